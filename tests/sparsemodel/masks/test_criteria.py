"""Criteria against closed forms, explicit Hessians and conservation laws."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn

from sparsemodel.errors import MaskError
from sparsemodel.masks.criteria import grasp, magnitude, random, snip, synflow, taylor
from sparsemodel.masks.registry import CALIBRATED, CRITERIA


def line() -> nn.Linear:
    """y = w x with w = (1, -2), float32."""
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
    return layer


def squared_error(model: nn.Module) -> torch.Tensor:
    """0.5 (w·x − t)² at x = (3, 1), t = 2."""
    error = model(torch.tensor([[3.0, 1.0]])) - 2.0
    return (0.5 * error.square()).sum()


def small_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
    )


def network_loss(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, 2, 4, 4, generator=generator)
    images = images.to(next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 0, 1, 1]))


NAMES = ["0.weight", "4.weight"]


def test_gradient_scores_of_a_line_by_hand() -> None:
    """w·x − t = 3 − 2 − 2 = −1, so g = −x = (−3, −1) and g θ = (−3, 2).

    H = x xᵀ, so H g = −(9 + 1) x = (−30, −10) and θ H g = (−30, 20).
    """
    model = line()
    assert snip(model, ["weight"], squared_error)["weight"].tolist() == [[3.0, 2.0]]
    assert taylor(model, ["weight"], squared_error)["weight"].tolist() == [[9.0, 4.0]]
    assert grasp(model, ["weight"], squared_error)["weight"].tolist() == [[-30.0, 20.0]]
    assert magnitude(model, ["weight"])["weight"].tolist() == [[1.0, 2.0]]


def test_grasp_high_means_that_removal_loses_gradient_flow() -> None:
    """Removing weight 2 (score 20): error 1·3 − 2 = 1, gᵀg stays 10 after the full step.

    To first order in a small step along the removal it falls by 2 · 20 · step, and for weight 1
    (score −30) it rises by 2 · 30 · step.
    """

    def flow(shrink: torch.Tensor) -> float:
        weight = (torch.tensor([1.0, -2.0]) * (1 - shrink)).double().requires_grad_()
        error = weight @ torch.tensor([3.0, 1.0], dtype=torch.float64) - 2.0
        (gradient,) = torch.autograd.grad(0.5 * error**2, weight)
        return float(gradient @ gradient)

    step = 1e-3
    base = flow(torch.zeros(2))
    assert (base - flow(torch.tensor([0.0, step]))) / step == pytest.approx(2 * 20, rel=1e-2)
    assert (base - flow(torch.tensor([step, 0.0]))) / step == pytest.approx(2 * -30, rel=1e-2)


def test_grasp_equals_an_explicit_float64_hessian() -> None:
    model = small_network().double()
    model.eval()
    weights = dict(model.named_parameters())
    shapes = [weights[name].shape for name in NAMES]
    theta = torch.cat([weights[name].detach().reshape(-1) for name in NAMES])

    def loss_of(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        named = {n: p.reshape(s) for n, p, s in zip(NAMES, parts, shapes, strict=True)}
        return network_loss(_Functional(model, named))

    hessian = torch.autograd.functional.hessian(loss_of, theta)
    gradient = torch.autograd.functional.jacobian(loss_of, theta)
    expected = (theta * (hessian @ gradient)).float()
    scores = grasp(model, NAMES, network_loss)
    actual = torch.cat([scores[name].reshape(-1) for name in NAMES])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-9)


class _Functional(nn.Module):
    """The model with some parameters replaced by tensors."""

    def __init__(self, model: nn.Module, replaced: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self.replaced = replaced

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(self.model, self.replaced, (images,))


def test_grasp_of_a_loss_without_curvature_is_zero() -> None:
    scores = grasp(line(), ["weight"], lambda model: model(torch.ones(1, 2)).sum())
    assert scores["weight"].tolist() == [[0.0, 0.0]]


def test_snip_equals_finite_differences_in_float64() -> None:
    model = small_network().double().eval()
    scores = snip(model, ["4.weight"], network_loss)["4.weight"]
    weight = model.get_parameter("4.weight").detach()
    step = 1e-5
    for row, column in [(0, 0), (1, 7), (0, 11)]:
        losses = []
        for sign in (1, -1):
            changed = copy.deepcopy(model)
            with torch.no_grad():
                changed.get_parameter("4.weight")[row, column] += sign * step
            losses.append(network_loss(changed).item())
        slope = (losses[0] - losses[1]) / (2 * step)
        expected = abs(slope * float(weight[row, column]))
        assert float(scores[row, column]) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_synflow_of_two_linear_layers_is_the_product_of_absolute_matrices() -> None:
    """R = 1ᵀ|B||A|1; the score of A[i, j] is |A[i, j]| times column sum i of |B|, over R."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    a, b = (p.detach().double().abs() for p in model.parameters())
    flow = (b @ a).sum()
    scores = synflow(model, ["0.weight", "1.weight"], (3,))
    expected_a = (a * b.sum(dim=0)[:, None] / flow).float()
    expected_b = (b * a.sum(dim=1)[None, :] / flow).float()
    torch.testing.assert_close(scores["0.weight"], expected_a)
    torch.testing.assert_close(scores["1.weight"], expected_b)


