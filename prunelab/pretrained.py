"""Pruned models of transformers as folders that plain transformers reads, with their masks beside.

Such a folder holds the weights with zeros at pruned places, so it is as large as that of the dense
model; `sparsemodel.save` writes a file of the active weights alone, which transformers cannot read.
"""

from __future__ import annotations

import base64
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunelab.errors import ModelError, RunError
from prunelab.runs.folder import write_file
from sparsemodel.codec import Limits, decode_mask, encode_mask
from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.layers.sparsify import densify, mask_of, sparse_layers, sparsify
from sparsemodel.masks.by_blocks import block_weights
from sparsemodel.masks.mask import Mask, num_not_zero, weights_under
from sparsemodel.storage.sealed import read_sealed_json, sealed_json

MASK_FILE = "fedprune_mask.json"
_OF = "mask of a pretrained model"
_CURE = "save the model again by prunelab.save_pretrained"
_BIASES = ("attention_bias", "mlp_bias", "enable_bias")  # settings of Llama's kind, and of OPT
_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
_LIMITS = Limits(max_elements=2**31 - 1)  # its checksum is looked at first


@dataclass(frozen=True)
class Saved:
    """What `save_pretrained` left.

    Attributes:
        num_bytes: of all files; `mask_bytes` of them are the mask's.
        density: of the weights under the mask.
    """

    folder: Path
    num_bytes: int
    mask_bytes: int
    density: float


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    mask: Mask | None = None,
    tokenizer: Any = None,
    force: bool = False,
    **options: Any,
) -> Saved:
    """Write a pruned model of transformers as a folder that `from_pretrained` of both reads.

    `transformers.AutoModel*.from_pretrained(folder)` gives the dense model with zeros;
    `prunelab.from_pretrained(folder)` the sparse one. To share it, upload the folder
    (`huggingface_hub.upload_folder`): the model's own `push_to_hub` leaves the mask behind.

    Args:
        model: sparsified, or plain with zeros at the pruned weights; stays as it is.
        mask: of a plain model. A sparsified one has its own.
        tokenizer: is saved beside.
        force: write into a folder that is not empty, over what is in it.
        options: for transformers' `save_pretrained`, such as `max_shard_size`.

    Raises:
        ModelError: no model of transformers, or no mask.
        MaskError: a mask that does not fit, or pruned weights that are not zero.
        RunError: a folder that is not empty, or that cannot be written.
    """
    folder = Path(folder)
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise ModelError(
            f"{type(model).__name__} is no model of transformers; use sparsemodel.save or "
            "sparsemodel.export"
        )
    if sparse_layers(model):
        if mask is not None:
            raise ModelError("a mask was given, but the model is sparsified and has its own")
        mask, model = mask_of(model), densify(model)
    if mask is None:
        raise ModelError(
            "which weights are pruned? give mask=, such as sparsemodel.prune(model, density=...), "
            "or a sparsified model; a dense model has its own save_pretrained"
        )
    check_zeros(model, mask)
    try:
        if folder.exists() and any(folder.iterdir()) and not force:
            raise RunError(f"{folder} is not empty; write into it with force=True")
        folder.mkdir(parents=True, exist_ok=True)
        # Never a mask beside other weights: it goes first and comes last.
        (folder / MASK_FILE).unlink(missing_ok=True)
        write: Any = model.save_pretrained
        write(folder, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error})") from error
    text = base64.b64encode(encode_mask(mask.csr())).decode()
    data = sealed_json(_OF, {"mask": text})
    write_file(folder / MASK_FILE, data)
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Saved(folder, num_bytes, len(data), mask.density)


def allow_biases(model: nn.Module) -> None:
    """Say in a model's configuration that the linear layers of its blocks have biases.

    Without it `from_pretrained` drops those that a recovery has added (`recovery.bias`). Some
    classes have no such setting, and no biases.

    Raises:
        ModelError: the model's class would not read them back, whatever the configuration says.
    """
    wanted = {
        f"{name.removesuffix('.weight')}.bias"
        for block in block_weights(model).values()
        for name in block
    }
    config: Any = copy.deepcopy(model.config)
    for flag in _BIASES:
        if hasattr(config, flag):
            setattr(config, flag, True)
    make: Any = type(model)
    with torch.device("meta"):
        found = set(make(config).state_dict())
    if found != set(model.state_dict()) | wanted:
        raise ModelError(
            f"{type(model).__name__} is read back by transformers without biases in all linear "
            "layers of its blocks: leave the recovery by biases out"
        )
    model.config = config


