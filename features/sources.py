"""Where images come from: folders, CSV manifests and the embedded sample; their labels and their splits."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from features.cache import cache_folder
from features.errors import ConfigurationError, SourceError, nearest
from features.images import read_bytes

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test", "unlabelled")
NOT_GIVEN, UNLABELLED = -1, 3
SPLIT_WORDS = {"train": 0, "validation": 1, "val": 1, "valid": 1, "test": 2}
# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif", ".jp2",
    ".ppm", ".pgm", ".pbm", ".pnm", ".ico",
})
# fmt: on
IGNORED_FOLDERS = frozenset({"__MACOSX", "@eaDir"})
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
LATER_SUFFIXES = (".parquet", ".npz", ".tfrecord")
SAMPLE, SAMPLE_IMAGES = "sample:digits", 1797
SPLIT_KINDS = ("hash", "stratified")
DEFAULT_FRACTIONS = (0.8, 0.1, 0.1)

# Links to folders are followed where split and class folders stand (as Keras does), not below.
_LINKED_DEPTH = 2
_PATH_COLUMNS = ("file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "paths")
_ODD = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, and bytes that are not UTF-8
_ADDRESS = re.compile("[A-Za-z][A-Za-z0-9+.-]*://")


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and what is known of each; row ``i`` of every column is image ``i``.

    Parameters
    ----------
    description : str
        What was scanned, for messages.
    root : Path
        Absolute folder that ``paths`` are relative to.
    paths : tuple of str, length n
        With ``/`` between folders. Sorted by code point, or in the manifest's order; absolute where a manifest
        points outside ``root``. A name that is not UTF-8 holds lone surrogates (``os.fsdecode``): it opens
        as it is, and must be written with ``errors="surrogateescape"``.
    labels : int32, (n,)
        Index into ``classes``, -1 for unlabelled.
    classes : tuple of str
        Sorted by code point.
    given_splits : int8, (n,)
        Index into ``SPLITS``, -1 where the source gives none.
    groups : tuple of str, length n, or None
        Images of one group must not cross splits; empty for an image without a group.
    sizes : int64, (n,)
        Bytes, -1 for a missing file.
    mtimes_ns : int64, (n,)
        Time of the last change, nanoseconds since 1970, -1 for a missing file.
    """

    description: str
    root: Path
    paths: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    given_splits: np.ndarray
    groups: tuple[str, ...] | None
    sizes: np.ndarray
    mtimes_ns: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        """The file of one image; raises ``UnreadableImageError`` as ``features.images.read_bytes`` does."""
        return read_bytes(os.path.join(self.root, self.paths[index]))


def scan(source: str | Path, *, target: str | None = None) -> ImageSet:
    """List the images of a source; no image is opened.

    Parameters
    ----------
    source : str or Path
        A folder of class folders, with or without ``train``, ``validation`` (``val``, ``valid``) and
        ``test`` folders above them; a folder of images, or one image (unlabelled); a CSV manifest with the
        columns ``path,label[,split][,group]``; or ``"sample:digits"``.
    target : str, optional
        The manifest's label column, ``label`` by default.

    Raises
    ------
    SourceError
        If there is no such source, or it holds no images, or it cannot be understood.
    """
    text = os.fspath(source)
    if not text:
        raise SourceError("the image source is empty; expected a folder, a CSV manifest or 'sample:digits'")
    if text.startswith("sample:"):
        return _scan_sample(text)
    path = Path(os.path.abspath(os.path.expanduser(text)))
    suffix = path.suffix.lower()
    if suffix == ".csv" and path.is_file():
        return _scan_manifest(path, text, target)
    if target is not None:
        raise ConfigurationError(f"target {target!r} names a column of a CSV manifest, and {text} is none")
    if path.is_dir():
        return _scan_folder(path, text)
    if not path.exists():
        _refuse_missing(path)
    if suffix in IMAGE_SUFFIXES:
        return _image_set(text, path.parent, [_look_at(path.parent, path.name)], [""], [NOT_GIVEN])
    if suffix in ARCHIVE_SUFFIXES:
        raise SourceError(f"{path} is an archive: unpack it and give the folder (archives come in a later release)")
    if suffix in LATER_SUFFIXES:
        raise SourceError(f"{path}: {suffix} files come in a later release; write a CSV manifest, path,label")
    raise SourceError(f"{path} is neither a folder, a CSV manifest (.csv) nor an image")


