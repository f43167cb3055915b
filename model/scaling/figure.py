"""The picture of a scaling law: measured losses and the fitted one over each variable, on logarithmic axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ditserve.model.scaling.law import Law, Point

TITLES = {
    "parameters": "parameters N",
    "pictures": "training pictures D",
    "flops": "floating-point operations of training T",
}
MARGIN = 1.25  # around the measured losses
BEYOND = 2.0  # the law is drawn so many times further than was measured


def draw_law(points: Sequence[Point], law: Law, laws: Sequence[Law], target: Path) -> None:
    """A panel per variable that the law knows; the others are at their largest in the line and in its 90 % band from `laws`.

    Points below their largest lie above the line: the less there is of the others, the smaller they are drawn.
    """
    most = {name: max(getattr(point, name) for point in points) for name in law.terms}
    figure = Figure(figsize=(4.6 * len(law.terms), 4.2), layout="constrained")
    runs = list(dict.fromkeys(point.run for point in points))
    axes = figure.subplots(1, len(law.terms), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, law.terms, strict=True):
        values = [getattr(point, name) for point in points]
        line = np.geomspace(min(values) / BEYOND, max(values) * BEYOND, 100)
        curves = np.array([each.loss(**{**most, name: line}) for each in laws])
        low, high = np.quantile(curves, [0.05, 0.95], axis=0)
        axis.fill_between(line, low, high, alpha=0.2, color="black", linewidth=0)
        axis.plot(line, law.loss(**{**most, name: line}), color="black", linewidth=1.2)
        for k, run in enumerate(runs):
            mine = [point for point in points if point.run == run]
            size = [
                12 + 48 * float(np.prod([getattr(p, o) / most[o] for o in most if o != name])) for p in mine
            ]
            axis.scatter(
                [getattr(p, name) for p in mine],
                [p.loss for p in mine],
                size,
                color=f"C{k % 10}",
                label=run,
                alpha=0.8,
            )
        axis.axhline(law.irreducible, linestyle=":", color="grey", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel=TITLES[name])
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter("{x:.0e}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title(f"exponent {law.terms[name].exponent:.3f}", fontsize=10)
        axis.grid(alpha=0.3, which="both")
    losses = [point.loss for point in points]
    axes[0].set_ylim(
        min(losses) / MARGIN, max(losses) * MARGIN
    )  # an irreducible loss next to nothing would flatten the rest
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes[0].yaxis.set_major_formatter("{x:.2g}")
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("held-out loss")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(target, dpi=110)
