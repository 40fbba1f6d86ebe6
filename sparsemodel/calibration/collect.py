"""One pass over calibration data that collects all statistics that some criteria need.

Modules are watched while the network runs, in eval mode. Inputs that several modules share
(queries, keys and values) are looked at once. Padding, where a batch's "attention_mask" is 0, is
left out of everything that is counted by tokens. Where a network puts the tokens of all sequences
into one row (OPT's feed-forward part), they are seen by sequences again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsemodel.calibration.batches import (
    Losses,
    first_tensor,
    grid_of,
    moved_to,
    padding_of,
    run,
    unpadded,
    usual_losses,
)
from sparsemodel.calibration.statistics import Calibration, Key, Moments, Statistic, Sums
from sparsemodel.errors import CalibrationError
from sparsemodel.masks.probe import probing

INPUTS = "inputs"
"""Moments of a module's input features: of every token, or of every sample [n, features]."""
OUTPUTS = "outputs"
"""The same of its output."""
GRAM = "gram"
"""XᵀX of its input: "products" [features, features], a sum over tokens."""
SEQUENCES = "sequences"
"""Of its input: "squares", Σ over sequences of (mean over tokens of |x|)², [features]."""
SEQUENCES_OUT = "sequences-out"
"""The same of its output."""
ANGLES = "angles"
"""Between what goes into it and what comes out, by tokens: "angle", arccos(cos) / π in [0, 1], and
"cosine"."""
HEADS = "heads"
"""Of an attention's output projection: "sizes", Σ over tokens of ‖x_h W_hᵀ‖₁ by head, [heads]."""
GRADIENTS = "gradients"
"""Of its weight, by sequences or samples: "gradient" Σ g, "squares" Σ g², "absolute" Σ |g|, each
of the weight's shape."""

KINDS = (INPUTS, OUTPUTS, GRAM, SEQUENCES, SEQUENCES_OUT, ANGLES, HEADS, GRADIENTS)

Needs = Mapping[str, Iterable[str]]
"""Kind of statistic -> names of modules."""


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    needs: Needs,
    *,
    losses: Losses = usual_losses,
    num_heads: int = 0,
) -> Calibration:
    """The statistics that are asked for, over all batches; of none, an empty calibration.

    The model runs in eval mode and is left as it was.

    Args:
        batches: mappings of tensors, which become keyword arguments; or (inputs, ...) or inputs
            alone, of which the inputs are given. Tensors are moved to the model's device.
        needs: kinds of statistics, with the modules that they are wanted of.
        losses: of each sample of a batch; for GRADIENTS alone, of which each sample's is one.
            Usually the cross-entropy, of the next token or of (inputs, labels).
        num_heads: for HEADS.

    Raises:
        CalibrationError: an unknown kind or module, or one that the data never reached.
    """
    watch = Watch.of(model, needs, num_heads=num_heads)
    device = next(model.parameters()).device
    with probing(model), watch.attached(), torch.enable_grad():
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for batch in batches:
            moved = moved_to(batch, device)
            if watch.needs_gradients:
                watch.begin(padding_of(moved), grid_of(moved), differentiated=True)
                losses(model, moved).sum().backward()
                model.zero_grad(set_to_none=True)
            else:
                with torch.no_grad():
                    watch.begin(padding_of(moved), grid_of(moved))
                    run(model, moved)
    return watch.found()


