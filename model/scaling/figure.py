"""The figure of a scaling law: measured and fitted losses over each variable, on logarithmic axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ditserve.model.scaling.law import Law, LossPoint

TITLES = {
    "parameters": "parameters N",
    "pictures": "training pictures D",
    "flops": "floating-point operations of training T",
}
# Factor around the measured losses that the axis of the loss reaches to.
MARGIN = 1.25
# Factor beyond the measured variables that the law is drawn to.
BEYOND = 2.0


def draw_law(points: Sequence[LossPoint], law: Law, laws: Sequence[Law], target: Path) -> None:
    """Draw a panel per variable of the law, with its line and the 90 % band of `laws`, into `target`.

    In the line and the band the other variables are at their largest. A point with less of another variable
    lies above the line; the less it has, the smaller it is drawn.
    """
    most = {name: max(getattr(point, name) for point in points) for name in law.terms}
    figure = Figure(figsize=(4.6 * len(law.terms), 4.2), layout="constrained")
    runs = list(dict.fromkeys(point.run for point in points))
    axes = figure.subplots(1, len(law.terms), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, law.terms, strict=True):
        values = [getattr(point, name) for point in points]
        line = np.geomspace(min(values) / BEYOND, max(values) * BEYOND, 100)
        curves = np.array([other.loss(**{**most, name: line}) for other in laws])
        low, high = np.quantile(curves, [0.05, 0.95], axis=0)
        axis.fill_between(line, low, high, alpha=0.2, color="black", linewidth=0)
        axis.plot(line, law.loss(**{**most, name: line}), color="black", linewidth=1.2)
        for k, run in enumerate(runs):
            of_run = [point for point in points if point.run == run]
            shares = [np.prod([getattr(p, o) / most[o] for o in most if o != name]) for p in of_run]
            size = [12 + 48 * float(share) for share in shares]
            axis.scatter(
                [getattr(p, name) for p in of_run],
                [p.loss for p in of_run],
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
    # The axis does not reach down to the irreducible loss: one near zero would flatten the rest.
    axes[0].set_ylim(min(losses) / MARGIN, max(losses) * MARGIN)
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes[0].yaxis.set_major_formatter("{x:.2g}")
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("held-out loss")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(target, dpi=110)
