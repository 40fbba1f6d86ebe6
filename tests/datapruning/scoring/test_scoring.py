"""Scoring runs: parts, resuming to the same bits, refusals, warnings, engines, sparse proxies."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from datapruning.errors import ScoreError, ScoreWarning, SelectionError
from datapruning.reports.score_report import proxy_check
from datapruning.scoring import engines as scoring_engines
from datapruning.scoring.jobs import observe_shard, train_run
from datapruning.scoring.parts import open_parts
from datapruning.scoring.score import dense_path, score, times_path
from datapruning.selection.select import select
from datapruning.selection.table import ScoreTable
from prunelab.data.datasets import load_dataset
from prunelab.data.samples import ImageSamples, TokenSamples
from prunelab.errors import RunError
from prunelab.networks import build_model
from prunelab.runs.folder import locked
from prunelab.training.loop import TrainingConfig
from prunelab.training.task import CausalLM, ImageClassification
from sparsemodel.errors import NotInstalledError

TRAINING = TrainingConfig(epochs=3, batch_size=30, lr=0.05)
METHODS = ["el2n-20", "aum", "prototypes-supervised"]
SMALL = {"training": TRAINING, "runs": 2, "shard_size": 32}


def small(seed: int) -> nn.Module:
    return build_model("resnet8", num_classes=10, input_shape=(1, 8, 8), seed=seed, width=4)


@pytest.fixture(scope="module")
def samples() -> ImageSamples:
    data = load_dataset("digits")
    return ImageSamples(data.train_images[:100], data.train_labels[:100])


@pytest.fixture(scope="module")
def undisturbed(samples: ImageSamples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of a run that was not interrupted."""
    out = tmp_path_factory.mktemp("undisturbed") / "s.parquet"
    score(samples, method=METHODS, model=small, out=out, **SMALL)
    return out


class Cut(Exception):  # noqa: N818
    """Stands for a kill: nothing after it runs."""


@pytest.mark.parametrize("job", range(6))
def test_cut_off_at_any_job_then_again_gives_the_same_files(
    job: int,
    samples: ImageSamples,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two models and four shards: cut off before the job-th, then started again."""
    jobs = iter(range(100))

    def cutting(function: Any) -> Any:
        def run(*arguments: Any) -> float:
            if next(jobs) == job:
                raise Cut
            return float(function(*arguments))

        return run

    out = tmp_path / "s.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(scoring_engines, "train_run", cutting(train_run))
        patch.setattr(scoring_engines, "observe_shard", cutting(observe_shard))
        with pytest.raises(Cut):
            score(samples, method=METHODS, model=small, out=out, **SMALL)
    assert not list(tmp_path.glob("*.parquet"))
    score(samples, method=METHODS, model=small, out=out, **SMALL)
    names = sorted(p.name for p in tmp_path.glob("*.parquet"))
    assert names == sorted(p.name for p in undisturbed.parent.glob("*.parquet"))
    for name in names:
        assert (tmp_path / name).read_bytes() == (undisturbed.parent / name).read_bytes()
    assert not (tmp_path / "s.parquet.parts").exists()


def test_cut_off_inside_a_training_run_goes_on_from_its_checkpoint(
    samples: ImageSamples, undisturbed: Path, tmp_path: Path
) -> None:
    """Cut in the middle of the second epoch; the first is not trained again."""
    out = tmp_path / "s.parquet"

    def progress(what: str, done: int, total: int) -> None:
        seen.append((what, done))
        if stop and what == "training run-100-000" and done == 2:
            raise Cut

    seen: list[tuple[str, int]] = []
    stop = True
    with pytest.raises(Cut):
        score(samples, method=METHODS, model=small, out=out, progress=progress, **SMALL)
    stop = False
    seen.clear()
    score(samples, method=METHODS, model=small, out=out, progress=progress, **SMALL)
    assert seen[0] == ("training run-100-000", 2)
    for path in undisturbed.parent.glob("*.parquet"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_shards_do_not_change_the_scores(samples: ImageSamples, undisturbed: Path) -> None:
    """One shard or four: the same, up to the rounding of other batch sizes."""
    whole = score(samples, method=METHODS, model=small, training=TRAINING, runs=2)
    for name in METHODS:
        table = ScoreTable.read(undisturbed.with_name(f"s-{name}.parquet"))
        torch.testing.assert_close(table.scores, whole[name].scores, rtol=1e-5, atol=1e-6)


@pytest.fixture
def cut_off(samples: ImageSamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the parts of an unfinished run lie."""

    def cut(*_: Any) -> float:
        raise Cut

    out = tmp_path / "s.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(scoring_engines, "observe_shard", cut)
        with pytest.raises(Cut):
            score(samples, method="el2n", model=small, out=out, **SMALL)
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"method": "loss"}, "methods.el2n"),
        ({"training": TrainingConfig(epochs=4)}, "training.epochs was 3, now 4"),
        ({"shard_size": 16}, "shard_size was 32, now 16"),
        ({"early": 2}, "early was 1, now 2"),
    ],
)
def test_parts_of_other_settings_are_refused(
    changes: dict[str, Any], message: str, samples: ImageSamples, cut_off: Path
) -> None:
    arguments = {"method": "el2n", "model": small, "out": cut_off, **SMALL, **changes}
    with pytest.raises(RunError, match=message):
        score(samples, **arguments)


