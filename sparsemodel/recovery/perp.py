"""PERP: after pruning, train the few parameters that matter most, and leave the mask alone.

Source: Zimmer et al., PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs (2023),
sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import nn
from torch.nn.utils import parametrize

from sparsemodel.errors import MaskError
from sparsemodel.masks.mask import Mask, weights_under
from sparsemodel.recovery.adapters import ADAPTERS, Adapter

BIASES = "biases"
"""Biases of all modules but norms."""
NORMS = "norms"
"""Weights and biases of modules whose class is called a norm."""
HEAD = "head"
"""The output layer, `get_output_embeddings()` or else the last linear layer; what is tied to it
is trained with it."""

PARTS = (BIASES, NORMS, HEAD, *ADAPTERS)
USUAL = (BIASES, NORMS, "mask-lora")


class Retraining:
    """While it is open, only chosen parts of a pruned model can be trained; then they are merged.

    The pruned weights are set to zero at birth. All parameters are frozen but those of `parts`,
    and the masked weights of linear layers are given adapters, through which the model computes as
    it did. Train `parameters()` by any loop and optimiser. `merge` (or the end of a `with` block)
    leaves plain weights under the mask, and what was trainable is so again. Biases, norms and the
    head learn in their own type: in half precision the small steps of fine-tuning are lost.

    Departs from the published code, which takes for pruned whatever is zero, in that the mask is
    given; and in that the head is trained whole, where that has a LoRA of it.

    Args:
        model: changed in place.
        mask: of the model; adapters ask for linear layers alone in it.
        parts: some of PARTS, one adapter at most.
        rank: of adapters; 16 as published.
        scale: s of adapters that add; 2 as published.
        seed: of what adapters start from.

    Raises:
        MaskError: unknown parts or two adapters, a mask that does not fit the model or names other
            layers than linear ones or tied weights, a part that is under the mask itself, or
            nothing to train.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> mask = Mask({"0.weight": torch.rand(8, 8) < 0.5})
    >>> with Retraining(model, mask, ["biases", "mask-lora"], rank=2) as retraining:
    ...     optimizer = torch.optim.AdamW(retraining.parameters(), lr=5e-4)
    ...     model(torch.ones(4, 8)).square().sum().backward()
    ...     optimizer.step()
    >>> retraining.counts
    {'biases': 10, 'mask-lora': 32}
    >>> int((model[0].weight[~mask["0.weight"]] != 0).sum())
    0
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Mask,
        parts: Iterable[str] = USUAL,
        *,
        rank: int = 16,
        scale: float = 2.0,
        seed: int = 0,
    ) -> None:
        chosen = _checked(parts)
        if rank < 1:
            raise MaskError(f"expected a rank of 1 or more, got {rank}")
        masked = weights_under(mask, model)
        found = {part: _FINDERS[part](model) for part in chosen if part in _FINDERS}
        _check_dense(found, masked)
        adapters = [part for part in chosen if part in ADAPTERS]
        layers = _linear_layers(model, masked) if adapters else {}
        if not any(found.values()) and not layers:
            raise MaskError(
                f"{type(model).__name__} has nothing to train in the parts {chosen}; "
                f"all parts are {', '.join(PARTS)}"
            )
        mask.apply(model)
        self._trainable = [(p, p.requires_grad) for p in model.parameters()]
        model.requires_grad_(False)
        self._adapted: list[tuple[nn.Linear, nn.Parameter, Adapter]] = []
        generator = torch.Generator().manual_seed(seed)
        for part in adapters:
            found[part] = []
            for name, layer in layers.items():
                adapter = ADAPTERS[part](
                    masked[name], mask[name], rank=rank, scale=scale, generator=generator
                )
                self._adapted.append((layer, masked[name], adapter))
                parametrize.register_parametrization(layer, "weight", adapter)
                found[part] += [adapter.lora_a, adapter.lora_b]
        self._trained = _once(found)
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [parameter for part in self._trained.values() for parameter in part]

    @property
    def counts(self) -> dict[str, int]:
        """Part -> how many numbers are trained in it."""
        return {name: sum(p.numel() for p in part) for name, part in self._trained.items()}

    @torch.no_grad()
    def merge(self) -> None:
        """Make plain weights of the adapters, zero under the mask; once more does nothing."""
        for layer, weight, adapter in self._adapted:
            merged = adapter.merged(weight)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            weight.copy_(merged)
            # The weight came back as the last parameter; it was the first.
            for name in [name for name in layer._parameters if name != "weight"]:
                layer._parameters[name] = layer._parameters.pop(name)
        for parameter, was_trainable in self._trainable:
            parameter.requires_grad_(was_trainable)
        self._adapted, self._trainable = [], []

    def __enter__(self) -> Retraining:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.merge()


