"""Levels of a grid of tokens: 2×2 tokens are merged into one, and split again beside a skip connection.

The blocks between compute on a quarter of the tokens. The way down and up is that of hourglass transformers
(Nawrot et al., arXiv:2110.13711; for diffusion, Crowson et al., arXiv:2401.11605), at one width. With three
axes, tokens of one frame are merged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

from torch import Tensor, nn

from ditserve.model.nets.layers import Grid


class TokenMerge(nn.Module):
    """A linear map from 2×2 tokens to one, (N, T, D) → (N, T/4, D)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, h: Tensor, grid: Grid) -> Tensor:
        n, _, d = h.shape
        # The rows of all frames, of which each has an even number, lie one below the other.
        rows, columns = math.prod(grid[:-1]), grid[-1]
        h = h.reshape(n, rows // 2, 2, columns // 2, 2, d).transpose(2, 3)  # (N, R/2, C/2, 2, 2, D)
        return cast(Tensor, self.linear(h.reshape(n, (rows // 2) * (columns // 2), 4 * d)))


class TokenSplit(nn.Module):
    """A linear map from one token to 2×2, (N, T, D) → (N, 4T, D)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 4 * hidden_size)

    def forward(self, h: Tensor, grid: Grid) -> Tensor:
        n, _, d = h.shape
        rows, columns = math.prod(grid[:-1]), grid[-1]
        h = cast(Tensor, self.linear(h)).reshape(n, rows, columns, 2, 2, d).transpose(2, 3)
        return h.reshape(n, 4 * rows * columns, d)


class TokenLevels(nn.Module):
    """The changes of level before each block, and after the last one."""

    def __init__(self, hidden_size: int, levels: Sequence[int]) -> None:
        super().__init__()
        changes = enumerate(pairwise((0, *levels, 0)))
        self.changes = nn.ModuleDict(
            {
                str(k): (TokenMerge if after > before else TokenSplit)(hidden_size)
                for k, (before, after) in changes
                if after != before
            }
        )

    def forward(self, h: Tensor, grid: Grid, block: int, skips: list[Tensor]) -> tuple[Tensor, Grid]:
        """Bring tokens and their grid to the level of a block; `skips` are the tokens of the levels above."""
        if str(block) not in self.changes:
            return h, grid
        change = self.changes[str(block)]
        if isinstance(change, TokenMerge):
            skips.append(h)
            return change(h, grid), (*grid[:-2], grid[-2] // 2, grid[-1] // 2)
        return skips.pop() + change(h, grid), (*grid[:-2], 2 * grid[-2], 2 * grid[-1])
