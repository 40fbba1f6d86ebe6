"""Batches, normalisation and augmentation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunelab.data.batches import augment, batches, prepare


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_prepare_uses_fixed_constants() -> None:
    """(51 / 255 − 0.5) / 0.25 = −1.2; float images are taken as prepared."""
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    torch.testing.assert_close(prepare(images).flatten(), torch.tensor([-2.0, -1.2, 2.0]))
    values = torch.tensor([0.25, 300.0], dtype=torch.float64)
    assert prepare(values).dtype == torch.float32
    assert prepare(values).tolist() == [0.25, 300.0]


@given(st.integers(0, 40), st.integers(2, 12), st.integers(0, 9))
def test_batches_are_a_shuffle_without_a_lonely_sample(
    num_samples: int, batch_size: int, seed: int
) -> None:
    found = list(batches(num_samples, batch_size=batch_size, generator=seeded(seed)))
    assert sorted(torch.cat(found).tolist() if found else []) == list(range(num_samples))
    sizes = [len(batch) for batch in found]
    assert all(size == batch_size for size in sizes[:-1])
    assert all(2 <= size <= batch_size + 1 for size in sizes) or num_samples == 1
    again = list(batches(num_samples, batch_size=batch_size, generator=seeded(seed)))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_batches_are_shuffled_anew_with_the_same_generator() -> None:
    generator = seeded()
    first, second = (
        torch.cat(list(batches(50, batch_size=8, generator=generator))) for _ in range(2)
    )
    assert not torch.equal(first, second)
    assert first.tolist() != list(range(50))


@pytest.mark.parametrize(
    ("shape", "pad"), [((120, 3, 32, 32), 4), ((120, 1, 8, 8), 1), ((120, 2, 28, 20), 4)]
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augment_equals_a_loop_over_images(
    shape: tuple[int, ...], pad: int, dtype: torch.dtype
) -> None:
    images = torch.randint(1, 256, shape, generator=seeded(1), dtype=torch.uint8).to(dtype)
    result = augment(images, generator=seeded(2))
    assert result.shape == images.shape
    assert result.dtype == dtype
    generator = seeded(2)
    tops, lefts = torch.randint(0, 2 * pad + 1, (2, shape[0]), generator=generator)
    flips = torch.rand(shape[0], generator=generator) < 0.5
    assert set(tops.tolist()) == set(lefts.tolist()) == set(range(2 * pad + 1))
    height, width = shape[2:]
    for image, found, top, left, flip in zip(images, result, tops, lefts, flips, strict=True):
        padded = torch.zeros(shape[1], height + 2 * pad, width + 2 * pad, dtype=dtype)
        padded[:, pad : pad + height, pad : pad + width] = image
        crop = padded[:, top : top + height, left : left + width]
        assert torch.equal(found, crop.flip(2) if flip else crop)
