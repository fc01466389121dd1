"""What a store says about images, from Python: audit, similar images, what to label next, networks compared.

store --> pipeline.auditing | pipeline.stages.similar | suggest --> Result;  images --> pipeline.stages.compare --> Result
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from features.errors import ConfigurationError
from features.machine import hosts_allowed, take_device
from features.progress import Progress
from features.shown import showing
from pipeline.api.places import Place, RunPlace, image_files
from pipeline.api.results import Audited, Comparison, Similar, Suggestions

if TYPE_CHECKING:
    from features.store.reader import FeatureStore
    from pipeline.stages.suggest import Classifier

COMPARED = (
    "image_size", "precision", "engine", "batch_size", "workers", "seed", "target", "split_folders", "class_level",
    "merge_labels",
)  # fmt: skip


def audit(
    store: Place | FeatureStore,
    *,
    features: str | None = None,
    checks: Sequence[str] = (),
    images: Place | None = None,
    labels: Place | None = None,
    apply: bool = False,
    include_test: bool = False,
    exact: bool = False,
    out: Place | None = None,
    seed: int = 0,
    allow_host: str = "",
    progress: bool | Progress = True,
) -> Audited:
    """Look for wrong labels, odd images, duplicates and weak groups in a store; no image goes through the network.

    Parameters
    ----------
    store : path or FeatureStore
        The features.
    features : str, optional
        Feature set, if the store has several.
    checks : sequence of str
        Make only these checks; default: all.
    images : path, optional
        Where the images are, for the checks of pixels.
    labels : path, optional
        Labels file that is put over the labels of the store.
    apply : bool
        Append suggestions of which an estimated 95 % are right to the labels file, for training images only.
    include_test : bool
        Judge the test images too; the labels file records it.
    exact : bool
        Search neighbours without projection, which takes longer.
    out : path, optional
        CSV file of all scores.
    seed : int
        Random seed.
    allow_host : str
        Hosts inside a private network that addresses of images may reach, with commas.
    progress : bool or callable
        See `features.shown.showing`.

    Raises
    ------
    ConfigurationError
        If there is no such feature set or check, or ``apply`` or ``include_test`` comes without ``labels``.

    Examples
    --------
    >>> from pipeline import audit
    >>> found = audit("features.h5", checks=["suspect-label"])
    >>> [(check["check"], check["judged"]) for check in found.checks]
    [('suspect-label', 40)]
    >>> found["suspect-label"].score.shape  # of all rows
    (40,)
    """
    from features.store.reader import FeatureStore
    from pipeline.auditing import applying, stage
    from pipeline.outputs import output_file, refuse_overwriting

    for option, wanted in (("--apply", apply), ("--include-test", include_test)):
        if wanted and labels is None:
            raise ConfigurationError(f"{option}: records what it does in a labels file; name one with --labels FILE")
    decisions = None if labels is None else Path(labels)
    opened = FeatureStore.open(store) if isinstance(store, str | Path) else store
    path = None if out is None else output_file(out, "--out", "audit.csv")
    if path is not None:
        inputs = (Path(opened.path), decisions)
        refuse_overwriting(path, "--out", [str(name.resolve()) for name in inputs if name is not None])
    opened = applying.labelled(opened, decisions, may_be_new=apply or include_test)
    with showing(progress) as told, hosts_allowed(allow_host):
        found = stage.audit(
            opened, features, checks=checks, include_test=include_test, exact=exact,
            read=None if images is None else applying.reader(opened, str(images)), seed=seed, progress=told,
        )  # fmt: skip
    document: dict[str, Any] = {**stage.document(found), "out": None if out is None else str(out)}
    if path is not None:
        stage.write_csv(found, path)
    if decisions is not None:
        document["labels"] = applying.record(found, decisions, apply=apply)
    return Audited(document, stage.summary, findings=found.findings, labelled_by=opened.labelled_by)


def similar(
    store: Place | FeatureStore,
    images: Place | Sequence[str | os.PathLike[str]],
    *,
    k: int = 20,
    features: str | None = None,
    out: Place | None = None,
    grid: Place | None = None,
    sources: Sequence[str] = (),
    weights: str | None = None,
    quantised: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    allow_host: str = "",
    progress: bool | Progress = True,
) -> Similar:
    """Find the stored images most similar to given ones, exactly, by the cosine of their features.

    Parameters
    ----------
    store : path or FeatureStore
        The features.
    images : path or sequence of paths
        Paths as the store has them, or image files.
    k : int, 1 to 10,000
        Number of neighbours of each image.
    features : str, optional
        Feature set, if the store has several.
    out, grid : path, optional
        CSV file to write; PNG or JPEG file to draw.
    sources : sequence of str
        Where the images of the store are now, if they have moved.
    weights, quantised : str, optional
        Where the network's files are now, if they have moved.
    device, batch_size
        As for the command.
    allow_host : str
        Hosts inside a private network that addresses of images may reach, with commas.
    progress : bool or callable
        See `features.shown.showing`.

    Raises
    ------
    ConfigurationError, UnreadableImageError, RunError
        As `pipeline.stages.similar.similar`.

    Examples
    --------
    >>> from pipeline import similar
    >>> found = similar("features.h5", "cat/00.png", k=3)
    >>> [item["rank"] for item in found.to_pandas().to_dict("records")], found.images[0]["stored"]
    ([1, 2, 3], True)
    >>> found.row_numbers.shape, found.similarity.shape
    ((1, 3), (1, 3))
    """
    from features.store.reader import FeatureStore
    from pipeline.stages import similar as stage

    opened = FeatureStore.open(store) if isinstance(store, str | Path) else store
    wanted = list(image_files(images))
    with showing(progress) as told, hosts_allowed(allow_host):
        document, nearest = stage.search(
            opened, wanted, k=k, name=features, out=None if out is None else Path(out),
            grid=None if grid is None else Path(grid), sources=sources, weights=weights, quantised=quantised,
            device=take_device(device), batch_size=batch_size, progress=told,
        )  # fmt: skip
    return Similar(document, stage.summary, row_numbers=nearest.rows, similarity=nearest.similarity)


def suggest(
    store: Place | FeatureStore,
    head: RunPlace | Classifier | None = None,
    *,
    n: int = 50,
    strategy: str = "mix",
    purpose: str = "train",
    labels: Place | None = None,
    features: str | None = None,
    seed: int = 0,
    out: Place | None = None,
) -> Suggestions:
    """Say which images to label next: typical ones first, then those about which the head is in doubt.

    Parameters
    ----------
    store : path or FeatureStore
        Features of images, some without a label.
    head : path or object, optional
        What gives the probabilities: a run, or an object with ``classes`` and ``predict_proba(X)`` of stored features. Default: a
        head is trained on what is labelled.
    n : int, 1 to 100,000
        Number of images.
    strategy : str
        ``mix``, ``typical``, ``margin``, ``spread-margin``, ``entropy``, ``k-centre`` or ``random``; see pipeline/README.md.
    purpose : {"train", "validation"}
        Images for validation are drawn at random, and entered in the labels file.
    labels : path, optional
        Labels file whose decisions hold over the labels of the store.
    features : str, optional
        Feature set, if the store has several.
    seed : int
        Random seed.
    out : path, optional
        CSV file to write.

    Raises
    ------
    ConfigurationError
        If every image has a label, or a value cannot be used.

    Examples
    --------
    >>> from pipeline import suggest
    >>> found = suggest("unlabelled.h5", n=5)
    >>> found.labelled, len(found.images), found.row_numbers.shape
    (0, 5, (5,))
    """
    from features.store.reader import FeatureStore
    from pipeline.stages import suggest as stage

    opened = FeatureStore.open(store) if isinstance(store, str | Path) else store
    taken = stage.head_for(opened, os.fspath(head), features) if isinstance(head, str | os.PathLike) else head
    document, chosen = stage.run(
        opened, taken, n=n, strategy=strategy, purpose=purpose, labels=labels, name=features, seed=seed,
        out=None if out is None else Path(out),
    )  # fmt: skip
    return Suggestions(document, stage.summary, row_numbers=chosen.rows, scores=chosen.scores)


def compare_networks(
    images: Place,
    backbones: Sequence[str],
    *,
    limit: int = 500,
    weights: Mapping[str, str] | None = None,
    preprocess: Mapping[str, str] | None = None,
    stores: Place | None = None,
    out: Place | None = None,
    image_size: int | tuple[int, int] | None = None,
    precision: Literal["float32", "bfloat16", "float16", "int8"] = "float32",
    engine: Literal["auto", "keras", "openvino", "onnxruntime"] = "auto",
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    seed: int = 0,
    target: str | None = None,
    split_folders: str = "",
    class_level: int = 0,
    merge_labels: bool = False,
    allow_host: str = "",
    progress: bool | Progress = True,
) -> Comparison:
    """Compare networks by a cross-validated logistic head on some images, and by their speed.

    Parameters
    ----------
    images : path
        Image source with labels. Images of the test split take no part.
    backbones : sequence of str
        Names or places of networks, as for `features.extract_features`.
    limit : int
        Largest number of images of the sample.
    weights, preprocess : dict of str to str, optional
        Weights, and how images are prepared, of single networks by their name.
    stores, out : path, optional
        Folder for the features; PNG or JPEG file to draw.
    image_size, ..., merge_labels
        Of all networks, as for `features.extract_features`.
    allow_host : str
        Hosts inside a private network that addresses of images may reach, with commas.
    progress : bool or callable
        See `features.shown.showing`.

    Raises
    ------
    ConfigurationError, SourceError
        As `pipeline.stages.compare.compare`.

    Examples
    --------
    >>> from features import compare_networks
    >>> compared = compare_networks("photos", ["network.keras"])
    >>> compared.chosen, compared.failed
    ('network.keras', [])
    """
    given = locals()
    from pipeline.stages import compare as stage

    options = {name: given[name] for name in COMPARED} | {"device": take_device(device)}
    with showing(progress) as told, hosts_allowed(allow_host):
        document = stage.compare(
            images, backbones, limit=limit, weights=weights, preprocess=preprocess, stores=stores, out=out,
            progress=told, **options,
        )  # fmt: skip
    return Comparison(document, stage.summary)
