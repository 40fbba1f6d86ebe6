"""Pictures of samples for a report: strips of images as PNG inside the page."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import torch
from torch import Tensor

from prunelab.pages.page import Strip

TARGET = 40
GAP = 2


def strip(images: Tensor, *, note: str = "") -> Strip:
    """Images side by side, enlarged by a whole factor; an empty strip for none.

    Args:
        images: uint8 [N, C, H, W], or float of any range, scaled to its own; C of 1 or 3 (of
            others the first channel is shown).
        note: shown when a pointer rests on it.
    """
    from PIL import Image  # noqa: PLC0415

    if not len(images):
        return Strip("")
    pixels = _bytes(images)
    if pixels.shape[1] not in (1, 3):
        pixels = pixels[:, :1]
    factor = max(1, math.ceil(TARGET / max(pixels.shape[-2:])))
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    # The gap is transparent: the page may be light or dark.
    height, width = pixels.shape[-2:]
    canvas = np.zeros((height, len(pixels) * (width + GAP) - GAP, 4), np.uint8)
    for place, picture in enumerate(pixels.numpy()):
        left = place * (width + GAP)
        canvas[:, left : left + width, :3] = picture.transpose(1, 2, 0)
        canvas[:, left : left + width, 3] = 255
    file = io.BytesIO()
    Image.fromarray(canvas).save(file, format="PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return Strip(f"data:image/png;base64,{data}", alt=f"{len(pixels)} samples", note=note)


def extremes(scores: Tensor, labels: Tensor, label: int, *, count: int) -> tuple[Tensor, Tensor]:
    """Rows of a class with the lowest and with the highest scores, the most extreme first.

    NaN is left out; equal scores come in the order of rows. A class with fewer than twice
    `count` samples shows half of them on either side.
    """
    rows = ((labels == label) & scores.isfinite()).nonzero()[:, 0]
    ordered = rows[torch.argsort(scores[rows], stable=True)]
    count = min(count, max(1, len(ordered) // 2)) if len(ordered) else 0
    return ordered[:count], ordered.flip(0)[:count]


def _bytes(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images
    low, high = images.amin(), images.amax()
    return ((images - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
