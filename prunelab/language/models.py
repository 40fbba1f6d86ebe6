"""A causal language model and its tokenizer, from a folder, a GGUF file or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunelab.errors import ModelError


def read_model(source: str | Path) -> tuple[nn.Module, Any]:
    """The model in float32 and evaluation mode, and its tokenizer.

    Args:
        source: a folder as transformers writes it, a .gguf file, or a name on the hub.

    Raises:
        ModelError: transformers is missing, there is no such model, or it cannot be read.
    """
    try:
        import transformers  # noqa: PLC0415
    except ImportError:
        raise ModelError("language models need transformers: pip install 'fedprune[llm]'") from None
    path = Path(source).expanduser()
    place, options = str(source), {}
    if path.suffix == ".gguf":
        place, options = str(path.parent), {"gguf_file": path.name}
    if (path.suffix == ".gguf" or str(source).startswith((".", "/", "~"))) and not path.exists():
        raise ModelError(f"no such model: {path}")
    if path.is_dir():
        place = str(path)
    logging = transformers.utils.logging
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise ModelError(f"{source}: no causal language model of transformers ({reason})") from None
    finally:
        if shows_bars:
            logging.enable_progress_bar()
    return model.eval(), tokenizer
