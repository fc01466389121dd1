"""Views through the whole of stage one: each is what its image gives by hand, is made once, and is made of that image."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import contents, differences, inferred, kill_often, run
from helpers import ROOT, NumpyNetwork, as_engine, call_pipeline, extract, listing, paint_folder, recipe
from PIL import Image

from features.augmentation import PRESETS, AugmentSpec
from features.errors import ConfigurationError, IntegrityError, TooManyUnreadableError
from features.extraction.extraction import Extraction, ExtractionResult, extract_features, pack_store
from features.extraction.journal import PartsFolder
from features.extraction.options import ExtractionOptions
from features.extraction.shard import ShardSpec, extract_shard
from features.pixels.decode import resize_image
from features.pixels.views import render_views
from features.recipe import PixelRule, Recipe
from features.sources.scan import scan
from features.store.reader import FeatureStore, parts_folder, shard_path
from features.store.schema import FeatureSpec, ImageTable, Quarantine, ShardTable
from features.store.writer import StoreWriter

pytestmark = pytest.mark.slow  # dozens of whole extractions

IMAGES = 21
JITTER = PRESETS["crop-rotation-jitter"]


class PixelNetwork(NumpyNetwork):
    """All pixels ("pixels"), and those of the first row ("top"): features that show a view as it was."""

    row_bytes = 4 * 6 * 8 * 3

    def __init__(self, *layers: str, rule: PixelRule = PixelRule(6, 8)) -> None:  # noqa: B008
        made = [recipe(layer, "none") for layer in layers or ("pixels",)]
        super().__init__([Recipe(**{**vars(item), "pixels": rule}) for item in made])
        self.asked: list[tuple[str, ...]] = []

    def engine(self, recipes: Sequence[Recipe], *, batch_size: int, device: str) -> Any:
        inner = super().engine([], batch_size=batch_size, device=device)

        def infer(batch: np.ndarray) -> Mapping[str, np.ndarray]:
            inner(batch)
            self.asked.append(tuple(item.name for item in recipes))
            values = {"pixels": batch.reshape(len(batch), -1), "top": batch[:, 0]}
            return {item.name: values[item.layer].astype(np.float32) for item in recipes}

        return as_engine(infer)

    @property
    def passes(self) -> int:
        return sum(self.batches)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Noisy pictures of various sizes, some of them JPEGs."""
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = generator.integers(0, 256, (10 + number % 5, 12 + number % 7, 3)).astype(np.uint8)
        path = tmp_path / "images" / ("cat", "dog")[number % 2] / f"{number:02d}.{('png', 'jpg')[number % 3 == 0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "f.h5"


def views_of(
    source: Path, out: Path, views: int, network: NumpyNetwork | None = None, spec: AugmentSpec = JITTER, **options: Any
) -> ExtractionResult:
    return extract(source, out, network or PixelNetwork(), views=views, augment=spec, **options)


def by_hand(path: Path, views: int, spec: AugmentSpec = JITTER, seed: int = 0) -> np.ndarray:
    """Pixels of all views of one image file, flat."""
    with Image.open(path) as image:
        upright = image.convert("RGB")
    sha256 = hashlib.sha256(path.read_bytes()).digest()
    rule, numbers = PixelRule(6, 8), range(views)
    return render_views(upright, rule, spec, seed=seed, sha256=sha256, views=numbers, resize=resize_image).reshape(
        views, -1
    )


def assert_views_are_their_images(store: FeatureStore, source: Path, views: int, **options: Any) -> None:
    array = np.asarray(store.array("pixels")[:])
    assert array.shape == (len(store), views, 6 * 8 * 3)
    for path, row in zip(store.images.paths, array, strict=True):
        np.testing.assert_array_equal(row, by_hand(source / path, views, **options))
        assert len({view.tobytes() for view in row}) > 1  # of a few pixels, two crops may be alike


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("none", "flip")])
def test_every_view_is_what_its_image_gives_by_hand(source: Path, out: Path, preset: str) -> None:
    network = PixelNetwork()
    result = views_of(source, out, 4, network, PRESETS[preset], seed=5)
    assert_views_are_their_images(result.store, source, 4, spec=PRESETS[preset], seed=5)
    assert (network.passes, result.inferred, result.counts["new"]) == (4 * IMAGES, 4 * IMAGES, IMAGES)
    assert set(network.batches[:-3]) == {4}  # full, across images
    X, y = result.store.load("train", views="all")
    np.testing.assert_array_equal(X[:, 0], result.store.load("train")[0])
    np.testing.assert_array_equal(X[:, 3], result.store.load("train", views=3)[0])
    np.testing.assert_array_equal(y, result.store.images.labels[result.store.rows("train")])


