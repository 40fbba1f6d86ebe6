"""Strips of pictures, and which pictures they hold."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image

from prunelab.pages.pictures import extremes, strip


def test_strip_holds_the_pictures_pixel_for_pixel() -> None:
    """Two 8×8 pictures, five times as large (40), a gap of two: 82 wide; gap and its alpha 0."""
    images = torch.arange(2 * 64).reshape(2, 1, 8, 8).to(torch.uint8)
    data = strip(images).picture.removeprefix("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.size == (82, 40)
        for number, left in ((0, 0), (1, 42)):
            for row, column in ((0, 0), (3, 5), (7, 7)):
                pixel = picture.getpixel((left + 5 * column + 2, 5 * row + 2))
                assert pixel == (*[int(images[number, 0, row, column])] * 3, 255)
        assert picture.getpixel((40, 20))[3] == 0
    assert not strip(images[:0]).picture


def test_extremes_by_hand() -> None:
    """Class 1 holds rows 0, 2, 3, 5 with scores 4, NaN, 1, 2: lowest 3; highest 0."""
    scores = torch.tensor([4.0, 9.0, torch.nan, 1.0, -1.0, 2.0])
    labels = torch.tensor([1, 0, 1, 1, 0, 1])
    low, high = extremes(scores, labels, 1, count=5)
    assert (low.tolist(), high.tolist()) == ([3], [0])
    low, high = extremes(scores, labels, 7, count=5)
    assert (low.tolist(), high.tolist()) == ([], [])
