"""Where images come from: folders, CSV manifests and the embedded sample; their labels and their splits."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from features.errors import ConfigurationError, SourceError, nearest
from features.images import read_bytes
from features.manifests import read_manifest
from features.sample import SAMPLE, SAMPLE_IMAGES, sample_folder
from features.splits import NOT_GIVEN, SPLIT_WORDS, SPLITS, UNLABELLED, listed

logger = logging.getLogger(__name__)

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif", ".jp2",
    ".ppm", ".pgm", ".pbm", ".pnm", ".ico",
})
# fmt: on
IGNORED_NAMES = frozenset({"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini"})  # and hidden ones
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
LATER_SUFFIXES = (".parquet", ".npz", ".tfrecord")

# Links to folders are followed where split and class folders stand (as Keras does), not below.
_LINKED_DEPTH = 2
_ODD = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, and bytes that are not UTF-8


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
    if suffix == ".csv" and os.path.isfile(path):
        return _scan_manifest(path, text, target)
    if target is not None:
        raise ConfigurationError(f"target {target!r} names a column of a CSV manifest, and {text} is none")
    if os.path.isdir(path):
        return _scan_folder(path, text)
    if not os.path.exists(path):
        _refuse_missing(path)
    if suffix in IMAGE_SUFFIXES:
        return _image_set(text, path.parent, [_look_at(path.parent, path.name)], [""], [NOT_GIVEN])
    if suffix in ARCHIVE_SUFFIXES:
        raise SourceError(f"{path} is an archive: unpack it and give the folder (archives come in a later release)")
    if suffix in LATER_SUFFIXES:
        raise SourceError(f"{path}: {suffix} files come in a later release; write a CSV manifest, path,label")
    raise SourceError(f"{path} is neither a folder, a CSV manifest (.csv) nor an image")


def _refuse_missing(path: Path) -> NoReturn:
    parent = next(folder for folder in path.parents if os.path.isdir(folder))
    missing = path.relative_to(parent).parts[0]
    try:
        hint = nearest(missing, os.listdir(parent))
    except OSError:  # a folder that may not be listed has no hints to give
        hint = ""
    raise SourceError(f"{path} does not exist: no {missing!r} in {parent}{hint}")


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
    # Everything is decided per folder: there are few of them, and may be millions of files.
    parents = [os.path.dirname(file.path) for file in files]
    parts = {parent: parent.split("/") if parent else [] for parent in set(parents)}
    tops = {part[0] for part in parts.values() if part}
    if not tops:
        return _image_set(description, root, files, [""] * len(files), [NOT_GIVEN] * len(files))
    nested = {part[0] for part in parts.values() if len(part) > 1}
    split_tops = {top for top in tops if top.lower() in SPLIT_WORDS}
    codes = {SPLIT_WORDS[top.lower()] for top in split_tops}
    below_splits = (0 in codes or len(codes) > 1) and (split_tops == tops or bool(split_tops & nested))
    rows: dict[str, tuple[str, int] | None]  # class and split of the images in a folder, None: beside the classes
    if below_splits:
        _check_splits(root, split_tops, nested, tops)
        rows = {parent: _row_below_split(part, nested) for parent, part in parts.items()}
    else:
        _check_depth(root, parts)
        rows = {parent: (part[0], NOT_GIVEN) if part else None for parent, part in parts.items()}
    if odd := sorted(row[0] for row in rows.values() if row and _ODD.search(row[0])):
        raise SourceError(f"{root}: the name of the class folder {odd[0]!r} is not plain UTF-8 text; rename it")
    kept = [(file, *row) for file, parent in zip(files, parents, strict=True) if (row := rows[parent]) is not None]
    if len(kept) < len(files):
        logger.warning("%s: %d images beside the class folders are left out", root, len(files) - len(kept))
    depth = 2 if below_splits else 1
    used = {"/".join(part[:length]) for part in parts.values() for length in range(depth + 1)}
    bare = [folder for folder in folders if folder.count("/") < depth and folder not in used]
    if bare:
        logger.warning("%s: folders without images are no classes: %s", root, listed(bare))
    names, splits = [name for _, name, _ in kept], [split for _, _, split in kept]
    return _image_set(description, root, [file for file, _, _ in kept], names, splits)


def _row_below_split(part: Sequence[str], nested: set[str]) -> tuple[str, int] | None:
    if len(part) > 1:
        return part[1], SPLIT_WORDS[part[0].lower()]
    return ("", UNLABELLED) if part and part[0] not in nested else None


def _check_splits(root: Path, split_tops: set[str], nested: set[str], tops: set[str]) -> None:
    if others := tops - split_tops:
        raise SourceError(
            f"{root} mixes split folders ({listed(sorted(split_tops))}) with other folders of images "
            f"({listed(sorted(others))}): move one kind elsewhere, or write a CSV manifest"
        )
    by_code: dict[int, str] = {}
    for top in sorted(split_tops):
        code = SPLIT_WORDS[top.lower()]
        if code in by_code:
            raise SourceError(f"{root}: {by_code[code]!r} and {top!r} both mean {SPLITS[code]}; merge or rename them")
        by_code[code] = top
        if top not in nested and SPLITS[code] != "test":
            raise SourceError(f"{root / top} holds images but no class folders; expected {top}/CLASS/IMAGE")


def _check_depth(root: Path, parts: Mapping[str, Sequence[str]]) -> None:
    """Refuse a folder whose class folders lie below a single other one: it would make a single class."""
    common = os.path.commonpath(parts)
    if common and common not in parts:
        depth = common.count("/") + 1
        below = sorted({part[depth] for part in parts.values()})
        raise SourceError(
            f"{root} holds a single folder, {parts[next(iter(parts))][0]!r}, and the folders with images are inside "
            f"({listed(below)}): give {root / common}. If they are all one class, write a CSV manifest"
        )


def _walk(root: Path) -> tuple[list[_File], list[str]]:
    """Images at any depth, and all folders, both relative to ``root`` and sorted by code point.

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
                    if name[0] == "." or name in IGNORED_NAMES:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(prefix + name)
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        (linked if depth < _LINKED_DEPTH else skipped).append(prefix + name)
                    elif name[name.rfind(".") :].lower() in IMAGE_SUFFIXES:
                        files.append(_look_at_entry(entry, prefix + name))
                    else:
                        left_out[os.path.splitext(name)[1].lower() or "no suffix"] += 1
        except OSError as error:
            raise SourceError(f"{folder} cannot be listed ({error.strerror}); an image set must be complete") from error
    if left_out:
        kinds = [f"{suffix} {count}" for suffix, count in sorted(left_out.items())]
        logger.warning("%s: %d files of other kinds are left out: %s", root, left_out.total(), ", ".join(kinds[:20]))
    if skipped:
        logger.warning("%s: links to folders that are not followed: %s", root, listed(sorted(skipped)))
    return sorted(files), sorted(folders)


