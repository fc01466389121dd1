"""The named heads and their default parameters.

name --find_preset()--> kind, parameters, pooling        the kinds of head are in ``pipeline.heads``
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from features.errors import ConfigurationError, nearest
from pipeline.config import Rate, Settings, Share

EPOCHS, MOST_HIDDEN = 100_000, 98  # that a run may record: rows of history.csv, hidden layers
DENSE = "dense"  # the kind of heads of dense layers


class ClassifierParameters(Settings):
    """The parameters that all scikit-learn heads have.

    Parameters
    ----------
    folds : int, >= 2
        Number of folds of the cross-validation on the training rows that chooses a parameter left at None, and the
        temperature of margins.
    scale : bool
        Whether to standardise the columns.
    pca : int, optional
        Number of principal components to project onto first; default: no projection.
    """

    folds: Annotated[int, Field(ge=2)] = 5
    scale: bool = True
    pca: PositiveInt | None = None

    def described(self) -> dict[str, Any]:
        """Like `Settings.described`, but without the defaults of parameters added later, so that old run ids stay valid."""
        return _without(super().described(), {"scale": True, "pca": None, "class_weight": None, "choose": "log_loss"})


def _without(values: dict[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in later or value != later[name]}


class SearchedParameters(ClassifierParameters):
    """The parameters of heads whose penalty can be chosen by cross-validation.

    Parameters
    ----------
    class_weight : {"balanced"}, optional
        Weight each row by rows / (classes x rows of its class), as scikit-learn does.
    choose : {"log_loss", "balanced_accuracy"}
        Score that the cross-validation chooses by.
    """

    class_weight: Literal["balanced"] | None = None
    choose: Literal["log_loss", "balanced_accuracy"] = "log_loss"


class LogisticParameters(SearchedParameters):
    """``C`` is the inverse of the L2 penalty. If it is None, cross-validation with ``folds`` folds chooses it.

    Parameters
    ----------
    solver : {"scikit-learn", "keras"}
        What minimises the loss; both find the same minimum. ``keras`` computes on a GPU where there is one, and reads rows
        that do not fit into memory piece by piece; see `pipeline.heads.logistic`.
    """

    C: PositiveFloat | None = None
    solver: Literal["scikit-learn", "keras"] = "scikit-learn"

    def described(self) -> dict[str, Any]:
        return _without(super().described(), {"solver": "scikit-learn"})


class RidgeParameters(SearchedParameters):
    """``alpha`` is the L2 penalty. If it is None, cross-validation with ``folds`` folds chooses it."""

    alpha: PositiveFloat | None = None


class LinearSvmParameters(SearchedParameters):
    """``C`` is the inverse of the L2 penalty. If it is None, cross-validation with ``folds`` folds chooses it."""

    C: PositiveFloat | None = None


class SgdParameters(SearchedParameters):
    """Averaged stochastic gradient descent on the log loss; ``alpha`` is the L2 penalty, None: chosen by cross-validation."""

    alpha: PositiveFloat | None = None


class LdaParameters(ClassifierParameters):
    """``shrinkage`` of the covariance towards a multiple of the identity, 0-1; None: chosen by cross-validation."""

    shrinkage: Share | None = None


class KnnParameters(ClassifierParameters):
    """``n_neighbors`` is the number of neighbours that vote; None: chosen by cross-validation with ``folds`` folds."""

    n_neighbors: PositiveInt | None = None


class EstimatorParameters(ClassifierParameters):
    """Any other scikit-learn classifier: ``params`` are its own parameters; others keep scikit-learn's defaults."""

    params: dict[str, Any] = Field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """Plain values, with the classifier's own parameters on the same level as the others."""
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
        One number: the rate after every hidden layer, or on the features if there is no hidden layer. Several
        numbers: the rates before each dense layer, ``len(hidden) + 1`` of them.
    batch_norm : bool
        Whether to train with BatchNorm between each hidden layer and its activation; it is folded into the layer
        afterwards.
    l2 : float, >= 0
        Penalty: ``l2`` times the sum of squares of all kernels is added to the training loss.
    optimizer : {"adam", "sgd", "rmsprop"}
        Optimizer. ``momentum`` applies to ``sgd`` and ``rmsprop``, ``nesterov`` to ``sgd`` only.
    learning_rate, weight_decay : float
        Learning rate, > 0; decoupled weight decay, >= 0.
    schedule : {"constant", "cosine"}
        Schedule of the learning rate; cosine falls to 0 over ``epochs`` (Loshchilov and Hutter, SGDR, ICLR 2017).
    batch_size, epochs : int
        Rows per step; maximum number of epochs.
    patience : int
        Epochs without a lower validation log loss after which training stops; 0: train all epochs. In both cases
        the weights of the best epoch are kept.
    class_weight : {"balanced"}, optional
        Weight each row by rows / (classes x rows of its class), as scikit-learn does.
    label_smoothing : float, 0-1
        Share of the target that is spread evenly over all classes.
    feature_noise : float, >= 0
        Standard deviation of Gaussian noise on the standardised features.
    mixup : float, >= 0
        Mix rows in pairs, with shares drawn from Beta(mixup, mixup) (Zhang et al., mixup, ICLR 2018); 0: no mixing.
    calibrate : bool
        Whether to fit a temperature on the validation rows (Guo et al., ICML 2017). Log loss and calibration error on
        these rows are then slightly better than on other images; the accuracy does not change.
    order_seed : int
        Random seed of the row order and of the views. Heads that are trained together have the same one.
    views : {"draw", "plain"}
        If images have several views: draw one view of each image in each epoch, or use the plain image only.
    stop_on : {"validation", "train"}
        Rows that decide which epoch is kept, and the temperature with ``calibrate``: the validation rows, which makes their
        scores slightly too good, or a tenth of the training rows (at most 2,000), which are then not trained on.
    """

    hidden: Annotated[tuple[PositiveInt, ...], Field(max_length=MOST_HIDDEN)] = ()
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
    epochs: Annotated[int, Field(ge=1, le=EPOCHS)] = 50
    patience: NonNegativeInt = 5
    class_weight: Literal["balanced"] | None = None
    label_smoothing: Share = 0.0
    feature_noise: NonNegativeFloat = 0.0
    mixup: NonNegativeFloat = 0.0
    calibrate: bool = False
    order_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    views: Literal["draw", "plain"] = "draw"
    stop_on: Literal["validation", "train"] = "validation"

    def described(self) -> dict[str, Any]:
        """Like `Settings.described`, but without the defaults of parameters added later, so that old run ids stay valid."""
        return _without(super().described(), {"views": "draw", "stop_on": "validation"})


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named head.

    Parameters
    ----------
    kind : str
        Its kind in ``head.json``: ``"dense"``, or the dotted path of the scikit-learn class.
    parameters : Settings
        Default parameters.
    pool : {"avg", "max", "flatten"}
        Default pooling of spatial features.
    by_path : bool
        Whether the head is named by the import path of a scikit-learn class and takes the parameters of this class.
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
    # Two heads for 1 to 20 images a class: deviations of a few rows are noise, so columns are not divided by them. The penalty then
    # shrinks columns of little spread the most.
    "logistic-shrunk": Preset("sklearn.linear_model.LogisticRegression", LogisticParameters(scale=False)),
    "nearest-mean": Preset("nearest-mean", ClassifierParameters(scale=False)),
    "dense": Preset(DENSE, DenseParameters()),
    "dropout-linear": Preset(DENSE, DenseParameters(dropout=0.2)),
    "mlp-256": Preset(DENSE, DenseParameters(hidden=(256,), dropout=0.5, learning_rate=3e-4), pool="flatten"),
    # The heads of published experiments, with the parameters they were trained with.
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
            hidden=(1024, 1024), dropout=(0.0, 0.5, 0.0), optimizer="sgd", learning_rate=1e-4, momentum=0.9, patience=10
        ),
        pool="flatten",
    ),
}


def find_preset(name: str) -> Preset:
    """Find the preset of a name, or make one for an import path.

    Raises
    ------
    ConfigurationError
        If the name is neither; the message suggests the nearest name.
    """
    if not isinstance(name, str):
        raise ConfigurationError(
            f"head: received {repr(name)[:80]}, expected a name such as 'logistic', or an import path such as "
            "'sklearn.svm.LinearSVC', whose parameters are given apart. An object of your own is fitted on what a store loads"
        )
    if is_path(name):
        return Preset(name, EstimatorParameters(), by_path=True)
    if name not in PRESETS:
        raise ConfigurationError(
            f"head: received {name!r}, expected one of {', '.join(PRESETS)}, or a scikit-learn classifier such as "
            f"sklearn.ensemble.RandomForestClassifier{nearest(name, PRESETS)}"
        )
    return PRESETS[name]


def is_path(text: object) -> bool:
    """Whether the name of a head is an import path."""
    return isinstance(text, str) and text.startswith("sklearn.")
