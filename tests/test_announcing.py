"""A long extraction is announced once, after its first batches or by a dry run, with what would be faster here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import NumpyNetwork, extract, paint_folder, recipe

from features.extraction import announcing
from features.extraction.announcing import Announcer, announcement
from features.extraction.extraction import Extraction
from features.extraction.options import ExtractionOptions
from features.sources.scan import scan
from pipeline.stages import extract as stage


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """A processor with bfloat16 and OpenVINO, no NNCF and no GPU; a test may change that."""
    has = {"bfloat16": True, "openvino": True, "nncf": False, "gpu": False}
    monkeypatch.setattr(announcing, "has_bfloat16", lambda: has["bfloat16"])
    monkeypatch.setattr(announcing, "is_installed", lambda: has["openvino"])
    monkeypatch.setattr(announcing, "can_quantise", lambda: has["nncf"])
    monkeypatch.setattr(announcing, "may_have_gpu", lambda device: has["gpu"])
    return has


def said(seconds: float = 7200, backbone: str = "vgg16", **options: Any) -> str:
    network = NumpyNetwork([recipe(backbone=backbone)])
    network.backbone_argument = backbone
    return announcement(network, ExtractionOptions(**options), 36_000, seconds)


BFLOAT = "--precision bfloat16, in about half the time if the network takes most of it"
INT8 = "--precision int8, mostly faster still (--check-precision 1000 tells what it costs in accuracy)"
SMALLER = "a smaller network (--backbone mobilenetv2; bottleneck compare tells what it costs in accuracy)"
FAST = "--decode fast for large JPEGs"


def test_a_long_extraction_is_announced_with_what_would_be_faster() -> None:
    head = "vgg16 takes about 2.0 hours for 36,000 images, 5.0 a second"
    assert said() == f"{head}; faster here: {BFLOAT}, or {SMALLER}, or {FAST}"
    assert said(precision="bfloat16") == f"{head}; faster here: {SMALLER}, or {FAST}"
    assert said(precision="bfloat16", decode="fast", backbone="mobilenetv2") == head.replace("vgg16", "mobilenetv2")
    assert (said(1799), said(1800) != "") == ("", True)


@pytest.mark.parametrize(("lacking", "value"), [("bfloat16", False), ("openvino", False), ("gpu", True)])
def test_bfloat16_is_offered_only_where_it_is_faster(machine: dict[str, bool], lacking: str, value: bool) -> None:
    machine[lacking] = value
    assert BFLOAT not in said()
    assert SMALLER in said()


def test_int8_is_offered_where_it_can_be_made_and_is_faster(machine: dict[str, bool]) -> None:
    machine["nncf"] = True
    head = "vgg16 takes about 2.0 hours for 36,000 images, 5.0 a second"
    assert said() == f"{head}; faster here: {BFLOAT}, or {INT8}, or {SMALLER}, or {FAST}"
    assert said(precision="bfloat16") == f"{head}; faster here: {INT8}, or {SMALLER}, or {FAST}"
    assert all(INT8 not in said(**other) for other in ({"precision": "float16"}, {"engine": "keras"}))
    assert INT8 not in said(precision="int8", quantised="q.int8")
    machine["bfloat16"] = False
    assert said() == f"{head}; faster here: {INT8}, or {SMALLER}, or {FAST}"
    for lacking, value in (("gpu", True), ("openvino", False)):
        machine[lacking] = value
        assert INT8 not in said()


def announced(caplog: pytest.LogCaptureFixture, batches: list[tuple[float, int]], images: int) -> list[str]:
    """What an announcer says of batches, each finished at a time in seconds."""
    times: Iterator[float] = iter([time for time, _ in batches])
    network = NumpyNetwork([recipe(backbone="vgg16")])
    announce = Announcer(network, ExtractionOptions(), images, clock=lambda: next(times))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        for _, count in batches:
            announce(count)
    return [record.getMessage().partition(";")[0] for record in caplog.records]


def test_the_first_batch_is_not_measured(caplog: pytest.LogCaptureFixture) -> None:
    """It ends after 100 s, as it starts the engine; then come 4 images a second."""
    batches = [(100.0, 32), (104.0, 16), (108.0, 16), (112.0, 16)]
    assert announced(caplog, batches, 14_400) == ["numpy takes about 60 minutes for 14,400 images, 4.0 a second"]


def test_a_short_run_says_nothing_and_a_long_one_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    assert announced(caplog, [(0.0, 32), (20.0, 80)], 7_000) == []  # 29 minutes
    assert announced(caplog, [(0.0, 32), (8.0, 32), (9.0, 4)], 10**6) == []  # it ended before 10 s were measured
    assert len(announced(caplog, [(0.0, 32), (20.0, 80), (40.0, 80), (60.0, 80)], 7_300)) == 1


@pytest.mark.slow
def test_a_run_and_a_dry_run_announce(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = paint_folder(tmp_path / "images", {"cat": 12, "dog": 12})
    extract(source, tmp_path / "short.h5")
    assert "takes about" not in caplog.text
    monkeypatch.setattr(announcing, "LONG", 0.0)
    monkeypatch.setattr(announcing, "MEASURED", 0.0)
    extract(source, tmp_path / "f.h5", shard_rows=4)
    [line] = [record.getMessage() for record in caplog.records if "takes about" in record.getMessage()]
    assert line.startswith("numpy takes about 1 s for 24 images")
    assert line.endswith(". Ctrl-C keeps what is finished")
    caplog.clear()

    def prepared(images: str, out: Path, options: ExtractionOptions, **_: object) -> Extraction:
        return Extraction(scan(images), NumpyNetwork(), out, options)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "prepare", prepared)
    stage.plan(str(source), tmp_path / "none.h5", ExtractionOptions())
    assert "numpy takes about 1 s for 24 images" in caplog.text
    caplog.clear()
    stage.plan(str(source), tmp_path / "none.h5", ExtractionOptions(), cluster="local:2")
    assert "takes about" not in caplog.text  # the forecast is for this machine
