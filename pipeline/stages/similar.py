"""Which stored images look like given ones: nearest neighbours by the cosine of their features.

path in the store ──▶ its row ──────────────────────────┐
image file ──hash──▶ its row, else through the network ─┴▶ vectors ──nearest──▶ rows, cosines ──▶ table, CSV, JSON, grid
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from features.errors import ConfigurationError, UnreadableImageError, check_range
from features.errors import nearest as near_names
from features.extraction.shard import ShardSpec, infer_shard
from features.files import atomic_file, printable
from features.machine import processors, usual_batch
from features.pixels.decode import read_bytes
from features.progress import Progress, counted
from features.sources.reading import Reading
from features.sources.splits import SPLITS
from features.store.reader import FeatureStore
from pipeline.outputs import output_file
from pipeline.reporting.grids import COLUMNS, EMPTY, TILE, Cell, check_page, check_picture, draw_grid, rows_of, square
from pipeline.reporting.thumbnails import Pictures
from pipeline.runs.datasets import source_of
from pipeline.search.neighbours import Neighbours, nearest
from pipeline.search.vectors import Vectors
from pipeline.tables import shortened, table_text
from pipeline.tuning.endtoend import Origin, network_from

SHOWN = 20  # neighbours listed for a person
FIELDS = ("image", "rank", "path", "sha256", "similarity", "label", "split")


class Query(NamedTuple):
    """An image whose neighbours are wanted: its name, the path of its file if it has one, and its row if it is stored."""

    name: str
    file: str | None
    row: int | None


class Found(NamedTuple):
    """The queries, the store's feature set, and the nearest rows of each query."""

    queries: list[Query]
    features: str
    neighbours: Neighbours


