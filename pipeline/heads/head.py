"""The interface of all heads, independent of the library that trains them.

Every head treats a row of features in the same way: it pools the row to one vector, standardises the vector with the
mean and standard deviation of the training rows, computes one logit per class (for two classes a single logit m, read
as [0, m]) and applies softmax.
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
from pipeline.heads.models.archive import is_bounded
from pipeline.heads.pooling import check_rows, choose_pool, chunks, pool_features
from pipeline.heads.prepared import Prepared, Rows, prepare, standardise
from pipeline.presets import Preset
from pipeline.tasks.table import CLASSIFICATION
from pipeline.tasks.task import Task

MOST_COLUMNS = 1_000_000  # of pooled rows, so that their means and deviations can be read again


class Head(abc.ABC):
    """A model from features to class probabilities, made by `make_head` or `load_head` of `pipeline.heads.kinds`.

    Attributes
    ----------
    name, kind : str
        Name of the preset; ``"dense"`` or the dotted path of the scikit-learn class.
    parameters : Settings
        Training parameters.
    pool : str or None
        Pooling of spatial features. None stands for `usual_pool` and is replaced in `fit`.
    usual_pool : str
        The preset's default pooling.
    task : Task
        What is predicted.
    classes : tuple of str
        Class names, in label order; for another task the names of the columns of the target.
    layer, fingerprint : str
        Layer of the network that the features come from, and their fingerprint.
    input_shape : tuple of int
        Shape of one stored row.
    mean, std : float32, (d,)
        Statistics of the pooled training rows; ``std`` has a lower bound, see
        `pipeline.heads.pooling.LEAST_DEVIATION`.
    temperature : float, > 0
        Logits or margins are divided by it before softmax.
    folds : int
        Number of folds for which `fit` should keep held-out predictions in `out_of_fold`. They are kept only where
        fitting computes them anyway.
    out_of_fold : float64, (n, c), or None
        Probabilities of the training rows, each predicted by a model that was not trained on it; NaN for rows that
        were in no fold.
    parallel : bool
        True: several heads are trained in parallel processes. False: they are trained in this process, alone or
        together with their `companions`.
    file_models : tuple of type
        Schemas of ``head.json``, one for each format that can be read.
    """

    parallel: bool = True
    file_models: tuple[type[HeadFile], ...] = (HeadFile,)

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
        self.task: Task = CLASSIFICATION
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
        """Train the head.

        Parameters
        ----------
        X : float16 or float32, (n, d) or (n, h, w, c)
            Features of the training rows.
        y : int32, (n,), 0 to c - 1
            Labels; every class must occur.
        X_validation, y_validation : optional
            Validation rows for early stopping of dense heads; scikit-learn heads ignore them.
        groups : sequence of str, optional
            Group (patient, animal, scene) of each row. Cross-validation keeps the rows of a group in one fold.
        progress : callable, optional
            Called with ("train-head", done, total).

        Returns
        -------
        dict of str to list of float
            Columns of ``history.csv``: one row per epoch, or per parameter value that was tried.

        Raises
        ------
        HeadError
            Features are not finite or cannot be pooled in this way, a class has no rows, or training diverges.
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
        """Train on rows that are already pooled and standardised as this head needs them. They are not modified."""
        self.adopt(prepared)
        return self._train(prepared, progress or (lambda stage, done, total: None))

    def adopt(self, prepared: Prepared) -> None:
        """Copy pooling, input shape, mean and standard deviation from prepared rows.

        Raises
        ------
        HeadError
            If the head cannot be trained on their labels.
        """
        self.check_labels(prepared.y, len(prepared.train))
        if len(prepared.mean) > MOST_COLUMNS:
            raise HeadError(
                f"rows of {len(prepared.mean):,} values: a head takes at most {MOST_COLUMNS:,}; use --pool avg or max"
            )
        self.pool, self.input_shape = prepared.pool, prepared.input_shape
        self.mean, self.std = prepared.mean, prepared.std

    def fresh(self) -> Self:
        """Make an untrained head with the same configuration."""
        new = type(self)(
            self.name, self.kind, self.parameters, pool=self.pool, usual_pool=self.usual_pool, seed=self.seed
        )
        new.task, new.classes, new.layer, new.fingerprint = self.task, self.classes, self.layer, self.fingerprint
        return new

    @property
    def scale(self) -> bool:
        """Whether columns are standardised."""
        return getattr(self.parameters, "scale", True)

    @property
    def streams(self) -> bool:
        """Whether the head can be trained on rows that are read from the store piece by piece."""
        return False

    @property
    def companions(self) -> Hashable | None:
        """Key that is equal for heads which one call of `train_together` can train; None: the head trains alone."""
        return None

    @classmethod
    def train_together(cls, heads: Sequence[Self], data: Prepared) -> list[History | HeadError]:
        """Train heads with equal `companions`. Each gets its history, or the error that explains why it has none."""
        return [head.fit_prepared(data) for head in heads]

    def fit_bytes(self, rows: int, columns: int, views: int = 1) -> int:
        """Estimate the bytes that fitting allocates in addition to the rows; 0 where they are few.

        Parameters
        ----------
        rows, columns : int
            Number of training images, and length of their vectors after pooling.
        views : int
            Number of views of each image used for training.
        """
        return 0

    def fit_seconds(self, rows: int, columns: int, views: int = 1) -> float:
        """Estimate, within a factor of about three, the processor seconds that fitting takes; 0 where it is not known.

        Parameters are those of `fit_bytes`.
        """
        return 0.0

    def cheaper(self, columns: int) -> list[dict[str, Any]]:
        """Parameters that each make fitting cheaper, and may make the head a little worse; see `fit_seconds`."""
        return []

    @classmethod
    def parse_parameters(cls, name: str, preset: Preset, params: Mapping[str, Any], classes: int) -> Settings:
        """Replace some parameters of a preset by given values.

        Raises
        ------
        ConfigurationError
            If the head does not have a given parameter, or does not accept its value.
        """
        return parse(type(preset.parameters), {**preset.parameters.model_dump(), **params}, f"head {name!r}")

    @classmethod
    @abc.abstractmethod
    def restored(cls, path: Path, stored: HeadFile) -> tuple[str, Settings]:
        """Name and parameters of a head read from ``head.json``. The training settings are in the run's config."""

    @classmethod
    def has_dense_form(cls, kind: str) -> bool:
        """Whether `as_dense` works for heads of this kind."""
        return False

    def views_used(self, stored: int) -> int:
        """Number of views of each image that training uses, given how many are stored."""
        return stored

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Predict class probabilities from stored features.

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
        """Predict class probabilities, float64 (n, c), of rows prepared in the same way as those of `fit_prepared`."""
        parts = [self._probabilities(Z) for _, Z in rows.pieces()]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.classes)))

    def predict_views(self, pieces: Iterable[tuple[slice, np.ndarray]]) -> np.ndarray:
        """Predict class probabilities, float64 (n, c), averaged over the views of each row; pieces are (k, K, d)."""
        parts = [np.zeros((0, len(self.classes)))]
        for _, Z in pieces:
            values = self._probabilities(Z.reshape(-1, Z.shape[2]))
            parts.append(values.reshape(*Z.shape[:2], -1).mean(axis=1))
        return np.concatenate(parts)

    def save(self, folder: Path) -> None:
        """Write ``head.json`` and the weights to an existing folder."""
        self._check_fitted()
        more = self._save_weights(folder)
        data = (json.dumps({**self._description(), **more}) + "\n").encode()
        if not is_bounded(data):
            raise HeadError(
                f"head.json of {self.name!r} would be too large to be read again; train it with fewer members"
            )
        (folder / "head.json").write_bytes(data)

    @property
    def network(self) -> Any:
        """Functional ``keras.Model`` from a stored row (``input_shape``) to logits, with pooling and standardisation.

        Softmax of the logits divided by `temperature` equals `predict_proba` (for two classes: sigmoid of one logit).
        """
        self._check_fitted()
        return self._network()

    @abc.abstractmethod
    def warm_up(self) -> None:
        """Import the library that trains the head, so that the measured time of `fit` does not include the import."""

    @property
    @abc.abstractmethod
    def parameter_count(self) -> int | None:
        """Number of trained parameters; None where counting them makes no sense (neighbours, trees)."""

    @property
    @abc.abstractmethod
    def files(self) -> tuple[str, ...]:
        """Names of the files written by `save`."""

    @abc.abstractmethod
    def as_dense(self) -> Head:
        """An equivalent head of dense layers, which can be fine-tuned; `HeadError` if there is none."""

    @abc.abstractmethod
    def _train(self, data: Prepared, progress: Progress) -> History: ...

    @abc.abstractmethod
    def _probabilities(self, Z: np.ndarray) -> np.ndarray: ...

    @abc.abstractmethod
    def _network(self) -> Any: ...

    @abc.abstractmethod
    def _save_weights(self, folder: Path) -> Mapping[str, Any]:
        """Write the weights to a folder; return what ``head.json`` says of them beside `_description`."""

    @abc.abstractmethod
    def _load_weights(self, folder: Path, stored: HeadFile, *, trust: bool) -> None:
        """Read the weights from a folder; ``trust``: the user vouches for files that only a trusted author may write."""

    @property
    def _outputs(self) -> int:
        return self.task.outputs(len(self.classes))

    def _prepare(self, X: np.ndarray) -> np.ndarray:
        check_rows(X, self.input_shape)
        assert self.pool is not None
        Z = pool_features(X, self.pool)
        standardise(Z, self.mean, self.std)
        return Z

    def _check_fitted(self) -> None:
        if not self.input_shape:
            raise HeadError(f"head {self.name!r} is not trained yet; call fit() first")

    def check_labels(self, y: np.ndarray, rows: int) -> None:
        """Refuse targets that no head can be trained on; see `Task.check`."""
        self.classes = self.task.check(y, rows, self.classes)

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
            **self.task.head_file,
        }


def check_finite(path: Path, weights: Sequence[np.ndarray]) -> None:
    """Raise ``HeadError`` if any weight read from ``path`` is NaN or infinite."""
    if not all(np.isfinite(values).all() for values in weights):
        raise HeadError(f"{path}: holds weights that are not finite; train the head again")
