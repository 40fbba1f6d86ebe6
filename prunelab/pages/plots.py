"""Charts as inline SVG: figures drawn under fixed settings, in colours of the page.

Matplotlib draws with placeholder colours that become CSS variables of the page, so that a chart
follows the reader's light or dark mode. Equal numbers give equal text, whatever the user's
matplotlibrc says; no backend, style or figure of the user is touched.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
HALF, WHOLE = 5.2, 10.6

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


def svg(figure: Any, label: str) -> str:
    """The figure as one <svg> element that may stand beside others in a page.

    Sizes are left to the page, and element names that would clash between charts are taken out
    or made from the label.
    """
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace("xlink:href", "href")
    view = re.search(r'viewBox="[^"]*"', text)
    assert view, "matplotlib gives every SVG a viewBox"
    head = f'<svg {view[0]} role="img" aria-label="{html.escape(label)}">'
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
    return head + re.sub(r"\s*\n\s*", "\n", body).strip()


def legend(axes: Any) -> None:
    """A legend in a line above the plot."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, handlelength=1.6
    )


def whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers alone."""
    axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
