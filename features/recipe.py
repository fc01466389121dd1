"""The options of a network, and the recipe: everything that decides the values of a feature set.

NetworkOptions --features.networks.network.resolve_network()--> Recipe -> canonical JSON -> fingerprint
Recipe --options()--> NetworkOptions that resolve to the same recipe
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from features.augmentation import AugmentSpec
from features.canonical import canonical_json, check_choice, digest_of
from features.errors import ConfigurationError

RECIPE_VERSION = 1
POOLINGS = ("none", "avg", "max", "flatten")
TOKEN_POOLINGS = ("cls", "tokens", "cls+tokens")
RESIZE_RULES = ("antialias", "keras", "bicubic")
FIT_RULES = ("stretch", "crop", "pad")
EDGE_RULE = "crop:"  # followed by the length of the shorter edge in pixels
CHANNEL_ORDERS = ("rgb", "bgr")
LARGEST_SIDE = 4096  # pixels
MOST_PREFIX = 64  # tokens
MOST_CHANNELS, MOST_FRAMES = 4096, 1_000_000
DTYPES = ("float32", "float16")
DECODE_RULES = ("full", "fast")
ENGINES = ("auto", "keras", "openvino", "onnxruntime")
ARITHMETIC = ("float32", "bfloat16", "float16", "int8")
DEVICES = ("auto", "cpu", "gpu")
# Half precision rounds to 8 or 11 bits in every layer, so two engines differ by far more than in float32. The engine
# is therefore part of the precision. In int8 a quantised network decides, whose digest is part of the recipe.
PRECISIONS = ("float32", "bfloat16:openvino", "int8") + tuple(  # noqa: RUF005
    f"{kind}:keras-{backend}" for kind in ("bfloat16", "float16") for backend in ("tensorflow", "jax", "torch")
)
MEAN_STD = "mean-std"  # the preprocessing of a recipe with a normalisation
COLOUR_RULE = "rgb:exif,alpha-over-white"
Cell = tuple[str, int]  # fingerprint, view


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """How pixels become the input of a network that was not made by Keras: ``(pixel * scale - mean) / std`` in float32.

    Parameters
    ----------
    scale : float
        Factor of the pixels, which are 0-255; often 1/255.
    mean, std : (float, float, float)
        Subtracted from, and divided by, per channel in the order of ``channels``; ``std`` is positive.
    channels : {"rgb", "bgr"}
        Order of the channels of the input.
    """

    scale: float = 1.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channels: str = "rgb"

    def __post_init__(self) -> None:
        check_choice("channels", self.channels, CHANNEL_ORDERS)
        object.__setattr__(self, "scale", float(self.scale))
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            object.__setattr__(self, name, values)
            if len(values) != 3 or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
                least = " above 0" if name == "std" else ""
                raise ConfigurationError(f"{name}: received {values}, expected three numbers{least}")
        if not math.isfinite(self.scale) or self.scale <= 0:
            raise ConfigurationError(f"scale: received {self.scale}, expected a number above 0")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Normalisation:
        """Rebuild from ``to_dict``; unknown or missing fields, and values of another type, are errors."""
        names = [field.name for field in dataclasses.fields(cls)]
        if sorted(values) != sorted(names):
            raise ConfigurationError(
                f"normalisation: received {', '.join(sorted(values))}; expected {', '.join(names)}"
            )
        triples = [values["mean"], values["std"]]
        numbers = [values["scale"], *(number for triple in triples if isinstance(triple, list) for number in triple)]
        if len(numbers) != 7 or not all(isinstance(number, float) for number in numbers):
            raise ConfigurationError(f"normalisation: received {values}, expected numbers")
        return cls(values["scale"], tuple(values["mean"]), tuple(values["std"]), values["channels"])


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """Which network computes the features, at which layers, from which pixels, and on which engine and device.

    Parameters
    ----------
    backbone : str
        Name of the network, a key of ``features.networks.backbones.BACKBONES``, or the path of a ``.keras`` or
        ``.onnx`` file or of a folder that holds an ONNX file and its description, or ``preset:FOLDER`` with a folder of
        KerasHub.
    weights : str
        ``"imagenet"``, ``"random"`` or a file; see ``features.networks.weights.resolve_weights``.
    layers : tuple of str
        Layers whose outputs are kept; ``"boundary"`` means the layer before the last block. If empty, the last layer
        is kept. A single string is accepted as one layer.
    pooling : {"none", "avg", "max", "flatten", "cls", "tokens", "cls+tokens"}, optional
        Pooling of every spatial output (h, w, c), or of tokens (n, c): ``cls`` takes the first token, ``tokens`` the mean
        of those behind the prefix, ``cls+tokens`` both. Default with ``layers`` given: ``none``; else ``avg`` for a
        spatial last layer, and for tokens ``cls`` if there is a class token, ``avg`` if there is none.
    prefix_tokens : int, optional
        How many tokens stand before those of the image: the class token and the registers. Default: what the
        description of the network says.
    preprocess : Normalisation or str, optional
        For a network that comes as a file: how pixels become its input, or the JSON file that says it. Default: the
        description beside the network; none for a ``.keras`` file made with Keras alone.
    image_size : int or (int, int), optional
        Side of a square, or height and width, in pixels, 1-4096. Default: the size that the network was trained on.
    resize : {"antialias", "keras", "bicubic"}, optional
        How pixels are resized; ``PixelRule`` explains ``resize``, ``fit`` and ``decode``. Default: what the description
        of the network says; ``antialias`` without one.
    fit : {"stretch", "crop", "pad", "crop:EDGE"}, optional
        How an image is fitted to another aspect ratio. Default: as for ``resize``; ``stretch`` without a description.
    dtype : {"float32", "float16"}
        Type in which the features are stored.
    decode : {"full", "fast"}
        Whether a JPEG is decoded at full size.
    engine : {"auto", "keras", "openvino", "onnxruntime"}
        Engine that runs the network; see ``features.networks.engines.choose_engine``.
    precision : {"float32", "bfloat16", "float16", "int8"}
        Arithmetic of the forward pass.
    device : {"auto", "cpu", "gpu"}
        Device that the network runs on.
    quantised : str, optional
        File of the quantised network that computes in ``int8``; see ``features.networks.quantised``. An extraction finds
        or makes it itself.
    channels, scale, frame
        Which channels of an image with other channels than RGB are used, how values become 0-255, and which frame of a
        DICOM file is taken; ``PixelRule`` explains them.

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
    prefix_tokens: int | None = None
    preprocess: Normalisation | str | None = None
    resize: str | None = None
    fit: str | None = None
    dtype: str = "float32"
    decode: str = "full"
    engine: str = "auto"
    precision: str = "float32"
    device: str = "auto"
    quantised: str | None = None
    channels: str = ""
    scale: str = ""
    frame: int = 0

    def __post_init__(self) -> None:
        layers = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        object.__setattr__(self, "layers", layers)
        check_choice("pooling", "none" if self.pooling is None else self.pooling, POOLINGS + TOKEN_POOLINGS)
        check_choice("resize", self.resize or RESIZE_RULES[0], RESIZE_RULES)
        check_fit(self.fit or FIT_RULES[0])
        if self.prefix_tokens is not None:
            check_prefix(self.prefix_tokens)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("decode", self.decode, DECODE_RULES)
        check_samples(self.channels, self.scale, self.frame)
        check_choice("engine", self.engine, ENGINES)
        check_choice("precision", self.precision, ARITHMETIC)
        check_device(self.device)
        if self.quantised is not None and self.precision != "int8":
            raise ConfigurationError(
                f"quantised: received {self.quantised} with the precision {self.precision}; add --precision int8, or leave it out"
            )


