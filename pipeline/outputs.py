"""Files that a command is asked to write: what they would destroy is refused before any work."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from features.errors import ConfigurationError
from features.files import behind_link, writable_folder
from features.sources.scan import ImageSet


def output_file(path: str | Path, option: str, example: str) -> Path:
    """Where a file is to be written: behind a link, so that the link stays one. Its folder is made.

    Parameters
    ----------
    path : Path
        As given.
    option : str
        Its name on the command line.
    example : str
        A name for it, shown where a folder was given.

    Raises
    ------
    ConfigurationError
        If it is a folder, or a device or pipe, which a whole file would replace.
    StoreError
        If its folder cannot be written.
    """
    given, path = path, behind_link(Path(path))
    if path.is_dir():
        raise ConfigurationError(f"{option} {given}: is a folder; expected a file, such as {Path(given) / example}")
    if path.exists() and not path.is_file():
        raise ConfigurationError(
            f"{option} {given}: is a device or a pipe, in whose place the file would be put; expected the name of a file, "
            f"such as {example}"
        )
    writable_folder(path.parent)
    return path


def refuse_overwriting(path: Path, option: str, read: Iterable[str | Path]) -> None:
    """Make sure that what is to be written is none of the files that are read.

    Raises
    ------
    ConfigurationError
        If it is.
    """
    if path.exists():
        place = os.path.realpath(path)
        if any(os.path.normpath(name) == place for name in read):
            raise ConfigurationError(
                f"{option} {path}: is itself one of the files that are read, and would be overwritten; give another name"
            )


def files_of(images: ImageSet) -> Iterable[str]:
    """Files that a source is read from: its own, or those of its images; absolute, links in folders followed."""
    yield os.path.realpath(images.description)
    if images.reader is None:
        root = os.path.realpath(images.root)
        yield from (os.path.join(root, path) for path in images.paths)
