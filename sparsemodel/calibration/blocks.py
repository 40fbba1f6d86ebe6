"""What a transformer is made of, by the names of its modules, and running it block by block.

Names follow the Llama family (Llama, Mistral, Qwen, SmolLM) and OPT; a network with other names
can be described by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsemodel.calibration.batches import moved_to, padding_of, run
from sparsemodel.calibration.collect import Watch
from sparsemodel.calibration.statistics import Calibration
from sparsemodel.errors import CalibrationError
from sparsemodel.masks.probe import probing


@dataclass(frozen=True)
class Block:
    """One decoder block: its attention and its feed-forward network, as names of modules.

    Head h is rows [h · head_dim, (h + 1) · head_dim) of `query` and those columns of
    `attention_out`; key and value heads serve `num_heads / num_groups` neighbours each. Channel j
    of the feed-forward network is row j of `up` (and of `gate`) and column j of `down`.

    Attributes:
        name: of the block.
        query, key, value, attention_out: linear layers.
        up, down: linear layers; `gate`: "" where there is none.
        norms: of the block's residual stream.
    """

    name: str
    query: str
    key: str
    value: str
    attention_out: str
    up: str
    down: str
    gate: str
    norms: tuple[str, ...]
    num_heads: int
    num_groups: int
    head_dim: int

    @property
    def linear(self) -> list[str]:
        """All its linear layers, in order."""
        named = [self.query, self.key, self.value, self.attention_out]
        return [*named, *([self.gate] if self.gate else []), self.up, self.down]


_ROLES: Mapping[str, tuple[str, ...]] = {
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "attention_out": ("o_proj", "out_proj"),
    "up": ("up_proj", "fc1"),
    "down": ("down_proj", "fc2"),
    "gate": ("gate_proj",),
}


def block_names(model: nn.Module) -> list[str]:
    """Names of the repeated blocks of a network: its longest list of modules of one class.

    Raises:
        CalibrationError: it has no such list.
    """
    lists = [
        (name, modules)
        for name, modules in model.named_modules()
        if isinstance(modules, nn.ModuleList) and len({type(one) for one in modules}) == 1
    ]
    if not lists:
        raise CalibrationError("the model has no torch.nn.ModuleList of equal blocks")
    name, modules = max(lists, key=lambda pair: len(pair[1]))
    return [f"{name}.{place}" for place in range(len(modules))]


def describe(model: nn.Module) -> list[Block]:
    """The blocks of a transformer whose modules have the usual names.

    Args:
        model: with a `config` as transformers' models have it: `num_attention_heads`, and
            `num_key_value_heads` and `head_dim` where they differ from the usual.

    Raises:
        CalibrationError: it is none, or its modules have other names.
    """
    config: Any = getattr(model, "config", None)
    num_heads = getattr(config, "num_attention_heads", 0)
    if not num_heads:
        raise CalibrationError(
            "the model has no config.num_attention_heads: give its blocks as "
            "sparsemodel.calibration.blocks.Block"
        )
    return [_described(model, name, config) for name in block_names(model)]


def _described(model: nn.Module, name: str, config: Any) -> Block:
    block = model.get_submodule(name)
    linear = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    found = {}
    for role, endings in _ROLES.items():
        matches = [n for n in linear if n.rpartition(".")[2] in endings]
        if len(matches) > 1 or (not matches and role != "gate"):
            raise CalibrationError(
                f"{name}: expected one linear layer named {' or '.join(endings)}, got "
                f"{matches or list(linear)}; describe the blocks by hand"
            )
        found[role] = f"{name}.{matches[0]}" if matches else ""
    num_heads = int(config.num_attention_heads)
    width = linear[found["query"].removeprefix(f"{name}.")].out_features
    head_dim = int(getattr(config, "head_dim", None) or width // num_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or num_heads)
    if head_dim * num_heads != width or num_heads % groups:
        raise CalibrationError(
            f"{name}: {num_heads} heads of {head_dim} in {groups} groups do not make "
            f"{width} features"
        )
    norms = tuple(f"{name}.{n}" for n in dict(block.named_children()) if "norm" in n.lower())
    return Block(
        name, **found, norms=norms, num_heads=num_heads, num_groups=groups, head_dim=head_dim
    )


CACHES = ("cache", "past_key_values", "past_key_value", "layer_past", "use_cache")


class _ReachedError(Exception):
    """Ends a forward pass that nobody needs the rest of."""


Prune = Callable[[str, Calibration], None]
"""(block, its statistics) changes the weights of that block."""


def by_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    needs: Callable[[str], Mapping[str, Iterable[str]]],
    prune: Prune = lambda name, calibration: None,
    *,
    num_heads: int = 0,
    resting: str | torch.device = "cpu",
) -> Calibration:
    """Calibrate block by block, and let each be pruned before the next one sees what it gives.

    One block's activations are in memory at a time, and between blocks one tensor [n, tokens,
    features] of each batch, where `resting` says: networks whose activations do not fit can be
    calibrated. Statistics that need gradients are not for this: they go through the whole network.

    Args:
        needs: block -> kinds of statistics with the modules in it, named as in the model.
        prune: is given each block's statistics, and may change its weights; the block then runs
            once more, for the next one.
        resting: the device where hidden states wait for the next block.

    Returns:
        The statistics of all blocks, of their inputs as they were then.

    Raises:
        CalibrationError: as `calibrate`; or a network that is no chain of its blocks.
    """
    parts = []
    with probing(model), torch.no_grad():
        model.eval()
        for name, inputs in walk_blocks(model, batches, resting=resting):
            watch = Watch.of(model, needs(name), num_heads=num_heads)
            if watch.needs_gradients:
                raise CalibrationError("gradients go through all blocks: use calibrate")
            with watch.attached():
                for one in inputs:
                    watch.begin(one.padding, one.grid)
                    one.through(model.get_submodule(name))
            found = watch.found()
            prune(name, found)
            parts.append(found)
    return Calibration.merged(parts)


def walk_blocks(
    model: nn.Module, batches: Iterable[Any], *, resting: str | torch.device = "cpu"
) -> Iterator[tuple[str, list[BlockInput]]]:
    """The names of the blocks in order, each with what it is given of every batch.

    What the next block is given is computed when it is asked for, without gradients, by the block
    as it is then: what was changed in between counts. The model runs in the mode that it is in.

    Args:
        resting: the device where hidden states wait.

    Raises:
        CalibrationError: a network that is no chain of its blocks.
    """
    names = block_names(model)
    with torch.no_grad():
        inputs = list(_entering(model, names[0], batches, resting))
    for name in names:
        yield name, inputs
        block = model.get_submodule(name)
        with torch.no_grad():
            inputs = [one.after(block, resting) for one in inputs]


@dataclass(frozen=True)
class BlockInput:
    """What a block is given of one batch.

    Attributes:
        hidden: [n, tokens, features], on the device where it rests.
        args, kwargs: all else: positions, masks.
        padding: bool [n, tokens], True for tokens that count; None: all do.
        device: of the model.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    padding: Tensor | None
    device: torch.device

    @property
    def grid(self) -> tuple[int, int] | None:
        """n and tokens; None: it has no tokens."""
        shape = self.hidden.shape
        return (shape[0], shape[1]) if len(shape) == 3 else None

    def through(self, block: nn.Module) -> Tensor:
        """What a block gives for it, on the model's device."""
        output = block(self.hidden.to(self.device), *self.args, **self.kwargs)
        hidden = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(hidden, Tensor) or hidden.shape != self.hidden.shape:
            raise CalibrationError("a block gives something else than it takes: calibrate as one")
        return hidden

    def after(self, block: nn.Module, resting: str | torch.device) -> BlockInput:
        """What the block after this one is given."""
        hidden = self.through(block).to(resting)
        return BlockInput(hidden, self.args, self.kwargs, self.padding, self.device)


def _entering(
    model: nn.Module, first: str, batches: Iterable[Any], resting: str | torch.device
) -> Iterator[BlockInput]:
    """What the first block is given of each batch."""
    device = next(model.parameters()).device
    caught: list[BlockInput] = []
    padding: Tensor | None = None

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        given = args or (rest.pop("hidden_states"),)
        for name in CACHES:  # for generation; they would grow by every call
            rest.pop(name, None)
        caught.append(BlockInput(given[0].to(resting), tuple(given[1:]), rest, padding, device))
        raise _ReachedError

    handle = model.get_submodule(first).register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches:
            moved = moved_to(batch, device)
            padding = padding_of(moved)
            try:
                run(model, moved)
            except _ReachedError:
                yield caught.pop()
            else:
                raise CalibrationError(f"the data never reached {first!r}")
    finally:
        handle.remove()
