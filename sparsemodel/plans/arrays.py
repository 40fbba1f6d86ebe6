"""Where a plan's native nodes find parameters, gradients and statistics of torch modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsemodel.errors import PlanError
from sparsemodel.kernels.cpu import native
from sparsemodel.kernels.cpu.plan_abi import ConvArrays, NativePlan, NormArrays, Parameter
from sparsemodel.kernels.csr import csr_from_mask
from sparsemodel.kernels.geometry import ConvGeometry
from sparsemodel.layers.linear_and_conv import SparseLayer
from sparsemodel.optim import SparseSGD

Tensor = torch.Tensor


class Gradient:
    """The gradient of one parameter: made once, as long as the parameter, given to `.grad`."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._gradient = torch.empty(0)

    def of(self, parameter: Tensor) -> int | None:
        """The address of the gradient of a parameter as it is now; None where it is frozen."""
        if not parameter.requires_grad:
            return None
        if self._gradient.shape != parameter.shape:
            # One element more: of an empty tensor the address would be null, which says frozen.
            self._memory = torch.zeros(parameter.numel() + 1)
            self._gradient = self._memory[:-1].view(parameter.shape)
        return self._memory.data_ptr()

    def give(self, parameter: Tensor) -> None:
        """Make it the parameter's `.grad`."""
        if parameter.requires_grad and parameter.grad is not self._gradient:
            parameter.grad = self._gradient


def _momentum(optimizer: SparseSGD, parameter: Tensor | None) -> Tensor | None:
    """A trained parameter's momentum buffer, made if there is none yet; None where none is kept."""
    if parameter is None or not parameter.requires_grad:
        return None
    if not optimizer.param_groups[0]["momentum"]:
        return None
    state = optimizer.state[parameter]
    if state.get("momentum_buffer") is None:
        state["momentum_buffer"] = torch.zeros_like(parameter)
    buffer: Tensor = state["momentum_buffer"]
    return buffer


class BoundModule:
    """A module's arrays, bound to a node of a plan; `refresh` follows them when they move."""

    _names: tuple[str, str]  # of the two parameters

    def __init__(self, plan: NativePlan, node: int, module: nn.Module, title: str) -> None:
        self._plan = plan
        self._node = node
        self._module = module
        self.title = title
        self._gradients = (Gradient(), Gradient())
        self._momenta: list[Tensor | None] = [None, None]
        self._key: tuple[Any, ...] = ()
        self._held: list[Tensor] = []

    def parameters(self) -> list[tuple[Tensor, Gradient]]:
        """The parameters that the module has, each with its gradient."""
        own = self._module._parameters
        pairs = zip(self._names, self._gradients, strict=True)
        return [(p, gradient) for name, gradient in pairs if (p := own.get(name)) is not None]

    def refresh(self, optimizer: SparseSGD | None = None) -> None:
        """Bind anew what has moved since the last call, after a mask change for instance.

        With an optimiser its momentum is bound too.
        """
        if optimizer is not None:
            own = self._module._parameters
            self._momenta = [_momentum(optimizer, own.get(name)) for name in self._names]
        tensors = [*self._tensors(), *self._momenta]
        key = tuple(
            None if t is None else (t.data_ptr(), t.shape, t.requires_grad) for t in tensors
        )
        if key != self._key:
            for tensor in tensors:
                self._check(tensor)
            self._bind()
            self._key = key
            # While aliases of the memory live, nothing else can get its address.
            self._held = [t.detach() for t in tensors if t is not None]

    def hand_over(self) -> None:
        """Give each parameter its gradient."""
        for parameter, gradient in self.parameters():
            gradient.give(parameter)

    def written(self, *, parameters: bool) -> list[Tensor]:
        """Tensors that a step writes into: statistics, and parameters that it updates."""
        if not parameters:
            return self._statistics()
        trained = [p for p, _ in self.parameters() if p.requires_grad]
        return [*trained, *self._statistics()]

    def _statistics(self) -> list[Tensor]:
        return []

    def _tensors(self) -> list[Tensor | None]:
        raise NotImplementedError

    def _bind(self) -> None:
        raise NotImplementedError

    def _check(self, tensor: Tensor | None) -> None:
        if tensor is None:
            return
        fits = tensor.dtype in {torch.float32, torch.int32, torch.int64}
        if not fits or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise PlanError(
                f"{self.title}: expected contiguous float32 parameters on the CPU, got "
                f"{tensor.dtype} of strides {tensor.stride()} on {tensor.device}"
            )
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            raise PlanError(f"{self.title} has hooks on its gradients, which a plan would not call")

    def _parameter(self, index: int) -> Parameter:
        parameter = self._module._parameters.get(self._names[index])
        if parameter is None:
            return Parameter()
        momentum = self._momenta[index]
        return Parameter(
            parameter.data_ptr() or None,
            self._gradients[index].of(parameter),
            None if momentum is None else momentum.data_ptr(),
        )


