"""Forget images on request: everything that this project keeps of them goes, and what cannot go is named.

    hashes --> labels files, runs, report pages --> store, shards, notes --> search every byte for what is left

The store comes last, as it alone knows the paths. After a kill the same command finishes the work.
"""

from __future__ import annotations

import contextlib
import html
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import ConfigurationError, LabelsError, RunError
from features.extraction.forgetting import Forgotten, held
from features.extraction.forgetting import forget as forget_rows
from features.files import behind_link, named, printable, read_small
from features.progress import Progress, counted
from features.store.reader import FeatureStore, parts_folder
from pipeline.labels.file import forget_decisions, keys_of, read_labels
from pipeline.runs.datasets import source_of
from pipeline.runs.folder import Run, find_runs
from pipeline.runs.forgetting import forget_predictions, holds_predictions, keeps_rows

LIST_BYTES = 100_000_000
PAGE_MARK = b"<p>Made by bottleneck-features "  # stands in every page that report has ever written
READ_BYTES = 4 << 20
SHOWN = 10  # names listed for a person
_HASH = re.compile("[0-9a-f]{64}")


def forget(
    file: str | Path,
    hashes: Collection[str],
    *,
    runs: str | Path | None = None,
    labels: Sequence[str | Path] = (),
    reports: Sequence[str | Path] = (),
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Remove images from a store and from what was made of it.

    Rows, features, labels, quarantine and the notes of this machine; lines of labels files; rows of ``predictions.csv`` in runs,
    whose scores are made again; and pages of ``report`` about this data set, which hold thumbnails and paths, as a whole.

    Parameters
    ----------
    file : Path
        The store.
    hashes : collection of str
        sha256 of the images' bytes, 64 hexadecimal digits each.
    runs : Path, optional
        Folder of runs.
    labels : sequence of Path
        Labels files.
    reports : sequence of Path
        Pages of ``report``, besides those in the folders of the store and of the runs.
    dry_run : bool
        Only say what would go.
    progress : callable, optional
        Called with ``("assemble", done, total)``.

    Returns
    -------
    dict
        ``rows``, ``quarantined``, ``shards`` and ``paths`` of the store; ``labels``, ``predictions``, ``reports``: what went; ``seen``,
        the runs whose weights may have been computed with the images; ``kept_rows``, those of them whose head consists of
        training rows; ``labels_left``, decisions in labels files that runs record and that were not named; ``source``, files that are still where the images came from; ``remaining``, files that still hold a hash.

    Raises
    ------
    ConfigurationError
        If something is no hash, or nothing here is about these images.
    RunError
        If a run would have no validation image left; nothing was changed then.
    LockedError
        If another process writes the store.
    """
    path = behind_link(Path(file))
    wanted = _checked(hashes)
    raw = [bytes.fromhex(text) for text in wanted]
    found, store = held(path, raw), FeatureStore.open(path)
    known = [] if runs is None or not Path(runs).is_dir() else find_runs(runs).runs
    of_data = [run for run in known if _is_of(run, store)]
    rows_of_runs = {run.run_id: holds_predictions(run, wanted) for run in known}
    lines = {str(name): _decisions(name, wanted) for name in labels}
    pages = list(_pages(path, runs, reports, [*wanted, *found.paths], of_data if found else []))
    for run in known:
        if rows_of_runs[run.run_id] >= run.metrics["validation"]["n"]:
            raise RunError(
                f"{run.folder}: all its validation images are to be forgotten; remove this folder, then run again. Nothing was changed"
            )
    if not dry_run:
        for name in labels:
            forget_decisions(name, wanted)
        for run in known:
            forget_predictions(run, wanted)
        for page in pages:
            page.unlink()
        forget_rows(path, raw, progress)
    root = Path(str(store.provenance.get("root") or path.parent))
    return {
        "format": 1,
        "file": str(file),
        "hashes": len(wanted),
        "done": not dry_run,
        "rows": found.rows,
        "quarantined": found.quarantined,
        "shards": found.shards,
        "paths": list(found.paths),
        "labels": {name: count for name, count in lines.items() if count},
        "predictions": {name: count for name, count in rows_of_runs.items() if count},
        "reports": [str(page) for page in pages],
        "seen": [run.run_id for run in of_data] if found else [],
        "kept_rows": [run.run_id for run in of_data if found and keeps_rows(run)],
        "source": [str(root / name) for name in found.paths if (root / name).is_file()] or _archive(root, found),
        "labels_left": _left(of_data, labels, wanted),
        "remaining": [] if dry_run else traces(path, wanted, runs=runs, more=[*labels, *reports]),
    }


def summary(document: dict[str, Any]) -> str:
    """Describe the result for a person."""
    done = document["done"]
    said = [
        f"{document['file']}: {counted(document['rows'], 'row')} and {counted(document['quarantined'], 'unreadable image')} "
        f"{'forgotten' if done else 'would be forgotten'}"
    ]
    if document["shards"]:
        said.append(f"  {counted(document['shards'], 'shard')} written again, or removed")
    for title, counts in (("decision", document["labels"]), ("prediction", document["predictions"])):
        said += [f"  {counted(count, title)} of {printable(name)}" for name, count in counts.items()]
    said += [f"  page removed: {printable(name)}; bottleneck report makes it again" for name in document["reports"]]
    if document["seen"]:
        said.append(
            f"cannot be undone: weights of {_listed(document['seen'])} may have been computed with these images. "
            "Remove these runs, and what was exported from them, and train again"
        )
    if document["kept_rows"]:
        said.append(
            f"holds features of training images in its model: {_listed(document['kept_rows'])}. Remove it and train again"
        )
    for name, count in document["labels_left"].items():
        said.append(
            f"not touched: {printable(name)}, under which a run was trained, holds {counted(count, 'decision')}; name it with --labels"
        )
    if document["source"]:
        said.append(
            f"not touched: {_listed(document['source'])}. The next extract takes up what is still there; remove it first. Copies, backups "
            "and files that you made yourself (--out, --grid) are not known here"
        )
    if document["remaining"]:
        said.append(f"still holds a hash: {_listed(document['remaining'])}")
    elif done:
        said.append("no byte of the store, its shards, the runs and the labels holds one of these hashes")
    return "\n".join(said)


def hashes_in(texts: Sequence[str], lists: Sequence[str | Path], file: Path | None = None) -> list[str]:
    """Collect hashes from options and from files of one hash, or one path of the store, on each line.

    Raises
    ------
    ConfigurationError
        If a line is neither; the message names it.
    """
    found = list(texts)
    for name in lists:
        try:
            lines = read_small(Path(name), LIST_BYTES).decode("utf-8", "surrogateescape").splitlines()
        except OSError as problem:
            raise ConfigurationError(f"{name}: cannot be read ({problem.strerror or problem})") from problem
        asked = [line.strip() for line in lines if line.strip()]
        paths = {line for line in asked if not _HASH.fullmatch(line.lower())}
        known: dict[str, str] = {}
        if paths and file is not None:
            store = FeatureStore.open(file)
            for table in (store.images, store.quarantine):
                places = [row for row, path in enumerate(table.paths) if path in paths]
                known |= {table.paths[row]: table.sha256[row].tobytes().hex() for row in places}
        for line in asked:
            if line in paths and line not in known:
                wanted = (
                    f" nor a path of {file}" if file else ". The store holds no path of what was forgotten: give hashes"
                )
                neither = "neither" if file else "not"
                raise ConfigurationError(
                    f"{name}: {printable(line)[:100]}: is {neither} a sha256 of 64 hexadecimal digits{wanted}"
                )
            found.append(known.get(line, line))
    return found


def traces(
    file: str | Path, hashes: Collection[str], *, runs: str | Path | None = None, more: Iterable[str | Path] = ()
) -> list[str]:
    """Search every byte of a store, its shards, runs and further files for content hashes, as 64 digits or as 32 bytes.

    Returns
    -------
    list of str
        Files that hold one of them.
    """
    needles = [form for text in _checked(hashes) for form in (text.encode(), bytes.fromhex(text))]
    path = behind_link(Path(file))
    folders = [parts_folder(path), *([] if runs is None else [Path(runs)])]
    files = [path, *map(Path, more), *(place for folder in folders for place in sorted(folder.rglob("*")))]
    return [str(place) for place in dict.fromkeys(files) if place.is_file() and _holds(place, needles)]


def found_again(file: Path, gone: Sequence[str], runs: str | Path | None) -> list[str]:
    """Search for forgotten images, each given as a hash, or as a file of hashes."""
    hashes = [text for text in gone if not os.path.isfile(text)]
    return traces(file, hashes_in(hashes, [text for text in gone if os.path.isfile(text)]), runs=runs)


def _checked(hashes: Collection[str]) -> list[str]:
    wanted = list(dict.fromkeys(text.strip().lower() for text in hashes))
    wrong = [text for text in wanted if not _HASH.fullmatch(text)]
    if wrong or not wanted:
        received = printable(wrong[0])[:80] if wrong else "none"
        raise ConfigurationError(
            f"sha256: received {received}, expected 64 hexadecimal digits, as sha256sum prints, or a file of them with --list"
        )
    if "0" * 64 in wanted:
        raise ConfigurationError(
            "sha256: 64 zeros stand for images of which no byte could be read; remove the file instead"
        )
    return wanted


def _holds(path: Path, needles: Sequence[bytes]) -> bool:
    longest, tail = max(map(len, needles)), b""
    with named(path), open(path, "rb") as stream:
        while data := stream.read(READ_BYTES):
            window = tail + data
            if any(needle in window for needle in needles):
                return True
            tail = window[-longest:]
    return False


def _decisions(name: str | Path, hashes: Collection[str]) -> int:
    wanted = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(-1, 32)
    return int(np.isin(keys_of(wanted), keys_of(read_labels(name).sha256)).sum())


def _left(runs: Sequence[Run], labels: Sequence[str | Path], hashes: Collection[str]) -> dict[str, int]:
    """Decisions about the images in labels files that runs record and that were not named: they are told, and not changed."""
    known = {os.path.realpath(name) for name in labels}
    paths = {os.path.realpath(str(run.labels["path"])) for run in runs if run.labels and "path" in run.labels}
    left = {}
    for path in sorted(paths - known):
        with contextlib.suppress(LabelsError, OSError):  # it has gone, or is no labels file any more
            if os.path.isfile(path) and (count := _decisions(path, hashes)):
                left[path] = count
    return left


def _is_of(run: Run, store: FeatureStore) -> bool:
    """Whether a run was trained on features of this data set."""
    same = os.path.realpath(str(run.config["features"]["store"])) == os.path.realpath(store.path)
    return same or run.source == source_of(store.source, str(store.provenance.get("root", "")))


def _pages(
    path: Path, runs: str | Path | None, reports: Sequence[str | Path], words: Sequence[str], of_data: Sequence[Run]
) -> Iterator[Path]:
    """Pages of ``report`` that name one of the images, or a run of their data set, whose thumbnails may show them."""
    folders = {path.resolve().parent, *([] if runs is None else [Path(runs).resolve().parent])}
    names = [place for folder in sorted(folders) for place in sorted(folder.glob("*.html"))]
    needles = [html.escape(printable(word)).encode() for word in [*words, *(run.run_id for run in of_data)]]
    for place in dict.fromkeys([*map(Path, reports), *names]):
        if _holds(place, [PAGE_MARK]) and _holds(place, needles):
            yield place


def _archive(root: Path, found: Forgotten) -> list[str]:
    return [str(root)] if found.paths and root.is_file() else []


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(printable, names[:SHOWN])) + more