def _refuse_missing(path: Path) -> NoReturn:
    parent = next(folder for folder in path.parents if folder.is_dir())
    missing = path.relative_to(parent).parts[0]
    raise SourceError(f"{path} does not exist: no {missing!r} in {parent}{nearest(missing, os.listdir(parent))}")


class _File(NamedTuple):
    path: str
    size: int
    mtime_ns: int


def _look_at(root: Path, path: str) -> _File:
    try:
        status = os.stat(os.path.join(root, path))
    except OSError:
        return _File(path, -1, -1)
    return _File(path, status.st_size, status.st_mtime_ns)


def _image_set(
    description: str,
    root: Path,
    files: Sequence[_File],
    names: Sequence[str],
    splits: Sequence[int],
    groups: Sequence[str] | None = None,
) -> ImageSet:
    """Columns to ImageSet; ``names`` are the class names, empty for unlabelled."""
    classes = tuple(sorted(set(names) - {""}))
    index = {name: number for number, name in enumerate(classes)} | {"": -1}
    labels = np.fromiter((index[name] for name in names), np.int32, len(files))
    return ImageSet(
        description=description,
        root=root,
        paths=tuple(file.path for file in files),
        labels=labels,
        classes=classes,
        given_splits=np.where(labels < 0, UNLABELLED, np.asarray(splits)).astype(np.int8),
        groups=tuple(groups) if groups is not None and any(groups) else None,
        sizes=np.fromiter((file.size for file in files), np.int64, len(files)),
        mtimes_ns=np.fromiter((file.mtime_ns for file in files), np.int64, len(files)),
    )


# --- folders ----------------------------------------------------------------------------------------------


def _scan_folder(root: Path, description: str) -> ImageSet:
    files, folders = _walk(root)
    if not files:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise SourceError(f"{root} holds no images: {len(folders)} folders were searched for {known}")
    tops = {_top(file.path) for file in files} - {""}
    if not tops:
        return _image_set(description, root, files, [""] * len(files), [NOT_GIVEN] * len(files))
    nested = {_top(file.path) for file in files if file.path.count("/") > 1}
    split_tops = {top for top in tops if top.lower() in SPLIT_WORDS}
    codes = {SPLIT_WORDS[top.lower()] for top in split_tops}
    below_splits = (0 in codes or len(codes) > 1) and (split_tops == tops or bool(split_tops & nested))
    if below_splits:
        _check_splits(root, split_tops, nested, tops)
        rows = [_row_below_split(file.path, nested) for file in files]
    else:
        _check_depth(root, files)
        rows = [(_top(file.path), NOT_GIVEN) if "/" in file.path else None for file in files]
    kept = [(file, *row) for file, row in zip(files, rows, strict=True) if row is not None]
    if len(kept) < len(files):
        logger.warning("%s: %d images beside the class folders are left out", root, len(files) - len(kept))
    names = [name for _, name, _ in kept]
    if odd := sorted(name for name in set(names) if _ODD.search(name)):
        raise SourceError(f"{root}: the name of the class folder {odd[0]!r} is not plain UTF-8 text; rename it")
    parents = {tuple(parent.split("/")) for parent in {os.path.dirname(file.path) for file in files}}
    used = {parent[:length] for parent in parents for length in (1, 2)}
    depth = 2 if below_splits else 1
    bare = [name for name in folders if name and name.count("/") < depth and tuple(name.split("/")) not in used]
    if bare:
        logger.warning("%s: folders without images are no classes: %s", root, _some(bare))
    return _image_set(description, root, [file for file, _, _ in kept], names, [split for _, _, split in kept])


def _top(path: str) -> str:
    """The first folder of a path, empty where there is none."""
    return path[: max(path.find("/"), 0)]


def _row_below_split(path: str, nested: set[str]) -> tuple[str, int] | None:
    """Class name and split of one image, None for one that stands beside the class folders."""
    top, _, rest = path.partition("/")
    if "/" in rest:
        return _top(rest), SPLIT_WORDS[top.lower()]
    return ("", UNLABELLED) if rest and top not in nested else None


