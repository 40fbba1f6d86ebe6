"""A data set of any kind: samples to train on, samples to test with, and what they are called."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunelab.data.arrays import count_classes
from prunelab.data.checked import checked_groups
from prunelab.data.datasets import ImageSet, fingerprint
from prunelab.data.samples import ImageSamples, Samples, TargetSamples, TokenSamples
from prunelab.data.streamed import StreamedImages
from prunelab.errors import DataError


@dataclass(frozen=True, eq=False)
class SampleSet:
    """Both sides of a data set.

    Attributes:
        train: samples of the training side.
        test: of the same kind; None where there are none to test with.
        num_classes: 0: counted by the training labels; samples without classes have None.
        class_names: of the classes 0, 1, ..., or of several targets, where the data name them.
        train_groups: natural client of each training sample, int64 [N], where there is one.
        fingerprint: hexadecimal digits that name the data; "": of their content.
        feature_names: of the columns that inputs came from, where they came from some.

    Raises:
        DataError: sides of two kinds or shapes, labels that are no such classes, names or groups
            of another number.
    """

    name: str
    train: Samples
    test: Samples | None
    num_classes: int | None = 0
    class_names: tuple[str, ...] = ()
    train_groups: Tensor | None = None
    fingerprint: str = ""
    feature_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        labels = self.train.labels
        if self.test is not None:
            kinds = [_kind(self.train), _kind(self.test)]
            if kinds[0] != kinds[1]:
                raise DataError(
                    f"{self.name}: training samples are {kinds[0]}, test samples {kinds[1]}; "
                    "expected both sides alike"
                )
        num_classes = self.num_classes
        if labels is None:
            num_classes = None
        elif not num_classes:
            test = None if self.test is None else self.test.labels
            num_classes = count_classes(labels, test, where=self.name)
        for side in (self.train, self.test):
            if num_classes is None or side is None or side.labels is None:
                continue
            largest = int(side.labels.max())
            if largest >= num_classes:
                raise DataError(
                    f"{self.name}: label {largest} lies outside 0 ... {num_classes - 1}"
                )
        if num_classes is not None and 0 < len(self.class_names) < num_classes:
            raise DataError(
                f"{self.name}: {len(self.class_names)} class names for {num_classes} classes"
            )
        object.__setattr__(self, "num_classes", num_classes)
        if self.train_groups is not None:
            groups = checked_groups(self.train_groups, len(self.train), where=self.name)
            object.__setattr__(self, "train_groups", groups)
        if not self.fingerprint:
            sides = [self.train] if self.test is None else [self.train, self.test]
            object.__setattr__(self, "fingerprint", _joined(*(s.fingerprint for s in sides)))

    @classmethod
    def of(cls, images: ImageSet) -> SampleSet:
        """The same of labelled images."""
        names = images.class_names
        return cls(
            images.name,
            ImageSamples(images.train_images, images.train_labels, class_names=names),
            ImageSamples(images.test_images, images.test_labels, class_names=names),
            num_classes=images.num_classes,
            class_names=names,
            train_groups=images.train_groups,
            fingerprint=images.fingerprint,
        )


def _kind(samples: Samples) -> str:
    """What has to be alike on both sides."""
    if isinstance(samples, ImageSamples):
        return f"{samples.images.dtype} {list(samples.images.shape[1:])} with labels"
    if isinstance(samples, StreamedImages):
        return f"{torch.uint8} {list(samples.input_shape)} with labels"
    if isinstance(samples, TargetSamples):
        inputs, targets = samples.inputs, samples.targets
        return f"{inputs.dtype} {list(inputs.shape[1:])} with targets {list(targets.shape[1:])}"
    if isinstance(samples, TokenSamples):
        return f"texts with {'token targets' if samples.labels is None else 'labels'}"
    return type(samples).__name__


def _joined(*digits: str) -> str:
    return fingerprint(*(torch.tensor(list(d.encode()), dtype=torch.uint8) for d in digits))
