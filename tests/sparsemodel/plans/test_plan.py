"""Training plans against the module path and against masked dense networks in float64."""

import copy

import pytest
import torch
from little_networks import pooled, random_mask
from plan_networks import NETWORKS, assert_gradients_match, assert_step_matches, batch, network
from torch import nn
from torch.nn import functional

from sparsemodel.errors import SparseModelError
from sparsemodel.layers.growth import change_mask
from sparsemodel.layers.sparsify import densify, sparsify
from sparsemodel.masks.mask import Mask
from sparsemodel.optim import SparseAdam, SparseSGD
from sparsemodel.plans.plan import TrainingPlan

SHAPE = (3, 16, 16)

pytestmark = pytest.mark.usefixtures("plans_on_one_thread")


def masked(name: str, density: float = 0.3) -> tuple[nn.Module, Mask]:
    """A masked dense network whose stem and classifier are not in the mask."""
    model = network(name)
    mask = random_mask(model, density)
    dense = {n: p for n, p in mask.items() if not n.endswith(("conv1.weight", "fc.weight"))}
    mask = Mask(dense if len(dense) > 4 else dict(mask.items()))
    mask.apply(model)
    return model, mask


def assert_states_match(model: nn.Module, dense: nn.Module, tolerance: float) -> None:
    """Parameters, running statistics and batch counters, of a sparsified and a dense model."""
    expected = dense.state_dict()
    found = densify(model).state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value.double(), expected[name].double(), rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_is_that_of_the_masked_dense_network(name: str, recompute: bool) -> None:
    model, mask = masked(name)
    sparse = sparsify(model, mask)
    plan = TrainingPlan(sparse, SHAPE, batch_size=16, recompute=recompute)
    model.double()
    for seed, size in enumerate((16, 7, 3)):
        assert_step_matches(plan, sparse, model, mask, batch(size, seed))
    assert_states_match(sparse, model, 1e-5)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", [SparseSGD, SparseAdam])