def similar(
    store: FeatureStore,
    images: Sequence[str | os.PathLike[str]],
    *,
    k: int = 20,
    name: str | None = None,
    weights: str | None = None,
    quantised: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Neighbours:
    """Find the stored images that are most similar to given ones, exactly.

    Parameters
    ----------
    store : FeatureStore
        The features that are searched: view 0, averaged where they are spatial. Checksums are verified on first use.
    images : sequence of str or path
        Paths as the store has them, whose own rows are left out of their neighbours; or image files. A file whose bytes are
        stored needs no network, and its row is the first of its neighbours. Other files go through the store's network.
    k : int, 1 to 10,000
        Number of neighbours of each image.
    name : str, optional
        Feature set; may be left out if the store has only one.
    weights, quantised : str, optional
        Where the weights, the model file or the quantised network are, if they have moved since the extraction.
    device : {"auto", "cpu", "gpu"}
        Device that the network runs on.
    batch_size : int, optional
        Number of images in one forward pass.
    progress : callable, optional
        Called with ``("similar", done, total)``, in rows.

    Returns
    -------
    Neighbours
        ``rows``, int64 (n, k), and ``similarity``, float32 (n, k), -1 to 1, the most similar first.

    Raises
    ------
    ConfigurationError
        If an image is neither a path of the store nor a file, or the store has no such feature set.
    UnreadableImageError
        If a file cannot be decoded.
    RunError
        If the network of the store is not found.
    """
    return find(
        store,
        images,
        k=k,
        name=name,
        weights=weights,
        quantised=quantised,
        device=device,
        batch_size=batch_size,
        progress=progress,
    ).neighbours


def find(
    store: FeatureStore,
    images: Sequence[str | os.PathLike[str]],
    *,
    k: int = 20,
    name: str | None = None,
    progress: Progress | None = None,
    **network: Any,
) -> Found:
    """Do what `similar` does, and also say which image is which row; ``network`` are its options of the network."""
    check_range("k", k, 1, 10_000)
    if not images:
        raise ConfigurationError("no image: expected paths of the store, or image files")
    vectors = Vectors(store, name)
    queries = _queries(store, [os.fspath(image) for image in images])
    points = np.empty((len(queries), vectors.width), np.float32)
    stored = [number for number, query in enumerate(queries) if query.row is not None]
    points[stored] = vectors.at(np.array([queries[number].row for number in stored], np.int64))
    new = [number for number, query in enumerate(queries) if query.row is None]
    if new:
        files = [str(queries[number].file) for number in new]
        points[new] = vectors.of_features(_through_network(store, vectors.name, files, **network))
    found = nearest(vectors, points, k + 1, progress=progress)
    return Found(queries, vectors.name, _without_themselves(found, queries, min(k, len(store))))


def search(
    store: FeatureStore,
    images: Sequence[str],
    *,
    out: Path | None = None,
    grid: Path | None = None,
    sources: Sequence[str] = (),
    **options: Any,
) -> tuple[dict[str, Any], Neighbours]:
    """Find similar images, write them where that was asked for, and return a document and what `similar` returns.

    Parameters
    ----------
    store, images
        As for `similar`.
    out : Path, optional
        CSV file to write: ``image,rank,path,sha256,similarity,label,split``.
    grid : Path, optional
        PNG or JPEG file to draw.
    sources : sequence of str
        Where the images of the store are now, if they have moved.
    **options
        Those of `similar`.
    """
    if grid is not None:
        check_picture(grid)
        grid = output_file(grid, "--grid", "similar.png")
    if out is not None:
        out = output_file(out, "--out", "similar.csv")
    found = find(store, images, **options)
    table, lines = store.images, []
    for query, rows, cosines in zip(found.queries, *found.neighbours, strict=True):
        listed = [
            {
                "path": table.paths[row],
                "sha256": table.sha256[row].tobytes().hex(),
                "similarity": round(cosine, 6),
                "label": store.classes[table.labels[row]] if table.labels[row] >= 0 else "",
                "split": SPLITS[table.splits[row]],
            }
            for row, cosine in zip(rows.tolist(), cosines.tolist(), strict=True)
            if row >= 0
        ]
        lines.append({"image": query.name, "stored": query.row is not None, "neighbours": listed})
    if out is not None:
        _write(out, lines)
    drawn = 0 if grid is None else _draw(store, found, lines, grid, sources)
    document = {
        "format": 1,
        "file": str(store.path),
        "features": found.features,
        "rows": len(store),
        "images": lines,
        "out": None if out is None else str(out),
        "grid": None if grid is None else str(grid),
        "drawn": drawn,
    }
    return document, found.neighbours


def summary(document: dict[str, Any]) -> str:
    """Describe the result for a person."""
    texts = []
    for line in document["images"]:
        listed = [
            {
                "similarity": f"{item['similarity']:.4f}",
                "path": shortened(printable(item["path"]), 60),
                "label": shortened(printable(item["label"])),
                "split": item["split"],
            }
            for item in line["neighbours"][:SHOWN]
        ]
        kind = "stored" if line["stored"] else "not stored"
        more = len(line["neighbours"]) - len(listed)
        rest = f"\n  and {more} more" if more else ""
        texts.append(f"{printable(line['image'])} ({kind}):\n{table_text(listed, '  ')}{rest}")
    if document["out"]:
        texts.append(
            f"{document['out']}: {counted(sum(len(line['neighbours']) for line in document['images']), 'row')}"
        )
    if document["grid"]:
        texts.append(f"{document['grid']}: {counted(document['drawn'], 'picture')}")
    return "\n".join(texts)


def _queries(store: FeatureStore, names: Sequence[str]) -> list[Query]:
    """Find each image in the store: by its path there, else by the hash of its bytes."""
    wanted, paths = set(names), store.images.paths
    row_of = {path: row for row, path in enumerate(paths) if path in wanted}
    queries = []
    for name in names:
        row, file = row_of.get(name), name if os.path.isfile(name) else None
        if row is None:
            if file is None:
                called = [path for path in paths if PurePath(path).name == PurePath(name).name]
                hint = near_names(name, called or paths[:100_000], cutoff=0 if called else 0.55) or "."
                raise ConfigurationError(
                    f"{printable(name)}: is neither a path of {store.path} nor an image file{printable(hint)} Paths of the "
                    f"store are like {printable(paths[0]) if paths else 'none'}"
                )
            digest = np.frombuffer(hashlib.sha256(read_bytes(name)).digest(), np.uint8)
            same = np.flatnonzero((store.images.sha256 == digest).all(axis=1))
            queries.append(Query(name, file, int(same[0]) if len(same) else None))
        else:
            queries.append(Query(name, None, row))
    return queries


def _through_network(
    store: FeatureStore,
    name: str,
    files: Sequence[str],
    *,
    weights: str | None = None,
    quantised: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
) -> np.ndarray:
    """Compute the features of image files as an extraction does, (n, ...) in the stored type."""
    network = network_from(Origin.of_store(store, name), weights, device=device, quantised=quantised)
    size = usual_batch("auto", device) if batch_size is None else batch_size
    check_range("batch size", size, 1, 4096)
    nothing = (0,) * len(files)
    spec = ShardSpec(root="", paths=tuple(files), sizes=nothing, mtimes_ns=nothing, recipes=network.recipes)
    infer = network.engine(network.recipes, batch_size=size, device=device)
    with ThreadPoolExecutor(processors(), "decode") as pool:
        rows = infer_shard(spec, read=read_bytes, infer=infer, decoders=pool, batch_size=size)
    if rows.refused:
        index, _, error = rows.refused[0]
        raise UnreadableImageError(
            error.reason, f"{printable(files[index])} ({error.detail or error}); leave it out, or repair it"
        )
    return rows.features[network.recipes[0].name][:, 0]


def _without_themselves(found: Neighbours, queries: Sequence[Query], k: int) -> Neighbours:
    """Leave out the row of a query that was named by it; -1 stands where a store has no more rows."""
    rows = np.full((len(queries), k), -1, np.int64)
    similarity = np.zeros((len(queries), k), np.float32)
    for line, query in enumerate(queries):
        own = query.row if query.file is None else None
        kept = (
            np.flatnonzero(found.rows[line] != own)[:k] if own is not None else np.arange(min(k, found.rows.shape[1]))
        )
        rows[line, : len(kept)], similarity[line, : len(kept)] = found.rows[line, kept], found.similarity[line, kept]
    return Neighbours(rows, similarity)


def _write(out: Path, lines: Sequence[dict[str, Any]]) -> None:
    with (
        atomic_file(out) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for line in lines:
            for rank, item in enumerate(line["neighbours"], 1):
                writer.writerow({"image": line["image"], "rank": rank, **item})


def _draw(
    store: FeatureStore, found: Found, lines: Sequence[dict[str, Any]], path: Path, sources: Sequence[str]
) -> int:
    """Draw each query and behind it its neighbours, six to a line; return the number of pictures that could be read."""
    root = str(store.provenance.get("root", ""))
    wanted = [item["path"] for line in lines for item in line["neighbours"]]
    places = [*sources, source_of(store.source, root), root]
    pictures = Pictures(places, wanted, Reading.recorded(store.provenance.get("reading", {})))
    height = sum(-(-(1 + len(line["neighbours"])) // COLUMNS) for line in lines)
    check_page(height, COLUMNS, TILE, TILE)
    rows: list[Sequence[Cell]] = []
    drawn = 0
    for query, line in zip(found.queries, lines, strict=True):
        own, table = query.row or 0, store.images
        data = [read_bytes(query.file) if query.file else pictures.read(table.paths[own], table.sha256[own].tobytes())]
        data += [pictures.read(item["path"], bytes.fromhex(item["sha256"])) for item in line["neighbours"]]
        captions = [("query", PurePath(query.name).name)]
        captions += [
            (f"{item['similarity']:.3f}", item["label"] or PurePath(item["path"]).name) for item in line["neighbours"]
        ]
        tiles = [None if some is None else square(some) for some in data]
        drawn += sum(tile is not None for tile in tiles)
        empty = np.full((TILE, TILE, 3), EMPTY, np.uint8)
        cells = [Cell(empty if tile is None else tile, *text) for tile, text in zip(tiles, captions, strict=True)]
        rows += rows_of(cells)
    draw_grid(rows, path, title=f"{PurePath(store.path).name}: most similar by {found.features}")
    return drawn
