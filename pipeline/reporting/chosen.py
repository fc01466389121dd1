"""Everything that the report says about a chosen run, beyond its row in the leaderboard."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import BottleneckError
from features.files import printable, quoted
from features.sources.splits import SPLITS
from features.store.reader import FeatureStore
from pipeline.heads.pooling import choose_pool, pool_features
from pipeline.labels.overlay import as_trained, labels_said
from pipeline.reporting import data as facts
from pipeline.reporting.audited import AuditFile
from pipeline.reporting.charts import (
    COLOURS,
    MARKERS,
    Series,
    interval_bar,
    line_chart,
    pairs_chart,
    reliability_chart,
    scatter,
)
from pipeline.reporting.data import Rows
from pipeline.reporting.feature_map import project
from pipeline.reporting.reproduce import commands
from pipeline.reporting.thumbnails import TILE, TILES_ACROSS, Pictures
from pipeline.runs.folder import Run
from pipeline.runs.notes import PACKAGES
from pipeline.sweeps.leakage import QUICK_PAIRS, near_duplicates
from pipeline.tables import RARE, promise_lines
from pipeline.tasks.shown import Table, Tile

TWINS, TWIN_PICTURE = 12, 128  # pairs of near-duplicates shown, and the side of their pictures in pixels
CLASS_ROWS = 1000  # classes that are listed
QUARANTINED = 50  # files in quarantine that are listed
LEAST_POINTS = 5  # fewest points of a feature map


@dataclasses.dataclass(frozen=True)
class Detail:
    """``values`` for the template, and the number of thumbnails among them."""

    values: dict[str, Any]
    pictures: int


def describe_run(
    run: Run,
    *,
    beside: Sequence[Run],
    images: Sequence[str],
    stores: Sequence[FeatureStore],
    points: int,
    labels: str | Path | None = None,
    audit: AuditFile | None = None,
) -> Detail:
    """Collect all that the page says about one run.

    Parameters
    ----------
    run : Run
        The run.
    beside : sequence of Run
        Other runs, which may include the one that it was fine-tuned from.
    images : sequence of str
        Image sources to try before the one that the run names.
    stores : sequence of FeatureStore
        Stores to try before the one that the run names.
    points : int
        Largest number of points in the feature map.
    labels : Path, optional
        Where the labels file is now under which the run was trained.
    audit : AuditFile, optional
        An audit; it is shown if it is about images of the run's store.

    Raises
    ------
    RunError
        If a file of the run is malformed. Images and store may be missing, which the page then says.
    """
    rows = Rows.of(run)
    store, no_store = _store_of(run, stores, labels)
    root = "" if store is None else str(store.provenance.get("root", ""))
    sources = [*images, run.config["features"]["source"], root]
    pictures = Pictures(sources, rows.paths, run.reading, run.recipe.pixels)
    mistakes, hits = (
        _cards(rows, chosen, pictures)
        for chosen in (facts.most_confident_mistakes(rows), facts.least_confident_hits(rows))
    )
    features, no_map = _map(run, rows, store, pictures, points) if store is not None else (None, no_store)
    data = None
    if store is not None:
        try:
            data = _data(run, store, pictures)
        except BottleneckError as problem:  # the page shows the scores even if the features are damaged
            no_store = printable(str(problem))
    audited, no_audit = _audited(audit, store, no_store, pictures)
    start = next((one for one in beside if one.run_id == (run.config["finetune"] or {}).get("start")), None)
    views = None if store is None else store.views(run.config["features"]["name"])
    cards = [card for check in audited for card in check["cards"]]
    shown = sum(bool(item["picture"]) for item in (*mistakes, *hits, *cards))
    if features:
        shown += sum(image["tile"] >= 0 for image in features["data"]["images"])
    return Detail(
        {
            "run_id": printable(run.run_id),
            "head": printable(run.config["head"]["name"]),
            "settings": printable(run.settings),
            "headline": run.task.headline(run.metrics["validation"]),
            "tiles": _tiles(run),
            "wrong": int((~rows.correct).sum()) if run.task.answers else len(rows),
            "mistakes": mistakes,
            "hits": hits,
            "words": (run.task.mistakes, run.task.hits),
            "no_pictures": printable(pictures.missing),
            "failures": ", ".join(f"{count} {reason}" for reason, count in sorted(pictures.failures.items())),
            **(_of_classes(rows) if run.task.one_class else {"confusion": False, "classes": []}),
            "scores": _table(run),
            "pairs_charts": [pairs_chart(printable(name), *ends) for name, *ends in _pairs(rows)],
            "calibration": _calibrated(run, rows),
            "answers": promise_lines(run.metrics.get("answers"), ""),
            "coverage": ((run.metrics.get("answers") or {}).get("abstain") or {}).get("coverage"),
            "groups": _group_tables(run),
            "learning": _learning(run),
            "map": features,
            "no_map": no_map,
            "data": data,
            "labels": labels_said(run.labels) if run.labels else "",
            "no_store": no_store,
            "audit": audited,
            "no_audit": no_audit,
            "facts": _facts(run),
            "commands": commands(run, start=start, views=views, root=root),
        },
        shown,
    )


def _of_classes(rows: Rows) -> dict[str, Any]:
    """What is only said of classes: which is mistaken for which, and the scores of each."""
    return {
        "confusion": True,
        "matrix": facts.matrix(rows) if len(rows.classes) <= facts.MATRIX_CLASSES else [],
        "pairs": facts.confused_pairs(rows),
        "classes": facts.class_table(rows)[:CLASS_ROWS],
        "classes_left": max(0, len(rows.classes) - CLASS_ROWS),
    }


def _tiles(run: Run) -> list[Tile]:
    """The scores of the validation split, of the folds and of the test split."""
    task, first = run.task, run.task.board_columns[0]

    def tile(scores: Any, where: str = "", note: str = "") -> Tile:
        interval = task.interval(scores)
        said = "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
        return Tile(f"{first.title}{where}", scores[first.key], ", ".join(part for part in (said, note) if part))

    scores, folds, test = (run.metrics[split] for split in ("validation", "cv", "test"))
    found = [tile(scores), *task.tiles(scores)]
    found += [tile(folds, f", {folds['folds']} folds")] if folds else []
    return [*found, tile(test, ", test", _test_said(run))] if test else found


def _table(run: Run) -> Table | None:
    """The table of the labels or numbers; what is beyond `CLASS_ROWS` is left out."""
    table = run.task.table(run.metrics["validation"])
    if table is None:
        return None
    lines = tuple({**line, "name": printable(line["name"])} for line in table.lines[:CLASS_ROWS])
    return table._replace(lines=lines)


def _pairs(rows: Rows) -> list[tuple[str, np.ndarray, np.ndarray]]:
    return rows.task.pairs(rows.probabilities, rows.labels, rows.classes)


def _calibrated(run: Run, rows: Rows) -> dict[str, Any] | None:
    """The section about calibration; None where the task has none."""
    about, bins = run.task.calibration(rows.probabilities, rows.labels), facts.reliability(rows)
    if about is None:
        return None
    ece = run.metrics["validation"]["ece"]
    title = f"Reliability diagram of {len(about.truth)} {about.things}; expected calibration error {ece:.4f}"
    y_label = "accuracy" if run.task.one_class else "share that holds"
    words = {"x_label": about.probability, "y_label": y_label, "things": about.things, "holds": about.holds}
    return {"ece": ece, "bins": bins, "chart": reliability_chart(bins, title, **words), "about": about}


_GROUP_TITLES = {"accuracy": "Accuracy", "right": "Right", "mae": "Mean absolute error", "rmse": "RMSE"}


def _group_tables(run: Run) -> list[dict[str, Any]]:
    """The tables by group, worst line first, with a bar for each interval; the line in each bar marks the whole score."""
    found, score = [], run.task.group_score
    for rows, tables in (run.metrics.get("groups") or {}).items():
        for column, table in tables.items():
            whole = sum(line[score] * line["n"] for line in table) / sum(line["n"] for line in table)
            ends = [end for line in table for end in line[f"{score}_interval"]]
            span = (min(ends), max(ends))
            more = [key for key in ("right", "rmse") if key in table[0]]
            lines = []
            for line in sorted(table, key=lambda line: (run.task.group_worth(line)[0], -line["n"])):
                low, high = line[f"{score}_interval"]
                numbers = {"score": line[score], "interval": (low, high), "more": [line[key] for key in more]}
                name = RARE if line["value"] is None else printable(line["value"])
                bar = interval_bar(low, line[score], high, span, whole)
                lines.append({"name": name, "n": line["n"], "bar": bar, **numbers})
            found.append(
                {
                    "column": printable(column),
                    "where": "validation images" if rows == "validation" else "training images, out of fold",
                    "span": span,
                    "lines": lines,
                    "score": _GROUP_TITLES[score],
                    "more": [_GROUP_TITLES[key] for key in more],
                    "worst_first": "ascending" if run.task.group_best_first == "descending" else "descending",
                }
            )
    return found


def _test_said(run: Run) -> str:
    """What a labels file did to the test images, so that their scores may be too good; empty where it did nothing."""
    record = run.labels or {"tested": 0, "seen": 0}
    said = [f"{record['tested']:,} labels changed"] if record["tested"] else []
    return ", ".join([*said, *([f"{record['seen']:,} images judged by an audit before"] if record["seen"] else [])])


def _store_of(
    run: Run, stores: Sequence[FeatureStore], labels: str | Path | None = None
) -> tuple[FeatureStore | None, str]:
    """Find the store that the run was trained on; if there is none, say why."""
    features = run.config["features"]
    why = "the run does not say where its features are"
    for candidate in (*stores, features["store"]):
        if not candidate:
            continue
        try:
            store = candidate if isinstance(candidate, FeatureStore) else FeatureStore.open(candidate)
            store = as_trained(store, run.labels, labels)
            if store.data_digest != features["data_digest"] or features["name"] not in store.names:
                why = f"{store.path} no longer holds the run's images and features; give a store that does with --features"
                continue
            own = (
                run.config["stage"] == "finetune"
                or store.recipes[features["name"]].fingerprint == features["fingerprint"]
            )
        except (BottleneckError, OSError) as problem:
            why = str(problem)
            continue
        if own:
            return store, ""
        why = f"{store.path} now holds features of another recipe"
    return None, printable(why)


def _cards(rows: Rows, chosen: Sequence[int], pictures: Pictures) -> list[dict[str, Any]]:
    made = pictures.cards([(rows.paths[row], rows.sha256[row]) for row in chosen])
    return [{**facts.card(rows, row), "picture": picture} for row, picture in zip(chosen, made, strict=True)]


def _map(
    run: Run, rows: Rows, store: FeatureStore, pictures: Pictures, points: int
) -> tuple[dict[str, Any] | None, str]:
    table, name = store.images, run.config["features"]["name"]
    place = {(table.paths[row], table.sha256[row].tobytes()): row for row in store.rows("validation").tolist()}
    known = np.array([key in place for key in zip(rows.paths, rows.sha256, strict=True)], bool)
    chosen = facts.sample_rows(rows, points)
    chosen = chosen[known[chosen]]
    if len(chosen) < LEAST_POINTS:
        return None, f"only {len(chosen)} validation images have features in the store"
    stored = np.array([place[rows.paths[row], rows.sha256[row]] for row in chosen.tolist()])
    order = np.argsort(stored)
    stored, chosen = stored[order], chosen[order]
    try:
        values = np.asarray(store.array(name)[stored, 0])
        pca, tsne, explained = project(pool_features(values, choose_pool(None, "avg", values.shape[1:])))
    except BottleneckError as problem:
        return None, printable(str(problem))
    sprite, tiles = pictures.sprite([(rows.paths[row], rows.sha256[row]) for row in chosen.tolist()])
    wrong = (~rows.correct[chosen]).tolist()
    styles, legend = _marks(rows, chosen)
    listed = [
        {"file": printable(rows.paths[row]), **_tip(rows, row), "tile": tile}
        for row, tile in zip(chosen.tolist(), tiles, strict=True)
    ]
    text = f"The features of all {len(rows):,} validation images in two dimensions."
    if len(chosen) < len(rows):
        text = (
            f"The features of {len(chosen):,} of {len(rows):,} validation images in two dimensions: "
            f"{sum(wrong)} of {int((~rows.correct).sum())} {'mistakes' if rows.task.answers else 'large errors'}, and others drawn at random."
        )
    if run.config["stage"] == "finetune":
        text += " They were computed before fine-tuning."
    return {
        "text": text,
        "pca": scatter(pca, styles, wrong, "PCA of the features"),
        "tsne": scatter(tsne, styles, wrong, "t-SNE of the features"),
        "explained": explained,
        "sprite": sprite,
        "tile": TILE,
        "across": max(1, min(TILES_ACROSS, sum(tile >= 0 for tile in tiles))),
        "legend": legend,
        "ring": rows.task.ring,
        "data": {"classes": [printable(title) for title in rows.classes], "images": listed},
    }, ""


def _tip(rows: Rows, row: int) -> dict[str, Any]:
    """What the page says of a point of the map: of classes by number, which is short, else in words."""
    if rows.task.one_class:
        numbers = {"label": int(rows.labels[row]), "predicted": int(rows.predicted[row])}
        return numbers | {"confidence": round(float(rows.confidence[row]), 4)}
    told = facts.card(rows, row)
    mark = {True: "✓ ", False: "✗ ", None: ""}[told["correct"]]
    lines = [
        f"{line.before} {line.name}{'' if line.number is None else f' {line.number:.3f}'}".strip()
        for line in told["lines"]
    ]
    return {"said": mark + "\n".join(lines)}


def _marks(rows: Rows, chosen: np.ndarray) -> tuple[list[tuple[int, int]], list[dict[str, Any]]]:
    """Choose marker and colour of each point, by class or, if there are too many classes, by right and wrong; and a legend."""
    codes, kinds = rows.task.kinds(rows.labels, rows.classes)
    if len(kinds) <= COLOURS * MARKERS:
        legend = [
            {"name": printable(title), "marker": k // COLOURS, "colour": k % COLOURS, "ring": False}
            for k, title in enumerate(kinds)
        ]
        return [(code // COLOURS, code % COLOURS) for code in codes[chosen].tolist()], legend
    legend = [
        {"name": "right", "marker": 0, "colour": 0, "ring": False},
        {"name": "wrong", "marker": 3, "colour": 5, "ring": True},
    ]
    return [(0, 0) if right else (3, 5) for right in rows.correct[chosen].tolist()], legend


def _data(run: Run, store: FeatureStore, pictures: Pictures) -> dict[str, Any]:
    table, quarantine = store.images, store.quarantine
    found = near_duplicates(store, run.config["features"]["name"], limit=TWINS, pairs_checked=QUICK_PAIRS)
    counts = Counter(SPLITS[code] for code in table.splits.tolist())
    ends = [path for pair in found.pairs for path in (pair.first, pair.second)]
    digests = {path: table.sha256[row].tobytes() for row, path in enumerate(table.paths)} if ends else {}
    made = pictures.cards([(path, digests[path]) for path in ends], TWIN_PICTURE)
    listed = zip(quarantine.paths[:QUARANTINED], quarantine.reasons, strict=False)
    return {
        "splits": {name: counts[name] for name in SPLITS if counts[name]},
        "quarantine": [(printable(path), printable(reason)) for path, reason in listed],
        "quarantine_count": len(quarantine),
        "duplicates": facts.exact_duplicates(
            table.sha256, table.splits, table.labels if table.target is None else table.target.codes, table.paths
        ),
        "leakage": {
            "threshold": found.threshold,
            "found": found.found,
            "capped": found.capped,
            "pairs": [
                {
                    "first": printable(pair.first),
                    "second": printable(pair.second),
                    "similarity": pair.similarity,
                    "splits": pair.splits,
                    "pictures": (made[2 * k], made[2 * k + 1]),
                }
                for k, pair in enumerate(found.pairs)
            ],
        },
    }


def _audited(
    audit: AuditFile | None, store: FeatureStore | None, no_store: str, pictures: Pictures
) -> tuple[list[dict[str, Any]], str]:
    """Describe an audit; if there is nothing to show, say why."""
    if audit is None:
        file = "FEATURES" if store is None else printable(quoted(store.path))
        return [], f"none was given. Type: bottleneck audit {file}, and then bottleneck report --audit audit.csv"
    if store is None:
        return [], no_store
    known = {digest.tobytes() for digest in store.images.sha256}
    found = audit.section(known, pictures)
    return found, "" if found else f"{printable(str(audit.path))} is about other images"


def _learning(run: Run) -> dict[str, Any]:
    """Describe the learning curves, or else the search for a parameter, or else say why there is neither."""
    history = facts.curves_of(run)
    columns = list(history)
    shown: dict[str, Any] = {
        "columns": columns,
        "lines": list(zip(*history.values(), strict=True)) if columns else [],
        "charts": [],
    }
    xs = history.get("epoch", [])
    if xs:
        names = {"loss": "training", "val_loss": "validation"}
        kept = None
        if "val_loss" in history and run.config["stage"] == "head":
            best = xs[int(np.argmin(history["val_loss"]))]
            kept = (best, f"kept: epoch {best:g}")
        losses = [Series(names[key], xs, history[key], k) for k, key in enumerate(names) if key in history]
        found = {"accuracy": "training", "val_accuracy": "validation"}
        accuracies = [Series(found[key], xs, history[key], k) for k, key in enumerate(found) if key in history]
        for series, label in ((losses, run.task.loss_label), (accuracies, "accuracy")):
            if series:
                shown["charts"].append(_chart(series, "epoch", label, kept=kept))
                kept = None if kept is None else (kept[0], "")  # only the first chart shows the caption
        text = f"{len(xs)} epochs."
        if kept:
            text += " The weights of the epoch with the lowest validation loss are kept."
        return {**shown, "title": "Learning curves", "text": text}
    parameter = columns[0] if columns and columns[0] not in ("score", "accuracy", "rows") else ""
    if parameter and "score" in history and len(history[parameter]) > 1:
        order = np.argsort(history[parameter])
        xs = [history[parameter][k] for k in order]
        for key, label, style in (("score", "score, lower is better", 0), ("accuracy", "accuracy, held out", 2)):
            if key in history:
                series = [Series(label, xs, [history[key][k] for k in order], style)]
                shown["charts"].append(_chart(series, parameter, label.partition(",")[0], log_x=min(xs) > 0))
        text = f"{parameter} was chosen among {len(xs)} values by cross-validation on the training rows."
        return {**shown, "title": f"Search for {parameter}", "text": text}
    return {**shown, "title": "Training", "text": "This head is fitted in one step, so there is no curve to show."}


def _chart(series: Sequence[Series], x_label: str, y_label: str, **options: Any) -> dict[str, Any]:
    ends = "; ".join(f"{line.name} from {line.ys[0]:.4g} to {line.ys[-1]:.4g}" for line in series)
    svg = line_chart(series, title=f"{y_label} by {x_label}: {ends}", x_label=x_label, y_label=y_label, **options)
    return {"svg": svg, "series": series}


def _facts(run: Run) -> dict[str, dict[str, str]]:
    """List what decided the run, as labels and texts."""
    features, head, environment = run.config["features"], run.config["head"], run.environment
    recipe = {key: value for key, value in features["recipe"].items() if key not in ("version", "augmentation")}
    augmentation = features["recipe"].get("augmentation") or {}
    known = environment.get("packages")
    packages = known if isinstance(known, dict) else {}
    groups: dict[str, dict[str, Any]] = {
        "Features": {
            "feature set": features["name"],
            **recipe,
            **{f"augment: {key}": value for key, value in augmentation.items()},
            "split": features["split_rule"],
            "fingerprint": features["fingerprint"],
        },
        "Head": {"name": head["name"], "pool": head["pool"], "seed": run.config["seed"], **head["parameters"]},
        "Environment": {
            **{
                key: environment.get(key)
                for key in ("created", "fit_seconds", "parameters", "python", "platform", "cpu_count", "keras_backend")
            },
            **{name: packages[name] for name in PACKAGES if name in packages},
        },
    }
    if run.config["finetune"]:
        settings = {key: value for key, value in run.config["finetune"].items() if not isinstance(value, dict)}
        groups["Fine-tuning"] = settings
    return {
        title: {printable(str(key)): _text(value) for key, value in entries.items()}
        for title, entries in groups.items()
    }


def _text(value: Any) -> str:
    if value is None or value == "" or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return printable(", ".join(map(str, value)) if isinstance(value, list) else str(value))
