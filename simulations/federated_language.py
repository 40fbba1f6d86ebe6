"""Pruning a language model over clients that are the roles of plays.

    python -m simulations.federated_language --model FOLDER --data TEXT

The text's paragraphs begin with `ROLE:`; the roles that say most are the clients. The last tenth of
what each says is for testing and chooses nothing. Every method begins with the same model and
trains it on the same samples; the seed draws which, the random mask and the order of batches.
Every run leaves its outcome in a file; a finished one is not run again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fedprune
from fedprune.methods import GMP, PERP, GraNet, Magnitude, Method, RandomMask, Wanda
from prunelab.data.samples import TokenSamples
from prunelab.data.sides import SampleSet
from prunelab.errors import DataError, PrunelabError
from prunelab.language.models import read_model, read_tokenizer
from prunelab.language.perplexity import perplexity
from prunelab.language.text import drawn, parted, read_text, sequences
from simulations.jobs import FINISHED, Outcome, check_settings, parsed, run_jobs, workers_of
from simulations.page import commits_of, page, publish, table, without_paths
from simulations.statistics import told_ratio, told_values
from sparsemodel.masks.mask import Mask

METHODS: Mapping[str, Callable[[float], Method]] = {
    "fedavg": lambda density: Method(),
    "random": RandomMask,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "perp": PERP,
    "perp-fast": PERP,
    "gmp": GMP,
    "granet": GraNet,
}
RATES = {"perp-fast": 10.0}
"""What few parameters are trained take larger steps: the rate over the others'."""
CONTROL = "magnitude"
BATCH = 8


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Attributes:
        model, data: a causal language model, and a text of roles.
        roles: clients.
        samples: sequences of `length` tokens that each trains on, at most.
        lr: of AdamW in the first round; it falls along half a cosine.
    """

    model: str
    data: str
    density: float
    roles: int
    samples: int
    length: int
    rounds: int
    lr: float


def spoken(text: str) -> dict[str, str]:
    r"""What each role says, in the order of how much that is.

    >>> spoken("A:\nYes.\n\nBoth:\nNo, no.\n\nA:\nAh.\n")
    {'A': 'Yes.\n\nAh.', 'Both': 'No, no.'}

    Raises:
        DataError: a text without roles.
    """
    said: dict[str, list[str]] = {}
    for paragraph in text.strip().split("\n\n"):
        role, colon, words = paragraph.partition(":\n")
        if colon and "\n" not in role:
            said.setdefault(role, []).append(words)
    if not said:
        raise DataError("the text has no paragraph that begins with a line such as 'ROLE:'")
    whole = {role: "\n\n".join(parts) for role, parts in said.items()}
    return dict(sorted(whole.items(), key=lambda item: -len(item[1])))


@cache
def pools(setting: Setting) -> dict[str, tuple[Tensor, Tensor]]:
    """Role -> its sequences for training and for testing.

    Raises:
        DataError: fewer roles, or one that says too little.
    """
    tokenizer, said = read_tokenizer(setting.model), spoken(read_text(setting.data))
    if len(said) < setting.roles:
        raise DataError(f"the text has {len(said)} roles; expected {setting.roles}")
    chosen = list(said)[: setting.roles]
    return {r: parted(sequences(said[r], tokenizer, length=setting.length)) for r in chosen}


def samples_of(setting: Setting, seed: int) -> SampleSet:
    """Each role's sequences, drawn by the seed, with the role as their natural client."""
    shares = [drawn(pool, setting.samples, seed=seed) for pool, _ in pools(setting).values()]
    owners = [torch.full((len(share),), place) for place, share in enumerate(shares)]
    train, test = _texts(torch.cat(shares)), _texts(held_back(setting))
    return SampleSet("roles", train, test, train_groups=torch.cat(owners))


def held_back(setting: Setting) -> Tensor:
    """All roles' sequences for testing."""
    return torch.cat([test for _, test in pools(setting).values()])


def _texts(tokens: Tensor) -> TokenSamples:
    return TokenSamples(tokens, torch.ones_like(tokens), tokens)


@dataclass(frozen=True)
class RolesJob:
    """One federation: a method and a seed."""

    setting: Setting
    method: str
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its outcome."""
        return f"{self.method}-{self.seed}"

    def run(self, out: Path) -> Outcome:
        """Train, and measure the model, and what its mask does before any training."""
        del out
        setting, test = self.setting, held_back(self.setting)
        model = read_model(setting.model)
        with tempfile.TemporaryDirectory() as folder:
            result = fedprune.run(
                model=lambda: read_model(setting.model),
                data=samples_of(setting, self.seed),
                method=METHODS[self.method](setting.density),
                rounds=setting.rounds,
                clients=setting.roles,
                seed=self.seed,
                optimizer="adamw",
                folder=Path(folder) / "run",
                settings={
                    "data.partition": "natural",
                    "training.lr": setting.lr * RATES.get(self.method, 1.0),
                    "training.batch_size": BATCH,
                    "training.local_epochs": 1,
                    "training.weight_decay": 0.0,
                    "server.pretrain_epochs": 0,
                    "server.per_class": 1,  # the fewest: ten sequences that nobody uses
                },
            )
            patterns, (begun, *rounds) = result.state.patterns, result.metrics
            start = perplexity(model, test)
            if patterns is not None:
                Mask.from_csr(patterns).apply(model)
            values = {
                "start": start,
                "pruned": perplexity(model, test),
                "perplexity": perplexity(result.model, test),
                "density": result.summary["density"],
                "bytes_before": begun["bytes_up"],
                "bytes_up": [line["bytes_up"] for line in rounds],
            }
        return Outcome(FINISHED, values=values)


def jobs_of(setting: Setting, methods: Sequence[str], seeds: Sequence[int]) -> list[RolesJob]:
    """Seed by seed every method."""
    return [RolesJob(setting, method, seed) for seed in seeds for method in methods]


def body(jobs: Sequence[RolesJob], found: Mapping[str, Outcome]) -> list[str]:
    """The tables: perplexities, bytes, what is told apart from magnitude."""
    done: dict[str, dict[int, Mapping[str, Any]]] = {}
    for job in jobs:
        if found[job.name].status == FINISHED:
            done.setdefault(job.method, {})[job.seed] = found[job.name].values

    def last(method: str) -> dict[int, float]:
        return {seed: value["perplexity"] for seed, value in done.get(method, {}).items()}

    rows = []
    for method, runs in done.items():
        each = list(runs.values())
        sent = [value["bytes_up"] for value in each]
        rows.append([
            method,
            f"{statistics.mean(value['density'] for value in each):.3f}",
            told_values([value["pruned"] for value in each], ".2f"),
            told_values(last(method).values(), ".3f"),
            "" if method == CONTROL else told_ratio(last(method), last(CONTROL), ".3f"),
            _kilobytes([value["bytes_before"] for value in each]),
            _kilobytes([up[0] for up in sent]),
            _kilobytes([up[-1] for up in sent]),
            _kilobytes([value["bytes_before"] + sum(value["bytes_up"]) for value in each]),
        ])  # fmt: skip
    starts = sorted({value["start"] for runs in done.values() for value in runs.values()})
    return [
        *(f"The model's perplexity before all is {start:.2f}." for start in starts),
        "",
        "Perplexity of the start's weights under the last mask, and after the rounds; ln: the "
        f"natural logarithm of the latter over that of `{CONTROL}`, paired by seeds, with its "
        "95 % interval, below zero is better. Then kB that all clients send together: before the "
        "first round, in the first, in the last, in all.",
        "",
        table(
            ["method", "density", "pruned", "trained", "ln", "before", "first", "last", "all"], rows
        ),
    ]


def _kilobytes(values: Sequence[float]) -> str:
    return f"{statistics.mean(values) / 1e3:,.0f}"


def parse(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[RolesJob], Path]:
    """The command line, its runs, and where they go.

    Raises:
        SystemExit: it asks for what cannot be; nothing has been run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m simulations.federated_language",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a folder, a .gguf file, or a hub's name")
    parser.add_argument("--data", required=True, help="a text whose paragraphs begin with ROLE:")
    parser.add_argument("--title", default="", help="what the page calls the model")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--roles", type=int, default=10, help="clients")
    parser.add_argument("--samples", type=int, default=16, help="sequences of a client, at most")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW in the first round")
    parser.add_argument("--out", type=Path, help="where runs go; default runs/NAME-MODEL")
    given = parsed(parser, words)
    given.title = given.title or Path(given.model).name
    methods = given.methods.split(",")
    setting = Setting(
        given.model, given.data, given.density, given.roles, given.samples, given.length,
        given.rounds, given.lr,
    )  # fmt: skip
    out = given.out or Path("runs") / f"federated_language-{given.title}"
    try:
        if unknown := [method for method in methods if method not in METHODS]:
            raise ValueError(f"no method {unknown[0]!r}; there are {', '.join(METHODS)}")
        for method in methods:
            METHODS[method](given.density)
        pools(setting)
        check_settings(out, asdict(setting))
    except (PrunelabError, ValueError) as error:
        parser.error(str(error))
    return given, jobs_of(setting, methods, range(given.seeds)), out


def main() -> None:
    """Run what is missing and write the page."""
    given, jobs, out = parse()
    with workers_of(given, on_gpus=False) as workers:
        found = run_jobs(jobs, out, workers)
    setting = asdict(jobs[0].setting)
    text = page(
        f"Pruning {given.title} over the roles of plays",
        command=f"python -m simulations.federated_language --model {given.title} --data TEXT",
        at=commits_of(found.values()),
        notes=[
            f"mean ± sample standard deviation over {given.seeds} seeds, which draw each role's "
            "samples, the random mask and the order of batches",
            "all linear layers of the blocks are pruned, the output layer, which is tied to the "
            "embedding, and the embedding are not",
            "the last tenth of what each role says is for testing and chooses nothing; no method's "
            "settings were tuned, and all have the same learning rate but `perp-fast`, "
            "which is `perp` with ten times that",
        ],
        body=body(jobs, found),
        settings=without_paths(setting),
    )
    publish(text, out / "table.md", found.values())


if __name__ == "__main__":
    main()
