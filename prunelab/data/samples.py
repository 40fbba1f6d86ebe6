"""Training samples as scores see them: rows with stable ids, read in batches by row number."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from prunelab.data.batches import Integers, parted
from prunelab.data.checked import (
    checked,
    checked_images,
    checked_labels,
    checked_targets,
    whole_numbers,
)
from prunelab.data.datasets import ImageSet, fingerprint
from prunelab.data.tensors import augmented, prepare
from prunelab.errors import DataError

NO_LOSS = -100
"""The target of a token whose loss is not taken, as transformers and torch have it."""


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


@runtime_checkable
class Ordered(Protocol):
    """Samples that are read fast in some orders alone."""

    def training_order(self, rows: Tensor, *, rng: np.random.Generator) -> Integers:
        """All places in `rows`, int64 [B], in a random order that is read fast."""
        ...


class Pairs:
    """Samples that are stored as (inputs, targets), of which a batch has the inputs as floats."""

    def raw(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these rows as they are stored: pictures as bytes."""
        raise NotImplementedError

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `Samples.batch`."""
        inputs, targets = self.raw(rows)
        return prepare(inputs), targets


class ImageSamples(Pairs):
    """Labelled images in memory; a batch is (float32 [B, C, H, W], int64 [B]).

    Args:
        images, labels: what `checked` takes, of torch or numpy; images may be vectors [N, D].
        ids: whole numbers [N]; by default the row numbers.
        class_names: of the classes 0, 1, ..., where they have some.

    Raises:
        DataError: as `checked`, or ids that repeat or are of another number.
    """

    labels: Tensor
    feature_names: tuple[str, ...] = ()  # of the columns that vectors came from

    def __init__(
        self, images: Any, labels: Any, *, ids: Any = None, class_names: Sequence[str] = ()
    ) -> None:
        self.images, self.labels = checked(images, labels)
        self.class_names = tuple(class_names)
        self.ids = checked_ids(ids, len(self.labels))

    @cached_property
    def fingerprint(self) -> str:
        """Of images and labels, computed when first asked for."""
        return fingerprint(self.images, self.labels)

    @classmethod
    def of(cls, dataset: ImageSet) -> ImageSamples:
        """The training side of a data set."""
        return cls(dataset.train_images, dataset.train_labels, class_names=dataset.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def raw(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[rows], self.labels[rows]

    def augmented_batch(self, rows: Tensor, *, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A batch of random crops and flips, drawn for each image (see `augment`)."""
        return prepare(augmented(self.images[rows], rng=rng)), self.labels[rows]


