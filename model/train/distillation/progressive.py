"""Progressive distillation: a student learns to do in one DDIM step what its teacher does in two.

Round by round, the averaged student becomes the teacher of the next student, which takes half as many steps
(Salimans & Ho, arXiv:2202.00512). Each round's student is kept as a bundle in `<run>/rounds/<steps>-steps`:
the next round loads its teacher from there, also if the run is continued later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditserve.model.nets.layers import along_rows
from ditserve.model.spec.diffusion import Schedule
from ditserve.model.spec.grids import even_grid, noise_levels
from ditserve.model.spec.solvers import step_table
from ditserve.model.train.batch import TrainingBatch
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.distillation.config import ProgressiveDistillationConfig
from ditserve.model.train.distillation.teacher import Teacher, fingerprint
from ditserve.model.train.loaded_model import LoadedModel


class DdimSteps:
    """The DDIM steps of an even grid: x' = a · x + b · D for an image estimate D; a, b are float32 (steps,).

    With half as many steps, the grid has every second level.
    """

    def __init__(self, steps: int, schedule: Schedule, device: str) -> None:
        table = step_table("ddim", noise_levels(even_grid(schedule), steps, schedule), schedule)
        self.level = torch.from_numpy(table.level.copy()).to(device)
        self.a, self.b = (torch.from_numpy(column.copy()).float().to(device) for column in (table.a, table.b))

    def advance(self, x: Tensor, image: Tensor, number: Tensor) -> Tensor:
        """Return x after the steps `number` (N,), with the image D estimated in it; both are (N, C, H, W)."""
        return along_rows(self.a[number], x) * x + along_rows(self.b[number], x) * image

    def number_at(self, levels: Tensor) -> Tensor:
        """Return the number (N,) of the step that each of the levels (N,) lies in: its start or below it."""
        return len(self.level) - 1 - torch.searchsorted(self.level.flip(0), levels.contiguous())

    def image_between(self, x: Tensor, after: Tensor, number: Tensor) -> Tensor:
        """Return the image with which one step leads from `x` to `after` (arXiv:2202.00512, algorithm 2)."""
        return (after - along_rows(self.a[number], x) * x) / along_rows(self.b[number], x)


class ProgressiveDistillation:
    """The objective of a run in rounds; `load_teacher` loads and checks a teacher.

    Raises:
        ValueError: teacher and student predict noise or different quantities, or take too many steps.
    """

    weight, teacher_calls = 1.0, 2

    def __init__(
        self,
        spec: ProgressiveDistillationConfig,
        config: TrainConfig,
        load_teacher: Callable[[Path], LoadedModel],
    ) -> None:
        self.spec, self.config, self.load_teacher = spec, config, load_teacher
        first = load_teacher(spec.teacher)
        of_teacher, of_student = first.manifest.diffusion.prediction, config.diffusion.prediction
        if of_student == "epsilon" or of_student != of_teacher:
            raise ValueError(
                "progressive distillation is of a teacher and a student that both predict v, or both x0, "
                f"not {of_teacher} and {of_student}: train a teacher that does"
            )
        self.schedule = config.diffusion.noise_schedule()
        if 2 * spec.sampling_steps[0] > self.schedule.max_steps:
            raise ValueError(
                f"distillation.sampling_steps: the first teacher takes {2 * spec.sampling_steps[0]} steps, "
                f"and there may be {self.schedule.max_steps}: begin with fewer"
            )
        self.identity: dict[str, Any] = {"teacher": fingerprint(first.network)}
        self._enter_round(0, first)

    def select_teacher(self, step: int) -> None:
        """Load the teacher of the round of `step`, unless it is loaded.

        Raises:
            LoadError, BundleError: an earlier round's student cannot be loaded.
        """
        current = self.spec.round_of(step)
        if current != self.round:
            previous = self.config.output / self.spec.student_folder((current - 1) * self.spec.round_steps)
            self._enter_round(current, self.load_teacher(previous if current else self.spec.teacher))

    def prepare_batch(self, batch: TrainingBatch) -> TrainingBatch:
        """Move the noise levels up to the student's grid.

        With 6 steps over 1000 timesteps, t = 0–166 becomes the grid's lowest timestep and t = 833–999 its
        highest.
        """
        return replace(batch, t=self.student_steps.level[self.student_steps.number_at(batch.t)])

    def target(self, batch: TrainingBatch, x_t: Tensor) -> Tensor:
        """Return the image that leads the student in one step to where its teacher arrives in two."""
        number, x = self.student_steps.number_at(batch.t), x_t
        for teacher_number in (2 * number, 2 * number + 1):
            t = self.teacher_steps.level[teacher_number]
            image = self.teacher.estimate_x0(x, t, batch.labels, batch.text)
            image = image.clip(-1, 1) if self.teacher.clip_x0 else image
            x = self.teacher_steps.advance(x, image, teacher_number)
        return self.student_steps.image_between(x_t, x, number)

    def auxiliary_losses(self) -> dict[str, tuple[float, Tensor]]:
        """Return no losses."""
        return {}

    def _enter_round(self, number: int, model: LoadedModel) -> None:
        self.round, device = number, self.config.device
        # Only the first teacher is guided: a later one has learned the guided output.
        self.teacher = Teacher(model, self.config, self.spec.guidance_scale if number == 0 else None)
        steps = self.spec.sampling_steps[number]
        self.student_steps = DdimSteps(steps, self.schedule, device)
        self.teacher_steps = DdimSteps(2 * steps, self.schedule, device)
