"""Features as a step of a scikit-learn pipeline, each image inferred once and kept in a store.

    X --hash--> rows in the store | missing --decode | infer--> the store grows --> float32, (n, d), in the order of X

This module is not imported by any other: whoever uses it has imported scikit-learn already.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin

from features.errors import ConfigurationError, ExtractionError, LockedError, UnreadableImageError, check_range
from features.files import atomic_file, locked, printable, sweep, writable_folder
from features.machine import processors, software_versions
from features.networks.network import Network, resolve_network
from features.pixels.batches import ahead
from features.pixels.decode import Decoded, decode_image, read_bytes
from features.pixels.png import plain_png
from features.recipe import NetworkOptions, PixelRule, Recipe
from features.sources.splits import UNLABELLED
from features.store.reader import FeatureStore
from features.store.schema import FeatureSpec, ImageTable, Quarantine, digest_rows
from features.store.writer import StoreWriter

logger = logging.getLogger(__name__)
SOURCE = "images given to FeatureExtractor"  # stores of this source are ours to extend
SAVE_SECONDS = 60.0  # what is computed since is lost if the process is killed
COPY_BYTES = 4 << 20
STORE_SUFFIXES = (".h5", ".hdf5")
NAMED = 10  # unreadable images that an error lists


class FeatureExtractor(TransformerMixin, BaseEstimator):
    """Images -> features of a frozen backbone, for ``sklearn.pipeline.Pipeline`` and cross-validation.

    Parameters
    ----------
    backbone, weights : str
        See ``features.recipe.NetworkOptions``, also for the parameters down to ``device``.
    layer : str, optional
        Backbone layer whose output is kept; the last one without it. What is not a vector is flattened.
    pooling : {"none", "avg", "max", "flatten"}, optional
        Of a 4-D output. Without it ``avg`` for the last layer, ``none`` for one asked for.
    image_size : int or (int, int), optional
        Height and width in pixels; the backbone's own without it.
    resize, fit_rule, decode, dtype, engine, precision, device : str
        As in ``extract_features``; ``fit_rule`` is its ``fit``, which is a method here.
    store : path, optional
        Where features are kept; without it every call computes them. A path that ends in ``.h5`` is one file, of one
        recipe; any other is a folder that gets a file per recipe, so that a grid search may vary layers. The
        file grows by what it lacks. One that ``extract`` made is read and never changed: what it lacks is computed
        each time.
    batch_size : int
        Images of one forward pass.
    workers : int, optional
        Threads that read and decode; the processors of this process without it.
    lock_timeout : float
        Seconds to wait while another process extends the same store. Whoever comes second finds what the first has
        computed, so that with ``n_jobs`` above 1, too, each image is inferred once.

    Notes
    -----
    Rows are found by the hash of the file. A file that the store knows by path, size and modification time is not
    read again. Fitting learns nothing from the images: the backbone is frozen.

    Examples
    --------
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> model = make_pipeline(FeatureExtractor(store="features-cache"), LogisticRegression())
    >>> cross_val_score(model, paths, labels)                         # doctest: +SKIP
    """

    def __init__(
        self,
        backbone: str = "mobilenetv2",
        *,
        weights: str = "imagenet",
        layer: str | None = None,
        pooling: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        resize: str = "antialias",
        fit_rule: str = "stretch",
        decode: str = "full",
        dtype: str = "float32",
        engine: str = "auto",
        precision: str = "float32",
        device: str = "auto",
        store: str | os.PathLike[str] | None = None,
        batch_size: int = 32,
        workers: int | None = None,
        lock_timeout: float = 3600.0,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.layer = layer
        self.pooling = pooling
        self.image_size = image_size
        self.resize = resize
        self.fit_rule = fit_rule
        self.decode = decode
        self.dtype = dtype
        self.engine = engine
        self.precision = precision
        self.device = device
        self.store = store
        self.batch_size = batch_size
        self.workers = workers
        self.lock_timeout = lock_timeout

    def fit(self, X: Any, y: Any = None) -> FeatureExtractor:
        """Check parameters and the kind of input; no image is opened.

        Raises
        ------
        ConfigurationError
            For a parameter or an input that cannot be used.
        """
        images_of(X)
        network = self._network()
        self.recipe_ = network.recipes[0]
        self.n_features_out_ = _width(network)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Features of images, in their order.

        Parameters
        ----------
        X : sequence of paths, (n,) or (n, 1), or uint8, (n, h, w, 3) or (n, h, w), 0-255
            Image files or pixels.

        Returns
        -------
        float32, (n, d)

        Raises
        ------
        UnreadableImageError
            Naming the images that cannot be read: no row is left out, as it would shift the labels behind it. The
            features of the others are kept.
        LockedError
            If another process was still extending the store after ``lock_timeout`` seconds.
        ConfigurationError
            If the store is of another recipe.
        """
        images = images_of(X)
        network = self._network()
        recipe = network.recipes[0]
        path = self._path(recipe)
        features = np.empty((len(images), _width(network)), np.float32)
        with ThreadPoolExecutor(self.workers or processors(), "decode") as pool:
            store = _open(path, recipe)
            hashes = _hashes(images, store, pool)
            first: dict[bytes, _Image] = {}
            for sha256, image in zip(hashes, images, strict=True):
                first.setdefault(sha256, image)
            infer = functools.partial(self._infer, network, pool)
            if path is not None and (store is None or store.source == SOURCE) and first.keys() - _rows(store).keys():
                writable_folder(path.parent)
                with _patiently_locked(path, self.lock_timeout):
                    sweep(path)
                    # Opened again: while this process waited, another one may have computed the same images.
                    store = self._extend(path, _open(path, recipe), first, network, infer)
            rows = _rows(store)
            here = np.array([rows.get(sha256, -1) for sha256 in hashes], np.int64)
            if store is not None:
                _copy(store, recipe.name, here, features)
            lacking = {sha256: image for sha256, image in first.items() if sha256 not in rows}
            if lacking and path is not None:
                logger.warning(
                    "%s lacks %d of these images; it was made by an extraction, so they are computed and not kept",
                    *(path, len(lacking)),
                )
            places: dict[bytes, list[int]] = {}
            for place in np.flatnonzero(here < 0).tolist():
                places.setdefault(hashes[place], []).append(place)
            for made, values in infer(lacking):
                for number, entry in enumerate(made):
                    features[places[entry.sha256]] = values[number].reshape(-1)
        return features

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the columns: data set and number, such as ``out_relu.avg_17``."""
        network = self._network()
        return np.array([f"{network.recipes[0].name}_{column}" for column in range(_width(network))], dtype=object)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit, tags.no_validation = False, True
        tags.input_tags.one_d_array = tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        return tags

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_kept"}  # no network

    def _network(self) -> Network:
        check_range("batch size", self.batch_size, 1, 4096)
        check_range("workers", 1 if self.workers is None else self.workers, 1, 1024)
        options = NetworkOptions(
            self.backbone,
            self.weights,
            layers=() if self.layer is None else (self.layer,),
            pooling=self.pooling,
            image_size=self.image_size,
            resize=self.resize,
            fit=self.fit_rule,
            decode=self.decode,
            dtype=self.dtype,
            engine=self.engine,
            precision=self.precision,
            device=self.device,
        )
        return resolve_network(options)

    def _path(self, recipe: Recipe) -> Path | None:
        """The file of a recipe."""
        if self.store is None:
            return None
        path = Path(os.path.realpath(os.path.expanduser(self.store)))
        if path.suffix.lower() in STORE_SUFFIXES:
            return path
        return path / f"{recipe.backbone}-{recipe.fingerprint[:16]}.h5"

    def _infer(self, network: Network, pool: Executor, images: dict[bytes, _Image]) -> Iterator[_Made]:
        """Features of images, a batch at a time; the unreadable ones are named when all others are done."""
        recipe = network.recipes[0]
        refused: list[tuple[_Image, UnreadableImageError]] = []
        batch: list[_Entry] = []
        pixels = np.empty((self.batch_size, recipe.pixels.height, recipe.pixels.width, 3), np.uint8)
        outcomes = ahead(pool, functools.partial(_decode, recipe.pixels), [*images.items()], 2 * self.batch_size)
        for (sha256, image), outcome in zip(images.items(), outcomes, strict=True):
            if isinstance(outcome, UnreadableImageError):
                refused.append((image, outcome))
                continue
            pixels[len(batch)] = outcome.pixels
            batch.append(_Entry(sha256, image, outcome.width, outcome.height))
            if len(batch) == self.batch_size:
                yield batch, self._forward(network, pixels)
                batch = []
        if batch:
            yield batch, self._forward(network, pixels[: len(batch)])
        _refuse(refused, len(images))

    def _forward(self, network: Network, pixels: np.ndarray) -> np.ndarray:
        recipe = network.recipes[0]
        key = (recipe.fingerprint, self.batch_size, self.device, self.engine)
        if getattr(self, "_kept", (None,))[0] != key:
            self._kept = key, network.engine(network.recipes, batch_size=self.batch_size, device=self.device)
        engine = self._kept[1]
        with np.errstate(over="ignore"):
            values = engine(pixels)[recipe.name].astype(recipe.dtype)
        if not np.isfinite(values).all():
            raise ExtractionError(
                f"layer {recipe.layer}: a feature is not finite as {recipe.dtype}. Use dtype='float32', or check the "
                "weights."
            )
        return values

    def _extend(
        self,
        path: Path,
        store: FeatureStore | None,
        images: dict[bytes, _Image],
        network: Network,
        infer: Callable[[dict[bytes, _Image]], Iterator[_Made]],
    ) -> FeatureStore | None:
        """Compute what a store lacks and write it; the lock is held."""
        rows = _rows(store)
        made: list[_Made] = []
        saved = time.monotonic()
        try:
            for batch in infer({sha256: image for sha256, image in images.items() if sha256 not in rows}):
                made.append(batch)
                if time.monotonic() - saved > SAVE_SECONDS:
                    store, made = _write(path, store, made, network, self.batch_size), []
                    saved = time.monotonic()
        except UnreadableImageError:
            if made:
                _write(path, store, made, network, self.batch_size)
            raise
        return _write(path, store, made, network, self.batch_size) if made else store


# --- input ------------------------------------------------------------------------------------------------


class _Image(NamedTuple):
    """One image: what it is called, size and time of its file (-1: none), and how its bytes are had."""

    name: str
    size: int
    mtime_ns: int
    read: Callable[[], bytes]


class _Entry(NamedTuple):
    sha256: bytes
    image: _Image
    width: int
    height: int


_Made = tuple[list[_Entry], np.ndarray]


def images_of(X: Any) -> list[_Image]:
    """What an input consists of.

    Raises
    ------
    ConfigurationError
        If it is neither paths nor pixels.
    """
    if hasattr(X, "to_numpy"):  # a column of a data frame
        X = X.to_numpy()
    if isinstance(X, np.ndarray) and X.ndim == 2 and X.shape[1] == 1 and X.dtype.kind in "OUT":
        X = X[:, 0]
    if isinstance(X, str | os.PathLike) or not hasattr(X, "__len__"):
        raise ConfigurationError(
            f"X: received {str(X)[:80]!r}, expected a list of image paths, or uint8 pixels (n, h, w, 3). For a folder "
            "there is features.extract_features."
        )
    return [_image_of(number, item) for number, item in enumerate(X)]


def _image_of(number: int, item: Any) -> _Image:
    if isinstance(item, str | os.PathLike):
        path = os.path.abspath(os.path.expanduser(os.fspath(item)))
        try:
            status = os.stat(path)
        except OSError:
            return _Image(path, -1, -1, functools.partial(read_bytes, path))  # refused when it is read
        return _Image(path, status.st_size, status.st_mtime_ns, functools.partial(read_bytes, path))
    pixels = item[..., 0] if isinstance(item, np.ndarray) and item.shape[2:] == (1,) else item
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or not pixels.size or not _is_image(pixels):
        received = f"{item.dtype} {item.shape}" if isinstance(item, np.ndarray) else repr(item)[:80]
        raise ConfigurationError(
            f"X[{number}]: received {received}, expected the path of an image, or uint8 pixels, 0-255, (h, w, 3) or (h, w)"
        )
    return _Image(f"X[{number}]", -1, -1, functools.partial(plain_png, pixels))


def _is_image(pixels: np.ndarray) -> bool:
    return pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)


def _hashes(images: Sequence[_Image], store: FeatureStore | None, pool: Executor) -> list[bytes]:
    """Content hash of each image; a file that the store knows by path, size and time is not read."""
    known: dict[tuple[str, int, int], bytes] = {}
    if store is not None:
        table, root = store.images, str(store.provenance.get("root", ""))
        columns = zip(table.paths, table.sizes.tolist(), table.mtimes_ns.tolist(), table.sha256, strict=True)
        known = {(os.path.join(root, path), size, time): sha256.tobytes() for path, size, time, sha256 in columns}

    def digest(image: _Image) -> bytes | UnreadableImageError:
        try:
            return hashlib.sha256(image.read()).digest()
        except UnreadableImageError as error:
            return error

    found = [known.get(image[:3]) if image.size >= 0 else None for image in images]
    unknown = [number for number, sha256 in enumerate(found) if sha256 is None]
    refused: list[tuple[_Image, UnreadableImageError]] = []
    for number, outcome in zip(unknown, ahead(pool, digest, [images[number] for number in unknown], 64), strict=True):
        if isinstance(outcome, UnreadableImageError):
            refused.append((images[number], outcome))
        else:
            found[number] = outcome
    _refuse(refused, len(images))
    return [sha256 for sha256 in found if sha256 is not None]


def _decode(rule: PixelRule, item: tuple[bytes, _Image]) -> Decoded | UnreadableImageError:
    sha256, image = item
    try:
        data = image.read()
        if hashlib.sha256(data).digest() != sha256:
            return UnreadableImageError("unreadable", "its content changed in the meantime")
        return decode_image(data, rule)
    except UnreadableImageError as error:
        return error


def _refuse(refused: Sequence[tuple[_Image, UnreadableImageError]], count: int) -> None:
    if not refused:
        return
    named = "; ".join(f"{printable(image.name)} ({error})" for image, error in refused[:NAMED])
    more = f"; and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
    raise UnreadableImageError(
        refused[0][1].reason,
        f"{len(refused)} of {count} images cannot be read: {named}{more}. Leave them out, with their labels, or repair "
        "them.",
    )


# --- store ------------------------------------------------------------------------------------------------


def _width(network: Network) -> int:
    return network.row_bytes // np.dtype(network.recipes[0].dtype).itemsize


def _open(path: Path | None, recipe: Recipe) -> FeatureStore | None:
    """The store as it is; None if there is none yet."""
    if path is None or not path.exists():
        return None
    store = FeatureStore.open(path)
    if all(held.fingerprint != recipe.fingerprint for held in store.recipes.values()):
        differences = [recipe.difference(held) for held in store.recipes.values()]
        fields = "; ".join(
            f"{field} is {held!s:.40}, not {mine!s:.40}" for field, (mine, held) in differences[0].items()
        )
        raise ConfigurationError(
            f"{path}: holds features of another recipe ({fields}). Give another store, or a folder (a path that does not "
            "end in .h5), which gets a file per recipe."
        )
    return store


def _rows(store: FeatureStore | None) -> dict[bytes, int]:
    return {} if store is None else {sha256.tobytes(): row for row, sha256 in enumerate(store.images.sha256)}


def _copy(store: FeatureStore, name: str, rows: np.ndarray, features: np.ndarray) -> None:
    """Fill those lines of ``features`` whose row in the store is not negative."""
    step = max(1, COPY_BYTES // (4 * features.shape[1]))
    order = np.argsort(rows, kind="stable")
    order = order[rows[order] >= 0]
    for lines in np.split(order, np.flatnonzero(np.diff(rows[order] // step)) + 1) if len(order) else ():
        start = int(rows[lines[0]])
        stored = store.read(name, start, int(rows[lines[-1]]) + 1)
        features[lines] = stored[rows[lines] - start, 0].reshape(len(lines), -1)


@contextlib.contextmanager
def _patiently_locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold the writer's lock, after waiting for it as long as that."""
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(path))
                break
            except LockedError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.1)
        yield


