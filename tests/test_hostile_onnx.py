"""ONNX files that ask for too much, never end, lie about their numbers, or print: refused in one line, or right."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_onnx_networks import HOW, IMAGES, features, network

from features.errors import BottleneckError
from features.networks.network import resolve_network
from features.networks.onnx_engine import limited_memory
from features.networks.reference import relative_difference
from features.recipe import NetworkOptions

Edit = Callable[[Any], None]
node = helper.make_node


def then(*nodes: Any, out: str = "y", **weights: Any) -> Edit:
    """Continue the network of the tests, which ends in ``logits`` (n, 5), with these nodes and constants."""

    def edit(model: Any) -> None:
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(item), key) for key, item in weights.items())
        model.graph.output[0].name = out

    return edit


def added(operator: str, *inputs: str, **weights: Any) -> Edit:
    """Add the sum of what an operator makes of constants to the features."""
    attributes = (
        {"value": helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])} if operator == "ConstantOfShape" else {}
    )
    made = node(operator, [*inputs], ["made"], **attributes)
    return then(made, node("ReduceSum", ["made"], ["sum"]), node("Add", ["logits", "sum"], ["y"]), **weights)


def declared(dims: Sequence[int], kind: int = TensorProto.FLOAT, data: bytes = bytes(16)) -> Edit:
    def edit(model: Any) -> None:
        then(node("MatMul", ["logits", "w"], ["y"]))(model)
        model.graph.initializer.append(TensorProto(name="w", data_type=kind, dims=dims, raw_data=data))

    return edit


def within(operator: str, depth: int = 1, **more: Any) -> Edit:
    """A loop or a condition that gives the features as they are."""
    value, inner = helper.make_tensor_value_info, [node("Identity", ["logits"], ["same"])]
    for _ in range(depth):
        body = helper.make_graph(inner, "body", [], [value("same", TensorProto.FLOAT, None)])
        branches = {"then_branch": body, "else_branch": body}
        inner = [node("If", ["yes"], ["same"], **branches)]
    if operator == "If":
        return then(*inner[:-1], node("If", ["yes"], ["y"], **branches), yes=np.array(True))
    body = helper.make_graph(
        [node("Identity", ["go"], ["on"]), node("Neg", ["state"], ["next"])], "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("state", TensorProto.FLOAT, None)],
        [value("on", TensorProto.BOOL, []), value("next", TensorProto.FLOAT, None)],
    )  # fmt: skip
    return then(node("Loop", ["often", "yes", "logits"], ["y"], body=body), yes=np.array(True), often=np.int64(1 << 60))


def sparse_elsewhere(model: Any) -> None:
    then(node("MatMul", ["logits", "w"], ["y"]))(model)
    values = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    values.external_data.add(key="location", value="net.onnx")
    indices = numpy_helper.from_array(np.array([[1, 1]], np.int64), "")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [5, 4]))


def many_inputs(model: Any) -> None:
    model.graph.input.extend(
        helper.make_tensor_value_info(f"in_{n}\x1b[2J", TensorProto.FLOAT, ["n" * 999, 3, 8, 8]) for n in range(999)
    )


def batch_of(count: int) -> Edit:
    def edit(model: Any) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = count

    return edit


def opset(version: int) -> Edit:
    def edit(model: Any) -> None:
        model.opset_import[0].version = version

    return edit


def matrix(*shape: int) -> np.ndarray:
    return np.full(shape, 0.5, np.float32)


SHAPE = np.array([200_000, 200_000])
EVIL = "\x1b]0;own\x07\nEvil"
UNENDING = [node("ConstantOfShape", ["s"], ["c0"])] + [
    node("MatMul", [f"c{n}", "c0"], [f"c{n + 1}"]) for n in range(500)
]
REFUSED: dict[str, tuple[Edit, str]] = {
    "a loop without end": (within("Loop"), "the operator Loop, a loop, which may have no end"),
    "graphs within graphs": (within("If", 9), "graphs within graphs, deeper than 6"),
    "random numbers": (then(node("RandomNormalLike", ["logits"], ["y"])), "RandomNormalLike: the same image would get other"),
    "training mode": (then(node("Dropout", ["logits", "r", "t"], ["y"]), r=np.float32(0.5), t=np.array(True)), "in training mode"),
    "a mean over the batch": (
        then(node("ReduceMean", ["logits"], ["m"], axes=[0]), node("Sub", ["logits", "m"], ["y"])),
        "depends on the other images of its batch",
    ),
    "a hidden batch": (then(node("Reshape", ["logits", "s"], ["y"]), s=np.array([1, 5])), "takes one image at a time"),
    "numbers that are none": (then(node("Log", ["z"], ["l"]), node("Add", ["logits", "l"], ["y"]), z=matrix(1) - 1), "not finite"),
    "no channels": (then(node("MatMul", ["logits", "w"], ["y"]), w=matrix(5, 0)), r"'y' gives \(2, 0\) for 2 images"),
    "tiles of the batch": (then(node("Tile", ["logits", "s"], ["y"]), s=np.array([2, 1])), r"gives \(4, 5\) for 2 images"),
    "text": (
        then(node("Constant", [], ["y"], value=helper.make_tensor("s", TensorProto.STRING, [1], [b"hi"]))),
        "cannot take images of 8x8 pixels: .* Cast",
    ),
    "a huge constant": (added("ConstantOfShape", "s", s=SHAPE), r"needs more than 10\d\d MB of memory for 2 images of 8x8"),
    "a huge expansion": (added("Expand", "one", "s", one=matrix(1), s=SHAPE), "MB of memory"),
    "a huge range": (added("Range", "a", "b", "d", a=np.float32(0), b=np.float32(1e10), d=np.float32(1)), "MB of memory"),
    "declared, not there": (declared([100_000, 100_000]), r"'w' declare the shape \[100000, 100000\], but the file does not hold"),
    "declared in halves": (declared([100_000, 5], TensorProto.FLOAT16), "does not hold so many numbers"),
    "more than 64 bits": (declared([1 << 32, 1 << 32], data=b""), "does not hold so many numbers"),
    "negative lengths": (declared([-5, 5], data=bytes(100)), r"'w' declare the shape \[-5, 5\]"),
    "sparse and elsewhere": (sparse_elsewhere, "sparse weights in another file"),
    "a circle": (then(node("Add", ["logits", "back"], ["y"]), node("Neg", ["y"], ["back"])), "cannot load the network"),
    "two of a name": (then(node("Neg", ["logits"], ["y"]), node("Abs", ["logits"], ["y"])), "Duplicate definition"),
    "an output that obeys": (then(node("Neg", ["logits"], [EVIL]), out=EVIL), r"'\\\\x1b\]0;own\\\\x07\\\\nEvil' is too long or cannot"),
    "an operator that obeys": (then(node(EVIL, ["logits"], ["y"], domain="odd")), r"not part of ONNX: odd\.\\x1b\]0;own"),
    "a name of 2 MB": (then(node("Neg", ["logits"], ["x" * 2_000_000]), out="x" * 2_000_000), "xxx...' is too long"),
    "a batch of a milliard": (batch_of(10**9), "takes batches of 1000000000 images, at most 1024"),
    "1,000 inputs": (many_inputs, r"and 996 more; expected exactly one, of images"),
    "operators of version 0": (opset(0), "does not say which version of ONNX's operators"),
    "operators of version 99": (opset(99), r"Opset 99 .* Update onnxruntime, or export the network again with a lower opset"),
}  # fmt: skip


def changed(folder: Path, edit: Edit) -> tuple[Path, str]:
    path, how = network(folder / "net.onnx", end="vector"), folder / "how.json"
    model = onnx.load(path)
    edit(model)
    path.write_bytes(model.SerializeToString())
    how.write_text(json.dumps(HOW))
    return path, str(how)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_network_does_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    edit, message = REFUSED[name]
    path, how = changed(tmp_path, edit)
    with pytest.raises(BottleneckError, match=message) as caught:
        resolve_network(NetworkOptions(str(path), preprocess=how))
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


@pytest.mark.slow
def test_what_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = "features.networks.onnx_engine.threading.Timer"
    real = __import__("threading").Timer
    monkeypatch.setattr(timer, lambda seconds, end: real(seconds / 40, end))  # 0.2 seconds, so that the test is short
    end = [node("ReduceSum", ["c500"], ["r"]), node("Add", ["logits", "r"], ["y"])]
    path, how = changed(tmp_path, then(*UNENDING, *end, s=np.array([1500, 1500])))
    with pytest.raises(BottleneckError, match="needs more than 8 seconds for 2 images of 8x8 pixels"):
        resolve_network(NetworkOptions(str(path), preprocess=how))


def test_the_limit_of_memory_ends_with_the_trial() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(MemoryError), limited_memory(20 << 20):
        np.empty(2 << 30, np.uint8)  # far more than earlier tests can have left free inside this process
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert np.empty(2 << 30, np.uint8).size == 2 << 30

    def often(number: int) -> None:
        for _ in range(50):
            with limited_memory(1 << 30):
                pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(often, range(4)))
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "auto"])
def test_conditions_and_whole_numbers_are_right(engine: str, tmp_path: Path) -> None:
    path, how = changed(tmp_path, then(out="logits"))
    plain = features(path, "onnxruntime", IMAGES, preprocess=how)

    def received(edit: Edit) -> np.ndarray:
        path, how = changed(tmp_path, edit)
        found = resolve_network(NetworkOptions(str(path), preprocess=how, engine=engine))
        (values,) = found.engine(found.recipes, batch_size=3)(IMAGES).values()
        return values

    assert relative_difference(received(within("If", 2)), plain) < 1e-6
    weights = np.arange(-10, 10, dtype=np.int8).reshape(5, 4)
    whole = then(
        node("DynamicQuantizeLinear", ["logits"], ["q", "scale", "zero"]),
        node("MatMulInteger", ["q", "w", "zero"], ["sums"]),
        node("Cast", ["sums"], ["as_float"], to=TensorProto.FLOAT), node("Mul", ["as_float", "scale"], ["y"]), w=weights,
    )  # fmt: skip
    rows = []
    for row in plain:  # each image by its own scale, whatever the others are
        scale = (max(row.max(), 0) - min(row.min(), 0)) / 255
        zero = np.round(-min(row.min(), 0) / scale)
        rows.append((np.clip(np.round(row / scale) + zero, 0, 255) - zero) @ weights * scale)
    assert relative_difference(received(whole), np.stack(rows)) < 1e-5
    value = helper.make_tensor_value_info
    twice, once = (
        helper.make_graph([made], "branch", [], [value(made.output[0], TensorProto.FLOAT, None)])
        for made in (node("Concat", ["logits", "logits"], ["twice"], axis=1), node("Identity", ["logits"], ["once"]))
    )
    shaped = then(
        node("ReduceMean", ["logits"], ["mean"], keepdims=0), node("Greater", ["mean", "low"], ["above"]),
        node("If", ["above"], ["y"], then_branch=twice, else_branch=once), low=np.float32(-9),
    )  # fmt: skip
    assert relative_difference(received(shaped), np.hstack([plain, plain])) < 1e-6  # OpenVINO cannot tell this shape
