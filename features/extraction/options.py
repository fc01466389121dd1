"""The options of one extraction, declared once: those of its network, and what is made of which images in what way."""

from __future__ import annotations

import dataclasses

from features.augmentation import PRESETS, AugmentSpec
from features.canonical import check_choice
from features.errors import ConfigurationError, check_range
from features.recipe import NetworkOptions
from features.sources.splits import SplitRule

LAYOUTS = ("packed", "sharded")


@dataclasses.dataclass(frozen=True)
class ExtractionOptions(NetworkOptions):
    """What one extraction is asked for, beside its images and its store. It begins with the fields of ``NetworkOptions``.

    Parameters
    ----------
    views : int
        Views of each image, 1-1000; view 0 is the plain image. A store keeps those it has beyond them.
    augment : str or AugmentSpec
        From what the other views are drawn: the name of a preset, or ranges.
    split : str
        How images without a given split get theirs: ``"hash"`` or ``"stratified"``, with fractions behind a colon; see
        ``SplitRule``.
    seed : int
        Seed of the views and of the split.
    target : str, optional
        The manifest's column that holds the label, noted for later stages.
    batch_size : int
        Pictures of one forward pass, 1-4096.
    shard_rows : int, optional
        Images of one shard, 1-1,048,576; about 64 MiB of features without it.
    workers : int, optional
        Threads that read and decode, 1-1024; the processors of this process without it.
    max_unreadable : float
        Largest share of unreadable images, 0-1.
    overwrite : bool
        Allow a store of another recipe or of other images to be replaced.
    rehash : bool
        Read every image again, also those whose size and time are unchanged.
    strict : bool
        Refuse the same bytes in two splits, which is otherwise warned about.
    layout : {"packed", "sharded"}, optional
        One file, or an index of shards that stay where they were made. Without it: that of the store as it is, packed
        for a new one.
    check_precision : int
        Compare so many images with float32, 0-100,000, and keep what was found in the store; see
        ``features.extraction.precision``.

    Raises
    ------
    ConfigurationError
        For a value that is none of the choices or out of its range, and for views without an augmentation or the other
        way round.
    """

    views: int = 1
    augment: str | AugmentSpec = "none"
    split: str = "hash"
    seed: int = 0
    target: str | None = None
    batch_size: int = 32
    shard_rows: int | None = None
    workers: int | None = None
    max_unreadable: float = 0.05
    overwrite: bool = False
    rehash: bool = False
    strict: bool = False
    layout: str | None = None
    check_precision: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        SplitRule.parse(self.split, self.seed)
        self._check_views()
        check_range("batch size", self.batch_size, 1, 4096)
        check_range("shard rows", 1 if self.shard_rows is None else self.shard_rows, 1, 1 << 20)
        check_range("workers", 1 if self.workers is None else self.workers, 1, 1024)
        check_range("max unreadable", self.max_unreadable, 0, 1)
        check_choice("layout", self.layout or "packed", LAYOUTS)
        check_range("check precision", self.check_precision, 0, 100_000)

    def _check_views(self) -> None:
        """Views and augmentation are given together: one without the other would make copies, or nothing."""
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
                f"augment: received {self.augmentation.name}, but one view is the plain image alone. Add --views with 2 "
                "or more."
            )

    @property
    def augmentation(self) -> AugmentSpec:
        """From what views are drawn."""
        return AugmentSpec.parse(self.augment) if isinstance(self.augment, str) else self.augment

    @property
    def rule(self) -> SplitRule:
        """How images without a given split get theirs."""
        return SplitRule.parse(self.split, self.seed)
