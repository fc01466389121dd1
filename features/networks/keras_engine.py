"""The Keras engine: a model compiled for batches of one size, on any Keras backend and device."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from features.errors import check_batch
from features.networks.backend import is_out_of_memory, place_of
from features.networks.engines import choose_device
from features.networks.folding import fold_batch_norms
from features.networks.reference import reference_images
from features.networks.torch_graph import GraphedForward
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
        Arithmetic of all layers except the final pooling; weights are float32, outputs have the type of the recipe.

    Attributes
    ----------
    concurrent : bool
        True on a GPU, where the next batch is copied and launched while one is computed. A single batch keeps the
        processors busy.
    """

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
        self.concurrent = self.device == "gpu"
        self.name = f"keras-{keras.backend.backend()}"
        rule = recipes[0].pixels
        self._shape, self._step = (batch_size, rule.height, rule.width, 3), batch_size
        self._lock = threading.Lock()  # of launching on a GPU, not of waiting for it
        self.images_inferred = 0
        self._scope = functools.partial(keras.device, place_of(self.device))

        with self._scope():
            images = reference_images(rule.height, rule.width, 2).astype(np.float32)
            model = fold_batch_norms(model, preprocess(images))
        if precision != "float32":
            compute_in(model, precision)

        def prepare(pixels: Any) -> Any:
            return preprocess(keras.ops.cast(pixels, "float32"))

        def network(inputs: Any) -> list[Any]:
            outputs = model(inputs, training=False)
            listed = outputs if isinstance(outputs, list | tuple) else [outputs]
            return [keras.ops.cast(output, recipe.dtype) for output, recipe in zip(listed, recipes, strict=True)]

        # uint8 goes to the device and the stored type comes back: casts and preprocessing are part of the function.
        self._forward = compiled(lambda pixels: network(prepare(pixels)))
        self._graph: GraphedForward | None = None
        self._capture = (
            functools.partial(GraphedForward, prepare, network)
            if (self.device, keras.backend.backend()) == ("gpu", "torch")
            else None
        )

    def __call__(self, images: np.ndarray) -> Mapping[str, np.ndarray]:
        """Compute the features of one batch; shapes and dtypes are those of ``features.networks.engines.Engine``."""
        check_batch(images, self._shape)
        parts: list[list[np.ndarray]] = []
        done = 0
        while done < len(images):
            before = self._step  # another thread may lower it
            try:
                parts.append(self._forward_pass(images[done : done + before]))
                done += before
            except Exception as error:
                if before == 1 or not is_out_of_memory(error):
                    raise
                self._step = min(self._step, -(-before // 2))
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
        if self._capture is not None and (graph := self._captured(images)) is not None:
            with self._scope():
                return [output[:count] for output in graph(images)]
        with self._lock, self._scope():
            outputs = self._forward(keras.ops.convert_to_tensor(images, dtype="uint8"))
        return [keras.ops.convert_to_numpy(output)[:count] for output in outputs]

    def _captured(self, images: np.ndarray) -> GraphedForward | None:
        """Return the CUDA graph for such batches; None, with a warning, if this network cannot be captured."""
        with self._lock, self._scope():
            if self._capture is not None and (self._graph is None or self._graph.shape != images.shape):
                self._graph = None  # frees the memory of the one before
                try:
                    self._graph = self._capture(images, "cuda:0")
                except RuntimeError as error:
                    if is_out_of_memory(error):
                        raise
                    reason = str(error).splitlines()[0]
                    logger.warning("%s runs without a CUDA graph, which is slower: %s", self.names[0], reason)
                    self._capture = None
            return self._graph


def compute_in(model: Any, precision: str) -> None:
    """Make all layers except those that give the outputs compute in half precision; the weights stay float32."""
    import keras

    policy = keras.DTypePolicy(f"mixed_{precision}")
    last = {id(tensor._keras_history.operation) for tensor in model.outputs}
    for layer in model._flatten_layers(include_self=False):
        if id(layer) not in last:
            layer.dtype_policy = policy
