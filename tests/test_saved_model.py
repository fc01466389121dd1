"""A SavedModel is a program: only what exports consist of is loaded, and it never wins over a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.errors import RunError
from pipeline.cli import main
from pipeline.exporting.artefacts import is_artefact, open_artefact, read_card, write_card
from pipeline.exporting.formats import FORMATS, convert
from pipeline.exporting.saved_model import CALLS, COMPUTING, check_saved_model

GOLDEN = Path(__file__).parent / "golden" / "runs" / "exports" / "mlp-256-calibrated"
Change = Callable[[Any], None]


@pytest.mark.parametrize("place", [".", "runs/ours"])
def test_a_run_wins_over_a_planted_artefact(tmp_path: Path, place: str) -> None:
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    assert is_artefact(tmp_path)
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "config.yaml").write_text("format: 1\n")
    assert not is_artefact(tmp_path / place)
    assert not is_artefact((tmp_path / place).parent if place != "." else tmp_path)
    shutil.copy(tmp_path / "saved_model.pb", tmp_path / "runs") if place != "." else None
    assert not is_artefact(tmp_path / "runs")


def computing(model: Any) -> Any:
    """The function that computes the probabilities."""
    return next(item for item in model.meta_graphs[0].graph_def.library.function if len(item.node_def) > 100)


def named(model: Any, part: str) -> Any:
    return next(item for item in model.meta_graphs[0].graph_def.library.function if part in item.signature.name)


def operation(op: str, **strings: str) -> Change:
    def change(model: Any) -> None:
        node = computing(model).node_def.add(name="added", op=op)
        for key, value in strings.items():
            node.attr[key].s = value.encode()

    return change


def call(caller: str, target: str) -> Change:
    def change(model: Any) -> None:
        node = named(model, caller).node_def.add(name="added", op="StatefulPartitionedCall")
        node.attr["f"].func.name = named(model, target).signature.name

    return change


def asset(model: Any) -> None:
    model.meta_graphs[0].asset_file_def.add(filename="/etc/passwd")


def second_graph(model: Any) -> None:
    model.meta_graphs.add().CopyFrom(model.meta_graphs[0])


def no_objects(model: Any) -> None:
    model.meta_graphs[0].ClearField("object_graph_def")


def program_at_start(model: Any) -> None:
    model.meta_graphs[0].object_graph_def.nodes.add().resource.device = ""


def registered(model: Any) -> None:
    model.meta_graphs[0].object_graph_def.nodes[0].user_object.identifier = "_stranger"


def saver_as_signature(model: Any) -> None:
    node = next(n for n in model.meta_graphs[0].object_graph_def.nodes if n.HasField("bare_concrete_function"))
    node.bare_concrete_function.concrete_function_name = named(model, "traced_save").signature.name


def huge_constant(model: Any) -> None:
    node = next(
        node for node in computing(model).node_def if node.op == "Const" and node.attr["value"].tensor.float_val
    )
    for size in (1 << 20, 1 << 20):
        node.attr["value"].tensor.tensor_shape.dim.add(size=size)


def many_constants(model: Any) -> None:
    """Each of them is small enough; together they are 3 GB."""
    function = computing(model)
    source = next(node for node in function.node_def if node.op == "Const" and node.attr["value"].tensor.float_val)
    for number in range(50):
        node = function.node_def.add()
        node.CopyFrom(source)
        node.name = f"added_{number}"
        node.attr["value"].tensor.tensor_shape.dim.add(size=15 << 20)


def replacing(model: Any) -> None:
    """TensorFlow would run the function that saves, in place of the one that computes."""
    for function in (computing(model), named(model, "traced_save")):
        function.attr["api_implements"].s = b"probabilities"


def twice(model: Any) -> None:
    model.meta_graphs[0].graph_def.library.function.add().CopyFrom(computing(model))


def multiplying(model: Any) -> None:
    library = model.meta_graphs[0].graph_def.library
    for level in range(40):
        function = library.function.add()
        function.signature.name = f"level_{level}"
        for number in range(2 if level else 0):
            node = function.node_def.add(name=f"call_{number}", op="PartitionedCall")
            node.attr["f"].func.name = f"level_{level - 1}"
        function.node_def.add(name="one", op="NoOp")


HOSTILE: dict[str, tuple[Change, str]] = {
    "writes a file": (operation("WriteFile"), r"the operation WriteFile \(added\)"),
    "reads a file": (operation("ReadFile"), "the operation ReadFile"),
    "runs Python": (operation("EagerPyFunc"), "the operation EagerPyFunc"),
    "loops": (operation("While"), "the operation While"),
    "saves in the middle": (operation("SaveV2"), "the operation"),
    "calls what saves": (call("signature_wrapper", "traced_save"), "traced_save.* is no function that an export calls"),
    "calls what restores": (call("signature_wrapper", "traced_restore"), "traced_restore"),
    "calls itself": (call("inference___call__", "inference___call__"), "calls itself"),
    "calls multiply": (multiplying, "stands for .* operations, at most 1000000"),
    "has assets": (asset, "reads files or runs a program of its own when it is loaded"),
    "two graphs": (second_graph, "holds 2 graphs, expected one"),
    "TensorFlow 1": (no_objects, "has no objects, as graphs of TensorFlow 1"),
    "makes a resource": (program_at_start, "an object of the kind resource"),
    "a stranger's object": (registered, "an object of the kind _stranger"),
    "saves as a signature": (saver_as_signature, "an object calls .*traced_save"),
    "a constant of terabytes": (huge_constant, r"declares 1\d+ values, but does not hold them"),
    "many large constants": (many_constants, "the constant added_1 declares 15728640 values, but does not hold them"),
    "replaces what computes": (replacing, "may replace another one, which no export has"),
    "two of a name": (twice, "has two functions of the name"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_graph_is_refused_before_it_is_loaded(tmp_path: Path, name: str) -> None:
    from tensorflow.core.protobuf import saved_model_pb2

    change, message = HOSTILE[name]
    shutil.copytree(GOLDEN, tmp_path / "model")
    file = tmp_path / "model" / "saved_model.pb"
    model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    change(model)
    file.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=message):
        check_saved_model(tmp_path / "model")


@pytest.mark.slow
def test_other_files_and_links_beside_the_graph_are_refused(tmp_path: Path) -> None:
    for name in ("saved_model.cpb", "saved_model.pbtxt", "assets/words.txt", "variables/variables.data-1", "x/y"):
        model = Path(shutil.copytree(GOLDEN, tmp_path / name.replace("/", "_")))
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("")
        with pytest.raises(ValueError, match="a link or a file that no export has"):
            check_saved_model(model)
    model = Path(shutil.copytree(GOLDEN, tmp_path / "linked"))
    index = model / "variables" / "variables.index"
    index.rename(tmp_path / "elsewhere")
    index.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"'variables/variables.index', a link"):
        check_saved_model(model)
    (tmp_path / "linked" / "saved_model.pb").write_bytes(b"no protocol buffer")
    with pytest.raises(RunError, match="saved_model cannot load it"):
        open_artefact(model)
    check_saved_model(GOLDEN)


@pytest.mark.slow
def test_a_saved_model_that_writes_a_file_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole program of a stranger with the card of an export: predict refuses it, and nothing is written or read."""
    import tensorflow as tf
    from PIL import Image

    proof = tmp_path / "proof.txt"

    class Program(tf.Module):  # type: ignore[misc]
        @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3), tf.uint8, name="images")])
        def serve(self, images: Any) -> dict[str, Any]:
            tf.io.write_file(str(proof), tf.io.read_file("/etc/hostname"))
            return {"probabilities": tf.zeros((tf.shape(images)[0], 2))}

    program = Program()
    tf.saved_model.save(program, str(tmp_path / "model"), signatures={"serving_default": program.serve})
    program.serve(tf.zeros((1, 2, 2, 3), tf.uint8))
    assert proof.exists()  # it works
    proof.unlink()
    write_card(tmp_path / "model", read_card(GOLDEN)[1])
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    assert main(["predict", str(tmp_path / "model"), str(tmp_path / "a.png")]) == 1
    assert "its graph has the operation ReadFile" in (error := capsys.readouterr().err) or "WriteFile" in error
    assert not proof.exists()


