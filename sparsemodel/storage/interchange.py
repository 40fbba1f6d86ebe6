"""Formats of others: a dense model as bytes, and a function that computes what the bytes say."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsemodel.errors import ExportError

METADATA = "metadata.json"  # in a program's file
MAX_ONNX_BYTES = 2**31 - 1  # of one protobuf message


@dataclass(frozen=True)
class Arguments:
    """What a model is called with: arguments by place, or by name."""

    args: tuple[Any, ...]
    named: Mapping[str, Any]

    @classmethod
    def named_in_order(cls, model: nn.Module, named: Mapping[str, Any]) -> Arguments:
        """Named arguments in the order of forward's own, in which programs have them."""
        order = list(inspect.signature(model.forward).parameters)
        known = sorted((n for n in named if n in order), key=order.index)
        return cls((), {n: named[n] for n in [*known, *(n for n in named if n not in order)]})

    def tensors(self) -> list[Tensor]:
        """All tensors, in order."""
        leaves = pytree.tree_leaves((self.args, dict(self.named)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def map(self, function: Callable[[Tensor], Any]) -> Arguments:
        """The same with a function's result in the place of every tensor."""
        return self._mapped(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf)

    def dimensions(self, batch: Any) -> Arguments:
        """What is free in shapes: the batch, and the length of texts if the model allows it."""

        def free(leaf: Any) -> dict[int, Any] | None:
            if not isinstance(leaf, Tensor):
                return None
            is_text = leaf.dim() == 2 and not leaf.is_floating_point()
            return {0: batch, 1: torch.export.Dim.AUTO} if is_text else {0: batch}

        return self._mapped(free)

    def _mapped(self, function: Callable[[Any], Any]) -> Arguments:
        return Arguments(*pytree.tree_map(function, (self.args, dict(self.named))))


Run = Callable[[Arguments], list[Tensor]]


class Format(NamedTuple):
    """How a model becomes bytes, and how bytes are run.

    Attributes:
        suffix: of its files.
        encode: (dense model in evaluation mode, a batch to trace it by, metadata) -> bytes.
        decode: (bytes, the dense model they were made of) -> what computes by the bytes.
    """

    suffix: str
    encode: Callable[[nn.Module, Arguments, Mapping[str, str]], bytes]
    decode: Callable[[bytes, nn.Module], Run]


def _safetensors(model: nn.Module, _: Arguments, metadata: Mapping[str, str]) -> bytes:
    data: bytes = safetensors.torch.save(_state(model), metadata=dict(metadata) or None)
    return data


def _torch_file(model: nn.Module, _: Arguments, __: Mapping[str, str]) -> bytes:
    file = io.BytesIO()
    torch.save(_state(model), file)
    return file.getvalue()


def _from_safetensors(data: bytes, model: nn.Module) -> Run:
    return _loaded(safetensors.torch.load(data), model)


def _from_torch_file(data: bytes, model: nn.Module) -> Run:
    return _loaded(torch.load(io.BytesIO(data), weights_only=True), model)


def _program(model: nn.Module, batch: Arguments, metadata: Mapping[str, str]) -> bytes:
    file = io.BytesIO()
    beside = {METADATA: json.dumps(dict(metadata))}
    with _quiet():
        torch.export.save(_exported(model, batch, _free(model, batch)), file, extra_files=beside)
    return file.getvalue()


def _from_program(data: bytes, _: nn.Module) -> Run:
    with _quiet():
        return _running(torch.export.load(io.BytesIO(data)).module())


def _onnx(model: nn.Module, batch: Arguments, metadata: Mapping[str, str]) -> bytes:
    try:
        import onnx  # noqa: F401, PLC0415
        import onnxscript  # noqa: F401, PLC0415
    except ImportError as error:
        raise ExportError(
            f"the format onnx needs {error.name}: pip install 'fedprune[export]'"
        ) from error
    num_bytes = sum(t.numel() * t.element_size() for t in _state(model).values())
    if num_bytes > MAX_ONNX_BYTES:
        raise ExportError(
            f"the model has {num_bytes:,} bytes, and one ONNX file holds {MAX_ONNX_BYTES:,}; "
            "export it as program"
        )
    free = _free(model, batch)
    with _quiet():
        program = _exported(model, batch, free)
        made: Any = torch.onnx.export(program, dynamo=True, verbose=False, dynamic_shapes=free)
    proto = made.model_proto
    for key, value in sorted(metadata.items()):
        proto.metadata_props.add(key=key, value=value)
    data: bytes = proto.SerializeToString()
    return data


def _from_onnx(data: bytes, _: nn.Module) -> Run:
    try:
        import onnxruntime  # noqa: PLC0415
    except ImportError:  # the slow reference computes the same
        from onnx.reference import ReferenceEvaluator  # noqa: PLC0415

        session = ReferenceEvaluator(data)
        names = session.input_names
    else:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]

    def run(batch: Arguments) -> list[Tensor]:
        tensors = batch.tensors()
        if len(names) != len(tensors):
            raise ExportError(
                f"the ONNX model has the inputs {', '.join(names)}, the example {len(tensors)}"
            )
        found = session.run(None, dict(zip(names, (t.numpy() for t in tensors), strict=True)))
        return [torch.as_tensor(value) for value in found]

    return run


FORMATS: dict[str, Format] = {
    "dense": Format(".safetensors", _safetensors, _from_safetensors),
    "torch": Format(".pt", _torch_file, _from_torch_file),
    "onnx": Format(".onnx", _onnx, _from_onnx),
    "program": Format(".pt2", _program, _from_program),
}


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict in memory of its own: tied weights under each of their names."""
    return {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }


def _loaded(state: Mapping[str, Tensor], model: nn.Module) -> Run:
    """A copy of the model that knows nothing but a state."""
    fresh = copy.deepcopy(model)
    for tensor in fresh.state_dict().values():
        tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.zero_()
    fresh.load_state_dict(state)
    return _running(fresh)


def _running(model: nn.Module) -> Run:
    return lambda batch: outputs_of(model, batch)


def outputs_of(model: nn.Module, batch: Arguments) -> list[Tensor]:
    """All tensors of what a model gives, in their order."""
    leaves = pytree.tree_leaves(model(*batch.args, **batch.named))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _exported(
    model: nn.Module, batch: Arguments, shapes: Mapping[str, Any]
) -> torch.export.ExportedProgram:
    return torch.export.export(model, batch.args, dict(batch.named), dynamic_shapes=dict(shapes))


def _free(model: nn.Module, batch: Arguments) -> dict[str, Any]:
    """By the names of forward's arguments: the first dimension has any size from one up."""
    size = torch.export.Dim("batch", min=1)
    shapes = batch.dimensions(size)
    return {**inspect.signature(model.forward).bind_partial(*shapes.args).arguments, **shapes.named}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters say of themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
