"""Fine-tuning under a labels file: the same rows, splits and classes as its head, or a refusal."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from finetuning import TinyWorld, tiny_world
from helpers import call_pipeline
from labelling import Book, sha256_of

from features.errors import RunError
from features.store.reader import FeatureStore
from pipeline.labels.file import EXCLUDE
from pipeline.labels.overlay import with_labels
from pipeline.reporting.reproduce import commands
from pipeline.runs.folder import Run, find_runs
from pipeline.stages.finetune import finetune
from pipeline.stages.train_head import train_head

tiny = tiny_world
STEPS = {"epochs": 1, "batch_size": 16}


@pytest.mark.slow
def test_fine_tuning_sees_the_labels_of_its_head(tiny: TinyWorld, tmp_path: Path) -> None:
    store, book = FeatureStore.open(tiny.store), Book(tmp_path / "labels.csv")
    book.add(sha256_of(store, "train/brick/000.png"), "leaf").add(sha256_of(store, "validation/leaf/001.png"), EXCLUDE)
    under = with_labels(store, book.path)
    params = {"epochs": 2, "learning_rate": 1e-3}
    head = Run.open(train_head(under, "dropout-linear", runs=tmp_path / "runs", params=params).folder)
    assert head.data_digest == under.data_digest
    document = finetune(head.folder, tiny.images, labels=book.path, **STEPS)
    tuned = Run.open(document["run"])
    assert (tuned.data_digest, tuned.labels) == (head.data_digest, head.labels)
    assert tuned.metrics["validation"]["n"] == 23
    assert document["best_head"]["run"] == head.run_id
    assert [line.count(f"--labels {book.path}") for line in commands(tuned, start=head)] == [0, 1, 1]

    boundary = tiny.extract("boundary.h5", layers=["boundary"])
    cached = finetune(head.folder, from_cache=boundary.path, labels=book.path, **STEPS)
    assert (Run.open(cached["run"]).data_digest, Run.open(cached["run"]).labels) == (head.data_digest, head.labels)

    for options in ({"images": tiny.images}, {"from_cache": boundary.path}):
        with pytest.raises(RunError, match=f"trained under the labels file {book.path}; give it with --labels"):
            finetune(head.folder, **options, **STEPS)
    book.add(sha256_of(store, "train/brick/001.png"), "wolf")
    with pytest.raises(RunError, match=r"under .*labels\.csv they have other labels, .* Train a head under the same"):
        finetune(head.folder, from_cache=boundary.path, labels=book.path, **STEPS)
    with pytest.raises(
        RunError, match=r"labels.csv: its classes are not those of .* \('wolf' is no class of the run\)"
    ):
        finetune(head.folder, tiny.images, labels=book.path, **STEPS)
    shutil.rmtree(tmp_path / "runs")


@pytest.mark.slow
def test_an_experiment_trains_under_a_labels_file(tiny: TinyWorld, tmp_path: Path) -> None:
    store, book = FeatureStore.open(tiny.store), Book(tmp_path / "labels.csv")
    book.add(sha256_of(store, "train/brick/000.png"), "moss").add(sha256_of(store, "train/brick/001.png"), "moss")
    (tmp_path / "way.yaml").write_text(
        "version: 1\nabout: labels\nways:\n  cached:\n    about: a head\n    steps:\n"
        f"      - extract: {{backbone: {tiny.backbone}, batch_size: 16}}\n      - train_head: {{head: lda}}\n"
    )
    done = call_pipeline(
        "recipe", tmp_path / "way.yaml", tiny.images, "--out", tmp_path / "out", "--labels", book.path, "--json"
    )
    assert done.returncode == 0, done.stderr
    (run,) = find_runs(tmp_path / "out" / "runs").runs
    assert run.classes == ("brick", "leaf", "moss")
    assert run.data_digest == with_labels(store, book.path).data_digest
