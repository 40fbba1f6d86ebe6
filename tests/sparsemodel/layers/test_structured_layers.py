"""Linear layers with execution "blocks": training, state, changes of the mask."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.kernels.blocks import ops as block_ops
from sparsemodel.kernels.cpu import library as cpu
from sparsemodel.layers.growth import change_mask, topk_pruned_gradients
from sparsemodel.layers.linear_and_conv import SparseConv2d, SparseLinear
from sparsemodel.layers.sparsify import densify, mask_of, sparsify
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.structure import block_counts, block_mask
from sparsemodel.optim import MaskedSGD, SparseSGD
from sparsemodel.plans.plan import TrainingPlan
from sparsemodel.storage.models import load, save

NAMES = ("0.weight", "2.weight")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32), nn.ReLU(),
                         nn.Linear(32, 5))  # fmt: skip


def mask_for(model: nn.Module, *, other: bool = False) -> Mask:
    """Of weights' magnitude; `other`: of the opposite."""
    sign = -1 if other else 1
    scores = {name: sign * model.get_parameter(name).detach().abs() for name in NAMES}
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    return block_mask(scores, block_counts(shapes, 0.4, side=16), side=16)


def build() -> tuple[nn.Sequential, Mask]:
    model = mlp()
    mask = mask_for(model)
    mask.apply(model)
    return model, mask


