"""Features in two dimensions: PCA and t-SNE of some rows of a store."""

from __future__ import annotations

import numpy as np

PERPLEXITY, ITERATIONS, COMPONENTS = 30, 500, 50


def project(X: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """Two projections of the same rows.

    Parameters
    ----------
    X : float32, (n, d)
        Pooled features, n >= 3.
    seed : int
        Of the randomised decomposition and of t-SNE.

    Returns
    -------
    pca : float64, (n, 2)
        The first two principal components.
    tsne : float64, (n, 2)
        t-SNE of the first 50, begun from the first two (Kobak and Berens, The art of using t-SNE for single-cell
        transcriptomics, 2019); zeros where all rows are the same.
    explained : float, 0-1
        Share of the variance that the two components hold.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    X = np.asarray(X, np.float32)
    centred = X - X.mean(axis=0)
    total = float(np.square(centred, dtype=np.float64).sum())
    if not total > 0:
        return np.zeros((len(X), 2)), np.zeros((len(X), 2)), 0.0
    kept = min(COMPONENTS, len(X) - 1, X.shape[1])
    solver = "randomized" if kept < min(X.shape) // 2 else "full"
    # So few points are done sooner by one thread: several wait for each other, busily where processors are shared.
    with threadpool_limits(1):
        places = PCA(kept, svd_solver=solver, random_state=seed).fit_transform(centred).astype(np.float64)
        if places.shape[1] < 2:
            places = np.pad(places, ((0, 0), (0, 1)))
        # The sign of a component is arbitrary; this one is the same on every machine.
        places *= np.where(places[np.abs(places).argmax(axis=0), np.arange(places.shape[1])] < 0, -1, 1)
        plane, near = places[:, :2], min(PERPLEXITY, (len(X) - 1) / 3)
        model = TSNE(2, perplexity=near, init="pca", max_iter=ITERATIONS, random_state=seed, n_jobs=1)
        return plane, model.fit_transform(places).astype(np.float64), float(np.square(plane).sum() / total)
