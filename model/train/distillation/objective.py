"""The objective of a student: the image that it should see in a noisy one, and the loss.

Output distillation is here; `model.train.distillation.progressive` halves the sampling steps. The student's
output is compared with the target image and the noise that belongs to it, so it may predict another quantity
than its teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from ditserve.model.data.dataset import Dataset
from ditserve.model.nets.factory import Network
from ditserve.model.nets.layers import along_rows
from ditserve.model.train.batch import TrainingBatch
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.distillation.config import OutputDistillationConfig
from ditserve.model.train.distillation.features import FeatureMatch
from ditserve.model.train.distillation.progressive import ProgressiveDistillation
from ditserve.model.train.distillation.teacher import Teacher, fingerprint, open_teacher
from ditserve.model.train.loss import RowNoise, squared_error


class DistillationObjective(Protocol):
    """A way to learn from a teacher.

    `weight` is its share of the loss. `teacher_calls` counts the teacher's estimates per row. `identity`
    holds the fingerprint of the teacher, which a checkpoint must agree with.
    """

    weight: float
    teacher: Teacher
    teacher_calls: int
    identity: dict[str, Any]

    def select_teacher(self, step: int) -> None:
        """Load the teacher of optimiser step `step`, unless it is loaded."""

    def prepare_batch(self, batch: TrainingBatch) -> TrainingBatch:
        """Return the batch at the noise levels that the student is trained at."""

    def target(self, batch: TrainingBatch, x_t: Tensor) -> Tensor:
        """Return the image (N, C, H, W) that the student should see in the noisy `x_t` (N, C, H, W)."""

    def auxiliary_losses(self) -> dict[str, tuple[float, Tensor]]:
        """Return further losses of the last forward passes: weight and value by name."""


@dataclass(slots=True)
class OutputDistillation:
    """The objective to predict, at any noise level, what the teacher predicts."""

    weight: float
    teacher: Teacher
    features: FeatureMatch | None
    identity: dict[str, Any]
    teacher_calls: int = 1

    def select_teacher(self, step: int) -> None:
        """Do nothing: there is one teacher."""

    def prepare_batch(self, batch: TrainingBatch) -> TrainingBatch:
        """Return the batch as it is: the noise levels are those of ordinary training."""
        return batch

    def target(self, batch: TrainingBatch, x_t: Tensor) -> Tensor:
        """Return the teacher's own estimate."""
        return self.teacher.estimate_x0(x_t, batch.t, batch.labels, batch.text)

    def auxiliary_losses(self) -> dict[str, tuple[float, Tensor]]:
        """Return the distance between the student's features and the teacher's, if features are matched."""
        return {} if self.features is None else {"features": (self.features.weight, self.features.loss())}


def make_objective(config: TrainConfig, dataset: Dataset, student: Network) -> DistillationObjective | None:
    """Make the objective of a run; None if it has no teacher.

    Raises:
        LoadError, BundleError: the teacher cannot be loaded.
        ValueError: this student cannot learn from it.
    """
    spec = config.distillation
    if spec is None:
        return None
    load_teacher = partial(open_teacher, config=config, dataset=dataset, student=student.config)
    if not isinstance(spec, OutputDistillationConfig):
        return ProgressiveDistillation(spec, config, load_teacher)
    teacher = Teacher(load_teacher(spec.teacher), config, spec.guidance_scale)
    identity = {"teacher": fingerprint(teacher.network)}
    match = FeatureMatch(student, teacher.network, spec) if spec.features else None
    return OutputDistillation(spec.weight, teacher, match, identity)


def distillation_loss(
    objective: DistillationObjective,
    row: RowNoise,
    output: Tensor,
    batch: TrainingBatch,
    x_t: Tensor,
    data_loss: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss to descend, () fp32, and its distillation terms by name, unweighted.

    `output` is the student's at the noisy `x_t`; `data_loss` is the loss by the data. With weight 0.8, a
    teacher term of 0.5 and a data loss of 1.0, the loss is 0.8 · 0.5 + 0.2 · 1.0 = 0.6, plus the weighted
    auxiliary losses.
    """
    image = objective.target(batch, x_t)
    noise = (x_t - along_rows(row.alpha, x_t) * image) / along_rows(row.sigma, x_t)
    error = squared_error(row, output, image, noise).mean()
    total, terms = objective.weight * error + (1.0 - objective.weight) * data_loss, {"teacher": error}
    for name, (weight, value) in objective.auxiliary_losses().items():
        total, terms[name] = total + weight * value, value
    return total, terms
