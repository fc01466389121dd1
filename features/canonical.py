"""One text and one digest for one value, and the check that a word is one of a closed list."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from features.errors import ConfigurationError, nearest


def canonical_json(value: Any) -> str:
    """Sorted keys, no spaces, ASCII only, no NaN: one text for one value.

    Examples
    --------
    >>> canonical_json({"b": 1, "a": [1.5, None]})
    '{"a":[1.5,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest_of(value: Any) -> str:
    """Hexadecimal sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def check_choice(field: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ConfigurationError, naming the nearest, if ``value`` is none of the known ones."""
    if value not in known:
        raise ConfigurationError(
            f"{field}: received {value!r}, expected one of {', '.join(known)}{nearest(str(value), known)}"
        )
