"""Masks: counts, digests, equality, application, selection by score."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from sparsemodel.errors import DensityError, MaskError
from sparsemodel.masks.mask import Mask, mask_from_scores, prunable_parameters

T, F = True, False


def small_mask() -> Mask:
    return Mask({"a": torch.tensor([[T, F], [F, T]]), "b": torch.tensor([F, F, T, F])})


def test_counts_and_indices_of_a_small_mask() -> None:
    """a keeps flat 0 and 3 of 4, b keeps 2 of 4: 3 of 8 active, density 0.375."""
    mask = small_mask()
    assert (mask.num_active, mask.num_weights, mask.density) == (3, 8, 0.375)
    assert mask.counts() == {"a": 2, "b": 1}
    assert mask.densities() == {"a": 0.5, "b": 0.25}
    assert mask.shapes() == {"a": (2, 2), "b": (4,)}
    assert mask.active("a").tolist() == [0, 3]
    assert mask.pruned("b").tolist() == [0, 1, 3]
    assert mask.active("a").dtype == torch.int64
    assert list(mask) == ["a", "b"]


def test_patterns_are_copied() -> None:
    pattern = torch.tensor([T, F])
    mask = Mask({"a": pattern})
    pattern[1] = True
    assert mask.num_active == 1


@pytest.mark.parametrize(
    "patterns",
    [{}, {"a": torch.ones(2)}, {"a": torch.ones(0, dtype=torch.bool)}],
    ids=["none", "float", "empty"],
)
def test_bad_patterns_are_refused(patterns: dict[str, torch.Tensor]) -> None:
    with pytest.raises(MaskError):
        Mask(patterns)


def test_digest_tells_pattern_shape_name_and_order_apart() -> None:
    base = small_mask()
    others = [
        base.replace({"b": torch.tensor([F, T, F, F])}),
        Mask({"a": base["a"].reshape(4), "b": base["b"]}),
        Mask({"a": base["a"], "c": base["b"]}),
        Mask({"b": base["b"], "a": base["a"]}),
    ]
    digests = {mask.digest() for mask in [base, *others]}
    assert len(digests) == 5
    assert all(len(digest) == 32 for digest in digests)
    assert base == small_mask()
    assert hash(base) == hash(small_mask())
    assert base != others[0]


def test_replace_refuses_unknown_names_and_other_shapes() -> None:
    with pytest.raises(MaskError, match="no layer 'c'"):
        small_mask().replace({"c": torch.tensor([T])})
    with pytest.raises(MaskError, match="expected shape"):
        small_mask().replace({"b": torch.tensor([T])})


def test_apply_zeroes_pruned_weights_even_infinite_ones() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[5.0, float("inf")]]))
    Mask({"weight": torch.tensor([[T, F]])}).apply(layer)
    assert layer.weight.tolist() == [[5.0, 0.0]]


def test_apply_refuses_a_model_that_does_not_fit() -> None:
    with pytest.raises(MaskError, match="no parameter"):
        small_mask().apply(nn.Linear(2, 2))
    with pytest.raises(MaskError, match="shape"):
        Mask({"weight": torch.ones(3, dtype=torch.bool)}).apply(nn.Linear(2, 2))


def test_prunable_parameters_leave_out_stem_biases_and_normalisation() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2)
    )
    assert list(prunable_parameters(model)) == ["2.weight", "4.weight"]
    assert list(prunable_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))) == [
        "1.weight"
    ]
    assert list(prunable_parameters(nn.Linear(2, 2))) == ["weight"]
    with pytest.raises(MaskError, match="nothing can be pruned"):
        prunable_parameters(nn.BatchNorm1d(2))


class StemLast(nn.Module):
    """Registers its layers from the output to the input."""

    def __init__(self, *, traceable: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.middle = nn.Conv2d(4, 4, 1)
        self.stem = nn.Conv2d(3, 4, 3)
        self.traceable = traceable

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.traceable and x.sum() > 0:  # before any layer
            x = x + 1
        x = self.middle(self.stem(x))
        if x.sum() > 0:  # what comes after the stem need not be traced
            x = x + 1
        y: torch.Tensor = self.head(x.mean((2, 3)))
        return y


def wrapped(*layers: nn.Module) -> list[str]:
    return list(prunable_parameters(nn.Sequential(*layers)))


def test_the_stem_is_what_the_input_reaches_first() -> None:
    assert list(prunable_parameters(StemLast())) == ["head.weight", "middle.weight"]
    model = StemLast().eval()
    model.head.eval().train()
    before = dict(vars(model)), [m.training for m in model.modules()]
    prunable_parameters(model)
    assert (dict(vars(model)), [m.training for m in model.modules()]) == before
    # A linear layer before a convolution; a transposed or looked-up input.
    first = nn.Sequential(nn.Linear(8, 8), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 2, 1))
    assert list(prunable_parameters(first)) == ["2.weight"]
    transposed = nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    assert wrapped(*transposed) == ["1.weight", "2.weight"]
    attention = nn.TransformerEncoderLayer(4, 2, 8)  # whose input projection is no layer
    names = ["0.self_attn.out_proj.weight", "0.linear1.weight", "0.linear2.weight", "1.weight"]
    assert wrapped(attention, nn.Linear(4, 2)) == names
    assert list(prunable_parameters(attention)) == [n.removeprefix("0.") for n in names[:3]]
    assert wrapped(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)) == ["1.weight", "2.weight"]


def test_where_code_cannot_be_followed_the_stem_is_the_first_registered_convolution() -> None:
    names = list(prunable_parameters(StemLast(traceable=False)))
    assert names == ["head.weight", "stem.weight"]


def test_a_stem_is_not_pruned_because_other_layers_cannot_be() -> None:
    """Not even where it is the only layer with a weight of its own."""
    norm = nn.utils.parametrizations.weight_norm
    stem, other = nn.Conv2d(3, 4, 3), norm(nn.Conv2d(4, 4, 3))
    with pytest.raises(MaskError, match=r"nothing can be pruned; it has Conv2d '0', Parametrized"):
        wrapped(stem, nn.ReLU(), other)
    with pytest.raises(MaskError, match=r"it has Conv2d '0', ConvTranspose2d '1'"):
        wrapped(stem, nn.ConvTranspose2d(4, 4, 2))
    assert wrapped(stem, other, nn.Flatten(), nn.Linear(4, 2)) == ["3.weight"]
    assert wrapped(norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)) == [
        *("1.weight", "2.weight")
    ]
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    tied[1].weight = tied[0].weight
    with pytest.raises(MaskError, match=r"it has Embedding '0', Linear '1': remove"):
        prunable_parameters(tied)


def test_what_is_frozen_or_tied_is_not_offered() -> None:
    """Neither has a sparse form that trains; of a model that is wholly frozen all is offered."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    model[1].requires_grad_(False)
    model[3].bias = model[2].bias
    assert list(prunable_parameters(model)) == ["4.weight"]
    model[3].bias, model[4].weight = nn.Parameter(torch.zeros(4)), model[3].weight
    assert list(prunable_parameters(model)) == ["2.weight"]
    shared = nn.Linear(4, 4)  # one layer that is called twice is no tie
    assert wrapped(nn.Linear(4, 4), shared, nn.ReLU(), shared) == ["1.weight"]
    frozen = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    assert list(prunable_parameters(frozen)) == ["1.weight"]
    frozen[0].weight.requires_grad_(True)
    with pytest.raises(MaskError, match="train what is frozen"):
        prunable_parameters(frozen)


