"""Training samples as scores see them: rows with stable ids, read in batches by row number."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from prunelab.data.datasets import ImageSet, fingerprint
from prunelab.data.tensors import augmented, prepare
from prunelab.errors import DataError


class Samples(Protocol):
    """What a score reads. A batch is whatever the task understands; rows come back in order.

    Attributes:
        ids: int64 [N], unique: the name of a sample in tables, whatever its row.
        labels: int64 [N], or None where samples have no class.
        fingerprint: hexadecimal digits that name the data.
    """

    ids: Tensor

    @property
    def fingerprint(self) -> str: ...

    @property
    def labels(self) -> Tensor | None: ...

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor) -> Any:
        """The samples of these rows (int64 [B]), on the CPU, never augmented."""
        ...


@runtime_checkable
class Augmentable(Protocol):
    """Samples that training may vary; scores never do."""

    def augmented_batch(self, rows: Tensor, *, rng: np.random.Generator) -> Any:
        """As `Samples.batch`, each sample changed at random."""
        ...


class ImageSamples:
    """Labelled images in memory; a batch is (float32 [B, C, H, W], int64 [B]).

    Args:
        images: uint8 or float32 [N, C, H, W]; or what else a network takes, [N, ...].
        labels: int64 [N].
        ids: int64 [N]; by default the row numbers.

    Raises:
        DataError: lengths differ, or ids repeat.
    """

    labels: Tensor

    def __init__(self, images: Tensor, labels: Tensor, *, ids: Tensor | None = None) -> None:
        self.images, self.labels = images, labels
        self.ids = torch.arange(len(labels)) if ids is None else ids
        check_ids(self.ids, len(images), len(labels))

    @cached_property
    def fingerprint(self) -> str:
        """Of images and labels, computed when first asked for."""
        return fingerprint(self.images, self.labels)

    @classmethod
    def of(cls, dataset: ImageSet) -> ImageSamples:
        """The training side of a data set."""
        return cls(dataset.train_images, dataset.train_labels)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return prepare(self.images[rows]), self.labels[rows]

    def augmented_batch(self, rows: Tensor, *, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A batch of random crops and flips, drawn for each image (see `augment`)."""
        return prepare(augmented(self.images[rows], rng=rng)), self.labels[rows]


class TokenSamples:
    """Tokenised texts in memory; a batch is a dict as transformers' models take it.

    Batches are cut at their longest text. Of a classification data set `targets` are the labels,
    [N]; of a causal language model they are token ids [N, T], −100 where no loss is taken (the
    prompt and the padding).

    Args:
        input_ids: int64 [N, T], padded on the right.
        attention_mask: int64 [N, T], 1 at tokens.
        targets: int64 [N] or [N, T].
        ids: int64 [N]; by default the row numbers.

    Raises:
        DataError: shapes differ, or ids repeat.
    """

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        targets: Tensor,
        *,
        ids: Tensor | None = None,
    ) -> None:
        if input_ids.shape != attention_mask.shape or targets.shape not in (
            input_ids.shape,
            input_ids.shape[:1],
        ):
            raise DataError(
                f"input_ids are {tuple(input_ids.shape)}, attention_mask "
                f"{tuple(attention_mask.shape)}, targets {tuple(targets.shape)}; expected "
                "[N, T], [N, T], and [N] or [N, T]"
            )
        self.input_ids, self.attention_mask, self.targets = input_ids, attention_mask, targets
        self.ids = torch.arange(len(input_ids)) if ids is None else ids
        check_ids(self.ids, len(input_ids), len(targets))
        self.labels = targets if targets.dim() == 1 else None

    @cached_property
    def fingerprint(self) -> str:
        """Of tokens and targets, computed when first asked for."""
        return fingerprint(self.input_ids, self.attention_mask, self.targets)

    def __len__(self) -> int:
        return len(self.input_ids)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        mask = self.attention_mask[rows]
        length = max(1, int(mask.sum(1).max()))
        targets = self.targets[rows]
        return {
            "input_ids": self.input_ids[rows, :length],
            "attention_mask": mask[:, :length],
            "labels": targets if targets.dim() == 1 else targets[:, :length],
        }


def sizes(samples: Samples) -> tuple[int | None, tuple[int, ...] | None]:
    """Number of classes, and the shape of one image; None where samples have none."""
    num_classes = None if samples.labels is None else int(samples.labels.max()) + 1
    batch = samples.batch(torch.zeros(1, dtype=torch.int64))
    shape = tuple(batch[0].shape[1:]) if isinstance(batch, tuple) else None
    return num_classes, shape


def check_ids(ids: Tensor, *lengths: int) -> None:
    """Raise DataError unless there is one id a sample and none repeats."""
    if ids.dtype != torch.int64 or any(length != len(ids) for length in lengths):
        raise DataError(
            f"expected one int64 id for each sample; got {len(ids)} of {ids.dtype} for "
            f"{', '.join(map(str, lengths))} samples"
        )
    unique, counts = ids.unique(return_counts=True)
    if len(unique) != len(ids):
        raise DataError(f"sample id {int(unique[counts > 1][0])} occurs more than once")
