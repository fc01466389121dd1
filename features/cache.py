"""Where this project keeps what it may throw away: converted weights, memos, compiled models."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$BOTTLENECK_CACHE``, else ``$XDG_CACHE_HOME/bottleneck-features``, else ``~/.cache/bottleneck-features``.

    The folder is not made here; whoever writes into it makes it.
    """
    own = os.environ.get("BOTTLENECK_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "bottleneck-features"
