"""The masked network computes what the smaller one does; costs are those of real parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from small_transformers import llama_logits, opt_logits
from tiny_language import llama, opt, texts
from torch import Tensor, nn

from sparsemodel.calibration.blocks import Block, describe
from sparsemodel.errors import MaskError
from sparsemodel.layers.sparsify import sparsify
from sparsemodel.units.masked import unit_mask
from sparsemodel.units.unit import Kept, costs, num_parameters

Logits = Callable[[nn.Module, list[Block], Kept, Tensor], Tensor]
TOKENS = texts(1, size=3, tokens=9)[0]["input_ids"]
NETWORKS = {
    "llama": (lambda: llama(groups=4), llama_logits),
    "llama, grouped": (lambda: llama(groups=2), llama_logits),
    "llama, one key": (lambda: llama(groups=1), llama_logits),
    "opt": (opt, opt_logits),
}


def network(name: str) -> tuple[nn.Module, list[Block], Logits]:
    """With biases and norms that are not the ones they start with."""
    make, logits = NETWORKS[name]
    model = make().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
            else:
                parameter.mul_(5)
    return model, describe(model), logits


def drawn(kind: str, size: int, block: Block, seed: int, density: float = 0.6) -> Kept:
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.rand(size, generator=generator) < density
    pattern[seed % size] = True
    return {(kind, block.name): pattern}


def some(blocks: list[Block], attention: str = "heads") -> dict[tuple[str, str], Tensor]:
    kept: dict[tuple[str, str], Tensor] = {}
    for seed, block in enumerate(blocks):
        size = block.num_heads if attention == "heads" else block.num_groups
        kept |= drawn(attention, size, block, seed) | drawn("channels", 24, block, seed + 10)
    return kept


def masked_logits(model: nn.Module, blocks: list[Block], kept: Kept, *, biases: bool) -> Tensor:
    masked = copy.deepcopy(model)
    unit_mask(masked, blocks, kept, biases=biases).apply(masked)
    with torch.no_grad():
        return masked(input_ids=TOKENS, use_cache=False).logits.double()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("attention", ["heads", "groups"])
@pytest.mark.parametrize("biases", [True, False])
def test_masked_is_removed(name: str, attention: str, biases: bool) -> None:
    model, blocks, logits = network(name)
    with torch.no_grad():
        dense = model(input_ids=TOKENS).logits.double()
    torch.testing.assert_close(logits(model, blocks, {}, TOKENS), dense, rtol=1e-5, atol=1e-5)
    kept = some(blocks, attention)
    small = logits(model, blocks, kept, TOKENS)
    assert (small - dense).abs().max() > 0.01
    found = masked_logits(model, blocks, kept, biases=biases)
    torch.testing.assert_close(found, small, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama, grouped", "opt"])
def test_a_removed_block_passes_its_input_on(name: str) -> None:
    model, blocks, logits = network(name)
    kept = some(blocks) | {("blocks", blocks[0].name): torch.tensor([False])}
    small = logits(model, blocks, kept, TOKENS)
    found = masked_logits(model, blocks, kept, biases=True)
    torch.testing.assert_close(found, small, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_kept_is_the_dense_network_bit_for_bit(name: str) -> None:
    model, blocks, _ = network(name)
    kept = {key: torch.ones_like(value) for key, value in some(blocks).items()}
    before = copy.deepcopy(model.state_dict())
    mask = unit_mask(model, blocks, kept)
    mask.apply(model)
    assert mask.density == 1.0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("attention", ["heads", "groups"])
def test_costs_are_the_parameters_that_are_left(name: str, attention: str) -> None:
    model, blocks, _ = network(name)
    kept = some(blocks, attention)
    mask = unit_mask(model, blocks, kept)
    assert num_parameters(model, blocks, kept) == mask.num_active
    assert mask.num_active < mask.num_weights
    nothing = unit_mask(model, blocks, {k: torch.zeros_like(v) for k, v in kept.items()})
    assert nothing.num_active == 0
    all_kept = {key: torch.ones_like(value) for key, value in kept.items()}
    linear = [model.get_submodule(name) for b in blocks for name in b.linear]
    biases = [model.get_submodule(name).bias for b in blocks for name in (b.attention_out, b.down)]
    total = sum(p.numel() for layer in linear for p in layer.parameters())
    total -= sum(bias.numel() for bias in biases if bias is not None)
    assert num_parameters(model, blocks, all_kept) == total


def test_costs_by_hand() -> None:
    # Hidden 16, heads of 4: a query head has 4 rows of 16 and 4 columns of 16.
    found = [costs(m, describe(m)[0]) for m in (llama(groups=2), opt())]
    assert [(c.head, c.shared, c.channel) for c in found] == [(128, 128, 48), (132, 136, 33)]


def test_costs_where_heads_are_not_as_wide_as_the_model() -> None:
    """Hidden 6, two heads of 4 that share a key and a value, 10 channels; biases everywhere."""
    sizes = {"q": (6, 8), "k": (6, 4), "v": (6, 4), "o": (8, 6), "u": (6, 10), "d": (10, 6)}
    model = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})
    block = Block("", "q", "k", "v", "o", "u", "d", "", (), 2, 1, 4)
    found = costs(model, block)
    assert (found.head, found.shared, found.channel) == (4 * (7 + 6), 4 * (7 + 7), 7 + 6)
    with pytest.raises(MaskError, match="'o' has 8 columns, expected 3 heads of 4"):
        costs(model, Block("", "q", "k", "v", "o", "u", "d", "", (), 3, 1, 4))


def test_a_key_goes_with_the_last_head_of_its_group() -> None:
    model, blocks, _ = network("llama, grouped")
    block = blocks[0]
    for pattern, keys in (([1, 0, 0, 0], [1, 0]), ([0, 1, 1, 0], [1, 1]), ([0, 0, 1, 1], [0, 1])):
        kept = {("heads", block.name): torch.tensor(pattern).bool()}
        mask = unit_mask(model, blocks, kept)
        rows = mask[f"{block.key}.weight"].reshape(2, 4, 16).all((1, 2))
        assert rows.tolist() == [bool(key) for key in keys]
        assert torch.equal(mask[f"{block.key}.weight"], mask[f"{block.value}.weight"])
        assert num_parameters(model, blocks, kept) == 128 * (sum(pattern) + sum(keys))
        assert list(mask) == [f"{n}.weight" for n in block.linear[:4]]


def test_blocks_count_with_all_their_units() -> None:
    model = llama(layers=3)
    blocks = describe(model)
    kept = {("blocks", b.name): torch.tensor([b is not blocks[1]]) for b in blocks}
    each = 4 * 128 + 2 * 128 + 24 * 48
    assert num_parameters(model, blocks, kept) == 2 * each
    mask = unit_mask(model, blocks, kept)
    assert (mask.num_active, mask.num_weights) == (2 * each, 3 * each)


def test_biases_of_removed_rows_are_zeroed_and_others_stay() -> None:
    model, blocks, _ = network("opt")
    kept, block = some(blocks), blocks[0]
    before = copy.deepcopy(model)
    unit_mask(model, blocks, kept).apply(model)
    heads = kept["heads", block.name].repeat_interleave(4)
    channels = kept["channels", block.name]
    for layer, rows in ((block.query, heads), (block.value, heads), (block.up, channels)):
        bias, old = (m.get_parameter(f"{layer}.bias") for m in (model, before))
        assert torch.equal(bias, torch.where(rows, old, 0.0))
    for layer in (block.attention_out, block.down):
        assert torch.equal(
            model.get_parameter(f"{layer}.bias"), before.get_parameter(f"{layer}.bias")
        )


def test_the_mask_of_weights_alone_makes_a_sparse_network() -> None:
    model, blocks, logits = network("opt")
    kept = some(blocks)
    sparse = sparsify(model, unit_mask(model, blocks, kept, biases=False))
    with torch.no_grad():
        found = sparse(input_ids=TOKENS).logits.double()
    expected = logits(model, blocks, kept, TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    model = llama()
    blocks = describe(model)
    name, yes = blocks[0].name, torch.ones(4, dtype=torch.bool)
    for kept, message in (
        ({("heads", "elsewhere"): yes}, "no units of kind 'heads' of 'elsewhere'"),
        ({("hidden", ""): yes}, "no units of kind 'hidden'"),
        ({("heads", name): yes[:3]}, r"expected 4, got \(3,\)"),
        ({("heads", name): yes.float()}, "expected a bool tensor"),
        ({("heads", name): yes, ("groups", name): yes[:2]}, "not both"),
        ({}, "at least one parameter"),
    ):
        with pytest.raises(MaskError, match=message):
            unit_mask(model, blocks, kept)
    with pytest.raises(MaskError, match=r"no parameter 'nowhere\.weight'"):
        costs(model, Block("b", "nowhere", "k", "v", "o", "u", "d", "", (), 4, 2, 4))
