"""How well the audit finds wrong labels, and what correcting them is worth: real features, training labels flipped at random.

    features of cats-dogs and flowers17 --labels flipped, 5 seeds--> audit --> precision, cleanlab's scores, heads on corrected labels

python tests/benchmarks/bench_audit.py FOLDER [OUT.json] [--seeds 5] [--first-seed 0]    # with BOTTLENECK_ASSETS; a quarter of an hour
python tests/benchmarks/bench_audit.py FOLDER --large 100000            # time and memory of a whole audit instead

Features are kept in the folder. cleanlab gets an environment of its own there, made by pip.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks")]

from accuracy import IMAGES, USUAL, WEIGHTS, pipeline  # noqa: E402

from features.store.reader import FeatureStore  # noqa: E402
from features.store.relabelled import RelabelledStore  # noqa: E402
from pipeline.auditing.applying import suggestions  # noqa: E402
from pipeline.auditing.stage import Audit, audit  # noqa: E402
from pipeline.scores.metrics import confusion, evaluate  # noqa: E402

# Data set -> kinds of noise: name, share of the training labels that are flipped.
NOISE = {
    "cats-dogs": (("uniform", 0.05), ("uniform", 0.1), ("uniform", 0.2)),
    "flowers17": (("uniform", 0.05), ("uniform", 0.1), ("uniform", 0.2), ("nearest", 0.1)),
}
CLEANLAB = "cleanlab>=2.9"
METHODS = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")
THEIR_CODE = """
import sys, numpy as np
from cleanlab.rank import get_label_quality_scores  # noqa: E402
data = np.load(sys.argv[1])
found = {}
for key in sorted({name.split("/")[0] for name in data}):
    for method in sys.argv[3:]:
        scores = get_label_quality_scores(data[key + "/labels"], data[key + "/probabilities"], method=method)
        found[key + "/" + method] = 1 - scores
