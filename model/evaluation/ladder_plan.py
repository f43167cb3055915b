"""The points of a ladder that are worth measuring: solvers, counts of steps, grids and backbones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ditserve.model.evaluation.front import OperatingPoint
from ditserve.model.spec.grids import even_grid, fits, grid_names
from ditserve.model.spec.manifest import Defaults, Manifest, StretchSpec
from ditserve.model.spec.pipeline_config import PipelineConfig

Interval = tuple[float, float]

# The counts of steps at which backbones are combined, and the noise levels at which they change.
STITCHED_STEPS = (20, 14, 10, 8, 6)
STITCHED_SOLVER = "dpmpp-2m"  # beside that of the defaults
# Those of a network with a block cache, whose steps cost less.
CACHED_STEPS = (30, 24, 20, 16, 14, 12, 10, 8)
CUTS = (0.7, 0.5, 0.3)
# Pictures of the condition of each real picture: the distance subtracts how far apart they are.
DRAWS = 2


@dataclass(frozen=True, slots=True)
class LadderPlan:
    """The points to measure.

    Args:
        reference: steps of DDIM in the model's own long run.
        candidates: solver → the grids and the counts of steps to try.
        conditions: conditions to draw; each is drawn `DRAWS` times.
        intervals: narrower guidance intervals to try at `STITCHED_STEPS` of each solver.
    """

    name: str
    reference: int
    candidates: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]
    conditions: int
    intervals: tuple[Interval, ...] = ()


THOROUGH = LadderPlan(
    "thorough",
    250,
    {
        "ddim": (("trailing",), (100, 50, 30, 20, 16, 12, 8)),
        "dpmpp-2m": (("trailing", "uniform-t"), (50, 40, 30, 25, 20, 16, 14, 12, 10, 8, 6, 5, 4)),
        "unipc-1": (("trailing", "uniform-t"), (30, 25, 20, 16, 14, 12, 10, 8, 6, 5, 4)),
        "unipc-2": (("trailing", "uniform-t"), (30, 25, 20, 16, 14, 12, 10, 8, 6, 5, 4)),
    },
    32,
    ((0.1, 0.8), (0.2, 0.7), (0.0, 0.6), (0.3, 1.0)),
)
QUICK = LadderPlan(
    "quick",
    100,
    {
        "ddim": (("trailing",), (50, 20)),
        "dpmpp-2m": (("trailing",), (30, 20, 10)),
        "unipc-1": (("uniform-t",), (8, 6, 4)),
        "unipc-2": (("trailing",), (20, 14, 8, 6, 4)),
    },
    16,
)
# For a network so large that the quick plan would take longer than all the rest of an export.
COARSE = LadderPlan("coarse", 40, {"dpmpp-2m": (("trailing",), (20, 10, 5))}, 2)


# For an imported pipeline: its own solver and two of order 2, all on its own grid.
PIPELINE_STEPS = (50, 40, 28, 20, 16, 12, 10, 8, 6, 5, 4)


def stitched_points(manifest: Manifest) -> tuple[OperatingPoint, ...]:
    """Return the points to measure of the further backbones of a bundle.

    A lighter one draws all of the picture, its noisy part or its last part, and two of them share the end
    (T-Stitch has the small network first). A student draws whole pictures in the steps that it was
    distilled for, or begins one. With a block cache the bundle's own network draws whole pictures.
    """
    defaults, points = manifest.defaults, dict[OperatingPoint, None]()

    def add(steps: int, *parts: tuple[float, str], run: Defaults | None = None) -> None:
        stretches = tuple(StretchSpec(above=above, backbone=name) for above, name in parts)
        grid, interval = (run or defaults).grid, defaults.guidance_interval
        for solver in (run.solver,) if run else dict.fromkeys((defaults.solver, STITCHED_SOLVER)):
            points[OperatingPoint(solver, steps, grid, interval, stretches)] = None

    networks = {name: spec for name, spec in manifest.backbones.items() if spec.block_cache is None}
    guided = {name: spec for name, spec in networks.items() if spec.guidance != "none"}
    for name in [name for name in manifest.backbones if name not in networks]:
        for steps in CACHED_STEPS:
            add(steps, (0.0, name))
    for name, spec in networks.items():
        own = spec.defaults.steps
        if name not in guided:
            for steps in spec.step_counts or [own >> k for k in range(own.bit_length())]:
                add(steps, (0.0, name), run=spec.defaults)
        for steps in STITCHED_STEPS:
            if name in guided:
                add(steps, (0.0, name))
            for above in CUTS:
                add(steps, (above, name))
                if name in guided:
                    add(steps, (above, ""), (0.0, name))
    for middle, light in itertools.permutations(guided, 2):
        if guided[light].row_cost < guided[middle].row_cost:
            for steps in STITCHED_STEPS:
                add(steps, (0.7, ""), (0.3, middle), (0.0, light))
    return tuple(points)


def reference_point(manifest: Manifest, plan: LadderPlan) -> OperatingPoint:
    """Return the long run of a model; of a few-step model, the most steps that it was trained to draw in."""
    defaults = manifest.defaults
    schedule = manifest.diffusion.noise_schedule()
    if is_distilled(manifest):
        steps = max(schedule.step_counts, default=defaults.steps)
        return OperatingPoint(defaults.solver, steps, defaults.grid, defaults.guidance_interval)
    steps = min(plan.reference, schedule.max_steps)
    return OperatingPoint("ddim", steps, even_grid(schedule), defaults.guidance_interval)


def candidates(manifest: Manifest, plan: LadderPlan) -> tuple[OperatingPoint, ...]:
    """Return the points to measure beside the reference: all solvers, grids and counts of the plan.

    DDIM also gets the grid of the model's defaults. A few-step model keeps its solver and grid. It has the
    other numbers of steps that it states, or else halves of the steps that it was trained to draw in.
    """
    defaults, reference = manifest.defaults, reference_point(manifest, plan)
    schedule = manifest.diffusion.noise_schedule()
    if is_distilled(manifest):
        halves = {defaults.steps >> k for k in range(1, defaults.steps.bit_length())}
        counts = set(schedule.step_counts or halves) - {reference.steps}
        return tuple(
            OperatingPoint(defaults.solver, steps, defaults.grid, defaults.guidance_interval)
            for steps in sorted(counts, reverse=True)
            if fits(defaults.grid, steps, schedule)
        )
    points: dict[OperatingPoint, None] = {}
    for solver, (grids, counts_of_solver) in plan.candidates.items():
        # A flow has other grids than those of the plan.
        known = [kind for kind in grids if kind in grid_names(schedule)] or [even_grid(schedule)]
        for kind in (*known, defaults.grid) if solver == "ddim" else known:
            for steps in counts_of_solver:
                if fits(kind, steps, schedule):
                    points[OperatingPoint(solver, steps, kind, defaults.guidance_interval)] = None
    points.pop(reference, None)
    if defaults.guidance_scale != 1.0:
        few = [point for point in points if point.steps in STITCHED_STEPS and point.grid == defaults.grid]
        low, high = defaults.guidance_interval
        narrow = [interval for interval in plan.intervals if low <= interval[0] and interval[1] <= high]
        points |= {replace(point, guidance_interval=each): None for point in few for each in narrow}
    return tuple(points)


def pipeline_plan(manifest: Manifest) -> LadderPlan:
    """Return the plan for an imported pipeline; the caller gives the prompts."""
    defaults = manifest.defaults
    grids, counts = (defaults.grid,), tuple(sorted({*PIPELINE_STEPS, defaults.steps}, reverse=True))
    solvers = dict.fromkeys((defaults.solver, "dpmpp-2m", "unipc-2"), (grids, counts))
    return LadderPlan("pipeline", QUICK.reference, solvers, 0)


def is_distilled(manifest: Manifest) -> bool:
    """Return True for a model that was distilled to few steps: with more it does not draw better.

    A pipeline without guidance was.
    """
    stated = bool(manifest.diffusion.step_counts)
    stated |= isinstance(manifest.config, PipelineConfig) and manifest.guidance == "none"
    return stated or bool(manifest.provenance.get("training", {}).get("distillation"))


def affordable_plan(manifest: Manifest, rows: float) -> tuple[LadderPlan, int]:
    """Return the plan that `rows` forward rows afford, and its conditions: quick, or else coarse.

    For 10,000 rows and 460 rows for a picture the quick plan has 10,000 / 460 / 2 = 10 conditions.
    """
    for plan, fewest in ((QUICK, 2), (COARSE, 1)):
        points = (reference_point(manifest, plan), *candidates(manifest, plan))
        conditions = int(rows / DRAWS / sum(point.rows(manifest) for point in points))
        if conditions >= fewest or plan is COARSE:
            return plan, max(fewest, min(plan.conditions, conditions))
    raise AssertionError
