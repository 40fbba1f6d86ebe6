"""Distillation: the loss against float64 by hand, its gradient's size, stored logits, alpha."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from datapruning.students.distill import (
    TeacherLogits,
    choose_alpha,
    held_out_rows,
    kd_loss,
    kd_objective,
    teacher_logits,
)
from prunelab.data.datasets import load_dataset
from prunelab.data.samples import ImageSamples
from prunelab.errors import RunError
from prunelab.networks import build_model
from prunelab.training.loop import Objective, TrainingConfig, train
from prunelab.training.task import ImageClassification

TASK = ImageClassification()


def digits(count: int = 100) -> ImageSamples:
    data = load_dataset("digits")
    return ImageSamples(data.train_images[:count], data.train_labels[:count])


def network(seed: int, num_classes: int = 10) -> nn.Module:
    return build_model(
        "resnet8", num_classes=num_classes, input_shape=(1, 8, 8), seed=seed, width=4
    )


def plain_loss(z: Tensor, y: Tensor, t: Tensor, alpha: float, tau: float) -> Tensor:
    """The formula as it is written, with logarithms of quotients."""
    p, s, q = z.softmax(1), (z / tau).softmax(1), (t / tau).softmax(1)
    hard = -p[torch.arange(len(y)), y].log()
    return (1 - alpha) * hard + alpha * tau**2 * (q * (q / s).log()).sum(1)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    alpha=st.floats(0, 1),
    tau=st.floats(0.5, 20),
    classes=st.integers(2, 9),
)
def test_loss_is_the_formula_in_float64(seed: int, alpha: float, tau: float, classes: int) -> None:
    random = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(5, classes, generator=random, dtype=torch.float64)
    t = 3 * torch.randn(5, classes, generator=random, dtype=torch.float64)
    y = torch.randint(0, classes, (5,), generator=random)
    ours = kd_loss(z, y, t, alpha=alpha, temperature=tau)
    torch.testing.assert_close(ours, plain_loss(z, y, t, alpha, tau), rtol=1e-9, atol=1e-11)


def test_loss_by_hand() -> None:
    """Student (0, 0), teacher (4 ln 3, 0), τ = 4, y = 0: CE = ln 2; q = (3/4, 1/4), s = (½, ½).

    KL = ¾ ln(3/2) + ¼ ln(1/2) = .1308; α = .25 gives .75 · .6931 + .25 · 16 · .1308 = 1.0431.
    """
    teacher = torch.tensor([[4 * torch.log(torch.tensor(3.0)).item(), 0.0]])
    loss = kd_loss(torch.zeros(1, 2), torch.tensor([0]), teacher, alpha=0.25, temperature=4.0)
    assert float(loss) == pytest.approx(1.0431, abs=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_samples_without_a_label_count_in_neither_term(alpha: float) -> None:
    """Loss, gradient and mean are those of the batch without them."""
    random = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 6, 5, generator=random)
    labels = torch.tensor([1, -100, 4, 0, -100, 2])
    kept = labels != -100
    cached = TeacherLogits(torch.arange(6), t)
    objective = kd_objective(alpha=alpha, cached=cached)
    batch, rows = (torch.zeros(6), labels), torch.arange(6)
    z.requires_grad_()
    mean = objective(z, batch, rows)
    (gradient,) = torch.autograd.grad(mean, z)
    alone = z.detach()[kept].requires_grad_()
    expected = objective(alone, (torch.zeros(4), labels[kept]), rows[kept])
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(gradient[kept], torch.autograd.grad(expected, alone)[0])
    assert gradient[~kept].count_nonzero() == 0
    losses = kd_loss(z, labels, t, alpha=alpha, temperature=2.0)
    assert losses[~kept].tolist() == [0.0, 0.0]
    nobody = objective(z, (torch.zeros(6), torch.full((6,), -100)), rows)
    assert nobody.item() == 0.0


@pytest.mark.parametrize("student", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("guide", [torch.bfloat16, torch.float16, torch.float32])
def test_softmaxes_are_of_the_logits_as_they_are(student: torch.dtype, guide: torch.dtype) -> None:
    """A float16 teacher rounded to a bfloat16 student's 8 bits would be off by .9 %."""
    random = torch.Generator().manual_seed(0)
    z, t = (8 * torch.randn(64, 10, generator=random) for _ in range(2))
    z, t = z.to(student), t.to(guide)
    labels = torch.randint(0, 10, (64,), generator=random)
    loss = kd_loss(z, labels, t, alpha=1.0, temperature=4.0)
    assert loss.dtype == torch.float32
    exact = plain_loss(z.double(), labels, t.double(), 1.0, 4.0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [100.0, 1000.0])