def test_training_follows_the_module_path(name: str, kind: type) -> None:
    model, mask = masked(name)
    by_plan, by_modules = sparsify(model, mask), sparsify(model, mask)
    plan = TrainingPlan(by_plan, SHAPE, batch_size=16)
    optimizers = [kind(m.parameters(), lr=0.01) for m in (by_plan, by_modules)]
    for step in range(4):
        images, labels = batch(16 if step < 3 else 9, step)
        loss, _ = plan.step(images, labels)
        expected = functional.cross_entropy(by_modules(images), labels)
        optimizers[1].zero_grad()
        expected.backward()
        for optimizer in optimizers:
            optimizer.step()
        # Adam divides by gradients' size: rounding of tiny ones counts as much as that of others.
        assert loss == pytest.approx(expected.item(), rel=1e-4 if kind is SparseSGD else 1e-2)
    if kind is SparseSGD:
        assert_states_match(by_plan, densify(by_modules), 1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_with_its_optimizer_is_both_steps(momentum: float) -> None:
    model, mask = masked("resnet8")
    models = [sparsify(model, mask) for _ in range(2)]
    plans = [TrainingPlan(m, SHAPE, batch_size=8) for m in models]
    optimizers = [
        SparseSGD(m.parameters(), lr=0.05, momentum=momentum, weight_decay=1e-3) for m in models
    ]
    changed = random_mask(model, 0.2, seed=7)
    for step in range(4):
        images, labels = batch(8, step)
        plans[0].step(images, labels)
        optimizers[0].step()
        plans[1].step(images, labels, optimizer=optimizers[1])
        if step == 1:
            for m, optimizer in zip(models, optimizers, strict=True):
                change_mask(m, Mask({n: changed[n] for n in mask}), optimizer=optimizer)
                optimizer.param_groups[0]["lr"] = 0.02
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        buffers = [
            o.state[p].get("momentum_buffer") for o, p in zip(optimizers, (a, b), strict=True)
        ]
        assert (buffers[0] is None) == (momentum == 0)
        assert buffers[0] is None or torch.equal(*buffers)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    model, mask = masked("resnet8")
    sparse = sparsify(model, mask)
    plan = TrainingPlan(sparse, SHAPE, batch_size=8)
    some = SparseSGD(list(sparse.parameters())[1:], lr=0.1)
    with pytest.raises(SparseModelError, match="not the same"):
        plan.step(*batch(8), optimizer=some)
    groups = SparseSGD([{"params": [p]} for p in sparse.parameters()], lr=0.1)
    with pytest.raises(SparseModelError, match="one parameter group"):
        plan.step(*batch(8), optimizer=groups)


def test_autograd_sees_what_a_step_writes() -> None:
    model, mask = masked("resnet8")
    sparse = sparsify(model, mask)
    plan = TrainingPlan(sparse, SHAPE, batch_size=8)
    images, labels = batch(8)
    loss = functional.cross_entropy(sparse(images), labels)
    plan.step(images, labels, optimizer=SparseSGD(sparse.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_pools_groups_bias_and_dilation() -> None:
    torch.manual_seed(0)
    model = pooled()
    mask = random_mask(model, 0.5)
    mask.apply(model)
    sparse = sparsify(model, mask)
    plan = TrainingPlan(sparse, (3, 9, 11), batch_size=6)
    images, labels = batch(5, shape=(3, 9, 11))
    loss, _ = plan.step(images, labels)
    model.double()
    expected = functional.cross_entropy(model(images.double()), labels)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_match(sparse, model, mask)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_inference_uses_running_statistics(name: str, recompute: bool) -> None:
    model, mask = masked(name)
    sparse = sparsify(model, mask)
    plan = TrainingPlan(sparse, SHAPE, batch_size=4, recompute=recompute)
    model.double().eval()
    before = copy.deepcopy(sparse.state_dict())
    for size in (1, 4, 11):
        images, labels = batch(size)
        logits = model(images.double())
        torch.testing.assert_close(plan.forward(images).double(), logits, rtol=1e-4, atol=1e-5)
        loss, num_correct = plan.evaluate(images, labels)
        assert loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-5)
        assert num_correct == int((logits.argmax(1) == labels).sum())
    for key, value in sparse.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("recompute", [False, True])
def test_the_number_of_threads_changes_no_bit(recompute: bool) -> None:
    model, mask = masked("resnet18")
    images, labels = batch(64)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        sparse = sparsify(model, mask)
        plan = TrainingPlan(sparse, SHAPE, batch_size=64, recompute=recompute)
        loss, _ = plan.step(images, labels)
        gradients = [p.grad.clone() for p in sparse.parameters()]
        results.append([torch.tensor(loss), plan.forward(images), *gradients, *sparse.buffers()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_recomputing_changes_no_bit() -> None:
    model, mask = masked("resnet18")
    results = []
    for recompute in (False, True):
        sparse = sparsify(model, mask)
        TrainingPlan(sparse, SHAPE, batch_size=8, recompute=recompute).step(*batch(8))
        results.append([p.grad for p in sparse.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_rounds_gradients_alone(name: str, recompute: bool) -> None:
    """Rounding to eight bits, which may be 2**-9 off, makes 0.2 %; cutting them off, 0.35 %."""
    model, mask = masked(name)
    images, labels = batch(16)
    losses, gradients, states, sizes = [], [], [], []
    for dtype in (torch.float32, torch.bfloat16):
        sparse = sparsify(model, mask)
        plan = TrainingPlan(
            sparse, SHAPE, batch_size=16, recompute=recompute, activation_dtype=dtype
        )
        losses.append(plan.step(images, labels))
        gradients.append(torch.cat([p.grad.flatten() for p in sparse.parameters()]))
        states.append(list(sparse.buffers()))
        sizes.append(plan.arena_bytes)
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 0 < error < 0.003
    # In a small network the first layer's gradient, which is not compressed, sets the peak.
    assert sizes[1] <= sizes[0]
    if name == "resnet20":
        assert sizes[1] < (0.75 if recompute else 0.85) * sizes[0]


def test_a_mask_change_is_followed() -> None:
    model, mask = masked("resnet8")
    sparse = sparsify(model, mask)
    plan = TrainingPlan(sparse, SHAPE, batch_size=8)
    optimizer = SparseSGD(sparse.parameters(), lr=0.05)
    plan.step(*batch(8))
    optimizer.step()
    patterns = random_mask(model, 0.15, seed=5)
    changed = Mask({name: patterns[name] for name in mask})
    change_mask(sparse, changed, optimizer=optimizer)
    dense = densify(sparse).double()
    for size in (8, 3):
        images, labels = batch(size, seed=2)
        loss, _ = plan.step(images, labels)
        dense.zero_grad()
        expected = functional.cross_entropy(dense(images.double()), labels)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert_gradients_match(sparse, dense, changed)
    optimizer.step()


def test_an_emptied_and_regrown_layer_is_followed() -> None:
    model, mask = masked("resnet8")
    sparse = sparsify(model, mask)
    plan = TrainingPlan(sparse, SHAPE, batch_size=4)
    name = next(iter(mask))
    for pattern in (torch.zeros_like(mask[name]), torch.ones_like(mask[name])):
        change_mask(sparse, Mask({name: pattern}))
        dense = densify(sparse).double()
        images, labels = batch(4)
        loss, _ = plan.step(images, labels)
        expected = functional.cross_entropy(dense(images.double()), labels)
        assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_moved_parameters_are_followed() -> None:
    model, mask = masked("vgg11_bn")
    sparse = sparsify(model, mask)
    plan = TrainingPlan(sparse, SHAPE, batch_size=4)
    plan.step(*batch(4))
    for tensor in (*sparse.parameters(), *sparse.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data * 0.5
    dense = densify(sparse).double()
    images, labels = batch(4)
    loss, _ = plan.step(images, labels)
    expected = functional.cross_entropy(dense(images.double()), labels)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_states_match(sparse, dense, 1e-5)


def test_frozen_parameters_get_no_gradient() -> None:
    model, mask = masked("vgg11_bn")
    sparse = sparsify(model, mask)
    frozen = [p for name, p in sparse.named_parameters() if name.startswith("0.0.")]
    names = [name for name, _ in sparse.named_parameters() if name.startswith("0.")]
    some = [sparse.get_parameter(name) for name in names if name.endswith("values")]
    for parameter in (*frozen, *some):
        parameter.requires_grad_(False)
    plan = TrainingPlan(sparse, SHAPE, batch_size=4)
    images, labels = batch(4)
    plan.step(images, labels)
    dense = densify(sparse).double().train()
    functional.cross_entropy(dense(images.double()), labels).backward()
    expected = dict(dense.named_parameters())
    for name, parameter in sparse.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
        elif not name.endswith("values"):
            gradient = expected[name].grad
            assert gradient is not None
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad.double(), gradient, rtol=2e-4, atol=2e-6)
    some[0].requires_grad_(True)
    with pytest.raises(SparseModelError, match="build a new plan"):
        plan.step(images, labels)


def test_bytes_are_normalised_pixels() -> None:
    model, mask = masked("resnet8")
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    sparse = sparsify(model, mask)
    plan = TrainingPlan(sparse, SHAPE, batch_size=8, normalization=(mean, std))
    pixels = torch.randint(0, 256, (7, *SHAPE), dtype=torch.uint8)
    columns = [torch.tensor(numbers).view(3, 1, 1) for numbers in (mean, std)]
    floats = (pixels / 255 - columns[0]) / columns[1]
    torch.testing.assert_close(plan.forward(pixels), plan.forward(floats), rtol=1e-4, atol=1e-5)


def test_layouts_of_images_do_not_matter() -> None:
    model, mask = masked("resnet8")
    plan = TrainingPlan(sparsify(model, mask), SHAPE, batch_size=8)
    images, _ = batch(6)
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(plan.forward(images), plan.forward(last))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(9, *SHAPE), torch.zeros(9, dtype=torch.int64), "at most 8"),
        (torch.zeros(2, 3, 16, 9), torch.zeros(2, dtype=torch.int64), r"\[B, \*\(3, 16, 16\)\]"),
        (torch.zeros(2, *SHAPE).double(), torch.zeros(2, dtype=torch.int64), "float64"),
        (torch.zeros(2, *SHAPE).byte(), torch.zeros(2, dtype=torch.int64), "normalization"),
        (torch.zeros(2, *SHAPE), torch.zeros(3, dtype=torch.int64), r"int64 \[2\]"),
        (torch.zeros(2, *SHAPE), torch.zeros(2, dtype=torch.int32), "int32"),
        (torch.zeros(2, *SHAPE), torch.tensor([0, 5]), "label 5 of sample 1"),
        (torch.zeros(2, *SHAPE), torch.tensor([-1, 0]), "label -1 of sample 0"),
    ],
)
def test_what_a_step_refuses_changes_nothing(
    images: torch.Tensor, labels: torch.Tensor, message: str
) -> None:
    model, mask = masked("resnet8")
    sparse = sparsify(model, mask)
    plan = TrainingPlan(sparse, SHAPE, batch_size=8)
    before = copy.deepcopy(sparse.state_dict())
    with pytest.raises(SparseModelError, match=message):
        plan.step(images, labels)
    assert all(torch.equal(v, before[k]) for k, v in sparse.state_dict().items())
    assert all(p.grad is None for p in sparse.parameters())


def test_one_value_a_channel_has_no_variance() -> None:
    model, mask = masked("resnet18")
    plan = TrainingPlan(sparsify(model, mask), (3, 8, 8), batch_size=2)
    with pytest.raises(SparseModelError, match="no variance"):
        plan.step(*batch(1, shape=(3, 8, 8)))
