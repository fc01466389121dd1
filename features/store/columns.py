"""Write a store as a Parquet file for other tools: one row per image, or per view, and a column for each feature set.

store --rows of at most 64 MB--> pyarrow tables --row groups--> features.parquet
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from features.canonical import canonical_json
from features.errors import ConfigurationError
from features.files import atomic_file
from features.machine import pyarrow_for
from features.progress import Progress
from features.sources.splits import SPLITS
from features.store.reader import FeatureStore
from features.targets import MULTILABEL, known_cells

if TYPE_CHECKING:
    import pyarrow

GROUP_BYTES = 64 << 20  # of features in one row group
FORMAT = "bottleneck-features-parquet 1"
_COLUMNS = ("path", "sha256", "view", "split", "label", "group")


def write_parquet(
    store: FeatureStore,
    path: Path,
    *,
    all_views: bool = False,
    float16: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write features, paths, hashes, splits and labels of a store; labels are the effective ones of the given store.

    A feature set is a column of lists of one length, float32, flattened in C order; the metadata of the column hold its
    ``shape``, ``recipe`` and ``fingerprint``, those of the file the classes and what else the store says of itself. Each column
    of a target is one column ``TARGET.COLUMN``: Boolean for labels, float64 for numbers, null where it is unknown.

    Parameters
    ----------
    store : FeatureStore
        The store, perhaps under a labels file.
    path : Path
        The file, which must not exist.
    all_views : bool
        Whether each view gets a row, numbered in the column ``view``, instead of view 0 alone.
    float16 : bool
        Whether what is stored in float16 stays so; else it becomes float32.
    progress : callable, optional
        Called with ``(stage, done, total)``.

    Returns
    -------
    int
        Number of rows written.

    Raises
    ------
    ConfigurationError
        If the file exists, or a column or feature set has the name of another column.
    StoreError
        If it cannot be written.
    """
    if path.exists():
        raise ConfigurationError(f"{path}: exists already. Choose another name, or remove the file.")
    pa = pyarrow_for(path)
    views = max(map(store.views, store.names)) if all_views else 1
    if all_views and min(map(store.views, store.names)) != views:
        raise ConfigurationError(f"{store.path}: its feature sets have different numbers of views; leave --views out")
    schema = _schema(pa, store, all_views=all_views, float16=float16)
    each = views * sum(math.prod(store.shape(name)[2:]) * 4 for name in store.names)
    step = max(1, GROUP_BYTES // max(1, each))
    features = [field.name for field in schema if (field.metadata or {}).get(b"fingerprint")]
    with (
        atomic_file(path) as temporary,
        pa.parquet.ParquetWriter(
            temporary, schema, use_dictionary=[n for n in schema.names if n not in features]
        ) as file,
    ):
        for start in range(0, len(store), step):
            stop = min(len(store), start + step)
            columns = _known(store, start, stop, views, all_views=all_views)
            for name in store.names:
                columns[name] = _lists(pa, store.read(name, start, stop)[:, :views], schema.field(name).type)
            file.write_table(pa.table(columns, schema), row_group_size=(stop - start) * views)
            if progress:
                progress("write", stop, len(store))
    return len(store) * views


def _schema(pa: Any, store: FeatureStore, *, all_views: bool, float16: bool) -> pyarrow.Schema:
    fields = [pa.field(name, pa.string()) for name in _COLUMNS if name != "view"]
    if all_views:
        fields.insert(2, pa.field("view", pa.int32()))
    fields += [pa.field(name, pa.string()) for name in store.images.columns]
    fields += [pa.field(name, kind) for name, kind in _target_columns(pa, store)]
    for name in store.names:
        recipe, shape = store.recipes[name], store.shape(name)[2:]
        kind = pa.float16() if float16 and recipe.dtype == "float16" else pa.float32()
        metadata = {"shape": canonical_json(list(shape)), "recipe": recipe.canonical, "fingerprint": recipe.fingerprint}
        fields.append(pa.field(name, pa.list_(kind, math.prod(shape)), metadata=metadata))
    names = [field.name for field in fields]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"{store.path}: two columns would be named {twice[0]!r}; rename that of the manifest")
    said = {
        "format": FORMAT, "classes": list(store.classes), "source": store.source, "split_rule": store.split_rule,
        "data_digest": store.data_digest, "labelled_by": dict(store.labelled_by), "provenance": dict(store.provenance),
    }  # fmt: skip
    return pa.schema(fields, metadata={"bottleneck": json.dumps(said, sort_keys=True)})


def _target_columns(pa: Any, store: FeatureStore) -> list[tuple[str, Any]]:
    """Return name and type of the columns of the target; whether a label holds is a Boolean."""
    target = store.images.target
    if target is None:
        return []
    kind = pa.bool_() if target.task == MULTILABEL else pa.float64()
    return [(f"{target.name}.{column}", kind) for column in target.columns]


def _target_values(store: FeatureStore, start: int, stop: int) -> dict[str, list[Any]]:
    """Return the values of the target, None where one is unknown."""
    target = store.images.target
    if target is None:
        return {}
    values = target.values[start:stop]
    known = known_cells(values)
    numbers = values.astype(bool) if target.task == MULTILABEL else values
    return {
        f"{target.name}.{column}": [
            value if there else None
            for value, there in zip(numbers[:, number].tolist(), known[:, number].tolist(), strict=True)
        ]
        for number, column in enumerate(target.columns)
    }


def _known(store: FeatureStore, start: int, stop: int, views: int, *, all_views: bool) -> dict[str, Any]:
    """Return the columns of some images but for the features, each value once per view; None where there is none."""
    table, rows = store.images, range(start, stop)

    def repeated(values: list[Any]) -> list[Any]:
        return [value for value in values for _ in range(views)]

    columns = {
        "path": repeated([table.paths[row] for row in rows]),
        "sha256": repeated([table.sha256[row].tobytes().hex() for row in rows]),
        "split": repeated([SPLITS[code] for code in table.splits[start:stop].tolist()]),
        "label": repeated([store.classes[code] if code >= 0 else None for code in table.labels[start:stop].tolist()]),
        "group": repeated([(table.groups[row] or None) if table.groups else None for row in rows]),
    }
    columns = {name: list(map(_printable, values)) for name, values in columns.items()}
    if all_views:
        columns["view"] = list(range(views)) * len(rows)
    columns |= {name: repeated(values) for name, values in _target_values(store, start, stop).items()}
    return columns | {
        name: repeated([_printable(values[row]) for row in rows]) for name, values in table.columns.items()
    }


def _printable(text: str | None) -> str | None:
    """Replace bytes of a name that is not UTF-8, which Parquet has no place for."""
    return None if text is None else text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _lists(pa: Any, values: np.ndarray, kind: Any) -> Any:
    flat = np.ascontiguousarray(values, dtype=kind.value_type.to_pandas_dtype()).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=kind)
