"""Find the quantised network of an extraction in int8, or make it: once, from some of the user's own images.

    store or its shards name one -> the file, from where it is kept
    neither does -> 320 images, drawn by the hash of their paths -> features.networks.quantising -> cache

It is made before the first row and never again: what changes later (images, labels, splits) leaves it as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from features.cache import cache_path, keep_json, kept_json
from features.canonical import digest_of
from features.errors import ConfigurationError, SourceError, UnreadableImageError
from features.extraction.journal import PartsFolder
from features.extraction.options import ExtractionOptions
from features.machine import installed_version, processors, software_versions
from features.networks.quantised import find, keep_in_cache, networks_of_store, read
from features.pixels.batches import loaded
from features.pixels.decode import decode_image
from features.progress import Progress, counted
from features.recipe import PixelRule
from features.sources.imageset import ImageSet
from features.sources.splits import SPLITS
from features.store.reader import FeatureStore, parts_folder, shard_path

if TYPE_CHECKING:
    from features.networks.network import Network

logger = logging.getLogger(__name__)
IMAGES = 320  # NNCF takes 300 by default
_HELD_OUT = (SPLITS.index("validation"), SPLITS.index("test"))
READ_AHEAD = 16


def with_quantised(
    options: ExtractionOptions, images: ImageSet, out: Path, progress: Progress | None = None
) -> ExtractionOptions:
    """Return the options with the file of the quantised network; unchanged if they need none or name one.

    Parameters
    ----------
    options : ExtractionOptions
        The options.
    images : ImageSet
        The whole source.
    out : Path
        The store that will be made or updated; only its quantised network is looked up.
    progress : callable, optional
        Called with ``("calibrate", done, total)``.

    Raises
    ------
    ConfigurationError
        If the quantised network of the store is lost, or the store has another precision and is not to be replaced.
    OpenVinoError
        If NNCF is missing, or the network cannot be quantised.
    SourceError
        If there is no image to calibrate on.
    """
    if options.precision != "int8" or options.quantised is not None:
        return options
    if (digest := _digest_before(out, overwrite=options.overwrite)) is not None:
        try:
            file = find(digest, [networks_of_store(out)])
            if not options.overwrite or _computes(file, options):
                return dataclasses.replace(options, quantised=str(file))
        except ConfigurationError as error:
            if not options.overwrite:
                raise
            logger.warning("%s: it is replaced, because %s", out, error)
    return dataclasses.replace(options, quantised=str(_calibrated(options, images, progress)))


def _computes(file: Path, options: ExtractionOptions) -> bool:
    """Whether a quantised network computes the features that are asked for: a store may be replaced by one of others."""
    network, _ = read(file)
    return all(network.number_of(recipe) is not None for recipe in _exact(options).recipes)


def _exact(options: ExtractionOptions) -> Network:
    """Return the network that is quantised."""
    from features.networks.network import resolve_network  # tests put other networks there

    return resolve_network(dataclasses.replace(options, precision="float32", engine="openvino", device="cpu"))


def _digest_before(out: Path, *, overwrite: bool) -> str | None:
    """Return the digest of the quantised network that the store, or shards of a killed run, were made with."""
    stores = []
    parts = PartsFolder(parts_folder(out))
    parts.read()
    try:
        if out.exists():
            stores.append(FeatureStore.open(out))
        stores += [FeatureStore.open_shard(shard_path(parts.path, identity)) for identity in parts.records]
    except OSError:  # damaged: whether that matters, the plan decides
        if not overwrite:
            raise
    recipes = [recipe for store in stores for recipe in store.recipes.values()]
    digest = next((recipe.quantised for recipe in recipes if recipe.quantised is not None), None)
    if digest is None and recipes and not overwrite:  # before minutes of work that would be refused
        raise ConfigurationError(
            f"{out}: holds features of another recipe (precision: {recipes[0].precision} -> int8). No row of it can be reused. "
            "Choose another --out, or add --overwrite to replace the store."
        )
    return digest


def _calibrated(options: ExtractionOptions, images: ImageSet, progress: Progress | None) -> Path:
    """Quantise the network, or take what the same network and images gave before; return the path in the cache."""
    from features.networks.quantising import quantise

    network = _exact(options)
    recipes = tuple(recipe.plain.in_float32 for recipe in network.recipes)
    rule = recipes[0].pixels
    with ThreadPoolExecutor(options.workers or processors(), "decode") as pool:
        drawn = list(_readable(images, drawn_rows(images, options.seed), rule, pool))
    if not drawn:
        raise SourceError(
            f"{images.description}: no image to calibrate int8 on: none that can be read is not marked validation or test. Add "
            "training images, name a quantised network with --quantised FILE, or choose another --precision"
        )
    hashes = sorted(sha256 for _, sha256 in drawn)
    made_of = [[recipe.to_dict() for recipe in recipes], hashes, software_versions(), installed_version("nncf")]
    memo = cache_path("quantised", f"{digest_of(made_of)}.json")
    if isinstance(digest := kept_json(memo), str):
        try:
            return find(digest, [])
        except ConfigurationError:
            pass  # removed from the cache, and no store was made with it: see _digest_before
    few = "" if len(drawn) == IMAGES else f", all that there are; {IMAGES} would be better"
    logger.warning("int8: calibrating on %s%s", counted(len(drawn), "image"), few)
    pixels = _Pixels(images, [row for row, _ in drawn], rule, progress)
    calibration = {"images": len(drawn), "sha256": digest_of(hashes)}
    path = keep_in_cache(quantise(network.conversion(), recipes, pixels, len(drawn), calibration))
    keep_json(memo, path.stem)
    return path


def drawn_rows(images: ImageSet, seed: int) -> list[int]:
    """Return the rows that may be calibrated on, in the order of the seeded hash of their paths.

    These are all that the source does not mark validation or test. Labels play no part.
    """
    rows = np.flatnonzero(~np.isin(images.given_splits, _HELD_OUT)).tolist()
    return sorted(rows, key=lambda row: hashlib.sha256(b"%d|%s" % (seed, os.fsencode(images.paths[row]))).digest())


def _readable(
    images: ImageSet, rows: list[int], rule: PixelRule, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, str]]:
    """Yield the first ``IMAGES`` rows that can be read and decoded, with their content hash."""

    def load(row: int) -> str:
        data = images.read(row)
        decode_image(data, rule)
        return hashlib.sha256(data).hexdigest()

    found = 0
    for row, sha256 in loaded(pool, load, rows, READ_AHEAD):
        if isinstance(sha256, UnreadableImageError):
            continue
        yield row, sha256
        found += 1
        if found == IMAGES:
            return


class _Pixels:
    """Calibration images, decoded each time, so that memory does not depend on their number and size."""

    def __init__(self, images: ImageSet, rows: list[int], rule: PixelRule, progress: Progress | None) -> None:
        self._images, self._rows, self._rule, self._progress = images, rows, rule, progress

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield uint8, (1, h, w, 3), 0-255."""
        for done, row in enumerate(self._rows):
            if self._progress:
                self._progress("calibrate", done, len(self._rows))
            yield decode_image(self._images.read(row), self._rule).pixels[None]
