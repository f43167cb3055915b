"""The ladder: the operating points of a model, in the order in which quality is spent.

A rung is one way to make an image (solver, steps, grid, guidance interval) with its measured quality. A
ladder is a model's rungs, best first. The best need not be the dearest: a long run may lie farther from real
pictures than a short one. This module also holds the arithmetic of moving a sample between rungs:
how many steps remain, and how many rows they take. Pure: tables and arithmetic, no I/O, no clock.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache, partial
from math import log
from typing import Final

from ditserve.model.spec.diffusion import Schedule, make_schedule
from ditserve.model.spec.grids import noise_levels
from ditserve.model.spec.guidance import forward_rows
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.stretches import stretch_at
from ditserve.service.rung import Consent, Interval, Rung

_CACHED = 4096  # bounded, because requests choose steps and intervals freely


THOUSAND_TIMESTEPS: Final = make_schedule("linear")


class Ladder:
    """The rungs of a model, best first. An empty ladder is legal: nothing is ever degraded on it."""

    def __init__(self, rungs: Iterable[Rung], schedule: Schedule = THOUSAND_TIMESTEPS) -> None:
        self.schedule = schedule
        ordered = sorted(rungs, key=lambda rung: (rung.quality, -self._guided_rows(rung)))
        self.rungs: tuple[Rung, ...] = tuple(ordered)
        self._own = [rung for rung in ordered if not rung.stretches]
        self.below: Callable[[Rung, Consent], tuple[Rung, ...]] = lru_cache(_CACHED)(self._below)

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> Ladder:
        rungs = (
            Rung(
                spec.name,
                spec.solver,
                spec.steps,
                spec.grid,
                spec.guidance_interval,
                spec.quality,
                stretches=manifest.stretches(spec.stretches),
            )
            for spec in manifest.ladder
        )
        return cls(rungs, manifest.diffusion.noise_schedule())

    def requested(
        self,
        solver: str,
        steps: int,
        grid: str,
        interval: Interval,
        guided: bool,
        *,
        decay: float = 0.0,
        strength: float = 1.0,
    ) -> Rung:
        """Return the rung a request names: one of the ladder, or a new one of interpolated quality.

        It is one of the bundle's own backbone. An unguided request has no guidance interval, so any interval
        matches.
        """
        for rung in self._own:
            same = (rung.solver, rung.steps, rung.grid) == (solver, steps, grid)
            if same and (not guided or rung.guidance_interval == interval):
                own = not decay and strength == 1.0
                return rung if own else replace(rung, guidance_decay=decay, strength=strength)
        quality = self._quality(solver, steps)
        return Rung(f"{solver}-{steps}", solver, steps, grid, interval, quality, decay, strength=strength)

    def descent(self, consent: Consent) -> tuple[Rung, ...]:
        """Return the best rung that `consent` allows, and those below it: each cheaper and worse."""
        best = list(filter(consent.allows, self.rungs))[:1]
        return (*best, *(rung for first in best for rung in self.below(first, consent)))

    def lowest(self, rung: Rung, consent: Consent) -> Rung:
        """Return the cheapest rung that `rung` can be cut to with this consent, or itself."""
        return next(iter(self.below(rung, consent)[-1:]), rung)

    def row_steps(self, rung: Rung, guidance_scale: float, conditions: int = 1) -> float:
        """Return the rows of one whole image whose `conditions` are composed, as `forward_rows` counts."""
        return _row_steps(rung, self.schedule, guidance_scale, conditions)

    def rows_left(self, rung: Rung, steps: int, noise: float, guided: bool, conditions: int = 1) -> float:
        """Return the rows of the last `steps` steps of a sample with the share `noise` of the range ahead.

        They count by the cost of their backbone. Exact but for one row where the guidance interval, or a
        backbone, does not cover all noise levels.
        """
        if rung.stretches:
            return _stretched_rows(rung, steps, noise, guided, conditions)
        rows = conditions * steps
        if not guided:
            return rows
        low, high = rung.guidance_interval
        if low <= 0.0 and high >= noise:
            return rows + steps
        share = max(0.0, min(high, noise) - low) / noise if noise > 0.0 else 0.0
        return rows + min(steps, int(share * steps) + 1)

    def _below(self, rung: Rung, consent: Consent) -> tuple[Rung, ...]:
        """Return the rungs that `consent` allows and that are cheaper than `rung`, dearest first.

        Each is cheaper and worse than the one before it. Their guidance interval is narrowed to that of
        `rung`: guidance never acts where the request excluded it.
        """
        limit = self._guided_rows(rung)
        allowed = filter(consent.allows, map(partial(_narrowed, to=rung), self.rungs))
        others = [(self._guided_rows(other), other) for other in allowed]
        below: list[Rung] = []  # cheapest first
        for rows, other in sorted(others, key=lambda pair: (pair[0], pair[1].quality)):
            if rows >= limit:
                continue
            # A rung that costs more than one already taken must be better.
            if not below or other.quality < below[-1].quality:
                below.append(other)
        return tuple(reversed(below))

    def _guided_rows(self, rung: Rung) -> float:
        return self.row_steps(rung, 2.0)

    def _quality(self, solver: str, steps: int) -> float:
        """Return the quality of an unmeasured count of steps.

        It is linear in log(steps) between the measured counts and constant outside.
        """
        measured = [rung for rung in self._own if rung.solver == solver] or self._own
        points = sorted({rung.steps: rung.quality for rung in reversed(measured)}.items())
        if not points:
            return 0.0
        if steps <= points[0][0]:
            return points[0][1]
        for (fewer, worse), (more, better) in itertools.pairwise(points):
            if steps <= more:
                share = log(steps / fewer) / log(more / fewer)
                return worse + share * (better - worse)
        return points[-1][1]


def steps_left(remaining: int, current: Rung, target: Rung) -> int:
    """Return the steps left when a sample with `remaining` steps of `current` moves to `target`.

    They are the same share of the grid, rounded up: 25 of 50 steps become 10 of 20, and 1 of 50 becomes 1 of
    20. Rounding up keeps the steps a sample takes in all at or above the fewest of the rungs it was on,
    whatever the moves.
    """
    return -(-remaining * target.steps // current.steps)


def _narrowed(rung: Rung, *, to: Rung) -> Rung:
    """Return `rung` with the guidance decay and the strength of `to`, and its interval cut to that of `to`.

    The interval is replaced where the two do not meet.
    """
    low, high = to.guidance_interval
    start, stop = max(low, rung.guidance_interval[0]), min(high, rung.guidance_interval[1])
    interval = (start, stop) if start <= stop else (low, high)
    return replace(rung, guidance_interval=interval, guidance_decay=to.guidance_decay, strength=to.strength)


@lru_cache(_CACHED)
def _row_steps(rung: Rung, schedule: Schedule, guidance_scale: float, conditions: int) -> float:
    levels = noise_levels(rung.grid, rung.steps, schedule)[-rung.walked :]
    interval, decay, stretches = rung.guidance_interval, rung.guidance_decay, rung.stretches
    return forward_rows(
        levels, schedule, guidance_scale, interval, decay, conditions=conditions, stretches=stretches
    )


def _stretched_rows(rung: Rung, steps: int, noise: float, guided: bool, conditions: int) -> float:
    """Return the rows of the last steps of a rung of several backbones, see `Ladder.rows_left`.

    The steps are spread evenly over the range ahead, which falls into parts of one backbone, guided or not.

    Example: 8 guided steps from noise 1.0, a backbone at half the cost above 0.5. Of the 4 steps in each half
    the first cost 4 · 2 / 2 = 4 rows, the others 4 · 2 = 8.
    """
    low, high = rung.guidance_interval
    edges = {0.0, noise, low, high, *(stretch.above for stretch in rung.stretches)}
    ahead = sorted(edge for edge in edges if 0.0 <= edge <= noise)
    if len(ahead) < 2:
        ahead = [0.0, 1.0]
    rows = 0.0
    for start, stop in itertools.pairwise(ahead):
        middle = (start + stop) / 2
        stretch = stretch_at(rung.stretches, middle)
        per_step = conditions + (guided and stretch.guided and low <= middle <= high)
        rows += stretch.row_cost * per_step * steps * (stop - start) / ahead[-1]
    return rows