def test_view_0_is_that_of_a_store_without_views(source: Path, out: Path, tmp_path: Path) -> None:
    plain = extract(source, out, PixelNetwork()).store
    views = views_of(source, tmp_path / "v.h5", 3).store
    np.testing.assert_array_equal(plain.array()[:, 0], views.array()[:, 0])


def test_batches_shards_and_workers_do_not_matter(source: Path, out: Path, tmp_path: Path) -> None:
    first = views_of(source, out, 3).store
    for number, (batch_size, shard_rows, workers) in enumerate(
        [(1, 8, 1), (3, 5, 4), (32, 21, 4), (32, 1, 1), (7, 2, 2)]
    ):
        options: dict[str, Any] = {"batch_size": batch_size, "shard_rows": shard_rows, "workers": workers}
        other = tmp_path / f"{number}.h5"
        views_of(source, other, 3, **options)
        assert differences(first.path, other) == []


def test_the_seed_changes_every_view_but_the_plain_one(source: Path, out: Path, tmp_path: Path) -> None:
    one = views_of(source, out, 3).store.array()
    two = views_of(source, tmp_path / "g.h5", 3, seed=1).store.array()
    np.testing.assert_array_equal(one[:, 0], two[:, 0])
    assert (one[:, 1:] != two[:, 1:]).any(axis=2).all()


def test_copies_of_one_image_have_the_same_views_and_an_equal_view_axis(source: Path, out: Path) -> None:
    (source / "cat" / "copy.png").write_bytes((source / "dog" / "01.png").read_bytes())
    store = views_of(source, out, 3, split="stratified").store
    rows = [store.images.paths.index(path) for path in ("cat/copy.png", "dog/01.png")]
    np.testing.assert_array_equal(*store.array()[rows])
    assert_views_are_their_images(store, source, 3)


# ---------------------------------------------------------------- increments


@pytest.mark.parametrize("layout", ["packed", "sharded"])
def test_more_views_and_more_layers_compute_only_those(source: Path, out: Path, layout: str) -> None:
    network = PixelNetwork()
    views_of(source, out, 2, network, layout=layout)
    assert network.passes == 2 * IMAGES
    assert views_of(source, out, 2, network).written is False
    raised = views_of(source, out, 5, network)
    assert (network.passes, raised.counts["cached"]) == (5 * IMAGES, IMAGES)
    assert_views_are_their_images(raised.store, source, 5)
    assert views_of(source, out, 5, network).written is False

    network = PixelNetwork("pixels", "top")
    both = views_of(source, out, 5, network).store
    assert (network.passes, set(network.asked)) == (5 * IMAGES, {("top",)})
    assert_views_are_their_images(both, source, 5)
    top = both.array("pixels")[:].reshape(IMAGES, 5, 6, 8, 3)[:, :, 0]
    np.testing.assert_array_equal(both.array("top")[:], top)
    both.verify()


def test_views_added_to_a_plain_store_leave_view_0_alone(source: Path, out: Path) -> None:
    extract(source, out, PixelNetwork())
    network = PixelNetwork()
    result = views_of(source, out, 4, network)
    assert (network.passes, result.inferred, result.counts["cached"]) == (3 * IMAGES, 3 * IMAGES, IMAGES)
    assert_views_are_their_images(result.store, source, 4)
    assert views_of(source, out, 4, network).written is False


def test_views_added_to_a_plain_sharded_store(source: Path, out: Path) -> None:
    before = extract(source, out, PixelNetwork(), layout="sharded").store
    old = np.asarray(before.array()[:])
    network = PixelNetwork()
    result = views_of(source, out, 3, network)
    assert (result.store.kind, network.passes) == ("index", 2 * IMAGES)
    assert {*before.shards.names} < {*result.store.shards.names}
    assert_views_are_their_images(result.store, source, 3)
    np.testing.assert_array_equal(result.store.array()[:, 0], old[:, 0])
    result.store.verify()
    network = PixelNetwork()
    assert (views_of(source, out, 3, network).written, network.batches) == (False, [])
    assert_views_are_their_images(pack_store(out), source, 3)


