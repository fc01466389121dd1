"""Heads from elsewhere: files that scikit-learn's own objects would follow outside their memory, or without end.

Each is made from a golden run and opened in a process of its own: it is refused by name, or predicts what it predicted. Nothing
crashes, executes, takes 10 seconds of the processor or 1.5 GB.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, rounds

from features.errors import BottleneckError
from features.machine import peak_memory
from pipeline.heads.kinds import load_head
from pipeline.heads.models import archive
from pipeline.runs.board import leaderboard

pytestmark = pytest.mark.slow  # starts a process

RUNS = ROOT / "tests" / "golden" / "runs"
NEAREST = "heads/knn-a366d1e6cc"
BALL_TREE = "heads/sklearn.neighbors.KNeighborsClassifier-09527d4c40"
FOREST = "heads/sklearn.ensemble.RandomForestClassifier-eef7315034"
HISTOGRAM = "pairs/sklearn.ensemble.HistGradientBoostingClassifier-cb1f7d8798"
VECTORS = "heads/sklearn.svm.SVC-ee2ff2acc2"
PCA = "heads/logistic-e2eac11460"
LAYERS = "pairs/sklearn.neural_network.MLPClassifier-a73e4b067a"
CALIBRATED = "pairs/sklearn.calibration.CalibratedClassifierCV-661dcdcb4d"
SECONDS, BYTES = 10, 1.5e9


class File:
    """A ``head.skops`` in memory: its schema and its other members."""

    def __init__(self, path: Path) -> None:
        with zipfile.ZipFile(path) as opened:
            self.members = {name: opened.read(name) for name in opened.namelist()}
        self.schema = json.loads(self.members.pop("schema.json"))

    def write(self, path: Path, compression: int = zipfile.ZIP_STORED) -> None:
        with zipfile.ZipFile(path, "w", compression) as opened:
            opened.writestr("schema.json", json.dumps(self.schema))
            for name, data in self.members.items():
                opened.writestr(name, data)

    def find(self, name: str, attribute: str) -> dict[str, Any]:
        """Attributes of the first object of a class that has one of this name."""
        found = (node["content"]["content"] for node in _nodes(self.schema) if node.get("__class__") == name)
        return next(attributes for attributes in found if attribute in attributes)

    def array(self, node: dict[str, Any]) -> np.ndarray:
        return np.load(io.BytesIO(self.members[node["file"]]))

    def put(self, node: dict[str, Any], values: np.ndarray) -> None:
        stream = io.BytesIO()
        np.save(stream, values)
        self.members[node["file"]] = stream.getvalue()


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _nodes(item)
    elif isinstance(value, list):
        for item in value:
            yield from _nodes(item)


Edit = Callable[[File], None]


def number(name: str, attribute: str, value: Any) -> Edit:
    """Replace a number or text."""

    def edit(file: File) -> None:
        file.find(name, attribute)[attribute]["content"] = json.dumps(value)

    return edit


def filled(name: str, attribute: str, value: float) -> Edit:
    """Replace all numbers of an array."""

    def edit(file: File) -> None:
        node = file.find(name, attribute)[attribute]
        file.put(node, np.full_like(file.array(node), value))

    return edit


def cut(name: str, attribute: str, part: Any) -> Edit:
    """Keep only a part of an array."""

    def edit(file: File) -> None:
        node = file.find(name, attribute)[attribute]
        file.put(node, file.array(node)[part])

    return edit


def nodes(name: str, **changes: tuple[int, int]) -> Edit:
    """Change fields of the nodes of the first tree: field=(node, value)."""

    def edit(file: File) -> None:
        node = file.find(name, "nodes")["nodes"]
        values = file.array(node)
        for field, (row, value) in changes.items():
            values[field][row] = value
        file.put(node, values)

    return edit


def chain(file: File) -> None:
    """A tree of 100,000 levels."""
    tree = file.find("Tree", "nodes")
    values = np.zeros(200_001, file.array(tree["nodes"]).dtype)
    values["left_child"] = values["right_child"] = -1
    rows = np.arange(0, 200_000, 2)
    values["left_child"][rows], values["right_child"][rows] = rows + 1, rows + 2
    file.put(tree["nodes"], values)
    file.put(tree["values"], np.full((len(values), 1, 3), 1 / 3))
    tree["node_count"]["content"] = str(len(values))


def wide_trees(file: File) -> None:
    """Trees of more classes than the forest has."""
    for node in _nodes(file.schema):
        if node.get("__class__") == "Tree":
            shape = file.array(node["content"]["content"]["values"]).shape
            file.put(node["content"]["content"]["values"], np.ones((shape[0], 1, 300)))


def declared(file: File) -> None:
    """An array that declares 8 TB and holds 8 bytes."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    node = file.find("KNeighborsClassifier", "_fit_X")["_fit_X"]
    file.members[node["file"]] = stream.getvalue() + bytes(8)


