"""Stage one: plan an extraction, or run it, and describe the store as one document."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from features.errors import ConfigurationError
from features.extraction.announcing import announcement
from features.extraction.extraction import prepare
from features.extraction.options import ExtractionOptions
from features.extraction.running import ShardRunner, run_here
from features.files import printable
from features.networks.quantised import find, networks_of_store, place_in, read
from features.progress import Progress, counted, duration
from features.sources.splits import SPLITS
from features.store.reader import FeatureStore
from features.targets import MULTILABEL, Target, known_cells
from pipeline.tables import shortened, table_text

logger = logging.getLogger(__name__)
DOCUMENT_FORMAT = 1
MOST_CLASSES = 40  # in the table of classes
SHOWN_CLASSES = 3  # in the first line
COUNTED = ("cached", "moved", "new", "changed", "removed", "unreadable", "hashed")


def plan(
    images: str, out: Path, options: ExtractionOptions, *, progress: Progress | None = None, cluster: str | None = None
) -> dict[str, Any]:
    """Describe what an extraction would do. Nothing is written, no cluster is contacted; the forecast is for this machine."""
    if cluster is not None:
        from pipeline.cluster.connection import parse_cluster

        parse_cluster(cluster)
    extraction = prepare(images, out, options, progress=progress)
    decided = extraction.plan()
    cost = extraction.forecast(decided)
    if cost and not cluster and (said := announcement(extraction.network, options, decided.to_infer, cost.seconds)):
        logger.warning("%s", said)
    return {
        "format": DOCUMENT_FORMAT,
        "out": str(out),
        "images": len(decided.images),
        "to_infer": decided.to_infer,
        "passes": decided.passes,
        "views": decided.views,
        "shards": len(decided.specs),
        "cluster": cluster,
        "data_sets": [recipe.name for recipe in decided.recipes],
        **{name: decided.counts[name] for name in sorted(decided.counts)},
        "forecast": None if cost is None else dataclasses.asdict(cost),
    }


def plan_summary(document: dict[str, Any]) -> str:
    """Describe the plan for a person."""
    done = ", ".join(f"{document[name]} {name}" for name in COUNTED if document[name])
    drawn = f" ({document['passes']} of their views)" if document["passes"] != document["to_infer"] else ""
    lines = [
        f"{document['out']}: {document['images']} images ({done or 'none'}), {document['to_infer']} to infer{drawn}"
    ]
    cost = document["forecast"]
    if cost:
        lines.append(
            f"  about {duration(cost['seconds'])}{' on this machine alone' if document['cluster'] else ''} at {cost['images_per_second']:.0f} images/s, "
            f"{cost['disk_bytes'] / 2**20:.0f} MiB of disk at most, {cost['memory_bytes'] / 2**30:.1f} GiB of memory"
        )
    return "\n".join(lines)


def run(
    images: str, out: Path, options: ExtractionOptions, *, progress: Progress | None = None, cluster: str | None = None
) -> dict[str, Any]:
    """Create or update a store and describe it. ``cluster`` names the workers that make its shards; default: this process."""
    run_shards: ShardRunner = run_here
    if cluster is not None:
        from pipeline.cluster.run import ClusterShards

        run_shards = ClusterShards(cluster)
    result = prepare(images, out, options, run_shards=run_shards, progress=progress).run(progress)
    return {
        **describe(result.store),
        "inferred": result.inferred,
        "written": result.written,
        **{name: result.counts[name] for name in sorted(result.counts)},
    }


def _class_counts(store: FeatureStore) -> dict[str, dict[str, int]]:
    """Number of images by class and split."""
    counts = np.zeros((len(store.classes), len(SPLITS)), np.int64)
    labels = store.images.labels
    np.add.at(counts, (labels[labels >= 0], store.images.splits[labels >= 0]), 1)
    return {
        name: {split: int(count) for split, count in zip(SPLITS, row, strict=True) if count}
        for name, row in zip(store.classes, counts, strict=True)
    }


def describe(store: FeatureStore) -> dict[str, Any]:
    """Describe the contents of a store as one document."""
    splits = Counter(SPLITS[code] for code in store.images.splits.tolist())
    reasons = zip(store.quarantine.paths, store.quarantine.reasons, strict=True)
    labels = Counter(store.images.labels.tolist())
    return {
        "format": DOCUMENT_FORMAT,
        "file": str(store.path),
        "rows": len(store),
        "layout": "sharded" if store.kind == "index" else "packed",
        "shards": len(store.shards.names),
        "rows_missing": int((~store.present()).sum()),
        "classes": {name: labels[number] for number, name in enumerate(store.classes)},
        "classes_by_split": _class_counts(store),
        "splits": {name: splits[name] for name in SPLITS if splits[name]},
        "split_rule": store.split_rule,
        "source": printable(store.source),
        "data_digest": store.data_digest,
        **({} if store.images.target is None else {"target": _described_target(store.images.target)}),
        "data_sets": {
            name: {
                "shape": list(store.shape(name)),
                "views": store.views(name),
                "augment": "none" if recipe.augmentation is None else recipe.augmentation.name,
                "fingerprint": recipe.fingerprint,
                "recipe": recipe.to_dict(),
                **({} if recipe.quantised is None else {"network": _network_of(store, recipe.quantised)}),
            }
            for name, recipe in sorted(store.recipes.items())
        },
        "columns": [printable(name) for name in store.images.columns],
        "quarantine": [{"path": printable(path), "reason": reason} for path, reason in reasons],
        "provenance": store.provenance,
    }


def _described_target(target: Target) -> dict[str, Any]:
    """Describe a target: of each label in how many images it holds, of each number its range and mean."""
    values, known = target.values, known_cells(target.values)
    columns = []
    for name, column, there in zip(target.columns, values.T, known.T, strict=True):
        found = column[there]
        line: dict[str, Any] = {"name": name, "known": len(found)}
        if target.task == MULTILABEL:
            line["images"] = int(found.sum())
        elif len(found):
            line |= {"least": float(found.min()), "mean": float(found.mean()), "greatest": float(found.max())}
        columns.append(line)
    return {"task": target.task, "name": target.name, "unlabelled": int((~target.known).sum()), "columns": columns}


def to_parquet(
    file: Path,
    to: Path,
    *,
    views: str | None = None,
    float16: bool = False,
    labels: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a store as a Parquet file; see ``features.store.columns.write_parquet``.

    Raises
    ------
    ConfigurationError
        If ``to`` does not end in ``.parquet``, or ``views`` is neither None nor ``all``.
    """
    from features.store.columns import write_parquet
    from pipeline.labels.overlay import with_labels

    if to.suffix.lower() != ".parquet":
        raise ConfigurationError(f"--to {to}: expected a file that ends in .parquet")
    if views not in (None, "all"):
        raise ConfigurationError(f"--views: received {views!r}, expected all, or leave it out for view 0")
    store = FeatureStore.open(file)
    store = store if labels is None else with_labels(store, labels)
    rows = write_parquet(store, to, all_views=views == "all", float16=float16, progress=progress)
    return {
        "format": DOCUMENT_FORMAT,
        "file": str(to),
        "rows": rows,
        "features": list(store.names),
        "bytes": to.stat().st_size,
    }


