"""How much code there is: lines that bear code, files, and the functions' lengths and parameters.

    python tests/benchmarks/code_lines.py [FOLDER ...] [--json]     # features and pipeline without FOLDER

- code: lines that bear a token, in files as `ruff format` leaves them. Docstrings, comments and blank lines are counted
  apart. A line with code and a comment is code; every line of a string that is no docstring is code.
- length of a function: its lines from `def` to its end without its own docstring; decorators do not count.
- parameters: all that have a name, without `self`, `cls`, `*args` and `**kwargs`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import io
import json
import statistics
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("features", "pipeline")
MANY, TOO_MANY = 7, 12
NO_CODE = frozenset(
    (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
)


@dataclasses.dataclass(frozen=True)
class Function:
    """A function or method, nested ones too; ``command`` where Typer makes a command of the command line of it."""

    name: str
    length: int
    parameters: int
    command: bool


@dataclasses.dataclass(frozen=True)
class File:
    """One file; the four kinds of lines add up to ``lines``."""

    path: str
    code: int
    docstrings: int
    comments: int
    blank: int
    functions: tuple[Function, ...]

    @property
    def lines(self) -> int:
        return self.code + self.docstrings + self.comments + self.blank


def read(text: str, path: str = "") -> File:
    """Count the lines of a file's text."""
    tree = ast.parse(text)
    docstrings = {line for node in ast.walk(tree) for line in docstring(node)}
    bearing: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        lines = range(token.start[0], token.end[0] + 1)
        if token.type == tokenize.COMMENT:
            comments.update(lines)
        elif token.type not in NO_CODE:
            bearing.update(lines)
    code = bearing - docstrings
    comments -= bearing
    total = len(text.splitlines())
    blank = total - len(code | docstrings | comments)
    return File(path, len(code), len(docstrings), len(comments), blank, tuple(functions(tree, path)))


def docstring(node: ast.AST) -> range:
    """The lines of a node's docstring; none where it has no docstring."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
        first = node.body[0]
        if ast.get_docstring(node, clean=False) is not None:
            return range(first.lineno, (first.end_lineno or first.lineno) + 1)
    return range(0)


def functions(tree: ast.AST, path: str) -> Iterator[Function]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = [item.arg for item in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        yield Function(
            f"{path}:{node.name}",
            (node.end_lineno or node.lineno) - node.lineno + 1 - len(docstring(node)),
            len([name for name in arguments if name not in ("self", "cls")]),
            any(is_command(decorator) for decorator in node.decorator_list),
        )


def is_command(decorator: ast.expr) -> bool:
    """Whether a decorator is Typer's `app.command`, called or not."""
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(called) == "app.command"


def summarise(files: Sequence[File]) -> dict[str, Any]:
    """The counts of some files; the functions' part is left out where there is none."""
    found: dict[str, Any] = {"files": len(files)}
    for kind in ("code", "docstrings", "comments", "blank", "lines"):
        found[kind] = sum(getattr(file, kind) for file in files)
    largest = max(files, key=lambda file: file.lines)
    found["largest_file"] = {"path": largest.path, "lines": largest.lines}
    every = [function for file in files for function in file.functions]
    if every:
        lengths = sorted(function.length for function in every)
        found["functions"] = {
            "count": len(every),
            "median": statistics.median(lengths),
            "ninety": lengths[min(len(lengths) - 1, len(lengths) * 9 // 10)],
            "longest": lengths[-1],
            "longest_name": max(every, key=lambda function: function.length).name,
            "share_many": sum(function.parameters >= MANY for function in every) / len(every),
            "too_many": {
                function.name: function.parameters
                for function in sorted(every, key=lambda function: -function.parameters)
                if function.parameters > TOO_MANY and not function.command
            },
        }
    return found


def count(folders: Sequence[Path]) -> dict[str, Any]:
    """Counts of each package and of all of them."""
    files = {
        path: read(path.read_text(), str(path.relative_to(folder.parent)))
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
    }
    packages: dict[str, dict[str, Any]] = {}
    for folder in folders:
        inside = [path for path in files if path.is_relative_to(folder)]
        packages[folder.name] = summarise([files[path] for path in inside])
        for package in sorted({path.parent for path in inside} - {folder}):
            own = [files[path] for path in inside if path.parent == package]
            packages[".".join(package.relative_to(folder.parent).parts)] = summarise(own)
    return {"packages": packages, "total": summarise(list(files.values()))}


def table(document: dict[str, Any]) -> str:
    lines = ["{:24} {:>8} {:>6} {:>10} {:>9} {:>7}".format("", "code", "files", "docstrings", "comments", "blank")]
    for name, row in [*document["packages"].items(), ("total", document["total"])]:
        label = f"  of it {name}" if "." in name else name
        counts = f"{row['docstrings']:10,} {row['comments']:9,} {row['blank']:7,}"
        lines.append(f"{label:24} {row['code']:8,} {row['files']:6} {counts}")
    total = document["total"]
    lines.append(f"largest file: {total['largest_file']['lines']} lines, {total['largest_file']['path']}")
    if "functions" in total:
        made = total["functions"]
        lengths = f"{made['median']:g} / {made['ninety']} / {made['longest']}"
        lines.append(
            f"functions: {made['count']:,}; lines, median / 90 % / longest: {lengths} ({made['longest_name']})"
        )
        lines.append(f"functions with {MANY} or more parameters: {made['share_many']:.1%}")
        lines.append(f"functions with more than {TOO_MANY}, commands left out: {len(made['too_many'])}")
        lines += [f"  {parameters} {name}" for name, parameters in made["too_many"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[ROOT / name for name in FOLDERS])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folders = [folder.resolve() for folder in options.folders]
    for folder in folders:
        if not any(folder.rglob("*.py")):
            parser.error(f"{folder} holds no Python file")
    document = count(folders)
    print(json.dumps(document, indent=1) if options.json else table(document))


if __name__ == "__main__":
    main()
