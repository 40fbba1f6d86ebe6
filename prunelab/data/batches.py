"""From stored images to what a network is fed: order, augmentation, normalisation; numpy alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from prunelab.errors import DataError

Images = NDArray[np.uint8] | NDArray[np.float32]
"""[N, C, H, W]; bytes as pictures have them, or floats that are fed as they are."""

Integers = NDArray[np.int64]

_KEY = "preprocessing"


@dataclass(frozen=True)
class Preprocessing:
    """What turns a picture's bytes into a network's input: (x / 255 − mean) / std.

    The default's constants are fixed: a mean over everybody's images would be data that leave a
    client.

    Attributes:
        mean, std: one for each channel, or a single one for all, in shares of the full range.

    Raises:
        DataError: no value, numbers of values that differ, one that is not finite, or a
            deviation that is not positive.
    """

    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)

    def __post_init__(self) -> None:
        good = (
            len(self.mean) == len(self.std) > 0
            and all(math.isfinite(value) for value in (*self.mean, *self.std))
            and min(self.std) > 0
        )
        if not good:
            raise DataError(
                f"preprocessing: mean {self.mean} and std {self.std}; expected as many of both, "
                "all finite, and deviations above 0"
            )

    def normalization(self, channels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and deviation of every channel, float32 [channels].

        Raises:
            DataError: images of so many channels are not what it is for.
        """
        if len(self.mean) not in (1, channels):
            raise DataError(
                f"preprocessing is for {len(self.mean)} channels, the images have {channels}"
            )
        mean, std = (
            np.broadcast_to(np.asarray(values, np.float32), channels).copy()
            for values in (self.mean, self.std)
        )
        return mean, std

    def apply(self, images: Images) -> NDArray[np.float32]:
        """uint8 [..., C, H, W] -> float32 of the same shape; float images pass as they are.

        >>> Preprocessing().apply(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)).ravel()
        array([-2.,  2.], dtype=float32)
        """
        if images.dtype != np.uint8:
            return images.astype(np.float32, copy=False)
        mean, std = self.normalization(images.shape[-3])
        values = images.astype(np.float32)
        values /= np.float32(255)
        values -= mean[:, None, None]
        values /= std[:, None, None]
        return values

    def to_dict(self) -> dict[str, list[float]]:
        """As JSON has it."""
        return {name: list(values) for name, values in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """What `to_dict` gave.

        Raises:
            DataError: something else.
        """
        try:
            (mean, std) = (tuple(map(float, values[name])) for name in ("mean", "std"))
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"preprocessing {values!r}: expected lists of numbers called mean and std"
            ) from None
        return cls(mean, std)

    def to_metadata(self) -> dict[str, str]:
        """As a model's file carries it beside its weights."""
        return {_KEY: json.dumps(self.to_dict())}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Preprocessing:
        """What a model's file says of its input.

        Args:
            metadata: as `sparsemodel.load(path).metadata` has it.

        Raises:
            DataError: the file says nothing of it, or something else.

        >>> Preprocessing.from_metadata(Preprocessing().to_metadata())
        Preprocessing(mean=(0.5,), std=(0.25,))
        """
        if _KEY not in metadata:
            raise DataError(
                f"the model's file has no {_KEY!r} among its metadata {sorted(metadata)}: it comes "
                "from an earlier version or another program; use what its training used"
            )
        try:
            return cls.from_dict(json.loads(metadata[_KEY]))
        except ValueError as error:
            raise DataError(f"{_KEY} {metadata[_KEY]!r:.80}: {error}") from None


def batches(num_samples: int, *, batch_size: int, rng: np.random.Generator) -> Iterator[Integers]:
    """Shuffled index batches, int64; a last batch of one joins the batch before it.

    Batch norm cannot be trained on a single value, and no sample should be left out for that.

    >>> [len(batch) for batch in batches(9, batch_size=4, rng=np.random.default_rng(0))]
    [4, 5]
    """
    return parted(rng.permutation(num_samples), batch_size=batch_size)


def parted(order: Integers, *, batch_size: int) -> Iterator[Integers]:
    """Batches of an order of samples, of the sizes that `batches` have."""
    starts = range(0, batch_size * num_batches(len(order), batch_size=batch_size), batch_size)
    for start, end in pairwise([*starts, len(order)]):
        yield order[start:end]


def num_batches(num_samples: int, *, batch_size: int) -> int:
    """How many `batches` there are.

    >>> num_batches(9, batch_size=4)
    2
    """
    count = math.ceil(num_samples / batch_size)
    return count - 1 if count > 1 and num_samples - (count - 1) * batch_size == 1 else count


def augment(images: Images, *, rng: np.random.Generator) -> Images:
    """Random crop of the zero-padded image and random horizontal flip, drawn for each image.

    Args:
        images: [N, C, H, W]; the padding is H / 8 on every side, rounded up (4 for CIFAR's 32).
    """
    return cropped(images, draw_crops(len(images), height=images.shape[2], rng=rng))


def draw_crops(count: int, *, height: int, rng: np.random.Generator) -> Integers:
    """What `augment` draws for so many images: rows top, left and flip (0 or 1), [3, count]."""
    offsets = rng.integers(0, 2 * padding(height) + 1, size=(2, count))
    return np.stack([*offsets, rng.random(count) < 0.5])


def cropped(images: Images, crops: Integers) -> Images:
    """Images [N, C, H, W] cut and flipped as `draw_crops` says."""
    count, _, height, width = images.shape
    pad, (top, left, flip) = padding(height), crops
    padded = np.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = sliding_window_view(padded, (height, width), axis=(2, 3))
    cuts = np.ascontiguousarray(windows[np.arange(count), :, top, left])
    flipped = flip.astype(bool)
    cuts[flipped] = cuts[flipped, ..., ::-1]
    return cuts


def padding(height: int) -> int:
    """Rows and columns of zeros on every side of images of this height, before they are cut."""
    return math.ceil(height / 8)