@pytest.mark.slow
def test_no_operation_of_the_list_has_a_side_effect() -> None:
    """TensorFlow's own registry says so; reading a variable and calling a function are the two that are needed."""
    from tensorflow.python.framework import op_def_registry

    unknown = [name for name in COMPUTING if op_def_registry.get(name) is None]
    stateful = {name for name in COMPUTING | CALLS if op_def_registry.get(name).is_stateful}
    assert (unknown, stateful) == ([], {"StatefulPartitionedCall"})
    assert not [name for name in COMPUTING if "File" in name or "Func" in name or "Save" in name or "Restore" in name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv3small"])
def test_exports_of_other_networks_consist_of_the_list(name: str) -> None:
    import tensorflow as tf

    from features.networks.backbones import build_backbone
    from features.networks.finding import find_backbone

    model = build_backbone(find_backbone(name), (64, 64))
    traced = tf.function(lambda images: model(images, training=False)).get_concrete_function(
        tf.TensorSpec((None, 64, 64, 3))
    )
    graph = traced.graph.as_graph_def()
    used = {node.op for item in (graph.node, *(inner.node_def for inner in graph.library.function)) for node in item}
    assert used - COMPUTING - CALLS == {"ReadVariableOp"}


@pytest.mark.slow
def test_an_export_is_what_keras_itself_exports(tmp_path: Path) -> None:
    import keras
    import tensorflow as tf

    images = keras.Input((None, None, 3), dtype="uint8", name="images")
    maps = keras.layers.BatchNormalization()(
        keras.layers.Conv2D(4, 3, padding="same")(keras.layers.Rescaling(1 / 127.5)(images))
    )
    model = keras.Model(images, keras.layers.GlobalAveragePooling2D()(maps), trainable=False)
    for name in ("saved_model", "litert"):
        row = FORMATS[name]
        convert(model, "keras", row, tmp_path / f"ours{row.suffix}")
        model.export(
            str(tmp_path / f"keras{row.suffix}"), format="litert" if row.suffix else "tf_saved_model", verbose=False
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keras", "keras.tflite", "ours", "ours.tflite"]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 9, 8, 3), dtype=np.uint8)
    said = []
    for name in ("keras", "ours"):
        loaded = tf.saved_model.load(str(tmp_path / name))
        serving = loaded.signatures["serving_default"]
        lists = [
            [item.shape for item in getattr(loaded, f"{kind}variables")]
            for kind in ("", "trainable_", "non_trainable_")
        ]
        said.append(
            (
                sorted(loaded.signatures), serving.structured_input_signature, serving.structured_outputs, lists,
                loaded.serve(pixels).numpy().tolist(), FORMATS["litert"].load(tmp_path / f"{name}.tflite")(pixels).tolist(),
            )
        )  # fmt: skip
    assert said[0] == said[1]
    assert len(said[0][3][0]) == 6
    check_saved_model(tmp_path / "ours")
    np.testing.assert_allclose(said[1][4], np.asarray(model(pixels)), rtol=1e-5, atol=1e-6)
