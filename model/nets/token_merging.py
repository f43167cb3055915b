"""Token merging: tokens that are alike are computed once (Bolya & Hoffman, arXiv:2303.17604).

One token of every 2×2 is a destination. Of the others, the share that is most like one of them is averaged
into it before attention and before the MLP, and gets its result. It needs no training and no weights.

The choice is a rank of likenesses, so that a rounding error may flip it: a picture may then differ visibly
from the same one in another batch, which no other option of the network does.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ditserve.model.nets.layers import Grid


def squares_apart(h: Tensor, grid: Grid) -> Tensor:
    """Order tokens (N, T, D) by their place in a square of 2×2: the first quarter are the upper left ones."""
    n, _, d = h.shape
    # The rows of all frames of a clip lie one below the other.
    rows, columns = math.prod(grid[:-1]), grid[-1]
    h = h.reshape(n, rows // 2, 2, columns // 2, 2, d).permute(0, 2, 4, 1, 3, 5)
    return h.reshape(n, rows * columns, d)


def squares_together(h: Tensor, grid: Grid) -> Tensor:
    """Order tokens (N, T, D) as they were before `squares_apart`."""
    n, _, d = h.shape
    rows, columns = math.prod(grid[:-1]), grid[-1]
    h = h.reshape(n, 2, 2, rows // 2, columns // 2, d).permute(0, 3, 1, 4, 2, 5)
    return h.reshape(n, rows * columns, d)


class TokenMerging:
    """The tokens `h` (N, T, D) that are computed together: their first quarter are the destinations."""

    def __init__(self, h: Tensor, share: float) -> None:
        # T may be symbolic, of which a product with a float is none of its whole numbers.
        self.quarter, merged = h.shape[1] // 4, h.shape[1] * round(100 * share) // 100
        unit = F.normalize(h.float(), dim=-1)
        likeness = unit[:, self.quarter :] @ unit[:, : self.quarter].transpose(1, 2)  # (N, 3T/4, T/4)
        best, target = likeness.max(dim=-1)
        order = best.argsort(dim=-1, descending=True)
        self.merged, self.kept = order[:, :merged], order[:, merged:]
        self.target = target.gather(1, self.merged)  # (N, M)
        # Which destination has which merged token, (N, T/4, M). Sums are products with it, because TensorRT
        # adds nothing in a scatter, and ONNX Runtime no halves.
        places = torch.arange(self.quarter, device=h.device)
        self.members = (self.target[:, None] == places[:, None]).to(h.dtype)
        self.counts = 1 + self.members.sum(-1, keepdim=True)  # (N, T/4, 1)

    def merge(self, x: Tensor) -> Tensor:
        """Return the means of what is merged, and the rest: (N, T, D) → (N, T − M, D)."""
        first, others = x[:, : self.quarter], x[:, self.quarter :]
        sums = first + self.members @ others.gather(1, _wide(self.merged, x))
        return torch.cat([sums / self.counts, others.gather(1, _wide(self.kept, x))], dim=1)

    def spread(self, y: Tensor) -> Tensor:
        """Return the result of every token: (N, T − M, D) → (N, T, D)."""
        first, kept = y[:, : self.quarter], y[:, self.quarter :]
        others = torch.zeros_like(first).repeat(1, 3, 1).scatter(1, _wide(self.kept, y), kept)
        others = others.scatter(1, _wide(self.merged, y), first.gather(1, _wide(self.target, y)))
        return torch.cat([first, others], dim=1)


def _wide(index: Tensor, x: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, x.shape[-1])
