"""The gate: what becomes images and labels, what is said of it, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from long import FACTOR
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from prunelab.data.arrays import MOST_CLASSES, count_classes
from prunelab.data.checked import checked, checked_images, checked_label, checked_labels
from prunelab.data.datasets import ImageSet
from prunelab.data.objects import as_samples
from prunelab.data.samples import ImageSamples, TokenSamples
from prunelab.errors import DataError, DataWarning

BYTES = np.random.default_rng(0).integers(0, 256, (4, 6, 5), dtype=np.uint8)
GRAY = torch.from_numpy(BYTES)[:, None]
CLASSES = np.array([0, 1, 2, 1])


def quiet(call: Any, *values: Any) -> Any:
    """The result of a call that must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*values)


# --- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        CLASSES.tolist(),
        tuple(CLASSES),
        CLASSES.astype(np.int32),
        CLASSES.astype(">i4"),
        CLASSES.astype(np.uint64),
        CLASSES.astype(object),
        CLASSES[::-1][::-1],
        CLASSES[::-1].copy()[::-1],
        CLASSES[:, None],
        CLASSES[:, None][:, ::-1],
        torch.from_numpy(CLASSES)[:, None].short(),
        torch.from_numpy(CLASSES).to(torch.uint16),
        np.broadcast_to(np.array(2), (4,)) - [2, 1, 0, 1],
    ],
)
def test_labels_of_any_whole_type_are_the_same(labels: Any) -> None:
    found = quiet(checked_labels, labels)
    assert found.dtype == torch.int64
    assert found.tolist() == CLASSES.tolist()


@pytest.mark.parametrize("dtype", [np.int64, np.float32, bool])
def test_one_hot_rows_are_said_to_be_that(dtype: Any) -> None:
    with pytest.warns(DataWarning, match=r"labels \[4, 3\] are one-hot; the class is the place"):
        assert checked_labels(np.eye(3, dtype=dtype)[CLASSES]).tolist() == CLASSES.tolist()


def test_truth_values_are_two_classes() -> None:
    assert quiet(checked_labels, np.array([True, False])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, -1, 0], "sample 1 has the label -1; expected a class from 0 to 65535: number the"),
        ([0, 2**40], f"sample 1 has the label {2**40}; expected a class"),
        (np.array([2**63 + 5], np.uint64), "sample 0 has the label 9223372036854775813;"),
        ([0, 2**70], "labels are object"),
        ([0.0, 1.0], r"labels are float64 of shape \[2\], expected whole numbers \[N\]"),
        ([0.5, np.nan], r"from 0 on; convert with astype\(int\), if they are that"),
        (np.full((3, 4), 0.25), r"labels are float64 of shape \[3, 4\]"),
        (np.zeros((3, 4), int), r"labels are int64 of shape \[3, 4\]"),
        (np.zeros((3, 1, 1), int), r"shape \[3, 1, 1\]"),
        (np.array(3), r"shape \[\]"),
        (["cat", "dog"], "labels are texts, such as 'cat'; expected numbers"),
        ([b"cat"], "labels are texts, such as b'cat'"),
        ([0, None], "labels are object"),
        ([[0], [1, 2]], "labels are not all of one shape"),
        ([torch.empty(2, device="meta")], "labels are not all of one shape"),
        (np.array(["2024-01-01"], "M8[D]"), "labels are datetime64"),
        (np.array([1j]), "labels are complex128"),
        (np.ma.masked_equal([0, 1], 1), "labels have masked places"),
        ([], "no samples"),
        (np.zeros((0, 0), bool), r"labels are bool of shape \[0, 0\]"),
        (None, "labels are object"),
    ],
)
def test_labels_that_are_no_classes(labels: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        checked_labels(labels)


def test_as_many_classes_as_samples_may_be() -> None:
    many = np.arange(MOST_CLASSES + 3)
    assert checked_labels(many)[-1] == MOST_CLASSES + 2
    with pytest.raises(DataError, match=f"sample 1 has the label {MOST_CLASSES}"):
        checked_labels([0, MOST_CLASSES])


@pytest.mark.parametrize(
    "label", [1, True, np.uint8(1), np.array([1]), torch.tensor(1), torch.tensor([0, 1, 0]), [0, 1]]
)
def test_the_label_of_one_sample(label: Any) -> None:
    assert quiet(checked_label, label, 3) == 1


@pytest.mark.parametrize("label", [-1, 1.0, "1", None, [1, 1], np.array([]), torch.tensor([0.5])])
def test_the_label_of_one_sample_that_is_none(label: Any) -> None:
    with pytest.raises(DataError, match=r"sample 3 has the label .*, expected a whole number"):
        checked_label(label, 3)


@pytest.mark.parametrize(
    ("labels", "absent"),
    [
        ([0, 0, 2], "1;"),
        ([1, 2, 2, 1], "0;"),
        (np.arange(100) // 10 * 10, "1, 2, 3, 4, 5, ...;"),
    ],
)
def test_numbers_between_the_classes_are_counted_and_named(labels: Any, absent: str) -> None:
    """They stay as they are: what a network says must mean the user's own numbers."""
    found = checked_labels(labels)
    with pytest.warns(
        DataWarning, match=f"^here: labels reach .* no sample has the class {absent}"
    ):
        assert count_classes(found, where="here") == max(labels) + 1


def test_classes_are_counted_by_the_training_side() -> None:
    train, test = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 0])
    assert quiet(count_classes, train, test) == 3
    with pytest.raises(DataError, match=r"test label 3 of row 1 lies outside 0 ... 2"):
        count_classes(train, torch.tensor([0, 3]))
    with pytest.raises(DataError, match="labels reach 9, and 2 training samples cannot have"):
        count_classes(torch.tensor([0, 9]))


