"""The folder of a store's shards, and the journal that records which of them are finished.

finished shard --commit()--> one JSON line on disk --shards()--> opened again by the next run
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from features.canonical import canonical_json
from features.errors import IntegrityError
from features.extraction.shard import ShardRecord, find_shard
from features.files import atomic_file, file_digest, named, writing
from features.store.reader import FeatureStore, is_shard_name, shard_path

logger = logging.getLogger(__name__)
JOURNAL_VERSION = 1


class PartsFolder:
    """The folder that holds the shards of an unfinished extraction or of a sharded store, and their journal.

    The journal has one JSON line per shard. An incomplete last line, a missing shard or a wrong checksum costs only
    the shard concerned. A shard file that a crash kept out of the journal is found again by its name. Files with
    other names than those of shards are left alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = path / "manifest.jsonl"
        self.records: dict[str, ShardRecord] = {}

    def read(self) -> None:
        """Read the journal, and find shard files that it lacks; nothing is changed on disk."""
        self.records = {}
        with named(self.journal):
            lines = self.journal.read_bytes().splitlines() if self.journal.is_file() else []
        for record in filter(None, map(_parse_record, lines)):
            if shard_path(self.path, record.identity).is_file():
                self.records[record.identity] = record
        for path in self._files():
            if path.stem not in self.records and (found := find_shard(path)) is not None:
                self.records[found.identity] = found

    def open(self) -> None:
        """Create the folder, remove left-over temporary files, and write a journal of all shards found."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._sweep()
        self._rewrite()

    def commit(self, record: ShardRecord) -> None:
        """Add a finished shard to the journal; when this returns, the line is on disk (fsync)."""
        with writing(self.journal), open(self.journal, "ab") as stream:
            stream.write(_record_line(record))
            stream.flush()
            os.fsync(stream.fileno())
        self.records[record.identity] = record

    def shards(self, *, known: Collection[str] = ()) -> Iterator[tuple[ShardRecord, FeatureStore]]:
        """Open every committed shard with the right checksum; the others are dropped with a warning.

        Parameters
        ----------
        known : collection of str
            Names of shards to leave out, because the index of the store already covers them.

        Raises
        ------
        IntegrityError
            If a shard holds other views than the journal says.
        """
        for identity, record in list(self.records.items()):
            if identity in known:
                continue
            path = shard_path(self.path, identity)
            if file_digest(path) != record.sha256:
                logger.warning("%s is damaged (its checksum differs); its images are computed again", path)
                del self.records[identity]
                continue
            shard = FeatureStore.open_shard(path)
            if any(shard.views(name) != len(record.views) for name in shard.names):
                raise IntegrityError(f"{path}: holds other views than {self.journal} says. Move it away and run again.")
            yield record, shard

    def drop(self, identities: Collection[str]) -> None:
        """Delete the files of these shards and forget their records."""
        for identity in identities:
            shard_path(self.path, identity).unlink(missing_ok=True)
            self.records.pop(identity, None)

    def keep(self, identities: Collection[str]) -> None:
        """Delete all shards but these, and record in the journal that a sharded store needs them."""
        self._sweep()  # removes temporary files of other machines that were killed meanwhile
        if set(self.records) == set(identities) and all(record.kept for record in self.records.values()):
            return
        self.drop([path.stem for path in self._files() if path.stem not in identities])
        self.records = {key: dataclasses.replace(record, kept=True, engine="") for key, record in self.records.items()}
        self._rewrite()

    def remove(self) -> None:
        """Remove journal, shards and folder; the journal first, so that a crash meanwhile leaves no wrong records."""
        for name in [self.journal, *self._files(), *self.path.glob(".*.tmp")]:
            name.unlink(missing_ok=True)
        if self.path.exists() and any(self.path.iterdir()):
            logger.warning("%s is not removed, because it contains other files", self.path)
        elif self.path.exists() and not self.path.is_symlink():  # a link may lead to another disk and is kept
            self.path.rmdir()

    def any_shard(self) -> bool:
        """Whether the folder contains a shard file, in the journal or not."""
        return bool(self._files())

    def _files(self) -> list[Path]:
        return [path for path in sorted(self.path.glob("*.h5")) if is_shard_name(path.stem) and path.is_file()]

    def _sweep(self) -> None:
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def _rewrite(self) -> None:
        with atomic_file(self.journal) as temporary:
            temporary.write_bytes(b"".join(map(_record_line, self.records.values())))


def _record_line(record: ShardRecord) -> bytes:
    values = {**dataclasses.asdict(record), "version": JOURNAL_VERSION}
    if not record.engine:
        del values["engine"]  # as lines of 0.1.0, which finds the shard of another line by its file
    return canonical_json(values).encode("ascii") + b"\n"


def _parse_record(line: bytes) -> ShardRecord | None:
    """Parse a line of the journal; None if a crash cut the line short (its shard is then found by its file)."""
    try:
        values = json.loads(line)
        if values.pop("version") != JOURNAL_VERSION:
            return None
        record = ShardRecord(**{**values, "views": tuple(values["views"])})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    texts = all(isinstance(text, str) for text in (record.identity, record.sha256, record.engine))
    if (
        not texts
        or not isinstance(record.kept, bool)
        or not is_shard_name(record.identity)
        or not all(type(view) is int for view in record.views)
    ):
        return None
    return record
