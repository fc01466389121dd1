"""The application: three stages and what is around them. ``python -m pipeline --help``; from Python, the functions below.

    commands --> api --> stages --> sweeps tuning exporting predicting reporting cluster --> search --> heads --> runs --> scores

Each folder is a room with a docstring that says what may be imported from it; README.md has the map. ``stages`` holds the
stages, ``api`` the functions that stand at this door; experiments runs several stages from one file. config, presets,
outputs, progress, streams and tables are the ground, used by all.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import features

if "extract_features" not in getattr(features, "__all__", ()):
    raise ImportError(
        f"{features.__file__} hides the package features of bottleneck-features, because Python looks beside the notebook or "
        "script first; rename it"
    )
if TYPE_CHECKING:
    from pipeline.api.classifier import BottleneckClassifier
    from pipeline.api.heads import leaderboard, open_run, report, train_head, train_heads
    from pipeline.api.looking import audit, compare_networks, similar, suggest
    from pipeline.api.models import evaluate, export, finetune, predict

    __version__: str

__all__ = [
    "BottleneckClassifier",
    "audit",
    "compare_networks",
    "evaluate",
    "export",
    "finetune",
    "leaderboard",
    "open_run",
    "predict",
    "report",
    "similar",
    "suggest",
    "train_head",
    "train_heads",
]
_HOMES = {
    "classifier": ("BottleneckClassifier",),
    "heads": ("leaderboard", "open_run", "report", "train_head", "train_heads"),
    "looking": ("audit", "compare_networks", "similar", "suggest"),
    "models": ("evaluate", "export", "finetune", "predict"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return features.__version__
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"pipeline.api.{home}"), name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