@dataclasses.dataclass(frozen=True)
class PixelRule:
    """How an image file becomes ``uint8`` pixels; part of every recipe.

    Parameters
    ----------
    height, width : int
        Size of the input of the network, in pixels, 1-4096.
    resize : {"antialias", "keras", "bicubic"}
        ``antialias``: Pillow's bilinear filter, width first, which averages pixels when it shrinks an image.
        ``bicubic``: Pillow's bicubic filter in the same way, which most vision transformers were trained with.
        ``keras``: bilinear interpolation at half-pixel centres without antialiasing, the default of
        ``keras.utils.image_dataset_from_directory``.
    fit : {"stretch", "crop", "pad", "crop:EDGE"}
        ``stretch`` ignores the aspect ratio, ``crop`` keeps the largest centred window that has the aspect ratio of
        the target, ``pad`` keeps the whole image, centred on black. ``crop:EDGE`` resizes the shorter edge to EDGE
        pixels and cuts out the centre, as torchvision's ``Resize(EDGE)`` and ``CenterCrop`` do.
    decode : {"full", "fast"}
        ``full`` decodes every pixel of the file. ``fast`` lets libjpeg decode a JPEG at 1/2, 1/4 or 1/8 of its size
        where that is still at least the size needed, and resizes the result.
    channels : str
        Which channels become red, green and blue: three numbers counted from 1, such as ``3,2,1``; one number, ``first`` or
        ``mean`` (of all channels) for a grey picture. Empty: those of an RGB or grey file.
    scale : str
        Which values become 0 and 255: ``LOW:HIGH``, ``percentile:LOW,HIGH`` (of each channel of each image), or ``dtype``
        (the range of the file's type; 0 to 1 for floating point). Values between are scaled linearly and rounded, halves
        up; values outside are clipped. Empty: as the file says.
    frame : int
        Which frame of a DICOM file with several is taken, counted from 1; 0: files with several are refused.

    Examples
    --------
    >>> from features import PixelRule
    >>> PixelRule(224, 224, fit="crop").fit
    'crop'
    """

    height: int
    width: int
    resize: str = "antialias"
    fit: str = "stretch"
    decode: str = "full"
    channels: str = ""
    scale: str = ""
    frame: int = 0

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            if not 1 <= value <= LARGEST_SIDE:
                raise ConfigurationError(
                    f"image size: received the {name} {value}, expected 1 to {LARGEST_SIDE} pixels"
                )
        check_choice("resize", self.resize, RESIZE_RULES)
        edge = check_fit(self.fit)
        check_choice("decode", self.decode, DECODE_RULES)
        channels, scale = check_samples(self.channels, self.scale, self.frame)
        object.__setattr__(self, "channels", channels)
        object.__setattr__(self, "scale", scale)
        if edge is not None and not max(self.height, self.width) <= edge <= LARGEST_SIDE:
            raise ConfigurationError(
                f"fit: received {self.fit!r}, expected an edge of {max(self.height, self.width)} (the image size) to {LARGEST_SIDE} pixels"
            )

    @property
    def edge(self) -> int | None:
        """Length to which the shorter edge of an image is resized, in pixels; None unless ``fit`` is ``crop:EDGE``."""
        return check_fit(self.fit)

    @property
    def chooses(self) -> bool:
        """Whether the rule says which channels or which values of a file are used."""
        return bool(self.channels or self.scale)

    def small(self, size: int, fit: str = "stretch") -> PixelRule:
        """Return a rule for thumbnails of ``size`` pixels with the channels, values and frame of this one."""
        return PixelRule(size, size, fit=fit, decode="fast", channels=self.channels, scale=self.scale, frame=self.frame)

    @classmethod
    def of(cls, options: NetworkOptions, default: PixelRule | int | tuple[int, int]) -> PixelRule:
        """Make the rule for the given options; ``default`` is the network's own rule, or its size."""
        rule = default if isinstance(default, PixelRule) else cls(*_both(default))
        height, width = _both(options.image_size or (rule.height, rule.width))
        fit = options.fit or rule.fit
        if options.fit is None and rule.edge is not None:  # the same part of the image at another size
            fit = f"{EDGE_RULE}{rule.edge * max(height, width) // max(rule.height, rule.width)}"
        return cls(
            height,
            width,
            resize=options.resize or rule.resize,
            fit=fit,
            decode=options.decode,
            channels=options.channels,
            scale=options.scale,
            frame=options.frame,
        )