def test_a_layer_and_views_at_once_make_no_cell_that_is_there(source: Path, out: Path) -> None:
    extract(source, out, PixelNetwork())
    network = PixelNetwork("pixels", "top")
    store = views_of(source, out, 3, network).store
    passes = dict.fromkeys(network.asked, 0)
    for asked, count in zip(network.asked, network.batches, strict=True):
        passes[asked] += count
    assert passes == {("top",): IMAGES, ("pixels", "top"): 2 * IMAGES}
    assert_views_are_their_images(store, source, 3)
    np.testing.assert_array_equal(store.array("top")[:].reshape(IMAGES, 3, -1), store.array("pixels")[..., : 8 * 3])


def test_a_store_keeps_its_views_without_being_told(source: Path, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    views_of(source, out, 3, seed=9)
    before = out.read_bytes()
    network = PixelNetwork()
    with caplog.at_level(logging.INFO, "features.extraction.planning"):
        assert extract(source, out, network).written is False
    assert f"{out}: keeps its 3 views, although 1 are requested" in caplog.text
    assert views_of(source, out, 2, network, seed=9).written is False
    assert (network.batches, out.read_bytes()) == ([], before)
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 9, 3)).astype(np.uint8)).save(source / "cat/new.png")
    store = extract(source, out, PixelNetwork("top")).store  # a new image and a new layer
    assert (store.views("pixels"), store.views("top")) == (3, 3)
    assert_views_are_their_images(store, source, 3, seed=9)


def test_views_drawn_in_another_way_are_refused(source: Path, out: Path) -> None:
    views_of(source, out, 2, spec=PRESETS["flip-rotation"])
    before, network = out.read_bytes(), PixelNetwork()
    other = AugmentSpec(horizontal_flip=True, rotation_degrees=15, fill="nearest")
    with pytest.raises(
        ConfigurationError,
        match=r"views with another augmentation \(augmentation.fill: reflect -> nearest; augmentation.rotation_degrees: "
        r"36.0 -> 15.0\)\. Omit --views and --augment to keep them",
    ):
        views_of(source, out, 2, network, other)
    with pytest.raises(ConfigurationError, match=r"with another augmentation \(seed: 0 -> 7\)"):
        views_of(source, out, 2, network, PRESETS["flip-rotation"], seed=7)
    assert (network.batches, out.read_bytes()) == ([], before)
    replaced = views_of(source, out, 3, network, other, overwrite=True).store
    assert_views_are_their_images(replaced, source, 3, spec=other)


def test_another_recipe_is_refused_whether_or_not_there_are_views(source: Path, out: Path) -> None:
    views_of(source, out, 2)
    other = PixelNetwork(rule=PixelRule(9, 8))
    for views in (1, 2):
        with pytest.raises(ConfigurationError, match=r"another recipe \(height: 6 -> 9\)\. No row"):
            views_of(source, out, views, other, JITTER if views > 1 else AugmentSpec())


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("layout", ["packed", "sharded"])
def test_an_interrupted_run_goes_on_where_it_was(source: Path, out: Path, tmp_path: Path, layout: str) -> None:
    whole = views_of(source, tmp_path / "whole.h5", 3).store
    network = PixelNetwork()
    network.fail_after = 7
    with pytest.raises(KeyboardInterrupt):
        views_of(source, out, 3, network, shard_rows=5, layout=layout)
    assert not out.exists()
    result = views_of(source, out, 3, network, shard_rows=5, layout=layout)
    assert network.passes == 3 * IMAGES  # nothing twice
    np.testing.assert_array_equal(result.store.array()[:], whole.array())
    assert_views_are_their_images(result.store, source, 3)


def test_interrupted_while_views_are_added(source: Path, out: Path) -> None:
    extract(source, out, PixelNetwork())
    before, network = out.read_bytes(), PixelNetwork()
    network.fail_after = 5
    with pytest.raises(KeyboardInterrupt):
        views_of(source, out, 4, network, shard_rows=5)
    assert out.read_bytes() == before
    kept = listing(parts_folder(out))
    with pytest.raises(ConfigurationError, match="an interrupted extraction with another recipe or more views"):
        extract(source, out, PixelNetwork())
    with pytest.raises(ConfigurationError, match="or more views"):
        views_of(source, out, 2)
    assert listing(parts_folder(out)) == kept
    result = views_of(source, out, 6, network)  # and more of them
    assert network.passes == 5 * IMAGES
    assert_views_are_their_images(result.store, source, 6)
    assert not parts_folder(out).exists()


