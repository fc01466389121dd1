"""A real S3 server on this machine, moto's, straight and through a proxy that cuts connections."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import PRELOAD, WIDTH, Faults, extract
from faults import differences, inferred
from helpers import STRESS, NumpyNetwork, paint_folder
from photographs import some_cats_and_dogs
from stores import cutting_proxy, kill_series, table, tar

from features.errors import SourceError
from features.extraction.extraction import Extraction
from features.extraction.options import ExtractionOptions
from features.sources import blocks, remote
from features.sources.scan import scan
from pipeline.cluster.run import ClusterShards

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
    """The port of a server whose bucket ``photos`` holds a folder of images, and tars, Parquet files and a manifest of the same images
    in ``set``; and that folder."""
    pytest.importorskip("moto")
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("s3fs")
    folder = paint_folder(tmp_path_factory.mktemp("s3") / "images", {"cat": 30, "dog": 30})
    files = sorted(folder.rglob("*.png"))
    beside = folder.parent / "beside"
    for number in range(3):
        part = files[20 * number : 20 * number + 20]
        pictures, labels = [file.read_bytes() for file in part], [file.parent.name for file in part]
        numbered = [(f"{k:02d}.png", data) for k, data in enumerate(pictures)]
        tar(beside / f"s-{number}.tar", numbered + [(f"{k:02d}.cls", text.encode()) for k, text in enumerate(labels)])
        (beside / f"z-{number}.tar.gz").write_bytes(gzip.compress((beside / f"s-{number}.tar").read_bytes()))
        table(beside / f"p-{number}.parquet", pictures, rows=7, label=labels)
    rows = [f"{file.relative_to(folder)},{file.parent.name}\n" for file in files]
    (beside / "m.csv").write_text("path,label\n" + "".join(rows))
    server, port = serving()
    try:
        with pytest.MonkeyPatch.context() as patch:
            account(patch, port)
            files = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
            files.mkdir("photos")
            files.mkdir("empty")
            files.put(f"{folder}/", "photos/set/", recursive=True)
            for path in beside.iterdir():
                files.put(str(path), f"photos/{'set/' if path.suffix == '.csv' else ''}{path.name}")
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


SOURCES = ("set", "s-{0..2}.tar", "p-*.parquet", "set/m.csv", "z-{0..2}.tar.gz")


@pytest.mark.parametrize(("source", "cut"), [("set", False), *((source, True) for source in SOURCES)])
def test_features_from_s3_are_those_of_the_folder(
    s3: tuple[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, cut: bool
) -> None:
    import fsspec

    port, folder = s3
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
    blocks._blocks.clear()
    with cutting_proxy(port) as between:
        fsspec.filesystem("s3").clear_instance_cache()
        account(monkeypatch, between if cut else port)
        result = run(f"s3://photos/{source}", tmp_path / "a.h5")
        monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "elsewhere"))  # another machine: only ETags tell
        again = run(f"s3://photos/{source}", tmp_path / "a.h5")
    expected = run(folder, tmp_path / "b.h5").store
    np.testing.assert_array_equal(result.store.array("last.avg"), expected.array("last.avg"))
    assert result.store.images.sha256.tolist() == expected.images.sha256.tolist()
    assert result.store.images.labels.tolist() == expected.images.labels.tolist()
    assert (again.inferred, again.counts["hashed"], again.written) == (0, 0, False)


@pytest.mark.parametrize("cut", [False, True] if STRESS else [True])
def test_photographs_from_s3_give_the_features_of_the_folder_and_only_added_objects_are_read(
    s3: tuple[int, Path], assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    """Of cats and dogs; ``make stress`` takes all 3,000."""
    import fsspec

    folder = some_cats_and_dogs(assets, tmp_path / "photographs", 1000 if STRESS else 30)
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)
    bucket = f"real-{int(cut)}"
    with cutting_proxy(s3[0]) as between:
        fsspec.filesystem("s3").clear_instance_cache()
        account(monkeypatch, s3[0])
        files = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
        files.mkdir(bucket)
        late = sorted(folder.rglob("*.jpg"))[:3]
        files.put(f"{folder}/", f"{bucket}/", recursive=True)
        for path in late:
            files.rm(f"{bucket}/{path.relative_to(folder)}")
        fsspec.filesystem("s3").clear_instance_cache()
        account(monkeypatch, between if cut else s3[0])
        run(f"s3://{bucket}", tmp_path / "a.h5")
        for path in late:
            files.put(str(path), f"{bucket}/{path.relative_to(folder)}")
        read, call = list[str](), remote.Reader.__call__
        monkeypatch.setattr(remote.Reader, "__call__", lambda self, path: read.append(path) or call(self, path))
        result = run(f"s3://{bucket}", tmp_path / "a.h5")
    assert sorted(set(read)) == [str(path.relative_to(folder)) for path in late]
    assert (result.inferred, result.counts["new"]) == (3, 3)
    expected = run(folder, tmp_path / "b.h5").store
    np.testing.assert_array_equal(result.store.array("last.avg"), expected.array("last.avg"))
    assert result.store.images.paths == expected.images.paths


def test_what_is_wrong_is_said(s3: tuple[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    fsspec.filesystem("s3").clear_instance_cache()
    account(monkeypatch, s3[0])
    with pytest.raises(SourceError, match="s3://nowhere/x does not exist: there is no such bucket or folder"):
        scan("s3://nowhere/x")
    with pytest.raises(SourceError, match="s3://empty holds no images"):
        scan("s3://empty")
    with monkeypatch.context() as patch:
        patch.setattr(remote, "_ATTEMPTS", 1)  # what no further try can mend is not tried again
        for source in ("s3://Bad!/x", "s3://Bad!/x.tar"):
            with pytest.raises(
                SourceError, match=r"Bad!.*cannot be asked for \(ParamValidationError: .*Check the address"
            ):
                scan(source)
        patch.setenv("AWS_PROFILE", "nobody")
        fsspec.filesystem("s3").clear_instance_cache()
        with pytest.raises(SourceError, match=r"x: cannot be asked for \(ProfileNotFound: .*nobody.*AWS_PROFILE"):
            scan("s3://photos/x")
    fsspec.filesystem("s3").clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(SourceError, match=r"may not be read \(no credentials were found; set AWS_PROFILE, or"):
        scan("s3://photos/set")


def test_a_cluster_needs_no_shared_disk_for_images_in_a_bucket(
    s3: tuple[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers read a folder, tars and a manifest themselves; they are told where, and nothing else."""
    import dask
    import distributed  # noqa: F401  # its own settings first, else they would go with ours
    import fsspec

    fsspec.filesystem("s3").clear_instance_cache()
    account(monkeypatch, s3[0])
    faults = Faults(tmp_path / "faults.json", numpy=WIDTH, log=str(tmp_path / "log"))
    for name, value in faults.environment.items():
        monkeypatch.setenv(name, value)
    sources = SOURCES if STRESS else SOURCES[1:2]
    with dask.config.set({"distributed.worker.preload": [faults.environment[PRELOAD]]}):
        for number, source in enumerate(sources):
            extract(
                f"s3://photos/{source}", tmp_path / f"{number}.h5", ClusterShards("local:2" if STRESS else "local:1")
            )
            extract(f"s3://photos/{source}", tmp_path / f"{number}-here.h5")
            assert differences(tmp_path / f"{number}.h5", tmp_path / f"{number}-here.h5") == []
    assert inferred(tmp_path / "log") == 60 * len(sources)


@pytest.mark.stress
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("source", SOURCES if STRESS else SOURCES[1:2])
def test_a_run_that_was_killed_gives_the_same_store(
    s3: tuple[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    import fsspec

    fsspec.filesystem("s3").clear_instance_cache()
    account(monkeypatch, s3[0])
    kill_series(f"s3://photos/{source}", tmp_path)
