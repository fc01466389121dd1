"""List the images of a source, with their labels and splits: a folder, an archive, arrays, a manifest or the sample.

Folders and archives first become a list of files; one function then derives classes and splits from the paths.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import NoReturn

import numpy as np

from features.canonical import check_choice
from features.errors import ConfigurationError, SourceError, UnreadableImageError, nearest
from features.progress import Progress, counted
from features.sources import parquet, remote, webdataset
from features.sources.archives import ARCHIVE_SUFFIXES, TAR_SUFFIXES, open_archive
from features.sources.arrays import open_arrays
from features.sources.arrow import SUFFIX as ARROW
from features.sources.arrow import saved_tables
from features.sources.blocks import File, InBucket, file_at, root_at, tables_below, versions_of
from features.sources.folders import IMAGE_SUFFIXES, Files, is_ignored, look_at, suffix_of, walk, warn_left_out
from features.sources.folders import File as ImageFile
from features.sources.imageset import ImageSet
from features.sources.manifests import read_manifest
from features.sources.objects import without_secrets
from features.sources.reading import Reading, read_labels, split_of
from features.sources.sample import SAMPLE, SAMPLE_DIGEST, sample_folder
from features.sources.splits import NOT_GIVEN, SPLIT_WORDS, UNLABELLED, listed
from features.sources.tarindex import Trust
from features.sources.trees import read_tree
from features.targets import CLASSIFICATION, MULTILABEL, TASKS, TYPES, UNKNOWN, Target

logger = logging.getLogger(__name__)

MANIFEST_SUFFIXES = (".csv", ".parquet")
OTHER_ARCHIVES = (".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")


def scan(
    source: str | Path,
    *,
    target: str | None = None,
    labelled: bool = True,
    reading: Reading | None = None,
    trust: Trust = "notes",
    task: str = CLASSIFICATION,
    hosts: str = "",
    progress: Progress | None = None,
) -> ImageSet:
    """List the images of a source; no image is opened.

    Parameters
    ----------
    source : str or Path
        A folder of class folders, with or without ``train``, ``validation`` (``val``, ``valid``) and
        ``test`` folders above them; a ``.zip``, ``.tar`` or compressed tar of one; a folder of images, or one image
        (unlabelled); a CSV or Parquet manifest with the columns ``path,label[,split][,group]``; an ``.npz`` with
        ``x_train y_train x_test y_test``; a ``.tar`` or several (``a-{00..12}.tar``) in the layout of WebDataset; a Parquet file
        with images, several, or a folder of them; class folders in a bucket (``s3://``, ``gs://``); or ``"sample:digits"``.
    target : str, optional
        Name of the label column of a manifest or table, or key of the label in ``.json`` members of a tar; ``label`` by default.
    labelled : bool
        Whether classes matter. If False, the label column of a manifest is not used, and no folder is refused because it
        is not certain which of its folders are classes.
    reading : Reading, optional
        How classes and splits are read. By default the names of the folders decide, and what is not certain is refused.
    trust : {"notes", "times", "nothing"}
        When the copy of a compressed tar in the cache is used; see ``features.sources.archives.open_archive``.
    task : {"classification", "multilabel", "regression"}
        What is to be predicted. For regression the source is a manifest; for multilabel it may have class folders, and an
        image that lies in several of them has all their labels.
    hosts : str
        Hosts inside a private network that addresses in a manifest may reach, separated by commas, beside those of
        ``BOTTLENECK_ALLOW_HOSTS``.
    progress : callable, optional
        Called with ``("list", done, total)`` while several tars are listed.

    Raises
    ------
    SourceError
        If the source does not exist, holds no images, or cannot be understood.
    ConfigurationError
        If ``target`` is given and the source is not a manifest, or ``reading`` names folders and it has none.
    """
    check_choice("task", task, TASKS)
    found = _scanned(source, target, labelled, reading, trust, task, hosts, progress)
    return _of_folders(task, found) if labelled and task != CLASSIFICATION and found.target is None else found


def _scanned(
    source: str | Path,
    target: str | None,
    labelled: bool,
    reading: Reading | None,
    trust: Trust,
    task: str,
    hosts: str,
    progress: Progress | None,
) -> ImageSet:
    """List the images; those of tables and tars with the targets of the task, those of folders with their classes."""
    reading = reading or Reading(settled=not labelled)
    if not isinstance(source, str | os.PathLike):
        raise SourceError(
            f"images: received an object of type {type(source).__name__}, expected a folder, an archive or a manifest. Write "
            "a list of image files to a manifest path,label, or give it to FeatureExtractor"
        )
    text = os.fspath(source)
    if remote.is_address(text):
        return _scan_bucket(text, target, reading, trust, progress, labelled=labelled, task=task, hosts=hosts)
    if not text:
        raise SourceError("the image source is empty; expected a folder, an archive, a manifest or 'sample:digits'")
    if text.startswith("sample:"):
        return _scan_sample(text, reading)
    if webdataset.is_pattern(text) and not os.path.exists(text):
        return _scan_several(text, target, reading, trust, progress, labelled=labelled, task=task)
    path = Path(os.path.abspath(os.path.expanduser(text)))
    name, is_file = path.name.lower(), os.path.isfile(path)
    if is_file and name.endswith((".parquet", ARROW)) and parquet.image_column(path) is not None:
        return _from_rows(text, parquet.open_tables(path, [path], target, labelled=labelled, task=task), reading)
    if is_file and name.endswith(MANIFEST_SUFFIXES):
        return _scan_manifest(path, text, target, reading, labelled=labelled, task=task, hosts=hosts)
    if tables := _tables_in(path):
        return _from_rows(text, parquet.open_tables(path, tables, target, labelled=labelled, task=task), reading)
    if is_file and name.endswith(ARCHIVE_SUFFIXES):
        return _scan_archive(path, text, target, reading, trust, labelled=labelled, task=task)
    _refuse_target(text, target)
    if os.path.isdir(path):
        return _scan_folder(path, text, reading)
    if not os.path.exists(path):
        _refuse_missing(path, text)
    if name.endswith(tuple(IMAGE_SUFFIXES)):
        return _image_set(text, path.parent, Files.of([look_at(path.parent, path.name)]), [""], [NOT_GIVEN])
    if is_file and name.endswith(".npz"):
        return _scan_arrays(path, text, reading)
    known = " ".join((*MANIFEST_SUFFIXES, *ARCHIVE_SUFFIXES, ".npz"))
    if is_file and name.endswith(ARROW):
        raise SourceError(
            f"{path}: is no Arrow stream with a column of images; expected one as save_to_disk of Hugging Face writes it"
        )
    if is_file and name.endswith(OTHER_ARCHIVES):
        raise SourceError(f"{path}: archives of this kind cannot be read, only {known}; unpack it and give the folder")
    raise SourceError(
        f"{path} is neither a folder, an image, nor one of {known}. Give the folder that holds your class folders."
    )


def is_manifest(source: str | Path) -> bool:
    """Whether a source has the name of a manifest, the usual kind of source that takes a ``target``."""
    return os.fspath(source).lower().endswith(MANIFEST_SUFFIXES)


def source_in(root: str, description: str) -> str:
    """Return the source that was given as ``description`` from the ``root`` that its scan found; a manifest lies in its root."""
    name = PurePath(description).name
    if webdataset.is_pattern(description):
        return root
    return os.path.join(root, name) if is_manifest(description) and PurePath(root).name != name else root


def reader_of(root: str) -> Callable[[str], bytes] | None:
    """Return what reads the images of a source by their paths, given its root; None if they are files in a folder."""
    if remote.is_address(root) and not _holds_images(root):
        return remote.Reader(root)
    if remote.is_address(root):
        return scan(root, labelled=False).reader
    path = Path(root)
    in_files = os.path.isfile(root) or webdataset.is_pattern(root) or bool(_tables_in(path))
    return scan(root, labelled=False).reader if in_files else None


def takes_target(source: str | Path) -> bool:
    """Whether a source may have several columns of labels: a manifest, tars of WebDataset, or Parquet files with images."""
    if remote.is_address(os.fspath(source)):
        return is_manifest(source) or _holds_images(os.fspath(source))
    path = Path(os.path.abspath(os.path.expanduser(os.fspath(source))))
    if is_manifest(source) or webdataset.is_pattern(os.fspath(source)) or _tables_in(path):
        return True
    return path.name.lower().endswith(TAR_SUFFIXES) and path.is_file() and webdataset.is_webdataset(open_archive(path))


def lists_addresses(source: str | Path) -> bool:
    """Whether a source is a manifest that lists images at addresses; none of them is asked for anything."""
    return is_manifest(source) and bool(read_manifest(file_at(os.fspath(source)), None, labelled=False)[-1])


def _refuse_target(text: str, target: str | None) -> None:
    if target is not None:
        raise ConfigurationError(
            f"target {target!r} names a column of a manifest (CSV, Parquet), but {text} is not a manifest. Leave "
            "--target out, or give the manifest."
        )


def _of_folders(task: str, images: ImageSet) -> ImageSet:
    """Turn classes of folders into labels of which several may hold."""
    if task != MULTILABEL:
        raise ConfigurationError(
            f"--task {task}: {images.description} has class folders, not numbers. Give a manifest, such as path,age, and name "
            "its columns with --target age"
        )
    values = np.zeros((len(images), len(images.classes)), TYPES[MULTILABEL])
    rows = np.flatnonzero(images.labels >= 0)
    values[rows, images.labels[rows]] = 1
    values[images.labels < 0] = UNKNOWN
    if not len(rows):
        raise SourceError(
            f"{images.description}: no image has a label, so there is nothing for --task {task}. Put the images of each label "
            "into a folder of its name, or leave --task out"
        )
    target, none = Target("folder", images.classes, values), np.full(len(images), -1, np.int32)
    return dataclasses.replace(images, labels=none, classes=(), target=target, united=True)


def united(images: ImageSet, digests: Sequence[bytes]) -> tuple[ImageSet, np.ndarray]:
    """Make one image of those with the same bytes in one given split, the first, with the labels of all their folders.

    Parameters
    ----------
    images : ImageSet
        Other images than those of class folders read for several labels are returned as they are.
    digests : sequence of bytes
        Content hash of each image; empty if it could not be read.

    Returns
    -------
    images : ImageSet
        The images that are kept.
    kept : int64, (k,)
        Their rows, ascending.
    """
    if not images.united or images.target is None:
        return images, np.arange(len(images))
    first: dict[tuple[bytes, int], int] = {}
    values, known, kept = images.target.values.copy(), images.target.known, []
    for row, digest in enumerate(digests):
        place = first.setdefault((digest, int(images.given_splits[row])), row) if digest else row
        if place == row:
            kept.append(row)
        elif known[row] and not known[place]:
            values[place] = values[row]
        elif known[row]:
            values[place] |= values[row]
    rows, target = np.array(kept, np.int64), dataclasses.replace(images.target, values=values)
    one_each = dataclasses.replace(images, target=target).some(rows)
    return dataclasses.replace(one_each, left_out=images.left_out), rows


def _refuse_missing(path: Path, text: str) -> NoReturn:
    if scheme := re.match("[a-z][a-z0-9+.-]+:/", text):
        raise SourceError(
            f"{text} does not exist; an address begins with {scheme[0]}/ (in Python, give text: a Path drops one /)"
        )
    parent = next(folder for folder in path.parents if os.path.isdir(folder))
    missing = path.relative_to(parent).parts[0]
    try:
        hint = nearest(missing, os.listdir(parent))
    except OSError:  # no hint can be taken from a folder that cannot be listed
        hint = ""
    raise SourceError(f"{path} does not exist: no {missing!r} in {parent}{hint}")


def _image_set(
    description: str,
    root: Path | str,
    files: Files,
    names: Sequence[str],
    splits: Sequence[int] | np.ndarray,
    groups: Sequence[str] | None = None,
    columns: Mapping[str, tuple[str, ...]] | None = None,
    reader: Callable[[str], bytes] | None = None,
    reading: Reading = Reading(),  # noqa: B008  frozen
    target: Target | None = None,
) -> ImageSet:
    """Build an ``ImageSet`` from its columns; ``names`` are class names, empty for unlabelled images."""
    names = read_labels(description, names, reading)
    classes = tuple(sorted(set(names) - {""}))
    index = {name: number for number, name in enumerate(classes)} | {"": -1}
    labels = np.fromiter((index[name] for name in names), np.int32, len(files.paths))
    return ImageSet(
        description=description,
        root=root,
        paths=files.paths,
        labels=labels,
        classes=classes,
        given_splits=np.where(labels < 0 if target is None else ~target.known, UNLABELLED, splits).astype(np.int8),
        groups=tuple(groups) if groups is not None and any(groups) else None,
        stamps=files.stamps,
        columns=columns or {},
        reader=reader,
        reading=reading.record,
        target=target,
    )


# --- folders and archives ---------------------------------------------------------------------------------


def _scan_folder(root: Path, description: str, reading: Reading) -> ImageSet:
    files, folders = walk(root)
    if not files and (tars := [*root.glob("*.tar")]):
        raise SourceError(
            f"{root} holds {counted(len(tars), 'tar')} and no images outside of them; give the tars, in quotes: '{root}/*.tar'"
        )
    return _from_tree(root, description, (files, folders), reading)


def _with_versions(images: ImageSet, reader: remote.Reader) -> ImageSet:
    """Add what the stores said of the versions of objects, and what is found out about them while they are read."""
    versions = tuple(reader.listed[path].version if path in reader.listed else "" for path in images.paths)
    return dataclasses.replace(images, versions=versions, replaced=reader.replaced)


def _holds_images(address: str) -> bool:
    """Whether an address stands for files in a bucket that hold many images each."""
    return address.lower().endswith((*TAR_SUFFIXES, ".parquet"))


def _scan_bucket(
    address: str,
    target: str | None,
    reading: Reading,
    trust: Trust,
    progress: Progress | None,
    *,
    labelled: bool,
    task: str,
    hosts: str,
) -> ImageSet:
    address = without_secrets(remote.checked(address, buckets_only=True))
    name = address.lower()
    trust = "nothing" if trust == "nothing" else "notes"  # versions say more than times
    if webdataset.is_pattern(address) and _holds_images(address):
        return _scan_several(address, target, reading, trust, progress, labelled=labelled, task=task)
    if name.endswith((*MANIFEST_SUFFIXES, *TAR_SUFFIXES)):
        file = InBucket(address)
        if name.endswith(TAR_SUFFIXES):
            return _scan_archive(file, address, target, reading, trust, labelled=labelled, task=task)
        if name.endswith(".parquet") and parquet.image_column(file) is not None:
            return _from_rows(
                address, parquet.open_tables(address, [file], target, labelled=labelled, task=task), reading
            )
        return _scan_manifest(file, address, target, reading, labelled=labelled, task=task, hosts=hosts)
    if name.endswith((*ARCHIVE_SUFFIXES, *OTHER_ARCHIVES, ".npz")) or webdataset.is_pattern(address):
        raise SourceError(
            f"{address}: from a bucket class folders, tars, .parquet and .csv are read, and {{000..099}}, {{}} or * in names of "
            "tars and Parquet files; unpack it there, or download it"
        )
    files, folders, reader = remote.listing(address)
    if not files and (tables := tables_below(reader.root)):
        return _scan_several(tables, target, reading, trust, progress, labelled=labelled, task=task)
    _refuse_target(address, target)
    return _with_versions(_from_tree(reader.root, address, (files, folders), reading, reader=reader), reader)


def _scan_archive(
    path: File, description: str, target: str | None, reading: Reading, trust: Trust, *, labelled: bool, task: str
) -> ImageSet:
    archive = open_archive(path, trust)
    root = root_at(path)
    if webdataset.is_webdataset(archive):
        return _from_rows(
            description, webdataset.samples_of(root, [archive], target, labelled=labelled, task=task), reading
        )
    _refuse_target(description, target)
    files, folders, left_out = list[ImageFile](), {"", *archive.folders}, Counter[str]()
    for member, details in archive.members.items():
        parts = member.split("/")
        if any(is_ignored(part) for part in parts):
            continue
        folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
        if suffix_of(member) in IMAGE_SUFFIXES:
            files.append(ImageFile.of(member, archive.status, details.size))
        else:
            left_out[suffix_of(member) or "no suffix"] += 1
    warn_left_out(root, left_out)
    seen = [folder for folder in folders if not any(is_ignored(part) for part in folder.split("/") if part)]
    # An archive often holds one outer folder around all others. On disk one would give the inner folder instead.
    skip = _outer_folders({os.path.dirname(file.path) for file in files} - {""})
    images = _from_tree(root, description, (sorted(files), sorted(seen)), reading, skip=skip, reader=archive.read)
    return dataclasses.replace(images, versions=versions_of([path], [len(images)]))


def _outer_folders(parents: set[str]) -> int:
    """Count the outer folders, one inside another, that contain all class or split folders."""
    common = [part for part in os.path.commonpath(parents or [""]).split("/") if part]
    below = {tuple(parent.split("/")[: len(common) + 1]) for parent in parents} - {tuple(common)}
    if len(below) < 2:  # there is a single class
        return 0
    return next((depth for depth, part in enumerate(common) if SPLIT_WORDS.get(part.lower()) == 0), len(common))


def _from_tree(
    root: Path | str,
    description: str,
    listing: tuple[Sequence[ImageFile], Sequence[str]],
    reading: Reading,
    *,
    skip: int = 0,
    reader: Callable[[str], bytes] | None = None,
) -> ImageSet:
    tree = read_tree(root, *listing, reading, skip)
    return _image_set(
        description,
        root,
        Files.of(tree.files),
        tree.names,
        tree.splits,
        tree.groups,
        reader=reader,
        reading=tree.reading,
    )


# --- many files of many images ------------------------------------------------------------------------------


def _scan_several(
    pattern: str,
    target: str | None,
    reading: Reading,
    trust: Trust,
    progress: Progress | None,
    *,
    labelled: bool,
    task: str,
) -> ImageSet:
    if pattern.lower().endswith(".parquet"):
        paths = [file_at(name) for name in webdataset.expanded(pattern)]
        return _from_rows(
            pattern,
            parquet.open_tables(webdataset.root_of(pattern), paths, target, labelled=labelled, task=task),
            reading,
        )
    found = webdataset.open_tars(pattern, trust, target, progress, labelled=labelled, task=task)
    return _from_rows(pattern, found, reading)


def _tables_in(folder: Path) -> list[Path]:
    """Return the Parquet files with images in a folder, or in its folder ``data``, where Hugging Face puts them; or its Arrow files."""
    for place in (folder, folder / "data"):
        found = sorted(place.glob("*.parquet")) if place.is_dir() else []
        if found and parquet.image_column(found[0]) is not None:
            return found
    return saved_tables(folder) if folder.is_dir() else []


def _from_rows(description: str, rows: webdataset.Samples | parquet.Rows, reading: Reading) -> ImageSet:
    if not reading.settled:
        _refuse_folders_of(description, reading)
    images = _image_set(
        description, rows.root, rows.files, rows.names, rows.splits, rows.groups, reader=rows.read, reading=reading,
        target=rows.target,
    )  # fmt: skip
    return images if rows.versions is None else dataclasses.replace(images, versions=rows.versions)


# --- other sources ----------------------------------------------------------------------------------------


def _scan_arrays(path: Path, description: str, reading: Reading) -> ImageSet:
    _refuse_folders_of(description, reading)
    files, names, splits, reader = open_arrays(path)
    return _image_set(description, path, Files.of(files), names, splits, reader=reader, reading=reading)


def _scan_sample(text: str, reading: Reading) -> ImageSet:
    for again in (False, True):
        folder = sample_folder(text, again=again)
        with contextlib.suppress(SourceError, UnreadableImageError):  # it is empty, or a file cannot be read
            images = _scan_folder(folder, SAMPLE, reading)
            hashes = (hashlib.sha256(images.read(row)).digest() for row in range(len(images)))
            if hashlib.sha256(b"".join(hashes)).hexdigest() == SAMPLE_DIGEST:
                return images
    raise SourceError(
        f"{folder} does not hold the images that were just written there; is another program changing them?"
    )


def _refuse_folders_of(description: str, reading: Reading) -> None:
    """Refuse a reading that names folders for a source whose classes are not folders."""
    if reading.split_folders or reading.class_level:
        option = "--split-folders" if reading.split_folders else "--class-level"
        raise ConfigurationError(
            f"{option}: {description} has no class folders; leave the option out, or give the folder"
        )


def _scan_manifest(
    manifest: File,
    description: str,
    target: str | None,
    reading: Reading,
    *,
    labelled: bool,
    task: str,
    hosts: str,
) -> ImageSet:
    if not reading.settled:  # a recorded one may be of a folder of the same images
        _refuse_folders_of(description, reading)
    root = root_at(manifest.parent)
    paths, names, splits, groups, columns, found, addresses = read_manifest(
        manifest, target, labelled=labelled, task=task
    )
    near = [path for path in paths if path not in addresses]
    files, reader = _look_at_all(manifest, Path(root), near) if near else [], None
    if addresses:
        try:
            far, reader = remote.look_at_rows(str(root), addresses, remote.hosts_of(hosts))
        except SourceError as error:
            raise SourceError(f"{manifest}: {error}") from error
        here = iter(files)
        files = [far.get(path) or next(here) for path in paths]
    missing = [file.path for file in files if file.size < 0]
    hint = _hint(Path(root), missing) if near else ""
    if len(missing) == len(files):
        raise SourceError(
            f"{manifest}: none of its {len(files)} files exists, for example {os.path.join(root, missing[0])}; "
            f"expected paths that are absolute or relative to the manifest's folder{hint}"
        )
    if missing:
        logger.warning("%s: %s not exist: %s%s", manifest, counted(len(missing), "file", "does"), listed(missing), hint)
    if (
        target is None
        and found is None
        and names
        and all(split_of(name, alone=True) is not None for name in set(names))
    ):
        raise SourceError(
            f"{manifest}: the column 'label' holds the names of splits ({listed(sorted(set(names)))}): name that column "
            "'split', and the one with the classes 'label'. If they are classes, add --target label."
        )
    known = [bool(name) for name in names] if found is None else found.known.tolist()
    useless = sum(1 for given, split in zip(known, splits, strict=True) if not given and split in (0, 1))
    if useless and labelled:
        logger.warning(
            "%s: %s no label, in train or validation: left unlabelled", manifest, counted(useless, "image", "has")
        )
    images = _image_set(description, root, Files.of(files), names, splits, groups, columns, reader, reading, found)
    return images if reader is None else _with_versions(images, reader)


def _look_at_all(manifest: File, root: Path, paths: Sequence[str]) -> list[ImageFile]:
    """Look at the files of a manifest; a missing one is also looked for in the other Unicode forms of its name."""
    files = [look_at(root, path) for path in paths]
    given, other = set(paths), 0
    for number, file in enumerate(files):
        if file.size >= 0 or file.path.isascii():
            continue
        for form in ("NFC", "NFD"):  # macOS takes them for equal, Linux does not
            path = unicodedata.normalize(form, file.path)
            if path not in given and (found := look_at(root, path)).size >= 0:
                files[number], other = found, other + 1
                given.add(path)
                break
    if other:
        logger.warning(
            "%s: %s in another Unicode form than the file it names (NFC, NFD); found all the same",
            manifest,
            counted(other, "path", "is"),
        )
    return files


def _hint(root: Path, missing: Sequence[str]) -> str:
    """Return what is wrong with the paths that do not exist, where the first of them shows it."""
    ways = (
        ("\\\\", "/", "the paths have backslashes, as in Windows: write / instead"),
        (r"^\s+|\s+$|\s+(?=/)|(?<=/)\s+", "", "the paths have blanks around their names: remove them"),
    )
    for pattern, text, hint in ways:
        for path in missing[:3]:
            changed = re.sub(pattern, text, path)
            if changed != path and (look_at(root, changed).size >= 0 or "\\" in path):
                return f". Here {hint}"
    return ""
