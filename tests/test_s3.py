"""A real S3 server on this machine, moto's, straight and through a proxy that cuts connections."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import NumpyNetwork, paint_folder
from stores import cutting_proxy, kill_series

from features.errors import SourceError
from features.extraction.extraction import Extraction
from features.extraction.options import ExtractionOptions
from features.sources import remote
from features.sources.scan import scan

pytestmark = pytest.mark.slow


def serving(port: int = 0) -> tuple[subprocess.Popen[str], int]:
    code = (
        "from moto.server import ThreadedMotoServer\n"
        "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)\n"
        "server.start()\nprint(server.get_host_and_port()[1], flush=True)\nimport sys\nsys.stdin.read()"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    return server, int(server.stdout.readline())


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """The port of a server that holds the images of a folder in the bucket ``photos``, and the folder."""
    pytest.importorskip("moto")
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("s3fs")
    folder = paint_folder(tmp_path_factory.mktemp("s3") / "images", {"cat": 30, "dog": 30})
    server, port = serving()
    try:
        with pytest.MonkeyPatch.context() as patch:
            account(patch, port)
            files = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
            files.mkdir("photos")
            files.mkdir("empty")
            files.put(f"{folder}/", "photos/set/", recursive=True)
        yield port, folder
    finally:
        server.kill()
        server.wait()


def account(patch: pytest.MonkeyPatch, port: int) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "testing")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    patch.setattr(remote, "_stores", {})


def run(source: str | Path, out: Path) -> Any:
    return Extraction(scan(source), NumpyNetwork(), out, ExtractionOptions()).run()  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [False, True])
def test_features_from_s3_are_those_of_the_folder(
    s3: tuple[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    import fsspec

    port, folder = s3
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)
    with cutting_proxy(port) as between:
        fsspec.filesystem("s3").clear_instance_cache()
        account(monkeypatch, between if cut else port)
        result = run("s3://photos/set", tmp_path / "a.h5")
        again = run("s3://photos/set", tmp_path / "a.h5")
    expected = run(folder, tmp_path / "b.h5").store
    np.testing.assert_array_equal(result.store.array("last.avg"), expected.array("last.avg"))
    assert result.store.images.paths == expected.images.paths
    assert (again.inferred, again.counts["hashed"], again.written) == (0, 0, False)


def test_what_is_wrong_is_said(s3: tuple[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    fsspec.filesystem("s3").clear_instance_cache()
    account(monkeypatch, s3[0])
    with pytest.raises(SourceError, match="s3://nowhere/x does not exist: there is no such bucket or folder"):
        scan("s3://nowhere/x")
    with pytest.raises(SourceError, match="s3://empty holds no images"):
        scan("s3://empty")
    fsspec.filesystem("s3").clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(SourceError, match=r"may not be read \(no credentials were found"):
        scan("s3://photos/set")


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_a_run_that_was_killed_gives_the_same_store(
    s3: tuple[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    fsspec.filesystem("s3").clear_instance_cache()
    account(monkeypatch, s3[0])
    kill_series("s3://photos/set", tmp_path)
