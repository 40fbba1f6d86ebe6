"""Files with a checksum inside, so that nothing is read but what was written.

Such a file holds `sha256:` and 32 hexadecimal digits: the SHA-256 of the file with zeros in their
place. Any format with room for a text can carry them: a key of JSON, a comment of TOML, the
metadata of safetensors and parquet. The first `sha256:` of a file is the one that counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

MARK, DIGITS = b"sha256:", 32
BLANK = MARK.decode() + "0" * DIGITS
"""What a text has before it is sealed."""

CHECKSUM, OF = "checksum", "of"
JSON = "json"


def seal(data: bytes, kind: str) -> bytes:
    """The same with its checksum in the place of `BLANK`.

    Args:
        kind: of file, or what comes before; no other is whole for those who ask for this one.

    >>> seal(f"a {BLANK} b".encode(), "")
    b'a sha256:95c4e27692628956b4931efecc58fe56 b'
    """
    start = data.index(BLANK.encode()) + len(MARK)
    assert start == data.index(MARK) + len(MARK), "another mark comes first"
    return data[:start] + _digits(data, start, kind) + data[start + DIGITS :]


def checksum(data: bytes) -> str:
    """The digits that a file carries; empty where there are none."""
    start = data.find(MARK) + len(MARK)
    return data[start : start + DIGITS].decode("ascii", "replace") if start >= len(MARK) else ""


def is_whole(data: bytes, kind: str) -> bool:
    """Whether the bytes are those that `seal` made."""
    start = data.find(MARK) + len(MARK)
    return start >= len(MARK) and data[start : start + DIGITS] == _digits(data, start, kind)


def read_sealed(path: Path, kind: str, *, error: type[ValueError], cure: str) -> bytes:
    """The bytes of a sealed file.

    Args:
        cure: what to do where the file is damaged.

    Raises:
        FileNotFoundError: there is no file.
        error: it cannot be read, or is not what was written.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror})") from None
    if not is_whole(data, kind):
        raise error(
            f"{path}: damaged, changed since it was written, or of another release: its checksum "
            f"does not fit; {cure}"
        )
    return data


def sealed_json(of: str, values: Mapping[str, Any]) -> bytes:
    """A JSON object with its checksum.

    Args:
        of: what kind of file it is, and what it belongs to.
    """
    assert not {CHECKSUM, OF} & values.keys()
    text = json.dumps({CHECKSUM: BLANK, OF: of, **values}, indent=1) + "\n"
    return seal(text.encode(), JSON)


def read_sealed_json(path: Path, *, of: str, error: type[ValueError], cure: str) -> dict[str, Any]:
    """The values that `sealed_json` was given.

    Raises:
        FileNotFoundError: there is no file.
        error: it is damaged, or belongs to something else.
    """
    values: dict[str, Any] = json.loads(read_sealed(path, JSON, error=error, cure=cure))
    found = values.pop(OF)
    if found != of:
        raise error(f"{path}: expected {of!r}, found {found!r}; {cure}")
    del values[CHECKSUM]
    return values


def _digits(data: bytes, start: int, kind: str) -> bytes:
    """The checksum of data whose digits begin at `start`."""
    sha, view = sha256(kind.encode()), memoryview(data)
    for part in (view[:start], b"0" * DIGITS, view[start + DIGITS :]):
        sha.update(part)
    return sha.hexdigest()[:DIGITS].encode()
