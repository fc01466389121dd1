"""The mistakes of a run, with small pictures where its images are still there.

run --> predictions of validation --> surest mistakes --> lines, pictures
"""

from __future__ import annotations

from typing import Any

from features.files import printable
from pipeline.runs.folder import Run


def mistakes_of(run: Run) -> list[dict[str, Any]]:
    """List the validation images that the run is most sure and wrong about: ``file``, ``label``, ``predicted``, ``confidence``."""
    from pipeline.reporting.data import Rows, most_confident_mistakes

    rows = Rows.of(run)
    return [
        {
            "file": printable(rows.paths[number]),
            "label": printable(rows.classes[rows.labels[number]]),
            "predicted": printable(rows.classes[rows.probabilities[number].argmax()]),
            "confidence": float(rows.confidence[number]),
        }
        for number in most_confident_mistakes(rows)
    ]


def pictures_of(run: Run) -> list[str]:
    """Pictures of the same images as data of an address (``data:``); empty where an image has gone or changed."""
    from pipeline.reporting.data import Rows, most_confident_mistakes
    from pipeline.reporting.thumbnails import Pictures

    rows = Rows.of(run)
    wanted = [(rows.paths[number], rows.sha256[number]) for number in most_confident_mistakes(rows)]
    shown = Pictures([run.source], rows.paths, run.reading, run.recipe.pixels)
    return [str(picture or "") for picture in shown.cards(wanted)]
