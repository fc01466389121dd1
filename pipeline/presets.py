"""The heads that have a name: how each is trained unless something else is asked for.

name --find_preset()--> kind, parameters, pooling        what a kind does is in ``pipeline.heads``
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from features.errors import ConfigurationError, nearest
from pipeline.config import Rate, Settings, Share

DENSE = "dense"  # the kind of heads of dense layers


class ClassifierParameters(Settings):
    """What all scikit-learn heads have.

    Parameters
    ----------
    folds : int
        Folds of the cross-validation on the training rows that chooses what is None, and the temperature of margins.
    scale : bool
        Standardise the columns.
    pca : int, optional
        Project onto so many principal components first.
    """

    folds: Annotated[int, Field(ge=2)] = 5
    scale: bool = True
    pca: PositiveInt | None = None

    def described(self) -> dict[str, Any]:
        """As `Settings.described`, without what is as it was before it could be said: older run ids hold."""
        return _without(super().described(), {"scale": True, "pca": None, "class_weight": None, "choose": "log_loss"})


def _without(values: dict[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in later or value != later[name]}


class SearchedParameters(ClassifierParameters):
    """Of heads whose penalty is searched.

    Parameters
    ----------
    class_weight : {"balanced"}, optional
        Weigh each row by rows / (classes x rows of its class), as scikit-learn does.
    choose : {"log_loss", "balanced_accuracy"}
        What the cross-validation chooses by.
    """

    class_weight: Literal["balanced"] | None = None
    choose: Literal["log_loss", "balanced_accuracy"] = "log_loss"


class LogisticParameters(SearchedParameters):
    """``C`` is the inverse of the L2 penalty; None: chosen by cross-validation with ``folds`` folds."""

    C: PositiveFloat | None = None


class RidgeParameters(SearchedParameters):
    """``alpha`` is the L2 penalty; None: chosen by cross-validation with ``folds`` folds."""

    alpha: PositiveFloat | None = None


class LinearSvmParameters(SearchedParameters):
    """``C`` is the inverse of the L2 penalty; None: chosen by cross-validation with ``folds`` folds."""

    C: PositiveFloat | None = None


class SgdParameters(SearchedParameters):
    """Averaged stochastic gradient descent on the log loss; ``alpha`` is the L2 penalty, None: chosen."""

    alpha: PositiveFloat | None = None


class LdaParameters(ClassifierParameters):
    """``shrinkage`` of the covariance towards a multiple of the identity, 0-1; None: chosen."""

    shrinkage: Share | None = None


class KnnParameters(ClassifierParameters):
    """``n_neighbors`` is the number of voters; None: chosen by cross-validation with ``folds`` folds."""

    n_neighbors: PositiveInt | None = None


class EstimatorParameters(ClassifierParameters):
    """Of any other scikit-learn classifier: ``params`` are its own, everything unsaid is as scikit-learn has it."""

    params: dict[str, Any] = Field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """Its own parameters stand beside ours."""
        kept = super().described()
        return {**kept.pop("params"), **kept}


class DenseParameters(Settings):
    """A small dense Keras network and how it is trained.

    Parameters
    ----------
    hidden : tuple of int
        Units of the hidden layers; empty for a linear head.
    activation : str
        Activation of the hidden layers.
    dropout : float, or tuple of float, 0 <= rate < 1
        One number: the rate after every hidden layer, or on the features where there is none. Several: the
        rate in front of each dense layer, ``len(hidden) + 1`` numbers.
    batch_norm : bool
        BatchNorm between each hidden layer and its activation while training; folded into the layer afterwards.
    l2 : float
        Penalty: this times the sum of squares of all kernels is added to the loss (not to what is reported).
    optimizer : {"adam", "sgd", "rmsprop"}
        ``momentum`` and ``nesterov`` apply to ``sgd``, ``momentum`` to ``rmsprop`` too.
    learning_rate, weight_decay : float
        Step size; decoupled weight decay.
    schedule : {"constant", "cosine"}
        Of the learning rate; cosine falls to 0 over ``epochs`` (Loshchilov and Hutter, SGDR, ICLR 2017).
    batch_size, epochs : int
        Rows per step; upper limit of passes over the rows.
    patience : int
        Epochs without a lower validation log loss before training stops; 0: train all epochs. Either way the
        weights of the best epoch are kept.
    class_weight : {"balanced"}, optional
        Weigh each row by rows / (classes x rows of its class), as scikit-learn does.
    label_smoothing : float, 0-1
        Share of the target that is spread evenly over all classes.
    feature_noise : float
        Standard deviation of Gaussian noise on the standardised features.
    mixup : float
        Rows are mixed in pairs, with shares drawn from Beta(mixup, mixup) (Zhang et al., mixup, ICLR 2018); 0: not.
    calibrate : bool
        Fit a temperature on the validation rows (Guo et al., ICML 2017). Log loss and calibration error of these
        rows are then a little better than they will be elsewhere; accuracy is not touched.
    order_seed : int
        Of the order of rows, and of the views. Heads of one bank have it in common.
    views : {"draw", "plain"}
        Where images have several views: each epoch draws one of each image anew, or sees the plain image only.
    """

    hidden: tuple[PositiveInt, ...] = ()
    activation: Literal["relu", "gelu", "elu", "selu", "silu", "tanh", "sigmoid"] = "relu"
    dropout: Rate | tuple[Rate, ...] = 0.0
    batch_norm: bool = False
    l2: NonNegativeFloat = 0.0
    optimizer: Literal["adam", "sgd", "rmsprop"] = "adam"
    learning_rate: PositiveFloat = 1e-3
    momentum: Rate = 0.0
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    batch_size: PositiveInt = 32
    epochs: PositiveInt = 50
    patience: NonNegativeInt = 5
    class_weight: Literal["balanced"] | None = None
    label_smoothing: Share = 0.0
    feature_noise: NonNegativeFloat = 0.0
    mixup: NonNegativeFloat = 0.0
    calibrate: bool = False
    order_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    views: Literal["draw", "plain"] = "draw"

    def described(self) -> dict[str, Any]:
        """As of `ClassifierParameters`."""
        return _without(super().described(), {"views": "draw"})


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named head.

    Parameters
    ----------
    kind : str
        What ``head.json`` calls it: ``"dense"``, or the dotted path of the scikit-learn class.
    parameters : Settings
        How it is trained unless something else is asked for.
    pool : {"avg", "max", "flatten"}
        Usual pooling of spatial features.
    by_path : bool
        Named by the import path of a scikit-learn class, whose own parameters it takes.
    """

    kind: str
    parameters: Settings
    pool: str = "avg"
    by_path: bool = False


