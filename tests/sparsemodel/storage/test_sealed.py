"""Checksums inside files: what was sealed is whole, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.sealed import (
    BLANK,
    checksum,
    is_whole,
    read_sealed,
    read_sealed_json,
    seal,
    sealed_json,
)
from sparsemodel.storage.state_file import load_state, save_state


@given(before=st.binary(max_size=20), after=st.binary(max_size=20), kind=st.text(max_size=5))
def test_what_was_sealed_is_whole(before: bytes, after: bytes, kind: str) -> None:
    data = seal(before.replace(b"sha", b"") + BLANK.encode() + after, kind)
    assert is_whole(data, kind)
    assert not is_whole(data, kind + "x")
    assert len(checksum(data)) == 32


def test_a_checksum_by_hand() -> None:
    """printf 'kinda sha256:%032d b' 0 | sha256sum: the digits stand where the zeros were."""
    assert seal(f"a {BLANK} b".encode(), "kind") == b"a sha256:" + BY_HAND + b" b"


BY_HAND = b"1c8b813b9d76879058efa5a15cca1d9a"


def test_every_flipped_bit_and_every_cut_is_found() -> None:
    data = seal(f"x = 1  # {BLANK}\ny = 2\n".encode(), "toml")
    for place in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        assert not is_whole(bytes(damaged), "toml")
    for length in range(len(data)):
        assert not is_whole(data[:length], "toml")
        assert not is_whole(data[:length] + b"\n" + data[length:], "toml")
    assert not is_whole(b"", "toml")


def test_text_that_looks_like_a_checksum_is_a_text(tmp_path: Path) -> None:
    """Whatever a caller stores beside: the first checksum of a file is its own."""
    for text in (BLANK, "sha256:", "sha256:0", f"{BLANK}{BLANK}"):
        path = tmp_path / "file"
        path.write_bytes(sealed_json("thing", {"a": text, text: 1}))
        values = read_sealed_json(path, of="thing", error=ValueError, cure="x")
        assert values == {"a": text, text: 1}
        state = SparseState({text: np.arange(3, dtype=np.float32)})
        save_state(path, state, metadata={text: text})
        found, metadata = load_state(path)
        assert metadata == {text: text}
        assert found.values.keys() == {text}


def test_files_that_cannot_be_read_are_clear_errors(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        read_sealed(path, "x", error=ValueError, cure="make it again")
    with pytest.raises(FileNotFoundError):
        read_sealed(path / "below", "x", error=ValueError, cure="make it again")
    path.mkdir()
    with pytest.raises(KeyError, match="cannot be read"):
        read_sealed(path, "x", error=KeyError, cure="make it again")  # type: ignore[arg-type]
    path.rmdir()
    path.write_bytes(sealed_json("cell a", {"accuracy": 0.5}))
    assert json.loads(path.read_bytes())["accuracy"] == 0.5
    with pytest.raises(ValueError, match=r"file: expected 'cell b', found 'cell a'; make it again"):
        read_sealed_json(path, of="cell b", error=ValueError, cure="make it again")
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"file: damaged, .*; make it again"):
        read_sealed_json(path, of="cell a", error=ValueError, cure="make it again")
