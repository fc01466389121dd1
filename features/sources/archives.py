"""Read zip and tar archives in place: every member is checked before any is read, and none is extracted to a file.

    archive --open_archive()--> Archive.members (path -> Member) --Archive.read(path)--> bytes

``zipfile`` and ``tarfile`` only list the members. Every read opens the file again, so many threads may read at the same
time. A tar is listed once: see ``tarindex``. A compressed tar has no random access: it is expanded into the cache folder
once, within limits.
"""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import logging
import lzma
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from features.cache import cache_path, signed_file, write_signed
from features.canonical import canonical_json
from features.errors import SourceError, StoreError, UnreadableImageError
from features.files import file_digest, whole_file
from features.pixels.limits import MAX_BYTES
from features.scratch import Growing
from features.sources import tarindex
from features.sources.blocks import File, Status, on_disk
from features.sources.folders import File as ImageFile
from features.sources.tarindex import Index, Trust
from features.temporary import sweep_dead
from features.texts import GrowingTexts, Lookup, Texts, key_of, keys_of

logger = logging.getLogger(__name__)

_EXPANDERS: dict[str, Callable[[Any], Any]] = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}
TAR_SUFFIXES = (".tar", *(f".{tar}{kind}" for kind in _EXPANDERS for tar in ("tar.", "t")))
ARCHIVE_SUFFIXES = (".zip", *TAR_SUFFIXES)

# Limits against archive bombs: images hardly compress, while deflate reaches a ratio of 1030. Members and archives that
# expand to no more than FREE_MEMBER and FREE_TOTAL bytes do no harm.
MAX_RATIO = 200
FREE_MEMBER, FREE_TOTAL = 16 << 20, 256 << 20

_ENCRYPTED_OR_PATCHED = 0x1 | 0x20 | 0x40 | 0x2000  # APPNOTE 6.3.10, 4.4.4
_UTF8_NAME = 0x800
_WINDOWS = 0
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_TAR_BLOCK = 512
_CHUNK = 1 << 20
TEXT_ENDINGS = ("cls", "json", "txt")  # of members of a tar that hold labels; they are read when it is listed
_TEXT_BYTES = 1 << 16  # if they have no more
_TEXTS = tuple(f".{ending}" for ending in TEXT_ENDINGS)
# Exceptions of listing or expanding hostile bytes. RecursionError: tarfile follows chains of long names recursively.
# fmt: off
_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, OSError, EOFError, ValueError,
    LookupError, OverflowError, NotImplementedError, RecursionError, MemoryError,
)
# fmt: on


class Member(NamedTuple):
    """One file of an archive."""

    size: int  # bytes, when expanded
    offset: int  # of the data in the file that is read; in a zip, of the local header before them
    stored: int  # bytes that it takes up there
    crc: int | None = None  # CRC-32 of the data; a tar has none
    deflated: bool = False


class Members(Mapping[str, Member]):
    """The files of an archive by path, in its order; it takes some 50 bytes for each, in a file.

    Parameters
    ----------
    paths : Texts
        Their paths, with ``/`` between folders.
    numbers : int64, (n, 5)
        The fields of ``Member``; a CRC of -1 stands for none.
    """

    def __init__(self, paths: Texts, numbers: np.ndarray) -> None:
        self.paths, self.numbers = paths, numbers

    @functools.cached_property
    def _lookup(self) -> Lookup:
        return Lookup(keys_of(self.paths, len(self.paths)))

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __getitem__(self, path: str) -> Member:
        if (row := self._lookup.row(key_of(path))) < 0:
            raise KeyError(path)
        return self.at(row)

    def at(self, row: int) -> Member:
        """Return the member of one row."""
        size, offset, stored, crc, deflated = self.numbers[row].tolist()
        return Member(size, offset, stored, None if crc < 0 else crc, bool(deflated))

    def repeated(self) -> str | None:
        """Return the first path that occurs a second time; None if there is none."""
        rows = self._lookup.repeated()
        return self.paths[int(rows[0])] if len(rows) else None


