"""Exponential moving average of weights, with warm-up so that short runs are not dominated by their start."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Ema:
    """A shadow copy of a module's parameters: shadow ← d·shadow + (1 − d)·parameter, d = min(decay, (1 + n)/(10 + n)).

    The warm-up of d over updates n is the one of TensorFlow's ExponentialMovingAverage. Updates are foreach, in place, fp32.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay must be in [0, 1), not {decay}")
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().clone().float() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor]) -> None:
        """Fold in the current parameters, in `named_parameters()` order."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.shadow.values()), [p.detach().float() for p in parameters], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite `module`'s parameters by the average."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.shadow[name])
