"""Text as sequences of tokens of one length."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunelab.errors import DataError

BATCH = 8  # sequences
_OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}


def read_text(path: str | Path) -> str:
    """The text of a file, UTF-8, which may be packed by xz or gzip.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"no such text file: {path}")
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            text: str = file.read()
    except (OSError, UnicodeDecodeError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path}: expected a text in UTF-8 ({error})") from None
    if not text.strip():
        raise DataError(f"{path} holds no text")
    return text


def sequences(text: str, tokenizer: Callable[..., Any], *, length: int) -> Tensor:
    """A text cut into sequences of so many tokens, one behind the other; the rest is left out.

    Returns:
        int64 [n, length].

    Raises:
        DataError: a length below 2, or a text shorter than one sequence.
    """
    if length < 2:
        raise DataError(f"sequences of {length} tokens predict nothing; expected 2 or more")
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    count = len(tokens) // length
    if not count:
        raise DataError(
            f"the text has {len(tokens)} tokens, less than one sequence of {length}; give a longer "
            "one, or shorter sequences"
        )
    return tokens[: count * length].reshape(count, length)


def parted(whole: Tensor, *, tested: float = 0.1) -> tuple[Tensor, Tensor]:
    """Sequences for calibration, and the last share of them for testing, one at least.

    Raises:
        DataError: a single sequence.
    """
    if len(whole) < 2:
        raise DataError(
            "a single sequence cannot be both looked at and tested on; give a longer text, or "
            "another one for testing"
        )
    end = len(whole) - max(1, round(tested * len(whole)))
    return whole[:end], whole[end:]


def both_sides(
    text: str, test: str, tokenizer: Callable[..., Any], *, length: int
) -> tuple[Tensor, Tensor]:
    """Sequences for calibration and for testing: of two texts, or the `parted` ones of one.

    Args:
        test: "": the last tenth of the other.
    """
    pool = sequences(text, tokenizer, length=length)
    return (pool, sequences(test, tokenizer, length=length)) if test else parted(pool)


def drawn(pool: Tensor, count: int, *, seed: int) -> Tensor:
    """So many sequences, drawn without replacement; all of them where there are no more."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return pool[order[:count].sort().values]


def in_batches(chosen: Tensor, *, size: int = BATCH) -> list[dict[str, Tensor]]:
    """Sequences as batches for a model."""
    return [{"input_ids": part} for part in chosen.split(size)]
