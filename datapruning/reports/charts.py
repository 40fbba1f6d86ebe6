"""The charts of score and training reports: plain numbers in, one inline SVG element out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from prunelab.pages import plots
from prunelab.pages.plots import ACCENT, GRID, HALF, INK, MUTED, SECOND, WHOLE

if TYPE_CHECKING:
    from prunelab.data.arrays import Array

BINS = 40
LARGEST = 1e150  # the sizes of a chart's axes would not be finite much above
EMPTY = 0.7  # where a logarithmic scale shows 0
FEW_METHODS = 9


def histogram_chart(
    scores: Array | Sequence[float],
    kept: Array | Sequence[float] | None,
    *,
    name: str,
    label: str,
) -> Markup:
    """How scores are spread, and below it the share of each bin that is kept.

    Two plots and no bars over bars: on a logarithmic scale those would show no share. Counts are
    logarithmic, drawn as an outline, where one bin holds more than half of all samples.

    Args:
        scores: of all samples, between ±`LARGEST`.
        kept: of the kept ones, or None.
        label: what a screen reader says; this and every other chart has one.
    """
    import numpy as np  # noqa: PLC0415

    low, high = float(np.min(scores)), float(np.max(scores))
    span, largest = high - low, max(abs(low), abs(high))
    if span <= max(1e-12 * largest, 1e-290):  # as good as equal: bins would have no width
        span = max(largest, 1.0)
    width = span / BINS
    edges = [low + width * k for k in range(BINS + 1)]
    counts, _ = np.histogram(scores, bins=edges)
    with plots.figure(HALF, 2.4 if kept is None else 3.1) as figure:
        if kept is None:
            axes = bottom = figure.add_subplot()
        else:
            axes, bottom = figure.subplots(nrows=2, sharex=True, height_ratios=[3, 1.3])
            shares = np.histogram(kept, bins=edges)[0] / np.maximum(counts, 1)
            bottom.bar(edges[:-1], 100 * shares, width=width, align="edge", color=ACCENT)
            bottom.set(ylabel="kept, %", ylim=(0, 104), yticks=(0, 50, 100))
            bottom.grid(visible=False, axis="x")
        if max(counts) > len(scores) / 2:
            axes.stairs(np.maximum(counts, EMPTY), edges, baseline=None, color=MUTED)
            axes.set_yscale("log")
            axes.set_ylim(bottom=EMPTY)
            axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, position: "")
            axes.set_ylabel("samples (log)")
        else:
            axes.stairs(counts, edges, fill=True, color=MUTED)
            axes.set_ylabel("samples")
        bottom.set_xlabel(f"score by {name} (high: keep)")
        axes.grid(visible=False, axis="x")
        return plots.svg(figure, label)


def matrix_chart(names: Sequence[str], values: Sequence[Sequence[float]], *, label: str) -> Markup:
    """A square of rank correlations, from −1 (second colour) over 0 to 1 (accent)."""
    from matplotlib.colors import to_rgba  # noqa: PLC0415

    size = len(names)
    with plots.figure(HALF if size <= FEW_METHODS else WHOLE, 1.2 + 0.36 * size) as figure:
        axes = figure.add_subplot()
        for row in range(size):
            for column in range(size):
                value = values[row][column]
                if math.isfinite(value):
                    colour = to_rgba(ACCENT if value >= 0 else SECOND, 0.75 * abs(value))
                    axes.fill_between(
                        [column - 0.48, column + 0.48], row - 0.46, row + 0.46,
                        color=colour, linewidth=0,
                    )  # fmt: skip
                text = f"{value:.2f}" if math.isfinite(value) else "–"
                axes.text(column, row, text, ha="center", va="center", color=INK, fontsize=8)
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
        axes.set_xticks(range(size), names, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(size), names)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return plots.svg(figure, label)


def balance_chart(before: Sequence[int], after: Sequence[int], *, label: str) -> Markup:
    """Samples of each class before and after a selection."""
    with plots.figure(plots.class_width(len(before)), 2.5) as figure:
        axes = figure.add_subplot()
        places = range(len(before))
        axes.bar(places, before, width=0.8, color=GRID, label="before")
        axes.bar(places, after, width=0.5, color=ACCENT, label="kept")
        share = sum(after) / max(sum(before), 1)
        fair = [share * count for count in before]
        axes.plot(
            places, fair, linestyle="none", marker="_", markersize=13, color=SECOND,
            label="equal share",
        )  # fmt: skip
        axes.set(xlabel="class", ylabel="samples")
        plots.class_ticks(axes, len(before))
        axes.grid(visible=False, axis="x")
        plots.legend(axes)
        return plots.svg(figure, label)


def curve_chart(
    x: Sequence[float],
    values: Sequence[float],
    *,
    name: str,
    xlabel: str,
    ylabel: str,
    label: str,
    marked: float | None = None,
) -> Markup:
    """A named line; `marked` is a point on the x axis to point out."""
    with plots.figure(HALF, 2.5) as figure:
        axes = figure.add_subplot()
        plots.lines(axes, x, [(name, values)])
        if marked is not None:
            axes.axvline(marked, color=SECOND, linestyle="--", linewidth=1.2, label="chosen")
            plots.legend(axes)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        return plots.svg(figure, label)


def class_chart(accuracies: Sequence[float | None], kept: Sequence[int], *, label: str) -> Markup:
    """Test accuracy of each class above the number of its training samples."""
    with plots.figure(plots.class_width(len(kept)), 2.9) as figure:
        above, below = figure.subplots(nrows=2, sharex=True, height_ratios=[3, 2])
        heights = [math.nan if value is None else 100 * value for value in accuracies]
        _class_bars(above, heights, color=ACCENT)
        _class_bars(below, kept, color=GRID)
        above.set(ylabel="accuracy, %", ylim=(0, 104))
        below.set(xlabel="class", ylabel="kept")
        plots.class_ticks(below, len(kept))
        return plots.svg(figure, label)


def _class_bars(axes: Any, heights: Sequence[float], *, color: str) -> None:
    axes.bar(range(len(heights)), heights, width=0.75, color=color)
    axes.grid(visible=False, axis="x")
