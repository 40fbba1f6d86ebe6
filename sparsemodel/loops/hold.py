"""A mask that survives whatever a training loop does: any optimiser, precision or wrapper."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from sparsemodel.errors import MaskError
from sparsemodel.masks.mask import Mask, check_shape

COMPILED = "_orig_mod"  # torch.compile's name of the module inside


class HeldMask:
    """While it is held, pruned weights are exactly zero after each step of the optimisers.

    At birth it sets pruned weights and what the optimisers remember of them (momentum, moments) to
    zero. From then on their gradients are zero before anything else sees them, so that clipping,
    loss scaling and the sums of several processes go by the active weights alone; and the weights
    are set to zero again after each step, whatever the optimiser did. The model stays dense: to
    train in the memory of the active weights, train what `sparsify` gives.

    Release it (or use it in a `with` block) before the model is sparsified.

    Args:
        model: may be wrapped by DistributedDataParallel, DataParallel or torch.compile, and may
            hold the model that was pruned as a part (a LightningModule).
        mask: which weights exist.
        optimizers: those that step on the weights.

    Raises:
        MaskError: the mask does not fit the model, nor one part of it alone.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    >>> with HeldMask(model, Mask({"weight": torch.tensor([[True, False]])}), optimizer):
    ...     model(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()
    >>> model.weight[0, 1].item()
    0.0
    """

    def __init__(self, model: nn.Module, mask: Mask, *optimizers: Optimizer) -> None:
        weights = masked_weights(model, mask)
        pairs = [(weight, ~mask[name].to(weight.device)) for name, weight in weights.items()]
        _zero(pairs)
        for optimizer in optimizers:
            _forget(optimizer, pairs)
        handles = [
            weight.register_hook(_Masked(pruned))
            for weight, pruned in pairs
            if weight.requires_grad
        ]
        handles += [o.register_step_post_hook(lambda *_: _zero(pairs)) for o in optimizers]
        # The hooks hold weights, never this object, so they go when it does, released or not.
        self._detach = weakref.finalize(self, _call_all, [handle.remove for handle in handles])

    def release(self) -> None:
        """Remove the hooks; the weights stay as they are."""
        self._detach()

    def __enter__(self) -> HeldMask:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def masked_weights(model: nn.Module, mask: Mask) -> dict[str, nn.Parameter]:
    """The weights that a mask is of, by the mask's names.

    Raises:
        MaskError: neither the model nor exactly one part of it has them all, in the mask's shapes.
    """
    parameters = dict(_bare_parameters(model))
    names = {name: name.replace(f"{COMPILED}.", "") for name in mask}
    fitting = _places(parameters, list(names.values()))
    if not fitting:  # a mask of what DistributedDataParallel gave
        names = {name: own.removeprefix("module.") for name, own in names.items()}
        fitting = _places(parameters, list(names.values()))
    if not fitting:
        missing = [name for name in names.values() if name not in parameters]
        raise MaskError(
            f"the mask does not fit {type(model).__name__}: it has no parameters {missing[:4]} "
            f"(of {len(names)} that the mask names); it has {list(parameters)[:4]}, ...: give the "
            "mask that was made of this model, or of one part of it"
        )
    if len(fitting) > 1:
        raise MaskError(
            f"the mask fits {len(fitting)} parts of {type(model).__name__}: {fitting}; make one of "
            "the whole model"
        )
    weights = {name: parameters[fitting[0] + own] for name, own in names.items()}
    for name, weight in weights.items():
        check_shape(name, weight, tuple(mask[name].shape))
        if hasattr(weight, "placements"):
            raise MaskError(
                f"the weight {name!r} is cut over several processes (FSDP, tensor parallel), and a "
                "mask is held on whole weights alone: train by DistributedDataParallel"
            )
    return weights


def _places(parameters: Mapping[str, nn.Parameter], names: list[str]) -> list[str]:
    """What to put before the names so that all of them are parameters: nothing, where that does."""
    first = names[0]
    starts = [name.removesuffix(first) for name in parameters if f".{name}".endswith(f".{first}")]
    fitting = [start for start in starts if all(start + name in parameters for name in names)]
    return [""] if "" in fitting else fitting


def _bare_parameters(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the names that they have without wrappers; tied ones by each of theirs."""
    for name, parameter in model.named_parameters(recurse=False):
        yield path + name, parameter
    for name, part in model.named_children():
        is_wrapped = name == COMPILED or isinstance(model, DistributedDataParallel | DataParallel)
        yield from _bare_parameters(part, path if is_wrapped else f"{path}{name}.")


class _Masked:
    """A gradient with zeros at the pruned places; not by multiplication: 0 * inf is no number."""

    def __init__(self, pruned: Tensor) -> None:
        self._pruned = pruned

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient.masked_fill(self._pruned, 0.0)


@torch.no_grad()
def _zero(pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
    for weight, pruned in pairs:
        weight.masked_fill_(pruned, 0.0)


@torch.no_grad()
def _forget(optimizer: Optimizer, pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Zero what an optimiser remembers of each pruned weight."""
    for weight, pruned in pairs:
        remembered: dict[str, Any] = optimizer.state.get(weight, {})
        for value in remembered.values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value.masked_fill_(pruned, 0.0)


def _call_all(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()