# --- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images",
    [
        BYTES,
        BYTES[:, None],
        GRAY,
        GRAY[:, 0],
        list(BYTES),
        np.asfortranarray(BYTES),
        BYTES[::-1][::-1],
        np.broadcast_to(BYTES, BYTES.shape),
        BYTES[:, None][:, ::-1],
    ],
)
def test_gray_images_have_one_channel(images: Any) -> None:
    found = quiet(checked_images, images)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    assert torch.equal(found, GRAY)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels_last_are_moved_to_the_front(dtype: Any, channels: int) -> None:
    """16×16 images of so many channels, never 16 channels of 16 times so many."""
    last = (np.random.default_rng(1).random((2, 16, 16, channels)) * 999).astype(dtype)
    with pytest.warns(DataWarning, match=r"have channels last; they were moved to the front"):
        found = checked_images(last)
    assert found.shape == (2, channels, 16, 16)
    assert np.array_equal(found.numpy(), np.moveaxis(last, 3, 1).astype(found.numpy().dtype))
    first = quiet(checked_images, np.moveaxis(last, 3, 1))
    assert torch.equal(first, found)


def test_floats_are_fed_as_they_are() -> None:
    halves = torch.randn(3, 1, 4, 4, requires_grad=True).to(torch.bfloat16)
    found = quiet(checked_images, halves)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert torch.equal(found, halves.detach().float())
    samples = ImageSamples(found, [0, 1, 0])
    assert torch.equal(samples.batch(torch.arange(3))[0], found)


