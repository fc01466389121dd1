"""What a report shows of an audit, read from its ``audit.csv``.

audit.csv --the worst flagged rows of each check--> `AuditFile` --rows of a store--> section with thumbnails
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from features.errors import ConfigurationError
from features.files import named, printable
from pipeline.reporting.thumbnails import Pictures

COLUMNS = ["check", "path", "sha256", "score", "flag", "label", "suggested"]  # as an audit writes them
CARDS, CARD_PICTURE = 12, 128  # rows of a check that are shown, and the side of their pictures in pixels
MOST_CHECKS = 50
LINE_CHARACTERS = 1 << 16  # longest line
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the file: a flagged image."""

    path: str
    sha256: bytes
    score: float
    label: str
    suggested: str


@dataclasses.dataclass
class Checked:
    """One check: how many images it judged and flagged, and the first `CARDS` flagged ones, which are the worst."""

    name: str
    judged: int = 0
    flagged: int = 0
    worst: list[Row] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class AuditFile:
    """What was read from an ``audit.csv``."""

    path: Path
    checks: tuple[Checked, ...]

    def section(self, known: set[bytes], pictures: Pictures) -> list[dict[str, Any]]:
        """Describe each check for the page; empty if the file is about other images.

        Parameters
        ----------
        known : set of bytes
            The sha256 of every image of a run's store.
        pictures : Pictures
            Where thumbnails come from.
        """
        rows = [row for check in self.checks for row in check.worst]
        if rows and not any(row.sha256 in known for row in rows):
            return []
        return [
            self._described(check, [row for row in check.worst if row.sha256 in known], pictures)
            for check in self.checks
        ]

    @staticmethod
    def _described(check: Checked, rows: Sequence[Row], pictures: Pictures) -> dict[str, Any]:
        made = pictures.cards([(row.path, row.sha256) for row in rows], CARD_PICTURE)
        return {
            "name": check.name,
            "judged": check.judged,
            "flagged": check.flagged,
            "cards": [
                {
                    "file": printable(row.path),
                    "name": printable(row.path.rpartition("/")[2]),
                    "score": row.score,
                    "label": printable(row.label),
                    "suggested": printable(row.suggested),
                    "picture": picture,
                }
                for row, picture in zip(rows, made, strict=True)
            ],
        }


def read_audit(path: str | Path) -> AuditFile:
    """Read the worst rows of each check from an ``audit.csv``; the file is untrusted and read line by line.

    Raises
    ------
    ConfigurationError
        If it is no such file, or a line is malformed; the message names the line.
    """
    path = Path(path)
    checks: dict[str, Checked] = {}
    with named(path), open(path, encoding="utf-8", errors="surrogateescape", newline="") as stream:
        lines = csv.reader(_short(path, stream), strict=True)
        try:
            if (heading := next(lines, [])) != COLUMNS:
                raise ValueError(f"received columns {', '.join(heading)[:200]}, expected {', '.join(COLUMNS)}")
            for cells in lines:
                _add(checks, cells)
        except (ValueError, csv.Error) as problem:
            raise ConfigurationError(
                f"--audit {path}: line {lines.line_num}: {printable(str(problem))}. bottleneck audit FEATURES --out {path.name} writes it"
            ) from problem
    return AuditFile(path, tuple(checks.values()))


def _short(path: Path, stream: Any) -> Any:
    while line := stream.readline(LINE_CHARACTERS):
        if len(line) == LINE_CHARACTERS:
            raise ValueError(f"is longer than {LINE_CHARACTERS:,} characters")
        yield line


def _add(checks: dict[str, Checked], cells: list[str]) -> None:
    if len(cells) != len(COLUMNS):
        raise ValueError(f"received {len(cells)} cells, expected {len(COLUMNS)}")
    name, path, sha256, score, flag, label, suggested = cells
    if not re.fullmatch("[a-z-]{1,40}", name) or (name not in checks and len(checks) == MOST_CHECKS):
        raise ValueError(f"received the check {name[:60]!r}, expected a name of a check")
    if not _SHA256.fullmatch(sha256) or flag not in ("0", "1") or not 0 <= float(score) <= 1:
        raise ValueError("expected a sha256, a score from 0 to 1 and a flag 0 or 1")
    check = checks.setdefault(name, Checked(name))
    check.judged += 1
    if flag == "1":
        check.flagged += 1
        if len(check.worst) < CARDS:
            check.worst.append(Row(path, bytes.fromhex(sha256), float(score), label, suggested))
