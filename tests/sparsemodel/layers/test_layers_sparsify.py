"""Sparsify, densify, fusing through the graph, masks changed in place, files."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dense_adjust
import pytest
import torch
from little_networks import Block, Residual, backward, images, masked, pooled, random_mask
from torch import nn
from torch.nn import functional

from sparsemodel.errors import CheckpointError, MaskError, SparseModelError
from sparsemodel.kernels.cpu import native
from sparsemodel.kernels.geometry import is_batch_innermost
from sparsemodel.layers.growth import change_mask, prune_and_grow, topk_pruned_gradients
from sparsemodel.layers.linear_and_conv import SparseConv2d, SparseLayer, SparseLinear
from sparsemodel.layers.norm_and_pool import FusedBatchNorm2d
from sparsemodel.layers.sparsify import densify, mask_of, sparsify
from sparsemodel.masks import adjust
from sparsemodel.masks.mask import Mask
from sparsemodel.optim import MaskedSGD, SparseAdam, SparseSGD
from sparsemodel.storage.checkpoint import save_sparse
from sparsemodel.storage.meter import state_bytes
from sparsemodel.storage.models import load, save

NETWORKS: list[Callable[[], nn.Module]] = [Residual, pooled]


def build(factory: Callable[[], nn.Module], density: float = 0.2) -> tuple[nn.Module, Mask]:
    torch.manual_seed(0)
    model = factory()
    return model, masked(model, density)


@pytest.mark.parametrize("factory", NETWORKS)
@pytest.mark.parametrize("fuse", [False, True])
def test_training_equals_masked_dense_training(
    factory: Callable[[], nn.Module], fuse: bool
) -> None:
    model, mask = build(factory)
    sparse = sparsify(model, mask, execution="sparse", fuse=fuse)
    optimizer = SparseSGD(sparse.parameters(), lr=0.05, weight_decay=1e-3)
    with MaskedSGD(model, mask, lr=0.05, weight_decay=1e-3) as expected:
        for step in range(6):
            optimizer.zero_grad()
            expected.zero_grad()
            assert abs(backward(sparse, step) - backward(model, step)) < 1e-5
            optimizer.step()
            expected.step()
    dense = densify(sparse)
    assert_same_state(dense, model, atol=2e-5)
    for network in (dense, sparse, model):
        network.eval()
    x, _ = images(99)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factory", NETWORKS)
def test_round_trip_is_exact_and_leaves_the_model_alone(factory: Callable[[], nn.Module]) -> None:
    model, mask = build(factory)
    before = copy.deepcopy(model.state_dict())
    sparse = sparsify(model, mask)
    assert_same_state(model, before)
    back = densify(sparse)
    assert type(back) is type(model)
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert list(back.state_dict()) == list(before)
    assert_same_state(back, before)
    assert [n for n, _ in back.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert mask_of(sparse) == mask
    x, _ = images(0)
    assert torch.equal(back(x), model(x))


def test_other_names_stay_and_pruned_weights_are_dropped() -> None:
    torch.manual_seed(0)
    model = Residual()
    mask = random_mask(model)  # not applied
    sparse = sparsify(model, mask)
    values = {f"{name.removesuffix('weight')}values" for name in mask}
    names = {name for name, _ in sparse.named_parameters()}
    assert names == {n for n, _ in model.named_parameters() if n not in mask} | values
    for name, pattern in mask.items():
        dense = model.get_parameter(name).detach()
        found = sparse.get_parameter(f"{name.removesuffix('weight')}values")
        assert torch.equal(found, dense[pattern])
        assert torch.equal(densify(sparse).get_parameter(name), dense * pattern)


def test_a_sparse_model_may_be_a_single_layer() -> None:
    model = nn.Linear(6, 4)
    mask = masked(model)
    sparse = sparsify(model, mask)
    assert isinstance(sparse, SparseLinear)
    assert list(mask_of(sparse)) == ["weight"]
    assert torch.equal(densify(sparse).weight, model.weight)  # type: ignore[arg-type]


def test_fusing_calls_one_batch_norm_for_norm_addition_and_relu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every batch norm with a ReLU behind it is fused; the shortcuts' own ones are not."""
    model, mask = build(Residual)
    calls: dict[str, tuple[bool, bool]] = {}
    sparse = sparsify(model, mask)
    names = {module: name for name, module in sparse.named_modules()}
    plain = FusedBatchNorm2d.forward

    def watched(self: FusedBatchNorm2d, *args: Any) -> torch.Tensor:  # hooks would undo fusing
        calls[names[self]] = (len(args) > 1 and args[1] is not None, args[2:] == (True,))
        return plain(self, *args)

    monkeypatch.setattr(FusedBatchNorm2d, "forward", watched)
    sparse(images(0)[0])
    assert calls.pop("bn1") == (False, True)
    for name, call in calls.items():
        expected = {"bn1": (False, True), "bn2": (True, True), "1": (False, False)}
        assert call == expected[name.rpartition(".")[2]], name


