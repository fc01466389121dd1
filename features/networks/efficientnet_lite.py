"""EfficientNet-Lite: the networks that TensorFlow published in 2020 for small devices, and the names of its PyTorch port.

They are EfficientNets (Tan & Le 2019, https://arxiv.org/abs/1905.11946) without squeeze-and-excitation, with ReLU6, and
with a stem and a head that do not grow:
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. ``keras.applications`` has none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from features.networks.torchfile import StoredTensor

# Repeats, kernel, stride, expansion, and channels of each stage, before scaling
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD = 32, 1280
# Pixels that the shorter edge of an image is longer than what is cut from its centre, resized by the bicubic rule:
# https://huggingface.co/timm/tf_efficientnet_lite0.in1k (crop_pct 0.875 of 256 pixels)
MARGIN = 32
_MULTIPLE = 8  # channels are multiples of it


def build(size: tuple[int, int], width: float, depth: float, name: str) -> Any:
    """Build the network without its classifier.

    Parameters
    ----------
    size : tuple of int
        Height and width of the images in pixels.
    width, depth : float
        Factors for the channels and the repeats of the stages; repeats of the first and the last one stay.
    name : str
        Name of the model.

    Returns
    -------
    keras.Model
        From float32 RGB (n, h, w, 3), 0-255, to (n, h/32, w/32, 1280).
    """
    import keras
    from keras import layers

    def unit(values: Any, layer: Any, stage: str, *, active: bool = True) -> Any:
        normed = layers.BatchNormalization(epsilon=1e-3, momentum=0.99, name=f"{stage}_bn")(layer(values))
        return layers.ReLU(6.0, name=f"{stage}_relu")(normed) if active else normed

    def conv(channels: int, stage: str, kernel: int = 1, stride: int = 1) -> Any:
        return layers.Conv2D(channels, kernel, stride, padding="same", use_bias=False, name=f"{stage}_conv")

    image = keras.Input((*size, 3), name="image")
    # (pixel - 127) / 128, as published for these networks
    values = layers.Rescaling(1 / 128, offset=-127 / 128, name="rescaling")(image)
    values = unit(values, conv(_STEM, "stem", 3, 2), "stem")
    number = 0
    for place, (repeats, kernel, first_stride, expansion, channels) in enumerate(_STAGES):
        repeats = repeats if place in (0, len(_STAGES) - 1) else math.ceil(repeats * depth)
        channels = _scaled(channels, width)
        for repeat in range(repeats):
            block, before, stride = f"block_{number}", values, 1 if repeat else first_stride
            if expansion > 1:
                values = unit(values, conv(expansion * before.shape[-1], f"{block}_expand"), f"{block}_expand")
            depthwise = layers.DepthwiseConv2D(
                kernel, stride, padding="same", use_bias=False, name=f"{block}_depthwise_conv"
            )
            values = unit(values, depthwise, f"{block}_depthwise")
            values = unit(values, conv(channels, f"{block}_project"), f"{block}_project", active=False)
            if repeat:
                values = layers.Add(name=f"{block}_add")([before, values])
            number += 1
    values = unit(values, conv(_HEAD, "top"), "top")
    return keras.Model(image, values, name=name)


def _scaled(channels: int, width: float) -> int:
    """Scale a number of channels to a multiple of 8 that is at least 0.9 of what was asked for.

    Examples
    --------
    >>> [_scaled(channels, 1.1) for channels in (16, 24, 40, 80, 112, 192, 320)]
    [16, 24, 48, 88, 120, 208, 352]
    """
    wanted = channels * width
    rounded = max(_MULTIPLE, int(wanted + _MULTIPLE / 2) // _MULTIPLE * _MULTIPLE)
    return rounded if rounded >= 0.9 * wanted else rounded + _MULTIPLE


_BLOCK = re.compile(r"_blocks\.(\d+)\._(expand|depthwise|project)_conv|_blocks\.(\d+)\._bn([012])")
_OUTSIDE = {"_conv_stem": "stem_conv", "_bn0": "stem_bn", "_conv_head": "top_conv", "_bn1": "top_bn"}
_NORMS = ("expand", "depthwise", "project")
_VARIABLES = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def canonical(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Name the tensors of a state dict of ``efficientnet_lite_pytorch`` as ``build`` does, kernels from OIHW to HWIO.

    The classifier and the counters of batches are left out; names that are not known stay as they are.
    """
    named = {}
    for name, tensor in tensors.items():
        module, _, variable = name.rpartition(".")
        if module == "_fc" or variable == "num_batches_tracked":
            continue
        layer = _layer(module)
        if layer.endswith("_conv") and variable == "weight" and len(tensor.shape) == 4:
            depthwise = layer.endswith("_depthwise_conv")
            named[f"{layer}/kernel"] = tensor.transposed(*((2, 3, 0, 1) if depthwise else (2, 3, 1, 0)))
        else:
            named[f"{layer}/{_VARIABLES.get(variable, variable)}"] = tensor
    return named


def _layer(module: str) -> str:
    """Translate the name of a module to that of the layer.

    Examples
    --------
    >>> _layer("_conv_stem"), _layer("_bn1"), _layer("_blocks.3._expand_conv"), _layer("_blocks.3._bn2")
    ('stem_conv', 'top_bn', 'block_3_expand_conv', 'block_3_project_bn')
    """
    if found := _BLOCK.fullmatch(module):
        return f"block_{found[1]}_{found[2]}_conv" if found[2] else f"block_{found[3]}_{_NORMS[int(found[4])]}_bn"
    return _OUTSIDE.get(module, module)
