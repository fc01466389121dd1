"""Networks that come as an ONNX file with a description of how images are prepared for them.

    FILE.onnx or FOLDER --find_onnx()--> OnnxFile --OnnxRuntime.describe()--> Description -> recipes
    OnnxFile, recipes --composed graph--> OpenVINO (proven against ONNX Runtime and kept) or ONNX Runtime

A later start with a kept description and conversion imports neither of the packages that read ONNX.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from features.cache import cache_path, keep_json, kept_json
from features.canonical import digest_of
from features.errors import ConfigurationError
from features.files import HashedFile
from features.networks.backbones import BOUNDARY, Description
from features.networks.described import Described
from features.networks.descriptions import find_image_input
from features.networks.engines import Engine
from features.networks.hub import ONNX_NAMES
from features.networks.imageinput import ImageInput
from features.networks.onnx_engine import OnnxRuntimeEngine, try_out
from features.networks.onnx_graph import (
    Outline,
    Output,
    check_layer,
    check_size,
    composed,
    outline_of,
    read_model,
    spatial_layout,
)
from features.networks.reference import reference_images, relative_difference
from features.networks.weights import WeightsFile
from features.recipe import NetworkOptions, Normalisation, Recipe

MEMO_VERSION = 3
_USUAL = Normalisation(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # about what networks take, for a trial
_SAME = 1e-3  # relative difference of an image's features in two batches: float32 rounds differently, training mode is far off


@dataclasses.dataclass(frozen=True)
class OnnxFile(Described):
    """An ONNX file, which contains both network and weights.

    Parameters
    ----------
    path : Path
        The ``.onnx`` file.
    given : str
        The file or folder that the user named, absolute, or a pinned name on a hub.
    """

    path: Path
    given: str

    @property
    def runtime(self) -> str:
        return "onnx"

    @property
    def own_weights(self) -> Path | None:
        return self.path

    @property
    def place(self) -> str | None:
        return self.given

    @functools.cached_property
    def file(self) -> HashedFile:
        """The ``.onnx`` file alone."""
        return HashedFile.of(self.path)

    @functools.cached_property
    def outline(self) -> Outline:
        """What the file takes and gives; read from it once, then kept by its sha256."""
        memo = cache_path("onnx", f"{digest_of([MEMO_VERSION, self.file.sha256])}.json")
        known = kept_json(memo)
        if isinstance(known, dict):
            lists = {name: tuple(known[name]) for name in ("outputs", "external")}
            return Outline(**{**known, **lists})
        outline = outline_of(self.path, read_model(self.path, weights=False))
        self.file.check()
        keep_json(memo, dataclasses.asdict(outline))
        return outline

    @functools.cached_property
    def own_files(self) -> tuple[HashedFile, ...]:
        return self.file, *(HashedFile.of(self.path.parent / name) for name in self.outline.external)

    def own_digest(self) -> str:
        """sha256 of the file, or of its sha256 and those of its external weights."""
        others = [[name, file.sha256] for name, file in zip(self.outline.external, self.own_files[1:], strict=True)]
        return digest_of([self.file.sha256, *others]) if others else self.file.sha256

    def model(self) -> Any:
        """Read the ``onnx.ModelProto`` with its weights: that which was hashed."""
        found = read_model(self.path)
        for file in self.own_files:
            file.check()
        return found

    @functools.cached_property
    def image_input(self) -> ImageInput:
        """The description in its folder."""
        return find_image_input(self.path.parent)

    @property
    def card(self) -> Path:
        return self.path.parent

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        return self.outline.size

    @property
    def classifier(self) -> tuple[str, str] | None:
        before = self.outline.before_scores
        return None if before is None else (self.outline.outputs[0], before)

    @property
    def larger(self) -> str:
        return ", or export the network with dynamic axes"

    def normalisation(self, options: NetworkOptions) -> Normalisation | None:
        """As the options or the description say."""
        how = super().normalisation(options)
        if self.outline.type == "uint8" and how != Normalisation():
            raise ConfigurationError(
                f"{self.path}: takes uint8 pixels, so it prepares them itself; expected scale 1, mean 0 and std 1, rgb, "
                "received other numbers. Give these with --preprocess FILE.json"
            )
        return how


def find_onnx(name: str) -> OnnxFile | None:
    """Find an ONNX file by its path, or in a folder by one of the usual names (``ONNX_NAMES``); None for another name."""
    path = Path(name).expanduser()
    if path.suffix.lower() == ".onnx" and not path.is_dir():
        if not path.is_file():
            raise ConfigurationError(f"backbone: {path} does not exist; give the path of an ONNX file")
        return _onnx_file(path, path)
    if not path.is_dir():
        return None
    for inner in ONNX_NAMES:
        if (path / inner).is_file():
            return _onnx_file(path / inner, path)
    found = sorted(str(file.relative_to(path)) for pattern in ("*.onnx", "onnx/*.onnx") for file in path.glob(pattern))
    if found:
        raise ConfigurationError(
            f"backbone: {path} holds {', '.join(found[:8])}, but none of {', '.join(ONNX_NAMES)}; give the file to use"
        )
    return None


def _onnx_file(path: Path, given: Path) -> OnnxFile:
    check_size(path)
    return OnnxFile("onnx", "none", None, path=path, given=str(given.resolve()))


class _Tensor(NamedTuple):
    """What a forward pass tells of a tensor: its shape without the batch, spatial ones as (h, w, c), and its order of axes."""

    shape: tuple[int, ...]
    layout: str


class OnnxRuntime:
    """See ``features.networks.network.Runtime``."""

    engines = ("onnxruntime", "openvino")

    def describe(
        self, backbone: OnnxFile, weights: WeightsFile, size: tuple[int, int], layers: Sequence[str]
    ) -> Description:
        """Find the shapes of the asked tensors by a forward pass: what a graph says of them is often wrong or missing."""
        asked = [*dict.fromkeys(layers or backbone.outline.outputs[:1])]
        found = self._kept(backbone, weights.sha256, size, [name for name in asked if name != BOUNDARY])
        return Description(weights.sha256, {name: tensor.shape for name, tensor in found.items()}, asked[0], None)

    def _kept(self, backbone: OnnxFile, sha256: str, size: tuple[int, int], names: Sequence[str]) -> dict[str, _Tensor]:
        """What is known of these tensors, found once for weights of this digest and then kept."""
        memo = cache_path("onnx", f"{digest_of([MEMO_VERSION, sha256, [*size], [*names]])}.json")
        found = kept_json(memo)
        if found is None:
            found = self._tried(backbone, size, names)
            keep_json(memo, found)
        return {str(name): _Tensor(tuple(map(int, shape)), str(layout)) for name, shape, layout in found}

    def _tried(self, backbone: OnnxFile, size: tuple[int, int], names: Sequence[str]) -> list[list[Any]]:
        if not names:
            return []
        outline, model = backbone.outline, backbone.model()
        for name in names:
            check_layer(backbone.path, model, name)
        plain = [Output(name, "none", rank=2) for name in names]
        how = Normalisation() if outline.type == "uint8" else _USUAL
        whole = composed(model, outline, plain, normalisation=how, size=size)
        both, alone = _batches(size, outline.batch)
        tensors = []
        whole_bytes = _bytes(backbone.path, whole)
        try:
            found, others = try_out(whole_bytes, [both, alone], len(names))
        except ConfigurationError:
            if outline.batch is None and _takes(whole_bytes, alone, len(names)):
                raise ConfigurationError(
                    f"{backbone.path}: takes one image at a time, although its input says any number. Export it with a fixed "
                    "batch of 1, or with a dynamic batch axis"
                ) from None
            raise
        for name, array, other in zip(names, found, others, strict=True):
            _check_features(backbone.path, name, array, other, len(both))
            first, *rest = array.shape[1:]
            spatial = array.ndim == 4
            layout = spatial_layout(array.shape, size, outline.layout) if spatial else outline.layout
            turned = spatial and layout == "NCHW"
            tensors.append([name, [*rest, first] if turned else [first, *rest], layout])
        return tensors

    def load(self, backbone: OnnxFile, weights: WeightsFile, size: tuple[int, int]) -> Any:
        """Refuse: Keras cannot build this kind of network."""
        raise ConfigurationError(
            f"{backbone.path}: an ONNX file cannot be trained further, and only Keras networks are fine-tuned. Use the same "
            "network as a .keras file or a KerasHub preset; heads can be trained on its features as on any others"
        )

    def converted(self, backbone: OnnxFile, weights: WeightsFile, recipes: Sequence[Recipe]) -> dict[str, np.ndarray]:
        """Convert for OpenVINO; the outputs for the reference batch are those of ONNX Runtime."""
        from features.networks.converting import convert

        return convert(self._composed(backbone, recipes), recipes, backbone.outline.batch)

    def engine(
        self,
        backbone: OnnxFile,
        weights: WeightsFile,
        recipes: Sequence[Recipe],
        *,
        batch_size: int,
        device: str,
        precision: str,
    ) -> Engine:
        """Open the ONNX Runtime engine."""
        model = self._composed(backbone, recipes)
        return OnnxRuntimeEngine(model, recipes, batch_size=batch_size, step=backbone.outline.batch, device=device)

    def graph(self, backbone: OnnxFile, recipes: Sequence[Recipe]) -> Any:
        """Return the model from uint8 pixels to the feature sets of these recipes."""
        size = recipes[0].pixels.height, recipes[0].pixels.width
        layers = [*dict.fromkeys(recipe.layer for recipe in recipes)]
        found = self._kept(backbone, recipes[0].weights, size, layers)
        outputs = [
            Output(one.layer, one.pooling, len(found[one.layer].shape) + 1, one.prefix_tokens, found[one.layer].layout)
            for one in recipes
        ]
        how = recipes[0].normalisation or Normalisation()
        model = backbone.model()
        return composed(model, backbone.outline, outputs, normalisation=how, size=size)

    def _composed(self, backbone: OnnxFile, recipes: Sequence[Recipe]) -> bytes:
        return _bytes(backbone.path, self.graph(backbone, recipes))


def _takes(model: bytes, images: np.ndarray, count: int) -> bool:
    try:
        try_out(model, [images], count)
    except ConfigurationError:
        return False
    return True


def _batches(size: tuple[int, int], fixed: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return a batch, and the same first image among others: alone or, where the number of images is fixed, among black ones."""
    both = reference_images(*size, count=fixed or 2)
    alone = both.copy() if fixed else both[:1]
    alone[1:] = 0
    return both, alone


def _check_features(path: Path, name: str, array: np.ndarray, other: np.ndarray, count: int) -> None:
    """Refuse what cannot be the features of images: ``array`` for a batch, ``other`` for another one of the same first image."""
    if array.ndim not in (2, 3, 4) or len(array) != count or not array.size:
        raise ConfigurationError(
            f"{path}: {name!r} gives {array.shape} for {count} images; expected (n, channels), (n, tokens, channels) or a "
            "spatial output of four axes. Choose another tensor with --layer"
        )
    if not np.isfinite(array).all():
        raise ConfigurationError(
            f"{path}: {name!r} gives numbers that are not finite for painted images. Export it again"
        )
    if not relative_difference(other[0], array[0]) <= _SAME:
        raise ConfigurationError(
            f"{path}: what {name!r} gives for an image depends on the other images of its batch, as with BatchNorm or Dropout "
            "in training mode. Export the network for inference (model.eval())"
        )


def _bytes(path: Path, model: Any) -> bytes:
    try:
        return bytes(model.SerializeToString())
    except ValueError as error:
        raise ConfigurationError(f"{path}: the network takes more than 2 GB, which cannot be run here") from error