def parquet_summary(document: dict[str, Any]) -> str:
    """Describe a written Parquet file for a person."""
    return f"{document['file']}: {document['rows']} rows, features {', '.join(document['features'])}, {document['bytes'] / 1e6:.1f} MB"


def _network_of(store: FeatureStore, digest: str) -> str | None:
    """Return where the quantised network of a store is; None if it is lost."""
    try:
        return str(find(digest, [networks_of_store(store.path)]))
    except ConfigurationError:
        return None


def verify_networks(store: FeatureStore) -> int:
    """Compare the quantised networks beside a store with their digests, and return their number.

    Raises
    ------
    IntegrityError
        If one is damaged.
    """
    digests = {recipe.quantised for recipe in store.recipes.values()} - {None}
    for digest in map(str, digests):
        path = place_in(networks_of_store(store.path), digest)
        try:
            read(path, digest)
        except FileNotFoundError:
            logger.warning("%s is not there: new images need it, and so do predictions", path)
    return len(digests)


def _views(entry: dict[str, Any]) -> str:
    """Describe the views of a feature set; empty if it has the plain images only."""
    if entry["views"] == 1:
        return ""
    return f"{entry['views']}, {entry['augment']} seed {entry['recipe']['seed']}"


def _arithmetic(recipe: dict[str, Any]) -> str:
    """Describe how the arithmetic and decoding differ from float32 and complete decoding; empty if they do not."""
    fast = [] if recipe["decode"] == "full" else ["fast decoding"]
    precision = [] if recipe["precision"] == "float32" else [recipe["precision"].replace(":", " by ")]
    return ", ".join(precision + fast)


def _data_sets(entries: dict[str, Any]) -> str:
    """Format a table of the feature sets; columns that are empty throughout are left out."""
    rows = [
        {
            "features": printable(name),
            "shape": "x".join(map(str, entry["shape"])),
            "dtype": entry["recipe"]["dtype"],
            "network": printable(entry["recipe"]["backbone"]),
            "pixels": f"{entry['recipe']['height']}x{entry['recipe']['width']}",
            "views": _views(entry),
            "computed in": _arithmetic(entry["recipe"]),
            "fingerprint": entry["fingerprint"][:10],
        }
        for name, entry in entries.items()
    ]
    said = [name for name in rows[0] if any(row[name] for row in rows)]
    return table_text([{name: row[name] for name in said} for row in rows], "  ")


def _place_lines(document: dict[str, Any]) -> list[str]:
    """Say where the network was, if it is a file, a folder or a name on a hub (the table shows its kind only), and its licence."""
    place, named = (str(document["provenance"].get(key) or "") for key in ("backbone", "license"))
    said = f"; licence: {printable(named[:200])}" if named else ""
    return [f"  network: {printable(place)}{said}"] if PurePath(place).is_absolute() or ":" in place or named else []


