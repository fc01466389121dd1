"""Stage one as a library: from images to a finished feature store.

scan -> resolve network -> plan -> shards (read | infer | write) -> table -> assemble -> features.h5
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from features.augmentation import AugmentSpec
from features.errors import ConfigurationError, StoreError, TooManyUnreadableError
from features.extraction.assembly import Contents, assemble, is_current, pack, table_of
from features.extraction.calibration import with_quantised
from features.extraction.forecast import Forecast, forecast
from features.extraction.journal import PartsFolder
from features.extraction.known import Identities
from features.extraction.options import ExtractionOptions
from features.extraction.planning import Plan, make_plan
from features.extraction.precision import check_precision, some_rows
from features.extraction.running import Reconciliation, ShardRunner, Work, run_here
from features.files import behind_link, locked, printable, sweep, writable_folder
from features.networks.quantised import find, keep, keep_only, networks_of_store
from features.progress import Progress, counted
from features.recipe import Normalisation, Recipe
from features.scratch import taken
from features.shown import showing
from features.sources.imageset import ImageSet
from features.sources.scan import scan
from features.sources.splits import SplitRule
from features.store.reader import FeatureStore, parts_folder, shard_path
from features.store.schema import ImageTable
from features.texts import Lookup, Texts, keys_of

if TYPE_CHECKING:
    from features.networks.network import Network

logger = logging.getLogger(__name__)
LOST = 0.005  # accuracy that a quantised network may cost in the precision check without a warning
NOTE_SECONDS = 60.0  # between two times that the notes are written while shards are made


@dataclasses.dataclass(frozen=True)
class ExtractionResult:
    """The result of one extraction.

    Parameters
    ----------
    store : FeatureStore
        The finished store.
    counts : Counter
        Number of images by what was done with them; see ``Plan``.
    inferred : int
        Number of views that went through the network.
    written : bool
        Whether the store was written; False if it was already up to date.
    """

    store: FeatureStore
    counts: Counter[str]
    inferred: int
    written: bool


class Extraction:
    """One extraction, from plan to finished store. Its parts are injected; ``prepare`` finds them by name.

    Parameters
    ----------
    images : ImageSet
        The scanned source.
    network : Network
        The network that computes the features: ``recipes``, ``row_bytes`` and
        ``engine(recipes, batch_size=, device=)`` are used.
    out : Path
        The store to create or update.
    options : ExtractionOptions
        The options. Because the network has been found already, only ``device`` and, for the workers of a cluster,
        ``engine`` are read of its options.
    run_shards : callable, optional
        Makes the shards; by default in this process. See ``features.extraction.running.ShardRunner``.
    """

    def __init__(
        self,
        images: ImageSet,
        network: Network,
        out: Path,
        options: ExtractionOptions,
        run_shards: ShardRunner = run_here,
    ) -> None:
        self.images, self.network, self.options, self.run_shards = images, network, options, run_shards
        self.out = behind_link(out)
        self.workers = options.workers or images.threads
        self.parts = PartsFolder(parts_folder(self.out))
        self._checked: dict[str, Any] | None = None

    def plan(self, progress: Progress | None = None) -> Plan:
        """Find out what would be done; this only reads and writes nothing."""
        self.parts.read()
        with ThreadPoolExecutor(self.workers) as readers:
            return make_plan(self.images, self.network, self.out, self.parts, self.options, readers, progress)

    def forecast(self, plan: Plan) -> Forecast | None:
        """Forecast time and space for a plan from a few measured batches; None if there is nothing to compute."""
        if not plan.specs:
            return None
        with ThreadPoolExecutor(self.workers) as decoders:
            return forecast(plan, self._work(plan), decoders)

    def _work(self, plan: Plan) -> Work:
        return Work(plan.specs, self.parts.path, self.images, self.network, self.options)

    def run(self, progress: Progress | None = None) -> ExtractionResult:
        """Compute what is missing and update the store.

        Parameters
        ----------
        progress : callable, optional
            Called with ``(stage, done, total)``.

        Raises
        ------
        LockedError
            If another process is writing the same store.
        TooManyUnreadableError
            If more images than allowed are unreadable. A new or overwritten store is written nevertheless; an existing
            one stays as it was.
        KeyboardInterrupt
            After Ctrl-C, once the shards in flight are finished; the next run resumes from there.
        """
        try:
            writable_folder(self.out.parent)
        except StoreError:
            if (result := self._as_it_is()) is None:
                raise
            return result
        with locked(self.out):
            sweep(self.out)
            plan = self.plan(progress)
            inferred = 0
            try:
                self._keep_quantised()
                if plan.layout == "packed" or plan.old is None:
                    self.parts.drop(plan.superseded)
                if plan.specs:
                    self.parts.open()
                    inferred = self._run_shards(plan, progress)
                result = self._finish(plan, inferred, progress)
            finally:
                self._note(plan)
                if self.parts.path.exists() and not self.parts.records and not self.parts.any_shard():
                    self.parts.remove()  # nothing was computed, so the folder is not needed
            if result.store.kind == "index":
                # The shards of the previous index stay for one more run, because it may still have readers.
                before = plan.old.shards.names if plan.old is not None else ()
                self.parts.keep({*result.store.shards.names, *before} & self.parts.records.keys())
            else:
                self.parts.remove()
            keep_only(networks_of_store(self.out), _digests(result.store.recipes.values()))
        reasons, rows = result.store.quarantine.reasons, len(result.store)
        self._check_unreadable(reasons, rows + len(reasons), f"the {rows} good rows are in {self.out}")
        return result

    def _keep_quantised(self) -> None:
        """Copy the quantised network to the store before any row that it computes; workers of a cluster take it from there."""
        for digest in _digests(self.network.recipes):
            path = keep(Path(str(self.network.quantised)), digest, networks_of_store(self.out))
            self.network = dataclasses.replace(self.network, quantised=path)

    def _run_shards(self, plan: Plan, progress: Progress | None) -> int:
        """Make the shards of a plan; return how many views went through the network."""
        inferred, count, total, lock = 0, 0, sum(map(len, plan.specs)), threading.Lock()

        def advance(more: int) -> None:
            nonlocal count
            with lock:
                count += more
                if progress:
                    progress("extract", count, total)

        planned, due = Reconciliation(plan.specs), time.monotonic() + NOTE_SECONDS
        with contextlib.closing(self.run_shards(self._work(plan), advance)) as shards:
            for made in shards:
                record = dataclasses.replace(made.record, engine=made.engine)
                shard = FeatureStore.open_shard(shard_path(self.parts.path, record.identity))
                if planned.enter(made, shard):
                    self.parts.commit(record)
                    plan.known.add(shard, record.views, root=str(self.images.root), fresh=True)
                    inferred += len(shard) * len(record.views)
                if (began := time.monotonic()) > due:  # what a killed run has read need not be hashed by the next one
                    self._note(plan)
                    due = time.monotonic() + max(NOTE_SECONDS, 50 * (time.monotonic() - began))
        planned.finish()
        return inferred

    def _note(self, plan: Plan) -> None:
        """Note the content of the files as far as it is known; what times alone tell is not worth a note."""
        if self.options.trust == "times":
            return
        found = plan.identities_now()
        rows = np.flatnonzero(found >= 0)
        sha256 = plan.known.sha256(found[rows])
        seen = np.asarray(sha256.any(axis=1))
        if self.images.replaced:
            seen &= np.array([self.images.paths[row] not in self.images.replaced for row in rows.tolist()], bool)
        rows, sha256 = rows[seen], taken(sha256, np.flatnonzero(seen))
        paths = Texts.of(self.images.paths).some(rows)
        plan.notes.of(paths, taken(self.images.stamps, rows), sha256).write(before=plan.notes)

    def _as_it_is(self) -> ExtractionResult | None:
        """The store in a folder that cannot be written; None unless there is nothing to do."""
        if not self.out.exists():
            return None
        plan = self.plan()
        if plan.specs or plan.old is None or self.options.check_precision:
            return None
        contents = self._contents(plan)
        if not self._is_current(plan, contents):
            return None
        self._note(plan)
        plan.counts["unreadable"] = len(contents.quarantine)
        return ExtractionResult(plan.old, plan.counts, 0, written=False)

    def _finish(self, plan: Plan, inferred: int, progress: Progress | None) -> ExtractionResult:
        contents = self._contents(plan)
        current = self._is_current(plan, contents)
        if not current:
            assemble(self.out, plan, contents, progress)
        plan.counts["unreadable"] = len(contents.quarantine)
        return ExtractionResult(FeatureStore.open(self.out), plan.counts, inferred, written=not current)

    def _is_current(self, plan: Plan, contents: Contents) -> bool:
        return is_current(plan, contents, with_times=self.options.trust_times)

    def _contents(self, plan: Plan) -> Contents:
        identities = _settled(plan)
        if self.options.check_precision:
            readable = np.flatnonzero(identities.reasons < 0).tolist()
            self._checked = self._check_precision(some_rows(self.images.strata, readable, self.options.check_precision))
        if plan.old is not None and not self.options.overwrite:
            refused = np.flatnonzero(identities.reasons >= 0).tolist()
            reasons = [str(identities.reason(row)) for row in refused]
            self._check_unreadable(reasons, len(self.images), f"{self.out} was not changed")
        rule = self.options.rule_after("" if plan.old is None else plan.old.split_rule)
        table, quarantine = table_of(self.images, identities, rule, strict=self.options.strict)
        if plan.old is not None and plan.old.split_rule != str(rule):
            _warn_of_another_rule(plan.old, rule, table)
        return Contents(
            images=table,
            quarantine=quarantine,
            classes=self.images.classes,
            source=self.images.description,
            split_rule=str(rule),
            provenance=self._provenance(plan),
        )

    def _engine(self, plan: Plan) -> str:
        """Name the engines of all shards that are in no store yet, those of runs that were killed included."""
        new = [record.engine for record in self.parts.records.values() if not record.kept]
        names = set(new) - {""}
        if new and not names and plan.old is None and any(map(len, plan.known.sources)):
            names = {self._work(plan).engine(plan.recipes).name}  # a run was killed before its journal could name it
        return ", ".join(sorted(names))

    def _provenance(self, plan: Plan) -> dict[str, object]:
        before = plan.old.provenance if plan.old is not None else {}
        checked = {**before.get("precision_check", {}), **(self._checked or {})}
        engine = self._engine(plan)
        return {
            **({"precision_check": checked} if checked else {}),
            "engine": engine or before.get("engine", ""),
            "batch_size": self.options.batch_size if engine else before.get("batch_size", self.options.batch_size),
            "backbone": self.network.backbone_argument,
            "weights": self.network.weights_argument,
            "target": self.options.target or "",
            "root": str(self.images.root),
            **({"reading": self.images.reading} if self.images.reading else {}),
            **({"license": self.network.license} if self.network.license else {}),
            **({"limit": len(self.images)} if self.images.left_out else {}),
        }

    def _check_precision(self, rows: Sequence[int]) -> dict[str, Any]:
        with ThreadPoolExecutor(self.workers) as decoders:
            found = check_precision(
                self.network,
                self.images,
                rows,
                decoders=decoders,
                batch_size=self.options.batch_size,
                device=self.options.device,
            )
        if self.network.recipes[0].quantised is not None:
            _warn_of_loss(found)
        return found

    def _check_unreadable(self, reasons: Sequence[str], images: int, outcome: str) -> None:
        refused, count = Counter(reasons), len(reasons)
        if count > self.options.max_unreadable * images:
            listed = ", ".join(f"{number} {reason}" for reason, number in refused.most_common())
            raise TooManyUnreadableError(
                f"{count} of {images} images are unreadable ({listed}), at most {self.options.max_unreadable:.0%} "
                f"are allowed; {outcome}. The warnings above name them. Repair them and run again, or allow more with "
                "--max-unreadable."
            )


def prepare(
    images: str | Path,
    out: str | Path,
    options: ExtractionOptions,
    *,
    run_shards: ShardRunner = run_here,
    progress: Progress | None = None,
) -> Extraction:
    """Scan the images, find the network, and return the extraction.

    Parameters
    ----------
    images : str or Path
        The image source; see ``features.sources.scan.scan``.
    out : str or Path
        The store to create or update.
    options : ExtractionOptions
        The options.
    run_shards : callable, optional
        Makes the shards; see ``Extraction``.
    progress : callable, optional
        Called with ``(stage, done, total)`` while tars are listed and a network is quantised.

    Raises
    ------
    SourceError, ConfigurationError, WeightsError
        If the images, a name or the weights cannot be used.
    """
    from features.networks.network import resolve_network

    image_set = scan(
        images,
        target=options.target,
        reading=options.reading,
        trust=options.trust,
        task=options.task,
        hosts=options.allow_host,
        progress=progress,
    )
    options = with_quantised(options, image_set, behind_link(Path(out)), progress)
    if options.limit is not None and options.limit < len(image_set):
        logger.warning(
            "%s: %d of %d images, as --limit asks; run again without it to add the others",
            *(image_set.description, options.limit, len(image_set)),
        )
        image_set = image_set.some(image_set.evenly(options.limit))
    return Extraction(image_set, resolve_network(options), Path(out), options, run_shards)


def extract_features(
    images: str | Path,
    out: str | Path,
    *,
    backbone: str = "mobilenetv2",
    weights: str = "imagenet",
    layers: str | Sequence[str] = (),
    pooling: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
    preprocess: Normalisation | str | None = None,
    resize: str | None = None,
    fit: str | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    decode: Literal["full", "fast"] = "full",
    engine: Literal["auto", "keras", "openvino", "onnxruntime"] = "auto",
    precision: Literal["float32", "bfloat16", "float16", "int8"] = "float32",
    device: str = "auto",
    quantised: str | None = None,
    channels: str = "",
    scale: str = "",
    frame: int = 0,
    views: int = 1,
    augment: str | AugmentSpec = "none",
    split: str | None = None,
    seed: int = 0,
    target: str | None = None,
    task: Literal["classification", "multilabel", "regression"] = "classification",
    split_folders: str = "",
    class_level: int = 0,
    merge_labels: bool = False,
    limit: int | None = None,
    batch_size: int | None = None,
    shard_rows: int | None = None,
    workers: int | None = None,
    max_unreadable: float = 0.05,
    overwrite: bool = False,
    rehash: bool = False,
    trust_times: bool = False,
    allow_host: str = "",
    strict: bool = False,
    layout: Literal["packed", "sharded"] | None = None,
    check_precision: int = 0,
    progress: bool | Progress = True,
) -> FeatureStore:
    """Compute the features of all images of a source with a frozen network, and keep them in a store.

    If it is interrupted, the same call resumes: finished shards are kept.

    Parameters
    ----------
    images : str or Path
        Folder of class folders, archive, manifest, arrays or ``"sample:digits"``; see ``features.sources.scan.scan``.
    out : str or Path
        The HDF5 file; if it exists, only what is missing is computed.
    backbone, ..., frame
        Which network, layers and pixels: the fields of ``features.recipe.NetworkOptions``, which describes them.
    views, ..., check_precision
        What is computed of which images: the fields of ``features.extraction.options.ExtractionOptions``, which describes them.
    progress : bool or callable
        True: a bar on a terminal and in a notebook. A callable gets ``(stage, done, total)``.

    Returns
    -------
    FeatureStore
        The finished store.

    Raises
    ------
    BottleneckError
        As ``Extraction.run``; the message says what was received, what was expected, and the fix.

    Examples
    --------
    >>> from features import extract_features
    >>> store = extract_features("photos", "features.h5", backbone="network.keras", split="stratified:0.7,0.3,0")
    >>> len(store), store.classes, store.shape(store.names[0])
    (40, ('cat', 'dog'), (40, 1, 16))
    """
    given = locals()  # the parameters
    options = ExtractionOptions(**{field.name: given[field.name] for field in dataclasses.fields(ExtractionOptions)})
    with showing(progress) as told:
        return prepare(images, out, options, progress=told).run(told).store


def pack_store(path: str | Path, out: str | Path | None = None, *, progress: Progress | None = None) -> FeatureStore:
    """Turn a sharded store into a single file, the packed layout.

    Parameters
    ----------
    path : str or Path
        The store.
    out : str or Path, optional
        Another file to write. By default the store itself is replaced, and its shards are removed.
    progress : callable, optional
        Called with ``(stage, done, total)``.

    Raises
    ------
    StoreError
        If ``out`` exists already, or cannot be written.
    IntegrityError
        If a shard is damaged or missing.
    """
    path = behind_link(Path(path))
    target = path if out is None else behind_link(Path(out))
    if target != path and target.exists():
        raise StoreError(f"{target}: exists already. Choose another --out, or remove the file.")
    FeatureStore.open(path)  # fails if it is not a store, before anything is created beside it
    writable_folder(target.parent)
    with locked(path), locked(target) if target != path else contextlib.nullcontext():
        sweep(target)
        store = FeatureStore.open(path)
        if target != path:
            for digest in _digests(store.recipes.values()):
                try:
                    keep(find(digest, [networks_of_store(path)]), digest, networks_of_store(target))
                except ConfigurationError as error:  # the features can be used without it
                    logger.warning("%s", error)
        if store.kind == "index" or target != path:
            pack(store, target, progress)
        if target == path:
            parts = PartsFolder(parts_folder(path))
            parts.read()
            unused = {name for name, record in parts.records.items() if record.kept or name in store.shards.names}
            parts.drop(unused)  # the shards of an unfinished extraction stay
            if not parts.records:
                parts.remove()
    return FeatureStore.open(target)


def _warn_of_loss(checked: Mapping[str, Mapping[str, Any]]) -> None:
    """Say which features are clearly worse in int8 than in float32: some networks quantise badly."""
    for name, found in checked.items():
        if found["accuracy"] is not None and (lost := found["accuracy_float32"] - found["accuracy"]) > LOST:
            logger.warning(
                "%s: a head on the int8 features is right on %.4f of %s, in float32 on %.4f: %.4f is lost. Better in half "
                "precision: --precision bfloat16, with another --out",
                *(name, found["accuracy"], counted(found["images"], "image"), found["accuracy_float32"], lost),
            )


def _digests(recipes: Iterable[Recipe]) -> list[str]:
    """Return the digests of the quantised networks of recipes."""
    return sorted({recipe.quantised for recipe in recipes if recipe.quantised is not None})


def _warn_of_another_rule(old: FeatureStore, rule: SplitRule, table: ImageTable) -> None:
    """Log that the split rule of a store changes, and how many of its images change their split with it."""
    rows = Lookup(keys_of(old.images.paths, len(old))).last(keys_of(table.paths, len(table)))
    known = np.flatnonzero(rows >= 0)
    if changed := int((old.images.splits[rows[known]] != table.splits[known]).sum()):
        logger.warning(
            "%s: the split rule changes from %s to %s, and the split of %s with it; --split %s keeps them",
            printable(str(old.path)), old.split_rule or "none", rule, counted(changed, "image"), old.split_rule or "hash",
        )  # fmt: skip


def _settled(plan: Plan) -> Identities:
    """Return what each image is, which is known once all shards are made."""
    entries = plan.identities_now()
    if len(lacking := np.flatnonzero(entries < 0)):
        path = plan.images.paths[int(lacking[0])]
        raise StoreError(f"{printable(path)}: planned, but in no shard. Run the same command again.")
    return plan.known.identities(entries)
