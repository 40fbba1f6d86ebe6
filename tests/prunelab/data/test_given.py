"""Both sides of whatever people have: objects, folders, tables, factories, partitions."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import flwr_datasets
import numpy as np
import pandas
import pytest
import torch
from flwr_datasets.partitioner import IidPartitioner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import PILToTensor, RandomCrop

from datapruning.recommend.language import train_tokenizer
from prunelab.data.given import as_sample_set, described, forget, load_sample_set
from prunelab.data.objects import as_samples
from prunelab.data.reading import reading
from prunelab.data.samples import ImageSamples, TargetSamples, TokenSamples
from prunelab.errors import DataError, DataWarning

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (12, 6, 5), dtype=np.uint8)
NAMES = ["cat", "dog", "ant", "dog"] * 3
CODES = [1, 2, 0, 2] * 3
SORTED = ("ant", "cat", "dog")


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    forget()
    yield
    forget()


def pictures(root: Path, names: list[str] | None = None, pixels: Any = PIXELS) -> Path:
    """Pictures in class folders."""
    for row, (name, image) in enumerate(zip(names or NAMES, pixels, strict=True)):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / name / f"{row:02}.png")
    return root


def labels_of(samples: Any) -> list[int]:
    assert samples.labels is not None
    found: list[int] = samples.labels.tolist()
    return found


# --- labels --------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["b", "a", "c", "10", "9"]), min_size=2, max_size=9))
def test_names_numbers_and_class_labels_are_the_same_samples(names: list[str]) -> None:
    """Names are numbered in their sorted order, whoever says it."""
    order = sorted(set(names))
    codes = [order.index(name) for name in names]
    pixels = PIXELS[: len(names)]
    hugging = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(one) for one in pixels], "label": names}
    )
    expected = ImageSamples(pixels, codes).fingerprint
    for data in (
        (pixels, names),
        (pixels, np.array(names)),
        (pixels, pandas.Series(names)),
        (pixels, pandas.Series(pandas.Categorical(names))),
        [(one, name) for one, name in zip(pixels, names, strict=True)],
        pandas.DataFrame({"img": list(pixels), "y": names}),
        hugging,
        hugging.class_encode_column("label"),
    ):
        samples: Any = as_samples(data)
        assert samples.fingerprint == expected
        assert samples.class_names == tuple(order)


def test_names_of_class_labels_keep_their_own_order() -> None:
    feature = datasets.ClassLabel(names=["z", "a", "m"])
    data = datasets.Dataset.from_dict(
        {"img": [Image.fromarray(one) for one in PIXELS[:2]], "label": [0, 1]}
    ).cast_column("label", feature)
    both = as_sample_set(data, test_share=0)
    assert (both.class_names, both.num_classes) == (("z", "a", "m"), 3)
    assert labels_of(both.train) == [0, 1]


@pytest.mark.parametrize(
    "labels",
    [
        np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0]]),
        [["ant", "cat"], ["dog"], []],
        [[0, 1], [2], []],
        datasets.Dataset.from_dict(
            {"label": [[0, 1], [2], []]},
            features=datasets.Features(
                {"label": datasets.List(datasets.ClassLabel(names=list(SORTED)))}
            ),
        ),
    ],
)
def test_several_classes_a_sample(labels: Any) -> None:
    data = {"x": list(PIXELS[:3]), "label": labels}
    if isinstance(labels, datasets.Dataset):
        data = labels.add_column("x", PIXELS[:3].tolist())
        data = data.cast_column("x", datasets.Array2D((6, 5), "uint8"))
        samples: Any = as_samples(data)
    else:
        samples = as_samples(data if isinstance(labels, list) else (PIXELS[:3], labels))
    assert isinstance(samples, TargetSamples)
    assert samples.is_multi_label
    assert samples.targets.tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0]]
    if "ant" in str(labels) or isinstance(labels, datasets.Dataset):
        assert samples.class_names == SORTED


def test_floats_are_numbers_to_predict_unless_they_are_said_to_be_classes() -> None:
    samples = as_samples((PIXELS, RANDOM.normal(size=12)))
    assert isinstance(samples, TargetSamples)
    whole = np.array(CODES, float)
    with pytest.warns(DataWarning, match="labels are floats, and are taken as numbers"):
        assert isinstance(as_samples((PIXELS, whole)), TargetSamples)
    assert labels_of(as_samples((PIXELS, whole), task="classification")) == CODES
    found: Any = as_samples((PIXELS, CODES), task="regression")
    assert found.targets.tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([*NAMES[:11], None], {}, "row 11 has no label"),
        ([*NAMES[:11], 3], {}, "row 11 has the label 3 among names"),
        ([10**30] * 12, {}, "labels are object"),
        ([0] * 11 + [-1], {}, "sample 11 has the label -1"),
        ([0] * 11 + [2**40], {}, "sample 11 has the label 1099511627776"),
        (RANDOM.normal(size=12), {"task": "classification"}, "floats with a fraction"),
        (CODES, {"task": "multi-label"}, "expected rows of 0 and 1"),
        (CODES[:3], {}, "12 images but 3 labels"),
    ],
)
def test_labels_that_are_none(labels: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_samples({"image": list(PIXELS), "label": labels}, **options)


# --- sides ---------------------------------------------------------------------------------------


def test_a_share_of_every_class_is_set_aside_by_the_seed() -> None:
    pixels = RANDOM.integers(0, 256, (50, 4, 4), dtype=np.uint8)
    names = ["a"] * 30 + ["b"] * 20
    both = as_sample_set((pixels, names), seed=3, test_share=0.1)
    assert both.test is not None
    assert np.bincount(labels_of(both.test)).tolist() == [3, 2]
    train: Any = both.train
    whole = {image.tobytes() for image in pixels}
    seen = [image.numpy().tobytes() for image in train.images]
    rest: Any = both.test
    seen += [image.numpy().tobytes() for image in rest.images]
    assert set(seen) == whole
    again = as_sample_set((pixels, names), seed=3, test_share=0.1)
    other = as_sample_set((pixels, names), seed=4, test_share=0.1)
    assert again.fingerprint == both.fingerprint != other.fingerprint
    assert as_sample_set((pixels, names), test_share=0).test is None
    with pytest.raises(DataError, match="too few samples to set 1% of every class aside"):
        as_sample_set((pixels, names), test_share=0.01)
    with pytest.raises(DataError, match="expected 0 <= share < 1, got 1"):
        as_sample_set((pixels, names), test_share=1)


def test_names_have_the_numbers_of_the_training_side_on_both() -> None:
    sides = {"train": (PIXELS, NAMES), "validation": (PIXELS[:2], ["dog", "cat"])}
    both = as_sample_set(sides)
    assert both.test is not None
    assert (labels_of(both.test), both.class_names) == ([2, 1], SORTED)
    for labels, message in (
        (["dog", "owl"], "row 1 has the label 'owl', which is none of the classes 'ant'"),
        ([0, 7], "the label 7 is none of the 3 classes"),
    ):
        with pytest.raises(DataError, match=message):
            as_sample_set({"train": (PIXELS, NAMES), "test": (PIXELS[:2], labels)})
    with pytest.raises(DataError, match="label 'a', which is no number as on the other side"):
        as_sample_set({"train": (PIXELS, CODES), "test": (PIXELS[:2], ["a", "b"])})
    with pytest.raises(DataError, match="expected the sides train and test, got test"):
        as_sample_set({"test": (PIXELS, NAMES)})


def called(names: tuple[str, ...], labels: list[int]) -> datasets.Dataset:
    """Numbers of classes with names of their own."""
    return datasets.Dataset.from_dict(
        {"a": [float(k) for k in labels], "text": ["word"] * len(labels), "label": labels}
    ).cast_column("label", datasets.ClassLabel(names=list(names)))


def test_numbers_with_names_of_their_own_go_by_name(tmp_path: Path) -> None:
    """The two sides number their classes in different orders, and one may lack some."""
    train, test = called(("cat", "dog"), [0, 1, 0, 1]), called(("owl", "dog", "cat"), [1, 2, 2])
    columns = {"features": "a"}
    both = as_sample_set({"train": train, "test": test}, columns=columns)
    assert both.test is not None
    assert (both.class_names, labels_of(both.test)) == (("cat", "dog"), [1, 0, 0])
    texts: Any = as_sample_set({"train": train, "test": test}, tokenizer=lambda text: [1, 2])
    assert texts.test.labels.tolist() == [1, 0, 0]
    with pytest.raises(DataError, match="class 'owl', which is none of the classes 'cat', 'dog'"):
        as_sample_set({"train": train, "test": called(("owl", "dog"), [0])}, columns=columns)
    with pytest.warns(DataWarning, match="their numbers are taken as they are"):
        as_sample_set({"train": (PIXELS, CODES), "test": _Called(("u", "v"))})
    given: Any = as_sample_set(
        {"train": (PIXELS, NAMES), "test": as_samples(_Called(("dog", "ant")))}
    )
    assert labels_of(given.test) == [2, 0]
    for number, names in enumerate((("u", "v"), ("v", "u"))):
        called(names, [0, 1]).to_parquet(tmp_path / f"train_{number}.parquet")
    with pytest.raises(
        DataError, match=r"train_1\.parquet names or numbers classes in another way"
    ):
        as_sample_set(tmp_path, columns=columns)
    # The same of parquet files, of two sides and of the parts of one.
    image = [{"bytes": _png(one), "path": None} for one in PIXELS[:2]]
    for name, names in (("train_0", "ab"), ("train_1", "ba"), ("test", "bac")):
        part = datasets.Dataset.from_dict({"img": image, "label": [0, 1]})
        part = part.cast_column("label", datasets.ClassLabel(names=list(names)))
        part.to_parquet(tmp_path / f"{name}.parquet")
    both = as_sample_set(tmp_path)
    assert both.test is not None
    assert both.class_names == ("a", "b")
    assert (labels_of(both.train), labels_of(both.test)) == ([0, 1, 1, 0], [1, 0])


class _Called:
    """Two pictures with classes by number, which have names of their own."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes = list(classes)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return PIXELS[row], row