def test_the_layout_is_kept_through_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.loaded():
        pytest.skip("build the native library to keep its layout")
    model, mask = build(lambda: Residual(blocks=2))
    sparse = sparsify(model, mask, execution="sparse")
    inputs: list[tuple[str, bool]] = []
    names = {module: name for name, module in sparse.named_modules()}

    def watch(kind: type[nn.Module]) -> None:
        plain = kind.forward

        def watched(self: nn.Module, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            if names[self] != "bn1":
                inputs.append((names[self], is_batch_innermost(x)))
            return plain(self, x, *rest)

        monkeypatch.setattr(kind, "forward", watched)

    watch(SparseConv2d)
    watch(FusedBatchNorm2d)
    sparse(images(0)[0])
    assert len(inputs) > 20
    assert [name for name, kept in inputs if not kept] == []


class Branching(nn.Module):
    """Cannot be traced: the way it takes depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(3, 3, 1)
        self.fc = nn.Linear(3 * 64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(x) if x.sum() > 0 else x
        logits: torch.Tensor = self.fc(y.flatten(1))
        return logits


class DropsInTraining(Branching):
    """Traces to another graph in training than in evaluation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.dropout(self.block(x), 0.5, self.training)
        logits: torch.Tensor = self.fc(y.flatten(1))
        return logits


class WritesInPlace(nn.Module):
    """A fused batch norm computed later would see another input, or write to another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.again = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3 * 64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        z = self.norm(y)
        y.relu_()
        z = functional.relu(z + y)
        u = self.conv(z)
        z += self.again(u)
        logits: torch.Tensor = self.fc((functional.relu(z) + z).flatten(1))
        return logits


class SumUnderTwoNames(WritesInPlace):
    """torch.fx alone records `y += x` as a new sum, which `kept` would not be."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = kept = self.norm(self.conv(x))
        y += self.again(x)
        logits: torch.Tensor = self.fc((functional.relu(y) + kept).flatten(1))
        return logits


@pytest.mark.parametrize("factory", [Branching, WritesInPlace, SumUnderTwoNames])
def test_models_that_cannot_be_fused_give_the_same(factory: Callable[[], nn.Module]) -> None:
    model, mask = build(factory)
    sparse = sparsify(model, mask)
    x, _ = images(0)
    for training in (True, False):
        model.train(training)
        sparse.train(training)
        torch.testing.assert_close(sparse(x.clone()), model(x.clone()), rtol=1e-4, atol=1e-5)


def test_what_training_does_otherwise_is_not_baked_in() -> None:
    model, mask = build(DropsInTraining)
    sparse = sparsify(model, mask)
    x, _ = images(0)
    assert not torch.equal(sparse(x), sparse(x))
    sparse, model = sparsify(model, mask).eval(), model.eval()
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-4, atol=1e-5)


def test_hooks_on_containers_prevent_fusing() -> None:
    model, mask = build(Residual)
    calls: list[int] = []
    model.get_submodule("stages").register_forward_hook(lambda *_: calls.append(1))
    sparsify(model, mask)(images(0)[0])
    assert len(calls) == 1


@pytest.mark.parametrize("fuse", [False, True])
def test_copies_pickles_and_compiled_models_give_the_same(fuse: bool) -> None:
    model, mask = build(Residual)
    sparse = sparsify(model, mask, execution="sparse", fuse=fuse).eval()
    x, _ = images(0)
    expected = sparse(x)
    copied = copy.deepcopy(sparse)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.zero_()
    assert torch.equal(copied(x), expected)
    again = pickle.loads(pickle.dumps(copied))
    torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-6)
    compiled = torch.compile(copied, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-6)


