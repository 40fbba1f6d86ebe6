"""Logits of smaller transformers, written out: kept units alone, one head at a time, float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsemodel.calibration.blocks import Block
from sparsemodel.units.unit import Kept


def llama_logits(model: nn.Module, blocks: Sequence[Block], kept: Kept, tokens: Tensor) -> Tensor:
    """Of tokens [n, t] by a Llama: [n, t, vocabulary]."""
    get = Weights(model)
    hidden = get("model.embed_tokens")[tokens]
    for block in blocks:
        if not stays(block, kept):
            continue
        x = rms(hidden, get(block.norms[0]))
        hidden = hidden + attention(get, block, heads_of(block, kept), x, rotary=True)
        x = rms(hidden, get(block.norms[1]))
        which = channels_of(get, block, kept)
        gate, up, down = get(block.gate)[which], get(block.up)[which], get(block.down)[:, which]
        hidden = hidden + (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    return rms(hidden, get("model.norm")) @ get("lm_head").T


def opt_logits(model: nn.Module, blocks: Sequence[Block], kept: Kept, tokens: Tensor) -> Tensor:
    """Of tokens [n, t] by an OPT."""
    get = Weights(model)
    places = get("model.decoder.embed_positions")[2 : 2 + tokens.shape[1]]
    hidden = get("model.decoder.embed_tokens")[tokens] + places
    for block in blocks:
        if not stays(block, kept):
            continue
        x = layer_norm(get, hidden, block.norms[0])
        hidden = hidden + attention(get, block, heads_of(block, kept), x, rotary=False)
        x = layer_norm(get, hidden, block.norms[1])
        which = channels_of(get, block, kept)
        inner = torch.relu(x @ get(block.up)[which].T + get.bias(block.up)[which])
        hidden = hidden + inner @ get(block.down)[:, which].T + get.bias(block.down)
    return layer_norm(get, hidden, "model.decoder.final_layer_norm") @ get("lm_head").T


class Weights:
    """Those of a model in float64."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, name: str) -> Tensor:
        return self.model.get_parameter(f"{name}.weight").detach().double()

    def bias(self, name: str) -> Any:
        bias = self.model.get_submodule(name).bias
        return 0.0 if bias is None else bias.detach().double()


def attention(get: Weights, block: Block, heads: list[int], x: Tensor, *, rotary: bool) -> Tensor:
    """Of some heads; each has only its own rows and columns."""
    d, per_group = block.head_dim, block.num_heads // block.num_groups
    total = torch.zeros_like(x) + get.bias(block.attention_out)
    future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()

    def part(layer: str, index: int) -> Tensor:
        bias = get.bias(layer)
        rows = slice(index * d, (index + 1) * d)
        return x @ get(layer)[rows].T + (bias[rows] if isinstance(bias, Tensor) else 0.0)

    for head in heads:
        group = head // per_group
        q, k, v = part(block.query, head), part(block.key, group), part(block.value, group)
        if rotary:
            q, k = turned(q), turned(k)
        scores = (q @ k.transpose(1, 2) / d**0.5).masked_fill(future, -torch.inf)
        columns = get(block.attention_out)[:, head * d : (head + 1) * d]
        total = total + scores.softmax(-1) @ v @ columns.T
    return total


def turned(x: Tensor) -> Tensor:
    """Rotary positions of base 10,000 on [n, t, d]."""
    d = x.shape[-1]
    angles = torch.arange(x.shape[1]).double()[:, None] / 10000.0 ** (
        torch.arange(0, d, 2).double() / d
    )
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def layer_norm(get: Weights, x: Tensor, name: str) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], get(name), get.bias(name))


def stays(block: Block, kept: Kept) -> bool:
    return ("blocks", block.name) not in kept or bool(kept["blocks", block.name])


def heads_of(block: Block, kept: Kept) -> list[int]:
    per_group = block.num_heads // block.num_groups
    heads, groups = kept.get(("heads", block.name)), kept.get(("groups", block.name))
    return [
        head
        for head in range(block.num_heads)
        if (heads is None or heads[head]) and (groups is None or groups[head // per_group])
    ]


def channels_of(get: Weights, block: Block, kept: Kept) -> Tensor:
    everything = torch.ones(len(get(block.up)), dtype=torch.bool)
    return kept.get(("channels", block.name), everything)
