"""Build the documentation site from the pages of the packages and the docstrings of the public names.

README.md and others of the checkout --copied, with the files they link to--> build/pages --mkdocs--> build/site
features.__all__, pipeline.__all__ --docstrings--> build/pages/reference

python .docs/build.py [FOLDER]    # in place of build
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build").resolve()
PAGES = FOLDER / "pages"
PACKAGES = ("features", "pipeline")
WIDTH = 88  # of a signature in one line
_LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")
_HEADING = re.compile(r"^(\w[\w ]*)\n-{3,}$", re.MULTILINE)
_PARAMETER = re.compile(r"^(\*{0,2}\w[\w, *]*?) : (.+)$")


def main() -> int:
    """Make the pages, then the site; any warning of mkdocs is an error."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for page in sorted(pages()):
        copy(page)
    sys.path.insert(0, str(ROOT))
    for package in PACKAGES:
        target = PAGES / "reference" / f"{package}.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text(reference(package), "utf-8")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--config-file",
        ROOT / ".docs/mkdocs.yml",
    ]
    said = {"PAGES": str(PAGES), "SITE": str(FOLDER / "site"), "NO_MKDOCS_2_WARNING": "1"}  # the last: advertisement
    return subprocess.run(list(map(str, command)), env={**os.environ, **said}, check=False).returncode


def pages() -> Iterator[Path]:
    """All Markdown files of the packages, tests and the project."""
    yield ROOT / "README.md"
    for folder in (".github", *PACKAGES, "tests/benchmarks"):
        yield from (ROOT / folder).rglob("*.md")


def copy(page: Path) -> None:
    """Copy a page to the place that it has in the checkout, and files that it links to; a folder stands for its page."""

    def linked(found: re.Match[str]) -> str:
        target = (page.parent / found[0]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return found[0]  # mkdocs names it
        if target.is_dir():
            return f"{found[0].rstrip('/')}/README.md"
        if target.suffix != ".md":
            place(target).write_bytes(target.read_bytes())
        return found[0]

    place(page).write_text(_LINK.sub(linked, page.read_text("utf-8")), "utf-8")


def place(path: Path) -> Path:
    """Where a file of the checkout lies among the pages; its folder is made."""
    target = PAGES / path.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def reference(package: str) -> str:
    """The page of a package: every public name, its signature and its docstring."""
    module = importlib.import_module(package)
    parts = [
        f"# {package}",
        *(entry(name, getattr(module, name), 2) for name in sorted(getattr(module, "__all__", ()))),
    ]
    return "\n\n".join(parts) + "\n"


def entry(name: str, found: Any, level: int) -> str:
    """A heading, the signature, the docstring, and for a class those of its public methods."""
    parts = [f"{'#' * level} {name}"]
    if callable(found) and not (inspect.isclass(found) and issubclass(found, Exception)):
        parts.append(f"```python\n{signature(name, found)}\n```")
    parts.append(prose(inspect.getdoc(found) or ""))
    if inspect.isclass(found):
        members = {key: value for key, value in vars(found).items() if not key.startswith("_")}
        for key, value in members.items():
            value = getattr(value, "__func__", value)
            if (callable(value) or isinstance(value, property)) and inspect.getdoc(value):
                parts.append(entry(key, value, level + 1))
    return "\n\n".join(parts)


def signature(name: str, found: Any) -> str:
    """A call with its parameters, one on each line if they are many."""
    given = inspect.signature(found)
    text = str(
        given.replace(
            parameters=[one.replace(annotation=_bare(one.annotation)) for one in given.parameters.values()],
            return_annotation=_bare(given.return_annotation),
        )
    )
    if len(name) + len(text) <= WIDTH:
        return f"{name}{text}"
    parameters, _, result = text[1:].rpartition(")")
    depth, lines = 0, [""]
    for character in parameters:
        depth += (character in "[({") - (character in "])}")
        lines[-1] += character
        if character == "," and not depth:
            lines.append("")
    return f"{name}(\n" + "\n".join(f"    {line.strip()}" for line in lines) + f"\n){result}"


class _Bare(str):
    """An annotation that is written without quotation marks."""

    __repr__ = str.__str__


def _bare(annotation: Any) -> Any:
    return _Bare(annotation) if isinstance(annotation, str) else annotation


def prose(docstring: str) -> str:
    """A docstring of numpydoc as Markdown: sections, parameters as a list, examples as code."""
    first, *sections = _HEADING.split(docstring)
    parts = [examples(first.strip())]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        text = body.strip("\n")
        parts += [f"**{title}**", examples(text) if title in ("Examples", "Notes") else parameters(text)]
    return "\n\n".join(part for part in parts if part)


def parameters(text: str) -> str:
    """Lines ``name : type`` and their indented descriptions as a list."""
    items: list[list[str]] = []
    for line in text.splitlines():
        if not line.startswith(" ") and line.strip():
            found = _PARAMETER.match(line)
            items.append([f"`{found[1]}` : {found[2]}" if found else f"`{line}`"])
        elif items:
            items[-1].append(f"    {line.strip()}")
    return "\n".join("- " + "\n".join([item[0], "", *item[1:]]).rstrip() + "\n" for item in items)


def examples(text: str) -> str:
    """Blocks that begin with ``>>>`` or are indented are code, in fences; the rest is prose."""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        code = block.startswith(">>>") or all(line.startswith("    ") for line in block.splitlines())
        block = re.sub(r"\s*# doctest: .*", "", block)
        blocks.append(
            f"```python\n{inspect.cleandoc(block)}\n```" if code and block.strip() else block.replace("``", "`")
        )
    return "\n\n".join(blocks)


if __name__ == "__main__":
    raise SystemExit(main())