def test_what_has_no_sparse_form_is_refused() -> None:
    def refused(model: nn.Module, name: str, match: str, shape: tuple[int, ...] = ()) -> None:
        shape = shape or tuple(dict(model.named_parameters())[name].shape)
        with pytest.raises((SparseModelError, MaskError), match=match):
            sparsify(model, Mask({name: torch.ones(shape, dtype=torch.bool)}))

    refused(nn.Sequential(nn.Conv1d(2, 2, 1)), "0.weight", "belongs to a Conv1d")
    refused(nn.Sequential(nn.Linear(2, 2)), "0.bias", "belongs to a Linear")
    refused(nn.Sequential(nn.Linear(2, 2)), "1.weight", r"no parameter '1\.weight'", (2, 2))
    refused(nn.Sequential(nn.Linear(2, 2)), "0.weight", r"has shape \(2, 3\)", (2, 3))
    tied = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    tied["head"].weight = tied["embed"].weight
    with pytest.raises(SparseModelError, match=r"'head\.weight' is tied to \['embed\.weight'\]"):
        sparsify(tied, Mask({"head.weight": torch.ones(5, 3, dtype=torch.bool)}))
    hooked = nn.Sequential(nn.Linear(2, 2))
    hooked[0].register_forward_hook(lambda *_: None)
    refused(hooked, "0.weight", r"has hooks \(forward hooks\); remove")