def _both(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


_LATER_FIELDS = {"normalisation", "prefix_tokens", "quantised"}
_LATER_PIXELS = {"channels", "scale", "frame"}
_DIGEST = re.compile("[0-9a-f]{64}")


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
    pooling : {"none", "avg", "max", "flatten", "cls", "tokens", "cls+tokens"}
        How an output (h, w, c) or (tokens, c) is reduced.
    pixels : PixelRule
        How images are decoded and resized.
    preprocessing : str
        Name of the ``keras.applications`` module whose ``preprocess_input`` is used, or ``"none"``; ``"mean-std"``
        stands for ``normalisation``.
    colour : str
        Name of the rule in ``features.pixels.decode`` for colour, orientation and transparency.
    augmentation : AugmentSpec or None
        Ranges from which views 1 and above are drawn; None if there is only view 0.
    seed : int
        Random seed of the views; 0 if there is only view 0.
    precision : {"float32", "int8", "bfloat16:openvino", "bfloat16:keras-tensorflow", "float16:keras-tensorflow", ...}
        Arithmetic of the forward pass, followed by the engine where it affects the values. The features are stored
        as ``dtype`` in any case.
    dtype : {"float32", "float16"}
        Element type of the stored features.
    normalisation : Normalisation or None
        How pixels become the input of the network, if no module of ``keras.applications`` says it.
    prefix_tokens : int or None
        Number of tokens before those of the image; None unless ``pooling`` is ``tokens`` or ``cls+tokens``.
    quantised : str or None
        sha256 of the file of the quantised network, 64 hexadecimal digits; None unless ``precision`` is ``int8``.

    Examples
    --------
    >>> from features import PixelRule, Recipe
    >>> recipe = Recipe("mobilenetv2", "0" * 64, "out_relu", "avg", PixelRule(224, 224), "none")
    >>> len(recipe.fingerprint), recipe == Recipe.from_dict(recipe.to_dict())
    (64, True)
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
    normalisation: Normalisation | None = None
    prefix_tokens: int | None = None
    quantised: str | None = None

    def __post_init__(self) -> None:
        check_choice("pooling", self.pooling, POOLINGS + TOKEN_POOLINGS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("dtype", self.dtype, DTYPES)
        if (self.prefix_tokens is not None) != (self.pooling in ("tokens", "cls+tokens")):
            raise ConfigurationError(
                f"prefix tokens: received {self.prefix_tokens} with the pooling {self.pooling}; expected a number with "
                "tokens and cls+tokens, and none otherwise"
            )
        if self.prefix_tokens is not None:
            check_prefix(self.prefix_tokens)
        if (self.normalisation is not None) != (self.preprocessing == MEAN_STD):
            raise ConfigurationError(
                f"preprocessing {self.preprocessing!r}: expected a normalisation only with {MEAN_STD!r}"
            )
        fits = self.quantised is None if self.precision != "int8" else _DIGEST.fullmatch(self.quantised or "")
        if not fits:
            raise ConfigurationError(
                f"quantised: received {self.quantised!r} with the precision {self.precision}; expected 64 hexadecimal digits "
                "with int8, and nothing otherwise"
            )

    @property
    def format_version(self) -> int:
        """Lowest version of the store's format that allows this recipe; see FORMAT.md."""
        later = self.pooling in TOKEN_POOLINGS or self.normalisation is not None or self.quantised is not None
        pixels = self.pixels
        later = later or pixels.chooses or pixels.frame > 0
        return 2 if later or pixels.resize == "bicubic" or pixels.edge is not None else 1

    @property
    def name(self) -> str:
        """Name of the feature set: the layer, followed by the pooling if there is one (``out_relu.avg``)."""
        layer = self.layer.replace("/", "|")
        return layer if self.pooling == "none" else f"{layer}.{self.pooling}"

    @functools.cached_property
    def plain(self) -> Recipe:
        """The recipe of view 0, which depends on neither augmentation nor seed."""
        return self if self.augmentation is None else dataclasses.replace(self, augmentation=None, seed=0)

    @functools.cached_property
    def in_float32(self) -> Recipe:
        """The recipe of the same features computed and stored in float32."""
        return dataclasses.replace(self, precision="float32", dtype="float32", quantised=None)

    def augmented(self, spec: AugmentSpec | None, seed: int) -> Recipe:
        """Return this recipe with another augmentation and seed; without both if ``spec`` changes nothing."""
        if spec is None or spec.is_plain:
            return self.plain
        return dataclasses.replace(self, augmentation=spec, seed=seed)

    def options(
        self,
        backbone: str,
        weights: str,
        *,
        engine: str | None = None,
        device: str = "auto",
        quantised: str | None = None,
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
        quantised : str, optional
            Where the file of the quantised network is.
        """
        precision, _, made_by = self.precision.partition(":")
        return NetworkOptions(
            backbone,
            weights,
            layers=(self.layer,),
            pooling=self.pooling,
            prefix_tokens=self.prefix_tokens,
            preprocess=self.normalisation,
            image_size=(self.pixels.height, self.pixels.width),
            resize=self.pixels.resize,
            fit=self.pixels.fit,
            dtype=self.dtype,
            decode=self.pixels.decode,
            channels=self.pixels.channels,
            scale=self.pixels.scale,
            frame=self.pixels.frame,
            engine=engine or made_by.partition("-")[0] or "auto",
            precision=precision,
            device=device,
            quantised=quantised,
        )

    def cell(self, view: int) -> Cell:
        """Return the key to the values of one view of any image: a fingerprint and the number of the view.

        View 0 has the same key whatever the augmentation, so it is reused when views are added to a store.
        """
        return (self.plain if view == 0 else self).fingerprint, view

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the recipe version as plain values; only ``augmentation`` and ``normalisation`` are nested.

        Fields that came later are left out where they say nothing, so fingerprints stay what they were.
        """
        values = dataclasses.asdict(self)
        values["augmentation"] = None if self.augmentation is None else self.augmentation.to_dict()
        values["normalisation"] = None if self.normalisation is None else self.normalisation.to_dict()
        values = {name: value for name, value in values.items() if value is not None or name not in _LATER_FIELDS}
        pixels = {name: value for name, value in values.pop("pixels").items() if value or name not in _LATER_PIXELS}
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
        odd = sorted((set(fields) ^ known) - _LATER_FIELDS - _LATER_PIXELS)
        if odd:
            raise ConfigurationError(f"recipe: unknown or missing fields: {', '.join(odd)}")
        kinds: dict[str, type | tuple[type, ...]] = {"height": int, "width": int, "seed": int, "frame": int}
        kinds |= {"augmentation": (dict, type(None)), "normalisation": dict, "prefix_tokens": int}
        for name, value in fields.items():
            if not isinstance(value, kinds.get(name, str)) or isinstance(value, bool):
                raise ConfigurationError(f"recipe: {name}: received {value!r}, which has the wrong type")
        pixels = PixelRule(**{name: fields.pop(name) for name in pixel_names if name in fields})
        if fields["augmentation"] is not None:
            fields["augmentation"] = AugmentSpec.from_dict(fields["augmentation"])
        if "normalisation" in fields:
            fields["normalisation"] = Normalisation.from_dict(fields["normalisation"])
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
        keys = [*mine, *(key for key in theirs if key not in mine)]
        return {key: (mine.get(key), theirs.get(key)) for key in keys if mine.get(key) != theirs.get(key)}


def check_fit(fit: str) -> int | None:
    """Raise ``ConfigurationError`` for an unknown fit rule; return the edge of ``crop:EDGE`` in pixels, else None."""
    edge = fit.removeprefix(EDGE_RULE)
    if fit.startswith(EDGE_RULE):
        if edge.isascii() and edge.isdigit() and len(edge) <= 4 and edge == str(int(edge)):
            return int(edge)
        raise ConfigurationError(f"fit: received {fit!r}, expected crop:EDGE with a number of pixels, such as crop:256")
    check_choice("fit", fit, FIT_RULES)
    return None


class Scale(NamedTuple):
    """Which values become 0 and 255: two values, or two percentiles of a channel; with ``dtype`` the range of the type."""

    kind: str
    low: float = 0.0
    high: float = 0.0


def parse_channels(text: str) -> tuple[int, ...]:
    """Return the numbers of the chosen channels, counted from 0; none for the mean of all.

    Raises
    ------
    ConfigurationError
        Unless it is one number or three of 1 to 4096, ``first`` or ``mean``.
    """
    if text in ("first", "mean"):
        return (0,) if text == "first" else ()
    numbers = [part.strip() for part in text.split(",")]
    if len(numbers) not in (1, 3) or not all(re.fullmatch("[0-9]{1,4}", part) for part in numbers):
        numbers = ["0"]
    chosen = tuple(int(part) - 1 for part in numbers)
    if not all(0 <= number < MOST_CHANNELS for number in chosen):
        raise ConfigurationError(
            f"channels: received {text!r}, expected three numbers counted from 1, such as 3,2,1, or one number, 'first' or 'mean'"
        )
    return chosen


def parse_scale(text: str) -> Scale:
    """Return what ``text`` says of the values; raises ``ConfigurationError`` if it cannot be understood.

    Examples
    --------
    >>> parse_scale("0:4095"), parse_scale("percentile:1,99")
    (Scale(kind='values', low=0.0, high=4095.0), Scale(kind='percentile', low=1.0, high=99.0))
    """
    if text == "dtype":
        return Scale("dtype")
    word, _, rest = text.partition(":")
    kind, pair = ("percentile", rest.split(",")) if word == "percentile" else ("values", text.split(":"))
    try:
        low, high = map(float, pair)
    except ValueError:
        low = high = 0.0
    most = 100.0 if kind == "percentile" else math.inf
    if not (-math.inf < low < high < math.inf) or (kind == "percentile" and low < 0) or high > most:
        raise ConfigurationError(
            f"scale: received {text!r}, expected LOW:HIGH, such as 0:65535, with LOW below HIGH; percentile:LOW,HIGH, such as "
            "percentile:1,99; or dtype"
        )
    return Scale(kind, low, high)


def check_samples(channels: str, scale: str, frame: int) -> tuple[str, str]:
    """Return ``channels`` and ``scale`` in the one form that recipes have; raises ``ConfigurationError`` if one is wrong."""
    if not isinstance(frame, int) or isinstance(frame, bool) or not 0 <= frame <= MOST_FRAMES:
        raise ConfigurationError(f"frame: received {frame!r}, expected 1 to {MOST_FRAMES}")
    if channels:
        channels = ",".join(str(number + 1) for number in parse_channels(channels)) or "mean"
    if scale:
        kind, *pair = parse_scale(scale)
        low, high = (repr(float(number)).removesuffix(".0") for number in pair)
        scale = {"dtype": "dtype", "values": f"{low}:{high}", "percentile": f"percentile:{low},{high}"}[kind]
    return channels, scale


def check_prefix(count: int) -> None:
    """Raise ``ConfigurationError`` unless ``count`` can be a number of prefix tokens."""
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MOST_PREFIX:
        raise ConfigurationError(f"prefix tokens: received {count!r}, expected 0 to {MOST_PREFIX}")


def check_device(device: str) -> None:
    """Raise ``ConfigurationError`` unless ``device`` is one of ``DEVICES``; names like ``cuda`` get a special hint.

    One of several GPUs is chosen by the process: see ``features.machine.take_device``.
    """
    if device.lower().partition(":")[0] in ("cuda", "mps", "metal", "rocm", "nvidia"):
        raise ConfigurationError(
            f"device: received {device!r}, expected one of {', '.join(DEVICES)}; use gpu for any make"
        )
    check_choice("device", device, DEVICES)
