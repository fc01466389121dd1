"""The configuration and the files of a run as frozen objects, which refuse unknown keys."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_serializer
from pydantic import ValidationError as PydanticValidationError

from features.errors import BottleneckError, ConfigurationError, FormatVersionError, nearest

FORMAT_VERSION = 1
History = dict[str, list[float]]  # columns of history.csv: one row per epoch, or per value that was tried

Model = TypeVar("Model", bound="Settings")
Rate = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base class of all configuration objects. They are immutable and refuse unknown keys, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def described(self) -> dict[str, Any]:
        """The settings as plain values, in the form that a run records."""
        return self.model_dump(mode="json")


class Scaler(Settings):
    """Column means and standard deviations of the training rows."""

    mean: tuple[float, ...]
    std: tuple[PositiveFloat, ...]


class HeadFile(Settings):
    """``head.json``: what is needed besides the weights to load a head.

    ``kind`` is ``"dense"`` for a Keras head, otherwise the dotted path of the scikit-learn class.
    """

    format: Literal[1] = 1
    kind: str
    layer: str
    pool: Literal["none", "avg", "max", "flatten"]
    input_shape: tuple[PositiveInt, ...]
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    fingerprint: str
    scaler: Scaler
    hidden: tuple[PositiveInt, ...]
    activation: str | None
    dropout: Rate | tuple[Rate, ...]
    temperature: PositiveFloat


class ArraysHeadFile(HeadFile):
    """``head.json`` of a head whose weights are the arrays in ``head.npz``.

    ``model`` says what they are, ``chosen`` is the value of the parameter that may be searched.
    """

    format: Literal[2] = 2  # type: ignore[assignment]
    model: dict[str, Any]
    chosen: dict[str, float]


class Scores(Settings):
    """Scores of one split, computed by `pipeline.scores.metrics.evaluate`."""

    accuracy: Share
    accuracy_interval: tuple[Share, Share]
    balanced_accuracy: Share
    macro_f1: Share
    log_loss: NonNegativeFloat
    roc_auc: Share | None
    ece: Share
    n: PositiveInt


class FoldScores(Scores):
    """Scores of cross-validation."""

    folds: PositiveInt


class ViewScores(Scores):
    """Scores of probabilities averaged over the views of each image."""

    views: PositiveInt


class MetricsFile(Settings):
    """``metrics.json`` of a run. ``averaged``, over the views of validation images, is there only if requested."""

    format: Literal[1] = 1
    run_id: str
    validation: Scores
    test: Scores | None
    cv: FoldScores | None
    averaged: ViewScores | None = None

    @model_serializer(mode="wrap")
    def _without_what_was_not_asked(self, handler: Callable[[MetricsFile], dict[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key != "averaged" or value is not None}


class RunHead(Settings):
    """The head of a run: name of the preset, resolved pooling and parameters."""

    name: str
    pool: str
    parameters: dict[str, Any]


class RunFeatures(Settings):
    """The features of a run.

    ``backbone`` and ``weights`` are the options that the extraction was given, ``data_digest`` covers images, labels and
    splits, ``views`` is the number of views of each image used for training, ``reading`` how folders and labels were read
    (``features.sources.reading.Reading``), if they had to be read in another way than the plain one.
    """

    store: str
    name: str
    recipe: dict[str, Any]
    fingerprint: str
    data_digest: str
    split_rule: str
    source: str
    backbone: str
    weights: str
    target: str = ""
    reading: dict[str, Any] = Field(default_factory=dict)
    views: PositiveInt = 1


class RunConfig(Settings):
    """``config.yaml`` of a run: everything that determines its result. ``finetune`` holds the settings of fine-tuning."""

    format: Literal[1] = 1
    run_id: str
    stage: Literal["head", "finetune"]
    seed: int
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    head: RunHead
    features: RunFeatures
    finetune: dict[str, Any] | None = None
    model: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.]*$")], ...]


def parse(
    model_class: type[Model], mapping: Any, where: str, *, error: type[BottleneckError] = ConfigurationError
) -> Model:
    """Validate plain values and make a settings object from them.

    Parameters
    ----------
    model_class : type
        Subclass of `Settings`.
    mapping : mapping
        Plain values, as read from YAML, JSON or keyword arguments.
    where : str
        Start of an error message: the file, or what is being configured.
    error : type, default ConfigurationError
        Class of the exception to raise.

    Raises
    ------
    ConfigurationError
        (or ``error``) If values are invalid. The message names every wrong key, what was received and what was
        expected, and for an unknown key the nearest known one.
    FormatVersionError
        If ``format`` is a number that this release does not know.

    Examples
    --------
    >>> parse(KnnParameters, {"n_neighbours": 3}, "head 'knn'")
    Traceback (most recent call last):
    ...
    features.errors.ConfigurationError: head 'knn': unknown key 'n_neighbours'; did you mean 'n_neighbors'?
    """
    if not isinstance(mapping, Mapping):
        raise error(f"{where}: expected a mapping of keys to values, received {_shown(mapping)}")
    stamp = mapping.get("format")
    version = model_class.model_fields["format"].default if "format" in model_class.model_fields else stamp
    if isinstance(stamp, int) and stamp != version:
        raise FormatVersionError(
            f"{where}: format {stamp} is not known here (expected {version}); use the release that wrote it"
        )
    try:
        return model_class.model_validate(dict(mapping))
    except PydanticValidationError as problem:
        found = sorted(problem.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
        lines = [_describe(model_class, item) for item in found]
        raise error(f"{where}: " + "; ".join(dict.fromkeys(lines))) from None


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, with PyYAML's safe loader.

    Raises
    ------
    ConfigurationError
        The file cannot be read, is not valid YAML, repeats a key, or holds something other than a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise ConfigurationError(f"{path}: cannot be read as a configuration file: {reason}") from problem
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, RecursionError) as problem:
        mark, what = getattr(problem, "problem_mark", None), getattr(problem, "problem", None) or problem
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConfigurationError(f"{path}: not valid YAML{where}: {what}") from problem
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: expected a mapping of keys to values, received {_shown(values)}")
    return values


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses repeated keys, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _describe(model_class: type[BaseModel], problem: Any) -> str:
    """Describe one pydantic error as ``key: received X, expected Y``."""
    location = list(problem["loc"])
    known, path = _known_keys(model_class, location)
    dotted = ".".join(path)
    if problem["type"] == "extra_forbidden":
        hint = nearest(path[-1], known) or f" (known: {', '.join(known)})"
        return f"unknown key {dotted!r}{hint}"
    if problem["type"] == "missing":
        return f"the key {dotted!r} is missing"
    expected = problem["msg"].replace("Input should be ", "expected ").replace("Input should ", "expected to ")
    expected = expected.removeprefix("Value error, ")  # the prefix of messages from our own validators
    return f"{dotted or 'value'}: received {_shown(problem['input'])}, {expected}"


def _known_keys(model_class: type[BaseModel], location: Iterable[Any]) -> tuple[list[str], list[str]]:
    """The keys allowed at the place of the last word of ``location``, and ``location`` without pydantic's type tags."""
    known: list[str] = list(model_class.model_fields)
    path: list[str] = []
    inner: type[BaseModel] | None = model_class
    any_key = False  # whether the next word is a key of a mapping in which any key is allowed
    for word in location:
        if isinstance(word, int) or any_key:
            path.append(str(word))
            any_key = False
            continue
        fields = inner.model_fields if inner else {}
        if inner is None and path:
            continue  # the tag of one branch of a union, such as "float" or "tuple[float, ...]"
        known, path = list(fields), [*path, word]
        inner = _inner_model(fields[word].annotation) if word in fields else None
        any_key = inner is not None and typing.get_origin(fields[word].annotation) is dict
    return known, path


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    found = (_inner_model(argument) for argument in typing.get_args(annotation))
    return next((model for model in found if model is not None), None)


def _shown(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
