"""Run a backbone over batches of bytes: ``uint8 (n, h, w, 3)`` in, ``{data set: float32 (n, ...)}`` out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from features.errors import ConfigurationError, nearest
from features.recipe import Recipe

DEVICES = ("auto", "cpu", "gpu")


def choose_device(device: str) -> str:
    """``auto`` -> ``gpu`` where Keras's backend sees one, else ``cpu``.

    Raises
    ------
    ConfigurationError
        If the name is unknown, or a GPU is asked for and none is seen.
    """
    if device not in DEVICES:
        raise ConfigurationError(
            f"device: received {device!r}, expected one of {', '.join(DEVICES)}{nearest(device, DEVICES)}"
        )
    if device == "cpu":
        return "cpu"
    seen = _gpu_count()
    if device == "gpu" and not seen:
        raise ConfigurationError(
            "device: a GPU was asked for, but Keras sees none. Install the CUDA build of the backend "
            "(pip install 'tensorflow[and-cuda]') and check the driver with nvidia-smi, or use --device auto."
        )
    return "gpu" if seen else "cpu"


def _gpu_count() -> int:
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return int(torch.cuda.device_count())
    return len(keras.distribution.list_devices("gpu"))


def compiled(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Compile a function of one tensor with Keras's backend. ``predict`` per batch is slower and has leaked."""
    import keras

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function, autograph=False)
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
    """

    def __init__(
        self,
        model: Any,
        preprocess: Callable[[Any], Any],
        recipes: Sequence[Recipe],
        *,
        batch_size: int,
        device: str = "auto",
    ) -> None:
        import keras

        self.names = [recipe.name for recipe in recipes]
        self.batch_size = batch_size
        self.device = choose_device(device)
        self.name = f"keras-{keras.backend.backend()}"
        rule = recipes[0].pixels
        self._shape = (batch_size, rule.height, rule.width, 3)
        self.images_inferred = 0

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
        import keras

        count = len(images)
        if count > self.batch_size or images.shape[1:] != self._shape[1:] or images.dtype != np.uint8:
            raise ConfigurationError(f"engine: received {images.dtype} {images.shape}, expected uint8 {self._shape}")
        if count < self.batch_size:
            padded = np.zeros(self._shape, dtype=np.uint8)
            padded[:count] = images
            images = padded
        with self._scope():
            outputs = self._forward(keras.ops.convert_to_tensor(images, dtype="uint8"))
            arrays = [keras.ops.convert_to_numpy(output)[:count] for output in outputs]
        self.images_inferred += count
        return dict(zip(self.names, arrays, strict=True))
