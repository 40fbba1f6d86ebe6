"""One pass over data: what is added up, against the same by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_language import llama, opt, texts
from torch import Tensor, nn

from sparsemodel.calibration.batches import next_token_losses
from sparsemodel.calibration.blocks import Block, block_names, by_blocks, describe
from sparsemodel.calibration.collect import KINDS, calibrate
from sparsemodel.calibration.statistics import Calibration
from sparsemodel.errors import CalibrationError

HEADS = 4


def needs(block: Block) -> dict[str, list[str]]:
    return {
        "inputs": block.linear,
        "outputs": [block.up],
        "gram": [block.down],
        "sequences": [block.down, block.attention_out],
        "sequences-out": list(block.norms),
        "angles": [block.name],
        "heads": [block.attention_out],
    }


def all_needs(model: nn.Module) -> dict[str, list[str]]:
    joint: dict[str, list[str]] = {}
    for block in describe(model):
        for kind, names in needs(block).items():
            joint.setdefault(kind, []).extend(names)
    return joint


def seen(model: nn.Module, name: str, batches: list[Any]) -> tuple[Tensor, Tensor]:
    """What a module takes and gives, [sequences, tokens, features]."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        pairs.append(
            (given.double(), (output[0] if isinstance(output, tuple) else output).double())
        )

    handle = model.get_submodule(name).register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])


def equal(one: Calibration, other: Calibration, *, rtol: float = 1e-5) -> None:
    assert set(one) == set(other)
    for key in one:
        ours, theirs = one[key].arrays(), other[key].arrays()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=1e-6)


def test_every_kind_by_hand() -> None:
    model, batches = llama().eval(), texts()
    found = calibrate(model, batches, all_needs(model), num_heads=HEADS)
    block = describe(model)[1]
    x, y = seen(model, block.down, batches)
    tokens = x.reshape(-1, 24)
    inputs = found.moments("inputs", block.down)
    assert inputs.count == 3 * 4 * 12
    torch.testing.assert_close(inputs.mean, tokens.mean(0), rtol=1e-5, atol=1e-7)
    variance = tokens.var(0, unbiased=False)
    torch.testing.assert_close(inputs.variance, variance, rtol=1e-5, atol=1e-9)
    gram = found.sums("gram", block.down).totals["products"]
    torch.testing.assert_close(gram, tokens.T @ tokens, rtol=1e-5, atol=1e-8)
    squares = found.sums("sequences", block.down).totals["squares"]
    torch.testing.assert_close(squares, x.abs().mean(1).square().sum(0), rtol=1e-5, atol=1e-8)
    _, normed = seen(model, block.norms[0], batches)
    squares = found.sums("sequences-out", block.norms[0]).totals["squares"]
    torch.testing.assert_close(squares, normed.abs().mean(1).square().sum(0), rtol=1e-5, atol=1e-8)
    _, up = seen(model, block.up, batches)
    torch.testing.assert_close(
        found.moments("outputs", block.up).absolute, up.abs().sum((0, 1)), rtol=1e-5, atol=1e-7
    )
    x, y = seen(model, block.name, batches)
    cosine = torch.cosine_similarity(x, y, dim=-1)
    angles = found.sums("angles", block.name)
    assert angles.count == 3 * 4 * 12
    assert angles.mean("cosine").item() == pytest.approx(cosine.mean().item(), rel=1e-5)
    assert angles.mean("angle").item() == pytest.approx(
        (torch.arccos(cosine) / torch.pi).mean().item(), rel=1e-5
    )
    x, _ = seen(model, block.attention_out, batches)
    weight = model.get_parameter(f"{block.attention_out}.weight").detach().double()
    width = block.head_dim
    sizes = [
        (x[..., h * width : (h + 1) * width] @ weight[:, h * width : (h + 1) * width].T).abs().sum()
        for h in range(HEADS)
    ]
    heads = found.sums("heads", block.attention_out).totals["sizes"]
    torch.testing.assert_close(heads, torch.stack(sizes), rtol=1e-5, atol=1e-7)


def test_angles_of_what_stays_turns_and_is_turned_about() -> None:
    class Turn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(3)])
            turns = ([[1, 0], [0, 1]], [[0, -1], [1, 0]], [[-1, 0], [0, -1]])
            for step, turn in zip(self.steps, turns, strict=True):
                step.load_state_dict({"weight": torch.tensor(turn).float()})

        def forward(self, x: Tensor) -> Tensor:
            for step in self.steps:
                x = step(x)
            return x

    found = calibrate(Turn(), [torch.randn(5, 2)], {"angles": block_names(Turn())})
    means = [found.sums("angles", name).mean("angle").item() for name in block_names(Turn())]
    assert means == pytest.approx([0.0, 0.5, 1.0], abs=1e-3)


