"""Models in the formats of others, each read again and compared before it is put in place.

What is sparse becomes dense here, with zeros at pruned weights: other formats know no sparse
layers. This is for a server or a desktop, not for a client.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsemodel.errors import ExportError
from sparsemodel.layers.sparsify import densify
from sparsemodel.masks.probe import probing
from sparsemodel.storage.files import write_atomically
from sparsemodel.storage.header import check_metadata
from sparsemodel.storage.interchange import FORMATS, Arguments, Run, outputs_of

TOLERANCE = 1e-5
"""How far outputs may differ, as a share of the largest."""


@dataclass(frozen=True)
class Exported:
    """What `export` left.

    Attributes:
        path: the file.
        format: its name in FORMATS.
        num_bytes: of the file.
        difference: largest difference of an output from the model's.
    """

    path: Path
    format: str
    num_bytes: int
    difference: float


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example: Any,
    format: str | None = None,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> Exported:
    """Write a model, sparse or dense, in a format that others read; it has been checked then.

    The file's content is read again and run on the example, on its first sample alone and on the
    example twice over; every output is the model's to 1e-5 of the largest. The batch may have any
    size in all formats, and texts (whole numbers [B, T]) any length where the model allows it. The
    model is exported in evaluation mode, and stays as it is.

    Args:
        path: the file; its folder must exist.
        example: what the model is called with: a tensor, a tuple of arguments, or a mapping of
            named ones. The first dimension of every tensor is the batch.
        format: "dense" (safetensors of the whole state), "torch" (a state dict for
            `torch.load(path, weights_only=True)`), "onnx" or "program" (`torch.export.load`). By
            default what the path's ending says: .safetensors, .pt, .onnx, .pt2.
        metadata: strings to store beside the model, wherever the format has room for them ("torch"
            has none).
        force: replace the file that is there.

    Raises:
        ExportError: an unknown format, a file that is there, a model that the format cannot hold,
            outputs that differ (says by how much and where), or a package that is missing.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> path = getfixture("tmp_path") / "model.pt"
    >>> export(model, path, example=torch.ones(3, 4)).difference
    0.0
    >>> sorted(torch.load(path, weights_only=True))
    ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    path = Path(path)
    name = format_of(path, format)
    check_free(path, force=force)
    check_metadata(path, metadata or {})
    inputs = _inputs(model, example)
    # On the processor, where numbers are those of every machine.
    given = model if _is_on_cpu(model) else copy.deepcopy(model).cpu()
    dense = densify(given).eval()
    encode, decode = FORMATS[name].encode, FORMATS[name].decode
    with torch.no_grad():
        try:
            with probing(given):
                given.eval()
                batches = _batches(inputs)
                expected = [outputs_of(given, batch) for batch in batches]
        except Exception as error:  # whatever the model's own code raises
            raise ExportError(
                f"{type(model).__name__} cannot be run on the example: {_first(error)}"
            ) from error
        try:
            data = encode(dense, batches[-1], metadata or {})
            run = decode(data, dense)
        except ExportError:
            raise
        except Exception as error:  # exporters raise errors of many kinds
            raise ExportError(
                f"{path}: {type(model).__name__} cannot be written as {name!r}: {_first(error)}"
            ) from error
        difference = _compared(path, run, batches, expected)
    check_free(path, force=force)
    try:
        write_atomically(path, data)
    except OSError as error:
        raise ExportError(f"{path}: cannot be written ({error.strerror})") from error
    return Exported(path, name, len(data), difference)


def format_of(path: Path, format: str | None) -> str:
    """The name in FORMATS of what is asked for, or of what the path's ending says."""
    endings = {kind.suffix: name for name, kind in FORMATS.items()}
    name = endings.get(path.suffix) if format is None else format
    if name not in FORMATS:
        raise ExportError(
            f"{path}: unknown format {format!r}; expected one of {', '.join(FORMATS)}"
            if format is not None
            else f"{path}: its ending names no format; expected {', '.join(endings)}, or format="
        )
    return name


def check_free(path: Path, *, force: bool) -> None:
    """Raise ExportError where a file is there already, or there is no folder for it."""
    if path.exists() and not force:
        raise ExportError(f"{path} is there already; overwrite it with --force (force=True)")
    if path.is_dir() or not path.parent.is_dir():
        raise ExportError(f"{path}: expected a file in a folder that exists")


def _inputs(model: nn.Module, example: Any) -> Arguments:
    """The example as arguments."""
    if isinstance(example, Mapping):
        inputs = Arguments.named_in_order(model, example)
    else:
        inputs = Arguments(example if isinstance(example, tuple) else (example,), {})
    sizes = {len(leaf) if leaf.dim() else 0 for leaf in inputs.tensors()}
    if len(sizes) != 1 or sizes == {0}:
        raise ExportError(
            "example: the first dimension of every tensor is the batch, so that they have to be "
            f"equally long; got {sorted(sizes) or 'no tensors'}"
        )
    return inputs.map(lambda leaf: leaf.detach().cpu())


def _batches(inputs: Arguments) -> list[Arguments]:
    """One sample, the example, and, by which it is traced, twice the example."""
    return [
        inputs.map(lambda leaf: leaf[:1]),
        inputs,
        inputs.map(lambda leaf: torch.cat([leaf, leaf])),
    ]


def _is_on_cpu(model: nn.Module) -> bool:
    return all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))


def _compared(
    path: Path, run: Run, batches: list[Arguments], expected: list[list[Tensor]]
) -> float:
    """The largest difference of what a file computes.

    Raises:
        ExportError: it is too large, or outputs are others.
    """
    limits = [
        TOLERANCE * max(_largest(output) for output in outputs)
        for outputs in zip(*expected, strict=True)
    ]
    found, largest = [run(batch) for batch in batches], 0.0
    for batch, own, other in zip(batches, expected, found, strict=True):
        of = f"of a batch of {len(batch.tensors()[0])}, the file gives"
        kinds = [[list(output.shape) for output in outputs] for outputs in (own, other)]
        if kinds[0] != kinds[1]:
            raise ExportError(f"{path}: not written: {of} {kinds[1]}, the model {kinds[0]}")
        for number, limit in enumerate(limits):
            apart = _apart(own[number], other[number])
            place = int(apart.argmax()) if apart.numel() else 0
            difference = float(apart.flatten()[place]) if apart.numel() else 0.0
            if not difference <= limit:
                where = [int(i) for i in torch.unravel_index(torch.tensor(place), apart.shape)]
                raise ExportError(
                    f"{path}: not written: {of} another output {number}: it differs by "
                    f"{difference:.3g} at {where}, allowed are {limit:.3g}{_hint(own[number])}"
                )
            largest = max(largest, difference)
    return largest


def _apart(own: Tensor, other: Tensor) -> Tensor:
    """How far numbers are apart; infinite where only one is NaN, 0 where both are the same."""
    one, two = own.double(), other.double()
    same = (one == two) | (one.isnan() & two.isnan())
    return (one - two).abs().nan_to_num(torch.inf).masked_fill(same, 0.0)


def _largest(output: Tensor) -> float:
    finite = output.double().abs()
    finite = finite[finite.isfinite()]
    return float(finite.max()) if len(finite) else 0.0


def _hint(output: Tensor) -> str:
    whole = not output.is_floating_point() or output.dtype in (torch.float32, torch.float64)
    return "" if whole else f"; outputs are {output.dtype}: export model.float()"


def _first(error: Exception) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
