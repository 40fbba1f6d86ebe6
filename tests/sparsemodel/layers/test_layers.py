"""Sparse layers as modules: shapes, storage, state, copies, dtypes, compilation."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.kernels.choice import dense_is_faster
from sparsemodel.kernels.cpu import native
from sparsemodel.kernels.geometry import ConvGeometry
from sparsemodel.layers.linear_and_conv import SparseConv2d, SparseLinear
from sparsemodel.storage.meter import storage_bytes


def pattern(*shape: int, density: float = 0.3, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def masked_pair(
    plain: nn.Linear | nn.Conv2d, density: float = 0.3
) -> tuple[nn.Module, SparseLinear | SparseConv2d]:
    """A plain layer with zeros at pruned places and its sparse form."""
    mask = pattern(*plain.weight.shape, density=density)
    with torch.no_grad():
        plain.weight.mul_(mask)
    if isinstance(plain, nn.Linear):
        return plain, SparseLinear.from_dense(plain, mask)
    return plain, SparseConv2d.from_dense(plain, mask)


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (1, 3), stride=(2, 1), padding=(0, 2), bias=False),
    nn.Conv2d(4, 8, 3, groups=4, dilation=2),
    nn.Conv2d(4, 6, 3, padding="same", dilation=(1, 2)),
    nn.Conv2d(4, 6, 2, padding="valid"),
]


@pytest.mark.parametrize("plain", CONVOLUTIONS, ids=str)
def test_convolutions_of_every_kind_round_trip_and_agree(plain: nn.Conv2d) -> None:
    plain, sparse = masked_pair(copy.deepcopy(plain))
    x = torch.randn(3, 4, 9, 10)
    torch.testing.assert_close(sparse(x), plain(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sparse(x[0]), plain(x[0]), rtol=1e-5, atol=1e-6)
    back = sparse.to_dense()
    assert torch.equal(back(x), plain(x))
    assert back.state_dict().keys() == plain.state_dict().keys()


def test_linear_takes_inputs_of_any_rank() -> None:
    plain, sparse = masked_pair(nn.Linear(7, 5))
    for lead in [(), (4,), (2, 3), (2, 1, 3), (0,)]:
        x = torch.randn(*lead, 7)
        torch.testing.assert_close(sparse(x), plain(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("execution", ["sparse", "dense"])
def test_outputs_may_be_changed_in_place(execution: str) -> None:
    """As nn.ReLU(inplace=True) does; outputs must not be views made inside a custom function."""
    options: dict[str, Any] = {"execution": execution}
    convolution = SparseConv2d(3, 4, 3, pattern(4, 3, 3, 3), **options)
    linear = SparseLinear(7, 5, pattern(5, 7), **options)
    for layer, x in [
        (convolution, torch.randn(2, 3, 5, 5)),
        (linear, torch.randn(3, 7)),
        (linear, torch.randn(2, 3, 7)),
    ]:
        layer(x).relu_().sum().backward()
        found = layer.values.grad
        layer.zero_grad()
        torch.relu(layer(x)).sum().backward()
        assert found is not None
        assert torch.equal(found, layer.values.grad)
        layer.zero_grad()


def test_values_are_the_only_weight_storage() -> None:
    """100 of 10,000 weights: 4 bytes a value and gradient, 4 for its column, 8 for gradients."""
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask.view(-1)[::100] = True
    layer = SparseLinear(100, 100, mask, bias=False, execution="sparse")
    assert [p.shape for p in layer.parameters()] == [(100,)]
    layer(torch.randn(4, 100)).sum().backward()
    assert layer.values.grad is not None
    assert layer.values.grad.shape == (100,)
    assert storage_bytes([layer.values, layer.values.grad]) == 800
    assert storage_bytes(layer.buffers()) <= 4 * (101 + 100) + 8 * 100 + 4 * 101
    assert layer.density == 0.01
    assert torch.equal(layer.mask(), mask)
    assert torch.equal(layer.weight[mask], layer.values)
    assert layer.weight.count_nonzero() <= 100


def test_new_layers_are_drawn_like_torchs() -> None:
    """Uniform in ±1/√fan_in, as nn.Linear and nn.Conv2d."""
    torch.manual_seed(0)
    layer = SparseConv2d(16, 64, 3, pattern(64, 16, 3, 3, density=0.5), padding=1)
    bound = 1 / 144**0.5
    assert 0.95 * bound < layer.values.abs().max() <= bound
    assert layer.bias is not None
    assert 0.8 * bound < layer.bias.abs().max() <= bound


def test_from_dense_draws_no_random_numbers_and_keeps_what_is_frozen() -> None:
    plain = nn.Linear(7, 5).requires_grad_(False).eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    sparse = SparseLinear.from_dense(plain, pattern(5, 7))
    dense = sparse.to_dense()
    assert torch.equal(torch.get_rng_state(), before)
    for layer in (sparse, dense):
        assert not layer.training
        assert not any(p.requires_grad for p in layer.parameters())


def test_state_round_trip_and_copies() -> None:
    _, sparse = masked_pair(nn.Conv2d(4, 6, 3))
    other = SparseConv2d(4, 6, 3, sparse.mask())
    assert list(other.state_dict()) == ["values", "bias", "row_ptr", "cols"]
    other.load_state_dict(sparse.state_dict())
    x = torch.randn(2, 4, 5, 5)
    for twin in (other, copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(twin(x), sparse(x))
        twin(x).sum().backward()
        assert sparse.values.grad is None


def test_a_state_of_another_pattern_or_a_damaged_one_is_refused() -> None:
    layer = nn.Sequential(SparseLinear(7, 5, pattern(5, 7)))
    state = layer.state_dict()
    other = nn.Sequential(SparseLinear(7, 5, pattern(5, 7, seed=1))).state_dict()
    with pytest.raises(
        MaskError, match=r"'0': the state was saved under another mask.*change_mask"
    ):
        layer.load_state_dict(other)
    with pytest.raises(MaskError, match="values for"):
        layer.load_state_dict({**state, "0.values": state["0.values"][1:]})
    bad_order = state["0.cols"].flip(0)
    with pytest.raises(MaskError, match="ascending in each row"):
        layer.load_state_dict({**state, "0.cols": bad_order})
    with pytest.raises(MaskError, match="row_ptr must rise"):
        layer.load_state_dict({**state, "0.row_ptr": state["0.row_ptr"] + 1})
    with pytest.raises(MaskError, match="expected row_ptr of 6 entries"):
        layer.load_state_dict({**state, "0.row_ptr": state["0.row_ptr"][1:]})
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.cols"):
        layer.load_state_dict({k: v for k, v in state.items() if k != "0.cols"})
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_take_the_reference_way(dtype: torch.dtype) -> None:
    for plain, x in [
        (nn.Linear(7, 5), torch.randn(3, 7)),
        (nn.Conv2d(7, 5, 3), torch.randn(3, 7, 4, 4)),
    ]:
        dense, sparse = masked_pair(plain)
        dense, sparse = dense.to(dtype), sparse.to(dtype)
        y, expected = sparse(x.to(dtype)), dense(x.to(dtype))
        assert y.dtype == dtype
        assert torch.equal(y, expected)
        y.sum().backward()
        assert sparse.values.grad is not None
        assert sparse.values.grad.dtype == dtype


def test_autocast_keeps_sparse_layers_in_their_own_type() -> None:
    net = nn.Sequential(nn.Linear(7, 7), SparseLinear(7, 5, pattern(5, 7)))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.randn(3, 7))
    assert y.dtype == torch.float32
    y.sum().backward()


@pytest.mark.parametrize("execution", ["sparse", "dense"])
@pytest.mark.parametrize("training", [False, True])
def test_compiled_layers_give_the_same(execution: str, training: bool) -> None:
    net = nn.Sequential(
        SparseConv2d(3, 6, 3, pattern(6, 3, 3, 3), padding=1, execution=execution),  # type: ignore[arg-type]
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        SparseLinear(24, 5, pattern(5, 24), execution=execution),  # type: ignore[arg-type]
    ).train(training)
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-6)
    compiled(x).square().sum().backward()
    net(x).square().sum().backward()
    for (name, found), expected in zip(twin.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("training", [False, True])
def test_the_automatic_choice_follows_shape_and_density(training: bool) -> None:
    """Dense where it must win (full, tiny), sparse where it must (1 % of a large layer)."""

    def dense(density: float, geometry: ConvGeometry, batch: int, size: int, layout: bool) -> bool:
        nnz = int(density * geometry.out_channels * geometry.row_length)
        where = {"in_layout": layout, "training": training}
        return dense_is_faster(geometry, nnz, batch, (size, size), **where)

    large = ConvGeometry(256, 256, 3, 3, 1, 1, 1, 1)
    for batch in (1, 16, 64):
        for layout in (False, True):
            assert dense(1.0, large, batch, 8, layout)
            assert not dense(0.01, large, batch, 8, layout)
            choices = [dense(d / 100, large, batch, 8, layout) for d in range(1, 101)]
            assert choices == sorted(choices), "one change from sparse to dense as density grows"
    assert dense(0.05, ConvGeometry(8, 8, 1, 1), 1, 1, True)
    assert dense(0.5, ConvGeometry(512, 512, 1, 1), 16, 1, True)


def test_execution_is_obeyed_and_may_be_changed() -> None:
    mask = pattern(256, 256, density=0.9)
    layer = SparseLinear(256, 256, mask, bias=False, execution="sparse")
    x = torch.randn(32, 256)
    expected = layer(x)
    assert layer.transposed.numel() > 0 or not native.loaded()
    assert layer.bits.numel() == 0
    for execution in ("dense", "auto"):  # both dense at this density
        layer.execution = execution  # type: ignore[assignment]
        assert layer.transposed.numel() == 0
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
        assert layer.bits.nbytes == (256 * 256 // 8 if native.loaded() else 0), "a bit a weight"
    layer.execution = "sparse"
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(SparseModelError, match="execution is one of"):
        layer.execution = "fast"  # type: ignore[assignment]


def test_moving_the_pattern_keeps_what_stays_active() -> None:
    layer = SparseLinear(4, 2, torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]]).bool(), bias=False)
    with torch.no_grad():
        layer.values.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    values = layer.values
    source = layer.move_pattern(torch.tensor([1, 2, 3, 5]))
    assert source.tolist() == [-1, 1, -1, 2]
    assert layer.values is values
    assert layer.weight.tolist() == [[0, 0, 2, 0], [0, 3, 0, 0]]
    assert layer.row_ptr.tolist() == [0, 3, 4]
    assert layer.cols.tolist() == [1, 2, 3, 1]
    x = torch.randn(3, 4, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, x @ layer.weight.t())
    (found,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.testing.assert_close(found, layer.weight.sum(0).expand(3, 4))
    assert layer.move_pattern(torch.empty(0, dtype=torch.int64)).tolist() == []
    assert layer(x).count_nonzero() == 0
    assert layer.move_pattern(torch.tensor([7])).tolist() == [-1]
    for bad in ([3, 2], [2, 2], [-1, 2], [8]):
        with pytest.raises(MaskError, match=r"ascending flat indices in \[0, 8\)"):
            layer.move_pattern(torch.tensor(bad))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(
        MaskError, match=r"weight's shape \(5, 7\), got torch.bool of shape \(7, 5\)"
    ):
        SparseLinear(7, 5, pattern(7, 5))
    with pytest.raises(MaskError, match=r"got torch\.float32"):
        SparseConv2d(4, 6, 3, torch.ones(6, 4, 3, 3))
    with pytest.raises(SparseModelError, match="groups must divide 4 and 6 channels, got 4"):
        SparseConv2d(4, 6, 3, pattern(6, 1, 3, 3), groups=4)
    with pytest.raises(SparseModelError, match="execution is one of"):
        SparseLinear(7, 5, pattern(5, 7), execution="fast")  # type: ignore[arg-type]
    circular = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")
    with pytest.raises(SparseModelError, match="padding_mode='circular'"):
        SparseConv2d.from_dense(circular, pattern(6, 4, 3, 3))
    uneven = nn.Conv2d(4, 6, 2, padding="same")
    with pytest.raises(SparseModelError, match="pads unevenly"):
        SparseConv2d.from_dense(uneven, pattern(6, 4, 2, 2))
    with pytest.raises(SparseModelError, match=r"expected a tensor \[\*, 7\], got \(2, 6\)"):
        SparseLinear(7, 5, pattern(5, 7))(torch.ones(2, 6))
