"""Hidden temporary folders. Those that a killed process left behind are removed when the next one is made."""

from __future__ import annotations

import glob
import os
import platform
import secrets
import shutil
from pathlib import Path


def scratch_folder(root: Path, name: str) -> Path:
    """Make the folder ``.NAME.MACHINE-PROCESS-TOKEN.tmp`` in ``root``.

    Folders of the same name and machine whose process no longer runs are removed.
    """
    prefix = f".{name}.{platform.node()}-"
    for left in root.glob(f"{glob.escape(prefix)}*.tmp"):
        process = left.name.removeprefix(prefix).partition("-")[0]
        if process.isdecimal() and not _lives(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    folder = root / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}.tmp"
    folder.mkdir()
    return folder


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)  # a signal that does nothing
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # it belongs to another user
    return True
