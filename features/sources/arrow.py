"""Arrow files (IPC streams, as ``save_to_disk`` of Hugging Face writes them) behind the part of pyarrow's ``ParquetFile`` that is used.

file --mapped--> record batches, checked --ArrowTable.iter_batches()--> a few rows at a time
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from features.sources.blocks import File, for_arrow

SUFFIX = ".arrow"


class _Group(NamedTuple):
    num_rows: int


class _Metadata(NamedTuple):
    num_rows: int
    groups: Sequence[_Group]

    @property
    def num_row_groups(self) -> int:
        """Number of record batches."""
        return len(self.groups)

    def row_group(self, number: int) -> _Group:
        """Return what is known of one record batch."""
        return self.groups[number]


class ArrowTable:
    """An Arrow file on a disk; its record batches are its row groups.

    Parameters
    ----------
    pyarrow : module
    path : Path
        The file, which is mapped: rows take memory only while they are used.

    Raises
    ------
    pyarrow.ArrowException
        If it is no Arrow stream or is damaged.
    """

    def __init__(self, pyarrow: ModuleType, path: Path) -> None:
        self._pyarrow, self._path = pyarrow, path
        batches = [batch.num_rows for batch in self._batches()]
        with pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))) as stream:
            self.schema_arrow = stream.schema
        self.metadata = _Metadata(sum(batches), [*map(_Group, batches)])

    def __enter__(self) -> ArrowTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def iter_batches(
        self,
        batch_size: int = 65536,
        row_groups: Sequence[int] | None = None,
        columns: Sequence[str] | None = None,
        use_threads: bool = False,
    ) -> Iterator[Any]:
        """Yield rows of some record batches, with some columns; ``name.field`` is the whole column ``name``."""
        known = self.schema_arrow.names
        names = [name if name in known else name.partition(".")[0] for name in columns or known]
        for number, batch in enumerate(self._batches()):
            if row_groups is not None and number not in row_groups:
                continue
            chosen = batch.select(names)
            chosen.validate(full=True)  # of an untrusted file: offsets may lead anywhere
            for start in range(0, chosen.num_rows, batch_size):
                yield chosen.slice(start, batch_size)
            if row_groups is not None and number >= max(row_groups):
                return

    def _batches(self) -> Iterator[Any]:
        with self._pyarrow.ipc.open_stream(self._pyarrow.memory_map(str(self._path))) as stream:
            yield from stream


def open_table(pyarrow: ModuleType, path: File, **options: Any) -> Any:
    """Open a Parquet or an Arrow file, as its suffix says; options are those of ``ParquetFile``."""
    source = for_arrow(path)
    if path.suffix.lower() == SUFFIX and isinstance(source, Path):
        return ArrowTable(pyarrow, source)
    return pyarrow.parquet.ParquetFile(source, **options)


def kind_of(path: File) -> str:
    """Return what a file should be, as its suffix says."""
    return "Arrow" if path.suffix.lower() == SUFFIX else "Parquet"


def saved_tables(folder: Path) -> list[Path]:
    """Return the Arrow files that ``save_to_disk`` has put into a folder, or into one folder for each split."""
    places = [folder, *(sorted(folder.iterdir()) if (folder / "dataset_dict.json").is_file() else ())]
    there = (place for place in places if (place / "state.json").is_file())
    return [*itertools.chain.from_iterable(sorted(place.glob(f"*{SUFFIX}")) for place in there)]
