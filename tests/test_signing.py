"""Whose a file is, and the user's key: what others could have written is not believed."""

from __future__ import annotations

import grp
import hashlib
import hmac
import logging
import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, given_away

from features import signing
from features.ownership import foreign


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A configuration folder without a key, and a process that has not read one."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    signing.user_key.cache_clear()
    yield tmp_path / "config" / "bottleneck-features"
    signing.user_key.cache_clear()


# --- whose file --------------------------------------------------------------------------------------------
def test_a_folder_below_tmp_is_ours_if_it_belongs_to_us(tmp_path: Path) -> None:
    sticky = tmp_path / "tmp"
    sticky.mkdir()
    sticky.chmod(0o1777)
    (sticky / "mine").mkdir(mode=0o700)
    assert foreign(sticky / "mine") == ""
    assert foreign(sticky / "not yet there" / "deeper") == ""
    assert foreign(sticky) == f"{sticky} is writable by everyone"  # its own files could be anybody's


def test_without_the_sticky_bit_others_may_exchange_the_folder(tmp_path: Path) -> None:
    (tmp_path / "open" / "mine").mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    assert foreign(tmp_path / "open" / "mine") == f"{tmp_path / 'open'} is writable by everyone"


def test_a_group_may_write_if_this_user_is_alone_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(0o775)
    user, group = pwd.getpwuid(os.geteuid()).pw_name, (tmp_path / "folder").stat().st_gid
    others = f"{tmp_path / 'folder'} is writable by the group"
    for name, members, answer in [
        (user, [], ""),
        (user, [user], ""),
        (user, [user, "somebody"], f"{others} {user}"),
        ("staff", [], f"{others} staff"),  # the first group of every user, which lists none
    ]:
        entry = grp.struct_group((name, "x", group, members))
        monkeypatch.setattr(grp, "getgrgid", lambda number, entry=entry: entry)
        assert foreign(tmp_path / "folder" / "file") == answer


@pytest.mark.parametrize("which", ["folder", "above", "file"])
def test_what_belongs_to_another_user_is_foreign(tmp_path: Path, which: str) -> None:
    (tmp_path / "above" / "folder").mkdir(parents=True)
    (tmp_path / "above" / "folder" / "file").write_text("")
    place = {"above": tmp_path / "above", "folder": tmp_path / "above" / "folder"}.get(
        which, tmp_path / "above" / "folder" / "file"
    )
    assert foreign(tmp_path / "above" / "folder" / "file") == ""
    name = given_away(place)
    assert foreign(tmp_path / "above" / "folder" / "file") == f"{place} belongs to {name}"


def test_links_are_followed_and_their_folders_looked_at(tmp_path: Path) -> None:
    for name in ("target", "safe", "open"):
        (tmp_path / name).mkdir()
    (tmp_path / "open" / "second").symlink_to(tmp_path / "target")
    (tmp_path / "safe" / "first").symlink_to("../open/second")
    assert foreign(tmp_path / "safe" / "first" / "file") == ""
    (tmp_path / "open").chmod(0o777)  # the link in the middle could be pointed elsewhere
    assert foreign(tmp_path / "safe" / "first" / "file") == f"{tmp_path}/safe/../open is writable by everyone"
    (tmp_path / "safe" / "circle").symlink_to("circle")
    assert "cannot be looked at" in foreign(tmp_path / "safe" / "circle")
    (tmp_path / "target").chmod(0o1777)
    (tmp_path / "safe" / "direct").symlink_to(tmp_path / "target")
    assert foreign(tmp_path / "safe" / "direct") == f"{tmp_path / 'target'} is writable by everyone"


# --- the key ----------------------------------------------------------------------------------------------
def test_a_signature_is_the_hmac_of_purpose_and_data_with_the_kept_key(config: Path) -> None:
    made = signing.signature("weights", "memo a")
    key = (config / "key").read_bytes()
    assert len(key) == 32
    message = (6).to_bytes(8, "big") + b"memo a" + b"weights"
    assert made == hmac.new(key, message, hashlib.sha256).hexdigest()
    assert stat.S_IMODE((config / "key").stat().st_mode) == 0o600
    assert os.listdir(config) == ["key"]
    assert signing.is_signed(b"weights", "memo a", made)
    assert not signing.is_signed("weights", "memo b", made)  # another purpose
    assert not signing.is_signed("a" + "weights", "memo ", made)  # the border between the two is signed, too
    assert not signing.is_signed("weightz", "memo a", made)
    assert not signing.is_signed("weights", "memo a", "")
    assert not signing.is_signed("weights", "memo a", "é\udc80")


@pytest.mark.slow
def test_processes_that_start_together_agree_on_the_key(config: Path) -> None:
    code = "from features.signing import signature; print(signature('x', 'y'))"
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    assert {process.communicate()[0].strip() for process in started} == {signing.signature("x", "y")}
    assert os.listdir(config) == ["key"]


def damage(config: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config.mkdir(parents=True)
    if what == "folder is a file":
        config.rmdir()
        config.write_text("")
    elif what == "folder is open":
        config.chmod(0o777)
    elif what == "no home":
        monkeypatch.delenv("XDG_CONFIG_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))
    else:
        (config / "key").write_bytes(b"k" * (8 if what == "short" else 32))
        (config / "key").chmod(0o644 if what == "readable" else 0o600)
        if what == "somebody else's":
            given_away(config / "key")


@pytest.mark.parametrize(
    "what", ["folder is a file", "folder is open", "no home", "short", "readable", "somebody else's"]
)
def test_a_key_that_is_not_safe_is_not_used_and_one_line_says_so(
    config: Path, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    damage(config, what, monkeypatch)
    with caplog.at_level(logging.WARNING):
        made = signing.signature("x", "y")
        assert signing.is_signed("x", "y", made)
    message = (1).to_bytes(8, "big") + b"yx"
    assert made != hmac.new(b"k" * 32, message, hashlib.sha256).hexdigest()
    [record] = caplog.records
    assert "XDG_CONFIG_HOME" in record.getMessage()
    assert "\n" not in record.getMessage()
    signing.user_key.cache_clear()  # the next process
    assert not signing.is_signed("x", "y", made)
