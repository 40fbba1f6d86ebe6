"""Which models a training plan takes, what it makes of them, and how it refuses others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plan_networks import batch
from torch import nn
from torch.nn import functional

from sparsemodel.errors import PlanError
from sparsemodel.kernels.cpu import native
from sparsemodel.layers.sparsify import exchange
from sparsemodel.plans.plan import TrainingPlan
from sparsemodel.plans.trace import trace_operations

SHAPE = (3, 8, 8)


class Calls(nn.Module):
    """A stem, a function of its output, and a classifier of what that gives."""

    def __init__(self, function: Callable[..., torch.Tensor], features: int, **layers: Any):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.layers = nn.ModuleDict(layers)
        self.fc = nn.Linear(features, 5)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.function(self, self.bn(self.stem(x))))
        return logits


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)


def in_place_on_a_shared_value(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = x
    x = torch.relu_(x)  # y changes too
    return flat(x + y)


def sum_in_place_under_two_names(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = functional.avg_pool2d(x, 3, 1, 1)
    z = y
    y += model.layers["again"](x)
    return flat(functional.relu(y) + z)


KNOWN: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    "view by size": (lambda m, x: x.view(x.size(0), -1), 256),
    "reshape by shape": (lambda m, x: x.reshape(x.shape[0], -1), 256),
    "view of known length": (lambda m, x: x.view(-1, 256), 256),
    "mean": (lambda m, x: x.mean((2, 3)), 4),
    "mean with keepdim": (lambda m, x: torch.mean(x, dim=[-1, -2], keepdim=True).flatten(1), 4),
    "max pool": (lambda m, x: flat(functional.max_pool2d(x, 3, 2, padding=1)), 64),
    "average pool": (lambda m, x: flat(functional.avg_pool2d(x, (2, 4))), 32),
    "part of a window": (
        lambda m, x: flat(functional.avg_pool2d(x, 3, 3, 1, count_include_pad=False)), 36,
    ),
    "padded average pool": (lambda m, x: flat(functional.avg_pool2d(x, 3, 3, 1)), 36),
    "adaptive": (lambda m, x: functional.adaptive_avg_pool2d(x, (1, 1)).flatten(1), 4),
    "twice the same": (lambda m, x: flat(x + x), 256),
    "relu twice used": (lambda m, x: flat(functional.relu(x) + x), 256),
    "relu plus another": (
        lambda m, x: flat(functional.relu(x) + functional.avg_pool2d(x, 3, 1, 1)), 256,
    ),
    "norm used twice": (lambda m, x: flat(torch.relu(x).add(torch.add(x, x))), 256),
    "in place, shared": (in_place_on_a_shared_value, 256),
    "in place on a sum": (lambda m, x: flat(functional.relu(x + x, inplace=True)), 256),
    "unused result": (lambda m, x: (x.relu(), flat(x))[1], 256),
}  # fmt: skip


def assert_plan_matches(model: nn.Module, recompute: bool) -> None:
    """Loss, gradients and inference of a plan against the model itself in float64."""
    sparse = exchange(model, {}, fuse=False)
    plan = TrainingPlan(sparse, SHAPE, batch_size=6, recompute=recompute)
    images, labels = batch(5, shape=SHAPE)
    loss, _ = plan.step(images, labels)
    model.double()
    expected = functional.cross_entropy(model(images.double()), labels)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for found, parameter in zip(sparse.parameters(), model.parameters(), strict=True):
        assert found.grad is not None
        assert parameter.grad is not None
        torch.testing.assert_close(found.grad.double(), parameter.grad, rtol=1e-4, atol=1e-6)
    model.eval()
    logits = model(images.double())
    torch.testing.assert_close(plan.forward(images).double(), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_functions_and_methods(name: str, recompute: bool) -> None:
    if not native.loaded():
        pytest.skip("build the native library to run training plans")
    function, features = KNOWN[name]
    torch.manual_seed(0)
    assert_plan_matches(Calls(function, features), recompute)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_sum_that_grows_in_place(recompute: bool) -> None:
    if not native.loaded():
        pytest.skip("build the native library to run training plans")
    torch.manual_seed(0)
    again = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    assert_plan_matches(Calls(sum_in_place_under_two_names, 256, again=again), recompute)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_fused_relu_is_kept_for_its_gradient(recompute: bool) -> None:
    """The sum after it, which could take its place in memory, has other signs."""
    if not native.loaded():
        pytest.skip("build the native library to run training plans")

    def after(model: Calls, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(x)
        return flat(x + model.layers["again"](functional.avg_pool2d(x, 3, 1, 1)))

    torch.manual_seed(0)
    assert_plan_matches(Calls(after, 256, again=nn.Conv2d(4, 4, 1)), recompute)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, momentum=0.3, eps=0.1),
    ],
)
def test_kinds_of_batch_norm(norm: nn.BatchNorm2d) -> None:
    if not native.loaded():
        pytest.skip("build the native library to run training plans")
    torch.manual_seed(0)
    model = Calls(lambda m, x: flat(m.layers["norm"](x).relu()), 256, norm=norm)
    sparse = exchange(model, {}, fuse=False)
    plan = TrainingPlan(sparse, SHAPE, batch_size=6)
    for seed in range(3):
        images, labels = batch(6, seed, shape=SHAPE)
        plan.step(images, labels)
        model(images)
    for name, value in sparse.named_buffers():
        torch.testing.assert_close(value, model.get_buffer(name), rtol=1e-4, atol=1e-5)
    images, _ = batch(6, shape=SHAPE)
    torch.testing.assert_close(plan.forward(images), model.eval()(images), rtol=1e-4, atol=1e-4)


def test_batch_norm_of_features() -> None:
    if not native.loaded():
        pytest.skip("build the native library to run training plans")
    torch.manual_seed(0)
    layers = (nn.Linear(192, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 5))
    assert_plan_matches(nn.Sequential(nn.Flatten(), *layers), recompute=True)


def test_norm_addition_and_relu_are_one_operation() -> None:
    model = Calls(
        lambda m, x: flat(functional.relu(m.layers["a"](x) + x)), 256, a=nn.Conv2d(4, 4, 1)
    )
    kinds = [operation.kind for operation in trace_operations(model, SHAPE)]
    assert kinds == ["input", "conv", "norm", "conv", "add", "relu", "flatten", "conv"]
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = Calls(lambda m, x: flat(functional.relu(m.layers["a"](x) + x)), 256, a=block)
    operations = trace_operations(model, SHAPE)
    assert [o.kind for o in operations] == [
        *("input", "conv", "norm", "conv", "norm", "flatten", "conv")
    ]
    assert operations[4].relu
    assert operations[4].inputs == (3, 2)


def reads_data(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return flat(x if x.sum() > 0 else -x)


def stale_view(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = x.flatten(1)
    y = torch.relu_(y)
    return functional.adaptive_avg_pool2d(x, 1).flatten(1)


UNKNOWN: dict[str, tuple[Callable[..., torch.Tensor], dict[str, nn.Module], str]] = {
    "dropout": (lambda m, x: m.layers["a"](x), {"a": nn.Dropout()}, "Dropout 'layers.a'"),
    "gelu": (lambda m, x: functional.gelu(x), {}, "function 'gelu'"),
    "sigmoid": (lambda m, x: x.sigmoid(), {}, "method 'sigmoid'"),
    "scalar": (lambda m, x: x + 1, {}, "'add' of something that is not an activation"),
    "alpha": (lambda m, x: torch.add(x, x, alpha=2), {}, "arguments"),
    "broadcast": (
        lambda m, x: x + functional.adaptive_avg_pool2d(x, 1), {}, r"shapes .*4, 1, 1",
    ),
    "padding mode": (
        lambda m, x: m.layers["a"](x),
        {"a": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")},
        "Conv2d 'layers.a' with padding .*reflect",
    ),
    "twice": (lambda m, x: m.bn(x), {}, "BatchNorm2d 'bn' is called twice"),
    "ceil": (lambda m, x: functional.max_pool2d(x, 3, ceil_mode=True), {}, "ceil_mode=True"),
    "divisor": (
        lambda m, x: m.layers["a"](x),
        {"a": nn.AvgPool2d(2, divisor_override=3)},
        "divisor_override=3",
    ),
    "adaptive": (lambda m, x: functional.adaptive_avg_pool2d(x, 2), {}, "to one pixel is"),
    "view": (lambda m, x: x.view(x.size(0), 4, -1), {}, "'view' other than to"),
    "mean": (lambda m, x: x.mean(1), {}, "'mean' over"),
    "data": (reads_data, {}, "cannot be traced"),
    "stale": (stale_view, {}, "in-place operation on another view"),
    "mode": (lambda m, x: x.relu() if m.training else x, {}, "in training than in evaluation"),
    "channels": (lambda m, x: m.layers["a"](x), {"a": nn.Conv2d(3, 4, 1)}, r"expects \[B, 3"),
    "unused norm": (
        lambda m, x: (m.layers["a"](x), flat(x))[1],
        {"a": nn.BatchNorm2d(4)},
        "layers.a' is not used",
    ),
    "no logits": (lambda m, x: x, {}, "expects"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_named(name: str) -> None:
    function, layers, message = UNKNOWN[name]
    with pytest.raises(PlanError, match=message):
        trace_operations(Calls(function, 256, **layers), SHAPE)


def test_subclasses_hooks_ties_and_frozen_norms_are_refused() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), Scaled(8, 5))
    with pytest.raises(PlanError, match=r"attribute '3\.weight'"):
        trace_operations(model, SHAPE)
    model[3] = nn.Linear(8, 5)
    handle = model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(PlanError, match="Linear '1' has forward hooks"):
        trace_operations(model, SHAPE)
    handle.remove()
    model[2].eval()
    with pytest.raises(PlanError, match="'2' is in another mode"):
        trace_operations(model, SHAPE)
    model[2].train()
    model.append(nn.Unflatten(1, (5, 1)))
    with pytest.raises(PlanError, match="Unflatten '4'"):
        trace_operations(model, SHAPE)


def test_tied_parameters_and_gradient_hooks_are_refused() -> None:
    if not native.loaded():
        pytest.skip("build the native library to run training plans")
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    with pytest.raises(PlanError, match="share a parameter"):
        TrainingPlan(model, (5,), batch_size=2)
    model[2].weight = nn.Parameter(torch.zeros(5, 5))
    model[0].weight.register_post_accumulate_grad_hook(lambda _: None)
    with pytest.raises(PlanError, match="hooks on its gradients"):
        TrainingPlan(model, (5,), batch_size=2)


def test_doubles_are_refused() -> None:
    if not native.loaded():
        pytest.skip("build the native library to run training plans")
    with pytest.raises(PlanError, match="float32"):
        TrainingPlan(nn.Linear(5, 5).double(), (5,), batch_size=2)


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = Calls(lambda m, x: flat(x), 256)
    model.eval()
    before = set(vars(model)), [m.training for m in model.modules()]
    trace_operations(model, SHAPE)
    assert (set(vars(model)), [m.training for m in model.modules()]) == before
