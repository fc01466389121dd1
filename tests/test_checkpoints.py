"""Checkpoints: whole or absent, bound to their configuration; a killed training goes on where it was."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetuning import TinyWorld, killed_training, tiny_world, weights_of_run
from helpers import STRESS, listing

from features.errors import RunError, StoreError
from pipeline.tuning.checkpoints import Checkpoint, State, checkpoint_path

tiny = tiny_world
CONFIGURATION = {"start": "dense-0123456789", "epochs": 3, "seed": 0}


def a_state(epoch: int = 2) -> State:
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3) + epoch, np.array(7, np.int64)]
    scores = {"accuracy": 0.9, "accuracy_interval": [0.8, 1.0], "roc_auc": None, "log_loss": 1 / 3}
    history = {"epoch": [0, 1, 2][: epoch + 1], "loss": [0.7, 0.1 + 0.2, 0.5][: epoch + 1]}
    return State(epoch, history, scores, scores, 1, 0.25, arrays, arrays[1:], arrays)


def test_what_is_saved_comes_back_exactly(tmp_path: Path) -> None:
    checkpoint = Checkpoint(checkpoint_path(tmp_path, "finetune-dense-1"), CONFIGURATION)
    assert checkpoint.load(a_state()) is None
    checkpoint.save(a_state(1))
    checkpoint.save(a_state(2))
    assert listing(tmp_path) == [".finetune-dense-1.checkpoint"]
    found, expected = checkpoint.load(a_state(0)), a_state(2)
    assert found is not None
    for name in ("epoch", "history", "before", "best", "waited", "lowest"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("variables", "optimizer", "kept"):
        for one, other in zip(getattr(found, name), getattr(expected, name), strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            np.testing.assert_array_equal(one, other)
    checkpoint.remove()
    assert listing(tmp_path) == []


def test_a_checkpoint_of_another_configuration_is_refused_with_what_differs(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, "a")
    Checkpoint(path, CONFIGURATION).save(a_state())
    other = Checkpoint(path, {**CONFIGURATION, "epochs": 5, "optimizer": "sgd"})
    with pytest.raises(RunError, match=r"configuration \(epochs: 3 -> 5; optimizer: default -> sgd\).*remove it"):
        other.load(a_state())
    shorter = a_state(0)
    shorter.variables = shorter.variables[:1]
    with pytest.raises(RunError, match="network with other variables"):
        Checkpoint(path, CONFIGURATION).load(shorter)
    beside = Checkpoint(checkpoint_path(tmp_path, "b"), {**CONFIGURATION, "seed": 1})
    assert beside.others() == [f"{path} (seed: 0 -> 1)"]
    assert Checkpoint(checkpoint_path(tmp_path, "b"), {"start": "another"}).others() == []


def test_a_damaged_checkpoint_is_said_and_training_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = Checkpoint(checkpoint_path(tmp_path, "a"), CONFIGURATION)
    checkpoint.save(a_state())
    whole = checkpoint.path.read_bytes()
    with np.load(checkpoint.path) as file:
        arrays = {name: file[name] for name in file.files}
    flipped = bytearray(whole)
    flipped[whole.index(b"variables_0.npy") + 180] ^= 1
    for content in (b"", b"no archive", whole[: len(whole) // 2], bytes(flipped)):
        checkpoint.path.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert checkpoint.load(a_state(0)) is None
        assert "is damaged" in caplog.text

    def changed(**values: Any) -> np.ndarray:
        about = json.loads(arrays["about"].tobytes())
        about["state"] |= values
        return np.frombuffer(json.dumps(about).encode(), np.uint8)

    first = arrays["variables_0"]
    for tampered in (
        {"variables_0": np.full_like(first, np.nan)},
        {"kept_0": np.full_like(first, np.inf)},
        {"variables_0": first.astype(complex)},
        {"variables_0": np.full(first.shape, "x")},
        {"variables_0": np.full(first.shape, {}, object)},
        {"about": np.frombuffer(b"[" * 100_000, np.uint8)},
        {"about": np.frombuffer(json.dumps({"state": {}, "arrays": {}}).encode(), np.uint8)},
        *({"about": changed(epoch=epoch)} for epoch in ("2", -1, 1.5, 99)),
        *({"about": changed(best=best)} for best in ({}, [], {**a_state().best, "accuracy": "high"})),
        *({"about": changed(history=history)} for history in ({}, [1], {"epoch": [0, 1, 2], "loss": ["a", "b", "c"]})),
        *({"about": changed(**{name: None})} for name in ("before", "lowest", "waited", "further")),
    ):
        np.savez(checkpoint.path.open("wb"), **{**arrays, **tampered})  # type: ignore[arg-type]
        caplog.clear()
        assert checkpoint.load(a_state(0)) is None, tampered
        assert "is damaged" in caplog.text


def test_a_write_that_fails_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(checkpoint_path(tmp_path, "a"), CONFIGURATION)
    checkpoint.save(a_state(1))

    def full(stream: Any, **arrays: Any) -> None:
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(StoreError, match=r"\.a\.checkpoint: could not be written.*Make room"):
        checkpoint.save(a_state(2))
    monkeypatch.undo()
    assert listing(tmp_path) == [".a.checkpoint"]
    found = checkpoint.load(a_state(0))
    assert found is not None
    assert found.epoch == 1
    (tmp_path / "..a.checkpoint.0123abcd.tmp").write_bytes(b"of a killed process")
    assert checkpoint.load(a_state(0)) is not None
    assert listing(tmp_path) == [".a.checkpoint"]


SETTINGS = {
    "epochs": 5,
    "patience": 0,
    "learning_rate": 1e-2,
    "batch_size": 8,
    "bn": "affine",
    "augment": "flip-rotation",
    "schedule": "cosine",
    "warmup_epochs": 0.5,
    "class_weight": "balanced",
    "unfreeze": "conv_2",
}


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.pain(8)
def test_pain_08_a_training_that_was_killed_again_and_again_is_the_uninterrupted_one(
    tiny: TinyWorld, tmp_path: Path
) -> None:
    runs = tmp_path / "killed"
    chance = random.Random(0)
    finished = 0
    kills = (1, 2, 3, 4, 5) if STRESS else (2, 5)  # epochs in which the process is killed; the last one is left alone
    for epoch in (*kills, None):
        step = chance.randrange(8, 64, 8)
        code, first, last, errors = killed_training(tiny.run, tiny.images, runs, SETTINGS, f"epoch {epoch}/5 {step}")
        assert first.startswith(f"epoch {finished + 1}/5 "), errors
        if epoch is not None:
            assert code == -9, errors
            assert [name for name in listing(runs) if not name.startswith(".")] == []
            finished = epoch - 1
        else:
            assert (code, last) == (0, "resumed 4\n"), errors
    (killed,) = listing_of_runs(runs)
    document = tiny.finetune(runs=tmp_path / "whole", **SETTINGS)
    assert document["resumed"] is None
    assert Path(document["run"]).name == killed.name
    assert (killed / "history.csv").read_text().count("\n") == 7
    columns = [
        np.loadtxt(folder / "history.csv", delimiter=",", skiprows=1) for folder in (killed, Path(document["run"]))
    ]
    np.testing.assert_allclose(*columns, rtol=1e-3)
    mine, theirs = weights_of_run(killed), weights_of_run(document["run"])
    start = weights_of_run(tiny.run)
    moved = [name for name in theirs if not np.array_equal(theirs[name], start[name])]
    assert len(moved) == 8  # kernel, gamma and beta of two blocks, and the head: else nothing would be compared
    for name in theirs:
        assert np.linalg.norm(mine[name] - theirs[name]) <= 1e-3 * np.linalg.norm(theirs[name]), name


def listing_of_runs(runs: Path) -> list[Path]:
    """The folder's content, which must be runs only."""
    found = sorted(runs.iterdir())
    assert all(path.name.startswith("finetune-") for path in found), found
    return found


@pytest.mark.slow
def test_ctrl_c_leaves_a_training_that_goes_on_and_another_one_is_said(
    tiny: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "epoch 3/4":
            raise KeyboardInterrupt

    settings = {"epochs": 4, "patience": 0, "learning_rate": 1e-3, "runs": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        tiny.finetune(progress=interrupt, **settings)
    (left,) = listing(tmp_path)
    assert left.endswith(".checkpoint")
    with caplog.at_level(logging.WARNING):
        tiny.finetune(**{**settings, "epochs": 1})
    assert "interrupted training with other settings" in caplog.text
    assert "(epochs: 4 -> 1)" in caplog.text
    assert tiny.finetune(**settings)["resumed"] == 2
    assert len(listing_of_runs(tmp_path)) == 2
    done = next(path for path in tmp_path.iterdir() if (path / "history.csv").read_text().count("\n") == 6)
    checkpoint_path(tmp_path, done.name).write_bytes(b"of a process that was killed before it removed it")
    for name in ("lock", "writer"):
        (tmp_path / f".{done.name}.{name}").write_text("process 1 on here")
    assert tiny.finetune(**settings)["cached"]
    assert len(listing_of_runs(tmp_path)) == 2
