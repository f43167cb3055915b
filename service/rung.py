"""The rung: one operating point of a model. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ditserve.model.spec.stretches import Stretch

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Rung:
    """One operating point: a solver, its steps, their grid, and the noise levels at which guidance acts.

    `guidance_interval` is in 0..1 of the noise range. `guidance_decay` lowers guidance with noise, see
    `guidance_weight`; it is that of the request, whatever rung of a ladder it is on. `quality` is the
    measured distance that orders the ladder, see `RungSpec`: lower is better.
    `stretches` name the bundle's backbones that take part, from noise to picture; its own has the rest.
    """

    name: str
    solver: str
    steps: int
    grid: str
    guidance_interval: Interval
    quality: float
    guidance_decay: float = 0.0
    stretches: tuple[Stretch, ...] = ()

    @property
    def backbones(self) -> tuple[str, ...]:
        """The further backbones of the bundle that it names."""
        return tuple(stretch.backbone for stretch in self.stretches if stretch.backbone)
