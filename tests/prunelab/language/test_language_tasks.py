"""What perplexity hides: facts, retrieval and agreement of models that were made by hand."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from prunelab.errors import DataError
from prunelab.language.perplexity import perplexity
from prunelab.language.tasks import (
    Agreement,
    Facts,
    Found,
    agreement,
    facts,
    facts_kept,
    planted,
    retrieval,
)

SURE = 10.0


class Bigrams(nn.Module):
    """Predicts the next token from the present one, by given logits [tokens, tokens]."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.dropout(self.table[input_ids]))


class Copying(nn.Module):
    """Predicts what followed the present token when it stood first in the sequence; else nothing.

    An induction head without the head.
    """

    def __init__(self, tokens: int, strength: float = SURE) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(strength))
        self.tokens = tokens

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, self.tokens)
        seen = (input_ids == input_ids[:, :1]) & (torch.arange(input_ids.shape[1]) > 0)
        rows, columns = seen.nonzero(as_tuple=True)
        logits[rows, columns, input_ids[rows, 1]] = self.strength.detach()
        return SimpleNamespace(logits=logits)


def chain(tokens: int, links: dict[int, int]) -> Bigrams:
    """Sure of the links, and of nothing else."""
    table = torch.zeros(tokens, tokens)
    for token, following in links.items():
        table[token, following] = SURE
    return Bigrams(table)


def text() -> Tensor:
    """0 and 1 in turn, and in each sequence a name, 2 + i, with its fact, 6 + i, at the end."""
    common = torch.tensor([0, 1] * 8).expand(4, -1)
    names = torch.stack([torch.arange(4) + 2, torch.arange(4) + 6], 1)
    return torch.cat([common, names], 1)


KNOWN = {0: 1, 1: 0, 2: 6, 3: 7, 4: 8, 5: 9}


def test_facts_are_the_rare_tokens_of_which_the_model_is_sure() -> None:
    """0 and 1 are known and common; the names are rare, and nobody can know them."""
    dense = chain(10, KNOWN)
    for size in (1, 3, 8):
        asked = facts(dense, text(), rare=0.02, batch_size=size)
        assert asked.places.tolist() == [[0, 17], [1, 17], [2, 17], [3, 17]]
        assert asked.tokens.tolist() == [6, 7, 8, 9]
        assert facts_kept(dense, asked, batch_size=size) == 1.0
    everything = facts(dense, text(), rare=1.0)
    assert len(everything.places) == 4 * 15 + 4
    # A reference in which the facts are common leaves none but the last, which it lacks.
    reference = torch.tensor([6, 7, 8] * 5)
    assert facts(dense, text(), rare=0.02, reference=reference).tokens.tolist()[-1] == 9
    assert 6 not in facts(dense, text(), rare=0.02, reference=reference).tokens


def test_a_model_is_sure_above_its_threshold_alone() -> None:
    """Two logits of log 3 and 0 among ten zeros: 3 / 12 is a quarter; of log 27: 27 / 36."""
    for value, is_fact in ((math.log(3), False), (math.log(27), True)):
        table = torch.zeros(10, 10)
        table[2, 6] = value
        model = Bigrams(table)
        if is_fact:
            assert facts(model, text(), rare=0.02).tokens.tolist() == [6]
            with pytest.raises(DataError, match=r"more than 0\.8; give a longer text"):
                facts(model, text(), rare=0.02, sure=0.8)
        else:
            with pytest.raises(DataError, match=r"more than 0\.5; give a longer text"):
                facts(model, text(), rare=0.02)


def test_facts_are_lost_where_perplexity_hardly_tells() -> None:
    dense = chain(10, KNOWN)
    forgetful = chain(10, {**KNOWN, 2: 7, 3: 8})
    asked = facts(dense, text(), rare=0.02)
    assert facts_kept(forgetful, asked) == 0.5
    assert perplexity(forgetful, text()) < 1.5 * perplexity(dense, text())
    broken = Bigrams(torch.full((10, 10), math.nan))
    assert facts_kept(broken, Facts(torch.zeros(1, 2).long(), torch.tensor([[0, 1]]))) == 0.0


