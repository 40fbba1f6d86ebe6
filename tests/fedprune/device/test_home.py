"""A device's home: keys that are never replaced, a profile that is checked when it is read."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedprune.device.home import PRIVATE, PROFILE, PUBLIC, Profile, make_home, own_data, parse_bytes
from fedprune.errors import ConfigError
from prunelab.errors import RunError


def test_a_home_has_a_pair_of_keys_and_the_profile(tmp_path: Path) -> None:
    home, profile = tmp_path / "home", Profile(budget=10**8, threads=2, data="/data", client=3)
    public = make_home(home, profile)
    private = load_ssh_private_key((home / PRIVATE).read_bytes(), None)
    text = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    assert public == home / PUBLIC
    assert public.read_bytes() == text
    assert load_ssh_public_key(text)
    assert stat.S_IMODE((home / PRIVATE).stat().st_mode) == 0o600
    assert Profile.read(home) == profile


def test_a_second_init_refuses_and_force_leaves_the_keys(tmp_path: Path) -> None:
    make_home(tmp_path, Profile(client=1))
    before = (tmp_path / PRIVATE).read_bytes()
    with pytest.raises(RunError, match="--force replaces its profile"):
        make_home(tmp_path, Profile(client=2))
    assert Profile.read(tmp_path).client == 1
    make_home(tmp_path, Profile(client=2), force=True)
    assert Profile.read(tmp_path).client == 2
    assert (tmp_path / PRIVATE).read_bytes() == before


def test_an_init_that_was_cut_short_is_completed(tmp_path: Path) -> None:
    """The public key belongs to the private one that is there."""
    make_home(tmp_path, Profile())
    private, public = ((tmp_path / name).read_bytes() for name in (PRIVATE, PUBLIC))
    (tmp_path / PUBLIC).unlink()
    (tmp_path / PROFILE).unlink()
    make_home(tmp_path, Profile())
    assert (tmp_path / PRIVATE).read_bytes() == private
    assert (tmp_path / PUBLIC).read_bytes() == public


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("budgt = 3", r"unknown 'budgt'; did you mean 'budget'\?"),
        ('threads = "two"', r"threads: expected int, got 'two'"),
        ("client = true", r"client: expected int, got True"),
        ("threads = -1", r"threads: expected 0 or more, got -1"),
        ('budget = "12 parsecs"', r"no number of bytes"),
        ("budget = ", r"no TOML"),
    ],
)
def test_a_profile_is_refused_in_words(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / PROFILE).write_text(text)
    with pytest.raises(ConfigError, match=says):
        Profile.read(tmp_path)


def test_a_profile_may_give_its_budget_in_units(tmp_path: Path) -> None:
    (tmp_path / PROFILE).write_text('budget = "1.5MiB"')
    assert Profile.read(tmp_path).budget == 3 * 2**19


def test_no_home_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="fedprune device init"):
        Profile.read(tmp_path)


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1.MB", "12 parsecs", "1e9"])
def test_other_words_are_no_bytes(text: str) -> None:
    with pytest.raises(ConfigError, match="no number of bytes"):
        parse_bytes(text)


def test_own_data_are_a_path_or_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert own_data("mine") == str(tmp_path / "mine")
    assert own_data("module:function") == "module:function"
    with pytest.raises(ConfigError, match="no such folder"):
        own_data("yours")
