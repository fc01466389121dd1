"""The configuration and the files of a run as frozen objects, which refuse unknown keys."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_serializer,
)
from pydantic import ValidationError as PydanticValidationError

from features.errors import BottleneckError, ConfigurationError, FormatVersionError, nearest
from features.files import read_small

FORMAT_VERSION = 1
# Limits of files that strangers may have written. `yaml_text` and `check_classes` keep to them what we write.
YAML_BYTES, YAML_NODES, YAML_DEPTH, NUMBER_LENGTH = 4_000_000, 100_000, 40, 64
SPARE = 1000  # values, and hundreds of bytes, of a config.yaml beside the names of classes
WRONG_KEYS = 8  # wrong keys that an error describes
History = dict[str, list[float]]  # columns of history.csv: one row per epoch, or per value that was tried

Model = TypeVar("Model", bound="Settings")
Count = Annotated[int, Field(gt=0, le=10**12)]
Tally = Annotated[int, Field(ge=0, le=10**15)]
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


class TargetHeadFile(HeadFile):
    """``head.json`` of a head for a task other than classification; ``model`` is null if the weights are those of Keras."""

    format: Literal[3] = 3  # type: ignore[assignment]
    task: Literal["multilabel", "regression"]
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    model: dict[str, Any] | None = None
    chosen: dict[str, float] = Field(default_factory=dict)


class Scores(Settings):
    """Scores of one split, computed by `pipeline.scores.metrics.evaluate`."""

    accuracy: Share
    accuracy_interval: tuple[Share, Share]
    balanced_accuracy: Share
    macro_f1: Share
    log_loss: NonNegativeFloat
    roc_auc: Share | None
    ece: Share
    n: Count


class FoldScores(Scores):
    """Scores of cross-validation."""

    folds: Count


class ViewScores(Scores):
    """Scores of probabilities averaged over the views of each image."""

    views: Count


class AbstainRecord(Settings):
    """Fields and properties of `pipeline.scores.answers.Abstention`."""

    precision: Annotated[float, Field(gt=0, lt=1)]
    threshold: Share | None
    n: Count
    answered: Annotated[int, Field(ge=0, le=10**12)]
    right: Annotated[int, Field(ge=0, le=10**12)]
    bound: Share
    needed: Count
    coverage: Share


class LabelAbstainRecord(AbstainRecord):
    """The same for labels: those of at least the probability ``threshold`` are given; see `find_label_threshold` there."""

    given: Literal["labels"] = "labels"


class SetsRecord(Settings):
    """Sets of classes that hold the true one with the chance ``coverage``: the classes of at least the probability ``least``."""

    coverage: Annotated[float, Field(gt=0, lt=1)]
    least: Share


class Answers(Settings):
    """What a run promises of its answers.

    ``rows`` says which rows tell: ``validation``, or ``cv`` for scores out of fold; ``grouped``, whether groups instead of
    images were taken to be exchangeable.
    """

    rows: Literal["validation", "cv"]
    grouped: bool
    abstain: AbstainRecord | None
    sets: SetsRecord


class IntervalsRecord(Settings):
    """Half the width of each number's interval, in its unit, which holds the true value with the chance ``coverage``.

    None: there were too few rows to say.
    """

    coverage: Annotated[float, Field(gt=0, lt=1)]
    half_widths: Annotated[tuple[NonNegativeFloat | None, ...], Field(min_length=1)]


class LabelAnswers(Settings):
    """What a run on labels promises: sets that hold all labels of an image; otherwise as `Answers`.

    ``abstain`` is there only if a precision was asked for.
    """

    rows: Literal["validation", "cv"]
    grouped: bool
    abstain: LabelAbstainRecord | None = None
    sets: SetsRecord

    @model_serializer(mode="wrap")
    def _without_what_was_not_asked(self, handler: Callable[[LabelAnswers], dict[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key != "abstain" or value is not None}


class NumberAnswers(Settings):
    """What a run on numbers promises; as `Answers`."""

    rows: Literal["validation", "cv"]
    grouped: bool
    intervals: IntervalsRecord


class GroupLine(Settings):
    """A line of `pipeline.scores.groups.group_table`."""

    value: str | None
    n: Count
    right: Annotated[int, Field(ge=0, le=10**12)]
    accuracy: Share
    accuracy_interval: tuple[Share, Share]


class NumberGroupLine(Settings):
    """A line of a table by group of a run on numbers: errors in their unit, means over the numbers."""

    value: str | None
    n: Count
    mae: NonNegativeFloat
    mae_interval: tuple[NonNegativeFloat, NonNegativeFloat]
    rmse: NonNegativeFloat


GroupTables = dict[str, Annotated[tuple[GroupLine, ...], Field(min_length=1)]]  # by column


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
        return {key: value for key, value in handler(self).items() if key not in ASKED_METRICS or value is not None}


class AnsweringMetricsFile(MetricsFile):
    """``metrics.json`` of a run that promises something of its answers, or has tables by group.

    ``groups`` are the tables of the ``validation`` rows and, with folds, of the training rows out of fold (``cv``), by column.
    """

    format: Literal[2] = 2  # type: ignore[assignment]
    answers: Answers | None = None
    groups: dict[Literal["validation", "cv"], GroupTables] | None = None


ASKED_METRICS = ("averaged", "answers", "groups")  # entries of metrics.json that are there only if requested
METRICS_FILES = (MetricsFile, AnsweringMetricsFile)


def metrics_format(values: Mapping[str, Any]) -> int:
    """The format of a ``metrics.json`` with these entries: that of earlier releases unless it needs the next one."""
    return 2 if values.get("answers") or values.get("groups") else 1


class RunHead(Settings):
    """The head of a run: name of the preset, resolved pooling and parameters."""

    name: str
    pool: str
    parameters: dict[str, Any]


class LabelsRecord(Settings):
    """The labels file under which a run was trained: its first ``size`` bytes, and what they did to the rows."""

    path: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    size: Tally
    decisions: Tally
    decided: Tally
    corrected: Tally
    added: Tally
    unknown: Tally
    excluded: Tally
    tested: Tally
    new_classes: Tally
    gone_classes: Tally
    elsewhere: Tally
    other_targets: Tally
    seen: Tally = 0


class RunFeatures(Settings):
    """The features of a run.

    ``backbone`` and ``weights`` are the options that the extraction was given, ``data_digest`` covers images, labels and
    splits, ``views`` is the number of views of each image used for training, ``reading`` how folders and labels were read
    (``features.sources.reading.Reading``), if they had to be read in another way than the plain one. ``limit`` is the number
    of images if ``extract --limit`` left out others, else 0. ``labels`` is there if a labels file was put over the store.
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
    limit: int = Field(0, ge=0, le=2**40)
    views: PositiveInt = 1
    labels: LabelsRecord | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, handler: Callable[[RunFeatures], dict[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key not in ("limit", "labels") or value}


class CacheRecord(Settings):
    """The store from which fine-tuning took cut features, and what of it decided the result."""

    model_config = ConfigDict(extra="allow")

    path: str


class TuningRecord(Settings):
    """What a fine-tuned run notes: its settings, the run that it started from, and what became of it."""

    model_config = ConfigDict(extra="allow")

    start: str = ""
    from_cache: CacheRecord | None = None
    cut: str = ""
    before: Scores | None = None
    parity_gap: float | None = None
    trainable_variables: int = 0
    trainable_parameters: int = 0

    @model_serializer(mode="wrap")
    def _as_it_was(self, handler: Callable[[TuningRecord], dict[str, Any]]) -> dict[str, Any]:
        known = set(type(self).model_fields) - self.model_fields_set
        return {key: value for key, value in handler(self).items() if key not in known}


class TargetTuningRecord(TuningRecord):
    """The same of a run of another task; ``pipeline.finetune`` checks the scores when it reports them."""

    before: dict[str, Any] | None = None  # type: ignore[assignment]


class RunConfig(Settings):
    """``config.yaml`` of a run: everything that determines its result. ``finetune`` holds the settings of fine-tuning."""

    format: Literal[1] = 1
    run_id: Annotated[str, Field(pattern=r"^[^/\x00-\x1f\x7f]{1,255}$")]
    stage: Literal["head", "finetune"]
    seed: int
    classes: Annotated[tuple[str, ...], FailFast(), Field(min_length=2)]
    head: RunHead
    features: RunFeatures
    finetune: TuningRecord | None = None
    model: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.]*$")], ...]


