"""What a student learns from its teacher, as the section `distillation` of a run's configuration.

{"kind": "output", "teacher": "model/zoo/emoji", "weight": 0.8, "features": [[2, 6]]}          a smaller network
{"kind": "progressive", "teacher": "model/zoo/emoji", "guidance_scale": 2.0,                   fewer steps
 "sampling_steps": [16, 8, 4], "round_steps": 2000}
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Block = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Distillation(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    teacher: Path
    """A bundle or a run, over the same conditions, size and noise as the student."""
    guidance_scale: float | None = None
    """Of the teacher: the student learns what it makes with guidance, and needs none itself. None: the teacher is not guided."""

    @property
    def guided(self) -> bool:
        """Whether the teacher is."""
        return self.guidance_scale not in (None, 1.0)

    def defaults(self, step: int) -> dict[str, Any]:
        """What the bundle of a student after `step` optimiser steps does by default, where that differs from other bundles."""
        return {"guidance_scale": 1.0} if self.guided else {}


class OutputDistillation(_Distillation):
    """The student predicts what the teacher predicts (Hinton et al., arXiv:1503.02531), and what the data says."""

    kind: Literal["output"]
    weight: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the teacher in the loss; the rest is the data's."""
    features: tuple[tuple[Block, Block], ...] = ()
    """Pairs of a student's and a teacher's block, counted from 0, whose outputs shall agree (FitNets: Romero et al., arXiv:1412.6550)."""
    feature_weight: Weight = 0.1


class ProgressiveDistillation(_Distillation):
    """The student does in one DDIM step what its teacher does in two; then it is the teacher of the next round (arXiv:2202.00512)."""

    kind: Literal["progressive"]
    sampling_steps: Annotated[tuple[Count, ...], Field(min_length=1)]
    """Of the student of each round, each half of the one before; the first teacher takes twice the first."""
    round_steps: Annotated[int, Field(ge=8)]
    """Optimiser steps of a round; the last one goes on to the end of the run."""

    @field_validator("sampling_steps")
    @classmethod
    def _halved(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if any(before != 2 * after for before, after in pairwise(steps)):
            raise ValueError(f"each must be half of the one before, such as [16, 8, 4], not {list(steps)}")
        return steps

    def round_of(self, step: int) -> int:
        """Which round, from 0, optimiser step `step` belongs to."""
        return min(step // self.round_steps, len(self.sampling_steps) - 1)

    def begins(self, step: int) -> bool:
        """Whether a student becomes a teacher before `step`."""
        return step > 0 and self.round_of(step) > self.round_of(step - 1)

    def folder(self, step: int) -> str:
        """Where, within a run's folder, the student of the round of `step` is kept."""
        return f"rounds/{self.sampling_steps[self.round_of(step)]}-steps"

    def length(self, step: int, steps: int) -> tuple[int, int]:
        """Of the round of `step`, in a run of `steps`: the steps gone by, and all there are."""
        begin = self.round_of(step) * self.round_steps
        last = self.round_of(step) == len(self.sampling_steps) - 1
        return step - begin, (steps - begin) if last else self.round_steps

    def defaults(self, step: int) -> dict[str, Any]:
        steps = self.sampling_steps[self.round_of(max(0, step - 1))]
        return {**super().defaults(step), "steps": steps, "solver": "ddim", "grid": "trailing"}


Distillation = Annotated[OutputDistillation | ProgressiveDistillation, Field(discriminator="kind")]
