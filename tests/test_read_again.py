"""What is written can be read again: no file of a run is larger than its reader allows, and no head is refused by its check."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from made_runs import made_run

from features.errors import BottleneckError, ConfigurationError, HeadError, UntrustedHeadError
from pipeline import config
from pipeline.config import check_classes, load_yaml, yaml_text
from pipeline.heads import head as heads
from pipeline.heads.kinds import load_head, make_head
from pipeline.heads.models import archive
from pipeline.heads.persistence import Wrapped
from pipeline.presets import EPOCHS, MOST_HIDDEN
from pipeline.runs.folder import HISTORY_BYTES, Run
from pipeline.tuning.settings import settings_of


def blobs(classes: int, rows: int = 12, columns: int = 6) -> tuple[np.ndarray, np.ndarray]:
    y = np.repeat(np.arange(classes, dtype=np.int32), rows)
    return (np.random.default_rng(0).normal(size=(len(y), columns)) + y[:, None]).astype(np.float32), y


@pytest.mark.slow
def test_as_many_classes_as_a_run_can_hold_are_trained_on_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "YAML_NODES", config.SPARE + 30)
    X, y = blobs(31)
    head = make_head("logistic")
    with pytest.raises(ConfigurationError, match=r"31 classes: a run holds at most 30\. Give folders of more general"):
        head.fit(X, y)
    make_head("logistic").fit(X[y < 30], y[y < 30])
    classes = tuple(f"class {number}" for number in range(30))
    assert made_run(tmp_path, "logistic-30", classes=classes).classes == classes


def test_names_of_classes_that_are_too_long_together_are_refused_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "YAML_BYTES", 100 * config.SPARE + 5_000)
    check_classes(["x" * 90] * 50)  # 50 times "- ", the name and the end of the line: 4,650 bytes
    with pytest.raises(ConfigurationError, match="the names of 50 classes take 7,150 bytes, at most 5,000 are allowed"):
        check_classes(["\U0001f600" * 35] * 50)


def test_a_configuration_beyond_the_limits_of_its_reader_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "YAML_NODES", 40)
    with pytest.raises(ConfigurationError, match=r"could not be read again: .*it holds more than 40 values"):
        made_run(tmp_path, "logistic-1")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(config, "YAML_BYTES", 50)
    with pytest.raises(ConfigurationError, match="would have 53 bytes, at most 50 are allowed"):
        yaml_text({"text": "x" * 46})


def test_a_value_that_is_used_twice_is_written_twice(tmp_path: Path) -> None:
    """PyYAML would write an alias, which a reader of runs refuses."""
    shared = {"test": ["Testing"]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml_text({"one": shared, "two": shared}))
    assert "&" in yaml.safe_dump({"one": shared, "two": shared})
    assert load_yaml(path, aliases=False) == {"one": shared, "two": shared}


def test_a_history_of_as_many_epochs_as_are_allowed_can_be_read() -> None:
    longest = len(f"{-sys.float_info.min!r},") * 8  # loss and accuracy of two splits, rates, seconds
    assert EPOCHS * longest < HISTORY_BYTES
    assert make_head("dense", epochs=EPOCHS).parameters.described()["epochs"] == EPOCHS
    for ask in (lambda: make_head("dense", epochs=EPOCHS + 1), lambda: settings_of({"epochs": EPOCHS + 1})):
        with pytest.raises(ConfigurationError, match=f"epochs: received {EPOCHS + 1}, expected .* {EPOCHS}"):
            ask()


def test_no_head_gets_more_hidden_layers_than_can_be_loaded() -> None:
    make_head("dense", hidden=[2] * MOST_HIDDEN)
    with pytest.raises(ConfigurationError, match=f"hidden: .* at most {MOST_HIDDEN}"):
        make_head("dense", hidden=[2] * (MOST_HIDDEN + 1))


@pytest.mark.slow
def test_a_head_json_that_could_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = blobs(2)
    head = make_head("logistic")
    head.fit(X, y)
    head.save(tmp_path)
    held = (tmp_path / "head.json").read_bytes()
    monkeypatch.setattr(archive, "MOST_VALUES", sum(map(held.count, (b",", b"[", b"{"))))
    head.save(tmp_path)
    np.testing.assert_array_equal(load_head(tmp_path).predict_proba(X), head.predict_proba(X))
    monkeypatch.setattr(archive, "MOST_VALUES", archive.MOST_VALUES - 1)
    with pytest.raises(HeadError, match=r"head\.json of 'logistic' would be too large"):
        head.save(tmp_path)
    monkeypatch.setattr(heads, "MOST_COLUMNS", 5)
    with pytest.raises(HeadError, match="rows of 6 values: a head takes at most 5; use --pool avg"):
        make_head("logistic").fit(X, y)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "params"),
    [
        ("sklearn.naive_bayes.BernoulliNB", {}),
        ("sklearn.model_selection.FixedThresholdClassifier", {"estimator": "sklearn.naive_bayes.BernoulliNB"}),
        ("sklearn.ensemble.BaggingClassifier", {"estimator": "sklearn.naive_bayes.BernoulliNB", "n_estimators": 12}),
        ("sklearn.multiclass.OneVsRestClassifier", {"estimator": "sklearn.naive_bayes.BernoulliNB", "pca": 3}),
    ],
)
def test_a_signed_head_is_read_whatever_its_size(
    path: str, params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits of what strangers send are none for what this user wrote; with a changed signature they are again."""
    X, y = blobs(2)
    head = make_head(path, classes=("a", "b"), **params)
    head.fit(X, y)
    assert isinstance(head.fitted, Wrapped)  # type: ignore[attr-defined]
    head.save(tmp_path)
    np.testing.assert_array_equal(load_head(tmp_path, trust=False).predict_proba(X), head.predict_proba(X))
    (tmp_path / "head.skops.signature").write_text("0" * 64)
    with pytest.raises(UntrustedHeadError, match=r"are stored as arrays|not stored as arrays"):
        load_head(tmp_path)
    np.testing.assert_array_equal(load_head(tmp_path, trust=True).predict_proba(X), head.predict_proba(X))
    head.save(tmp_path)
    values = json.loads((tmp_path / "head.json").read_text())
    monkeypatch.setattr(archive, "MOST_VALUES", 100)  # of head.json; schema.json has more
    np.testing.assert_array_equal(load_head(tmp_path).predict_proba(X), head.predict_proba(X))
    (tmp_path / "head.json").write_text(json.dumps(values | {"kind": "sklearn.naive_bayes.GaussianNB"}))
    with pytest.raises(BottleneckError, match=r"but head\.json says sklearn\.naive_bayes\.GaussianNB"):
        load_head(tmp_path)
    (tmp_path / "head.json").write_text(json.dumps(values | {"classes": ["a", "b", "c"]}))
    with pytest.raises(HeadError, match=r"it knows 2 classes and .* columns, expected 3"):
        load_head(tmp_path)


def test_runs_are_read_after_they_were_written(tmp_path: Path) -> None:
    odd = ("2026-11-27", "a: b", "null", "&anchor", "é\u2028x", "\udce9", "- [")
    run = made_run(tmp_path, "logistic-odd", classes=odd)
    assert Run.open(run.folder).classes == odd