def _write(
    path: Path, store: FeatureStore | None, made: Sequence[_Made], network: Network, batch_size: int
) -> FeatureStore:
    """Put a store of the rows that there were and the new ones in the place of the old one."""
    recipe = network.recipes[0]
    entries = [entry for batch, _ in made for entry in batch]
    names = tuple(
        entry.image.name if entry.image.size >= 0 else f"pixels/{entry.sha256.hex()[:20]}.png" for entry in entries
    )
    new = ImageTable(
        paths=names,
        sha256=digest_rows(entry.sha256 for entry in entries),
        labels=np.full(len(entries), -1, np.int32),
        splits=np.full(len(entries), UNLABELLED, np.int8),
        groups=None,
        widths=np.array([entry.width for entry in entries], np.int32),
        heights=np.array([entry.height for entry in entries], np.int32),
        sizes=np.array([entry.image.size for entry in entries], np.int64),
        mtimes_ns=np.array([entry.image.mtime_ns for entry in entries], np.int64),
    )
    table = new if store is None else _joined(store.images, new)
    spec = FeatureSpec(recipe, 1, made[0][1].shape[1:])
    with atomic_file(path) as temporary:
        writer = StoreWriter(temporary, kind="store", rows=len(table), features={recipe.name: spec})
        try:
            step = max(1, COPY_BYTES // network.row_bytes)
            for start in range(0, 0 if store is None else len(store), step):
                assert store is not None
                writer.append(recipe.name, store.read(recipe.name, start, start + step))
            for _, values in made:
                writer.append(recipe.name, values[:, None])
            writer.finish(
                images=table,
                quarantine=Quarantine((), digest_rows(()), (), np.zeros(0, np.int64), np.zeros(0, np.int64)),
                source=SOURCE,
                provenance={
                    "backbone": network.backbone_argument,
                    "weights": network.weights_argument,
                    "batch_size": batch_size,
                    "root": "",
                    "software": software_versions(),
                },
            )
        finally:
            writer.close()
    return FeatureStore.open(path)


def _joined(old: ImageTable, new: ImageTable) -> ImageTable:
    arrays = ("sha256", "labels", "splits", "widths", "heights", "sizes", "mtimes_ns")
    columns: dict[str, Any] = {name: np.concatenate([getattr(old, name), getattr(new, name)]) for name in arrays}
    return ImageTable(paths=old.paths + new.paths, groups=None, **columns)
