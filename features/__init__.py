"""Images in, trustworthy feature arrays out.

    sources --> pixels --+--> extraction --> store            transformer: the same for scikit-learn
    networks ------------+

Each folder is a room; its docstring says what lives there and what it may import. The modules beside this file are
the ground, which every room may import. README.md has a map of the rooms, and FORMAT.md specifies the store. The public
names below are loaded on first use, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from features.augmentation import AugmentSpec
    from features.errors import BottleneckError
    from features.extraction.extraction import extract_features
    from features.recipe import PixelRule, Recipe
    from features.store.reader import FeatureStore
    from features.transformer import FeatureExtractor
    from pipeline.api.looking import compare_networks

    __version__: str

__all__ = [
    "AugmentSpec",
    "BottleneckError",
    "FeatureExtractor",
    "FeatureStore",
    "PixelRule",
    "Recipe",
    "compare_networks",
    "extract_features",
]

_HOMES = {
    "AugmentSpec": "features.augmentation",
    "BottleneckError": "features.errors",
    "FeatureExtractor": "features.transformer",
    "FeatureStore": "features.store.reader",
    "PixelRule": "features.recipe",
    "Recipe": "features.recipe",
    "compare_networks": "pipeline.api.looking",  # its verdict needs heads
    "extract_features": "features.extraction.extraction",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from features.machine import installed_version

        return installed_version("bottleneck-features", "0+unknown")  # a version that sorts before every release
    if name not in _HOMES:
        raise AttributeError(f"module 'features' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
