"""A causal language model, or its tokenizer, from a folder, a GGUF file or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunelab.errors import ModelError


def read_model(source: str | Path) -> nn.Module:
    """The model in float32 and evaluation mode.

    Args:
        source: a folder as transformers writes it, a .gguf file, whose weights are no longer
            quantised then, or a name on the hub.

    Raises:
        ModelError: transformers is missing, there is no such model, or it cannot be read.
    """
    model: nn.Module = _read(source, "AutoModelForCausalLM", dtype=torch.float32)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and Path(source).suffix == ".gguf":
        quantizer.remove_quantization_config(model)  # with it transformers would not save it
    return model.eval()


def read_tokenizer(source: str | Path) -> Any:
    """The model's tokenizer.

    Args:
        source: as of `read_model`.

    Raises:
        ModelError: as `read_model`.
    """
    return _read(source, "AutoTokenizer")


def _read(source: str | Path, reader: str, **options: Any) -> Any:
    """What one of transformers' classes reads, without its progress bars."""
    try:
        import transformers  # noqa: PLC0415
    except ImportError:
        raise ModelError("language models need transformers: pip install 'fedprune[llm]'") from None
    path = Path(source).expanduser()
    place = str(path if path.is_dir() else source)
    if path.suffix == ".gguf":
        place, options = str(path.parent), {**options, "gguf_file": path.name}
        if reader == "AutoModelForCausalLM" and hasattr(transformers, "GgufConfig"):
            # Else some installations would keep the weights packed.
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if (path.suffix == ".gguf" or str(source).startswith((".", "/", "~"))) and not path.exists():
        raise ModelError(f"no such model: {path}")
    logging = transformers.utils.logging
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return getattr(transformers, reader).from_pretrained(place, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        where = "" if path.exists() else "; there is no folder of that name here"
        raise ModelError(
            f"{source}: no causal language model of transformers ({reason}){where}"
        ) from None
    finally:
        if shows_bars:
            logging.enable_progress_bar()
