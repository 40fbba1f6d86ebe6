"""Optimisers whose gradients and state are as sparse as the weights.

`MaskedSGD` works on a dense model under a mask, `SparseSGD` and `SparseAdam` on the parameters of
a sparsified one (or of any model).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.kernels import reference
from sparsemodel.kernels.cpu import native
from sparsemodel.kernels.cuda import array_ops as cuda_array_ops
from sparsemodel.kernels.cuda import launch as cuda
from sparsemodel.masks.mask import Mask
from sparsemodel.storage.meter import storage_bytes


class MaskedSGD:
    """Stochastic gradient descent with momentum that stores only what belongs to active weights.

    While it is open, a hook on each masked parameter moves the gradient at the active weights
    into a vector of that many values and frees the dense gradient at once, so `.grad` of masked
    parameters is always None and one dense layer gradient at most is alive in a backward pass.
    Gradients of several backward passes add up until `zero_grad`. The updates equal those of
    torch.optim.SGD on a masked model with masked gradients; pruned weights stay exactly zero.
    Parameters without a mask, and layers whose mask is full, take the plain dense path; those
    with requires_grad off are left alone.

    Close it (or use it in a `with` block) before another optimiser or
    `topk_pruned_gradients` works on the same model.

    Args:
        model: its pruned weights must be zero (`mask.apply(model)`), its weights contiguous.
        mask: which weights exist; None for a dense model.
        lr: learning rate, >= 0; may be set anew between steps.
        momentum: in [0, 1); 0 keeps no momentum.
        weight_decay: L2 penalty on the active weights, >= 0.

    Raises:
        MaskError: the mask does not fit the model, or a pruned weight is not zero.
        SparseModelError: a number outside its range.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> mask = Mask({"weight": torch.tensor([[True, False]])})
    >>> mask.apply(model)
    >>> with MaskedSGD(model, mask, lr=0.1) as optimizer:
    ...     model(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()
    >>> model.weight[0, 1].item()
    0.0
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Mask | None,
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        if not (lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0):
            raise SparseModelError(
                "expected lr >= 0, momentum in [0, 1) and weight_decay >= 0, "
                f"got {lr}, {momentum} and {weight_decay}"
            )
        self.lr = lr
        self._momentum = momentum
        self._weight_decay = weight_decay
        parameters = dict(model.named_parameters())
        missing = [name for name in mask or () if name not in parameters]
        if missing:
            raise MaskError(f"the model has no parameters {missing} that the mask names")
        self._slots = [
            _Slot(parameter, _active_indices(name, parameter, mask))
            for name, parameter in parameters.items()
            if parameter.requires_grad
        ]
        self._names = [name for name, p in parameters.items() if p.requires_grad]
        self._frozen = [p for p in parameters.values() if not p.requires_grad]
        # The hooks hold slots, never this object, so they go when it does, closed or not.
        removals = [slot.attach() for slot in self._slots if slot.indices is not None]
        self._detach = weakref.finalize(self, _call_all, removals)

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights; parameters that got no gradient stay as they are."""
        for slot in self._slots:
            slot.update(lr=self.lr, momentum=self._momentum, weight_decay=self._weight_decay)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for slot in self._slots:
            slot.gradient = None
            slot.parameter.grad = None

    def gradients(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Name -> (values, gradient) of each parameter that has one, before the step.

        Of masked parameters those of the active weights, [nnz], and the values are a copy; a
        gradient changed in place is what `step` takes.
        """
        found = {}
        for name, slot in zip(self._names, self._slots, strict=True):
            gradient = slot.parameter.grad if slot.indices is None else slot.gradient
            if gradient is not None:
                found[name] = slot.values(), gradient
        return found

    def state_bytes(self) -> dict[str, int]:
        """Bytes of storage held now, by kind: weights, gradients, momentum and indices.

        Weights are those of the whole model, whose masked layers are stored dense.
        """
        slots = self._slots
        parameters = [*(slot.parameter for slot in slots), *self._frozen]
        gradients = [*(slot.gradient for slot in slots), *(p.grad for p in parameters)]
        return {
            "weights": storage_bytes(parameters),
            "gradients": storage_bytes(gradients),
            "momentum": storage_bytes(slot.momentum for slot in slots),
            "indices": storage_bytes(slot.indices for slot in slots),
        }

    def close(self) -> None:
        """Remove the hooks: gradients of later backward passes are dense again."""
        self._detach()

    def __enter__(self) -> MaskedSGD:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class SparseSGD(torch.optim.Optimizer):
    """Stochastic gradient descent with momentum; one native pass over each parameter.

    Takes a sparsified model's parameters like any others. Updates and state are those of
    torch.optim.SGD (dampening 0, no Nesterov), whose state dicts it reads and writes.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, >= 0.
        momentum: in [0, 1); 0 keeps no momentum.
        weight_decay: L2 penalty, >= 0.

    Raises:
        SparseModelError: a number outside its range.

    >>> weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> weight.grad = torch.tensor([1.0, 0.0])
    >>> SparseSGD([weight], lr=0.5).step()
    >>> weight.tolist()
    [0.5, 2.0]
    """

    def __init__(
        self, params: ParamsT, *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        if not (lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0):
            raise SparseModelError(
                "expected lr >= 0, momentum in [0, 1) and weight_decay >= 0, "
                f"got {lr}, {momentum} and {weight_decay}"
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient; returns what `closure` returned, if any."""
        loss = _evaluated(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(
        self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]
    ) -> None:
        lr, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
        buffer = self.state[parameter].get("momentum_buffer")
        if momentum and buffer is None:
            buffer = torch.zeros_like(parameter)
            self.state[parameter]["momentum_buffer"] = buffer
        buffer = buffer if momentum else None
        if _by_kernel(parameter, gradient, buffer):
            cuda_array_ops.sgd_step(parameter, gradient, buffer, lr, momentum, decay)
        elif _native(parameter, gradient, buffer):
            native.library().sgd_step(
                parameter.numel(), parameter.data_ptr(), gradient.data_ptr(),
                None if buffer is None else native.address(buffer), lr, momentum, decay,
                torch.get_num_threads(),
            )  # fmt: skip
        else:
            reference.sgd_step(parameter, gradient, buffer, lr, momentum, decay)
            return
        torch.autograd.graph.increment_version(parameter)


class SparseAdam(torch.optim.Optimizer):
    """Adam, or AdamW with `decoupled`; one native pass over each parameter.

    Takes a sparsified model's parameters like any others. Updates and state are those of
    torch.optim.Adam and AdamW (no AMSGrad), whose state dicts it reads and writes. It is no
    relation of torch.optim.SparseAdam, which is for embeddings.
    Sources: Kingma and Ba (ICLR 2015); Loshchilov and Hutter (ICLR 2019).

    Args:
        params: parameters or parameter groups.
        lr: learning rate, >= 0.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: >= 0.
        decoupled: whether weight decay shrinks the weights (AdamW) or is added to the gradient.

    Raises:
        SparseModelError: a number outside its range.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= b < 1 for b in betas)):
            raise SparseModelError(
                "expected lr, eps and weight_decay >= 0 and betas in [0, 1), "
                f"got {lr}, {eps}, {weight_decay} and {betas}"
            )
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**numbers, "decoupled": decoupled})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient; returns what `closure` returned, if any."""
        loss = _evaluated(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(
        self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step, mean, square = int(state["step"]), state["exp_avg"], state["exp_avg_sq"]
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        eps, decay, decoupled = group["eps"], group["weight_decay"], group["decoupled"]
        numbers = lr, beta1, beta2, eps, decay, decoupled, step
        if _by_kernel(parameter, gradient, mean, square):
            cuda_array_ops.adam_step(parameter, gradient, mean, square, *numbers)
        elif _native(parameter, gradient, mean, square):
            native.library().adam_step(
                parameter.numel(), parameter.data_ptr(), gradient.data_ptr(), mean.data_ptr(),
                square.data_ptr(), *numbers, torch.get_num_threads(),
            )  # fmt: skip
        else:
            reference.adam_step(parameter, gradient, mean, square, *numbers)
            return
        torch.autograd.graph.increment_version(parameter)


def _evaluated(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _native(parameter: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the native step takes a parameter with its gradient and state."""
    return native.reaches(parameter) and all(
        t is None or (native.reaches(t) and t.is_contiguous()) for t in (parameter, *others)
    )


