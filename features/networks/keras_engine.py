"""A Keras model as an engine: compiled for batches of one size, on any backend and device."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from features.errors import check_batch
from features.networks.engines import choose_device
from features.networks.folding import fold_batch_norms
from features.networks.reference import reference_images
from features.recipe import Recipe

logger = logging.getLogger(__name__)


def compiled(function: Callable[..., Any], *, fuse: bool = False) -> Callable[..., Any]:
    """Compile a function of tensors with Keras's backend. ``predict`` per batch is slower and has leaked.

    ``fuse`` asks TensorFlow for XLA too: fewer passes over memory, no copies between the steps of a loop; compiling
    takes a second or two.
    """
    import keras

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function, autograph=False, jit_compile=fuse or None)
    if backend == "jax":
        import jax

        return jax.jit(function)
    if backend == "torch":
        import torch

        return torch.inference_mode()(function)
    return function


class KerasEngine:
    """A Keras model as a function of fixed-size batches, on any backend and device.

    Parameters
    ----------
    model : keras.Model
        Float32 pixels after preprocessing -> one output per recipe, in their order.
    preprocess : callable
        Float32 RGB 0-255 -> what the backbone was trained on.
    recipes : sequence of Recipe
        Data sets, one per output; they share the pixel rule.
    batch_size : int
        Every forward pass has this many images; the last batch is padded with zeros and cut.
    device : {"auto", "cpu", "gpu"}
        Where to run.
    precision : {"float32", "bfloat16", "float16"}
        Arithmetic of all layers but the pooling at the end; weights and outputs are float32.
    """

    concurrent = False  # one batch at a time fills the device

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

        if self.device == "gpu" and precision == "float32":
            exact_float32()
        if self.device == "cpu" or keras.backend.backend() == "tensorflow":  # where the proof can run on processors
            with keras.device("cpu:0"):
                images = reference_images(rule.height, rule.width, 2).astype(np.float32)
                model = fold_batch_norms(model, preprocess(images))
        if precision != "float32":
            compute_in(model, precision)

        def forward(pixels: Any) -> list[Any]:
            # Only bytes cross to the device; the cast and the preprocessing are part of the compiled function.
            outputs = model(preprocess(keras.ops.cast(pixels, "float32")), training=False)
            return list(outputs) if isinstance(outputs, list | tuple) else [outputs]

        self._scope = functools.partial(keras.device, f"{self.device}:0")
        self._forward = compiled(forward)

    def __call__(self, images: np.ndarray) -> Mapping[str, np.ndarray]:
        """Features of one batch.

        Parameters
        ----------
        images : uint8, (n, h, w, 3), 0-255, n <= batch_size
            RGB pixels.

        Returns
        -------
        dict of str to float32, (n, ...)
            Features by data set.
        """
        count = len(images)
        check_batch(images, self._shape)
        parts = [self._infer(images[start : start + self._step]) for start in range(0, count, self._step)]
        self.images_inferred += count
        arrays = parts[0] if len(parts) == 1 else [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]
        return dict(zip(self.names, arrays, strict=True))

    def _infer(self, images: np.ndarray) -> list[np.ndarray]:
        try:
            return self._forward_pass(images)
        except Exception as error:
            if self._step < self.batch_size or self._step == 1 or not is_out_of_memory(error):
                raise
            self._step = -(-self.batch_size // 2)
            logger.warning(
                "out of memory with batches of %d images; going on with %d. Give --batch-size %d to begin with that.",
                *(self.batch_size, self._step, self._step),
            )
        halves = [self._forward_pass(images[start : start + self._step]) for start in range(0, len(images), self._step)]
        return [np.concatenate(outputs) for outputs in zip(*halves, strict=True)]

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
    """Make all layers of a model but those that give its outputs compute in half precision; weights stay float32."""
    import keras

    policy = keras.DTypePolicy(f"mixed_{precision}")
    last = {id(tensor._keras_history.operation) for tensor in model.outputs}
    for layer in model._flatten_layers(include_self=False):
        if id(layer) not in last:
            layer.dtype_policy = policy


def exact_float32() -> None:
    """Have a GPU multiply float32 as such: its TensorFloat-32 keeps 10 bits, and features would differ by 1e-3."""
    import keras

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(False)
    elif backend == "jax":
        import jax

        jax.config.update("jax_default_matmul_precision", "float32")
    elif backend == "torch":
        import torch

        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a backend says that the device's memory does not suffice (TensorFlow and JAX by a code, torch by a class)."""
    return isinstance(error, MemoryError) or any(
        sign in f"{type(error).__name__} {error}" for sign in ("ResourceExhausted", "RESOURCE_EXHAUSTED", "OutOfMemory")
    )