def _png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_image_folders_of_which_one_lacks_a_class(tmp_path: Path) -> None:
    pictures(tmp_path / "train")
    pictures(tmp_path / "test", ["dog", "cat"], PIXELS[:2])
    sides = {
        side: ImageFolder(str(tmp_path / side), transform=PILToTensor())
        for side in ("train", "test")
    }
    both = as_sample_set(sides)
    assert both.test is not None
    assert labels_of(both.test) == [1, 2]


def test_numbers_among_the_names_of_classes_are_names(tmp_path: Path) -> None:
    """One side of a table alone looks like numbers; elsewhere it could be either."""
    table(tmp_path / "train.csv", "a,y\n1,1\n2,2\n3,a\n")
    table(tmp_path / "test.csv", "a,y\n1,2\n2,1\n")
    both = as_sample_set(str(tmp_path))
    assert both.test is not None
    assert (both.class_names, labels_of(both.test)) == (("1", "2", "a"), [1, 0])
    train = (PIXELS[:3], ["1", "2", "a"])
    for labels in ([1, 2], [0]):
        with pytest.raises(DataError, match=r"the label \d could be the class '\d' or the"):
            as_sample_set({"train": train, "test": (PIXELS[: len(labels)], labels)})
    plain = as_sample_set({"train": (PIXELS[:3], ["0", "1", "2"]), "test": (PIXELS[:2], [2, 0])})
    assert plain.test is not None
    assert labels_of(plain.test) == [2, 0]


