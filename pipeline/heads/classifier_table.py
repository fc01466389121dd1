"""The scikit-learn classes behind the named heads, as a table: what is searched, and what their outputs mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Classifier:
    """How a scikit-learn class is fitted.

    Parameters
    ----------
    parameter : str
        Name of the parameter that cross-validation chooses.
    values : tuple
        With ``climbs``: three exponents of ten (least, start, greatest); the best half decade between them is searched.
        Otherwise: the values to compare.
    climbs : bool
        Whether the score has a single minimum, so that `climb` can walk towards it.
    linear : bool
        Whether ``coef_ X + intercept_`` gives the logits or margins.
    margins : bool
        Whether the outputs are margins rather than log odds; a temperature is then fitted on out-of-fold margins.
    spanned : bool
        Whether the penalty is L2, so that the solution lies in the span of the rows.
    fixed, search : mapping
        Further arguments of the class; those of ``search`` are used only while values are compared.
    """

    parameter: str
    values: tuple[Any, ...]
    climbs: bool = True
    linear: bool = True
    margins: bool = True
    spanned: bool = True
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    search: Mapping[str, Any] = dataclasses.field(default_factory=dict)


NEAREST_MEAN = "nearest-mean"  # of `pipeline.heads.nearest_mean`, the only one here that is not a class of scikit-learn
CLASSIFIERS = {
    # The search uses the tolerance of the final fit: stopping earlier also regularises, and would bias the choice.
    "sklearn.linear_model.LogisticRegression": Classifier("C", (-6, -2, 3), margins=False, fixed={"max_iter": 1000}),
    "sklearn.linear_model.RidgeClassifier": Classifier("alpha", (-2, 3, 7)),
    "sklearn.svm.LinearSVC": Classifier("C", (-7, -4, 2), fixed={"dual": True}, search={"tol": 1e-2}),
    "sklearn.linear_model.SGDClassifier": Classifier(
        "alpha", (-6, -2, 2), spanned=False, fixed={"loss": "log_loss", "average": True}
    ),
    "sklearn.discriminant_analysis.LinearDiscriminantAnalysis": Classifier(
        "shrinkage",
        (0.01, 0.03, 0.1, 0.3, 0.6, 0.9),
        climbs=False,
        margins=False,
        spanned=False,
        fixed={"solver": "lsqr"},
    ),
    "sklearn.neighbors.KNeighborsClassifier": Classifier(
        "n_neighbors",
        (1, 3, 5, 7, 11, 15, 21, 31),
        climbs=False,
        linear=False,
        margins=False,
        spanned=False,
        fixed={"algorithm": "brute"},
    ),
    NEAREST_MEAN: Classifier("", (), climbs=False, spanned=False),
}
OTHER = Classifier("", (), climbs=False, linear=False, margins=False, spanned=False)  # any other class
