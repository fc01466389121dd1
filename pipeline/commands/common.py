"""What several commands share: the application, options, and how results and errors are printed."""

from __future__ import annotations

import errno
import functools
import inspect
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

import features
from features.errors import BottleneckError, ConfigurationError, IntegrityError, brief
from features.files import printable, printable_lines
from features.machine import hosts_allowed, take_device
from features.networks.backend import is_out_of_memory
from features.temporary import temporary_files_together
from pipeline.progress import QUIET, set_quiet

if TYPE_CHECKING:
    from features.store.reader import FeatureStore


def opt(help: str, *names: str, **more: Any) -> Any:
    """Make an option of a command; ``names`` and ``more`` are those of ``typer.Option``."""
    return typer.Option(*names, help=help, **more)


def arg(help: str, **more: Any) -> Any:
    """Make an argument of a command, with its help text."""
    return typer.Argument(help=help, **more)


app = typer.Typer(name="bottleneck", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


Hosts = Annotated[
    str,
    opt("Hosts inside a private network that addresses of images may reach, with commas.", metavar="HOST,..."),
]
Quiet = Annotated[bool, opt("Print only errors on stderr: no progress, no hints, no warnings.", "--quiet", "-q")]


def _memory_text(error: Exception, batch_size: int | None) -> str:
    """Say that memory ended, and what to do."""
    said = brief(" ".join(str(error).split()) or type(error).__name__, 300)
    smaller = f"--batch-size {max(1, batch_size // 2)}" if batch_size else "a smaller batch size"
    return (
        f"error: memory did not suffice: {said}. All finished work is kept. Give {smaller}, or --device cpu, or end other "
        "programs that use the device; then run the same command again"
    )


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors of this project and Ctrl-C into one line on stderr and an exit code; add the option ``--quiet``.

    A command that takes images or an address also gets the option ``--allow-host``.
    """

    @functools.wraps(command)
    def wrapper(*args: Any, quiet: bool = False, allow_host: str = "", **kwargs: Any) -> None:
        if quiet:
            set_quiet(quiet=True)
        try:
            _check_encoding()
            if str(kwargs.get("out")) == "-":
                raise ConfigurationError("--out -: this command cannot write to standard output; give a name")
            if "device" in kwargs:
                kwargs["device"] = take_device(kwargs["device"])
            with temporary_files_together(), hosts_allowed(allow_host):
                command(*args, **kwargs)
        except KeyboardInterrupt:
            sys.stderr.write("interrupted; all finished work is kept. Run the same command again to resume.\n")
            raise typer.Exit(130) from None
        except BottleneckError as error:
            sys.stderr.write(printable_lines(f"error: {error}") + "\n")
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read our output has closed it
                raise
            text = brief(f"error: {error.filename or 'the system'}: {error.strerror or error}")
            sys.stderr.write(printable_lines(text) + "\n")
            raise typer.Exit(1) from None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            sys.stderr.write(printable_lines(_memory_text(error, kwargs.get("batch_size"))) + "\n")
            raise typer.Exit(1) from None

    # Every command takes --quiet, and so does the program itself, because people type it in either place.
    signature = inspect.signature(command, eval_str=True)
    added: list[tuple[str, Any, Any]] = [("quiet", False, Quiet)]
    if signature.parameters.keys() & {"images", "url"}:
        added.append(("allow_host", "", Hosts))
    options = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=d, annotation=a) for name, d, a in added]
    wrapper.__annotations__ = {**command.__annotations__, **{name: annotation for name, _, annotation in added}}
    wrapper.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *options])  # type: ignore[attr-defined]
    return wrapper


def _check_encoding() -> None:
    """Refuse to read file names in another encoding than UTF-8: classes of other names would be kept in the store."""
    if sys.getfilesystemencoding() != "utf-8":
        raise ConfigurationError(
            f"the locale takes file names for {sys.getfilesystemencoding()}, so names with other letters would be misread; "
            "expected UTF-8. Set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
        )


def print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"bottleneck-features {features.__version__}")
        raise typer.Exit


@app.callback()
def whole_program(
    quiet: Quiet = False,
    version: Annotated[bool, opt("Print the version.", "--version", callback=print_version, is_eager=True)] = False,
) -> None:
    """Compute the features of a frozen network once, train heads on them in seconds, fine-tune the last block."""
    if quiet:
        set_quiet(quiet=True)


Json = Annotated[bool, opt("Print one JSON document.", "--json")]
Runs = Annotated[Path, opt("Folder of run folders.")]
Seed = Annotated[int, opt("Random seed.")]
MergeLabels = Annotated[
    bool, opt("Make one class of labels that look alike (Cat, cat; 0, 0.0), no label of nan.", "--merge-labels")
]
SplitFolders = Annotated[
    str,
    opt("Split folders of other names: train=Training,test=Testing.", metavar="SPLIT=FOLDER,...", show_default=False),
]
ClassLevel = Annotated[
    int,
    opt(
        "Level of the class folders, 1 or 2; the other folders become groups. Default: their names tell.",
        show_default=False,
    ),
]
Device = Annotated[str, opt("Device that the command runs on: auto, cpu, gpu, or gpu:K for one of several.")]
LabelsFile = Annotated[
    Path | None, opt("Labels file that is put over the labels of the images (bottleneck labels show FILE).", "--labels")
]
Cluster = Annotated[
    str | None,
    opt("local:N for N worker processes here, or the address of a Dask scheduler: tcp://HOST:PORT."),
]
BatchSize = Annotated[int | None, opt("Number of images in one forward pass. Default: 256 on a GPU, else 32.")]
Workers = Annotated[int | None, opt("Number of threads that read and decode. Default: one for each processor.")]
DataSetName = Annotated[
    str | None,
    opt("Data set, if the folder holds runs of several: its name, its source, or digits of its digest.", "--data-set"),
]
Trust = Annotated[
    bool,
    opt(
        "Load a head that only scikit-learn's own objects describe, though this user has not signed its file.",
        "--trust",
    ),
]
Weights = Annotated[str, opt("imagenet, random, or the path of a weights file.")]


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Parse an image size: ``"224"`` -> (224, 224); ``"192x256"`` -> (192, 256), height first.

    Raises
    ------
    ConfigurationError
        For anything else.
    """
    if text is None:
        return None
    numbers = text.lower().split("x")
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise ConfigurationError(
            f"--image-size: received {text!r}, expected PIXELS or HEIGHTxWIDTH, such as 224 or 192x256"
        )
    return int(numbers[0]), int(numbers[-1])


def parse_params(items: list[str]) -> dict[str, Any]:
    """Parse ``NAME=VALUE`` items: ``["C=0.1", "hidden=[256]"]``. A value that is no JSON is taken as text."""
    values: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise ConfigurationError(f"--param: received {item!r}, expected NAME=VALUE")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def listed_paths(stream: BinaryIO) -> Iterator[str]:
    """Yield the paths of a list, one per line, as they arrive; blank lines are skipped.

    Raises
    ------
    ConfigurationError
        If the list is separated by NUL characters.
    """
    for line in stream:
        if b"\0" in line:
            raise ConfigurationError(
                "standard input holds NUL characters; expected a list of paths, one per line, such as "
                "find photos -name '*.jpg' gives (without -print0)"
            )
        path = os.fsdecode(line.rstrip(b"\r\n"))
        if path.strip():
            yield path


def open_stores(files: Sequence[Path], labels: Path | None) -> list[FeatureStore]:
    """Open feature stores, under a labels file if one is named; what it changes is told on stderr."""
    from features.store.reader import FeatureStore
    from pipeline.labels.file import read_labels
    from pipeline.labels.overlay import account, with_labels

    stores = [FeatureStore.open(file) for file in files]
    if labels is None:
        return stores
    decisions = read_labels(labels)
    found = [with_labels(store, decisions) for store in stores]
    for store in found:
        where = f"{labels} over {store.path}" if len(found) > 1 else str(labels)
        print_note(f"{where}: {'; '.join([account(store), *decisions.remarks])}")
        if store.labelled_by["new_classes"]:
            print_note(
                "runs and exports made before do not know a new class and predict those that they have; finetune and evaluate "
                "refuse it for them. Train, fine-tune and export again"
            )
    return list(found)


def print_document(document: dict[str, Any], as_json: bool, text: str) -> None:
    """Print the result of a command: as JSON with ``--json``, else as text for a person."""
    typer.echo(json.dumps(document, indent=2) if as_json else printable_lines(text))


def columns_of_terminal() -> int | None:
    """Number of columns of the terminal that standard output is; None if it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_note(text: str) -> None:
    """Tell a person something on stderr, unless ``--quiet`` was given."""
    if not QUIET.is_set():
        typer.echo(printable(text), err=True)


def exit_if_damaged(damaged: Sequence[str]) -> None:
    """End with the exit code 3 if damaged runs were left out; warnings have named them."""
    if damaged:
        raise typer.Exit(IntegrityError.exit_code)


def print_next(*words: object) -> None:
    """Suggest the next command, its words quoted for a POSIX shell."""
    print_note(f"next: {shlex.join(map(str, words))}")
