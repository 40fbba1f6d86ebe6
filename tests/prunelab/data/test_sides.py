"""A data set's two sides have to be alike."""

from __future__ import annotations

import numpy as np
import pytest

from prunelab.data.datasets import load_dataset
from prunelab.data.samples import ImageSamples, TargetSamples, TokenSamples
from prunelab.data.sides import SampleSet
from prunelab.errors import DataError


def _images(count: int, size: int = 4, classes: int = 2) -> ImageSamples:
    labels = np.arange(count) % classes
    return ImageSamples(np.zeros((count, 1, size, size), np.uint8), labels)


def test_of_an_image_set_keeps_everything() -> None:
    images = load_dataset("digits")
    found = SampleSet.of(images)
    assert (found.name, found.num_classes, found.fingerprint) == (
        images.name,
        10,
        images.fingerprint,
    )
    assert found.train.batch(found.train.ids[:2])[1].tolist() == images.train_labels[:2].tolist()


def test_samples_without_classes_have_no_number_of_them() -> None:
    values = TargetSamples(np.ones((4, 3)), np.arange(4) / 2)
    found = SampleSet("values", values, None)
    assert found.num_classes is None
    assert len(found.fingerprint) == 16
    assert found.fingerprint != SampleSet("values", values, values).fingerprint


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (_images(4, size=5), "both sides alike"),
        (TargetSamples(np.ones((4, 3)), np.ones(4)), "both sides alike"),
        (TokenSamples([[1, 2]], [[1, 1]], [0]), "both sides alike"),
        (_images(4, classes=4), "label"),
    ],
)
def test_sides_that_differ(test: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        SampleSet("odd", _images(4), test)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"class_names": ("one",)}, "1 class names for 2 classes"),
        ({"train_groups": np.zeros(3, np.int64)}, "3 natural clients for 4"),
        ({"num_classes": 1}, "label 1 lies outside"),
    ],
)
def test_descriptions_that_do_not_fit(keywords: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SampleSet("odd", _images(4), None, **keywords)