def test_whole_numbers_are_the_folders_that_are_called_so(tmp_path: Path) -> None:
    """Also from 10 on, where texts would be sorted otherwise."""
    pictures(tmp_path, [str(number) for number in range(12)])
    sides = {
        "train": ImageFolder(str(tmp_path), transform=PILToTensor()),  # 0, 1, 10, 11, 2, ...
        "test": (PIXELS, list(range(12))),
    }
    with pytest.raises(DataError, match="the label 2 could be the class '2' or the place 2"):
        as_sample_set(sides)
    folders = as_sample_set(tmp_path, test_share=0).train
    found = as_sample_set({"train": folders, "test": (PIXELS[:, None], list(range(12)))})
    assert found.test is not None
    assert labels_of(found.test) == labels_of(folders)


def test_lists_of_classes_are_no_rows_of_0_and_1_where_the_other_side_has_lists() -> None:
    for train, test, expected in (
        ([[0], [0, 1]], [[0, 1], [1, 0]], [[1, 1], [1, 1]]),
        ([[0], [0, 1], [1]], [[0], [1]], [[1, 0], [0, 1]]),
        ([["a"], ["a", "b"]], [["b"]], [[0, 1]]),
        (np.array([[1, 1], [0, 1]]), [[0, 1], [1, 0]], [[0, 1], [1, 0]]),
    ):
        sides = {"train": (PIXELS[: len(train)], train), "test": (PIXELS[: len(test)], test)}
        if isinstance(train, list):
            sides = {
                side: {"x": list(images), "label": labels}  # type: ignore[misc]
                for side, (images, labels) in sides.items()
            }
        found: Any = as_sample_set(sides).test
        assert found.targets.tolist() == expected


