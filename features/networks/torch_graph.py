"""The forward pass of torch on a card as one CUDA graph, with page-locked memory for both ways.

    images -> page-locked -> card, preprocessed | graph -> stored dtype -> page-locked -> array

torch launches thousands of small kernels for a batch, which takes the interpreter longer than the card needs for them. A
CUDA graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs) launches them as one.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from features.networks.folding import largest_difference

WARM_UP = 3  # passes before the capture, in which torch and cuDNN choose their algorithms and allocate
SLOTS = 2  # batches in flight: while the card computes one, the next is copied
TOLERANCE = 1e-3  # largest accepted relative difference, max|a-b| / max|b|, of a replay from a plain pass


class GraphedForward:
    """The forward pass for batches of one size. Several threads may call it; the card computes one batch after another.

    Parameters
    ----------
    prepare : callable
        uint8 pixels on the card -> input of the network. It is not captured, so that it can run beside the graph.
    network : callable
        Input -> list of outputs. It is captured.
    images : uint8, (n, h, w, 3), 0-255
        A batch to capture with and to prove that a replay gives the outputs of a plain pass.
    device : str
        ``"cuda:0"`` and the like.

    Raises
    ------
    RuntimeError
        If the network cannot be captured, a replay gives other outputs, or memory does not suffice.
    """

    def __init__(
        self,
        prepare: Callable[[Any], Any],
        network: Callable[[Any], Sequence[Any]],
        images: np.ndarray,
        device: str,
    ) -> None:
        import torch

        self.shape, self._prepare, self._device = images.shape, prepare, device
        self._lock = threading.Lock()
        self._uploads, self._stream = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._constants = _constants()  # the graph reads them, so they live as long as it does
        with torch.inference_mode(), self._constants:
            self._input = prepare(torch.from_numpy(images).to(device)).clone()
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP - 1):
                    network(self._input)
                with _no_host_copies():
                    expected = network(self._input)
            self._stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may use the card meanwhile, such as one that has another engine.
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                self._outputs = network(self._input)
        self._slots: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for _ in range(SLOTS):
            self._slots.put(_Slot(self.shape, self._outputs))
        found = largest_difference(self(images), [output.cpu().numpy() for output in expected])
        if not found <= TOLERANCE:  # true for NaN too
            raise RuntimeError(f"a replay differs from a plain pass by {found:.2g} (relative)")

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """Compute the outputs of a batch, uint8 of ``shape``; each as the network gives it."""
        slot = self._slots.get()
        try:
            np.copyto(slot.images, images)
            with self._lock:
                self._launch(slot)
            slot.done.synchronize()
            return [output.numpy().copy() for output in slot.outputs]
        finally:
            self._slots.put(slot)

    def replay(self) -> Any:
        """Compute again what is on the card already: the network alone, for measurements."""
        self._graph.replay()
        return self._outputs

    def _launch(self, slot: _Slot) -> None:
        """Queue all work for one batch on the card, and return before it is done."""
        import torch

        with torch.inference_mode(), self._constants:
            with torch.cuda.stream(self._uploads):  # the input of the next batch comes while this one is computed
                slot.input = self._prepare(slot.pixels.to(self._device, non_blocking=True))
                slot.there.record()
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(slot.there)
                self._input.copy_(slot.input)
                self._graph.replay()
                for pinned, output in zip(slot.outputs, self._outputs, strict=True):
                    pinned.copy_(output, non_blocking=True)
                slot.done.record()


class _Slot:
    """Page-locked memory for one batch on its way, and what tells when each half of the way is done."""

    def __init__(self, shape: tuple[int, ...], outputs: Sequence[Any]) -> None:
        import torch

        self.pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        self.images = self.pixels.numpy()
        self.outputs = [torch.empty(output.shape, dtype=output.dtype, pin_memory=True) for output in outputs]
        self.input: Any = None  # held until the batch is done, because two streams use it
        # Waiting for `done` sleeps: CUDA's usual way keeps a processor busy, which decoding needs.
        self.there, self.done = torch.cuda.Event(), torch.cuda.Event(blocking=True)


def _constants() -> Any:
    """Return a mode in which each number that Keras takes to the card is taken there once, before the capture."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Constants(TorchFunctionMode):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[Any, Any] = {}

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            value = args[0] if args else None
            if function is not torch.as_tensor or not isinstance(value, bool | int | float | list | tuple | np.ndarray):
                return function(*args, **kwargs)
            said = (value.shape, str(value.dtype), value.tobytes()) if isinstance(value, np.ndarray) else repr(value)
            key = (said, args[1:], tuple(sorted((name, str(given)) for name, given in kwargs.items())))
            if key not in self.kept:
                self.kept[key] = function(*args, **kwargs)
            return self.kept[key]

    return Constants()


def _no_host_copies() -> Any:
    """Return a mode in which copying a number from the host is refused; a capture would refuse it too, but spoil the stream."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoHostCopies(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.lift_fresh.default:
                raise RuntimeError("it copies a number from the host to the card")
            return function(*args, **(kwargs or {}))

    return NoHostCopies()
