"""From a model to the list of operations that a training plan runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch import fx, nn

from sparsemodel.errors import PlanError, SparseModelError
from sparsemodel.layers.tracing import has_hooks, is_leaf, trace_forward
from sparsemodel.plans.rules import Operation, Translator, module_title
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
            called twice, or a model that torch.fx cannot trace.
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
    for name, module in model.named_modules():
        if has_hooks(module):
            raise PlanError(f"{module_title(name, module)} has hooks, which a plan would not call")
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
    operations = list(operations)
    users = Counter(i for operation in operations for i in set(operation.inputs))
    gone = set()

    def plain_norm(number: int) -> bool:
        norm = operations[number]
        return norm.kind == "norm" and not norm.relu and users[number] == 1

    for number, operation in enumerate(operations):
        inputs = operation.inputs
        if operation.kind == "add" and inputs[0] != inputs[1]:
            norms = [i for i in inputs if plain_norm(i) and len(operations[i].inputs) == 1]
            if norms:
                norm = operations[norms[0]]
                residual = inputs[1] if inputs[0] == norms[0] else inputs[0]
                operations[number] = replace(norm, inputs=(norm.inputs[0], residual))
                gone.add(norms[0])
        elif operation.kind == "relu" and plain_norm(inputs[0]):
            operations[number] = replace(operations[inputs[0]], relu=True)
            gone.add(inputs[0])
    return _renumbered(operations, [n for n in range(len(operations)) if n not in gone])
