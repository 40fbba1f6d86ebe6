"""The commands, from files to metrics, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from datapruning.errors import ScoreError, SelectionError
from datapruning.recommend import steps
from datapruning.recommend.cli import app
from datapruning.recommend.finetune import FinetuneConfig
from datapruning.recommend.histories import Histories
from datapruning.recommend.language import LoraSettings, train_tokenizer, with_lora
from datapruning.selection.table import ScoreTable, Subset
from prunelab.errors import ModelError, RunError

from .made import made_histories

transformers = pytest.importorskip("transformers")


def written(histories: Histories, folder: Path) -> Path:
    """As a divided folder."""
    folder.mkdir()
    titles = [f"{i}\t{title}" for i, title in enumerate(histories.titles, start=1)]
    (folder / "items.tsv").write_text("\n".join(["item_id\ttitle", *titles]))
    for split in ("train", "valid", "test"):
        rows = getattr(histories, split)
        lines = [
            " ".join(map(str, [int(user), *rows[row].tolist()]))
            for row, user in enumerate(histories.users)
        ]
        (folder / f"sequential_{split}.txt").write_text("\n".join(lines))
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def passed(*arguments: object) -> str:
    result = run(*arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(steps, "DEPTH", 30)
    monkeypatch.setattr(steps, "TITLES", FinetuneConfig(steps=3, batch_size=8, lr=1e-3))
    return written(made_histories(num_users=50), tmp_path / "games")


SCORE = ("--epochs", 2, "--negatives", 0)


def test_from_histories_to_metrics(data: Path, tmp_path: Path) -> None:
    scores, out = tmp_path / "scores", tmp_path / "tuned"
    shown = passed("score", data, "--out", scores, *SCORE)
    assert "50 users, 30 items" in shown
    assert "surrogate, epoch 2" in shown
    table = ScoreTable.read(scores / "scores.parquet")
    influence, effort = (ScoreTable.read(scores / f"{n}.parquet") for n in ("influence", "effort"))
    assert table.scores.isfinite().all()
    assert effort.model == "scratch:tiny"
    assert influence.provenance["damping"] == 0.25
    kept = tmp_path / "kept.parquet"
    assert "kept: 12 of" in passed("select", scores / "scores.parquet", "--keep", 12, "--out", kept)
    assert len(Subset.read(kept)) == 12
    tuning = (
        "finetune", data, "--subset", kept, "--model", scores / "base", "--out", out, "--epochs", 2,
    )  # fmt: skip
    assert "step 2 of 2" in passed(*tuning)
    shown = passed("evaluate", data, "--model", out / "model", "--json")
    found = json.loads(shown.splitlines()[-1])
    assert 0 <= found["recall@10"] <= 1
    popular = passed("evaluate", data, "--split", "valid")
    assert "30 items" in popular
    assert "ndcg@10" in popular


def test_scoring_again_finds_what_is_there_and_refuses_other_settings(
    data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores"
    passed("score", data, "--out", out, *SCORE)
    before = (out / "scores.parquet").read_bytes()
    shown = passed("score", data, "--out", out, *SCORE)
    assert "surrogate, epoch" not in shown
    assert (out / "scores.parquet").read_bytes() == before
    result = run("score", data, "--out", out, "--epochs", 3, "--negatives", 0)
    assert isinstance(result.exception, ScoreError)
    assert "other data or settings" in str(result.exception)
    for command in (
        ("score", data, "--out", out, *SCORE, "--weight", 1),
        ("select", out / "scores.parquet", "--keep", 9, "--out", out / "effort.parquet"),
    ):
        result = run(*command)
        assert isinstance(result.exception, RunError)
        assert "holds something else; name another --out, or overwrite it" in str(result.exception)
    assert (out / "scores.parquet").read_bytes() == before
    passed("score", data, "--out", out, *SCORE, "--weight", 1, "--force")
    assert ScoreTable.read(out / "scores.parquet").provenance["weight"] == 1
    for _ in range(2):  # the same again is no overwriting
        passed("select", out / "scores.parquet", "--keep", 9, "--out", out / "kept.parquet")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_language_model_is_refused(data: Path, tmp_path: Path, name: str) -> None:
    histories, base = made_histories(num_users=50), tmp_path / "base"
    steps.load_language("scratch:tiny", histories, base=base)
    content = bytearray((base / name).read_bytes())
    content[len(content) // 2] ^= 1
    (base / name).write_bytes(content)
    message = rf"{name}: missing, damaged, or changed since it was saved; delete .*base"
    with pytest.raises(ModelError, match=message):
        steps.load_language("scratch:tiny", histories, base=base)
    result = run("evaluate", data, "--model", base)
    assert isinstance(result.exception, ModelError)


def test_a_base_of_another_model_is_refused(data: Path, tmp_path: Path) -> None:
    histories, base = made_histories(num_users=50), tmp_path / "base"
    first = steps.load_language("scratch:tiny", histories, base=base)
    again = steps.load_language("scratch:tiny", histories, base=base)
    ours, theirs = first.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ModelError, match="holds scratch:tiny"):
        steps.load_language("scratch:small", histories, base=base)
    model, _ = _local_model(tmp_path / "local")
    other = steps.load_language(str(model), histories, base=base)
    assert not other.from_scratch


def test_a_count_that_is_none_is_refused(tmp_path: Path) -> None:
    scores = ScoreTable(torch.arange(30), torch.rand(30).double(), "x", "other", "0" * 16, seed=0)
    scores.write(tmp_path / "s.parquet")
    result = run("select", tmp_path / "s.parquet", "--keep", 10.5, "--out", tmp_path / "k.parquet")
    assert isinstance(result.exception, SelectionError)


def test_an_unknown_size_is_refused_before_anything_is_trained(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("score", data, "--model", "scratch:huge", "--out", out, *SCORE)
    assert isinstance(result.exception, ModelError)
    assert not out.exists()


def test_a_model_of_transformers_gets_adapters(data: Path, tmp_path: Path) -> None:
    model, _ = _local_model(tmp_path / "local")
    out = tmp_path / "tuned"
    passed("finetune", data, "--model", model, "--out", out, "--steps", 2, "--max-titles", 3)
    assert (out / "model" / "adapter_config.json").exists()
    settings = json.loads((out / "model" / "recommend.json").read_text())["prompts"]
    assert settings == {"template": "instruction", "max_length": 256, "max_titles": 3}
    again = steps.load_language(str(out / "model"), made_histories(num_users=50))
    assert any("lora" in name for name, _ in again.model.named_parameters())
    passed("evaluate", data, "--model", out / "model", "--users", 5)


def test_a_subset_of_other_data_is_refused(data: Path, tmp_path: Path) -> None:
    scores = ScoreTable(torch.arange(30), torch.rand(30).double(), "x", "other", "0" * 16, seed=0)
    scores.write(tmp_path / "other.parquet")
    kept = tmp_path / "kept.parquet"
    passed("select", tmp_path / "other.parquet", "--keep", 0.5, "--out", kept)
    result = run("finetune", data, "--subset", kept)
    assert isinstance(result.exception, SelectionError)


def test_no_user_to_ask(data: Path, tmp_path: Path) -> None:
    for split in ("valid", "test"):
        (data / f"sequential_{split}.txt").write_text("100\n")
    result = run("evaluate", data)
    assert isinstance(result.exception, RunError)


def _local_model(folder: Path) -> tuple[Path, Any]:
    """A model as transformers keeps one, with no sign of being from scratch."""
    tokenizer = train_tokenizer(["Made game 1: part 2"], vocabulary=300)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model


def test_adapters_are_as_published(tmp_path: Path) -> None:
    _, model = _local_model(tmp_path / "local")
    adapted = with_lora(model, LoraSettings())
    shapes = {tuple(p.shape) for name, p in adapted.named_parameters() if "lora_A" in name}
    assert shapes == {(8, 16)}
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.05)
    assert not adapted.training
