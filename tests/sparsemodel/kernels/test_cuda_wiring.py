"""What calls the CUDA kernels: optimisers, aggregation, distillation and samples' norms."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from datapruning.students.distill import kd_loss
from fedprune.errors import ClientError
from fedprune.exchange.aggregate import WeightedMean
from sparsemodel.gradients.per_sample import gradient_norms
from sparsemodel.kernels.cuda import launch as kernels
from sparsemodel.kernels.cuda import measured
from sparsemodel.kernels.cuda.launch import Runner
from sparsemodel.layers.linear_and_conv import SparseConv2d, SparseLinear
from sparsemodel.optim import SparseAdam, SparseSGD

Tensor = torch.Tensor


@pytest.fixture
def launched(cuda: Runner, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels run; their names."""
    return recording(cuda, monkeypatch)


def recording(cuda: Runner, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make kernels run from here on; their names as they do."""
    names = []
    launch = type(cuda).launch

    def recorded(self: Runner, family: str, kernel: str, *rest: object, **real: object) -> None:
        names.append(kernel)
        launch(self, family, kernel, *rest, **real)

    monkeypatch.setattr(type(cuda), "launch", recorded)
    monkeypatch.setattr(kernels, "runner", lambda device: cuda)
    return names


@pytest.mark.parametrize(
    ("sparse", "dense", "options"),
    [
        (SparseSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
        (SparseSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.0}),
        (SparseAdam, torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.1}),
    ],
)
def test_optimisers_step_by_kernels(
    launched: list[str],
    sparse: type[torch.optim.Optimizer],
    dense: type[torch.optim.Optimizer],
    options: dict[str, float],
) -> None:
    own = nn.Parameter(torch.randn(40))
    expected = nn.Parameter(own.detach().clone())
    ours, theirs = sparse([own], **options), dense([expected], **options)
    for _ in range(3):
        own.grad = torch.randn(40)
        expected.grad = own.grad.clone()
        version = own._version
        ours.step()
        theirs.step()
        assert own._version > version
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    assert launched == ["sgd_step" if sparse is SparseSGD else "adam_step"] * 3


@pytest.mark.parametrize("kind", ["float64", "not contiguous"])
def test_other_parameters_step_by_the_reference(launched: list[str], kind: str) -> None:
    start = torch.ones(4, 3, dtype=torch.float64) if kind == "float64" else torch.ones(3, 4).t()
    own = nn.Parameter(start)
    own.grad = torch.ones_like(own)
    SparseSGD([own], lr=0.5).step()
    SparseAdam([own], lr=0.0).step()
    assert (own == 0.5).all()
    assert launched == []


def test_a_mean_has_the_bits_of_the_plain_one_on_the_cpu(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    replies = [
        {
            "w": np.float32(random.standard_normal((5, 60)) * 10.0**-k),
            "m": np.float32(random.standard_normal(7)),
            "v": np.float32(random.random(7)),
        }
        for k in range(3)
    ]
    means = WeightedMean([("m", "v")], device="cpu"), WeightedMean([("m", "v")])
    for mean in means:
        for weight, reply in enumerate(replies, 5):
            mean.add(reply, weight=weight)
        monkeypatch.setattr(kernels, "runner", lambda device: None)
    found, plain = (mean.result() for mean in means)
    assert all(np.array_equal(found[name], plain[name]) for name in "wmv")
    assert launched == ["fixed_add"] * 9


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2.0**20])
@pytest.mark.parametrize("name", ["w", "m"])
def test_a_refused_reply_leaves_no_trace(launched: list[str], bad: float, name: str) -> None:
    random = np.random.default_rng(0)
    good = {
        "w": np.float32(random.standard_normal(300)),
        "m": np.float32(random.standard_normal(4)),
        "v": np.float32(random.random(4)),
    }
    mean, expected = (WeightedMean([("m", "v")], device="cpu") for _ in range(2))
    wrong = {key: value.copy() for key, value in good.items()}
    wrong[name][-1] = bad
    for _ in range(2):  # as the first reply and as the second
        with pytest.raises(ClientError, match=f"'{name}'"):
            mean.add(wrong, weight=9)
        mean.add(good, weight=2)
        expected.add(good, weight=2)
    assert all(np.array_equal(mean.result()[key], expected.result()[key]) for key in good)
    assert mean.total_weight == 4
    assert set(launched) == {"fixed_add"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distillation_runs_the_fused_loss(launched: list[str], dtype: torch.dtype) -> None:
    logits = torch.randn(6, 9).to(dtype).t().contiguous().t().requires_grad_()
    teacher, labels = torch.randn(6, 9).half(), torch.randint(0, 9, (6,))
    loss = kd_loss(logits, labels, teacher, alpha=0.3, temperature=2.0)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    z, t = logits.detach().double().requires_grad_(), teacher.double()
    hard = functional.cross_entropy(z, labels, reduction="none")
    student, guide = (torch.log_softmax(x / 2, 1) for x in (z, t))
    exact = 0.7 * hard + 0.3 * 4 * (guide.exp() * (guide - student)).sum(1)
    (expected,) = torch.autograd.grad(exact.sum(), z)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    atol = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=atol)
    assert launched == ["kd_forward", "kd_backward"]


def sparse_layer(kind: str) -> tuple[nn.Module, Tensor]:
    """A sparse layer and an input of three samples."""
    dense: nn.Module = nn.Linear(8, 5)
    x = torch.randn(3, 8) if kind == "linear" else torch.randn(3, 7, 8)
    if kind == "conv":
        dense = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1, groups=2)
        x = torch.randn(3, 4, 7, 6)
    mask = torch.rand(dense.weight.shape) < 0.4
    with torch.no_grad():
        dense.weight.mul_(mask)
    form = SparseConv2d if kind == "conv" else SparseLinear
    return form.from_dense(dense, mask, execution="dense"), x


@pytest.mark.parametrize("kind", ["linear", "tokens", "conv"])
def test_norms_of_samples_are_taken_by_kernels(
    launched: list[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = sparse_layer(kind)
    won = [measured.Timed(o, 0, 0, 1.0, 1.0, 2.0) for o in ("norms", "norms of sequences")]
    gpu = measured.Gpu("any", (9, 0), tuple(won))
    monkeypatch.setattr(measured, "gpu_of", lambda device: gpu)

    def losses(model: nn.Module) -> Tensor:
        return model(x).flatten(1).sin().sum(1)

    expected = []
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = gradient_norms(layer, losses, num_samples=3)
        for value in losses(layer):
            parts = torch.autograd.grad(value, list(layer.parameters()), retain_graph=True)
            expected.append(sum(part.double().square().sum() for part in parts) ** 0.5)
    kernels_of = {"linear": ["square_norms"], "tokens": ["sequence_norms"], "conv": []}
    assert launched == kernels_of[kind]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-6)
