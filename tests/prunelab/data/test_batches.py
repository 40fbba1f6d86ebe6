"""Batches, normalisation and augmentation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunelab.data import tensors
from prunelab.data.batches import Preprocessing, augment, batches, cropped, draw_crops
from prunelab.data.tensors import augmented, prepare
from prunelab.errors import DataError
from prunelab.runs.seeds import rng


def every_byte(channels: int) -> np.ndarray:  # type: ignore[type-arg]
    """[2, channels, 16, 16]: all values in each channel, forwards and backwards."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    return np.stack([np.stack([image] * channels) for image in (ramp, ramp[::-1])])


def test_preprocessing_uses_fixed_constants() -> None:
    """(51 / 255 − 0.5) / 0.25 = −1.2; float images are taken as prepared."""
    images = np.array([0, 51, 255], np.uint8).reshape(3, 1, 1, 1)
    found = Preprocessing().apply(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.ravel(), [-2.0, -1.2, 2.0], rtol=1e-6)
    values = np.array([0.25, 300.0], np.float32).reshape(2, 1, 1, 1)
    assert Preprocessing().apply(values) is values
    doubles = torch.tensor([0.25, 300.0], dtype=torch.float64)
    assert prepare(doubles).dtype == torch.float32
    assert prepare(doubles).tolist() == [0.25, 300.0]


@pytest.mark.parametrize(
    "preprocessing", [Preprocessing(), Preprocessing((0.4914, 0.4822, 0.4465), (0.2, 0.19, 0.21))]
)
def test_torch_prepares_to_the_same_bits(preprocessing: Preprocessing) -> None:
    images = every_byte(3)
    found = prepare(torch.from_numpy(images), preprocessing=preprocessing)
    assert np.array_equal(found.numpy(), preprocessing.apply(images))
    stacked = prepare(torch.from_numpy(images)[None], preprocessing=preprocessing)
    assert torch.equal(stacked[0], found)


def test_every_channel_has_its_own_constants() -> None:
    """Bytes 255 with means 0 and 0.5, deviations 1 and 0.25: 1 and 2."""
    preprocessing = Preprocessing((0.0, 0.5), (1.0, 0.25))
    images = np.full((1, 2, 1, 1), 255, np.uint8)
    assert preprocessing.apply(images).ravel().tolist() == [1.0, 2.0]
    mean, std = preprocessing.normalization(2)
    assert (mean.tolist(), std.tolist()) == ([0.0, 0.5], [1.0, 0.25])
    assert mean.dtype == std.dtype == np.float32
    mean, std = Preprocessing().normalization(3)
    assert (mean.tolist(), std.tolist()) == ([0.5] * 3, [0.25] * 3)
    with pytest.raises(DataError, match="for 2 channels, the images have 3"):
        preprocessing.normalization(3)


def test_preprocessing_travels_as_json() -> None:
    preprocessing = Preprocessing((0.1, 0.7), (0.3, 1.0 / 3))
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing
    for wrong in ({}, {"mean": [0.5]}, {"mean": 0.5, "std": 0.25}, {"mean": ["x"], "std": [1]}):
        with pytest.raises(DataError, match="expected lists of numbers called mean and std"):
            Preprocessing.from_dict(wrong)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((), ()),
        ((0.5,), (0.25, 0.25)),
        ((0.5,), (0.0,)),
        ((math.nan,), (1.0,)),
        ((0,), (math.inf,)),
    ],
)
def test_constants_that_cannot_be_are_refused(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    with pytest.raises(DataError, match="expected as many of both, all finite, and deviations"):
        Preprocessing(mean, std)


@given(st.integers(0, 40), st.integers(2, 12), st.integers(0, 9))
def test_batches_are_a_shuffle_without_a_lonely_sample(
    num_samples: int, batch_size: int, seed: int
) -> None:
    found = list(batches(num_samples, batch_size=batch_size, rng=rng(seed)))
    assert all(batch.dtype == np.int64 for batch in found)
    assert sorted(np.concatenate(found).tolist() if found else []) == list(range(num_samples))
    sizes = [len(batch) for batch in found]
    assert all(size == batch_size for size in sizes[:-1])
    assert all(2 <= size <= batch_size + 1 for size in sizes) or num_samples == 1
    again = list(batches(num_samples, batch_size=batch_size, rng=rng(seed)))
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


def test_batches_are_shuffled_anew_with_the_same_generator() -> None:
    random = rng(0)
    first, second = (
        np.concatenate(list(batches(50, batch_size=8, rng=random))).tolist() for _ in range(2)
    )
    assert first != second
    assert first != list(range(50))


@pytest.mark.parametrize(
    ("shape", "pad"), [((120, 3, 32, 32), 4), ((120, 1, 8, 8), 1), ((120, 2, 28, 20), 4)]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_augment_equals_a_loop_over_images(
    shape: tuple[int, ...], pad: int, dtype: type[np.uint8] | type[np.float32]
) -> None:
    images = rng(1).integers(1, 256, shape, dtype=np.uint8).astype(dtype)
    before = images.copy()
    result = augment(images, rng=rng(2))
    assert np.array_equal(images, before)
    assert result.shape == images.shape
    assert result.dtype == dtype
    assert result.flags.c_contiguous
    assert torch.equal(augmented(torch.from_numpy(images), rng=rng(2)), torch.from_numpy(result))
    crops = draw_crops(len(images), height=shape[2], rng=rng(2))
    assert np.array_equal(cropped(images, crops), result)
    on_device = tensors.cropped(torch.from_numpy(images), torch.from_numpy(crops))
    assert torch.equal(on_device, torch.from_numpy(result))
    assert on_device.is_contiguous(memory_format=torch.channels_last)
    random = rng(2)
    tops, lefts = random.integers(0, 2 * pad + 1, (2, shape[0]))
    flips = random.random(shape[0]) < 0.5
    assert set(tops.tolist()) == set(lefts.tolist()) == set(range(2 * pad + 1))
    assert 0 < flips.sum() < len(flips)
    height, width = shape[2:]
    for image, found, top, left, flip in zip(images, result, tops, lefts, flips, strict=True):
        padded = np.zeros((shape[1], height + 2 * pad, width + 2 * pad), dtype)
        padded[:, pad : pad + height, pad : pad + width] = image
        crop = padded[:, top : top + height, left : left + width]
        assert np.array_equal(found, crop[:, :, ::-1] if flip else crop)
