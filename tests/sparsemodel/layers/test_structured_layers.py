"""Linear layers with execution "blocks" and "2:4": training, state, changes of the mask."""

import copy
import gc
import pickle
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsemodel.errors import MaskError, NativeLibraryWarning, SparseModelError
from sparsemodel.kernels.blocks import ops as block_ops
from sparsemodel.kernels.blocks import semi_structured
from sparsemodel.kernels.cpu import library as cpu
from sparsemodel.layers import tensor_cores as structured
from sparsemodel.layers.base import Execution
from sparsemodel.layers.growth import change_mask, topk_pruned_gradients
from sparsemodel.layers.linear_and_conv import SparseConv2d, SparseLinear
from sparsemodel.layers.sparsify import densify, mask_of, sparsify
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.structure import block_counts, block_mask, n_of_m_mask
from sparsemodel.optim import MaskedSGD, SparseSGD
from sparsemodel.plans.plan import TrainingPlan
from sparsemodel.storage.models import load, save

NAMES = ("0.weight", "2.weight")
both = pytest.mark.parametrize("execution", ["blocks", "2:4"])


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32), nn.ReLU(),
                         nn.Linear(32, 5))  # fmt: skip


def mask_for(model: nn.Module, execution: Execution, *, other: bool = False) -> Mask:
    """Of weights' magnitude; `other`: of the opposite."""
    sign = -1 if other else 1
    scores = {name: sign * model.get_parameter(name).detach().abs() for name in NAMES}
    if execution == "2:4":
        return n_of_m_mask(scores)
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    return block_mask(scores, block_counts(shapes, 0.4, side=16), side=16)


def build(execution: Execution) -> tuple[nn.Sequential, Mask]:
    model = mlp()
    mask = mask_for(model, execution)
    mask.apply(model)
    return model, mask


def through_metadata(*args: torch.Tensor | int) -> torch.Tensor:
    """In place of cuSPARSELt, which needs a GPU: packed values and metadata, and back."""
    weight = semi_structured._weight(*args)  # type: ignore[arg-type]
    return sparse_semi_structured_to_dense_cutlass(
        *sparse_semi_structured_from_dense_cutlass(weight.detach().half())
    ).to(weight.dtype)


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
        monkeypatch.setattr(semi_structured, "obstacle", lambda values, shape: None)
        monkeypatch.setattr(semi_structured, "compress", through_metadata)
    return str(request.param)


@both
def test_training_equals_masked_dense_training(execution: Execution, way: str) -> None:
    model, mask = build(execution)
    for parameter in model.parameters():  # what half keeps, for the metadata's sake
        parameter.data = parameter.data.half().float()
    sparse = sparsify(model, mask, execution=execution)
    optimizer = SparseSGD(sparse.parameters(), lr=0.1)
    tolerance = 2e-3 if (way, execution) == ("kernels", "2:4") else 1e-5
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
            assert abs(losses[0] - losses[1]) < tolerance
    dense = densify(sparse)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(dense.get_parameter(name), parameter, rtol=0, atol=tolerance)
    assert mask_of(sparse) == mask


@both
def test_input_gradient_and_odd_batches(execution: Execution, way: str) -> None:
    model, mask = build(execution)
    layer = sparsify(model, mask, execution=execution)[0]  # type: ignore[index]
    for shape in ((64,), (1, 64), (0, 64), (2, 3, 64)):
        x = torch.randn(*shape).half().float().requires_grad_()
        y = layer(x)
        torch.testing.assert_close(y, model[0](x), rtol=0, atol=2e-3)
        y.sum().backward()
        expected = torch.autograd.grad(model[0](x).sum(), x)[0]
        torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-5)


@both
def test_state_copies_and_files_come_back(execution: Execution, way: str, tmp_path: Path) -> None:
    model, mask = build(execution)
    sparse = sparsify(model, mask, execution=execution)
    x = torch.randn(3, 64)
    with torch.no_grad():
        y = sparse(x)
        for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
            assert torch.equal(other(x), y)
            assert other[0].execution == execution
        fresh = sparsify(mlp(), mask, execution=execution)
        fresh.load_state_dict(sparse.state_dict())
        assert torch.equal(fresh(x), y)
        save(sparse, tmp_path / "model.safetensors")
        loaded = load(tmp_path / "model.safetensors", mlp(), execution=execution)
        assert torch.equal(loaded(x), y)
    assert not {"0.blocks", "0.side"} & sparse.state_dict().keys()


