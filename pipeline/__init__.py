"""The application: three stages and what is around them. ``python -m pipeline --help``.

    commands --> stages --> sweeps tuning exporting predicting reporting cluster --> search --> heads --> runs --> scores

Each folder is a room with a docstring that says what may be imported from it; README.md has the map. ``stages`` holds the
stages; experiments runs several of them from one file. config, presets, outputs, progress, streams and tables are the
ground, used by all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    import features

    return features.__version__
