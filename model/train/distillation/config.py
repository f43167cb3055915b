"""The section `distillation` of a run's configuration: the teacher, and how the student learns from it.

A smaller network, and fewer sampling steps:

{"kind": "output", "teacher": "model/zoo/emoji", "weight": 0.8, "features": [[2, 6]]}
{"kind": "progressive", "teacher": "model/zoo/emoji", "guidance_scale": 2.0,
 "sampling_steps": [16, 8, 4], "round_steps": 2000}
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

BlockIndex = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _TeacherConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    teacher: Path
    """A bundle or a run, over the same conditions, size and noise as the student."""
    guidance_scale: float | None = None
    """Guidance scale of the teacher; the student learns the guided output and needs no guidance itself.

    None: the teacher is not guided."""

    @property
    def guided(self) -> bool:
        """True if the teacher is guided."""
        return self.guidance_scale not in (None, 1.0)

    def defaults(self, step: int) -> dict[str, Any]:
        """Return the sampling defaults of a student after `step` steps, where other runs have others."""
        return {"guidance_scale": 1.0} if self.guided else {}


class OutputDistillationConfig(_TeacherConfig):
    """The student learns the teacher's predictions (Hinton et al., arXiv:1503.02531), and from the data."""

    kind: Literal["output"]
    weight: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the teacher in the loss; the rest is the data's."""
    features: tuple[tuple[BlockIndex, BlockIndex], ...] = ()
    """Pairs of a student's and a teacher's block, counted from 0, whose outputs are to agree.

    FitNets: Romero et al., arXiv:1412.6550."""
    feature_weight: Weight = 0.1


class ProgressiveDistillationConfig(_TeacherConfig):
    """The student learns to do in one DDIM step what its teacher does in two (arXiv:2202.00512).

    Then it becomes the teacher of the next round. With `sampling_steps` [16, 8, 4] and `round_steps` 2000,
    the first teacher takes 32 steps; optimiser step 2000 starts round 1 (8 steps) and step 4000 round 2,
    which goes on to the end.
    """

    kind: Literal["progressive"]
    sampling_steps: Annotated[tuple[Count, ...], Field(min_length=1)]
    """Sampling steps of each round's student, each half of the one before."""
    round_steps: Annotated[int, Field(ge=8)]
    """Optimiser steps of a round; the last round goes on to the end of the run."""

    @field_validator("sampling_steps")
    @classmethod
    def _check_halved(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if any(before != 2 * after for before, after in pairwise(steps)):
            raise ValueError(f"each must be half of the one before, such as [16, 8, 4], not {list(steps)}")
        return steps

    def round_of(self, step: int) -> int:
        """Return the round, from 0, that optimiser step `step` belongs to."""
        return min(step // self.round_steps, len(self.sampling_steps) - 1)

    def starts_round(self, step: int) -> bool:
        """Return True if `step` is the first of a round after the first: a student becomes the teacher."""
        return step > 0 and self.round_of(step) > self.round_of(step - 1)

    def student_folder(self, step: int) -> str:
        """Return the folder, within a run's folder, of the student of the round of `step`."""
        return f"rounds/{self.sampling_steps[self.round_of(step)]}-steps"

    def position(self, step: int, steps: int) -> tuple[int, int]:
        """Return (steps done, all steps) of the round of `step`, in a run of `steps`."""
        begin = self.round_of(step) * self.round_steps
        last = self.round_of(step) == len(self.sampling_steps) - 1
        return step - begin, (steps - begin) if last else self.round_steps

    def defaults(self, step: int) -> dict[str, Any]:
        """Return the sampling defaults of the student after `step` optimiser steps."""
        steps = self.sampling_steps[self.round_of(max(0, step - 1))]
        return {**super().defaults(step), "steps": steps, "solver": "ddim"}


DistillationConfig = Annotated[
    OutputDistillationConfig | ProgressiveDistillationConfig, Field(discriminator="kind")
]