class TargetSamples(Pairs):
    """Inputs with numbers to predict; a batch is (float32 [B, ...], float32 [B] or [B, K]).

    Args:
        inputs: features [N, D] or images, as `checked_images` takes them.
        targets: [N] or [N, K], finite; only 0 and 1 in [N, K]: several classes a sample.
        ids: whole numbers [N]; by default the row numbers.
        class_names: of the targets' columns, where they have some.

    Raises:
        DataError: other shapes, values that are not finite, or ids that repeat.
    """

    labels = None
    feature_names: tuple[str, ...] = ()  # of the columns that inputs came from

    def __init__(
        self, inputs: Any, targets: Any, *, ids: Any = None, class_names: Sequence[str] = ()
    ) -> None:
        self.inputs = checked_images(inputs)
        self.class_names = tuple(class_names)
        self.targets = checked_targets(targets)
        if len(self.inputs) != len(self.targets):
            raise DataError(
                f"{len(self.inputs)} inputs but {len(self.targets)} targets; expected one of each "
                "a sample"
            )
        self.ids = checked_ids(ids, len(self.targets))

    @property
    def is_multi_label(self) -> bool:
        """Whether targets say which of several classes a sample has."""
        return self.targets.dim() == 2 and bool(((self.targets == 0) | (self.targets == 1)).all())

    @cached_property
    def fingerprint(self) -> str:
        """Of inputs and targets, computed when first asked for."""
        return fingerprint(self.inputs, self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def raw(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs[rows], self.targets[rows]


class TokenSamples:
    """Tokenised texts in memory; a batch is a dict as transformers' models take it.

    Batches are cut at their longest text. Of a classification data set `targets` are the labels,
    [N]; of a causal language model they are token ids [N, T], −100 where no loss is taken (the
    prompt and the padding). All are whole numbers of any type, of torch or numpy.

    Args:
        input_ids: [N, T], padded on the right.
        attention_mask: [N, T], 1 (or true) at tokens.
        targets: [N] or [N, T].
        ids: [N]; by default the row numbers.
        class_names: of the classes 0, 1, ..., where they have some.

    Raises:
        DataError: no samples, shapes that differ, a mask that is not ones and then zeros, tokens
            below 0, targets that are neither tokens nor −100, or ids that repeat.
    """

    def __init__(
        self,
        input_ids: Any,
        attention_mask: Any,
        targets: Any,
        *,
        ids: Any = None,
        class_names: Sequence[str] = (),
    ) -> None:
        self.class_names = tuple(class_names)
        self.input_ids = whole_numbers(input_ids, "input_ids")
        self.attention_mask = whole_numbers(attention_mask, "attention_mask")
        self.targets = whole_numbers(targets, "targets")
        shape = self.input_ids.shape
        if (
            len(shape) != 2
            or 0 in shape
            or self.attention_mask.shape != shape
            or self.targets.shape not in (shape, shape[:1])
        ):
            raise DataError(
                f"input_ids are {tuple(shape)}, attention_mask {tuple(self.attention_mask.shape)}, "
                f"targets {tuple(self.targets.shape)}; expected [N, T], [N, T], and [N] or [N, T], "
                "N and T at least 1"
            )
        self.labels = checked_labels(self.targets) if self.targets.dim() == 1 else None
        self._check_values()
        self.ids = checked_ids(ids, len(self.input_ids))

    def _check_values(self) -> None:
        mask = self.attention_mask
        wrong = {
            "an attention mask that is not ones and then zeros: pad on the right": (
                (mask != (torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True))).any(1)
            ),
            "a token below 0": (self.input_ids < 0).any(1),
        }
        if self.labels is None:
            has_target = self.targets != NO_LOSS
            wrong[f"a target below 0 that is not {NO_LOSS} (no loss)"] = (
                has_target & (self.targets < 0)
            ).any(1)
            wrong[f"targets in its padding: put {NO_LOSS} there (no loss)"] = (
                has_target & (mask == 0)
            ).any(1)
        for what, rows in wrong.items():
            if bool(rows.any()):
                raise DataError(f"sample {int(rows.nonzero()[0])} has {what}")

    @property
    def num_targets(self) -> Tensor:
        """Targets whose loss is taken, int64 [N]: of a language model those behind a token."""
        if self.labels is not None:
            return torch.ones_like(self.labels)
        counts: Tensor = (self.targets[:, 1:] != NO_LOSS).sum(1)
        return counts

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


def shuffled(
    samples: Samples, rows: Tensor, *, batch_size: int, rng: np.random.Generator
) -> list[Tensor]:
    """The rows (int64 [B]) of each batch of an epoch, in the order that suits the samples."""
    if isinstance(samples, Ordered):
        order = samples.training_order(rows, rng=rng)
    else:
        order = rng.permutation(len(rows))
    return [rows[torch.from_numpy(part)] for part in parted(order, batch_size=batch_size)]


def taken(samples: Samples, rows: Tensor) -> Samples:
    """Some of the samples, which keep their ids; int64 [K] rows in any order.

    Raises:
        DataError: samples of a class that is none of these three.
    """
    names, ids = getattr(samples, "class_names", ()), samples.ids[rows]
    if isinstance(samples, ImageSamples):
        return ImageSamples(samples.images[rows], samples.labels[rows], ids=ids, class_names=names)
    if isinstance(samples, TargetSamples):
        return TargetSamples(
            samples.inputs[rows], samples.targets[rows], ids=ids, class_names=names
        )
    if isinstance(samples, TokenSamples):
        return TokenSamples(
            samples.input_ids[rows], samples.attention_mask[rows], samples.targets[rows],
            ids=ids, class_names=names,
        )  # fmt: skip
    raise DataError(
        f"{type(samples).__name__} cannot be divided into a training and a test side; give both: "
        "{'train': ..., 'test': ...}"
    )


def stored(samples: Samples) -> tuple[Any, Any]:
    """Inputs and targets as a `SampleStore` has them, numpy arrays that share memory with these.

    Token ids have -1 behind the end of a text.

    Raises:
        DataError: samples of another kind.
    """
    if isinstance(samples, ImageSamples):
        return samples.images.numpy(), samples.labels.numpy()
    if isinstance(samples, TargetSamples):
        return samples.inputs.numpy(), samples.targets.numpy()
    if isinstance(samples, TokenSamples):
        ids = samples.input_ids.where(samples.attention_mask > 0, -1)
        return ids.numpy(), samples.targets.numpy()
    raise DataError(
        f"samples are {type(samples).__name__}; expected images, texts or inputs with targets: "
        "ImageSamples, TokenSamples or TargetSamples"
    )


def sizes(samples: Samples) -> tuple[int | None, tuple[int, ...] | None]:
    """Number of classes, and the shape of one image; None where samples have none."""
    named = len(getattr(samples, "class_names", ()))
    num_classes = None if samples.labels is None else named or int(samples.labels.max()) + 1
    batch = samples.batch(torch.zeros(1, dtype=torch.int64))
    shape = tuple(batch[0].shape[1:]) if isinstance(batch, tuple) else None
    return num_classes, shape


def check_targets(samples: Samples, rows: Tensor | None = None) -> None:
    """Raise DataError if nothing can be learned from one of the samples: a text without targets."""
    if isinstance(samples, TokenSamples):
        counts = samples.num_targets if rows is None else samples.num_targets[rows]
        if bool((counts == 0).any()):
            ids = samples.ids if rows is None else samples.ids[rows]
            raise DataError(
                f"{int((counts == 0).sum())} texts have no target token, the first with the id "
                f"{int(ids[counts == 0][0])}: they have no loss; leave them out"
            )


def checked_ids(ids: Any, num_samples: int) -> Tensor:
    """Ids as int64 [N], by default the row numbers; raise DataError unless each sample has one."""
    if ids is None:
        return torch.arange(num_samples)
    own = whole_numbers(ids, "ids")
    if own.shape != (num_samples,):
        raise DataError(
            f"ids have shape {tuple(own.shape)}; expected one for each of {num_samples} samples"
        )
    unique, counts = own.unique(return_counts=True)
    if len(unique) != len(own):
        raise DataError(f"sample id {int(unique[counts > 1][0])} occurs more than once")
    return own
