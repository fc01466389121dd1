"""Which images to label next, by what is known already: nothing, a few labels, or a head.

    rows without a label + labelled rows --logistic head--> probabilities --strategy--> rows, best first

Nothing is written, except that images drawn for validation are entered in the labels file before anyone labels them.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from features.canonical import check_choice
from features.errors import ConfigurationError, check_range
from features.files import atomic_file, printable
from features.progress import counted
from features.sources.splits import SPLITS, UNLABELLED
from features.store.reader import FeatureStore
from pipeline.heads.kinds import head_of, make_head
from pipeline.labels.file import LABEL, SPLIT, Labels, append_decisions, new_decision, read_labels
from pipeline.labels.overlay import target_of, with_labels
from pipeline.outputs import output_file
from pipeline.runs.folder import Run
from pipeline.search.choosing import STRATEGIES, Situation, margin
from pipeline.search.vectors import Vectors
from pipeline.tables import shortened, table_text

PENALTY = 0.01  # C of the logistic head; with few labels there is nothing to choose it by
MOST_ROWS = 20_000  # candidates, and labelled rows, that are compared; of more, the most doubtful or a random sample
SHOWN = 50  # images listed for a person
FIELDS = ("rank", "path", "sha256", "score", "predicted")
PURPOSES = ("train", "validation")
TRAIN = SPLITS.index("train")


class Classifier(Protocol):
    """What is used of a head."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the probabilities."""

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Probabilities, float64 (n, c), of stored features, (n, ...)."""


class Suggested(NamedTuple):
    """Images to label next, best first.

    Parameters
    ----------
    rows : int64, (k,)
        Row numbers in the store.
    scores : float64, (k,)
        What the strategy went by, higher for better; zeros if they were drawn at random.
    predicted : tuple of str
        The likeliest class of each; empty where no head could be trained.
    """

    rows: np.ndarray
    scores: np.ndarray
    predicted: tuple[str, ...]


def suggest(
    store: FeatureStore,
    head: Classifier | None = None,
    *,
    n: int = 50,
    strategy: str = "mix",
    purpose: str = "train",
    labels: Labels | str | Path | None = None,
    name: str | None = None,
    seed: int = 0,
) -> Suggested:
    """Choose images without a label that are worth labelling next.

    Parameters
    ----------
    store : FeatureStore
        The features: view 0, averaged where they are spatial.
    head : Classifier, optional
        Gives the probabilities of stored features. By default a logistic head with C 0.01 is trained on the labelled training rows,
        at most 20,000 of them, if they are of two classes or more.
    n : int, 1 to 100,000
        Number of images; fewer are given if there are not so many.
    strategy : str
        ``mix``: typical images of clusters until there are 30 training labels, then doubtful ones that differ. ``typical``, ``margin``,
        ``spread-margin``, ``entropy``, ``k-centre`` or ``random`` alone.
    purpose : {"train", "validation"}
        Images for validation are drawn at random, whatever the strategy, from images whose group is in no split yet.
    labels : Labels or Path, optional
        Decisions that hold over the labels of the store. Images that have one, also ``unknown`` or ``exclude``, are not suggested again.
    name : str, optional
        Feature set; may be left out if the store has only one.
    seed : int
        Random seed.

    Raises
    ------
    ConfigurationError
        If every image has a label, the strategy needs a head and there is none, or the store has no classes.
    """
    check_range("n", n, 1, 100_000)
    check_choice("strategy", strategy, tuple(STRATEGIES))
    check_choice("purpose", purpose, PURPOSES)
    if store.images.target is not None:
        raise ConfigurationError(
            f"{store.path}: its target is {store.images.target.name!r}; suggest needs one class of each image"
        )
    known = read_labels(labels) if isinstance(labels, str | Path) else labels
    labelled_store = store if known is None or not len(known) else with_labels(store, known)
    pool = candidates(labelled_store, known, purpose)
    vectors, generator = Vectors(store, name), np.random.default_rng(seed)
    if purpose == "validation":
        return Suggested(
            np.sort(generator.permutation(pool)[:n]), np.zeros(min(n, len(pool))), ("",) * min(n, len(pool))
        )
    chosen = STRATEGIES[strategy]
    if chosen.by_head and head is None:
        head = _trained(labelled_store, vectors.name, generator)
    if chosen.needs_head and head is None:
        raise ConfigurationError(
            f"--strategy {strategy}: needs labelled training images of two classes, or a head; leave it out to begin without labels"
        )
    probabilities = _probabilities(store, vectors.name, pool, head) if chosen.by_head and head is not None else None
    if len(pool) > MOST_ROWS:
        some = generator.permutation(len(pool)) if probabilities is None else margin(_bare(probabilities), len(pool))[0]
        some = np.sort(some[:MOST_ROWS])
        pool, probabilities = pool[some], None if probabilities is None else probabilities[some]
    rows = _taught(labelled_store, generator)
    order = generator.permutation(len(pool))  # equal scores do not follow the order of the store
    columns = np.zeros((len(pool), 0)) if probabilities is None else probabilities
    now = Situation(vectors.at(pool)[order], vectors.at(rows), columns[order], seed)
    places, scores = chosen.choose(now, n)
    found = order[places]
    predicted = (
        [""] * len(found)
        if head is None or probabilities is None
        else [head.classes[k] for k in columns[found].argmax(axis=1)]
    )
    return Suggested(pool[found], scores, tuple(predicted))


def run(
    store: FeatureStore,
    head: Classifier | None = None,
    *,
    n: int = 50,
    strategy: str = "mix",
    purpose: str = "train",
    labels: str | Path | None = None,
    name: str | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> tuple[dict[str, Any], Suggested]:
    """Choose images, enter them in the labels file if they are for validation, write a list; return a document and what was chosen."""
    if purpose == "validation" and labels is None:
        raise ConfigurationError(
            "--for validation: needs --labels FILE, in which the images drawn are entered before anyone labels them"
        )
    if out is not None:
        out = output_file(out, "--out", "suggested.csv")
    known = read_labels(labels) if labels is not None and Path(labels).exists() else None
    found = suggest(store, head, n=n, strategy=strategy, purpose=purpose, labels=known, name=name, seed=seed)
    table = store.images
    images = [
        {
            "rank": rank,
            "path": table.paths[row],
            "sha256": table.sha256[row].tobytes().hex(),
            "score": round(score, 6),
            "predicted": predicted,
        }
        for rank, (row, score, predicted) in enumerate(
            zip(found.rows.tolist(), found.scores.tolist(), found.predicted, strict=True), 1
        )
    ]
    if purpose == "validation":
        append_decisions(
            str(labels), [new_decision(item["sha256"], item["path"], purpose, target=SPLIT) for item in images]
        )
    if out is not None:
        _write(out, images)
    document = {
        "format": 1,
        "file": str(store.path),
        "purpose": purpose,
        "strategy": strategy if purpose == "train" else "random",
        "score": STRATEGIES[strategy].score if purpose == "train" else "none",
        "labels": None if labels is None else str(labels),
        "labelled": int((with_labels(store, known).images.labels >= 0).sum())
        if known
        else int((table.labels >= 0).sum()),
        "images": images,
        "out": None if out is None else str(out),
    }
    return document, found


def head_for(store: FeatureStore, folder: str | Path, name: str | None) -> Classifier:
    """Load the head of a run for the features of a store; ``ConfigurationError`` if it was trained on others."""
    run_ = Run.open(folder)
    recipe = store.recipes[store.feature_set(name)]
    if recipe.fingerprint != run_.recipe.fingerprint:
        raise ConfigurationError(
            f"--run {folder}: its head was trained on {run_.recipe.name} of fingerprint {run_.recipe.fingerprint[:10]}, {store.path} holds "
            f"{recipe.name} of {recipe.fingerprint[:10]}; give a run of these features"
        )
    return head_of(run_)


def summary(document: dict[str, Any]) -> str:
    """Describe the result for a person."""
    shown = [
        {
            **({} if document["score"] == "none" else {"score": f"{item['score']:.4f}"}),
            **(
                {"predicted": shortened(printable(item["predicted"]))}
                if any(line["predicted"] for line in document["images"])
                else {}
            ),
            "path": shortened(printable(item["path"]), 80),
        }
        for item in document["images"][:SHOWN]
    ]
    more = len(document["images"]) - len(shown)
    said = f"{document['file']}: {counted(document['labelled'], 'image')} labelled; next, by {document['strategy']}:"
    if document["purpose"] == "validation":
        said = f"{document['file']}: drawn at random for validation, and entered in {document['labels']}:"
    wrote = f"\n{document['out']}: {counted(len(document['images']), 'row')}" if document["out"] else ""
    return f"{said}\n{table_text(shown, '  ')}" + (f"\n  and {more} more" if more else "") + wrote


def candidates(store: FeatureStore, labels: Labels | None, purpose: str) -> np.ndarray:
    """Rows that may be suggested, int64, ascending: without a label and a decision, one of equal images.

    For training, those that would take another split with their label, as their bytes or their group have it, are left out.

    Raises
    ------
    ConfigurationError
        If there are none.
    """
    table = store.images
    labelled, decided, drawn = table.labels >= 0, np.zeros(len(table), bool), np.zeros(len(table), bool)
    if labels is not None and len(labels):
        decided = ~labelled & (labels.latest(table.sha256, target_of(store), LABEL, "") >= 0)
        drawn = ~labelled & ~decided & (labels.latest(table.sha256, SPLIT) >= 0)
    # The split that an image would take with its label: that of its bytes or its group.
    placed = table.splits != UNLABELLED
    held = _with_equals(store, placed if purpose == "validation" else (placed & (table.splits != TRAIN)) | drawn)
    rows = np.flatnonzero(~labelled & ~decided & ~drawn & ~held)
    first = np.unique(table.sha256[rows], axis=0, return_index=True)[1]
    if not len(first):
        counts = [
            f"{int(some.sum()):,} {said}"
            for some, said in (
                (labelled, "have a label"),
                (decided, "are decided as unknown or excluded"),
                (drawn, "are drawn for validation and wait for a label"),
                (
                    held & ~labelled & ~decided & ~drawn,
                    "would not become training images" if purpose == "train" else "have a split, as their group",
                ),
            )
            if some.any()
        ]
        raise ConfigurationError(
            f"{store.path}: no image is left to suggest: of its {len(table):,} images, {', '.join(counts)}. bottleneck audit "
            "finds labels that may be wrong"
        )
    return rows[np.sort(first)]


def _with_equals(store: FeatureStore, some: np.ndarray) -> np.ndarray:
    """These rows and those with their bytes or their group, bool (n,)."""
    table, held = store.images, some.copy()
    keys = [table.sha256.view("V32")[:, 0].tolist(), *([] if table.groups is None else [table.groups])]
    for column in keys:
        taken = {column[row] for row in np.flatnonzero(some).tolist()} - {""}
        held |= np.fromiter((key in taken for key in column), bool, len(table))
    return np.asarray(held)


def _trained(store: FeatureStore, name: str, generator: np.random.Generator) -> Classifier | None:
    """A logistic head on labelled training rows; None if they are not of two classes."""
    labels, rows = store.images.labels, _taught(store, generator)
    present = np.unique(labels[rows])
    if len(present) < 2:
        return None
    head = make_head("logistic", classes=[store.classes[label] for label in present], C=PENALTY)
    head.fit(np.asarray(store.array(name)[rows, 0]), np.searchsorted(present, labels[rows]).astype(np.int32))
    return head


def _taught(store: FeatureStore, generator: np.random.Generator) -> np.ndarray:
    """Rows that a head may learn from, int64, ascending: labelled ones of the training split, or a sample of them."""
    rows = np.flatnonzero((store.images.labels >= 0) & (store.images.splits == SPLITS.index("train")))
    return np.sort(generator.permutation(rows)[:MOST_ROWS])


def _probabilities(store: FeatureStore, name: str, rows: np.ndarray, head: Classifier) -> np.ndarray:
    """Probabilities of rows, float64 (n, c), a piece of the store at a time."""
    parts = []
    for start in range(0, len(rows), 1024):
        some = rows[start : start + 1024]
        parts.append(head.predict_proba(np.asarray(store.array(name)[some, 0])))
    return np.concatenate(parts)


def _bare(probabilities: np.ndarray) -> Situation:
    nothing = np.zeros((0, 0), np.float32)
    return Situation(nothing, nothing, probabilities)


def _write(out: Path, images: Sequence[dict[str, Any]]) -> None:
    with (
        atomic_file(out) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(images)
