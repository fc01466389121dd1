"""Output files of a command: a file that would destroy something else is refused before any work is done."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from features.errors import ConfigurationError
from features.files import behind_link, writable_folder
from features.sources.imageset import ImageSet


def output_file(path: str | Path, option: str, example: str) -> Path:
    """Check an output path, make its folder, and return the path to write; links are followed, so that they are kept.

    Parameters
    ----------
    path : Path
        Path given by the user.
    option : str
        Name of the option on the command line.
    example : str
        Name of a file to suggest if the path is a folder.

    Raises
    ------
    ConfigurationError
        If the path is a folder, or a device or a pipe, which the file would replace.
    StoreError
        If the folder of the path cannot be written.
    """
    given, path = path, behind_link(Path(path))
    if path.is_dir():
        raise ConfigurationError(f"{option} {given}: is a folder; expected a file, such as {Path(given) / example}")
    if path.exists() and not path.is_file():
        raise ConfigurationError(
            f"{option} {given}: is a device or a pipe, which the file would replace; expected the name of a file, "
            f"such as {example}"
        )
    writable_folder(path.parent)
    return path


def refuse_overwriting(path: Path, option: str, read: Iterable[str | Path]) -> None:
    """Refuse an output path that is one of the input files.

    Raises
    ------
    ConfigurationError
        If it is one of them.
    """
    if path.exists():
        place = os.path.realpath(path)
        if any(os.path.normpath(name) == place for name in read):
            raise ConfigurationError(
                f"{option} {path}: is itself one of the files that are read, and would be overwritten; give another name"
            )


def files_of(images: ImageSet) -> Iterable[str]:
    """Yield the files that a source of images is read from, as absolute paths with links in folders resolved."""
    yield os.path.realpath(images.description)
    if images.reader is None:
        root = os.path.realpath(images.root)
        yield from (os.path.join(root, path) for path in images.paths)
