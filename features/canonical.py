"""Canonical JSON of a value, its digest, and a check that a word is in a closed list."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from features.errors import ConfigurationError, nearest


def canonical_json(value: Any) -> str:
    """Return the canonical JSON of ``value``, the same text for equal values: sorted keys, no spaces, ASCII, no NaN.

    Examples
    --------
    >>> canonical_json({"b": 1, "a": [1.5, None]})
    '{"a":[1.5,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest_of(value: Any) -> str:
    """Return the hexadecimal sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def check_choice(field: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ``ConfigurationError`` unless ``value`` is one of ``known``; the message names the nearest."""
    if value not in known:
        raise ConfigurationError(
            f"{field}: received {value!r}, expected one of {', '.join(known)}{nearest(str(value), known)}"
        )
