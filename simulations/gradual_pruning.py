"""Pruning a small language model while it trains, beside pruning it once and small dense ones.

    python -m simulations.gradual_pruning [--data TEXT]

A causal language model of characters is trained from random weights on a text, or on sentences of a
small grammar. Every way has the same number of steps, batches and learning rates. The last tenth
of the text is for testing and chooses nothing. Every run leaves its outcome in a file; a finished
one is not run again.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from prunelab.errors import PrunelabError
from prunelab.language.perplexity import perplexity
from prunelab.language.text import parted, read_text, sequences
from simulations.jobs import FINISHED, Outcome, check_settings, parsed, run_jobs, workers_of
from simulations.page import commits_of, page, publish, table
from simulations.statistics import told_ratio, told_values
from sparsemodel.loops.gradual import GradualPruner, gmp, granet, journey
from sparsemodel.masks.by_blocks import block_weights
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.schedule import GradualPlan, average_density, cosine

EVERY = 5  # steps from one change of a mask to the next
RETRAINED = 0.5  # of the steps, after pruning once
BATCH = 8
Plan = Callable[[float, int], GradualPlan]
"""Density and steps of the run -> plan."""


def _once(density: float, steps: int) -> GradualPlan:
    """All at once, after the first part of the steps."""
    at = round(steps * (1 - RETRAINED))
    return gmp(density, start=at - 1, end=at, every=1)


WAYS: Mapping[str, Plan] = {
    "magnitude, once": _once,
    "GMP": lambda density, steps: gmp(density, start=steps // 10, end=steps // 2, every=EVERY),
    "25-75 %": lambda density, steps: journey(density, steps=steps, every=EVERY),
    "GraNet": lambda density, steps: granet(
        density, start=steps // 10, end=3 * steps // 4, every=EVERY
    ),
}
"""Of training that ends sparse."""
NARROW = "dense, as many on average"
"""A dense model of as many parameters as "25-75 %" has on average."""
DENSE = "dense"


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Attributes:
        data: a text; "": the grammar's.
        width: features of a token; layers: blocks; length: characters of a sequence.
        lr: of AdamW at first; it falls along half a cosine to zero.
    """

    data: str
    steps: int
    width: int = 64
    layers: int = 2
    length: int = 64
    lr: float = 3e-3


def grammar_text(seed: int, *, num_sentences: int) -> str:
    """Sentences of a grammar with agreement in number across a clause, and sums that are right."""
    drawn = random.Random(seed)
    one = {"cat": "cats", "bird": "birds", "child": "children", "wolf": "wolves", "king": "kings"}
    verbs = {"sees": "see", "follows": "follow", "fears": "fear", "loves": "love", "helps": "help"}
    adjectives = ["old", "small", "grey", "quiet", "brave"]

    def noun(*, plural: bool) -> str:
        word = drawn.choice(sorted(one))
        described = [drawn.choice(adjectives)] * drawn.randint(0, 1)
        return " ".join(["the", *described, one[word] if plural else word])

    def verb(*, plural: bool) -> str:
        word = drawn.choice(sorted(verbs))
        return verbs[word] if plural else word

    lines = []
    for _ in range(num_sentences):
        if drawn.random() < 0.2:
            a, b = drawn.randint(0, 9), drawn.randint(0, 9)
            lines.append(f"{a} and {b} make {a + b}.")
            continue
        plural, other = drawn.random() < 0.5, drawn.random() < 0.5
        clause = ""
        if drawn.random() < 0.4:
            clause = f" that {verb(plural=plural)} {noun(plural=other)}"
        subject = f"{noun(plural=plural)}{clause} {verb(plural=plural)}"
        lines.append(f"{subject} {noun(plural=drawn.random() < 0.5)}.")
    return "\n".join(lines)


@cache
def sides(setting: Setting) -> tuple[Tensor, Tensor, int]:
    """Sequences of characters for training and for testing, and how many characters there are."""
    text = read_text(setting.data) if setting.data else grammar_text(0, num_sentences=6000)
    places = {letter: place for place, letter in enumerate(sorted(set(text)))}

    def characters(given: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [places[letter] for letter in given]}

    pool, test = parted(sequences(text, characters, length=setting.length))
    return pool, test[:256], len(places)