PRESETS = {
    "logistic": Preset("sklearn.linear_model.LogisticRegression", LogisticParameters()),
    "ridge": Preset("sklearn.linear_model.RidgeClassifier", RidgeParameters()),
    "linear-svm": Preset("sklearn.svm.LinearSVC", LinearSvmParameters()),
    "sgd": Preset("sklearn.linear_model.SGDClassifier", SgdParameters()),
    "lda": Preset("sklearn.discriminant_analysis.LinearDiscriminantAnalysis", LdaParameters()),
    "knn": Preset("sklearn.neighbors.KNeighborsClassifier", KnnParameters()),
    "dense": Preset(DENSE, DenseParameters()),
    "dropout-linear": Preset(DENSE, DenseParameters(dropout=0.2)),
    "mlp-256": Preset(DENSE, DenseParameters(hidden=(256,), dropout=0.5, learning_rate=3e-4), pool="flatten"),
    # The heads of published recipes, as they were trained.
    "linear-sgd": Preset(
        DENSE, DenseParameters(optimizer="sgd", learning_rate=1e-3, momentum=0.9, weight_decay=1e-3, epochs=20)
    ),
    "mlp-256-sgd": Preset(DENSE, DenseParameters(hidden=(256,), optimizer="sgd", learning_rate=1e-3)),
    "mlp-1024-128": Preset(
        DENSE,
        DenseParameters(hidden=(1024, 128), optimizer="sgd", learning_rate=1e-3, momentum=0.9, nesterov=True),
        pool="flatten",
    ),
    "mlp-1024-1024": Preset(
        DENSE,
        DenseParameters(
            hidden=(1024, 1024),
            dropout=(0.0, 0.5, 0.0),
            optimizer="sgd",
            learning_rate=1e-4,
            momentum=0.9,
            patience=10,
        ),
        pool="flatten",
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of that name, or one made for an import path.

    Raises
    ------
    ConfigurationError
        If it is neither; the nearest names are given.
    """
    if is_path(name):
        return Preset(name, EstimatorParameters(), by_path=True)
    if name not in PRESETS:
        raise ConfigurationError(
            f"head: received {name!r}, expected one of {', '.join(PRESETS)}, or a classifier of scikit-learn such as "
            f"sklearn.ensemble.RandomForestClassifier{nearest(name, PRESETS)}"
        )
    return PRESETS[name]


def is_path(text: object) -> bool:
    """Whether a head is named by an import path."""
    return isinstance(text, str) and text.startswith("sklearn.")