class TargetRunConfig(RunConfig):
    """``config.yaml`` of a run of another task than classification; ``classes`` are the columns of the target."""

    format: Literal[2] = 2  # type: ignore[assignment]
    task: Literal["multilabel", "regression"]
    classes: Annotated[tuple[str, ...], FailFast(), Field(min_length=1)]
    finetune: TargetTuningRecord | None = None


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
        lines = [_describe(model_class, item) for item in found[:WRONG_KEYS]]
        lines += [f"and {len(found) - WRONG_KEYS} more"] if len(found) > WRONG_KEYS else []
        raise error(f"{where}: " + "; ".join(dict.fromkeys(lines))) from None


def parse_one_of(
    model_classes: Sequence[type[Model]],
    mapping: Any,
    where: str,
    *,
    error: type[BottleneckError] = ConfigurationError,
) -> Model:
    """Do what `parse` does with the class whose ``format`` the mapping states; the first one where none fits."""
    stamp = mapping.get("format") if isinstance(mapping, Mapping) else None
    fitting = (one for one in model_classes if one.model_fields["format"].default == stamp)
    return parse(next(fitting, model_classes[0]), mapping, where, error=error)


def check_classes(names: Sequence[str]) -> None:
    """Check that a run of these classes could be read again.

    Raises
    ------
    ConfigurationError
        If they are too many, or their names too long together.
    """
    most, room = YAML_NODES - SPARE, YAML_BYTES - 100 * SPARE
    if len(names) > most:
        raise ConfigurationError(
            f"{len(names):,} classes: a run holds at most {most:,}. Give folders of more general classes, or a manifest with "
            "another label column (--target)"
        )
    not_utf_8 = any(_NOT_UTF_8.search(ascii(name)) for name in names)
    if (not_utf_8 or 20 * sum(map(len, names)) > room) and (size := len(yaml_text(list(names)).encode())) > room:
        raise ConfigurationError(
            f"the names of {len(names):,} classes take {size:,} bytes, at most {room:,} are allowed; give shorter names"
        )