class BoundLayer(BoundModule):
    """A sparse, or a plain and so full, convolution or linear layer."""

    def __init__(
        self, plan: NativePlan, node: int, module: nn.Module, title: str, geometry: ConvGeometry
    ) -> None:
        super().__init__(plan, node, module, title)
        self._geometry = geometry
        self._sparse = isinstance(module, SparseLayer)
        self._own_index = torch.empty(0)
        self._names = ("values" if self._sparse else "weight", "bias")
        if not self._sparse:
            weight = module._parameters["weight"]
            assert weight is not None, "a layer has a weight"
            row_ptr, cols = csr_from_mask(torch.ones(weight.shape, dtype=torch.bool))
            self._full = (row_ptr, cols, native.transpose_pattern(row_ptr, cols, geometry))

    def _tensors(self) -> list[Tensor | None]:
        parameters, buffers = self._module._parameters, self._module._buffers
        own: list[Tensor | None] = [parameters.get(name) for name in self._names]
        return [*own, buffers["row_ptr"], buffers["cols"]] if self._sparse else own

    def _bind(self) -> None:
        row_ptr, cols, transposed = self._pattern()
        index = native.index_parts(transposed, len(cols))
        self._plan.bind_conv(
            self._node,
            ConvArrays(
                row_ptr.data_ptr(), cols.data_ptr(), *index, self._parameter(0),
                self._parameter(1),
            ),
        )  # fmt: skip

    def _pattern(self) -> tuple[Tensor, Tensor, Tensor]:
        if not self._sparse:
            return self._full
        row_ptr, cols, transposed = (
            self._module._buffers[name] for name in ("row_ptr", "cols", "transposed")
        )
        assert row_ptr is not None
        assert cols is not None
        assert transposed is not None
        if transposed.numel() == 0:  # where the layer itself computes densely
            transposed = native.transpose_pattern(row_ptr, cols, self._geometry)
            self._own_index = transposed
        return row_ptr, cols, transposed


class BoundNorm(BoundModule):
    """A batch norm."""

    _names = ("weight", "bias")
    _buffers = ("running_mean", "running_var", "num_batches_tracked")

    def _statistics(self) -> list[Tensor]:
        own = self._module._buffers
        return [b for name in self._buffers if (b := own[name]) is not None]

    def _tensors(self) -> list[Tensor | None]:
        parameters, buffers = self._module._parameters, self._module._buffers
        return [
            *(parameters.get(name) for name in self._names),
            *(buffers[name] for name in self._buffers),
        ]

    def _bind(self) -> None:
        buffers = (self._module._buffers[name] for name in self._buffers)
        addresses = [None if b is None else b.data_ptr() for b in buffers]
        self._plan.bind_norm(
            self._node, NormArrays(self._parameter(0), self._parameter(1), *addresses)
        )