@dataclasses.dataclass(frozen=True, eq=False)
class Archive:
    """An archive whose members have been listed and checked.

    Parameters
    ----------
    path : Path or InBucket
        The archive, for messages.
    file : Path or InBucket
        The file that is read: the archive itself, or its expanded copy in the cache.
    state : tuple of int
        Size in bytes and modification time in nanoseconds of ``file`` before its members were listed.
    members : Members
        Members by path; a path is never absolute and never contains ``..``.
    folders : list of str
        Folders that the archive lists.
    status : os.stat_result or Status
        What was said of ``path`` before anything of it was read.
    index : Index, optional
        Of a tar: the members with the bytes of the small texts among them.
    """

    path: File
    file: File
    state: tuple[int, int]
    members: Members
    folders: list[str]
    status: os.stat_result | Status
    index: Index | None = None

    def read(self, path: str, limit: int | None = None) -> bytes:
        """Return the bytes of a member, or its first ``limit`` bytes; may be called from many threads.

        Raises
        ------
        UnreadableImageError
            If this member is damaged; the reason is ``truncated`` or ``unreadable``.
        SourceError
            If the archive has been changed or removed since it was listed.
        """
        return self.read_member(path, self.members[path], limit)

    def read_row(self, row: int) -> bytes:
        """Do as ``read``, for the member of one row."""
        text = None if self.index is None else self.index.text(row)
        return self.read_member(self.members.paths[row], self.members.at(row)) if text is None else text

    def read_member(self, path: str, member: Member, limit: int | None = None) -> bytes:
        """Do as ``read``, for a member that has been looked up."""
        wanted = member.size if limit is None else min(limit, member.size)
        try:
            with self.file.open("rb") as stream:
                if _state(self.file.stat()) != self.state:
                    raise SourceError(f"{self.file} has been changed since its members were listed; run again")
                data = _member_data(stream, member, wanted)
        except FileNotFoundError as error:
            raise SourceError(
                f"{self.file} has been removed since its members were listed; put it back and run again"
            ) from error
        except (OSError, zlib.error, struct.error) as error:
            raise UnreadableImageError("unreadable", f"{path} in {self.path}: {error}") from error
        if len(data) < wanted:
            raise UnreadableImageError(
                "truncated", f"{path} in {self.path}: received {len(data)} bytes, expected the {member.size} listed"
            )
        if member.crc is not None and wanted == member.size and zlib.crc32(data) != member.crc:
            raise UnreadableImageError("unreadable", f"{path} in {self.path}: the data do not match their CRC-32")
        return data


def _state(status: os.stat_result | Status) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _member_data(stream: BinaryIO, member: Member, wanted: int) -> bytes:
    stream.seek(member.offset)
    if member.crc is not None:
        signature, *_, name_length, extra_length = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
        if signature != b"PK\3\4":
            raise struct.error("no member begins at the listed offset")
        stream.seek(name_length + extra_length, os.SEEK_CUR)
    if not member.deflated:
        return stream.read(wanted)
    # A byte takes at most 15 bits when compressed, so the beginning of a member needs only the beginning of these data.
    data = stream.read(min(member.stored, 2 * wanted + _CHUNK))
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, wanted) if wanted else b""


def open_archive(path: File, trust: Trust = "notes") -> Archive:
    """List the members of a zip or tar archive, as its suffix says; a compressed tar is expanded into the cache.

    Parameters
    ----------
    path : Path or InBucket
        The archive; in a bucket a tar.
    trust : {"notes", "times", "nothing"}
        When the list and the expanded copy of before are used: if the archive has the inode, times and size noted; if it
        has the modification time and size noted; or never.

    Raises
    ------
    SourceError
        If the file is damaged or is not such an archive, or if a member has an absolute path or one with ``..``, is a
        link or a device, occurs twice, is encrypted, exceeds the limits or is compressed like a bomb.
    """
    kind = "zip" if path.name.lower().endswith(".zip") else "tar"
    with _reading(path, f"{kind} archive"):
        status = path.stat()  # before anything is read: what is noted of other bytes is then not believed
    return dataclasses.replace(_opened(path, trust), status=status)


