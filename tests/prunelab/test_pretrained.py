"""Pruned models of transformers load in plain transformers, and come back sparse."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prunelab
import sparsemodel
from prunelab.errors import ModelError, RunError
from prunelab.pretrained import allow_biases
from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.layers.sparsify import mask_of, sparse_layers
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.prune import prune

transformers = pytest.importorskip("transformers")
IDS = torch.arange(12).reshape(2, 6)


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 40}
    config = transformers.LlamaConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        bos_token_id=1, eos_token_id=2, **changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_a_pruned_language_model_loads_in_plain_transformers(tied: bool, tmp_path: Path) -> None:
    """To the same logits, in shards; its zeros stay, and so do generation settings."""
    model = llama(tie_word_embeddings=tied)
    model.generation_config.max_new_tokens = 7
    sparse = sparsemodel.sparsify(model, prune(model, density=0.3))
    saved = prunelab.save_pretrained(sparse, tmp_path / "lm", max_shard_size="20KB")
    assert len(list((tmp_path / "lm").glob("model-*.safetensors"))) > 1
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert (logits(plain) - logits(sparse)).abs().max() <= 1e-5
    assert plain.generation_config.max_new_tokens == 7
    mask = mask_of(sparse)
    for name in mask:
        weight = plain.get_parameter(name)
        assert not weight[~mask[name]].any()
        assert torch.equal(weight[mask[name]], model.get_parameter(name)[mask[name]])
    again = prunelab.from_pretrained(tmp_path / "lm")
    assert type(again).__name__ == type(sparse).__name__
    assert sparse_layers(again).keys() == sparse_layers(sparse).keys()
    assert mask_of(again).digest() == mask.digest()
    assert torch.equal(logits(again), logits(sparse))
    files = [file.stat().st_size for file in (tmp_path / "lm").iterdir()]
    assert (saved.num_bytes, saved.density) == (sum(files), mask.density)


def test_a_masked_model_and_its_tokenizer(tmp_path: Path) -> None:
    from datapruning.recommend.language import train_tokenizer  # noqa: PLC0415

    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 40, "num_labels": 3}
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    mask = prune(model, density=0.5)
    with pytest.raises(MaskError, match=r"weights of .* are pruned by the mask and not zero"):
        prunelab.save_pretrained(model, tmp_path / "bert", mask=mask)
    assert not (tmp_path / "bert").exists()
    mask.apply(model)
    tokenizer = train_tokenizer(["a few words", "words of a text"], vocabulary=300)
    prunelab.save_pretrained(model, tmp_path / "bert", mask=mask, tokenizer=tokenizer)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")) == len(tokenizer)
    masked = prunelab.from_pretrained(tmp_path / "bert", sparse=False)
    assert type(masked) is type(model)
    assert torch.equal(logits(masked), logits(model))
    body = prunelab.from_pretrained(
        tmp_path / "bert", model_class=transformers.AutoModelForSequenceClassification
    )
    assert sparse_layers(body).keys() == set(mask)
    assert prunelab.pretrained_mask(tmp_path / "bert").digest() == mask.digest()


def test_biases_are_allowed_where_the_class_reads_them_back() -> None:
    """Qwen2's attention has biases but in its output, whatever its configuration says."""
    model = llama()
    allow_biases(model)
    assert model.config.attention_bias
    assert model.config.mlp_bias
    qwen = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        hidden_size=32, intermediate_size=48, vocab_size=40, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    ))  # fmt: skip
    with pytest.raises(ModelError, match="Qwen2ForCausalLM is read back by transformers without"):
        allow_biases(qwen)


def test_gpt2_is_masked_and_not_sparse(tmp_path: Path) -> None:
    """Its layers are transformers' own Conv1D: what cannot be done says what can."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=40, bos_token_id=1, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    name = "transformer.h.0.mlp.c_fc.weight"
    weight = model.get_parameter(name)
    mask = Mask({name: torch.rand(weight.shape, generator=torch.manual_seed(1)) < 0.5})
    with pytest.raises(SparseModelError, match="Conv1D"):
        prune(model, density=0.5)
    mask.apply(model)
    prunelab.save_pretrained(model, tmp_path / "gpt2", mask=mask)
    with pytest.raises(SparseModelError, match=r"Conv1D, which has no sparse form.*sparse=False"):
        prunelab.from_pretrained(tmp_path / "gpt2")
    again = prunelab.from_pretrained(tmp_path / "gpt2", sparse=False)
    assert torch.equal(logits(again), logits(model))
    assert again.lm_head.weight is again.transformer.wte.weight  # tied, as before


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    model = llama()
    sparse = sparsemodel.sparsify(model, prune(model, density=0.3))
    prunelab.save_pretrained(sparse, tmp_path)
    with pytest.raises(RunError, match="is not empty; write into it with force=True"):
        prunelab.save_pretrained(sparse, tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.safetensors").write_bytes(b"of a run")
    with pytest.raises(RunError, match="is not empty"):
        prunelab.save_pretrained(sparse, run)
    assert (run / "model.safetensors").read_bytes() == b"of a run"
    other = sparsemodel.sparsify(model, prune(model, density=0.2))
    prunelab.save_pretrained(other, tmp_path, force=True)
    assert mask_of(prunelab.from_pretrained(tmp_path)).digest() == mask_of(other).digest()


def test_a_revision_is_one_of_mask_and_weights(tmp_path: Path) -> None:
    """Of a repository as transformers keeps it on this machine, of which two were read."""
    model = llama()
    cache = tmp_path / "models--me--lm"
    digests = []
    for revision, density in (("v1", 0.3), ("main", 0.2)):
        commit = {"v1": "1", "main": "2"}[revision] * 40
        pruned = sparsemodel.sparsify(model, prune(model, density=density))
        prunelab.save_pretrained(pruned, cache / "snapshots" / commit)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / revision).write_text(commit)
        digests.append(mask_of(pruned).digest())
    options = {"cache_dir": tmp_path, "local_files_only": True}
    found = [
        mask_of(prunelab.from_pretrained("me/lm", revision=revision, **options)).digest()
        for revision in ("v1", "main")
    ]
    assert found == digests
    with pytest.raises(RunError, match="me/other: no such folder or repository"):
        prunelab.from_pretrained("me/other", **options)


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    model = llama()
    mask = prune(model, density=0.3)
    with pytest.raises(ModelError, match=r"no model of transformers; use sparsemodel\.save"):
        prunelab.save_pretrained(nn.Linear(2, 2), tmp_path, mask=mask)
    with pytest.raises(ModelError, match="which weights are pruned"):
        prunelab.save_pretrained(model, tmp_path)
    sparse = sparsemodel.sparsify(model, mask)
    with pytest.raises(ModelError, match="sparsified and has its own"):
        prunelab.save_pretrained(sparse, tmp_path, mask=mask)
    assert not os.listdir(tmp_path)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(RunError, match=r"no fedprune_mask\.json: it is a dense model"):
        prunelab.from_pretrained(tmp_path / "dense")
    prunelab.save_pretrained(sparse, tmp_path / "lm")
    model.save_pretrained(tmp_path / "lm")  # dense weights beside the mask
    with pytest.raises(RunError, match=r"fedprune_mask\.json is not the mask of the weights"):
        prunelab.from_pretrained(tmp_path / "lm")
    path = tmp_path / "lm" / "fedprune_mask.json"
    path.write_bytes(path.read_bytes().replace(b'"mask": "', b'"mask": "A'))
    with pytest.raises(RunError, match="its checksum does not fit; save the model again"):
        prunelab.from_pretrained(tmp_path / "lm")
