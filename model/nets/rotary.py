"""The rotary tables of a network, kept from one pass to the next."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ditserve.model.nets.layers import Grid, Spacing, rotary_tables

# The tables that a network keeps of grids beside its own.
OTHERS_KEPT: Final = 16
CosSin = tuple[Tensor, Tensor]


class RotaryTokens(NamedTuple):
    """The tokens that are rotated: a grid at a level, behind `front` tokens that are not."""

    grid: Grid
    level: int
    front: int
    device: torch.device


class RotaryTables:
    """The rotary tables of a network with heads of `head_size` that was trained on the grid `own`.

    Tables of that grid stay for good, because captured kernels read them where they lie. Requests may bring
    any number of other grids, so of those only the latest tables are kept. Nothing here is a weight.
    """

    def __init__(self, head_size: int, own: Grid) -> None:
        self._head_size, self._own_grid = head_size, own
        self._own: dict[RotaryTokens, CosSin] = {}
        self._others: dict[RotaryTokens, CosSin] = {}

    def get(self, tokens: RotaryTokens, spacing: Spacing) -> CosSin:
        """Return cos and sin for tokens, each (front + T, head_size/2) fp32; `spacing` follows the grid."""
        kept = self._own if tokens.grid == self._own_grid else self._others
        tables = kept.get(tokens)
        if tables is None:
            # Tables made in inference mode could not be trained with later.
            with torch.inference_mode(False):
                tables = self.make(tokens, spacing)
            if kept is self._others and len(kept) == OTHERS_KEPT:
                del kept[next(iter(kept))]
            kept[tokens] = tables
        return tables

    def make(self, tokens: RotaryTokens, spacing: Spacing) -> CosSin:
        """Compute what `get` returns, for a trace to follow."""
        (*front, rows, columns), side = tokens.grid, 1 << tokens.level
        cos, sin = rotary_tables(self._head_size, (*front, rows // side, columns // side), spacing)
        padding = (0, 0, tokens.front, 0)
        return F.pad(cos, padding, value=1.0).to(tokens.device), F.pad(sin, padding).to(tokens.device)
