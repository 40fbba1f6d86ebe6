"""`fedprune prune` on a tiny language model: what it writes, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import prunelab
from fedprune.cli import cli
from fedprune.language.asked import Pruning
from fedprune.language.pruning import prune_language_model
from prunelab.errors import RunError
from prunelab.language.perplexity import perplexity
from prunelab.language.text import parted, sequences
from sparsemodel.errors import DensityError, MaskError
from sparsemodel.masks.structure import is_n_of_m

WORDS = [f"w{number}" for number in range(40)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has learned a text, and the text."""
    folder = tmp_path_factory.mktemp("a b")
    model: Any = llama()
    vocabulary = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="w0"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(folder / "model")
    steps = torch.randint(1, 4, (3000,)).cumsum(0) % 40
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        tokens = steps[: 16 * 20].reshape(20, 16)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(" ".join(WORDS[n] for n in steps), encoding="utf-8")
    return folder


def command(place: Path, out: Path, *more: str) -> Any:
    words = ["prune", str(place / "model"), "--data", str(place / "text.txt"), "--out", str(out)]
    return CliRunner().invoke(cli, [*words, "--length", "16", *more])


def test_the_folder_is_a_model_for_transformers_and_for_us(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned model"
    result = command(place, out)
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    plain = AutoModelForCausalLM.from_pretrained(out)
    sparse = prunelab.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = (place / "text.txt").read_text(encoding="utf-8")
    _, test = parted(sequences(text, tokenizer, length=16))
    told = summary["perplexity"]
    assert perplexity(plain, test[:64]) == pytest.approx(told, rel=1e-5)
    assert perplexity(sparse, test[:64]) == pytest.approx(told, rel=1e-4)
    assert summary["density"] == 0.5
    zeros = sum(int((p == 0).sum()) for n, p in plain.named_parameters() if "_proj" in n)
    assert zeros == summary["pruned"] == summary["prunable"] // 2
    assert None not in [summary["perplexity_random"], summary["perplexity_magnitude"]]
    assert len(summary["perplexity_by_block"]) == 3
    report = (out / "report.html").read_text(encoding="utf-8")
    for text in ("wanda", "magnitude", "random", "Block by block"):
        assert text in report
    assert re.search(r"wanda +│ +" + re.escape(f"{told:,.2f}"), result.output)


def test_two_runs_give_the_same_bits_and_seeds_differ(place: Path, tmp_path: Path) -> None:
    def pruned(name: str, seed: int) -> dict[str, torch.Tensor]:
        asked = Pruning(
            str(place / "model"), str(place / "text.txt"), length=16, samples=4, seed=seed,
            controls=False,
        )  # fmt: skip
        summary = prune_language_model(asked, tmp_path / name)
        assert summary["perplexity_random"] is None
        state: dict[str, torch.Tensor] = prunelab.from_pretrained(
            tmp_path / name, sparse=False
        ).state_dict()
        return state

    one, again, other = pruned("a", 0), pruned("b", 0), pruned("c", 1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_patterns_give_the_density(place: Path, tmp_path: Path) -> None:
    result = command(place, tmp_path / "out", "--pattern", "2:4", "--criterion", "obs",
                     "--no-controls", "--samples", "4")  # fmt: skip
    assert result.exit_code == 0, result.output
    mask = prunelab.pretrained_mask(tmp_path / "out")
    assert all(is_n_of_m(mask[name]) for name in mask)
    assert mask.density == 0.5
    again = command(place, tmp_path / "out")
    assert isinstance(again.exception, RunError)
    assert "not empty" in str(again.exception)
    forced = command(place, tmp_path / "out", "--force", "--no-controls", "--samples", "4",
                     "--density", "0.25")  # fmt: skip
    assert forced.exit_code == 0
    assert prunelab.pretrained_mask(tmp_path / "out").density == 0.25


def test_stages_are_told_and_their_biases_are_read_back(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = command(place, out, "--units", "0.75", "--density", "0.5", "--recover", "dsnot",
                     "--recover", "bias", "--recover", "perp", "--samples", "8")  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    told = summary["stages"]
    assert [one["stage"] for one in told] == ["units", "weights", "dsnot", "bias", "perp"]
    assert summary["density"] == 0.5 == prunelab.pretrained_mask(out).density
    assert [one["density"] for one in told[1:]] == [0.5] * 4
    assert 0.5 < told[0]["density"] <= 0.75
    assert summary["perplexity_chosen"] == told[1]["perplexity"]
    assert summary["perplexity"] == told[-1]["perplexity"]
    assert len({one["perplexity"] for one in told}) == len(told)
    text = (place / "text.txt").read_text(encoding="utf-8")
    _, test = parted(sequences(text, AutoTokenizer.from_pretrained(out), length=16))
    for model in (AutoModelForCausalLM.from_pretrained(out), prunelab.from_pretrained(out)):
        assert model.get_parameter("model.layers.0.mlp.down_proj.bias").any()
        assert perplexity(model, test[:64]) == pytest.approx(summary["perplexity"], rel=1e-4)
    report = (out / "report.html").read_text(encoding="utf-8")
    for words in ("units to 0.75 by flap", "weights to 0.5 in each row by wanda", "DSnoT",
                  "flap units, wanda, dsnot, bias, perp", "random"):  # fmt: skip
        assert words in report
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "fedprune_mask.json", "summary.json", "report.html",
    }  # fmt: skip


def test_units_alone_leave_what_they_leave(place: Path, tmp_path: Path) -> None:
    asked = Pruning(
        str(place / "model"), str(place / "text.txt"), length=16, samples=4, tested=8, units=0.75,
        unit_criterion="amp",
    )  # fmt: skip
    summary = prune_language_model(asked, tmp_path / "out")
    assert [one["stage"] for one in summary["stages"]] == ["units"]
    assert summary["density"] == pytest.approx(0.75, abs=0.02)
    assert summary["perplexity_by_block"] == []
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "amp units" in report
    assert "Block by block" not in report


class CutError(Exception):
    """Ends a run."""


@pytest.mark.parametrize("last", ["random", "units", "model.layers.1", "weights"])
def test_a_run_that_was_cut_goes_on_to_the_same_bits(
    place: Path, tmp_path: Path, last: str
) -> None:
    asked = Pruning(
        str(place / "model"), str(place / "text.txt"), length=16, samples=8, tested=8,
        units=0.75, density=0.5, recover=("bias",),
    )  # fmt: skip
    heard: list[str] = []

    def cut(line: str) -> None:
        heard.append(line)
        if line.startswith(last):
            raise CutError

    whole = prune_language_model(asked, tmp_path / "whole")
    out = tmp_path / "cut"
    with pytest.raises(CutError):
        prune_language_model(asked, out, say=cut)
    assert [path.name for path in out.iterdir()] == ["unfinished.safetensors"]
    with pytest.raises(RunError, match=r"other settings \(seed, texts\); give the same"):
        prune_language_model(replace(asked, seed=1), out)
    again: list[str] = []
    summary = prune_language_model(asked, out, say=again.append)
    finished = {"random": [], "units": ["units"], "model.layers.1": ["units"],
                "weights": ["units", "weights"]}[last]  # fmt: skip
    for line in heard:
        name = line.split(" to ")[0]
        if name in {"units", "weights"}:
            assert (line in again) == (name not in finished)
    assert any(line.startswith("goes on after") for line in again) == bool(finished)
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in out.iterdir()} == files
    for name in ("model.safetensors", "fedprune_mask.json", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for values in (whole, summary):
        del values["seconds"]
        for stage in values["stages"]:
            del stage["seconds"]
    assert summary == whole


def test_force_begins_anew(place: Path, tmp_path: Path) -> None:
    asked = Pruning(
        str(place / "model"), str(place / "text.txt"), length=16, samples=4, tested=4,
        controls=False,
    )  # fmt: skip

    def cut(line: str) -> None:
        raise CutError

    for damage in (False, True):
        out = tmp_path / str(damage)
        with pytest.raises(CutError):
            prune_language_model(asked, out, say=cut)
        if damage:
            (out / "unfinished.safetensors").write_bytes(b"nothing")
            with pytest.raises(RunError, match="or begin anew"):
                prune_language_model(asked, out)
        other = replace(asked, density=0.25)
        assert prune_language_model(other, out, force=True)["density"] == 0.25
        assert not (out / "unfinished.safetensors").exists()


def test_a_stage_that_fails_leaves_nothing_behind(place: Path, tmp_path: Path) -> None:
    """Groups of five do not divide rows of 16."""
    asked = Pruning(
        str(place / "model"), str(place / "text.txt"), length=16, samples=4, tested=4,
        pattern="2:5", controls=False,
    )  # fmt: skip
    with pytest.raises(MaskError, match="multiple of 5"):
        prune_language_model(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_is_told_before_work(place: Path, tmp_path: Path) -> None:
    text, model = str(place / "text.txt"), str(place / "model")
    for wrong, reason, kind in (
        ({"criterion": "wnda"}, "unknown criterion 'wnda'; known: wanda, gblm", MaskError),
        ({"criterion": "snip"}, "unknown criterion 'snip'", MaskError),
        ({"pattern": "column"}, "expected 'row', 'layer' or such as '2:4'", MaskError),
        ({"density": 0.0}, "density must be in", DensityError),
        ({"samples": 0}, "samples: expected 1 or more", RunError),
        ({"units": 0.8, "criterion": "obs"}, "criterion 'obs' changes nothing here", MaskError),
        ({"unit_kind": "heads"}, "unit_kind 'heads' changes nothing here: give units", MaskError),
        ({"units": 0.8, "unit_kind": "blocks"}, "expected some of", MaskError),
        ({"recover": ("perp", "dsnot")}, "in the order", MaskError),
        ({"recover": ("kd",)}, "unknown recovery 'kd'; known: dsnot, bias, perp", MaskError),
    ):
        with pytest.raises(kind, match=reason):
            Pruning(model, text, **wrong)
    with pytest.raises(RunError, match="length 64: the model takes 32 tokens"):
        prune_language_model(Pruning(model, text, length=64), tmp_path / "out")
    assert not (tmp_path / "out").exists()
