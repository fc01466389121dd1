"""The leaderboard as a person reads it: it fits the terminal, says each thing once, and shows what differs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from made_runs import made_run

from pipeline.cli import main
from pipeline.runs.board import leaderboard
from pipeline.tables import board_text

FOREST = "sklearn.ensemble.HistGradientBoostingClassifier"


def row(number: int, **changes: Any) -> dict[str, Any]:
    values = {
        "run_id": f"{FOREST}-{number:010d}", "chosen": number == 1, "head": FOREST, "settings": "max_iter=100 seed=3",
        "features": "mobilenetv2/out_relu.avg", "accuracy": 0.9, "accuracy_interval": None, "balanced_accuracy": 0.8, "log_loss": 0.25, "ece": 0.01,
        "n": 100, "cv_accuracy": None, "cv_interval": None, "test_accuracy": None, "fit_seconds": 1.0,
        "parameters": None, "data": "d" * 10, "comparable": True, "stage": "head",
    }  # fmt: skip
    return values | changes


def test_what_all_runs_share_is_said_once_and_the_import_path_once_a_row() -> None:
    rows = [row(n, settings=f"learning_rate={rate} max_iter=100 seed=3") for n, rate in ((1, 0.1), (2, 0.01))]
    table = board_text([*rows, row(3, head="knn", run_id="knn-3", settings="n_neighbors=5 seed=3")])
    assert table.split("\n") == [
        "   run                                                         settings            accuracy  95 % interval     log loss     ece  seconds",
        f"*  {FOREST}-0000000001  learning_rate=0.1     0.9000  0.8256 to 0.9448    0.2500  0.0100   1.0000",
        f"   {FOREST}-0000000002  learning_rate=0.01    0.9000  0.8256 to 0.9448    0.2500  0.0100   1.0000",
        "   knn-3                                                       n_neighbors=5         0.9000  0.8256 to 0.9448    0.2500  0.0100   1.0000",
        "all: features mobilenetv2/out_relu.avg, images 100, seed=3",
        f"{FOREST}: max_iter=100",
    ]
    assert "all: " not in board_text([row(1)])  # one run shares nothing with others
    assert "max_iter=100 seed=3" in board_text([row(1)])


def test_scores_of_folds_have_their_interval() -> None:
    rows = [row(1, cv_accuracy=0.85, cv_interval=[0.8, 0.89]), row(2)]
    heads, first, second = board_text(rows).split("\n")[:3]
    assert re.split(r" {2,}", heads.strip())[1:5] == ["accuracy", "95 % interval", "folds", "folds, 95 %"]
    assert "0.9000  0.8256 to 0.9448  0.8500  0.8000 to 0.8900" in first
    assert re.search(r"0\.9448 +- +- ", second)


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_it_fits_the_terminal_and_says_what_was_left_out(width: int) -> None:
    rows = [
        row(
            n,
            settings=f"learning_rate={n / 7:.9f} hidden_layer_sizes=[{n}, {n}]",
            features=f"mobilenetv2/layer_{n}.avg",
        )
        for n in range(1, 5)
    ]
    rows[0] |= {"cv_accuracy": 0.9, "test_accuracy": 0.5} if width > 100 else {}
    lines = board_text(rows, width=width).split("\n")
    assert max(map(len, lines)) <= width
    table, below = lines[: 1 + len(rows)], " ".join(lines[1 + len(rows) :])
    assert len({line.lstrip("* ").split()[0] for line in table[1:]}) == 4  # the ids can still be told apart
    assert f"left out to fit {width} columns: ece, " in below
    assert all("0.9000" in line and "0.8256 to 0.9448" in line for line in table[1:])


def test_each_data_set_and_state_has_a_table_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_run(tmp_path, "logistic-ants", source="/data/ants", digest="a" * 64, minute=1)
    made_run(tmp_path, "logistic-brain", source="/data/brain", digest="b" * 64, minute=3)
    made_run(tmp_path, "logistic-old", source="/data/brain", digest="0" * 64, accuracy=1.0, minute=2)
    monkeypatch.setattr("pipeline.commands.heads.columns_of_terminal", lambda: 72)
    assert main(["leaderboard", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.split("\n"))) <= 72
    titles = [part.split("\n")[0] for part in shown.split("\n\n")]
    assert titles == [f"brain {'b' * 10}", f"brain {'0' * 10}, an older state (stale)", f"ants {'a' * 10}"]
    assert [line.split()[1] for line in shown.split("\n") if line.startswith("*")] == [
        "logistic-brain",
        "logistic-ants",
    ]
    assert board_text(leaderboard(tmp_path)[:1]).startswith("brain bbbbbbbbbb\n")