def _opened(path: File, trust: Trust) -> Archive:
    name = path.name.lower()
    if (path_on_disk := on_disk(path)) is not None and name.endswith(".zip"):
        return open_zip(path_on_disk)
    with _reading(path, "tar archive"):
        place = tarindex.place_of(path)
    expand = next((function for kind, function in _EXPANDERS.items() if name.endswith(kind)), None)
    if expand is None:
        return _open_tar(path, path, place, trust)
    copy = _expanded(path, expand, trust)
    try:
        return _open_tar(path, copy, place, trust)
    except SourceError:
        for file in (_note_of(copy), copy):
            file.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _reading(path: File, kind: str) -> Iterator[None]:
    """Turn an error of a library that reads the archive into a ``SourceError``."""
    try:
        yield
    except (SourceError, StoreError):
        raise
    except _DAMAGE as error:
        raise SourceError(
            f"{path} cannot be read as a {kind} ({error or type(error).__name__}): it is another kind of file, "
            "truncated or damaged. Download or pack it again, or give the unpacked folder."
        ) from error


class _Listing:
    """The members listed so far; each is checked when it is added."""

    def __init__(self, path: File, file: File, member_limit: int) -> None:
        self._path, self._file, self._state = path, file, _state(file.stat())
        self._paths, self._numbers, self._folders = GrowingTexts(), Growing("<i8", (5,)), list[str]()
        self._rows, self._texts, self._is_room = Growing("<i8"), GrowingTexts(), True
        self._member_limit, self._total = member_limit, 0
        self._total_limit = max(FREE_TOTAL, MAX_RATIO * self._state[0])

    def archive(self) -> Archive:
        members = Members(self._paths.texts(), self._numbers.array())
        if (twice := members.repeated()) is not None:
            self.refuse(twice, "occurs twice")
        index = Index(members.paths, members.numbers, *self._small(), self._folders)
        return Archive(self._path, self._file, self._state, members, self._folders, self._path.stat(), index)

    def _small(self) -> tuple[np.ndarray, Texts]:
        with contextlib.suppress(OSError):
            if self._is_room:
                return self._rows.array(), self._texts.texts()
        return np.empty(0, np.int64), Texts.of(())

    def refuse(self, name: str, problem: str) -> NoReturn:
        raise SourceError(f"{self._path}: the member {name!r} {problem}. Unpack it with care, and give the folder.")

    def add(self, name: str, member: Member) -> None:
        path = self._checked(name)
        if not path:
            self.refuse(name, "has no name")
        if member.size > self._member_limit:
            self.refuse(name, f"would expand to {member.size} bytes; the limit is {self._member_limit}")
        if member.size > max(FREE_MEMBER, MAX_RATIO * member.stored):
            self.refuse(name, f"would expand from {member.stored} to {member.size} bytes, as bombs do, not images")
        if max(member[:3]) >= 1 << 62:
            self.refuse(name, "lies outside the archive")
        self._total += member.size
        if self._total > self._total_limit:
            self.refuse(name, f"and those before it would expand to more than {self._total_limit} bytes, as bombs do")
        self._paths.append(path)
        self._numbers.append((*member[:3], -1 if member.crc is None else member.crc, member.deflated))

    def add_text(self, data: bytes) -> None:
        """Keep the bytes of the member that was added last; on a full disk none are kept, and all are read when needed."""
        if not self._is_room:
            return
        try:
            self._rows.append(len(self._numbers) - 1)
            self._texts.append(data.decode("utf-8", "surrogateescape"))
        except OSError:
            self._is_room = False

    def add_folder(self, name: str) -> None:
        if path := self._checked(name):
            self._folders.append(path)

    def _checked(self, name: str) -> str:
        if "\0" in name:
            self.refuse(name, "has a NUL character in its name")
        if re.match(r"[/\\]|[A-Za-z]:", name):
            self.refuse(name, "has an absolute path")
        if ".." in re.split(r"[/\\]", name):
            self.refuse(name, "leaves its folder with '..'")
        return "/".join(part for part in name.split("/") if part not in ("", "."))


