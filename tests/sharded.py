"""Pictures in files of shards, for tests of what reads them."""

from __future__ import annotations

import ctypes
import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from prunelab.data.arrays import Array

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def png(image: Array, *, level: int = 6) -> bytes:
    """A file of uint8 [H, W] or [H, W, 3]; level 0: not compressed, and fast to read."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def images(count: int, shape: tuple[int, ...] = (3, 6, 5), seed: int = 0) -> Array:
    """Random pictures, uint8 [N, C, H, W]."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, *shape), dtype=np.uint8)


def cells_of(pictures: Array) -> list[bytes]:
    """Their files."""
    return [png(np.moveaxis(picture, 0, -1).squeeze(-1 if len(picture) == 1 else ()))
            for picture in pictures]  # fmt: skip


def write_parquet(
    path: Path, cells: Sequence[Any], labels: Any, *, group: int = 1024, nested: bool = False
) -> Path:
    """A parquet file with so many rows a group; nested: bytes and path, as datasets has them."""
    if nested:
        cells = [{"bytes": cell, "path": "x.png"} for cell in cells]
    table = pa.table({"label": labels, "img": cells})
    pq.write_table(table, path, row_group_size=group)
    return path


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], *, mode: str = "w") -> Path:
    """A tar file of (name, content)."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def members_of(cells: Sequence[bytes], labels: Iterable[Any]) -> list[tuple[str, bytes]]:
    """KEY.png and KEY.cls of each sample."""
    found = []
    for number, (cell, label) in enumerate(zip(cells, labels, strict=True)):
        found += [(f"{number:05d}.png", cell), (f"{number:05d}.cls", str(label).encode())]
    return found


def write_shards(
    folder: Path, kind: str, pictures: Array, labels: Sequence[Any], ends: Sequence[int],
    *, group: int = 1024, nested: bool = False,
) -> Path:  # fmt: skip
    """Shards that end at these samples."""
    folder.mkdir(parents=True, exist_ok=True)
    cells, start = cells_of(pictures), 0
    for number, end in enumerate(ends):
        path = folder / f"train-{number:06d}.{kind}"
        if kind == "tar":
            write_tar(path, members_of(cells[start:end], labels[start:end]))
        else:
            write_parquet(path, cells[start:end], labels[start:end], group=group, nested=nested)
        start = end
    return folder


def peak_of_scoring(pattern: str, *, side: int) -> tuple[int, int]:
    """Score pictures of that many pixels a side: peak above what was resident before, and count.

    For a process of its own; imports are paid before the first look.
    """
    import pyarrow.parquet  # noqa: F401, PLC0415
    import torch  # noqa: PLC0415
    from torch import nn  # noqa: PLC0415

    import datapruning  # noqa: PLC0415
    from benchmarks.process_memory import reset_high_water, resident  # noqa: PLC0415

    torch.set_num_threads(1)
    # Large arrays go back to the system when they are freed, so that the peak is of what is in use.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 18)
    pa.set_memory_pool(pa.system_memory_pool())
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3 * (side // 8) ** 2, 3)).eval()
    model(torch.zeros(256, 3, side, side))
    reset_high_water()
    before = resident("VmRSS")
    table = datapruning.score(datapruning.stream(pattern), model=model, method="el2n")
    return resident("VmHWM") - before, len(table)