def test_a_plant_is_in_its_place_and_nowhere_else() -> None:
    chosen = torch.randint(0, 50, (20, 12), generator=torch.Generator().manual_seed(0))
    made, again, other = (planted(chosen, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(made.sequences, again.sequences)
    assert not torch.equal(made.sequences, other.sequences)
    keys = made.sequences[:, 0]
    assert torch.equal(made.sequences[:, -1], keys)
    assert torch.equal(made.without[:, -1], keys)
    assert torch.equal(made.sequences[:, 1], made.values)
    assert torch.equal(made.without[:, :-1], chosen[:, :-1])
    assert torch.equal(made.sequences[:, 2:-1], chosen[:, 2:-1])
    for row, key, value in zip(chosen.tolist(), keys.tolist(), made.values.tolist(), strict=True):
        assert key != value
        assert not {key, value} & set(row)
    few = planted(chosen, seed=0, candidates=torch.tensor([60, 61]))
    assert set(few.sequences[:, 0].tolist()) == {60, 61}
    assert torch.equal(few.sequences[:, 0] + few.values, torch.full((20,), 121))


def test_a_model_that_copies_finds_what_was_planted() -> None:
    """e^10 against 49 others with the pair; without it all 50 are alike: rank 25.5."""
    chosen = torch.randint(0, 50, (20, 12), generator=torch.Generator().manual_seed(0))
    asked = planted(chosen, seed=3)
    for size in (1, 8, 32):
        found = retrieval(Copying(50), asked, batch_size=size)
        assert found.planted.first == 1.0
        assert found.planted.rank == 1.0
        assert found.planted.probability == pytest.approx(1 / (1 + 49 * math.exp(-SURE)), rel=1e-5)
        assert found.without == Found(0.0, 25.5, pytest.approx(1 / 50))
    opposed = retrieval(Copying(50, strength=-1.0), asked).planted
    assert (opposed.first, opposed.rank) == (0.0, 50.0)


def test_a_model_without_context_finds_nothing() -> None:
    chosen = torch.randint(0, 50, (20, 12), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    found = retrieval(Bigrams(torch.randn(50, 50)), planted(chosen, seed=3))
    assert found.planted == found.without
    broken = retrieval(Bigrams(torch.full((50, 50), math.nan)), planted(chosen, seed=3))
    assert broken.planted == Found(0.0, 50.0, 0.0)


def test_agreement_is_that_of_the_counts() -> None:
    torch.manual_seed(0)
    dense, pruned = Bigrams(torch.randn(6, 6)).train(), Bigrams(torch.randn(6, 6)).train()
    pruned.dropout.eval()
    chosen = torch.randint(0, 6, (7, 9))
    p, q = (m.table.detach().double().log_softmax(1) for m in (dense, pruned))
    asked = chosen[:, :-1].flatten()
    kl = (p.exp() * (p - q)).sum(1)[asked].mean().item()
    share = (p.argmax(1) == q.argmax(1))[asked].double().mean().item()
    for size in (1, 3, 8):
        found = agreement(pruned, dense, chosen, batch_size=size)
        assert found.kl == pytest.approx(kl, rel=1e-5)
        assert found.share == pytest.approx(share)
    assert 0 < share < 1
    assert dense.training
    assert dense.dropout.training
    assert not pruned.dropout.training
    assert agreement(dense, copy.deepcopy(dense), chosen) == Agreement(1.0, 0.0)


def test_agreement_by_hand() -> None:
    """KL of (½, ½) from (¼, ¾) is ½ log 2 + ½ log ⅔; an excluded token adds nothing."""
    chosen = torch.zeros(1, 3, dtype=torch.long)

    def rows(*values: float) -> Bigrams:
        return Bigrams(torch.tensor([values] * 3).log())

    dense = rows(0.5, 0.5, 0.0)
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert agreement(rows(0.25, 0.75, 0.0), dense, chosen).kl == pytest.approx(expected, rel=1e-5)
    assert agreement(rows(1.0, 0.0, 0.0), dense, chosen) == Agreement(1.0, math.inf)
    broken = Bigrams(torch.full((3, 3), math.nan))
    for reference in (dense, broken):
        assert agreement(broken, reference, chosen) == Agreement(0.0, math.inf)


def test_what_cannot_be_asked_is_told() -> None:
    model = chain(10, KNOWN)
    for call, reason in (
        (lambda: facts(model, torch.zeros(4).long()), r"\[n, length\].* got shape \(4,\)"),
        (lambda: facts(model, text(), sure=0.4), "sure in"),
        (lambda: facts(model, text(), rare=0.0), "rare in"),
        (lambda: agreement(model, model, torch.zeros(2, 1).long()), "a length of 2 or more"),
        (lambda: planted(torch.zeros(2, 2).long(), seed=0), "a length of 3 or more"),
        (lambda: planted(torch.tensor([[0, 1, 2, 3]]), seed=0), "sequence 0 leaves 0 tokens"),
    ):
        with pytest.raises(DataError, match=reason):
            call()
