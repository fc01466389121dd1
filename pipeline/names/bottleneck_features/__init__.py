"""``import bottleneck_features as bf``: all names of ``features`` and ``pipeline`` in one module, whose own name nobody takes.

Examples
--------
>>> import bottleneck_features as bf
>>> bf.extract_features.__module__, bf.predict.__module__
('features.extraction.extraction', 'pipeline.api.models')
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pipeline

if "train_head" not in getattr(pipeline, "__all__", ()):
    raise ImportError(
        f"{pipeline.__file__} hides the package pipeline of bottleneck-features, because Python looks beside the notebook or "
        "script first; rename it"
    )
import features

if TYPE_CHECKING:
    from features import *  # noqa: F403
    from pipeline import *  # noqa: F403

__all__ = sorted({*features.__all__, *pipeline.__all__})


def __getattr__(name: str) -> Any:
    if name == "__version__" or name in features.__all__:
        return getattr(features, name)
    if name in pipeline.__all__:
        return getattr(pipeline, name)
    raise AttributeError(f"module 'bottleneck_features' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
