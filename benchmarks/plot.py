"""Ratios over density as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence


def draw(path: str | os.PathLike[str], curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Write a PNG with one curve a name, both axes logarithmic, and a line at ratio 1.

    Args:
        path: the file; its folder must exist.
        curves: name -> (density, ratio) points, both > 0.
    """
    # Benchmarks of memory must not pay for a plotting library that they do not use.
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9, 4 + 0.16 * len(curves)), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(curves.items()):
        densities, ratios = zip(*sorted(points), strict=True)
        axes.plot(densities, ratios, marker="os^Dv"[i // 10 % 5], markersize=4, label=name)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="dashed")
    axes.set(xscale="log", yscale="log", xlabel="density", ylabel="times better than the peer")
    axes.grid(which="major", alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=150)
