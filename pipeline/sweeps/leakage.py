"""Find near-duplicates across splits: images in different splits whose features are almost equal.

    rows --pool, normalise, project--> short vectors --matrix product in blocks--> candidates --exact--> pairs

Files with the same bytes are found by their hash when a store is assembled. This module finds the same picture encoded
again, resized, mirrored or slightly cropped, and two photographs of the same scene.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from features.cache import cache_path
from features.canonical import canonical_json, digest_of
from features.errors import check_range
from features.files import printable, whole_file
from features.progress import counted
from features.sources.splits import SPLITS
from pipeline.progress import QUIET
from pipeline.search.vectors import Vectors, normalised

if TYPE_CHECKING:
    from features.store.reader import FeatureStore

logger = logging.getLogger(__name__)

# Measured with MobileNetV2 features (out_relu.avg, 224 px) on 200 images each of cats-dogs and flowers17. The share of
# altered copies at or above 0.92 is 1.00 for JPEG quality 75, 0.99 for a 5 % crop, 0.92 and 0.94 for mirrored images,
# 0.66 (where the images were already small) and 1.00 for half the size. At or above it are 1 of 4.5 million pairs of
# cats-dogs and 82 of 0.9 million pairs of flowers17: 80 of these are copies or show the same flower, 2 show two flowers
# that look alike.
THRESHOLD = 0.92
PROJECTED = 128  # columns after projection, used to estimate cosines if there are too many rows
EXACT_WORK = 1 << 38  # multiplications up to which cosines are computed without projection, a few seconds
PAIRS_CHECKED = 1 << 34  # comparisons of projected rows, about a minute on two processors
# The standard deviation of the cosine c after a random projection to k columns is (1 - c^2) / sqrt(k), 0.014 at 0.92.
# Candidates are pairs down to three deviations below the threshold; they are then compared exactly.
DEVIATIONS = 3.0
KEPT = 20  # candidates kept per reported pair
QUICK_PAIRS = 1 << 31  # comparisons in the check before training, a few seconds
PRODUCTS_BYTES = 16 << 20  # of one matrix product


@dataclasses.dataclass(frozen=True)
class NearDuplicate:
    """Two images in different splits with almost equal features; ``similarity`` is the cosine of these, -1 to 1."""

    first: str
    second: str
    similarity: float
    splits: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Leakage:
    """The result of `near_duplicates`.

    Parameters
    ----------
    pairs : tuple of NearDuplicate
        The pairs, most similar first.
    found : int
        Number of pairs at or above the threshold, possibly more than are listed; an estimate if ``capped`` says so.
    checked, possible : int
        Number of pairs that were compared, and number of all pairs across splits.
    capped : str
        What was left out and why; empty if nothing was left out.
    threshold : float
        Minimum similarity of a pair.
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
    """Find near-duplicates between train, validation and test by the cosine of their features.

    Parameters
    ----------
    store : FeatureStore
        The features. View 0 is compared; spatial features are averaged.
    name : str, optional
        Feature set; may be left out if the store has only one.
    threshold : float, 0-1
        Minimum cosine of a near-duplicate; the default was measured with MobileNetV2, see `THRESHOLD`.
    limit : int
        Maximum number of pairs to list.
    memory_bytes : int
        Bytes for vectors and products; rows are read in pieces.
    seed : int
        Random seed of the projection, and of the sample of images if there are too many.
    pairs_checked : int
        Maximum number of comparisons. If there are more pairs, only a random sample of the images of each split is
        compared, and ``capped`` of the result says so.

    Raises
    ------
    ConfigurationError
        If a number is out of range, or there is no such feature set.
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
    # The training split, the largest, is read once for each stretch of the other split that fits into memory.
    for a, b in sides:
        search.compare(parts[a], parts[b])
    first, second, similarity = search.verified()
    if search.dropped:
        notes.append(f"only the {len(first)} most similar of {search.found} candidates were compared exactly")
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
    """The vectors of rows, and the candidates so far: the most similar pairs, and the number of all pairs found."""

    def __init__(self, store: FeatureStore, name: str | None, threshold: float, memory_bytes: int, keep: int) -> None:
        self.threshold, self.memory_bytes, self.keep = threshold, memory_bytes, keep
        self._rows = Vectors(store, name)
        self.width = self._rows.width
        self._projection: np.ndarray | None = None
        self._floor, self._cut = threshold, -np.inf
        self._candidates: list[np.ndarray] = []
        self._similarities: list[np.ndarray] = []
        self.found, self.dropped = 0, False

    def project(self, seed: int) -> None:
        """Estimate cosines from random projections from now on."""
        generator = np.random.default_rng(seed)
        self._projection = generator.standard_normal((self.width, PROJECTED), dtype=np.float32)
        self._floor = self.threshold - DEVIATIONS * (1 - self.threshold**2) / np.sqrt(PROJECTED)

    def compare(self, many: np.ndarray, few: np.ndarray) -> None:
        """Add the similar pairs between two sets of rows to the candidates."""
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
        """Row numbers and exact cosines of the candidates at or above the threshold."""
        pairs = np.concatenate([np.zeros((0, 2), np.int64), *self._candidates])
        similarity = np.concatenate([np.zeros(0, np.float32), *self._similarities])
        if self._projection is not None and len(pairs):
            self._projection = None
            rows, place = np.unique(pairs, return_inverse=True)
            place = place.reshape(-1, 2)
            for chosen in np.array_split(np.argsort(place[:, 0], kind="stable"), len(pairs) // 1000 + 1):
                wanted = np.unique(place[chosen])
                vectors = self._rows.at(rows[wanted])
                ends = np.searchsorted(wanted, place[chosen])
                similarity[chosen] = np.einsum("nd,nd->n", vectors[ends[:, 0]], vectors[ends[:, 1]])
        kept = similarity >= self.threshold
        return pairs[kept, 0], pairs[kept, 1], np.minimum(similarity[kept], 1)

    def _add(self, pairs: np.ndarray, similarity: np.ndarray) -> None:
        """Add candidates, and keep only the most similar ones if there are too many."""
        self._candidates.append(pairs)
        self._similarities.append(similarity)
        if sum(map(len, self._similarities)) > 2 * self.keep:
            self.dropped = True
            pairs, similarity = np.concatenate(self._candidates), np.concatenate(self._similarities)
            best = np.argpartition(-similarity, self.keep)[: self.keep]
            self._candidates, self._similarities = [pairs[best]], [similarity[best]]
            self._cut = similarity[best].min()

    def _vectors(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield row numbers and their vectors of length 1, projected or not, float32 (k, columns), piece by piece."""
        for piece, values in self._rows.pieces(rows):
            yield piece, values if self._projection is None else normalised(values @ self._projection)