def test_floats_that_look_like_pixels_are_mentioned() -> None:
    """Images without a negative value, up to 1 or 255, have not been normalised."""
    for high in (1, 255):
        words = f"floats between 0 and {high}, and are fed to the net"
        with pytest.warns(DataWarning, match=words):
            checked_images(np.array([[[0.0, float(high)]]]))
    for plain in ([[-1.0, 9.0]], [[0.0, 256.0]], [[0.0, 0.0]]):
        quiet(checked_images, np.array([plain]))
    quiet(checked_images, np.array([[0.0, 1.0]]))  # vectors are no pixels


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (BYTES.astype(bool), "images are bool; expected bytes"),
        (BYTES.astype(np.int16), "images are int16; expected bytes"),
        (BYTES.astype(np.uint16), "images are uint16"),
        (BYTES.astype(np.int64), "images are int64"),
        (BYTES.astype(complex), "images are complex128"),
        (BYTES[:0], r"images have shape \[0, 6, 5\]; expected at least one"),
        (BYTES[:, :0], r"images have shape \[4, 0, 5\]"),
        (np.zeros(4), r"images have shape \[4\]"),
        (np.full((2, 3), np.inf), "sample 0 holds values that are not finite"),
        (np.array([[1.0], [1e300]]), "sample 1 holds values that are not finite"),
        ([BYTES[0], BYTES[0, :3]], "images are not all of one shape"),
        (np.ma.masked_less(BYTES, 9), "images have masked places"),
        (["a.png"], "images are texts, such as 'a.png'"),
        (torch.empty(2, 3, device="meta"), "images are a tensor that numpy cannot read"),
    ],
)
def test_images_that_are_none(images: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        checked_images(images)


# --- both ----------------------------------------------------------------------------------------

DRESSES: dict[str, Any] = {
    "arrays": (BYTES, CLASSES),
    "tensors": (GRAY, torch.from_numpy(CLASSES)),
    "mapping": {"image": BYTES, "label": CLASSES},
    "array and list": (BYTES, CLASSES.tolist()),
    "lists of arrays": (list(BYTES), CLASSES.tolist()),
    "pictures and list": ([Image.fromarray(one) for one in BYTES], CLASSES.tolist()),
    "pictures and array": ([Image.fromarray(one) for one in BYTES], CLASSES.astype(np.int16)),
    "items": [(Image.fromarray(one), np.int32(c)) for one, c in zip(BYTES, CLASSES, strict=True)],
    "items of [1]": TensorDataset(GRAY, torch.from_numpy(CLASSES)[:, None]),
    "one-hot items": TensorDataset(GRAY, torch.eye(3)[CLASSES]),
    "frame": pandas.DataFrame({"image": list(BYTES), "label": CLASSES}),
    "Hugging Face": datasets.Dataset.from_dict(
        {"img": [Image.fromarray(one) for one in BYTES], "label": CLASSES}
    ),
    "undecoded": datasets.Dataset.from_dict(
        {"img": [Image.fromarray(one) for one in BYTES], "label": CLASSES}
    ).cast_column("img", datasets.Image(decode=False)),
    "loader": DataLoader(TensorDataset(GRAY, torch.from_numpy(CLASSES)), batch_size=3),
    "mappings": [{"img": one, "label": c} for one, c in zip(BYTES, CLASSES, strict=True)],
}


@pytest.mark.filterwarnings("ignore:data. labels .* are one-hot")
@pytest.mark.parametrize("dress", DRESSES)
def test_the_same_samples_in_any_dress(dress: str) -> None:
    samples, plain = as_samples(DRESSES[dress]), ImageSamples(GRAY, CLASSES)
    assert samples.fingerprint == plain.fingerprint
    assert samples.labels is not None
    assert samples.labels.tolist() == CLASSES.tolist()


def test_lists_of_other_lengths_and_labels_that_are_none() -> None:
    pictures = [Image.fromarray(one) for one in BYTES]
    for labels, words in (
        ([0, 1], "4 images but 2 labels"),
        (np.array(1), r"labels are int64 of shape \[\]"),
        (np.ones(4) * 1j, "labels are complex128"),
    ):
        with pytest.raises(DataError, match=words):
            as_samples((pictures, labels))


def test_what_cannot_be_read_by_row_is_said_to_be_that() -> None:
    class Stream(IterableDataset[Any]):
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[Any]:
            yield BYTES[0], 0

    with pytest.raises(DataError, match=r"data is a Stream, which is read in one go"):
        as_samples(Stream())
    with pytest.raises(DataError, match="Stream, is read in one go"):
        as_samples(DataLoader(Stream()))


def test_two_items_are_no_pair_of_arrays() -> None:
    samples = as_samples([(BYTES[0], 1), (BYTES[1], 0)])
    assert samples.labels is not None
    assert samples.labels.tolist() == [1, 0]


def test_a_set_of_both_sides_is_checked_and_counted() -> None:
    labels = CLASSES.astype(np.int16)
    found = ImageSet("own", BYTES, labels, BYTES[:2], labels[:2])  # type: ignore[arg-type]
    assert (found.num_classes, found.input_shape, len(found.fingerprint)) == (3, (1, 6, 5), 16)
    assert found.train_labels.dtype == torch.int64
    groups = np.array([7, 7, 10**9, 0], np.int32)
    assert (
        ImageSet(  # type: ignore[arg-type]
            "own", BYTES, labels, BYTES[:2], labels[:2], train_groups=groups
        ).train_groups.tolist()
        == [7, 7, 10**9, 0]
    )
    for changed, words in (
        ({"test_images": BYTES[:2, :3]}, r"test images torch.uint8 \(1, 3, 5\)"),
        ({"test_labels": [0, 3]}, "own: test label 3 of row 1 lies outside 0 ... 2"),
        ({"test_labels": [0]}, "own, test side: 2 images but 1 labels"),
        ({"num_classes": 2}, "own: label 2 lies outside 0 ... 1"),
        ({"train_groups": [0, 1, 2]}, "own: 3 natural clients for 4 training samples"),
        ({"train_groups": torch.zeros(4)}, "own: natural clients are float32; expected whole"),
        ({"train_images": BYTES.reshape(4, -1)}, r"give vectors \[N, D\] as images"),
    ):
        given: dict[str, Any] = {
            "train_images": BYTES, "train_labels": labels, "test_images": BYTES[:2],
            "test_labels": labels[:2],
        } | changed  # fmt: skip
        with pytest.raises(DataError, match=words):
            ImageSet("own", **given)


def test_ids_of_any_whole_type() -> None:
    assert ImageSamples(BYTES, CLASSES, ids=np.array([4, 3, 2, 9], np.int32)).ids.tolist()[3] == 9
    for ids, words in (
        ([1, 2, 3], r"ids have shape \(3,\); expected one for each of 4 samples"),
        ([1, 2, 2, 1], "sample id 1 occurs more than once"),
        ([1.0, 2.0, 3.0, 4.0], "ids are float64; expected whole numbers"),
        (np.array([2**63, 0, 1, 2], np.uint64), "ids are uint64"),
    ):
        with pytest.raises(DataError, match=words):
            ImageSamples(BYTES, CLASSES, ids=ids)


HOSTILE = arrays.arrays(
    dtype=st.one_of(
        arrays.integer_dtypes(),
        arrays.unsigned_integer_dtypes(),
        arrays.floating_dtypes(),
        arrays.boolean_dtypes(),
        arrays.complex_number_dtypes(),
        arrays.unicode_string_dtypes(max_len=3),
        arrays.datetime64_dtypes(),
    ),
    shape=arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6),
)


