"""The page of a pruned language model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from prunelab.pages import plots
from prunelab.pages.page import Fact, Figure, Page, Section, Table, Text, settings
from prunelab.pages.units import NOTHING, format_bytes, format_seconds

CONTROLS = ("magnitude", "random")
"""Criteria that any other has to beat."""
_ASKED = ("model", "data", "test", "criterion", "pattern", "density", "samples", "length",
          "tested", "seed")  # fmt: skip


def pruning_page(summary: Mapping[str, Any]) -> Page:
    """What a summary says, for people."""
    dense, pruned = summary["perplexity_dense"], summary["perplexity"]
    share = summary["prunable"] / summary["parameters"]
    return Page(
        product="fedprune",
        kind="language model",
        heading=f"{summary['criterion']} at density {summary['density']:.4g}",
        subtitle=f"{summary['model']} · seed {summary['seed']}",
        facts=[
            Fact("perplexity", _number(pruned), f"dense {_number(dense)}"),
            Fact("pruned weights", f"{summary['pruned']:,}", f"of {summary['prunable']:,}"),
            Fact(
                "all parameters", f"{summary['parameters']:,}",
                f"{share:.0%} of them in the layers that are pruned",
            ),
            Fact("folder", format_bytes(summary["model_bytes"]),
                 f"with a mask of {format_bytes(summary['mask_bytes'])}"),
            Fact("time", format_seconds(summary["seconds"])),
        ],
        note="Perplexity is exp of the mean cross-entropy of the next token. Embeddings, norms and "
        "the output layer are not pruned. The folder holds zeros, so it is as large as the dense "
        "model's.",
        sections=[
            Section("Beside controls", [
                Table(("mask", "perplexity", "times dense"), result_rows(summary), marked=1),
                Text("All masks have the same density in every layer. A choice that does not beat "
                     "a random one says nothing.", is_note=True),
            ]),
            Section("Block by block", [Figure(
                _chart(summary["perplexity_by_block"]),
                "Perplexity on the first test sequences once so many blocks are pruned, from the "
                "first on.",
            )]),
            Section("Layers", [Table(
                ("layer", "density"),
                [[name, f"{density:.4f}"] for name, density in summary["layer_densities"].items()],
                scrolls="Layers",
            )]),
            Section("Settings", [settings({n: summary[n] for n in _ASKED}, top="prune")]),
        ],
        footer=f"Made by fedprune {summary['version']}. The test text was used for the record "
        "only.",
    )  # fmt: skip


def result_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Mask, perplexity, and how many times that of the dense model: dense first, then ours."""
    known = {"dense": summary["perplexity_dense"], summary["criterion"]: summary["perplexity"]}
    for name in CONTROLS:
        if name != summary["criterion"] and summary[f"perplexity_{name}"] is not None:
            known[name] = summary[f"perplexity_{name}"]
    dense = summary["perplexity_dense"]
    return [[name, _number(value), f"{value / dense:.2f}"] for name, value in known.items()]


def _number(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:,.2f}" if math.isfinite(value) else "infinite"


def _chart(values: Sequence[float]) -> Markup:
    shown = [value if math.isfinite(value) else math.nan for value in values]
    with plots.figure(plots.HALF, 2.6) as figure:
        axes = figure.add_subplot()
        plots.lines(axes, list(range(len(shown))), [("", shown)])
        axes.set(xlabel="blocks pruned", ylabel="perplexity")
        if max(shown) > 20 * min(shown):
            axes.set_yscale("log")
        ends = f"from {_number(values[0])} to {_number(values[-1])}"
        return plots.svg(figure, f"Perplexity by blocks pruned: {ends}")
