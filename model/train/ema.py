"""Exponential moving averages of weights, with a warm-up against the influence of the first weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn


class Ema:
    """The averages of a module's parameters, one per decay: s ← d·s + (1 − d)·parameter.

    d = min(decay, (1 + n)/(10 + n)). The warm-up of d over updates n is the one of TensorFlow's
    ExponentialMovingAverage. After the first update d is 2/11, after the tenth 11/20; a decay of 0.999 is
    reached after 8,990. Updates are in place, in fp32. `averages` maps a decay to its named tensors, in the
    order of `named_parameters()`; the first is sampled from.

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
        """The average that is sampled from and exported."""
        return next(iter(self.averages.values()))

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor]) -> None:
        """Average the current parameters in; they come in `named_parameters()` order."""
        self.updates += 1
        warm_up = (1 + self.updates) / (10 + self.updates)
        current = [p.detach().float() for p in parameters]
        for decay, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), current, 1 - min(decay, warm_up))

    @torch.no_grad()
    def copy_to(
        self, module: nn.Module, full_tensor: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor
    ) -> None:
        """Overwrite `module`'s parameters by the first average.

        `full_tensor` gathers a parameter, given its name, from the part that a process holds.
        """
        for name, parameter in module.named_parameters():
            parameter.copy_(full_tensor(name, self.first[name]))
