"""Which network is worth it on these images? Features of a sample by each, a cross-validated head, and the time for all images.

source -> sample -> one store for each network --the same folds--> accuracy, differences | speed -> time for all images
       -> table, picture, and the extraction that takes up the sample's features
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.canonical import digest_of
from features.errors import ConfigurationError, HeadError, SourceError, check_range
from features.extraction.calibration import with_quantised
from features.extraction.extraction import Extraction
from features.extraction.journal import PartsFolder
from features.extraction.options import ExtractionOptions
from features.files import atomic_file, printable, read_small, writable_folder
from features.machine import processors
from features.networks.network import Network, resolve_network
from features.progress import Progress, counted, duration
from features.sources.imageset import ImageSet
from features.sources.scan import scan
from features.sources.splits import SPLITS
from features.store.reader import FeatureStore, parts_folder
from pipeline.heads.fitting import cross_validate, reason_of
from pipeline.heads.kinds import make_head, resolve_pool
from pipeline.heads.prepared import group_codes, prepare
from pipeline.intervals import paired_interval, wilson_interval
from pipeline.outputs import files_of, output_file, refuse_overwriting
from pipeline.reporting.comparison import draw_comparison
from pipeline.reporting.grids import check_picture
from pipeline.scores.selection import USUAL_FOLDS, stratified_folds
from pipeline.tables import shortened, table_text

logger = logging.getLogger(__name__)
DOCUMENT_FORMAT, SPEEDS_FORMAT = 1, 1
HEAD = "logistic"
TEST = SPLITS.index("test")
SPEEDS, SPEEDS_BYTES = "speeds.json", 1 << 20  # measured speeds, beside the stores
BATCHES_OF_A_SHARD = 2  # what is lost if the process is killed
# Fields of the options that the extraction of all images needs too, as options of the command.
REPEATED = (
    *("weights", "preprocess", "image_size", "precision", "engine", "device", "seed", "batch_size", "workers"),
    *("target", "split_folders", "class_level", "merge_labels"),
)


@dataclasses.dataclass(frozen=True)
class _Sample:
    """The images of a source that all networks see; ``rows`` are their numbers, int64, ascending."""

    images: ImageSet
    rows: np.ndarray

    def check_place(self, store: FeatureStore) -> None:
        """Raise ``ConfigurationError`` if a store was made from images in another place."""
        if store.provenance.get("root") != str(self.images.root):
            raise ConfigurationError(
                f"{store.path}: holds features of {printable(store.source)}, which lies elsewhere than "
                f"{printable(self.images.description)}. Give another folder with --stores"
            )

    def with_those_of(self, stores: Iterable[FeatureStore]) -> ImageSet:
        """The sample, and all images of stores and shards, so that none of their rows is lost."""
        held = {path for store in stores for path in store.images.paths}
        there = [row for row, path in enumerate(self.images.paths) if path in held]
        return self.images.some(np.union1d(self.rows, np.array(there, np.int64)))


@dataclasses.dataclass(frozen=True)
class _Computed:
    """The features of the sample by one network, and how fast they are made, in images per second."""

    options: ExtractionOptions
    network: Network
    store: FeatureStore
    inferred: int
    images_per_second: float

    @property
    def feature_set(self) -> str:
        return self.network.recipes[0].name


def names_in(text: str) -> list[str]:
    """Split names of networks at commas, unless all of it is one path.

    Examples
    --------
    >>> names_in("mobilenetv2, vgg16")
    ['mobilenetv2', 'vgg16']
    """
    if Path(text).expanduser().exists():
        return [text]
    return [name for part in text.split(",") if (name := part.strip())]


def files_of_networks(option: str, items: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Read the ``NETWORK=FILE`` items of an option, where the networks are ``names``.

    Raises
    ------
    ConfigurationError
        If an item names none of them, or no file.
    """
    found = {}
    for item in items:
        name = max((name for name in names if item.startswith(f"{name}=")), key=len, default=None)
        if name is None or len(item) == len(name) + 1:
            raise ConfigurationError(
                f"{option}: received {item!r}, expected NETWORK=FILE with one of the networks that are compared: "
                f"{', '.join(names)}"
            )
        found[name] = item[len(name) + 1 :]
    return found