def test_parts_of_other_data_are_refused(samples: ImageSamples, cut_off: Path) -> None:
    other = ImageSamples(samples.images.flip(0), samples.labels.flip(0))
    with pytest.raises(RunError, match="fingerprint was"):
        score(other, method="el2n", model=small, out=cut_off, **SMALL)


def test_a_foreign_or_damaged_part_is_refused(samples: ImageSamples, cut_off: Path) -> None:
    """A shard of other settings under the right name; then half a file."""
    parts = cut_off.with_name("s.parquet.parts")
    foreign = open_parts(parts.with_name("other"), {"seed": 9})
    foreign.save_shard(0, {"id": torch.arange(32), "el2n": torch.zeros(32)})
    shard = parts / "shard-00000.pt"
    shutil.copy(foreign.shard(0), shard)
    with pytest.raises(RunError, match="belongs to another run"):
        score(samples, method="el2n", model=small, out=cut_off, **SMALL)
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(RunError, match=r"shard-00000\.pt: damaged, .*delete it"):
        score(samples, method="el2n", model=small, out=cut_off, **SMALL)
    settings = json.loads((parts / "settings.json").read_text())
    own = open_parts(parts, {k: v for k, v in settings.items() if k not in ("checksum", "of")})
    own.save_shard(1, {"id": torch.arange(32), "el2n": torch.zeros(32)})
    own.shard(1).rename(shard)
    with pytest.raises(RunError, match=r"part is 'shard-00000\.pt', the checkpoint's 'shard-00001"):
        score(samples, method="el2n", model=small, out=cut_off, **SMALL)
    shard.unlink()
    score(samples, method="el2n", model=small, out=cut_off, **SMALL)


def test_a_second_process_takes_what_the_first_has_finished(
    samples: ImageSamples, cut_off: Path, tmp_path: Path
) -> None:
    """It waits for the lock; the folder is gone then, and the table is there."""
    parts, other = cut_off.with_name("s.parquet.parts"), tmp_path / "other.parquet"
    with ThreadPoolExecutor(1) as pool, locked(parts):
        second = pool.submit(score, samples, method="el2n", model=small, out=cut_off, **SMALL)
        first = score(samples, method="el2n", model=small, out=other, **SMALL)
        assert not second.done()
        other.rename(cut_off)
        shutil.rmtree(parts)
        assert torch.equal(second.result().scores, first.scores)
    assert not parts.exists()


