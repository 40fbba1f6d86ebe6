"""Influence on a convex problem against retraining without a sample, and by hand."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from datapruning.errors import ScoreError
from datapruning.scores.ekfac import ekfac
from datapruning.scores.hessian import Product
from datapruning.scores.influence import (
    influence,
    influence_of,
    inverse_hvp,
    mean_gradient,
)
from datapruning.selection.agreement import spearman
from prunelab.data.datasets import load_dataset
from prunelab.data.samples import ImageSamples, TokenSamples
from prunelab.networks import build_model
from prunelab.training.task import CausalLM, ImageClassification
from sparsemodel.layers.sparsify import sparsify
from sparsemodel.masks.mask import Mask

RIDGE = 0.02
COUNT = 120
LEFT_OUT = range(0, COUNT, 4)


class Regression(ImageClassification):
    """Logistic regression on pixels in float64, whatever the samples are stored in."""

    def logits(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits: Tensor = model(batch[0].double())
        return logits


TASK = Regression()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _side(start: int, count: int) -> ImageSamples:
    data = load_dataset("digits")
    images = functional.avg_pool2d(data.train_images.float() / 128 - 1, 2)
    return ImageSamples(images[start : start + count], data.train_labels[start : start + count] % 3)


TRAINING, HELD_OUT = _side(0, COUNT), _side(600, 200)


def fitted(weights: Tensor, start: nn.Module | None = None) -> nn.Module:
    """The minimum of Σ w_i ℓ_i / n + ridge/2 ‖θ‖², by Newton's method."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double().eval()
    nn.init.zeros_(model.get_parameter("1.weight"))
    nn.init.zeros_(model.get_parameter("1.bias"))
    if start is not None:
        model.load_state_dict(start.state_dict())
    x, labels = TRAINING.images.double().flatten(1), TRAINING.labels
    x1 = torch.cat([x, torch.ones(COUNT, 1, dtype=torch.float64)], 1)
    theta = torch.cat([model[1].weight, model[1].bias[:, None]], 1).detach()  # type: ignore[index]

    def objective(flat: Tensor) -> Tensor:
        losses = functional.cross_entropy(x1 @ flat.view(3, 17).T, labels, reduction="none")
        return (weights * losses).sum() / COUNT + RIDGE / 2 * flat.square().sum()

    flat = theta.reshape(-1)
    for _ in range(20):
        gradient = torch.func.grad(objective)(flat)
        flat = flat - torch.linalg.solve(torch.func.hessian(objective)(flat), gradient)
        if float(gradient.norm()) < 1e-10:
            break
    with torch.no_grad():
        model[1].weight.copy_(flat.view(3, 17)[:, :16])  # type: ignore[index, operator]
        model[1].bias.copy_(flat.view(3, 17)[:, 16])  # type: ignore[index, operator]
    return model


def target_loss(model: nn.Module) -> float:
    with torch.no_grad():
        return float(TASK.loss(model, HELD_OUT.batch(torch.arange(len(HELD_OUT)))).mean())


@lru_cache
def retrained() -> tuple[nn.Module, Tensor]:
    """The model, and n times the rise of the held-out loss when one of LEFT_OUT is left out."""
    model = fitted(torch.ones(COUNT))
    rises = []
    for row in LEFT_OUT:
        weights = torch.ones(COUNT)
        weights[row] = 0
        rises.append(COUNT * (target_loss(fitted(weights, model)) - target_loss(model)))
    return model, torch.tensor(rises, dtype=torch.float64)


