"""The CUDA graph of the torch backend, rehearsed on processors: a recorder of torch's operations takes the card's place.

It runs with KERAS_BACKEND=torch where torch is installed. What only a card can show (speed, page-locked memory, streams
that really overlap) is measured by tests/benchmarks/gpu.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from features.machine import keras_backend
from features.networks.torch_graph import GraphedForward
from features.recipe import NetworkOptions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        keras_backend() != "torch" or importlib.util.find_spec("torch") is None, reason="KERAS_BACKEND is not torch"
    ),
]


SIDE = 32  # pixels: a replay goes through Python once more for every operation
CALLS = itertools.count()


class Stream:
    """Does everything at once and in order."""

    def __init__(self, device: object = None) -> None:
        self.device = device

    def wait_stream(self, other: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def synchronize(self) -> None: ...


class Event:
    def __init__(self, *, blocking: bool = False) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class Graph:
    """Records operations of torch, and plays them again on the same tensors."""

    replays = 0

    def __init__(self) -> None:
        self.recorded: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        from torch.utils._pytree import tree_leaves

        Graph.replays += 1
        for function, args, kwargs, made in self.recorded:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if hasattr(old, "copy_") and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def recorded(graph: Graph, **_: Any) -> Iterator[None]:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            graph.recorded.append((function, args, kwargs or {}, made))
            return made

    with Recorder():
        yield


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine believe that there is a card, which is the processor."""
    import torch

    from features.networks import engines, keras_engine

    Graph.replays = 0
    empty = torch.empty
    for name, made in {"Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": recorded}.items():
        monkeypatch.setattr(torch.cuda, name, made)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **more: empty(*args, **more))
    monkeypatch.setattr(engines, "_gpu_count", lambda: 1)
    monkeypatch.setattr(keras_engine, "GraphedForward", on_the_processor)
    monkeypatch.setattr("keras.device", lambda name: contextlib.nullcontext())


def on_the_processor(prepare: Any, network: Any, images: Any, device: str) -> Any:
    assert device.startswith("cuda")
    return GraphedForward(prepare, network, images, "cpu")


def engine_of(name: str, device: str, batch_size: int = 4, **options: Any) -> Any:
    from features.networks.network import resolve_network

    network = resolve_network(
        NetworkOptions(name, "random", image_size=(SIDE, SIDE), engine="keras", device=device, **options)
    )
    return network.engine(network.recipes, batch_size=batch_size, device=device)


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "dtype"), [("mobilenetv2-0.35", "float16"), ("vgg16", "float32"), ("efficientnetb0", "float32")]
)
def test_a_replay_gives_the_features_of_the_plain_pass(
    card: None, caplog: pytest.LogCaptureFixture, name: str, dtype: str
) -> None:
    graphed, plain = engine_of(name, "gpu", dtype=dtype), engine_of(name, "cpu", dtype=dtype)
    for number, count in enumerate((4, 3)):  # new images each time, and a batch that is not full
        images = pixels(count, number)
        (found,), (expected,) = graphed(images).values(), plain(images).values()
        assert found.dtype == expected.dtype == np.dtype(dtype)
        bound = 1e-5 if dtype == "float32" else 1e-3  # of the largest feature; 1e-3 is a step of float16
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound * np.abs(expected).max())
    assert Graph.replays == 1 + 2  # one proves the graph
    assert "CUDA graph" not in caplog.text
    assert graphed.concurrent
    assert not plain.concurrent


def test_batches_of_several_threads_are_not_mixed_up(card: None) -> None:
    graphed = engine_of("mobilenetv2-0.35", "gpu")
    batches = [pixels(4, seed) for seed in range(6)]
    alone = [next(iter(graphed(batch).values())) for batch in batches]
    start = threading.Barrier(3)

    def run(batch: np.ndarray) -> np.ndarray:
        with contextlib.suppress(threading.BrokenBarrierError):
            start.wait(1)
        return np.asarray(next(iter(graphed(batch).values())))

    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(run, batches))
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (lambda inputs: [inputs + inputs.new_tensor(1.0)], "it copies a number from the host to the card"),
        (lambda inputs: [inputs * next(CALLS)], "a replay differs from a plain pass by 0.5"),
    ],
)
def test_what_a_graph_would_not_compute_is_refused(card: None, network: Any, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        GraphedForward(lambda batch: batch.float(), network, pixels(2), "cpu")


def test_a_network_that_cannot_be_captured_runs_all_the_same(
    card: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might")

    monkeypatch.setattr("torch.cuda.graph", refused)
    graphed, plain = engine_of("mobilenetv2-0.35", "gpu"), engine_of("mobilenetv2-0.35", "cpu")
    for _ in range(2):
        np.testing.assert_array_equal(*(next(iter(engine(pixels(4)).values())) for engine in (graphed, plain)))
    said = "out_relu.avg runs without a CUDA graph, which is slower: CUDA error: operation not permitted when stream is"
    assert caplog.text.count(said) == 1
