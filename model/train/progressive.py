"""Progressive distillation: a student learns to do in one DDIM step what its teacher does in two (Salimans & Ho, arXiv:2202.00512).

Round by round the student, averaged, becomes the teacher of the next, which takes half as many steps. Each round's student is kept as a
bundle in `<run>/rounds/<steps>-steps`: the next round opens its teacher there, also when the run is continued later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditserve.model.spec.diffusion import Schedule, grid
from ditserve.model.spec.solvers import step_table
from ditserve.model.train.batch import Batch
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.distillation_config import ProgressiveDistillation
from ditserve.model.train.distillation_teacher import Teacher, fingerprint
from ditserve.model.train.loaded_model import LoadedModel
from ditserve.model.train.loss import rows

GRID = "trailing"  # of half as many steps it has every second timestep


class DdimSteps:
    """The DDIM steps of a grid of `steps`: x' = a · x + b · D, all tensors float32 (steps,)."""

    def __init__(self, steps: int, schedule: Schedule, device: str) -> None:
        table = step_table("ddim", grid(GRID, steps, schedule.timesteps), schedule)
        self.timestep = torch.from_numpy(table.timestep.copy()).to(device)
        self.a, self.b = (torch.from_numpy(column.copy()).float().to(device) for column in (table.a, table.b))

    def move(self, x: Tensor, image: Tensor, place: Tensor) -> Tensor:
        """x and the image D estimated in it, (N, C, H, W), after the steps numbered `place` (N,)."""
        return rows(self.a, place) * x + rows(self.b, place) * image

    def unmoved(self, x: Tensor, moved: Tensor, place: Tensor) -> Tensor:
        """The image with which one step leads from x to `moved` (arXiv:2202.00512, algorithm 2)."""
        return (moved - rows(self.a, place) * x) / rows(self.b, place)


class Progressive:
    """The rounds of a run; `open_source` opens and checks a teacher.

    Raises:
        ValueError: a student of another kind than its teacher, that predicts noise, or with more steps than timesteps.
    """

    weight, asked = 1.0, 2

    def __init__(
        self, spec: ProgressiveDistillation, config: TrainConfig, open_source: Callable[[Path], LoadedModel]
    ) -> None:
        self.spec, self.config, self.open_source = spec, config, open_source
        opened = open_source(spec.teacher)
        theirs, ours = opened.manifest.diffusion.prediction, config.diffusion.prediction
        if ours == "epsilon" or ours != theirs:
            raise ValueError(
                f"progressive distillation is of a teacher and a student that both predict v, or both x0, not {theirs} and {ours}: "
                "train a teacher that does"
            )
        self.schedule = config.diffusion.noise_schedule()
        if 2 * spec.sampling_steps[0] > self.schedule.timesteps:
            raise ValueError(
                f"distillation.sampling_steps: the first teacher takes {2 * spec.sampling_steps[0]} steps, and there are "
                f"{self.schedule.timesteps} timesteps: begin with fewer"
            )
        self.identity: dict[str, Any] = {"teacher": fingerprint(opened.network)}
        self._enter(0, opened)

    def begin(self, step: int) -> None:
        """Have the teacher of the round of `step` at hand.

        Raises:
            LoadError, BundleError: an earlier round's student cannot be opened.
        """
        current = self.spec.round_of(step)
        if current != self.round:
            before = self.config.output / self.spec.folder((current - 1) * self.spec.round_steps)
            self._enter(current, self.open_source(before if current else self.spec.teacher))

    def pose(self, batch: Batch) -> Batch:
        """Noise levels on the grid of the student."""
        steps, total = len(self.ours.timestep), self.schedule.timesteps
        return replace(batch, t=self.ours.timestep[steps - 1 - batch.t * steps // total])

    def image(self, batch: Batch, x_t: Tensor) -> Tensor:
        """What leads the student in one step to where its teacher comes in two."""
        place, x = self.places[batch.t], x_t
        for line in (2 * place, 2 * place + 1):
            image = self.teacher.image(x, self.theirs.timestep[line], batch.labels, batch.text)
            x = self.theirs.move(x, image.clip(-1, 1) if self.teacher.clip_x0 else image, line)
        return self.ours.unmoved(x_t, x, place)

    def auxiliary(self) -> dict[str, tuple[float, Tensor]]:
        """Nothing."""
        return {}

    def _enter(self, number: int, opened: LoadedModel) -> None:
        """The teacher of the first round is guided; a later one has learnt to do without."""
        self.round, device = number, self.config.device
        self.teacher = Teacher(opened, self.config, self.spec.guidance_scale if number == 0 else None)
        steps = self.spec.sampling_steps[number]
        self.ours = DdimSteps(steps, self.schedule, device)
        self.theirs = DdimSteps(2 * steps, self.schedule, device)
        self.places = torch.full((self.schedule.timesteps,), -1, device=device)
        self.places[self.ours.timestep] = torch.arange(steps, device=device)
