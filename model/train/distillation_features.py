"""Feature matching: some of a student's blocks should put out what some of its teacher's do, but for a linear map that is learnt too.

FitNets (Romero et al., arXiv:1412.6550). The teacher's features are normalised to mean 0 and variance 1 over the channels of a token, so
that one weight suits every block. The maps train as a part of the student, and are no part of its bundle.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ditserve.model.nets.dit import DiT
from ditserve.model.nets.factory import Network
from ditserve.model.nets.layers import layer_norm
from ditserve.model.train.distillation_config import OutputDistillation
from ditserve.model.train.load import FEATURE_MAPS


class FeatureMatch:
    """Watches the blocks of `features` (the student's, the teacher's), and tells how far apart they were in the last forward passes.

    The maps become the student's submodule FEATURE_MAPS; attach before the student is shared out.

    Raises:
        ValueError: a network that is no DiT, a block that is not there, or other tokens.
    """

    def __init__(self, student: Network, teacher: Network, spec: OutputDistillation) -> None:
        pairs = spec.features
        if not isinstance(student, DiT) or not isinstance(teacher, DiT):
            raise ValueError("distillation.features is for a DiT and its DiT teacher: leave it out")
        if student.config.tokens != teacher.config.tokens:
            raise ValueError(
                f"distillation.features compares token by token, and the student has {student.config.tokens}, the teacher "
                f"{teacher.config.tokens}: take the teacher's patch_size {teacher.config.patch_size}, or leave features out"
            )
        for who, network, chosen in (
            ("student", student, [pair[0] for pair in pairs]),
            ("teacher", teacher, [pair[1] for pair in pairs]),
        ):
            for block in chosen:
                if block >= network.config.depth:
                    raise ValueError(
                        f"distillation.features: the {who} has no block {block}, its blocks are 0 to {network.config.depth - 1}"
                    )
        self.weight, self.tokens = spec.feature_weight, student.config.tokens
        self.mapped: dict[int, Tensor] = {}
        self.wanted: dict[int, Tensor] = {}
        ours, theirs = student.config.hidden_size, teacher.config.hidden_size
        maps = nn.ModuleList(nn.Linear(ours, theirs) for _ in pairs)
        student.add_module(FEATURE_MAPS, maps)
        for place, (mine, other) in enumerate(pairs):
            student.blocks[mine].register_forward_hook(self._mapper(place, maps[place]))
            teacher.blocks[other].register_forward_hook(self._keeper(place))

    def loss(self) -> Tensor:
        """The mean squared difference, () fp32; 1 is that of a map to nothing."""
        apart = [
            F.mse_loss(self.mapped[place].float(), layer_norm(self.wanted[place].float()))
            for place in self.mapped
        ]
        return cast(Tensor, sum(apart)) / len(apart)

    def _mapper(self, place: int, linear: nn.Module) -> Any:
        def hook(module: nn.Module, inputs: Any, h: Tensor) -> None:
            self.mapped[place] = linear(h[:, -self.tokens :])  # (N, T, D): image tokens come last

        return hook

    def _keeper(self, place: int) -> Any:
        def hook(module: nn.Module, inputs: Any, h: Tensor) -> None:
            self.wanted[place] = h[:, -self.tokens :]

        return hook
