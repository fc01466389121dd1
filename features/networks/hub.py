"""Networks by name from a hub: ``hf:OWNER/NAME[@REVISION]`` becomes a folder in the cache that is whole and pinned.

    name --pin--> commit --record--> files, licence --check or download--> HubFolder

A branch is looked up once. The commit that it stood for then is pinned: later uses of the same name need no network and
give the same files, although the branch may have moved. Pins and records are signed and lie beside the files:

    cache/hub/HOST/OWNER--NAME/at-REVISION.json   the commit that a branch or tag stood for
    cache/hub/HOST/OWNER--NAME/COMMIT.json        licence, names of all files, size and sha256 of those that are here
    cache/hub/HOST/OWNER--NAME/COMMIT/...         the files

A file is used only if it is as the record says: unchanged since it was noted (inode, change time, modification time,
size), or of the same sha256. Weights whose licence restricts their use are not fetched: their user has to accept it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from features.cache import cache_path, keep_json, kept_json
from features.errors import (
    ConfigurationError,
    FetchError,
    WeightsError,
    WeightsNotFoundError,
    brief,
    nearest,
)
from features.files import file_digest, file_stamp, printable, writing
from features.networks.fetching import Server

logger = logging.getLogger(__name__)
PREFIX = "hf:"
FORMAT = 1
# ONNX files of one image network, the most fitting first: a vision_model.onnx is the image half of a network of images
# and texts, whose model.onnx takes both.
ONNX_NAMES = ("onnx/vision_model.onnx", "vision_model.onnx", "onnx/model.onnx", "model.onnx")
_DESCRIPTIONS = ("config.json", "preprocessor_config.json", "processor_config.json", "open_clip_config.json")
_PRESET = re.compile(
    r"(config|metadata|task|preprocessor|image_converter|tokenizer|model\.weights)\.json|model(_\d{1,5})?\.weights\.h5|assets/.+"
)
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,99}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST_FILES = 10_000
_LONGEST_PATH = 500  # bytes
# Licences that ask for no more than naming the authors, or for sharing changes under the same licence. Every other one is
# for the user to read.
_FREE = frozenset(
    [
        "afl-3.0",
        "agpl-3.0",
        "apache-2.0",
        "artistic-2.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "bsl-1.0",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc0-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "cdla-sharing-1.0",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "isc",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "mit",
        "mpl-2.0",
        "ms-pl",
        "ncsa",
        "odc-by",
        "ofl-1.1",
        "osl-3.0",
        "pddl",
        "postgresql",
        "unlicense",
        "wtfpl",
        "zlib",
    ]
)


@dataclasses.dataclass(frozen=True)
class HubFolder:
    """A cached folder of a hub's repository, with those files that were wanted.

    Parameters
    ----------
    path : Path
        The folder. Files lie in it under the names of the repository, such as ``onnx/model.onnx``.
    name : str
        ``hf:OWNER/NAME@COMMIT``, which means these files for ever.
    commit : str
        40 hexadecimal digits.
    license : str or None
        Licence that the hub names; None if it names none.
    """

    path: Path
    name: str
    commit: str
    license: str | None


def is_hub_name(name: str) -> bool:
    """Whether a name of a network is meant for a hub: it begins with ``hf:``."""
    return name.startswith(PREFIX)


def needed_files(listed: Sequence[str]) -> list[str]:
    """Choose the files of a repository that a network of images needs.

    An ONNX file with its external data; without one, a KerasHub preset; without that, a ``.keras`` file. The
    descriptions beside it always belong to it.

    Parameters
    ----------
    listed : sequence of str
        All files of the repository.

    Raises
    ------
    WeightsError
        If there is no network that can be used here, or more than one.
    """
    described = [name for name in _DESCRIPTIONS if name in listed]
    for onnx in ONNX_NAMES:
        if onnx in listed:
            data = re.compile(re.escape(onnx) + r"([._]data.*)?")
            return [*(name for name in listed if data.fullmatch(name)), *described]
    if "config.json" in listed and {"model.weights.h5", "model.weights.json"} & set(listed):
        return [name for name in listed if _PRESET.fullmatch(name)]
    keras = [name for name in listed if name.endswith(".keras") and "/" not in name]
    if len(keras) == 1:
        return [*keras, *described]
    if keras:
        raise WeightsError(
            f"it holds several .keras files ({brief(', '.join(keras), 200)}): download one and name it by its path"
        )
    raise WeightsError(
        f"it holds no network that can be used here, but {brief(', '.join(sorted(listed)), 200)}. Expected "
        f"{' or '.join(ONNX_NAMES[2:])}, a KerasHub preset or a .keras file. Repositories of onnx-community and Xenova have "
        "ONNX files of many networks; others can be exported (optimum-cli export onnx) and given by their folder"
    )


def hub_folder(name: str, wanted: Callable[[Sequence[str]], Sequence[str]] = needed_files) -> HubFolder:
    """Return the cached folder of a repository; what is missing in it is downloaded first.

    ``HF_ENDPOINT`` names another hub than https://huggingface.co, ``HF_TOKEN`` is sent to that hub alone, and
    ``HF_HUB_OFFLINE=1`` allows only what is cached.

    Parameters
    ----------
    name : str
        ``hf:OWNER/NAME`` or ``hf:OWNER/NAME@REVISION``, where the revision is a branch, a tag or a commit. Default: main.
    wanted : callable
        Given the names of all files of the repository, returns those that are needed.

    Raises
    ------
    ConfigurationError
        If the name is not one.
    WeightsError
        If the repository has no such file, is gated, or has a licence that restricts its use; if what comes is damaged.
    WeightsNotFoundError
        If the hub cannot be reached, or has no such repository or revision.
    StoreError
        If the cache cannot be written.
    """
    repository, revision = _parse(name)
    server = Server.from_environment()
    place = cache_path("hub", quote(server.endpoint.partition("://")[2], safe=""), repository.replace("/", "--"))
    about = {"format": FORMAT, "endpoint": server.endpoint, "repository": repository}
    pin, is_pinned = place / f"at-{quote(revision, safe='')}.json", _COMMIT.fullmatch(revision) is not None
    commit = revision if is_pinned else (_read(pin, {**about, "revision": revision}) or {}).get("commit")
    with _explained(repository, revision, server):
        record = _Record.read(place, about, commit) if commit else None
        if record is None:
            record = _look_up(server, repository, commit or revision, place)
            keep_json(record.file, {**about, **record.to_dict()})
        if not is_pinned and commit != record.commit:
            keep_json(pin, {**about, "revision": revision, "commit": record.commit})
            logger.info("%s is pinned to the commit %s; remove %s to look again", name, record.commit, pin)
        complete = _completed(server, repository, record, _chosen(record.listed, wanted))
        if complete != record:
            keep_json(record.file, {**about, **complete.to_dict()})
    return HubFolder(record.folder, f"{PREFIX}{repository}@{record.commit}", record.commit, record.license)


def is_name(name: str) -> bool:
    """Whether a name is ``hf:OWNER/NAME`` or ``hf:OWNER/NAME@REVISION``."""
    repository, at, revision = name.removeprefix(PREFIX).partition("@")
    owner, slash, short = repository.partition("/")
    right = slash and all(_NAME.fullmatch(part) and "--" not in part and ".." not in part for part in (owner, short))
    return bool(right) and not (at and (not _REVISION.fullmatch(revision) or ".." in revision))


def _parse(name: str) -> tuple[str, str]:
    """Split a name into repository and revision."""
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if not is_name(name):
        raise ConfigurationError(
            f"backbone: received {brief(printable(name), 200)!r}, expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION, as in "
            "hf:onnx-community/dinov2-small; a revision is a branch, a tag or a commit."
        )
    return repository, (revision.lower() if _COMMIT.fullmatch(revision.lower()) else revision) or "main"


# ------------------------------------------------------------------------------------ what the hub says
def _look_up(server: Server, repository: str, revision: str, place: Path) -> _Record:
    """Ask the hub for a revision: its commit, licence and files."""
    path = f"/api/models/{repository}/revision/{quote(revision, safe='')}"
    answer = server.json(path)
    if not isinstance(answer, dict):
        raise WeightsError(f"the hub answers {path} with {brief(repr(answer), 80)}, expected an object of JSON")
    commit, siblings = answer.get("sha"), answer.get("siblings")
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise WeightsError(f"the hub gives the commit {brief(repr(commit), 80)}, expected 40 hexadecimal digits")
    if _COMMIT.fullmatch(revision) and commit != revision:
        raise WeightsError(f"the hub gives the commit {commit}, expected {revision}")
    if not isinstance(siblings, list) or len(siblings) > _MOST_FILES:
        count = len(siblings) if isinstance(siblings, list) else "no list of"
        raise WeightsError(f"the hub names {count} files, expected a list of at most {_MOST_FILES:,}")
    listed = tuple(sorted({_checked_path(item) for item in siblings}))
    return _Record(place, commit, _checked_license(server, repository, answer), listed, {})


def _checked_path(item: Any) -> str:
    """Return the path of a file inside a repository; ``WeightsError`` if it could lie outside, or is none."""
    path = item.get("rfilename") if isinstance(item, dict) else None
    if isinstance(path, str) and path.isprintable() and "\\" not in path and len(path.encode()) <= _LONGEST_PATH:
        parts = path.split("/")
        if not {"", ".", ".."} & set(parts) and all(len(part.encode()) <= 200 for part in parts):
            return path
    raise WeightsError(f"the hub names a file {brief(repr(path), 100)}, which is no path inside a repository")


def _checked_license(server: Server, repository: str, answer: Mapping[str, Any]) -> str | None:
    """Return the licence that the hub names; ``WeightsError`` if the repository is gated or the licence restricts its use."""
    way = (
        f"Read and accept it at {server.endpoint}/{repository}, download the repository yourself, and give its folder by its "
        "path: --backbone FOLDER"
    )
    if answer.get("gated", False) is not False:
        raise WeightsError(f"it is gated: its owners want you to accept a licence first. {way}")
    card, tags = answer.get("cardData"), answer.get("tags")
    named = card.get("license") if isinstance(card, dict) else None
    found = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    if not found and isinstance(tags, list):
        found = [tag.removeprefix("license:") for tag in tags if isinstance(tag, str) and tag.startswith("license:")]
    licenses = [printable(str(item))[:100] for item in found[:10]]
    if not licenses:
        logger.warning("%s%s: the hub names no licence; look for one before you use it", PREFIX, repository)
        return None
    if not {item.lower() for item in licenses} <= _FREE:
        further = card.get("license_name") if isinstance(card, dict) else None
        shown = " and ".join(licenses) + (f" ({printable(further)[:100]})" if isinstance(further, str) else "")
        raise WeightsError(
            f"its licence {shown!r} is not one of the free ones known here and may restrict its use. {way}"
        )
    return ", ".join(licenses)


@contextlib.contextmanager
def _explained(repository: str, revision: str, server: Server) -> Iterator[None]:
    """Name the repository in each error, and say what to do where the hub did not give what was asked for."""
    name = f"{PREFIX}{repository}"
    try:
        yield
    except FetchError as error:
        if error.status == 404 and error.code not in ("RepoNotFound", "EntryNotFound"):
            known = (
                "the hub has no such revision"
                if error.code == "RevisionNotFound"
                else "the hub has no such repository or revision"
            )
            way = f"Look for its branches, tags and commits at {server.endpoint}/{repository}"
            raise WeightsNotFoundError(f"{name}: {known} ({revision!r}). {way}. Tried: {error}.") from error
        if error.status in (401, 403, 404):
            way = (
                "A private one needs HF_TOKEN, a token that may read it; a gated one is given by the path of its folder"
            )
            raise WeightsNotFoundError(
                f"{name}: it does not exist, or it is not for everyone. {way}. Tried: {error}"
            ) from error
        network = "Unset it for once" if server.offline else "Is there a network? HF_ENDPOINT names a mirror"
        if error.status == 429 or error.status >= 500:
            network = "The hub is busy: try again later" + (", or with HF_TOKEN" if not server.token else "")
        way = f"{network}; or download the repository on another machine and give its folder: --backbone FOLDER"
        raise WeightsNotFoundError(
            f"{name} is not whole in the cache, and cannot be fetched. Tried: {error}. {way}."
        ) from error
    except WeightsError as error:
        raise WeightsError(f"{name}: {error}.") from error


# --------------------------------------------------------------------------------------- what is cached
@dataclasses.dataclass(frozen=True)
class _Note:
    """What a file was when it was downloaded; ``stamp`` is its inode, change time, modification time and size."""

    sha256: str
    size: int
    stamp: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class _Record:
    """One commit of a repository; ``files`` are those that are in the folder."""

    place: Path
    commit: str
    license: str | None
    listed: tuple[str, ...]
    files: Mapping[str, _Note]

    @property
    def folder(self) -> Path:
        return self.place / self.commit

    @property
    def file(self) -> Path:
        return self.place / f"{self.commit}.json"

    def to_dict(self) -> dict[str, Any]:
        files = {name: [note.sha256, note.size, list(note.stamp)] for name, note in self.files.items()}
        return {"commit": self.commit, "license": self.license, "listed": list(self.listed), "files": files}

    @classmethod
    def read(cls, place: Path, about: Mapping[str, Any], commit: str) -> _Record | None:
        """Read a record; None if there is none that can be believed."""
        values = _read(place / f"{commit}.json", {**about, "commit": commit})
        if values is None:
            return None
        files = {name: _Note(sha256, size, tuple(stamp)) for name, (sha256, size, stamp) in values["files"].items()}
        return cls(place, commit, values["license"], tuple(values["listed"]), files)


def _read(path: Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read a signed object of JSON that is about these things; None if there is none."""
    values = kept_json(path)
    return values if isinstance(values, dict) and about.items() <= values.items() else None


