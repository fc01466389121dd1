"""Features as a step of a scikit-learn pipeline; each image is inferred once and its features are kept in a store.

    X --hash--> rows in the store | missing --decode | infer--> the store grows --> float32, (n, d), in the order of X

This module is not imported by any other: whoever uses it has imported scikit-learn already.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin

from features.errors import ConfigurationError, UnreadableImageError, check_range
from features.extraction.growing import Append, GrowingStore
from features.extraction.notes import Notes
from features.extraction.shard import SHARD_BYTES, ShardRows, ShardSpec, infer_shard, rows_per_shard
from features.files import printable
from features.machine import processors, software_versions
from features.networks.engines import Engine
from features.networks.network import Network, resolve_network
from features.networks.quantised import keep, networks_of_store
from features.pixels.batches import loaded
from features.pixels.decode import read_bytes
from features.pixels.png import plain_png
from features.recipe import NetworkOptions, Normalisation, Recipe
from features.sources.folders import File, look_at

logger = logging.getLogger(__name__)
SOURCE = "images given to FeatureExtractor"  # stores of this source are ours to extend
SHARD_SECONDS = 10.0  # shards double in size up to the usual one, unless that takes longer; a kill loses one of them
HASHED_AHEAD = 64  # images read ahead
STORE_SUFFIXES = (".h5", ".hdf5")
NAMED = 10  # unreadable images that an error lists


class FeatureExtractor(TransformerMixin, BaseEstimator):
    """Turn images into features of a frozen network, for ``sklearn.pipeline.Pipeline`` and cross-validation.

    Parameters
    ----------
    backbone, weights : str
        See ``features.recipe.NetworkOptions``, also for the parameters down to ``device``.
    layer : str, optional
        Layer whose output is kept; default: the last one. Spatial features are flattened.
    pooling, prefix_tokens, preprocess : optional
        Pooling of spatial features or tokens, and how pixels become the input. Default: ``none`` for a layer that is named.
    image_size : int or (int, int), optional
        Height and width in pixels; default: those of the network.
    resize, fit_rule, decode, dtype, engine, precision, device, quantised, channels, scale, frame
        As for ``extract_features``; ``fit_rule`` is its ``fit``, which is a method here. The precision ``int8`` needs
        ``quantised``, because nothing is learned from the images here: take the file that ``extract`` made.
    store : path, optional
        Where features are kept; without it every call computes them. A path that ends in ``.h5`` is one store, of one
        recipe; any other is a folder that gets a store per recipe, so that a grid search may vary layers. The
        store grows by what it lacks: it is an index, with shards in the folder ``.h5.parts`` beside it, which are added
        to and never rewritten, but that many small ones are merged. A store that ``extract`` made is read and never
        changed: what it lacks is computed each time.
    batch_size : int
        Number of images in one forward pass.
    workers : int, optional
        Number of threads that read and decode; default: one for each processor.
    rehash : bool
        Read and hash every file again, whatever is noted.
    trust_times : bool
        Take a file for unchanged if its path, size and modification time are those in the store.
    lock_timeout : float
        Seconds to wait while another process extends the same store. The second process finds what the first has
        computed, so each image is inferred once, even with ``n_jobs`` above 1.

    Notes
    -----
    Rows are found by the hash of the file. A file whose path, inode, change time, modification time and size are as noted
    on this machine (in the cache folder) is not read again. ``fit`` learns nothing from the images, because the network is frozen.

    Examples
    --------
    >>> from pathlib import Path
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.model_selection import cross_val_score
    >>> from sklearn.pipeline import make_pipeline
    >>> from features import FeatureExtractor
    >>> paths = sorted(Path("photos").glob("*/*.png"))
    >>> labels = [path.parent.name for path in paths]
    >>> model = make_pipeline(FeatureExtractor("network.keras", store="features-cache"), LogisticRegression())
    >>> cross_val_score(model, paths, labels, cv=2).shape
    (2,)
    """

    def __init__(
        self,
        backbone: str = "mobilenetv2",
        *,
        weights: str = "imagenet",
        layer: str | None = None,
        pooling: str | None = None,
        prefix_tokens: int | None = None,
        preprocess: Normalisation | str | None = None,
        image_size: int | tuple[int, int] | None = None,
        resize: str | None = None,
        fit_rule: str | None = None,
        decode: str = "full",
        dtype: str = "float32",
        engine: str = "auto",
        precision: str = "float32",
        device: str = "auto",
        quantised: str | None = None,
        channels: str = "",
        scale: str = "",
        frame: int = 0,
        store: str | os.PathLike[str] | None = None,
        batch_size: int = 32,
        workers: int | None = None,
        rehash: bool = False,
        trust_times: bool = False,
        lock_timeout: float = 3600.0,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.layer = layer
        self.pooling = pooling
        self.prefix_tokens = prefix_tokens
        self.preprocess = preprocess
        self.image_size = image_size
        self.resize = resize
        self.fit_rule = fit_rule
        self.decode = decode
        self.dtype = dtype
        self.engine = engine
        self.precision = precision
        self.device = device
        self.quantised = quantised
        self.channels = channels
        self.scale = scale
        self.frame = frame
        self.store = store
        self.batch_size = batch_size
        self.workers = workers
        self.rehash = rehash
        self.trust_times = trust_times
        self.lock_timeout = lock_timeout

    def fit(self, X: Any, y: Any = None) -> FeatureExtractor:
        """Check the parameters and the kind of input. No image is opened.

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
        """Compute or look up the features of images, in their order.

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
            Names the images that cannot be read. No row is left out, because the labels of later rows would shift. The
            features of the other images are kept.
        LockedError
            If another process was still extending the store after ``lock_timeout`` seconds.
        ConfigurationError
            If the store is of another recipe.
        """
        images = images_of(X)
        network = self._network()
        path = self._path(network.recipes[0])
        store = None if path is None else GrowingStore(path, network.recipes[0], SOURCE)
        features = np.empty((len(images), _width(network)), np.float32)
        lines: dict[bytes, list[int]] = {}  # content hash -> where its features go
        with ThreadPoolExecutor(self.workers or processors(), "decode") as pool:
            for line, sha256 in enumerate(self._hashes(images, store, pool)):
                lines.setdefault(sha256, []).append(line)
            with self._extending(store, lines.keys(), network) as append:
                # Looked up again: while this process waited, another one may have computed the same images.
                stored = store.rows.keys() if store is not None else ()
                lacking = {sha256: images[there[0]] for sha256, there in lines.items() if sha256 not in stored}
                for spec, rows in self._inferred(network, pool, lacking):
                    append(spec, rows)
                    values = rows.features[network.recipes[0].name]
                    for number, (_, sha256, *_) in enumerate(rows.images):
                        features[lines[sha256]] = values[number].reshape(-1)
        if store is not None:
            store.copy({sha256: there for sha256, there in lines.items() if sha256 not in lacking}, features)
        return features

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names of the columns: feature set and number, such as ``out_relu.avg_17``."""
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
        if self.rehash and self.trust_times:
            raise ConfigurationError("rehash reads every file and trust_times as few as possible; give one of them")
        check_range("workers", 1 if self.workers is None else self.workers, 1, 1024)
        shared = {field.name for field in dataclasses.fields(NetworkOptions)} & self.get_params().keys()
        layers = () if self.layer is None else (self.layer,)
        options = NetworkOptions(layers=layers, fit=self.fit_rule, **{name: getattr(self, name) for name in shared})
        return resolve_network(options)

    def _hashes(self, images: Sequence[_Image], store: GrowingStore | None, pool: Executor) -> list[bytes]:
        """Content hash of each image; a file that is as noted is not read."""
        if store is None:
            return _read(images, [None] * len(images), pool)
        files = [image.file for image in images]
        if self.trust_times:
            times = store.files([file.mtime_ns for file in files])
            return _read(images, [times.get(file[:3]) for file in files], pool)
        paths, stamps = [file.path for file in files], np.array([file.stamp for file in files], np.int64).reshape(-1, 4)
        known = [None] * len(files) if self.rehash else Notes.read(store.path, "").hashes(paths, stamps)
        hashes = _read(images, known, pool)
        before = Notes.read(store.path, "")  # again: another process may have noted other files meanwhile
        noted = [sha256 if image.is_file else None for image, sha256 in zip(images, hashes, strict=True)]
        before.updated(paths, stamps, noted).write(before)
        return hashes

    def _path(self, recipe: Recipe) -> Path | None:
        """Return the path of the store of a recipe; None without a store."""
        if self.store is None:
            return None
        path = Path(os.path.realpath(os.path.expanduser(self.store)))
        if path.suffix.lower() in STORE_SUFFIXES:
            return path
        return path / f"{recipe.backbone}-{recipe.fingerprint[:16]}.h5"

    def _extending(
        self, store: GrowingStore | None, wanted: Collection[bytes], network: Network
    ) -> contextlib.AbstractContextManager[Append]:
        """Return what keeps computed rows, if some are missing and the store may grow."""
        lacking = 0 if store is None else len(wanted - store.rows.keys())
        if store is not None and lacking and store.grows:
            if (digest := network.recipes[0].quantised) is not None:
                keep(Path(str(network.quantised)), digest, networks_of_store(store.path))
            return store.extending(
                shard_rows=max(1, SHARD_BYTES // network.row_bytes),
                provenance={
                    "backbone": network.backbone_argument,
                    "weights": network.weights_argument,
                    "batch_size": self.batch_size,
                    "software": software_versions(),
                    **({"license": network.license} if network.license else {}),
                },
                lock_timeout=self.lock_timeout,
            )
        if store is not None and lacking:
            logger.warning(
                "%s lacks %d of these images. Their features are computed but not kept, because the store was made by an extraction",
                *(store.path, lacking),
            )
        return contextlib.nullcontext(lambda spec, rows: None)

    def _inferred(
        self, network: Network, pool: Executor, images: Mapping[bytes, _Image]
    ) -> Iterator[tuple[ShardSpec, ShardRows]]:
        """Yield the rows of images, a shard at a time; name the unreadable images when all others are done."""
        named: dict[str, tuple[bytes, _Image]] = {}
        for sha256, image in images.items():
            is_file = image.is_file and image.name not in named  # a file that changed while it was hashed comes twice
            named[image.name if is_file else f"pixels/{sha256.hex()[:20]}.png"] = sha256, image

        def read(name: str) -> bytes:
            sha256, image = named[name]
            data = image.read()
            if hashlib.sha256(data).digest() != sha256:
                raise UnreadableImageError("unreadable", "its content changed in the meantime")
            return data

        refused: list[tuple[_Image, UnreadableImageError]] = []
        names, start, count = list(named), 0, self.batch_size
        while start < len(names):
            began, chosen = time.monotonic(), names[start : start + count]
            some = [named[name][1] for name in chosen]
            spec = ShardSpec(
                root="",
                paths=tuple(chosen),
                sizes=tuple(image.file.size for image in some),
                mtimes_ns=tuple(image.file.mtime_ns for image in some),
                recipes=network.recipes,
            )
            infer = functools.partial(self._infer, network)
            rows = infer_shard(spec, read=read, infer=infer, decoders=pool, batch_size=self.batch_size)
            refused += [(some[index], error) for index, _, error in rows.refused]
            if rows.images:
                yield spec, ShardRows(rows.images, rows.features)
            start += count
            if time.monotonic() - began < SHARD_SECONDS:
                count = min(2 * count, rows_per_shard(network.row_bytes, self.batch_size))
        _refuse(refused, len(images))

    def _infer(self, network: Network, pixels: np.ndarray) -> Mapping[str, np.ndarray]:
        key = (network.recipes[0].fingerprint, self.batch_size, self.device, self.engine)
        if getattr(self, "_kept", (None,))[0] != key:
            self._kept = key, network.engine(network.recipes, batch_size=self.batch_size, device=self.device)
        engine: Engine = self._kept[1]
        return engine(pixels)


# --- input ------------------------------------------------------------------------------------------------


class _Image(NamedTuple):
    """One image: its file, whose numbers are -1 if there is none, and a function that reads its bytes."""

    file: File
    read: Callable[[], bytes]

    @property
    def name(self) -> str:
        return self.file.path

    @property
    def is_file(self) -> bool:
        return self.file.size >= 0


def items_of(X: Any) -> Any:
    """Return the images of an input as they were given, a sequence of one item for each.

    Raises
    ------
    ConfigurationError
        If it is no sequence, or the pixels of a single image.
    """
    if hasattr(X, "to_numpy"):  # a column of a data frame
        X = X.to_numpy()
    if isinstance(X, np.ndarray) and X.ndim == 2 and X.shape[1] == 1 and X.dtype.kind in "OUT":
        X = X[:, 0]
    if isinstance(X, str | os.PathLike) or not hasattr(X, "__len__"):
        raise ConfigurationError(
            f"X: received {str(X)[:80]!r}, expected a list of image paths, or uint8 pixels (n, h, w, 3). Of one image give "
            "[X], of a generator list(X); for a folder there is features.extract_features."
        )
    if isinstance(X, np.ndarray) and X.ndim == 3 and X.shape[2] in (3, 4):
        raise ConfigurationError(
            f"X: received {X.dtype} {X.shape}, which looks like one image, expected (n, h, w, 3). Of one image give [X]."
        )
    return X


def images_of(X: Any) -> list[_Image]:
    """Return the images of an input.

    Raises
    ------
    ConfigurationError
        If it is neither paths nor pixels.
    """
    return [_image_of(number, item) for number, item in enumerate(items_of(X))]


def _image_of(number: int, item: Any) -> _Image:
    if isinstance(item, str | os.PathLike):
        path = os.path.abspath(os.path.expanduser(os.fspath(item)))
        return _Image(look_at(Path(), path), functools.partial(read_bytes, path))  # a missing one is refused when read
    pixels = item[..., 0] if isinstance(item, np.ndarray) and item.shape[2:] == (1,) else item
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or not pixels.size or not _is_image(pixels):
        received = f"{item.dtype} {item.shape}" if isinstance(item, np.ndarray) else repr(item)[:80]
        hint = "; of a PIL image give np.asarray(image.convert('RGB'))" if hasattr(item, "getbands") else ""
        raise ConfigurationError(
            f"X[{number}]: received {received}, expected the path of an image, or uint8 pixels, 0-255, (h, w, 3) or (h, w)"
            + hint
        )
    return _Image(File(f"X[{number}]", -1, -1), functools.partial(plain_png, pixels))


def _is_image(pixels: np.ndarray) -> bool:
    return pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)


def _read(images: Sequence[_Image], known: Sequence[bytes | None], pool: Executor) -> list[bytes]:
    """Content hash of each image; those that are not known are read."""
    found = list(known)
    unknown = [number for number, sha256 in enumerate(found) if sha256 is None]
    refused: list[tuple[_Image, UnreadableImageError]] = []
    digests = loaded(pool, lambda number: hashlib.sha256(images[number].read()).digest(), unknown, HASHED_AHEAD)
    for number, outcome in digests:
        if isinstance(outcome, UnreadableImageError):
            refused.append((images[number], outcome))
        else:
            found[number] = outcome
    _refuse(refused, len(images))
    return [sha256 for sha256 in found if sha256 is not None]


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


def _width(network: Network) -> int:
    return network.row_bytes // np.dtype(network.recipes[0].dtype).itemsize
