"""int8: one quantised network, made once of the user's images, found by its digest or refused; never made again in silence."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import listing, paint_folder, recipe
from onnx import TensorProto, helper, numpy_helper

from features.errors import ConfigurationError, IntegrityError, OpenVinoError, SourceError
from features.extraction import extraction
from features.extraction.calibration import drawn_rows, with_quantised
from features.extraction.extraction import extract_features, pack_store, prepare
from features.extraction.options import ExtractionOptions
from features.networks import quantised, quantising
from features.networks.engines import choose_engine
from features.networks.openvino_engine import import_openvino
from features.networks.quantised import QuantisedNetwork, find, keep, keep_only, networks_of_store, place_in, read
from features.networks.reference import reference_images, relative_difference
from features.recipe import NetworkOptions, Recipe
from features.sources.scan import scan
from features.store.reader import FeatureStore
from features.transformer import FeatureExtractor
from pipeline.reporting.reproduce import commands
from pipeline.runs import writing
from pipeline.runs.folder import Run
from pipeline.stages import extract as stage
from pipeline.stages.export import export
from pipeline.stages.finetune import finetune
from pipeline.stages.predict import predict
from pipeline.stages.train_head import train_head

DIGEST = "ab" * 32
HOW = {
    "format": "bottleneck-preprocess 1", "size": [16, 16], "resize": "antialias", "fit": "stretch", "scale": 1 / 255,
    "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
}  # fmt: skip


def packed(**changes: Any) -> QuantisedNetwork:
    values: dict[str, Any] = {
        "outputs": (recipe(), recipe("corner")),
        "model": np.frombuffer(b"<net/>", np.uint8),
        "weights": np.arange(7, dtype=np.uint8),
        "expected": (np.array([[1.5, -2]], np.float32), np.zeros((1, 2, 2), np.float32)),
        "step": None,
        "calibration": {"images": 3},
    }
    return QuantisedNetwork(**{**values, **changes})


def written(folder: Path, network: QuantisedNetwork | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = (network or packed()).packed()
    path = place_in(folder, quantised.hashlib.sha256(data).hexdigest())
    path.write_bytes(data)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_folder_of_runs_has_its_copy_also_where_one_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "features.h5.networks")
    for place in ("one", "two", "one"):
        (tmp_path / place).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / place)
        writing._keep_quantised(Path("runs"), tmp_path / "features.h5", path.stem)
        assert (Path("runs/.networks") / path.name).read_bytes() == path.read_bytes()
        shutil.rmtree("runs")


def test_a_damaged_copy_beside_the_runs_is_mended_by_the_next_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, copy = written(tmp_path / "features.h5.networks"), tmp_path / "runs" / ".networks"
    for damage in (b"", path.read_bytes()[:-1], path.read_bytes()):
        copy.mkdir(parents=True, exist_ok=True)
        (copy / path.name).write_bytes(damage)
        writing._keep_quantised(tmp_path / "runs", tmp_path / "features.h5", path.stem)
        assert (copy / path.name).read_bytes() == path.read_bytes()
    assert caplog.text.count("It is not used") == 2
    path.unlink()
    (copy / path.name).write_bytes(b"damaged")
    writing._keep_quantised(tmp_path / "runs", tmp_path / "features.h5", path.stem)
    assert "is lost" in caplog.text
    assert "cannot predict new images" in caplog.text


# ---------------------------------------------------------------------------------------------- recipe and file
def test_the_digest_is_part_of_the_recipe_and_of_no_other_recipe() -> None:
    exact = recipe()
    made = dataclasses.replace(exact, precision="int8", quantised=DIGEST)
    assert made.to_dict() == {**exact.to_dict(), "precision": "int8", "quantised": DIGEST}
    assert "quantised" not in exact.canonical
    assert (exact.format_version, made.format_version) == (1, 2)
    assert Recipe.from_dict(json.loads(made.canonical)) == made
    assert made.fingerprint != dataclasses.replace(made, quantised="cd" * 32).fingerprint
    assert dataclasses.replace(made, dtype="float16").in_float32 == exact
    options = made.options("numpy", "imagenet", quantised="q.int8")
    assert (options.precision, options.quantised, options.engine) == ("int8", "q.int8", "auto")


@pytest.mark.parametrize(
    ("precision", "digest"),
    [("int8", None), ("float32", DIGEST), ("int8", "AB" * 32), ("int8", "../" * 20 + "abcd"), ("float32", "")],
)
def test_a_recipe_has_a_digest_if_and_only_if_it_is_int8(precision: str, digest: Any) -> None:
    with pytest.raises(ConfigurationError, match="quantised: received"):
        recipe(precision=precision, quantised=digest)
    with pytest.raises(ConfigurationError, match="add --precision int8, or leave it out"):
        NetworkOptions(quantised="q.int8")


def test_a_file_gives_back_what_was_packed(tmp_path: Path) -> None:
    path = written(tmp_path)
    network, digest = read(path, path.stem)
    assert digest == path.stem
    assert network.outputs == (recipe(), recipe("corner"))
    assert network.model.tobytes() == b"<net/>"
    assert network.weights.tolist() == list(range(7))
    assert [values.tolist() for values in network.expected] == [[[1.5, -2.0]], [[[0.0, 0.0], [0.0, 0.0]]]]
    asked = dataclasses.replace(recipe("corner"), dtype="float16", precision="int8", quantised=digest)
    assert network.number_of(asked) == 1
    assert network.number_of(recipe("other")) is None


def test_the_digest_covers_every_byte(tmp_path: Path) -> None:
    path = written(tmp_path)
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(IntegrityError, match="is damaged or another file"):
            read(path, path.stem)
    path.write_bytes(data + b"x")
    with pytest.raises(IntegrityError, match="is damaged or another file"):
        read(path, path.stem)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"}, {"format_version": 2}, {"model": 7}, {"weights": 1 << 40}, {"weights": -1}, {"weights": 7.0},
        {"expected": [[1, 2]]}, {"expected": [[1 << 62, 4], [1, 2, 2]]}, {"expected": [[1] * 9, [1]]}, {"expected": "no"},
        {"outputs": []}, {"outputs": [{}]}, {"outputs": None}, {"step": "4"}, {"calibration": 3},
    ],
)  # fmt: skip
def test_a_strange_file_is_refused_before_anything_is_allocated(tmp_path: Path, change: dict[str, Any]) -> None:
    line, rest = packed().packed().split(b"\n", 1)
    path = tmp_path / "x.int8"
    path.write_bytes(json.dumps({**json.loads(line), **change}).encode() + b"\n" + rest)
    with pytest.raises(IntegrityError, match="is not a quantised network that this release reads"):
        read(path)
    for data in (b"", b"[]\n", b"{" * 100_000 + b"\n", rest, line):
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match="is not a quantised network"):
            read(path)


# ---------------------------------------------------------------------------------------------- where it is found
def test_it_is_found_in_any_of_its_places_and_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = written(tmp_path / "away")
    digest = kept.stem
    folders = [tmp_path / "runs" / ".networks", networks_of_store(tmp_path / "f.h5")]
    with pytest.raises(ConfigurationError, match=r"is lost: .*--quantised FILE\.int8; else extract again"):
        find(digest, folders)
    assert find(digest, folders, kept) == kept
    cached = quantised.keep_in_cache(packed())
    assert find(digest, folders) == cached == tmp_path / "cache" / "quantised" / kept.name
    beside = keep(cached, digest, folders[1])
    assert find(digest, folders) == beside
    beside.write_bytes(b"damaged")
    assert find(digest, folders) == cached
    assert "It is not used" in caplog.text
    assert caplog.text.count(str(beside)) == 1
    assert keep(cached, digest, folders[1]).read_bytes() == kept.read_bytes()  # mended
    other = written(tmp_path / "other", packed(step=1))
    with pytest.raises(ConfigurationError, match=f"expected the quantised network {digest[:12]}") as refused:
        find(digest, folders, other)
    assert str(refused.value).count(str(other)) == 1
    keep_only(folders[1], [digest])
    assert listing(folders[1]) == [kept.name]
    keep_only(folders[1], [])
    assert not folders[1].exists()


def test_only_openvino_on_a_processor_runs_it() -> None:
    for wrong in ({"engine": "keras"}, {"device": "gpu"}):
        with pytest.raises(ConfigurationError, match="int8 runs with openvino on the processor only"):
            choose_engine(NetworkOptions(precision="int8", **wrong))
    assert choose_engine(NetworkOptions(precision="int8", engine="openvino")) == "openvino"


# ---------------------------------------------------------------------------------------------- calibration images
def test_calibration_images_are_drawn_by_path_from_what_is_not_held_out(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        paint_folder(tmp_path / split, {"cat": 8, "dog": 8}, start=len(split) * 20)
    images = scan(tmp_path)
    rows = drawn_rows(images, 0)
    chosen = [images.paths[row] for row in rows]
    assert sorted(chosen) == [path for path in images.paths if path.startswith("train/")]
    assert chosen != sorted(chosen)
    assert [images.paths[row] for row in drawn_rows(images, 1)] != chosen
    (tmp_path / "train" / "cat" / "0003.png").unlink()
    fewer = scan(tmp_path)
    assert [fewer.paths[row] for row in drawn_rows(fewer, 0)] == [name for name in chosen if "cat/0003" not in name]


def test_a_store_of_another_precision_is_refused_before_the_work(tmp_path: Path) -> None:
    paint_folder(tmp_path / "images", {"cat": 4, "dog": 4})
    from helpers import extract

    extract(tmp_path / "images", tmp_path / "f.h5")
    asked = ExtractionOptions(precision="int8")
    images = scan(tmp_path / "images")
    with pytest.raises(ConfigurationError, match="another recipe \\(precision: float32 -> int8\\)"):
        with_quantised(asked, images, tmp_path / "f.h5")
    given = dataclasses.replace(asked, quantised="q.int8")
    assert with_quantised(given, images, tmp_path / "f.h5") is given
    with pytest.raises(ConfigurationError, match="int8 needs a quantised network, which extract makes"):
        FeatureExtractor("mobilenetv2", weights="random", precision="int8").fit(["a.png"])


def test_what_int8_costs_is_said_where_it_is_much(caplog: pytest.LogCaptureFixture) -> None:
    found = {"images": 1000, "relative_error": 0.3, "accuracy": 0.97, "accuracy_float32": 0.98}
    extraction._warn_of_loss({"a": found, "b": {**found, "accuracy": 0.976}, "c": {**found, "accuracy": None}})
    assert (
        "a: a head on the int8 features is right on 0.9700 of 1,000 images, in float32 on 0.9800: 0.0100 is lost"
        in caplog.text
    )
    assert "--precision bfloat16" in caplog.text
    assert len(caplog.records) == 1


# ---------------------------------------------------------------------------------------------- a real one
@dataclasses.dataclass(frozen=True)
class World:
    """A folder with images, a small network, its features in int8 and a head; made once."""

    folder: Path
    said: str

    @property
    def store(self) -> Path:
        return self.folder / "f.h5"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def run(self) -> Path:
        (run,) = (self.folder / "runs").glob("logistic-*")
        return run

    @property
    def options(self) -> dict[str, Any]:
        return {"backbone": str(self.folder / "net.onnx"), "preprocess": str(self.folder / "how.json")}


def network(path: Path) -> None:
    """Write an ONNX file of two convolutions whose weights would overflow 16 bits in pairs."""
    draw = np.random.default_rng(3)
    weights = [
        numpy_helper.from_array(draw.normal(0.2, 0.2, shape).astype(np.float32), name)
        for name, shape in (("first", (16, 3, 3, 3)), ("second", (24, 16, 3, 3)))
    ]
    nodes = [
        helper.make_node("Conv", ["pixels", "first"], ["a"], strides=[2, 2]), helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "second"], ["c"]), helper.make_node("Relu", ["c"], ["relu"]),
    ]  # fmt: skip
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, 16, 16])]
    outputs = [helper.make_tensor_value_info("relu", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "small", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def textured(folder: Path, count: int, start: int = 0) -> None:
    from PIL import Image

    for number in range(start, start + count):
        draw = np.random.default_rng(number)
        for name, low in (("cat", 0), ("dog", 15)):
            pixels = draw.integers(low, low + 190, (16, 16, 3), dtype=np.uint8)
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    if not quantising.can_quantise():
        pytest.skip("NNCF is not installed (extra int8)")
    folder = tmp_path_factory.mktemp("int8")
    made = World(folder, "")
    textured(made.images, 14)
    network(folder / "net.onnx")
    (folder / "how.json").write_text(json.dumps(HOW))
    handler = logging.StreamHandler(text := io.StringIO())
    logging.getLogger("features").addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BOTTLENECK_CACHE", str(folder / "cache"))
        store = extract_features(made.images, made.store, precision="int8", check_precision=20, **made.options)
        train_head(store, "logistic", runs=folder / "runs", params={"C": 1e-3})
    logging.getLogger("features").removeHandler(handler)
    return dataclasses.replace(made, said=text.getvalue())


def rows_of(run: Path, images: Path, **options: Any) -> np.ndarray:
    predict(run, images, stream=(text := io.StringIO()), **options)
    return np.array([float(row["cat"]) for row in csv.DictReader(text.getvalue().splitlines())])


@pytest.mark.slow
def test_int8_gives_the_numbers_of_exact_integers_and_weights_have_seven_bits(world: World) -> None:
    store = FeatureStore.open(world.store)
    (made,) = store.recipes.values()
    path = place_in(networks_of_store(world.store), str(made.quantised))
    network, _ = read(path, made.quantised)
    graph = import_openvino().Core().read_model(network.model.tobytes(), import_openvino().Tensor(network.weights))
    whole = [node.data for node in graph.get_ops() if node.get_type_name() == "Constant"]
    bytes_ = [values for values in whole if values.dtype == np.int8 and values.ndim == 4]
    assert {values.shape for values in bytes_} == {(16, 3, 3, 3), (24, 16, 3, 3)}
    assert all(60 <= np.abs(values.astype(int)).max() <= 64 for values in bytes_)
    engine = quantising.open_quantised(path, [made], batch_size=4)
    images = reference_images(16, 16)
    (found,) = engine(images).values()
    (exact,) = network.expected
    assert relative_difference(found, exact) < 0.005
    checked = store.provenance["precision_check"][made.name]
    assert 1e-4 < checked["relative_error"] < 0.2  # images of two kinds of brightness, half of them clipped
    assert network.calibration["images"] == 28
    assert "int8: calibrating on 28 images, all that there are; 320 would be better" in world.said


@pytest.mark.slow
def test_increments_and_predictions_use_the_same_bits_and_nothing_is_quantised_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(world.folder, folder)
    there = World(folder, "")
    monkeypatch.setenv("BOTTLENECK_CACHE", str(folder / "cache"))
    monkeypatch.setattr(quantising, "quantise", lambda *_: pytest.fail("quantised again"))
    before = FeatureStore.open(there.store)
    digest = str(before.recipes["relu.avg"].quantised)
    assert listing(folder / "runs" / ".networks") == [f"{digest}.int8"]
    store = extract_features(there.images, there.store, precision="int8", **there.options)
    assert store.recipes == before.recipes
    textured(there.images, 3, start=50)  # new images, another split rule: no reason to calibrate again
    more = extract_features(there.images, there.store, precision="int8", split="stratified", **there.options)
    assert (len(more), more.recipes) == (34, before.recipes)
    again = extract_features(  # a store of its own, from the file
        there.images, tmp_path / "g.h5", precision="int8", quantised=str(folder / "runs" / ".networks" / f"{digest}.int8"),
        **there.options,
    )  # fmt: skip
    np.testing.assert_array_equal(again.array("relu.avg"), more.array("relu.avg"))
    transformer = FeatureExtractor(
        there.options["backbone"],
        preprocess=there.options["preprocess"],
        precision="int8",
        quantised=str(place_in(tmp_path / "g.h5.networks", digest)),
        store=tmp_path / "t.h5",
    )
    paths = [str(there.images / path) for path in more.images.paths]
    np.testing.assert_allclose(transformer.fit_transform(paths), more.array("relu.avg")[:, 0], rtol=1e-6)
    assert listing(tmp_path / "t.h5.networks") == [f"{digest}.int8"]
    shutil.rmtree(folder / "cache")
    shutil.rmtree(networks_of_store(there.store))
    moved = tmp_path / "elsewhere" / "runs"
    shutil.copytree(folder / "runs", moved)
    here = rows_of(moved / world.run.name, there.images)
    np.testing.assert_array_equal(here, rows_of(world.run, there.images))
    text = "\n".join(commands(Run.open(moved / world.run.name)))
    assert f"--precision int8 --quantised {moved / '.networks' / digest}.int8" in text


@pytest.mark.slow
def test_a_lost_network_is_refused_with_the_way_out(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(world.folder, folder)
    there = World(folder, "")
    (file,) = (folder / "runs" / ".networks").iterdir()
    saved = shutil.copy(file, tmp_path)
    shutil.rmtree(folder / "runs" / ".networks")
    config = there.run / "config.yaml"  # as if the store lay elsewhere
    config.write_text(config.read_text().replace(str(world.store), str(folder / "gone.h5")))
    for act in (
        lambda: rows_of(there.run, there.images),
        lambda: export(there.run, format="onnx", out=tmp_path / "m.onnx"),
    ):
        with pytest.raises(ConfigurationError, match=r"is lost: .* name it with --quantised FILE\.int8"):
            act()
    expected = rows_of(world.run, there.images)
    np.testing.assert_array_equal(rows_of(there.run, there.images, quantised=str(saved)), expected)
    place = networks_of_store(there.store)
    shutil.rmtree(place)
    textured(there.images, 1, start=70)
    with pytest.raises(ConfigurationError, match="is lost"):
        extract_features(there.images, there.store, precision="int8", **there.options)
    pack_store(there.store, tmp_path / "packed.h5")
    assert caplog.text.count("is lost") == 1
    assert stage.verify_networks(FeatureStore.open(there.store)) == 1
    assert "is not there: new images need it" in caplog.text
    keep(Path(saved), Path(saved).stem, place)
    place_in(place, Path(saved).stem).write_bytes(b"x")
    with pytest.raises(IntegrityError, match="is damaged or another file"):
        stage.verify_networks(FeatureStore.open(there.store))


@pytest.mark.slow
def test_an_interrupted_calibration_leaves_nothing(world: World, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("calibrate", 9):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_features(world.images, tmp_path / "f.h5", precision="int8", progress=stop, **world.options)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert not (tmp_path / "cache" / "quantised").exists()


@pytest.mark.slow
def test_a_lost_network_is_replaced_where_the_store_may_be(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world.folder / "cache", tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "quantised")
    shutil.copy(world.store, tmp_path / "f.h5")
    again = ExtractionOptions(precision="int8", overwrite=True, **world.options)
    monkeypatch.setattr(quantising, "quantise", lambda *_: packed())
    options = with_quantised(again, scan(world.images), tmp_path / "f.h5")
    assert read(Path(str(options.quantised)))[0].calibration == {"images": 3}


@pytest.mark.slow
def test_overwrite_replaces_a_store_by_features_of_another_network(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(world.store, tmp_path / "f.h5")
    shutil.copytree(networks_of_store(world.store), networks_of_store(tmp_path / "f.h5"))
    how = tmp_path / "how.json"
    how.write_text(json.dumps({**HOW, "scale": 1 / 128}))
    monkeypatch.setattr(quantising, "quantise", lambda *_: packed(calibration={"images": 28}))
    for preprocess, images in ((how, 28), (world.folder / "how.json", None)):
        chosen = {**world.options, "preprocess": str(preprocess)}
        asked = ExtractionOptions(precision="int8", overwrite=True, **chosen)
        options = with_quantised(asked, scan(world.images), tmp_path / "f.h5")
        found, digest = read(Path(str(options.quantised)))
        assert (digest in (path.stem for path in networks_of_store(world.store).iterdir())) == (images is None)
        assert images is None or found.calibration == {"images": images}
    kept = ExtractionOptions(precision="int8", **{**world.options, "preprocess": str(how)})
    kept = with_quantised(kept, scan(world.images), tmp_path / "f.h5")
    with pytest.raises(ConfigurationError, match=r"other features .*add --overwrite to replace the store"):
        prepare(world.images, tmp_path / "f.h5", kept)


@pytest.mark.slow
def test_export_states_the_difference_and_finetune_is_refused(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = export(world.run, format="onnx", out=tmp_path / "m.onnx", images=world.images)
    assert document["parity_gap"] <= 2e-6
    assert 1e-5 < document["precision_gap"] < 0.1
    gap = np.abs(rows_of(tmp_path / "m.onnx", world.images) - rows_of(world.run, world.images)).max()
    assert document["precision_gap"] == pytest.approx(gap, abs=3e-6)
    assert (
        "computed in int8, and the artefact computes in float32: the probabilities of 28 images differ" in caplog.text
    )
    with pytest.raises(ConfigurationError, match="features computed in int8; fine-tuning continues from float32 ones"):
        finetune(world.run, world.images)


@pytest.mark.slow
def test_the_network_goes_with_its_store(world: World, tmp_path: Path) -> None:
    (file,) = networks_of_store(world.store).iterdir()
    store = extract_features(
        world.images, tmp_path / "s.h5", precision="int8", quantised=str(file), layout="sharded", **world.options
    )
    assert "quantised network: " in stage.summary(stage.describe(store))
    pack_store(tmp_path / "s.h5", tmp_path / "p.h5")
    assert listing(networks_of_store(tmp_path / "p.h5")) == [file.name]
    extract_features(world.images, tmp_path / "p.h5", overwrite=True, **world.options)  # in float32
    assert not networks_of_store(tmp_path / "p.h5").exists()


def opened(folder: Path, whole: QuantisedNetwork, **changes: Any) -> None:
    """Open a network whose file was changed, and whose sha256 is the one that is asked for."""
    path = written(folder, dataclasses.replace(whole, **changes))
    made = dataclasses.replace(whole.outputs[0], precision="int8", quantised=path.stem)
    quantising.open_quantised(path, [made], batch_size=4)


@pytest.fixture
def whole(world: World) -> QuantisedNetwork:
    (file,) = networks_of_store(world.store).iterdir()
    return read(file)[0]


@pytest.mark.slow
def test_damaged_networks_are_refused(whole: QuantisedNetwork, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(quantising, "run_limited", lambda module, folder, limits: quantising.work(folder))
    text = whole.model.tobytes().decode()
    opened(tmp_path, whole)
    for model, changes in (
        ("<net/>", {}), (text[: len(text) // 2], {}), (text.replace('offset="0"', 'offset="999999999"'), {}),
        (text, {"weights": whole.weights[:5]}), (text.replace('type="Convolution"', 'type="Nothing"'), {}),
        (text, {"expected": (whole.expected[0] * 2,)}),
    ):  # fmt: skip
        with pytest.raises(OpenVinoError):
            opened(tmp_path, whole, model=np.frombuffer(model.encode(), np.uint8), **changes)


def made_of(whole: QuantisedNetwork, build: Any) -> dict[str, Any]:
    """The two files of a network of OpenVINO that takes pixels and gives what `build` makes of them, (n, 24)."""
    from openvino import Model
    from openvino import opset13 as op

    pixels = op.parameter([-1, 16, 16, 3], np.uint8, "pixels")
    mean = op.reduce_mean(op.convert(pixels, "f32"), op.constant([1, 2, 3]), keep_dims=False)
    row = op.broadcast(op.unsqueeze(mean, op.constant([1])), op.constant([1, 24]), broadcast_spec="BIDIRECTIONAL")
    result = op.result(build(op, row))
    result.output(0).get_tensor().set_names({"output_0"})
    (width,) = whole.expected[0].shape[1:]
    assert width == 24
    model, weights = quantising._serialised(import_openvino(), Model([result], [pixels]), 0)
    return {"model": model, "weights": weights}


def signs(op: Any, row: Any, count: int = 1500) -> Any:
    """Changes of sign, which OpenVINO compiles together: twice as many take several times as long."""
    row = op.softmax(row, 1)
    for number in range(count):
        row = op.relu(row) if number % 2 else op.negative(row)
    return row


def wide(op: Any, row: Any) -> Any:
    """400 MB of the same number for every image."""
    one = op.reduce_max(row, op.constant([1]), keep_dims=True)
    many = op.negative(op.broadcast(one, op.constant([1, 100_000_000]), broadcast_spec="BIDIRECTIONAL"))
    return op.add(row, op.reduce_max(op.negative(many), op.constant([1]), keep_dims=True))


def endless(op: Any, row: Any) -> Any:
    """A loop whose length depends on the pixels."""
    from openvino import Model

    inside = op.parameter([-1, 24], np.float32)
    body = Model([op.result(op.constant(True)), op.result(op.negative(inside))], [inside])
    count = op.convert(op.reduce_max(row, op.constant([0, 1]), keep_dims=False), "i64")
    loop = op.loop(count, op.constant(True))
    loop.set_function(body)
    loop.set_special_body_ports([-1, 0])
    loop.set_merged_input(inside, row.output(0), body.get_results()[1].output(0))
    return loop.get_iter_value(body.get_results()[1].output(0), -1).get_node()


def mixed(op: Any, row: Any) -> Any:
    """What an image gives depends on the others of its batch."""
    return op.add(row, op.reduce_mean(row, op.constant([0]), keep_dims=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "limits", "message"),
    [
        (signs, (4 << 30, 3), "OpenVINO cannot run the network: it takes more than 3 seconds of processor time"),
        (wide, (1 << 30, 60), "OpenVINO cannot run the network: it takes more than 1074 MB of memory"),
        (endless, None, "the network has the operation Loop, which none that this project made has"),
        (mixed, None, "the features of an image depend on the others of its batch"),
    ],
    ids=["time", "memory", "loop", "batch"],
)
def test_a_hostile_network_of_the_right_sha256_is_ended_or_refused(
    whole: QuantisedNetwork, tmp_path: Path, monkeypatch: Any, build: Any, limits: Any, message: str
) -> None:
    if limits is None:  # a rule: no process is needed to see it
        monkeypatch.setattr(quantising, "run_limited", lambda module, folder, limits: quantising.work(folder))
    else:
        monkeypatch.setattr(quantising, "limits_of", lambda length, pixels: limits)
    changes = made_of(whole, build)
    if build is mixed:
        mean = reference_images(16, 16).reshape(4, -1).mean(axis=1)
        changes["expected"] = (np.repeat((mean + mean.mean())[:, None], 24, axis=1).astype(np.float32),)
    with pytest.raises(OpenVinoError) as caught:
        opened(tmp_path, whole, **changes)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.slow
def test_a_network_is_tried_once_on_a_processor(whole: QuantisedNetwork, tmp_path: Path, monkeypatch: Any) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(quantising, "run_limited", lambda *words: tried.append(words))
    opened(tmp_path, whole)
    opened(tmp_path, whole)
    assert len(tried) == 1
    monkeypatch.setattr(quantising, "processor", lambda: "another")
    opened(tmp_path, whole)
    opened(tmp_path, whole, calibration={"images": 1})  # another file
    assert len(tried) == 3
    monkeypatch.setattr(quantising, "processor", lambda: None)  # unknown: it might be another one
    opened(tmp_path, whole)
    assert len(tried) == 4


@pytest.mark.slow
def test_nothing_to_calibrate_on_and_no_nncf_are_said(world: World, tmp_path: Path, monkeypatch: Any) -> None:
    for split in ("validation", "test"):
        textured(tmp_path / "images" / split, 2)
    options = {"precision": "int8", **world.options}
    with pytest.raises(SourceError, match="no image to calibrate int8 on: none that can be read is not marked"):
        prepare(tmp_path / "images", tmp_path / "f.h5", ExtractionOptions(**options))
    monkeypatch.setattr(quantising, "can_quantise", lambda: False)
    with pytest.raises(OpenVinoError, match=r"pip install .*\[int8\]'"):
        prepare(world.images, tmp_path / "f.h5", ExtractionOptions(**options))
    assert not (tmp_path / "f.h5").exists()