def _quantised_lines(document: dict[str, Any]) -> list[str]:
    """Say where the quantised network is."""
    places = {entry["network"] for entry in document["data_sets"].values() if "network" in entry}
    return [f"  quantised network: {'lost' if place is None else printable(place)}" for place in places]


def _precision_lines(document: dict[str, Any]) -> list[str]:
    checked = document["provenance"].get("precision_check")
    if not isinstance(checked, dict):
        return []
    lines = []
    for name, found in checked.items():
        before, after = found["accuracy_float32"], found["accuracy"]
        head = "" if after is None else f"; a logistic head: {before:.4f} in float32, {after:.4f} as stored"
        lines.append(
            f"  {printable(name)}  differs from float32 by {found['relative_error']:.2g} on {found['images']} images{head}"
        )
    return lines


def class_table(document: dict[str, Any]) -> str:
    """Format the classes with their numbers of images by split, the first `MOST_CLASSES` of them."""
    by_split = document["classes_by_split"]
    shown = [split for split in SPLITS if any(split in counts for counts in by_split.values())]
    rows = [
        {"class": printable(name), "images": sum(counts.values()), **{split: counts.get(split, 0) for split in shown}}
        for name, counts in list(by_split.items())[:MOST_CLASSES]
    ]
    left = len(by_split) - len(rows)
    return table_text(rows, "  ") + (f"\n  and {left} more classes (--json lists all)" if left else "")


def target_table(document: dict[str, Any]) -> str:
    """Format the columns of the target, the first `MOST_CLASSES` of them."""
    columns = document["target"]["columns"]
    rows = [{**line, "name": printable(line["name"])} for line in columns[:MOST_CLASSES]]
    rows = [{key: line.get(key) for key in max(rows, key=len)} for line in rows]
    left = len(columns) - len(rows)
    return table_text(rows, "  ") + (f"\n  and {left} more columns (--json lists all)" if left else "")


def _class_names(document: dict[str, Any]) -> str:
    """Name the first few classes, or columns of the target, beside their number."""
    if "target" in document:
        target = document["target"]
        names = [printable(shortened(line["name"], 20)) for line in target["columns"]]
        more = ", ..." if len(names) > SHOWN_CLASSES else ""
        return f"{target['task']} of {counted(len(names), 'column')} ({', '.join(names[:SHOWN_CLASSES])}{more})"
    names = [printable(shortened(name, 20)) for name in document["classes"]]
    more = ", ..." if len(names) > SHOWN_CLASSES else ""
    return counted(len(names), "class") + (f" ({', '.join(names[:SHOWN_CLASSES])}{more})" if names else "")


def origin(document: dict[str, Any]) -> str:
    """Say where the images of a store came from, and by which digest ``--data-set`` knows them."""
    root = printable(str(document["provenance"].get("root", "")))
    at = f" in {root}" if root not in ("", document["source"]) else ""
    return f"  images: {document['source'] or 'of an unknown place'}{at}; --data-set {document['data_digest'][:10]}"


def summary(document: dict[str, Any]) -> str:
    """Describe the store for a person."""
    lines = [
        f"{document['file']}: {document['rows']} rows, {_class_names(document)}, "
        + ", ".join(f"{name} {count}" for name, count in document["splits"].items())
    ]
    if document["layout"] == "sharded":
        lines.append(f"  in {document['shards']} shards beside the file ({document['file']}.parts)")
    if document["rows_missing"]:
        lines.append(f"  {document['rows_missing']} rows are missing with their shards; extract again to compute them")
    lines.append(_data_sets(document["data_sets"]))
    lines += _place_lines(document)
    lines += _quantised_lines(document)
    lines += _precision_lines(document)
    if "inferred" in document:
        changed = ", ".join(
            f"{document[name]} {name}" for name in ("cached", "moved", "new", "changed", "removed") if document[name]
        )
        if document["hashed"]:
            fresh = document["new"] + document["changed"]
            lines.append(f"  {counted(document['hashed'], 'image')} hashed, {fresh or 'none'} new")
        if not document["written"]:
            lines.append(f"  nothing to do: {document['rows']} rows cached, 0 inferred, file untouched")
        else:
            views = " views" if any(entry["views"] > 1 for entry in document["data_sets"].values()) else ""
            among = ", unreadable ones included" if changed and document["quarantine"] else ""
            lines.append(f"  {document['inferred']}{views} inferred ({changed or 'no change'}{among})")
    if document["quarantine"]:
        lines.append(f"  {len(document['quarantine'])} unreadable, quarantined:")
        lines += [f"    {item['path']}: {item['reason']}" for item in document["quarantine"][:20]]
        if len(document["quarantine"]) > 20:
            lines.append(f"    and {len(document['quarantine']) - 20} more (--json lists all)")
    return "\n".join(lines)