def test_shards_of_a_plain_run_serve_one_with_views(source: Path, out: Path) -> None:
    network = PixelNetwork()
    network.fail_after = 2
    with pytest.raises(KeyboardInterrupt):
        extract(source, out, network, shard_rows=5)
    assert_views_are_their_images(views_of(source, out, 3, network).store, source, 3)
    assert network.passes == 3 * IMAGES


def test_unreadable_images_cost_no_views_and_the_rest_stays_aligned(source: Path, out: Path) -> None:
    for name in ("cat/00.jpg", "dog/07.png", "cat/20.png"):
        (source / name).write_bytes(b"no image")
    network: Any = PixelNetwork()
    steps: list[tuple[str, int, int]] = []
    extraction = Extraction(
        scan(source),
        network,
        out,
        ExtractionOptions(views=3, augment=JITTER, batch_size=4, shard_rows=8, max_unreadable=0.2),
    )
    store = extraction.run(lambda *step: steps.append(step)).store
    assert store.quarantine.paths == ("cat/00.jpg", "cat/20.png", "dog/07.png")
    assert (len(store), network.passes) == (IMAGES - 3, 3 * (IMAGES - 3))
    assert_views_are_their_images(store, source, 3)
    done = [step[1:] for step in steps if step[0] == "extract"]
    assert done[-1] == (IMAGES, IMAGES)  # images, not views
    assert all(first[0] < second[0] for first, second in itertools.pairwise(done))
    with pytest.raises(TooManyUnreadableError):
        views_of(source, out, 4, network)


def test_an_image_that_changes_while_views_are_added_is_an_error(source: Path, out: Path) -> None:
    extract(source, out, PixelNetwork())
    path = source / "cat" / "02.png"
    before, other = path.stat(), bytearray(path.read_bytes())
    other[-1] ^= 1  # behind the pixels: the same picture, but not the same bytes
    path.write_bytes(other)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(
        IntegrityError, match=r"cat/02.png: pixels, view 0, was not made of the bytes.*without --trust-times"
    ):
        views_of(source, out, 2, trust_times=True)
    assert_views_are_their_images(views_of(source, out, 2).store, source, 2)


