"""Stage one end to end with a network of numpy: every row has the features, the label and the path of its own image."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    ROOT,
    NumpyNetwork,
    as_engine,
    assert_rows_are_their_images,
    expected_features,
    extract,
    listing,
    paint,
    paint_folder,
    recipe,
)
from PIL import Image

from features.errors import ConfigurationError, ExtractionError, LockedError, SourceError, TooManyUnreadableError
from features.extraction import extraction
from features.extraction.extraction import Extraction, ExtractionResult, prepare
from features.extraction.journal import PartsFolder
from features.extraction.options import ExtractionOptions
from features.extraction.shard import rows_per_shard
from features.files import locked
from features.machine import peak_memory
from features.progress import counted
from features.sources.scan import scan
from features.sources.splits import SPLITS
from features.store.reader import FeatureStore, parts_folder
from pipeline.heads.records import describe_features
from pipeline.stages.extract import describe, origin, summary


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return paint_folder(tmp_path / "images", {"cat": 13, "dog": 20})


@pytest.mark.slow
@pytest.mark.pain(1)
@pytest.mark.parametrize("workers", [1, 7])
def test_pain_01_features_and_labels_stay_in_one_order(tmp_path: Path, workers: int) -> None:
    source = paint_folder(tmp_path / "images", {"b": 40, "a": 31, "c": 9})
    store = extract(source, tmp_path / "f.h5", workers=workers, batch_size=3, shard_rows=21).store
    assert store.classes == ("a", "b", "c")
    assert list(store.images.paths) == sorted(store.images.paths)
    assert_rows_are_their_images(store, source)
    for split in SPLITS[:3]:
        X, y = store.load(split)
        rows = store.rows(split)
        np.testing.assert_array_equal(y, store.images.labels[rows])
        np.testing.assert_allclose(X, expected_features(source, [store.images.paths[row] for row in rows]), rtol=1e-6)


@pytest.mark.slow
def test_a_later_extraction_without_a_split_rule_keeps_that_of_the_store(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def again(**options: Any) -> FeatureStore:
        asked = ExtractionOptions(batch_size=4, workers=2, **options)
        return Extraction(scan(source), NumpyNetwork(), tmp_path / "f.h5", asked).run().store

    first = again(split="stratified:0.6,0.2,0.2", seed=3)
    paint(source / "cat" / "new.png", (1, 2, 3))
    kept = again()
    assert (len(kept), kept.split_rule) == (34, "stratified:0.6,0.2,0.2@3")
    assert again().split_rule == first.split_rule == kept.split_rule
    assert again(seed=5).split_rule == "stratified:0.6,0.2,0.2@5"
    caplog.clear()
    before = again()
    assert "the split rule" not in caplog.text
    after = again(split="hash")
    changed = int((before.images.splits != after.images.splits).sum())
    assert after.split_rule == "hash"
    assert changed > 0
    assert (
        f"f.h5: the split rule changes from stratified:0.6,0.2,0.2@5 to hash, and the split of {counted(changed, 'image')} with it; "
        "--split stratified:0.6,0.2,0.2@5 keeps them"
    ) in caplog.text


@pytest.mark.slow
def test_the_remedy_for_a_class_without_images_in_a_split_gives_it_some(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = paint_folder(tmp_path / "images", {"cat": 4, "dog": 60})
    hashed = extract(source, tmp_path / "f.h5").store
    assert len({*hashed.images.splits[hashed.images.labels == 0].tolist()}) < 3
    assert "'cat'. --split stratified:0.6,0.2,0.2 gives each split some of every class that has 4 images" in caplog.text
    caplog.clear()
    even = extract(source, tmp_path / "g.h5", split="stratified:0.6,0.2,0.2").store
    assert np.bincount(even.images.splits[even.images.labels == 0]).tolist() == [2, 1, 1]
    assert "without images" not in caplog.text


@pytest.mark.slow
def test_a_store_says_where_its_images_came_from(source: Path, tmp_path: Path) -> None:
    (source / "dog" / "broken.png").write_bytes(b"hello\n")
    result = extract(source, tmp_path / "f.h5", max_unreadable=0.5)
    document = {**describe(result.store), "inferred": result.inferred, "written": True, **result.counts}
    assert document["data_digest"] == result.store.data_digest
    assert origin(document) == f"  images: {source}; --data-set {result.store.data_digest[:10]}"
    text = summary({"hashed": 0, "cached": 0, "moved": 0, "changed": 0, "removed": 0, **document})
    assert text.startswith(f"{tmp_path}/f.h5: 33 rows, 2 classes (cat, dog), train ")
    assert "  33 inferred (34 new, unreadable ones included)" in text.splitlines()


@pytest.mark.slow
@pytest.mark.pain(2)
@pytest.mark.parametrize("batch_size", [1, 4, 7, 32, 33, 64])
def test_pain_02_no_row_is_lost_or_repeated_at_any_batch_size(source: Path, tmp_path: Path, batch_size: int) -> None:
    network = NumpyNetwork()
    store = extract(source, tmp_path / "f.h5", network, batch_size=batch_size, shard_rows=max(8, batch_size)).store
    assert len(store) == 33 == len(set(store.images.paths))
    assert sum(network.batches) == 33
    assert_rows_are_their_images(store, source)


@pytest.mark.slow
def test_nothing_is_left_beside_the_store(source: Path, tmp_path: Path) -> None:
    extract(source, tmp_path / "out" / "f.h5")
    assert listing(tmp_path / "out") == ["f.h5"]


@pytest.mark.slow
def test_a_second_run_infers_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    extract(source, tmp_path / "f.h5")
    before = (tmp_path / "f.h5").stat()
    network = NumpyNetwork()
    result = extract(source, tmp_path / "f.h5", network)
    assert (network.batches, result.inferred, result.written) == ([], 0, False)
    after = (tmp_path / "f.h5").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert result.counts["cached"] == 33


@pytest.mark.slow
def test_added_images_alone_are_inferred_and_removed_ones_leave(source: Path, tmp_path: Path) -> None:
    extract(source, tmp_path / "f.h5")
    paint_folder(source, {"bird": 2}, start=900)
    (source / "dog" / "0003.png").unlink()
    network = NumpyNetwork()
    result = extract(source, tmp_path / "f.h5", network)
    assert sum(network.batches) == 2
    assert (result.counts["new"], result.counts["removed"], result.counts["cached"]) == (2, 1, 32)
    assert len(result.store) == 34
    assert_rows_are_their_images(result.store, source)


@pytest.mark.slow
def test_a_renamed_class_folder_costs_no_inference(source: Path, tmp_path: Path) -> None:
    extract(source, tmp_path / "f.h5")
    (source / "cat").rename(source / "zebra")
    network = NumpyNetwork()
    result = extract(source, tmp_path / "f.h5", network)
    assert (network.batches, result.counts["moved"], result.written) == ([], 13, True)
    assert result.store.classes == ("dog", "zebra")
    assert_rows_are_their_images(result.store, source)


@pytest.mark.slow
@pytest.mark.pain(11)
def test_pain_11_a_changed_image_is_computed_again_and_a_changed_setting_is_refused(
    source: Path, tmp_path: Path
) -> None:
    extract(source, tmp_path / "f.h5")
    paint(source / "cat" / "0000.png", (250, 1, 2), size=(9, 9))
    network = NumpyNetwork()
    result = extract(source, tmp_path / "f.h5", network)
    assert (sum(network.batches), result.counts["changed"]) == (1, 1)
    assert_rows_are_their_images(result.store, source)
    before = (tmp_path / "f.h5").read_bytes()
    other = NumpyNetwork([recipe(size=16, seed=1)])
    with pytest.raises(ConfigurationError, match=r"another recipe \(.*height: 8 -> 16.*seed: 0 -> 1.*--overwrite"):
        extract(source, tmp_path / "f.h5", other)
    assert (tmp_path / "f.h5").read_bytes() == before
    result = extract(source, tmp_path / "f.h5", other, overwrite=True)
    np.testing.assert_allclose(
        result.store.array()[:, 0], 2 * expected_features(source, result.store.images.paths), rtol=1e-6
    )


@pytest.mark.slow
def test_an_added_layer_computes_only_that_layer_and_keeps_the_other(source: Path, tmp_path: Path) -> None:
    extract(source, tmp_path / "f.h5")
    before = np.array(FeatureStore.open(tmp_path / "f.h5").array("last.avg"))
    network = NumpyNetwork([recipe("corner", "none")])
    result = extract(source, tmp_path / "f.h5", network)
    assert (sum(network.batches), result.counts["cached"]) == (33, 33)
    assert result.store.names == ("corner", "last.avg")
    np.testing.assert_array_equal(result.store.array("last.avg"), before)
    # and a new image then gets both
    paint_folder(source, {"cat2": 1}, start=700)
    both = extract(source, tmp_path / "f.h5", NumpyNetwork()).store
    assert both.names == ("corner", "last.avg")
    np.testing.assert_allclose(both.array("corner"), both.array("last.avg"), rtol=1e-6)  # one colour: the same


@pytest.mark.slow
def test_other_images_do_not_replace_a_store_by_accident(source: Path, tmp_path: Path) -> None:
    extract(source, tmp_path / "f.h5")
    other = paint_folder(tmp_path / "other", {"x": 3, "y": 3}, start=500)
    before = (tmp_path / "f.h5").read_bytes()
    with pytest.raises(ConfigurationError, match=r"only 0 of them are in .*other.*another --out"):
        extract(other, tmp_path / "f.h5")
    assert (tmp_path / "f.h5").read_bytes() == before
    assert len(extract(other, tmp_path / "f.h5", overwrite=True).store) == 6


@pytest.mark.slow
@pytest.mark.pain(10)
def test_pain_10_unreadable_images_are_named_and_the_rows_stay_aligned(source: Path, tmp_path: Path) -> None:
    (source / "cat" / "0005.png").write_bytes(b"no image")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(source / "dog" / "0000.png")
    (source / "dog" / "0000.png").write_bytes((source / "dog" / "0000.png").read_bytes()[:5000])
    (source / "dog" / "empty.png").touch()
    store = extract(source, tmp_path / "f.h5", max_unreadable=0.2).store
    assert store.quarantine.paths == ("cat/0005.png", "dog/0000.png", "dog/empty.png")
    assert store.quarantine.reasons == ("not-an-image", "truncated", "empty")
    assert len(store) == 31
    assert_rows_are_their_images(store, source)
    network = NumpyNetwork()
    assert extract(source, tmp_path / "f.h5", network, max_unreadable=0.2).written is False
    paint(source / "cat" / "0005.png", (3, 200, 9))
    repaired = extract(source, tmp_path / "f.h5", network, max_unreadable=0.2).store
    assert (sum(network.batches), len(repaired), len(repaired.quarantine)) == (1, 32, 2)
    assert_rows_are_their_images(repaired, source)


@pytest.mark.slow
def test_too_many_unreadable_images_still_keep_the_good_rows(source: Path, tmp_path: Path) -> None:
    for index in range(5):
        (source / "dog" / f"{index:04d}.png").write_bytes(b"?")
    with pytest.raises(
        TooManyUnreadableError, match=r"5 of 33 images are unreadable \(5 not-an-image\).*the 28 good rows are in"
    ) as caught:
        extract(source, tmp_path / "f.h5")
    assert caught.value.exit_code == 4
    store = FeatureStore.open(tmp_path / "f.h5")
    assert len(store) == 28
    assert_rows_are_their_images(store, source)


def test_no_readable_image_writes_nothing(tmp_path: Path) -> None:
    source = tmp_path / "images"
    for name in ("a/1.png", "b/1.png"):
        paint(source / name, (1, 2, 3))
        (source / name).write_bytes(b"x")
    with pytest.raises(SourceError, match="none of 2 images could be read"):
        extract(source, tmp_path / "out" / "f.h5")
    assert not (tmp_path / "out" / "f.h5").exists()


@pytest.mark.slow
def test_ctrl_c_while_a_shard_is_entered_loses_none(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(NumpyNetwork):
        def engine(self, recipes, **options):
            inner = super().engine(recipes, **options)
            return as_engine(lambda batch: time.sleep(0.1) or inner(batch))

    network, out, commit = Slow(), tmp_path / "f.h5", PartsFolder.commit

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PartsFolder, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(source, out, network, shard_rows=8)
    assert not [name for name in listing(parts_folder(out)) if name.endswith(".tmp")]
    before = sum(network.batches)
    assert before in (8, 16, 24)  # whole shards: the one to be entered, and those in flight
    monkeypatch.setattr(PartsFolder, "commit", commit)
    assert_rows_are_their_images(extract(source, out, network, shard_rows=8).store, source)
    assert sum(network.batches) == 33  # nothing twice


@pytest.mark.slow
@pytest.mark.pain(8)
def test_pain_08_an_interrupted_run_goes_on_where_it_was(source: Path, tmp_path: Path) -> None:
    whole = extract(source, tmp_path / "whole.h5").store
    network = NumpyNetwork()
    network.fail_after = 3
    with pytest.raises(KeyboardInterrupt):
        extract(source, tmp_path / "f.h5", network, shard_rows=8)
    assert not (tmp_path / "f.h5").exists()
    kept = [name for name in listing(tmp_path / "f.h5.parts") if name.endswith(".h5")]
    assert 1 <= len(kept) < 5
    result = extract(source, tmp_path / "f.h5", network, shard_rows=8)
    assert sum(network.batches) == 33  # nothing twice
    np.testing.assert_array_equal(result.store.array(), whole.array())
    assert result.store.images.paths == whole.images.paths
    assert not (tmp_path / "f.h5.parts").exists()


@pytest.mark.slow
@pytest.mark.pain(9)
def test_pain_09_damaged_leftovers_are_not_accepted(source: Path, tmp_path: Path) -> None:
    network = NumpyNetwork()
    network.fail_after = 3
    with pytest.raises(KeyboardInterrupt):
        extract(source, tmp_path / "f.h5", network, shard_rows=8)
    parts = tmp_path / "f.h5.parts"
    shards = sorted(parts.glob("*.h5"))
    data = bytearray(shards[0].read_bytes())
    data[len(data) // 2] ^= 1
    shards[0].write_bytes(data)
    (parts / ".half.h5.1234.tmp").write_bytes(b"half")
    with open(parts / "manifest.jsonl", "ab") as journal:
        journal.write(b'{"identity": "torn')
    result = extract(source, tmp_path / "f.h5", network, shard_rows=8)
    assert sum(network.batches) == 33 + 8  # the damaged shard again
    assert_rows_are_their_images(result.store, source)


@pytest.mark.slow
def test_a_shard_renamed_but_not_entered_is_found_again(source: Path, tmp_path: Path) -> None:
    network = NumpyNetwork()
    network.fail_after = 3
    with pytest.raises(KeyboardInterrupt):
        extract(source, tmp_path / "f.h5", network, shard_rows=8)
    (tmp_path / "f.h5.parts" / "manifest.jsonl").unlink()
    result = extract(source, tmp_path / "f.h5", network, shard_rows=8)
    assert sum(network.batches) == 33
    assert_rows_are_their_images(result.store, source)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["function", ""])
def test_a_run_that_was_killed_in_its_assembly_gives_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """The next run computes nothing, and names the engine by the journal; by itself if the kill was before its last line."""
    whole = tmp_path / "whole.h5"
    assert extract(source, whole, shard_rows=8).store.provenance["engine"] == "function"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(extraction, "assemble", interrupt)
        extract(source, tmp_path / "f.h5", shard_rows=8)
    journal = tmp_path / "f.h5.parts" / "manifest.jsonl"
    lines = journal.read_text().splitlines()
    assert [json.loads(line).pop("engine") for line in lines] == ["function"] * 5
    if not engine:
        journal.unlink()
    result = extract(source, tmp_path / "f.h5", shard_rows=8)
    assert (result.inferred, result.written) == (0, True)
    assert (tmp_path / "f.h5").read_bytes() == whole.read_bytes()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_second_writer_is_refused_with_the_holder(source: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "f.h5"), pytest.raises(LockedError, match=f"process {os.getpid()} on "):
        extract(source, tmp_path / "f.h5")
    extract(source, tmp_path / "f.h5")
    assert listing(tmp_path) == sorted([*(f"images/{name}" for name in listing(source)), "f.h5", "images"])


def test_given_splits_are_kept(tmp_path: Path) -> None:
    source = tmp_path / "images"
    paint_folder(source / "train", {"a": 4, "b": 4})
    paint_folder(source / "validation", {"a": 2, "b": 3}, start=50)
    store = extract(source, tmp_path / "f.h5").store
    for path, code in zip(store.images.paths, store.images.splits, strict=True):
        assert path.split("/")[0] == SPLITS[code]
    assert_rows_are_their_images(store, source)


def test_float16_that_is_not_finite_names_the_layer(source: Path, tmp_path: Path) -> None:
    class Loud(NumpyNetwork):
        def engine(self, recipes, **options):
            inner = super().engine(recipes, **options)
            return as_engine(lambda batch: {name: values + 70000 for name, values in inner(batch).items()})

    with pytest.raises(ExtractionError, match=r"layer last: a feature is not finite as float16 \(largest magnitude 7"):
        extract(source, tmp_path / "f.h5", Loud([recipe(dtype="float16")]))


def test_rows_per_shard_holds_whole_batches() -> None:
    assert rows_per_shard(1280 * 4, 32) == 2048
    assert rows_per_shard(100_352, 32) == 640
    assert rows_per_shard(1 << 30, 7) == 28


def test_unwritable_folder_is_said_before_any_work(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    network = NumpyNetwork()
    with pytest.raises(Exception, match="cannot write there") as caught:
        extract(source, tmp_path / "file" / "f.h5", network)
    assert caught.value.exit_code == 1
    assert network.batches == []


@pytest.mark.slow
def test_moving_the_whole_source_costs_no_inference(source: Path, tmp_path: Path) -> None:
    extract(source, tmp_path / "f.h5")
    shutil.move(source, tmp_path / "moved")
    network = NumpyNetwork()
    result = extract(tmp_path / "moved", tmp_path / "f.h5", network)
    assert network.batches == []
    assert_rows_are_their_images(result.store, tmp_path / "moved")


@pytest.mark.slow
def test_rehash_sees_a_change_that_size_and_time_hide(source: Path, tmp_path: Path) -> None:
    extract(source, tmp_path / "f.h5")
    path = source / "cat" / "0000.png"
    status, before = path.stat(), path.read_bytes()
    other = (source / "dog" / "0000.png").read_bytes()
    assert len(other) == len(before)  # one colour each: the same size
    path.write_bytes(other)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert extract(source, tmp_path / "f.h5", trust_times=True).written is False
    network = NumpyNetwork()
    result = extract(source, tmp_path / "f.h5", network, rehash=True)
    assert (network.batches, result.counts["moved"], result.counts["cached"]) == ([], 1, 32)
    assert_rows_are_their_images(result.store, source)
    assert extract(source, tmp_path / "f.h5", network, rehash=True).written is False


def test_the_same_bytes_in_two_splits_are_named_and_refused_with_strict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "images"
    paint_folder(source / "train", {"a": 4, "b": 4})
    paint_folder(source / "test", {"a": 3, "b": 3}, start=50)
    shutil.copy(source / "train" / "a" / "0001.png", source / "test" / "a" / "copy.png")
    with pytest.raises(SourceError, match=r"1 image is in two splits .*: test/a/copy.png = train/a/0001.png.*--strict"):
        extract(source, tmp_path / "f.h5", strict=True)
    assert not (tmp_path / "f.h5").exists()
    store = extract(source, tmp_path / "f.h5").store
    assert "test/a/copy.png = train/a/0001.png" in caplog.text
    assert len(store) == 15


@pytest.mark.slow
def test_peak_of_memory_is_not_that_of_who_started_the_process() -> None:
    held = np.ones(210 << 20, np.uint8)
    here = peak_memory()
    command = [sys.executable, "-c", "from features.machine import peak_memory; print(peak_memory())"]
    there = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert here > held.nbytes
    assert 5 << 20 < there < 200 << 20


@pytest.mark.slow
def test_forecast_multiplies_what_it_measured(source: Path, tmp_path: Path) -> None:
    network = NumpyNetwork()
    options = ExtractionOptions(batch_size=4, shard_rows=8, workers=2)
    extraction = Extraction(scan(source), network, tmp_path / "f.h5", options)  # type: ignore[arg-type]
    plan = extraction.plan()
    cost = extraction.forecast(plan)
    assert cost is not None
    assert cost.disk_bytes == 12 * (33 + 33)  # three float32 a row, as shards and in the store
    assert cost.seconds == pytest.approx(33 / cost.images_per_second)
    assert sum(network.batches) == 4 + 4  # a batch to compile, the rest of the first shard to measure
    assert cost.memory_bytes > 1 << 20
    assert listing(tmp_path) == sorted([*(f"images/{name}" for name in listing(source)), "images"])
    extract(source, tmp_path / "f.h5")
    assert extraction.forecast(extraction.plan()) is None


@pytest.mark.slow
def test_images_that_are_away_for_a_while_cost_nothing(source: Path, tmp_path: Path) -> None:
    manifest = source / "list.csv"
    lines = [f"{path.relative_to(source)},{path.parent.name}" for path in sorted(source.rglob("*.png"))]
    manifest.write_text("\n".join(["path,label", *lines]))
    extract(manifest, tmp_path / "f.h5")
    before = (tmp_path / "f.h5").read_bytes()
    (source / "cat").rename(source / "away")
    with pytest.raises(TooManyUnreadableError, match=r"13 of 33 images are unreadable \(13 missing\).*was not changed"):
        extract(manifest, tmp_path / "f.h5")
    assert (tmp_path / "f.h5").read_bytes() == before
    (source / "away").rename(source / "cat")
    network = NumpyNetwork()
    assert extract(manifest, tmp_path / "f.h5", network).written is False
    assert network.batches == []
    # one folder too deep: most rows would leave
    with pytest.raises(ConfigurationError, match=r"only 13 of them are in .*add --overwrite\."):
        extract(source / "cat", tmp_path / "f.h5")
    # fewer would leave, but all would lose their labels
    with pytest.raises(
        ConfigurationError, match=r"holds 33 images of 2 classes of .*20 of them would stay, without labels"
    ):
        extract(source / "dog", tmp_path / "f.h5")
    assert (tmp_path / "f.h5").read_bytes() == before


@pytest.mark.slow
def test_a_passing_fault_is_tried_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from features.errors import UnreadableImageError
    from features.sources.imageset import ImageSet

    read = ImageSet.read_path

    def faulty(self: ImageSet, path: str) -> bytes:
        if path == self.paths[5]:
            raise UnreadableImageError("no-permission", "for now")
        return read(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(ImageSet, "read_path", faulty)
        store = extract(source, tmp_path / "f.h5").store
    assert store.quarantine.reasons == ("no-permission",)
    network = NumpyNetwork()
    store = extract(source, tmp_path / "f.h5", network).store
    assert (len(store), len(store.quarantine), sum(network.batches)) == (33, 0, 1)
    assert_rows_are_their_images(store, source)


@pytest.mark.slow
def test_size_and_time_speak_only_in_the_folder_where_they_were_noted(tmp_path: Path) -> None:
    first = paint_folder(tmp_path / "first", {"a": 3, "b": 3})
    second = paint_folder(tmp_path / "second", {"a": 3, "b": 3}, start=100)
    for path in [*first.rglob("*.png"), *second.rglob("*.png")]:
        os.utime(path, ns=(0, 10**18))
    extract(first, tmp_path / "f.h5")
    with pytest.raises(ConfigurationError, match="only 0 of them are in"):
        extract(second, tmp_path / "f.h5")
    store = extract(second, tmp_path / "f.h5", overwrite=True).store
    assert_rows_are_their_images(store, second)


@pytest.mark.slow
def test_shards_of_another_recipe_are_not_dropped_silently(source: Path, tmp_path: Path) -> None:
    network = NumpyNetwork()
    network.fail_after = 3
    with pytest.raises(KeyboardInterrupt):
        extract(source, tmp_path / "f.h5", network, shard_rows=8)
    kept = listing(tmp_path / "f.h5.parts")
    other = NumpyNetwork([recipe(size=16)])
    with pytest.raises(ConfigurationError, match="an interrupted extraction with another recipe"):
        extract(source, tmp_path / "f.h5", other)
    assert listing(tmp_path / "f.h5.parts") == kept
    store = extract(source, tmp_path / "f.h5", other, overwrite=True).store
    assert store.recipes["last.avg"].pixels.height == 16
    assert not (tmp_path / "f.h5.parts").exists()


@pytest.mark.slow
def test_a_damaged_store_can_be_overwritten_and_leftovers_are_swept(source: Path, tmp_path: Path) -> None:
    store = extract(source, tmp_path / "f.h5").store
    place = store.array().offset + 10  # type: ignore[attr-defined]
    data = bytearray((tmp_path / "f.h5").read_bytes())
    data[place] ^= 1
    (tmp_path / "f.h5").write_bytes(data)
    (tmp_path / ".f.h5.0badcafe.tmp").write_bytes(b"left by a process that was killed")
    network = NumpyNetwork()
    result = extract(source, tmp_path / "f.h5", network, overwrite=True)
    assert sum(network.batches) == 33
    assert_rows_are_their_images(result.store, source)
    assert not list(tmp_path.glob(".f.h5*"))
    (tmp_path / "f.h5").write_bytes(b"not a store at all")
    assert len(extract(source, tmp_path / "f.h5", overwrite=True).store) == 33


@pytest.mark.slow
def test_files_of_others_in_the_parts_folder_are_left(source: Path, tmp_path: Path) -> None:
    (tmp_path / "f.h5.parts").mkdir()
    (tmp_path / "f.h5.parts" / "notes.txt").write_text("mine")
    assert len(extract(source, tmp_path / "f.h5").store) == 33
    assert listing(tmp_path / "f.h5.parts") == ["notes.txt"]


def test_a_limit_takes_in_turn_from_classes_and_splits(tmp_path: Path) -> None:
    source = tmp_path / "images"
    for split, count in (("train", 6), ("test", 3)):
        paint_folder(source / split, {"cat": 2 * count, "dog": count}, start=100 * count)
    images = scan(source)
    some = images.some(images.evenly(10))
    assert some.paths == (
        *("test/cat/0000.png", "test/cat/0001.png", "test/cat/0002.png"),
        *("test/dog/0000.png", "test/dog/0001.png", "test/dog/0002.png"),
        *("train/cat/0000.png", "train/cat/0001.png", "train/dog/0000.png", "train/dog/0001.png"),
    )
    assert (some.classes, some.labels.tolist()) == (("cat", "dog"), [0, 0, 0, 1, 1, 1, 0, 0, 1, 1])
    assert [some.read(row) for row in range(10)] == [(source / path).read_bytes() for path in some.paths]


@pytest.mark.slow
def test_an_extraction_with_a_limit_grows_into_the_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network, out = NumpyNetwork(), tmp_path / "f.h5"
    monkeypatch.setattr("features.networks.network.resolve_network", lambda options: network)

    def run(limit: int | None) -> FeatureStore:
        return prepare(source, out, ExtractionOptions(limit=limit)).run().store

    trial = run(10)
    assert len(trial) == 10
    assert (trial.provenance["limit"], describe_features(trial, "last.avg")["limit"]) == (10, 10)
    assert "images: 10 of 33 images, as --limit asks" in caplog.text
    assert_rows_are_their_images(run(None), source)
    assert sum(network.batches) == 33
    assert "limit" not in describe_features(FeatureStore.open(out), "last.avg")
    with pytest.raises(ConfigurationError, match="holds 3 images that --limit 30 leaves out"):
        run(30)
    caplog.clear()
    assert len(run(99)) == 33
    assert "limit" not in caplog.text


@pytest.mark.slow
def test_a_limit_is_blamed_for_what_it_leaves_out_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, out = NumpyNetwork(), tmp_path / "f.h5"
    monkeypatch.setattr("features.networks.network.resolve_network", lambda options: network)

    def run(limit: int | None) -> ExtractionResult:
        return prepare(source, out, ExtractionOptions(limit=limit)).run()

    first = run(None).store
    for path in first.images.paths[:3]:
        (source / path).unlink()
    with pytest.raises(ConfigurationError, match="holds 10 images that --limit 20 leaves out"):  # and 3 that are gone
        run(20)
    result = run(30)  # all that are left
    assert (result.counts["removed"], len(result.store)) == (3, 30)
    assert "limit" not in result.store.provenance
    assert run(None).written is False

    trial = tmp_path / "trial.h5"
    out = trial
    assert run(12).store.provenance["limit"] == 12
    for path in set(first.images.paths[3:]) - set(FeatureStore.open(trial).images.paths):
        (source / path).unlink()
    result = run(None)  # the same 12 images, which are now all
    assert (result.written, "limit" in result.store.provenance) == (True, False)
    shutil.rmtree(source)
    paint_folder(source, {"fox": 4, "owl": 4})
    with pytest.raises(
        ConfigurationError, match=r"only 1 of them are in .*, of which --limit takes 3 images. If images"
    ):
        run(3)