np.savez(sys.argv[2], **found)
"""
PERSON = 1.5  # suspects that a simulated person looks at, in numbers of flipped labels


def store_of(images: str, folder: Path) -> FeatureStore:
    """Features of a data set, made when they are first needed."""
    path = folder / f"{images}.h5"
    if not path.exists():
        assets = Path(os.environ["BOTTLENECK_ASSETS"])
        weights = assets / "weights" / f"{WEIGHTS['mobilenetv2']}.weights.h5"
        split = ("--split", "stratified:0.75,0.25") if images == "flowers17" else ()
        pipeline("extract", assets / "images" / IMAGES[images], "--out", path, "--weights", weights, *USUAL, *split)
    return FeatureStore.open(path)


def relabelled(store: FeatureStore, rows: np.ndarray, labels: np.ndarray) -> FeatureStore:
    """The store with other labels of some rows."""
    changed = store.images.labels.copy()
    changed[rows] = labels
    return RelabelledStore(store, store.classes, changed, store.images.splits, {})


def flipped(labels: np.ndarray, kind: str, share: float, nearest: np.ndarray, seed: int) -> np.ndarray:
    """Labels of which a share is another class: any other, or the one that the class is most confused with."""
    generator = np.random.default_rng(seed)
    count, result = round(share * len(labels)), labels.copy()
    chosen = generator.choice(len(labels), count, replace=False)
    further = generator.integers(1, labels.max() + 1, count)
    result[chosen] = nearest[labels[chosen]] if kind == "nearest" else (labels[chosen] + further) % (labels.max() + 1)
    return result


def most_confused(store: FeatureStore) -> np.ndarray:
    """For each class the other one that held-out rows of it are most often taken for, by probability where there are ties."""
    rows, values = audit(store, checks=["suspect-label"]).material.probabilities
    rows_in = np.isin(rows, store.rows("train"))
    labels, values = store.images.labels[rows[rows_in]], values[rows_in]
    count = len(store.classes)
    table = confusion(labels, values.argmax(axis=1), count) + np.stack(
        [values[labels == k].mean(axis=0) for k in range(count)]
    )
    np.fill_diagonal(table, -1)
    return np.asarray(table.argmax(axis=1))


def precision(score: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """Precision at the number of wrong labels, and average precision."""
    hits = wrong[np.argsort(-score, kind="stable")]
    at = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return {"p_at_n": float(at[hits.sum() - 1]), "average_precision": float(at[hits].mean())}


def scored(found: Audit) -> dict[str, float]:
    """Validation accuracy and log loss of the head that was trained on all training labels of an audit."""
    store, head = found.store, found.material.held_out
    assert head is not None
    scores = evaluate(head.of_others, store.images.labels[store.rows("validation")], store.classes)
    return {name: scores[name] for name in ("accuracy", "log_loss")}


def one(store: FeatureStore, kind: str, share: float, nearest: np.ndarray, seed: int) -> tuple[dict[str, Any], Audit]:
    """One draw of noise: the audit, and heads on noisy, machine-corrected and person-corrected labels."""
    train = store.rows("train")
    truth = store.images.labels[train]
    noisy = flipped(truth, kind, share, nearest, seed)
    wrong = noisy != truth

    def audited(labels: np.ndarray) -> Audit:
        return audit(relabelled(store, train, labels), checks=["suspect-label"], seed=seed)

    found = audited(noisy)
    finding = found["suspect-label"]
    rows, classes, sure = suggestions(found)
    applied = noisy.copy()
    applied[np.searchsorted(train, rows)] = classes
    seen = np.argsort(-finding.score[train], kind="stable")[: round(PERSON * wrong.sum())]
    by_person = noisy.copy()
    by_person[seen] = truth[seen]
    right = applied[applied != noisy] == truth[applied != noisy]
    result = {
        **precision(finding.score[train], wrong),
        "flipped": int(wrong.sum()),
        "flagged": int(finding.flag[train].sum()),
        "flag_precision": float(wrong[finding.flag[train]].mean()) if finding.flag[train].any() else None,
        "applied": len(rows),
        "applied_precision": float(right.mean()) if len(right) else None,
        "applied_estimate": float(sure.mean()) if len(sure) else None,
        "noisy": scored(found),
        "machine": scored(audited(applied)),
        "person": scored(audited(by_person)),
    }
    return result, found


def cleanlabs_scores(folder: Path, cases: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """cleanlab's scores of the same probabilities, 1 for the most suspicious, by case and method."""
    python = folder / "cleanlab" / "bin" / "python"
    if not python.exists():
        venv.create(folder / "cleanlab", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", CLEANLAB], check=True)
    given, back = folder / "given.npz", folder / "theirs.npz"
    arrays: dict[str, Any] = {f"{key}/{name}": values for key, case in cases.items() for name, values in case.items()}
    np.savez(given, **arrays)
    subprocess.run([python, "-c", THEIR_CODE, given, back, *METHODS], check=True)
    return dict(np.load(back))


def measure(images: str, folder: Path, seeds: range) -> list[dict[str, Any]]:
    """All kinds of noise on one data set, means of the seeds."""
    store = store_of(images, folder)
    nearest = most_confused(store)
    train, lines = store.rows("train"), []
    truth = store.images.labels[train]
    plain = [audit(store, checks=["suspect-label"], seed=seed) for seed in seeds]
    clean = [scored(found) for found in plain]
    applied = [suggestions(found) for found in plain]
    machine = [
        scored(audit(relabelled(store, rows, classes), checks=["suspect-label"], seed=seed)) if len(rows) else before
        for seed, before, (rows, classes, _) in zip(seeds, clean, applied, strict=True)
    ]
    counts = statistics.fmean(len(rows) for rows, _, _ in applied)
    lines.append({"images": images, "noise": "none", "applied": counts, "clean": mean(clean), "machine": mean(machine)})
    for kind, share in NOISE[images]:
        results, cases = [], {}
        for seed, before in zip(seeds, clean, strict=True):
            result, found = one(store, kind, share, nearest, seed)
            rows, values = found.material.probabilities
            chosen = np.isin(rows, train)
            noisy = found.store.images.labels[rows[chosen]]
            cases[f"{seed}"] = {"labels": noisy, "probabilities": values[chosen].astype(np.float64)}
            results.append({**result, "clean": before})
            print(f"{images}, {share:.0%} {kind}, seed {seed}: {result}", file=sys.stderr, flush=True)
        theirs = cleanlabs_scores(folder, cases)
        line = {"images": images, "noise": f"{share:.0%} {kind}", **mean(results)}
        for method in METHODS:
            line[method] = mean(
                [precision(theirs[f"{seed}/{method}"], cases[f"{seed}"]["labels"] != truth) for seed in seeds]
            )
        line["recovered"] = {
            "log_loss": share_of(line, "log_loss"),
            "accuracy": share_of(line, "accuracy"),
        }
        lines.append(line)
    return lines


def share_of(line: dict[str, Any], score: str) -> float | None:
    """What of the loss by noise the person's corrections take back."""
    lost = line["noisy"][score] - line["clean"][score]
    return (line["noisy"][score] - line["person"][score]) / lost if lost else None


def mean(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean of each number, those in mappings too; what is None in some draws is averaged over the others."""
    found: dict[str, Any] = {}
    for name, first in results[0].items():
        values = [result[name] for result in results if result[name] is not None]
        if values:
            found[name] = mean(values) if isinstance(first, dict) else statistics.fmean(values)
    return found


def row(line: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    best = max(METHODS, key=lambda method: float(line[method]["average_precision"]))
    cells = [
        line["images"],
        line["noise"],
        f"{line['p_at_n']:.3f} / {line['average_precision']:.3f}",
        f"{line[best]['p_at_n']:.3f} / {line[best]['average_precision']:.3f} ({best})",
        f"{line['flagged']:.0f} / {line['flipped']:.0f}",
        f"{line['applied']:.0f}, {line.get('applied_precision', 1):.3f}",
        *(
            f"{line[who]['accuracy']:.4f}, {line[who]['log_loss']:.3f}"
            for who in ("clean", "noisy", "machine", "person")
        ),
        f"{line['recovered']['log_loss']:.0%}, {line['recovered']['accuracy']:.0%}",
    ]
    return "| " + " | ".join(cells) + " |"


HEADINGS = (
    "images",
    "labels flipped",
    "P@n / average precision",
    "best of cleanlab",
    "flagged / flipped",
    "applied, right",
    "clean: accuracy, log loss",
    "noisy",
    "`--apply`",
    "a person, 1.5 n",
    "of the log loss, of the accuracy",
)


def large(folder: Path, count: int) -> dict[str, Any]:
    """A whole audit of made-up features, 1,280 columns and 10 classes, of which 5 % have a wrong label."""
    from test_streaming import write_store

    generator, path = np.random.default_rng(0), folder / f"large-{count}.h5"
    centres = generator.standard_normal((10, 1280), dtype=np.float32)
    if not path.exists():
        labels = generator.integers(0, 10, count)
        mixing = generator.standard_normal((200, 1280), dtype=np.float32) / 5
        blocks = []
        for start in range(0, count, 5000):
            y = labels[start : start + 5000]
            noise = generator.standard_normal((len(y), 200), dtype=np.float32) @ mixing
            small = generator.standard_normal((len(y), 1280), dtype=np.float32)
            blocks.append(np.maximum(centres[y] * 0.6 + noise + 0.5 * small, 0))
        wrong = generator.random(count) < 0.05
        labels[wrong] = (labels[wrong] + generator.integers(1, 10, int(wrong.sum()))) % 10
        write_store(path, blocks, labels, (generator.random(count) < 0.1).astype(np.int8))
    return whole_process(path, folder)


def whole_process(path: Path, folder: Path) -> dict[str, Any]:
    """Time and memory of `bottleneck audit` as a process, and its document."""
    command = [sys.executable, "-m", "pipeline", "audit", path, "--out", folder / "audit.csv", "--json"]
    started = time.perf_counter()
    with open(folder / "audit.json", "w+", encoding="utf-8") as stream:
        child = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=stream)
        peak = watched(child.pid, lambda: child.poll() is not None)
        stream.seek(0)
        document = json.load(stream)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "anonymous_gb": peak / 1e9,
        "flagged": {one["check"]: one["flagged"] for one in document["checks"]},
    }


def watched(process: int, ended: Callable[[], bool]) -> int:
    """Most anonymous memory of a process in bytes, looked at ten times a second until it ends."""
    peak = 0
    while not ended():
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:
            break
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))])
        time.sleep(0.1)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--images", nargs="+", choices=IMAGES, default=list(IMAGES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--first-seed", type=int, default=0, help="draws on which nothing was chosen: give a number above those used"
    )
    parser.add_argument("--large", type=int, help="rows of a made-up store whose audit is timed")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.large:
        results: Any = large(options.folder, options.large)
        print(json.dumps(results, indent=2))
    else:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        results = [line for images in options.images for line in measure(images, options.folder.resolve(), seeds)]
        print("| " + " | ".join(HEADINGS) + " |\n|" + " --- |" * len(HEADINGS))
        for line in results:
            print(row(line) if "p_at_n" in line else f"{line}")
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
