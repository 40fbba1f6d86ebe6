"""Reading language models and texts; sequences; perplexity against the closed form."""

from __future__ import annotations

import gzip
import lzma
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunelab.errors import DataError, ModelError
from prunelab.language.models import read_model
from prunelab.language.perplexity import perplexity
from prunelab.language.text import drawn, in_batches, parted, read_text, sequences


def letters(text: str, **_: object) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) - ord("a") for letter in text]}


class Bigrams(nn.Module):
    """Predicts the next letter from the present one, by given logits [letters, letters]."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def test_perplexity_is_that_of_the_counts() -> None:
    torch.manual_seed(0)
    table = torch.randn(5, 5)
    chosen = torch.randint(0, 5, (7, 9))
    logs = table.double().log_softmax(1)
    each = [logs[a, b].item() for row in chosen for a, b in pairwise(row)]
    expected = math.exp(-sum(each) / len(each))
    model = Bigrams(table).train()
    for size in (1, 3, 8):
        assert perplexity(model, chosen, batch_size=size) == pytest.approx(expected, rel=1e-6)
    assert model.training
    assert perplexity(Bigrams(torch.zeros(5, 5)), chosen) == pytest.approx(5.0)


def test_a_broken_model_has_an_infinite_perplexity() -> None:
    broken = Bigrams(torch.full((3, 3), math.nan))
    assert perplexity(broken, torch.zeros(1, 4, dtype=torch.long)) == math.inf
    sure = torch.zeros(3, 3)
    sure[:, 1] = 1e30
    assert perplexity(Bigrams(sure), torch.zeros(1, 4, dtype=torch.long)) == math.inf


def test_a_text_is_cut_and_parted() -> None:
    whole = sequences("abcdefghijk", letters, length=2)
    assert whole.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    pool, test = parted(whole)
    assert (len(pool), test.tolist()) == (4, [[8, 9]])
    pool, test = parted(whole, tested=0.4)
    assert (len(pool), len(test)) == (3, 2)
    one, again, other = (drawn(whole, 3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len({tuple(row) for row in one.tolist()}) == 3
    assert torch.equal(drawn(whole, 9, seed=0), whole)
    assert [len(batch["input_ids"]) for batch in in_batches(whole, size=2)] == [2, 2, 1]
    for text, length, reason in (
        ("abc", 1, "predict nothing"),
        ("abc", 4, "3 tokens, less than one sequence of 4"),
    ):
        with pytest.raises(DataError, match=reason):
            sequences(text, letters, length=length)
    with pytest.raises(DataError, match="a single sequence"):
        parted(whole[:1])


def test_texts_may_be_packed(tmp_path: Path) -> None:
    text = "Zwölf Boxkämpfer\njagen"
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / "a.txt").write_text(text, encoding="utf-8")
    (folder / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    (folder / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert {read_text(file) for file in folder.iterdir()} == {text}
    (folder / "empty.txt").write_text(" \n", encoding="utf-8")
    (folder / "latin.txt").write_bytes(b"Zw\xf6lf")
    (folder / "cut.xz").write_bytes(lzma.compress(text.encode() * 100)[:-20])
    (folder / "none.gz").write_text("plain", encoding="utf-8")
    for name, reason in (
        ("nothing.txt", "no such text file"),
        ("empty.txt", "holds no text"),
        ("latin.txt", "expected a text in UTF-8"),
        ("cut.xz", "expected a text"),
        ("none.gz", "expected a text"),
    ):
        with pytest.raises(DataError, match=reason):
            read_text(folder / name)


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    for source, reason in (
        (tmp_path / "nothing", "no such model"),
        (tmp_path / "model.gguf", "no such model"),
        (tmp_path, "no causal language model of transformers"),
        ("no/such/model", "no causal .*; there is no folder of that name here"),
    ):
        with pytest.raises(ModelError, match=reason):
            read_model(source)


def test_a_quantised_file_is_read_as_plain_weights(tmp_path: Path) -> None:
    """Which transformers saves again: a model that says it is quantised it does not."""
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'fedprune[llm]'")
    width, kind = 32, gguf.GGMLQuantizationType.Q4_1
    file = gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "llama")
    file.add_context_length(16)
    file.add_embedding_length(width)
    file.add_block_count(1)
    file.add_feed_forward_length(width)
    file.add_head_count(4)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(8)
    random = np.random.default_rng(0)
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    packed = {}
    for name in ("token_embd", "output", *(f"blk.0.{each}" for each in matrices)):
        rows = width if name.startswith("blk") else 8
        packed[name] = gguf.quants.quantize(
            random.standard_normal((rows, width), dtype=np.float32), kind
        )
        file.add_tensor(f"{name}.weight", packed[name], raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        file.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()

    model = read_model(tmp_path / "tiny.gguf")
    down = gguf.quants.dequantize(packed["blk.0.ffn_down"], kind)
    name = "model.layers.0.mlp.down_proj.weight"
    assert np.array_equal(model.get_parameter(name).detach(), down)
    save: Any = model.save_pretrained
    save(tmp_path / "saved")
    again = read_model(tmp_path / "saved")
    assert np.array_equal(again.get_parameter(name).detach(), down)
