"""From a model to the list of operations that a training plan runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch import fx, nn

from sparsemodel.errors import PlanError, SparseModelError
from sparsemodel.layers.gate import check_plain, module_title
from sparsemodel.layers.norm_fusion import find_fusions
from sparsemodel.layers.tracing import is_leaf, trace_forward
from sparsemodel.plans.rules import Operation, Translator
from sparsemodel.runtime.pattern import Shape


def trace_operations(model: nn.Module, input_shape: Shape) -> list[Operation]:
    """The operations of one forward pass, batch norm fused with addition and ReLU.

    Args:
        model: takes one tensor [B, *input_shape] and returns logits [B, classes].
        input_shape: (C, H, W) or (features,).

    Returns:
        Operations in the order in which they run; the last one gives the logits.

    Raises:
        PlanError: an operation that plans do not know, named in the message, a module that is
            called twice, hooks or parameters in the same memory, or a model that cannot be traced.
    """
    training = model.training
    if is_leaf(model):
        model = nn.Sequential(model)
    graph = _graph(model)
    operations, output = Translator(dict(model.named_modules()), input_shape).run(graph)
    for operation in operations:
        if operation.kind == "norm" and operation.module and operation.module.training != training:
            raise PlanError(
                f"{module_title(operation.name, operation.module)} is in another mode than the "
                "model; a plan trains all batch norms"
            )
    shape = operations[output].shape
    if len(shape) != 1:
        raise PlanError(f"expected logits [B, classes], got an output of shape [B, *{shape}]")
    return _fused(_live(operations, output))


def _graph(model: nn.Module) -> fx.Graph:
    check_plain(model, PlanError)
    try:
        return trace_forward(model)
    except SparseModelError as error:
        raise PlanError(str(error)) from error


def _live(operations: list[Operation], output: int) -> list[Operation]:
    """The operations that the output needs, if leaving out the others changes nothing."""
    needed = {output}
    for number in range(output, -1, -1):
        if number in needed:
            needed.update(operations[number].inputs)
    for number, operation in enumerate(operations):
        if number not in needed and operation.kind == "norm":
            raise PlanError(f"the result of the batch norm {operation.name!r} is not used")
    return _renumbered(operations, sorted(needed))


def _renumbered(operations: list[Operation], order: list[int]) -> list[Operation]:
    place = {number: index for index, number in enumerate(order)}
    return [
        replace(operations[number], inputs=tuple(place[i] for i in operations[number].inputs))
        for number in order
    ]


def _fused(operations: list[Operation]) -> list[Operation]:
    """Batch norm, an addition to it and the ReLU of that as one operation."""
    fused = list(operations)
    gone = set()
    for fusion in find_fusions(range(len(operations)), _View(operations)):
        norm, inputs = operations[fusion.norm], operations[fusion.norm].inputs
        if fusion.addition is not None:
            inputs += tuple(i for i in operations[fusion.addition].inputs if i != fusion.norm)
        fused[fusion.last] = replace(norm, inputs=inputs, relu=fusion.relu is not None)
        gone |= {n for n in (fusion.norm, fusion.addition, fusion.relu) if n is not None}
        gone -= {fusion.last}
    return _renumbered(fused, [n for n in range(len(fused)) if n not in gone])


class _View:
    """A list of operations, as `find_fusions` looks at it."""

    def __init__(self, operations: list[Operation]) -> None:
        self._operations = operations
        self._users = Counter(i for operation in operations for i in set(operation.inputs))

    def is_norm(self, number: int) -> bool:
        return self._operations[number].kind == "norm" and self._users[number] == 1

    def summands(self, number: int) -> tuple[int, ...]:
        inputs = self._operations[number].inputs
        is_sum = self._operations[number].kind == "add" and inputs[0] != inputs[1]
        return inputs if is_sum else ()

    def before_relu(self, number: int) -> int | None:
        operation = self._operations[number]
        if operation.kind != "relu" or self._users[operation.inputs[0]] != 1:
            return None
        return operation.inputs[0]
