"""Figures of the benchmarks: PNG files, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bench.outcomes import Point
from model.bundle import RungSpec

RESULTS = Path(__file__).parent / "results"
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