def test_the_labels_of_a_small_test_side_are_what_the_training_sides_are() -> None:
    """Whole numbers among floats, and rows with a single 1, are no classes there."""
    prices = {"train": (PIXELS, RANDOM.normal(size=12)), "test": (PIXELS[:2], [1, 2])}
    hot = np.array([[1, 1, 0], [0, 0, 1]] * 6)
    several = {"train": (PIXELS, hot), "test": (PIXELS[:1], np.array([[0, 1, 0]]))}
    for data, shape in ((prices, (2,)), (several, (1, 3))):
        test: Any = as_sample_set(data).test
        assert test.targets.shape == shape


def test_a_dataset_dict_of_texts() -> None:
    texts = {"text": ["a good one", "bad"] * 5, "label": ["pos", "neg"] * 5}
    sides = datasets.DatasetDict(
        train=datasets.Dataset.from_dict(texts), test=datasets.Dataset.from_dict(texts)
    )
    tokenizer = train_tokenizer(texts["text"], vocabulary=300)
    both = as_sample_set(sides, tokenizer=tokenizer)
    assert isinstance(both.test, TokenSamples)
    assert (both.class_names, both.num_classes) == (("neg", "pos"), 2)
    with pytest.raises(DataError, match=r"column 'text' holds texts, which need a tokenizer"):
        as_sample_set(sides)


# --- data sets of torch --------------------------------------------------------------------------


def test_data_sets_of_torchvision_name_their_classes(tmp_path: Path) -> None:
    pictures(tmp_path)
    folder = ImageFolder(str(tmp_path), transform=PILToTensor())
    samples: Any = as_samples(DataLoader(Subset(folder, [0, 3, 11]), batch_size=2, shuffle=True))
    assert samples.class_names == SORTED
    assert labels_of(samples) == [folder.targets[row] for row in (0, 3, 11)]
    assert torch.equal(samples.images[1], folder[3][0])
    fake = as_samples(FakeData(4, (3, 8, 8), 3, transform=PILToTensor()))
    assert isinstance(fake, ImageSamples)


def test_a_loader_gives_the_samples_that_its_sampler_names() -> None:
    """Or test samples would be trained on."""
    data = TensorDataset(torch.arange(20.0)[:, None].repeat(1, 3), torch.arange(20) % 2)
    sides = {
        "train": DataLoader(data, sampler=SubsetRandomSampler(range(15))),
        "test": DataLoader(data, batch_size=2, sampler=SubsetRandomSampler([17, 16, 19])),
    }
    both: Any = as_sample_set(sides)
    assert both.train.images[:, 0].tolist() == list(range(15))
    assert both.test.images[:, 0].tolist() == [16, 17, 19]
    hugging = datasets.Dataset.from_dict({"a": list(range(20)), "y": [0, 1] * 10})
    found: Any = as_samples(DataLoader(hugging, sampler=SubsetRandomSampler([3, 1])))  # type: ignore[arg-type]
    assert found.images.tolist() == [[1], [3]]
    for loader in (
        DataLoader(data, shuffle=True, drop_last=True, batch_size=3),
        DataLoader(data, batch_size=None),
        DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 2, drop_last=False)),
    ):
        assert len(as_samples(loader)) == 20
    with pytest.warns(DataWarning, match="collate_fn is left out"):
        assert len(as_samples(DataLoader(data, collate_fn=lambda items: items))) == 20


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": WeightedRandomSampler([1.0] * 20, 5)},
        {"sampler": RandomSampler(range(20), replacement=True)},
        {"sampler": RandomSampler(range(20), num_samples=5)},
        {"sampler": SequentialSampler(range(5))},
        {"sampler": [1, 2]},
        {"batch_sampler": [[1, 2], [3]]},
        {"batch_sampler": BatchSampler(WeightedRandomSampler([1.0] * 20, 5), 2, drop_last=False)},
    ],
)
def test_a_loader_that_does_not_say_which_samples_it_reads(options: dict[str, Any]) -> None:
    data = TensorDataset(torch.zeros(20, 3), torch.arange(20) % 2)
    with pytest.raises(DataError, match="give the data set, or a Subset of it"):
        as_samples(DataLoader(data, **options))


def test_random_transforms_are_refused(tmp_path: Path) -> None:
    folder = ImageFolder(str(pictures(tmp_path)), transform=RandomCrop(2))
    torch.manual_seed(0)
    with pytest.raises(DataError, match="sample 0 is another one each time"):
        as_samples(DataLoader(folder))


def test_vectors_with_numbers_to_predict() -> None:
    inputs, targets = torch.randn(20, 3), torch.randn(20)
    both = as_sample_set(TensorDataset(inputs, targets))
    assert isinstance(both.train, TargetSamples)
    assert both.test is not None
    assert (len(both.train), len(both.test), both.num_classes) == (16, 4, None)


