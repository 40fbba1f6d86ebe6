"""Per-sample gradient norms and dot products against one backward pass a sample."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from little_networks import Residual, pooled, random_mask
from torch import nn
from torch.nn import functional

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.gradients import sample_gradients
from sparsemodel.gradients.per_sample import gradient_dots, gradient_norms
from sparsemodel.layers.sparsify import densify, sparsify

Tensor = torch.Tensor
Losses = Callable[[nn.Module], Tensor]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def one_by_one(
    model: nn.Module, losses: Losses, names: list[str] | None = None
) -> list[dict[str, Tensor]]:
    """The gradient of each sample by a backward pass of its own; zero where there is none."""
    model = copy.deepcopy(model)
    chosen = {n: p for n, p in model.named_parameters() if names is None or n in names}
    for p in chosen.values():
        p.requires_grad_()
    values = losses(model)
    return [
        dict(
            zip(
                chosen,
                torch.autograd.grad(
                    value, list(chosen.values()), retain_graph=True, materialize_grads=True
                ),
                strict=True,
            )
        )
        for value in values
    ]


def check(
    model: nn.Module,
    losses: Losses,
    num_samples: int,
    names: list[str] | None = None,
    *,
    rtol: float = 1e-9,
) -> None:
    """Norms, and dot products with a random direction, equal the plain loop's."""
    gradients = one_by_one(model, losses, names)
    q = {name: torch.randn_like(g) for name, g in gradients[0].items()}
    norms = torch.stack([sum(g.double().square().sum() for g in one.values()) for one in gradients])
    dots = torch.stack(
        [sum((g * q[n]).double().sum() for n, g in one.items()) for one in gradients]
    )
    found = gradient_norms(model, losses, num_samples=num_samples, parameters=names)
    torch.testing.assert_close(found, norms.sqrt(), rtol=rtol, atol=1e-12)
    found = gradient_dots(model, losses, q, num_samples=num_samples)
    torch.testing.assert_close(found, dots, rtol=rtol, atol=rtol * float(dots.abs().max()))


def classified(x: Tensor, num_classes: int = 5) -> Losses:
    labels = torch.arange(len(x)) % num_classes
    return lambda m: functional.cross_entropy(m(x), labels, reduction="none")


def squares(x: Tensor) -> Losses:
    """A loss of every number that the model returns, no two alike."""
    return lambda m: m(x).flatten(1).sin().cumsum(1).square().sum(1)