class _Dumper(yaml.SafeDumper):
    """Writes what is used twice twice, because a file that uses aliases is refused when it is read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def yaml_text(values: Any) -> str:
    """Format plain values as YAML that `load_yaml` reads.

    Raises
    ------
    ConfigurationError
        If they are more than it reads.
    """
    text = str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
    if (size := len(text.encode())) > YAML_BYTES:
        raise ConfigurationError(f"a configuration file would have {size:,} bytes, at most {YAML_BYTES:,} are allowed")
    try:
        _check_events(text, aliases=False)
    except yaml.YAMLError as problem:
        raise ConfigurationError(f"a configuration file could not be read again: {problem}") from problem
    return text


def load_yaml(path: str | Path, *, aliases: bool = True) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, with PyYAML's safe loader.

    Size, number of values, depth and length of numbers are limited before any value is made.

    Parameters
    ----------
    path : Path
        The file.
    aliases : bool
        Whether the file may use aliases and tags. A file that this project writes never does.

    Raises
    ------
    ConfigurationError
        The file cannot be read, is too large, is not valid YAML, repeats a key, or holds something other than a mapping.
    """
    path = Path(path)
    try:
        text = read_small(path, YAML_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise ConfigurationError(f"{path}: cannot be read as a configuration file: {reason}") from problem
    try:
        _check_events(text, aliases=aliases)
        values = yaml.load(text, Loader=_loader_of(text))
    except yaml.YAMLError as problem:
        mark, what = getattr(problem, "problem_mark", None), getattr(problem, "problem", None) or problem
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConfigurationError(f"{path}: not valid YAML{where}: {what}") from problem
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as problem:
        # PyYAML raises them for a value that is not what its tag says, such as a date in month 99.
        raise ConfigurationError(f"{path}: holds a value that YAML does not allow: {problem!r}") from problem
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: expected a mapping of keys to values, received {_shown(values)}")
    return values


_Fast: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, if PyYAML was built with it: ten times as fast
_NOT_UTF_8 = re.compile(r"\\u[dD][cC][89a-fA-F]")  # a byte of a name that is not UTF-8, which libyaml does not read
_SLOW_BYTES = 100_000  # that PyYAML's own parser reads in a second


def _check_events(text: str, *, aliases: bool) -> None:
    """Raise a ``yaml.YAMLError`` for what would take too much time, memory or stack to turn into values."""
    nodes, sizes = (
        0,
        dict[str, int](),
    )  # values so far, and those behind each anchor, aliases counted as what they stand for
    parents: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=_loader_of(text)):
        what = ""
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = parents.pop()
            if anchor:
                sizes[anchor] = nodes - before
        elif isinstance(event, yaml.NodeEvent):
            is_alias = isinstance(event, yaml.AliasEvent)
            nodes += sizes.get(str(event.anchor), YAML_NODES + 1) if is_alias else 1  # the last one stands for itself
            if not aliases and (event.anchor or getattr(event, "tag", None)):
                what = "aliases and tags are not allowed in this file"
            elif nodes > YAML_NODES:
                what = f"it holds more than {YAML_NODES:,} values"
            elif isinstance(event, yaml.CollectionStartEvent):
                parents.append((event.anchor, nodes - 1))
                if len(parents) > YAML_DEPTH:
                    what = f"it is nested more than {YAML_DEPTH} deep"
            elif event.anchor and not is_alias:
                sizes[event.anchor] = 1
        if what:
            raise yaml.MarkedYAMLError(problem=what, problem_mark=event.start_mark)  # type: ignore[arg-type]


class _UniqueKeys:
    """A safe loader that refuses long numbers, and repeated keys, of which PyYAML would silently keep the last."""

    def construct_scalar(self: Any, node: yaml.ScalarNode) -> Any:
        if node.tag in _NUMBERS and len(node.value) > NUMBER_LENGTH:
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"a number has {len(node.value)} characters, at most {NUMBER_LENGTH} are allowed",
                node.start_mark,
            )
        return super().construct_scalar(node)  # type: ignore[misc]

    def construct_mapping(self: Any, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return dict(super().construct_mapping(node, deep=deep))  # type: ignore[misc]


class _FastLoader(_UniqueKeys, _Fast):  # type: ignore[misc]
    """Reads all but names that are not UTF-8."""


class _SlowLoader(_UniqueKeys, yaml.SafeLoader):  # type: ignore[misc]
    """Reads all."""


def _loader_of(text: str) -> Any:
    return _SlowLoader if len(text) <= _SLOW_BYTES and _NOT_UTF_8.search(text) else _FastLoader


_NUMBERS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}


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
