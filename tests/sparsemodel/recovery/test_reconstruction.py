"""Blocks that are taught to give what the dense ones give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_language import llama, opt, texts
from torch import Tensor, nn

from sparsemodel.calibration.blocks import block_names, describe, walk_blocks
from sparsemodel.errors import CalibrationError, MaskError
from sparsemodel.masks.mask import Mask, mask_from_scores
from sparsemodel.recovery.reconstruction import BlockError, block_error, reconstruct, warm_linear

TRAINING: dict[str, Any] = {"steps": 40, "lr": 1e-2, "rank": 4}


def smallest_half(model: nn.Module) -> Mask:
    names = [f"{name}.weight" for block in describe(model) for name in block.linear]
    weights = {name: model.get_parameter(name).detach() for name in names}
    counts = {name: weight.numel() // 2 for name, weight in weights.items()}
    return mask_from_scores({name: weight.abs() for name, weight in weights.items()}, counts)


def seen(model: nn.Module, name: str, batches: list[Any]) -> list[tuple[Tensor, Tensor]]:
    """What a block takes and gives in a whole forward pass."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        pairs.append((given, output[0] if isinstance(output, tuple) else output))

    handle = model.get_submodule(name).register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return pairs


@pytest.mark.parametrize("make", [llama, opt])
def test_every_block_comes_closer_to_the_dense_one(make: Callable[[], nn.Module]) -> None:
    """The errors are those by hand, too: of one block alone, on what the mended ones give it."""
    model, batches = make(), texts(4)
    dense, mask = copy.deepcopy(model).eval(), smallest_half(model)
    errors = reconstruct(model, mask, batches, **TRAINING)
    assert list(errors) == block_names(model)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert list(model.state_dict()) == list(dense.state_dict())
    model.eval()
    for name, pattern in mask.items():
        assert not model.get_parameter(name)[~pattern].any()
    for name, error in errors.items():
        assert error.mended < 0.5 * error.pruned
        mixed = copy.deepcopy(model)
        mixed.get_submodule(name).load_state_dict(dense.get_submodule(name).state_dict())
        goals = seen(mixed, name, batches)
        for state, expected in ((model, error.mended), (mixed, error.pruned)):
            mask.apply(state)
            found = [
                (got - goal).square()
                for (_, got), (_, goal) in zip(seen(state, name, batches), goals, strict=True)
            ]
            assert torch.stack(found).mean().item() == pytest.approx(expected, rel=1e-3)


def test_the_network_as_a_whole_comes_closer() -> None:
    model, batches, others = llama(), texts(8, size=8), texts(4, seed=9)
    dense, mask = copy.deepcopy(model).eval(), smallest_half(model)
    pruned = copy.deepcopy(dense)
    mask.apply(pruned)
    reconstruct(model, mask, batches, **TRAINING | {"steps": 100})
    model.eval()

    def off(found: nn.Module) -> float:
        with torch.no_grad():
            parts = [(found(**b).logits - dense(**b).logits).square().mean() for b in others]
        return torch.stack(parts).mean().item()

    assert off(model) < 0.7 * off(pruned)


def test_the_published_settings_help_already() -> None:
    model = llama()
    for error in reconstruct(model, smallest_half(model), texts(4)).values():
        assert error.mended < 0.9 * error.pruned