# --- zip --------------------------------------------------------------------------------------------------


def open_zip(path: Path, *, member_limit: int = MAX_BYTES) -> Archive:
    """List a zip file and check every member; see ``open_archive``.

    Parameters
    ----------
    path : Path
        The file.
    member_limit : int
        Largest size of an expanded member, in bytes.
    """
    with _reading(path, "zip archive"):
        listing = _Listing(path, path, member_limit)
        with zipfile.ZipFile(path) as archive:
            infos, end = archive.infolist(), archive.start_dir
    for info in infos:
        name = _zip_name(info)
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            listing.refuse(name, "is a link or a device; expected files and folders")
        if name.endswith("/"):
            listing.add_folder(name)
            continue
        if info.flag_bits & _ENCRYPTED_OR_PATCHED:
            listing.refuse(name, "is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            listing.refuse(name, f"is compressed with method {info.compress_type}; expected stored (0) or deflated (8)")
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        if not deflated and info.compress_size != info.file_size:
            listing.refuse(name, f"is not compressed, but has two sizes, {info.compress_size} and {info.file_size}")
        listing.add(name, Member(info.file_size, info.header_offset, info.compress_size, info.CRC, deflated))
    # Members that share their data are the other kind of bomb.
    infos.sort(key=lambda info: info.header_offset)
    starts = [info.header_offset for info in infos]
    for info, following in zip(infos, [*starts, end][1:], strict=True):
        if info.header_offset < 0 or info.header_offset + _LOCAL_HEADER.size + info.compress_size > following:
            listing.refuse(_zip_name(info), "overlaps another member, or extends beyond the end of the archive")
    return listing.archive()


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Return the whole name of a member. Many writers use UTF-8 without setting its flag; else it is code page 437."""
    name = info.orig_filename  # ``filename`` ends at the first NUL
    if not info.flag_bits & _UTF8_NAME:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/") if info.create_system == _WINDOWS else name


# --- tar --------------------------------------------------------------------------------------------------


class _Headers:
    """The stream from which tarfile reads headers. It refuses huge ones, which tarfile would otherwise believe."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.seek, self.tell = stream, stream.seek, stream.tell

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _CHUNK:
            raise tarfile.ReadError(f"a header claims to have {count} bytes")
        return self._stream.read(count)


def _open_tar(path: File, file: File, place: Path | None, trust: Trust) -> Archive:
    """Return what a tar holds, as it was listed before or as it is listed now.

    ``file`` is the tar or its expanded copy, and ``place`` that of its index, found before the copy was made.
    """
    with _reading(path, "tar archive"):
        state = _state(file.stat())
        if tarindex.place_of(path) != place:  # it is being changed: neither list is that of the file
            place = None
    if place is not None and (index := tarindex.kept(place, trust)) is not None:
        return Archive(path, file, state, Members(index.paths, index.numbers), index.folders, path.stat(), index)
    archive = _listed(path, file)
    if place is not None and archive.index is not None and tarindex.place_of(path) == place:
        tarindex.keep(place, archive.index)
        if (index := tarindex.kept(place, "notes")) is not None:  # in a file, so it takes less memory
            return dataclasses.replace(archive, members=Members(index.paths, index.numbers), index=index)
    return archive


def _listed(path: File, file: File) -> Archive:
    # The encoding of names must not depend on the locale.
    options: dict[str, Any] = {"mode": "r:", "encoding": "utf-8", "errors": "surrogateescape"}
    with _reading(path, "tar archive"), file.open("rb") if isinstance(file, Path) else file.open_once() as stream:
        listing = _Listing(path, file, MAX_BYTES)
        with tarfile.open(fileobj=_Headers(stream), **options) as archive:  # type: ignore[call-overload]
            last = -1
            while (info := archive.next()) is not None:
                archive.members.clear()  # otherwise tarfile keeps all of them in memory
                if info.offset_data <= last or info.size < 0:
                    listing.refuse(info.name, "does not lie after the previous member")
                last = info.offset_data
                if info.isdir():
                    listing.add_folder(info.name)
                elif info.isreg() and not info.issparse():
                    listing.add(info.name, Member(info.size, info.offset_data, info.size))
                    if info.size <= _TEXT_BYTES and info.name.lower().endswith(_TEXTS):
                        stream.seek(info.offset_data)
                        if len(data := stream.read(info.size)) == info.size:
                            listing.add_text(data)
                else:
                    listing.refuse(info.name, "is a link, a device or a sparse file; expected files and folders")
            stream.seek(archive.offset)
            if stream.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):  # tarfile mistakes a damaged header for the end
                raise tarfile.ReadError(f"no end mark at byte {archive.offset}")
            rest = stream.read(_CHUNK)
            start = (len(rest) - len(rest.lstrip(b"\0"))) // _TAR_BLOCK * _TAR_BLOCK
            if rest[start + 257 : start + 262] == b"ustar":
                raise SourceError(
                    f"{path} holds another tar after its end mark at byte {archive.offset}, as cat joins them. Give the tars as files "
                    "of their own, or join them with tar --concatenate"
                )
    return listing.archive()