def made(
    setting: Setting, *, vocabulary: int, seed: int, width: int = 0, inner: int = 0
) -> nn.Module:
    """A Llama of random weights, of the setting's width where none is given."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - takes seconds

    torch.manual_seed(seed)
    width = width or setting.width
    inner = inner or 8 * width // 3 // 4 * 4
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner,
        num_hidden_layers=setting.layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=setting.length,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    return model


def num_parameters(model: nn.Module) -> int:
    """All of a model's."""
    return sum(p.numel() for p in model.parameters())


def narrow(setting: Setting, *, vocabulary: int, seed: int, parameters: float) -> nn.Module:
    """A dense model of as many parameters: of the nearest width, and feed-forward parts to fit."""

    def off(width: int) -> float:
        return abs(
            num_parameters(made(setting, vocabulary=vocabulary, seed=0, width=width)) - parameters
        )

    width = min(range(8, setting.width + 1, 8), key=off)
    known = num_parameters(made(setting, vocabulary=vocabulary, seed=0, width=width, inner=1))
    step = 3 * width * setting.layers
    inner = max(1, 1 + round((parameters - known) / step))
    return made(setting, vocabulary=vocabulary, seed=seed, width=width, inner=inner)


@dataclass(frozen=True)
class TrainJob:
    """One run: a way, its density, a seed."""

    setting: Setting
    way: str
    density: float
    seed: int

    @property
    def name(self) -> str:
        """Of its outcome."""
        words = self.way.replace(", ", "-").replace(" % ", " ").replace(" %", "")
        return f"{words.replace(' ', '_')}-{self.density:g}-{self.seed}"

    def run(self, out: Path) -> Outcome:
        """Train and measure."""
        del out
        pool, test, vocabulary = sides(self.setting)
        started = time.process_time()
        model = made(self.setting, vocabulary=vocabulary, seed=self.seed)
        names = [name for block in block_weights(model).values() for name in block]
        mask = Mask(
            {name: torch.ones(model.get_parameter(name).shape, dtype=torch.bool) for name in names}
        )
        if self.way == NARROW:
            shares = average_density(
                WAYS["25-75 %"](self.density, self.setting.steps).density_after, self.setting.steps
            )
            average = num_parameters(model) - (1 - shares) * mask.num_weights
            model = narrow(self.setting, vocabulary=vocabulary, seed=self.seed, parameters=average)
        is_sparse = self.way in WAYS
        plan = WAYS[self.way](self.density, self.setting.steps) if is_sparse else None
        trained = train(model, pool, self.setting, seed=self.seed, plan=plan, mask=mask)
        values = {
            "perplexity": perplexity(model, test),
            "average_parameters": trained,
            "processor_seconds": time.process_time() - started,
        }
        return Outcome(FINISHED, values=values)


def train(
    model: nn.Module, pool: Tensor, setting: Setting, *, seed: int, plan: GradualPlan | None,
    mask: Mask,
) -> float:  # fmt: skip
    """Train in place; the model's parameters averaged over the steps."""
    drawn = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=0.01)
    pruner = None if plan is None else GradualPruner(model, optimizer, plan=plan, mask=mask)
    model.train()
    for step in range(setting.steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, value=setting.lr, end=setting.steps)
        tokens = pool[torch.randint(len(pool), (BATCH,), generator=drawn)]
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if pruner is not None:
            pruner.step()
    if pruner is None:
        return float(num_parameters(model))
    assert plan is not None
    pruner.release()
    return pruner.average_parameters


def jobs_of(setting: Setting, densities: Sequence[float], seeds: Sequence[int]) -> list[TrainJob]:
    """Seed by seed the dense model, then every way at every density."""
    return [
        job
        for seed in seeds
        for job in (
            TrainJob(setting, DENSE, 1.0, seed),
            *(TrainJob(setting, way, d, seed) for d in densities for way in (*WAYS, NARROW)),
        )
    ]


