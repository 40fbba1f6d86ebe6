"""Tiny language models with random weights, and tokens for them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

VOCABULARY = 40


def llama(*, layers: int = 2, groups: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=groups, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def opt(*, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip
    return OPTForCausalLM(config)


def texts(
    batches: int = 3, *, size: int = 4, tokens: int = 12, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(3, VOCABULARY, (batches, size, tokens), generator=generator)
    return [{"input_ids": each} for each in drawn]
