"""Nearest neighbours among feature vectors or pictures, exactly, a chunk of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 256  # queries whose distances to all references are held at once


@dataclass(frozen=True, slots=True)
class Nearest:
    """Of each query: distances (N, k) ascending, and which references they are (N, k)."""

    distances: Tensor
    indices: Tensor


def nearest(queries: Tensor, references: Tensor, k: int = 1) -> Nearest:
    """The k nearest of references (M, D) to each query (N, D), by Euclidean distance.

    Raises:
        ValueError: fewer than k references.
    """
    if len(references) < k:
        raise ValueError(f"{len(references)} pictures have no {k} nearest")
    found = [block.topk(k, largest=False) for block in _distances(queries, references)]
    return Nearest(torch.cat([part.values for part in found]), torch.cat([part.indices for part in found]))


def kth_distance(points: Tensor, k: int) -> Tensor:
    """The distance (N,) of each of (N, D) to its k-th nearest other one.

    Raises:
        ValueError: no more than k points.
    """
    if len(points) <= k:
        raise ValueError(f"{len(points)} pictures are too few for {k} neighbours each")
    return nearest(points, points, k + 1).distances[:, k]


def within(queries: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Whether each query (N, D) lies within the radius (M,) of any centre (M, D), bool (N,)."""
    return torch.cat([(block <= radii).any(1) for block in _distances(queries, centres)])


def _distances(queries: Tensor, references: Tensor) -> Iterator[Tensor]:
    """Distances (n, M) of chunks of queries; in float64, since the matrix product inside loses small ones to rounding."""
    references = references.double()
    for chunk in queries.split(CHUNK):
        yield torch.cdist(chunk.double(), references)