def scores_of(solver: str) -> Tensor:
    model, _ = retrained()
    return influence(
        TASK, model, TRAINING, solver=solver, target=HELD_OUT, damping=RIDGE, chunk=50  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("solver", ["exact", "cg", "lissa"])
def test_scores_predict_retraining_without_a_sample(solver: str) -> None:
    """In rank, in sign (high = its loss hurts = keep) and in size."""
    _, rises = retrained()
    scores = scores_of(solver)[list(LEFT_OUT)]
    assert spearman(scores, rises) > 0.95
    slope = float((scores * rises).sum() / (scores * scores).sum())
    assert slope == pytest.approx(1.1, abs=0.1)  # a sample less is also some curvature less


def test_solvers_agree() -> None:
    exact = scores_of("exact")
    torch.testing.assert_close(scores_of("cg"), exact, rtol=1e-5, atol=1e-6)
    error = (scores_of("lissa") - exact).norm() / exact.norm()
    assert float(error) < 0.1  # random batches


def test_lissa_without_noise_is_the_exact_solution() -> None:
    model, _ = retrained()
    v = mean_gradient(TASK, model, HELD_OUT)
    exact = inverse_hvp(TASK, model, TRAINING, v, solver="exact", damping=0.2)
    lissa = inverse_hvp(TASK, model, TRAINING, v, solver="lissa", damping=0.2)
    torch.testing.assert_close(lissa, exact, rtol=1e-6, atol=1e-8)
    # The usual form h ← v + (1 − damp) h − H h / scale has a damping of damp · scale.
    product, damp, scale = Product(TASK, model, list(v), 0), 0.01, 25.0
    batch = TRAINING.batch(torch.arange(COUNT))
    h = flat = product.flat(v)
    for _ in range(1500):
        h = flat + (1 - damp) * h - product.of_batch(batch, h) / scale
    exact = inverse_hvp(TASK, model, TRAINING, v, solver="exact", damping=damp * scale)
    torch.testing.assert_close(h / scale, product.flat(exact), rtol=1e-6, atol=1e-8)


def test_solution_by_hand() -> None:
    """Two weights at 0, input 1, label 0: H = [[¼, −¼], [−¼, ¼]], which is ½ along (1, −1).

    v = (3, −3) and damping 1 give (2, −2); ∇ℓ = (−½, ½), so the product is −2.
    """

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 2, bias=False)
            nn.init.zeros_(self.layer.weight)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x.flatten(1))
            return y

    model = Pair().eval()
    samples = ImageSamples(torch.ones(1, 1, 1, 1), torch.tensor([0]))
    v = {"layer.weight": torch.tensor([[3.0], [-3.0]])}
    task = ImageClassification()
    for solver in ("exact", "cg"):
        q = inverse_hvp(task, model, samples, v, solver=solver, damping=1.0)  # type: ignore[arg-type]
        torch.testing.assert_close(q["layer.weight"], torch.tensor([[2.0], [-2.0]]))
    assert influence_of(task, model, samples.batch(torch.tensor([0])), q).tolist() == [-2.0]


def test_products_of_a_network_do_not_depend_on_the_chunk() -> None:
    model = build_model("resnet8", num_classes=10, input_shape=(3, 8, 8), seed=0).eval()
    samples = ImageSamples(torch.randn(5, 3, 8, 8), torch.arange(5))
    task, names = ImageClassification(), ["fc.weight", "layer3.0.conv2.weight"]
    v = mean_gradient(task, model, samples, parameters=names, chunk=4)
    products = []
    for row in range(5):
        loss = task.loss(model, samples.batch(torch.tensor([row]))).sum()
        parts = torch.autograd.grad(loss, [model.get_parameter(n) for n in names])
        products.append(sum((g * v[n]).sum() for n, g in zip(names, parts, strict=True)))
    expected = torch.stack(products).double()
    for chunk in (1, 4, 5):
        parts = torch.arange(5).split(chunk)
        scores = torch.cat([influence_of(task, model, samples.batch(rows), v) for rows in parts])
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
    hvp = influence(task, model, samples, parameters=["fc.weight"], damping=0.1, chunk=4)
    exact = influence(
        task, model, samples, parameters=["fc.weight"], damping=0.1, chunk=5, solver="exact"
    )
    torch.testing.assert_close(hvp, exact, rtol=1e-3, atol=1e-5)


def test_products_are_what_a_training_step_takes_off_the_loss() -> None:
    """A small step on sample i lowers the held-out loss by η times its score."""
    model, rate = fitted(torch.linspace(0, 2, COUNT)), 1e-5
    v, before = mean_gradient(TASK, model, HELD_OUT), target_loss(model)
    scores = influence_of(TASK, model, TRAINING.batch(torch.arange(COUNT)), v)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for row in range(0, COUNT, 10):
        loss = TASK.loss(model, TRAINING.batch(torch.tensor([row]))).sum()
        with torch.no_grad():
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.sub_(rate * gradient)
        assert (before - target_loss(model)) / rate == pytest.approx(float(scores[row]), rel=1e-2)
        model.load_state_dict(state)


