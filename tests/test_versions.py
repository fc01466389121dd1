"""Which objects of a web server are unchanged: by ETag and size, else by time and size; of others nothing is believed."""

from __future__ import annotations

import email.utils
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import NumpyNetwork, paint_folder
from stores import Objects, objects

from features.extraction.extraction import Extraction, ExtractionResult
from features.extraction.options import ExtractionOptions
from features.sources import remote
from features.sources.scan import scan

LONG_AGO, LATER = "Sat, 03 Oct 2015 12:00:00 GMT", "Sat, 03 Oct 2015 12:00:01 GMT"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Objects]:
    """A server without ETags that has the images ``/0.png`` to ``/3.png``, and the manifest ``m.csv`` of them."""
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.001)
    files = sorted(paint_folder(tmp_path / "images", {"cat": 2, "dog": 2}).rglob("*.png"))
    with objects() as serving:
        serving.with_etags = False
        serving.objects = {f"/{number}.png": file.read_bytes() for number, file in enumerate(files)}
        rows = [f"{serving.address}/{number}.png,{file.parent.name}\n" for number, file in enumerate(files)]
        (tmp_path / "m.csv").write_text("path,label\n" + "".join(rows))
        yield serving


def run(folder: Path, **options: Any) -> ExtractionResult:
    asked = ExtractionOptions(allow_host="127.0.0.1", **options)
    images = scan(folder / "m.csv", hosts=asked.allow_host)
    return Extraction(images, NumpyNetwork(), folder / "a.h5", asked).run()  # type: ignore[arg-type]


def read_in(server: Objects, folder: Path, **options: Any) -> tuple[list[str], ExtractionResult]:
    """Run again; return the objects that were read for it."""
    start = len(server.asked)
    result = run(folder, **options)
    return sorted({asked[5] for asked in server.asked[start:] if asked.startswith("GET")}), result


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"trust_times": True}], ids=["", "trust-times"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_without_an_etag_the_time_of_the_last_change_and_the_size_tell(
    server: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool, options: dict[str, Any]
) -> None:
    server.modified = dict.fromkeys(server.objects, LONG_AGO)
    first = run(tmp_path)
    assert first.store.images.versions == ("1443873600000000000",) * 4  # date -d "2015-10-03 12:00 UTC" +%s
    if elsewhere:  # only what the store says is known
        monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "elsewhere"))
    read, again = read_in(server, tmp_path, **options)
    assert (read, again.inferred, again.written) == ([], 0, False)
    new = server.objects["/1.png"][:-1] + b"?"
    server.objects |= {"/0.png": server.objects["/0.png"] + b"more", "/1.png": new}
    server.modified["/1.png"] = LATER
    read, again = read_in(server, tmp_path, **options)
    assert (read, again.inferred) == (["0", "1"], 2)  # one has another size, one another time
    assert again.store.images.sha256[1].tobytes() == hashlib.sha256(new).digest()
    assert read_in(server, tmp_path, **options)[0] == []


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"trust_times": True}], ids=["", "trust-times"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_where_there_is_neither_nothing_is_believed(
    server: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool, options: dict[str, Any]
) -> None:
    assert run(tmp_path).store.images.versions == ("",) * 4
    if elsewhere:
        monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "elsewhere"))
    read, again = read_in(server, tmp_path, **options)
    assert (read, again.inferred, again.counts["hashed"]) == (["0", "1", "2", "3"], 0, 4)
    server.objects["/2.png"] = server.objects["/2.png"][:-1] + b"?"  # of the same size
    read, again = read_in(server, tmp_path, **options)
    assert (read, again.inferred, again.counts["hashed"]) == (["0", "1", "2", "3"], 1, 4)


@pytest.mark.slow
def test_a_time_within_the_second_of_the_answer_is_no_version(server: Objects, tmp_path: Path) -> None:
    """Else what is written later in that second is never seen."""
    tomorrow = email.utils.formatdate(time.time() + 86400, usegmt=True)
    server.modified = {"/0.png": LONG_AGO, "/1.png": tomorrow, "/2.png": "soon", "/3.png": LATER}
    assert [bool(version) for version in run(tmp_path).store.images.versions or ()] == [True, False, False, True]
    assert read_in(server, tmp_path)[0] == ["1", "2"]


@pytest.mark.slow
def test_an_etag_goes_before_the_time(server: Objects, tmp_path: Path) -> None:
    server.modified, server.with_etags = dict.fromkeys(server.objects, LONG_AGO), True
    run(tmp_path)
    server.modified["/0.png"] = LATER  # copied to another server: the content, and so the ETag, is the same
    server.objects["/1.png"] = server.objects["/1.png"][:-1] + b"?"
    read, again = read_in(server, tmp_path)
    assert (read, again.inferred) == (["1"], 1)


@pytest.mark.slow
@pytest.mark.parametrize("etags", [True, False])
def test_an_object_that_is_replaced_after_the_listing_is_read_again(
    server: Objects, tmp_path: Path, etags: bool
) -> None:
    """Also one of another size that has kept its time, and that is put back later."""
    server.modified, server.with_etags = dict.fromkeys(server.objects, LONG_AGO), etags
    listed = scan(tmp_path / "m.csv", hosts="127.0.0.1")
    before = server.objects["/0.png"]
    server.objects["/0.png"] += b"more"
    Extraction(listed, NumpyNetwork(), tmp_path / "a.h5", ExtractionOptions()).run()  # type: ignore[arg-type]
    assert listed.replaced == {f"{server.address}/0.png"}
    server.objects["/0.png"] = before
    read, again = read_in(server, tmp_path)
    assert (read, again.inferred) == (["0"], 1)
    assert again.store.images.sha256[0].tobytes() == hashlib.sha256(before).digest()
    assert read_in(server, tmp_path)[0] == []