def _look_at_entry(entry: os.DirEntry[str], path: str) -> _File:
    try:
        status = entry.stat()
    except OSError:  # a link to nothing: kept, so that it is listed as missing
        return _File(path, -1, -1)
    return _File(path, status.st_size, status.st_mtime_ns)


def _scan_sample(text: str) -> ImageSet:
    folder = sample_folder(text)
    images = _scan_folder(folder, SAMPLE)
    if len(images) != SAMPLE_IMAGES:
        raise SourceError(f"{folder} holds {len(images)} of {SAMPLE_IMAGES} images; delete it, it is made anew")
    return images


def _scan_manifest(manifest: Path, description: str, target: str | None) -> ImageSet:
    root = manifest.parent
    paths, names, splits, groups = read_manifest(manifest, target)
    files = [_look_at(root, path) for path in paths]
    missing = [file.path for file in files if file.size < 0]
    if len(missing) == len(files):
        raise SourceError(
            f"{manifest}: none of its {len(files)} files exists, such as {os.path.join(root, missing[0])}; "
            "paths are absolute or start at the manifest's folder"
        )
    if missing:
        logger.warning("%s: %d files do not exist: %s", manifest, len(missing), listed(missing))
    useless = sum(1 for name, split in zip(names, splits, strict=True) if not name and split in (0, 1))
    if useless:
        logger.warning("%s: %d images of train or validation have no label and are left unlabelled", manifest, useless)
    return _image_set(description, root, files, names, splits, groups)