def _by_kernel(parameter: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the CUDA kernels step a parameter with its gradient and state."""
    return cuda.runner(parameter.device) is not None and all(
        t is None
        or (t.dtype == torch.float32 and t.device == parameter.device and t.is_contiguous())
        for t in (parameter, *others)
    )


class _Slot:
    """One parameter with its gradient and momentum; `indices` is None on the dense path."""

    def __init__(self, parameter: nn.Parameter, indices: torch.Tensor | None) -> None:
        self.parameter = parameter
        self.indices = indices
        self.gradient: torch.Tensor | None = None
        self.momentum: torch.Tensor | None = None

    def attach(self) -> Callable[[], None]:
        """Gather the gradient that is there and every later one, until the result is called."""
        if self.parameter.grad is not None:
            self.gather(self.parameter)
        handle = self.parameter.register_post_accumulate_grad_hook(self.gather)
        remove: Callable[[], None] = handle.remove
        return remove

    def gather(self, parameter: torch.Tensor) -> None:
        """Add the gradient at the active weights to the compact one and free the dense one."""
        dense, parameter.grad = parameter.grad, None
        if dense is None:
            raise MaskError(
                "a gradient was taken by another hook; close the earlier MaskedSGD of this model "
                "before making a new one"
            )
        assert self.indices is not None, "dense parameters have no hook"
        values = dense.reshape(-1).index_select(0, self.indices)
        self.gradient = values if self.gradient is None else self.gradient.add_(values)

    def values(self) -> torch.Tensor:
        """The parameter, detached; of a masked one a copy of its active weights."""
        weight = self.parameter.detach()
        return weight if self.indices is None else weight.view(-1).index_select(0, self.indices)

    def update(self, *, lr: float, momentum: float, weight_decay: float) -> None:
        """One step, in the order of operations of torch.optim.SGD."""
        weight, indices = self.parameter, self.indices
        gradient = weight.grad if indices is None else self.gradient
        if gradient is None:
            return
        if weight_decay:
            values = weight if indices is None else weight.view(-1).index_select(0, indices)
            gradient = gradient.add(values, alpha=weight_decay)
        if momentum:
            if self.momentum is None:
                self.momentum = gradient.clone()
            else:
                self.momentum.mul_(momentum).add_(gradient)
            gradient = self.momentum
        if indices is None:
            weight.add_(gradient, alpha=-lr)
        else:
            weight.view(-1).index_add_(0, indices, gradient, alpha=-lr)


def _active_indices(name: str, weight: nn.Parameter, mask: Mask | None) -> torch.Tensor | None:
    """Flat indices of the active weights, or None where all weights are active."""
    if mask is None or name not in mask:
        return None
    pattern = mask[name]
    if pattern.shape != weight.shape:
        raise MaskError(
            f"mask of {name!r} has shape {tuple(pattern.shape)}, its weight {tuple(weight.shape)}"
        )
    if not weight.is_contiguous():
        raise MaskError(f"the weight {name!r} is not contiguous; make it so before training")
    if weight.detach()[~pattern.to(weight.device)].count_nonzero():
        raise MaskError(f"pruned weights of {name!r} are not zero; call mask.apply(model) first")
    if pattern.all():
        return None
    dtype = torch.int32 if pattern.numel() < 2**31 else torch.int64
    return mask.active(name).to(device=weight.device, dtype=dtype)


def _call_all(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()