def _chosen(listed: Sequence[str], wanted: Callable[[Sequence[str]], Sequence[str]]) -> list[str]:
    chosen = list(wanted(listed))
    for name in chosen:
        if name not in listed:
            raise WeightsError(f"it holds no file {brief(name, 200)!r}{nearest(name, listed)}")
    return chosen


def _completed(server: Server, repository: str, record: _Record, names: Sequence[str]) -> _Record:
    """Check the files that are there, and download those that are missing or not as they were."""
    files = dict(record.files)
    for name in names:
        path = record.folder / name
        note = _unchanged(path, files.get(name))
        if note is None:
            with writing(path):
                sha256 = server.fetch(f"/{repository}/resolve/{record.commit}/{quote(name)}", path)
                note = _Note(sha256, path.stat().st_size, file_stamp(path))
        files[name] = note
    return dataclasses.replace(record, files=files)


def _unchanged(path: Path, note: _Note | None) -> _Note | None:
    """Return the note on a file, with its stamp of now, if the file is as noted; None if it has to come again."""
    if note is None or not path.is_file():
        return None
    stamp = file_stamp(path)
    if stamp == note.stamp:
        return note
    if stamp[3] == note.size and file_digest(path) == note.sha256:
        return dataclasses.replace(note, stamp=stamp)
    logger.warning("%s is not as it was downloaded; it is downloaded again", path)
    return None
