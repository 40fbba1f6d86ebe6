"""The distillation loss and its gradient: the kernels of loss.cu, run on the host."""
# ruff: noqa: PLR0917 - what a loss is a function of

import math

import pytest
import torch
from torch.nn import functional

from sparsemodel.kernels.cuda import loss as cuda_loss
from sparsemodel.kernels.cuda.launch import Runner

Tensor = torch.Tensor

# (rows, classes): one class, fewer than threads, as many, no multiple of them.
SIZES = [(1, 1), (3, 10), (2, 256), (4, 1000)]


def exact(
    logits: Tensor, teacher: Tensor, labels: Tensor, alpha: float, temperature: float
) -> Tensor:
    """In float64, from the definition."""
    hard = functional.cross_entropy(logits, labels, reduction="none")
    student = torch.log_softmax(logits / temperature, 1)
    guide = torch.log_softmax(teacher / temperature, 1)
    soft = torch.where(guide.exp() > 0, guide.exp() * (guide - student), 0.0).sum(1)
    return torch.where(labels == -100, 0.0, (1 - alpha) * hard + alpha * temperature**2 * soft)


def check(
    cuda: Runner, logits: Tensor, teacher: Tensor, labels: Tensor, alpha: float, temperature: float
) -> None:
    reference = logits.double().requires_grad_()
    expected = exact(reference, teacher.double(), labels, alpha, temperature)
    scale = torch.randn(len(logits))
    (gradient,) = torch.autograd.grad(expected, reference, scale.double())
    loss, logs = cuda_loss.kd_loss(cuda, logits, teacher, labels, alpha, temperature)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    found = cuda_loss.kd_loss_backward(
        cuda, scale, logits, teacher, labels, logs, alpha, temperature
    )
    assert found.dtype == logits.dtype
    tolerance = max(1e-5, torch.finfo(logits.dtype).eps)
    torch.testing.assert_close(found.double(), gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("rows", "classes"), SIZES)
@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.3, 4.0), (1.0, 0.5)])
def test_loss_and_gradient(
    cuda: Runner, rows: int, classes: int, alpha: float, temperature: float
) -> None:
    logits, teacher = 3 * torch.randn(rows, classes), 3 * torch.randn(rows, classes)
    check(cuda, logits, teacher, torch.randint(0, classes, (rows,)), alpha, temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_summed_in_float32(cuda: Runner, dtype: torch.dtype) -> None:
    logits, teacher = torch.randn(3, 700).to(dtype), torch.randn(3, 700).to(dtype)
    check(cuda, logits, teacher, torch.randint(0, 700, (3,)), 0.5, 2.0)


def test_a_case_by_hand(cuda: Runner) -> None:
    """Student (0, 0), teacher (0, ln 3), τ = 1: CE = ln 2, KL = ¼ ln ½ + ¾ ln 3⁄2."""
    teacher = torch.tensor([[0.0, math.log(3)]])
    loss, _ = cuda_loss.kd_loss(cuda, torch.zeros(1, 2), teacher, torch.tensor([0]), 0.5, 1.0)
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert loss.tolist() == pytest.approx([0.5 * math.log(2) + 0.5 * kl])


def test_large_logits_do_not_overflow(cuda: Runner) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e4, -3e4, -3e4]])
    teacher = torch.tensor([[1e4, 9.99e3, 0.0], [5e3, 5e3, -3e4]])
    check(cuda, logits, teacher, torch.tensor([0, 2]), 0.5, 2.0)


def test_classes_that_are_ruled_out_add_nothing(cuda: Runner) -> None:
    logits, teacher = torch.randn(2, 40), torch.randn(2, 40)
    teacher[:, 5:] = -torch.inf
    logits[:, 20:] = -torch.inf
    labels = torch.tensor([3, 19])
    loss, _ = cuda_loss.kd_loss(cuda, logits, teacher, labels, 0.5, 2.0)
    z, t = logits[:, :20].double(), teacher[:, :20].double()
    torch.testing.assert_close(loss.double(), exact(z, t, labels, 0.5, 2.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", [0, 300])
def test_a_class_that_both_all_but_rule_out_adds_nothing(cuda: Runner, place: int) -> None:
    """Its weight is e⁻²⁰⁰, 0 in float32: met before or after the others, it makes no NaN."""
    logits, teacher = torch.randn(1, 400), torch.randn(1, 400)
    logits[0, place], teacher[0, place] = -torch.inf, -200.0
    loss, _ = cuda_loss.kd_loss(cuda, logits, teacher, torch.tensor([7]), 0.5, 1.0)
    others = torch.arange(400) != place
    label = torch.tensor([7 - (place < 7)])
    expected = exact(logits[:, others].double(), teacher[:, others].double(), label, 0.5, 1.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_ignored_labels_and_labels_out_of_range(cuda: Runner) -> None:
    logits, teacher = torch.randn(3, 10), torch.randn(3, 10)
    check(cuda, logits, teacher, torch.tensor([-100, 4, -100]), 0.4, 2.0)
    loss, _ = cuda_loss.kd_loss(cuda, logits, teacher, torch.tensor([-100, 4, -100]), 0.4, 2.0)
    assert loss[[0, 2]].tolist() == [0.0, 0.0]
    loss, _ = cuda_loss.kd_loss(cuda, logits, teacher, torch.tensor([10, -1, 9]), 0.4, 2.0)
    assert loss.isnan().tolist() == [True, True, False]
