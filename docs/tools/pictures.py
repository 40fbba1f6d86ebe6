"""Draws the pictures of the pages anew: python docs/tools/pictures.py

Drawings are drawn; accuracies by round and the losses of candidates come from small runs on digits,
the accuracies of kept shares from the saved page simulations/ten_metrics.md. The same input gives
the same files.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import fedprune
from fedprune.methods import DEFAULT_METHOD, FedTiny, FedTinyVanillaSelection
from fedprune.methods.base import Method
from fedprune.methods.fedtiny.progressive import is_adjustment_round
from prunelab.networks.blocks import parameter_blocks
from prunelab.networks.build import build_model
from sparsemodel.masks.schedule import block_of_adjustment, cosine

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
TEAL, ORANGE, GRAY, PALE, INK = "#00796b", "#e65100", "#9e9e9e", "#e0f2f1", "#263238"


def main() -> None:
    """Write every picture."""
    mpl.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "fedprune", "font.family": "sans-serif",
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
        "text.color": INK, "axes.labelcolor": INK,
    })  # fmt: skip
    PICTURES.mkdir(exist_ok=True)
    for draw in (run, round_, selection, progressive, storage, keep, blocks):
        figure = draw()
        name = draw.__name__.rstrip("_")
        figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})


def run() -> Figure:
    """The README's command beside the same run with all weights: accuracy, and bytes for it."""
    figure = Figure(figsize=(8.4, 2.9), layout="constrained")
    rounds, sent = figure.subplots(1, 2, sharey=True)
    with tempfile.TemporaryDirectory() as folder:
        for method, colour, label in (
            (DEFAULT_METHOD, TEAL, "5 % of the weights"),
            (Method.name, GRAY, "all weights"),
        ):
            result = fedprune.run(data="digits", method=method, folder=f"{folder}/{method}")
            start, *lines = result.metrics
            clients = len(start["clients"])
            both = [line["bytes_up"] + line["bytes_down"] for line in result.metrics]
            accuracy = [100 * line["test_accuracy"] for line in lines]
            megabytes = np.cumsum(both)[1:] / clients / 1e6
            rounds.plot([line["round"] for line in lines], accuracy, color=colour, label=label)
            sent.plot(megabytes, accuracy, color=colour)
    rounds.set(xlabel="round", ylabel="test accuracy, %", xticks=[1, 5, 10, 15, 20])
    rounds.legend(frameon=False, loc="lower right")
    sent.set(xlabel="sent and received by a client so far, MB", xscale="log")
    return figure


def round_() -> Figure:
    """What travels in a steady round, and when the mask changes."""
    figure, axes = _paper(9.0, 3.9)
    _box(axes, (0.2, 1.2, 2.0, 1.6), "server\n\nmask, values,\nsum of answers")
    for row, name in enumerate(("client 1", "client 2", "client N")):
        place = (6.8, 2.75 - 1.25 * row, 2.0, 1.0)
        _box(axes, place, f"{name}\nown samples, mask,\nactive weights")
        y = 3.25 - 1.25 * row
        _arrow(axes, (2.25, 2.25 - 0.1 * row), (6.75, y + 0.12), TEAL)
        _arrow(axes, (6.75, y - 0.18), (2.25, 1.85 - 0.2 * row), ORANGE)
    axes.text(4.4, 3.55, "down: active values", color=TEAL, ha="center")
    axes.text(4.4, 0.05, "up: trained active values", color=ORANGE, ha="center")
    axes.text(
        1.2, 0.35, "mask changes:\ngradients go up,\nthe difference\nof masks goes down",
        ha="center", va="center", fontsize=8.5,
    )  # fmt: skip
    return figure