def evaluated(model: nn.Module) -> nn.Module:
    """In float64 and eval mode, batch norm's statistics as after some training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.double().eval()


def images(batch: int, size: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size, dtype=torch.float64)


def test_hand_worked_linear_layer() -> None:
    """ℓ = w·x + b: the gradient is (x, 1), so norms are √(9 + 16 + 1) and √(0 + 1 + 1)."""
    layer = nn.Linear(2, 1).double()
    x = torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    norms = gradient_norms(layer, lambda m: m(x).squeeze(1), num_samples=2)
    assert norms.tolist() == pytest.approx([26**0.5, 2**0.5])
    direction = {"weight": torch.tensor([[1.0, -1.0]]), "bias": torch.tensor([10.0])}
    dots = gradient_dots(layer, lambda m: m(x).squeeze(1), direction, num_samples=2)
    assert dots.tolist() == pytest.approx([9, 9])


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("make", [Residual, pooled])
def test_convolutional_networks(make: Callable[[], nn.Module], batch: int) -> None:
    x = images(batch, 12)
    check(evaluated(make()), classified(x), batch)


def test_float32_to_1e_5() -> None:
    x = images(5).float()
    check(evaluated(Residual()).float(), classified(x), 5, rtol=1e-5)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear, few positions: Gram": (lambda: nn.Linear(40, 30), (3, 40)),
    "linear, many positions: blocks": (lambda: nn.Linear(3, 2), (50, 3)),
    "linear, two position dimensions": (lambda: nn.Linear(3, 2), (4, 5, 3)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "conv, stride, dilation": (
        lambda: nn.Conv2d(3, 4, (3, 2), (2, 1), (2, 1), (1, 2)),
        (3, 9, 8),
    ),
    "conv, groups: Gram": (lambda: nn.Conv2d(64, 96, 3, groups=2), (64, 4, 4)),
    "conv, groups: blocks": (lambda: nn.Conv2d(4, 6, 3, 1, 1, groups=2), (4, 9, 9)),
    "conv, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 6, 6)),
    "conv, same, uneven": (lambda: nn.Conv2d(2, 3, 2, padding="same"), (2, 6, 6)),
    "conv, valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (2, 6, 6)),
    "conv, reflected": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 6, 6)),
    "layer norm": (lambda: nn.LayerNorm(5), (7, 5)),
    "layer norm, two dimensions": (lambda: nn.LayerNorm((3, 5)), (2, 3, 5)),
    "layer norm, no positions": (lambda: nn.LayerNorm(5), (5,)),
    "rms norm": (lambda: nn.RMSNorm(5), (7, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (6, 3, 3)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(6), (6,)),
    "batch norm 1d, positions": (lambda: nn.BatchNorm1d(6), (6, 4)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(6), (6, 4, 4)),
    "prelu, recomputed": (lambda: nn.PReLU(6), (6, 4)),
    "conv 1d, recomputed": (lambda: nn.Conv1d(3, 4, 3), (3, 9)),
    "transposed conv, recomputed": (lambda: nn.ConvTranspose2d(3, 4, 3, 2), (3, 5, 5)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.parametrize("name", LAYERS)
def test_each_layer(name: str) -> None:
    """The layer between others, so that it is neither first nor last."""
    make, shape = LAYERS[name]
    first = nn.Linear(shape[-1], shape[-1])
    model = evaluated(nn.Sequential(first, nn.Tanh(), make(), nn.Tanh()))
    for p in model.parameters():  # norms start at ones and zeros
        nn.init.normal_(p)
    check(model, squares(torch.randn(4, *shape, dtype=torch.float64)), 4)


@pytest.mark.parametrize("block", [1, 300, 1 << 21])
@pytest.mark.parametrize("name", ["linear, few positions: Gram", "conv, groups: Gram"])
def test_both_ways_in_blocks_of_any_size(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_gradients, "BLOCK", block)
    make, shape = LAYERS[name]
    model, x = evaluated(make()), torch.randn(5, *shape, dtype=torch.float64)
    for cheaper in (True, False):
        monkeypatch.setattr(sample_gradients, "_gram_is_cheaper", lambda *_, c=cheaper: c)
        check(model, squares(x), 5)


@settings(deadline=None, max_examples=30)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 3]),
    batch=st.integers(1, 5),
    gram=st.booleans(),
)
def test_any_convolution(  # noqa: PLR0917
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    batch: int,
    gram: bool,
) -> None:
    layer = nn.Conv2d(6, 12, kernel, stride, padding, dilation, groups).double()
    x = images(batch, 7, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_gradients, "_gram_is_cheaper", lambda *_: gram)
        check(layer, squares(x), batch)


class Tied(nn.Module):
    """A token model whose head has the embedding's weight, and one layer called twice."""

    def __init__(self, *, tied: bool = True, vocabulary: int = 11) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, 6, padding_idx=0)
        self.places = nn.Embedding(9, 6)
        self.mix = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1])[None])
        x = x + self.mix(self.norm(x)).tanh()
        x = x + self.mix(self.norm(x.cumsum(1))).tanh()
        logits: Tensor = self.head(x)
        return logits


def next_token(ids: Tensor) -> Losses:
    return lambda m: functional.cross_entropy(m(ids)[:, :-1].mT, ids[:, 1:], reduction="none").sum(
        1
    )