def from_pretrained(
    folder: str | Path, *, model_class: Any = None, sparse: bool = True, **options: Any
) -> nn.Module:
    """The pruned model that `save_pretrained` left, in evaluation mode.

    Args:
        folder: or the name of a repository of the hub.
        model_class: what reads it, such as `transformers.AutoModelForCausalLM`; by default the
            class that the model's configuration names.
        sparse: of sparse layers, else plain with zeros (`pretrained_mask` has the mask).
        options: for transformers' `from_pretrained`, such as `dtype` or `revision`.

    Raises:
        ModelError: transformers is missing, or it has no such class.
        RunError: no such folder or repository, no mask beside the model, a damaged one, or one of
            other weights.
        SparseModelError: a layer under the mask has no sparse form (`sparsemodel.sparsify`), such
            as GPT-2's Conv1D: give sparse=False.
    """
    transformers = _transformers()
    of_hub = {name: options[name] for name in _HUB if name in options}
    mask = pretrained_mask(folder, **of_hub)
    if model_class is None:
        trust = {k: v for k, v in options.items() if k == "trust_remote_code"}
        config = transformers.AutoConfig.from_pretrained(folder, **of_hub, **trust)
        name = next(iter(config.architectures or ()), "")
        model_class = getattr(transformers, name, None)
        if model_class is None:
            raise ModelError(
                f"{folder}: transformers has no class {name!r}, which the configuration names; "
                "give model_class="
            )
    model: nn.Module = model_class.from_pretrained(folder, **options)
    try:
        check_zeros(model, mask)
    except MaskError as error:
        raise RunError(
            f"{Path(folder) / MASK_FILE} is not the mask of the weights beside it ({error}); "
            f"{_CURE}"
        ) from error
    if not sparse:
        return model.eval()
    try:
        return sparsify(model, mask).eval()
    except SparseModelError as error:
        raise type(error)(f"{error}; or read the masked model: sparse=False") from error


def pretrained_mask(folder: str | Path, **of_hub: Any) -> Mask:
    """The mask beside a pruned model.

    Args:
        folder: or the name of a repository of the hub.
        of_hub: how that is read: revision, token, cache_dir, as transformers takes them.

    Raises:
        RunError: there is none, or it is damaged.
    """
    is_here = Path(folder).is_dir()
    path = Path(folder) / MASK_FILE if is_here else _of_hub(str(folder), of_hub)
    try:
        values = read_sealed_json(path, of=_OF, error=RunError, cure=_CURE)
    except FileNotFoundError:
        raise RunError(
            f"{folder} has no {MASK_FILE}: it is a dense model, or was saved by transformers "
            f"alone; {_CURE}"
        ) from None
    return Mask.from_csr(decode_mask(base64.b64decode(values["mask"]), limits=_LIMITS))


def _of_hub(name: str, options: Mapping[str, Any]) -> Path:
    """The mask's file of a repository, as transformers keeps it; none there where it has none."""
    from transformers.utils import cached_file  # noqa: PLC0415

    reason = ""
    try:
        for wanted in (MASK_FILE, "config.json"):
            found = cached_file(
                name, wanted, _raise_exceptions_for_missing_entries=False, **options
            )
            if found is not None:
                return Path(found).with_name(MASK_FILE)
    except OSError as error:
        reason = f" ({str(error).strip().partition(chr(10))[0]})"
    raise RunError(f"{name}: no such folder or repository{reason}; check the name")


def check_zeros(model: nn.Module, mask: Mask) -> None:
    """Raise MaskError unless a mask fits a model whose pruned weights are zero."""
    for name, count in num_not_zero(mask, weights_under(mask, model)).items():
        if count:
            raise MaskError(
                f"{count} weights of {name!r} are pruned by the mask and not zero; call "
                "mask.apply(model), if they are to go"
            )


def _transformers() -> Any:
    try:
        import transformers  # noqa: PLC0415
    except ImportError as error:
        raise ModelError(
            "reading a model of transformers needs it: pip install 'fedprune[llm]'"
        ) from error
    return transformers
