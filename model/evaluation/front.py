"""Operating points and the choice among measured ones: the ladder, and the defaults that follow from it.

Arithmetic on measured numbers, without networks or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ditserve.model.spec.grids import noise_levels
from ditserve.model.spec.guidance import forward_rows
from ditserve.model.spec.manifest import Defaults, Manifest, RungSpec, StretchSpec

Distance = Literal["own", "real"]
# A rung costs at most this share of the next dearer one.
WORTHWHILE = 0.9


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """A way to draw a picture."""

    solver: str
    steps: int
    grid: str
    guidance_interval: tuple[float, float]
    stretches: tuple[StretchSpec, ...] = ()

    @property
    def name(self) -> str:
        """The solver and its steps, where guidance acts if not everywhere, and the backbones.

        For example "euler-20 guided 0.1-0.8" and, from noise to picture, "euler-20 light>0.5".
        """
        low, high = self.guidance_interval
        words = [f"{self.solver}-{self.steps}"]
        words += [f"guided {low:g}-{high:g}"] if (low, high) != (0.0, 1.0) else []
        for part in self.stretches:
            words.append((part.backbone or "own") + (f">{part.above:g}" if part.above else ""))
        return " ".join(words)

    def rows(self, manifest: Manifest) -> float:
        """Return the forward rows of a picture of a model at its default guidance scale."""
        schedule = manifest.diffusion.noise_schedule()
        levels = noise_levels(self.grid, self.steps, schedule)
        scale, interval = manifest.defaults.guidance_scale, self.guidance_interval
        stretches = manifest.stretches(self.stretches)
        return round(forward_rows(levels, schedule, scale, interval, stretches=stretches), 3)


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredPoint:
    """An operating point with its distance to the model's own long run, and its energy scores (n,) if any."""

    point: OperatingPoint
    rows: float
    own: float
    scores: Tensor | None

    @property
    def real(self) -> float | None:
        return None if self.scores is None else float(self.scores.mean())

    def spec(self, order: Distance) -> RungSpec:
        """Return the rung whose quality is the distance `order`, "own" or "real"."""
        point, real = self.point, self.real
        return RungSpec(
            name=point.name,
            solver=point.solver,
            steps=point.steps,
            grid=point.grid,
            guidance_interval=point.guidance_interval,
            rows=self.rows,
            stretches=point.stretches,
            quality=self.own if order == "own" or real is None else real,
            own=self.own,
            real=real,
        )


def front(measured: Sequence[RungSpec], *, worthwhile: float = WORTHWHILE) -> tuple[RungSpec, ...]:
    """Return the ladder: the rungs that no other beats in rows and both distances, best first, thinned out.

    First come those that nothing cheaper matches in quality, from dear to cheap; then those that only the
    other distance keeps, where none of the first costs about as much.

    Example with (rows, quality): of (100, 0.1), (50, 0.3), (40, 0.2) the second goes, since 40 rows do
    better. Of (100, 0.1), (95, 0.2), (80, 0.3) the second goes, since it costs more than 0.9 times 100 rows.
    Of (200, quality 0.3, own 0.0), (40, quality 0.1, own 0.2), (8, quality 0.2, own 0.4) all stay.
    """
    unbeaten = [rung for rung in measured if not any(_beats(other, rung) for other in measured)]
    kept: list[RungSpec] = []
    for rung in reversed(_unmatched(unbeaten)):
        if not kept or rung.rows <= worthwhile * kept[-1].rows:
            kept.append(rung)
    for rung in sorted(unbeaten, key=lambda spec: (-spec.rows, _own(spec))):
        if all(rung.rows <= worthwhile * r.rows or r.rows <= worthwhile * rung.rows for r in kept):
            kept.append(rung)
    return tuple(sorted(kept, key=lambda spec: (spec.quality, -spec.rows)))


def _unmatched(measured: Sequence[RungSpec]) -> list[RungSpec]:
    """Return the rungs that nothing cheaper matches in quality, cheapest first."""
    unmatched: list[RungSpec] = []
    best = float("inf")
    for rung in sorted(measured, key=lambda spec: (spec.rows, spec.quality)):
        if rung.quality < best:
            best = rung.quality
            unmatched.append(rung)
    return unmatched


def _beats(other: RungSpec, rung: RungSpec) -> bool:
    """Return True if `other` is nowhere worse than `rung`, and somewhere better."""
    ours, theirs = ((spec.rows, spec.quality, _own(spec)) for spec in (other, rung))
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def _own(rung: RungSpec) -> float:
    return rung.quality if rung.own is None else rung.own


def nearer(scores: Tensor, others: Tensor) -> bool:
    """Return True if `scores` (n,) are lower than `others` (n,) by more than two standard errors of it."""
    gain = others - scores
    return float(gain.mean()) > 2 * _standard_error(gain)


def best_defaults(measured: Sequence[MeasuredPoint], defaults: Defaults) -> Defaults:
    """Return `defaults` with the cheapest point that lies as near to real pictures as any.

    It may be farther than the nearest point by one standard error of the difference: for 0.1278 and 0.1276
    with an error of 0.0003, the cheaper of the two.
    """
    # A request for a solver and its steps means the model's own network.
    own = [point for point in measured if not point.point.stretches]
    scored = [(point, point.scores) for point in own if point.scores is not None]
    _, nearest = min(scored, key=lambda pair: float(pair[1].mean()))
    as_near = [
        point
        for point, scores in scored
        if float((scores - nearest).mean()) <= _standard_error(scores - nearest)
    ]
    chosen = min(as_near, key=lambda point: (point.rows, point.real)).point
    return defaults.model_copy(
        update={
            "steps": chosen.steps,
            "solver": chosen.solver,
            "grid": chosen.grid,
            "guidance_interval": chosen.guidance_interval,
        }
    )


def _standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of values (n,)."""
    return float(values.std() / len(values) ** 0.5)