@pytest.mark.parametrize("gram", [True, False, None])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_and_repeated_calls(
    tied: bool, gram: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cross terms count; position embeddings [1, T, E] are taken apart by sample."""
    if gram is not None:
        monkeypatch.setattr(sample_gradients, "_gram_is_cheaper", lambda *_: gram)
    ids = torch.randint(0, 11, (4, 8))
    check(Tied(tied=tied).double(), next_token(ids), 4)
    check(Tied(tied=tied).double(), next_token(ids[:1]), 1)
    monkeypatch.setattr(sample_gradients, "BLOCK", 20)  # three rows of the vocabulary at a time
    check(Tied(tied=tied).double(), next_token(ids), 4)


def test_repeated_convolution_and_norm() -> None:
    conv, norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    model = evaluated(nn.Sequential(conv, norm, nn.Tanh(), conv, norm, nn.Tanh(), conv))
    check(model, squares(images(3, 6)), 3)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("execution", ["sparse", "dense", "auto"])
def test_sparse_layers_count_their_active_values(execution: str, fuse: bool) -> None:
    """Also against the dense model: its gradient at the mask, for the masked layers."""
    model = evaluated(Residual()).float()
    mask = random_mask(model, 0.3)
    sparse = sparsify(model, mask, execution=execution, fuse=fuse)  # type: ignore[arg-type]
    x = images(5).float()
    check(sparse, classified(x), 5, rtol=2e-5)
    gradients = one_by_one(densify(sparse), classified(x))
    masked = torch.stack(
        [
            sum((g * mask[n] if n in mask else g).double().square().sum() for n, g in one.items())
            for one in gradients
        ]
    ).sqrt()
    norms = gradient_norms(sparse, classified(x), num_samples=5)
    torch.testing.assert_close(norms, masked, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("shape", [(6,), (3, 6)])
def test_sparse_linear_with_and_without_positions(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    sparse = sparsify(model, random_mask(model, 0.4))
    check(sparse, squares(torch.randn(4, *shape, dtype=torch.float64)), 4)


def test_a_subset_of_parameters_frozen_or_not() -> None:
    model, x = evaluated(Residual()), images(3)
    model.requires_grad_(False)
    names = ["fc.weight", "stages.1.conv2.weight", "stages.1.bn1.bias"]
    check(model, classified(x), 3, names)
    model.get_parameter("fc.bias").requires_grad_()
    check_default = gradient_norms(model, classified(x), num_samples=3)
    alone = gradient_norms(model, classified(x), num_samples=3, parameters=["fc.bias"])
    torch.testing.assert_close(check_default, alone)


def test_in_place_activations() -> None:
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
    check(
        evaluated(nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 5))),
        classified(images(3, 6)),
        3,
    )


def test_the_model_is_left_as_it_was() -> None:
    model, x = evaluated(Residual()), images(3)
    model.get_parameter("fc.bias").requires_grad_(False)
    model.get_parameter("fc.weight").grad = torch.ones(5, 32, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    gradient_norms(model, classified(x), num_samples=3)
    assert not model.get_parameter("fc.bias").requires_grad
    assert model.get_parameter("fc.weight").requires_grad
    assert bool((model.get_parameter("fc.weight").grad == 1).all())  # type: ignore[union-attr]
    assert model.get_parameter("conv1.weight").grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_does_not_depend_on_the_batch() -> None:
    model, x = evaluated(Residual()), images(6)
    whole = gradient_norms(model, classified(x), num_samples=6)
    labels = torch.arange(6) % 5
    for size in (1, 4):
        parts = [
            gradient_norms(
                model,
                lambda m, p=part: functional.cross_entropy(m(x[p]), labels[p], reduction="none"),
                num_samples=len(part),
            )
            for part in torch.arange(6).split(size)
        ]
        torch.testing.assert_close(torch.cat(parts), whole)


def test_unused_branch_counts_nothing_and_unused_model_is_refused() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)}).double()
    x = torch.randn(2, 3, dtype=torch.float64)

    def losses(m: nn.Module) -> Tensor:
        m["idle"](x)  # type: ignore[index]
        return m["used"](x).square().sum(1)  # type: ignore[index, no-any-return]

    check(model, losses, 2)
    with pytest.raises(SparseModelError, match=r"does not depend on any of \['idle"):
        gradient_norms(model, losses, num_samples=2, parameters=["idle.weight"])


class Functional(nn.Module):
    """Uses a layer's weight behind its back, as some heads and attention layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return functional.linear(self.tokens(ids), self.tokens.weight)


class Broadcast(nn.Module):
    """Adds embedded positions [T, E], whose first dimension is no batch even where T = B."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(9, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x + self.places(torch.arange(x.shape[1])))
        return y


def test_refusals_name_the_layer() -> None:
    def refused(model: nn.Module, x: Tensor, match: str) -> None:
        with pytest.raises(SparseModelError, match=match):
            gradient_norms(model, lambda m: m(x).flatten(1).square().sum(1), num_samples=len(x))

    x = torch.randn(3, 4)
    refused(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), x, r"layer '1': .*model\.eval\(\)")
    untracked = nn.BatchNorm1d(4, track_running_stats=False).eval()
    refused(untracked, x, "track running statistics")
    refused(Functional(), torch.tensor([[1, 2]]), "'tokens.weight' is used outside")
    for positions in (3, 5):  # as many as samples, or not
        refused(Broadcast(), torch.randn(3, positions, 6), "layer 'places'")
    attention = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    refused(attention, torch.randn(3, 2, 4), "'self_attn': MultiheadAttention has parameters")
    refused(nn.Embedding(5, 2, max_norm=1.0), torch.ones(3, 2, dtype=torch.long), "max_norm")
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    refused(normed, x, "parametrizations")
    flat = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 4), nn.Unflatten(0, (3, 2)))
    refused(flat, torch.randn(3, 2, 4), r"layer '1' returns \(6, 4\)")


def test_refuses_bad_arguments() -> None:
    layer, x = nn.Linear(2, 2), torch.ones(3, 2)
    with pytest.raises(SparseModelError, match="not averaged; got shape"):
        gradient_norms(layer, lambda m: m(x).mean(), num_samples=3)
    with pytest.raises(MaskError, match="no parameter 'odd'"):
        gradient_norms(layer, lambda m: m(x).sum(1), num_samples=3, parameters=["odd"])
    with pytest.raises(SparseModelError, match=r"'bias' has shape \(2,\), the direction \(3,\)"):
        gradient_dots(layer, lambda m: m(x).sum(1), {"bias": torch.ones(3)}, num_samples=3)

    def changed(m: nn.Module) -> Tensor:
        h = x.clone()
        y = m(h)
        h += 1
        return y.sum(1)  # type: ignore[no-any-return]

    with pytest.raises(SparseModelError, match="changed in place"):
        gradient_norms(layer, changed, num_samples=3)
