"""The charts of a run's report: plain numbers in, one inline SVG element out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from markupsafe import Markup

from prunelab.pages import plots
from prunelab.pages.plots import ACCENT, GRID, HALF, INK, MUTED, SECOND, SURFACE

SHADES = 10
NAME_LENGTH = 44


def quality_chart(
    rounds: Sequence[int],
    values: Sequence[float],
    adjusted: Sequence[int],
    *,
    name: str,
    label: str,
) -> Markup:
    """Test accuracy, or what else the model is judged by, by round.

    Args:
        rounds: round numbers, ascending.
        values: one a round; NaN leaves a gap.
        adjusted: those of `rounds` after which the mask was adjusted.
        name: of the axis.
        label: what a screen reader says; this and every other chart has one.
    """
    shown = dict(zip(rounds, values, strict=True))
    with plots.figure(HALF, 2.6) as figure:
        axes = figure.add_subplot()
        plots.lines(axes, rounds, [("", list(shown.values()))])
        if adjusted:
            axes.plot(
                adjusted,
                [shown[number] for number in adjusted],
                linestyle="none",
                marker="o",
                markersize=6.5,
                markerfacecolor=SURFACE,
                markeredgecolor=SECOND,
                markeredgewidth=1.6,
                label="mask adjusted",
            )
            plots.legend(axes)
        axes.set(xlabel="round", ylabel=name)
        return plots.svg(figure, label)


def traffic_chart(
    rounds: Sequence[int],
    up: Sequence[float],
    down: Sequence[float],
    *,
    dense: float | None,
    format_value: Callable[[float], str],
    label: str,
) -> Markup:
    """Bytes sent by all clients (up) and to all clients (down) by round.

    The scale is logarithmic where the values span more than a factor of eight.

    Args:
        dense: bytes of the same clients' messages under dense federated averaging, each way.
        format_value: bytes -> text of a tick.
    """
    with plots.figure(HALF, 2.6) as figure:
        axes = figure.add_subplot()
        plots.lines(axes, rounds, [("up", up), ("down", down)])
        if dense:
            axes.axhline(dense, color=MUTED, linestyle="--", linewidth=1.2, label="dense, each way")
        positive = [value for value in (*up, *down, dense or 0) if value > 0]
        if positive and max(positive) > 8 * min(positive):
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(lambda value, position: "")
        else:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, position: format_value(value))
        axes.set(xlabel="round", ylabel="bytes of all clients")
        plots.legend(axes)
        return plots.svg(figure, label)


def density_chart(
    names: Sequence[str],
    before: Sequence[float | None],
    after: Sequence[float | None],
    *,
    after_label: str,
    label: str,
) -> Markup:
    """Density of each layer at the start and later, one line a layer.

    The scale is logarithmic where the densities span more than a factor of twenty.

    Args:
        before, after: one density in [0, 1] a layer; None where it is not known.
        after_label: what `after` is, for the legend.
    """
    known = [d for d in (*before, *after) if d]
    with plots.figure(HALF, 0.85 + 0.3 * len(names)) as figure:
        axes = figure.add_subplot()
        if known and max(known) > 20 * min(known):
            axes.set_xscale("log")
        else:
            axes.set_xlim(0, 1.06 * max(known, default=1.0))
        places = range(len(names))
        for place, old, new in zip(places, before, after, strict=True):
            axes.axhline(place, color=GRID, linewidth=0.8, zorder=0)
            if old is not None and new is not None:
                axes.plot([old, new], [place, place], color=GRID, linewidth=3, zorder=1)
            texts = dict.fromkeys(f"{d:.3g}" for d in (old, new) if d is not None)
            # Above its points: beside them, long names would leave the points no room.
            above = {"transform": axes.get_yaxis_transform(), "fontsize": 8, "va": "center"}
            axes.text(0, place - 0.45, _shortened(names[place]), color=INK, **above)
            axes.text(1, place - 0.45, " → ".join(texts), color=MUTED, ha="right", **above)
        _dots(axes, before, marker_label="at the start", color=MUTED, size=7.5, filled=False)
        _dots(axes, after, marker_label=after_label, color=ACCENT, size=4.5, filled=True)
        plots.named_rows(axes, [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.8)
        axes.set_xlabel("density")
        axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, position: "")
        plots.legend(axes)
        return plots.svg(figure, label)


def candidate_chart(losses: Sequence[float], winner: int, *, label: str) -> Markup:
    """Weighted loss of each candidate; the winner in the accent colour.

    Args:
        losses: at least one; values that are not finite get no bar.
        winner: index into `losses`.
    """
    finite = [loss if math.isfinite(loss) else 0.0 for loss in losses]
    with plots.figure(HALF, 0.75 + 0.3 * len(losses)) as figure:
        axes = figure.add_subplot()
        places = range(len(losses))
        colours = [ACCENT if place == winner else GRID for place in places]
        axes.barh(places, finite, height=0.66, color=colours)
        for place, loss in enumerate(losses):
            text = f"{loss:.4g}" if math.isfinite(loss) else "–"
            axes.annotate(
                f"{text}, winner" if place == winner else text,
                (finite[place], place),
                xytext=(5, 0),
                textcoords="offset points",
                verticalalignment="center",
                color=INK,
                fontweight="bold" if place == winner else "normal",
            )
        plots.named_rows(axes, [str(place + 1) for place in places])
        axes.set_xlim(0, 1.6 * max(finite) or 1.0)
        axes.set(xlabel="weighted loss (smaller is better)", ylabel="candidate")
        return plots.svg(figure, label)


def label_chart(clients: Sequence[int], counts: Sequence[Sequence[int]], *, label: str) -> Markup:
    """Heat map of each client's labels beside the number of its samples.

    Args:
        clients: client numbers, one a row.
        counts: [clients][classes], samples of that class.
    """
    from matplotlib.colors import to_rgba  # noqa: PLC0415

    num_classes = max(len(row) for row in counts)
    largest = largest_share(counts)
    row_height = 0.24 if len(clients) <= 30 else 0.11
    with plots.figure(plots.class_width(num_classes), 0.95 + row_height * len(clients)) as figure:
        axes, bars = figure.subplots(ncols=2, sharey=True, width_ratios=[4, 1])
        for shade, patch in _shaded_cells(counts, full=largest):
            patch.set(facecolor=to_rgba(ACCENT, shade), edgecolor="none")
            axes.add_patch(patch)
        axes.set(xlim=(-0.5, num_classes - 0.5), ylim=(len(clients) - 0.5, -0.5))
        axes.set(xlabel="class", ylabel="client")
        step = 1 if len(clients) <= 30 else 10
        axes.set_yticks(range(0, len(clients), step), [str(c) for c in clients[::step]])
        plots.class_ticks(axes, num_classes)
        bars.barh(range(len(clients)), [sum(row) for row in counts], height=0.7, color=ACCENT)
        bars.set_xlabel("samples")
        bars.xaxis.get_major_locator().set_params(nbins=2, integer=True)
        bars.grid(visible=False, axis="y")
        axes.grid(visible=False)
        for part in (axes, bars):
            part.tick_params(axis="y", length=0)
        return plots.svg(figure, label)


def largest_share(counts: Sequence[Sequence[int]]) -> float:
    """Of a client's samples that one class has: what the heat map shows in full colour."""
    return max((n / sum(row) for row in counts for n in row if n), default=1.0)


