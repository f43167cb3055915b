"""The rung: one operating point of a model, and how far down a request consents to be moved. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Self

from ditserve.model.spec.mixing import Combine
from ditserve.model.spec.source import walked_steps
from ditserve.model.spec.stretches import Stretch, stretch_at

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Rung:
    """One operating point: a solver, its steps, their grid, and the noise levels at which guidance acts.

    `guidance_interval` is in 0..1 of the noise range. `guidance_decay` lowers guidance with noise, see
    `guidance_weight`; it is that of the request, whatever rung of a ladder it is on. `quality` is the
    measured distance that orders the ladder, see `RungSpec`: lower is better.
    `stretches` name the bundle's backbones that take part, from noise to picture; its own has the rest.
    `strength` is the share of the steps that are walked, the last ones; it too is that of the request. Below
    1 they start from a picture.
    """

    name: str
    solver: str
    steps: int
    grid: str
    guidance_interval: Interval
    quality: float
    guidance_decay: float = 0.0
    stretches: tuple[Stretch, ...] = ()
    strength: float = 1.0

    @property
    def walked(self) -> int:
        """The steps that are walked: the share `strength` of all, rounded up."""
        return walked_steps(self.steps, self.strength)

    @property
    def backbones(self) -> tuple[str, ...]:
        """The further backbones of the bundle that it names."""
        return tuple(stretch.backbone for stretch in self.stretches if stretch.backbone)

    @property
    def last_backbone(self) -> str:
        """The backbone of the last step."""
        return stretch_at(self.stretches, 0.0).backbone


@dataclass(frozen=True, slots=True)
class Consent:
    """The rungs that a request may be degraded to: at least so many steps, and a distance that is no larger.

    One that only the bundle's own backbone can draw consents to `own_backbone` alone.
    """

    min_steps: int = 1
    worst: float = inf
    own_backbone: bool = False

    @classmethod
    def to(
        cls,
        min_steps: int,
        min_quality: float | None,
        *,
        negative_prompt: str,
        mix: Combine,
        adapted: bool = False,
    ) -> Self:
        """Return the consent of a request.

        A further backbone may have too few blocks for a condition of layers, and adapters change the bundle's
        own. A student takes no negative prompt.
        """
        own_backbone = bool(negative_prompt) or mix == "layers" or adapted
        return cls(min_steps, inf if min_quality is None else min_quality, own_backbone)

    def allows(self, rung: Rung) -> bool:
        own = not (self.own_backbone and rung.stretches)
        return rung.walked >= self.min_steps and rung.quality <= self.worst and own
