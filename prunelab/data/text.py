"""Texts as people have them, tokenised into samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from prunelab.data.columns import LABEL_NAMES, TEXT_NAMES, Columns, columns_of
from prunelab.data.labels import as_classes
from prunelab.data.samples import NO_LOSS, TokenSamples
from prunelab.errors import DataError


def tokenized(
    dataset: Any,
    tokenizer: Callable[..., Any],
    *,
    text: str | None = None,
    label: str | None = None,
    max_length: int = 128,
) -> TokenSamples:
    """Samples of texts, padded on the right.

    Without labels they are for a causal language model: each token is a target.

    Args:
        dataset: a data set of Hugging Face, a frame of pandas, a list of mappings, or a mapping of
            columns.
        tokenizer: one of transformers, or a function of one text that gives its token ids.
        text: the column of the texts; by default the one called text, sentence or the like, or
            the only one that holds texts beside the label.
        label: the column of the classes, as names or whole numbers (names are numbered in sorted
            order); by default the one called label or the like, if there is one.
        max_length: tokens of a text that are kept, from its beginning.

    Raises:
        DataError: no such column, several that could be meant, a text that is missing or has no
            token, or labels that are no classes.

    >>> rows = [{"text": "ab", "label": "good"}, {"text": "c", "label": "bad"}]
    >>> samples = tokenized(rows, lambda text: [ord(letter) for letter in text])
    >>> samples.input_ids.tolist(), samples.labels.tolist(), samples.class_names
    ([[97, 98], [99, 0]], [1, 0], ('bad', 'good'))
    """
    columns = columns_of(dataset)
    if columns is None:
        raise DataError(
            f"texts are a {type(dataset).__name__}; expected a data set of Hugging Face, a frame "
            "of pandas, or a list of mappings such as {'text': ..., 'label': ...}"
        )
    return tokenized_columns(columns, tokenizer, text=text, label=label, max_length=max_length)


def tokenized_columns(
    columns: Columns,
    tokenizer: Callable[..., Any],
    *,
    text: str | None = None,
    label: str | None = None,
    max_length: int = 128,
    class_names: Sequence[str] | None = None,
) -> TokenSamples:
    """As `tokenized`; `class_names` are those of another side, whose numbers names get."""
    if max_length < 1:
        raise DataError(f"max_length is {max_length}; expected at least 1 token")
    label = columns.pick(label, LABEL_NAMES, "label")
    text = columns.pick(text, TEXT_NAMES, "text") or _only_texts(columns, label)
    ids = _token_ids(columns.read(text), tokenizer, max_length, f"{columns.where}, column {text!r}")
    length = max(map(len, ids))
    padding = getattr(tokenizer, "pad_token_id", None) or 0
    input_ids = np.full((len(ids), length), padding, np.int64)
    mask = np.zeros_like(input_ids)
    for row, tokens in enumerate(ids):
        input_ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    if label is None:
        return TokenSamples(input_ids, mask, np.where(mask == 1, input_ids, NO_LOSS))
    classes, names = as_classes(
        columns.read(label),
        class_names=class_names,
        own_names=columns.class_names.get(label, ()),
        fields=columns.fields(label) if columns.fields else None,
        where=f"{columns.where}, column {label!r}",
    )
    return TokenSamples(input_ids, mask, classes, class_names=names)


def _only_texts(columns: Columns, label: str | None) -> str:
    """The only column whose first cell is a text."""
    others = [name for name in columns.names if name != label]
    found = [n for n in others if len(v := columns.read(n)) and isinstance(v[0], str)]
    if len(found) != 1:
        raise DataError(
            f"{columns.where}: {'no column holds texts' if not found else 'texts could be '}"
            f"{' or '.join(map(repr, found))}; columns: {', '.join(map(repr, columns.names))}; "
            "say which by text=..."
        )
    return found[0]


def _token_ids(
    texts: Sequence[Any], tokenizer: Callable[..., Any], max_length: int, where: str
) -> list[Any]:
    """Token ids of each text, at least one, at most `max_length`."""
    if not len(texts):
        raise DataError(f"{where}: no samples")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{where}: row {row} is {text!r}, expected a text")
    if hasattr(tokenizer, "model_max_length"):  # of transformers: many at a time are fast
        ids = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    else:
        given = [tokenizer(text) for text in texts]
        ids = [list(one["input_ids"] if isinstance(one, Mapping) else one) for one in given]
        ids = [tokens[:max_length] for tokens in ids]
    for row, tokens in enumerate(ids):
        if not len(tokens):
            raise DataError(f"{where}: row {row}, {texts[row]!r}, has no token; leave it out")
    return list(ids)
