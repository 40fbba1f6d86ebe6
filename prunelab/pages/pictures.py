"""Pictures of samples for a report, as PNG inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch
from torch import Tensor

from prunelab.pages.page import Picture

LARGEST = 64
"""Pixels of a side, at most: larger images are made smaller, or a page would hold megabytes."""


def pictures(images: Tensor, captions: Sequence[str], alts: Sequence[str]) -> list[Picture]:
    """A picture of each image.

    Args:
        images: uint8 [N, C, H, W], or float of any range, scaled to the range of all of them; C of
            1 or 3 (of others the first channel is shown).
        captions, alts: a text of each.
    """
    if not len(images):
        return []
    pixels = _bytes(images)
    if pixels.shape[1] not in (1, 3):
        pixels = pixels[:, :1]
    return [
        Picture(_png(picture), caption, alt)
        for picture, caption, alt in zip(pixels, captions, alts, strict=True)
    ]


def extremes(scores: Tensor, labels: Tensor, label: int, *, count: int) -> tuple[Tensor, Tensor]:
    """Rows of a class with the lowest and with the highest scores, the most extreme first.

    NaN is left out; equal scores come in the order of rows. A class with fewer than twice
    `count` samples shows half of them on either side.
    """
    rows = ((labels == label) & scores.isfinite()).nonzero()[:, 0]
    ordered = rows[torch.argsort(scores[rows], stable=True)]
    count = min(count, max(1, len(ordered) // 2)) if len(ordered) else 0
    return ordered[:count], ordered.flip(0)[:count]


def _png(pixels: Tensor) -> str:
    """A data: URL of uint8 [1 or 3, H, W]."""
    from PIL import Image  # noqa: PLC0415

    array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    picture = Image.fromarray(array.contiguous().numpy())
    picture.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _bytes(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images
    low, high = images.amin(), images.amax()
    return ((images - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
