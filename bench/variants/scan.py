"""A bidirectional selective scan in place of attention, in plain PyTorch, to time what it would cost.

The state-space layer of Mamba (Gu & Dao, arXiv:2312.00752, §3.2 and Algorithm 2), forwards and backwards
along the rows of tokens as in ZigMa (arXiv:2403.13802). Without a kernel of its own the recurrence is a loop
over the tokens.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditserve.model.nets.layers import Grid

STATES = 16


class SelectiveScan(nn.Module):
    """s_t = exp(Δ_t·A)·s_{t−1} + Δ_t·B_t·x_t and y_t = C_t·s_t + D·x_t, with Δ, B and C made of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.step = nn.Linear(width, width)
        self.read_write = nn.Linear(width, 2 * STATES)
        self.log_decay = nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(width, 1))
        self.skip = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        step = F.softplus(self.step(x))  # (N, T, D)
        write, read = self.read_write(x).chunk(2, dim=-1)  # 2 × (N, T, S)
        decay = torch.exp(-step[..., None] * self.log_decay.exp())  # (N, T, D, S)
        added = (step * x)[..., None] * write[:, :, None]
        state, outputs = torch.zeros_like(added[:, 0]), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + added[:, t]
            outputs.append((state * read[:, t, None]).sum(-1))
        return torch.stack(outputs, dim=1) + self.skip * x


class ScanMixer(nn.Module):
    """A drop-in for the attention of a block: gated scans of the tokens in both orders, (N, T, D) → same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inputs, self.proj = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.forwards, self.backwards = SelectiveScan(width), SelectiveScan(width)

    def forward(self, h: Tensor, rotary: None, grid: Grid) -> Tensor:
        x, gate = self.inputs(h).chunk(2, dim=-1)
        x = F.silu(x)
        both = self.forwards(x) + self.backwards(x.flip(1)).flip(1)
        return cast(Tensor, self.proj(both * F.silu(gate)))
