"""A cache that others may write, or have written, changes no answer: what it holds is made again."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import ROOT, given_away

from features import signing
from features.cache import cache_path, signed_file, write_signed
from features.errors import StoreError
from features.networks.finding import find_backbone
from features.networks.weights import WeightsFile, known_digest
from features.temporary import system_root, temporary_files_together

LIE = "f" * 64


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("BOTTLENECK_CACHE", str(folder))
    return folder


def test_what_is_written_is_read_again(cache: Path) -> None:
    write_signed(cache_path("memos", "a.json"), b"content")
    with signed_file(cache / "memos" / "a.json") as file:
        assert file.read() == b"content"
    assert [path.name for path in cache.rglob("*")] == ["memos", "a.json"]


def test_the_cache_is_used_whatever_the_umask_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the umask 002 and a group of many users, what a run wrote was refused by the next one."""
    monkeypatch.setenv("BOTTLENECK_CACHE", str(tmp_path / "new" / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other" / "config"))
    signing.user_key.cache_clear()
    before = os.umask(0)
    try:
        path = cache_path("memos", "a.json")
        write_signed(path, b"content")
    finally:
        os.umask(before)
    assert path.is_relative_to(tmp_path)
    assert cache_path("memos", "a.json") == path
    signing.user_key.cache_clear()
    with signed_file(path) as file:
        assert file.read() == b"content"
    signing.user_key.cache_clear()


@pytest.mark.parametrize("place", ["memos/b.json", "others/a.json"])
def test_a_file_under_the_name_of_another_is_not_believed(cache: Path, place: str) -> None:
    write_signed(cache / "memos" / "a.json", b"content")
    (cache / "others").mkdir()
    (cache / "memos" / "a.json").rename(cache / place)
    with pytest.raises(ValueError, match="does not carry this user's signature"), signed_file(cache / place):
        pass


@pytest.mark.parametrize("what", ["empty", "unsigned", "flipped", "longer", "another user's key"])
def test_a_file_without_a_valid_signature_is_not_believed(
    cache: Path, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache / "memos" / "a.json"
    if what == "another user's key":
        with monkeypatch.context() as patch:
            patch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config of another"))
            signing.user_key.cache_clear()
            write_signed(path, b"content")
        signing.user_key.cache_clear()
    else:
        write_signed(path, b"content")
        whole = path.read_bytes()
        damaged = {"empty": b"", "unsigned": b"content", "flipped": whole[:-1] + b"T", "longer": whole + b"\n"}
        path.write_bytes(damaged[what])
    with pytest.raises(ValueError, match="does not carry this user's signature"), signed_file(path):
        pass


def poison(cache: Path, backbone: object, file: WeightsFile) -> Path:
    """A memo that gives weights the digest of others, in the form in which it is kept."""
    [memo] = (cache / "digests").iterdir()
    with signed_file(memo) as stream:
        values = json.load(stream)
    write_signed(memo, json.dumps({**values, "digest": LIE}).encode())
    return memo


@pytest.mark.slow
def test_a_poisoned_memo_is_believed_in_ones_own_cache_only(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    from features.networks.backbones import build_backbone
    from features.networks.weights import load_weights, resolve_weights

    backbone = find_backbone("mobilenetv2-0.35")
    file = resolve_weights(backbone, "random")
    digest = load_weights(build_backbone(backbone, (32, 32)), backbone, file)
    assert known_digest(backbone, file) == digest
    memo = poison(cache, backbone, file)
    assert known_digest(backbone, file) == LIE  # signed by this user: there is nothing to find out
    memo.write_bytes(b"0" * 64 + memo.read_bytes()[64:])
    assert known_digest(backbone, file) is None
    poison_again = memo.read_bytes()
    write_signed(memo, poison_again[64:])
    cache.chmod(0o777)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert known_digest(backbone, file) is None
        assert load_weights(build_backbone(backbone, (32, 32)), backbone, file) == digest
        assert known_digest(backbone, file) == digest  # kept in the private folder
    [record] = caplog.records
    assert f"the cache {cache} is not used, because {cache} is writable by everyone" in record.getMessage()
    assert "Set BOTTLENECK_CACHE to a folder that only you can write" in record.getMessage()


@pytest.mark.slow
def test_a_private_folder_serves_one_process(cache: Path) -> None:
    cache.chmod(0o777)
    code = (
        "import logging; logging.basicConfig()\n"
        "from features.cache import *\n"
        "write_signed(cache_path('memos', 'a'), b'kept')\n"
        "with signed_file(cache_path('memos', 'a')) as file: assert file.read() == b'kept'\n"
        "print(cache_path(), oct(cache_path().stat().st_mode))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    folder, mode = done.stdout.split()
    assert mode == "0o40700"
    assert not Path(folder).exists()
    assert os.listdir(cache) == []
    assert done.stderr.count("\n") == 1
    assert "is writable by everyone" in done.stderr


@pytest.mark.parametrize("which", ["", "digests", "digests/a.json"])
def test_a_folder_or_file_of_another_user_is_not_used(
    cache: Path, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_signed(cache / "digests" / "a.json", b"{}")
    name = given_away(cache / which)
    with caplog.at_level(logging.WARNING):
        path = cache_path("digests", "a.json")
        assert cache_path("digests", "a.json") == path
        cache_path("digests", "b.json")
    assert path.parts[-2:] == ("digests", "a.json")
    assert not path.is_relative_to(cache)
    [record] = caplog.records
    assert f"because {cache / which} belongs to {name}" in record.getMessage()


def test_without_a_home_a_private_folder_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for variable in ("BOTTLENECK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    with caplog.at_level(logging.WARNING):
        assert cache_path("memos") == cache_path("memos")
    [record] = caplog.records
    assert "the cache has no home folder" in record.getMessage()


def test_without_any_temporary_folder_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(
        StoreError, match="no folder for temporary files that can be written; make /tmp writable, or set TMPDIR"
    ):
        system_root()
    with temporary_files_together():  # which helps where it can
        pass
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    monkeypatch.setenv("BOTTLENECK_CACHE", str(cache))
    with pytest.raises(StoreError, match="set TMPDIR"):
        cache_path("notes")
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    with pytest.raises(StoreError, match=r"and no folder can be made in .*file .*; set TMPDIR or BOTTLENECK_CACHE"):
        cache_path("notes")
