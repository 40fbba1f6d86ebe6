"""Scores against hand cases and plain loops; planted units; permutations."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_language import llama, opt, texts
from torch import Tensor, nn

from sparsemodel.calibration.blocks import Block, describe
from sparsemodel.calibration.collect import calibrate
from sparsemodel.calibration.statistics import Calibration, Moments, Sums
from sparsemodel.errors import CalibrationError
from sparsemodel.units import scores as criteria
from sparsemodel.units.allocation import best, uniform
from sparsemodel.units.masked import unit_mask
from sparsemodel.units.registry import UNIT_CRITERIA, needs_of
from sparsemodel.units.unit import Key

WIDTH = [name for name, entry in UNIT_CRITERIA.items() if "channels" in entry.units]
OF_DATA = [name for name in WIDTH if name not in {"magnitude", "random"}]
NETWORKS = {"llama": llama, "one head a group": lambda: llama(groups=4), "opt": opt}


def measured(model: nn.Module, batches: list[Any] | None = None) -> Calibration:
    blocks = describe(model)
    needs = needs_of(UNIT_CRITERIA, blocks)
    return calibrate(model, batches or texts(), needs, num_heads=blocks[0].num_heads)


def scored(name: str, model: nn.Module, batches: list[Any] | None = None) -> dict[Key, Tensor]:
    return UNIT_CRITERIA[name].score(model, describe(model), measured(model, batches))


class Single(nn.Module):
    """The two layers that heads and channels end in, on two inputs."""

    block = Block("", "q", "k", "v", "out", "up", "down", "", (), 1, 1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.out, self.down = nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) + self.down(x)


def test_minitron_of_two_sequences() -> None:
    """Tokens (1, −3) and (3, 3) of channel 0 have means 2 and 3; (0, 0) and (4, −4) 0 and 4."""
    data = torch.tensor([[[1.0, 0.0], [-3.0, 0.0]], [[3.0, 4.0], [3.0, -4.0]]])
    model = Single()
    block = model.block
    seen = calibrate(model, [data], needs_of(["minitron"], [block]))
    found = criteria.minitron(model, [block], seen)
    torch.testing.assert_close(found["channels", ""], torch.tensor([13.0**0.5, 4.0]).double())
    torch.testing.assert_close(found["heads", ""], torch.tensor([29.0**0.5]).double())


def test_flap_by_hand() -> None:
    """Of inputs (1, 2) and (3, 2), and weights of which each row is (1, −2), (0, 2), (3, 1)."""
    model = Single()
    weight = torch.tensor([[1.0, -2.0], [0.0, 2.0], [3.0, 1.0]])
    with torch.no_grad():
        model.out.weight.copy_(weight)
        model.down.weight.copy_(weight)
    block = model.block
    data = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    seen = calibrate(model, [data], needs_of(["wifv"], [block]))
    for score, channels in (
        (criteria.wifv, [10.0, 0.0]),
        (criteria.ifv, [1.0, 0.0]),
        (criteria.wifn, [10**0.5 * 4 / 3, 8**0.5 * 5 / 3]),
    ):
        expected = torch.tensor(channels).double()
        found = score(model, [block], seen)
        torch.testing.assert_close(found["channels", ""], expected)
        torch.testing.assert_close(found["heads", ""], expected.square().mean().reshape(1))
        standard = score(model, [block], seen, standard=True)
        torch.testing.assert_close(standard["channels", ""].abs(), torch.ones(2).double())
        assert standard["heads", ""].item() == pytest.approx(0.0, abs=1e-12)


def test_flap_is_the_change_of_the_output_when_the_mean_is_kept() -> None:
    model, batches = llama().eval(), texts()
    block = describe(model)[0]
    x = inputs_of(model, block.down, batches).reshape(-1, 24)
    weight = model.get_parameter(f"{block.down}.weight").detach().double()
    found = scored("wifv", model, batches)["channels", block.name]
    for channel in range(24):
        change = (x[:, channel] - x[:, channel].mean())[:, None] * weight[:, channel]
        expected = change.square().sum(1).mean()
        torch.testing.assert_close(found[channel], expected, rtol=1e-5, atol=0)


def test_standardised_columns_are_averaged_over_heads() -> None:
    model = llama()
    blocks, seen = describe(model), measured(model)
    plain, standard = (
        criteria.wifv(model, blocks, seen, standard=standard) for standard in (False, True)
    )
    for block in blocks:
        weight = model.get_parameter(f"{block.attention_out}.weight").detach().double()
        x = seen.moments("inputs", block.attention_out)
        columns = (x.variance * weight.square().sum(0)).square()
        expected = ((columns - columns.mean()) / columns.std(unbiased=False)).reshape(4, 4).mean(1)
        torch.testing.assert_close(standard["heads", block.name], expected, rtol=1e-5, atol=1e-6)
        channels = standard["channels", block.name]
        assert channels.mean().item() == pytest.approx(0.0, abs=1e-9)
        assert channels.std(unbiased=False).item() == pytest.approx(1.0)
        for kind in ("heads", "channels"):
            orders = [s[kind, block.name].argsort(stable=True) for s in (plain, standard)]
            assert torch.equal(*orders)


def test_equal_scores_are_standardised_to_zero() -> None:
    assert criteria.standard_scores(torch.full((3,), 0.1).double()).tolist() == [0.0] * 3


def inputs_of(model: nn.Module, name: str, batches: list[Any]) -> Tensor:
    """What a module is given, [sequences, tokens, features]."""
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(args[0].double()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_activations_by_plain_loops(make: Any) -> None:
    model, batches = make().eval(), texts()
    seen, blocks = measured(model, batches), describe(model)
    amp, minitron = (UNIT_CRITERIA[name].score(model, blocks, seen) for name in ("amp", "minitron"))
    for block in blocks:
        x = inputs_of(model, block.attention_out, batches)
        weight = model.get_parameter(f"{block.attention_out}.weight").detach().double()
        for head in range(4):
            own = slice(4 * head, 4 * head + 4)
            size = (x[..., own] @ weight[:, own].T).abs().sum(-1).mean()
            torch.testing.assert_close(amp["heads", block.name][head], size, rtol=1e-5, atol=0)
            squares = sum(x[n][:, own].abs().mean(0).square().sum() for n in range(len(x)))
            found = minitron["heads", block.name][head]
            torch.testing.assert_close(found.square(), squares, rtol=1e-5, atol=0)
        x = inputs_of(model, block.down, batches).reshape(12, 12, 24)
        torch.testing.assert_close(
            amp["channels", block.name], x.abs().mean((0, 1)), rtol=1e-5, atol=1e-9
        )
        torch.testing.assert_close(
            minitron["channels", block.name],
            x.abs().mean(1).square().sum(0).sqrt(), rtol=1e-5, atol=1e-9,
        )  # fmt: skip


def test_magnitude_counts_each_weight_once() -> None:
    for make in NETWORKS.values():
        model = make()
        block = describe(model)[1]
        found = criteria.magnitude(model, [block])
        for kind, names in (("heads", block.linear[:4]), ("channels", block.linear[4:])):
            total = sum(model.get_parameter(f"{n}.weight").double().square().sum() for n in names)
            torch.testing.assert_close(found[kind, block.name].sum(), total, rtol=1e-6, atol=0)
    model = llama()
    block = describe(model)[0]
    with torch.no_grad():
        for name in block.linear:
            model.get_parameter(f"{name}.weight").fill_(1.0)
        model.get_parameter(f"{block.key}.weight")[:4] = 2.0  # of the first two heads
        model.get_parameter(f"{block.up}.weight")[3] = 3.0
    found = criteria.magnitude(model, [block])
    # 64 of the query, 64 of the output, half of 64 each of key and value.
    assert found["heads", block.name].tolist() == [288.0, 288.0, 192.0, 192.0]
    assert found["channels", block.name][2:4].tolist() == [48.0, 176.0]


def test_cfsp_by_hand_and_unlike_the_form_in_which_weights_cancel() -> None:
    model = llama(seed=3)
    block, seen = describe(model)[0], measured(model)
    norms = seen.moments("inputs", block.down).norms
    down, up, gate = (
        model.get_parameter(f"{name}.weight").detach().double().abs()
        for name in (block.down, block.up, block.gate)
    )
    found = criteria.cfsp(model, [block], seen, inner_power=0.5, outer_power=2.0)
    expected = torch.zeros(24, dtype=torch.float64)
    for channel in range(24):
        for row in range(16):
            part = down[row, channel] * norms[channel] ** 0.5 / (down[row] * norms**0.5).sum()
            part += up[channel, row] / up[:, row].sum() + gate[channel, row] / gate[:, row].sum()
            expected[channel] += part / 16 * norms[channel] ** 2
    torch.testing.assert_close(found["channels", block.name], expected, rtol=1e-5, atol=0)
    cancelled = sum(
        (matrix / matrix.sum(0)).mean(0) for matrix in (down * norms, up.T, gate.T)
    ) * norms  # fmt: skip
    torch.testing.assert_close(cancelled, 3 / 16 * norms)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_parameter(f"{block.down}.weight")[:, 5] *= 10
    ours = [criteria.cfsp(m, [block], seen)["channels", block.name] for m in (model, changed)]
    assert ours[1][5] > 2 * ours[0][5]
    # With all weights equal the norms alone are left.
    with torch.no_grad():
        for name in (block.down, block.up, block.gate):
            changed.get_parameter(f"{name}.weight").fill_(0.1)
    equal = criteria.cfsp(changed, [block], seen, inner_power=0.0)["channels", block.name]
    torch.testing.assert_close(equal, 3 / 24 * norms, rtol=1e-5, atol=0)


def test_of_swiglu_without_biases_both_sides_weigh_a_channel_alike() -> None:
    """Σ w g of a channel's row of up is that of its column of down: names and axes are right."""
    model = llama()
    blocks = describe(model)
    layers = [name for b in blocks for name in (b.up, b.down)]
    found = calibrate(model, texts(), {"gradients": layers})
    for block in blocks:
        up, down = (
            model.get_parameter(f"{name}.weight").detach().double()
            * found.sums("gradients", name).totals["gradient"]
            for name in (block.up, block.down)
        )
        assert up.abs().max() > 1e-4
        torch.testing.assert_close(up.sum(1), down.sum(0), rtol=1e-4, atol=1e-7)