def test_a_fault_of_the_augmentation_is_not_a_fault_of_the_image(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> np.ndarray:
        raise ValueError("a slip of ours")

    monkeypatch.setattr("features.pixels.views.apply_view", broken)
    with pytest.raises(ValueError, match="a slip of ours"):
        views_of(source, out, 2)
    assert not out.exists()


@pytest.mark.slow
def test_killed_anywhere_and_run_again_gives_the_same_views(tmp_path: Path) -> None:
    count, views, shard = 200, 3, 16
    source = paint_folder(tmp_path / "images", {"cat": 90, "dog": 110})
    numpy = ["--numpy", 16]

    def command(out: Path) -> list[object]:
        drawn = ["--views", views, "--augment", "crop-rotation-jitter", "--shard-rows", shard, "--workers", 2]
        return ["extract", source, "--out", out, *drawn]

    run(tmp_path / "log", *command(tmp_path / "whole.h5"), options=numpy)
    out, log = tmp_path / "f.h5", tmp_path / "log2"
    kill_often(5, count * views, log, command(out), [*numpy, "--delay", 0.02], seed=1)
    run(log, *command(out), options=numpy)
    assert differences(tmp_path / "whole.h5", out) == []
    assert contents(out)["features/last.avg"][2] == (count, views, 16)
    assert count * views <= inferred(log) <= count * views + 5 * 2 * shard * views


# ---------------------------------------------------------------- shards, sharded stores, forecast


def test_a_sharded_store_with_views_reads_and_packs_as_the_packed_one(source: Path, out: Path, tmp_path: Path) -> None:
    sharded = views_of(source, out, 3, layout="sharded").store
    packed = views_of(source, tmp_path / "p.h5", 3).store
    assert (sharded.kind, sharded.shape("pixels")) == ("index", packed.shape("pixels"))
    rows = np.random.default_rng(0).permutation(IMAGES)
    for views in (0, 2, "all"):
        for split in ("train", None):
            np.testing.assert_array_equal(sharded.load(split, views=views)[0], packed.load(split, views=views)[0])
    np.testing.assert_array_equal(sharded.array()[rows, 1], packed.array()[rows, 1])
    views_of(source, out, 5, seed=0)
    assert_views_are_their_images(FeatureStore.open(out), source, 5)
    assert_views_are_their_images(pack_store(out, tmp_path / "aside.h5"), source, 5)
    assert_views_are_their_images(extract(source, out, PixelNetwork(), layout="packed").store, source, 5)


def test_one_shard_of_some_views_only(source: Path, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    images, drawn = scan(source), [item.augmented(JITTER, 2) for item in PixelNetwork().recipes]
    columns = (images.paths[:5], tuple(images.sizes[:5].tolist()), tuple(images.mtimes_ns[:5].tolist()))
    spec = ShardSpec(str(images.root), *columns, tuple(drawn), views=(4, 7))
    network = PixelNetwork()
    told: list[int] = []
    infer = network.engine(drawn, batch_size=3, device="cpu")
    parts = PartsFolder(tmp_path / "parts")
    parts.open()
    with ThreadPoolExecutor(2) as pool:
        record = extract_shard(
            spec,
            parts.path,
            read=lambda path: (source / path).read_bytes(),
            infer=infer,
            decoders=pool,
            batch_size=3,
            advance=told.append,
        )
    assert (record.views, network.batches, told) == ((4, 7), [3, 3, 3, 1], [1, 2, 1, 1])
    parts.commit(record)
    ((_, shard),) = parts.shards()
    for path, row in zip(shard.images.paths, shard.array("pixels")[:], strict=True):
        np.testing.assert_array_equal(row, by_hand(source / path, 8, seed=2)[[4, 7]])


def test_plan_and_forecast_count_images_and_views(source: Path, out: Path) -> None:
    def planned(views: int, *layers: str) -> tuple[Extraction, Any]:
        network: Any = PixelNetwork(*layers)
        options = ExtractionOptions(views=views, augment=JITTER, batch_size=4, workers=2)
        extraction = Extraction(scan(source), network, out, options)
        return extraction, extraction.plan()

    extraction, plan = planned(4)
    assert (plan.to_infer, plan.passes, plan.views, len(plan.specs)) == (IMAGES, 4 * IMAGES, 4, 1)
    cost = extraction.forecast(plan)
    assert cost is not None
    assert cost.disk_bytes == PixelNetwork.row_bytes * 4 * 2 * IMAGES  # shards and store
    assert cost.seconds == pytest.approx(IMAGES / cost.images_per_second)
    assert extraction.network.batches == [4, 4, 4]  # type: ignore[attr-defined]
    extract(source, out, PixelNetwork())
    _, plan = planned(4, "pixels", "top")
    assert (plan.to_infer, plan.passes) == (IMAGES, IMAGES + 3 * IMAGES)
    assert sorted(spec.views for spec in plan.specs) == [(0,), (1, 2, 3)]


def test_views_make_shards_of_fewer_images(tmp_path: Path) -> None:
    source = paint_folder(tmp_path / "images", {"a": 50, "b": 50})
    network: Any = NumpyNetwork()
    network.row_bytes = 1 << 20
    for views, spec, shards in ((1, "none", 2), (2, JITTER, 4)):  # 64 images, 32 images
        extraction = Extraction(scan(source), network, tmp_path / "f.h5", ExtractionOptions(views=views, augment=spec))
        assert len(extraction.plan().specs) == shards


# ---------------------------------------------------------------- options


def test_views_and_augmentation_are_given_together(source: Path, out: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"views: received 3, which without .* --augment with one of flip, "):
        extract_features(source, out, views=3)
    with pytest.raises(ConfigurationError, match=r"augment: received crop-flip, but with one view .* Add --views"):
        extract_features(source, out, augment="crop-flip")
    with pytest.raises(ConfigurationError, match=r"'flips', expected one of none, flip, .*did you mean 'flip'"):
        extract_features(source, out, views=2, augment="flips")
    with pytest.raises(ConfigurationError, match="views: received 0, expected 1 to 1000"):
        extract(source, out, PixelNetwork(), views=0)


COMMAND = """
import sys
from helpers import NumpyNetwork
from features.networks import network as networks
networks.resolve_network = lambda *_, **__: NumpyNetwork()
from pipeline.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_command_line_makes_and_shows_views(tmp_path: Path) -> None:
    source, out = paint_folder(tmp_path / "images", {"cat": 10, "dog": 10}), tmp_path / "f.h5"

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "", "HOME": str(tmp_path)}
        line = [sys.executable, "-c", COMMAND, "extract", str(source), "--out", str(out), *map(str, arguments)]
        return subprocess.run(line, env=paths, capture_output=True, text=True, check=False)

    drawn = ("--views", 3, "--augment", "crop-rotation-jitter", "--seed", 4)
    planned = json.loads(command(*drawn, "--dry-run", "--json").stdout)
    assert (planned["to_infer"], planned["passes"], planned["views"]) == (20, 60, 3)
    assert "20 to infer (60 of their views)" in command(*drawn, "--dry-run").stdout
    assert not out.exists()
    made = command(*drawn)
    assert made.returncode == 0, made.stderr
    assert re.search(
        r"20x3x3 +float32 +numpy +8x8 +3, crop-rotation-jitter seed 4 +[0-9a-f]{10}$", made.stdout, re.MULTILINE
    )
    assert "60 views inferred (20 new)" in made.stdout
    again = command("--seed", 4)  # of the splits too
    assert "nothing to do: 20 rows cached, 0 inferred" in again.stdout
    shown = call_pipeline("inspect", out, "--json")
    entry = json.loads(shown.stdout)["data_sets"]["last.avg"]
    assert (entry["views"], entry["augment"], entry["shape"]) == (3, "crop-rotation-jitter", [20, 3, 3])
    refused = command("--views", 2)
    assert (refused.returncode, refused.stderr.count("--augment")) == (2, 1)


@pytest.mark.slow
def test_a_real_network_makes_views_and_checks_its_precision_on_view_0(tmp_path: Path) -> None:
    source, out = paint_folder(tmp_path / "images", {"cat": 12, "dog": 12}), tmp_path / "f.h5"
    small = ("--backbone", "mobilenetv2-0.35", "--weights", "random", "--image-size", "32", "--engine", "keras")
    drawn = ("--views", 3, "--augment", "crop-rotation-jitter", "--dtype", "float16", "--check-precision", 8)
    result = call_pipeline("extract", source, "--out", out, *small, *drawn, "--json")
    assert result.returncode == 0, result.stderr
    store = FeatureStore.open(out)
    assert store.shape("out_relu.avg") == (24, 3, 1280)
    assert '"images": 8' in json.dumps(store.provenance["precision_check"])
    X = np.asarray(store.array(), dtype=np.float64)
    assert (np.abs(X[:, 1:] - X[:, :1]).max(axis=2) > 0).all()


def test_an_index_takes_nothing_but_view_0_from_a_shard_drawn_in_another_way(tmp_path: Path) -> None:
    out, zeros = tmp_path / "f.h5", np.zeros(2, np.int64)
    none = Quarantine((), np.zeros((0, 32), np.uint8), (), zeros[:0], zeros[:0])
    table: dict[str, Any] = {"paths": ("a/1", "a/2"), "sha256": np.zeros((2, 32), np.uint8), "groups": None}
    table |= dict.fromkeys(("widths", "heights", "sizes", "mtimes_ns"), zeros)
    parts_folder(out).mkdir()

    def written(held: Any, views: int) -> FeatureStore:
        shard = shard_path(parts_folder(out), "0" * 20)
        for path in (shard, out):
            path.unlink(missing_ok=True)
        writer = StoreWriter(shard, kind="shard", rows=2, features={"last.avg": FeatureSpec(recipe(), 1, (3,))})
        writer.append("last.avg", np.ones((2, 1, 3), np.float32))
        undecided = ImageTable(**table, labels=zeros - 1, splits=zeros.astype(np.int8) - 1)
        writer.finish(images=undecided, quarantine=none, provenance={"views": held})
        digest = np.frombuffer(FeatureStore.open_shard(shard).digest, np.uint8)[None]
        drawn = FeatureSpec(recipe().augmented(JITTER, 1), views, (3,))
        writer = StoreWriter(out, kind="index", rows=2, features={"last.avg": drawn})
        writer.append("last.avg", np.tile(np.array([[[0, 0, 0]], [[0, 1, 0]]], np.int32), (1, views, 1)))
        images = ImageTable(**table, labels=zeros, splits=zeros.astype(np.int8))
        writer.finish(images=images, quarantine=none, classes=("a",), shards=ShardTable(("0" * 20,), digest))
        return FeatureStore.open(out)

    np.testing.assert_array_equal(written([0], 1).load()[0], np.ones((2, 3)))
    written([0], 1).verify()
    for held, views in (([0], 2), ([1], 1), ([], 1), (None, 1), ({"0": 0}, 1)):
        for check in (FeatureStore.load, FeatureStore.verify):
            with pytest.raises(IntegrityError, match=r"does not hold the feature set last\.avg"):
                check(written(held, views))
