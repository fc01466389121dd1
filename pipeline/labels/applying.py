"""Write a manifest of a store under its labels file, which ``extract`` reads: the labels in effect become the data set's own.

RelabelledStore, excluded rows left out --> path,label,split,group and further columns
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np

from features.errors import SourceError
from features.files import atomic_file
from features.sources.splits import SPLITS, UNLABELLED
from features.store.reader import FeatureStore


def write_manifest(store: FeatureStore, out: Path, *, without: np.ndarray, root: str | Path | None = None) -> int:
    """Write the manifest.

    Parameters
    ----------
    store : FeatureStore
        The store under the labels in effect.
    out : Path
        CSV file.
    without : bool, (n,)
        Rows to leave out.
    root : Path, optional
        Folder of the images; default: the one that the store notes.

    Returns
    -------
    int
        Number of images listed.

    Raises
    ------
    SourceError
        If the images are not files of a folder.
    """
    if store.images.target is not None:
        raise SourceError(
            f"{store.path}: is for --task {store.images.target.task}, and labels apply writes manifests of classes only; train "
            "with --labels instead"
        )
    folder = str(root or store.provenance.get("root", ""))
    if not os.path.isdir(folder):
        raise SourceError(
            f"{folder or store.source}: is not a folder, and a manifest lists files in folders. Give the folder that the "
            "images are in with --images, or unpack the archive"
        )
    table, beside = store.images, os.path.realpath(folder) == os.path.realpath(out.parent)
    names = ["path", "label", "split", *(["group"] if table.groups is not None else []), *table.columns]
    rows = np.flatnonzero(~without).tolist()
    with (
        atomic_file(out) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream,
    ):
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            label, split = int(table.labels[row]), int(table.splits[row])
            path = table.paths[row] if beside else os.path.join(os.path.realpath(folder), table.paths[row])
            cells = [path, store.classes[label] if label >= 0 else "", SPLITS[split] if split != UNLABELLED else ""]
            cells += [table.groups[row]] if table.groups is not None else []
            writer.writerow([*cells, *(values[row] for values in table.columns.values())])
    return len(rows)
