"""Stage one as a library: images in, a finished feature store out.

scan -> resolve network -> plan -> shards (read | infer | write) -> table -> assemble -> features.h5
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.augmentation import PRESETS, AugmentSpec
from features.errors import ConfigurationError, StoreError, TooManyUnreadableError, check_range
from features.extraction.assembly import assemble, is_current, pack, table_of
from features.extraction.forecast import Forecast, forecast
from features.extraction.journal import PartsFolder
from features.extraction.planning import Identity, Plan, make_plan
from features.extraction.precision import check_precision, some_rows
from features.extraction.running import SHARDS_IN_FLIGHT, MadeShard, Reconciliation, ShardRunner, Work, run_here
from features.extraction.shard import rows_per_shard
from features.files import behind_link, locked, printable, sweep, writable_folder
from features.machine import processors
from features.progress import Progress
from features.sources.scan import ImageSet, scan
from features.sources.splits import SplitRule
from features.store.reader import FeatureStore, parts_folder, shard_path

if TYPE_CHECKING:
    from features.networks.network import Network

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ExtractionResult:
    """A finished store, what was done for it, and how many views of images went through the network."""

    store: FeatureStore
    counts: Counter[str]
    inferred: int
    written: bool


@dataclasses.dataclass
class _Done:
    """What this run has made so far."""

    inferred: int = 0
    engines: set[str] = dataclasses.field(default_factory=set)

    def add(self, made: MadeShard, shard: FeatureStore) -> None:
        self.inferred += len(shard) * len(made.record.views)
        self.engines |= {made.engine} - {""}  # no engine was needed where no image could be read


class Extraction:
    """One extraction, from plan to finished store. Its parts are injected; ``prepare`` finds them by name.

    Parameters
    ----------
    images : ImageSet
        The source as scanned.
    network : Network
        What makes features: ``recipes``, ``row_bytes`` and ``engine(recipes, batch_size=, device=)``.
    out : Path
        The store to make or bring up to date.
    rule : SplitRule
        How images without a given split get theirs.
    views : int
        Views of each image, 1-1000; view 0 is the plain image. A store keeps those it has beyond them.
    augmentation : AugmentSpec, optional
        From what the other views are drawn.
    seed : int
        Seed of the views.
    batch_size : int
        Pictures of one forward pass, 1-4096.
    shard_rows : int, optional
        Images of one shard; about 64 MiB of features without it.
    workers : int, optional
        Threads that read and decode; the processors of this process without it.
    device : {"auto", "cpu", "gpu"}
        Where the network runs.
    max_unreadable : float
        Largest share of unreadable images, 0-1.
    overwrite : bool
        Allow a store of another recipe or of other images to be replaced.
    rehash : bool
        Read every image again, also those whose size and time are unchanged.
    strict : bool
        Refuse the same bytes in two splits, which is otherwise warned about.
    target : str, optional
        The manifest's label column, noted for later stages.
    layout : {"packed", "sharded"}, optional
        One file, or an index of shards that stay where they were made; a store keeps its own without it.
    check_precision : int
        Compare so many images with float32, and keep what was found in the store; see ``features.extraction.precision``.
    run_shards : callable, optional
        What makes the shards; this process without it. See ``features.extraction.running.ShardRunner``.
    """

    def __init__(
        self,
        images: ImageSet,
        network: Network,
        out: Path,
        *,
        rule: SplitRule,
        views: int = 1,
        augmentation: AugmentSpec | None = None,
        seed: int = 0,
        batch_size: int = 32,
        shard_rows: int | None = None,
        workers: int | None = None,
        device: str = "auto",
        max_unreadable: float = 0.05,
        overwrite: bool = False,
        rehash: bool = False,
        strict: bool = False,
        target: str | None = None,
        layout: str | None = None,
        check_precision: int = 0,
        run_shards: ShardRunner = run_here,
    ) -> None:
        _check_views(views, augmentation)
        check_range("batch size", batch_size, 1, 4096)
        check_range("workers", 1 if workers is None else workers, 1, 1024)
        check_range("max unreadable", max_unreadable, 0, 1)
        self.images, self.network, self.rule = images, network, rule
        self.views = views
        self.recipes = tuple(recipe.augmented(augmentation, seed) for recipe in network.recipes)
        self.out = out = behind_link(out)
        self.batch_size, self.device, self.overwrite = batch_size, device, overwrite
        self.rehash, self.strict, self.target, self.layout = rehash, strict, target, layout
        self.max_unreadable = max_unreadable
        check_range("check precision", check_precision, 0, 100_000)
        self.check_precision = check_precision
        self._checked: dict[str, Any] | None = None
        self.run_shards = run_shards
        self.workers = workers or processors()
        check_range("shard rows", 1 if shard_rows is None else shard_rows, 1, 1 << 20)
        self.shard_rows = shard_rows
        self.parts = PartsFolder(parts_folder(out))

    def plan(self) -> Plan:
        """What would be done. Reads; writes nothing."""
        self.parts.read()
        row_bytes = self.network.row_bytes
        with ThreadPoolExecutor(self.workers) as readers:
            return make_plan(
                self.images,
                self.recipes,
                views=self.views,
                out=self.out,
                parts=self.parts,
                shard_rows=lambda views: self.shard_rows or rows_per_shard(row_bytes * views, self.batch_size),
                readers=readers,
                overwrite=self.overwrite,
                rehash=self.rehash,
                layout=self.layout,
            )

    def forecast(self, plan: Plan) -> Forecast | None:
        """What a plan will take, from a measurement of a few batches; None if there is nothing to infer."""
        if not plan.specs:
            return None
        work = self._work(plan)
        engine = work.engine(plan.specs[0].recipes)
        with ThreadPoolExecutor(self.workers) as decoders:
            return forecast(
                plan,
                engine,
                work.reader(),
                decoders,
                batch_size=self.batch_size,
                row_bytes=self.network.row_bytes,
                shards_in_flight=SHARDS_IN_FLIGHT,
                separate_device=getattr(engine, "device", "cpu") != "cpu",
            )

    def _work(self, plan: Plan) -> Work:
        return Work(plan.specs, self.parts.path, self.images, self.network, self.batch_size, self.device, self.workers)

    def run(self, progress: Progress | None = None) -> ExtractionResult:
        """Compute what is missing and bring the store up to date.

        Parameters
        ----------
        progress : callable, optional
            Called with ``(stage, done, total)``.

        Raises
        ------
        LockedError
            If another process writes the same store.
        TooManyUnreadableError
            If more images than allowed are unreadable; the store is written all the same.
        KeyboardInterrupt
            After the shards in flight were finished; the next run goes on from there.
        """
        writable_folder(self.out.parent)
        with locked(self.out):
            sweep(self.out)
            plan = self.plan()
            done = _Done()
            try:
                if plan.layout == "packed" or plan.old is None:
                    self.parts.drop(plan.superseded)
                if plan.specs:
                    self.parts.open()
                    self._run_shards(plan, done, progress)
                result = self._finish(plan, done, progress)
            finally:
                if self.parts.path.exists() and not self.parts.records and not self.parts.any_shard():
                    self.parts.remove()  # nothing was computed: leave nothing behind
            if result.store.kind == "index":
                # Those of the state before stay for one run more: it may have readers.
                before = plan.old.shards.names if plan.old is not None else ()
                self.parts.keep({*result.store.shards.names, *before} & self.parts.records.keys())
            else:
                self.parts.remove()
        reasons = [None] * len(result.store) + list(result.store.quarantine.reasons)
        self._check_unreadable(reasons, f"the {len(result.store)} good rows are in {self.out}")
        return result

    def _run_shards(self, plan: Plan, done: _Done, progress: Progress | None) -> None:
        count, total, lock = 0, sum(map(len, plan.specs)), threading.Lock()

        def advance(more: int) -> None:
            nonlocal count
            with lock:
                count += more
                if progress:
                    progress("extract", count, total)

        planned = Reconciliation(plan.specs)
        with contextlib.closing(self.run_shards(self._work(plan), advance)) as shards:
            for made in shards:
                record = made.record
                shard = FeatureStore.open_shard(shard_path(self.parts.path, record.identity))
                if planned.enter(made, shard):
                    self.parts.commit(record)
                    plan.known.add(shard, record.views, root=str(self.images.root), fresh=True)
                    done.add(made, shard)
        planned.finish()

    def _finish(self, plan: Plan, done: _Done, progress: Progress | None) -> ExtractionResult:
        identities = _settled(plan)
        if self.check_precision:
            readable = [row for row, identity in enumerate(identities) if identity.reason is None]
            self._checked = self._check_precision(some_rows(self.images.labels, readable, self.check_precision))
        if plan.old is not None and not self.overwrite:
            self._check_unreadable([identity.reason for identity in identities], f"{self.out} is as it was before")
        table, quarantine = table_of(self.images, identities, self.rule, strict=self.strict)
        provenance = self._provenance(plan, done)
        current = plan.old is not None and is_current(
            plan.old,
            self.images,
            table,
            quarantine,
            self.rule,
            plan.recipes,
            plan.views,
            plan.layout,
            provenance,
        )
        if not current:
            assemble(
                self.out,
                images=self.images,
                table=table,
                quarantine=quarantine,
                rule=self.rule,
                recipes=plan.recipes,
                views=plan.views,
                known=plan.known,
                layout=plan.layout,
                provenance=provenance,
                progress=progress,
            )
        plan.counts["unreadable"] = len(quarantine)
        return ExtractionResult(FeatureStore.open(self.out), plan.counts, done.inferred, written=not current)

    def _provenance(self, plan: Plan, done: _Done) -> dict[str, object]:
        before = plan.old.provenance if plan.old is not None else {}
        checked = {**before.get("precision_check", {}), **(self._checked or {})}
        engine = ", ".join(sorted(done.engines))
        return {
            **({"precision_check": checked} if checked else {}),
            "engine": engine or before.get("engine", ""),
            "batch_size": self.batch_size if engine else before.get("batch_size", self.batch_size),
            "backbone": self.network.backbone_argument,
            "weights": self.network.weights_argument,
            "target": self.target or "",
            "root": str(self.images.root),
        }

    def _check_precision(self, rows: Sequence[int]) -> dict[str, Any]:
        with ThreadPoolExecutor(self.workers) as decoders:
            return check_precision(
                self.network,
                self.images,
                rows,
                decoders=decoders,
                batch_size=self.batch_size,
                device=self.device,
            )

    def _check_unreadable(self, reasons: Sequence[str | None], outcome: str) -> None:
        refused = Counter(reason for reason in reasons if reason is not None)
        count = sum(refused.values())
        if count > self.max_unreadable * len(reasons):
            listed = ", ".join(f"{number} {reason}" for reason, number in refused.most_common())
            raise TooManyUnreadableError(
                f"{count} of {len(reasons)} images are unreadable ({listed}); at most {self.max_unreadable:.0%} are "
                f"allowed; {outcome}. The warnings above name them. Repair them and run again, or allow more with "
                "--max-unreadable."
            )


def prepare(
    images: str | Path,
    out: str | Path,
    *,
    backbone: str = "mobilenetv2",
    weights: str = "imagenet",
    layers: str | Sequence[str] = (),
    pooling: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    resize: str = "antialias",
    fit: str = "stretch",
    dtype: str = "float32",
    decode: str = "full",
    engine: str = "auto",
    precision: str = "float32",
    device: str = "auto",
    views: int = 1,
    augment: str | AugmentSpec = "none",
    split: str = "hash",
    seed: int = 0,
    target: str | None = None,
    **options: Any,
) -> Extraction:
    """Find images, backbone and weights by name.

    Parameters
    ----------
    images : str or Path
        Image source, see ``features.sources.scan.scan``; ``target`` picks the label column of a manifest.
    out : str or Path
        The store.
    backbone, weights, layers, pooling, image_size, resize, fit, dtype, decode, engine, precision, device
        The recipe, and what runs it; see ``features.networks.network.resolve_network``.
    views, augment : int, str or AugmentSpec
        Views of each image, and what all but view 0 are drawn from with ``seed``: the name of a preset, or ranges.
    split : str
        ``"hash"`` or ``"stratified"``, with fractions behind a colon, and ``seed``; see ``SplitRule``.
    **options
        ``batch_size``, ``shard_rows``, ``workers``, ``max_unreadable``, ``overwrite``, ``rehash``, ``strict``, ``layout``, ``check_precision``, ``run_shards`` of ``Extraction``.

    Raises
    ------
    SourceError, ConfigurationError, WeightsError
        For images, names or weights that cannot be used.
    """
    from features.networks.network import resolve_network

    rule = SplitRule.parse(split, seed)
    augmentation = AugmentSpec.parse(augment) if isinstance(augment, str) else augment
    _check_views(views, augmentation)  # before anything is read
    image_set = scan(images, target=target)
    network = resolve_network(
        backbone,
        weights=weights,
        layers=[layers] if isinstance(layers, str) else layers,
        pooling=pooling,
        image_size=(image_size, image_size) if isinstance(image_size, int) else image_size,
        resize=resize,
        fit=fit,
        dtype=dtype,
        decode=decode,
        engine=engine,
        precision=precision,
        device=device,
    )
    return Extraction(
        image_set,
        network,
        Path(out),
        rule=rule,
        views=views,
        augmentation=augmentation,
        seed=seed,
        target=target,
        device=device,
        **options,
    )


def _check_views(views: int, augmentation: AugmentSpec | None) -> None:
    """Views and augmentation are given together: one without the other would make copies, or nothing."""
    check_range("views", views, 1, 1000)
    plain = augmentation is None or augmentation.is_plain
    if views > 1 and plain:
        presets = ", ".join(name for name, spec in PRESETS.items() if not spec.is_plain)
        raise ConfigurationError(
            f"views: received {views}, which without an augmentation would all be the plain image. Add --augment with "
            f"one of {presets}."
        )
    if views == 1 and augmentation is not None and not plain:
        raise ConfigurationError(
            f"augment: received {augmentation.name}, but one view is the plain image alone. Add --views with 2 or more."
        )


def extract_features(
    images: str | Path, out: str | Path, *, progress: Progress | None = None, **options: Any
) -> FeatureStore:
    """Push every image of a source through a frozen backbone once and keep the features.

    Parameters
    ----------
    images : str or Path
        Folder of class folders, archive, manifest, arrays or ``"sample:digits"``; see ``features.sources.scan.scan``.
    out : str or Path
        The HDF5 file; brought up to date if it exists.
    progress : callable, optional
        Called with ``(stage, done, total)``.
    **options
        As of ``prepare``: ``backbone``, ``weights``, ``layers``, ``pooling``, ``image_size``, ``split``, ...

    Returns
    -------
    FeatureStore
        The finished store.
    """
    return prepare(images, out, **options).run(progress).store


def pack_store(path: str | Path, out: str | Path | None = None, *, progress: Progress | None = None) -> FeatureStore:
    """Turn a sharded store into one file.

    Parameters
    ----------
    path : str or Path
        The store.
    out : str or Path, optional
        Another file to write; without it the store itself is replaced, and its shards are removed.
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
        raise StoreError(f"{target}: exists already. Give another --out, or remove it.")
    FeatureStore.open(path)  # whether it is one, before anything is made beside it
    writable_folder(target.parent)
    with locked(path), locked(target) if target != path else contextlib.nullcontext():
        sweep(target)
        store = FeatureStore.open(path)
        if store.kind == "index" or target != path:
            pack(store, target, progress)
        if target == path:
            parts = PartsFolder(parts_folder(path))
            parts.read()
            unused = {name for name, record in parts.records.items() if record.kept or name in store.shards.names}
            parts.drop(unused)  # not those of an unfinished extraction
            if not parts.records:
                parts.remove()
    return FeatureStore.open(target)


def _settled(plan: Plan) -> list[Identity]:
    """Identity of every image, from what was known before and from the shards just made."""
    images = plan.images
    columns = zip(images.paths, images.sizes.tolist(), images.mtimes_ns.tolist(), plan.identities, strict=True)
    settled = []
    for path, size, mtime, identity in columns:
        if identity is None or plan.known.is_fresh(path):
            identity = plan.known.identity(path, size, mtime)
        if identity is None:
            raise StoreError(f"{printable(path)}: no shard holds it, though one was planned")
        settled.append(identity)
    return settled
