"""Who could have written a file: the files of this user and of root are believed, those that others may change are not."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path


def foreign(path: Path) -> str:
    """Say why another user could have written a file or folder, or put it there; empty if only this user or root could.

    All folders and symbolic links on the way must belong to this user or to root. None may be writable by others, or
    by a group that has further members. A folder on the way may be writable by all if it has the sticky bit, as
    ``/tmp`` has: there, nobody can rename or remove what belongs to someone else. What is missing has no owner, so the
    answer is about the folder that it would be made in.

    Parameters
    ----------
    path : Path
        File or folder, which may be missing.

    Returns
    -------
    str
        For example ``"/srv/cache is writable by everyone"``.
    """
    # Whoever owns "/" may change everything: root, or "nobody" where root has no number, as in some containers.
    believed = {0, os.geteuid(), os.stat("/").st_uid}
    try:
        for place, status, is_last in _way_to(path.absolute()):
            if status.st_uid not in believed:
                return f"{place} belongs to {_user_name(status.st_uid)}"
            if stat.S_ISLNK(status.st_mode) or (status.st_mode & stat.S_ISVTX and not is_last):
                continue  # links have no permissions of their own
            if status.st_mode & stat.S_IWOTH:
                return f"{place} is writable by everyone"
            if status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid):
                return f"{place} is writable by the group {_group_name(status.st_gid)}"
    except OSError as error:
        return f"{error.filename or path} cannot be looked at ({error.strerror})"
    return ""


def make_folder(folder: Path) -> None:
    """Create a folder and those above it that are missing, so that nobody else can write them, whatever the umask is."""
    for place in reversed((folder, *folder.parents)):
        if not place.is_dir():
            with contextlib.suppress(FileExistsError):  # another process was faster
                place.mkdir(0o755)


def _way_to(path: Path, *, is_last: bool = True) -> Iterator[tuple[Path, os.stat_result, bool]]:
    """Yield all that opening ``path`` passes through, targets of links too, and whether it is the end of the way.

    What is missing is left out.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.stat(path)  # an error for links in a circle, which would never end here
    for place in (path, *path.parents):
        try:
            status = os.lstat(place)
        except (FileNotFoundError, NotADirectoryError):
            continue
        yield place, status, is_last and place == path
        if stat.S_ISLNK(status.st_mode):
            yield from _way_to(place.parent / os.readlink(place), is_last=is_last and place == path)


def _is_own_group(group: int) -> bool:
    """Whether a group is the private one that many systems make for each user, under the user's name."""
    try:
        entry, user = grp.getgrgid(group), pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # numbers without names, as in a container
        return group == os.geteuid()
    return entry.gr_name == user and set(entry.gr_mem) <= {user}


def _user_name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"


def _group_name(group: int) -> str:
    try:
        return grp.getgrgid(group).gr_name
    except KeyError:
        return str(group)
