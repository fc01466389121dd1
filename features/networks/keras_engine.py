"""The Keras engine: a model compiled for batches of one size, on any Keras backend and device."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from features.errors import check_batch
from features.networks.backend import is_out_of_memory, place_of
from features.networks.engines import choose_device
from features.networks.folding import fold_batch_norms
from features.networks.reference import reference_images
from features.recipe import Recipe

logger = logging.getLogger(__name__)


def compiled(function: Callable[..., Any], *, fuse: bool = False) -> Callable[..., Any]:
    """Compile a function of tensors with Keras's backend; ``predict`` per batch is slower and has leaked memory.

    With ``fuse``, TensorFlow also uses XLA, which saves passes over memory and copies between the steps of a loop; the
    compilation then takes a second or two.
    """
    import keras

    made = function
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        made = tf.function(function, autograph=False, jit_compile=fuse or None)
    elif backend == "jax":
        import jax

        made = jax.jit(function)
    elif backend == "torch":
        import torch

        made = torch.inference_mode()(function)
    return made


def xla_of(layers: Iterable[Any]) -> bool | str:
    """Whether a model of these layers is to be trained with XLA: the value for ``jit_compile`` of ``keras.Model.compile``.

    TensorFlow on a processor trains depthwise convolutions without it: with XLA a step of MobileNetV2's last blocks took
    7 times the processor time, and its compilation 10 s more. Everything else is left to Keras ("auto").
    """
    import keras

    slow = (keras.layers.DepthwiseConv2D, keras.layers.SeparableConv2D)
    on_processor = keras.backend.backend() == "tensorflow" and choose_device("auto") == "cpu"
    return False if on_processor and any(isinstance(layer, slow) for layer in layers) else "auto"


class KerasEngine:
    """A Keras model as a function of fixed-size batches, on any Keras backend and device.

    Parameters
    ----------
    model : keras.Model
        Takes preprocessed float32 pixels; has one output per recipe, in the same order.
    preprocess : callable
        Turns float32 RGB 0-255 into the input that the network was trained on.
    recipes : sequence of Recipe
        The feature sets, one per output; they share the pixel rule.
    batch_size : int
        Images per forward pass. A smaller batch is padded with zeros, and the padding is removed from the features.
    device : {"auto", "cpu", "gpu"}
        Where to run.
    precision : {"float32", "bfloat16", "float16"}
        Arithmetic of all layers except the final pooling; weights and outputs are float32.
    """

    concurrent = False  # a single batch already keeps the device busy

    def __init__(
        self,
        model: Any,
        preprocess: Callable[[Any], Any],
        recipes: Sequence[Recipe],
        *,
        batch_size: int,
        device: str = "auto",
        precision: str = "float32",
    ) -> None:
        import keras

        self.names = [recipe.name for recipe in recipes]
        self.batch_size = batch_size
        self.device = choose_device(device)
        self.name = f"keras-{keras.backend.backend()}"
        rule = recipes[0].pixels
        self._shape, self._step = (batch_size, rule.height, rule.width, 3), batch_size
        self.images_inferred = 0

        if self.device == "cpu" or keras.backend.backend() == "tensorflow":  # folding is checked on the CPU
            with keras.device(place_of("cpu")):
                images = reference_images(rule.height, rule.width, 2).astype(np.float32)
                model = fold_batch_norms(model, preprocess(images))
        if precision != "float32":
            compute_in(model, precision)

        def forward(pixels: Any) -> list[Any]:
            # Only uint8 pixels are copied to the device: the compiled function contains the cast and the preprocessing.
            outputs = model(preprocess(keras.ops.cast(pixels, "float32")), training=False)
            return list(outputs) if isinstance(outputs, list | tuple) else [outputs]

        self._scope = functools.partial(keras.device, place_of(self.device))
        self._forward = compiled(forward)

    def __call__(self, images: np.ndarray) -> Mapping[str, np.ndarray]:
        """Compute the features of one batch; shapes and dtypes are those of ``features.networks.engines.Engine``."""
        check_batch(images, self._shape)
        parts: list[list[np.ndarray]] = []
        done = 0
        while done < len(images):
            try:
                parts.append(self._forward_pass(images[done : done + self._step]))
                done += self._step
            except Exception as error:
                if self._step == 1 or not is_out_of_memory(error):
                    raise
                before, self._step = self._step, -(-self._step // 2)
                logger.warning(
                    "out of memory with batches of %d images; continuing with %d. Use --batch-size %d to start with that.",
                    *(before, self._step, self._step),
                )
        self.images_inferred += len(images)
        arrays = parts[0] if len(parts) == 1 else [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]
        return dict(zip(self.names, arrays, strict=True))

    def _forward_pass(self, images: np.ndarray) -> list[np.ndarray]:
        import keras

        count = len(images)
        if count < self._step:
            padded = np.zeros((self._step, *self._shape[1:]), dtype=np.uint8)
            padded[:count] = images
            images = padded
        with self._scope():
            outputs = self._forward(keras.ops.convert_to_tensor(images, dtype="uint8"))
            return [keras.ops.convert_to_numpy(output)[:count] for output in outputs]


def compute_in(model: Any, precision: str) -> None:
    """Make all layers except those that give the outputs compute in half precision; the weights stay float32."""
    import keras

    policy = keras.DTypePolicy(f"mixed_{precision}")
    last = {id(tensor._keras_history.operation) for tensor in model.outputs}
    for layer in model._flatten_layers(include_self=False):
        if id(layer) not in last:
            layer.dtype_policy = policy
