"""Distillation: a teacher at a student's side while it trains. Outputs are imitated here, `model.progressive` halves the steps.

A lesson tells the trainer at which noise levels the student is taught, and the image that it should see there; the image and the noise
that belongs to it are what the student's output is compared with, so it may predict something else than its teacher does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from ditserve.model.data.dataset import Dataset
from ditserve.model.nets.factory import Network
from ditserve.model.train.batch import Batch
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.distillation_config import OutputDistillation
from ditserve.model.train.distillation_features import FeatureMatch
from ditserve.model.train.distillation_teacher import Teacher, fingerprint, open_teacher
from ditserve.model.train.loss import NoiseTables, rows, squared_error
from ditserve.model.train.progressive import Progressive


class Lesson(Protocol):
    """What a student learns from its teacher, whose share of the loss is `weight`; `identity` says which teacher it is."""

    weight: float
    teacher: Teacher
    asked: int  # how often the teacher is, of every row
    identity: dict[str, Any]

    def begin(self, step: int) -> None:
        """Have the teacher of optimiser step `step` at hand."""

    def pose(self, batch: Batch) -> Batch:
        """The batch at noise levels that the student is taught at."""

    def image(self, batch: Batch, x_t: Tensor) -> Tensor:
        """The image (N, C, H, W) that the student should see in the noisy `x_t` (N, C, H, W)."""

    def auxiliary(self) -> dict[str, tuple[float, Tensor]]:
        """Losses of the forward passes just made besides that of the output: weight and value by name."""


@dataclass(slots=True)
class Imitation:
    """Output distillation: at any noise, the student should predict what its teacher does."""

    weight: float
    teacher: Teacher
    features: FeatureMatch | None
    identity: dict[str, Any]
    asked: int = 1

    def begin(self, step: int) -> None:
        """The teacher is the same throughout."""

    def pose(self, batch: Batch) -> Batch:
        """The noise levels of any other training."""
        return batch

    def image(self, batch: Batch, x_t: Tensor) -> Tensor:
        """The teacher's own estimate."""
        return self.teacher.image(x_t, batch.t, batch.labels, batch.text)

    def auxiliary(self) -> dict[str, tuple[float, Tensor]]:
        """How far the student's features are from the teacher's."""
        return {} if self.features is None else {"features": (self.features.weight, self.features.loss())}


def make_lesson(config: TrainConfig, dataset: Dataset, student: Network) -> Lesson | None:
    """The lesson of a run, None where it has no teacher.

    Raises:
        LoadError, BundleError: a teacher that cannot be opened.
        ValueError: one that this student cannot learn from.
    """
    spec = config.distillation
    if spec is None:
        return None
    opening = partial(open_teacher, config=config, dataset=dataset, student=student.config)
    if not isinstance(spec, OutputDistillation):
        return Progressive(spec, config, opening)
    teacher = Teacher(opening(spec.teacher), config, spec.guidance_scale)
    identity = {"teacher": fingerprint(teacher.network)}
    match = FeatureMatch(student, teacher.network, spec) if spec.features else None
    return Imitation(spec.weight, teacher, match, identity)


def taught(
    lesson: Lesson, tables: NoiseTables, output: Tensor, batch: Batch, x_t: Tensor, loss: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """What to descend where the loss by the data is `loss`, and the parts of the lesson by name, unweighted."""
    image = lesson.image(batch, x_t)
    noise = (x_t - rows(tables.alpha, batch.t) * image) / rows(tables.sigma, batch.t)
    gap = squared_error(tables, output, image, noise, batch.t).mean()
    total, parts = lesson.weight * gap + (1.0 - lesson.weight) * loss, {"teacher": gap}
    for name, (weight, value) in lesson.auxiliary().items():
        total, parts[name] = total + weight * value, value
    return total, parts
