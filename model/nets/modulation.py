"""Variants of how the condition modulates a block: a gate for each token, and one map for all blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConditionGate(nn.Module):
    """The gate α = 2·σ(MLP(x, c)) of tokens x (N, T, D) and a condition c, (N, T, 1) in 0…2.

    The first layer is linear, so its part that reads c is computed with the modulation, once for all tokens:
    `of_condition` (N, 1, D). The last layer starts at zero, and with it α at 1.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, 1)

    def forward(self, h: Tensor, of_condition: Tensor) -> Tensor:
        return 2 * torch.sigmoid(self.fc2(F.silu(self.fc1(h) + of_condition)))


class ModulationTable(nn.Module):
    """A block's own offsets to a modulation that all blocks share, (N, vectors·D) → (N, vectors·D).

    This is adaLN-single: Chen et al., arXiv:2310.00426, §2.3.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.offsets = nn.Parameter(torch.zeros(width))

    def forward(self, shared: Tensor) -> Tensor:
        return shared + self.offsets
