"""Figures of the benchmarks: PNG files, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ditserve.bench.answers import Summary
from ditserve.bench.outcomes import Point
from ditserve.model.spec.bundle import RungSpec

RESULTS = Path(__file__).parent / "results"
FATES = (
    ("attainment", "answered in time, of all requests"),
    ("goodput_per_s", "answered in time, a second"),
    ("distance", "mean RMS distance to 250 steps"),
)
PANELS = (
    ("attainment", "answered in time, of all requests"),
    ("quality", "mean distance to full quality"),
    ("refused", "refused"),
)


def draw_sweep(points: Sequence[Point], target: Path) -> None:
    """Attainment, quality and refusals over load: one row of panels per curve and arrival process, one line per arm."""
    rows = list(dict.fromkeys((point.curve, point.process) for point in points))
    figure = Figure(figsize=(12, 3.2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(PANELS), squeeze=False)
    for line, (curve, process) in zip(axes, rows, strict=True):
        here = [point for point in points if (point.curve, point.process) == (curve, process)]
        for axis, (field, title) in zip(line, PANELS, strict=True):
            for arm in dict.fromkeys(point.arm for point in here):
                mine = [point for point in here if point.arm == arm]
                axis.plot(
                    [p.load for p in mine], [getattr(p.outcome, field) for p in mine], marker="o", label=arm
                )
            axis.set_title(f"{curve}, {process}: {title}", fontsize=9)
            axis.set_xlabel("offered load")
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(target, dpi=80)


def draw_ladder(
    candidates: Sequence[RungSpec], kept: Sequence[RungSpec], frechet: Mapping[str, float], target: Path
) -> None:
    """Quality over cost: every candidate by its solver, and the front that was kept; beside it the front's Fréchet distances."""
    figure = Figure(figsize=(12 if frechet else 7, 4.5), layout="constrained")
    axis, *beside = figure.subplots(1, 2 if frechet else 1, squeeze=False)[0]
    for other in beside:
        other.plot([k.rows for k in kept], [frechet[k.name] for k in kept], "ko-")
        other.set(xscale="log", xlabel="rows an image", ylabel="Fréchet distance to real pictures")
        other.grid(alpha=0.3, which="both")
    for solver in dict.fromkeys(each.solver for each in candidates):
        mine = sorted((each for each in candidates if each.solver == solver), key=lambda each: each.rows)
        axis.plot([m.rows for m in mine], [m.quality for m in mine], "o", alpha=0.5, label=solver)
    axis.step([k.rows for k in kept], [k.quality for k in kept], "k-", where="post", label="ladder")
    for each in kept:
        axis.annotate(
            each.name, (each.rows, each.quality), fontsize=7, xytext=(3, 3), textcoords="offset points"
        )
    axis.set(xscale="log", yscale="log", xlabel="rows an image", ylabel="RMS distance to 250 steps")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(target, dpi=110)


def draw_shares(shares: Mapping[str, float], title: str, target: Path) -> None:
    """One bar per name, the longest on top."""
    figure = Figure(figsize=(7, 1 + 0.4 * len(shares)), layout="constrained")
    axis = figure.subplots()
    ranked = sorted(shares.items(), key=lambda pair: pair[1])
    axis.barh([name for name, _ in ranked], [value for _, value in ranked])
    axis.set_xlabel(title)
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(target, dpi=110)


def draw_headline(curves: Mapping[str, Sequence[tuple[float, Summary]]], target: Path) -> None:
    """What became of requests over the load they came at: one line per arm."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axis, (field, title) in zip(figure.subplots(1, len(FATES)), FATES, strict=True):
        for arm, points in curves.items():
            axis.plot(
                [load for load, _ in points], [getattr(each, field) for _, each in points], "o-", label=arm
            )
        axis.set(xlabel="offered load", title=title)
        axis.grid(alpha=0.3)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8
    )
    figure.savefig(target, dpi=100)


def draw_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    target: Path,
    *,
    x: str,
    y: str,
    level: float | None = None,
    log_y: bool = False,
) -> None:
    """One line per name over a logarithmic x; a dashed one at `level`, the goal."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, points in lines.items():
        axis.plot([each for each, _ in points], [value for _, value in points], "o-", label=name)
    if level is not None:
        axis.axhline(level, color="k", linestyle="--", linewidth=1)
    axis.set(xscale="log", xlabel=x, ylabel=y, yscale="log" if log_y else "linear")
    if not log_y:
        axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(target, dpi=110)