@pytest.mark.parametrize(("make", "role"), [(llama, "query"), (opt, "query"), (opt, "down")])
def test_gradients_are_those_of_every_sequence(make: Any, role: str) -> None:
    model, batches = make().eval(), texts(2)
    name = getattr(describe(model)[0], role)
    found = calibrate(model, batches, {"gradients": [name]}).sums("gradients", name)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    weight, each = model.get_parameter(f"{name}.weight"), []
    for batch in batches:
        for sequence in batch["input_ids"]:
            loss = model(sequence[None], labels=sequence[None]).loss
            each.append(torch.autograd.grad(loss, weight)[0].double())
    expected = torch.stack(each)
    assert found.count == len(each) == 8
    for part, total in {
        "gradient": expected.sum(0),
        "squares": expected.square().sum(0),
        "absolute": expected.abs().sum(0),
    }.items():
        torch.testing.assert_close(found.totals[part], total, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("make", [llama, opt])
def test_block_by_block_is_all_at_once(make: Any) -> None:
    model, batches = make(), texts()
    model.train()
    blocks = {block.name: block for block in describe(model)}
    whole = calibrate(model, batches, all_needs(model), num_heads=HEADS)
    parts = by_blocks(model, batches, lambda name: needs(blocks[name]), num_heads=HEADS)
    equal(whole, parts)
    assert model.training


def test_later_blocks_see_what_pruned_ones_give() -> None:
    model, batches = llama(), texts()
    blocks = {block.name: block for block in describe(model)}
    first, second = blocks.values()
    untouched = copy.deepcopy(model)

    def prune(name: str, found: Calibration) -> None:
        assert ("inputs", blocks[name].down) in found
        model.get_parameter(f"{blocks[name].down}.weight").data.zero_()

    parts = by_blocks(model, batches, lambda name: needs(blocks[name]), prune, num_heads=HEADS)
    untouched.get_parameter(f"{first.down}.weight").data.zero_()
    expected = calibrate(untouched, batches, all_needs(untouched), num_heads=HEADS)
    later = [
        Calibration({k: v for k, v in one.items() if k[1].startswith(f"{second.name}.")})
        for one in (parts, expected)
    ]
    assert len(later[0]) > 5
    equal(*later)


@pytest.mark.parametrize("blockwise", [False, True])
def test_tokens_in_one_row_are_sequences_again(*, blockwise: bool) -> None:
    """OPT's feed-forward part is given [sequences · tokens, features]."""
    model, batches = opt().eval(), texts()
    blocks = {block.name: block for block in describe(model)}
    if blockwise:
        found = by_blocks(model, batches, lambda name: needs(blocks[name]), num_heads=HEADS)
    else:
        found = calibrate(model, batches, all_needs(model), num_heads=HEADS)
    for block in blocks.values():
        x, _ = seen(model, block.down, batches)
        _, normed = seen(model, block.norms[1], batches)
        assert x.shape == (3 * 4 * 12, 24)
        for kind, name, values in (
            ("sequences", block.down, x), ("sequences-out", block.norms[1], normed)
        ):  # fmt: skip
            sums = found.sums(kind, name)
            expected = values.reshape(12, 12, -1).abs().mean(1).square().sum(0)
            assert sums.count == 12
            torch.testing.assert_close(sums.totals["squares"], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("make", [llama, opt])
@pytest.mark.parametrize("blockwise", [False, True])
def test_padding_counts_for_nothing(make: Any, *, blockwise: bool) -> None:
    model = make()
    blocks = {block.name: block for block in describe(model)}
    (whole,) = texts(1, size=3, tokens=8)
    short = {"input_ids": whole["input_ids"][:, :5]}
    mask = torch.zeros(3, 8, dtype=torch.long)
    mask[:, :5] = 1
    padded = {**whole, "attention_mask": mask}

    def run(batch: dict[str, Tensor]) -> Calibration:
        if blockwise:
            return by_blocks(model, [batch], lambda name: needs(blocks[name]), num_heads=HEADS)
        wanted = {**all_needs(model), "gradients": [b.down for b in blocks.values()]}
        return calibrate(model, [batch], wanted, num_heads=HEADS)

    equal(run(padded), run(short), rtol=1e-4)


def test_clients_that_are_merged_are_the_union() -> None:
    model, batches = llama(), texts(4)
    wanted = {**all_needs(model), "gradients": [block.up for block in describe(model)]}
    whole = calibrate(model, batches, wanted, num_heads=HEADS)
    clients = [batches[:1], [], batches[1:3], batches[3:]]
    parts = [calibrate(model, own, wanted, num_heads=HEADS) for own in clients]
    equal(Calibration.merged(parts[::-1]), whole, rtol=1e-6)
    assert len(parts[1]) == 0


def test_losses_are_the_models_own() -> None:
    model, (batch,) = llama().eval(), texts(1)
    tokens = batch["input_ids"]
    own = model(tokens, labels=tokens).loss
    assert next_token_losses(model, batch).mean().item() == pytest.approx(own.item(), rel=1e-6)


def test_what_cannot_be_is_refused() -> None:
    model, batches = llama(), texts(1)
    block = describe(model)[0]
    name = block.down
    for wrong, reason in (
        ({"input": [name]}, f"unknown statistics 'input'; known: {', '.join(KINDS)}"),
        ({"inputs": ["nothing"]}, "inputs: the model has no module 'nothing'"),
        ({"heads": [block.attention_out]}, "give num_heads"),
        ({"gradients": [block.norms[0]]}, "expected a Linear"),
        ({"angles": [name]}, "takes vectors of 24 and gives 16"),
    ):
        with pytest.raises(CalibrationError, match=reason):
            calibrate(model, batches, wrong)
    for batch in ({"pixels": torch.ones(1, 2)}, torch.ones(1, 2)):
        with pytest.raises(CalibrationError, match="gradients need a loss: give batches of"):
            calibrate(nn.Sequential(nn.Linear(2, 2)), [batch], {"gradients": ["0"]})
    model.unused = nn.Linear(2, 2)  # type: ignore[assignment]
    with pytest.raises(CalibrationError, match="no batch has reached 'unused'"):
        calibrate(model, batches, {"inputs": ["unused"]})
    with pytest.raises(CalibrationError, match="gradients go through all blocks"):
        by_blocks(model, batches, lambda _: {"gradients": [name]})
    with pytest.raises(CalibrationError, match=r"no torch\.nn\.ModuleList"):
        block_names(nn.Linear(2, 2))
    with pytest.raises(CalibrationError, match="num_attention_heads"):
        describe(nn.Linear(2, 2))