def warn_near_duplicates(store: FeatureStore, names: Sequence[str] = ()) -> None:
    """Log a line about near-duplicates across splits, found with the first of the given feature sets.

    It is said once for the same images, splits and features: a note in the cache keeps that it has been, or that there is
    nothing to say. Without a cache it is said each time.
    """
    known = [name for name in names or store.names if name in store.names]
    if not known or QUIET.is_set():
        return  # unknown names are refused later, where they are used
    key = digest_of([store.data_digest, store.recipes[known[0]].fingerprint, THRESHOLD])
    note = cache_path("near-duplicates", f"{key}.json")
    if note.is_file():
        return
    found = near_duplicates(store, known[0], limit=1, pairs_checked=QUICK_PAIRS)
    if found.found:
        pair, alike = found.pairs[0], "; so many look alike to this network" if found.found > len(store) else ""
        names_of = f"{printable(pair.first)} ~ {printable(pair.second)}"
        pairs, are = counted(found.found, "pair"), "is" if found.found == 1 else "are"
        text = "%s: %s of near-duplicates %s in different splits, such as %s%s; the report shows them"
        logger.warning(text, store.path, pairs, are, names_of, alike)
    with contextlib.suppress(OSError), whole_file(note) as file:  # the note only saves a repetition
        file.write(canonical_json({"pairs": found.found}).encode())