def test_force_does_not_take_parts_from_a_process_at_work(
    samples: ImageSamples, cut_off: Path
) -> None:
    parts = cut_off.with_name("s.parquet.parts")
    arguments = {"method": "el2n", "model": small, "out": cut_off, "force": True, **SMALL}
    with locked(parts), pytest.raises(RunError, match="another process is running in"):
        score(samples, **arguments)
    assert (parts / "settings.json").exists()
    score(samples, **{**arguments, "seed": 4})
    assert ScoreTable.read(cut_off).seed == 4
    with pytest.raises(ScoreError, match="unknown method"):
        score(samples, **{**arguments, "method": "magic"})
    assert ScoreTable.read(cut_off).seed == 4


def test_a_missing_package_is_named_before_a_model_is_trained(
    samples: ImageSamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kronfluence", None)
    out = tmp_path / "s.parquet"
    with pytest.raises(NotInstalledError, match=r"'influence-ekfac' .* 'fedprune\[influence\]'"):
        score(samples, method=["loss", "influence-ekfac"], model=small, out=out, **SMALL)
    assert not list(tmp_path.iterdir())


def test_parts_keep_matrices_and_types(tmp_path: Path) -> None:
    parts = open_parts(tmp_path / "p", {"a": 1})
    columns = {
        "id": torch.arange(3),
        "vector": torch.randn(3, 5),
        "right": torch.tensor([[True, False], [False, False], [True, True]]),
        "score": torch.randn(3, dtype=torch.float64),
    }
    parts.save_shard(7, columns)
    found = parts.load_shard(7)
    assert found.keys() == columns.keys()
    for name, values in columns.items():
        assert found[name].dtype == values.dtype
        assert torch.equal(found[name], values)


def test_a_table_of_other_settings_is_not_overwritten(
    samples: ImageSamples, tmp_path: Path
) -> None:
    out = tmp_path / "s.parquet"
    score(samples, method="random", out=out)
    before = out.read_bytes()
    with pytest.raises(RunError, match="seed was 0, now 1"):
        score(samples, method="random", out=out, seed=1)
    with pytest.raises(RunError, match="method was 'random', now 'el2n'"):
        score(samples, method="el2n", model=small, out=out, **SMALL)
    assert out.read_bytes() == before


class NotANumber(ImageClassification):
    """Whose loss is NaN for some samples, but only where it is looked at, not trained."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses = super().loss(model, batch)
        return losses if model.training else losses.where(batch[1] != 3, torch.nan)


def test_nan_scores_are_written_with_a_warning_and_not_selected_by(
    samples: ImageSamples, tmp_path: Path
) -> None:
    count = int((samples.labels == 3).sum())
    first = int(samples.ids[samples.labels == 3][0])
    out = tmp_path / "s.parquet"
    with pytest.warns(ScoreWarning, match=rf"{count} of 100 scores are not finite \(ids {first},"):
        score(samples, method="loss", model=small, task=NotANumber(), out=out, **SMALL)
    table = ScoreTable.read(out)
    assert int(table.scores.isnan().sum()) == count
    assert table.provenance["notes"]
    with pytest.raises(SelectionError):
        select(table, keep=0.5)


def test_constant_scores_are_written_with_a_warning_and_not_selected_by(
    samples: ImageSamples,
) -> None:
    """A model of zeros has the same loss, ln 10, for everything."""
    model = small(0).eval()
    for parameter in model.parameters():
        parameter.data.zero_()
    with pytest.warns(ScoreWarning, match=r"all 100 scores are 2.30259 \(ids 0 ... 99\)"):
        table = score(samples, method="loss", model=model)
    with pytest.raises(SelectionError):
        select(table, keep=0.5)


def test_a_sparse_proxy_is_checked_against_the_dense_model(
    samples: ImageSamples, tmp_path: Path
) -> None:
    out = tmp_path / "s.parquet"
    table = score(samples, method="el2n", model=small, out=out, density=0.3, check=True, **SMALL)
    dense = score(samples, method="el2n", model=small, **SMALL)
    assert torch.equal(ScoreTable.read(dense_path(out)).scores, dense.scores)
    assert not torch.equal(table.scores, dense.scores)
    found = proxy_check(out)
    assert found is not None
    assert -1 <= found[0].spearman <= 1
    assert found[1] is not None
    assert found[1] > 0
    assert json.loads(times_path(out).read_text())["processor_seconds"] > 0


def test_a_trained_model_is_scored_as_it_is(samples: ImageSamples) -> None:
    from datapruning.scores.gradient import grand  # noqa: PLC0415

    model = small(0).eval()
    table = score(samples, method="grand", model=model)
    batch = samples.batch(torch.arange(len(samples)))
    expected = grand(ImageClassification(), model, batch)
    torch.testing.assert_close(table.scores, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ScoreError, match="trains models of its own"):
        score(samples, method="aum", model=model)


def test_a_language_model_is_scored_without_classes() -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return type("Output", (), {"logits": self.head(self.embed(input_ids))})()

    class Averaged(CausalLM):
        def embedding(self, model: Any, batch: Any) -> Tensor:
            vectors: Tensor = model.embed(batch["input_ids"]).mean(1)
            return vectors

    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (12, 6), generator=random)
    texts = TokenSamples(ids, torch.ones_like(ids), ids)
    torch.manual_seed(0)
    model = Tiny().eval()
    table = score(texts, method=["loss", "grand"], model=model, task=CausalLM())
    with torch.no_grad():
        expected = CausalLM().loss(model, texts.batch(torch.arange(12))).double()
    torch.testing.assert_close(table["loss"].scores, expected)
    with pytest.raises(ScoreError, match="for samples with classes"):
        score(texts, method="el2n", model=model, task=CausalLM())
    # A text without targets has no loss, and cannot be selected by it; its influence is 0.
    targets = ids.clone()
    targets[3, 1:] = -100
    some = TokenSamples(ids, torch.ones_like(ids), targets)
    methods = ["loss", "grand", "semdedup", "influence-cg"]
    with pytest.warns(ScoreWarning, match=r"1 of 12 scores are not finite \(ids 3\)"):
        again = score(some, method=methods, model=model, task=Averaged())
    for name in ("loss", "grand"):
        rest = torch.arange(12) != 3
        assert again[name].scores[3].isnan()
        torch.testing.assert_close(again[name].scores[rest], table[name].scores[rest])
        with pytest.raises(SelectionError, match="NaN or infinite, the first of ids 3"):
            again[name].select(keep=3, policy="easiest")
    assert bool(again["semdedup"].scores.isfinite().all())
    influence = again["influence-cg"].scores
    assert float(influence[3]) == 0
    assert bool((influence[rest] != 0).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "magic"}, "known methods"),
        ({"method": []}, "no method given"),
        ({"engine": "steam"}, "expected one of inline, ray"),
        ({"density": 0.0}, "density must be in"),
        ({"runs": 0}, "runs must be at least 1"),
        ({"early": 0}, "early must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"training": TrainingConfig(steps=5)}, "give training.epochs, not steps"),
        ({"options": {"window": 3}}, "no option 'window'"),
        ({"density": 0.5, "check": True}, "give out"),
        ({"model": "gpt"}, "known models"),
    ],
)
def test_what_scoring_refuses(
    arguments: dict[str, Any], message: str, samples: ImageSamples
) -> None:
    given = {"method": "el2n", "model": small, "training": TRAINING, **arguments}
    with pytest.raises((ScoreError, RunError, ValueError), match=message):
        score(samples, **given)


def test_global_random_state_and_threads_are_left_alone(samples: ImageSamples) -> None:
    torch.manual_seed(5)
    expected, before = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(5)
    score(samples, method="el2n", model=small, threads=2, **SMALL)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == before
