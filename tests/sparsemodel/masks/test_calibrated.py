"""Criteria of calibration statistics: by hand, against removal itself, and where they must win."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_language import llama, texts
from torch import Tensor, nn

from sparsemodel.calibration.collect import GRADIENTS, GRAM, INPUTS, calibrate
from sparsemodel.calibration.statistics import Calibration, Moments, Sums
from sparsemodel.errors import CalibrationError, DensityError, MaskError
from sparsemodel.masks.by_blocks import block_weights, prune_blocks
from sparsemodel.masks.calibrated import dpruner, gblm, obs, taylor_mixed, wanda
from sparsemodel.masks.prune import prune
from sparsemodel.masks.registry import CALIBRATED, CRITERIA, needs_of
from sparsemodel.masks.structure import is_n_of_m

NAME = "weight"


class Layer(nn.Module):
    """One linear layer, as a model."""

    def __init__(self, out: int = 4, features: int = 6, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(features, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


FC = ["fc.weight"]


def inputs(count: int = 50, features: int = 6, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, features, generator=generator)
    return mixed @ torch.randn(features, features, generator=generator)


def test_wanda_squared_is_the_change_of_the_output() -> None:
    model, x = Layer(), inputs()
    scores = wanda(model, FC, calibrate(model, [x], needs_of(wanda, FC)))["fc.weight"]
    weight = model.fc.weight.detach().double()
    for i in range(4):
        for j in range(6):
            removed = weight.clone()
            removed[i, j] = 0
            change = (x.double() @ (weight - removed).T).square().sum().item()
            assert scores[i, j].item() ** 2 == pytest.approx(change, rel=1e-4)


def test_obs_is_the_change_where_the_others_make_up_for_it() -> None:
    """Removal followed by least squares over the weights that stay: w² / [H⁻¹]_jj of damped H."""
    model, x = Layer(), inputs()
    found = calibrate(model, [x], needs_of(obs, FC))
    scores = obs(model, FC, found)["fc.weight"]
    products = x.double().T @ x.double()
    h = products + 0.01 * products.diagonal().mean() * torch.eye(6).double()
    weight = model.fc.weight.detach().double()
    for i in range(4):
        for j in range(6):
            rest = [k for k in range(6) if k != j]
            # min over δ with δ_j = −w_j of δᵀHδ
            moved = torch.linalg.solve(h[rest][:, rest], h[rest, j] * weight[i, j])
            delta = torch.zeros(6).double()
            delta[j], delta[rest] = -weight[i, j], moved
            assert scores[i, j].item() == pytest.approx((delta @ h @ delta).item(), rel=1e-4)


def test_gblm_without_gradients_is_wanda() -> None:
    model, batches = llama().eval(), texts(2)
    names = block_weights(model)["model.layers.1"]
    found = calibrate(model, batches, needs_of(gblm, names))
    plain, zero = wanda(model, names, found), gblm(model, names, found, alpha=0.0)
    assert all(torch.equal(plain[name], zero[name]) for name in names)
    name = names[0]
    squares = found.sums(GRADIENTS, name.removesuffix(".weight")).totals["squares"]
    weight = model.get_parameter(name).detach().double()
    expected = weight.abs() * (found.moments(INPUTS, name[:-7]).norms + 100 * squares.sqrt())
    torch.testing.assert_close(
        gblm(model, names, found)[name].double(), expected, rtol=1e-5, atol=0
    )


def test_taylor_by_hand() -> None:
    """w = 2, g = .5, F = .25: first order 1, second order 1, mixed .5."""
    model = Layer(1, 1)
    model.fc.weight.data.fill_(2.0)
    totals = {"gradient": torch.tensor([[1.0]]), "squares": torch.tensor([[0.5]])}
    found = Calibration({(GRADIENTS, "fc"): Sums.of(2, absolute=torch.ones(1, 1), **totals)})
    assert taylor_mixed(model, FC, found)["fc.weight"].item() == 0.5


def domain_and_open(gradient: Tensor, squares: Tensor, products: Tensor) -> Calibration:
    totals = {"gradient": gradient, "squares": squares, "absolute": squares}
    of_domain = Calibration({(GRADIENTS, "fc"): Sums.of(1, **totals)})
    return of_domain.merge(Calibration({(GRAM, "fc"): Sums.of(7, products=products)}))


def test_dpruner_by_hand() -> None:
    """w = (1, 2), g = (1, 1), F = (1, .5); H is diagonal, so G = w² H = (1, 4) · (3, .75) = (3, 3).

    G F = (3, 1.5), over its mean (4/3, 2/3). At a strength of .3 g′ = (1.4, 1.2), and the scores
    are 1.4 − .5 = .9 and 2.4 − 1 = 1.4. H is damped by .01 of its mean, which moves both a little.
    """
    model = Layer(1, 2)
    model.fc.weight.data.copy_(torch.tensor([[1.0, 2.0]]))
    h = torch.tensor([3.0, 0.75]) - 0.01 * 1.875 / 1.01  # damped, it is (3, .75)
    found = domain_and_open(torch.ones(1, 2), torch.tensor([[1.0, 0.5]]), torch.diag(h))
    scores = dpruner(model, FC, found, strength=0.3)["fc.weight"]
    torch.testing.assert_close(scores, torch.tensor([[0.9, 1.4]]))


def test_dpruner_of_no_strength_is_the_plain_taylor_score() -> None:
    model = llama().eval()
    names = block_weights(model)["model.layers.1"]
    modules = [name.removesuffix(".weight") for name in names]
    found = calibrate(model, texts(2, seed=1), {GRAM: modules}).merge(
        calibrate(model, texts(2, seed=2), {GRADIENTS: modules})
    )
    plain, zero = taylor_mixed(model, names, found), dpruner(model, names, found, strength=0.0)
    assert all(torch.equal(plain[name], zero[name]) for name in names)
    other = calibrate(model, texts(2, seed=3), {GRAM: modules})
    moved = Calibration({**found, **other})
    for name in names:
        one, two = dpruner(model, names, found)[name], dpruner(model, names, moved)[name]
        assert not torch.equal(one, plain[name])
        assert not torch.equal(one, two)  # open text has a say


def test_dpruner_does_not_depend_on_units_of_open_text() -> None:
    model, drawn = Layer(), torch.Generator().manual_seed(0)
    gradient, x = torch.randn(4, 6, generator=drawn), inputs().double()
    one, two = (
        dpruner(model, FC, domain_and_open(gradient, gradient.square(), scale * x.T @ x))
        for scale in (1.0, 64.0)
    )
    torch.testing.assert_close(one["fc.weight"], two["fc.weight"])


def test_dpruner_keeps_what_open_text_needs_among_equals_of_the_domain() -> None:
    """Planted: all weights, g and F are equal; open text uses the features 1 and 4."""
    model = Layer()
    model.fc.weight.data.fill_(1.0)
    used = torch.full((6,), 0.1).index_fill(0, torch.tensor([1, 4]), 10.0)
    found = domain_and_open(torch.ones(4, 6), torch.ones(4, 6), torch.diag(used))
    mask = prune(
        model, 1 / 3, criterion="dpruner", within="row", calibration=found, names=FC
    )["fc.weight"]  # fmt: skip
    assert mask.nonzero()[:, 1].tolist() == [1, 4] * 4
    plain = taylor_mixed(model, FC, found)["fc.weight"]
    assert (plain == plain[0, 0]).all()


@pytest.mark.parametrize("name", CALIBRATED)
def test_an_input_that_is_always_zero_counts_for_nothing(name: str) -> None:
    """However large its weights are."""
    model, x = Layer(), inputs()
    x[:, 2] = 0.0
    model.fc.weight.data[:, 2] = 100.0
    wanted = needs_of(name, FC)
    found = calibrate(model, [x], wanted, losses=lambda m, batch: m(batch).square().sum(1))
    scores = CRITERIA[name].score(model, FC, found)["fc.weight"]
    assert (scores[:, 2] == 0).all()
    others = [0, 1, 3, 4, 5]
    assert (scores[:, others] > 0).all()


@pytest.mark.parametrize("name", CALIBRATED)
def test_scores_do_not_depend_on_how_data_were_divided(name: str) -> None:
    model, batches = llama(), texts(4)
    names = [n for block in block_weights(model).values() for n in block]
    wanted = needs_of(name, names)
    parts = [calibrate(model, own, wanted) for own in (batches[2:], [], batches[:2])]
    joint = CRITERIA[name].score(model, names, Calibration.merged(parts))
    whole = CRITERIA[name].score(model, names, calibrate(model, batches, wanted))
    for each in names:
        torch.testing.assert_close(joint[each], whole[each], rtol=1e-5, atol=1e-9)


def test_prune_ranks_within_rows_and_groups() -> None:
    model, x = Layer(8, 16), inputs(features=16)
    rows = prune(model, 0.5, criterion="wanda", within="row", data=[x], names=FC)["fc.weight"]
    assert rows.sum(1).tolist() == [8] * 8
    groups = prune(model, 0.5, criterion="obs", within="2:4", data=[x], names=FC)["fc.weight"]
    assert is_n_of_m(groups)
    assert groups.sum() == 64
    one = prune(model, 0.3, criterion="wanda", within="row", data=[x], names=FC)["fc.weight"]
    assert one.sum() == round(0.3 * 128)
    assert set(one.sum(1).tolist()) == {4, 5}


def test_refusals() -> None:
    model, x = Layer(8, 16), inputs(features=16)
    for wrong, reason, kind in (
        ({"within": "column"}, "expected 'layer', 'row' or such as '2:4'", MaskError),
        ({"within": "2:4", "density": 0.3}, "keeps 0.5 of all weights, not 0.3", DensityError),
        ({"data": None}, "'wanda' looks at data", MaskError),
        (
            {"calibration": Calibration()},
            "no statistics of kind 'inputs' of 'fc'",
            CalibrationError,
        ),
        (
            {"calibration": Calibration({(INPUTS, "fc"): Moments.of(torch.ones(2, 3))})},
            "its inputs have 3 features",
            CalibrationError,
        ),
    ):
        given = {"density": 0.5, "criterion": "wanda", "data": [x], "names": FC, **wrong}
        with pytest.raises(kind, match=reason):
            prune(model, **given)
    with pytest.raises(CalibrationError, match=r"end in \.weight"):
        needs_of(wanda, ["fc.values"])


# --- block by block -------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["magnitude", "random", *CALIBRATED])
@pytest.mark.parametrize("within", ["row", "2:4"])
def test_blocks_reach_the_density_and_the_rest_is_left(criterion: str, within: str) -> None:
    model, batches = llama(), texts(2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask = prune_blocks(model, 0.5, batches, criterion=criterion, within=within)
    assert mask.density == 0.5
    assert list(mask) == [name for names in block_weights(model).values() for name in names]
    for name, parameter in model.named_parameters():
        kept = before[name] * mask[name] if name in mask else before[name]
        assert torch.equal(parameter, kept)
    again = llama()
    assert prune_blocks(again, 0.5, batches, criterion=criterion, within=within) == mask
    if criterion == "random":
        first, second = (block[0] for block in block_weights(model).values())
        assert not torch.equal(mask[first], mask[second])


def test_a_later_block_is_judged_behind_the_pruned_ones() -> None:
    model, batches = llama(), texts(2)
    mask = prune_blocks(model, 0.5, batches)
    second = block_weights(model)["model.layers.1"]
    behind = llama()
    first = block_weights(behind)["model.layers.0"]
    for name in first:
        behind.get_parameter(name).data *= mask[name]
    expected = prune(
        behind, 0.5, criterion="wanda", within="row", names=second,
        calibration=calibrate(behind, batches, needs_of(wanda, second)),
    )  # fmt: skip
    dense = prune(llama(), 0.5, criterion="wanda", within="row", names=second, data=batches)
    query = second[0]  # its inputs do not depend on what is pruned in its own block
    assert torch.equal(mask[query], expected[query])
    assert not torch.equal(mask[query], dense[query])


def test_a_function_is_a_criterion() -> None:
    model = llama()
    narrow = partial(wanda)
    with pytest.raises(CalibrationError, match="no statistics"):  # it says nothing of its needs
        prune_blocks(model, 0.5, texts(1), criterion=narrow)
    mask = prune_blocks(model, 0.5, criterion=lambda model, names: {
        name: model.get_parameter(name).detach() for name in names
    })  # fmt: skip
    assert mask.density == 0.5


def test_gram_is_needed_by_obs_alone() -> None:
    assert needs_of(obs, FC) == {GRAM: ["fc"]}
    assert needs_of(wanda, FC) == {INPUTS: ["fc"]}
    assert needs_of(max, FC) == {}