def _check_splits(root: Path, split_tops: set[str], nested: set[str], tops: set[str]) -> None:
    if others := tops - split_tops:
        raise SourceError(
            f"{root} mixes split folders ({_some(sorted(split_tops))}) with other folders of images "
            f"({_some(sorted(others))}): move one kind elsewhere, or write a CSV manifest"
        )
    by_code: dict[int, str] = {}
    for top in sorted(split_tops):
        code = SPLIT_WORDS[top.lower()]
        if code in by_code:
            raise SourceError(f"{root}: {by_code[code]!r} and {top!r} both mean {SPLITS[code]}; merge or rename them")
        by_code[code] = top
        if top not in nested and SPLITS[code] != "test":
            raise SourceError(f"{root / top} holds images but no class folders; expected {top}/CLASS/IMAGE")


def _check_depth(root: Path, files: Sequence[_File]) -> None:
    """Refuse a folder whose class folders lie below a single other one: it would make a single class."""
    pairs = zip(files[0].path.split("/")[:-1], files[-1].path.split("/")[:-1], strict=False)  # sorted: outermost two
    common = []
    for first, last in pairs:
        if first != last:
            break
        common.append(first)
    start = sum(len(name) + 1 for name in common)
    below = {_top(file.path[start:]) for file in files}
    if common and "" not in below:
        inner = root.joinpath(*common)
        raise SourceError(
            f"{root} holds a single folder, {common[0]!r}, and the folders with images are inside "
            f"({_some(sorted(below))}): give {inner}. If they are all one class, give a CSV manifest"
        )


def _walk(root: Path) -> tuple[list[_File], list[str]]:
    """Images at any depth, and all folders, both relative and sorted by code point.

    No folder is entered twice, whichever links lead to it; real folders come before linked ones.
    """
    files: list[_File] = []
    folders: list[str] = []
    left_out: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    pending, linked, skipped = [""], list[str](), list[str]()
    while pending or linked:
        if not pending:
            linked.sort(reverse=True)
        relative = pending.pop() if pending else linked.pop()
        folder = os.path.join(root, relative)
        prefix = f"{relative}/" if relative else ""
        depth = prefix.count("/")
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                skipped.append(relative)
                continue
            seen.add((status.st_dev, status.st_ino))
            folders.append(relative)
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == "." or name in IGNORED_FOLDERS:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(prefix + name)
                    elif entry.is_symlink() and entry.is_dir():
                        (linked if depth < _LINKED_DEPTH else skipped).append(prefix + name)
                    elif name[name.rfind(".") :].lower() in IMAGE_SUFFIXES:
                        files.append(_look_at_entry(entry, prefix + name))
                    else:
                        left_out[os.path.splitext(name)[1].lower() or "no suffix"] += 1
        except OSError as error:
            raise SourceError(f"{folder} cannot be listed ({error.strerror}); an image set must be complete") from error
    if left_out:
        kinds = ", ".join(f"{kind} {count}" for kind, count in left_out.most_common(8))
        logger.warning("%s: %d files of other kinds are left out: %s", root, left_out.total(), kinds)
    if skipped:
        logger.warning("%s: links to folders that are not followed: %s", root, _some(sorted(skipped)))
    return sorted(files), sorted(folders)


def _look_at_entry(entry: os.DirEntry[str], path: str) -> _File:
    try:
        status = entry.stat()
    except OSError:  # a link to nothing: kept, so that it is listed as missing
        return _File(path, -1, -1)
    return _File(path, status.st_size, status.st_mtime_ns)


def _some(names: Sequence[str], count: int = 8) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(repr, names[:count])) + more


# --- the embedded sample ----------------------------------------------------------------------------------


def _scan_sample(text: str) -> ImageSet:
    if text != SAMPLE:
        raise SourceError(f"there is no sample {text!r}; expected {SAMPLE!r}")
    folder = cache_folder() / "digits"
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".digits-", dir=folder.parent) as temporary:
                made = Path(temporary) / "digits"
                _write_digits(made)
                try:
                    made.rename(folder)
                except OSError:
                    if not folder.is_dir():  # else another process was faster, with the same files
                        raise
    except OSError as error:
        raise SourceError(f"cannot write the sample to {folder} ({error}); set BOTTLENECK_CACHE to a folder") from error
    images = _scan_folder(folder, SAMPLE)
    if len(images) != SAMPLE_IMAGES:
        raise SourceError(f"{folder} holds {len(images)} of {SAMPLE_IMAGES} images; delete it, it is made anew")
    return images


