"""The units of a transformer, what belongs to them, and how many parameters they hold.

| unit | its members |
| --- | --- |
| head | rows of the query layer and columns of the attention's output layer; the key and value that a group of heads shares go with the last head of the group |
| group | all heads of a KV group with their key and value; without grouped queries the same as a head |
| channel | of the feed-forward network: row of `up` (and `gate`), column of `down` |
| block | the whole of it |
| hidden | a dimension of the residual stream, in every layer |

Rows of a layer count their biases. The biases of the two output layers, norms and embeddings belong
to no head and no channel.
"""  # noqa: E501 - rows of a table

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsemodel.calibration.blocks import Block
from sparsemodel.errors import MaskError

HEADS, GROUPS, CHANNELS, BLOCKS, HIDDEN = "heads", "groups", "channels", "blocks", "hidden"

Key = tuple[str, str]
"""Kind of unit and name of the block; "" for hidden dimensions."""
Scores = Mapping[Key, Tensor]
"""The scores of units of one kind in one block, [units], float64 on the CPU; high means keep."""
Kept = Mapping[Key, Tensor]
"""Which units stay: bool [units]. Units of which nothing is said stay."""


@dataclass(frozen=True)
class Costs:
    """Parameters that one unit of a block holds.

    Attributes:
        head: its query and its columns of the output layer.
        shared: the key and the value of a KV group.
        channel: of the feed-forward network.
    """

    head: int
    shared: int
    channel: int


def costs(model: nn.Module, block: Block) -> Costs:
    """What the units of a block cost, by the shapes of its layers.

    Raises:
        MaskError: layers whose shapes do not fit the block.
    """
    query, key, value = (_row_cost(model, n) for n in (block.query, block.key, block.value))
    rows = [_row_cost(model, name) for name in (block.up, block.gate) if name]
    heads, channels = (weight_of(model, n).shape for n in (block.attention_out, block.down))
    if heads[1] != block.num_heads * block.head_dim:
        raise MaskError(
            f"{block.attention_out!r} has {heads[1]} columns, expected {block.num_heads} heads of "
            f"{block.head_dim}"
        )
    return Costs(
        head=block.head_dim * (query + heads[0]),
        shared=block.head_dim * (key + value),
        channel=sum(rows) + channels[0],
    )


def num_parameters(model: nn.Module, blocks: Sequence[Block], kept: Kept) -> int:
    """How many parameters the units of which `kept` says something still hold.

    With all of them kept it is what they hold in the dense model. A head that stays keeps the key
    and value of its group; a block that goes takes all its units, one that stays has them all but
    for those of which `kept` says otherwise.

    Raises:
        MaskError: `kept` does not fit the blocks.
    """
    check_kept(model, blocks, kept)
    total = 0
    for block in blocks:
        price, (heads, channels) = costs(model, block), kept_units(model, block, kept)
        if heads is not None:
            groups = kept_groups(block, heads)
            total += int(heads.sum()) * price.head + int(groups.sum()) * price.shared
        if channels is not None:
            total += int(channels.sum()) * price.channel
    return total


def kept_units(model: nn.Module, block: Block, kept: Kept) -> tuple[Tensor | None, Tensor | None]:
    """Which heads [num_heads] and which channels of a block stay; None where nothing is said."""
    heads, channels = (kept.get((kind, block.name)) for kind in (HEADS, CHANNELS))
    if (groups := kept.get((GROUPS, block.name))) is not None:
        heads = groups.repeat_interleave(block.num_heads // block.num_groups)
    if (whole := kept.get((BLOCKS, block.name))) is not None:
        sizes = num_units(model, block)
        heads = whole.expand(sizes[HEADS]) if heads is None else heads & whole
        channels = whole.expand(sizes[CHANNELS]) if channels is None else channels & whole
    return heads, channels


def kept_groups(block: Block, heads: Tensor) -> Tensor:
    """Which keys and values stay, bool [num_groups]: those of which a head does."""
    return heads.reshape(block.num_groups, -1).any(1)


def num_units(model: nn.Module, block: Block) -> dict[str, int]:
    """How many units of each kind a block has; itself is one."""
    return {
        HEADS: block.num_heads,
        GROUPS: block.num_groups,
        CHANNELS: weight_of(model, block.down).shape[1],
        BLOCKS: 1,
    }


def check_units(model: nn.Module, blocks: Sequence[Block], units: Scores | Kept) -> None:
    """Raise MaskError unless scores, or what is kept, are of units that these blocks have."""
    sizes = {
        (kind, block.name): size
        for block in blocks
        for kind, size in num_units(model, block).items()
    }
    for (kind, name), values in units.items():
        if (kind, name) not in sizes:
            raise MaskError(
                f"no units of kind {kind!r} of {name!r} in these blocks; kinds: "
                f"{', '.join((HEADS, GROUPS, CHANNELS, BLOCKS))}"
            )
        if tuple(values.shape) != (sizes[kind, name],):
            raise MaskError(
                f"{kind} of {name!r}: expected {sizes[kind, name]}, got {tuple(values.shape)}"
            )
        if kind == HEADS and (GROUPS, name) in units:
            raise MaskError(f"{name!r}: give its heads or its groups, not both")


def check_kept(model: nn.Module, blocks: Sequence[Block], kept: Kept) -> None:
    """The same, and that it says yes or no."""
    check_units(model, blocks, kept)
    for (kind, name), values in kept.items():
        if values.dtype != torch.bool:
            raise MaskError(f"{kind} of {name!r}: expected a bool tensor, got {values.dtype}")


def weight_of(model: nn.Module, layer: str) -> Tensor:
    """The weight [out, in] of a layer, detached.

    Raises:
        MaskError: the model has no such matrix.
    """
    try:
        weight = model.get_parameter(f"{layer}.weight").detach()
    except AttributeError:
        raise MaskError(f"the model has no parameter {layer + '.weight'!r}") from None
    if weight.dim() != 2:
        raise MaskError(f"{layer!r}: expected a matrix [out, in], got {tuple(weight.shape)}")
    return weight


def bias_of(model: nn.Module, layer: str) -> Tensor | None:
    """The bias of a layer, if it has one."""
    bias = getattr(model.get_submodule(layer), "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def _row_cost(model: nn.Module, layer: str) -> int:
    return weight_of(model, layer).shape[1] + (bias_of(model, layer) is not None)