def deep(file: File) -> None:
    node: Any = {"__loader__": "JsonNode", "content": "1"}
    for _ in range(400):
        node = {"__loader__": "ListNode", "content": [node], "__class__": "list", "__module__": "builtins"}
    file.find("KNeighborsClassifier", "_fit_X")["_fit_X"] = node


def outside(file: File) -> None:
    file.find("KNeighborsClassifier", "_fit_X")["_fit_X"]["file"] = "../../../../etc/passwd"


def tree_of_rows(file: File) -> None:
    """The index of a ball tree, which scikit-learn follows: we do not read it."""
    state = next(node for node in _nodes(file.schema) if node.get("__class__") == "BallTree")
    for node in _nodes(state):
        if node.get("__loader__") == "NdArrayNode":
            values = file.array(node)
            file.put(node, np.full_like(values, 2**40) if values.dtype.kind == "i" else values)


# name -> golden run, what is done to it, and the message; None: it predicts what it predicted.
STRUCTURES: dict[str, tuple[str, Edit, str | None]] = {
    "labels of 10**8": (NEAREST, filled("KNeighborsClassifier", "_y", 10**8), "labels holds indices out of bounds"),
    "labels of 40,000": (NEAREST, filled("KNeighborsClassifier", "_y", 40_000), "labels holds indices out of bounds"),
    "more neighbours than rows": (NEAREST, number("KNeighborsClassifier", "n_neighbors", 10**9), "count is 1000000000"),
    "rows of fewer columns": (NEAREST, cut("KNeighborsClassifier", "_fit_X", np.s_[:, :2]), "rows has shape"),
    "an array that declares 8 TB": (NEAREST, declared, "8 bytes cannot be float64"),
    "an array outside the file": (NEAREST, outside, r"'\.\./\.\./\.\./\.\./etc/passwd' is missing"),
    "lists in lists": (NEAREST, deep, "_fit_X"),
    "a precomputed metric": (NEAREST, number("KNeighborsClassifier", "effective_metric_", "precomputed"), "--trust"),
    "a ball tree that leads outside": (BALL_TREE, tree_of_rows, None),
    "trees wider than classes": (FOREST, wide_trees, r"values has shape \(\d+, 300\), expected"),
    "a tree for more columns": (
        FOREST,
        nodes("Tree", feature=(0, 10**6)),
        "feature of inner nodes holds indices out of",
    ),
    "a tree without end": (FOREST, nodes("Tree", left_child=(0, 0)), "a child comes before its parent"),
    "a tree that leads outside": (FOREST, nodes("Tree", left_child=(0, 10**7)), "a tree has indices out of bounds"),
    "a node with two parents": (FOREST, nodes("Tree", right_child=(0, 1)), "a node has several parents, or none"),
    "a tree of 100,000 levels": (FOREST, chain, "a tree has more than 4096 levels"),
    "a histogram tree that leads outside": (
        HISTOGRAM,
        nodes("TreePredictor", left=(0, 10_000)),
        "indices out of bounds",
    ),
    "a histogram tree for more columns": (
        HISTOGRAM,
        nodes("TreePredictor", feature_idx=(0, 99)),
        "feature of inner nodes",
    ),
    "a histogram tree on categories": (HISTOGRAM, nodes("TreePredictor", is_categorical=(0, 1)), "--trust"),
    "a precomputed kernel": (VECTORS, number("SVC", "kernel", "precomputed"), "--trust"),
    "more support vectors than there are": (VECTORS, filled("SVC", "_n_support", 10**6), "counts holds indices out of"),
    "fewer coefficients than vectors": (VECTORS, cut("SVC", "_dual_coef_", np.s_[:, :3]), "dual has shape"),
    "components that are NaN": (
        PCA,
        filled("PCA", "components_", np.nan),
        "components holds values that are not finite",
    ),
    "layers that do not fit": (LAYERS, number("MLPClassifier", "activation", "eval"), "--trust"),
    "a calibration of more classes": (CALIBRATED, cut("LinearSVC", "coef_", np.s_[:, :1]), "coef has shape"),
}