def selection() -> Figure:
    """Losses of the same candidates with and without adapted batch norm."""
    figure = Figure(figsize=(7.0, 3.0), layout="constrained")
    axes = figure.add_subplot()
    for shift, method, colour, label in (
        (-0.2, FedTinyVanillaSelection, GRAY, "statistics of the start"),
        (0.2, FedTiny, TEAL, "statistics of all clients under the candidate"),
    ):
        found = _selection(method(density=0.2, pool_size=6))
        losses, places = found["losses"], np.arange(len(found["losses"]))
        bars = axes.bar(places + shift, losses, 0.38, color=colour, label=label)
        bars[found["winner"]].set_edgecolor(ORANGE)
        bars[found["winner"]].set_linewidth(2.5)
    axes.set(xlabel="candidate mask", ylabel="mean loss of the clients")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=2, frameon=False)
    return figure


def _selection(method: FedTiny) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        settings = {"server.per_class": 20, "server.pretrain_epochs": 20}
        result = fedprune.run(
            model="resnet8", data="digits", method=method, rounds=1, clients=4, seed=0,
            settings=settings, folder=f"{folder}/run",
        )  # fmt: skip
        return dict(result.metrics[0]["selection"])


def progressive() -> Figure:
    """FedTiny's exchanged share and moved block, by its own functions, with its defaults."""
    method, rounds = FedTiny(), 20
    until = method.last_adjustment(rounds)
    net = build_model("resnet8", num_classes=10, input_shape=(1, 8, 8), seed=0)
    names = parameter_blocks(net, granularity=method.granularity)
    figure = Figure(figsize=(8.0, 2.8), layout="constrained")
    share, moved = figure.subplots(1, 2)
    steps = np.linspace(0, until, 100)
    curve = [cosine(step, value=method.adjust_rate, end=until) for step in steps]
    share.plot(steps, [100 * value for value in curve], color=GRAY)
    adjusted = [
        r for r in range(1, rounds + 1)
        if is_adjustment_round(r, every=method.adjust_every, until=until)
    ]  # fmt: skip
    points = [100 * cosine(r, value=method.adjust_rate, end=until) for r in adjusted]
    share.plot(adjusted, points, "o", color=TEAL)
    share.set(xlim=(0, rounds), xlabel="round", ylabel="weights exchanged, %")
    blocks_moved = [block_of_adjustment(i, len(names)) for i in range(len(adjusted))]
    moved.plot(adjusted, blocks_moved, "s", color=TEAL, markersize=9)
    labels = [f"{name[0].split('.')[0]}" for name in names]
    moved.set(xlim=(0, rounds), xlabel="round", yticks=range(len(names)), yticklabels=labels)
    moved.set_ylim(-0.5, len(names) - 0.5)
    return figure


def storage() -> Figure:
    """A layer's dense matrix and what a sparse layer stores of it."""
    weights = np.random.default_rng(3).normal(size=(4, 8)).round(1)
    mask = np.random.default_rng(5).random((4, 8)) < 0.25
    figure, axes = _paper(9.0, 3.4)
    for row, column in np.ndindex(*mask.shape):
        colour = TEAL if mask[row, column] else "white"
        _cell(axes, 0.3 + 0.42 * column, 2.4 - 0.42 * row, colour, weights[row, column]
              if mask[row, column] else "")  # fmt: skip
    axes.text(1.98, 3.05, "a layer under its mask: outputs × inputs", ha="center")
    axes.text(1.98, 0.65, "a dense layer stores all 32 numbers", ha="center", color=GRAY)
    _arrow(axes, (3.85, 1.9), (4.5, 1.9), INK)
    rows, columns = np.nonzero(mask)
    starts = np.concatenate([[0], np.cumsum(mask.sum(1))])
    stored = (
        ("values (float32)", weights[rows, columns], TEAL),
        ("cols (int32)", columns, PALE),
        ("row_ptr (int32)", starts, PALE),
    )
    for line, (name, numbers, colour) in enumerate(stored):
        y = 2.3 - 0.85 * line
        axes.text(4.7, y + 0.52, name)
        for place, number in enumerate(numbers):
            _cell(axes, 4.7 + 0.42 * place, y, colour, number)
    axes.text(4.7, 0.15, "gradients, momentum and growth are as long as values", color=INK)
    return figure


