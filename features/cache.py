"""Where this project keeps what it may throw away: converted weights, memos, compiled models, the sample."""

from __future__ import annotations

import os
from pathlib import Path

from features.errors import ConfigurationError

FOLDER_NAME = "bottleneck-features"


def cache_folder() -> Path:
    """The user's cache folder, absolute. It is not made here; whoever writes into it makes it.

    ``BOTTLENECK_CACHE`` if set, else ``$XDG_CACHE_HOME/bottleneck-features``, else
    ``~/.cache/bottleneck-features`` (XDG Base Directory Specification 0.8, which also says that a
    relative ``XDG_CACHE_HOME`` is to be ignored).

    Raises
    ------
    ConfigurationError
        If there is no home folder to put it in.
    """
    try:
        if own := os.environ.get("BOTTLENECK_CACHE"):
            return Path(own).expanduser().absolute()
        shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (shared if shared.is_absolute() else Path.home() / ".cache") / FOLDER_NAME
    except RuntimeError as error:
        raise ConfigurationError(f"no home folder for the cache ({error}); set BOTTLENECK_CACHE to a folder") from error
