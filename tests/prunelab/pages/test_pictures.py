"""Pictures of samples, and which samples they are of."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image
from torch import Tensor

from prunelab.pages.pictures import LARGEST, extremes, pictures


def opened(source: str) -> Image.Image:
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    return Image.open(io.BytesIO(data))


def test_a_picture_has_its_pixels_and_its_texts() -> None:
    images = torch.arange(2 * 64).reshape(2, 1, 8, 8).to(torch.uint8)
    shown = pictures(images, ["7", "9"], ["sample 7", "sample 9"])
    assert [(p.caption, p.alt) for p in shown] == [("7", "sample 7"), ("9", "sample 9")]
    for number, picture in enumerate(shown):
        with opened(picture.source) as image:
            assert image.size == (8, 8)
            for row, column in ((0, 0), (3, 5), (7, 7)):
                assert image.getpixel((column, row)) == int(images[number, 0, row, column])
    assert pictures(images[:0], [], []) == []


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (torch.tensor([0, 10, 20]).reshape(1, 3, 1, 1).to(torch.uint8), (0, 10, 20)),
        (torch.tensor([5, 6, 7, 8]).reshape(1, 4, 1, 1).to(torch.uint8), 5),
        (torch.tensor([[-1.0, 3.0]]).reshape(1, 1, 1, 2), 0),
    ],
)
def test_colours_channels_and_ranges(images: Tensor, expected: object) -> None:
    """Three channels are colours, of four the first is shown, floats fill their range."""
    with opened(pictures(images, ["0"], [""])[0].source) as image:
        assert image.getpixel((0, 0)) == expected


def test_large_images_are_made_smaller() -> None:
    """A page holds hundreds of them: 512×256 pixels become 64×32."""
    images = torch.zeros(1, 3, 256, 512, dtype=torch.uint8)
    with opened(pictures(images, ["0"], [""])[0].source) as image:
        assert image.size == (LARGEST, LARGEST // 2)


def test_extremes_by_hand() -> None:
    """Class 1 holds rows 0, 2, 3, 5 with scores 4, NaN, 1, 2: lowest 3; highest 0."""
    scores = torch.tensor([4.0, 9.0, torch.nan, 1.0, -1.0, 2.0])
    labels = torch.tensor([1, 0, 1, 1, 0, 1])
    low, high = extremes(scores, labels, 1, count=5)
    assert (low.tolist(), high.tolist()) == ([3], [0])
    low, high = extremes(scores, labels, 7, count=5)
    assert (low.tolist(), high.tolist()) == ([], [])
