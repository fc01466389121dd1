"""What is wrong with the images and labels of a store: checks, each of which gives every image a score.

    store --`Material`, computed once--> checks --`Finding` each--> table, audit.csv, labels.csv, a section of the report

May import labels, search, sweeps, heads and below. From Python: ``from pipeline.auditing import audit``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.auditing.stage import Audit, audit

__all__ = ["Audit", "audit"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pipeline.auditing' has no attribute {name!r}")
    from pipeline.auditing import stage

    return getattr(stage, name)
