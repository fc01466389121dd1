"""What an experiment file may say: ways of steps, checked before anything is computed.

name or YAML file --read_experiment()--> Experiment
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, create_model, model_validator

from features.errors import ConfigurationError, nearest
from features.extraction.options import ExtractionOptions
from pipeline.config import Settings, load_yaml, parse
from pipeline.sweeps.sweep_file import expand, single
from pipeline.tuning.settings import settings_of

FOLDER = Path(__file__).parent / "published"

# Options of extract that an experiment does not set: they concern the machine, or the store of one user.
# fmt: off
NOT_IN_A_STEP = (
    "device", "workers", "target", "split_folders", "class_level", "merge_labels", "overwrite", "rehash", "trust_times",
    "strict", "layout", "check_precision",
)
# fmt: on


class _ExtractStep(Settings):
    """Extract features: the other fields of ``ExtractionOptions``, with its defaults."""

    @property
    def options(self) -> dict[str, Any]:
        """The options that the file gives."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    @model_validator(mode="after")
    def _known(self) -> _ExtractStep:
        ExtractionOptions(**self.options)
        return self


if TYPE_CHECKING:
    ExtractStep = _ExtractStep
else:  # the fields are declared where the options are
    _types = {**get_type_hints(ExtractionOptions), "augment": str}  # of an augmentation the name of a preset only
    _fields = [field for field in dataclasses.fields(ExtractionOptions) if field.name not in NOT_IN_A_STEP]
    ExtractStep = create_model(
        "ExtractStep", __base__=_ExtractStep, **{field.name: (_types[field.name], field.default) for field in _fields}
    )


class HeadStep(Settings):
    """Train a head: its name and parameters, and the feature set where the store has several."""

    head: str
    params: dict[str, Any] = Field(default_factory=dict)
    pool: str | None = None
    features: str | None = None
    folds: NonNegativeInt = 0

    @model_validator(mode="after")
    def _known(self) -> HeadStep:
        expand(single(self.head, self.params, self.pool), "train_head")
        return self


def _tunable(options: dict[str, Any]) -> dict[str, Any]:
    """Check the options of a fine-tuning step before anything is computed."""
    settings = {name: value for name, value in options.items() if name != "from_cache"}
    settings_of(settings)
    if not isinstance(options.get("from_cache", False), bool):
        raise ConfigurationError("from_cache: expected true (the features of the last extract step) or false")
    return options


class PredictStep(Settings):
    """Predict the classes of some validation images with the last run of the way."""

    images: PositiveInt = 1


class Step(Settings):
    """One step of an experiment; exactly one field is set."""

    extract: ExtractStep | None = None
    train_head: HeadStep | None = None
    finetune: Annotated[dict[str, Any], AfterValidator(_tunable)] | None = None
    predict: PredictStep | None = None

    @model_validator(mode="after")
    def _one(self) -> Step:
        if len(self.model_fields_set) != 1 or getattr(self, self.kind) is None:
            raise ValueError(f"expected one of {', '.join(type(self).model_fields)}, with its options behind the colon")
        return self

    @property
    def kind(self) -> str:
        """Name of the field that is set."""
        return next(iter(self.model_fields_set))


class Way(Settings):
    """A sequence of steps; an experiment compares several such ways."""

    about: str = ""
    steps: Annotated[list[Step], Field(min_length=1)]

    @model_validator(mode="after")
    def _in_order(self) -> Way:
        kinds = [step.kind for step in self.steps]
        for number, kind in enumerate(kinds):
            needed = {"extract": None, "train_head": "extract"}.get(kind, "train_head")
            if needed and needed not in kinds[:number]:
                raise ValueError(f"expected {needed} in a step before {kind}, which is step {number + 1}")
        return self


class Experiment(Settings):
    """An experiment file.

    Parameters
    ----------
    version : int
        Version of this schema: 1.
    about, source, published : str
        What the experiment is, where it was published, and the figures given there.
    classes : list of str
        The only classes to use from a data set that has more.
    ways : dict of str to Way
        The ways, in the order in which they are run.
    """

    version: Literal[1]
    about: str
    source: str = ""
    published: str = ""
    classes: list[str] = Field(default_factory=list)
    ways: Annotated[dict[str, Way], Field(min_length=1)]


def experiment_names() -> list[str]:
    """Names of the published experiments that come with this package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_experiment(name: str | Path) -> Experiment:
    """Read a published experiment by its name, or one from a YAML file.

    Raises
    ------
    ConfigurationError
        An unknown name (the nearest is named), or a file that does not have the schema of `Experiment`.
    """
    path = FOLDER / f"{name}.yaml"
    if str(name).endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
    elif str(name) not in experiment_names():
        known = experiment_names()
        raise ConfigurationError(
            f"recipe: received {str(name)!r}, expected one of {', '.join(known)}, or a .yaml file{nearest(str(name), known)}"
        )
    return parse(Experiment, load_yaml(path), str(path))