def overlapping(path: Path) -> None:
    """A member of 1 MB that the table of contents names 2,000 times."""
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("0.npy", bytes(1 << 20))
        for copy in range(2_000):
            info = zipfile.ZipInfo(f"{copy + 1}.npy")
            info.file_size = info.compress_size = 1 << 20
            info.CRC, info.header_offset = opened.filelist[0].CRC, 0
            opened.filelist.append(info)
            opened.NameToInfo[info.filename] = info


def bomb(path: Path) -> None:
    """A schema of 400 MB in 400 kB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened, opened.open("schema.json", "w") as stream:
        for _ in range(400):
            stream.write(b"[" * (1 << 20))


def many_values(path: Path) -> None:
    """A schema of 5 million lists, stored as they are."""
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("schema.json", b"[" + b"[]," * 5_000_000 + b"[]]")


def many_members(path: Path) -> None:
    """An archive that is all table of contents."""
    data = b"PK\1\2" + bytes(42)
    end = b"PK\5\6" + bytes(4) + b"\xff\xff\xff\xff" + (10**6 * len(data)).to_bytes(4, "little") + bytes(6)
    path.write_bytes(data * 10**6 + end)


ARCHIVES: dict[str, tuple[Callable[[Path], None], str]] = {
    "members that overlap": (overlapping, "its members overlap"),
    "a compressed schema of 400 MB": (bomb, r"'schema\.json' is compressed"),
    "a schema of 5 million lists": (many_values, r"'schema\.json': holds more than 134217728 bytes or 3000000 values"),
    "a million members": (many_members, "its table of contents is missing or too large"),
    "a pickle": (
        lambda path: path.write_bytes(b"cposix\nsystem\n(S'true'\ntR.") and None,
        "table of contents is missing",
    ),
    "a folder": (lambda path: path.mkdir(), "there is no such file"),
}
# head.json of the format with arrays -> message.
DESCRIPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "models in models": ({"kind": "projected", "model": {"kind": "linear"}}, r"'components\.npy' is missing"),
    "10**12 arrays": (
        {"kind": "layers", "activation": "relu", "weights": 10**12, "biases": 1},
        r"'weights\.0\.npy' is missing",
    ),
    "an endless number": ({"kind": "boosting", "float32": True, "scale": 10**400}, "scale: received '1000"),
    "another field": ({"kind": "linear", "coef": [1, 2]}, "a linear has the keys coef, kind, expected kind"),
    "a list": ({"kind": ["linear"]}, r"kind is \"\['linear'\]\""),
}


def probabilities(folder: Path) -> np.ndarray:
    head = load_head(folder)
    Z = np.random.default_rng(0).normal(size=(40, *head.input_shape)).astype(np.float32)
    return head.predict_proba(Z)


def prepare(root: Path) -> dict[str, str | None]:
    """Make a folder of every case; its name -> the message."""
    expected: dict[str, str | None] = {}
    for name, (run, edit, message) in STRUCTURES.items():
        shutil.copytree(RUNS / run, root / name)
        file = File(root / name / "head.skops")
        edit(file)
        file.write(root / name / "head.skops")
        expected[name] = message
    for name, (write, message) in ARCHIVES.items():
        shutil.copytree(RUNS / NEAREST, root / name)
        (root / name / "head.skops").unlink()
        write(root / name / "head.skops")
        expected[name] = message
    for name, (values, message) in DESCRIPTIONS.items():
        shutil.copytree(RUNS / NEAREST, root / name)
        stored = json.loads((root / name / "head.json").read_text())
        (root / name / "head.json").write_text(json.dumps({**stored, "format": 2, "model": values, "chosen": {}}))
        fields = ("starts", "left", "right", "feature", "threshold", "missing", "values", "base")
        np.savez(root / name / "head.npz", **dict.fromkeys(fields, np.zeros(1)))  # type: ignore[arg-type]
        expected[name] = message
    return expected


def main(root: Path) -> None:
    """Open the head of every folder; print what came of it, and the memory that all of it took."""
    found: dict[str, Any] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        started = time.process_time()
        try:
            outcome: Any = probabilities(folder).tolist()
        except BottleneckError as problem:
            outcome = str(problem)
        found[folder.name] = [outcome, time.process_time() - started]
    print(
        json.dumps({"cases": found, "bytes": peak_memory(), "loaded": sorted({"sklearn", "skops"} & set(sys.modules))})
    )


def test_heads_that_would_lead_outside_their_memory(tmp_path: Path) -> None:
    expected = prepare(tmp_path)
    assert len(STRUCTURES) >= 16
    code = f"import sys\nsys.path[:0] = ['tests']\nimport test_hostile_heads as t\nt.main(t.Path({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout)
    assert answer["bytes"] < BYTES
    assert set(answer["cases"]) == set(expected)
    for name, message in expected.items():
        outcome, seconds = answer["cases"][name]
        assert seconds < SECONDS, name
        if message is None:
            golden = probabilities(RUNS / STRUCTURES[name][0])
            np.testing.assert_allclose(outcome, golden, rtol=0, atol=1e-12, err_msg=name)
        else:
            assert isinstance(outcome, str), name
            assert str(tmp_path / name) in outcome
            assert len(outcome) < 1000 + len(str(tmp_path))
            assert re.search(message, outcome), f"{name}: {outcome}"


def changed(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """An array with other bytes, another length, shape or type."""
    data = bytearray(values.tobytes())
    for at in draw.integers(max(1, len(data)), size=3 * (len(data) > 0)):
        data[at] = draw.integers(256)
    flipped = np.frombuffer(bytes(data), values.dtype).reshape(values.shape)
    plain = values if values.dtype.names is None else flipped
    choices = [flipped, values[None], np.full_like(plain, 7), plain.astype("U5") if plain is values else flipped]
    choices += [values[:-1], np.concatenate([values, values]), values.T] if values.ndim else []
    return choices[draw.integers(len(choices))]


def scrambled(schema: Any, draw: np.random.Generator) -> None:
    """A value of the schema replaced by another one, or by a text, number or nothing."""
    places = [(node, key) for node in _nodes(schema) for key in node]
    node, key = places[draw.integers(len(places))]
    other, where = places[draw.integers(len(places))]
    values = [None, -1, "NaN", "1e308", "100000000", [], json.loads(json.dumps(other[where]))]
    node[key] = values[draw.integers(len(values))]


@pytest.mark.stress
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numbers beyond all bounds
def test_heads_changed_at_random_are_refused_or_predict(tmp_path: Path) -> None:
    draw, runs, outcomes = np.random.default_rng(2), sorted(RUNS.glob("*/*/head.skops")), [0, 0]
    for number in range(rounds(2000)):
        run = runs[draw.integers(len(runs))].parent
        folder, file = tmp_path / str(number), File(run / "head.skops")
        shutil.copytree(run, folder)
        if draw.random() < 0.5:
            scrambled(file.schema, draw)
        else:
            name = sorted(file.members)[draw.integers(len(file.members))]
            file.put({"file": name}, changed(file.array({"file": name}), draw))
        file.write(folder / "head.skops")
        try:
            assert probabilities(folder).shape[0] == 40
            outcomes[0] += 1
        except BottleneckError:
            outcomes[1] += 1
        shutil.rmtree(folder)
    assert min(outcomes) > rounds(2000) // 10


def test_leaderboard_and_report_load_no_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.stages.report import make_report

    def refuse(*_: object) -> None:
        raise AssertionError("a head was opened")

    monkeypatch.setattr(archive.Archive, "__init__", refuse)
    for run in (NEAREST, FOREST, "heads/logistic-215049015c"):
        shutil.copytree(RUNS / run, tmp_path / Path(run).name)
    assert len(leaderboard(tmp_path)) == 3
    make_report(tmp_path, tmp_path / "report.html")


def test_predict_and_evaluate_load_objects_of_an_unsigned_file_only_if_they_are_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.cli import main as command

    shutil.copytree(RUNS, tmp_path / "here", ignore=shutil.ignore_patterns("heads", "pairs", "sweep", "exports"))
    monkeypatch.chdir(tmp_path / "here")
    train = ["train-head", "features.h5", "--head", "sklearn.naive_bayes.BernoulliNB", "--runs", "runs", "--json"]
    assert command(train) == 0
    run = Path(json.loads(capsys.readouterr().out)["run"])
    assert command(["predict", str(run), "images", "--out", "signed.csv"]) == 0
    (run / "head.skops.signature").write_text("0" * 64)
    capsys.readouterr()
    for words in (["predict", str(run), "images", "--out", "trusted.csv"], ["evaluate", str(run), "images"]):
        assert command(words) == 1
        said = capsys.readouterr().err
        assert "BernoulliNB is not one of the classes that are stored as arrays" in " ".join(said.split())
        assert "--trust" in said
        assert command([*words, "--trust"]) == 0
    assert Path("trusted.csv").read_text() == Path("signed.csv").read_text()
    capsys.readouterr()
    before = (run / "head.skops").read_bytes()
    assert command(train) == 0  # the run is there, and is kept
    assert json.loads(capsys.readouterr().out)["cached"] is True
    assert (run / "head.skops").read_bytes() == before
