"""Texts as people have them become padded tokens."""

from __future__ import annotations

from typing import Any

import datasets
import pandas
import pytest
import torch

import datapruning
from datapruning.recommend.language import train_tokenizer
from prunelab.errors import DataError

TEXTS = ["a good film", "bad", "good good"]
NAMES = ["pos", "neg", "pos"]


def _hugging_face(**columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_a_tokenizer_of_transformers_gives_its_own_tokens_padded_on_the_right() -> None:
    tokenizer = train_tokenizer(TEXTS, vocabulary=300)
    samples = datapruning.tokenized(_hugging_face(text=TEXTS, label=NAMES), tokenizer)
    for row, text in enumerate(TEXTS):
        length = int(samples.attention_mask[row].sum())
        assert samples.input_ids[row, :length].tolist() == tokenizer(text)["input_ids"]
        assert set(samples.input_ids[row, length:].tolist()) <= {tokenizer.pad_token_id}
    assert samples.labels is not None
    assert samples.labels.tolist() == [1, 0, 1]
    assert samples.class_names == ("neg", "pos")


@pytest.mark.parametrize(
    "rows",
    [
        _hugging_face(text=TEXTS, label=NAMES),
        _hugging_face(text=TEXTS, label=NAMES).class_encode_column("label"),
        pandas.DataFrame({"text": TEXTS, "label": NAMES}),
        pandas.DataFrame({"text": TEXTS, "label": pandas.Categorical(NAMES)}),
        [{"text": t, "label": n} for t, n in zip(TEXTS, NAMES, strict=True)],
        {"text": TEXTS, "label": NAMES},
        {"review": TEXTS, "y": NAMES},
        {"words": TEXTS, "label": NAMES},
    ],
)
def test_every_way_to_hold_texts_gives_the_same_samples(rows: Any) -> None:
    first = datapruning.tokenized({"text": TEXTS, "label": NAMES}, letters)
    samples = datapruning.tokenized(rows, letters)
    assert samples.fingerprint == first.fingerprint
    assert samples.class_names == ("neg", "pos")


def test_without_labels_every_token_is_a_target_and_no_padding_is() -> None:
    samples = datapruning.tokenized([{"text": "abc"}, {"text": "d"}], letters, max_length=2)
    assert samples.input_ids.tolist() == [[97, 98], [100, 0]]
    assert samples.targets.tolist() == [[97, 98], [100, -100]]
    assert samples.labels is None


def test_columns_are_named_and_whole_numbers_are_classes_as_they_are() -> None:
    rows = {"text": ["x", "y"], "title": ["ab", "c"], "label": [0, 1], "kind": [2, 0]}
    samples = datapruning.tokenized(rows, letters, text="title", label="kind")
    assert samples.input_ids.tolist() == [[97, 98], [99, 0]]
    assert torch.equal(samples.targets, torch.tensor([2, 0]))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ({"text": TEXTS}, {"text": "txt"}, "no column 'txt' for the text; columns: 'text'"),
        ({"text": TEXTS, "review": TEXTS}, {}, "could be 'text' or 'review'"),
        ({"one": TEXTS, "two": TEXTS}, {}, "texts could be 'one' or 'two'"),
        ({"one": [1, 2]}, {}, "no column holds texts"),
        ({"text": ["a", None]}, {}, "row 1 is None, expected a text"),
        ({"text": ["a", ""]}, {}, "row 1, '', has no token"),
        ({"text": []}, {}, "no samples"),
        ({"text": ["a", "b"], "label": ["x", None]}, {}, "row 1 has the label None among names"),
        ({"text": ["a", "b"], "label": [0, 10**30]}, {}, "label"),
        ({"text": ["a", "b"], "label": [0, -1]}, {}, "row|sample 1 has the label -1"),
        ({"text": ["a"]}, {"max_length": 0}, "max_length is 0"),
        ([{"text": "a"}, {"txt": "b"}], {}, "row 1 has no 'text'"),
        (TEXTS, {}, "texts are a list; expected a data set of Hugging Face"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(
    rows: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        datapruning.tokenized(rows, letters, **options)
