"""The labels file: one line for each decision about an image. README.md beside this module is normative.

    decisions --append_decisions--> labels.csv --read_labels--> Labels: columns in memory, and each decision when asked for

The file is untrusted. Of each line about 80 bytes stay in memory; paths and earlier values stay in the file.
"""

from __future__ import annotations

import array
import csv
import dataclasses
import datetime
import getpass
import hashlib
import io
import os
import re
import stat
import sys
import threading
import time
import uuid
import weakref
from binascii import unhexlify
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np

from features.errors import BottleneckError, FormatVersionError, LabelsError
from features.files import atomic_file, behind_link, locked, named, sync_folder, writing
from features.progress import counted

FIRST_LINE = "# bottleneck-labels 1"
COLUMNS = ("sha256", "path", "target", "value", "earlier", "by", "utc", "id")
HEADER = ",".join(COLUMNS)
UNKNOWN, EXCLUDE = "unknown", "exclude"
WITHDRAWN = ""  # the value that takes earlier decisions back: the label of the data set holds again
LABEL, SPLIT = "label", "split"  # the target of a data set without a named one; the target that gives a split
SEEN = "seen"  # the target of a note that an audit judged an image of the test split
CLASS_PREFIX = "class:"  # before the name of a class that would be read as something else
MACHINE = "machine:"  # start of `by` where no person decided
LINE_BYTES = 1 << 16  # longest line
PATIENCE = 30.0  # seconds to wait for another process that writes the file
_MARKED = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|(.?))", re.DOTALL)
_ODD = re.compile("[\x00-\x1f\\\\\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_HEXADECIMAL = re.compile("[0-9a-f]+")
_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z")
# A line of letters without accents, quotes and escapes, as most lines are; its time has six decimals.
_PLAIN = re.compile(
    rb"([0-9a-f]{64}),[^\x00\",\\]*,([^\x00\",\\]*),([^\x00\",\\]*),[^\x00\",\\]*,([^\x00\",\\]*),"
    rb"(\d{4}-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-5]\d\.\d{6}Z),([0-9a-f]{32})\r?\n?"
)
_MOST = LINE_BYTES + 1
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """One decision about an image; every field is text.

    Parameters
    ----------
    sha256 : str
        Hash of the bytes of the image, 64 hexadecimal digits. The decision holds for all rows with these bytes.
    path : str
        Where the image was, for people; it decides nothing.
    target : str
        What is decided: the target of the data set (`LABEL` if it has no name of its own), or `SPLIT`.
    value : str
        A class as `value_of` writes it, `UNKNOWN`, `EXCLUDE`, or `WITHDRAWN`. For `SPLIT`: train, validation or test.
    earlier : str
        The value that held before, for people.
    by : str
        Who decided; begins with `MACHINE` where no person did.
    utc : str
        When: ``2026-11-28T00:48:12.123456Z``.
    id : str
        32 hexadecimal digits; lines with the same one are copies of one decision.
    """

    sha256: str
    path: str
    target: str
    value: str
    earlier: str
    by: str
    utc: str
    id: str


class Words(NamedTuple):
    """A column of few different words: ``words[codes[k]]`` is the word of decision ``k``; ``codes`` is int32 (n,)."""

    codes: np.ndarray
    words: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
    """The decisions of a labels file in the order in which they take effect: by time, then by place in the file.

    Parameters
    ----------
    path : Path
        The file.
    digest : str
        sha256 of its first ``size`` bytes, which end with the last whole line. Later decisions are appended, so these
        bytes can be found again.
    size : int
        Number of bytes.
    torn : tuple of int
        Numbers of lines that a killed process left incomplete; they are ignored.
    doubled : int
        Number of lines that are copies of others; they count once.
    sha256 : uint8, (n, 32)
        Content hash of each decision's image.
    targets, values, people : Words
        The columns ``target``, ``value`` and ``by``.
    times : int64, (n,)
        Microseconds since 1970, ascending.
    """

    path: Path
    digest: str
    size: int
    torn: tuple[int, ...]
    doubled: int
    sha256: np.ndarray
    targets: Words
    values: Words
    people: Words
    times: np.ndarray
    _line: Callable[[int], bytes] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.times)

    @property
    def remarks(self) -> list[str]:
        """What was left out of the file, in words."""
        said = []
        if self.torn:
            lines = ", ".join(map(str, self.torn[:3])) + (", ..." if len(self.torn) > 3 else "")
            said.append(f"{counted(len(self.torn), 'line', 'is')} incomplete, left out: {lines}")
        if self.doubled:
            said.append(f"{counted(self.doubled, 'line', 'is')} there already, counted once")
        return said

    @property
    def decisions(self) -> Sequence[Decision]:
        """All decisions in effective order; each is read from the file when it is asked for."""
        return _Decisions(self)

    def lines(self) -> Iterator[bytes]:
        """Yield the line of each decision, in effective order, as it stands in the file, with its end."""
        return map(self._line, range(len(self)))

    def about(self, *targets: str) -> np.ndarray:
        """Return whether each decision is about one of these targets, bool, (n,)."""
        return np.isin(self.targets.codes, [k for k, word in enumerate(self.targets.words) if word in targets])

    def latest(self, sha256: np.ndarray, *targets: str) -> np.ndarray:
        """Find the decision about each image that is in effect.

        Parameters
        ----------
        sha256 : uint8, (m, 32)
            Content hashes of the images.
        targets : str
            Only decisions about one of these.

        Returns
        -------
        int64, (m,)
            Places in ``decisions``; -1 if there is none, or it was withdrawn.
        """
        places = np.flatnonzero(self.about(*targets))
        return self.undrawn(last_of(self.sha256[places], places, sha256))

    def undrawn(self, places: np.ndarray) -> np.ndarray:
        """Return places with -1 for decisions that withdraw others."""
        if not len(self):
            return np.full(len(places), -1, np.int64)
        withdrawn = np.array([word == WITHDRAWN for word in self.values.words], bool)[self.values.codes[places]]
        return np.where(withdrawn, -1, places)