def body(jobs: Sequence[TrainJob], found: Mapping[str, Outcome]) -> list[str]:
    """The tables: perplexities, what is told apart, and the average parameters."""
    done = {job: found[job.name].values for job in jobs if found[job.name].status == FINISHED}
    densities = sorted({job.density for job in jobs if job.way != DENSE})
    header = ["way", *(f"{density:g}" for density in densities)]

    def values(way: str, density: float, what: str) -> dict[int, float]:
        return {
            job.seed: value[what] for job, value in done.items()
            if (job.way, job.density) == (way, density)
        }  # fmt: skip

    def against(way: str, other: str, density: float) -> str:
        return told_ratio(*(values(each, density, "perplexity") for each in (way, other)), ".3f")

    def rows(ways: Sequence[str], cell: Callable[[str, float], str]) -> list[list[str]]:
        return [[way, *(cell(way, density) for density in densities)] for way in ways]

    def measured(way: str, density: float) -> str:
        return told_values(values(way, density, "perplexity").values(), ".3f")

    def trained(way: str, density: float) -> str:
        each = values(way, density, "average_parameters").values()
        return told_values([statistics.mean(each)] if each else [], ",.0f")

    dense = list(values(DENSE, 1.0, "perplexity").values())
    everyone = (*WAYS, NARROW)
    once = next(iter(WAYS))
    return [
        "## Perplexity of a character", "",
        f"The dense model's is {told_values(dense, '.3f')}.", "",
        table(header, rows(everyone, measured)),
        "", "## Against pruning once", "",
        f'The natural logarithm of the perplexity over that of "{once}", paired by seeds, with its '
        "95 % interval: below zero is better.", "",
        table(header, rows([w for w in WAYS if w != once], lambda w, d: against(w, once, d))),
        "", "## The middle half of the run against a dense model of as many parameters", "",
        table(header, rows(["25-75 %"], lambda w, d: against(w, NARROW, d))),
        "", "## Parameters, averaged over the steps", "",
        "Embeddings, norms and the output layer are whole, and counted.", "",
        table(header, rows(everyone, trained)),
    ]  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.gradual_pruning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", default="", help="a text; default: sentences of a grammar")
    parser.add_argument("--densities", default=".1,.2,.5")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/gradual_pruning"))
    given = parsed(parser, words)
    setting = Setting(given.data, given.steps)
    try:
        sides(setting)
        check_settings(given.out, asdict(setting))
        densities = [float(density) for density in given.densities.split(",")]
    except (PrunelabError, ValueError) as error:
        parser.error(str(error))
    jobs = jobs_of(setting, densities, range(given.seeds))
    with workers_of(given, on_gpus=False) as workers:
        found = run_jobs(jobs, given.out, workers)
    shown = {name: value for name, value in asdict(setting).items() if name != "data"}
    text = page(
        "Pruning a small language model while it trains",
        command=f"python -m simulations.gradual_pruning --steps {given.steps}"
        + (" --data TEXT" if given.data else ""),
        at=commits_of(found.values()),
        notes=[
            f"mean ± sample standard deviation over {given.seeds} seeds of weights and batches",
            "all runs have the same steps, batches and learning rates; none was tuned",
            "densities are those of the blocks' linear layers at the end",
            '"magnitude, once" prunes halfway; GMP from 10 to 50 % of the steps, GraNet from 10 to '
            "75 %: ways differ in how many weights they train on average",
            *([] if given.data else ["the text is 6000 sentences of a grammar, not a language"]),
        ],
        body=body(jobs, found),
        settings=shown,
    )
    # Only the whole grid on the text that everybody has replaces the saved page.
    asked = ("data", "densities", "seeds", "steps")
    is_whole = all(getattr(given, name) == parser.get_default(name) for name in asked)
    saved = Path(__file__).with_suffix(".md") if is_whole else given.out / "table.md"
    publish(text, saved, found.values())


if __name__ == "__main__":
    main()