def _write_digits(folder: Path) -> None:
    """scikit-learn's handwritten digits, 8x8 of 17 grey levels, as 32x32 PNG files in folders 0 to 9."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    for label in digits.target_names:
        (folder / str(label)).mkdir(parents=True)
    for index, (pixels, label) in enumerate(zip(grey, digits.target, strict=True)):
        # Not compressed, so that the bytes, and with them the splits, do not depend on the zlib at hand.
        Image.fromarray(pixels).save(folder / str(label) / f"{index:04d}.png", compress_level=0)


# --- manifests --------------------------------------------------------------------------------------------


def _scan_manifest(manifest: Path, description: str, target: str | None) -> ImageSet:
    root = manifest.parent
    lines = _csv_rows(manifest)
    header = next(lines, (1, []))[1]
    columns = _columns(manifest, header, target)
    first_line: dict[str, int] = {}
    names, splits, groups = [], [], []
    for line, row in lines:
        if len(row) != len(header):
            _refuse_line(
                manifest, line, f"{len(row)} fields, expected {len(header)} (quote a field that holds a comma)"
            )
        path = _manifest_path(manifest, line, row[columns["path"]])
        if path in first_line:
            _refuse_line(manifest, line, f"{path!r} is listed already in line {first_line[path]}")
        first_line[path] = line
        cells = {key: row[index].strip() for key, index in columns.items() if key != "path"}
        for key, cell in cells.items():
            if _ODD.search(cell):
                _refuse_line(manifest, line, f"{key} {cell!r} is not plain UTF-8 text")
        names.append(cells.get("label", ""))
        groups.append(cells.get("group", ""))
        splits.append(_split_code(manifest, line, cells.get("split", "")))
    if not first_line:
        raise SourceError(f"{manifest} lists no images")
    _refuse_other_targets(manifest, target or "label", [name for name in names if name])
    files = [_look_at(root, path) for path in first_line]
    missing = [file.path for file in files if file.size < 0]
    if len(missing) == len(files):
        raise SourceError(
            f"{manifest}: none of its {len(files)} files exists, such as {os.path.join(root, missing[0])}; "
            "paths are absolute or start at the manifest's folder"
        )
    if missing:
        logger.warning("%s: %d files do not exist: %s", manifest, len(missing), _some(missing))
    useless = sum(1 for name, split in zip(names, splits, strict=True) if not name and split in (0, 1))
    if useless:
        logger.warning("%s: %d images of train or validation have no label and are left unlabelled", manifest, useless)
    return _image_set(description, root, files, names, splits, groups)


def _refuse_line(manifest: Path, line: int, message: str) -> NoReturn:
    raise SourceError(f"{manifest}, line {line}: {message}")


def _csv_rows(manifest: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the number of the line on which it starts."""
    try:
        data = manifest.read_bytes()
    except OSError as error:
        raise SourceError(f"{manifest} cannot be read: {error.strerror}") from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise SourceError(f"{manifest} is UTF-16 text; save it as CSV in UTF-8")
    if b"\0" in data:
        _refuse_line(manifest, data.count(b"\n", 0, data.index(b"\0")) + 1, "a NUL character; expected text in UTF-8")
    reader = csv.reader(io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline=""), strict=True)
    line = 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        _refuse_line(manifest, line, f"not CSV: {error}")


