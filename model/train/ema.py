"""Exponential moving averages of weights, with warm-up so that short runs are not dominated by their start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn


class Ema:
    """Averages of a module's parameters, one per decay: s ← d·s + (1 − d)·parameter, d = min(decay, (1 + n)/(10 + n)).

    The warm-up of d over updates n is the one of TensorFlow's ExponentialMovingAverage. Updates are foreach, in place, fp32.
    `averages` maps a decay to its named tensors, in the order of `named_parameters()`; the first is the one to sample from.

    Raises:
        ValueError: no decay, the same one twice, or one outside [0, 1).
    """

    def __init__(self, module: nn.Module, decays: Sequence[float]) -> None:
        if not decays or len(set(decays)) < len(decays) or not all(0 <= decay < 1 for decay in decays):
            raise ValueError(f"ema must be one or more different decays in [0, 1), not {tuple(decays)}")
        self.updates = 0
        self.averages: dict[float, dict[str, Tensor]] = {
            decay: {name: p.detach().clone().float() for name, p in module.named_parameters()}
            for decay in decays
        }

    @property
    def first(self) -> dict[str, Tensor]:
        """The average to sample from and to export."""
        return next(iter(self.averages.values()))

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor]) -> None:
        """Fold in the current parameters, in `named_parameters()` order."""
        self.updates += 1
        warm = (1 + self.updates) / (10 + self.updates)
        current = [p.detach().float() for p in parameters]
        for decay, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), current, 1 - min(decay, warm))

    @torch.no_grad()
    def copy_to(
        self, module: nn.Module, whole: Callable[[str, Tensor], Tensor] = lambda _, part: part
    ) -> None:
        """Overwrite `module`'s parameters by the first average, `whole` making all of a parameter's from a process's part."""
        for name, parameter in module.named_parameters():
            parameter.copy_(whole(name, self.first[name]))