def dead(model: nn.Module, block: Block) -> None:
    """Head 2 and channel 5 give zero, by weights before them; the rest of theirs stays."""
    with torch.no_grad():
        for name, rows in ((block.value, slice(8, 12)), (block.up, slice(5, 6))):
            model.get_parameter(f"{name}.weight")[rows] = 0.0
            if model.get_submodule(name).bias is not None:
                model.get_parameter(f"{name}.bias")[rows] = 0.0


@pytest.mark.parametrize("make", [NETWORKS["one head a group"], opt], ids=["llama", "opt"])
@pytest.mark.parametrize("name", OF_DATA)
def test_dead_units_are_found(name: str, make: Any) -> None:
    model = make()
    block = describe(model)[1]
    dead(model, block)
    found = scored(name, model)
    for kind, unit in (("heads", 2), ("channels", 5)):
        if (kind, block.name) in found:
            score = found[kind, block.name]
            assert score[unit] == 0
            assert (others(score, unit) > 0).all()
    magnitude = scored("magnitude", model)
    assert magnitude["heads", block.name][2] > 0
    assert magnitude["channels", block.name][5] > 0


def others(score: Tensor, unit: int) -> Tensor:
    return torch.cat([score[:unit], score[unit + 1 :]])


def test_a_constant_channel_is_nothing_to_flap_and_something_to_others() -> None:
    model = opt()
    block = describe(model)[0]
    with torch.no_grad():
        model.get_parameter(f"{block.up}.weight")[5] = 0.0
        model.get_parameter(f"{block.up}.bias")[5] = 0.5
    seen = measured(model)
    for name in OF_DATA:
        score = UNIT_CRITERIA[name].score(model, [block], seen)["channels", block.name]
        assert (score[5] == 0) == (name in {"wifv", "ifv"})
        assert (others(score, 5) > 0).all()


