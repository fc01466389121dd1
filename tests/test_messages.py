"""A message is never longer than 1,000 characters, whatever a file or an option holds."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

import features.errors
from features.errors import LONGEST_MESSAGE, BottleneckError, brief
from pipeline.progress import StderrHandler


def errors(base: type[BottleneckError] = BottleneckError) -> Iterator[type[BottleneckError]]:
    yield base
    for kind in base.__subclasses__():
        yield from errors(kind)


@pytest.mark.parametrize("kind", sorted(set(errors()), key=lambda kind: kind.__name__))
def test_every_error_of_this_project_is_short(kind: type[BottleneckError]) -> None:
    text = str(kind(f"photos.h5: received {'config ' * 20_000}, expected numbers. Extract again."))
    assert len(text) == LONGEST_MESSAGE
    assert text.startswith("photos.h5: received config config")
    assert text.endswith(", expected numbers. Extract again.")
    assert str(kind("photos.h5: is missing")) == "photos.h5: is missing"


def test_all_errors_lie_in_one_module() -> None:
    assert {kind.__module__ for kind in errors()} == {features.errors.__name__}


def test_warnings_are_short_too() -> None:
    record = logging.LogRecord("x", logging.WARNING, "x.py", 1, "%s. Fix it.", ("y" * 100_000,), None)
    text = StderrHandler().format(record)
    assert len(text) == LONGEST_MESSAGE
    assert text.startswith("WARNING: yyyy")
    assert text.endswith("y. Fix it.")


@pytest.mark.parametrize("length", [0, 39, 40, 41, 1000])
def test_a_text_keeps_its_beginning_and_its_end(length: int) -> None:
    text = "".join(chr(97 + number % 26) for number in range(length))
    short = brief(text, 40)
    assert len(short) == min(length, 40)
    assert text.startswith(short[:20])
    assert text.endswith(short[-14:])
