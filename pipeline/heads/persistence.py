"""Write and read the files of scikit-learn heads: arrays of our own, or a skops file signed by this user.

``head.npz`` and ``model`` in ``head.json`` -> `Model`. ``head.skops`` -> `Model` too, for the classes that arrays can
describe; any other class is loaded by skops only from a file that this user signed or that the user trusts by an option.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from features.errors import HeadError, UntrustedHeadError
from features.files import file_digest, read_small
from features.signing import is_signed, signature
from pipeline.heads.models.archive import Archive
from pipeline.heads.models.converting import class_count, classifier_of, model_of_part
from pipeline.heads.models.document import restored
from pipeline.heads.models.model import ARRAYS, DamagedModelError, Model, need
from pipeline.heads.models.parts import NotPlainError, Part
from pipeline.heads.models.skops_file import read_skops
from pipeline.scores.metrics import two_columns

SKOPS, SIGNATURE = "head.skops", "head.skops.signature"
# The only types that a trusted head.skops may contain besides those that skops 0.16 trusts by itself. The list is never
# extended by what a file asks for.
TRUSTED_TYPES = (
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.metrics._dist_metrics.EuclideanDistance64",
    "sklearn.neighbors._ball_tree.BallTree",
    "sklearn.neighbors._kd_tree.KDTree",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
    "sklearn.tree._tree.Tree",
    "sklearn.utils._bunch.Bunch",
)
# What skops, scikit-learn and NumPy raise for a file that does not fit them.
_REFUSALS = (
    *(ValueError, KeyError, TypeError, AttributeError, ImportError, IndexError, RecursionError, OSError),
    *(ArithmeticError, MemoryError),
)


class Wrapped(Model):
    """A classifier of scikit-learn that arrays do not describe. It predicts by itself."""

    kind: ClassVar[str] = "scikit-learn"
    files: ClassVar[tuple[str, ...]] = ("head.json", SKOPS, SIGNATURE)

    def __init__(self, estimator: Any) -> None:
        self.estimator = estimator

    @property
    def soft(self) -> bool:
        return not hasattr(self.estimator, "predict_proba")

    def check(self, columns: int, classes: int) -> None:
        found = len(self.estimator.classes_), self.estimator.n_features_in_
        if found != (classes, columns):
            raise DamagedModelError(
                f"it knows {found[0]} classes and {found[1]} columns, expected {classes} and {columns}"
            )

    def save(self, folder: Path) -> dict[str, Any]:
        import skops.io

        _unmap(self.estimator)
        data = skops.io.dumps(self.estimator)
        (folder / SKOPS).write_bytes(data)
        (folder / SIGNATURE).write_text(signature(_digest(data), SKOPS) + "\n", encoding="utf-8")
        return {}

    def outputs(self, Z: np.ndarray) -> np.ndarray:
        if not self.soft:
            return np.asarray(self.estimator.predict_proba(Z), np.float64)
        margins = self.estimator.decision_function(Z)
        return np.asarray(two_columns(margins[:, None] if margins.ndim == 1 else margins), np.float64)


def foreign_types(estimator: Any) -> list[str]:
    """Types in a fitted estimator that a skops file must not contain."""
    import skops.io

    return sorted(set(skops.io.get_untrusted_types(data=skops.io.dumps(estimator))) - set(TRUSTED_TYPES))


def load_arrays(folder: Path, values: Any, *, columns: int, classes: int, of_columns: bool = False) -> Model:
    """Read a model from ``head.npz`` and the plain values in ``head.json``, and check it.

    Parameters
    ----------
    folder : Path
        Run folder.
    values : mapping
        The value of ``model`` in ``head.json``.
    columns, classes : int
        What ``head.json`` says of the rows and classes.
    of_columns : bool
        Whether it is the model of several labels or numbers, not of classes.

    Raises
    ------
    HeadError
        If anything in the files is impossible.
    """
    with Archive(folder / ARRAYS) as archive:
        try:
            model = restored(values, lambda name: archive.array(f"{name}.npy"))
            need(model.of_columns == of_columns, f"a model of kind {model.kind} is for another task")
            model.check(columns, classes)
        except _REFUSALS as problem:
            if isinstance(problem, HeadError):
                raise
            raise archive.damaged(str(problem)) from problem
    return model


def load_skops(folder: Path, kind: str, *, columns: int, classes: int, trust: bool) -> Model:
    """Read a model from ``head.skops``, which is untrusted input.

    What this user signed is loaded by skops, with the types of `TRUSTED_TYPES`. Of other files, classes that arrays can
    describe are read by our own reader, and the rest is loaded by skops if ``trust`` is true.

    Parameters
    ----------
    kind : str
        Import path of the class, from ``head.json``.

    Raises
    ------
    HeadError
        If the file is malformed, or does not fit ``head.json``.
    UntrustedHeadError
        If it needs to be trusted.
    """
    path = folder / SKOPS
    with Archive(path) as archive:
        try:
            if _is_ours(folder):
                model = _loaded(path, kind)
            else:
                part = read_skops(archive)
                _check_class(classifier_of(part).name, kind, path)
                try:
                    model = model_of_part(part)
                    _check_classes(part, classes)
                except NotPlainError as problem:
                    if not trust:
                        raise _untrusted(path, kind, str(problem)) from problem
                    model = _loaded(path, kind)
            model.check(columns, classes)
        except (NotPlainError, *_REFUSALS) as problem:
            if isinstance(problem, HeadError):
                raise
            raise archive.damaged(str(problem)) from problem
    return model


def _check_class(found: str, kind: str, path: Path) -> None:
    if found.rpartition(".")[2] != kind.rpartition(".")[2]:
        raise HeadError(f"{path}: contains a {found}, but head.json says {kind}; train the head again")


def _check_classes(part: Part, classes: int) -> None:
    if class_count(part) != classes:
        raise DamagedModelError(f"classes_ are {class_count(part)}, but head.json expects {classes}")


def _untrusted(path: Path, kind: str, reason: str) -> UntrustedHeadError:
    return UntrustedHeadError(
        f"{path}: {reason[:200]}, and scikit-learn's own objects, when made from an edited file, can crash or read and "
        "write outside their memory. This user has not signed the file. If you trust who made it, say so with "
        "predict --trust or evaluate --trust; otherwise remove the run and train it again: "
        f"bottleneck train-head STORE --head {kind}"
    )


def _loaded(path: Path, kind: str) -> Model:
    """Load ``head.skops``, which is trusted, by skops."""
    import skops.io
    from skops.io.exceptions import UntrustedTypesFoundException

    data = path.read_bytes()
    try:
        foreign = sorted(set(skops.io.get_untrusted_types(data=data)) - set(TRUSTED_TYPES))
        if foreign:
            raise HeadError(f"{path}: contains types that must not be loaded from a file: {', '.join(foreign)[:300]}")
        estimator = skops.io.loads(data, trusted=list(TRUSTED_TYPES))
    except HeadError:
        raise
    except (UntrustedTypesFoundException, *_REFUSALS) as problem:
        text = f"{problem!r}"[:300]
        raise HeadError(f"{path}: cannot be loaded as a head: {text}; train the head again") from problem
    _check_class(type(getattr(estimator, "steps", [[estimator]])[-1][-1]).__name__, kind, path)
    return Wrapped(estimator)


def _unmap(found: Any) -> None:
    """Replace memory maps in a fitted classifier by plain arrays of the same values.

    Neighbour classifiers keep their training rows. A worker returns these as a memory map of its file, which is not one
    of the types that are loaded from a run.
    """
    if isinstance(found, list | tuple):
        for item in found:
            _unmap(item)
    elif hasattr(found, "get_params") and hasattr(found, "__dict__"):
        for name, value in vars(found).items():
            if isinstance(value, np.memmap):
                setattr(found, name, np.asarray(value))
            _unmap(value)


def _is_ours(folder: Path) -> bool:
    """Whether this user signed ``head.skops``."""
    try:
        claimed = read_small(folder / SIGNATURE, 100).decode("ascii", "replace").strip()
        return is_signed(bytes.fromhex(file_digest(folder / SKOPS)), SKOPS, claimed)
    except OSError:
        return False


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
