"""Views in heads: dense ones draw one per image and epoch, scikit-learn ones see all, scores are those of view 0."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import part, recipe
from test_train_head import Images, Store

from features.errors import ConfigurationError
from pipeline.heads.classifiers import SklearnHead
from pipeline.heads.fitting import cross_validate
from pipeline.heads.gather import Source
from pipeline.heads.kinds import head_of, make_head
from pipeline.heads.models.linear import Linear
from pipeline.heads.prepared import ArrayRows, Prepared, drawn_views
from pipeline.heads.records import run_id_of
from pipeline.heads.streaming import FeatureStream
from pipeline.runs.folder import Run
from pipeline.scores.metrics import evaluate
from pipeline.stages.train_head import add_averaged, needs_views, train_head

BOTH = (False, True)


@dataclasses.dataclass
class ViewStore(Store):
    """A store whose arrays are (n, K, d)."""

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.arrays[name][start:stop]


def make_views(
    views: int = 4,
    rows: int = 120,
    gap: float = 1.0,
    columns: int = 4,
    classes: tuple[str, ...] = ("cat", "dog", "eel"),
) -> ViewStore:
    """Overlapping classes, one after the other; view k of an image is shifted by noise of its own."""
    labels = np.sort(np.arange(rows) % len(classes)).astype(np.int32)
    splits = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 2], np.int8)[np.arange(rows) % 10]
    corners = gap * np.random.default_rng(1).normal(size=(len(classes), columns))
    X = corners[labels] + np.random.default_rng(2).normal(size=(rows, columns))
    noise = np.random.default_rng(3).normal(size=(rows, views, columns)) * (np.arange(views) > 0)[:, None]
    sha256 = np.random.default_rng(4).integers(0, 256, (rows, 32)).astype(np.uint8)
    images = Images(tuple(f"{classes[k]}/{row}.png" for row, k in enumerate(labels)), labels, splits, sha256)
    made = recipe()
    return ViewStore({made.name: (X[:, None] + noise).astype(np.float32)}, {made.name: made}, classes, images)


def constants(rows: int = 50, views: int = 3, columns: int = 2) -> np.ndarray:
    """View k of row r holds 10 r + k."""
    values = 10 * np.arange(rows)[:, None, None] + np.arange(views)[None, :, None]
    return np.broadcast_to(values, (rows, views, columns)).astype(np.float32)


def prepared(store: Store, *, memory: int = 1 << 30, views: int | None = None, scale: bool = True) -> Prepared:
    name = store.names[0]
    return Source(store, name, "none", views or store.shape(name)[1], memory).prepare(scale=scale)


# ----------------------------------------------------------------------------------------------- drawing
def test_a_view_comes_from_seed_epoch_and_row_alone() -> None:
    views = drawn_views(0, 3, 4000, 4)
    assert np.bincount(views) == pytest.approx([1000] * 4, abs=110)  # four deviations
    assert (drawn_views(0, 3, 10, 4) == views[:10]).all()
    for other in (drawn_views(1, 3, 4000, 4), drawn_views(0, 4, 4000, 4)):
        assert np.mean(other == views) == pytest.approx(0.25, abs=0.03)


def test_each_epoch_shows_other_views_and_every_row_once() -> None:
    rows = ArrayRows(constants(), np.arange(50))
    seen = []
    for epoch in range(8):
        pieces = [*rows.epoch(epoch, size=7, seed=2, draws=BOTH)]
        X, y = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        assert X.shape == (50, 2, 2)
        assert sorted(y) == list(range(50))
        assert (X[:, 0, 0] == 10 * y).all()  # the plain one
        drawn = (X[:, 1] - 10 * y[:, None])[np.argsort(y)]
        assert (drawn == drawn_views(2, epoch, 50, 3)[:, None]).all()
        seen.append(drawn[:, 0])
        (alone,) = rows.epoch(epoch, size=50, seed=2, draws=(True,))
        assert (alone[0][:, 0] == X[:, 1]).all()
    assert {len(set(column)) for column in np.stack(seen).T} <= {2, 3}  # in 8 epochs every row showed several
    assert not (np.diff(seen, axis=0) == 0).all(axis=1).any()


def test_some_of_the_rows_show_the_views_they_have_among_all() -> None:
    rows = ArrayRows(constants(), np.arange(50))
    some = rows.take(np.arange(50) % 3 == 1)
    for X, y in some.epoch(5, size=4, seed=0, draws=(True,)):
        assert (X[:, 0, 0] == 10 * y + drawn_views(0, 5, 50, 3)[y]).all()
    assert [Z[:, 0].tolist() for _, Z in some.take(np.array([0, 2])).pieces()] == [[10, 70]]


def test_a_stream_draws_a_view_of_each_row() -> None:
    store = make_views(views=3)
    store.arrays["last.avg"] = constants(120)
    rows = store.rows("train")
    stream = FeatureStream(store, "last.avg", rows, rows.astype(np.int32), 4000)  # type: ignore[arg-type]
    order = []
    for epoch in (0, 1):
        pieces = [*stream.epoch(epoch, size=5, seed=7, draws=BOTH)]
        X, y = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        assert sorted(y) == rows.tolist()
        assert (X[:, 0, 0] == 10 * y).all()
        assert (X[:, 1, 1] == 10 * y + drawn_views(7, epoch, 120, 3)[y]).all()
        alone = np.concatenate([labels for _, labels in stream.epoch(epoch, size=5, seed=7)])
        assert (alone == y).all()  # what is asked for does not change the order
        order.append(y.tolist())
    assert order[0] != order[1]
    piece, values = next(stream.all_views(2))
    assert (values[:, :, 0] == 10 * rows[piece][:, None] + [0, 1]).all()


# -------------------------------------------------------------------------------------------- preparation
def test_columns_are_standardised_with_view_0_of_the_training_rows() -> None:
    store = make_views()
    data, X = prepared(store), store.arrays["last.avg"]
    plain = X[store.rows("train"), 0]
    assert data.mean == pytest.approx(plain.mean(axis=0), abs=1e-6)
    assert data.std == pytest.approx(plain.std(axis=0), rel=1e-5)
    assert isinstance(data.train, ArrayRows)
    assert isinstance(data.held_out, ArrayRows)
    assert (data.train.views, data.held_out.views) == (4, 1)
    assert data.train.values == pytest.approx((X[store.rows("train")] - data.mean) / data.std, abs=1e-5)
    assert data.held_out.flat == pytest.approx((X[store.rows("validation"), 0] - data.mean) / data.std, abs=1e-5)
    left = prepared(store, memory=1000)
    assert left.streamed
    assert left.mean == pytest.approx(data.mean, abs=1e-6)
    assert left.std == pytest.approx(data.std, rel=1e-5)


def test_what_training_may_take_goes_with_the_rows() -> None:
    store = make_views()
    assert [prepared(store, memory=memory).memory for memory in (1 << 20, 1000)] == [1 << 20, 250]
    assert prepared(store, memory=1 << 20).part(np.arange(9)).memory == 1 << 20


def test_views_lie_in_files_too(tmp_path: Path) -> None:
    store = make_views()
    filed = Source(store, "last.avg", "none", 4, 1 << 30).prepare(scale=True, folder=tmp_path)
    data = prepared(store)
    assert isinstance(filed.train, ArrayRows)
    assert isinstance(data.train, ArrayRows)
    assert isinstance(filed.train.values, np.memmap)
    assert (filed.train.values == data.train.values).all()
    assert filed.train.flat.base is not None  # no copy for scikit-learn
    assert (tmp_path / "train.npy").stat().st_size == 128 + data.train.values.nbytes


# ------------------------------------------------------------------------------------------- scikit-learn
def test_scikit_learn_heads_see_all_views_as_rows() -> None:
    from sklearn.linear_model import LogisticRegression

    store = make_views()
    data = prepared(store)
    head = make_head("logistic", C=0.3, classes=store.classes)
    head.fit_prepared(data)
    Z = (store.arrays["last.avg"][store.rows("train")] - data.mean) / data.std
    model = LogisticRegression(C=0.3, max_iter=1000).fit(Z.reshape(-1, 4), np.repeat(data.y, 4))
    assert isinstance(head, SklearnHead)
    assert isinstance(head.fitted, Linear)
    assert head.fitted.coef == pytest.approx(model.coef_, abs=1e-4)
    assert data.held_out is not None
    V = (store.arrays["last.avg"][store.rows("validation"), 0] - data.mean) / data.std
    assert head.predict_rows(data.held_out) == pytest.approx(model.predict_proba(V), abs=1e-4)


def test_folds_keep_the_views_of_an_image_together(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_views()
    data = prepared(store)
    parts: list[tuple[np.ndarray, np.ndarray]] = []

    class Recorder:
        coef_, intercept_ = np.zeros((3, 4)), np.zeros(3)

        def fit(self, Z: np.ndarray, y: np.ndarray) -> Recorder:
            parts.append((Z, y))
            return self

    monkeypatch.setattr(SklearnHead, "_new", lambda *_, **__: Recorder())
    head = make_head("ridge", alpha=1.0, classes=store.classes)
    head.folds = 5
    head.fit_prepared(data)
    assert isinstance(data.train, ArrayRows)
    image = {values.tobytes(): row for row, views in enumerate(data.train.values.astype(float)) for values in views}
    assert len(parts) == 6  # five folds, and all rows
    out = np.zeros(len(data.y), int)
    for Z, y in parts[:5]:
        rows = np.array([image[values.tobytes()] for values in Z])
        assert (np.bincount(rows, minlength=len(data.y)) % 4 == 0).all()  # an image is in with all its views, or out
        assert (data.y[rows] == y).all()
        out += np.bincount(rows, minlength=len(data.y)) == 0
    assert (out == 1).all()
    assert head.out_of_fold is not None
    assert head.out_of_fold.shape == (len(data.y), 3)


def test_cross_validation_trains_on_all_views_and_judges_the_plain_one() -> None:
    store = make_views()
    data = prepared(store)
    found = cross_validate(make_head("knn", n_neighbors=1, classes=store.classes, scale=True), data, 4)
    assert found.shape == (84, 3)
    # With its own other views among the neighbours, nearly every row would be right.
    assert evaluate(found, data.y, store.classes)["accuracy"] < 0.9


def test_views_count_as_rows_in_the_memory_estimate() -> None:
    for name in ("logistic", "linear-svm", "knn", "lda"):
        head = make_head(name, classes=("a", "b"))
        assert head.fit_bytes(30_000, 1280, views=4) > 1.9 * head.fit_bytes(30_000, 1280) > 0


# ---------------------------------------------------------------------------------------------- identity
def test_the_run_id_says_how_many_views_were_seen() -> None:
    def run_id(name: str, stored: int, **params: Any) -> str:
        store = make_views(stored)
        head = make_head(name, classes=store.classes, **params)
        head.pool = "none"
        return run_id_of(head, store, "last.avg")

    assert len({run_id("dense", stored) for stored in (1, 2, 4)}) == 3
    assert len({run_id("dense", stored, views="plain") for stored in (1, 2, 4)} | {run_id("dense", 1)}) == 1
    assert len({run_id("knn", stored) for stored in (1, 2, 4)}) == 3
    assert make_head("dense").parameters.described() == make_head("dense", views="draw").parameters.described()
    with pytest.raises(ConfigurationError, match="views: received 'all', expected 'draw' or 'plain'"):
        make_head("dense", views="all")


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_a_run_says_its_views_and_what_averaging_them_scores(tmp_path: Path) -> None:
    store = make_views()
    result = train_head(store, "logistic", runs=tmp_path, params={"C": 0.3})
    run = Run.open(result.folder)
    assert run.config["features"]["views"] == 4
    assert "averaged" not in run.metrics
    again = add_averaged(run, [store])
    head, rows = head_of(run), store.rows("validation")
    X, y = store.arrays["last.avg"][rows], store.images.labels[rows]
    mean = np.mean([head.predict_proba(X[:, k]) for k in range(4)], axis=0)
    scores = evaluate(mean, y, store.classes)
    assert again.metrics["averaged"] == {**scores, "views": 4}
    assert scores["log_loss"] != again.metrics["validation"]["log_loss"]
    assert again.metrics["validation"] == evaluate(head.predict_proba(X[:, 0]), y, store.classes)
    assert Run.open(result.folder).metrics == again.metrics
    needs_views(store)
    with pytest.raises(ConfigurationError, match=r"one view of each image in last\.avg; extract again with --views 4"):
        needs_views(make_views(1))


# --------------------------------------------------------------------------------------------------- dense
@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.parametrize(("hidden", "memory"), part([(0, 1 << 30), (8, 3000)], 8))
def test_heads_with_and_without_views_in_one_bank_are_as_alone(hidden: int, memory: int) -> None:
    from pipeline.heads.bank import BankHead, BankSpec, predict, train_rows

    store = make_views(rows=300)
    data = prepared(store, memory=memory)
    assert data.streamed is (memory == 3000)
    spec = BankSpec(3, hidden=hidden, epochs=4, batch_size=8, patience=0)
    heads = [
        BankHead(3e-3, draws=True),
        BankHead(3e-3),
        BankHead(3e-3, dropout=0.3, seed=1, draws=True),
        BankHead(3e-3, feature_noise=0.2, seed=1),
        BankHead(1e-3, draws=True),
    ]
    together = train_rows(spec, heads, data.train, data.held_out)
    Z = np.concatenate([piece for _, piece in data.held_out.pieces()])  # type: ignore[union-attr]
    for head, result in zip(heads, together, strict=True):
        (alone,) = train_rows(spec, [head], data.train, data.held_out)
        assert predict(spec, result, Z) == pytest.approx(predict(spec, alone, Z), abs=1e-3)
        for ours, theirs in zip(result.weights, alone.weights, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
        assert result.history["val_loss"] == pytest.approx(alone.history["val_loss"], abs=1e-4)
    drawn, plain = (predict(spec, result, Z) for result in together[:2])
    assert np.abs(drawn - plain).max() > 0.01
    if not data.streamed:
        (without,) = train_rows(spec, [BankHead(3e-3)], prepared(store, views=1).train, data.held_out)
        assert predict(spec, without, Z) == pytest.approx(plain, abs=1e-5)  # a plain head does not see them at all


@pytest.mark.slow
@pytest.mark.parametrize("views", ["draw", "plain"])
def test_keras_sees_the_batches_of_the_bank(views: str) -> None:
    from pipeline.heads.bank import train_rows
    from pipeline.heads.dense import KerasHead
    from pipeline.heads.keras_fit import fit_dense

    store = make_views(rows=300)
    data = prepared(store)
    head = make_head("dense", epochs=5, learning_rate=3e-3, views=views, order_seed=5, classes=store.classes)
    assert isinstance(head, KerasHead)
    assert head.bank_spec is not None
    (result,) = train_rows(head.bank_spec, [head.bank_head], data.train, data.held_out)
    weights, history = fit_dense(head.parameters, data, classes=3, seed=0, class_weights=None, progress=lambda *_: None)
    for ours, theirs in zip(result.weights, weights, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert history["loss"] == pytest.approx(result.history["loss"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_a_sweep_trains_heads_with_and_without_views_beside_each_other(tmp_path: Path) -> None:
    from pipeline.heads import dense
    from pipeline.sweeps.sweep import run_sweep
    from pipeline.sweeps.sweep_file import SweepFile, SweepHead

    store = make_views()
    grid = {"views": ["draw", "plain"], "epochs": [5], "learning_rate": [0.03]}
    sweep = SweepFile(
        version=1,
        heads=[
            SweepHead(head="dense", grid=grid),
            SweepHead(head="logistic", grid={"C": [0.3]}),
            SweepHead(head="knn", grid={"n_neighbors": [3]}),
        ],
    )
    banks = []
    with pytest.MonkeyPatch.context() as patch:
        train = dense.train_rows
        patch.setattr(
            dense, "train_rows", lambda spec, heads, *a, **k: banks.append(len(heads)) or train(spec, heads, *a, **k)
        )
        swept = run_sweep([store], sweep, runs=tmp_path / "sweep", jobs=1, folds=2)
    assert banks[0] == 2
    assert (swept.trained, swept.failed) == (4, [])
    fast: dict[str, Any] = {"epochs": 5, "learning_rate": 0.03}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("dense", {"views": "draw", **fast}),
        ("dense", {"views": "plain", **fast}),
        ("logistic", {"C": 0.3}),
        ("knn", {"n_neighbors": 3}),
    ]
    X = store.arrays["last.avg"][store.rows("validation"), 0]
    for name, params in cases:
        alone = train_head(store, name, runs=tmp_path / "alone", params=params)
        run = Run.open(tmp_path / "sweep" / alone.run_id)
        assert run.metrics["validation"]["log_loss"] == pytest.approx(alone.metrics["validation"]["log_loss"], abs=1e-3)
        assert run.config["features"].get("views", 1) == (1 if params.get("views") == "plain" else 4)
        assert run.metrics["cv"]["n"] == 84
        expected = head_of(Run.open(alone.folder)).predict_proba(X)
        assert head_of(run).predict_proba(X) == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_a_draw_from_pieces_is_a_run_like_any_other(tmp_path: Path) -> None:
    store = make_views(rows=600, gap=2.5)
    params = {"epochs": 6, "learning_rate": 0.01, "batch_size": 8}
    cases = {"dense": params, "linear-sgd": {**params, "learning_rate": 0.05, "momentum": 0.0}, "sgd": {"alpha": 0.03}}
    for name, own in cases.items():
        left, whole = (
            train_head(store, name, runs=tmp_path / str(memory), params=own, memory=memory)
            for memory in (12_000, 1 << 30)
        )
        assert (left.streamed, whole.streamed) == (True, False)
        assert left.run_id == whole.run_id
        accuracies = [result.metrics["validation"]["accuracy"] for result in (left, whole)]
        assert accuracies[0] == pytest.approx(accuracies[1], abs=0.05)  # 6 of 120 rows