def test_influence_of_a_language_model() -> None:
    """Attention has second derivatives here, as its fused kernels have not."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 20, (6, 7))
    samples = TokenSamples(ids, torch.ones_like(ids), ids)
    names = ["model.layers.0.self_attn.v_proj.weight", "model.norm.weight"]
    cg, exact = (
        influence(CausalLM(), model, samples, solver=solver, parameters=names, damping=20.0)  # type: ignore[arg-type]
        for solver in ("cg", "exact")
    )
    torch.testing.assert_close(cg, exact, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("kronfluence") is None, reason="needs kronfluence")
@pytest.mark.filterwarnings("ignore")  # kronfluence and accelerate
def test_ekfac_ranks_as_the_exact_solution_and_as_retraining() -> None:
    """One layer, where the Fisher is the Hessian; the Kronecker form is what differs."""
    model, rises = retrained()
    single = _single(model)
    scores = ekfac(ImageClassification(), single, TRAINING, target=HELD_OUT, damping=RIDGE)
    exact = scores_of("exact")
    assert spearman(scores, exact) > 0.9
    assert spearman(scores[list(LEFT_OUT)], rises) > 0.9
    slope = float((scores * exact).sum() / (scores * scores).sum())
    assert 0.5 < slope < 2
    assert type(single[1]) is nn.Linear  # a copy was worked on


def _single(model: nn.Module) -> nn.Sequential:
    single = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    single.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    return single


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = retrained()
    v = mean_gradient(TASK, model, HELD_OUT)
    with pytest.raises(ScoreError, match="unknown solver 'newton'; known: exact, cg, lissa"):
        inverse_hvp(TASK, model, TRAINING, v, solver="newton")  # type: ignore[arg-type]
    with pytest.raises(ScoreError, match="damping must be at least 0"):
        inverse_hvp(TASK, model, TRAINING, v, damping=-1.0)
    with pytest.raises(ScoreError, match=r"its scale 0\.05 is below half"):
        inverse_hvp(TASK, model, TRAINING, v, solver="lissa", scale=0.05)
    with pytest.raises(ScoreError, match=r"the vector's '1.bias' has shape \(2,\)"):
        inverse_hvp(TASK, model, TRAINING, {"1.bias": torch.ones(2)})
    with pytest.raises(ScoreError, match="no parameter 'odd'"):
        mean_gradient(TASK, model, TRAINING, parameters=["odd"])
    with pytest.raises(ScoreError, match="no samples"):
        mean_gradient(TASK, model, TRAINING, rows=torch.arange(0))
    sparse = sparsify(model, Mask({"1.weight": torch.eye(3, 16).bool()}))
    with pytest.raises(ScoreError, match="take densify"):
        influence(TASK, sparse.eval(), TRAINING)
    with pytest.raises(ScoreError, match=r"call model\.eval"):
        influence(
            TASK, build_model("resnet8", num_classes=3, input_shape=(1, 8, 8), seed=0), TRAINING
        )
    large = build_model("resnet8", num_classes=3, input_shape=(1, 8, 8), seed=0).eval()
    with pytest.raises(ScoreError, match=r"at most 4,096 numbers by parameters"):
        influence(ImageClassification(), large, TRAINING, solver="exact")
    monkeypatch.setitem(sys.modules, "kronfluence", None)
    with pytest.raises(ScoreError, match=r"pip install 'fedprune\[influence\]'"):
        ekfac(TASK, model, TRAINING)


def test_negative_curvature_is_refused() -> None:
    """A network away from its minimum, with next to no damping."""
    model = build_model("resnet8", num_classes=10, input_shape=(3, 8, 8), seed=0).eval()
    samples = ImageSamples(torch.randn(6, 3, 8, 8), torch.arange(6))
    with pytest.raises(ScoreError, match=r"not positive definite.*raise the damping"):
        influence(ImageClassification(), model, samples, damping=1e-9)
