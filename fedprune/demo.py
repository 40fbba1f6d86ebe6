"""`fedprune demo`: a short run that says what it does and what it took."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprune.config import METHOD_NAME, RunConfig
from fedprune.front import Result
from fedprune.methods import BASELINES, DEFAULT_METHOD
from fedprune.methods.base import Method
from fedprune.reports.progress import Watch, is_round
from fedprune.rounds import run as runner
from fedprune.rounds.folder import MODEL
from prunelab.data.datasets import load_dataset
from prunelab.pages.units import format_bytes, percent
from prunelab.runs.folder import refuse_used

Say = Callable[[str], None]
DATASET, DENSITY = "digits", "method.density"
SHOWN, WIDTH, BAR = 4, 78, 30
INK = " .:+#@"
"""From paper to ink, in letters that every terminal has."""


def demo(folder: Path, *, rounds: int, seed: int, say: Say) -> Result:
    """Train a tiny network on eight clients, and a dense one beside it, and tell each step.

    Args:
        folder: a new one, for both runs, "pruned" and "dense".
        say: is given each line.

    Returns:
        The pruned run.

    Raises:
        RunError: there is something in it; nothing was computed.
    """
    values = {"data.dataset": DATASET, "training.rounds": rounds, "seed": seed}
    tiny = RunConfig.parse({**values, METHOD_NAME: DEFAULT_METHOD})
    dense = RunConfig.parse({**values, METHOD_NAME: Method.name})
    path, beside = folder / "pruned", folder / "dense"
    refuse_used(folder)

    def tell(line: Mapping[str, Any]) -> None:
        for text in _lines_of(line, tiny):
            say(text)

    _paragraph(say, "1. Samples stay where they are", (
        f"{tiny.data.clients} clients share scikit-learn's pictures of handwritten digits. Each "
        "has its own mix of labels, as people's phones have. No client sees another's pictures."
    ))  # fmt: skip
    watch = Watch(path, tiny, show=tell)
    result = Result(path, runner.run(tiny, path, engine="inline", progress=watch))
    _paragraph(say, "4. What it took", "The same rounds again with all weights, to compare:")
    for text in costs(result.summary, runner.run(dense, beside, engine="inline")):
        say(text)
    _paragraph(say, "5. The model at work", (
        f"{MODEL} holds the kept weights alone, and computes with them. It reads digits that "
        "nobody trained on:"
    ))  # fmt: skip
    images = load_dataset(DATASET).test_images[:SHOWN].numpy()
    for text in drawn(images, result.predict(images).classes):
        say(text)
    _paragraph(say, "Where to go from here", f"The page of this run is {result.report}.")
    for command, what in NEXT:
        say(f"  {command}  # {what}")
    return result


COMPARED = ",".join([*BASELINES, DEFAULT_METHOD])
NEXT = (
    ("fedprune run --dataset FOLDER --model resnet18", "your pictures"),
    (f"fedprune compare --methods {COMPARED}", "methods side by side"),
    ("datapruning score digits --method el2n --out s.parquet", "which samples matter"),
    ("fedprune fleet up --nodes 4 --dir my-fleet", "real processes"),
)


def _lines_of(line: Mapping[str, Any], config: RunConfig) -> list[str]:
    """What a line of metrics.jsonl says."""
    if line.get("event") == "start":
        return [*clients(line["clients"]), "", *candidates(line["selection"], config), ""]
    if not is_round(line):
        return []
    share = line["test_accuracy"]
    bar = "#" * round(BAR * share)
    moved = "  mask moves" if line["adjusted"] else ""
    each = format_bytes(line["bytes_up"] / len(line["clients"]))
    number = f"round {line['round']:>2}"
    return [f"  {number}  {bar:<{BAR}} {percent(share)}  {each} up{moved}"]


def clients(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many samples of each label each client has, as a table."""
    width = max(len(str(count)) for line in lines for count in line["labels"]) + 2
    rows = [f"  {'label':<9}" + "".join(f"{k:>{width}}" for k in range(len(lines[0]["labels"])))]
    for line in lines:
        counts = "".join(f"{count or '.':>{width}}" for count in line["labels"])
        rows.append(f"  client {line['client']:<2}{counts}")
    return rows


def candidates(selection: Mapping[str, Any], config: RunConfig) -> list[str]:
    """The masks that clients were shown, and which one they took."""
    lines = [
        "2. Clients choose a mask",
        *_wrapped(
            f"The server prunes {config.model_name} to {percent(config.flat()[DENSITY])} of its "
            f"weights in {len(selection['losses'])} ways. Each client measures the batch-norm "
            "statistics of each on its own samples, and the loss with them."
        ),
    ]
    for place, loss in enumerate(selection["losses"]):
        taken = "  <- taken" if place == selection["winner"] else ""
        lines.append(f"  candidate {place + 1}  loss {loss:.3f}{taken}")
    return [
        *lines,
        "",
        "3. Clients train what the mask keeps",
        *_wrapped(
            "They hold, compute and send the kept weights alone. Now and then the mask moves to "
            "where gradients are large. Bars show the accuracy on test samples."
        ),
    ]


def costs(tiny: Mapping[str, Any], dense: Mapping[str, Any]) -> list[str]:
    """What the pruned run took, beside a dense one with nothing but what it has to hold."""
    lines = [f"  {'':<34}{'pruned':>12}{'dense':>12}"]
    for label, own, other, shown in (
        ("accuracy on test samples", "test_accuracy", dense["test_accuracy"], percent),
        ("a client's message in a round", "bytes_up_steady_round", tiny["bytes_dense_round"],
         format_bytes),
        ("weights, gradients and momentum", "state_bytes", tiny["state_bytes_dense"],
         format_bytes),
    ):  # fmt: skip
        lines.append(f"  {label:<34}{shown(tiny[own]):>12}{shown(other):>12}")
    return lines


def drawn(images: NDArray[np.uint8], classes: Sequence[str]) -> list[str]:
    """Pictures side by side in letters, with what they are called.

    Args:
        images: uint8 [n, 1, height, width].
    """
    levels = images[:, 0].astype(int) * (len(INK) - 1) // max(1, int(images.max()))
    width = 2 * images.shape[-1] + 2
    rows = [
        "  " + "".join("".join(2 * INK[level] for level in line).ljust(width) for line in row)
        for row in levels.transpose(1, 0, 2).tolist()
    ]
    return [*rows, "  " + "".join(f"-> {name}".center(width) for name in classes)]


def _paragraph(say: Say, title: str, text: str) -> None:
    say(f"\n{title}")
    for line in _wrapped(text):
        say(line)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH)