# --- columns -------------------------------------------------------------------------------------


def test_columns_are_mapped_and_candidates_are_listed() -> None:
    cells = [Image.fromarray(one) for one in PIXELS]
    data = datasets.Dataset.from_dict({"front": cells, "back": cells[::-1], "kind": NAMES})
    expected = ImageSamples(PIXELS, CODES).fingerprint
    found = as_samples(data, columns={"image": "front", "label": "kind"})
    assert found.fingerprint == expected
    assert as_samples(data, columns="image=front,label=kind").fingerprint == expected
    with pytest.raises(DataError, match="the image could be 'front' or 'back'; say which"):
        as_samples(data, columns={"label": "kind"})
    with pytest.raises(DataError, match="no column 'sort' for the label; columns: 'front', 'back'"):
        as_samples(data, columns={"image": "front", "label": "sort"})
    with pytest.raises(DataError, match="unknown role 'picture'; expected image, text"):
        as_samples(data, columns={"picture": "front"})


def test_pictures_of_several_sizes_are_brought_to_one() -> None:
    cells = [Image.fromarray(one).resize((9, 7)) if r else Image.fromarray(one)
             for r, one in enumerate(PIXELS)]  # fmt: skip
    data = datasets.Dataset.from_dict({"image": cells, "label": CODES})
    with pytest.raises(DataError, match=r"row 1 is uint8 of shape \(1, 7, 9\).*--resize 32"):
        as_samples(data)
    with pytest.warns(DataWarning, match="data: pictures of several sizes were brought to 6x5"):
        samples: Any = as_samples(data, resize="6x5")
    assert samples.images.shape == (12, 1, 6, 5)
    assert torch.equal(samples.images[0, 0], torch.from_numpy(PIXELS[0]))  # of that size already
    flat = as_samples((np.full((3, 3, 6, 9), 7, np.uint8), [0, 1, 0]), resize=5)
    assert isinstance(flat, ImageSamples)
    assert flat.images.shape == (3, 3, 5, 5)
    assert bool((flat.images == 7).all())
    for size in ("0", "3x", "axb", "2x3x4"):
        with pytest.raises(DataError, match="expected N or HxW in pixels"):
            as_samples(data, resize=size)


