"""Networks by name from a hub on 127.0.0.1: pinned, hashed, whole or absent, and refused where that is due."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import ROOT, listing, rounds
from hubs import Hub, commit, running_hub

from features.cache import signed_file
from features.errors import ConfigurationError, StoreError, WeightsError, WeightsNotFoundError
from features.networks import fetching
from features.networks.hub import hub_folder, is_hub_name, needed_files

A, B = commit("a"), commit("b")
NAME = "hf:owner/name"
TOKEN = "hf_abcdefgh"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(fetching, "_PAUSE", 0.0)
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def place(hub: Hub, tmp_path: Path) -> Path:
    return tmp_path / "cache" / "hub" / hub.endpoint.removeprefix("http://").replace(":", "%3A") / "owner--name"


def test_a_repository_becomes_a_folder_with_the_files_needed(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        found = hub_folder(NAME)
    folder = place(hub, tmp_path)
    assert (found.path, found.name, found.commit, found.license) == (folder / A, f"{NAME}@{A}", A, "apache-2.0")
    assert listing(folder) == sorted(
        [A, f"{A}.json", f"{A}/config.json", f"{A}/onnx", f"{A}/onnx/model.onnx", "at-main.json"]
    )
    assert (found.path / "onnx" / "model.onnx").read_bytes() == hub.files["onnx/model.onnx"]
    assert (found.path / "config.json").read_bytes() == hub.files["config.json"]
    with signed_file(folder / f"{A}.json") as file:
        record = json.load(file)
    sha256, size, stamp = record["files"]["onnx/model.onnx"]
    assert (sha256, size) == (hashlib.sha256(hub.files["onnx/model.onnx"]).hexdigest(), 10_240)
    assert stamp[3] == 10_240
    assert (record["license"], record["commit"], record["listed"]) == ("apache-2.0", A, sorted(hub.files))
    assert hub.paths() == [
        "/api/models/owner/name/revision/main",
        f"/owner/name/resolve/{A}/onnx/model.onnx",
        "/blob/onnx/model.onnx",
        f"/owner/name/resolve/{A}/config.json",
    ]
    assert "downloading model.onnx (0.0 MB)" in caplog.text
    assert f"{NAME} is pinned to the commit {A}; remove {folder / 'at-main.json'} to look again" in caplog.text
    assert "secret" not in caplog.text


def test_a_second_use_needs_no_network_and_hashes_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hub_folder(NAME)
    hub.seen.clear()
    monkeypatch.setattr("features.networks.hub.file_digest", lambda _: pytest.fail("hashed again"))
    assert hub_folder(NAME) == first
    assert hub_folder(f"{NAME}@{A}") == first
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_folder(NAME) == first
    assert hub.seen == []


def test_a_name_stays_pinned_although_its_branch_moves(hub: Hub, tmp_path: Path) -> None:
    first = hub_folder(NAME)
    hub.commits |= {"main": B, B: B}
    hub.files["config.json"] = b"{}"
    assert hub_folder(NAME) == first
    newer = hub_folder(f"{NAME}@{B}")
    assert (newer.commit, (newer.path / "config.json").read_bytes()) == (B, b"{}")
    assert hub_folder(NAME) == first
    (place(hub, tmp_path) / "at-main.json").unlink()
    assert hub_folder(NAME) == newer


def test_tags_and_refs_are_revisions(hub: Hub) -> None:
    hub.commits |= {"v1.0": B, "refs/pr/1": A}
    assert hub_folder(f"{NAME}@v1.0").commit == B
    assert hub_folder(f"{NAME}@refs/pr/1").commit == A
    assert hub_folder(f"{NAME}@{A.upper()}").commit == A


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\n")
    hub_folder(NAME)
    assert {(server, token) for server, _, token, _ in hub.seen} == {("hub", f"Bearer {TOKEN}"), ("storage", None)}


@pytest.mark.parametrize("token", ["a b", "a\nX-Other: b", "ä"])
def test_a_token_that_is_none_is_never_shown(hub: Hub, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigurationError, match=r"^HF_TOKEN: it holds blanks") as caught:
        hub_folder(NAME)
    assert token not in str(caught.value)
    assert hub.seen == []


def test_a_server_does_not_show_its_token() -> None:
    assert TOKEN not in repr(fetching.Server("https://huggingface.co", TOKEN))


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://example.org",
        "ftp://127.0.0.1",
        "file:///etc",
        "huggingface.co",
        "https://",
        "https://a.org?x=1",
        "https://a.org:x",
    ],
)
def test_an_endpoint_is_https_or_this_machine(endpoint: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(ConfigurationError, match=r"http is taken for 127\.0\.0\.1 and localhost only") as caught:
        hub_folder(NAME)
    assert endpoint in str(caught.value)


def test_an_endpoint_with_a_password_is_not_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@a.org")
    with pytest.raises(ConfigurationError, match="received an address with a password") as caught:
        hub_folder(NAME)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("place", ["http://example.org", "file:///etc", "ftp://127.0.0.1", "http://[", "gopher://a"])
def test_a_redirect_leads_only_to_https(hub: Hub, place: str) -> None:
    hub.elsewhere = place
    with pytest.raises(
        WeightsNotFoundError, match=r"a redirect to an address that is not https|HTTP status 302|redirects"
    ):
        hub_folder(NAME)


def test_an_interrupted_download_goes_on_where_it_ended(hub: Hub) -> None:
    hub.cut, hub.cuts = 5000, 1
    found = hub_folder(NAME)
    assert (found.path / "onnx" / "model.onnx").read_bytes() == hub.files["onnx/model.onnx"]
    assert [span for server, _, _, span in hub.seen if server == "storage"] == [None, "bytes=5000-"]


def test_a_server_without_ranges_starts_again(hub: Hub) -> None:
    hub.cut, hub.cuts, hub.ranges = 5000, 2, False
    found = hub_folder(NAME)
    assert (found.path / "onnx" / "model.onnx").read_bytes() == hub.files["onnx/model.onnx"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cut": 5000, "cuts": 99}, "received 5,000 of 10,240 bytes"),
        ({"altered": bytes(10_240)}, "received other bytes than those of the hash"),
        ({"altered": bytes(10_241)}, "received more than the 10,240 bytes expected; nothing is kept"),
        ({"altered": b""}, "received 0 of 10,240 bytes"),
    ],
)
def test_a_file_that_is_not_the_promised_one_leaves_nothing(
    hub: Hub, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    for name, value in change.items():
        setattr(hub, name, value)
    with pytest.raises(WeightsError, match=message) as caught:
        hub_folder(NAME)
    assert "hf:owner/name" in str(caught.value)
    assert ("--backbone FOLDER" in str(caught.value)) is ("expected" not in message and "hash" not in message)
    assert listing(place(hub, tmp_path)) == sorted([A, f"{A}.json", f"{A}/onnx", "at-main.json"])
    hub.cut, hub.altered = -1, None
    assert (hub_folder(NAME).path / "onnx" / "model.onnx").read_bytes() == hub.files["onnx/model.onnx"]


def test_a_small_file_is_checked_by_gits_hash(hub: Hub) -> None:
    right = hub.files["config.json"]
    hub.altered = bytes(len(right))
    promised = hashlib.sha1(b"blob %d\0" % len(right) + right).hexdigest()
    with pytest.raises(WeightsError, match=f"config.json: received other bytes than those of the hash {promised}"):
        hub_folder(NAME, lambda _: ["config.json"])
    hub.altered = None
    assert (hub_folder(NAME, lambda _: ["config.json"]).path / "config.json").read_bytes() == right


def test_without_a_promised_hash_the_size_counts(hub: Hub) -> None:
    hub.promises = False
    assert (hub_folder(NAME).path / "onnx" / "model.onnx").stat().st_size == 10_240
    hub.length = False
    hub.files["model.onnx"], hub.large = b"x", {"model.onnx"}
    hub.commits["main"], hub.commits[B] = B, B
    with pytest.raises(WeightsError, match="the server says neither the size nor the hash of the file"):
        hub_folder(f"{NAME}@{B}", lambda _: ["model.onnx"])
    hub.promises = True
    assert (hub_folder(f"{NAME}@{B}", lambda _: ["model.onnx"]).path / "model.onnx").read_bytes() == b"x"


def test_a_cached_file_that_was_changed_comes_again(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    path = hub_folder(NAME).path / "onnx" / "model.onnx"
    times = path.stat()
    path.write_bytes(bytes(10_240))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    hub.seen.clear()
    hub_folder(NAME)
    assert path.read_bytes() == hub.files["onnx/model.onnx"]
    assert "/blob/onnx/model.onnx" in hub.paths("storage")
    assert f"{path} is not as it was downloaded; it is downloaded again" in caplog.text
    path.touch()  # of the same content: hashed once, and noted
    hub.seen.clear()
    hub_folder(NAME)
    assert hub.seen == []


def test_offline_a_changed_or_missing_file_is_an_error(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsNotFoundError) as caught:
        hub_folder(NAME)
    assert str(caught.value) == (
        f"hf:owner/name is not whole in the cache, and cannot be fetched. Tried: {hub.endpoint}/api/models/owner/name/revision/"
        "main: HF_HUB_OFFLINE is set. Unset it for once; or download the repository on another machine and give its folder: "
        "--backbone FOLDER."
    )
    assert hub.seen == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (hub_folder(NAME).path / "config.json").write_bytes(b"x")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsNotFoundError, match=r"config.json: HF_HUB_OFFLINE is set"):
        hub_folder(NAME)


def test_two_that_fetch_at_once_end_with_the_same_whole_files(hub: Hub) -> None:
    hub.slow = 0.005
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(hub_folder, [NAME, NAME])
    assert one == other
    seen = len(hub.seen)
    assert hub_folder(NAME) == one
    assert len(hub.seen) == seen  # nothing is asked again
    assert listing(one.path) == ["config.json", "onnx", "onnx/model.onnx"]
    assert (one.path / "onnx" / "model.onnx").read_bytes() == hub.files["onnx/model.onnx"]


def test_other_files_of_a_pinned_commit_can_be_wanted_later(hub: Hub) -> None:
    hub_folder(NAME)
    hub.seen.clear()
    found = hub_folder(NAME, lambda listed: [name for name in listed if name.endswith(".md")])
    assert hub.paths() == [f"/owner/name/resolve/{A}/README.md"]
    assert (found.path / "README.md").read_bytes() == b"#"
    with pytest.raises(WeightsError, match=r"it holds no file 'READNE.md'; did you mean 'README.md'"):
        hub_folder(NAME, lambda _: ["READNE.md"])


def test_a_record_that_is_not_ones_own_is_not_believed(hub: Hub, tmp_path: Path) -> None:
    hub_folder(NAME)
    for path in place(hub, tmp_path).glob("*.json"):
        path.write_bytes(b"0" * 64 + path.read_bytes()[64:])
    (place(hub, tmp_path) / A / "onnx" / "model.onnx").write_bytes(b"evil")
    found = hub_folder(NAME)
    assert (found.path / "onnx" / "model.onnx").read_bytes() == hub.files["onnx/model.onnx"]


def test_the_pin_of_one_hub_says_nothing_about_another(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_folder(NAME)
    with running_hub() as other:
        other.commits = {"main": B}
        monkeypatch.setenv("HF_ENDPOINT", f"{other.endpoint}/")
        assert hub_folder(NAME).commit == B


DOWNLOAD = "from features.networks.hub import hub_folder; print(hub_folder('hf:owner/name').path)"


@pytest.mark.slow
@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGINT])
def test_a_download_that_was_killed_goes_on(hub: Hub, signal_: signal.Signals, tmp_path: Path) -> None:
    hub.files["onnx/model.onnx_data"] = bytes(1000)
    hub.files["onnx/model.onnx"] = os.urandom(1 << 20)
    hub.large = {"onnx/model.onnx", "onnx/model.onnx_data"}
    hub.slow = 0.005
    process = subprocess.Popen([sys.executable, "-c", DOWNLOAD], cwd=ROOT, stderr=subprocess.DEVNULL)
    folder = place(hub, tmp_path) / A / "onnx"
    until = time.monotonic() + 30
    while time.monotonic() < until and not any(path.stat().st_size > 50_000 for path in folder.glob(".*.tmp")):
        time.sleep(0.01)
    process.send_signal(signal_)
    assert process.wait(30) != 0
    assert not (folder / "model.onnx").exists()
    assert bool(listing(folder)) is (signal_ == signal.SIGKILL)  # nobody could remove the half
    hub.slow = 0.0
    found = hub_folder(NAME)
    assert (found.path / "onnx" / "model.onnx").read_bytes() == hub.files["onnx/model.onnx"]
    assert listing(folder) == ["model.onnx", "model.onnx_data"]


KILLED = """
import os, signal, sys
folder, left = os.environ["BOTTLENECK_CACHE"], int(sys.argv[1])

