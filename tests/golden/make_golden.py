"""Make the golden files: stores that every later release must open with the values below.

    python tests/golden/make_golden.py FOLDER

writes ``store-v1.h5``, and the same rows as an index and two shards, ``sharded-v1.h5`` and ``sharded-v1.h5.parts``, as
this release writes them. The files that lie beside this script are never written again: a new format version gets new
ones, and the old ones stay.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ROWS = 24


def features() -> dict[str, np.ndarray]:
    """Values that can be worked out by hand: row, view and place, exact in both types."""
    row, view = np.arange(ROWS)[:, None], np.arange(2)[None, :]
    base = (row + 100 * view).astype(np.float32)
    return {
        "out_relu.avg": base[:, :, None] + np.arange(6, dtype=np.float32) / 8,
        "block|add": (base[:, :, None, None, None] / 4 + np.arange(12).reshape(2, 2, 3)).astype(np.float16),
    }


def table() -> dict[str, object]:
    rows = np.arange(ROWS)
    return {
        "paths": tuple(
            b"cat/\xff\xfe.png".decode("utf-8", "surrogateescape")
            if row == 0
            else f"{'cat' if row < 12 else 'dög'}/{row:02d}.png"
            for row in rows
        ),
        "sha256": np.repeat(rows[:, None], 32, axis=1).astype(np.uint8),
        "labels": np.where(rows == 23, -1, rows // 12).astype(np.int32),
        "splits": np.where(rows == 23, 3, rows % 3).astype(np.int8),
        "groups": tuple(f"patient {row % 5}" if row else "" for row in rows),
        "widths": (rows + 10).astype(np.int32),
        "heights": (rows + 20).astype(np.int32),
        "sizes": (rows.astype(np.int64) + 1) << 33,
        "mtimes_ns": rows.astype(np.int64) + 1_500_000_000_000_000_000,
    }


QUARANTINE = {
    "paths": ("cat/bad.png", "dög/empty.jpg"),
    "sha256": np.stack([np.full(32, 7), np.zeros(32)]).astype(np.uint8),
    "reasons": ("truncated", "empty"),
    "sizes": np.array([5000, 0], np.int64),
    "mtimes_ns": np.array([1, 2], np.int64),
}
CLASSES = ("cat", "dög")
SOURCE, SPLIT_RULE = "images/ä", "hash:0.8,0.1,0.1@7"
SHARDS = {"0" * 20: slice(0, None, 2), "f" * 20: slice(1, None, 2)}
PROVENANCE = {"engine": "golden", "batch_size": 32, "software": {"numpy": "2.0"}}


def main(folder: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    sys.path.insert(0, str(root))
    from features.files import atomic_file
    from features.recipe import PixelRule, Recipe
    from features.store.reader import FeatureStore, parts_folder, shard_path
    from features.store.schema import FeatureSpec, ImageTable, Quarantine, ShardTable
    from features.store.writer import StoreWriter

    pixels = PixelRule(96, 128, resize="keras", fit="crop")
    recipes = [
        Recipe("mobilenetv2", "0" * 64, "out_relu", "avg", pixels, "mobilenet_v2", seed=7),
        Recipe("mobilenetv2", "0" * 64, "block/add", "none", pixels, "mobilenet_v2", seed=7, dtype="float16"),
    ]
    values = features()
    specs = {recipe.name: FeatureSpec(recipe, 2, values[recipe.name].shape[2:]) for recipe in recipes}

    def write(path: Path, kind: str, arrays: dict[str, np.ndarray], images: dict[str, object], **more: object) -> None:
        with atomic_file(path) as temporary:
            writer = StoreWriter(temporary, kind=kind, rows=len(images["labels"]), features=specs)  # type: ignore[arg-type]
            try:
                for name, rows in arrays.items():
                    writer.append(name, rows)
                writer.finish(images=ImageTable(**images), **more)  # type: ignore[arg-type]
            finally:
                writer.close()

    tables = {
        "quarantine": Quarantine(**QUARANTINE),  # type: ignore[arg-type]
        "classes": CLASSES,
        "source": SOURCE,
        "split_rule": SPLIT_RULE,
        "provenance": PROVENANCE,
    }
    write(folder / "store-v1.h5", "store", values, table(), **tables)

    index, digests = folder / "sharded-v1.h5", []
    parts_folder(index).mkdir(exist_ok=True)
    undecided = {"labels": np.full(ROWS, -1, np.int32), "splits": np.full(ROWS, -1, np.int8), "groups": None}
    none = Quarantine((), np.zeros((0, 32), np.uint8), (), np.zeros(0, np.int64), np.zeros(0, np.int64))
    for name, part in SHARDS.items():
        images = {key: None if column is None else column[part] for key, column in {**table(), **undecided}.items()}  # type: ignore[index]
        path = shard_path(parts_folder(index), name)
        write(path, "shard", {key: rows[part] for key, rows in values.items()}, images, quarantine=none)
        digests.append(FeatureStore.open_shard(path).digest)
    places = np.array([[[row % 2, row // 2, view] for view in range(2)] for row in range(ROWS)], np.int32)
    shards = ShardTable(tuple(SHARDS), np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32))
    write(index, "index", dict.fromkeys(values, places), table(), **tables, shards=shards)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
