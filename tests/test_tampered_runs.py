"""Run folders from elsewhere: ten that were tampered with, none executes anything, each refused with the file's name."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_train_head import make_store

from features.errors import BottleneckError
from pipeline.heads.kinds import head_of
from pipeline.runs.board import leaderboard, take_run
from pipeline.runs.folder import Run, read_predictions
from pipeline.stages.predict import predict
from pipeline.stages.train_head import train_head

pytestmark = [
    pytest.mark.slow,  # trains and writes run folders
    pytest.mark.filterwarnings("ignore:Skipping nested container"),
]

FOREST = "sklearn.ensemble.RandomForestClassifier"
HISTOGRAM = "sklearn.ensemble.HistGradientBoostingClassifier"


class Bomb:
    """What pickle would call on the way in."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.proof}",)


def pickled(proof: Path) -> bytes:
    import pickle

    return pickle.dumps(Bomb(proof))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def object_array(proof: Path) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Bomb(proof)], dtype=object), allow_pickle=True)
    return stream.getvalue()


def rewrite(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Write all members of an archive anew, each as ``change`` makes it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


def pickled_members(folder: Path, proof: Path) -> None:
    """Arrays of the file replaced by an array of objects, which NumPy would unpickle if it were let."""
    rewrite(folder / "head.npz", lambda name, data: object_array(proof))


def endless_tree(folder: Path, proof: Path) -> None:
    """A tree whose root is its own child: prediction would never end."""
    with np.load(folder / "head.npz") as archive:
        arrays = dict(archive)
    arrays["left"][0] = 0
    np.savez(folder / "head.npz", **arrays)  # type: ignore[arg-type]


def pickle_in(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, proof: (folder / name).write_bytes(pickled(proof)) and None


def no_weights(folder: Path, proof: Path) -> None:
    """A whole HDF5 file with nothing in it: Keras would keep the new weights, and warn."""
    import h5py

    h5py.File(folder / "head.weights.h5", "w").close()


def some_weights(folder: Path, proof: Path) -> None:
    """The kernel is there, under another name."""
    import h5py

    with h5py.File(folder / "head.weights.h5", "a") as file:
        file.move("layers/dense", "layers/dense_7")


def linked_weights(folder: Path, proof: Path) -> None:
    """The kernel lies in another file."""
    import h5py

    other = folder / "other.h5"
    with h5py.File(folder / "head.weights.h5", "a") as file:
        with h5py.File(other, "w") as target:
            file.copy("layers/dense", target)
        del file["layers/dense"]
        file["layers/dense"] = h5py.ExternalLink(str(other), "/dense")


def other_weights(folder: Path, proof: Path) -> None:
    """Weights of another shape."""
    import keras

    model = keras.Sequential([keras.Input((9,)), keras.layers.Dense(1)])
    model.save_weights(folder / "head.weights.h5")


TAMPERED: dict[str, tuple[str, Callable[[Path, Path], None], str]] = {
    "arrays that are pickled": (FOREST, pickled_members, r"head\.npz: cannot be loaded as a head"),
    "arrays that are a pickle": (FOREST, pickle_in("head.npz"), r"head\.npz: cannot be loaded as a head"),
    "a tree without end": (FOREST, endless_tree, r"head\.npz: .*a child comes before its parent"),
    "head.json with an unknown key": (
        FOREST,
        lambda folder, _: edit_json(folder / "head.json", on_load="touch"),
        r"head\.json: unknown key 'on_load'",
    ),
    "head.json that names another class": (
        FOREST,
        lambda folder, _: edit_json(folder / "head.json", kind="os.system"),
        r"head\.json: kind is 'os\.system'",
    ),
    "config.yaml with a Python object": (
        FOREST,
        lambda folder, proof: (
            (folder / "config.yaml").write_text(f"!!python/object/apply:os.system ['touch {proof}']") and None
        ),
        r"config\.yaml: not valid YAML",
    ),
    "config.yaml that points outside": (
        FOREST,
        lambda folder, _: (
            (folder / "config.yaml").write_text(
                (folder / "config.yaml").read_text().replace("- head.npz", "- ../../head.npz")
            )
            and None
        ),
        r"config\.yaml: model\.1: received '\.\./\.\./head\.npz'",
    ),
    "metrics.json that is a pickle": (FOREST, pickle_in("metrics.json"), r"metrics\.json: cannot be read"),
    "environment.json that is a pickle": (FOREST, pickle_in("environment.json"), r"environment\.json: cannot be read"),
    "weights of another shape": ("dense", other_weights, r"head\.weights\.h5: the weights do not fit head\.json"),
    "no weights": ("dense", no_weights, r"head\.weights\.h5: the weights do not fit head\.json"),
    "weights of another name": ("dense", some_weights, r"head\.weights\.h5: the weights do not fit head\.json"),
    "weights in another file": ("dense", linked_weights, r"head\.weights\.h5: .*behind a soft or external link"),
    "head.json with a layer of 40 TB": (
        "dense",
        lambda folder, _: edit_json(folder / "head.json", hidden=[10**12], activation="relu"),
        r"head\.weights\.h5: the weights do not fit head\.json.* 2 layers in a file of",
    ),
    "weights that are a pickle": ("dense", pickle_in("head.weights.h5"), r"head\.weights\.h5: the weights do not fit"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    params: dict[str, dict[str, Any]] = {
        FOREST: {"n_estimators": 3},
        "dense": {"epochs": 1},
        HISTOGRAM: {"max_iter": 3},
    }
    return {name: train_head(make_store(), name, runs=root, params=params[name]).folder for name in params}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_run_is_refused_by_name_and_executes_nothing(
    case: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    head, tamper, message = TAMPERED[case]
    folder, proof = tmp_path / "runs" / whole[head].name, tmp_path / "proof"
    shutil.copytree(whole[head], folder)
    head_of(Run.open(folder))
    tamper(folder, proof)
    with pytest.raises(BottleneckError, match=message) as refused:
        head_of(Run.open(folder))
    assert str(folder) in str(refused.value)
    for act in (lambda: head_of(take_run(folder).run), lambda: predict(folder, tmp_path)):
        with pytest.raises(BottleneckError):
            act()
    leaderboard(tmp_path / "runs")
    assert not proof.exists()


def test_a_pickle_in_any_file_of_a_run_never_executes(whole: dict[str, Path], tmp_path: Path) -> None:
    for original in whole.values():
        for path in sorted(item.relative_to(original) for item in original.rglob("*") if item.is_file()):
            folder, proof = tmp_path / "runs" / original.name, tmp_path / "proof"
            shutil.copytree(original, folder)
            (folder / path).write_bytes(pickled(proof))
            for act in (
                lambda folder=folder: head_of(Run.open(folder)),
                lambda folder=folder: read_predictions(Run.open(folder)),
                lambda folder=folder: leaderboard(folder.parent),
            ):
                with contextlib.suppress(BottleneckError):
                    act()
            assert not proof.exists(), path
            shutil.rmtree(folder)