@dataclass
class Watch:
    """Watches modules and adds up what it sees.

    Attributes:
        modules: of the network, by name.
        needs: kind -> names.
    """

    modules: Mapping[str, nn.Module]
    needs: Mapping[str, Sequence[str]]
    num_heads: int = 0
    _sums: dict[Key, Statistic] = field(default_factory=dict)
    _seen: dict[tuple[str, int], tuple[Tensor, Statistic]] = field(default_factory=dict)
    _padding: Tensor | None = None
    _grid: tuple[int, int] | None = None
    _differentiated: bool = False
    _num_batches: int = 0

    @classmethod
    def of(cls, model: nn.Module, needs: Needs, *, num_heads: int = 0) -> Watch:
        """One that has seen nothing.

        Raises:
            CalibrationError: an unknown kind or module.
        """
        modules = dict(model.named_modules())
        listed = {kind: list(names) for kind, names in needs.items()}
        for kind, names in listed.items():
            if kind not in KINDS:
                raise CalibrationError(f"unknown statistics {kind!r}; known: {', '.join(KINDS)}")
            for name in names:
                if name not in modules:
                    raise CalibrationError(f"{kind}: the model has no module {name!r}")
                if kind in {GRADIENTS, HEADS} and not isinstance(modules[name], nn.Linear):
                    raise CalibrationError(
                        f"{kind}: {name!r} is a {type(modules[name]).__name__}, expected a Linear"
                    )
        if listed.get(HEADS) and num_heads < 1:
            raise CalibrationError("heads: give num_heads, of an attention")
        return cls(modules, listed, num_heads)

    @property
    def needs_gradients(self) -> bool:
        """Whether a backward pass is needed."""
        return bool(self.needs.get(GRADIENTS))

    def begin(
        self,
        padding: Tensor | None,
        grid: tuple[int, int] | None = None,
        *,
        differentiated: bool = False,
    ) -> None:
        """A new batch.

        Args:
            padding: bool [n, tokens], True for tokens that count; None: all do.
            grid: n and tokens; None: it has no tokens.
            differentiated: whether there will be a backward pass.
        """
        self._padding, self._grid, self._differentiated = padding, grid, differentiated
        self._seen = {}
        self._num_batches += 1

    def attached(self) -> ExitStack:
        """Hooks on all modules, until the context ends."""
        stack = ExitStack()
        by_module: dict[str, list[str]] = {}
        for kind, names in self.needs.items():
            for name in names:
                by_module.setdefault(name, []).append(kind)
        for name, kinds in by_module.items():
            hook = self._hook(name, kinds)
            handle = self.modules[name].register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        return stack

    def found(self) -> Calibration:
        """What was seen, in the order in which it was asked for.

        Raises:
            CalibrationError: a module was never called.
        """
        self._seen = {}
        if not self._num_batches:
            return Calibration()
        wanted = [(kind, name) for kind, names in self.needs.items() for name in names]
        for kind, name in wanted:
            if (kind, name) not in self._sums:
                raise CalibrationError(f"{kind}: no batch has reached {name!r}")
        return Calibration({key: self._sums[key] for key in wanted})

    def _hook(self, name: str, kinds: Sequence[str]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs = first_tensor(args, kwargs)
            outputs = output[0] if isinstance(output, tuple | list) else output
            for kind in kinds:
                if kind == GRADIENTS:
                    if self._differentiated:
                        self._watch_gradient(name, self._by_sequences(inputs.detach()), outputs)
                    continue
                given, made = (self._by_sequences(each.detach()) for each in (inputs, outputs))
                statistic = self._statistic(kind, module, given, made)
                self._add((kind, name), statistic)

        return hook

    def _add(self, key: Key, statistic: Statistic) -> None:
        known = self._sums.get(key)
        self._sums[key] = statistic if known is None else known.merge(statistic)  # type: ignore[arg-type]

    def _statistic(
        self, kind: str, module: nn.Module, inputs: Tensor, outputs: Tensor
    ) -> Statistic:
        watched = outputs if kind in {OUTPUTS, SEQUENCES_OUT} else inputs
        shared = kind in {INPUTS, OUTPUTS, GRAM, SEQUENCES, SEQUENCES_OUT}
        form = {OUTPUTS: INPUTS, SEQUENCES_OUT: SEQUENCES}.get(kind, kind)
        known = self._seen.get((form, id(watched.untyped_storage()))) if shared else None
        if known is not None and _same(known[0], watched):
            return known[1]
        if form == INPUTS:
            statistic: Statistic = Moments.of(self._tokens(watched))
        elif form == GRAM:
            tokens = self._tokens(watched).double()
            statistic = Sums.of(len(tokens), products=tokens.T @ tokens)
        elif form == SEQUENCES:
            statistic = self._sequences(watched)
        elif form == ANGLES:
            statistic = _angles(self._tokens(inputs), self._tokens(outputs))
        else:
            statistic = self._heads(module, self._tokens(inputs))
        if shared:
            # The tensor is kept with it, so that no other can take its place in memory.
            self._seen[form, id(watched.untyped_storage())] = watched, statistic
        return statistic

    def _by_sequences(self, values: Tensor) -> Tensor:
        """Values [n · tokens, features] as [n, tokens, features]; others as they are."""
        if self._grid is None or values.dim() != 2 or len(values) != self._grid[0] * self._grid[1]:
            return values
        return values.reshape(*self._grid, -1)

    def _tokens(self, values: Tensor) -> Tensor:
        """All vectors of a tensor [..., features] that are not padding: [n, features]."""
        return unpadded(values, self._padding)

    def _sequences(self, values: Tensor) -> Sums:
        if values.dim() < 3:  # one vector a sample
            return Sums.of(len(values), squares=values.double().square().sum(0))
        sizes = values.abs().double()
        counted = torch.ones(values.shape[:2], dtype=torch.float64, device=values.device)
        if self._padding is not None:
            counted = self._padding.double()
        tokens = counted.sum(1, keepdim=True).clamp(min=1.0)
        means = (sizes * counted.unsqueeze(-1)).sum(1) / tokens
        return Sums.of(int(counted.any(1).sum()), squares=means.square().sum(0))

    def _heads(self, module: nn.Module, tokens: Tensor) -> Sums:
        weight = module.get_parameter("weight").detach()
        heads = tokens.reshape(len(tokens), self.num_heads, -1).transpose(0, 1)
        parts = weight.reshape(len(weight), self.num_heads, -1).permute(1, 2, 0)
        sizes = torch.stack(
            [(x @ w).abs().double().sum() for x, w in zip(heads, parts, strict=True)]
        )
        return Sums.of(len(tokens), sizes=sizes)

    def _watch_gradient(self, name: str, inputs: Tensor, outputs: Tensor) -> None:
        def add(flat: Tensor) -> None:
            gradient = self._by_sequences(flat)
            size = (gradient.shape[-1], inputs.shape[-1])
            total, squares, absolute = (torch.zeros(size, device=inputs.device) for _ in range(3))
            for one, back in zip(inputs, gradient, strict=True):
                sample = _sample_gradient(one, back)
                total += sample
                squares += sample.square()
                absolute += sample.abs()
            found = Sums.of(len(inputs), gradient=total, squares=squares, absolute=absolute)
            self._add((GRADIENTS, name), found)

        if not outputs.requires_grad:
            outputs.requires_grad_(True)
        outputs.register_hook(add)


def _sample_gradient(inputs: Tensor, gradient: Tensor) -> Tensor:
    """Of one sample's loss by a linear layer's weight: [out, in], float32."""
    columns = gradient.reshape(-1, gradient.shape[-1]).float()
    return columns.T @ inputs.reshape(-1, inputs.shape[-1]).float()


def _angles(inputs: Tensor, outputs: Tensor) -> Sums:
    if inputs.shape != outputs.shape:
        raise CalibrationError(
            f"angles: a module takes vectors of {inputs.shape[-1]} and gives {outputs.shape[-1]}; "
            "name one whose output has its input's shape, such as a block"
        )
    cosine = functional.cosine_similarity(inputs.double(), outputs.double(), dim=-1)
    angle = torch.arccos(cosine.clamp(-1.0, 1.0)) / torch.pi
    return Sums.of(len(inputs), angle=angle.sum(), cosine=cosine.sum())


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, seen in the same way."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )
