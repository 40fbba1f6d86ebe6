"""DEALRec on Amazon Games: few samples against all of them, scoring time included.

python -m simulations.dealrec_games --data FOLDER [--preset small|full] [--seeds 0,1,2]
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datapruning.recommend.effort import answer_error, answer_loss, effort
from datapruning.recommend.finetune import FinetuneConfig, finetune
from datapruning.recommend.grounding import language_recommender
from datapruning.recommend.histories import Histories, HistorySamples, Question
from datapruning.recommend.overall import overall_table, select_covering
from datapruning.recommend.readers import read
from datapruning.recommend.steps import (
    Language,
    PromptSettings,
    effort_table,
    influence_table,
    load_language,
)
from datapruning.recommend.surrogate import (
    SurrogateConfig,
    evaluate,
    popularity_recommender,
    sasrec_recommender,
    train_surrogate,
)
from datapruning.selection.select import select
from datapruning.selection.table import ScoreTable
from prunelab.data.samples import TokenSamples
from prunelab.runs.provenance import commit
from prunelab.runs.seeds import generator
from simulations.dealrec_table import GROWING, page
from sparsemodel.storage.files import write_atomically

ARMS = ("full", "random", "influence", "effort", "dealrec", "grand", "el2n", "ccs")
BUDGETS = ("steps", "epochs")
CUTOFFS = (10, 20)


@dataclass(frozen=True)
class Preset:
    """One size of the experiment.

    Attributes:
        model: scratch:SIZE (all weights are fine-tuned) or a name of transformers (LoRA).
        users: drawn once for all seeds, whose samples are the pool; None: all.
        test_users: drawn once from all users with test items; None: all of them.
        keep: share of the pool's samples that every method but "full" trains on.
        weight: λ of DEALRec.
        early: share of the full run's steps after which GraNd and EL2N look at the model.
        fractions: larger shares, at which DEALRec and random choice are tried as well, at equal
            steps: where do they reach all samples?
    """

    model: str
    users: int | None
    test_users: int | None
    surrogate: SurrogateConfig
    training: FinetuneConfig
    max_titles: int = 10
    max_length: int = 256
    keep: float = 0.02
    weight: float = 0.3
    early: float = 0.1
    fractions: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75)


PRESETS = {
    "small": Preset(
        model="scratch:tiny",
        users=5000,
        test_users=3000,
        surrogate=SurrogateConfig(epochs=40, patience=5, negatives=512),
        training=FinetuneConfig(epochs=2, batch_size=32, lr=1e-3),
        max_titles=5,
        max_length=96,
    ),
    "full": Preset(
        model="HuggingFaceTB/SmolLM2-360M",
        users=None,
        test_users=None,
        surrogate=SurrogateConfig(),
        training=FinetuneConfig(epochs=3, batch_size=128, lr=3e-4, tokens=16384),
    ),
}


@dataclass(frozen=True)
class Bench:
    """What all cells of a run share."""

    preset: Preset
    histories: Histories
    pool: Histories
    samples: HistorySamples
    question: Question
    out: Path
    device: str

    @classmethod
    def open(cls, data: str, preset: Preset, out: Path, device: str) -> Bench:
        histories, _ = read(data)
        pool, question = histories, histories.question("test")
        if preset.users is not None:
            order = torch.randperm(len(histories.users), generator=generator(0, 0))
            pool = histories.take(order[: preset.users].sort().values)
        if preset.test_users is not None:
            order = torch.randperm(len(question), generator=generator(0, 1))
            question = question.take(order[: preset.test_users].sort().values)
        return cls(preset, histories, pool, HistorySamples(pool), question, out, device)

    def language(self) -> Language:
        """The model as it is before it has seen a history; the same for every seed and method."""
        preset = self.preset
        return load_language(
            preset.model,
            self.histories,
            settings=PromptSettings(max_length=preset.max_length, max_titles=preset.max_titles),
            device=self.device,
            base=self.out / "base",
            report=_say,
        )


def run_seed(data: str, preset: Preset, seed: int, out: Path, device: str) -> None:
    """All cells of a seed, those that are there already left as they are."""
    _be_quiet()
    bench = Bench.open(data, preset, out, device)
    folder = out / f"s{seed}"
    tables = score_all(bench, seed, folder)
    tokens = bench.language().prompts.samples(bench.samples)
    for arm in ARMS:
        rows = _rows(arm, bench, tables, seed, keep=preset.keep)
        for budget in BUDGETS if arm != "full" else ("steps",):
            cell = folder / f"{arm}-{budget}"
            _cell(cell, partial(_trained, bench, tokens, rows, budget, seed))
            found = json.loads((cell / "result.json").read_text())
            _say(f"seed {seed}, {arm}, equal {budget}: {_short(found)}")
    for fraction in preset.fractions:
        for arm in GROWING:
            rows = _rows(arm, bench, tables, seed, keep=fraction)
            cell = folder / f"{arm}-{fraction:g}"
            _cell(cell, partial(_trained, bench, tokens, rows, "steps", seed))
            found = json.loads((cell / "result.json").read_text())
            _say(f"seed {seed}, {arm}, {fraction:g} kept: {_short(found)}")


def score_all(bench: Bench, seed: int, folder: Path) -> dict[str, ScoreTable]:
    """Every score of a seed; each in a folder of its own, with the seconds that it took."""
    preset = bench.preset

    def of_influence(cell: Path) -> dict[str, Any]:
        influence_table(
            bench.pool, bench.samples, cell,
            config=preset.surrogate, seed=seed, device=bench.device, report=_say,
        )  # fmt: skip
        return {}

    def of_effort(cell: Path) -> dict[str, Any]:
        model = bench.language()
        effort_table(bench.pool, bench.samples, cell, language_model=model, seed=seed, report=_say)
        return {}

    def classic(name: str) -> Callable[[Path], dict[str, Any]]:
        def score(cell: Path) -> dict[str, Any]:
            _early_table(bench, name, seed).write(cell / f"{name}.parquet")
            return {}

        return score

    makers: dict[str, Callable[[Path], dict[str, Any]]]
    makers = {"influence": of_influence, "effort": of_effort}
    makers |= {name: classic(name) for name in ("grand", "el2n")}
    for name, make in makers.items():
        _cell(folder / f"score-{name}", make)
    tables = {
        name: ScoreTable.read(folder / f"score-{name}" / f"{name}.parquet") for name in makers
    }
    both = tables["influence"], tables["effort"]
    return {**tables, "dealrec": overall_table(*both, weight=preset.weight)}


def _early_table(bench: Bench, name: str, seed: int) -> ScoreTable:
    """GraNd or EL2N of the answers, after a share of the full run."""
    language = bench.language()
    tokens, training = language.prompts.samples(bench.samples), bench.preset.training
    model = language.adapted(seed=seed)
    steps = max(1, round(bench.preset.early * training.num_steps(len(tokens))))
    finetune(model, tokens, config=replace(training, steps=steps), seed=seed)
    scores = effort(model, tokens) if name == "grand" else answer_error(model, tokens)
    return ScoreTable(
        ids=bench.samples.ids,
        scores=scores,
        method=name,
        dataset=bench.pool.name,
        fingerprint=bench.samples.fingerprint,
        seed=seed,
        model=language.name,
        provenance={"steps": steps},
    )


def _rows(
    arm: str, bench: Bench, tables: Mapping[str, ScoreTable], seed: int, *, keep: float
) -> Tensor:
    """The samples of the pool that an arm trains on, int64 row numbers."""
    samples = bench.samples
    if arm == "full":
        return torch.arange(len(samples))
    if arm in ("influence", "effort", "dealrec"):
        return select_covering(tables[arm], keep=keep, seed=seed).rows(samples)
    policy = {"random": "random", "ccs": "ccs"}.get(arm, "hardest")
    table = tables[{"random": "grand", "ccs": "el2n"}.get(arm, arm)]
    return select(table, keep=keep, policy=policy, seed=seed).rows(samples)


def _trained(
    bench: Bench, tokens: TokenSamples, rows: Tensor, budget: str, seed: int, _: Path
) -> dict[str, Any]:
    """Fine-tune on the rows and rank all items for the test users."""
    training, language = bench.preset.training, bench.language()
    if budget == "steps":
        training = replace(training, steps=training.num_steps(len(tokens)))
    model = language.adapted(seed=seed)
    started = _clock(bench.device)
    result = finetune(model, tokens, config=training, seed=seed, rows=rows)
    seconds = _clock(bench.device) - started
    metrics = evaluate(
        language_recommender(model, language.prompts), bench.question, cutoffs=CUTOFFS
    )
    targets = bench.question.targets
    pairs = language.prompts.questions(bench.question.history, targets.values[targets.starts[:-1]])
    return {
        **{name: float(values.mean()) for name, values in metrics.items()},
        "test_loss": float(answer_loss(model, pairs).mean()),
        "train_loss": sum(result.losses[-10:]) / len(result.losses[-10:]),
        "num_samples": len(rows),
        "steps": result.steps,
        "samples_seen": result.samples_seen,
        "finetune_seconds": seconds,
    }


def references(bench: Bench) -> dict[str, dict[str, float]]:
    """Popularity and the surrogate itself on the same test users."""
    found = {"popularity": popularity_recommender(bench.pool)}
    model, _ = train_surrogate(
        bench.pool, config=bench.preset.surrogate, seed=0, device=bench.device,
        checkpoint=bench.out / "s0" / "score-influence" / "surrogate.ckpt",
    )  # fmt: skip
    found["sasrec"] = sasrec_recommender(model)
    return {
        name: {k: float(v.mean()) for k, v in evaluate(r, bench.question, cutoffs=CUTOFFS).items()}
        for name, r in found.items()
    }


def _cell(folder: Path, make: Callable[[Path], dict[str, Any]]) -> None:
    """Run a cell from its start unless its result is there; a cut-off one would hide its time."""
    if (folder / "result.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = _clock(device)
    found = make(folder)
    found |= {"seconds": _clock(device) - started, "commit": commit()}
    write_atomically(folder / "result.json", json.dumps(found, indent=1).encode())


def _clock(device: str) -> float:
    """Processor time where the processor computes: other processes do not count."""
    return time.perf_counter() if device.startswith("cuda") else time.process_time()


def _short(found: Mapping[str, float]) -> str:
    return (
        f"NDCG@10 {found['ndcg@10']:.5f}, test loss {found['test_loss']:.3f}, "
        f"{found['finetune_seconds']:.0f} s"
    )


def _say(text: str) -> None:
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m simulations.dealrec_games")
    parser.add_argument("--data", required=True, help="folder of histories, see recommend.readers")
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--model", help="another language model")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: runs/dealrec_games-PRESET")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    given = parser.parse_args(arguments)
    preset = PRESETS[given.preset]
    if given.model:
        preset = replace(preset, model=given.model)
    out = given.out or Path("runs") / f"dealrec_games-{given.preset}"
    seeds = [int(seed) for seed in given.seeds.split(",")]
    _be_quiet()
    _check_settings(out / "preset.json", preset)
    bench = Bench.open(given.data, preset, out, given.device)
    _cell(out / "base-cost", lambda _: {"titles": len(bench.language().prompts.titles)})
    if given.jobs == 1:
        for seed in seeds:
            run_seed(given.data, preset, seed, out, given.device)
    else:
        with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as workers:
            runs = [
                workers.submit(run_seed, given.data, preset, seed, out, given.device)
                for seed in seeds
            ]
            for run in runs:
                run.result()
    text = page(out, seeds, settings=_flat(preset), fractions=preset.fractions,
                pool=len(bench.samples), questions=len(bench.question),
                references=references(bench),
                command=f"--preset {given.preset} --seeds {given.seeds}")  # fmt: skip
    suffix = "" if given.preset == "small" else f"_{given.preset}"
    target = Path(__file__).parent / f"dealrec_games{suffix}.md"
    if given.model:
        target = out / "table.md"
    target.write_text(text, encoding="utf-8")
    print(text)
    print(f"table: {target}")


def _be_quiet() -> None:
    """One thread, and no progress bar for every model that is read."""
    import transformers  # noqa: PLC0415

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def _check_settings(path: Path, preset: Preset) -> None:
    """Cells of other settings must not end up in one table."""
    settings = json.dumps(asdict(preset), indent=1)
    if path.exists() and path.read_text(encoding="utf-8") != settings:
        raise SystemExit(f"{path} has other settings; name another folder by --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(settings, encoding="utf-8")


def _flat(preset: Preset) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in asdict(preset).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": v for inner, v in value.items()}
        else:
            flat[name] = value
    return flat


if __name__ == "__main__":
    main()