def keep() -> Figure:
    """Accuracy over the kept share, of the saved page."""
    text = (ROOT / "simulations" / "ten_metrics.md").read_text(encoding="utf-8")
    section = text.split("## Equal epochs")[1].split("Best choices")[0]
    shown = {
        "random": (GRAY, "o-"),
        "rs2": (INK, "^--"),
        "prototypes-ssl, hardest": (TEAL, "s-"),
        "forgetting, hardest": ("#5e35b1", "D-"),
        "el2n, hardest": (ORANGE, "v-"),
        "el2n, easiest": (ORANGE, "v:"),
    }
    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for offset, (name, (colour, style)) in enumerate(shown.items()):
        cells = re.search(rf"^\| {re.escape(name)} \| (.+) \|$", section, re.MULTILINE)
        assert cells is not None, name
        pairs = [tuple(map(float, cell.split(" ± "))) for cell in cells[1].split(" | ")]
        shares = np.array([20, 50, 80]) + 0.4 * (offset - 2.5)
        means, spreads = zip(*pairs, strict=True)
        axes.errorbar(shares, means, spreads, fmt=style, color=colour, label=name, capsize=2)
    whole = re.search(r"^\| all data \| ([\d.]+)", section, re.MULTILINE)
    assert whole is not None
    axes.axhline(float(whole[1]), color=GRAY, linewidth=0.8, linestyle="dashed")
    axes.text(35, float(whole[1]) + 0.6, "all data", color=GRAY, ha="center")
    axes.set(xlabel="kept, %", ylabel="test accuracy, %", xticks=[20, 50, 80])
    axes.legend(frameon=False, loc="lower right")
    return figure


def blocks() -> Figure:
    """Pruning a language model block by block."""
    figure, axes = _paper(9.0, 3.2)
    states = ("pruned", "pruned", "being pruned", "still dense", "still dense")
    colours = (PALE, PALE, "#ffe0b2", "white", "white")
    _box(axes, (0.1, 1.2, 1.1, 1.0), "sequences\nof a text")
    _arrow(axes, (1.22, 1.7), (1.58, 1.7), INK)
    for place, (state, colour) in enumerate(zip(states, colours, strict=True)):
        left = 1.6 + 1.5 * place
        _box(axes, (left, 1.2, 1.1, 1.0), f"block {place + 1}\n{state}", colour)
        if place < len(states) - 1:
            _arrow(axes, (left + 1.12, 1.7), (left + 1.48, 1.7), INK if place < 2 else GRAY)
    axes.text(
        5.15, 2.75, "1  measure the inputs of its layers\n2  score weights, make the mask\n"
        "3  run it again: its outputs are the next block's inputs",
        ha="center", va="center", fontsize=9,
    )  # fmt: skip
    axes.text(3.1, 0.75, "what reaches block 3 has gone\nthrough pruned blocks", ha="center",
              va="center", color=TEAL, fontsize=9)  # fmt: skip
    axes.text(7.2, 0.75, "not looked at yet", ha="center", va="center", color=GRAY, fontsize=9)
    return figure


def _paper(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure whose coordinates are inches."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _box(
    axes: Axes, place: tuple[float, float, float, float], text: str, colour: str = PALE
) -> None:
    """A box with words in it; its place is left, low, width, height."""
    left, low, width, height = place
    patch = FancyBboxPatch(
        (left, low), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=colour,
        edgecolor=INK, linewidth=1.0,
    )  # fmt: skip
    axes.add_patch(patch)
    middle = (left + width / 2, low + height / 2)
    axes.text(*middle, text, ha="center", va="center", fontsize=9)


def _cell(axes: Axes, left: float, low: float, colour: str, content: object) -> None:
    axes.add_patch(
        FancyBboxPatch((left, low), 0.4, 0.4, boxstyle="square,pad=0", facecolor=colour,
                       edgecolor=GRAY, linewidth=0.7)
    )  # fmt: skip
    light = "white" if colour == TEAL else INK
    axes.text(
        left + 0.2, low + 0.2, str(content), ha="center", va="center", fontsize=8, color=light
    )


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.annotate(
        "", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.5}
    )


if __name__ == "__main__":
    main()