@pytest.mark.parametrize(("part", "batches"), [("mask-lora", 1), ("scale-lora", 3)])
def test_the_seed_decides_adapters_and_the_order_of_batches(part: str, batches: int) -> None:
    """With one batch there is no order, and scales start without chance."""

    def mended(seed: int) -> dict[str, Tensor]:
        model, settings = llama(), {**TRAINING, "steps": 6, "parts": [part]}
        reconstruct(model, smallest_half(model), texts(batches), seed=seed, **settings)
        return model.state_dict()

    one, same, other = mended(0), mended(0), mended(1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(one[name], other[name])


def test_blocks_with_tiny_outputs_are_mended_too() -> None:
    """Errors of 1e-12 have gradients far below AdamW's epsilon; scales suit any weights."""
    model, settings = llama(), {**TRAINING, "parts": ["scale-lora"]}
    with torch.no_grad():
        for block in describe(model):
            for name in (block.attention_out, block.down):
                model.get_parameter(f"{name}.weight").mul_(1e-3)
    for error in reconstruct(model, smallest_half(model), texts(4), **settings).values():
        assert 0 < error.pruned < 1e-11
        assert error.mended < 0.8 * error.pruned


def test_a_full_mask_leaves_the_network_as_it_was() -> None:
    model = llama()
    before = copy.deepcopy(model.state_dict())
    full = Mask({name: torch.ones_like(p) for name, p in smallest_half(model).items()})
    errors = reconstruct(model, full, texts(2))
    assert set(errors.values()) == {BlockError(0.0, 0.0)}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_blocks_without_masked_weights_are_left_alone() -> None:
    model = llama()
    before = copy.deepcopy(model.state_dict())
    mask = Mask({n: p for n, p in smallest_half(model).items() if ".layers.1." in n})
    first, second = reconstruct(model, mask, texts(2), **TRAINING).values()
    assert first == BlockError(0.0, 0.0)
    assert 0 < second.mended < second.pruned
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed
    assert all(".layers.1." in name for name in changed)


def test_padding_counts_for_nothing() -> None:
    (whole,) = texts(1, size=3, tokens=8)
    short = {"input_ids": whole["input_ids"][:, :5]}
    attended = torch.zeros(3, 8, dtype=torch.long)
    attended[:, :5] = 1
    found = []
    for batch in ({**whole, "attention_mask": attended}, short):
        model = llama()
        found.append(reconstruct(model, smallest_half(model), [batch], **TRAINING | {"steps": 3}))
    for padded, plain in zip(*(one.values() for one in found), strict=True):
        assert padded.pruned == pytest.approx(plain.pruned, rel=1e-3)
        assert padded.mended == pytest.approx(plain.mended, rel=1e-2)


def test_the_learning_rate_rises_for_a_tenth_and_falls_to_zero() -> None:
    factors = [warm_linear(step, 30) for step in range(31)]
    assert factors[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert factors[30] == 0.0
    falls = torch.tensor(factors[3:]).diff()
    torch.testing.assert_close(falls, torch.full_like(falls, -1 / 27))
    assert [warm_linear(step, 5) for step in range(5)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_walking_gives_what_a_forward_pass_gives_and_sees_changes() -> None:
    model, batches = llama(layers=3).eval(), texts(2)
    first, second, third = block_names(model)
    expected = {name: seen(model, name, batches) for name in (first, second, third)}
    for name, inputs in walk_blocks(model, batches):
        assert torch.is_grad_enabled()  # nothing of the walk's own leaks out of it
        for one, (given, got) in zip(inputs, expected[name], strict=True):
            torch.testing.assert_close(one.hidden, given)
            torch.testing.assert_close(one.through(model.get_submodule(name)), got)
        targets = [got for _, got in expected[name]]
        assert block_error(model.get_submodule(name), inputs, targets) == pytest.approx(0, abs=1e-9)
    walk = walk_blocks(model, batches)
    next(walk)
    with torch.no_grad():
        for parameter in model.get_submodule(first).parameters():
            parameter.zero_()
    name, inputs = next(walk)
    embedded = torch.stack([given for given, _ in expected[first]])
    assert name == second
    torch.testing.assert_close(torch.stack([one.hidden for one in inputs]), embedded)


def test_what_cannot_be_is_refused() -> None:
    model = llama()
    mask, before = smallest_half(model), copy.deepcopy(model.state_dict())
    outside = Mask({"lm_head.weight": torch.ones(40, 16, dtype=torch.bool)})
    with pytest.raises(MaskError, match=r"'lm_head.weight' is in none of the blocks"):
        reconstruct(model, outside, texts(1))
    with pytest.raises(MaskError, match="no parameter 'x'"):
        reconstruct(model, Mask({"x": torch.ones(1, dtype=torch.bool)}), texts(1))
    with pytest.raises(MaskError, match="expected steps >= 1 and lr > 0, got 0"):
        reconstruct(model, mask, texts(1), steps=0)
    with pytest.raises(CalibrationError, match="no batch"):
        reconstruct(model, mask, [])
    with pytest.raises(MaskError, match="a block has no head"):
        reconstruct(model, mask, texts(1), parts=["norms", "head"])
    with pytest.raises(MaskError, match="nothing to train in the parts"):
        reconstruct(model, mask, texts(1), parts=["biases"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
