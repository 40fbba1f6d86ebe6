"""Charts as inline SVG: figures drawn under fixed settings, in colours of the page.

Matplotlib draws with placeholder colours that become CSS variables of the page, so that a chart
follows the reader's light or dark mode. Equal numbers give equal text, whatever the user's
matplotlibrc says; no backend, style or figure of the user is touched.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup, escape

# Placeholder -> CSS variable. Nothing else may be drawn in these colours.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
ACCENT, SECOND, SURFACE = "#040404", "#050505", "#060606"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    ACCENT: "--accent",
    SECOND: "--second",
    SURFACE: "--surface",
}
# Inches. A half and a whole line of the page have the same scale, so text has one size.
HALF, WHOLE = 4.4, 9.2
LEAST = 65
"""Pixels of the page that an inch takes at least: below that, a chart scrolls inside its card."""
MANY_CLASSES = 25
MANY_POINTS = 40

SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedprune",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}


@contextmanager
def figure(width: float, height: float) -> Iterator[Any]:
    """A figure of `width` x `height` inches, drawn under our settings alone."""
    from matplotlib import style  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    with style.context(["default", SETTINGS]):
        yield Figure(figsize=(width, height), layout="constrained")


def svg(figure: Any, label: str) -> Markup:
    """The figure as one <svg> element that may stand beside others in a page.

    Sizes are left to the page, and element names that would clash between charts are taken out
    or made from the label, which is what a screen reader says.
    """
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace("xlink:href", "href")
    view = re.search(r'viewBox="[^"]*"', text)
    assert view, "matplotlib gives every SVG a viewBox"
    least = round(LEAST * figure.get_figwidth())
    head = f'<svg {view[0]} style="min-width: {least}px" role="img" aria-label="{escape(label)}">'
    body = text[text.index(">") + 1 :]
    body = re.sub(r"<!--.*?-->|<style.*?</style>", "", body, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    prefix = re.sub(r"\W+", "-", label.partition(":")[0].lower())
    body = re.sub(
        r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", body
    )
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return Markup(head + re.sub(r"\s*\n\s*", "\n", body).strip())


def legend(axes: Any) -> None:
    """A legend in a line above the plot."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, handlelength=1.6
    )


def lines(axes: Any, x: Sequence[float], series: Sequence[tuple[str, Sequence[float]]]) -> None:
    """One or two (name, values) over the same points; a line without a name is in no legend.

    Points are marked where there are few; ticks are at whole numbers where all points are whole.
    """
    size = 3.5 if len(x) <= MANY_POINTS else 0
    for (name, values), colour, marker in zip(series, (ACCENT, SECOND), "os", strict=False):
        axes.plot(
            x, values, color=colour, marker=marker, markersize=size, linewidth=1.8, label=name
        )
    if all(float(value).is_integer() for value in x):
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def named_rows(axes: Any, names: Sequence[str]) -> None:
    """The y axis as a list of names from above, one for each of 0, 1, ..."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def class_width(num_classes: int) -> float:
    """Width of a figure with a bar for each class."""
    return WHOLE if takes_a_line(num_classes) else HALF


def takes_a_line(num_classes: int) -> bool:
    """Whether a figure with a bar for each class needs a card as wide as the page."""
    return num_classes > MANY_CLASSES


def class_ticks(axes: Any, num_classes: int) -> None:
    """Ticks of the x axis at the classes, of many at every tenth."""
    axes.set_xticks(range(0, num_classes, 1 if num_classes <= MANY_CLASSES else 10))