def permuted(model: nn.Module, block: Block, heads: Tensor, channels: Tensor) -> nn.Module:
    """The same network with its units in another order; heads in whole groups."""
    other = copy.deepcopy(model)
    groups = heads.reshape(block.num_groups, -1)[:, 0] // (block.num_heads // block.num_groups)

    def dims(order: Tensor) -> Tensor:
        return (order[:, None] * block.head_dim + torch.arange(block.head_dim)).reshape(-1)

    with torch.no_grad():
        for name, order in (
            (block.query, dims(heads)), (block.key, dims(groups)), (block.value, dims(groups)),
            *((name, channels) for name in (block.up, block.gate) if name),
        ):  # fmt: skip
            for kind, parameter in other.get_submodule(name).named_parameters():
                parameter.copy_(model.get_parameter(f"{name}.{kind}")[order])
        for name, order in ((block.attention_out, dims(heads)), (block.down, channels)):
            own = model.get_parameter(f"{name}.weight")
            other.get_parameter(f"{name}.weight").copy_(own[:, order])
    return other


@pytest.mark.parametrize("make", [llama, opt])
def test_permuting_units_permutes_scores_and_masks(make: Any) -> None:
    model = make().eval()
    block = describe(model)[0]
    generator = torch.Generator().manual_seed(1)
    heads = torch.tensor([3, 2, 0, 1])
    channels = torch.randperm(24, generator=generator)
    other = permuted(model, block, heads, channels)
    tokens = texts(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(model(**tokens).logits, other(**tokens).logits)
    seen = measured(model), measured(other)
    for name in WIDTH:
        if name == "random":
            continue
        one, two = (
            UNIT_CRITERIA[name].score(m, [block], s)
            for m, s in zip((model, other), seen, strict=True)
        )
        orders = {"heads": heads, "channels": channels}
        for (kind, _), score in one.items():
            permutation = orders[kind]
            torch.testing.assert_close(
                score[permutation], two[kind, block.name], rtol=1e-4, atol=1e-12
            )
        masks = [unit_mask(m, [block], uniform(s, 0.5)) for m, s in ((model, one), (other, two))]
        down = [mask[f"{block.down}.weight"] for mask in masks]
        assert torch.equal(down[0][:, channels], down[1])
        if ("heads", block.name) in one:
            out = [m[f"{block.attention_out}.weight"].reshape(16, 4, 4) for m in masks]
            assert torch.equal(out[0][:, heads], out[1])


def planted(make: Any) -> tuple[nn.Module, list[Block]]:
    """Half of the groups of heads and two of three channels do little."""
    model = make().eval()
    blocks = describe(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        for block in blocks:
            weak = torch.arange(24) % 3 != 0
            groups = torch.arange(4 * block.num_groups) // 4 % 2 == 1
            heads = groups.reshape(-1, 4).repeat_interleave(4 // block.num_groups, 0).reshape(-1)
            for name, rows in ((block.up, weak), (block.value, groups)):
                for parameter in model.get_submodule(name).parameters():
                    parameter[rows] = 0.1 * parameter[rows]
            for name, columns in ((block.attention_out, heads), (block.down, weak)):
                weight = model.get_parameter(f"{name}.weight")
                weight[:, columns] = 0.1 * weight[:, columns]
    return model, blocks


def damage(model: nn.Module, blocks: list[Block], scores: dict[Key, Tensor]) -> float:
    """Mean squared change of the logits when half of the heads and two thirds of channels go."""
    counts = {key: 2 if key[0] == "heads" else 8 for key in scores}
    masked, tokens = copy.deepcopy(model), texts(1, seed=9)[0]
    unit_mask(masked, blocks, best(scores, counts)).apply(masked)
    with torch.no_grad():
        return float((masked(**tokens).logits - model(**tokens).logits).square().mean())


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_chosen_is_better_than_random_and_reversed_is_worse(make: Any) -> None:
    model, blocks = planted(make)
    seen = measured(model)
    chance = [damage(model, blocks, criteria.random(model, blocks, seed=s)) for s in range(5)]
    channels_by_chance = [
        damage(model, blocks, {k: v for k, v in criteria.random(model, blocks, seed=s).items()
                               if k[0] == "channels"}) for s in range(5)
    ]  # fmt: skip
    for name in WIDTH:
        if name == "random":
            continue
        scores = UNIT_CRITERIA[name].score(model, blocks, seen)
        rivals = chance if any(kind == "heads" for kind, _ in scores) else channels_by_chance
        chosen = damage(model, blocks, scores)
        assert chosen < min(rivals), name
        assert damage(model, blocks, criteria.reversed_scores(scores)) > chosen, name


def angles(*pairs: tuple[float, float]) -> tuple[list[Block], Calibration]:
    """Blocks with these mean cosines and angles, of ten tokens each."""
    blocks = [
        Block(str(n), "q", "k", "v", "o", "u", "d", "", (f"{n}.norm",), 1, 1, 2)
        for n in range(len(pairs))
    ]
    sums = {
        ("angles", b.name): Sums.of(
            10, cosine=torch.tensor(10 * cosine), angle=torch.tensor(10 * angle)
        )
        for b, (cosine, angle) in zip(blocks, pairs, strict=True)
    }
    return blocks, Calibration(sums)


def test_blocks_that_keep_turn_and_turn_about_their_input() -> None:
    blocks, seen = angles((1.0, 0.0), (0.0, 0.5), (-1.0, 1.0))
    for name, expected in (("cfsp-blocks", [0.0, 0.5, 1.0]), ("minitron-blocks", [0.0, 1.0, 2.0])):
        found = UNIT_CRITERIA[name].score(nn.Module(), blocks, seen)
        assert [found["blocks", b.name].tolist() for b in blocks] == [[e] for e in expected]


def test_a_block_that_does_nothing_has_the_lowest_score() -> None:
    model = llama(layers=3)
    blocks = describe(model)
    with torch.no_grad():
        for name in (blocks[1].attention_out, blocks[1].down):
            model.get_parameter(f"{name}.weight").zero_()
    seen = measured(model)
    for name in ("cfsp-blocks", "minitron-blocks"):
        found = [s.item() for s in UNIT_CRITERIA[name].score(model, blocks, seen).values()]
        assert found[1] == pytest.approx(0.0, abs=1e-3)
        assert min(found[0], found[2]) > 0.01


def test_hidden_dimensions_are_summed_over_norms() -> None:
    model, batches = llama().eval(), texts()
    outputs: dict[str, list[Tensor]] = {}
    norms = [name for block in describe(model) for name in block.norms]
    assert len(norms) == 4

    def keep(name: str) -> Any:
        return lambda module, args, out: outputs.setdefault(name, []).append(out.double())

    handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in norms]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    expected = sum(
        torch.cat(seen).abs().mean(1).square().sum(0).sqrt() for seen in outputs.values()
    )
    found = scored("minitron-hidden", model, batches)
    torch.testing.assert_close(found["hidden", ""], expected, rtol=1e-5, atol=1e-8)


def in_parts(batches: list[Any]) -> Iterator[list[Any]]:
    yield batches[:1]
    yield batches[1:]


@pytest.mark.parametrize("name", UNIT_CRITERIA)
def test_every_criterion_keeps_its_contract(name: str) -> None:
    """What it needs is enough, what it scores is said, parts merge, and the model stays."""
    entry, model, batches = UNIT_CRITERIA[name], llama(), texts()
    blocks = describe(model)
    before = copy.deepcopy(model.state_dict())
    needs = needs_of([name], blocks)
    whole = calibrate(model, batches, needs, num_heads=4)
    found = entry.score(model, blocks, whole)
    assert {kind for kind, _ in found} == set(entry.units)
    for score in found.values():
        assert (score.dtype, score.device.type) == (torch.float64, "cpu")
        assert torch.isfinite(score).all()
    parts = Calibration.merged(
        [calibrate(model, part, needs, num_heads=4) for part in in_parts(batches)]
    )
    for key, score in entry.score(model, blocks, parts).items():
        torch.testing.assert_close(score, found[key], rtol=1e-5, atol=1e-9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if needs:
        with pytest.raises(CalibrationError, match="no statistics"):
            entry.score(model, blocks, Calibration())


def test_random_is_of_its_seed() -> None:
    model = llama()
    one, same, other = (
        criteria.random(model, describe(model), seed=seed)["channels", "model.layers.1"]
        for seed in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_needs_are_joined() -> None:
    blocks = describe(llama())
    joint = needs_of(["wifv", "amp", "cfsp"], blocks)
    assert sorted(joint) == ["heads", "inputs"]
    assert sorted(joint["inputs"]) == sorted(
        name for b in blocks for name in (b.attention_out, b.down)
    )


def test_half_precision_is_scored_in_single() -> None:
    model = llama().bfloat16()
    block = describe(model)[0]
    x = Moments.of(torch.randn(50, 24, generator=torch.Generator().manual_seed(0)))
    seen = Calibration({("inputs", block.down): x})
    found = criteria.cfsp(model, [block], seen)["channels", block.name]
    expected = criteria.cfsp(model.float(), [block], seen)["channels", block.name]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
