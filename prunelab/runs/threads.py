"""How torch computes for a while: with how many threads, and in which type by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def computing(threads: int) -> Iterator[None]:
    """So many threads inside, and float32 as torch's default type, whatever the process had.

    The bits of a result depend on both.
    """
    import torch  # noqa: PLC0415

    before, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_default_dtype(dtype)
