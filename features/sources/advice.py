"""Why a split is empty, and what the user can do about it: the advice looks at the cause, so that it never leads back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from features.errors import ConfigurationError
from features.sources.splits import NOT_GIVEN, SPLITS, SplitRule, assign_splits

FEW = 60  # images of a split from which a tenth, drawn by hash, may leave nothing


def empty_splits(
    labels: np.ndarray,
    splits: np.ndarray,
    groups: Sequence[str] | None,
    sha256: np.ndarray,
    rule: str,
    given_splits: np.ndarray | None = None,
) -> dict[str, str]:
    """Return the splits that have no labelled image, each with the options or the change of the source that mends it.

    Parameters
    ----------
    labels : int32, (n,)
    splits : int8, (n,)
        Index into ``SPLITS``.
    groups : sequence of str, length n, or None
    sha256 : uint8, (n, 32)
    rule : str
        The split rule, in the form of ``str(SplitRule)``.
    given_splits : int8, (n,), optional
        Index into ``SPLITS``, -1 for not given. Without them, as for a store, splits that the rule would not make are taken
        for given.

    Returns
    -------
    dict of str to str
        Advice by name of the split; a clause such as "extract again with --validation-from-train 0.1".
    """
    rows = np.flatnonzero(np.asarray(labels) >= 0)
    empty = [name for code, name in enumerate(SPLITS[:3]) if not (np.asarray(splits)[rows] == code).any()]
    if not empty or not len(rows):
        return {}
    try:
        asked = SplitRule.parse(rule)
    except ConfigurationError:  # of a store that another release wrote
        asked = SplitRule()
    names = None if groups is None else [groups[row] for row in rows.tolist()]
    labels, splits, sha256 = np.asarray(labels)[rows], np.asarray(splits)[rows], np.asarray(sha256)[rows]
    if given_splits is None:
        by_rule, _ = assign_splits(labels, np.full(len(rows), NOT_GIVEN, np.int8), names, sha256, asked)
        given = bool((by_rule != splits).any())
    else:
        given = bool((np.asarray(given_splits)[rows] != NOT_GIVEN).all())
    advise = _of_source if given else _of_rule
    units = len(rows) if names is None else len(set(names) - {""}) + names.count("")
    return {split: advise(split, splits, asked, units, grouped=units < len(rows)) for split in empty}


def _of_rule(split: str, splits: np.ndarray, rule: SplitRule, units: int, *, grouped: bool) -> str:
    """Advise where the rule has split all images; ``units`` are the groups, or the images where there are none."""
    kinds = f"{units} groups" if grouped else f"{units} images"
    if grouped and units == 1:
        return "all images are of one group, which is never divided: leave the group out, or give each image its split"
    if not rule.fractions[SPLITS.index(split)]:
        return f"the split rule {rule} leaves none for it: extract again with --split {rule.kind}:0.8,0.1,0.1"
    if units < sum(share > 0 for share in rule.fractions):
        fewer = "--split stratified:0.75,0.25" if split == "test" or units > 1 else "more images"
        return f"{kinds} cannot fill three splits: extract again with {fewer}"
    if rule.kind == "hash":
        whole = ", which divides whole groups evenly" if grouped else ", which is exact even for few images"
        return f"chance left none of {kinds} for it: extract again with --split stratified:0.6,0.2,0.2{whole}"
    return f"{kinds} are too few for these shares of each class: extract again with --split stratified:0.6,0.2,0.2"


def _of_source(split: str, splits: np.ndarray, rule: SplitRule, units: int, *, grouped: bool) -> str:
    """Advise where the source itself gives splits, which are kept."""
    counts = dict(zip(SPLITS[:3], np.bincount(splits, minlength=4)[:3].tolist(), strict=True))
    option, from_split = (
        ("test-from-validation", "validation") if split == "test" else ("validation-from-train", "train")
    )
    if not counts[from_split]:
        return (
            f"the source gives splits, but no {from_split} images: add them, or leave its splits out to have it split by "
            "--split"
        )
    tried = rule.validation_from_train if split == "validation" else rule.test_from_validation
    share = 0.5 if split == "test" else 0.25 if grouped or counts[from_split] < FEW else 0.1
    kind = "--split stratified " if grouped or tried else ""
    share = min(0.5, 2 * tried) if tried and kind and rule.kind == "stratified" else share
    also = ", which takes whole groups" if grouped else ""
    return f"the source gives its splits: extract again with {kind}--{option} {share:g}{also}"