def _shaded_cells(counts: Sequence[Sequence[int]], *, full: float) -> Iterator[tuple[float, Any]]:
    """Opacity and cells of that opacity; the share `full` of a row is opaque.

    One path for all cells of a shade takes a tenth of the text of one path a cell.
    """
    from matplotlib.patches import PathPatch  # noqa: PLC0415
    from matplotlib.path import Path  # noqa: PLC0415

    cells: dict[int, list[Path]] = {}
    for row, numbers in enumerate(counts):
        total = sum(numbers)
        for column, number in enumerate(numbers):
            if number > 0:
                shade = math.ceil(SHADES * number / total / full - 1e-9)
                x0, x1, y0, y1 = column - 0.46, column + 0.46, row - 0.42, row + 0.42
                corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
                cells.setdefault(shade, []).append(Path(corners, closed=True))
    for shade, paths in sorted(cells.items()):
        yield shade / SHADES, PathPatch(Path.make_compound_path(*paths), linewidth=0)


def _dots(
    axes: Any,
    densities: Sequence[float | None],
    *,
    marker_label: str,
    color: str,
    size: float,
    filled: bool,
) -> None:
    points = [(d, place) for place, d in enumerate(densities) if d is not None]
    if points:
        axes.plot(
            *zip(*points, strict=True),
            linestyle="none",
            marker="o",
            markersize=size,
            markerfacecolor=color if filled else "none",
            markeredgecolor=color,
            label=marker_label,
        )


def _shortened(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else f"…{name[-NAME_LENGTH + 1 :]}"
