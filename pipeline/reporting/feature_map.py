"""Features in two dimensions: PCA and t-SNE of some rows of a store."""

from __future__ import annotations

import numpy as np

PERPLEXITY, ITERATIONS, COMPONENTS = 30, 500, 50  # of t-SNE; COMPONENTS is the number of principal components it gets


def project(X: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """Project rows to two dimensions in two ways.

    Parameters
    ----------
    X : float32, (n, d)
        Pooled features, n >= 3.
    seed : int
        Seed of the randomised decomposition and of t-SNE.

    Returns
    -------
    pca : float64, (n, 2)
        The first two principal components.
    tsne : float64, (n, 2)
        t-SNE of the first 50 components, initialised with PCA (Kobak and Berens, The art of using t-SNE for single-cell
        transcriptomics, 2019); zeros if all rows are the same.
    explained : float, 0-1
        Share of the variance that the first two components explain.
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
    # One thread is faster for so few points: several would spend their time waiting for each other.
    with threadpool_limits(1):
        places = PCA(kept, svd_solver=solver, random_state=seed).fit_transform(centred).astype(np.float64)
        if places.shape[1] < 2:
            places = np.pad(places, ((0, 0), (0, 1)))
        # The sign of a component is arbitrary; this makes it the same on every machine.
        places *= np.where(places[np.abs(places).argmax(axis=0), np.arange(places.shape[1])] < 0, -1, 1)
        plane, near = places[:, :2], min(PERPLEXITY, (len(X) - 1) / 3)
        model = TSNE(2, perplexity=near, init="pca", max_iter=ITERATIONS, random_state=seed, n_jobs=1)
        return plane, model.fit_transform(places).astype(np.float64), float(np.square(plane).sum() / total)
