"""The store: what goes in comes out, a file is whole or absent, and nothing that was changed is handed out."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import listing, recipe

from features.errors import ConfigurationError, FormatVersionError, IntegrityError, StoreError
from features.files import atomic_file
from features.store.reader import FeatureStore
from features.store.schema import FeatureSpec, ImageTable, Quarantine
from features.store.writer import StoreWriter

ROWS = 500
NAMES = ("last.avg", "spatial")


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "last.avg": generator.normal(size=(ROWS, 1, 700)).astype(np.float32),
        "spatial": generator.normal(size=(ROWS, 1, 2, 3, 4)).astype(np.float16),
    }


def table() -> ImageTable:
    generator = np.random.default_rng(1)
    return ImageTable(
        paths=tuple(
            f"class/ü{index}.png" if index else b"\xff.png".decode("utf-8", "surrogateescape") for index in range(ROWS)
        ),
        sha256=generator.integers(0, 256, (ROWS, 32)).astype(np.uint8),
        labels=generator.integers(0, 2, ROWS).astype(np.int32),
        splits=np.repeat([0, 1, 2, 0, 1], ROWS // 5).astype(np.int8),
        groups=None,
        widths=np.full(ROWS, 30, np.int32),
        heights=np.full(ROWS, 20, np.int32),
        sizes=np.arange(ROWS, dtype=np.int64),
        mtimes_ns=np.arange(ROWS, dtype=np.int64) + (1 << 60),
        columns={"camera": ("left", "") * (ROWS // 2), "tägs/x": tuple(map(str, range(ROWS)))},
    )


QUARANTINE = Quarantine(("bad.png",), np.zeros((1, 32), np.uint8), ("truncated",), np.array([3]), np.array([4]))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "features.h5")


def write(path: Path) -> Path:
    data = arrays()
    specs = {
        "last.avg": FeatureSpec(recipe(), 1, (700,)),
        "spatial": FeatureSpec(recipe("spatial", "none", dtype="float16"), 1, (2, 3, 4)),
    }
    with atomic_file(path) as temporary:
        writer = StoreWriter(temporary, kind="store", rows=ROWS, features=specs)
        for name, values in data.items():
            for start in range(0, ROWS, 77):  # blocks that do not fit the checksum blocks
                writer.append(name, values[start : start + 77])
        writer.finish(images=table(), quarantine=QUARANTINE, classes=("cat", "dög"), source="here", split_rule="hash")
    return path


def test_what_goes_in_comes_out(path: Path) -> None:
    store, data, expected = FeatureStore.open(path), arrays(), table()
    assert store.names == NAMES
    assert len(store) == ROWS
    shapes = [f"{name} {'x'.join(map(str, data[name].shape))}" for name in NAMES]
    assert FeatureStore(str(path)).digest == store.digest
    assert repr(store) == f"<FeatureStore {str(path)!r}: {ROWS} images; {', '.join(shapes)}>"
    assert store.classes == ("cat", "dög")
    assert (store.source, store.split_rule) == ("here", "hash")
    assert store.images.paths == expected.paths
    assert store.images.groups is None
    assert store.images.columns == expected.columns
    for name in ("sha256", "labels", "splits", "widths", "heights", "sizes", "mtimes_ns"):
        np.testing.assert_array_equal(getattr(store.images, name), getattr(expected, name))
    assert (store.quarantine.paths, store.quarantine.reasons) == (("bad.png",), ("truncated",))
    for name in NAMES:
        np.testing.assert_array_equal(store.array(name), data[name])
        assert store.array(name).dtype == data[name].dtype
    # blocks: two of 374 rows, one of all rows, and one for each of the 22 columns and lists of strings
    assert store.verify() == 2 + 1 + 22


def test_load_selects_rows_with_their_own_labels(path: Path) -> None:
    store, data, expected = FeatureStore.open(path), arrays(), table()
    for split, code in (("train", 0), ("validation", 1), ("test", 2)):
        chosen = expected.splits == code
        X, y = store.load(split, name="spatial")
        np.testing.assert_array_equal(X, data["spatial"][chosen, 0])
        np.testing.assert_array_equal(y, expected.labels[chosen])
    X, y = store.load(name="last.avg", views="all")
    np.testing.assert_array_equal(X, data["last.avg"])
    assert isinstance(store.load("test", name="last.avg")[0], np.memmap)  # one run of rows: no copy


def test_wrong_questions_get_the_names(path: Path) -> None:
    store = FeatureStore.open(path)
    with pytest.raises(ConfigurationError, match=r"holds 2 feature sets: name one of last.avg, spatial"):
        store.load("train")
    with pytest.raises(ConfigurationError, match="did you mean 'spatial'"):
        store.load("train", name="spatials")
    with pytest.raises(ConfigurationError, match="did you mean 'validation'"):
        store.rows("validate")
    with pytest.raises(ConfigurationError, match=r"received 'all', expected one of train, .*, or None for all rows"):
        store.load("all", name="spatial")
    with pytest.raises(ConfigurationError, match="views 0 to 0"):
        store.load("train", name="spatial", views=1)


def test_the_layout_is_that_of_the_format(path: Path) -> None:
    with h5py.File(path, "r") as file:
        assert dict(file.attrs)["format"] == b"bottleneck-features"
        assert file.attrs["format_version"] == 1
        assert file["features/last.avg"].chunks is None
        assert file["features/last.avg"].attrs["fingerprint"] == recipe().fingerprint.encode()
        seen = []
        file.visititems(lambda name, item: seen.append((name, item.dtype)) if isinstance(item, h5py.Dataset) else None)
        assert not any(dtype.hasobject for _, dtype in seen)  # nothing of variable length
        assert file["images/path/utf8"].dtype == np.uint8
        names = file["images/path/utf8"][()].tobytes()
        assert names[: file["images/path/ends"][0]] == b"\xff.png"


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = write(tmp_path / "features.h5")
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert listing(tmp_path) == ["features.h5"]
    assert path.read_bytes() == before
    with pytest.raises(StoreError, match="could not be written"), atomic_file(tmp_path / "other.h5") as temporary:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    assert listing(tmp_path) == ["features.h5"]


def test_rows_that_were_promised_must_be_written(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "a.h5", kind="store", rows=3, features={"last.avg": FeatureSpec(recipe(), 1, (4,))})
    writer.append("last.avg", np.zeros((2, 1, 4), np.float32))
    with pytest.raises(StoreError, match="expected"):
        writer.append("last.avg", np.zeros((2, 1, 4), np.float32))
    with pytest.raises(StoreError, match="received 2 rows, expected 3"):
        writer.finish(images=table(), quarantine=QUARANTINE)
    writer.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_row_is_never_handed_out(path: Path, name: str) -> None:
    with h5py.File(path, "r+") as file:
        file[f"features/{name}"][321] = 1.0
    store = FeatureStore.open(path)
    with pytest.raises(IntegrityError, match=rf"/features/{name} rows \d+ to \d+ are not what was written") as caught:
        store.load("train", name=name)
    assert str(path) in str(caught.value)
    with pytest.raises(IntegrityError, match="checksum differs"):
        store.verify()


@pytest.mark.parametrize("column", ["images/label", "images/split", "images/sha256", "classes/utf8", "quarantine/size"])
def test_a_changed_table_is_never_handed_out(path: Path, column: str) -> None:
    with h5py.File(path, "r+") as file:
        file[column][0] = 9
    with pytest.raises(IntegrityError, match=f"/{column} rows 0 to"):
        FeatureStore.open(path).verify()


def test_changed_attributes_are_refused(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["source"] = np.bytes_("elsewhere")
    with pytest.raises(IntegrityError, match="attributes_sha256"):
        FeatureStore.open(path)


def test_an_unknown_version_says_what_to_do(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 3
    with pytest.raises(FormatVersionError, match="Install a newer bottleneck-features, or extract again"):
        FeatureStore.open(path)


def test_a_folder_of_images_beside_its_store_is_taken_for_a_slip(tmp_path: Path) -> None:
    (tmp_path / "photos.h5").touch()
    with pytest.raises(StoreError, match=r"no such feature store; did you mean '.*/photos\.h5'\?$"):
        FeatureStore.open(tmp_path / "photos")
    (tmp_path / "photos").mkdir()
    with pytest.raises(IntegrityError, match=r"a feature store is a file; did you mean '.*/photos\.h5'\?$"):
        FeatureStore.open(tmp_path / "photos")


def test_files_that_are_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such feature store"):
        FeatureStore.open(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(IntegrityError, match="not a readable feature store"):
        FeatureStore.open(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(IntegrityError, match="not a feature store"):
        FeatureStore.open(tmp_path / "other.h5")


def test_a_truncated_file_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for keep in (0, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(IntegrityError, match=r"features\.h5"):
            FeatureStore.open(path).verify()


def test_links_out_of_the_file_are_refused(path: Path, tmp_path: Path) -> None:
    for link in (h5py.ExternalLink("/etc/hostname", "/"), h5py.SoftLink("/features/spatial")):
        with h5py.File(path, "r+") as file:
            file["features/linked"] = link
        with pytest.raises(IntegrityError, match="/features/linked: a soft or external link"):
            FeatureStore.open(path)
        with h5py.File(path, "r+") as file:
            del file["features/linked"]


def test_external_storage_and_virtual_data_sets_are_refused(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["features/last.avg"]
        file.create_dataset("features/last.avg", shape=(ROWS, 1, 700), dtype="f4", external=[("/etc/passwd", 0, 10**9)])
    with pytest.raises(IntegrityError):
        FeatureStore.open(path)


def test_absurd_declared_sizes_are_refused_before_they_are_allocated(path: Path) -> None:
    with h5py.File(path, "r+", libver="latest") as file:
        del file["images/size"]
        file.create_dataset("images/size", shape=(1 << 50,), dtype="<i8")
    with pytest.raises(IntegrityError, match=r"/images/size: declares 9007199254740992 bytes"):
        FeatureStore.open(path)


def _sum_of(store: FeatureStore) -> float:
    return float(np.asarray(store.array("last.avg"), dtype=np.float64).sum())


@pytest.mark.slow
@pytest.mark.pain(15)
@pytest.mark.parametrize("how", ["fork", "spawn", "loky"])
def test_pain_15_a_store_opened_here_is_read_in_other_processes(path: Path, how: str) -> None:
    store = FeatureStore.open(path)
    expected = _sum_of(store)  # opened, verified and mapped before the others begin
    if how == "loky":
        import joblib

        found = joblib.Parallel(n_jobs=3)(joblib.delayed(_sum_of)(store) for _ in range(6))
    else:
        with multiprocessing.get_context(how).Pool(3) as pool:
            found = pool.map(_sum_of, [store] * 6)
    assert found == [expected] * 6
    assert _sum_of(store) == expected