def _columns(manifest: Path, header: Sequence[str], target: str | None) -> dict[str, int]:
    """Where ``path``, ``label``, ``split`` and ``group`` stand, as far as they are there."""
    names = [name.strip().lower() for name in header]
    twice = sorted(name for name, count in Counter(names).items() if name and count > 1)
    if twice:
        _refuse_line(manifest, 1, f"two columns are named {twice[0]!r}")
    shown = ", ".join(map(repr, header))
    if "path" not in names:
        likely = [name for name in names if name in _PATH_COLUMNS]
        hint = f"; rename {likely[0]!r} to 'path'" if likely else nearest("path", names)
        if len(names) == 1 and re.search("[;\t|]", names[0]):
            hint = "; fields must be separated by commas"
        _refuse_line(
            manifest, 1, f"no column 'path', received {shown or 'nothing'}; expected path,label[,split][,group]{hint}"
        )
    found: dict[str, int] = {name: names.index(name) for name in ("path", "split", "group") if name in names}
    wanted = "label" if target is None else target.strip().lower()
    if wanted in ("path", "split"):
        raise SourceError(f"{manifest}: the column {target!r} cannot be the target; expected a column of class names")
    if wanted in names:
        found["label"] = names.index(wanted)
    elif target is not None:
        _refuse_line(manifest, 1, f"no column {target!r} for the target, received {shown}{nearest(target, header)}")
    elif set(names) - {*found, ""}:
        _refuse_line(manifest, 1, f"no column 'label', received {shown}; name the column of classes as the target")
    return found


def _manifest_path(manifest: Path, line: int, text: str) -> str:
    if not text.strip():
        _refuse_line(manifest, line, "the path is empty")
    if _ADDRESS.match(text):
        _refuse_line(manifest, line, f"{text!r} is an address; expected a file (download it first)")
    path = os.path.normpath(text)
    inside = f"{manifest.parent}{os.sep}"
    return path[len(inside) :] if path.startswith(inside) else path


def _split_code(manifest: Path, line: int, word: str) -> int:
    code = SPLIT_WORDS.get(word.lower(), None if word else NOT_GIVEN)
    if code is None:
        known = ", ".join(SPLIT_WORDS)
        _refuse_line(manifest, line, f"unknown split {word!r}; expected {known} or nothing{nearest(word, SPLIT_WORDS)}")
    return code


def _refuse_other_targets(manifest: Path, column: str, labels: Sequence[str]) -> None:
    """One class per image is all that this project learns: refuse measurements and lists of classes.

    Measurements: every label is a number, one of them is not whole, and more than half are distinct.
    Lists: ``|`` or ``;`` splits more than half of the labels, or splits one into parts of which another
    label consists or which another list shares.
    """
    distinct = set(labels)
    if len(labels) > 2 and len(distinct) > len(labels) / 2:
        numbers = [_number(label) for label in distinct]
        if None not in numbers and any(number is not None and not number.is_integer() for number in numbers):
            raise SourceError(
                f"{manifest}: the column {column!r} looks like a measurement ({len(distinct)} different numbers, "
                f"such as {labels[0]}); expected class names. Regression is not supported: write ranges as names, "
                "or choose another target"
            )
    lists = {label: parts for label in distinct if len(parts := [part.strip() for part in re.split("[|;]", label)]) > 1}
    if not lists:
        return
    uses = Counter(part for parts in lists.values() for part in set(parts))
    mixed = next(
        (label for label, parts in lists.items() if any(part in distinct or uses[part] > 1 for part in parts)), None
    )
    if mixed is not None or sum(label in lists for label in labels) > len(labels) / 2:
        raise SourceError(
            f"{manifest}: the column {column!r} looks like several classes per image, such as {mixed or min(lists)!r}; "
            "expected one. Multi-label targets are not supported: choose another target, or, if '|' and ';' "
            "are part of the class names, replace them"
        )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# --- splits -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SplitRule:
    """How images without a given split get one.

    Parameters
    ----------
    kind : {"hash", "stratified"}
        ``hash``: each image by itself, from its group or its content, so it never changes sides when
        others are added; the fractions hold in expectation. ``stratified``: the fractions hold in each
        class to within one image, but images may change sides when others are added.
    fractions : tuple of three float
        Shares of train, validation and test; they add up to 1.
    seed : int
        Another seed, other splits.

    Examples
    --------
    >>> SplitRule.parse("stratified:0.75,0.25").fractions
    (0.75, 0.25, 0.0)
    >>> str(SplitRule.parse("hash:0.7,0.15,0.15", seed=3)), str(SplitRule())
    ('hash:0.7,0.15,0.15', 'hash')
    """

    kind: str = "hash"
    fractions: tuple[float, float, float] = DEFAULT_FRACTIONS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in SPLIT_KINDS:
            hint = nearest(self.kind, SPLIT_KINDS)
            raise ConfigurationError(f"split: received {self.kind!r}, expected {' or '.join(SPLIT_KINDS)}{hint}")
        inside = len(self.fractions) == 3 and all(0 <= share <= 1 for share in self.fractions)
        if not inside or abs(sum(self.fractions) - 1) > 1e-9 or self.fractions[0] == 0:
            raise ConfigurationError(
                f"split: received the fractions {self.fractions}, expected train, validation and test "
                "between 0 and 1, train above 0, which add up to 1"
            )

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> SplitRule:
        """Read ``hash``, ``stratified``, or either with two (no test) or three fractions: ``hash:0.7,0.15,0.15``."""
        kind, colon, rest = text.strip().partition(":")
        if not colon:
            return cls(kind, seed=seed)
        shares = [_number(part) for part in rest.split(",")]
        if None in shares or len(shares) not in (2, 3):
            raise ConfigurationError(
                f"split: received {text!r}, expected two or three numbers after the colon, "
                "train, validation and test, as in 'hash:0.7,0.15,0.15'"
            )
        train, validation, test = [share for share in shares if share is not None] + [0.0] * (3 - len(shares))
        return cls(kind, (train, validation, test), seed)

    def __str__(self) -> str:
        if self.fractions == DEFAULT_FRACTIONS:
            return self.kind
        shown = self.fractions if self.fractions[2] else self.fractions[:2]
        return f"{self.kind}:{','.join(map(repr, shown))}"


