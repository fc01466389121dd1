"""What several tests share: small image folders, a numpy stand-in for the network, whole processes."""

from __future__ import annotations

import _thread
import contextlib
import functools
import hashlib
import http.server
import io
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from PIL import Image

from features.extraction.extraction import Extraction, ExtractionResult
from features.extraction.options import ExtractionOptions
from features.recipe import PixelRule, Recipe
from features.sources.scan import scan
from features.store.reader import FeatureStore

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
STRESS = bool(os.environ.get("STRESS"))  # as in `make stress`


def rounds(full: int) -> int:
    """How often to kill, to flip or to draw: all of it in ``make stress``, a tenth in the suite."""
    return full if STRESS else -(-full // 10)


def part(rows: Iterable[T], *names: object) -> list[T]:
    """Of a table all rows in ``make stress``, in the suite those that are, or begin with, one of these."""
    kept = [row for row in rows if STRESS or (row[0] if isinstance(row, tuple) else row) in names]
    assert STRESS or len(kept) == len(names)
    return kept


def recipe(layer: str = "last", pooling: str = "avg", size: int = 8, **changes: object) -> Recipe:
    values = {"backbone": "numpy", "weights": "0" * 64, "preprocessing": "none", **changes}
    return Recipe(layer=layer, pooling=pooling, pixels=PixelRule(size, size), **values)  # type: ignore[arg-type]


def numpy_network(batch: np.ndarray) -> dict[str, np.ndarray]:
    """Channel means: a 'network' whose features can be worked out by hand from the pixels of each image."""
    return {"last.avg": batch.astype(np.float32).mean(axis=(1, 2))}


def paint(path: Path, colour: Sequence[int], size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(colour)).save(path)
    return path


def paint_folder(root: Path, classes: Mapping[str, int], start: int = 0) -> Path:
    """Class folders of one-coloured PNGs, every image of another colour."""
    number = start
    for name, count in classes.items():
        for index in range(count):
            paint(root / name / f"{index:04d}.png", (number % 256, number // 256 % 256, 7))
            number += 1
    return root


@contextlib.contextmanager
def chromium(what: str) -> Iterator[Any]:
    """Chromium, which reads ``what``; the test is skipped where it is not installed, and fails there in CI."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        if os.environ.get("CI", "").lower() in ("true", "1"):
            pytest.fail(f"chromium is not here, and nobody would notice that {what} goes unread: apt-get install it")
        pytest.skip(f"chromium is not here (Debian: apt-get install chromium): {what} is not read by a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for name in ("new_context", "new_page"):
            setattr(launched, name, patient(getattr(launched, name)))
        yield launched
        launched.close()


@contextlib.contextmanager
def folder_served(folder: Path) -> Iterator[int]:
    """A web server of this machine that serves a folder: its port."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def patient(make: Callable[..., Any]) -> Callable[..., Any]:
    """What makes a page or a context of it, whose waiting ends after four minutes: half of one is little on a loaded machine."""

    def made(**options: Any) -> Any:
        opened = make(**options)
        opened.set_default_timeout(240_000)
        return opened

    return made


def given_away(path: Path) -> str:
    """Give a file or folder to another user, who has no name; skip the test where this process may not."""
    if os.geteuid():
        pytest.skip("only root can give files away")
    os.chown(path, 54321, 54321)
    return "user 54321"


def listing(folder: Path) -> list[str]:
    """Every name under a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


LEAVE = """
import os, sys
from pathlib import Path
from features.temporary import temporary_path
for name in sys.argv[2:]:
    path = temporary_path(Path(sys.argv[1], name))
    (path.mkdir() if name == "folder" else path.write_bytes(b"half"))
    print(path, flush=True)
if sys.argv[2] == "stay":
    sys.stdin.read()
os.kill(os.getpid(), 9)
"""


def leave(folder: Path, *names: str) -> list[Path]:
    """Let a process make such files, and a folder of that name, and be killed."""
    command = [sys.executable, "-c", LEAVE, str(folder), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


def run_pipeline(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m pipeline ...`` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, arguments)],
        cwd=cwd or ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )


def call_pipeline(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, where a process of its own is not the point: TensorFlow is loaded only once."""
    from pipeline.cli import main
    from pipeline.progress import StderrHandler

    handler = StderrHandler()
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        logging.getLogger().addHandler(handler)
        try:
            code = main(list(map(str, arguments)))
        finally:
            logging.getLogger().removeHandler(handler)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def run_without(modules: set[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line as a process that ends with an error, and names them, where any of these modules was imported."""
    code = (
        "import sys\nfrom pipeline.cli import main\n"
        f"code = main({list(map(str, arguments))!r})\n"
        f"sys.exit(code or sorted({modules!r} & set(sys.modules)) or 0)"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def as_engine(infer: Callable[[np.ndarray], Mapping[str, np.ndarray]]) -> Any:
    """Give a function what the interface of an engine has besides the call."""
    infer.name, infer.device, infer.concurrent = "function", "cpu", False  # type: ignore[attr-defined]
    return infer


class NumpyNetwork:
    """Channel means ("last.avg") and the first pixel ("corner") of each image; counts what goes through it."""

    backbone_argument, weights_argument = "numpy", "none"
    license: str | None = None
    row_bytes = 12

    def __init__(self, recipes: Sequence[Recipe] = (recipe(),)) -> None:
        self.recipes = tuple(recipes)
        self.batches: list[int] = []
        self.fail_after: int | None = None

    def engine(self, recipes: Sequence[Recipe], *, batch_size: int, device: str):
        def infer(batch: np.ndarray) -> Mapping[str, np.ndarray]:
            if self.fail_after is not None and len(self.batches) >= self.fail_after:
                time.sleep(0.05)  # the main thread has handed out its shards and waits for them
                _thread.interrupt_main()  # Ctrl-C; a real signal is for processes of their own
                self.fail_after = None
            self.batches.append(len(batch))
            pixels = batch.astype(np.float32)
            made = {"last": pixels.mean(axis=(1, 2)), "corner": pixels[:, 0, 0]}
            return {item.name: made[item.layer] * (1 if item.seed == 0 else 2) for item in recipes}

        return as_engine(infer)


def extract(
    source: Path, out: Path, network: NumpyNetwork | None = None, split: str = "hash", **options: object
) -> ExtractionResult:
    options = {"batch_size": 4, "shard_rows": 16, "workers": 2, "split": f"{split}@0", **options}
    asked = ExtractionOptions(**options)  # type: ignore[arg-type]
    return Extraction(scan(source), network or NumpyNetwork(), out, asked).run()  # type: ignore[arg-type]


def expected_features(source: Path, paths: Sequence[str]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(source / path)).astype(np.float32).mean(axis=(0, 1)) for path in paths])


def assert_rows_are_their_images(store: FeatureStore, source: Path) -> None:
    table = store.images
    np.testing.assert_allclose(store.array("last.avg")[:, 0], expected_features(source, table.paths), rtol=1e-6)
    assert [store.classes[label] for label in table.labels] == [path.split("/")[-2] for path in table.paths]
    for path, digest in zip(table.paths, table.sha256, strict=True):
        assert hashlib.sha256((source / path).read_bytes()).digest() == digest.tobytes()
