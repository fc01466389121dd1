"""Near-duplicates across splits: images whose features are almost the same on both sides of a split.

    rows --pool, normalise, project--> short vectors --matrix product in blocks--> candidates --exact--> pairs

Files with the same bytes are found by their hash when a store is assembled; here it is the same picture encoded
again, resized, mirrored or cropped a little, or the same scene photographed twice.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from features.errors import check_range
from features.files import printable
from features.sources.splits import SPLITS
from pipeline.heads.pooling import choose_pool, pool_features

if TYPE_CHECKING:
    from features.store.reader import FeatureStore

logger = logging.getLogger(__name__)

# Measured with MobileNetV2 features, out_relu.avg at 224 px, on 200 images of cats-dogs and 200 of flowers17. Share of
# altered copies at or above 0.92: JPEG quality 75 1.00, cropped by 5 % 0.99, mirrored 0.92 and 0.94, half the size 0.66
# (of images that were small already) and 1.00. Above it are 1 of 4.5 million pairs of cats-dogs, and 82 of 0.9 million of
# flowers17: 80 of them are copies or show the same flower, 2 are of two flowers that look alike.
THRESHOLD = 0.92
PROJECTED = 128  # columns that cosines are estimated in where there are too many rows
EXACT_WORK = 1 << 38  # products of two numbers, a few seconds
PAIRS_CHECKED = 1 << 34  # comparisons of projected rows, about a minute on two processors
# The cosine c of two random projections to k columns deviates by (1 - c^2) / sqrt(k): 0.014 at 0.92. Candidates are
# taken from three deviations below, and compared exactly.
DEVIATIONS = 3.0
KEPT = 20  # candidates kept for each pair that is reported
QUICK_PAIRS, SHOWN = 1 << 31, 5  # before training: some seconds at most, and what is named
READ_BYTES = 4 << 20
PRODUCTS_BYTES = 16 << 20  # of one step


@dataclasses.dataclass(frozen=True)
class NearDuplicate:
    """Two images in different splits whose features are almost the same; ``similarity`` is their cosine, -1 to 1."""

    first: str
    second: str
    similarity: float
    splits: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Leakage:
    """What `near_duplicates` found.

    Parameters
    ----------
    pairs : tuple of NearDuplicate
        The most similar first.
    found : int
        Pairs at or above the threshold, which may be more than those listed; an estimate where ``capped`` says so.
    checked, possible : int
        Pairs compared, and pairs across splits there are.
    capped : str
        What was left out and why; empty if nothing was.
    threshold : float
        Least similarity of a pair.
    """

    pairs: tuple[NearDuplicate, ...]
    found: int
    checked: int
    possible: int
    capped: str
    threshold: float


def near_duplicates(
    store: FeatureStore,
    name: str | None = None,
    *,
    threshold: float = THRESHOLD,
    limit: int = 100,
    memory_bytes: int = 512 << 20,
    seed: int = 0,
    pairs_checked: int = PAIRS_CHECKED,
) -> Leakage:
    """Compare train with validation and test, and validation with test, by the cosine of their features.

    Parameters
    ----------
    store : FeatureStore
        The features; view 0 is compared, spatial ones averaged.
    name : str, optional
        Feature data set; may be left out where there is one.
    threshold : float
        Least cosine of a near-duplicate; the default was measured with MobileNetV2, see `THRESHOLD`.
    limit : int
        Pairs to list.
    memory_bytes : int
        For vectors and products; rows come and go in pieces.
    seed : int
        Of the projection, and of the images that are compared where there are too many.
    pairs_checked : int
        Comparisons at most. Above it only some images of each split are compared, and ``capped`` says so.

    Raises
    ------
    ConfigurationError
        If a number is out of range, or there is no such data set.
    """
    check_range("threshold", threshold, 0, 1)
    check_range("limit", limit, 1, 1_000_000)
    check_range("memory", memory_bytes, 16 << 20, 1 << 50)
    search = _Search(store, name, threshold, memory_bytes, KEPT * limit)
    parts = {split: store.rows(split) for split in SPLITS[:3]}
    sides = [pair for pair in itertools.combinations(SPLITS[:3], 2) if len(parts[pair[0]]) and len(parts[pair[1]])]
    possible = sum(len(parts[a]) * len(parts[b]) for a, b in sides)
    notes = []
    if possible > pairs_checked:
        share = float(np.sqrt(pairs_checked / possible))
        generator = np.random.default_rng(seed)
        for split, rows in parts.items():
            parts[split] = np.sort(generator.choice(rows, int(share * len(rows)), replace=False))
        notes.append(f"{share:.0%} of the images of each split were compared, chosen at random")
    checked = sum(len(parts[a]) * len(parts[b]) for a, b in sides)
    if checked * search.width > EXACT_WORK and search.width > PROJECTED:
        search.project(seed)
    # Train, the largest, is read once for each part of the others that memory holds.
    for a, b in sides:
        search.compare(parts[a], parts[b])
    first, second, similarity = search.verified()
    if search.dropped:
        notes.append(f"only the {len(first)} most similar of {search.found} candidates were looked at more closely")
    listed = np.argsort(-similarity, kind="stable")[:limit]
    table = store.images
    pairs = tuple(
        NearDuplicate(
            table.paths[first[i]],
            table.paths[second[i]],
            float(similarity[i]),
            (SPLITS[table.splits[first[i]]], SPLITS[table.splits[second[i]]]),
        )
        for i in listed.tolist()
    )
    found = search.found if search.dropped else len(first)
    return Leakage(pairs, found, checked, possible, "; ".join(notes), threshold)


class _Search:
    """Vectors of rows, and the candidates found so far: the most similar ones, and how many there were."""

    def __init__(self, store: FeatureStore, name: str | None, threshold: float, memory_bytes: int, keep: int) -> None:
        self.store, self.threshold, self.memory_bytes, self.keep = store, threshold, memory_bytes, keep
        self.name = store.names[0] if name is None and len(store.names) == 1 else name or ""
        _, views, *shape = store.shape(self.name)
        self.pool = choose_pool(None, "avg", shape)
        self.width = shape[-1]
        self._row_bytes = views * int(np.prod(shape)) * np.dtype(store.recipes[self.name].dtype).itemsize
        self._projection: np.ndarray | None = None
        self._floor, self._cut = threshold, -np.inf
        self._candidates: list[np.ndarray] = []
        self._similarities: list[np.ndarray] = []
        self.found, self.dropped = 0, False

    def project(self, seed: int) -> None:
        """From now on estimate cosines from random projections."""
        generator = np.random.default_rng(seed)
        self._projection = generator.standard_normal((self.width, PROJECTED), dtype=np.float32)
        self._floor = self.threshold - DEVIATIONS * (1 - self.threshold**2) / np.sqrt(PROJECTED)

    def compare(self, many: np.ndarray, few: np.ndarray) -> None:
        """Add the similar pairs of two sets of rows to the candidates."""
        columns = self.width if self._projection is None else PROJECTED
        held = max(1, self.memory_bytes // 4 // (4 * columns))
        for start in range(0, len(few), held):
            rows = few[start : start + held]
            vectors = np.concatenate([values for _, values in self._vectors(rows)])
            for piece, values in self._vectors(many):
                step = max(1, min(PRODUCTS_BYTES, self.memory_bytes // 16) // (4 * len(values)))
                for begin in range(0, len(rows), step):
                    products = values @ vectors[begin : begin + step].T
                    if products.max() >= self._floor:
                        self.found += int(np.count_nonzero(products >= self._floor))
                        a, b = np.nonzero((products >= self._floor) & (products > self._cut))
                        self._add(np.stack([piece[a], rows[begin + b]], axis=1), products[a, b])

    def verified(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows and exact cosines of the candidates that are at or above the threshold."""
        pairs = np.concatenate([np.zeros((0, 2), np.int64), *self._candidates])
        similarity = np.concatenate([np.zeros(0, np.float32), *self._similarities])
        if self._projection is not None and len(pairs):
            self._projection = None
            rows, place = np.unique(pairs, return_inverse=True)
            place = place.reshape(-1, 2)
            for chosen in np.array_split(np.argsort(place[:, 0], kind="stable"), len(pairs) // 1000 + 1):
                wanted = np.unique(place[chosen])
                vectors = np.concatenate([values for _, values in self._vectors(rows[wanted])])
                ends = np.searchsorted(wanted, place[chosen])
                similarity[chosen] = np.einsum("nd,nd->n", vectors[ends[:, 0]], vectors[ends[:, 1]])
        kept = similarity >= self.threshold
        return pairs[kept, 0], pairs[kept, 1], np.minimum(similarity[kept], 1)

    def _add(self, pairs: np.ndarray, similarity: np.ndarray) -> None:
        """Keep the most similar candidates."""
        self._candidates.append(pairs)
        self._similarities.append(similarity)
        if sum(map(len, self._similarities)) > 2 * self.keep:
            self.dropped = True
            pairs, similarity = np.concatenate(self._candidates), np.concatenate(self._similarities)
            best = np.argpartition(-similarity, self.keep)[: self.keep]
            self._candidates, self._similarities = [pairs[best]], [similarity[best]]
            self._cut = similarity[best].min()

    def _vectors(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Row numbers and their normalised vectors, float32, (k, columns), in pieces."""
        step = max(1, READ_BYTES // self._row_bytes)
        edges = np.flatnonzero(np.diff(rows // step)) + 1
        for piece in np.split(rows, edges) if len(rows) else ():
            stored = self.store.read(self.name, int(piece[0]), int(piece[-1]) + 1)
            values = pool_features(stored[piece - piece[0], 0], self.pool)
            if self._projection is not None:
                values = values @ self._projection
            lengths = np.linalg.norm(values, axis=1, keepdims=True)
            yield piece, values / np.where(lengths > 0, lengths, 1)  # a row of zeros resembles none


def warn_near_duplicates(store: FeatureStore, names: Sequence[str] = ()) -> None:
    """Log how many images of one split look like one of another, by the store's first data set asked for."""
    known = [name for name in names or store.names if name in store.names]
    if not known:
        return  # the names are refused where they are used
    found = near_duplicates(store, known[0], limit=SHOWN, pairs_checked=QUICK_PAIRS)
    if found.found:
        alike = ". So many mean that all such images look alike to this network" if found.found > len(store) else ""
        pairs = "; ".join(f"{printable(pair.first)} ~ {printable(pair.second)}" for pair in found.pairs)
        logger.warning(
            "%s: %d pairs of near-duplicates lie in two splits (cosine of %s at least %g), such as %s%s",
            *(
                store.path,
                found.found,
                known[0],
                found.threshold,
                pairs,
                (f" ({found.capped})" if found.capped else "") + alike,
            ),
        )
