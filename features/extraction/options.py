"""The options of an extraction, declared in one place: those of the network, and those of the extraction itself."""

from __future__ import annotations

import dataclasses

from features.augmentation import PRESETS, AugmentSpec
from features.canonical import check_choice
from features.errors import ConfigurationError, check_range
from features.machine import usual_batch
from features.recipe import NetworkOptions
from features.sources.reading import Reading
from features.sources.splits import SplitRule
from features.sources.tarindex import Trust
from features.targets import CLASSIFICATION, TASKS

LAYOUTS = ("packed", "sharded")


@dataclasses.dataclass(frozen=True)
class ExtractionOptions(NetworkOptions):
    """The options of one extraction, in addition to the fields of ``NetworkOptions``.

    Parameters
    ----------
    views : int
        Views per image, 1-1000; view 0 is the plain image. A store that already has more views keeps them.
    augment : str or AugmentSpec
        Augmentation of views 1 and above: the name of a preset, or ranges.
    split : str, optional
        How images without a given split are assigned to one: ``"hash"`` or ``"stratified"``, followed by a colon and
        the fractions; see ``SplitRule``. Default: the rule of the existing store; ``"hash"`` for a new one.
    seed : int
        Random seed of the views and of the split. 0 keeps the seed of a split rule that is kept.
    target : str, optional
        Column of the manifest that holds the label; it is recorded in the store for later stages. For other tasks several
        columns may be named, with commas between them.
    task : {"classification", "multilabel", "regression"}
        What is to be predicted: one class of each image, any number of labels, or numbers.
    split_folders : str
        Folders that hold the splits, if they have other names than ``train``, ``validation`` and ``test``:
        ``train=Training,test=Testing``; see ``Reading``.
    class_level : {0, 1, 2}
        Level of the class folders if their names do not tell; the folders of the other level become groups. 0: they tell.
    merge_labels : bool
        Make one class of labels that look alike, such as ``Cat`` and ``cat``, and no label of ``nan``.
    limit : int, optional
        Use at most this many images, taken in turn from each class and given split, for a trial run.
    batch_size : int, optional
        Views per forward pass, 1-4096. Default: 256 where Keras may have a GPU, else 32.
    shard_rows : int, optional
        Images per shard, 1-1,048,576. Default: as many as make about 64 MiB of features.
    workers : int, optional
        Threads that read and decode images, 1-1024. Default: the number of processor cores of this process.
    max_unreadable : float
        Largest fraction of images that may be unreadable, 0-1.
    overwrite : bool
        Allow a store of another recipe or of other images to be replaced.
    rehash : bool
        Read and hash every image again, and expand a compressed tar again, whatever is noted.
    trust_times : bool
        Take an image for unchanged if its path, size and modification time are those in the store, whatever is noted
        on this machine: for file systems without lasting inodes, and where there is no lasting cache folder.
    allow_host : str
        Hosts inside a private network, or without encryption, that addresses in a manifest may reach; separated by commas.
    strict : bool
        Raise an error, instead of a warning, if the same bytes are found in two splits.
    layout : {"packed", "sharded"}, optional
        One file, or an index of shards that remain separate files. Default: the layout of the existing store;
        packed for a new one.
    check_precision : int
        Number of images to compare with float32, 0-100,000; the result is recorded in the store, see
        ``features.extraction.precision``.

    Raises
    ------
    ConfigurationError
        If a value is not one of the choices or is out of range, or if only one of ``views`` and ``augment`` is given.
    """

    views: int = 1
    augment: str | AugmentSpec = "none"
    split: str | None = None
    seed: int = 0
    target: str | None = None
    task: str = CLASSIFICATION
    split_folders: str = ""
    class_level: int = 0
    merge_labels: bool = False
    limit: int | None = None
    batch_size: int = None  # type: ignore[assignment]  # filled in by __post_init__
    shard_rows: int | None = None
    workers: int | None = None
    max_unreadable: float = 0.05
    overwrite: bool = False
    rehash: bool = False
    trust_times: bool = False
    allow_host: str = ""
    strict: bool = False
    layout: str | None = None
    check_precision: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size is None:
            object.__setattr__(self, "batch_size", usual_batch(self.engine, self.device))
        self.rule_after("")
        _ = self.reading
        self._check_views()
        check_range("batch size", self.batch_size, 1, 4096)
        check_range("limit", 1 if self.limit is None else self.limit, 1, 1 << 40)
        check_range("shard rows", 1 if self.shard_rows is None else self.shard_rows, 1, 1 << 20)
        check_range("workers", 1 if self.workers is None else self.workers, 1, 1024)
        check_range("max unreadable", self.max_unreadable, 0, 1)
        check_choice("task", self.task, TASKS)
        check_choice("layout", self.layout or "packed", LAYOUTS)
        check_range("check precision", self.check_precision, 0, 100_000)
        if self.rehash and self.trust_times:
            raise ConfigurationError(
                "rehash reads every image and trust times reads as few as possible; give one of them"
            )

    def _check_views(self) -> None:
        """Raise ``ConfigurationError`` unless views and augmentation are given together or not at all.

        More views without an augmentation would be copies, and an augmentation without more views has no effect.
        """
        check_range("views", self.views, 1, 1000)
        plain = self.augmentation.is_plain
        if self.views > 1 and plain:
            presets = ", ".join(name for name, spec in PRESETS.items() if not spec.is_plain)
            raise ConfigurationError(
                f"views: received {self.views}, which without an augmentation would all be the plain image. Add "
                f"--augment with one of {presets}."
            )
        if self.views == 1 and not plain:
            raise ConfigurationError(
                f"augment: received {self.augmentation.name}, but with one view there is only the plain image. "
                "Add --views 2 or more."
            )

    @property
    def augmentation(self) -> AugmentSpec:
        """How views 1 and above are augmented."""
        return AugmentSpec.parse(self.augment) if isinstance(self.augment, str) else self.augment

    @property
    def reading(self) -> Reading:
        """How classes, splits and groups are read from the source."""
        return Reading(self.split_folders, self.class_level, self.merge_labels)

    @property
    def trust(self) -> Trust:
        """What shows that a file is unchanged."""
        return "nothing" if self.rehash else "times" if self.trust_times else "notes"

    def rule_after(self, before: str) -> SplitRule:
        """How images without a given split are assigned to one; ``before`` is the rule of the existing store, or empty."""
        if self.split is not None or not before:
            return SplitRule.parse("hash" if self.split is None else self.split, self.seed)
        kept = SplitRule.parse(before)
        return dataclasses.replace(kept, seed=self.seed or kept.seed)