def test_gradient_keeps_its_size_at_any_temperature(tau: float) -> None:
    """As τ → ∞ the gradient of τ² KL tends to ((z − z̄) − (t − t̄)) / C: without τ² it dies out."""
    random = torch.Generator().manual_seed(0)
    z = torch.randn(1, 6, generator=random, dtype=torch.float64, requires_grad=True)
    t = torch.randn(1, 6, generator=random, dtype=torch.float64)
    kd_loss(z, torch.tensor([0]), t, alpha=1.0, temperature=tau).sum().backward()
    with torch.no_grad():
        limit = ((z - z.mean()) - (t - t.mean())) / 6
    torch.testing.assert_close(z.grad, limit, rtol=10 / tau, atol=1 / tau)


def test_stored_logits_are_the_teachers_in_half_precision(tmp_path: Path) -> None:
    samples, teacher = digits(), network(0).eval()
    rows = torch.tensor([40, 3, 77])
    path = tmp_path / "with space" / "logits.pt"
    stored = teacher_logits(teacher, samples, TASK, rows=rows, path=path)
    assert stored.logits.dtype == torch.float16
    with torch.no_grad():
        expected = teacher(samples.batch(rows)[0])
    torch.testing.assert_close(stored.of(rows).float(), expected, rtol=1e-3, atol=1e-4)
    again = teacher_logits(teacher, samples, TASK, rows=rows, path=path)
    assert torch.equal(again.logits, stored.logits)
    for changed in ({"rows": torch.tensor([1, 2])}, {"rows": None}):
        with pytest.raises(RunError, match="belongs to another run"):
            teacher_logits(teacher, samples, TASK, path=path, **changed)
    with pytest.raises(RunError, match="teacher is"):
        teacher_logits(network(1).eval(), samples, TASK, rows=rows, path=path)
    with pytest.raises(RunError, match="lack row 5"):
        stored.of(torch.tensor([3, 5]))


def test_stored_and_running_teacher_train_to_the_same_model() -> None:
    """Without augmentation both ways are one objective, up to half precision."""
    samples, teacher = digits(), network(0).eval()
    config = TrainingConfig(epochs=1, batch_size=25, lr=0.01)
    cached = teacher_logits(teacher, samples, TASK)
    states = []
    for objective in (
        kd_objective(alpha=0.7, cached=cached),
        kd_objective(alpha=0.7, teacher=teacher, task=TASK),
    ):
        student = network(1)
        train(student, samples, TASK, config=config, seed=0, objective=objective)
        states.append(student.fc.weight.detach().clone())
    torch.testing.assert_close(states[0], states[1], rtol=1e-2, atol=1e-3)