@pytest.fixture(params=["reference", "kernels"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Layers as they are without a GPU, and on what a CPU can run of their paths on one."""
    if request.param == "kernels":
        pytest.importorskip("triton")
        from triton.runtime.interpreter import InterpretedFunction  # noqa: PLC0415

        from sparsemodel.kernels.blocks import triton_blocks  # noqa: PLC0415

        kernels = (InterpretedFunction(kernel.fn) for kernel in triton_blocks.KERNELS)
        interpreted = triton_blocks.Kernels(*kernels)
        monkeypatch.setattr(block_ops, "kernels_for", lambda x: interpreted)
    return str(request.param)


def test_training_equals_masked_dense_training(way: str) -> None:
    model, mask = build()
    sparse = sparsify(model, mask, execution="blocks")
    optimizer = SparseSGD(sparse.parameters(), lr=0.1)
    with MaskedSGD(model, mask, lr=0.1) as expected:
        for step in range(5):
            x = torch.randn(7, 64, generator=torch.Generator().manual_seed(step))
            labels = torch.arange(7) % 5
            losses = []
            for network, steps in ((sparse, optimizer), (model, expected)):
                steps.zero_grad()
                loss = functional.cross_entropy(network(x), labels)
                loss.backward()
                steps.step()
                losses.append(loss.item())
            assert abs(losses[0] - losses[1]) < 1e-5
    dense = densify(sparse)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(dense.get_parameter(name), parameter, rtol=0, atol=1e-5)
    assert mask_of(sparse) == mask


def test_input_gradient_and_odd_batches(way: str) -> None:
    model, mask = build()
    layer = sparsify(model, mask, execution="blocks")[0]  # type: ignore[index]
    for shape in ((64,), (1, 64), (0, 64), (2, 3, 64)):
        x = torch.randn(*shape).requires_grad_()
        y = layer(x)
        torch.testing.assert_close(y, model[0](x), rtol=0, atol=1e-5)
        y.sum().backward()
        expected = torch.autograd.grad(model[0](x).sum(), x)[0]
        torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-5)


def test_state_copies_and_files_come_back(way: str, tmp_path: Path) -> None:
    model, mask = build()
    sparse = sparsify(model, mask, execution="blocks")
    x = torch.randn(3, 64)
    with torch.no_grad():
        y = sparse(x)
        for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
            assert torch.equal(other(x), y)
            assert other[0].execution == "blocks"
        fresh = sparsify(mlp(), mask, execution="blocks")
        fresh.load_state_dict(sparse.state_dict())
        assert torch.equal(fresh(x), y)
        save(sparse, tmp_path / "model.safetensors")
        loaded = load(tmp_path / "model.safetensors", mlp(), execution="blocks")
        assert torch.equal(loaded(x), y)
    assert not {"0.blocks", "0.side"} & sparse.state_dict().keys()


def test_a_mask_changes_to_one_of_the_same_structure_alone(way: str) -> None:
    model, mask = build()
    sparse = sparsify(model, mask, execution="blocks")
    x = torch.randn(3, 64)
    with torch.no_grad():
        sparse(x)
    new = mask_for(mlp(), other=True)
    assert new != mask
    loose = new.replace({NAMES[1]: torch.rand(32, 96) < 0.9})
    with pytest.raises(MaskError, match=f"mask of '{NAMES[1]}': execution="):
        change_mask(sparse, loose)
    assert mask_of(sparse) == mask
    change_mask(sparse, new)
    for name in NAMES:
        sparse.get_submodule(name.removesuffix(".weight")).reset_parameters()  # type: ignore[operator]
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), densify(sparse)(x), rtol=0, atol=1e-5)
    assert mask_of(sparse) == new
    layer = sparse[0]  # type: ignore[index]
    before = layer.values.clone()
    positions = layer.active_positions()
    free = torch.nonzero(~layer.mask().view(-1)).view(-1)[:1]
    with pytest.raises(MaskError, match='execution="blocks" needs a mask'):
        layer.move_pattern(torch.cat([positions, free]).sort().values)
    assert torch.equal(layer.values, before)
    assert torch.equal(layer.active_positions(), positions)


def test_growth_candidates_are_those_of_the_dense_way() -> None:
    model, mask = build()
    sparse, plain = (sparsify(model, mask, execution=e) for e in ("blocks", "dense"))
    x, labels = torch.randn(8, 64), torch.arange(8) % 5
    found = [
        topk_pruned_gradients(
            network, dict.fromkeys(NAMES, 9), lambda m: functional.cross_entropy(m(x), labels)
        )
        for network in (sparse, plain)
    ]
    for name in NAMES:
        for one, other in zip(found[0][name], found[1][name], strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.skipif(cpu.library() is None, reason="needs the native library: a C++ compiler")
def test_plans_take_structured_layers() -> None:
    model, mask = build()
    x, labels = torch.randn(8, 64), torch.arange(8) % 5
    losses = []
    for kind in ("blocks", "dense"):
        network = sparsify(model, mask, execution=kind)
        plan = TrainingPlan(network, (64,), batch_size=8)
        losses.append(plan.step(x, labels, optimizer=SparseSGD(network.parameters(), lr=0.1))[0])
    assert losses[0] == losses[1]


def test_compiled_block_layers_compute_the_same(way: str) -> None:
    model, mask = build()
    sparse = sparsify(model, mask, execution="blocks", fuse=False)
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 64)
    gradients = []
    for network in (sparse, compiled):
        network.zero_grad()
        y = network(x)
        y.square().sum().backward()
        gradients.append((y.detach(), *(p.grad for p in sparse.parameters())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_an_execution_is_checked_against_the_mask_and_the_layer() -> None:
    model, mask = build()
    layer = sparsify(model, mask)[0]  # type: ignore[index]
    layer.execution = "blocks"
    with pytest.raises(SparseModelError, match="execution is one of"):
        layer.execution = "2:4"
    assert layer.execution == "blocks"
    layer.execution = "sparse"
    assert layer.blocks.numel() == 0
    loose = torch.ones(32, 32, dtype=torch.bool)
    loose[0, 0] = False
    with pytest.raises(MaskError, match="whole blocks"):
        SparseLinear(32, 32, loose, execution="blocks")
    with pytest.raises(SparseModelError, match=r"for a SparseConv2d, got 'blocks'"):
        SparseConv2d(16, 16, 1, torch.ones(16, 16, 1, 1, dtype=torch.bool), execution="blocks")
