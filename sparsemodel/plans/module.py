"""A program as a torch module, for devices and executions that the runtime does not know."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from sparsemodel.errors import PlanError
from sparsemodel.runtime.program import Node, Program


class ProgramModule(nn.Module):
    """A network that computes the operations of a program, its tensors under their names.

    Args:
        program: its layers and norms become torch's own, with whatever start values.

    Raises:
        PlanError: a layer whose tensors have no path, as those of a network of one layer.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._program = program
        for number, node in enumerate(program.nodes):
            if names := node.tensors():
                path, dot, _ = names[0].rpartition(".")
                if not dot:
                    raise PlanError(f"{program.title(number)}: {names[0]!r} is of no module")
                self._place(path, _module(program, node))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, *input_shape] -> logits [N, classes]."""
        results: list[torch.Tensor] = []
        for node in self._program.nodes:
            sources = [results[i] for i in node.inputs]
            results.append(self._result(node, sources) if sources else x)
        return results[-1]

    def _result(self, node: Node, sources: list[torch.Tensor]) -> torch.Tensor:
        if node.kind not in {"conv", "norm"}:
            return _OPERATIONS[node.kind](node, *sources)
        names, y = node.tensors(), sources[0]
        module = (
            self.get_submodule(names[0].rpartition(".")[0]) if names else _norm(node, y.shape[1])
        )
        y = module(y)
        if len(sources) > 1:
            y = y + sources[1]
        return functional.relu(y) if node.relu else y

    def _place(self, path: str, module: nn.Module) -> None:
        *parents, last = path.split(".")
        holder: nn.Module = self
        for name in parents:
            if name not in holder._modules:
                holder.add_module(name, nn.Module())
            holder = holder._modules[name]  # type: ignore[assignment]
        holder.add_module(last, module)


def _module(program: Program, node: Node) -> nn.Module:
    if node.kind == "norm":
        return _norm(node, program.shapes()[node.tensors()[0]][0])
    assert node.weight is not None, "a layer has a weight"
    out, width, *kernel = program.shapes()[node.weight]
    if not kernel:
        return nn.Linear(width, out, bias=node.bias is not None)
    return nn.Conv2d(
        width * node.groups, out, (kernel[0], kernel[1]), node.stride, node.padding, node.dilation,
        groups=node.groups, bias=node.bias is not None,
    )  # fmt: skip


def _norm(node: Node, channels: int) -> nn.Module:
    return _BatchNorm(
        channels, node.eps, node.momentum,
        affine=node.weight is not None, track_running_stats=node.mean is not None,
    )  # fmt: skip


class _BatchNorm(nn.BatchNorm2d):
    """One that takes images and features alike."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass


_OPERATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "relu": lambda node, x: functional.relu(x),
    "add": lambda node, x, y: x + y,
    "max_pool": lambda node, x: functional.max_pool2d(x, node.kernel, node.stride, node.padding),
    "avg_pool": lambda node, x: functional.avg_pool2d(
        x, node.kernel, node.stride, node.padding, count_include_pad=node.include_pad
    ),
    "global_pool": lambda node, x: functional.adaptive_avg_pool2d(x, 1),
    "flatten": lambda node, x: x.flatten(1),
}
