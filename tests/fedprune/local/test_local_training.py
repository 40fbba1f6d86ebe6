"""Local training: pruned weights stay zero, seeds decide everything, small clients work."""

from __future__ import annotations

import math

import pytest
import torch
from fedprune.local.execution import choose_execution
from torch.nn import functional

from fedprune.config import TrainingConfig
from fedprune.local.training import (
    GrowthBatch,
    compute_device,
    evaluate,
    round_learning_rate,
    train_locally,
)
from prunelab.data.tensors import prepare
from prunelab.networks import build_model, float_state
from sparsemodel.masks.mask import Mask, prunable_parameters


def digits_like(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return images, torch.arange(count) % 3


def trained(count: int = 40, *, mask: Mask | None = None, seed: int = 1, epochs: int = 2):  # type: ignore[no-untyped-def]
    model = build_model("resnet8", num_classes=3, input_shape=(1, 8, 8), seed=0, width=4)
    images, labels = digits_like(count)
    config = TrainingConfig(batch_size=8)
    result = train_locally(
        model, images, labels, mask=mask, config=config, lr=0.1, epochs=epochs, seed=seed
    )
    return model, result


def random_mask(density: float = 0.5) -> Mask:
    model = build_model("resnet8", num_classes=3, input_shape=(1, 8, 8), seed=0, width=4)
    generator = torch.Generator().manual_seed(5)
    return Mask(
        {
            n: torch.rand(p.shape, generator=generator) < density
            for n, p in prunable_parameters(model).items()
        }
    )


def test_pruned_weights_stay_exactly_zero_and_active_ones_move() -> None:
    mask = random_mask()
    model, _ = trained(mask=mask)
    for name, weight in prunable_parameters(model).items():
        assert not weight.detach()[~mask[name]].any()
        assert (weight.detach()[mask[name]] != 0).all()


def test_state_is_as_small_as_the_mask_says() -> None:
    """Dense: weights + gradients + momentum; sparse: those and three indices an active weight."""
    _, dense = trained()
    _, sparse = trained(mask=random_mask(0.1))
    assert sparse.state_bytes < 0.5 * dense.state_bytes


def test_equal_seeds_give_equal_bits() -> None:
    first, second, other = (float_state(trained(seed=s)[0]) for s in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("count", [2, 9])
def test_two_samples_and_a_last_batch_of_one(count: int) -> None:
    """Nine samples in batches of eight would leave one alone, which batch norm cannot train."""
    model, result = trained(count)
    assert result.samples_seen == 2 * count
    assert all(torch.isfinite(value).all() for value in float_state(model).values())


def test_evaluation_adds_up() -> None:
    model, _ = trained()
    images, labels = digits_like(300)  # more than one evaluation batch
    result = evaluate(model, images, labels)
    model.eval()
    with torch.no_grad():
        logits = model(prepare(images))
    assert result.num_samples == 300
    assert result.num_correct == int((logits.argmax(1) == labels).sum())
    assert result.loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result.accuracy == result.num_correct / 300


def test_learning_rate_decays_by_the_cosine() -> None:
    config = TrainingConfig(rounds=10, lr=0.2)
    rates = [round_learning_rate(config, r) for r in range(10)]
    assert rates[0] == 0.2
    assert rates[5] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(0.1 * (1 + math.cos(0.9 * math.pi)))
    assert rates == sorted(rates, reverse=True)


def test_missing_cuda_is_a_clear_error() -> None:
    if torch.cuda.is_available():
        assert compute_device("cuda").type == "cuda"
        return
    with pytest.raises(ValueError, match="use 'cpu'"):
        compute_device("cuda")


# --- execution ---------------------------------------------------------------------------------


def executed(execution: str, mask: Mask, num_samples: int = 8):  # type: ignore[no-untyped-def]
    model = build_model("resnet8", num_classes=3, input_shape=(1, 8, 8), seed=0, width=4)
    images, labels = digits_like(40)
    result = train_locally(
        model,
        images,
        labels,
        mask=mask,
        config=TrainingConfig(batch_size=8, execution=execution),
        lr=0.05,
        epochs=2,
        seed=1,
        growth=GrowthBatch({"fc.weight": 5, "layer2.0.conv1.weight": 7}, torch.arange(num_samples)),
    )
    return float_state(model), result


@pytest.mark.parametrize("num_samples", [8, 16])  # of the growth gradients: a batch, and more
@pytest.mark.parametrize("execution", ["sparse", "masked"])
def test_executions_do_the_same(execution: str, num_samples: int) -> None:
    """Ten steps, running statistics and growth gradients of each against plainly dense training."""
    mask = random_mask()
    state, result = executed(execution, mask, num_samples)
    dense, expected = executed("dense", mask, num_samples)
    assert result.loss == pytest.approx(expected.loss, rel=1e-4)
    for name, value in dense.items():
        torch.testing.assert_close(state[name], value, rtol=2e-4, atol=2e-5)
    assert set(result.growth) == {"fc.weight", "layer2.0.conv1.weight"}
    for name, (indices, values) in result.growth.items():
        assert torch.equal(indices, expected.growth[name][0])
        assert not mask[name].reshape(-1)[indices].any()
        torch.testing.assert_close(values, expected.growth[name][1], rtol=1e-3, atol=1e-5)


def test_executions_hold_what_they_say() -> None:
    """12 bytes a weight when dense; masked: weights whole, the rest by density, 4 for an index;
    sparse: 12 + 12 for indices, all by density. Stem, norms and biases are dense in all."""
    mask = random_mask(0.1)
    held = {kind: executed(kind, mask)[1].state_bytes for kind in ("dense", "masked", "sparse")}
    model = build_model("resnet8", num_classes=3, input_shape=(1, 8, 8), seed=0, width=4)
    parameters = sum(p.numel() for p in model.parameters())
    rest = parameters - mask.num_weights
    assert held["dense"] == 12 * parameters
    assert held["masked"] == 12 * rest + 4 * mask.num_weights + 12 * mask.num_active
    rows = 4 * sum(2 * sum(p.shape[:2]) * 9 for p in mask.values())  # more than all row pointers
    assert 12 * rest + 24 * mask.num_active < held["sparse"]
    assert held["sparse"] < 12 * rest + 24 * mask.num_active + rows


@pytest.mark.parametrize(
    ("execution", "device", "expected"),
    [("dense", "cpu", "dense"), ("auto", "cuda", "masked"), ("sparse", "cuda", "sparse")],
)
def test_choice_of_execution(execution: str, device: str, expected: str) -> None:
    config = TrainingConfig(execution=execution, device=device)
    assert choose_execution(config, random_mask()) == expected
    assert choose_execution(config, None) == "masked"  # nothing is pruned


def test_automatic_execution_without_native_kernels_is_masked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reference path of sparse layers is slower than dense kernels."""
    for library, expected in ((None, "masked"), (object(), "sparse")):
        monkeypatch.setattr("sparsemodel.kernels.cpu.library.library", lambda found=library: found)
        assert choose_execution(TrainingConfig(), random_mask()) == expected