def test_synflow_is_conserved_from_layer_to_layer_and_at_each_unit() -> None:
    """Tanaka et al., theorem 1: what flows into a hidden unit flows out of it."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(5, 3, 2, bias=False),
        nn.Flatten(),
        nn.Linear(27, 4, bias=False),
    )
    scores = synflow(model, ["0.weight", "2.weight", "4.weight"], (2, 6, 6))
    for score in scores.values():
        assert float(score.sum()) == pytest.approx(1.0, rel=1e-5)
    into, out_of = scores["0.weight"].sum(dim=(1, 2, 3)), scores["2.weight"].sum(dim=(0, 2, 3))
    torch.testing.assert_close(into, out_of)


def test_synflow_is_computed_in_eval_mode() -> None:
    """In train mode batch norm would subtract the mean of the single input and stop the flow."""
    expected = synflow(small_network().eval(), NAMES, (2, 4, 4))
    actual = synflow(small_network().train(), NAMES, (2, 4, 4))
    assert all(torch.equal(actual[name], expected[name]) for name in NAMES)


def test_synflow_says_so_where_a_model_reads_tokens() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    with pytest.raises(MaskError, match=r"synflow feeds the model ones .* networks of tokens"):
        synflow(model, ["1.weight"], (5,))


def test_synflow_stays_in_range_for_deep_models() -> None:
    """60 layers of 64 ones with weights 10 reach 640^60 = 2e168, far above float32."""
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(60)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(10.0)
    score = synflow(model, ["30.weight"], (64,))["30.weight"]
    torch.testing.assert_close(score, torch.full((64, 64), 1 / 64**2))


def test_synflow_reports_a_model_that_passes_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model.get_parameter("0.weight").zero_()
    with pytest.raises(MaskError, match="synaptic flow"):
        synflow(model, ["1.weight"], (2,))


def test_random_scores_come_from_the_generator_alone() -> None:
    model = small_network()
    state = torch.get_rng_state()
    first = random(model, NAMES, generator=torch.Generator().manual_seed(5))
    again = random(model, NAMES, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state)
    for name in NAMES:
        assert torch.equal(first[name], again[name])
        assert first[name].shape == model.get_parameter(name).shape


ARGUMENTS: dict[str, Any] = {
    "loss": network_loss,
    "input_shape": (2, 4, 4),
    "generator": torch.Generator(),
}


def scores_by(name: str, model: nn.Module) -> dict[str, torch.Tensor]:
    score = CRITERIA[name].score
    wanted = inspect.signature(score).parameters.keys() & ARGUMENTS.keys()
    return score(model, NAMES, **{key: ARGUMENTS[key] for key in wanted})


@pytest.mark.parametrize("name", [name for name in CRITERIA if name not in CALIBRATED])
def test_every_criterion_keeps_its_contract_and_leaves_no_trace(name: str) -> None:
    model = small_network()
    model.train()
    model[2].eval()
    model.get_parameter("0.weight").requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(number)) if number != 2 else None
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad for p in model.parameters()]
    copies = [None if g is None else g.clone() for g in gradients]
    flags = [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]

    with torch.no_grad():  # criteria turn gradients on for themselves
        scores = scores_by(name, model)

    assert list(scores) == NAMES
    for key, score in scores.items():
        assert score.shape == model.get_parameter(key).shape
        assert score.dtype == torch.float32
        assert not score.requires_grad
        assert torch.isfinite(score).all()
    assert any(score.count_nonzero() for score in scores.values())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    for parameter, gradient, value in zip(model.parameters(), gradients, copies, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, value)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes


def test_the_model_is_restored_when_the_loss_fails() -> None:
    model = small_network().train()
    mean = model.get_buffer("1.running_mean").clone()

    def failing(model: nn.Module) -> torch.Tensor:
        network_loss(model)
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        snip(model, NAMES, failing)
    assert torch.equal(model.get_buffer("1.running_mean"), mean)
    assert all(p.requires_grad for p in model.parameters())


def test_bad_arguments_are_refused() -> None:
    model = line()
    with pytest.raises(MaskError, match="no parameter 'bias'"):
        magnitude(model, ["bias"])
    with pytest.raises(MaskError, match="got none"):
        snip(model, [], squared_error)
    with pytest.raises(MaskError, match="scalar loss"):
        snip(model, ["weight"], lambda m: m(torch.ones(3, 2)))
    with pytest.raises(MaskError, match="no gradient"):
        grasp(model, ["weight"], lambda m: torch.tensor(1.0))