def _expanded(path: File, expand: Callable[[Any], Any], trust: Trust) -> Path:
    """Return the expanded copy of a tar in the cache; it is made if it is missing or damaged or the archive has changed."""
    status = path.stat()
    copy = tarindex.trusted(cache_path("archives", f"{tarindex.name_of(path, status)}.tar"), trust)
    if trust != "nothing" and _is_whole(copy):
        return copy
    logger.info("%s: expanding into %s", path, copy)
    try:
        sweep_dead(copy.parent)
        tarindex.drop_others(copy)
        _expand(path, expand, copy, status)
    except OSError as error:
        raise SourceError(
            f"{path} cannot be expanded into {copy.parent} ({error.strerror or error}); unpack it yourself and give the "
            "folder, or set BOTTLENECK_CACHE to a folder with enough space"
        ) from error
    return copy


def _expand(path: File, expand: Callable[[Any], Any], copy: Path, status: os.stat_result | Status) -> None:
    limit, digest = max(FREE_TOTAL, MAX_RATIO * status.st_size), hashlib.sha256()
    with whole_file(copy) as out:
        for chunk in _chunks(path, expand):
            if out.tell() + len(chunk) > limit:
                raise SourceError(
                    f"{path} expands from {status.st_size} to more than {limit} bytes, as bombs do, not images. "
                    "Unpack it with care, and give the folder."
                )
            out.write(chunk)
            digest.update(chunk)
        out.flush()
        os.utime(out.fileno(), ns=(status.st_mtime_ns,) * 2)  # so that two processes make identical copies
    try:
        _write_note(copy, digest.hexdigest())
    except OSError:  # without its note it would take up room for nothing
        copy.unlink(missing_ok=True)
        raise


def _note_of(copy: Path) -> Path:
    """Return the path of the note on a copy: its digest, and the stamp that it has while it is unchanged."""
    return copy.with_suffix(".json")


def _write_note(copy: Path, sha256: str) -> None:
    note = {"sha256": sha256, "stamp": ImageFile.of(copy.name, os.stat(copy)).stamp}
    write_signed(_note_of(copy), canonical_json(note).encode("ascii"))


def _is_whole(copy: Path) -> bool:
    """Whether there is a copy that is unchanged since it was made; it is hashed if its stamp is another one."""
    try:
        with signed_file(_note_of(copy)) as file:
            note = json.load(file)
        if tuple(note["stamp"]) == ImageFile.of(copy.name, os.stat(copy)).stamp:
            return True
        if file_digest(copy) != note["sha256"]:
            raise ValueError("its digest is not the one noted")
        with contextlib.suppress(OSError):  # a cache of root, which only root may write
            _write_note(copy, note["sha256"])
        return True
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is not used (%s); the archive is expanded again", copy, error)
        return False


def _chunks(path: File, expand: Callable[[Any], Any]) -> Iterator[bytes]:
    data = path if isinstance(path, Path) else path.open_in_order()
    with _reading(path, "compressed tar archive"), expand(data) as source:
        while chunk := source.read(_CHUNK):
            yield chunk
