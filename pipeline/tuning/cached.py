"""Cut features, the values at the cut, read from a store (``extract --layer boundary``) instead of computed from images.

store -> the feature set that this run's trunk would compute -> CachedFeatures
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from features.errors import ConfigurationError, RunError
from features.recipe import Recipe
from features.sources.splits import listed
from features.store.reader import FeatureStore
from pipeline.labels.file import Labels
from pipeline.labels.overlay import with_labels
from pipeline.runs.folder import Run
from pipeline.tasks.table import names_of, targets_of
from pipeline.tuning.inputs import PLAIN, Data

_FREE = {"layer", "pooling", "dtype", "augmentation", "seed"}  # recipe fields in which cut features may differ


class CachedCut(NamedTuple):
    """A feature set of a store that serves as the input of the trained layers."""

    store: FeatureStore
    name: str

    @property
    def recipe(self) -> Recipe:
        """Recipe of the feature set."""
        return self.store.recipes[self.name]

    @property
    def identity(self) -> dict[str, str | int]:
        """The facts about the feature set that decide the result of training."""
        return {"fingerprint": self.recipe.fingerprint, "views": self.store.views(self.name)}


def open_cut(path: str | Path, run: Run, cuts: list[str], labels: Labels | None = None) -> CachedCut:
    """Find the feature set of a store from which training can start.

    Parameters
    ----------
    path : str or Path
        The store.
    run : Run
        The run to fine-tune; the store must hold features of its network and its data.
    cuts : list of str
        Layers before the first trained one at which the network can be cut, in graph order, after `PIXELS`, which
        comes first. The latest one that the store holds is used.
    labels : Labels, optional
        The labels file under which the run was trained.

    Raises
    ------
    RunError
        If the store holds other images, labels or splits than the run was trained on, or features of another network.
    ConfigurationError
        If the store holds none of these layers.
    """
    store = FeatureStore.open(path)
    store = store if labels is None else with_labels(store, labels)
    _check_rows(store, run)
    allowed = cuts[1:]
    if not allowed:
        raise ConfigurationError(
            "from_cache: no single tensor separates the first trained layer from the layers before it, so there is "
            "nothing to cache; give --images, or unfreeze from a later layer"
        )
    found = [name for name in store.names if (r := store.recipes[name]).pooling == "none" and r.layer in allowed]
    if not found:
        raise ConfigurationError(
            f"{path}: holds {', '.join(store.names)}; expected {allowed[-1]} without pooling (earlier layers that would "
            f"do: {', '.join(allowed[-4:-1]) or 'none'}). Make it with: bottleneck extract IMAGES --out FILE.h5 "
            f"--layer {allowed[-1]}, and the --backbone, --weights and --image-size of the run"
        )
    cut = CachedCut(store, max(found, key=lambda name: allowed.index(store.recipes[name].layer)))
    differences = {
        field: values for field, values in run.recipe.difference(cut.recipe).items() if field.split(".")[0] not in _FREE
    }
    if differences:
        listed = "; ".join(f"{field}: {ours} -> {theirs}" for field, (ours, theirs) in differences.items())
        raise RunError(
            f"{path}: {cut.name} has another recipe than the features of {run.run_id} ({listed}). Extract both with the "
            "same --backbone, --weights, --image-size, --resize, --fit, --decode and --precision."
        )
    return cut


def unlike(expected: Sequence[str], received: Sequence[str]) -> str:
    """Say which classes of a run are missing, and which the run does not know.

    Examples
    --------
    >>> unlike(["cat", "dog"], ["dog", "wolf"])
    "without its class 'cat'; 'wolf' is no class of the run"
    """
    missing, added = sorted(set(expected) - set(received)), sorted(set(received) - set(expected))
    said = [f"without its {'class' if len(missing) == 1 else 'classes'} {listed(missing)}"] if missing else []
    said += [f"{listed(added)} {'is no class' if len(added) == 1 else 'are no classes'} of the run"] if added else []
    return "; ".join(said) or "they are in another order"


def _check_rows(store: FeatureStore, run: Run) -> None:
    if store.data_digest == run.config["features"]["data_digest"]:
        return
    where = f"{store.path}: its images are not those that {run.run_id} was trained on"
    if store.labelled_by:
        raise RunError(
            f"{where}: under {store.labelled_by['path']} they have other labels, classes or splits. Train a head under the "
            "same labels file first: bottleneck train-head FEATURES --labels FILE"
        )
    if (names := names_of(store)) != run.classes:
        raise RunError(f"{where} ({unlike(run.classes, names)}). Give a store of the same images.")
    ours, theirs = (rule or "as given" for rule in (store.split_rule, run.split_rule))
    other = "the split rule is the same" if ours == theirs else f"it is split {ours}, the run {theirs}"
    raise RunError(
        f"{where}: images, labels or splits differ ({other}; {len(store)} rows). Extract both from the same images with "
        "the same --split and --seed; one store can hold several layers."
    )


def data_of(store: FeatureStore) -> Data:
    """The rows of a store as the data to train on."""
    table = store.images
    description = f"{store.path} ({store.source})" if store.source else str(store.path)
    return Data(
        description,
        table.paths,
        targets_of(store, np.arange(len(table))),
        table.splits,
        table.sha256,
        store.data_digest,
        names_of(store),
        store.labelled_by,
    )


class CachedFeatures:
    """Cut features read from a store. If it holds several views, each epoch reads one of them per image.

    Parameters
    ----------
    cut : CachedCut
        The feature set. It is memory-mapped, and verified against its checksums when it is first read.
    batch_size : int
        Rows per batch.
    seed : int
        The view that an epoch reads depends on this seed, the epoch and the image's content, not on order or batch.
    """

    def __init__(self, cut: CachedCut, *, batch_size: int, seed: int) -> None:
        self._array = cut.store.array(cut.name)
        self._views, self._batch_size, self._seed = cut.store.views(cut.name), batch_size, seed
        self._sha256 = cut.store.images.sha256

    def readable(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def batches(self, rows: np.ndarray, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        views = np.zeros(len(rows), np.int64)
        if epoch != PLAIN and self._views > 1:
            views = drawn_views(self._sha256[rows], self._views, seed=self._seed, epoch=epoch)
        for start in range(0, len(rows), self._batch_size):
            batch = rows[start : start + self._batch_size]
            yield batch, np.asarray(self._array[batch, views[start : start + self._batch_size]])


def drawn_views(sha256: np.ndarray, views: int, *, seed: int, epoch: int) -> np.ndarray:
    """Draw the view of each image that an epoch reads, int64, (n,); each of the ``views`` is equally likely.

    Parameters
    ----------
    sha256 : uint8, (n, 32)
        Content hashes of the images.
    """
    prefix = f"epoch view:{seed}:{epoch}:".encode("ascii")
    draws = [hashlib.sha256(prefix + content.tobytes()).digest()[:8] for content in sha256]
    return np.array([int.from_bytes(draw, "little") % views for draw in draws], dtype=np.int64)
