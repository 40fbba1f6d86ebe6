"""The plan's largest pruned gradients against the dense gradient in float64 and the module path."""

import copy

import pytest
import torch
from little_networks import pooled, random_mask
from plan_networks import NETWORKS, batch, network
from torch import nn
from torch.nn import functional

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.layers import growth as grow
from sparsemodel.layers.sparsify import sparse_layers, sparsify
from sparsemodel.masks.adjust import TensorEntries
from sparsemodel.masks.mask import Mask
from sparsemodel.optim import SparseSGD
from sparsemodel.plans.plan import TrainingPlan

SHAPE = (3, 16, 16)
EVERYTHING = 10**9  # more than any layer has

pytestmark = pytest.mark.usefixtures("plans_on_one_thread")


def masked(name: str) -> tuple[nn.Module, Mask]:
    """A masked dense network of which all but the stem is in the mask."""
    model = network(name)
    patterns = dict(random_mask(model, 0.3).items())
    patterns.pop("conv1.weight", None)
    mask = Mask(patterns)
    mask.apply(model)
    return model, mask


def dense_gradients(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """All gradients, of masked dense weights in float64."""
    double = copy.deepcopy(model).double()
    functional.cross_entropy(double(images.double()), labels).backward()
    return {name: p.grad for name, p in double.named_parameters() if p.grad is not None}


def assert_largest(
    found: dict[str, TensorEntries],
    gradients: dict[str, torch.Tensor],
    mask: Mask,
    counts: dict[str, int],
    tolerance: float,
) -> None:
    """Right values at ascending pruned places, none left out that is larger by more than rounding.

    Args:
        tolerance: of a layer's largest gradient.
    """
    assert list(found) == list(counts)
    for name, (indices, values) in found.items():
        gradient, pruned = gradients[name].flatten(), ~mask[name].flatten()
        assert len(indices) == len(values) == min(counts[name], int(pruned.sum())), name
        assert (indices.diff() > 0).all()
        assert pruned[indices].all()
        allowed = tolerance * gradient.abs().max().item()
        torch.testing.assert_close(
            values.double(), gradient[indices], rtol=0, atol=allowed, msg=name
        )
        pruned[indices] = False  # what is left out
        if len(values) and pruned.any():
            assert gradient[pruned].abs().max() <= values.abs().min() + 2 * allowed, name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_they_are_the_largest_of_the_dense_gradient(
    name: str, dtype: torch.dtype, recompute: bool
) -> None:
    model, mask = masked(name)
    plan = TrainingPlan(
        sparsify(model, mask), SHAPE, batch_size=16, recompute=recompute, activation_dtype=dtype
    )
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    for seed, size in ((1, 16), (2, 5)):  # of seed 0, rounding decides about one ReLU of resnet18
        images, labels = batch(size, seed)
        gradients = dense_gradients(model, images, labels)
        counts = {n: (7, EVERYTHING, 40)[i % 3] for i, n in enumerate(mask)}
        found = plan.topk_pruned_gradients(counts, images, labels)
        assert_largest(found, gradients, mask, counts, tolerance)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_they_are_those_of_the_module_path(name: str, recompute: bool) -> None:
    model, mask = masked(name)
    sparse = sparsify(model, mask)
    plan = TrainingPlan(sparse, SHAPE, batch_size=8, recompute=recompute)
    images, labels = batch(8)
    counts = {n: 20 + i for i, n in enumerate(reversed(list(mask)))}
    found = plan.topk_pruned_gradients(counts, images, labels)
    expected = grow.topk_pruned_gradients(
        sparse, counts, lambda net: functional.cross_entropy(net(images), labels)
    )
    assert list(found) == list(expected)
    for weight, (indices, values) in found.items():
        assert torch.equal(indices, expected[weight][0]), weight
        allowed = 1e-5 * values.abs().max().item()
        torch.testing.assert_close(values, expected[weight][1], rtol=0, atol=allowed)


@pytest.mark.parametrize("recompute", [False, True])
def test_each_layer_may_be_asked_for_alone(recompute: bool) -> None:
    """The backward pass then ends there, and overwrites what it would otherwise keep."""
    for model, shape in ((network("resnet8"), SHAPE), (pooled(), (3, 9, 11))):
        mask = random_mask(model, 0.4)
        mask.apply(model)
        plan = TrainingPlan(sparsify(model, mask), shape, batch_size=6, recompute=recompute)
        images, labels = batch(6, shape=shape)
        gradients = dense_gradients(model, images, labels)
        for name in mask:
            found = plan.topk_pruned_gradients({name: 30}, images, labels)
            assert_largest(found, gradients, mask, {name: 30}, 1e-4)


def test_a_pass_that_ends_early_does_less() -> None:
    model, mask = masked("resnet20")
    plan = TrainingPlan(sparsify(model, mask), SHAPE, batch_size=8)
    plan.topk_pruned_gradients({"fc.weight": 3}, *batch(8))
    went = {timed.name for timed in plan.seconds() if timed.kind == "conv" and timed.backward > 0}
    assert went == {"fc"}


def test_nothing_else_changes() -> None:
    model, mask = masked("resnet18")
    models = [sparsify(model, mask) for _ in range(2)]
    plans = [TrainingPlan(m, SHAPE, batch_size=8) for m in models]
    optimizers = [SparseSGD(m.parameters(), lr=0.05, momentum=0.9) for m in models]
    for step in range(3):
        for m, plan, optimizer in zip(models, plans, optimizers, strict=True):
            plan.step(*batch(8, step), optimizer=optimizer)
            gradients = [p.grad.clone() for p in m.parameters()]
            state = copy.deepcopy(m.state_dict())
            if m is models[1]:
                plan.topk_pruned_gradients(dict.fromkeys(mask, 10), *batch(6, 100 + step))
            for before, p in zip(gradients, m.parameters(), strict=True):
                assert torch.equal(before, p.grad)
            assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        buffers = [o.state[p]["momentum_buffer"] for o, p in zip(optimizers, (a, b), strict=True)]
        assert torch.equal(*buffers)


def test_before_a_step_there_are_no_gradients() -> None:
    model, mask = masked("resnet8")
    sparse = sparsify(model, mask)
    plan = TrainingPlan(sparse, SHAPE, batch_size=8)
    plan.topk_pruned_gradients(dict.fromkeys(mask, 10), *batch(8))
    assert all(p.grad is None for p in sparse.parameters())


def test_frozen_layers_may_be_asked_for() -> None:
    """Their inputs are not kept by a training step, so that the arena has to grow."""
    model, mask = masked("vgg11_bn")
    sparse = sparsify(model, mask)
    for parameter in sparse.parameters():
        parameter.requires_grad_(False)
    sparse.get_parameter("3.bias").requires_grad_(True)
    plan = TrainingPlan(sparse, SHAPE, batch_size=16)
    images, labels = batch(16)
    logits, loss = plan.forward(images), plan.step(images, labels)[0]
    counts = dict.fromkeys(mask, 25)
    gradients = dense_gradients(model, images, labels)
    found = plan.topk_pruned_gradients(counts, images, labels)
    assert_largest(found, gradients, mask, counts, 1e-4)
    assert plan.step(images, labels)[0] == loss
    assert logits.shape == plan.forward(images).shape


@pytest.mark.parametrize("recompute", [False, True])
def test_the_number_of_threads_changes_no_bit(recompute: bool) -> None:
    model, mask = masked("resnet18")
    images, labels = batch(64)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        plan = TrainingPlan(sparsify(model, mask), SHAPE, batch_size=64, recompute=recompute)
        results.append(plan.topk_pruned_gradients(dict.fromkeys(mask, 50), images, labels))
    for other in results[1:]:
        for name, (indices, values) in results[0].items():
            assert torch.equal(indices, other[name][0])
            assert torch.equal(values, other[name][1])


def test_of_equal_gradients_the_lower_index_is_kept() -> None:
    """Equal inputs: each row's pruned gradients are all alike, and two rows of opposite sign."""
    pattern = torch.zeros(2, 6, dtype=torch.bool)
    pattern[:, 0] = True
    model = nn.Sequential(nn.Linear(6, 2))
    plan = TrainingPlan(sparsify(model, Mask({"0.weight": pattern})), (6,), batch_size=4)
    images, labels = torch.ones(3, 6), torch.tensor([0, 1, 1])
    indices, values = plan.topk_pruned_gradients({"0.weight": 7}, images, labels)["0.weight"]
    assert indices.tolist() == [1, 2, 3, 4, 5, 7, 8]
    assert values[:5].unique().numel() == 1
    torch.testing.assert_close(values[5:], -values[:2], rtol=1e-6, atol=0)


def test_masks_that_change_are_followed() -> None:
    model, mask = masked("resnet8")
    sparse = sparsify(model, mask)
    plan = TrainingPlan(sparse, SHAPE, batch_size=8)
    patterns = random_mask(model, 0.15, seed=5)
    names = list(mask)
    changed = Mask({n: patterns[n] for n in names} | {names[0]: torch.ones_like(mask[names[0]])})
    grow.change_mask(sparse, changed)
    dense = copy.deepcopy(model)
    weights = {n: layer.to_dense().weight for n, layer in sparse_layers(sparse).items()}
    with torch.no_grad():
        for n, weight in weights.items():
            dense.get_parameter(n).copy_(weight)
    images, labels = batch(8)
    counts = dict.fromkeys(names, 15)
    found = plan.topk_pruned_gradients(counts, images, labels)
    assert len(found[names[0]][0]) == 0  # nothing is pruned there
    assert_largest(found, dense_gradients(dense, images, labels), changed, counts, 1e-4)


def test_none_asked_for() -> None:
    model, mask = masked("resnet8")
    plan = TrainingPlan(sparsify(model, mask), SHAPE, batch_size=8)
    assert plan.topk_pruned_gradients({}, *batch(8)) == {}
    found = plan.topk_pruned_gradients(dict.fromkeys(mask, 0), *batch(8))
    assert list(found) == list(mask)
    for indices, values in found.values():
        assert indices.dtype == torch.int64
        assert values.dtype == torch.float32
        assert len(indices) == len(values) == 0


def test_a_nan_is_an_error_that_names_the_layer() -> None:
    model, mask = masked("resnet8")
    plan = TrainingPlan(sparsify(model, mask), SHAPE, batch_size=8)
    images, labels = batch(8)
    images[3, 1, 2, 2] = float("nan")
    with pytest.raises(MaskError, match=r"'fc\.weight' is NaN"):
        plan.topk_pruned_gradients(dict.fromkeys(mask, 5), images, labels)


@pytest.mark.parametrize(
    ("counts", "size", "message"),
    [
        ({"conv1.weight": 3}, 8, "no sparse layer 'conv1.weight'"),
        ({"fc.weight": -1}, 8, "count >= 0, got -1"),
        ({"fc.weight": 3}, 9, "at most 8"),
    ],
)
def test_what_is_refused(counts: dict[str, int], size: int, message: str) -> None:
    model, mask = masked("resnet8")
    plan = TrainingPlan(sparsify(model, mask), SHAPE, batch_size=8)
    with pytest.raises(SparseModelError, match=message):
        plan.topk_pruned_gradients(counts, *batch(size))


def test_one_value_a_channel_has_no_variance() -> None:
    model, mask = masked("resnet18")
    plan = TrainingPlan(sparsify(model, mask), (3, 8, 8), batch_size=2)
    with pytest.raises(SparseModelError, match="no variance"):
        plan.topk_pruned_gradients({"fc.weight": 1}, *batch(1, shape=(3, 8, 8)))
