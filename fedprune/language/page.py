"""The page of a pruned language model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from prunelab.pages import plots
from prunelab.pages.page import Fact, Figure, Page, Section, Table, Text, settings
from prunelab.pages.units import NOTHING, format_bytes, format_seconds
from sparsemodel.pipeline.stages import CONTROLS

_ASKED = ("model", "data", "test", "units", "unit_criterion", "unit_kind", "criterion", "pattern",
          "density", "recover", "samples", "length", "tested", "seed")  # fmt: skip


def pruning_page(summary: Mapping[str, Any]) -> Page:
    """What a summary says, for people."""
    dense, pruned = summary["perplexity_dense"], summary["perplexity"]
    share = summary["prunable"] / summary["parameters"]
    return Page(
        product="fedprune",
        kind="language model",
        heading=f"{_way(summary)} at density {summary['density']:.4g}",
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
            Section("Stages", [
                Table(
                    ("stage", "density", "perplexity", "times dense", "time"),
                    [["dense", "1", _number(dense), "1.00", NOTHING]] + [
                        [one["told"], f"{one['density']:.4f}", _number(one["perplexity"]),
                         f"{one['perplexity'] / dense:.2f}", format_seconds(one["seconds"])]
                        for one in summary["stages"]
                    ],
                ),
                Text("Densities are kept shares of all weights that can be pruned, over all stages "
                     "so far.", is_note=True),
            ]),
            Section("Beside controls", [
                Table(("mask", "perplexity", "times dense"), result_rows(summary), marked=1),
                Text("All masks have the same density, up to whole units. A choice that does not "
                     "beat a random one says nothing. Controls are not mended.", is_note=True),
            ]),
            *([Section("Block by block", [Figure(
                _chart(summary["perplexity_by_block"]),
                "Perplexity on the first test sequences once the weights of so many blocks are "
                "pruned, from the first on.",
            )])] if summary["perplexity_by_block"] else []),
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
    known = {
        "dense": summary["perplexity_dense"],
        summary["way"]: summary["perplexity_chosen"],
        _way(summary): summary["perplexity"],
    }
    for name in CONTROLS:
        if name not in known and summary[f"perplexity_{name}"] is not None:
            known[name] = summary[f"perplexity_{name}"]
    dense = summary["perplexity_dense"]
    return [[name, _number(value), f"{value / dense:.2f}"] for name, value in known.items()]


def _way(summary: Mapping[str, Any]) -> str:
    return ", ".join([summary["way"], *summary["recover"]])


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
