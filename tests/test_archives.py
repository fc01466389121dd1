"""Zip, tar and npz: the same images as in a folder, and one hostile archive after the other."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import logging
import lzma
import os
import pickle
import re
import shutil
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import as_engine, listing, numpy_network, recipe
from PIL import Image

from features.errors import SourceError, UnreadableImageError
from features.extraction.extraction import Extraction, ExtractionResult
from features.extraction.options import ExtractionOptions
from features.pixels.decode import decode_image
from features.pixels.png import plain_png, png_size
from features.recipe import PixelRule, Recipe
from features.sources import archives
from features.sources.archives import open_archive
from features.sources.imageset import ImageSet
from features.sources.scan import scan
from features.sources.splits import SPLITS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("BOTTLENECK_CACHE", str(folder))
    return folder


def pixels(number: int, size: tuple[int, ...] = (8, 8, 3)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, size).astype(np.uint8)


def pictures(*names: str) -> dict[str, bytes]:
    return {name: plain_png(pixels(number)) for number, name in enumerate(names)}


def write_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tar_bytes(files: Mapping[str, bytes], *further: tarfile.TarInfo, **options: Any) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in further:
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    return stream.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes], *further: tarfile.TarInfo, **options: Any) -> Path:
    data = tar_bytes(files, *further, **options)
    pack: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".tgz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
    }
    path.write_bytes(pack.get(path.suffix, bytes)(data))
    return path


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, link, size
    return made


def contents(images: ImageSet) -> dict[str, bytes]:
    return {path: images.read(index) for index, path in enumerate(images.paths)}


def labelled(images: ImageSet) -> dict[str, str]:
    return {path: images.classes[label] for path, label in zip(images.paths, images.labels, strict=True)}


def refusal(path: Path) -> str:
    with pytest.raises(SourceError) as caught:
        scan(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message


FILES = pictures("cat/1.png", "cat/2.png", "dog/1.png", "dog/deep/2.png")
WRITERS: dict[str, Callable[[Path, Mapping[str, bytes]], Path]] = {
    "a.zip": write_zip,
    "stored.zip": lambda path, files: write_zip(path, files, zipfile.ZIP_STORED),
    "a.tar": write_tar,
    "a.tar.gz": write_tar,
    "A.TGZ": lambda path, files: write_tar(path.with_suffix(".tgz"), files).rename(path),
    "a.tar.bz2": write_tar,
    "a.tar.xz": write_tar,
}


# --- what is read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_an_archive_gives_what_the_folder_gives(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, FILES)
    images, folder = scan(path), scan(write_folder(tmp_path / "folder", FILES))
    assert images.paths == folder.paths == tuple(sorted(FILES))
    assert images.classes == folder.classes == ("cat", "dog")
    assert images.labels.tolist() == folder.labels.tolist() == [0, 0, 1, 1]
    assert images.sizes.tolist() == folder.sizes.tolist()
    assert images.mtimes_ns.tolist() == [path.stat().st_mtime_ns] * 4
    assert contents(images) == FILES
    assert images.root == path


def test_nothing_is_written_beside_an_archive(tmp_path: Path, cache: Path) -> None:
    contents(scan(write_zip(tmp_path / "a.zip", FILES)))
    contents(scan(write_tar(tmp_path / "a.tar", FILES)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "a.zip", "cache"]
    contents(scan(write_tar(tmp_path / "b.tar.gz", FILES)))
    name = "KEY-{0.st_size}-{0.st_mtime_ns}-{0.st_ino}-{0.st_ctime_ns}".format((tmp_path / "b.tar.gz").stat())
    found = sorted(re.sub("[0-9a-f]{20}", "KEY", name) for name in listing(cache))
    assert found[:3] == ["archives", f"archives/{name}.json", f"archives/{name}.tar"]
    assert f"{name}.index" in [Path(each).name for each in found[3:]]
    assert found[3:5] == ["scratch", "tars"]
    assert len([each for each in found if each.endswith(".index")]) == 2  # and the list of the other tar


def test_a_compressed_tar_is_expanded_once_and_anew_when_it_changes(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = write_tar(tmp_path / "a.tar.gz", FILES)
    scan(path)
    scan(path)
    assert caplog.text.count("expanding into") == 1
    changed = FILES | pictures("cow/1.png")
    write_tar(path, changed)
    assert contents(scan(path)) == changed
    [copy] = (cache / "archives").glob("*.tar")  # the former copy is gone
    assert len(listing(cache / "archives")) == 2  # the copy and the note on it
    copy.write_bytes(copy.read_bytes()[:700])  # damaged behind our back
    assert contents(scan(path)) == changed


def test_an_expanded_copy_made_twice_is_the_same(tmp_path: Path, cache: Path) -> None:
    path = write_tar(tmp_path / "a.tar.gz", FILES)
    first = scan(path)
    next((cache / "archives").glob("*.tar")).unlink()
    scan(path)  # as by another process at the same time
    assert contents(first) == FILES


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_many_threads_read_at_once(tmp_path: Path, name: str) -> None:
    files = {f"{number % 7}/{number}.png": os.urandom(5000 + number) for number in range(200)}
    images = scan(WRITERS[name](tmp_path / name, files))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(images.read, range(200)))
    assert dict(zip(images.paths, read, strict=True)) == files


def test_a_folder_that_only_wraps_the_others_is_no_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["train/cats/1.png", "train/dogs/1.png", "validation/cats/2.png"]
    files = {f"cats_and_dogs_filtered/{name}": data for name, data in pictures(*names).items()}
    files |= {"cats_and_dogs_filtered/vectorize.py": b"print()", "__MACOSX/cats/._1.png": b"", "x/.hidden/1.png": b""}
    images = scan(write_zip(tmp_path / "a.zip", files))
    assert images.paths == tuple(f"cats_and_dogs_filtered/{name}" for name in names)
    assert images.classes == ("cats", "dogs")
    assert [SPLITS[code] for code in images.given_splits] == ["train", "train", "validation"]
    assert "left out: 1 file of other kinds: .py 1" in caplog.text


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/b/cat/1.png", "a/b/dog/1.png"], {"a/b/cat/1.png": "cat", "a/b/dog/1.png": "dog"}),
        (["a/cat/1.png", "a/dog/1.png", "a/loose.png"], {"a/cat/1.png": "cat", "a/dog/1.png": "dog"}),
        (["a/cat/1.png", "a/dog/1.png", "loose.png"], {"a/cat/1.png": "cat", "a/dog/1.png": "dog"}),
        (["cat/1.png", "cat/more/2.png"], {"cat/1.png": "cat", "cat/more/2.png": "cat"}),
        (["train/cat/1.png", "train/dog/1.png"], {"train/cat/1.png": "cat", "train/dog/1.png": "dog"}),
        (["a/train/cat/1.png", "a/train/dog/1.png"], {"a/train/cat/1.png": "cat", "a/train/dog/1.png": "dog"}),
    ],
)
def test_wrapping_folders(tmp_path: Path, names: Sequence[str], expected: Mapping[str, str]) -> None:
    images = scan(write_zip(tmp_path / "a.zip", pictures(*names)))
    assert labelled(images) == expected
    assert set(images.given_splits.tolist()) == ({0} if "train" in names[0] else {-1})


def test_folders_have_members_of_their_own(tmp_path: Path) -> None:
    folders = [info(name, tarfile.DIRTYPE) for name in ("./", "./cat", "./dog/")]
    assert contents(scan(write_tar(tmp_path / "a.tar", FILES, *folders))) == FILES
    assert contents(scan(write_zip(tmp_path / "a.zip", FILES | {"./": b"", "cat/": b"", "./dog/": b""}))) == FILES


def test_a_flat_archive_is_unlabelled(tmp_path: Path) -> None:
    images = scan(write_tar(tmp_path / "a.tar", pictures("b.png", "a.png")))
    assert (images.paths, images.labels.tolist(), images.classes) == (("a.png", "b.png"), [-1, -1], ())


def test_archives_inside_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inner = write_zip(tmp_path / "inner.zip", FILES).read_bytes()
    images = scan(write_zip(tmp_path / "a.zip", FILES | {"cat/more.zip": inner, "all.tar.gz": b"x", "empty/": b""}))
    assert contents(images) == FILES
    assert "left out: 2 files of other kinds: .gz 1, .zip 1" in caplog.text
    assert "folders without images are not classes: 'empty'" in caplog.text


def test_names_in_other_alphabets(tmp_path: Path) -> None:
    names = ["größe/é.png", "größe/2.png", "ネコ/🐈.png"]
    for path in (write_zip(tmp_path / "a.zip", pictures(*names)), write_tar(tmp_path / "a.tar", pictures(*names))):
        assert contents(scan(path)) == pictures(*names)
        assert scan(path).classes == ("größe", "ネコ")


def test_zip_names_without_the_utf8_flag(tmp_path: Path) -> None:
    """Old writers use code page 437; others write UTF-8 and do not say so."""
    path = write_zip(tmp_path / "a.zip", {"caf@/1.png": b"1", "th~~/1.png": b"2"}, zipfile.ZIP_STORED)
    data = path.read_bytes().replace(b"caf@", b"caf\x82").replace(b"th~~", "thé".encode())
    path.write_bytes(data)
    assert contents(scan(path)) == {"café/1.png": b"1", "thé/1.png": b"2"}
    assert scan(path).classes == ("café", "thé")


def test_tar_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"a/caf\xe9.png")
    path = write_tar(
        tmp_path / "a.tar", {name: b"coffee"}, format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
    )
    assert contents(scan(path)) == {name: b"coffee"}
    path = write_tar(
        path,
        {os.fsdecode(b"caf\xe9/1.png"): b""},
        format=tarfile.GNU_FORMAT,
        encoding="utf-8",
        errors="surrogateescape",
    )
    assert "not plain UTF-8 text" in refusal(path)


def test_backslashes_are_separators_in_zips_from_windows_only(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for system in (0, 3):
            entry = zipfile.ZipInfo(f"cat\\{system}.png")
            entry.create_system = system
            archive.writestr(entry, b"x")
    assert sorted(open_archive(path).members) == ["cat/0.png", "cat\\3.png"]


def test_names_that_differ_in_case_are_two(tmp_path: Path) -> None:
    files = pictures("a/1.png", "a/1.PNG", "A/1.png")
    assert contents(scan(write_zip(tmp_path / "a.zip", files))) == files


def test_an_archive_that_changes_or_goes_is_noticed(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", FILES)
    images = scan(path)
    os.utime(path, ns=(0, 10**18))
    with pytest.raises(SourceError, match=r"a\.zip has been changed since .*; run again"):
        images.read(0)
    path.unlink()
    with pytest.raises(SourceError, match=r"a\.zip has been removed since .*; put it back and run again"):
        images.read(0)


# --- hostile names and kinds ------------------------------------------------------------------------------

HOSTILE_NAMES = [
    ("../out.png", "leaves its folder with '..'"),
    ("a/../../out.png", "leaves its folder"),
    ("a\\..\\..\\out.png", "leaves its folder"),
    ("..", "leaves its folder"),
    ("/etc/out.png", "has an absolute path"),
    ("\\\\server\\out.png", "has an absolute path"),
    ("C:\\out.png", "has an absolute path"),
    ("c:/out.png", "has an absolute path"),
    ("c:out.png", "has an absolute path"),
    ("./cat//1.png", "occurs twice"),
]


@pytest.mark.parametrize(("name", "problem"), HOSTILE_NAMES)
@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_hostile_names(tmp_path: Path, cache: Path, suffix: str, name: str, problem: str) -> None:
    path = tmp_path / f"a{suffix}"
    (write_zip if suffix == ".zip" else write_tar)(path, FILES | {name: b""})
    message = refusal(path)
    assert problem in message
    assert repr("cat/1.png" if problem == "occurs twice" else name) in message
    assert "Unpack it with care, and give the folder" in message
    assert [entry for entry in listing(cache) if entry != "archives"] == []  # the expanded copy is gone


def test_nul_in_names(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"cat/1.png~.exe": b"x"})
    path.write_bytes(path.read_bytes().replace(b"png~", b"png\0"))
    assert "has a NUL character in its name" in refusal(path)
    path = write_tar(tmp_path / "a.tar", {}, format=tarfile.PAX_FORMAT, pax_headers={})
    entry = info("x.png")
    entry.pax_headers = {"path": "a/\0.png"}
    path.write_bytes(tar_bytes({}, entry, format=tarfile.PAX_FORMAT))
    assert "has a NUL character in its name" in refusal(path)


def test_control_characters_in_names(tmp_path: Path) -> None:
    files = {"cat/1\n.png": b"x", "dog/\x1b[2J.png": b"y"}
    assert contents(scan(write_zip(tmp_path / "a.zip", files))) == files
    assert "'dog\\x07' is not plain UTF-8 text" in refusal(
        write_zip(tmp_path / "b.zip", {"dog\a/1.png": b"", "c/1.png": b""})
    )


@pytest.mark.parametrize(
    ("kind", "link"),
    [
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.SYMTYPE, "cat/1.png"),
        (tarfile.LNKTYPE, "cat/1.png"),
        (tarfile.LNKTYPE, "/etc/passwd"),
        (tarfile.CHRTYPE, ""),
        (tarfile.BLKTYPE, ""),
        (tarfile.FIFOTYPE, ""),
    ],
)
def test_links_and_devices_in_a_tar(tmp_path: Path, kind: bytes, link: str) -> None:
    message = refusal(write_tar(tmp_path / "a.tar", FILES, info("cat/x.png", kind, link)))
    assert "the member 'cat/x.png' is a link, a device or a sparse file" in message


@pytest.mark.parametrize("kind", [0o120000, 0o020000, 0o060000, 0o010000, 0o140000])
def test_links_and_devices_in_a_zip(tmp_path: Path, kind: int) -> None:
    entry = zipfile.ZipInfo("cat/x.png")
    entry.create_system, entry.external_attr = 3, (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(entry, b"/etc/passwd")
    assert "the member 'cat/x.png' is a link or a device" in refusal(tmp_path / "a.zip")


def test_duplicate_members(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile says so too
        archive.writestr("a/1.png", b"one")
        archive.writestr("a/1.png", b"two")
    assert "'a/1.png' occurs twice" in refusal(tmp_path / "a.zip")
    assert "'a/1.png' occurs twice" in refusal(write_tar(tmp_path / "a.tar", {"a/1.png": b""}, info("a/1.png")))


# --- bombs ------------------------------------------------------------------------------------------------


def test_zip_bombs_by_ratio_and_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FREE_MEMBER", 1 << 16)
    monkeypatch.setattr(archives, "FREE_TOTAL", 1 << 18)
    bomb = bytes(1 << 17)
    message = refusal(write_zip(tmp_path / "a.zip", {"a/1.png": bomb}))
    assert re.search(r"'a/1.png' would expand from \d+ to 131072 bytes, as bombs do, not images", message)
    many = {f"a/{number}.png": bytes(1 << 16) for number in range(5)}
    assert "would expand to more than 262144 bytes, as bombs do" in refusal(write_zip(tmp_path / "b.zip", many))
    assert len(scan(write_zip(tmp_path / "c.zip", {"a/1.png": bytes(1 << 16)}))) == 1  # small enough to do no harm
    monkeypatch.setattr(archives, "MAX_BYTES", 100)
    assert "would expand to 101 bytes; the limit is 100" in refusal(
        write_tar(tmp_path / "a.tar", {"a/1.png": bytes(101)})
    )


def test_a_declared_size_that_no_archive_can_hold(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"a/1.png": b"x" * 77})
    data = path.read_bytes()
    head, directory = data[: data.rindex(b"PK\1\2")], data[data.rindex(b"PK\1\2") :]
    path.write_bytes(head + directory.replace(struct.pack("<I", 77), struct.pack("<I", 0xFFFFFFF0)))
    assert "would expand to 4294967280 bytes; the limit is 1073741824" in refusal(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.bz2", "a.tar.xz"])
def test_a_bomb_of_a_compressed_tar_ends_at_the_limit(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(archives, "FREE_TOTAL", 1 << 20)
    path = write_tar(tmp_path / name, {"a/1.png": bytes(8 << 20)})
    message = refusal(path)
    assert "expands from" in message
    assert "as bombs do" in message
    assert listing(cache) == ["archives"]


def test_members_that_share_their_data(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"a/1.png": b"x" * 99, "a/2.png": b"x" * 99}, zipfile.ZIP_STORED)
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("a/2.png").header_offset
    data = path.read_bytes()
    place = data.rindex(struct.pack("<I", offset) + b"a/2.png")
    path.write_bytes(data[:place] + bytes(4) + data[place + 4 :])
    assert "overlaps another member" in refusal(path)
    beyond = struct.pack("<I", len(data) - 50)
    path.write_bytes(data[:place] + beyond + data[place + 4 :])
    assert "overlaps another member, or extends beyond the end of the archive" in refusal(path)


def test_a_tar_header_that_asks_for_much_or_goes_back(tmp_path: Path) -> None:
    long = tarfile.TarInfo("x")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 5 << 20
    path = tmp_path / "a.tar"
    path.write_bytes(long.tobuf() + bytes(6 << 20))
    assert "a header claims to have 5242880 bytes" in refusal(path)
    back = tarfile.TarInfo("a/1.png")
    back.size = 1
    buffer = bytearray(back.tobuf(tarfile.GNU_FORMAT))
    buffer[124:136] = b"\xff" * 10 + struct.pack(">h", -1024)  # base 256, as GNU writes large and negative sizes
    buffer[148:156] = b"%06o\0 " % (256 + sum(buffer[:148]) + sum(buffer[156:512]))
    path.write_bytes(bytes(buffer) + bytes(1024))
    assert "does not lie after the previous member" in refusal(path)


# --- damage -----------------------------------------------------------------------------------------------


def test_encrypted_and_unusual_members(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", FILES)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    assert "is encrypted" in refusal(path)
    assert "compressed with method 14; expected stored (0) or deflated (8)" in refusal(
        write_zip(tmp_path / "b.zip", FILES, zipfile.ZIP_LZMA)
    )


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8])
def test_a_cut_archive(tmp_path: Path, cache: Path, name: str, share: float) -> None:
    path = WRITERS[name](tmp_path / name, {f"a/{number}.png": os.urandom(2000) for number in range(10)})
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    message = refusal(path)
    assert "cannot be read as a" in message
    assert "Download or pack it again, or give the unpacked folder" in message
    assert not [entry for entry in listing(cache) if entry.startswith("archives/")]


def test_a_tar_cut_or_damaged_between_members(tmp_path: Path) -> None:
    """tarfile takes both for the end."""
    path = tmp_path / "a.tar"
    data = tar_bytes({"a/1.png": bytes(512), "b/1.png": bytes(512)})
    path.write_bytes(data[:1024])
    assert "no end mark at byte 1024" in refusal(path)
    path.write_bytes(data[:1024] + b"?" + data[1025:])
    assert "no end mark at byte 1024" in refusal(path)


def test_tars_that_were_joined_by_cat_are_refused_not_read_in_half(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", pictures(f"cat/{number}.png"))
    (tmp_path / "both.tar").write_bytes(b"".join((tmp_path / f"{number}.tar").read_bytes() for number in range(2)))
    with pytest.raises(
        SourceError, match=r"both\.tar holds another tar after its end mark at byte \d+, as cat joins them"
    ):
        scan(tmp_path / "both.tar")
    (tmp_path / "both.tar").write_bytes((tmp_path / "0.tar").read_bytes() + bytes(5000) + b"signed by me" * 90)
    assert contents(scan(tmp_path / "both.tar")) == pictures("cat/0.png")


def test_files_that_only_look_like_archives(tmp_path: Path) -> None:
    for name in ("a.zip", "b.tar", "c.tar.gz", "d.npz"):
        (tmp_path / name).write_bytes(b"<html>not found</html>" * 100)
        assert "another kind of file, truncated or damaged" in refusal(tmp_path / name)
    assert "holds no images: 1 folder was" in refusal(write_zip(tmp_path / "e.zip", {}))


@pytest.mark.slow
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_one_damaged_member_is_set_aside_and_the_others_are_right(tmp_path: Path, method: int) -> None:
    path = write_zip(tmp_path / "a.zip", FILES, method)
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("cat/2.png")
    data = bytearray(path.read_bytes())
    data[entry.header_offset + 30 + len("cat/2.png") + entry.compress_size // 2] ^= 0x55
    path.write_bytes(data)
    images = scan(path)
    with pytest.raises(UnreadableImageError) as caught:
        images.read(1)
    assert caught.value.reason == "unreadable"
    assert f"cat/2.png in {path}" in caught.value.detail
    result = extract(path, tmp_path / "f.h5", max_unreadable=0.5)
    assert (result.store.quarantine.paths, result.store.quarantine.reasons) == (("cat/2.png",), ("unreadable",))
    folder = write_folder(tmp_path / "folder", {name: png for name, png in FILES.items() if name != "cat/2.png"})
    assert_same_store(result, extract(folder, tmp_path / "g.h5"))


def test_a_member_that_ends_early_or_lies_elsewhere(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", FILES)
    data = path.read_bytes()
    place = data.rindex(b"PK\1\2")
    sizes = data[place + 20 : place + 28]
    stored, size = struct.unpack("<2I", sizes)
    path.write_bytes(data[: place + 20] + struct.pack("<2I", stored, size + 9) + data[place + 28 :])
    with pytest.raises(UnreadableImageError) as caught:
        scan(path).read(3)
    assert caught.value.reason == "truncated"
    path.write_bytes(b"XX" + data[2:])
    with pytest.raises(UnreadableImageError, match="no member begins at the listed offset") as caught:
        scan(path).read(0)
    assert caught.value.reason == "unreadable"


@pytest.mark.slow
def test_any_damaged_byte_is_refused_or_set_aside(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    for name in ("a.zip", "a.tar"):
        path = WRITERS[name](tmp_path / name, FILES)
        whole = path.read_bytes()
        for place in generator.integers(0, len(whole), 150):
            data = bytearray(whole)
            data[place] ^= 1 << int(generator.integers(8))
            path.write_bytes(data)
            try:
                images = scan(path)
            except SourceError:
                continue
            for index in range(len(images)):
                try:
                    read = images.read(index)
                except UnreadableImageError:
                    continue
                assert name != "a.zip" or read in FILES.values()  # a tar has no checksums of its data


def test_no_room_for_the_expanded_copy(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file, not a folder")
    message = refusal(write_tar(tmp_path / "a.tar.gz", FILES))
    assert "cannot be expanded into" in message
    assert "set BOTTLENECK_CACHE to a folder with enough space" in message


# --- npz --------------------------------------------------------------------------------------------------


def write_npz(path: Path, **content: Any) -> Path:
    np.savez_compressed(path, **content)
    return path


def digits(count: int = 6, size: tuple[int, ...] = (5, 4, 3), start: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.stack([pixels(start + number, size) for number in range(count)]), "y": np.arange(count) % 3}


@pytest.mark.parametrize("size", [(5, 4), (5, 4, 1), (5, 4, 3), (160, 160, 3)])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_gives_exactly_its_pixels(tmp_path: Path, size: tuple[int, ...], save: Callable[..., None]) -> None:
    train, test = digits(6, size), digits(2, size, start=50)
    save(
        tmp_path / "a.npz",
        x_train=np.asfortranarray(train["x"]),
        y_train=train["y"][:, None],
        x_test=test["x"],
        y_test=test["y"].astype(np.uint8),
    )
    images = scan(tmp_path / "a.npz")
    assert images.paths == (*(f"test/{row:06d}" for row in range(2)), *(f"train/{row:06d}" for row in range(6)))
    assert images.classes == ("0", "1", "2")
    assert images.labels.tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    assert images.given_splits.tolist() == [2] * 2 + [0] * 6
    data = [images.read(index) for index in range(8)]
    assert [len(png) for png in data] == images.sizes.tolist()
    assert images.mtimes_ns.tolist() == [(tmp_path / "a.npz").stat().st_mtime_ns] * 8
    for png, expected in zip(data, [*test["x"], *train["x"]], strict=True):
        rgb = np.broadcast_to(
            expected if expected.shape[2:] == (3,) else expected.reshape(*size[:2], 1), (*size[:2], 3)
        )
        np.testing.assert_array_equal(decode_image(png, PixelRule(size[0], size[1])).pixels, rgb)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), rgb)
    assert contents(scan(tmp_path / "a.npz")) == dict(zip(images.paths, data, strict=True))


# Other bytes would change the splits of all users' arrays.
def test_the_bytes_of_a_plain_png_are_frozen() -> None:
    ramp = np.arange(300 * 300 * 3).astype(np.uint8).reshape(300, 300, 3)
    assert (
        hashlib.sha256(plain_png(ramp)).hexdigest()
        == "2fa38e7b590a3328ec5ca1d0d4eb91078584611fa3836658b008300312da500d"
    )
    assert (
        hashlib.sha256(plain_png(ramp[:9, :7, 0])).hexdigest()
        == "1702eb7f09ad8123173caffd4c29ee8630ebd56d7730260b9cbd7585a003f615"
    )
    for shape in [(1, 1), (1, 65534), (2, 65534), (255, 256), (256, 255)]:  # about the block of 65535 bytes
        values = pixels(1, shape)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(plain_png(values)))), values)
        assert len(plain_png(values)) == png_size((1, *shape))


def test_npz_classes_sort_as_numbers(tmp_path: Path) -> None:
    labels = np.array([100, 3, 20, -1, 0, 7])
    images = scan(write_npz(tmp_path / "a.npz", x_train=digits()["x"], y_train=labels))
    assert images.classes == ("000", "003", "007", "020", "100")
    assert images.labels.tolist() == [4, 1, 3, -1, 0, 2]
    assert images.given_splits.tolist() == [0, 0, 0, 3, 0, 0]
    hundred = scan(write_npz(tmp_path / "b.npz", x_train=np.zeros((100, 2, 2), np.uint8), y_train=np.arange(100)))
    assert hundred.labels.tolist() == list(range(100))  # as in CIFAR-100: the label is the number


@pytest.mark.parametrize("word", ["val", "validation"])
def test_npz_validation_and_unlabelled_test(tmp_path: Path, word: str, caplog: pytest.LogCaptureFixture) -> None:
    content = {"x_train": digits()["x"], "y_train": digits()["y"], "x_test": digits(2)["x"], "names": np.array(["a"])}
    images = scan(write_npz(tmp_path / "a.npz", **content, **{f"x_{word}": digits(1)["x"], f"y_{word}": np.array([2])}))
    assert images.paths[-1] == "validation/000000"
    assert images.given_splits.tolist() == [3] * 2 + [0] * 6 + [1]
    assert images.labels.tolist() == [-1, -1, 0, 1, 2, 0, 1, 2, 2]
    assert "arrays of other names are left out: 'names'" in caplog.text


X, Y = digits()["x"], digits()["y"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": X, "labels": Y}, "holds 'images', 'labels'; expected x_train, y_train"),
        ({"x_train": X}, "'x_train' has no matching array 'y_train'; only x_test may lack labels"),
        ({"y_train": Y}, "'y_train' has no matching array 'x_train'"),
        ({"x_train": X[:0], "y_train": Y[:0]}, "holds no images"),
        ({"x_train": X / 255, "y_train": Y}, "'x_train' is float64 (6, 5, 4, 3); expected uint8, 0-255, (n, h, w) or"),
        ({"x_train": X / 255, "y_train": Y}, "scale it by 255 and round"),
        ({"x_train": X.astype(np.int32), "y_train": Y}, "'x_train' is int32"),
        ({"x_train": X.transpose(0, 3, 1, 2), "y_train": Y}, "channels go last"),
        ({"x_train": X[..., :2], "y_train": Y}, "'x_train' is uint8 (6, 5, 4, 2)"),
        ({"x_train": X.reshape(6, -1), "y_train": Y}, "'x_train' is uint8 (6, 60)"),
        ({"x_train": np.uint8(1), "y_train": Y}, "'x_train' is uint8 ()"),
        ({"x_train": X[:, :0], "y_train": Y}, "its images have no pixels"),
        ({"x_train": X, "y_train": Y[:5]}, "'y_train' is int64 (5,); expected whole numbers, (6,) or (6, 1)"),
        ({"x_train": X, "y_train": np.eye(3)[Y]}, "if it is one-hot, save y_train.argmax(1)"),
        ({"x_train": X, "y_train": Y * 1.0}, "'y_train' is float64 (6,)"),
        ({"x_train": X, "y_train": Y.astype(str)}, "expected whole numbers"),
        ({"x_train": X, "y_train": Y - 2}, "'y_train' holds the label -2; expected 0 or more, or -1"),
        ({"x_train": X, "y_train": Y, "x_val": X, "y_val": Y, "x_validation": X, "y_validation": Y}, "beside 'x_val'"),
        ({"x_train": X.view([("a", "u1")])[..., 0], "y_train": Y}, "'x_train' is [('a', 'u1')]"),
    ],
)
def test_npz_errors(tmp_path: Path, content: Mapping[str, np.ndarray], message: str) -> None:
    assert message in refusal(write_npz(tmp_path / "a.npz", **content))


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_npz_never_unpickles(tmp_path: Path) -> None:
    trap = np.array([Trap(tmp_path / "sprung")] * 6, dtype=object)
    for content in ({"x_train": trap, "y_train": Y}, {"x_train": X, "y_train": trap}):
        assert "holds Python objects, which are never unpickled" in refusal(write_npz(tmp_path / "a.npz", **content))
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x_train.npy", pickle.dumps(Trap(tmp_path / "sprung")))
        archive.writestr("y_train.npy", b"")
    assert "'x_train' has no valid header" in refusal(tmp_path / "b.npz")
    scan(write_npz(tmp_path / "c.npz", x_train=X, y_train=Y, other=trap))  # not even looked at
    assert not (tmp_path / "sprung").exists()


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 1000, 1000)}"), "10"),
        (
            npy("{'descr': '|u1', 'fortran_order': False, 'shape': (4294967296, 4294967296, 1)}"),
            "18446744073709551616 bytes",
        ),
        (
            npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -1, 3)}", b"abc"),
            "is declared as uint8 (-1, -1, 3)",
        ),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 1)}", b"ab"), "is declared as uint8 (1, 1, 1)"),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, True)}", b"a"), ""),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 1)}", b"a"), "Python objects"),
        (npy("{'descr': '|u1', 'shape': (1, 1, 1)}", b"a"), "has no valid header"),
        (npy("__import__('os').mkdir('sprung')"), "has no valid header"),
        (npy("(" * 9000), "has no valid header"),
        (npy(" " * 20000), "has no valid header"),
        (b"\x93NUMPY\3\0" + npy("{}")[8:], "version other than 1.0 or 2.0"),
        (b"\x93NUMPY\2\0\xff\xff\xff\xff{}", "has no valid header"),
        (b"", "has no valid header"),
    ],
)
def test_npz_headers_are_not_believed(tmp_path: Path, member: bytes, message: str) -> None:
    path = write_zip(tmp_path / "a.npz", {"x_test.npy": member})
    if not message:
        assert len(scan(path)) == 1
        return
    received = refusal(path)
    assert "'x_test'" in received
    assert message in received


def test_a_damaged_npz_is_an_error_not_an_image(tmp_path: Path) -> None:
    images = digits(400)  # more than is read for the header
    np.savez(tmp_path / "a.npz", x_train=images["x"], y_train=images["y"])
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[data.index(images["x"][3].tobytes())] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    scanned = scan(tmp_path / "a.npz")
    with pytest.raises(SourceError, match=r"a\.npz is damaged: x_train\.npy .*CRC-32\. Download or save it again"):
        scanned.read(0)


# --- stage one --------------------------------------------------------------------------------------------


class MeanNetwork:
    """Channel means, and how many images were asked for."""

    backbone_argument, weights_argument, row_bytes = "numpy", "none", 12
    license: str | None = None

    def __init__(self) -> None:
        self.recipes, self.inferred = (recipe(),), 0

    def engine(self, recipes: Sequence[Recipe], *, batch_size: int, device: str) -> Callable[..., Any]:
        def infer(batch: np.ndarray) -> Mapping[str, np.ndarray]:
            self.inferred += len(batch)
            return numpy_network(batch)

        return as_engine(infer)


def extract(source: Path, out: Path, network: MeanNetwork | None = None, **options: Any) -> ExtractionResult:
    options = {"batch_size": 4, "shard_rows": 16, "workers": 3, **options}
    asked = ExtractionOptions(**options)  # type: ignore[arg-type]
    return Extraction(scan(source), network or MeanNetwork(), out, asked).run()  # type: ignore[arg-type]


def rows(result: ExtractionResult) -> dict[bytes, tuple[str, int, tuple[float, ...]]]:
    """Class, split and features by content."""
    store = result.store
    table, features = store.images, store.array("last.avg")[:, 0]
    return {
        table.sha256[row].tobytes(): (store.classes[table.labels[row]], int(table.splits[row]), tuple(features[row]))
        for row in range(len(store))
    }


def assert_same_store(first: ExtractionResult, second: ExtractionResult) -> None:
    assert first.store.classes == second.store.classes
    assert rows(first) == rows(second)


@pytest.fixture(scope="module")
def folder_store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExtractionResult]:
    """A folder of two splits, and the store of its images."""
    place = tmp_path_factory.mktemp("splits")
    train = {f"train/{row % 2}/{row:06d}.png": plain_png(pixels(row)) for row in range(20)}
    test = {f"test/{row % 2}/{row:06d}.png": plain_png(pixels(100 + row)) for row in range(9)}
    folder = write_folder(place / "folder", train | test)
    return folder, extract(folder, place / "folder.h5")


def as_npz(folder: Path, path: Path) -> Path:
    content = {}
    for split, count, start in (("train", 20, 0), ("test", 9, 100)):
        content[f"x_{split}"] = np.stack([pixels(start + row) for row in range(count)])
        content[f"y_{split}"] = np.arange(count) % 2
    return write_npz(path, **content)


def as_archive(folder: Path, path: Path) -> Path:
    files = {f"data/{name}": (folder / name).read_bytes() for name in listing(folder) if name.endswith(".png")}
    return WRITERS[path.name](path, files)


def as_manifest(folder: Path, path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    names = [name for name in listing(folder) if name.endswith(".png")]
    parts = [name.split("/") for name in names]
    columns = {
        "path": [f"{folder}/{name}" for name in names],
        "label": [int(part[1]) for part in parts],
        "split": [part[0] for part in parts],
    }
    parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.zip", as_archive),
        ("a.tar.gz", as_archive),
        ("a.npz", as_npz),
        ("images.parquet", as_manifest),
    ],
)
def test_stage_one_gives_the_same_rows_from_every_source(
    tmp_path: Path, folder_store: tuple[Path, ExtractionResult], name: str, make: Callable[[Path, Path], Path]
) -> None:
    folder, expected = folder_store
    assert sorted(split for _, split, _ in rows(expected).values()) == [0] * 20 + [2] * 9
    source = make(folder, tmp_path / name)
    network = MeanNetwork()
    result = extract(source, tmp_path / "f.h5", network)
    assert network.inferred == 29
    assert_same_store(result, expected)
    for digest, (_, _, features) in rows(result).items():
        number = next(n for n in range(109) if hashlib.sha256(plain_png(pixels(n))).digest() == digest)
        np.testing.assert_allclose(features, pixels(number).mean(axis=(0, 1)), rtol=1e-6)
    again = extract(source, tmp_path / "f.h5", network)
    assert (network.inferred, again.written, again.counts["cached"]) == (29, False, 29)
    # the same images from another source, and the same archive made anew, are read and not inferred
    shutil.copy(expected.store.path, tmp_path / "folder.h5")
    moved = extract(source, tmp_path / "folder.h5", network)
    assert network.inferred == 29
    assert_same_store(moved, expected)


@pytest.mark.slow
def test_an_archive_made_anew_costs_only_its_new_images(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", FILES)
    extract(path, tmp_path / "f.h5")
    write_zip(path, FILES | {"cow/1.png": plain_png(pixels(77))})
    os.utime(path, ns=(0, 10**18))
    network = MeanNetwork()
    result = extract(path, tmp_path / "f.h5", network)
    assert (network.inferred, len(result.store), result.store.classes) == (1, 5, ("cat", "cow", "dog"))
    folder = write_folder(tmp_path / "folder", FILES | {"cow/1.png": plain_png(pixels(77))})
    assert_same_store(result, extract(folder, tmp_path / "g.h5"))