@settings(max_examples=150 * FACTOR, deadline=None)
@given(images=HOSTILE, labels=HOSTILE, odd=st.booleans())
@pytest.mark.filterwarnings("ignore::prunelab.errors.DataWarning")
def test_whatever_comes_is_checked_or_refused(images: Any, labels: Any, odd: bool) -> None:
    """Never another error, never samples that a network could stumble over."""
    if odd and labels.ndim and len(labels):
        labels = (np.arange(len(images)) % 3) if images.ndim else labels
    try:
        found, classes = checked(images, labels)
    except DataError:
        return
    assert found.dtype in (torch.uint8, torch.float32)
    assert classes.dtype == torch.int64
    assert len(found) == len(classes) > 0
    assert found.dim() > 1
    assert found.dim() != 3
    assert found.is_contiguous()
    assert bool(found.float().isfinite().all())
    assert 0 <= int(classes.min()) <= int(classes.max()) < MOST_CLASSES
    assert found.numel() == images.size
    ImageSamples(images, labels).batch(torch.arange(len(classes)))


# --- texts ---------------------------------------------------------------------------------------

IDS = np.array([[5, 6, 7, 0], [8, 0, 0, 0]])
MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0]])
TARGETS = np.where(MASK == 1, IDS, -100)


def test_texts_of_any_whole_type() -> None:
    plain = TokenSamples(torch.from_numpy(IDS), torch.from_numpy(MASK), torch.from_numpy(TARGETS))
    other = TokenSamples(IDS.astype(np.int32), MASK.astype(bool), TARGETS.tolist())
    assert other.fingerprint == plain.fingerprint
    assert other.num_targets.tolist() == [2, 0]
    assert TokenSamples(IDS, MASK, [1, 0]).labels is not None


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((IDS[:0], MASK[:0], TARGETS[:0]), "N and T at least 1"),
        ((IDS, MASK[:, :2], TARGETS), r"attention_mask \(2, 2\)"),
        ((IDS, MASK, TARGETS[:1]), r"targets \(1, 4\)"),
        ((IDS / 1, MASK, TARGETS), "input_ids are float64; expected whole numbers"),
        ((IDS, MASK[:, ::-1], TARGETS), "sample 0 has an attention mask that is not ones and then"),
        ((IDS, MASK * 2, TARGETS), "sample 0 has an attention mask"),
        ((-IDS, MASK, TARGETS), "sample 0 has a token below 0"),
        ((IDS, MASK, TARGETS - 1), "sample 0 has a target below 0 that is not -100"),
        ((IDS, MASK, IDS), "sample 0 has targets in its padding: put -100 there"),
        ((IDS, MASK, [0, -100]), "sample 1 has the label -100"),
    ],
)
def test_texts_that_are_none(parts: tuple[Any, Any, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        TokenSamples(*parts)