def test_alpha_zero_is_training_without_a_teacher() -> None:
    samples = digits()
    config = TrainingConfig(epochs=1, batch_size=25)
    cached = teacher_logits(network(0).eval(), samples, TASK)
    with_kd, without = network(1), network(1)
    objective = kd_objective(alpha=0.0, cached=cached)
    train(with_kd, samples, TASK, config=config, seed=0, objective=objective)
    train(without, samples, TASK, config=config, seed=0)
    for a, b in zip(with_kd.parameters(), without.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_augmented_views_need_the_teachers_answer_to_that_view() -> None:
    """The running teacher is asked about the batch that the student got, not the stored image."""
    seen: list[Tensor] = []

    class Watched(ImageClassification):
        def logits(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            seen.append(batch[0])
            return super().logits(model, batch)

    samples, teacher = digits(20), network(0)
    config = TrainingConfig(epochs=1, batch_size=20, augment=True)
    objective = kd_objective(alpha=1.0, teacher=teacher, task=Watched())
    train(network(1), samples, Watched(), config=config, seed=0, objective=objective)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert not teacher.training


def test_other_label_sets_are_refused() -> None:
    samples = digits(40)
    cached = teacher_logits(network(0, num_classes=7).eval(), samples, TASK)
    objective = kd_objective(alpha=0.5, cached=cached)
    config = TrainingConfig(epochs=1)
    with pytest.raises(RunError, match="teacher knows 7 classes and the student 10"):
        train(network(1), samples, TASK, config=config, seed=0, objective=objective)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.2}, "alpha must be in"),
        ({"alpha": float("nan")}, "alpha must be in"),
        ({"alpha": 0.5, "temperature": 0.0}, "temperature must be positive"),
        ({"alpha": 0.5, "cached": None}, "either cached logits, or a teacher"),
        ({"alpha": 0.5, "cached": None, "teacher": nn.Identity()}, "either cached"),
    ],
)
def test_what_an_objective_refuses(arguments: dict[str, object], message: str) -> None:
    cached = TeacherLogits(torch.arange(2), torch.zeros(2, 3).half())
    with pytest.raises(RunError, match=message):
        kd_objective(**{"cached": cached, **arguments})  # type: ignore[arg-type]


def test_alpha_is_chosen_on_held_out_training_samples_alone() -> None:
    """A teacher of nonsense, always class 0: α = 0 has to win; no held-out row is trained on."""
    samples = digits(200)
    trained: list[Tensor] = []
    nonsense = torch.zeros(len(samples), 10).half()
    nonsense[:, 0] = 30
    cached = TeacherLogits(torch.arange(len(samples)), nonsense)

    def objective(alpha: float) -> Objective:
        inner = kd_objective(alpha=alpha, cached=cached)

        def watched(logits: Tensor, batch: object, rows: Tensor) -> Tensor:
            trained.append(rows)
            return inner(logits, batch, rows)

        return watched

    kept = torch.arange(0, 200, 2)
    choice = choose_alpha(
        network, samples, TASK,
        objective=objective, rows=kept, config=TrainingConfig(epochs=8, batch_size=16, lr=0.05),
        seed=3, alphas=(0.0, 0.5, 1.0),
    )  # fmt: skip
    held_out = held_out_rows(samples, share=0.2, seed=3)
    assert choice.alpha == 0.0
    assert [point.alpha for point in choice.curve] == [0.0, 0.5, 1.0]
    assert choice.curve[0].accuracy > choice.curve[2].accuracy
    assert choice.num_held_out == len(held_out)
    seen = torch.cat(trained).unique()
    assert not torch.isin(seen, held_out).any()
    assert torch.isin(seen, kept).all()
    assert choice.num_train == len(seen)


def test_held_out_split_is_by_class_and_by_seed() -> None:
    """Ten samples of each of two classes and one of a third: 2 + 2 + 0 at a share of .2."""
    labels = torch.tensor([0] * 10 + [1] * 10 + [2])
    samples = ImageSamples(torch.zeros(21, 1, 8, 8, dtype=torch.uint8), labels)
    rows = held_out_rows(samples, share=0.2, seed=0)
    assert labels[rows].bincount(minlength=3).tolist() == [2, 2, 0]
    assert torch.equal(rows, held_out_rows(samples, share=0.2, seed=0))
    assert any(
        not torch.equal(rows, held_out_rows(samples, share=0.2, seed=seed)) for seed in (1, 2)
    )


def test_too_few_samples_to_hold_some_out() -> None:
    samples = ImageSamples(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
    with pytest.raises(RunError, match="too few to hold some out"):
        choose_alpha(
            network, samples, TASK,
            objective=lambda alpha: lambda logits, batch, rows: functional.cross_entropy(
                logits, batch[1]
            ),
            config=TrainingConfig(epochs=1), seed=0,
        )  # fmt: skip
