"""What ties a program's arrays to torch modules: shared memory, followed when it moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sparsemodel.errors import PlanError
from sparsemodel.layers.gate import has_hooks, module_title
from sparsemodel.layers.linear_and_conv import SparseLayer
from sparsemodel.optim import SparseSGD
from sparsemodel.runtime.bound import BoundProgram, LayerArrays, ParameterArrays, layer_geometry
from sparsemodel.runtime.pattern import Pattern
from sparsemodel.runtime.structures import Structure, shared_structures

Tensor = torch.Tensor
Array = NDArray[Any]


class Gradient:
    """The gradient of one parameter: made once, as long as the parameter, given to `.grad`."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.float32)
        self._gradient = torch.empty(0)

    def of(self, parameter: Tensor) -> Array | None:
        """The gradient of a parameter as it is now; None where it is frozen."""
        if not parameter.requires_grad:
            return None
        if self._gradient.shape != parameter.shape:
            # One element more: of an empty array the address may be null, which says frozen.
            self._memory = np.zeros(parameter.numel() + 1, np.float32)
            self._gradient = torch.from_numpy(self._memory[:-1]).view(parameter.shape)
        return self._memory[:-1]

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
    """A module's arrays, bound to a node of a program; `refresh` follows them when they move."""

    _names: tuple[str, str]  # of the two parameters

    def __init__(self, plan: BoundProgram, node: int, module: nn.Module, title: str) -> None:
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

    def refresh(self, optimizer: SparseSGD | None = None) -> bool:
        """Bind anew what has moved since the last call, after a mask change for instance.

        With an optimiser its momentum is bound too.

        Returns:
            Whether anything had moved.
        """
        if optimizer is not None:
            own = self._module._parameters
            self._momenta = [_momentum(optimizer, own.get(name)) for name in self._names]
        tensors = [*self._tensors(), *self._momenta]
        key = tuple(
            None if t is None else (t.data_ptr(), t.shape, t.requires_grad, has_hooks(t))
            for t in tensors
        )
        if key == self._key:
            return False
        for tensor in tensors:
            self._check(tensor)
        self._bind()
        self._key = key
        # While aliases of the memory live, nothing else can get its address.
        self._held = [t.detach() for t in tensors if t is not None]
        return True

    def check_mode(self, training: bool) -> None:
        """Refuse a batch norm that is in another mode than the model.

        Raises:
            PlanError: it is.
        """

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
                f"{self.title!r}: expected contiguous float32 parameters on the CPU, got "
                f"{tensor.dtype} of strides {tensor.stride()} on {tensor.device}"
            )
        if has_hooks(tensor):
            raise PlanError(
                f"{self.title!r} has hooks on its gradients, which a plan would not call"
            )

    def _parameter(self, index: int) -> ParameterArrays | None:
        parameter = self._module._parameters.get(self._names[index])
        if parameter is None:
            return None
        gradient = self._gradients[index].of(parameter)
        momentum = self._momenta[index]
        return ParameterArrays(
            _shared(parameter), gradient, None if momentum is None else _shared(momentum)
        )


class BoundLayer(BoundModule):
    """A sparse, or a plain and so full, convolution or linear layer."""

    def __init__(self, plan: BoundProgram, node: int, module: nn.Module, title: str) -> None:
        super().__init__(plan, node, module, title)
        self._sparse = isinstance(module, SparseLayer)
        self._names = ("values" if self._sparse else "weight", "bias")
        self._geometry = layer_geometry(plan.program, node, 1)

    def _tensors(self) -> list[Tensor | None]:
        parameters, buffers = self._module._parameters, self._module._buffers
        own: list[Tensor | None] = [parameters.get(name) for name in self._names]
        return [*own, buffers["row_ptr"], buffers["cols"]] if self._sparse else own

    def _bind(self) -> None:
        weight = self._parameter(0)
        assert weight is not None, "a layer has a weight"
        self._plan.bind_layer(self._node, LayerArrays(*self._pattern(), weight, self._parameter(1)))

    def _pattern(self) -> tuple[Array, Array, Array]:
        """Rows, columns and the index by input."""
        if not isinstance(self._module, SparseLayer):
            weight = self._module._parameters["weight"]
            assert weight is not None, "a layer has a weight"
            full = shared_structures.full(tuple(weight.shape), self._geometry)
            return full.pattern.row_ptr, full.pattern.cols, full.index()
        layer = self._module
        row_ptr, cols, transposed = (
            _shared(t) for t in (layer.row_ptr, layer.cols, layer.transposed)
        )
        if not transposed.size:  # where the layer itself computes densely
            pattern = Pattern(tuple(layer.weight_shape), row_ptr, cols)
            transposed = Structure(pattern, self._geometry).index()
        return row_ptr, cols, transposed


class BoundNorm(BoundModule):
    """A batch norm."""

    _names = ("weight", "bias")
    _buffers = ("running_mean", "running_var", "num_batches_tracked")

    def check_mode(self, training: bool) -> None:
        if self._module.training != training:
            raise PlanError(
                f"{module_title(self.title, self._module)} is in another mode than the model; a "
                "plan trains all batch norms"
            )

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
        mean, variance, batches = (None if b is None else _shared(b) for b in buffers)
        self._plan.bind_norm(
            self._node, self._parameter(0), self._parameter(1), (mean, variance, batches)
        )


def _shared(tensor: Tensor) -> Array:
    """A tensor's memory as an array."""
    return tensor.detach().numpy()
