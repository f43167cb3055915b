"""Looks of pairs that no picture shows, told by a conditional mean: of a name in a style that lacks it.

It is what the class looks like in the most similar map that shows it. A mean over all of its maps would be
nearer to the truth, but it is a ghost of several drawings, and what is drawn from it is one as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ditserve.model.nets.dit import DiT

Floats = npt.NDArray[np.float64]

# The weight of the means of shown pairs beside those of others, and the ridge of a class's codes.
KEPT, RIDGE = 0.5, 1e-4


def fill_looks(looks: Floats, shown: npt.NDArray[np.bool_]) -> Floats:
    """Return the looks (classes, maps, L) of classes in maps with those that are not shown (classes, maps).

    A class looks there as in the map most like it, over the classes that both show, that shows the class. One
    that is shown in no map stays as it is.
    """
    maps = shown.shape[1]
    apart = np.full((maps, maps), np.inf)
    for a, b in permutations(range(maps), 2):
        both = shown[:, a] & shown[:, b]
        if both.any():
            apart[a, b] = np.square(looks[both, a] - looks[both, b]).mean()
    filled = looks.copy()
    for a in range(maps):
        others = [int(b) for b in np.argsort(apart[a], kind="stable") if b != a]
        for k in np.flatnonzero(~shown[:, a]):
            source = next((b for b in others if shown[k, b]), None)
            if source is not None:
                filled[k, a] = looks[k, source]
    return filled


def complete_codes(
    network: DiT,
    looks: Floats,
    shown: npt.NDArray[np.bool_],
    offsets: npt.NDArray[np.floating[Any]],
    factors: Sequence[int],
) -> int:
    """Change the codes of classes to tell `fill_looks` of pairs that are not shown; return how many changed.

    `looks` (classes, maps, L) are less the `offsets` (maps, L). `factors` are those of the codes and of the
    maps. What a class tells of shown pairs changes little: it is a compromise of least squares.
    """
    mean = network.conditional_mean
    assert mean is not None
    coded, gated = (cast(nn.Embedding, network.y_embedder.tables[factor]).weight for factor in factors)
    first, maps = network.config.hidden_size, shown.shape[1]
    chosen = gated[:maps, first : first + mean.maps].double().numpy()  # (maps, the mean's maps)
    basis = mean.basis.double().numpy()
    linear = np.einsum("tm,mrl->trl", chosen, basis[:, 1:])
    squares = linear @ linear.transpose(0, 2, 1)  # (maps, R, R)
    wanted = fill_looks(looks, shown) + offsets
    lacking = np.flatnonzero(~shown.all(1) & shown.any(1))
    for k in lacking.tolist():
        told = mean.mean((coded[k] + gated[:maps])[:, first:]).flatten(1).double().numpy()
        gaps = np.flatnonzero(~shown[k])
        square = squares[gaps].sum(0) + KEPT * squares[shown[k]].sum(0)
        square += RIDGE * square.diagonal().mean() * np.eye(len(square))
        error = np.einsum("trl,tl->r", linear[gaps], wanted[k, gaps] - told[gaps])
        change = np.linalg.solve(square, error)
        coded[k, first + mean.maps :] += torch.from_numpy(change).to(coded)
    return len(lacking)