@both
def test_a_mask_changes_to_one_of_the_same_structure_alone(execution: Execution, way: str) -> None:
    model, mask = build(execution)
    sparse = sparsify(model, mask, execution=execution)
    x = torch.randn(3, 64)
    with torch.no_grad():
        sparse(x)
    new = mask_for(mlp(), execution, other=True)
    assert new != mask
    loose = new.replace({NAMES[1]: torch.rand(32, 96) < 0.9})
    with pytest.raises(MaskError, match=f"mask of '{NAMES[1]}': execution="):
        change_mask(sparse, loose)
    assert mask_of(sparse) == mask
    change_mask(sparse, new)
    for name in NAMES:
        sparse.get_submodule(name.removesuffix(".weight")).reset_parameters()  # type: ignore[operator]
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), densify(sparse)(x), rtol=0, atol=2e-3)
    assert mask_of(sparse) == new
    layer = sparse[0]  # type: ignore[index]
    before = layer.values.clone()
    positions = layer.active_positions()
    free = torch.nonzero(~layer.mask().view(-1)).view(-1)[:1]
    with pytest.raises(MaskError, match=f'execution="{execution}" needs a mask'):
        layer.move_pattern(torch.cat([positions, free]).sort().values)
    assert torch.equal(layer.values, before)
    assert torch.equal(layer.active_positions(), positions)


@both
def test_growth_candidates_are_those_of_the_dense_way(execution: Execution) -> None:
    model, mask = build(execution)
    sparse, plain = (sparsify(model, mask, execution=e) for e in (execution, "dense"))
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
@both
def test_plans_take_structured_layers(execution: Execution) -> None:
    model, mask = build(execution)
    x, labels = torch.randn(8, 64), torch.arange(8) % 5
    losses = []
    for kind in (execution, "dense"):
        network = sparsify(model, mask, execution=kind)
        plan = TrainingPlan(network, (64,), batch_size=8)
        losses.append(plan.step(x, labels, optimizer=SparseSGD(network.parameters(), lr=0.1))[0])
    assert losses[0] == losses[1]


def test_compiled_block_layers_compute_the_same(way: str) -> None:
    model, mask = build("blocks")
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
    model, mask = build("blocks")
    with pytest.raises(MaskError, match=r"'0.weight'.*at most 2 of every 4 neighbours"):
        sparsify(model, mask, execution="2:4")
    layer = sparsify(model, mask)[0]  # type: ignore[index]
    layer.execution = "blocks"
    with pytest.raises(MaskError, match="n_of_m_mask"):
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


def test_packed_values_are_the_layers_values() -> None:
    """With exactly 2 of 4 the metadata depend on the mask alone; values are packed in order."""
    weight = torch.randn(32, 64).half()
    mask = n_of_m_mask({"w": weight.abs()})["w"]
    packed, metadata = sparse_semi_structured_from_dense_cutlass(weight * mask)
    assert torch.equal(packed.flatten(), weight[mask])
    _, same = sparse_semi_structured_from_dense_cutlass(mask.half())
    assert torch.equal(metadata, same)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, metadata), weight * mask)


def test_the_compressed_weight_follows_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def compress(*args: torch.Tensor | int) -> torch.Tensor:
        made.append(1)
        return through_metadata(*args)

    monkeypatch.setattr(semi_structured, "obstacle", lambda values, shape: None)
    monkeypatch.setattr(semi_structured, "compress", compress)
    model, mask = build("2:4")
    layer = sparsify(model, mask, execution="2:4")[0]  # type: ignore[index]
    x = torch.ones(2, 64)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
        assert len(made) == 1
        layer.values.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(layer(x), 2 * first, rtol=0, atol=1e-4)
        assert len(made) == 2
        layer.load_state_dict({k: -v if v.is_floating_point() else v
                               for k, v in layer.state_dict().items()})  # fmt: skip
        torch.testing.assert_close(layer(x), -2 * first, rtol=0, atol=1e-4)
        half = layer.half()(x.half())
        torch.testing.assert_close(half, -2 * first.half(), rtol=0, atol=1e-2)
    layer(x.half()).sum().backward()
    assert layer.values.grad.shape == layer.values.shape
    assert layer in structured._COMPRESSED
    kept = weakref.ref(structured._COMPRESSED[layer].weight)
    del layer
    gc.collect()
    assert kept() is None


def test_one_warning_says_why_the_reference_computes() -> None:
    semi_structured.warn_once.cache_clear()
    model, mask = build("2:4")
    layer = sparsify(model, mask, execution="2:4")[0]  # type: ignore[index]
    with pytest.warns(NativeLibraryWarning, match="2:4.*on cpu; they need an NVIDIA GPU"):
        layer(torch.ones(1, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.ones(1, 64))


def test_what_two_of_four_kernels_take() -> None:
    why = semi_structured.shape_obstacle
    assert why(torch.bfloat16, (64, 96)) is None
    assert "call .to(torch.bfloat16)" in str(why(torch.float32, (64, 96)))
    assert "multiple of (16, 16), this one is (64, 20)" in str(why(torch.float16, (64, 20)))
    assert "this one is (8, 64)" in str(why(torch.float16, (8, 64)))
