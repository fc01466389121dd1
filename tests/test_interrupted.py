"""An interrupted cell: whatever a function was doing, nothing half-written is left, and the same call again gives what it would have given."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetuning import SIZE, TinyWorld, tiny_world
from helpers import STRESS, listing
from PIL import Image

import pipeline
from pipeline.api.results import Result

pytestmark = pytest.mark.slow
world = tiny_world
HEADS = [
    {"head": "logistic", "grid": {"C": [0.01, 1.0]}},
    {"head": "dropout-linear", "grid": {"epochs": [2]}},
    {"head": "knn"},
]
TIMES = {"seconds", "fit_seconds", "minutes", "images_per_second", "chosen"}  # the last: the fastest of equals
TOLD_OF_THE_FIRST = {"trained", "cached", "resumed", "inferred"}
WITH_TIMES = {"environment.json", "README.md", "speeds.json", "backbone.keras", "c.png"}
Told = Callable[[str, int, int], None]


def train_head(world: TinyWorld, told: Told) -> Result:
    return pipeline.train_head(world.store, "dropout-linear", params={"epochs": 4}, progress=told)


def train_heads(world: TinyWorld, told: Told) -> Result:
    return pipeline.train_heads(
        world.store, {"version": 1, "heads": HEADS}, n_jobs=2 if STRESS else 1, folds=0, progress=told
    )


def finetune(world: TinyWorld, told: Told) -> Result:
    steps: dict[str, Any] = {"epochs": 4, "patience": 0, "learning_rate": 1e-3}
    return pipeline.finetune(world.run, world.images, runs="runs", progress=told, **steps)


def predict(world: TinyWorld, told: Told) -> Result:
    return pipeline.predict(world.run, world.images, out="p.csv", grid="p.png", batch_size=16, progress=told)


def audit(world: TinyWorld, told: Told) -> Result:
    return pipeline.audit(
        world.store, images=world.images, out="audit.csv", labels="labels.csv", apply=True, progress=told
    )


def similar(world: TinyWorld, told: Told) -> Result:
    Image.fromarray(np.full((SIZE, SIZE, 3), 90, np.uint8)).save("new.png")
    return pipeline.similar(world.store, ["new.png"], k=3, out="similar.csv", grid="similar.png", progress=told)


def compare_networks(world: TinyWorld, told: Told) -> Result:
    networks = [str(world.backbone)]
    return pipeline.compare_networks(world.images, networks, stores="stores", out="c.png", batch_size=8, progress=told)


def report(world: TinyWorld, told: Told) -> Result:
    return pipeline.report(world.run.parent, "report.html", progress=told)


CALLS = [train_head, train_heads, finetune, predict, audit, similar, compare_networks, report]
RESUMED_FROM = {  # what an interrupted call leaves for the next one
    "finetune": r"runs/\.[\w-]+\.checkpoint|runs",
    "compare_networks": r"stores(/[\w.-]+\.h5\.parts(/.*)?)?",
}


def plain(value: Any) -> Any:
    """Without times, and without what tells that the call was not the first."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items() if name not in TIMES | TOLD_OF_THE_FIRST}
    return [plain(item) for item in value] if isinstance(value, list) else value


def changed(folder: Path, whole: Path) -> list[str]:
    """Files of ``folder`` that are not those of ``whole``."""

    def content(path: Path) -> Any:
        return plain(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()

    names = [name for name in listing(whole) if (whole / name).is_file() and Path(name).name not in WITH_TIMES]
    return [name for name in names if content(folder / name) != content(whole / name)]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_the_same_call_again_gives_what_an_uninterrupted_one_gives(
    call: Callable[[TinyWorld, Told], Result],
    world: TinyWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    def told(moment: int | None) -> tuple[Told, list[str]]:
        stages: list[str] = []

        def tell(stage: str, done: int, total: int) -> None:
            stages.append(stage)
            if len(stages) == moment:
                raise KeyboardInterrupt

        return tell, stages

    def at(place: Path) -> Path:
        place.mkdir()
        monkeypatch.chdir(place)
        return place

    tell, stages = told(None)
    whole = at(tmp_path / "whole")
    expected = call(world, tell).to_dict()
    last = len(stages)
    for moment in {1, last // 2 + 1, last} if STRESS else {last // 2 + 1, last}:
        place = at(tmp_path / f"at-{moment}")
        with pytest.raises(KeyboardInterrupt) as _kept:  # as a notebook keeps the last traceback, and all it refers to
            call(world, told(moment)[0])
        left = set(listing(place)) - set(listing(whole))
        pattern = RESUMED_FROM.get(call.__name__, "nothing")
        assert [name for name in left if not re.fullmatch(pattern, name)] == [], moment
        again = call(world, told(None)[0]).to_dict()
        assert plain(again) == plain(expected), moment
        assert listing(place) == listing(whole), moment
        assert changed(place, whole) == [], moment
    assert [str(one.message) for one in recwarn if "processed by the workers" in str(one.message)] == []
