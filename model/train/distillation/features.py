"""Feature matching: blocks of a student learn the outputs of its teacher's blocks, up to a linear map.

FitNets (Romero et al., arXiv:1412.6550). The teacher's features are normalised to mean 0 and variance 1 over
the channels of a token, so that one weight suits every block. The maps are learned as a part of the student,
but are no part of its bundle.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ditserve.model.nets.dit import DiT
from ditserve.model.nets.factory import Network
from ditserve.model.nets.layers import layer_norm
from ditserve.model.train.distillation.config import OutputDistillationConfig
from ditserve.model.train.load import FEATURE_MAPS


class FeatureMatch:
    """The distance between the paired blocks of `spec.features` in the last forward passes.

    The linear maps become the student's submodule FEATURE_MAPS, so this must be made before the student is
    distributed.

    Raises:
        ValueError: a network that is no DiT, a block that is not there, or a different number of tokens.
    """

    def __init__(self, student: Network, teacher: Network, spec: OutputDistillationConfig) -> None:
        pairs = spec.features
        if not isinstance(student, DiT) or not isinstance(teacher, DiT):
            raise ValueError("distillation.features is for a DiT and its DiT teacher: leave it out")
        _check_pairs(student, teacher, pairs)
        self.weight, self.tokens = spec.feature_weight, student.config.tokens
        # By number of the pair: features of the last forward passes.
        self.student_features: dict[int, Tensor] = {}
        self.teacher_features: dict[int, Tensor] = {}
        maps = nn.ModuleList(nn.Linear(student.config.hidden_size, teacher.config.hidden_size) for _ in pairs)
        student.add_module(FEATURE_MAPS, maps)
        for number, (student_block, teacher_block) in enumerate(pairs):
            student.blocks[student_block].register_forward_hook(self._student_hook(number, maps[number]))
            teacher.blocks[teacher_block].register_forward_hook(self._teacher_hook(number))

    def loss(self) -> Tensor:
        """Return the mean squared difference, () fp32; it is 1 for a map that outputs 0."""
        differences = [
            F.mse_loss(features.float(), layer_norm(self.teacher_features[number].float()))
            for number, features in self.student_features.items()
        ]
        return cast(Tensor, sum(differences)) / len(differences)

    def _student_hook(self, number: int, linear: nn.Module) -> Any:
        def hook(module: nn.Module, inputs: Any, h: Tensor) -> None:
            # (N, T, D): image tokens come last.
            self.student_features[number] = linear(h[:, -self.tokens :])

        return hook

    def _teacher_hook(self, number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, h: Tensor) -> None:
            self.teacher_features[number] = h[:, -self.tokens :]

        return hook


def _check_pairs(student: DiT, teacher: DiT, pairs: tuple[tuple[int, int], ...]) -> None:
    if student.config.tokens != teacher.config.tokens:
        raise ValueError(
            f"distillation.features compares token by token, and the student has {student.config.tokens}, "
            f"the teacher {teacher.config.tokens}: take the teacher's patch_size "
            f"{teacher.config.patch_size}, or leave features out"
        )
    for name, network, blocks in (
        ("student", student, [pair[0] for pair in pairs]),
        ("teacher", teacher, [pair[1] for pair in pairs]),
    ):
        for block in blocks:
            if block >= network.config.depth:
                raise ValueError(
                    f"distillation.features: the {name} has no block {block}, its blocks are 0 to "
                    f"{network.config.depth - 1}"
                )
