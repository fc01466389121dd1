"""What every head does, whatever library is behind it.

Every head does the same to a row: pool it to one vector, standardise that with the training rows' mean and
standard deviation, compute one logit per class (two classes: one logit m, read as [0, m]), softmax.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from features.errors import HeadError
from features.progress import Progress
from pipeline.config import FORMAT_VERSION, HeadFile, History, Settings, parse
from pipeline.heads.pooling import check_rows, choose_pool, chunks, pool_features
from pipeline.heads.prepared import Prepared, Rows, prepare, standardise
from pipeline.presets import Preset


class Head(abc.ABC):
    """A model from features to class probabilities. Made by `pipeline.heads.kinds.make_head` or `load_head`.

    Attributes
    ----------
    name, kind : str
        Preset; ``"dense"`` or the dotted path of the scikit-learn class.
    parameters : Settings
        How it is trained.
    pool : str or None
        Pooling of spatial features; None until `fit` where the usual one is to be used.
    usual_pool : str
        The preset's default.
    classes : tuple of str
        Class names, in label order.
    layer, fingerprint : str
        Backbone layer and fingerprint of the features.
    input_shape : tuple of int
        Shape of one stored row.
    mean, std : float32, (d,)
        Of the pooled training rows; ``std`` has a lower bound, see `pipeline.heads.pooling.LEAST_DEVIATION`.
    temperature : float
        Margins are divided by it.
    folds : int
        Set it before `fit` to have predictions of held-out training rows in `out_of_fold`, where fitting makes them
        anyway.
    out_of_fold : float64, (n, c), or None
        Probabilities of the training rows, each by a model that had not seen it; NaN for rows that took no part.
    parallel : bool
        Whether several heads are trained by processes side by side; False: in this process, alone or beside their
        `companions`.
    file_model : type
        What ``head.json`` holds.
    """

    parallel: bool = True
    file_model: type[HeadFile] = HeadFile

    def __init__(
        self,
        name: str,
        kind: str,
        parameters: Settings,
        *,
        pool: str | None = None,
        usual_pool: str = "avg",
        seed: int = 0,
    ) -> None:
        self.name = name
        self.kind = kind
        self.parameters = parameters
        self.pool = pool
        self.usual_pool = usual_pool
        self.seed = seed
        self.classes: tuple[str, ...] = ()
        self.layer = ""
        self.fingerprint = ""
        self.input_shape: tuple[int, ...] = ()
        self.mean = self.std = np.zeros(0, np.float32)
        self.temperature = 1.0
        self.folds = 0
        self.out_of_fold: np.ndarray | None = None

    def fit(
        self,
        X: np.ndarray,
        y: np.ndarray,
        *,
        X_validation: np.ndarray | None = None,
        y_validation: np.ndarray | None = None,
        groups: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> History:
        """Train.

        Parameters
        ----------
        X : float16 or float32, (n, d) or (n, h, w, c)
            Features of the training rows.
        y : int32, (n,), 0 to c - 1
            Labels; every class must occur.
        X_validation, y_validation : optional
            For early stopping of Keras heads; scikit-learn heads do not look at them.
        groups : sequence of str, optional
            Rows of one group (patient, animal, scene) stay together where cross-validation chooses something.
        progress : callable, optional
            Called with ("train-head", done, total).

        Returns
        -------
        dict of str to list of float
            Columns of ``history.csv``: epochs, or the grid that was searched.

        Raises
        ------
        HeadError
            Features that are not finite or cannot be pooled so, a class without rows, diverging training.
        """
        y = np.asarray(y)
        self.check_labels(y, len(X))
        prepared = prepare(
            X,
            y,
            pool=choose_pool(self.pool, self.usual_pool, X.shape[1:]),
            scale=self.scale,
            X_validation=X_validation,
            y_validation=y_validation,
            groups=groups,
        )
        return self.fit_prepared(prepared, progress)

    def fit_prepared(self, prepared: Prepared, progress: Progress | None = None) -> History:
        """Train on rows that are pooled and standardised already, as this head wants them; they are not changed."""
        self.adopt(prepared)
        return self._train(prepared, progress or (lambda stage, done, total: None))

    def adopt(self, prepared: Prepared) -> None:
        """Take over how rows were prepared.

        Raises
        ------
        HeadError
            For labels that cannot be trained on.
        """
        self.check_labels(prepared.y, len(prepared.train))
        self.pool, self.input_shape = prepared.pool, prepared.input_shape
        self.mean, self.std = prepared.mean, prepared.std

    def fresh(self) -> Self:
        """The same head, not trained."""
        new = type(self)(
            self.name, self.kind, self.parameters, pool=self.pool, usual_pool=self.usual_pool, seed=self.seed
        )
        new.classes, new.layer, new.fingerprint = self.classes, self.layer, self.fingerprint
        return new

    @property
    def scale(self) -> bool:
        """Whether columns are standardised."""
        return getattr(self.parameters, "scale", True)

    @property
    def streams(self) -> bool:
        """Whether it can be trained on rows that come piece by piece."""
        return False

    @property
    def companions(self) -> Hashable | None:
        """Heads for which this is equal can be trained by one `train_together`; None: each is trained alone."""
        return None

    @classmethod
    def train_together(cls, heads: Sequence[Self], data: Prepared) -> list[History | HeadError]:
        """Train heads that are companions; the history of each, or why there is none."""
        return [head.fit_prepared(data) for head in heads]

    def fit_bytes(self, rows: int, columns: int, views: int = 1) -> int:
        """Bytes that fitting allocates beside the rows, about; 0 where it is little.

        Parameters
        ----------
        rows, columns : int
            Training images, and numbers of each after pooling.
        views : int
            Views of each image that are trained on.
        """
        return 0

    @classmethod
    def parse_parameters(cls, name: str, preset: Preset, params: Mapping[str, Any], classes: int) -> Settings:
        """Parameters of a preset with some of them given.

        Raises
        ------
        ConfigurationError
            For one that it does not have, or a value that it does not take.
        """
        return parse(type(preset.parameters), {**preset.parameters.model_dump(), **params}, f"head {name!r}")

    @classmethod
    @abc.abstractmethod
    def restored(cls, path: Path, stored: HeadFile) -> tuple[str, Settings]:
        """Name and parameters of a head that is read from ``head.json``; how it was trained stands in the run."""

    @classmethod
    def has_dense_form(cls, kind: str) -> bool:
        """Whether heads of that kind have the form that `as_dense` gives."""
        return False

    def views_used(self, stored: int) -> int:
        """How many views of each image training looks at, of so many that there are."""
        return stored

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Class probabilities.

        Parameters
        ----------
        X : float16 or float32, (n, *input_shape)
            Features, as stored.

        Returns
        -------
        float64, (n, c), 0-1, rows sum to 1
        """
        self._check_fitted()
        parts = [self._probabilities(self._prepare(X[rows])) for rows in chunks(X)]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.classes)))

    def predict_rows(self, rows: Rows) -> np.ndarray:
        """Class probabilities of rows that are pooled and standardised as those of `fit_prepared`: float64, (n, c)."""
        parts = [self._probabilities(Z) for _, Z in rows.pieces()]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.classes)))

    def predict_views(self, pieces: Iterable[tuple[slice, np.ndarray]]) -> np.ndarray:
        """Class probabilities averaged over views: of pieces of rows (k, K, d) as of `predict_rows`, float64, (n, c)."""
        parts = [np.zeros((0, len(self.classes)))]
        for _, Z in pieces:
            values = self._probabilities(Z.reshape(-1, Z.shape[2]))
            parts.append(values.reshape(*Z.shape[:2], -1).mean(axis=1))
        return np.concatenate(parts)

    def save(self, folder: Path) -> None:
        """Write ``head.json`` and the weights into an existing folder."""
        self._check_fitted()
        (folder / "head.json").write_text(json.dumps(self._description()) + "\n", encoding="utf-8")
        self._save_weights(folder)

    @property
    def network(self) -> Any:
        """A functional ``keras.Model`` from a stored row (``input_shape``) to logits, everything included.

        Softmax of the logits divided by `temperature` is `predict_proba` (sigmoid of the one logit of two classes).
        """
        self._check_fitted()
        return self._network()

    @abc.abstractmethod
    def warm_up(self) -> None:
        """Import the library behind the head, so that the time of `fit` is its own."""

    @property
    @abc.abstractmethod
    def parameter_count(self) -> int | None:
        """Trained numbers; None where the notion does not apply."""

    @property
    @abc.abstractmethod
    def files(self) -> tuple[str, ...]:
        """Names of the files that `save` writes."""

    @abc.abstractmethod
    def as_dense(self) -> Head:
        """The same function as a head of dense layers, which can be fine-tuned; `HeadError` if there is none."""

    @abc.abstractmethod
    def _train(self, data: Prepared, progress: Progress) -> History: ...

    @abc.abstractmethod
    def _probabilities(self, Z: np.ndarray) -> np.ndarray: ...

    @abc.abstractmethod
    def _network(self) -> Any: ...

    @abc.abstractmethod
    def _save_weights(self, folder: Path) -> None: ...

    @abc.abstractmethod
    def _load_weights(self, folder: Path) -> None: ...

    @property
    def _outputs(self) -> int:
        return 1 if len(self.classes) == 2 else len(self.classes)

    def _prepare(self, X: np.ndarray) -> np.ndarray:
        check_rows(X, self.input_shape)
        assert self.pool is not None
        Z = pool_features(X, self.pool)
        standardise(Z, self.mean, self.std)
        return Z

    def _check_fitted(self) -> None:
        if not self.input_shape:
            raise HeadError(f"head {self.name!r} is not trained yet; call fit first")

    def check_labels(self, y: np.ndarray, rows: int) -> None:
        """Refuse labels that cannot be trained on.

        Raises
        ------
        HeadError
            Unlabelled rows, labels outside the classes, a class without rows, one class.
        """
        if y.shape != (rows,) or not rows:
            raise HeadError(f"labels: received shape {y.shape} for {rows} rows of features")
        if y.min() < 0:
            raise HeadError(f"labels: {int((y < 0).sum())} training rows are unlabelled (-1)")
        self.classes = self.classes or tuple(str(k) for k in range(int(y.max()) + 1))
        counts = np.bincount(y, minlength=len(self.classes))
        if len(counts) > len(self.classes):
            raise HeadError(f"labels: received {len(counts) - 1}, expected 0 to {len(self.classes) - 1}")
        missing = [repr(self.classes[k]) for k in np.flatnonzero(counts == 0)]
        if missing:
            raise HeadError(
                f"no training rows of {', '.join(missing)}: every class needs some; "
                "give the class more images or another split (--split), or leave it out"
            )
        if len(self.classes) < 2:
            raise HeadError(
                f"all training rows are of one class ({self.classes[0]!r}); a classifier needs two. Add images of another "
                "class and extract again (features are kept)"
            )

    def _description(self) -> dict[str, Any]:
        """Content of ``head.json``."""
        return {
            "format": FORMAT_VERSION,
            "kind": self.kind,
            "layer": self.layer,
            "pool": self.pool,
            "input_shape": self.input_shape,
            "classes": self.classes,
            "fingerprint": self.fingerprint,
            "scaler": {"mean": self.mean.tolist(), "std": self.std.tolist()},
            "hidden": (),
            "activation": None,
            "dropout": 0.0,
            "temperature": self.temperature,
        }


def two_columns(margins: np.ndarray) -> np.ndarray:
    """One margin m of two classes becomes [0, m]."""
    return np.hstack([np.zeros_like(margins), margins]) if margins.shape[1] == 1 else margins


def check_finite(path: Path, weights: Sequence[np.ndarray]) -> None:
    """Refuse a file whose weights hold NaN or infinity."""
    if not all(np.isfinite(values).all() for values in weights):
        raise HeadError(f"{path}: holds weights that are not finite; train the head again")
