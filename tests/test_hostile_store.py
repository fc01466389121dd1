"""Files made to harm: each is refused with its name and the place, quickly and without the memory it asks for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers import ROOT, recipe

from features.canonical import canonical_json
from features.errors import FormatVersionError, IntegrityError, StoreError
from features.files import atomic_file
from features.store.reader import FeatureStore
from features.store.schema import FeatureSpec, ImageTable, Quarantine, attributes_digest, block_hash, block_rows
from features.store.writer import StoreWriter

pytestmark = pytest.mark.slow  # hundreds of small HDF5 files

ROWS = 12
KEY = "features/last.avg"
Change = Callable[[h5py.File], None]


def write(path: Path, kind: str = "store") -> Path:
    numbers = np.arange(ROWS)
    table = ImageTable(
        paths=tuple(f"cat/{number:02d}.png" for number in numbers),
        sha256=np.repeat(numbers[:, None], 32, axis=1).astype(np.uint8),
        labels=(numbers % 2 if kind == "store" else np.full(ROWS, -1)).astype(np.int32),
        splits=(numbers % 4 if kind == "store" else np.full(ROWS, -1)).astype(np.int8),
        groups=None,
        widths=np.full(ROWS, 9, np.int32),
        heights=np.full(ROWS, 8, np.int32),
        sizes=numbers.astype(np.int64),
        mtimes_ns=numbers.astype(np.int64),
    )
    quarantine = Quarantine(("bad",), np.zeros((1, 32), np.uint8), ("empty",), np.array([0]), np.array([4]))
    features = np.arange(ROWS * 5, dtype=np.float32).reshape(ROWS, 1, 5)
    with atomic_file(path) as temporary:
        writer = StoreWriter(temporary, kind=kind, rows=ROWS, features={"last.avg": FeatureSpec(recipe(), 1, (5,))})
        writer.append("last.avg", features)
        writer.finish(
            images=table, quarantine=quarantine, classes=("cat", "dog") if kind == "store" else (), source="here"
        )
    return path


def forge(path: Path, *changes: Change) -> Path:
    """Change a file and make its checksums fit again, as someone would who wants it to be believed."""
    late = [change for change in changes if getattr(change, "late", False)]
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        for change in changes:
            if change not in late:
                change(file)
    with contextlib.suppress(KeyError, TypeError, OSError), h5py.File(path, "r+", libver=("v110", "v110")) as file:
        seal(file)
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        for change in late:
            change(file)
    return path


def late(change: Change) -> Change:
    """After the checksums were made to fit."""
    change.late = True  # type: ignore[attr-defined]
    return change


def seal(file: h5py.File) -> None:
    attributes: dict[str, dict[str, Any]] = {}
    datasets: dict[str, h5py.Dataset] = {}

    def visit(name: str, item: Any) -> None:
        key = "/" + name
        attributes[key] = {name: plain(value) for name, value in item.attrs.items()}
        if isinstance(item, h5py.Dataset) and not key.startswith("/checksums/"):
            datasets[key] = item

    file.visititems(visit)
    for key, dataset in datasets.items():
        if (
            dataset.chunks
            or dataset.is_virtual
            or dataset.external
            or not dataset.shape
            or max(dataset.shape) > 1 << 24
        ):
            continue
        values, step, digests = dataset[()], block_rows(dataset.shape, dataset.dtype), []
        for block, start in enumerate(range(0, len(values), step)):
            digest = block_hash(key, dataset.dtype, dataset.shape, block)
            digest.update(np.ascontiguousarray(values[start : start + step]).tobytes())
            digests.append(digest.digest())
        name = f"/checksums{key}"
        if name in file:
            del file[name]
        file[name] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    attributes["/"] = {name: plain(value) for name, value in file.attrs.items() if name != "attributes_sha256"}
    text(file, "/", attributes_sha256=attributes_digest(attributes))


def plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else int(value) if isinstance(value, np.integer) else str(value)


def text(file: h5py.File, key: str, **values: str) -> None:
    for name, value in values.items():
        file[key].attrs[name] = np.bytes_(value.encode())


def use(path: Path) -> None:
    """Everything a program does with a store."""
    store = FeatureStore.open(path)
    len(store.images), len(store.quarantine), store.classes
    for name in store.names:
        store.load("train", name=name, views="all")
    store.verify()


def replace(key: str, **settings: Any) -> Change:
    def change(file: h5py.File) -> None:
        attributes = dict(file[key].attrs) if key in file else {}
        if key in file:
            del file[key]
        dataset = file.create_dataset(key, **settings)
        for name, value in attributes.items():
            dataset.attrs[name] = value

    return change


def put(key: str, values: Any, at: Any = ...) -> Change:
    def change(file: h5py.File) -> None:
        file[key][at] = values

    return change


def link(key: str, target: Any) -> Change:
    def change(file: h5py.File) -> None:
        if key in file:
            del file[key]
        file[key] = file[target] if isinstance(target, str) else target

    return change


def attribute(key: str, name: str, value: Any, dtype: Any = None) -> Change:
    def change(file: h5py.File) -> None:
        if value is None:
            del file[key].attrs[name]
        else:
            file[key].attrs.create(name, value, dtype=dtype)

    return change


def delete(key: str) -> Change:
    def change(file: h5py.File) -> None:
        del file[key]

    return change


def recipe_text(make: Callable[[dict[str, Any]], str], *, honest: bool = True) -> Change:
    """Another recipe text, with the fingerprint that belongs to it."""
    import hashlib

    def change(file: h5py.File) -> None:
        value = make(recipe().to_dict())
        text(file, KEY, recipe=value)
        if honest:
            text(file, KEY, fingerprint=hashlib.sha256(value.encode()).hexdigest())

    return change


def emptied(key: str) -> Change:
    def change(file: h5py.File) -> None:
        del file[key]
        file.create_group(key)

    return change


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(shape=(ROWS, 1, 5), dtype="<f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", shape=(ROWS, 1, 5))
    del file[KEY]
    file.create_virtual_dataset(KEY, layout)


def bomb(file: h5py.File) -> None:
    del file[KEY]
    data = file.create_dataset(KEY, (1 << 20, 1, 1 << 16), "<f4", chunks=(16, 1, 1 << 16), compression="gzip")
    data[:16] = 0


def many_names(file: h5py.File) -> None:
    """Sixty names of the root in the root: 60**5 paths."""
    for number in range(60):
        file[f"again{number}"] = file["/"]


def deep(file: h5py.File) -> None:
    file.create_group("/images/" + "/".join("x" * 400))


FLOAT32, INT64 = "<f4", "<i8"
# name -> what to change, what the message says; every message has the path of the file
CASES: dict[str, tuple[Change, str]] = {
    # links
    "external link": (link(KEY, h5py.ExternalLink("/etc/hostname", "/x")), "/features/last.avg: a soft or external"),
    "external link, a group": (link("images", h5py.ExternalLink("x.h5", "/images")), "/images: a soft or external"),
    "soft link inside": (link("features/b", h5py.SoftLink(f"/{KEY}")), "/features/b: a soft or external"),
    "soft link to itself": (link("features/b", h5py.SoftLink("/features/b")), "/features/b: a soft or external"),
    "soft link in the checksums": (
        late(link(f"checksums/{KEY}", h5py.SoftLink("/images/sha256"))),
        "/checksums/features/last.avg: a soft",
    ),
    "hard link to the root": (link("features/b", "/"), "a second name for the same object"),
    "hard link to a neighbour": (link("features/b", KEY), "a second name for the same object"),
    "hard links to the root, many": (many_names, "a second name for the same object"),
    "checksums that are the data": (
        late(link("checksums/images/sha256", "images/sha256")),
        "a second name for the same object",
    ),
    "named type": (lambda file: file.__setitem__("features/t", np.dtype("<f4")), "/features/t: neither a group nor"),
    "groups in groups": (deep, "nested more deeply"),
    # where the data lies
    "external storage": (
        replace(KEY, shape=(ROWS, 1, 5), dtype=FLOAT32, external=[("/etc/passwd", 0, 240)]),
        "/features/last.avg: not a contiguous array",
    ),
    "virtual array": (virtual, "/features/last.avg: not a contiguous array"),
    "chunks": (replace(KEY, data=np.zeros((ROWS, 1, 5), FLOAT32), chunks=True), "not a contiguous array"),
    "compressed bomb": (bomb, "/features/last.avg: not a contiguous array"),
    "chunked checksums": (
        late(replace(f"checksums/{KEY}", shape=(1 << 40, 32), dtype="u1", chunks=(1024, 32))),
        "/checksums/features/last.avg: not a contiguous",
    ),
    "no data space": (replace(KEY, data=h5py.Empty(FLOAT32)), "/features/last.avg: not a contiguous"),
    "a scalar": (replace("images/size", data=np.int64(3)), "/images/size: received a scalar, expected rows"),
    # declared sizes
    "absurd rows": (replace(KEY, shape=(1 << 40, 1, 5), dtype=FLOAT32), "declares 21990232555520 bytes"),
    "absurd rows of a table": (replace("images/label", shape=(1 << 50,), dtype="<i4"), "/images/label: declares"),
    "absurd text": (replace("images/path/utf8", shape=(1 << 45,), dtype="u1"), "/images/path/utf8: declares"),
    "absurd checksums": (
        late(replace(f"checksums/{KEY}", shape=(1 << 40, 32), dtype="u1")),
        "/checksums/features/last.avg: declares",
    ),
    "a size that overflows": (
        replace(KEY, shape=(1 << 30, 1 << 30, 1 << 4), dtype=FLOAT32),
        "declares 73786976294838206464 bytes",
    ),
    "never written": (replace(KEY, shape=(ROWS, 1, 5), dtype=FLOAT32), "declares 240 bytes"),
    "absurd rows of nothing": (
        replace(KEY, shape=(1 << 60, 1, 0), dtype=FLOAT32),
        "/features/last.avg: received shape",
    ),
    "nothing of absurd rows": (
        replace(KEY, shape=(0, 1, 1 << 62), dtype=FLOAT32),
        "/features/last.avg: received shape",
    ),
    "nothing of rows that overflow": (
        replace(KEY, shape=(0, 1 << 62, 1 << 62), dtype=FLOAT32),
        "/features/last.avg: received shape",
    ),
    # types
    "big-endian features": (replace(KEY, data=np.zeros((ROWS, 1, 5), ">f4")), "received >f4"),
    "float64 features": (replace(KEY, data=np.zeros((ROWS, 1, 5), "<f8")), "received <f8"),
    "integer features": (replace(KEY, data=np.zeros((ROWS, 1, 5), "<i4")), "received <i4"),
    "features of another recipe's type": (replace(KEY, data=np.zeros((ROWS, 1, 5), "<f2")), "received <f2"),
    "complex features": (replace(KEY, data=np.zeros((ROWS, 1, 5), "<c8")), "/features/last.avg: element type"),
    "compound features": (replace(KEY, data=np.zeros((ROWS, 1, 5), [("a", "<f4")])), "/features/last.avg: element"),
    "booleans": (replace("images/split", data=np.zeros(ROWS, bool)), "/images/split: element type"),
    "int64 labels": (replace("images/label", data=np.zeros(ROWS, INT64)), "/images/label: received <i8"),
    "unsigned sizes": (replace("images/size", data=np.zeros(ROWS, "<u8")), "/images/size: received <u8"),
    "text of variable length": (
        replace("images/path/utf8", data=["a"] * ROWS, dtype=h5py.string_dtype()),
        "/images/path/utf8: element type",
    ),
    "references": (replace("images/size", shape=(ROWS,), dtype=h5py.ref_dtype), "/images/size: element type"),
    # shapes and lengths
    "features without views": (replace(KEY, data=np.zeros((ROWS, 5), FLOAT32)), r"received <f4 \(12, 5\)"),
    "no view": (replace(KEY, shape=(ROWS, 0, 5), dtype=FLOAT32), "received shape"),
    "fewer rows": (
        replace(KEY, data=np.zeros((ROWS - 1, 1, 5), FLOAT32)),
        r"received <f4 \(11, 1, 5\), expected float32 and 12 rows",
    ),
    "more labels": (replace("images/label", data=np.zeros(ROWS + 1, "<i4")), "columns of different lengths"),
    "fewer paths": (replace("images/path/ends", data=np.zeros(ROWS - 1, INT64)), "columns of different lengths"),
    "short hashes": (replace("images/sha256", data=np.zeros((ROWS, 31), "u1")), "/images/sha256: received"),
    "quarantine of two lengths": (replace("quarantine/size", data=np.zeros(3, INT64)), "/quarantine: columns of diff"),
    "fewer checksums": (
        late(replace(f"checksums/{KEY}", data=np.zeros((0, 32), "u1"))),
        "/checksums/features/last.avg: received",
    ),
    # missing and extra
    "no labels": (delete("images/label"), "arrays without a checksum, or checksums without an array: /images/label"),
    "no labels, no checksum": (
        lambda file: (delete("images/label")(file), delete("checksums/images/label")(file)),  # type: ignore[dict-item]
        "unknown or missing arrays: /images/label",
    ),
    "no classes": (
        lambda file: (delete("classes")(file), delete("checksums/classes")(file)),  # type: ignore[dict-item]
        "unknown or missing arrays: /classes/ends, /classes/utf8",
    ),
    "no features": (
        lambda file: (emptied("features")(file), delete("checksums/features")(file)),  # type: ignore[dict-item]
        "/features: no feature set",
    ),
    "no checksums": (late(emptied("checksums")), "arrays without a checksum, or checksums without an array"),
    "an extra table": (replace("images/secret", data=np.zeros(ROWS, "<i4")), "unknown or missing arrays"),
    "an extra array": (replace("more", data=np.zeros(3, "u1")), "unknown or missing arrays: /more"),
    "an extra group": (lambda file: file.create_group("more"), "does not have: /more"),  # type: ignore[dict-item]
    "an extra attribute of the root": (attribute("/", "x", np.bytes_("y")), "root attributes"),
    "an extra attribute of a table": (attribute("images/label", "x", 1, INT64), "does not have: /images/label"),
    "an extra attribute of features": (attribute(KEY, "x", 1, INT64), "attributes .*expected fingerprint and recipe"),
    "no source": (attribute("/", "source", None), "root attributes"),
    "no kind": (attribute("/", "kind", None), "root attributes"),
    "no recipe": (attribute(KEY, "recipe", None), "expected fingerprint and recipe"),
    "features under another name": (
        lambda file: file.move(KEY, "features/other"),  # type: ignore[dict-item,return-value]
        "without a checksum|does not match its recipe",
    ),
    "features in a folder": (
        lambda file: (  # type: ignore[dict-item]
            file.move(KEY, "features/a/b"),
            file.move(f"checksums/{KEY}", "checksums/features/a/b"),
        ),
        "/features/a/b: the fingerprint or the name",
    ),
    # attributes
    "attribute of variable length": (attribute("/", "source", "here", h5py.string_dtype()), "attribute source of /"),
    "attribute that is a list": (attribute("/", "source", np.array([b"a", b"b"])), "attribute source of /"),
    "attribute that is a float": (attribute("/", "format_version", 1.0, "<f8"), "attribute format_version of /"),
    "attribute of a megabyte": (attribute("/", "source", np.bytes_(b"x" * 300_000)), "attribute source of /"),
    "no attribute at all": (
        lambda file: [file.attrs.__delitem__(name) for name in list(file.attrs)],  # type: ignore[dict-item,return-value]
        "not a feature store",
    ),
    "another format": (attribute("/", "format", np.bytes_("holiday")), "not a feature store"),
    "provenance that is no JSON": (attribute("/", "provenance", np.bytes_("{")), "not a readable feature store"),
    "provenance that is a list": (attribute("/", "provenance", np.bytes_("[]")), "attribute provenance"),
    "provenance that is deep": (attribute("/", "provenance", np.bytes_("[" * 50_000)), "not a readable"),
    # recipes
    "fingerprint of another recipe": (
        recipe_text(lambda values: canonical_json({**values, "seed": 1}), honest=False),
        "/features/last.avg: the fingerprint or the name does not match its recipe",
    ),
    "recipe of an unknown version": (recipe_text(lambda values: canonical_json({**values, "version": 2})), "version 2"),
    "recipe with an extra field": (
        recipe_text(lambda values: canonical_json({**values, "x": 2})),
        "unknown or missing",
    ),
    "recipe with a field missing": (
        recipe_text(lambda values: canonical_json({key: values[key] for key in values if key != "fit"})),
        "unknown or missing fields: fit",
    ),
    "recipe with NaN": (recipe_text(lambda values: json.dumps({**values, "seed": float("nan")})), "not a readable"),
    "recipe with spaces": (recipe_text(lambda values: json.dumps(values, sort_keys=True)), "does not match its recipe"),
    "recipe with a field twice": (
        recipe_text(lambda values: canonical_json(values)[:-1] + ',"seed":0}'),
        "does not match its recipe",
    ),
    "recipe that is deep": (recipe_text(lambda values: '{"a":' * 9_000 + "1" + "}" * 9_000), "not a readable"),
    "recipe with a deep field": (
        recipe_text(
            lambda values: canonical_json(values).replace(
                '"augmentation":null', '"augmentation":' + "[" * 20_000 + "]" * 20_000
            )
        ),
        "not a readable",
    ),
    "recipe that is a number": (recipe_text(lambda values: "7"), "not a readable"),
    "recipe with an endless number": (
        recipe_text(lambda values: canonical_json(values).replace('"seed":0', '"seed":' + "9" * 30_000)),
        "not a readable",
    ),
    "recipe of an absurd size": (recipe_text(lambda values: canonical_json({**values, "height": 10**9})), "1 to 4096"),
    "recipe whose layer is a number": (
        recipe_text(lambda values: canonical_json({**values, "layer": 3})),
        "layer|read",
    ),
    "recipe with an unknown rule": (
        recipe_text(lambda values: canonical_json({**values, "fit": "x"})),
        "fit: received",
    ),
    # values
    "features that are NaN": (put(KEY, np.nan), "/features/last.avg rows 0 to 11 hold values that are not finite"),
    "one infinite feature": (put(KEY, np.inf, (7, 0, 3)), "not finite"),
    "ends that go back": (put("images/path/ends", 1, 5), "/images/path has string ends that do not fit"),
    "ends below zero": (put("images/path/ends", -4, 0), "/images/path has string ends that do not fit"),
    "ends beyond the text": (put("images/path/ends", 1 << 60, ROWS - 1), "/images/path has string ends"),
    "ends before the end of the text": (put("classes/ends", 5, 1), "/classes has string ends"),
    "text that nobody ends": (replace("quarantine/path/ends", shape=(0,), dtype=INT64), "/quarantine"),
    "label of no class": (put("images/label", 2, 3), "/images/label holds 0 to 2, expected -1 to 1"),
    "label below -1": (put("images/label", -2, 3), "/images/label holds -2 to 1, expected -1 to 1"),
    "split that does not exist": (put("images/split", 4, 3), "/images/split holds 0 to 4, expected 0 to 3"),
    "split not decided": (put("images/split", -1, 3), "/images/split holds -1 to 3, expected 0 to 3"),
    "classes not sorted": (put("classes/utf8", np.frombuffer(b"dogcat", "u1")), "/classes are not sorted"),
    "a class twice": (put("classes/utf8", np.frombuffer(b"catcat", "u1")), "/classes are not sorted, or one occurs"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_store_is_refused(tmp_path: Path, name: str) -> None:
    change, message = CASES[name]
    path = forge(write(tmp_path / "features.h5"), change)
    use_warm(tmp_path)
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(IntegrityError, match=f"(?s){message}") as caught:
            use(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 3
    assert len(str(caught.value)) < 2000
    assert peak < 20e6
    assert time.process_time() - started < 5


def use_warm(folder: Path) -> None:
    """What an untouched store of this kind needs is not what is measured."""
    use(write(folder / "good.h5"))


def test_a_forged_store_that_breaks_no_rule_opens(tmp_path: Path) -> None:
    """The cases above fail for what was changed, not for how."""
    path = forge(
        write(tmp_path / "features.h5"),
        put(KEY, 4.0),
        put("images/label", -1),
        attribute("/", "source", np.bytes_("x")),
    )
    store = FeatureStore.open(path)
    assert store.source == "x"
    np.testing.assert_array_equal(store.array(), np.full((ROWS, 1, 5), 4, np.float32))
    np.testing.assert_array_equal(store.images.labels, -1)
    store.verify()


@pytest.mark.parametrize("version", [0, 3, -1, 1 << 62])
def test_another_format_version_is_refused_before_anything_else(tmp_path: Path, version: int) -> None:
    path = forge(write(tmp_path / "features.h5"), attribute("/", "format_version", version, INT64), delete("images"))
    with pytest.raises(FormatVersionError, match=rf"features\.h5: format version {version} is not known") as caught:
        FeatureStore.open(path)
    assert caught.value.exit_code == 1


def test_a_shard_is_no_store_and_a_store_no_shard(tmp_path: Path) -> None:
    shard, store = write(tmp_path / "shard.h5", "shard"), write(tmp_path / "store.h5")
    with pytest.raises(IntegrityError, match=r"shard\.h5: .*received kind 'shard', expected 'store' or 'index'"):
        FeatureStore.open(shard)
    with pytest.raises(IntegrityError, match=r"store\.h5: .*received kind 'store', expected 'shard'"):
        FeatureStore.open_shard(store)
    forge(shard, put("images/split", 0, 3))
    with pytest.raises(IntegrityError, match="/images/split holds -1 to 0, expected -1 to -1"):
        FeatureStore.open_shard(shard).verify()
    assert dataclasses.asdict(FeatureStore.open(store).recipes["last.avg"])["layer"] == "last"


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.h5")
    (tmp_path / "folder.h5").mkdir()
    (tmp_path / "null.h5").symlink_to("/dev/zero")
    code = (
        "import sys\nfrom features.store.reader import FeatureStore\nfrom features.errors import IntegrityError\n"
        "try:\n    FeatureStore.open(sys.argv[1])\nexcept IntegrityError as error:\n    print(error)\n"
    )
    said = {
        "pipe.h5": "not a feature store, but a pipe or a device",
        "folder.h5": "is a folder, and a feature store is",
    }
    for name, words in {**said, "null.h5": said["pipe.h5"]}.items():
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
        assert f"{tmp_path / name}: {words}" in done.stdout
    (tmp_path / "loop.h5").symlink_to("loop.h5")
    (tmp_path / "nothing.h5").symlink_to("missing")
    (tmp_path / "empty.h5").touch()
    for name in ("loop.h5", "nothing.h5", "empty.h5"):
        with pytest.raises(StoreError, match=name):
            FeatureStore.open(tmp_path / name)


def test_a_header_without_a_body_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "features.h5")
    data = path.read_bytes()
    for size in (1, 8, 47, 48, 96, 500, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(IntegrityError, match=r"features\.h5"):
            use(path)
    path.write_bytes(data + b"\0" * 100)  # more than the file says is not less
    use(path)


def test_a_reader_keeps_the_file_it_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "features.h5")
    store = FeatureStore.open(path)
    before = np.array(FeatureStore.open(path).array())
    later = forge(write(tmp_path / "later.h5"), put(KEY, 1.0), put("images/label", 1))
    os.replace(later, path)
    np.testing.assert_array_equal(store.array(), before)
    np.testing.assert_array_equal(store.images.labels, np.arange(ROWS) % 2)
    assert store.verify() == FeatureStore.open(path).verify()
    np.testing.assert_array_equal(FeatureStore.open(path).array(), np.ones((ROWS, 1, 5), np.float32))


def test_open_files_are_given_back(tmp_path: Path) -> None:
    path = write(tmp_path / "features.h5")
    use(path)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    for _ in range(20):
        use(path)
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 1
