"""Quantised networks: one file each, named by its sha256, kept beside the store, beside the runs and in the cache.

    features.h5.networks/DIGEST.int8, runs/.networks/DIGEST.int8, CACHE/quantised/DIGEST.int8
    recipe with a digest --find()--> path --read()--> QuantisedNetwork, whose every byte is covered by the digest

The file holds one line of canonical JSON and then plain arrays, as FORMAT.md says. It is untrusted input: it is read
only if its digest is the expected one, and nothing is allocated that the file does not hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.cache import cache_path
from features.canonical import canonical_json
from features.errors import ConfigurationError, IntegrityError
from features.files import atomic_file, read_small, whole_file, writable_folder, writing
from features.recipe import Recipe

logger = logging.getLogger(__name__)
FORMAT = "bottleneck-quantised"
FORMAT_VERSION = 1
SUFFIX = ".int8"
LARGEST = 4 << 30  # bytes of a file
LONGEST_HEADER = 1 << 20  # bytes of its first line
LONGEST_MODEL = 64 << 20  # bytes of the description of the graph


@dataclasses.dataclass(frozen=True, eq=False)
class QuantisedNetwork:
    """What a file holds.

    Parameters
    ----------
    outputs : tuple of Recipe
        The plain recipe in float32 of each output.
    model, weights : uint8, (bytes,)
        OpenVINO's intermediate representation, from uint8 pixels (n, h, w, 3) to one output per recipe.
    expected : tuple of float32, (n, ...)
        Each output for ``features.networks.reference.reference_images``, by exact integers.
    step : int or None
        Images per pass, if the network takes no other number.
    calibration : dict
        How it was made: ``images``, the number it was calibrated on, ``sha256`` of their sorted hashes, and ``software``.
    """

    outputs: tuple[Recipe, ...]
    model: np.ndarray
    weights: np.ndarray
    expected: tuple[np.ndarray, ...]
    step: int | None
    calibration: Mapping[str, Any]

    def packed(self) -> bytes:
        """Return the bytes of the file."""
        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "outputs": [recipe.to_dict() for recipe in self.outputs],
            "model": len(self.model),
            "weights": len(self.weights),
            "expected": [list(values.shape) for values in self.expected],
            "step": self.step,
            "calibration": dict(self.calibration),
        }
        arrays = (self.model, self.weights, *(values.astype("<f4") for values in self.expected))
        return b"\n".join([canonical_json(header).encode("ascii"), b"".join(array.tobytes() for array in arrays)])

    def number_of(self, recipe: Recipe) -> int | None:
        """Return which output computes the features of a recipe; None if none does."""
        wanted = recipe.plain.in_float32
        return self.outputs.index(wanted) if wanted in self.outputs else None


def read(path: Path, digest: str | None = None) -> tuple[QuantisedNetwork, str]:
    """Read a file, and return what it holds and its sha256.

    Raises
    ------
    IntegrityError
        If it has another sha256 than ``digest``, or is no such file.
    OSError
        If it cannot be read.
    """
    data = read_small(path, LARGEST)
    found = hashlib.sha256(data).hexdigest()
    if digest is not None and found != digest:
        raise IntegrityError(f"{path}: is damaged or another file (sha256 {found[:12]}..., expected {digest[:12]}...)")
    try:
        return _parsed(data), found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{path}: is not a quantised network that this release reads ({error})") from error


def _parsed(data: bytes) -> QuantisedNetwork:
    end = data.find(b"\n", 0, LONGEST_HEADER)
    header = json.loads(data[: max(end, 0)])
    if (header["format"], header["format_version"]) != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"its format is {str(header['format'])[:40]!r} {str(header['format_version'])[:40]}")
    shapes = [[_whole(length) for length in shape] for shape in header["expected"]]
    counts = [_whole(header["model"]), _whole(header["weights"]), *(4 * _product(shape) for shape in shapes)]
    if end + 1 + sum(counts) != len(data) or not 0 < counts[0] <= LONGEST_MODEL:
        raise ValueError("its length is not that of its parts")
    outputs = tuple(Recipe.from_dict(values) for values in header["outputs"])
    if len(shapes) != len(outputs) or any(recipe != recipe.plain.in_float32 for recipe in outputs) or not outputs:
        raise ValueError("its outputs are not plain features in float32")
    parts, start = [], end + 1
    for count in counts:
        parts.append(np.frombuffer(data, np.uint8, count, start).copy())  # aligned
        start += count
    expected = tuple(part.view("<f4").reshape(shape) for part, shape in zip(parts[2:], shapes, strict=True))
    step = None if header["step"] is None else _whole(header["step"])
    return QuantisedNetwork(outputs, parts[0], parts[1], expected, step, dict(header["calibration"]))


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError(f"received {str(value)[:40]!r}, expected a whole number")
    return value


def _product(shape: Sequence[int]) -> int:
    if len(shape) > 8:
        raise ValueError(f"received {len(shape)} axes")
    product = 1
    for length in shape:
        product *= length
    return product


# ------------------------------------------------------------------------------------------------ where they are kept
def networks_of_store(store: Path) -> Path:
    """Return the folder of the quantised networks of a store, beside the file; it is there only if the store has some."""
    file = Path(os.path.realpath(store))
    return file.with_name(f"{file.name}.networks")


def networks_of_runs(runs: Path) -> Path:
    """Return the folder in which a folder of runs keeps one copy of each quantised network."""
    return runs / ".networks"


def place_in(folder: Path, digest: str) -> Path:
    """Return the path of a quantised network in a folder."""
    return folder / f"{digest}{SUFFIX}"


def find(digest: str, folders: Iterable[Path], given: str | Path | None = None) -> Path:
    """Find the quantised network of a digest: the given file, or in one of the folders, or in the cache.

    Raises
    ------
    ConfigurationError
        If the given file is another one, or it is in none of these places; the message says what to do.
    """
    if given is not None:
        try:
            read(Path(given), digest)
        except OSError as error:  # IntegrityError is one, too
            raise ConfigurationError(
                f"--quantised: {_said(given, error)}; expected the quantised network {digest[:12]}..."
            ) from error
        return Path(given)
    looked = [place_in(folder, digest) for folder in (*folders, cache_path("quantised"))]
    for path in looked:
        try:
            read(path, digest)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            logger.warning("%s. It is not used", _said(path, error))
            continue
        return path
    raise ConfigurationError(
        f"the quantised network {digest[:12]}... is lost: it is not in {', '.join(str(path.parent) for path in looked)}. No "
        "other network gives the same features, so none is made. Copy the file there from where the store or the runs were "
        f"made, or name it with --quantised FILE{SUFFIX}; else extract again with --overwrite and train again"
    )


def keep(source: Path, digest: str, folder: Path) -> Path:
    """Copy a quantised network into a folder, if it is not there already; return its path there.

    Raises
    ------
    StoreError
        If the folder cannot be written.
    """
    path = place_in(folder, digest)
    with contextlib.suppress(OSError):  # missing or damaged
        read(path, digest)
        return path
    data = read_small(source, LARGEST)
    if hashlib.sha256(data).hexdigest() != digest:
        raise IntegrityError(f"{source}: changed while it was copied. Run the same command again.")
    writable_folder(folder)
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)
    return path


def keep_in_cache(network: QuantisedNetwork) -> Path:
    """Write a new quantised network into the cache, and return its path.

    Raises
    ------
    StoreError
        If the cache cannot be written.
    """
    data = network.packed()
    path = place_in(cache_path("quantised"), hashlib.sha256(data).hexdigest())
    with writing(path), whole_file(path) as file:
        file.write(data)
    return path


def keep_only(folder: Path, digests: Collection[str]) -> None:
    """Remove the quantised networks of a store that none of its recipes needs, and the folder if it is empty."""
    if not folder.is_dir() or folder.is_symlink():
        return
    for path in folder.glob(f"*{SUFFIX}"):
        if path.stem not in digests:
            path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def checked(path: Path, recipes: Sequence[Recipe]) -> str:
    """Return the digest of a quantised network that computes the features of these recipes.

    Raises
    ------
    ConfigurationError
        If it computes others, or the file cannot be read.
    """
    try:
        network, digest = read(path)
    except OSError as error:
        raise ConfigurationError(f"--quantised: {_said(path, error)}") from error
    for recipe in recipes:
        if network.number_of(recipe) is None:
            differences = network.outputs[0].difference(recipe.plain.in_float32).items()
            listed = "; ".join(
                f"{field}: {str(has)[:40]}, not {str(asked)[:40]}" for field, (has, asked) in differences
            )
            raise ConfigurationError(
                f"{path}: is the quantised network of other features ({listed}). All layers of a store are quantised "
                "together. Choose another --out, and name them all there; add --overwrite to replace the store; or leave out "
                "--quantised, if it was given"
            )
    return digest


def _said(path: str | Path, error: OSError) -> str:
    """Say which file cannot be used and why; an error of this project names the file itself."""
    return str(error) if error.strerror is None else f"{path}: {error.strerror}"