def assign_splits(
    labels: np.ndarray,
    given_splits: np.ndarray,
    groups: Sequence[str] | None,
    sha256: np.ndarray,
    rule: SplitRule,
) -> tuple[np.ndarray, list[str]]:
    """Give every image its split. Given splits stay; unlabelled images are ``unlabelled``.

    An image draws u = (first 8 bytes of sha256(seed in decimal + key), big-endian) / 2^64, where key is its group
    in UTF-8, or the sha256 of its content where it has none. ``hash``: train if u < train share,
    validation if u < train + validation share, else test; so a group, or identical bytes, never cross.
    ``stratified``: each class is ordered by u and cut by largest remainders; identical bytes of one
    class stay together.

    Parameters
    ----------
    labels : int32, (n,)
    given_splits : int8, (n,)
        Index into ``SPLITS``, -1 for not given.
    groups : sequence of str, length n, or None
    sha256 : uint8, (n, 32)
        Of each file's content.
    rule : SplitRule

    Returns
    -------
    splits : int8, (n,)
        Index into ``SPLITS``.
    warnings : list of str
        Groups that cross splits because the given splits make them.

    Raises
    ------
    ConfigurationError
        For ``stratified`` with groups: exact proportions and whole groups exclude each other.
    """
    splits = np.array(given_splits, dtype=np.int8)
    splits[np.asarray(labels) < 0] = UNLABELLED
    rows = np.flatnonzero(splits == NOT_GIVEN).tolist()
    if rule.kind == "stratified" and groups is not None and len(rows):
        raise ConfigurationError(
            "split 'stratified' would tear groups apart; use 'hash', or give splits in the manifest"
        )
    digests = np.asarray(sha256, dtype=np.uint8)
    keys = (_group_key(groups[row]) if groups is not None and groups[row] else digests[row].tobytes() for row in rows)
    draws = _draws(keys, rule.seed)
    if rule.kind == "stratified":
        splits[rows] = _stratify(np.asarray(labels)[rows], draws, rule.fractions)
    else:
        train, validation, test = rule.fractions
        # A share of 0 must stay empty even where adding up the others falls short of 1, or u rounds to 1.
        last = np.inf if test == 0 else train + validation
        splits[rows] = np.searchsorted([last if validation == 0 else train, last], draws, side="right")
    return splits, _crossing_groups(groups, splits)


def _group_key(group: str) -> bytes:
    return group.encode("utf-8", "surrogateescape")


def _draws(keys: Iterable[bytes], seed: int) -> np.ndarray:
    prefix = str(seed).encode("ascii")
    heads = b"".join(hashlib.sha256(prefix + key).digest()[:8] for key in keys)
    return np.frombuffer(heads, dtype=">u8").astype(np.float64) / 2.0**64


