"""Figures of the benchmarks: PNG files, drawn without a display."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from ditserve.model.spec.manifest import RungSpec

Lines = Mapping[str, Sequence[tuple[float, float]]]
# Lines beyond the colours that there are have another marker.
COLOURS, MARKERS = 10, "o^sD"


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram: by name, the points (x, value) of a line."""

    title: str
    lines: Lines


def draw_panels(
    rows: Sequence[Sequence[Panel]],
    target: Path,
    *,
    size: tuple[float, float],
    legend_columns: int,
    dpi: int,
    x: str = "offered load",
    log: bool = False,
) -> None:
    """Draw a grid of panels over the quantity `x`, with one legend for all; `log` makes all axes logarithmic.

    `size` is width and height in inches.
    """
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axes_row, row in zip(axes, rows, strict=True):
        for axis, panel in zip(axes_row, row, strict=True):
            for index, (name, points) in enumerate(panel.lines.items()):
                marker = MARKERS[index // COLOURS % len(MARKERS)]
                axis.plot([x for x, _ in points], [y for _, y in points], f"{marker}-", label=name)
            axis.set_title(panel.title, fontsize=9)
            axis.set_xlabel(x)
            if log:
                axis.set(xscale="log", yscale="log")
            axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=legend_columns, fontsize=8)
    figure.savefig(target, dpi=dpi)


def draw_ladder(candidates: Sequence[RungSpec], ladder: Sequence[RungSpec], target: Path) -> None:
    """Draw the distances over the cost: candidates by solver, and the names of the ladder's rungs."""
    is_real = any(rung.real is not None for rung in candidates)
    panels = ["distance to the model's own long run", *(["distance to real pictures"] if is_real else [])]
    figure = Figure(figsize=(7 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, title, distance in zip(axes, panels, ("own", "real"), strict=False):
        for solver in dict.fromkeys(rung.solver for rung in candidates):
            points = [(r.rows, getattr(r, distance)) for r in candidates if r.solver == solver]
            axis.plot(*zip(*points, strict=True), "o", alpha=0.5, label=solver)
        for rung in ladder:
            at = (rung.rows, getattr(rung, distance))
            axis.annotate(rung.name, at, fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.set(xscale="log", xlabel="rows an image", ylabel=title)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.savefig(target, dpi=110)


def draw_bars(values: Mapping[str, float], title: str, target: Path) -> None:
    """Draw one bar for each name, the longest on top."""
    figure = Figure(figsize=(7, 1 + 0.4 * len(values)), layout="constrained")
    axis = figure.subplots()
    ranked = sorted(values.items(), key=lambda pair: pair[1])
    axis.barh([name for name, _ in ranked], [value for _, value in ranked])
    axis.set_xlabel(title)
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(target, dpi=110)


def draw_lines(
    lines: Lines, target: Path, *, x: str, y: str, goal: float | None = None, log_y: bool = False
) -> None:
    """Draw one line for each name over a logarithmic x axis, and a dashed line at `goal`."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, points in lines.items():
        axis.plot([at for at, _ in points], [value for _, value in points], "o-", label=name)
    if goal is not None:
        axis.axhline(goal, color="k", linestyle="--", linewidth=1)
    axis.set(xscale="log", xlabel=x, ylabel=y, yscale="log" if log_y else "linear")
    if not log_y:
        axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(target, dpi=110)


def draw_peak_shares(shares: Iterable[tuple[str, int, float]], target: Path, *, goal: float) -> None:
    """Draw shares of the matrix-multiply peak, given as (network and runtime, rows of a step, share)."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, rows, share in shares:
        lines.setdefault(name, []).append((rows, share))
    draw_lines(lines, target, x="rows of a step", y="share of the matrix-product peak", goal=goal)
