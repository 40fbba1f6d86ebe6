"""Causal language models for recommendation: by name, by path, or small and from scratch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunelab.errors import ModelError
from prunelab.runs.seeds import seeded, stream_seed

SCRATCH = "scratch:"


@dataclass(frozen=True)
class Size:
    """Of a LLaMA-style model from scratch."""

    hidden: int
    num_layers: int
    num_heads: int
    vocabulary: int
    max_positions: int = 512


SIZES = {
    "tiny": Size(hidden=64, num_layers=2, num_heads=2, vocabulary=1024),
    "small": Size(hidden=128, num_layers=3, num_heads=4, vocabulary=4096),
    "medium": Size(hidden=512, num_layers=8, num_heads=8, vocabulary=16384),
}
SPECIAL = ("<pad>", "<s>", "</s>")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters, as DEALRec sets them.

    Attributes:
        rank, alpha, dropout: of each adapter.
        modules: names of the linear layers that get one; None: those that peft chooses for the
            architecture (queries and values of LLaMA).
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    modules: Sequence[str] | None = None


def load(
    name: str, *, texts: Iterable[str] = (), seed: int = 0, device: str | torch.device = "cpu"
) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer, in eval mode.

    Args:
        name: of a model that transformers finds, a folder, or scratch:SIZE: a LLaMA-style model
            with random weights, and a byte-level BPE tokenizer trained on `texts`.
        texts: titles, and the words around them in prompts; read for scratch: models alone.
        seed: of random weights.

    Raises:
        ModelError: transformers is missing, the name is unknown, or no texts for a tokenizer.
    """
    check_name(name)
    import transformers  # noqa: PLC0415

    if name.startswith(SCRATCH):
        return _from_scratch(name.removeprefix(SCRATCH), list(texts), seed=seed, device=device)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"language model {name!r} cannot be loaded: {reason} (a model that trains from "
            f"nothing: {', '.join(SCRATCH + size for size in SIZES)})"
        ) from None
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name!r} has no end token, which ends a title")
    return model.to(device).eval(), tokenizer


def check_name(name: str) -> None:
    """What can be told of a model's name before anything is trained; nothing is fetched.

    Raises:
        ModelError: transformers is missing, or a size of scratch: models is unknown.
    """
    try:
        import transformers  # noqa: F401, PLC0415
    except ImportError:
        raise ModelError("language models need transformers: pip install 'fedprune[llm]'") from None
    size = name.removeprefix(SCRATCH)
    if name.startswith(SCRATCH) and size not in SIZES:
        raise ModelError(
            f"unknown size {size!r}; known: {', '.join(SCRATCH + known for known in SIZES)}"
        )


def with_lora(model: nn.Module, settings: LoraSettings, *, seed: int = 0) -> nn.Module:
    """The model with adapters; they alone are trainable. In eval mode.

    Raises:
        ModelError: peft is missing, or the model has none of the modules.
    """
    try:
        import peft  # noqa: PLC0415
    except ImportError:
        raise ModelError("LoRA needs peft: pip install 'fedprune[llm]'") from None

    modules = None if settings.modules is None else list(settings.modules)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )
    device = next(model.parameters()).device
    with seeded(stream_seed(seed, 3), device), warnings.catch_warnings():
        # peft asks transformers by a name that transformers wants to be rid of.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            adapted = peft.get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"LoRA: {error}; name layers by modules") from None
    return adapted.eval()


def train_tokenizer(texts: Sequence[str], *, vocabulary: int) -> Any:
    """A byte-level BPE tokenizer: every text has tokens, and they give it back exactly.

    Raises:
        ModelError: no texts.
    """
    import tokenizers  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    if not any(texts):
        raise ModelError("a tokenizer from scratch needs texts, such as the titles of items")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, begin, end = SPECIAL
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=begin,
        eos_token=end,
        clean_up_tokenization_spaces=False,
    )


def _from_scratch(
    size: str, texts: Sequence[str], *, seed: int, device: str | torch.device
) -> tuple[nn.Module, Any]:
    import transformers  # noqa: PLC0415

    shape = SIZES[size]
    tokenizer = train_tokenizer(texts, vocabulary=shape.vocabulary)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        from_scratch=True,  # kept in config.json: all weights are fine-tuned, not adapters
    )
    with seeded(stream_seed(seed, 4), torch.device("cpu")):
        model = transformers.LlamaForCausalLM(config)
    return model.to(device).eval(), tokenizer