class Conv1D(nn.Module):
    """As transformers has it for GPT-2: a linear layer of the transposed weight."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(in_features, out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_layers_of_other_classes_are_named() -> None:
    with pytest.raises(MaskError, match=r"it has Conv1D '0', Conv1D '1': .*Conv1D\) for nn.Linear"):
        wrapped(Conv1D(4, 4), Conv1D(4, 4))
    assert wrapped(Conv1D(4, 4), nn.Linear(4, 2)) == ["1.weight"]


def test_equal_scores_keep_the_lower_index() -> None:
    mask = mask_from_scores({"a": torch.tensor([1.0, 2.0, 2.0, 2.0])}, {"a": 2})
    assert mask["a"].tolist() == [F, T, T, F]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.data())
def test_mask_from_scores_keeps_exactly_the_best(scores: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, len(scores)))
    mask = mask_from_scores({"a": torch.tensor(scores)}, {"a": keep})
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep]
    assert mask.active("a").tolist() == sorted(best)


def test_mask_from_scores_refuses_what_it_cannot_order() -> None:
    with pytest.raises(MaskError, match="NaN"):
        mask_from_scores({"a": torch.tensor([float("nan")])}, {"a": 1})
    with pytest.raises(MaskError, match="counts for"):
        mask_from_scores({"a": torch.ones(1)}, {"b": 1})
    with pytest.raises(DensityError, match="cannot keep 2"):
        mask_from_scores({"a": torch.ones(1)}, {"a": 2})
