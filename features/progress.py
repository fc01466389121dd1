"""The type of a callback that reports progress, and how durations and numbers of things are told."""

from __future__ import annotations

from collections.abc import Callable

# Called with (stage, done, total), such as ("extract", 320, 2000); total is 0 where it is not known.
Progress = Callable[[str, int, int], None]
PLURALS = {"is": "are", "has": "have", "does": "do", "lies": "lie"}


def duration(seconds: float) -> str:
    """Format a rough number of seconds for a person.

    Examples
    --------
    >>> duration(0.2), duration(48), duration(200), duration(9000)
    ('1 s', '50 s', '3 minutes', '2.5 hours')
    """
    if seconds < 90:
        return f"{max(1, round(seconds)) if seconds < 10 else round(seconds, -1):.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def counted(count: int, noun: str, verb: str = "") -> str:
    """Format a number of things, with the plural of the noun; of a verb in the singular, such as ``has``, too.

    Examples
    --------
    >>> counted(1, "run"), counted(1500, "image"), counted(2, "class")
    ('1 run', '1,500 images', '2 classes')
    >>> counted(1, "file", "does"), counted(2, "file", "does")
    ('1 file does', '2 files do')
    """
    if verb:
        return f"{counted(count, noun)} {verb if count == 1 else PLURALS[verb]}"
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"
