"""The options of a network, and the recipe: everything that decides the values of a feature set.

NetworkOptions --features.networks.network.resolve_network()--> Recipe -> canonical JSON -> fingerprint
Recipe --options()--> NetworkOptions that resolve to the same recipe
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from features.augmentation import AugmentSpec
from features.canonical import canonical_json, check_choice, digest_of
from features.errors import ConfigurationError

RECIPE_VERSION = 1
POOLINGS = ("none", "avg", "max", "flatten")
RESIZE_RULES = ("antialias", "keras")
FIT_RULES = ("stretch", "crop", "pad")
DTYPES = ("float32", "float16")
DECODE_RULES = ("full", "fast")
ENGINES = ("auto", "keras", "openvino")
ARITHMETIC = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "gpu")
# Half precision rounds to 8 or 11 bits in every layer, so two engines differ by far more than in float32. The engine
# is therefore part of the precision.
PRECISIONS = ("float32", "bfloat16:openvino") + tuple(  # noqa: RUF005
    f"{kind}:keras-{backend}" for kind in ("bfloat16", "float16") for backend in ("tensorflow", "jax", "torch")
)
COLOUR_RULE = "rgb:exif,alpha-over-white"
Cell = tuple[str, int]  # fingerprint, view


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """Which network computes the features, at which layers, from which pixels, and on which engine and device.

    Parameters
    ----------
    backbone : str
        Name of the network, a key of ``features.networks.backbones.BACKBONES``, or the path of a ``.keras`` file.
    weights : str
        ``"imagenet"``, ``"random"`` or a file; see ``features.networks.weights.resolve_weights``.
    layers : tuple of str
        Layers whose outputs are kept; ``"boundary"`` means the layer before the last block. If empty, the last layer
        is kept. A single string is accepted as one layer.
    pooling : {"none", "avg", "max", "flatten"}, optional
        Pooling of every spatial output (h, w, c), or of tokens (n, c). Default: ``avg`` if ``layers`` is empty and the
        last layer is spatial, ``none`` otherwise.
    image_size : int or (int, int), optional
        Side of a square, or height and width, in pixels, 1-4096. Default: the size that the network was trained on.
    resize : {"antialias", "keras"}
        How pixels are resized; ``PixelRule`` explains ``resize``, ``fit`` and ``decode``.
    fit : {"stretch", "crop", "pad"}
        How an image is fitted to another aspect ratio.
    dtype : {"float32", "float16"}
        Type in which the features are stored.
    decode : {"full", "fast"}
        Whether a JPEG is decoded at full size.
    engine : {"auto", "keras", "openvino"}
        Engine that runs the network; see ``features.networks.engines.choose_engine``.
    precision : {"float32", "bfloat16", "float16"}
        Arithmetic of the forward pass.
    device : {"auto", "cpu", "gpu"}
        Device that the network runs on.

    Raises
    ------
    ConfigurationError
        If a value is not one of the choices; the message suggests the nearest one.
    """

    backbone: str = "mobilenetv2"
    weights: str = "imagenet"
    layers: tuple[str, ...] = ()
    pooling: str | None = None
    image_size: int | tuple[int, int] | None = None
    resize: str = "antialias"
    fit: str = "stretch"
    dtype: str = "float32"
    decode: str = "full"
    engine: str = "auto"
    precision: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        layers = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        object.__setattr__(self, "layers", layers)
        check_choice("pooling", "none" if self.pooling is None else self.pooling, POOLINGS)
        check_choice("resize", self.resize, RESIZE_RULES)
        check_choice("fit", self.fit, FIT_RULES)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("decode", self.decode, DECODE_RULES)
        check_choice("engine", self.engine, ENGINES)
        check_choice("precision", self.precision, ARITHMETIC)
        check_device(self.device)


@dataclasses.dataclass(frozen=True)
class PixelRule:
    """How an image file becomes ``uint8`` pixels; part of every recipe.

    Parameters
    ----------
    height, width : int
        Size of the input of the network, in pixels, 1-4096.
    resize : {"antialias", "keras"}
        ``antialias``: Pillow's bilinear filter, width first, which averages pixels when it shrinks an image.
        ``keras``: bilinear interpolation at half-pixel centres without antialiasing, the default of
        ``keras.utils.image_dataset_from_directory``.
    fit : {"stretch", "crop", "pad"}
        ``stretch`` ignores the aspect ratio, ``crop`` keeps the largest centred window that has the aspect ratio of
        the target, ``pad`` keeps the whole image, centred on black.
    decode : {"full", "fast"}
        ``full`` decodes every pixel of the file. ``fast`` lets libjpeg decode a JPEG at 1/2, 1/4 or 1/8 of its size
        where that is still at least the size needed, and resizes the result.
    """

    height: int
    width: int
    resize: str = "antialias"
    fit: str = "stretch"
    decode: str = "full"

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            if not 1 <= value <= 4096:
                raise ConfigurationError(f"image size: received the {name} {value}, expected 1 to 4096 pixels")
        check_choice("resize", self.resize, RESIZE_RULES)
        check_choice("fit", self.fit, FIT_RULES)
        check_choice("decode", self.decode, DECODE_RULES)

    @classmethod
    def of(cls, options: NetworkOptions, default: tuple[int, int]) -> PixelRule:
        """Make the rule for the given options; ``default`` is the network's own height and width in pixels."""
        size = options.image_size or default
        height, width = (size, size) if isinstance(size, int) else size
        return cls(height, width, resize=options.resize, fit=options.fit, decode=options.decode)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the values of one feature set. The number of views is not part of it.

    Parameters
    ----------
    backbone : str
        Name of the network, a key of ``features.networks.backbones.BACKBONES``, or ``"model"`` for a Keras model file.
    weights : str
        sha256 of the canonical tensors, 64 hexadecimal digits (``features.networks.weights.tensor_digest``); for a
        model file, of the tensors and the architecture.
    layer : str
        Layer of the network whose output is kept.
    pooling : {"none", "avg", "max", "flatten"}
        How an output (h, w, c) or (tokens, c) is reduced.
    pixels : PixelRule
        How images are decoded and resized.
    preprocessing : str
        Name of the ``keras.applications`` module whose ``preprocess_input`` is used, or ``"none"``.
    colour : str
        Name of the rule in ``features.pixels.decode`` for colour, orientation and transparency.
    augmentation : AugmentSpec or None
        Ranges from which views 1 and above are drawn; None if there is only view 0.
    seed : int
        Random seed of the views; 0 if there is only view 0.
    precision : {"float32", "bfloat16:openvino", "bfloat16:keras-tensorflow", "float16:keras-tensorflow", ...}
        Arithmetic of the forward pass, followed by the engine where it affects the values. The features are stored
        as ``dtype`` in any case.
    dtype : {"float32", "float16"}
        Element type of the stored features.
    """

    backbone: str
    weights: str
    layer: str
    pooling: str
    pixels: PixelRule
    preprocessing: str
    colour: str = COLOUR_RULE
    augmentation: AugmentSpec | None = None
    seed: int = 0
    precision: str = "float32"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("dtype", self.dtype, DTYPES)

    @property
    def name(self) -> str:
        """Name of the feature set: the layer, followed by the pooling if there is one (``out_relu.avg``)."""
        layer = self.layer.replace("/", "|")
        return layer if self.pooling == "none" else f"{layer}.{self.pooling}"

    @functools.cached_property
    def plain(self) -> Recipe:
        """The recipe of view 0, which depends on neither augmentation nor seed."""
        return self if self.augmentation is None else dataclasses.replace(self, augmentation=None, seed=0)

    def augmented(self, spec: AugmentSpec | None, seed: int) -> Recipe:
        """Return this recipe with another augmentation and seed; without both if ``spec`` changes nothing."""
        if spec is None or spec.is_plain:
            return self.plain
        return dataclasses.replace(self, augmentation=spec, seed=seed)

    def options(
        self, backbone: str, weights: str, *, engine: str | None = None, device: str = "auto"
    ) -> NetworkOptions:
        """Return options that resolve to the plain recipe again.

        Parameters
        ----------
        backbone, weights : str
            Where network and weights are found, as given to the extraction; the recipe itself has only their digest.
        engine : str, optional
            Engine that runs the network. Default: the one that the precision names, or ``auto`` in float32.
        device : {"auto", "cpu", "gpu"}
            Device that the network runs on.
        """
        precision, _, made_by = self.precision.partition(":")
        return NetworkOptions(
            backbone,
            weights,
            layers=(self.layer,),
            pooling=self.pooling,
            image_size=(self.pixels.height, self.pixels.width),
            resize=self.pixels.resize,
            fit=self.pixels.fit,
            dtype=self.dtype,
            decode=self.pixels.decode,
            engine=engine or made_by.partition("-")[0] or "auto",
            precision=precision,
            device=device,
        )

    def cell(self, view: int) -> Cell:
        """Return the key to the values of one view of any image: a fingerprint and the number of the view.

        View 0 has the same key whatever the augmentation, so it is reused when views are added to a store.
        """
        return (self.plain if view == 0 else self).fingerprint, view

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the recipe version as plain values; only ``augmentation`` is nested."""
        values = dataclasses.asdict(self)
        values["augmentation"] = None if self.augmentation is None else self.augmentation.to_dict()
        pixels = values.pop("pixels")
        return {"version": RECIPE_VERSION, **values, **pixels}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Rebuild a recipe from ``to_dict``; unknown or missing fields and another version are errors."""
        version = values.get("version")
        if version != RECIPE_VERSION:
            raise ConfigurationError(f"recipe: received version {version!r}, expected {RECIPE_VERSION}")
        fields = dict(values)
        fields.pop("version")
        pixel_names = [field.name for field in dataclasses.fields(PixelRule)]
        known = {field.name for field in dataclasses.fields(cls)} - {"pixels"} | set(pixel_names)
        if set(fields) != known:
            odd = sorted(set(fields) ^ known)
            raise ConfigurationError(f"recipe: unknown or missing fields: {', '.join(odd)}")
        kinds: dict[str, type | tuple[type, ...]] = {"height": int, "width": int, "seed": int}
        kinds["augmentation"] = (dict, type(None))
        for name, value in fields.items():
            if not isinstance(value, kinds.get(name, str)) or isinstance(value, bool):
                raise ConfigurationError(f"recipe: {name}: received {value!r}, which has the wrong type")
        pixels = PixelRule(**{name: fields.pop(name) for name in pixel_names})
        if fields["augmentation"] is not None:
            fields["augmentation"] = AugmentSpec.from_dict(fields["augmentation"])
        return cls(pixels=pixels, **fields)

    @property
    def canonical(self) -> str:
        """Canonical JSON of the recipe."""
        return canonical_json(self.to_dict())

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON, as 64 hexadecimal digits."""
        return digest_of(self.to_dict())

    def difference(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Return the fields that differ, as ``{field: (own value, other's value)}``; augmentations field by field."""
        mine, theirs = self.to_dict(), other.to_dict()
        if self.augmentation is not None and other.augmentation is not None:
            for values in (mine, theirs):
                inner = values.pop("augmentation")
                values |= {f"augmentation.{key}": value for key, value in inner.items()}
        return {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}


def check_device(device: str) -> None:
    """Raise ``ConfigurationError`` unless ``device`` is one of ``DEVICES``; names like ``cuda`` get a special hint."""
    if device.lower().partition(":")[0] in ("cuda", "mps", "metal", "rocm", "nvidia"):
        raise ConfigurationError(
            f"device: received {device!r}, expected one of {', '.join(DEVICES)}; use gpu for any make"
        )
    check_choice("device", device, DEVICES)