class _Decisions(Sequence[Decision]):
    def __init__(self, labels: Labels) -> None:
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, place):  # type: ignore[no-untyped-def]
        if isinstance(place, slice):
            return [self[k] for k in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        return _parsed(self._labels._line(place))


def keys_of(sha256: np.ndarray) -> np.ndarray:
    """Return content hashes, uint8 (n, 32), as an array of n values that can be sorted and compared."""
    return np.ascontiguousarray(sha256, np.uint8).reshape(-1, 32).view("S32").ravel()


def last_of(known: np.ndarray, places: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return for each wanted hash the largest of the places of the equal known hashes; -1 if there is none.

    Parameters
    ----------
    known : uint8, (n, 32)
    places : int64, (n,), ascending
    wanted : uint8, (m, 32)

    Returns
    -------
    int64, (m,)
    """
    return _of_equal(known, places, wanted, -1)


def first_of(known: np.ndarray, places: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the smallest of the places instead; see `last_of`."""
    return _of_equal(known, places, wanted, 0)


def _of_equal(known: np.ndarray, places: np.ndarray, wanted: np.ndarray, end: int) -> np.ndarray:
    keys, asked = keys_of(known), keys_of(wanted)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    found = np.searchsorted(keys, asked, side="right" if end else "left") + end
    inside = (found >= 0) & (found < len(keys))
    inside[inside] = keys[found[inside]] == asked[inside]
    result = np.full(len(asked), -1, np.int64)
    result[inside] = places[order[found[inside]]]
    return result


def value_of(name: str) -> str:
    """Return the value that stands for a class: its name, unless that means something else.

    Examples
    --------
    >>> value_of("cat"), value_of("unknown"), class_of("class:unknown")
    ('cat', 'class:unknown', 'unknown')
    """
    special = name in (UNKNOWN, EXCLUDE, WITHDRAWN) or name.startswith(CLASS_PREFIX)
    return CLASS_PREFIX + name if special else name


def class_of(value: str) -> str | None:
    """Return the class that a value stands for; None for `UNKNOWN`, `EXCLUDE` and `WITHDRAWN`."""
    return None if value in (UNKNOWN, EXCLUDE, WITHDRAWN) else value.removeprefix(CLASS_PREFIX)


def is_person(by: str) -> bool:
    """Whether a person decided, and not a machine."""
    return not by.startswith(MACHINE)


def this_user() -> str:
    """Return the name of the user of this process, for the column ``by``."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may have no name for its user
        return f"user {os.getuid()}" if hasattr(os, "getuid") else "somebody"


_last_moment = 0
_moment_lock = threading.Lock()


def new_decision(
    sha256: str | bytes | np.ndarray,
    path: str,
    value: str,
    *,
    target: str = LABEL,
    earlier: str = WITHDRAWN,
    by: str | None = None,
) -> Decision:
    """Make a decision with the time and a new id. Later ones of a process are later, whatever its clock does.

    Parameters
    ----------
    sha256 : str, bytes or uint8 (32,)
        Content hash of the image.
    path : str
        Where it is.
    value : str
        `UNKNOWN`, `EXCLUDE`, `WITHDRAWN`, or a class as `value_of` writes it.
    target, earlier, by : str, optional
        See `Decision`; by default `LABEL`, nothing, and the name of this user.
    """
    global _last_moment
    digest = sha256 if isinstance(sha256, str) else bytes(sha256).hex()
    with _moment_lock:
        _last_moment = max(time.time_ns() // 1000, _last_moment + 1)
        utc = moment_text(_last_moment)
    return Decision(digest, path, target, value, earlier, this_user() if by is None else by, utc, uuid.uuid4().hex)


def moment_text(microseconds: int) -> str:
    """Return a time, in microseconds since 1970, as the column ``utc`` has it."""
    return (_EPOCH + microseconds * _MICROSECOND).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def line_of(decision: Decision) -> bytes:
    """Return a decision as one physical line of the file, with its end.

    Raises
    ------
    LabelsError
        If it could not be read again.
    """
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="").writerow(map(_escaped, dataclasses.astuple(decision)))
    line = text.getvalue().encode("utf-8") + b"\n"
    try:
        _parsed(line)
    except ValueError as problem:
        raise LabelsError(f"a decision about {decision.path!r:.100} cannot be written: {problem}") from problem
    return line


def append_decisions(path: str | Path, decisions: Iterable[Decision], *, dated: bool = False) -> None:
    """Append decisions to a labels file, which is made if it is missing. When this returns, they are on the disk.

    A decision never comes before the last line of the file: if its time is earlier, because a clock is wrong, it takes the
    time of that line; unless it is ``dated``, made elsewhere at that time. An incomplete last line, which a killed process
    left, is replaced.

    Raises
    ------
    LabelsError
        If the file is no labels file, or a decision cannot be written.
    StoreError
        If it cannot be written, or another process keeps it locked; it is then as it was before.
    """
    given, path = list(decisions), behind_link(Path(path))
    with writing(path), locked(path, seconds=PATIENCE):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
        try:
            size, last = _end_of(path, descriptor)
            start = b"" if size else f"{FIRST_LINE}\n{HEADER}\n".encode()
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # the last line is whole and only lacks its end
                start = b"\n"
            data = start + b"".join(line_of(item if dated else _not_before(item, last)) for item in given)
            os.ftruncate(descriptor, size)
            try:
                _write(descriptor, data)
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        if not size:
            sync_folder(path.parent)


def forget_decisions(path: str | Path, hashes: Collection[str]) -> int:
    """Remove every line about images with these content hashes, 64 hexadecimal digits each; the others stay as they are.

    Returns
    -------
    int
        Number of lines removed.

    Raises
    ------
    LabelsError
        If the file is no labels file.
    StoreError
        If it cannot be written, or another process keeps it locked; it is then as it was before.
    """
    path = behind_link(Path(path))
    gone = tuple(text.encode() for text in hashes)
    with writing(path), locked(path, seconds=PATIENCE):
        read_labels(path)
        with open(path, "rb") as source, atomic_file(path) as temporary, open(temporary, "xb") as file:
            removed = 0
            for line in source:
                about = line.lstrip(b'"')
                torn = not line.endswith(b"\n") and bool(about) and any(text.startswith(about[:64]) for text in gone)
                if about.startswith(gone) or torn:
                    removed += 1
                else:
                    file.write(line)
            file.flush()
    return removed


def _not_before(decision: Decision, last: int) -> Decision:
    try:
        return dataclasses.replace(decision, utc=moment_text(last)) if _moment(decision.utc) < last else decision
    except ValueError:  # which `line_of` reports
        return decision


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _end_of(path: Path, descriptor: int) -> tuple[int, int]:
    """Return the size of a labels file without an incomplete last line, and the time of its last decision, else 0."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise LabelsError(f"{path}: is not a regular file; expected a labels file, or a new name")
    size = status.st_size
    if not size:
        return 0, 0
    if not os.pread(descriptor, len(FIRST_LINE) + 3, 0).removeprefix(b"\xef\xbb\xbf").startswith(FIRST_LINE.encode()):
        _refuse_first_line(path, os.pread(descriptor, 200, 0).split(b"\n")[0])
    start = max(0, size - 2 * LINE_BYTES)
    *whole, tail = os.pread(descriptor, size - start, start).split(b"\n")
    if tail:
        try:
            return size, _moment(_parsed(tail).utc)
        except ValueError:
            size -= len(tail)
    return size, _time_of(whole[-1]) if whole else 0


def _time_of(line: bytes) -> int:
    try:
        return _moment(_parsed(line).utc)
    except ValueError:  # a line of columns
        return 0


def read_labels(path: str | Path, size: int | None = None) -> Labels:
    """Read a labels file. Memory grows by about 80 bytes for each line.

    Parameters
    ----------
    path : Path
        The file.
    size : int, optional
        Read only its first ``size`` bytes, to see it as it was.

    Raises
    ------
    LabelsError
        If it is no labels file, or a line cannot be understood; the message names the line.
    FormatVersionError
        If this release does not know its version.
    """
    path = Path(path)
    with named(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError as problem:
            raise LabelsError(f"{path}: there is no such labels file; bottleneck review makes one") from problem
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise LabelsError(f"{path}: is not a regular file; expected a labels file (CSV)")
        with open(descriptor, "rb", closefd=False) as stream:
            try:
                return _Reader(path, descriptor).read(stream, sys.maxsize if size is None else size)
            except BaseException:
                os.close(descriptor)
                raise


class _Reader:
    """Collect the columns of a labels file, line by line."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self._digests, self._ids, self._times = bytearray(), bytearray(), bytearray()
        self._numbers = array.array("q")  # of each line: start, length, target, value, by
        self._words: tuple[dict[str, int], ...] = ({}, {}, {})
        self._codes: tuple[dict[bytes, int], ...] = ({}, {}, {})  # the same words as plain lines hold them

    def read(self, stream: BinaryIO, size: int) -> Labels:
        start, number, torn, digest = 0, 0, [], hashlib.sha256()
        while line := stream.readline(_MOST if start + _MOST <= size else size - start):
            number += 1
            if not line.endswith(b"\n"):
                if len(line) == _MOST:
                    raise LabelsError(f"{self._path}, line {number}: is longer than {LINE_BYTES:,} bytes")
                if not _is_whole(line):
                    torn.append(number)
                    break
            try:
                self._take(line, start, number)
            except BottleneckError:
                raise
            except ValueError as problem:
                if not line.rstrip(b"\r\n").endswith(FIRST_LINE.encode()):  # another file was put behind a torn line
                    raise LabelsError(f"{self._path}, line {number}: {problem}") from problem
                torn.append(number)
            digest.update(line)
            start += len(line)
        if not number:
            _refuse_first_line(self._path, b"")
        return self._labels(digest.hexdigest(), start, tuple(torn))

    def _take(self, line: bytes, start: int, number: int) -> None:
        plain = _PLAIN.fullmatch(line) if line.isascii() else None
        if plain is None:
            self._take_other(line, start, number)
            return
        sha256, target, value, by, utc, identity = plain.groups()
        codes = []
        for known, words, raw in zip(self._codes, self._words, (target, value, by), strict=True):
            code = known.get(raw)
            if code is None:
                code = known[raw] = words.setdefault(raw.decode("ascii"), len(words))
            codes.append(code)
        self._add(line, start, unhexlify(sha256), codes, utc, unhexlify(identity))

    def _take_other(self, line: bytes, start: int, number: int) -> None:
        """Take a line with quotes, escapes or other letters, one of names, or an empty one."""
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.startswith((b"#", HEADER.encode())) or number == 1:
            text = line.rstrip(b"\r\n,")
            if text not in (FIRST_LINE.encode(), HEADER.encode()) or (number == 1 and text != FIRST_LINE.encode()):
                _refuse_first_line(self._path, text)
        elif line.strip():
            found = _parsed(line)
            fields = zip(self._words, (found.target, found.value, found.by), strict=True)
            codes = [words.setdefault(word, len(words)) for words, word in fields]
            utc = moment_text(_moment(found.utc)).encode()
            self._add(line, start, unhexlify(found.sha256), codes, utc, unhexlify(found.id))

    def _add(self, line: bytes, start: int, sha256: bytes, codes: list[int], utc: bytes, identity: bytes) -> None:
        self._digests += sha256
        self._ids += identity
        self._times += utc[:-1]
        self._numbers.extend((start, len(line), *codes))

    def _labels(self, digest: str, size: int, torn: tuple[int, ...]) -> Labels:
        numbers = np.frombuffer(self._numbers, np.int64).reshape(-1, 5)
        times = self._moments()
        self._times = bytearray()
        order = np.argsort(times, kind="stable")
        ids = np.frombuffer(self._ids, "V16")[order]
        kept = np.arange(len(ids))
        if len(np.unique(ids.view(np.uint64)[::2])) < len(ids):
            kept = np.sort(np.unique(ids, return_index=True)[1])
            self._check_copies(numbers[order], ids, kept)
        doubled, order = len(order) - len(kept), order[kept]
        starts, *others = (numbers[order, place] for place in range(5))
        lengths, *codes = (column.astype(np.int32) for column in others)
        del ids, numbers, others
        self._ids, self._numbers, times = bytearray(), array.array("q"), times[order]
        path, descriptor = self._path, self._descriptor
        sha256 = np.frombuffer(self._digests, np.uint8).reshape(-1, 32)[order]

        def line(place: int) -> bytes:
            data = os.pread(descriptor, int(lengths[place]), int(starts[place]))
            if len(data) < lengths[place] or not data.startswith(sha256[place].tobytes().hex().encode()):
                raise LabelsError(f"{path}: was changed while it was read, other than by appending; read it again")
            return data

        targets, values, people = (Words(code, tuple(words)) for code, words in zip(codes, self._words, strict=True))
        labels = Labels(path, digest, size, torn, doubled, sha256, targets, values, people, times, line)
        weakref.finalize(line, os.close, descriptor)
        return labels

    def _moments(self) -> np.ndarray:
        """Microseconds since 1970 of each line, int64, (n,)."""
        texts = np.frombuffer(self._times, "S26")
        try:
            parts = [texts[k : k + (1 << 16)].astype("datetime64[us]") for k in range(0, len(texts), 1 << 16)]
        except ValueError as problem:  # the 31st of February
            raise LabelsError(f"{self._path}: a line has a time that does not exist: {problem}") from problem
        return np.concatenate([np.empty(0, "datetime64[us]"), *parts]).view(np.int64)

    def _check_copies(self, numbers: np.ndarray, ids: np.ndarray, kept: np.ndarray) -> None:
        """Refuse two different decisions of the same id."""
        copies = np.setdiff1d(np.arange(len(ids)), kept)
        if not len(copies):
            return
        known, place = np.unique(ids[kept], return_index=True)
        originals = kept[place[np.searchsorted(known, ids[copies])]]
        for copy, original in zip(copies.tolist(), originals.tolist(), strict=True):
            one, other = (
                _parsed(os.pread(self._descriptor, int(numbers[k, 1]), int(numbers[k, 0]))) for k in (original, copy)
            )
            if one != other:
                raise LabelsError(
                    f"{self._path}: two different decisions have the id {one.id} (about {one.path!r:.80} and "
                    f"{other.path!r:.80}); one of them was edited. Give one of them another id of 32 hexadecimal digits"
                )


def _is_whole(line: bytes) -> bool:
    try:
        _parsed(line)
    except ValueError:
        return False
    return True


def _moment(utc: str) -> int:
    return (datetime.datetime.fromisoformat(utc) - _EPOCH) // _MICROSECOND


def _refuse_first_line(path: Path, line: bytes) -> NoReturn:
    text = line.decode("utf-8", "replace")
    if text.startswith(FIRST_LINE[:-1]):
        raise FormatVersionError(
            f"{path}: received {text[:60]!r}, expected {FIRST_LINE!r}; use the release that wrote it"
        )
    raise LabelsError(
        f"{path}: is not a labels file: received {text[:60]!r}, expected the first line {FIRST_LINE!r} and then {HEADER}. "
        "bottleneck labels import makes one of a CSV file of another tool"
    )


def _parsed(line: bytes) -> Decision:
    """Parse one line; raises ``ValueError``, which says what is wrong."""
    text = line.rstrip(b"\r\n").decode("utf-8")
    if "\0" in text:
        raise ValueError("a NUL character")
    fields = text.split(",") if '"' not in text else next(csv.reader([text], strict=True))
    if len(fields) != len(COLUMNS):
        raise ValueError(f"received {len(fields)} fields, expected {len(COLUMNS)}: {HEADER}")
    if "\\" in text:
        fields = [_unescaped(field) for field in fields]
    decision = Decision(*fields)
    for name, word, digits in (("sha256", decision.sha256, 64), ("id", decision.id, 32)):
        if len(word) != digits or not _HEXADECIMAL.fullmatch(word):
            raise ValueError(f"{name}: received {word!r:.80}, expected {digits} hexadecimal digits in lower case")
    if not _UTC.fullmatch(decision.utc):
        raise ValueError(f"utc: received {decision.utc!r:.40}, expected such as 2026-11-28T00:48:12.123456Z")
    _moment(decision.utc)  # there is no 13th month
    return decision


def _escaped(text: str) -> str:
    """Make text one line of UTF-8: backslash, control characters and bytes that are not UTF-8 are written as escapes."""
    return _ODD.sub(_mark, text)


def _mark(found: re.Match[str]) -> str:
    character = found.group()
    simple = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character)
    if simple:
        return simple
    byte = ord(character) - 0xDC00
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else f"\\u{ord(character):04x}"


def _unescaped(text: str) -> str:
    return _MARKED.sub(_character, text)


def _character(found: re.Match[str]) -> str:
    byte, point, simple = found.groups()
    if byte is not None and int(byte, 16) >= 0x80:
        return chr(0xDC00 + int(byte, 16))
    if point is not None:
        return chr(int(point, 16))
    character = {"\\": "\\", "n": "\n", "r": "\r", "t": "\t"}.get(simple)
    if character is None:
        raise ValueError(f"unknown escape {found.group()!r}; write a backslash as two")
    return character