def _stratify(labels: np.ndarray, draws: np.ndarray, fractions: Sequence[float]) -> np.ndarray:
    splits = np.empty(len(labels), dtype=np.int8)
    order = np.lexsort((draws, labels))
    for rows in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        exact = np.asarray(fractions) * len(rows)
        counts = np.floor(exact + 1e-9).astype(np.int64)
        remainders = np.round(exact - counts, 9)
        counts[np.argsort(-remainders, kind="stable")[: len(rows) - counts.sum()]] += 1
        # Identical bytes draw the same u: all stand at the place of their first.
        places = np.arange(len(rows))
        places[1:][np.diff(draws[rows]) == 0] = 0
        places = np.maximum.accumulate(places)
        splits[rows] = np.searchsorted(counts.cumsum()[:2], places, side="right")
    return splits


def _crossing_groups(groups: Sequence[str] | None, splits: np.ndarray) -> list[str]:
    first: dict[str, int] = {}
    crossing: dict[str, None] = {}
    for group, split in zip(groups or (), splits.tolist() if groups is not None else (), strict=True):
        if group and split != UNLABELLED and first.setdefault(group, split) != split:
            crossing[group] = None
    if not crossing:
        return []
    return [f"{len(crossing)} groups lie in more than one split, because of given splits: {_some(list(crossing))}"]


def find_leakage(sha256: np.ndarray, splits: np.ndarray, paths: Sequence[str]) -> list[tuple[str, str]]:
    """Identical files in two of train, validation and test.

    Parameters
    ----------
    sha256 : uint8, (n, 32)
    splits : int8, (n,)
    paths : sequence of str, length n

    Returns
    -------
    list of (path, path)
        The first file of a content, with the first one of each other split it is in; in row order.
    """
    contents = np.ascontiguousarray(sha256, dtype=np.uint8).reshape(-1, 32).view("S32").ravel()
    order = np.argsort(contents, kind="stable")
    order = order[(splits[order] >= 0) & (splits[order] != UNLABELLED)]
    equal = contents[order][1:] == contents[order][:-1]
    order = order[np.append(equal, False) | np.insert(equal, 0, False)] if len(order) else order
    pairs = []
    first: dict[int, int] = {}
    for previous, row in zip([-1, *order.tolist()], order.tolist(), strict=False):
        if previous < 0 or contents[previous] != contents[row]:
            first = {}
        split = int(splits[row])
        if first and split not in first:
            pairs.append((next(iter(first.values())), row))
        first.setdefault(split, row)
    return [(paths[row], paths[other]) for row, other in sorted(pairs)]


def warnings_about(labels: np.ndarray, splits: np.ndarray, classes: Sequence[str]) -> list[str]:
    """What would hurt training: too few classes or images, classes or splits that are empty.

    Parameters
    ----------
    labels : int32, (n,)
    splits : int8, (n,)
        Index into ``SPLITS``.
    classes : sequence of str
    """
    labelled = np.asarray(labels) >= 0
    if not labelled.any():
        return ["no image has a label: features can be kept, but nothing can be trained"]
    counts = np.zeros((len(classes), len(SPLITS)), dtype=np.int64)
    np.add.at(counts, (np.asarray(labels)[labelled], np.asarray(splits)[labelled]), 1)
    totals = counts.sum(axis=1)
    messages = []
    if (totals > 0).sum() == 1:
        messages.append(f"only one class has images, {classes[int(totals.argmax())]!r}: training needs two")
    if (totals < 2).any():
        messages.append(f"classes with fewer than 2 images: {_named(classes, totals < 2)}")
    for code, split in enumerate(SPLITS[:3]):
        absent = (counts[:, code] == 0) & (totals > 0)
        if counts[:, code].any() and absent.any():
            messages.append(f"classes without images in {split}: {_named(classes, absent)}")
        elif absent.any() and split != "test":
            messages.append(f"no labelled image is in {split}")
    return messages


def _named(classes: Sequence[str], mask: np.ndarray) -> str:
    return _some([name for name, chosen in zip(classes, mask, strict=True) if chosen])
