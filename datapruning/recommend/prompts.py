"""Texts for a language model: the titles of a history, and the title that comes next.

The form is that of BIGRec (Bao et al., A Bi-Step Grounding Paradigm for Large Language Models in
Recommendation Systems, 2023): an instruction with the history, answered by a title.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from datapruning.recommend.histories import HistorySamples
from datapruning.recommend.ragged import Ragged
from prunelab.data.samples import NO_LOSS, TokenSamples
from prunelab.errors import DataError


@dataclass(frozen=True)
class Template:
    """Words around titles: intro, titles with `joint` between them, outro; then the answer."""

    intro: str
    joint: str
    outro: str


TEMPLATES = {
    "instruction": Template(
        "Instruction: below are titles that a person chose, the oldest first. "
        "Answer with the title that this person chooses next.\nTitles: ",
        "; ",
        "\nAnswer: ",
    ),
    "plain": Template("", "; ", " -> "),
}
"""Name -> template; "plain" spares a model that knows no language the words."""


class Prompts:
    """Histories and answers as token ids.

    Parts are tokenised apart and put together as ids, so that prompt and answer meet at a token,
    in training as in generation. Where a prompt is too long, the oldest of the history goes.

    Args:
        tokenizer: of transformers, with an end token.
        titles: title of item i at i − 1.
        max_length: tokens of prompt and answer.
        max_titles: of a history.
        max_title: tokens of a title; what is longer is cut, and counted in `num_cut`.

    Raises:
        DataError: max_length leaves no room for a title and a history.
    """

    def __init__(
        self,
        tokenizer: Any,
        titles: Sequence[str],
        *,
        template: Template,
        max_length: int = 256,
        max_titles: int = 10,
        max_title: int = 32,
    ) -> None:
        self.max_length, self.max_titles = max_length, max_titles
        self.end = int(tokenizer.eos_token_id)
        self.padding = self.end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        self.begin = begin[0] if begin else self.end

        def encoded(texts: Sequence[str]) -> list[list[int]]:
            # A title may spell a token of the tokenizer's own, as "</s>": it stays text.
            found = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
            return list(found["input_ids"])

        intro, self._joint, self._outro = encoded([template.intro, template.joint, template.outro])
        self._intro = begin + intro
        whole = encoded(titles)
        self.titles = [title[:max_title] for title in whole]
        self.num_cut = sum(len(title) > max_title for title in whole)
        frame = len(self._intro) + len(self._outro) + 1
        if frame + 2 * max_title > max_length:
            raise DataError(
                f"two titles of up to {max_title} tokens and the {frame} tokens around them do "
                f"not fit into max_length = {max_length}; raise it, or lower max_title"
            )

    def prompt(self, history: Sequence[int], *, room: int) -> list[int]:
        """Token ids of a prompt that leaves `room` tokens for the answer."""
        inside: list[int] = []
        for item in history[-self.max_titles :]:
            inside += self._joint * bool(inside) + self.titles[item - 1]
        space = self.max_length - room - len(self._intro) - len(self._outro)
        return [*self._intro, *inside[max(0, len(inside) - space) :], *self._outro]

    def samples(self, samples: HistorySamples, *, rows: Tensor | None = None) -> TokenSamples:
        """Prompt, answer and end token of each sample; the loss is taken on the last two."""
        rows = torch.arange(len(samples)) if rows is None else rows
        return self._pairs(samples.history.take(rows), samples.targets[rows], ids=samples.ids[rows])

    def questions(self, history: Ragged, targets: Tensor) -> TokenSamples:
        """As `samples`, for one target a history: what the loss on held-out data is taken of."""
        return self._pairs(history, targets, ids=None)

    def catalogue(self) -> TokenSamples:
        """The answers alone, each after the begin token: what a model can learn of titles."""
        ids = Ragged.of([self.begin, *title, self.end] for title in self.titles)
        return _token_samples(ids, torch.ones_like(ids.lengths), padding=self.padding, ids=None)

    def to_generate(self, history: Ragged, *, room: int) -> tuple[Tensor, Tensor]:
        """Prompts padded on the left, and their attention mask: int64 [Q, T] both."""
        prompts = [self.prompt(history[q].tolist(), room=room) for q in range(len(history))]
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.padding)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        lengths = torch.tensor(list(map(len, prompts)))
        return ids, (torch.arange(longest) >= longest - lengths[:, None]).long()

    def _pairs(self, history: Ragged, targets: Tensor, *, ids: Tensor | None) -> TokenSamples:
        rows, lengths = [], []
        for row, target in enumerate(targets.tolist()):
            answer = [*self.titles[target - 1], self.end]
            prompt = self.prompt(history[row].tolist(), room=len(answer))
            rows.append(prompt + answer)
            lengths.append(len(prompt))
        tokens, prompts = Ragged.of(rows), torch.tensor(lengths)
        return _token_samples(tokens, prompts, padding=self.padding, ids=ids)


def texts_of(titles: Sequence[str], template: Template) -> list[str]:
    """What a tokenizer from scratch is trained on: each title once, and the words around it."""
    return [*titles, template.intro, template.joint, template.outro]


def _token_samples(
    tokens: Ragged, prompts: Tensor, *, padding: int, ids: Tensor | None
) -> TokenSamples:
    table = tokens.padded(fill=padding)
    places = torch.arange(table.shape[1])
    mask = places < tokens.lengths[:, None]
    targets = table.masked_fill(~mask | (places < prompts[:, None]), NO_LOSS)
    return TokenSamples(table, mask.long(), targets, ids=ids)