def parameter_names(model: nn.Module, parts: Iterable[str] = (BIASES, NORMS)) -> list[str]:
    """The names of all parameters in some parts without adapters, in the model's order.

    Raises:
        MaskError: unknown parts.

    >>> parameter_names(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    ['0.bias', '1.weight', '1.bias']
    """
    found = {id(p) for part in _checked(parts) if part in _FINDERS for p in _FINDERS[part](model)}
    return [name for name, parameter in model.named_parameters() if id(parameter) in found]


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _biases(model: nn.Module) -> list[nn.Parameter]:
    owned = [m._parameters.get("bias") for m in model.modules() if not _is_norm(m)]
    return [bias for bias in owned if bias is not None]


def _norms(model: nn.Module) -> list[nn.Parameter]:
    norms = [module for module in model.modules() if _is_norm(module)]
    return [p for norm in norms for p in norm.parameters(recurse=False)]


def _head(model: nn.Module) -> list[nn.Parameter]:
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    if head is None:
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        head = linear[-1] if linear else None
    return [] if head is None else list(head.parameters(recurse=False))


_FINDERS = {BIASES: _biases, NORMS: _norms, HEAD: _head}


def _checked(parts: Iterable[str]) -> list[str]:
    chosen = [parts] if isinstance(parts, str) else list(dict.fromkeys(parts))
    unknown = [part for part in chosen if part not in PARTS]
    if unknown or not chosen:
        raise MaskError(f"expected some of the parts {', '.join(PARTS)}; got {unknown or 'none'}")
    adapters = [part for part in chosen if part in ADAPTERS]
    if len(adapters) > 1:
        raise MaskError(f"a weight has one adapter, got {adapters}")
    return chosen


def _check_dense(found: dict[str, list[nn.Parameter]], masked: dict[str, nn.Parameter]) -> None:
    """Raise MaskError where a part would be trained whole that is under the mask."""
    names = {id(weight): name for name, weight in masked.items()}
    for part, parameters in found.items():
        if inside := [names[id(p)] for p in parameters if id(p) in names]:
            raise MaskError(
                f"{part!r} would train {inside}, which the mask has pruned: leave the part out (an "
                "adapter reaches pruned layers), or take them out of the mask"
            )


def _linear_layers(model: nn.Module, masked: dict[str, nn.Parameter]) -> dict[str, nn.Linear]:
    """The layers of masked weights, by the weights' names."""
    modules, layers = dict(model.named_modules()), {}
    for name, weight in masked.items():
        path, _, leaf = name.rpartition(".")
        layer = modules[path]
        if not isinstance(layer, nn.Linear) or leaf != "weight":
            raise MaskError(
                f"{name!r} belongs to a {type(layer).__name__}; adapters are for the weights of "
                "torch.nn.Linear: leave them out of the parts"
            )
        owners = [m for m in modules.values() if any(p is weight for p in m._parameters.values())]
        if len(owners) > 1:
            raise MaskError(f"{name!r} is tied to another layer: untie it or leave adapters out")
        layers[name] = layer
    return layers


def _once(found: dict[str, list[nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
    """Each parameter in the first part that has it."""
    seen: set[int] = set()
    parts: dict[str, list[nn.Parameter]] = {}
    for part, parameters in found.items():
        parts[part] = [p for p in dict.fromkeys(parameters) if id(p) not in seen]
        seen |= {id(p) for p in parameters}
    return parts