def test_what_is_written_in_another_way_is_the_same() -> None:
    frame = pandas.DataFrame({"a": [1.0, 2, 3], "b": [0.5, 1, 2], "label": ["u", "v", "u"]})
    expected = as_samples(frame)
    for samples in (
        as_samples((frame[["a", "b"]], frame[["label"]])),
        as_samples((frame[["a", "b"]], np.array([["u"], ["v"], ["u"]]))),
        as_samples((frame[["a", "b"]], [["u"], ["v"], ["u"]])),
        as_samples(frame, columns={"features": ["a", "b"]}),
        as_samples(frame.rename(columns={"a": 0}), columns={"features": [0, "b"]}),  # type: ignore[list-item]
    ):
        assert samples.fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((PIXELS[:2], ["cat", 3]), "row 1 has the label 3 among names such as 'cat'"),
        ((PIXELS[:2], [["cat", 3], ["dog"]]), "some labels are texts"),
        (TensorDataset, r"data is the class TensorDataset; give one of it: TensorDataset\("),
        (datasets.Dataset.from_dict({"a": [1], "y": [0]}).to_iterable_dataset(), "streaming=True"),
        (pandas.DataFrame({"a": [], "label": []}), "no samples"),
    ],
)
def test_data_that_are_none(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_samples(data)


def test_a_size_that_is_none() -> None:
    with pytest.raises(DataError, match=r"resize 8.0: expected N or HxW"):
        as_samples((PIXELS, CODES), resize=8.0)  # type: ignore[arg-type]


# --- tables --------------------------------------------------------------------------------------

TABLE = "id,size,rooms,price,town\n1,50.5,2,1.5,a\n2,60,3,2.5,b\n3,75,1,3.25,a\n4,80,4,9,b\n"


def table(path: Path, text: str = TABLE) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_table_of_numbers(tmp_path: Path) -> None:
    file = table(tmp_path / "homes.csv", "\ufeff" + TABLE)  # as Excel saves UTF-8
    columns = {"features": "size+rooms", "label": "price"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples: Any = as_samples(pandas.read_csv(file), columns=columns)
    assert samples.inputs.tolist() == [[50.5, 2], [60, 3], [75, 1], [80, 4]]
    assert samples.targets.tolist() == [1.5, 2.5, 3.25, 9]
    both = as_sample_set(file, columns=columns, test_share=0.25)
    assert described(both) == "homes.csv: 3 training and 1 test samples, inputs 2"
    whole = as_sample_set(file, columns=columns, test_share=0)
    assert whole.train.fingerprint == samples.fingerprint
    pandas.read_csv(file).to_parquet(tmp_path / "homes.parquet")
    stored = as_sample_set(str(tmp_path / "homes.parquet"), columns=columns, test_share=0)
    assert stored.train.fingerprint == samples.fingerprint
    named = as_sample_set(file, columns={"features": "size+rooms", "label": "town"}, test_share=0)
    assert (labels_of(named.train), named.class_names) == ([0, 1, 0, 1], ("a", "b"))
    text = TABLE.replace(",town", "").replace(",a", "").replace(",b", "")
    rest = table(tmp_path / "rest.csv", text)
    with pytest.warns(DataWarning, match="column 'id' numbers the rows, and is no feature"):
        samples = as_sample_set(rest, columns="label=price", test_share=0).train
    assert samples.inputs.shape == (4, 2)


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        (TABLE, "", "no column is called as a label is .*columns: 'id', 'size'.*--target"),
        (TABLE, "label=prize", "no column 'prize' for the label; columns: 'id'"),
        (
            TABLE.replace("id", "age"),
            "label=price",
            "column 'town': row 0 is 'a', no number; write categories as",
        ),
        ("a,y\n1,2\n,3\n", "", "column 'a': row 1 has no value"),
        ("a,y\n1,2\nnan,3\n", "", "column 'a': row 1 is 'nan', no number"),
        ("a,y\n1,2\ninf,3\n", "", "column 'a': row 1 is 'inf', no number"),
        ("a,y\n1,2\n1_0,3\n", "", "column 'a': row 1 is '1_0', no number"),
        ("a,y\n1,x\n2,\n", "", "column 'y': row 1 has no label"),
        ("a,y\n1,2\n1e99,3\n", "", "column 'a': row 1 is not finite"),
        ("y,label,a\n1,2,3\n", "", "the label could be 'y' or 'label'"),
        ("a,y\n1,99999999999999999999999\n", "", "labels are object"),
        ("y\n1\n0\n", "", "no column is left for the features"),
        ("a,a,y\n1,2,3\n", "", "two columns called 'a'"),
        ("a,y\n1\n", "", "line 2: 1 values for 2 columns"),
        ("", "", "is empty"),
    ],
)
def test_tables_that_are_none(text: str, columns: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        as_sample_set(table(tmp_path / "t.csv", text), columns=columns, test_share=0)


def test_what_is_written_otherwise_is_called_otherwise(tmp_path: Path) -> None:
    """Names such as 01 and 1_1 are no numbers; clients are names, in the order of numbers."""
    text = "a,y,client\n1,01,1_1\n2,1,11\n3,01,11\n4,1,9\n"
    both = as_sample_set(table(tmp_path / "t.csv", text), test_share=0)
    assert (both.class_names, labels_of(both.train)) == (("01", "1"), [0, 1, 0, 1])
    assert both.train_groups is not None
    assert both.train_groups.tolist() == [1, 0, 0, 2]
    text = "a,y,client\n1,0,10\n2,1,9\n3,0,9\n"
    both = as_sample_set(table(tmp_path / "whole.csv", text), test_share=0)
    assert both.train_groups is not None
    assert both.train_groups.tolist() == [1, 0, 0]


def test_features_of_very_different_sizes_are_mentioned() -> None:
    frame = pandas.DataFrame({"a": [0.0, 1.0], "b": [0, 10**6], "y": [0.5, 1.5]})
    with pytest.warns(DataWarning, match=r"ranges reach from 1 to 1e\+06"):
        as_samples(frame)


def test_a_folder_of_tables_has_both_sides_and_clients(tmp_path: Path) -> None:
    table(tmp_path / "train.csv", "a,y,client\n1,u,south\n2,v,north\n3,u,south\n")
    table(tmp_path / "test.csv", "a,y,client\n4,v,north\n")
    both = as_sample_set(str(tmp_path))
    assert both.test is not None
    assert labels_of(both.test) == [1]
    assert both.train_groups is not None
    assert both.train_groups.tolist() == [1, 0, 1]
    assert "2 natural clients" in described(both)


# --- folders of class folders --------------------------------------------------------------------


def test_class_folders(tmp_path: Path) -> None:
    root = pictures(tmp_path / "root")
    both = as_sample_set(root, test_share=0)
    order = sorted(range(12), key=lambda row: (NAMES[row], row))
    expected = ImageSamples(PIXELS[order], sorted(CODES)).fingerprint
    assert both.train.fingerprint == expected
    assert (both.class_names, both.name) == (SORTED, "root")
    # What is no picture changes nothing, and is counted.
    (root / "ant" / ".hidden.png").write_bytes(b"?")
    (root / "cat" / "notes.txt").write_text("?")
    (root / "README.md").write_text("?")
    for name in (".cache", "__pycache__", "__MACOSX"):
        (root / name).mkdir()
    forget()
    with pytest.warns(DataWarning, match="3 files are hidden or no pictures"):
        assert as_sample_set(root, test_share=0).train.fingerprint == expected


def test_class_folders_of_two_sides_and_a_picture_alone(tmp_path: Path) -> None:
    pictures(tmp_path / "train")
    pictures(tmp_path / "val", ["dog"], PIXELS[:1])
    (tmp_path / "val" / "ant").mkdir()
    with pytest.warns(DataWarning, match="the class 'ant' has no pictures"):
        both = as_sample_set(tmp_path)
    assert both.test is not None
    assert labels_of(both.test) == [2]
    pictures(tmp_path / "val", ["owl"], PIXELS[:1])
    forget()
    with pytest.raises(DataError, match="the class 'owl', which is none of 'ant', 'cat', 'dog'"):
        as_sample_set(tmp_path)


def test_class_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no folders of classes; expected .*/CLASS/picture"):
        as_sample_set(tmp_path)
    (tmp_path / "ant").mkdir()
    with (
        pytest.warns(DataWarning, match="the class 'ant' has no pictures"),
        pytest.raises(DataError, match="no pictures in its 1 folders"),
    ):
        as_sample_set(tmp_path)
    pictures(tmp_path)
    (tmp_path / "dog" / "01.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    with pytest.raises(DataError, match=r"dog/01.png is not a picture"):
        as_sample_set(tmp_path, test_share=0)


def test_one_picture_of_a_class_stays_with_the_training_side(tmp_path: Path) -> None:
    names = ["many"] * 10 + ["one"] * 2
    pictures(tmp_path, names)
    (tmp_path / "one" / "11.png").unlink()
    both = as_sample_set(tmp_path)
    assert both.test is not None
    assert labels_of(both.train) == [0] * 8 + [1]
    assert labels_of(both.test) == [0, 0]


def test_sides_are_known_by_the_same_names_everywhere(tmp_path: Path) -> None:
    """And those that are not read are named."""
    two = (PIXELS[:2], ["dog", "cat"])
    both = as_sample_set({"train": (PIXELS, NAMES), "val": two})
    assert both.test is not None
    assert len(both.test) == 2
    with pytest.warns(DataWarning, match="given: the test side is test; not read: validation"):
        as_sample_set({"train": (PIXELS, NAMES), "validation": two, "test": two})
    with pytest.warns(DataWarning, match="the test side is set aside; not read: unsupervised"):
        as_sample_set({"train": (PIXELS, NAMES), "unsupervised": 1}, test_share=0.3)
    with pytest.raises(DataError, match="expected the sides train and test, got val"):
        as_sample_set({"val": two})
    table(tmp_path / "train.csv", "a,y\n1,u\n2,v\n")
    table(tmp_path / "val.csv", "a,y\n4,v\n")
    both = as_sample_set(str(tmp_path))
    assert both.test is not None
    assert labels_of(both.test) == [1]
    table(tmp_path / "test.tsv", "a\ty\n4\tu\n")
    forget()
    with pytest.warns(DataWarning, match=r"the test side is test; not read: val\.csv"):
        both = as_sample_set(str(tmp_path))
    assert both.test is not None
    assert labels_of(both.test) == [0]
    frame = pandas.DataFrame({"img": [_png(one) for one in PIXELS], "label": NAMES})
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("train", "val", "valid"):
        frame.to_parquet(folder / f"{name}.parquet")
    with pytest.warns(DataWarning, match=r"the valid side is valid\.parquet; not read: val\.parq"):
        both = as_sample_set(folder)
    assert both.test is not None
    assert len(both.test) == 12


def test_a_folder_that_is_a_side_is_no_class(tmp_path: Path) -> None:
    pictures(tmp_path / "seg_train")
    pictures(tmp_path / "seg_test")
    with pytest.raises(DataError, match=r"seg_test holds folders alone, so it is no class"):
        as_sample_set(tmp_path)
    pictures(tmp_path / "classes", ["trainer", "contest", "other"] * 4)
    assert as_sample_set(tmp_path / "classes", test_share=0).num_classes == 3


def test_folders_called_by_whole_numbers_are_in_their_order(tmp_path: Path) -> None:
    names = [str(number) for number in range(12)]
    pictures(tmp_path / "numbers", names)
    both = as_sample_set(tmp_path / "numbers", test_share=0)
    assert both.class_names == tuple(names)
    train: Any = both.train
    assert torch.equal(train.images[:, 0], torch.from_numpy(PIXELS))


# --- by name -------------------------------------------------------------------------------------


def test_a_factory_by_name_gives_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "import numpy\ndef pair(): return numpy.zeros((8, 4, 4), 'uint8'), ['u', 'v'] * 4\n"
    (tmp_path / "own_data_here.py").write_text(code + f"def folder(): return {str(tmp_path)!r}\n")
    try:
        both = as_sample_set("own_data_here:pair", test_share=0.25)
        assert (both.class_names, len(both.train)) == (("u", "v"), 6)
        few = load_sample_set("own_data_here:pair", how=reading(test_share=0.25), num_train=2)
        assert len(few.train) == 2
        with pytest.raises(DataError, match="no folders of classes"):
            as_sample_set("own_data_here:folder")
        with pytest.raises(DataError, match="has no 'nothing'"):
            as_sample_set("own_data_here:nothing")
    finally:
        sys.modules.pop("own_data_here", None)
    with pytest.raises(DataError, match=r"unknown data set 'diggits'; known: .*module:function"):
        as_sample_set("diggits")
    (tmp_path / "inputs.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"a file of another kind; .*inputs.npy and targets.npy"):
        as_sample_set(str(tmp_path / "inputs.npy"))


# --- flwr-datasets -------------------------------------------------------------------------------


def test_partitions_are_the_natural_clients() -> None:
    data = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(one) for one in PIXELS], "label": NAMES}
    ).class_encode_column("label")
    partitioner = IidPartitioner(num_partitions=3)
    with pytest.raises(DataError, match="the partitioner has no data set"):
        as_sample_set(partitioner)
    partitioner.dataset = data
    both = as_sample_set(partitioner, test_share=0)
    assert both.train_groups is not None
    for client in range(3):
        own = as_samples(partitioner.load_partition(client))
        rows = (both.train_groups == client).nonzero()[:, 0]
        assert torch.equal(both.train.batch(rows)[0], own.batch(torch.arange(4))[0])