def look(event, arguments):
    global left
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event in ("os.rename", "os.mkdir", "os.remove"):
        left -= str(arguments[0]).startswith(folder)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(look)
"""


@pytest.mark.slow
@pytest.mark.stress
def test_killed_before_any_change_of_a_file_the_next_run_ends_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(count: int) -> int:
        command = [sys.executable, "-c", KILLED + DOWNLOAD, str(count)]
        return subprocess.run(command, cwd=ROOT, check=False, capture_output=True).returncode

    changes = list(range(1, 17))  # opened, removed and renamed files, and folders
    random.shuffle(changes)
    for count in changes[: rounds(len(changes))]:
        monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / str(count)))
        assert run(count) == -signal.SIGKILL
        for path in (tmp_path / str(count)).rglob("[!.]*.onnx"):
            assert path.read_bytes() == hub.files["onnx/model.onnx"]
        assert run(0) == 0
        names = [A, f"{A}.json", f"{A}/config.json", f"{A}/onnx", f"{A}/onnx/model.onnx", "at-main.json"]
        [folder] = (tmp_path / str(count)).glob("hub/*/owner--name")
        assert listing(folder) == sorted(names)
        assert (folder / A / "onnx" / "model.onnx").read_bytes() == hub.files["onnx/model.onnx"]
        hub.seen.clear()
        assert run(0) == 0
        assert hub.seen == []


def test_whole_files_of_a_killed_run_are_kept(hub: Hub, tmp_path: Path) -> None:
    """Killed after the last file, and before the record said so."""
    folder = place(hub, tmp_path) / A
    (folder / "onnx").mkdir(parents=True)
    for name in ("onnx/model.onnx", "config.json"):
        (folder / name).write_bytes(hub.files[name])
    times = (folder / "config.json").stat().st_mtime_ns
    hub_folder(NAME)
    assert (folder / "config.json").stat().st_mtime_ns == times
    assert hub_folder(NAME).path == folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gated": "auto"}, "it is gated: its owners want you to accept a licence first"),
        ({"gated": "manual"}, "it is gated"),
        ({"gated": True}, "it is gated"),
        (
            {"cardData": {"license": "cc-by-nc-4.0"}},
            "its licence 'cc-by-nc-4.0' is not one of the free ones known here",
        ),
        (
            {"cardData": {"license": "other", "license_name": "dinov3-license"}},
            r"its licence 'other \(dinov3-license\)'",
        ),
        ({"cardData": None, "tags": ["onnx", "license:dinov3-license"]}, "its licence 'dinov3-license'"),
        ({"cardData": {"license": ["mit", "cc-by-nc-nd-4.0"]}}, "its licence 'mit and cc-by-nc-nd-4.0'"),
    ],
)
def test_gated_or_restricted_weights_are_refused(
    hub: Hub, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    hub.answers |= change
    with pytest.raises(WeightsError, match=message) as caught:
        hub_folder(NAME)
    assert str(caught.value).startswith("hf:owner/name: ")
    assert str(caught.value).endswith(
        f"Read and accept it at {hub.endpoint}/owner/name, download the repository yourself, and give its folder by its path: "
        "--backbone FOLDER."
    )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache" / "hub").exists()
    assert hub.paths() == ["/api/models/owner/name/revision/main"]


def test_a_missing_licence_is_said(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.answers = {}
    assert hub_folder(NAME).license is None
    assert "hf:owner/name: the hub names no licence; look for one before you use it" in caplog.text


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ((401, "RepoNotFound"), "it does not exist, or it is not for everyone. A private one needs HF_TOKEN"),
        ((404, "RepoNotFound"), "it does not exist"),
        ((403, "GatedRepo"), "a gated one is given by the path of its folder"),
        (
            (404, "RevisionNotFound"),
            r"the hub has no such revision \('main'\). Look for its branches, tags and commits at",
        ),
        ((404, ""), r"the hub has no such repository or revision \('main'\)"),
        (
            (503, ""),
            r"is not whole in the cache, and cannot be fetched\. .* The hub is busy: try again later, or with HF_TOKEN; or",
        ),
        ((429, ""), "HTTP status 429.*The hub is busy"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub: Hub, status: tuple[int, str], message: str) -> None:
    hub.status = status
    with pytest.raises(WeightsNotFoundError, match=message) as caught:
        hub_folder(NAME)
    assert "hf:owner/name" in str(caught.value)
    assert f"Tried: {hub.endpoint}/api/models/owner/name/revision/main: HTTP status {status[0]}" in str(caught.value)
    assert len(str(caught.value)) <= 1000


def test_a_revision_that_is_not_there(hub: Hub) -> None:
    with pytest.raises(WeightsNotFoundError, match=r"hf:owner/name: the hub has no such revision \('mian'\)"):
        hub_folder(f"{NAME}@mian")


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        WeightsNotFoundError, match=r"Tried: http://127.0.0.1:9/api/.*Connection refused.*--backbone FOLDER"
    ):
        hub_folder(NAME)


def test_a_silent_server_is_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_TIMEOUT", 0.1)
    monkeypatch.setattr(fetching, "_ATTEMPTS", 2)
    hub.slow = 0.5
    with pytest.raises(WeightsNotFoundError, match="timed out"):
        hub_folder(NAME)


def test_a_note_that_cannot_be_written_is_only_warned_about(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = hub_folder(NAME)
    (found.path / "config.json").touch()

    def refuse(path: Path, content: bytes) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("features.cache.write_signed", refuse)
    assert hub_folder(NAME) == found
    assert re.search(r"could not be written \(.*Read-only file system", caplog.text)


def test_a_file_for_which_there_is_no_room_is_not_begun(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_239))
    with pytest.raises(
        StoreError, match=r"model.onnx: could not be written \(10,240 bytes are needed, 0.0 MB are free\)"
    ):
        hub_folder(NAME)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_240))
    hub_folder(NAME)


def test_a_folder_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "cache" / "hub").write_bytes(b"in the way")
    with pytest.raises(StoreError, match="could not be written"):
        hub_folder(NAME)


@pytest.mark.parametrize(
    "name",
    [
        "hf:",
        "hf:name",
        "hf:/name",
        "hf:owner/",
        "hf:owner/name/more",
        "hf:../name",
        "hf:owner/..",
        "hf:owner/a..b",
        "hf:owner/a--b",
        "hf:own er/name",
        "hf:owner\\name",
        "hf:owner/na\nme",
        "hf:owner/name@",
        "hf:owner/name@../../x",
        "hf:owner/name@a b",
        "hf:owner/name@a@b",
        "hf:-owner/name",
        "hf:owner/name?x",
        "hf:owner/" + "n" * 97,
        "hf:owner/name@" + "r" * 101,
    ],
)
def test_names_that_are_none_are_refused_before_anything_is_asked(hub: Hub, name: str) -> None:
    assert is_hub_name(name)
    with pytest.raises(ConfigurationError, match="expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION") as caught:
        hub_folder(name)
    assert "\n" not in str(caught.value)
    assert hub.seen == []


@pytest.mark.parametrize(
    "path",
    ["../x", "a/../../x", "/etc/passwd", "a\\b", "a\nb", "a\0b", "", ".", "a//b", "a/", "n" * 201, 5, None, "\ud800"],
)
def test_hostile_paths_are_refused(hub: Hub, path: Any, tmp_path: Path) -> None:
    hub.answers["siblings"] = [{"rfilename": "config.json"}, {"rfilename": path}]
    with pytest.raises(WeightsError, match="which is no path inside a repository"):
        hub_folder(NAME)
    assert not (tmp_path / "cache" / "hub").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha": "main"}, "gives the commit 'main', expected 40 hexadecimal digits"),
        ({"sha": 5}, "gives the commit 5"),
        ({"sha": "../" + "a" * 37}, "expected 40 hexadecimal digits"),
        ({"siblings": None}, "names no list of files"),
        ({"siblings": {"a": 1}}, "names no list of files"),
        ({"siblings": [5]}, "which is no path"),
        ({"siblings": [{"rfilename": "x"}] * 10_001}, "names 10001 files, expected a list of at most 10,000"),
        ({"cardData": {"license": {"a": 1}}, "tags": 5}, "x"),
    ],
)
def test_answers_of_the_wrong_shape_are_refused(hub: Hub, change: dict[str, Any], message: str) -> None:
    hub.answers |= change
    if message == "x":
        assert hub_folder(NAME).license is None
        return
    with pytest.raises(WeightsError, match=message):
        hub_folder(NAME)


def test_another_commit_than_the_one_asked_for_is_refused(hub: Hub) -> None:
    hub.commits[B] = A
    with pytest.raises(WeightsError, match=f"gives the commit {A}, expected {B}"):
        hub_folder(f"{NAME}@{B}")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"<html>", "the answer is not JSON"),
        (b"[1]", r"with \[1\], expected an object"),
        (b"[" * 200_000, "the answer is not JSON"),
        (b"\xff\xfe\xfd", "the answer is not JSON"),
        (b" " * ((8 << 20) + 1), "the answer takes more than 8,388,608 bytes"),
    ],
)
def test_answers_that_are_no_json_are_refused(hub: Hub, raw: bytes, message: str) -> None:
    hub.raw = raw
    with pytest.raises(WeightsError, match=message):
        hub_folder(NAME)


@pytest.mark.parametrize(
    ("listed", "needed"),
    [
        (["model.onnx", "onnx/model.onnx", "model.safetensors", "config.json"], ["onnx/model.onnx", "config.json"]),
        (["model.onnx", "model.onnx.data", "model_q4.onnx", "a.keras"], ["model.onnx", "model.onnx.data"]),
        (
            ["onnx/model.onnx", "onnx/model.onnx_data", "onnx/model.onnx_data_1", "onnx/model_fp16.onnx"],
            ["onnx/model.onnx", "onnx/model.onnx_data", "onnx/model.onnx_data_1"],
        ),
        (
            ["onnx/model.onnx", "onnx/text_model.onnx", "onnx/vision_model.onnx", "preprocessor_config.json"],
            ["onnx/vision_model.onnx", "preprocessor_config.json"],
        ),
        (["net.keras", "open_clip_config.json", "x/other.keras"], ["net.keras", "open_clip_config.json"]),
        (
            [
                "assets/tokenizer/v.json",
                "config.json",
                "image_converter.json",
                "metadata.json",
                "model.weights.h5",
                "README.md",
                "task.json",
                "task.weights.h5",
            ],
            [
                "assets/tokenizer/v.json",
                "config.json",
                "image_converter.json",
                "metadata.json",
                "model.weights.h5",
                "task.json",
            ],
        ),
        (
            ["config.json", "model.weights.json", "model_00000.weights.h5", "model_00001.weights.h5", "x.h5"],
            ["config.json", "model.weights.json", "model_00000.weights.h5", "model_00001.weights.h5"],
        ),
    ],
)
def test_only_what_a_network_needs_is_fetched(listed: list[str], needed: list[str]) -> None:
    assert needed_files(listed) == needed


def test_a_repository_without_a_network_says_what_to_do(hub: Hub) -> None:
    hub.files = {"config.json": b"{}", "model.safetensors": b"x"}
    with pytest.raises(WeightsError) as caught:
        hub_folder(NAME)
    message = str(caught.value)
    assert message.startswith(
        "hf:owner/name: it holds no network that can be used here, but config.json, model.safetensors."
    )
    assert "optimum-cli export onnx" in message
    with pytest.raises(WeightsError, match=r"several .keras files \(a.keras, b.keras\)"):
        needed_files(["a.keras", "b.keras"])


def test_names_of_hubs_and_others() -> None:
    assert is_hub_name("hf:a/b")
    assert not is_hub_name("mobilenetv2")
    assert not is_hub_name("./hf:a/b")
