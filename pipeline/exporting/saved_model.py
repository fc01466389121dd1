"""Check a SavedModel before TensorFlow loads it. Its graph is a program: it can read and write files when it runs.

    saved_model.pb, parsed as data -> operations of the graph and of all its functions, calls, objects -> pass, or ValueError

What passes consists of what ``bottleneck export`` writes: operations that compute, variables, and the two functions that
save and restore these, which only TensorFlow itself calls. Loops are not among them, so a graph always ends.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Operations without a side effect that exports consist of: those of all networks of the table, of the resizing rules, of
# heads, and of the layers of Keras that a model file can have. A test compares them with TensorFlow's own registry.
_COMPUTING = """
Abs AddV2 All Any ArgMax ArgMin Atan AvgPool BatchMatMulV2 BatchToSpaceND BiasAdd Bitcast BitwiseAnd BroadcastTo Cast
Ceil ConcatV2 Const Conv2D Conv2DBackpropInput Cos Cosh Cumsum DepthwiseConv2dNative DivNoNan Einsum Elu Equal Erf Erfc
Exp ExpandDims Expm1 Fill Floor FloorDiv FloorMod FusedBatchNormV3 GatherV2 Greater GreaterEqual Identity IdentityN
IsFinite IsNan LeakyRelu Less LessEqual Log Log1p LogSoftmax LogicalAnd LogicalNot LogicalOr MatMul Max MaxPool Maximum
Mean Min Minimum MirrorPad Mul Neg NoOp NotEqual OneHot OnesLike Pack Pad PadV2 Placeholder Pow Prod Range RealDiv
Reciprocal Relu Relu6 Reshape ResizeBicubic ResizeBilinear ResizeNearestNeighbor ReverseV2 Roll Round Rsqrt Select
SelectV2 Selu Shape Sigmoid Sign Sin Sinh Slice Softmax Softplus Softsign SpaceToBatchND Split SplitV Sqrt Square
SquaredDifference Squeeze StopGradient StridedSlice Sub Sum Tan Tanh Tile TopKV2 Transpose Unpack ZerosLike
"""
COMPUTING = frozenset(_COMPUTING.split())
CALLS = frozenset(("PartitionedCall", "StatefulPartitionedCall", "StatelessIf"))
VARIABLES = frozenset(("VarHandleOp", "ReadVariableOp", "AssignVariableOp", "VarIsInitializedOp", "DisableCopyOnRead"))
FILES = frozenset(
    ("SaveV2", "RestoreV2", "MergeV2Checkpoints", "ShardedFilename", "StaticRegexFullMatch", "StringJoin")
)
_SAVER = FILES | VARIABLES | {"Const", "Identity", "NoOp", "Pack", "Select"}
_KINDS = ("user_object", "function", "bare_concrete_function", "variable", "constant")
_OBJECTS = (
    *("_generic_user_object", "signature_map", "trackable_list_wrapper", "trackable_dict_wrapper"),
    "trackable_tuple_wrapper",
)
_MEMBERS = re.compile(
    r"saved_model\.pb|fingerprint\.pb|variables/variables\.(index|data-\d{5}-of-\d{5})|assets\.extra/bottleneck\.json"
)
_LARGEST_GRAPH = 256 << 20  # bytes of saved_model.pb, which holds no weights
_LARGEST_CONSTANTS = 256 << 20  # bytes that the constants may declare beyond those in the file
_MOST_NODES = 1_000_000  # of one call, with everything that it calls


def check_saved_model(path: Path) -> None:
    """Check a folder that TensorFlow would load as a SavedModel.

    Raises
    ------
    ValueError
        If it holds other files, or a graph with anything but what an export consists of; the message names it.
    """
    from tensorflow.core.protobuf import saved_model_pb2

    _check_files(path)
    file = path / "saved_model.pb"
    if file.stat().st_size > _LARGEST_GRAPH:
        raise ValueError(f"saved_model.pb has {file.stat().st_size} bytes, at most {_LARGEST_GRAPH} are allowed")
    model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    if len(model.meta_graphs) != 1:
        raise ValueError(f"it holds {len(model.meta_graphs)} graphs, expected one")
    graph = model.meta_graphs[0]
    if graph.asset_file_def or not set(graph.collection_def) <= {"saved_model_main_op"}:
        raise ValueError("it reads files or runs a program of its own when it is loaded, which no export does")
    functions = _functions(graph.graph_def.library.function)
    savers = {name for name, nodes in functions.items() if any(node.op in FILES for node in nodes)}
    for name, nodes in functions.items():
        allowed = _SAVER if name in savers else COMPUTING | CALLS | {"ReadVariableOp"}
        _check_nodes(nodes, allowed, set(functions) - savers)
    ends = {graph.saver_def.save_tensor_name.partition(":")[0], graph.saver_def.restore_op_name}
    every = COMPUTING | CALLS | VARIABLES
    _check_nodes((node for node in graph.graph_def.node if node.name in ends), every, set(functions))
    _check_nodes((node for node in graph.graph_def.node if node.name not in ends), every, set(functions) - savers)
    _check_constants(itertools.chain(graph.graph_def.node, *functions.values()))
    _check_calls(functions)
    _check_objects(graph.object_graph_def, set(functions) - savers)


def _check_files(path: Path) -> None:
    for item in sorted(path.rglob("*")):
        name = item.relative_to(path).as_posix()
        known = name in ("variables", "assets.extra", "assets") if item.is_dir() else _MEMBERS.fullmatch(name)
        if item.is_symlink() or not known:
            raise ValueError(f"it holds {name!r}, a link or a file that no export has")


def _check_nodes(nodes: Iterable[Any], allowed: frozenset[str] | set[str], functions: set[str]) -> None:
    for node in nodes:
        if node.op not in allowed:
            raise ValueError(f"its graph has the operation {node.op} ({node.name}), which no export has")
        if unknown := sorted(set(_called(node)) - functions):
            raise ValueError(f"{node.name} calls {unknown[0]!r}, which is no function that an export calls")


def _functions(library: Iterable[Any]) -> dict[str, Any]:
    """Nodes of the functions by name. TensorFlow may run a function in place of another that implements the same."""
    functions: dict[str, Any] = {}
    for function in library:
        name = function.signature.name
        if name in functions:
            raise ValueError(f"it has two functions of the name {name!r}")
        if "api_implements" in function.attr:
            raise ValueError(f"its function {name!r} may replace another one, which no export has")
        functions[name] = function.node_def
    return functions


def _check_constants(nodes: Iterable[Any]) -> None:
    """A constant of one repeated value takes a few bytes in the file and as much memory as its shape declares."""
    declared = 0
    for node in nodes:
        for value in node.attr.values():
            if value.HasField("tensor"):
                values = math.prod(dimension.size for dimension in value.tensor.tensor_shape.dim)
                declared += max(0, 16 * values - 16 * len(value.tensor.tensor_content))
                if declared > _LARGEST_CONSTANTS:
                    raise ValueError(f"the constant {node.name} declares {values} values, but does not hold them")


def _called(node: Any) -> Iterator[str]:
    for value in node.attr.values():
        if value.HasField("func"):
            yield value.func.name
        for function in value.list.func:
            yield function.name


def _check_calls(functions: Mapping[str, Iterable[Any]]) -> None:
    """Refuse functions that call themselves, or whose calls multiply: TensorFlow writes out every call when it runs."""
    sizes: dict[str, int] = {}

    def size(name: str, above: tuple[str, ...]) -> int:
        if name in above or len(above) > 50:
            raise ValueError(f"its function {name!r} calls itself, or calls are nested more deeply than in any export")
        if name not in sizes:
            called = [inner for node in functions[name] for inner in _called(node)]
            sizes[name] = len(list(functions[name])) + sum(size(inner, (*above, name)) for inner in called)
        if sizes[name] > _MOST_NODES:
            raise ValueError(
                f"its function {name!r} stands for {sizes[name]} operations, at most {_MOST_NODES} are allowed"
            )
        return sizes[name]

    for name in functions:
        size(name, ())


def _check_objects(graph: Any, functions: set[str]) -> None:
    """Check the objects that TensorFlow makes, some of which run a function when the model is loaded."""
    if not graph.nodes:
        raise ValueError(
            "it has no objects, as graphs of TensorFlow 1, which run a program of their own when they are loaded"
        )
    for node in graph.nodes:
        kind = node.WhichOneof("kind")
        named = node.user_object.identifier if kind == "user_object" else ""
        if kind not in _KINDS or (kind == "user_object" and named not in _OBJECTS):
            raise ValueError(f"it has an object of the kind {named or kind}, which no export has")
        if node.saveable_objects or node.registered_name or node.registered_saver:
            raise ValueError("it has an object that is restored by a function of its own, which no export has")
        used = {*node.function.concrete_functions} | {node.bare_concrete_function.concrete_function_name} - {""}
        if unknown := sorted(used - functions):
            raise ValueError(f"an object calls {unknown[0]!r}, which is no function that an export calls")
