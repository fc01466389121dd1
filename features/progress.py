"""The type of a callback that reports progress."""

from __future__ import annotations

from collections.abc import Callable

# Called with (stage, done, total), such as ("extract", 320, 2000); total is 0 where it is not known.
Progress = Callable[[str, int, int], None]