def test_a_federated_data_set_brings_its_test_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    home = tmp_path / "home"
    home.mkdir()
    for side, rows in (("train", 12), ("test", 4)):
        frame = pandas.DataFrame({"a": range(rows), "b": [0.5] * rows, "label": CODES[:rows]})
        frame.to_csv(home / f"{side}.csv", index=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        federated = flwr_datasets.FederatedDataset(
            dataset=str(home), partitioners={"train": 4}, shuffle=False
        )
        both = as_sample_set(federated)
        swapped = flwr_datasets.FederatedDataset(
            dataset=str(home), partitioners={"test": 2}, shuffle=False
        )
        alone = as_sample_set(swapped, test_share=0)
    assert (len(alone.train), alone.test) == (4, None)
    assert both.test is not None
    assert (len(both.train), len(both.test)) == (12, 4)
    assert both.train_groups is not None
    assert both.train_groups.tolist() == sorted([0, 1, 2, 3] * 3)


def test_the_columns_of_a_test_side_are_those_of_the_training_side() -> None:
    """In its order, with others beside them; names are kept."""
    train = {"a": [1.0, 2.0], "b": [3.0, 4.0], "label": [0, 1]}
    test = {"label": [1, 0], "more": [9.0, 9.0], "b": [5.0, 6.0], "a": [7.0, 8.0]}
    both = as_sample_set({"train": train, "test": test})
    assert both.feature_names == ("a", "b")
    assert both.test is not None
    assert both.test.batch(torch.arange(2))[0].tolist() == [[7.0, 5.0], [8.0, 6.0]]
    with pytest.raises(DataError, match="no column 'b' for the features"):
        as_sample_set({"train": train, "test": {"a": [7.0], "label": [1]}})


def test_a_file_that_has_changed_is_read_anew(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    rows = [f"{x},{x % 3}" for x in range(30)]
    table.write_text("\n".join(["x,label", *rows]))
    first = load_sample_set(str(table))
    assert load_sample_set(str(table)) is first
    table.write_text("\n".join(["x,label", *rows, "30,0"]))
    again = load_sample_set(str(table))
    assert len(again.train) + len(again.test) == 31