def compare(
    images: str | Path,
    backbones: Sequence[str],
    *,
    limit: int = 500,
    weights: Mapping[str, str] | None = None,
    preprocess: Mapping[str, str] | None = None,
    stores: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Compare networks by a cross-validated logistic head on some images, and by their speed.

    Parameters
    ----------
    images : str or Path
        Any image source with labels. Images of the test split take no part.
    backbones : sequence of str
        Names or places of networks, as for ``extract``. One that fails takes no other with it.
    limit : int
        Largest number of images of the sample, taken in turn from each class.
    weights : dict of str to str, optional
        Weights of single networks by their name in ``backbones``; default: those that belong to the name.
    preprocess : dict of str to str, optional
        JSON files with how images are prepared for single networks; default: as their own files say.
    stores : Path, optional
        Folder for the features, one store for each network, where a later extraction of all images takes them up, and for
        the speeds. Default: ``compare/NAME``, with the name of the source.
    out : Path, optional
        PNG or JPEG file. Default: ``compare.png`` in that folder.
    progress : callable, optional
        Called with ``(stage, done, total)``.
    **options
        Fields of ``ExtractionOptions`` for all networks: ``image_size``, ``precision``, ``seed``, ``target``, ...

    Returns
    -------
    dict
        ``networks``, best accuracy first, each with ``accuracy``, ``accuracy_interval``, ``difference`` to the best with its
        paired interval, ``images_per_second``, ``seconds`` for all images and its ``store``; ``failed`` with reasons; ``best``;
        ``chosen``, the fastest of those that the sample does not tell from the best; ``next``, the words of a command.

    Raises
    ------
    ConfigurationError
        If a name or option cannot be used.
    SourceError
        If the images have no labels, or too few images of two classes.
    """
    check_range("limit", limit, 2, 1 << 40)
    base, weights, preprocess = ExtractionOptions(**options), dict(weights or {}), dict(preprocess or {})
    source = scan(images, target=base.target, reading=base.reading, trust=base.trust)
    sample = _sample(source, limit)
    folder = Path(stores) if stores is not None else Path("compare", Path(source.description).stem or "images")
    picture = Path(out) if out is not None else folder / "compare.png"
    check_picture(picture)
    writable_folder(folder)
    picture = output_file(picture, "--out", "compare.png")
    refuse_overwriting(picture, "--out", files_of(source))
    done: dict[str, _Computed] = {}
    failed: dict[str, str] = {}
    for number, name in enumerate(dict.fromkeys(backbones), 1):
        logger.info(
            "%s: %s (network %d of %d)", printable(name), counted(len(sample.rows), "image"), number, len(backbones)
        )
        asked = dataclasses.replace(
            base, backbone=name, weights=weights.get(name, base.weights), preprocess=preprocess.get(name)
        )
        try:
            done[name] = _computed(asked, sample, folder, progress)
        except Exception as problem:  # noqa: BLE001  libraries raise errors of any type; the reason is reported
            failed[name] = reason_of(problem)
    right = _right(done, failed, sample, base.seed)
    document = {
        "format": DOCUMENT_FORMAT,
        "source": printable(source.description),
        "images": len(source),
        "sample": len(sample.rows),
        "head": HEAD,
        "folds": USUAL_FOLDS,
        "stores": str(folder),
        **_ranked(done, right, len(source)),
        "failed": [{"network": name, "reason": reason} for name, reason in failed.items()],
        "out": None,
        "next": [],
    }
    if right:
        draw_comparison(document, picture)
        document |= {"out": str(picture), "next": _next(done[document["chosen"]], images, len(source))}
    return document


def _sample(source: ImageSet, limit: int) -> _Sample:
    """Choose images that have a label and are not given as test images, in turn from each class."""
    if not (source.labels >= 0).any():
        raise SourceError(
            f"{source.description}: none of its images has a label, and networks are compared by how well a head learns the "
            "labels. Put the images of each class into a folder named after the class, or write a CSV manifest path,label"
        )
    rows = source.evenly(limit, np.flatnonzero((source.labels >= 0) & (source.given_splits != TEST)))
    enough = int((np.bincount(source.labels[rows], minlength=1) > 1).sum())
    if enough < 2:
        raise SourceError(
            f"{source.description}: outside the test split, {enough} of its classes have two images among the "
            f"{counted(len(rows), 'image')} of the sample; expected two such classes at least. Add images, or raise --limit"
        )
    return _Sample(source, rows)


def _computed(asked: ExtractionOptions, sample: _Sample, folder: Path, progress: Progress | None) -> _Computed:
    """Compute what is missing of the features of the sample by one network, and measure or recall its speed."""
    stem, out = _plain(asked.backbone), folder
    if asked.precision == "int8":  # the quantised network is found by the store, so its name cannot depend on it
        exact = resolve_network(dataclasses.replace(asked, precision="float32", engine="openvino", device="cpu"))
        out = folder / f"{stem}-{exact.recipes[0].fingerprint[:8]}-int8.h5"
        asked = with_quantised(asked, sample.images, out, progress)
    network = resolve_network(asked)
    recipe = network.recipes[0]
    if recipe.quantised is None:
        out = folder / f"{stem}-{recipe.fingerprint[:8]}.h5"
    asked = dataclasses.replace(asked, shard_rows=BATCHES_OF_A_SHARD * asked.batch_size)
    speeds, meter = _Speeds(folder / SPEEDS), _Meter(progress)
    key = speeds.key(network, asked)
    store = FeatureStore.open(out) if out.exists() else None
    if store is not None:
        sample.check_place(store)
    try:
        result = _extraction(asked, network, sample, store, out).run(meter)
    finally:
        if meter.images_per_second:  # also after Ctrl-C: the next run may have nothing left to measure
            speeds.note(key, meter.images_per_second)
    if (speed := speeds.known(key)) is None:
        speed = _measured(sample, network, folder, asked)
        speeds.note(key, speed)
    return _Computed(asked, network, result.store, result.inferred, speed)


def _extraction(
    asked: ExtractionOptions, network: Network, sample: _Sample, store: FeatureStore | None, out: Path
) -> Extraction:
    """Make the extraction of a sample that keeps what is there: rows, finished shards, and how the store was split."""
    parts = PartsFolder(parts_folder(out))
    parts.read()
    kept = [shard for _, shard in parts.shards(known=() if store is None else store.shards.names)]
    if store is not None:
        asked = dataclasses.replace(asked, split=store.split_rule)
    return Extraction(sample.with_those_of([*kept, *([] if store is None else [store])]), network, out, asked)


def _plain(name: str) -> str:
    """Make a name of a file from the name or place of a network.

    Examples
    --------
    >>> _plain("mobilenetv2-0.35"), _plain("models/my net.keras"), _plain("hf:owner/dino-small@main")
    ('mobilenetv2-0.35', 'my-net', 'hf-owner-dino-small-main')
    """
    path = Path(name)
    text = path.stem if path.suffix.lower() in (".keras", ".onnx") else path.name if path.exists() else name
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[:60] or "network"


def _measured(sample: _Sample, network: Network, folder: Path, asked: ExtractionOptions) -> float:
    """Measure images per second on a few batches of the sample, whose features were made without being measured."""
    asked = dataclasses.replace(asked, shard_rows=None)  # batches of one shard are measured
    extraction = Extraction(sample.images.some(sample.rows), network, folder / "measured.h5", asked)
    forecast = extraction.forecast(extraction.plan())
    assert forecast is not None  # nothing lies at that place, so all has to be computed
    return forecast.images_per_second


class _Meter:
    """Passes progress on, and measures the images per second of an extraction after its first batch."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._times: list[tuple[float, int]] = []  # of the first batch and of the last one: seconds, images done

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "extract":
            self._times[1:] = [(time.perf_counter(), done)]
        if self._progress:
            self._progress(stage, done, total)

    @property
    def images_per_second(self) -> float | None:
        if len(self._times) < 2:
            return None
        (began, first), (ended, last) = self._times
        return (last - first) / max(ended - began, 1e-9)


class _Speeds:
    """Measured speeds beside the stores, so that a second run need not compute anything to know them.

    Each belongs to a recipe and to what else decides the speed: engine, device, batch size, decoders and processors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @staticmethod
    def key(network: Network, asked: ExtractionOptions) -> str:
        cost = [network.engine_name, asked.device, asked.batch_size, asked.workers, processors()]
        return digest_of([network.recipes[0].fingerprint, *cost])[:20]

    def known(self, key: str) -> float | None:
        speed = self._read().get(key)
        return float(speed) if isinstance(speed, int | float) and 0 < speed < math.inf else None

    def note(self, key: str, speed: float) -> None:
        document = {"format": SPEEDS_FORMAT, "images_per_second": {**self._read(), key: speed}}
        with atomic_file(self._path) as temporary:
            temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")

    def _read(self) -> dict[str, Any]:
        """The noted speeds; none if there is no such file or it is damaged, as they can be measured again."""
        try:
            document = json.loads(read_small(self._path, SPEEDS_BYTES))
            return dict(document["images_per_second"]) if document["format"] == SPEEDS_FORMAT else {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}


def _right(done: Mapping[str, _Computed], failed: dict[str, str], sample: _Sample, seed: int) -> dict[str, np.ndarray]:
    """Say which images a head predicts rightly in the fold that held them out: the same images and folds for each network.

    Images that a store lacks, because they are unreadable, and those of the test split take no part. A network whose
    features no head takes is added to ``failed``.

    Returns
    -------
    dict of str to bool, (n,)
    """
    if not done:
        return {}
    places = []
    for item in done.values():
        table = item.store.images
        places.append({path: row for row, path in enumerate(table.paths) if table.splits[row] != TEST})
    rows = [row for row in sample.rows.tolist() if all(sample.images.paths[row] in place for place in places)]
    names, groups = sample.images.labels[rows], sample.images.groups
    labels = np.unique(names, return_inverse=True)[1].astype(np.int32)
    codes = None if groups is None else group_codes([groups[row] for row in rows])
    folds = stratified_folds(labels, USUAL_FOLDS, seed, codes) if len(rows) else np.array([-1])
    if folds.max() < 0:
        raise SourceError(
            f"{sample.images.description}: {counted(len(rows), 'image')} of the sample, without those of the test split, cannot "
            "be divided into folds, which need two classes with two images or groups each. Raise --limit, or add images"
        )
    right: dict[str, np.ndarray] = {}
    for (name, item), place in zip(done.items(), places, strict=True):
        try:
            predicted = _predicted(
                item, np.array([place[sample.images.paths[row]] for row in rows]), labels, codes, seed
            )
        except HeadError as problem:
            failed[name] = reason_of(problem)
        else:
            right[name] = (predicted == labels)[folds >= 0]
    return right


def _predicted(
    item: _Computed, rows: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, seed: int
) -> np.ndarray:
    """Predict each row by a head trained without its fold: int64, (n,); what is in no fold is predicted at random."""
    order = np.argsort(rows)
    X = np.empty((len(rows), *item.store.shape(item.feature_set)[2:]), np.float32)
    X[order] = item.store.array(item.feature_set)[rows[order], 0]
    head = make_head(HEAD, seed=seed, classes=[str(label) for label in range(int(labels.max()) + 1)])
    head.pool = resolve_pool(HEAD, None, X.shape[1:])
    prepared = dataclasses.replace(prepare(X, labels, pool=head.pool, scale=head.scale), groups=groups)
    return np.asarray(cross_validate(head, prepared, USUAL_FOLDS).argmax(axis=1))


def _ranked(done: Mapping[str, _Computed], right: Mapping[str, np.ndarray], images: int) -> dict[str, Any]:
    """Describe the networks, best accuracy first, and choose the fastest of those that the sample does not tell from it."""
    order = sorted(right, key=lambda name: (-int(right[name].sum()), -done[name].images_per_second))
    entries: list[dict[str, Any]] = []
    for name in order:
        item, hits, best = done[name], right[name], right[order[0]]
        gained, lost, n = int((hits & ~best).sum()), int((best & ~hits).sum()), len(hits)
        recipe = item.network.recipes[0]
        entries.append(
            {
                "network": name,
                "image_size": [recipe.pixels.height, recipe.pixels.width],
                "precision": recipe.precision,
                "columns": int(np.prod(item.store.shape(item.feature_set)[2:])),
                "accuracy": float(hits.mean()),
                "accuracy_interval": wilson_interval(int(hits.sum()), n),
                "difference": (gained - lost) / n,
                "difference_interval": None if name == order[0] else paired_interval(gained, lost, n),
                "images_per_second": item.images_per_second,
                "seconds": images / item.images_per_second,
                "store": str(item.store.path),
                "fingerprint": recipe.fingerprint,
                "license": item.network.license,
                "inferred": item.inferred,
            }
        )
    alike = [one for one in entries if one["difference_interval"] is None or one["difference_interval"][1] >= 0]
    return {
        "scored": len(right[order[0]]) if order else 0,
        "networks": entries,
        "best": order[0] if order else None,
        "chosen": max(alike, key=lambda one: one["images_per_second"])["network"] if alike else None,
    }


def _next(item: _Computed, images: str | Path, count: int) -> list[str]:
    """Return the words of the extraction that adds the other images to the store; of training, if there are none."""
    if len(item.store) + len(item.store.quarantine) >= count:
        return ["bottleneck", "train-head", str(item.store.path), "--head", HEAD]
    words, usual = ["bottleneck", "extract", str(images), "--backbone", item.options.backbone], ExtractionOptions()
    for name in REPEATED:
        value = getattr(item.options, name)
        if value != getattr(usual, name):
            option = f"--{name.replace('_', '-')}"
            text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [option] if value is True else [option, text]
    return [*words, "--out", str(item.store.path)]


def summary(document: dict[str, Any]) -> str:
    """Describe the comparison for a person."""
    licensed = any(one["license"] for one in document["networks"])
    rows = [
        {
            "": "*" if one["network"] == document["chosen"] else "",
            "network": shortened(one["network"], 40),
            "pixels": "x".join(map(str, one["image_size"])),
            "features": one["columns"],
            "accuracy": one["accuracy"],
            "95 % interval": one["accuracy_interval"],
            "against the best": one["difference_interval"] or "",
            "images/s": f"{one['images_per_second']:.1f}",
            f"all {document['images']:,} images": duration(one["seconds"]),
            **({"licence": shortened(one["license"] or "", 20)} if licensed else {}),
        }
        for one in document["networks"]
    ]
    failed = [one["network"] for one in document["failed"]]
    rows += [{**dict.fromkeys(rows[0]), "": "", "network": shortened(name, 40)} for name in failed if rows]
    lines = [
        f"{document['source']}: {document['scored']:,} of {counted(document['images'], 'image')}, {HEAD} in {document['folds']} folds",
        table_text(rows, "  "),
    ]
    if not rows:
        lines = [f"{document['source']}: no network could be compared"]
    alike = [one["network"] for one in document["networks"] if (one["difference_interval"] or [0, -1])[1] >= 0]
    if alike:
        lines.append(
            f"  these images do not tell apart {', '.join([document['best'], *alike])}; * is the fastest of them"
        )
    lines += [f"  failed: {one['network']}: {one['reason']}" for one in document["failed"]]
    if document["out"]:
        lines.append(f"{document['out']}: accuracy against time; features in {document['stores']}")
    return "\n".join(lines)