@pytest.mark.parametrize("training", [False, True])
def test_attention_reads_the_weight_of_its_sparse_projection(training: bool) -> None:
    """It is never called; torch's fast path for evaluation reads those of the others too."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    mask = masked(layer)
    assert "self_attn.out_proj.weight" in mask
    sparse = sparsify(layer.train(training), mask)
    x = torch.randn(3, 5, 8)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(sparse(x), layer(x), rtol=1e-5, atol=1e-6)
    if training:
        sparse(x).square().sum().backward()
        layer(x).square().sum().backward()
        for name, part in layers_of(sparse).items():
            gradient = layer.get_parameter(name).grad
            assert gradient is not None
            torch.testing.assert_close(part.values.grad, gradient[mask[name]], rtol=1e-4, atol=1e-5)
    back = densify(sparse)
    assert [type(m) for m in back.modules()] == [type(m) for m in layer.modules()]


def test_a_layer_used_twice_under_one_name_stays_one_layer() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    mask = Mask({"0.weight": torch.eye(4).bool()})
    mask.apply(model)
    sparse = sparsify(model, mask)
    assert sparse[0] is sparse[2]  # type: ignore[index]
    x = torch.randn(3, 4)
    torch.testing.assert_close(sparse(x), model(x))
    back = densify(sparse)
    assert back[0] is back[2]  # type: ignore[index]


@pytest.mark.parametrize("adam", [False, True])
def test_prune_and_grow_equals_the_masked_dense_way(adam: bool) -> None:
    """Masks and weights are those of adjust; state of the optimiser follows its weights."""
    model, mask = build(Residual)
    sparse = sparsify(model, mask, execution="sparse")
    optimizer = (SparseAdam if adam else SparseSGD)(sparse.parameters(), lr=0.01)
    backward(sparse, 0)
    optimizer.step()
    dense = densify(sparse)

    def loss(network: nn.Module) -> torch.Tensor:
        x, labels = images(1)
        return functional.cross_entropy(network(x), labels)

    counts = dict.fromkeys(mask, 7)
    found = topk_pruned_gradients(sparse, counts, loss)
    expected = adjust.topk_pruned_gradients(dense, mask, counts, loss)
    for name in mask:
        assert torch.equal(found[name][0], expected[name][0])
        torch.testing.assert_close(found[name][1], expected[name][1], rtol=1e-3, atol=1e-6)
    weights = {name: dense.get_parameter(name).detach() for name in mask}
    new = dense_adjust.prune_and_grow(mask, weights, expected, counts)
    carried = dense_adjust.carry_weights(weights, old=mask, new=new)
    before = {
        name: {k: v.clone() for k, v in optimizer.state[layer.values].items()}
        for name, layer in layers_of(sparse).items()
    }
    prune_and_grow(sparse, found, counts, optimizer=optimizer)
    assert mask_of(sparse) == new
    for name, layer in layers_of(sparse).items():
        assert torch.equal(layer.weight, carried[name])
        for key, tensor in optimizer.state[layer.values].items():
            wanted = torch.zeros(mask[name].shape)
            if tensor.dim():
                wanted[mask[name]] = before[name][key]
                wanted[~new[name]] = 0
                assert torch.equal(tensor, wanted[new[name]]), key
    backward(sparse, 2)
    optimizer.step()


def layers_of(model: nn.Module) -> dict[str, SparseLayer]:
    return {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, SparseLayer)}


def test_topk_leaves_no_trace_and_names_what_it_cannot_do() -> None:
    model, mask = build(Residual)
    sparse = sparsify(model, mask)
    before = copy.deepcopy(sparse.state_dict())
    counts = {"fc.weight": 3, "stages.0.conv1.weight": 0}
    found = topk_pruned_gradients(sparse, counts, lambda m: m(images(0)[0]).square().sum())
    assert [len(found[name][0]) for name in counts] == [3, 0]
    assert_same_state(sparse, before)
    assert all(p.grad is None and p.requires_grad for p in sparse.parameters())
    with pytest.raises(MaskError, match=r"no sparse layer 'conv1\.weight'"):
        topk_pruned_gradients(sparse, {"conv1.weight": 1}, lambda m: m(images(0)[0]).sum())
    with pytest.raises(MaskError, match="called twice in one pass"):
        topk_pruned_gradients(
            sparse, {"fc.weight": 1}, lambda m: m(images(0)[0]).sum() + m(images(1)[0]).sum()
        )
    active = mask.active("fc.weight")[:1]
    with pytest.raises(MaskError, match="hold active weights"):
        prune_and_grow(sparse, {"fc.weight": (active, torch.ones(1))}, {"fc.weight": 1})
    with pytest.raises(MaskError, match="expected a count >= 0"):
        prune_and_grow(sparse, {}, {"fc.weight": -1})
    assert_same_state(sparse, before)


def test_change_mask_carries_weights_and_torchs_own_optimiser() -> None:
    model, mask = build(Residual)
    sparse = sparsify(model, mask)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.01, momentum=0.9)
    backward(sparse, 0)
    optimizer.step()
    dense = densify(sparse)
    new = random_mask(model, density=0.3, seed=9)
    change_mask(sparse, new, optimizer=optimizer)
    weights = {name: dense.get_parameter(name).detach() for name in mask}
    carried = dense_adjust.carry_weights(weights, old=mask, new=new)
    assert mask_of(sparse) == new
    for name, layer in layers_of(sparse).items():
        assert torch.equal(layer.weight, carried[name])
        assert optimizer.state[layer.values]["momentum_buffer"].shape == layer.values.shape
    assert_same_state(densify(sparsify(densify(sparse), new)), densify(sparse))
    backward(sparse, 1)
    optimizer.step()
    with pytest.raises(MaskError, match="sparse layers are"):
        change_mask(sparse, Mask({"conv1.weight": torch.ones(8, 3, 3, 3).bool()}))


@pytest.mark.parametrize("factory", NETWORKS)
def test_files_are_those_of_the_dense_state_and_mask(
    factory: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model, mask = build(factory)
    sparse = sparsify(model, mask)
    save_sparse(tmp_path / "dense", model.state_dict(), mask, metadata={"a": "b"})
    save(sparse, tmp_path / "sparse", metadata={"a": "b"})
    assert (tmp_path / "sparse").read_bytes() == (tmp_path / "dense").read_bytes()
    assert load(tmp_path / "sparse").mask == mask
    assert load(tmp_path / "sparse").metadata == {"a": "b"}
    torch.manual_seed(5)
    other = factory()
    for template in (other, sparsify(other, random_mask(other, density=0.4, seed=7))):
        before = copy.deepcopy(template.state_dict())
        loaded = load(tmp_path / "sparse", template)
        assert mask_of(loaded) == mask
        assert_same_state(loaded, sparse)
        assert_same_state(densify(loaded), model)
        assert_same_state(template, before)
        x, _ = images(0)
        assert torch.equal(loaded.eval()(x), sparse.eval()(x))


def test_a_model_on_meta_is_filled(tmp_path: Path) -> None:
    """Nothing of the architecture is held in memory but what the file has."""
    model, mask = build(Residual)
    sparse = sparsify(model, mask)
    save(sparse, tmp_path / "sparse")
    with torch.device("meta"):
        empty = Residual()
    loaded = load(tmp_path / "sparse", empty)
    assert_same_state(loaded, sparse)
    assert all(p.is_meta for p in empty.parameters())
    x, _ = images(0)
    assert torch.equal(loaded.eval()(x), sparse.eval()(x))


def test_files_without_counters_are_read(tmp_path: Path) -> None:
    """As those of sparse states: a model keeps its own, one on "meta" starts at zero."""
    model, mask = build(Residual)
    floats = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    save_sparse(tmp_path / "state", floats, mask, metadata={})
    model.bn1.num_batches_tracked.fill_(3)
    assert_same_state(densify(load(tmp_path / "state", model)), model)
    with torch.device("meta"):
        empty = Residual()
    assert int(load(tmp_path / "state", empty).bn1.num_batches_tracked) == 0


def test_files_without_a_mask_give_plain_models(tmp_path: Path) -> None:
    model, mask = build(Residual)
    save(model, tmp_path / "plain")
    torch.manual_seed(5)
    loaded = load(tmp_path / "plain", Residual())
    assert_same_state(loaded, model)
    assert not any(isinstance(m, SparseLayer) for m in loaded.modules())
    assert load(tmp_path / "plain").mask is None
    save(model, tmp_path / "masked", mask=mask)
    assert load(tmp_path / "masked").mask == mask
    assert mask_of(load(tmp_path / "masked", Residual())) == mask


def test_files_of_other_models_are_refused(tmp_path: Path) -> None:
    model, mask = build(Residual)
    path = tmp_path / "file"
    save(sparsify(model, mask), path)
    with pytest.raises(
        CheckpointError,
        match=r"the model has no parameter 'stages.0.conv1.weight' .*; is it another",
    ):
        load(path, pooled())
    with pytest.raises(CheckpointError, match=r"has shape .* is it another"):
        load(path, Residual(width=4))
    wider = Residual()
    wider.extra = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"differ in \['extra.bias', 'extra.weight'\]"):
        load(path, wider)
    stem = Residual()
    stem.conv1 = nn.Conv2d(3, 8, 5, 1, 2, bias=False)
    with pytest.raises(CheckpointError, match="made for another model"):
        load(path, stem)
    with pytest.raises(CheckpointError, match="has its own; leave it out"):
        save(sparsify(model, mask), path, mask=mask)
    save(model, path)
    with pytest.raises(CheckpointError, match="file and model differ in"):
        load(path, sparsify(model, mask))


def test_state_bytes_are_those_of_active_weights() -> None:
    """4 bytes for value, gradient and momentum each; columns and the index by input apart."""
    model, mask = build(Residual, density=0.05)
    sparse = sparsify(model, mask, execution="sparse")
    optimizer = SparseSGD(sparse.parameters(), lr=0.1)
    pruned = mask.num_weights - mask.num_active
    numel = sum(p.numel() for p in model.parameters()) - pruned
    assert state_bytes(sparse)["weights"] == 4 * numel
    backward(sparse, 0)
    optimizer.step()
    found = state_bytes(sparse, optimizer)
    assert found["weights"] == found["gradients"] == found["optimizer"] == 4 * numel
    rows = sum(p.shape[0] + 1 for p in mask.values())
    by_input = sum(4 * p.shape[1] + 1 for p in mask.values())  # at most, for stride 2
    assert 4 * (mask.num_active + rows) <= found["indices"]
    assert found["indices"] <= 4 * (3 * mask.num_active + rows + by_input)
    assert found["buffers"] == sum(b.numel() * b.element_size() for b in model.buffers())


def assert_same_state(
    model: nn.Module | dict[str, torch.Tensor],
    other: nn.Module | dict[str, torch.Tensor],
    atol: float = 0.0,
) -> None:
    one, two = (m.state_dict() if isinstance(m, nn.Module) else m for m in (model, other))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor, two[name], rtol=atol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
