"""Distances between two sets of pictures, computed on their features.

This is arithmetic on tensors, without networks or files. The number of pictures biases every one of these
estimates. Compare only figures of equal counts and of the same feature network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 256  # queries whose distances to all references are held at once


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over subsets or splits, and the standard deviation of these."""

    mean: float
    std: float


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the squared Fréchet distance of the Gaussians fitted to features (N, D) and (M, D).

        |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½        Heusel et al., arXiv:1706.08500, eq. 6

    With Inception's features this is FID. The last trace is the sum of the square roots of the eigenvalues of
    Σ₁^½ Σ₂ Σ₁^½. They equal those of Σ₁Σ₂, but belong to a symmetric matrix, so nothing becomes complex if a
    covariance is singular. With too few pictures for D the distance is overestimated.

    Raises:
        ValueError: fewer than two pictures in a set.
    """
    (mean_a, covariance_a), (mean_b, covariance_b) = _gaussian(a), _gaussian(b)
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp_min(0).sqrt().sum()
    traces = covariance_a.trace() + covariance_b.trace()
    return float(((mean_a - mean_b).square().sum() + traces - 2 * overlap).clamp_min(0))


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and unbiased covariance (D, D) of features (N, D), float64."""
    if len(features) < 2:
        raise ValueError("a Fréchet distance needs at least 2 pictures in each set")
    exact = features.double()
    mean = exact.mean(0)
    centred = exact - mean
    return mean, centred.T @ centred / (len(exact) - 1)


def energy_scores(pictures: Tensor, real: Tensor) -> Tensor:
    """Return the energy scores (n,) of n conditions, from two pictures and a real one of each.

        (|X − y| + |X' − y|) / 2 − |X − X'| / 2        Gneiting & Raftery, JASA 102 (2007), eq. 22

    X and X' are pictures k and k + n of `pictures` (2n, C, H, W), y is picture k of `real` (n, C, H, W), and
    a distance is a root mean square. The mean is least for a model that draws as reality does: pictures that
    are only blurred, or all alike, gain in the first term and lose in the second. No feature network is
    needed, so it works for any pictures and latents.
    """
    one, other = pictures.flatten(1).chunk(2)
    truth = real.flatten(1)
    to_real = (_rms(one - truth) + _rms(other - truth)) / 2
    return to_real - _rms(one - other) / 2


def _rms(values: Tensor) -> Tensor:
    return values.double().square().mean(1).sqrt()


def kernel_distance(a: Tensor, b: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> Estimate:
    """Return the squared maximum mean discrepancy of features (N, D) and (M, D).

    With Inception's features this is KID. The kernel is (x·y/D + 1)³ (Bińkowski et al., arXiv:1801.01401,
    §4). The estimate is averaged over `subsets` random subsets of `size` pictures, or of as many as there
    are. It is unbiased for any count: sets of one distribution give 0 on average, and negative values occur.

    Raises:
        ValueError: fewer than two pictures in a set.
    """
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError("a kernel distance needs at least 2 pictures in each set")
    generator = torch.Generator().manual_seed(seed)
    estimates = []
    for _ in range(subsets):
        x, y = (
            rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)].double()
            for rows in (a, b)
        )
        same = sum(_kernel(rows, rows).fill_diagonal_(0).sum() / (size * (size - 1)) for rows in (x, y))
        estimates.append(same - 2 * _kernel(x, y).mean())
    values = torch.stack([torch.as_tensor(value) for value in estimates])
    return Estimate(float(values.mean()), float(values.std(correction=0)))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def inception_score(probabilities: Tensor, splits: int = 1) -> Estimate:
    """Return exp of the mean KL divergence of class probabilities (N, K) from their own average.

    The score is 1 to K, higher is better. It grows with the count, and does not depend on the training set.
    Source: Salimans et al., arXiv:1606.03498, §4.

    Raises:
        ValueError: fewer pictures than splits.
    """
    if not 1 <= splits <= len(probabilities):
        raise ValueError(f"{len(probabilities)} pictures cannot be split in {splits}")
    scores = []
    for part in probabilities.double().tensor_split(splits):
        average = part.mean(0, keepdim=True)
        divergence = torch.special.xlogy(part, part) - torch.special.xlogy(part, average)
        scores.append(divergence.sum(1).mean().exp())
    values = torch.stack(scores)
    return Estimate(float(values.mean()), float(values.std(correction=0)))


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Return (precision, recall) of real features (M, D) and generated features (N, D).

    A picture's radius is the distance to its k-th nearest neighbour in its own set. Precision is the share
    of generated pictures within the radius of a real one; recall is the share of real pictures within the
    radius of a generated one. Radii shrink as a set grows. Source: Kynkäänniemi et al., arXiv:1904.06991,
    eq. 1 and 2.

    Raises:
        ValueError: no more than k pictures in a set.
    """
    precision = within_radius(generated, real, kth_distance(real, k)).double().mean()
    recall = within_radius(real, generated, kth_distance(generated, k)).double().mean()
    return float(precision), float(recall)


@dataclass(frozen=True, slots=True)
class NearestNeighbours:
    """The k nearest references of N queries: `distances` (N, k), ascending, and `indices` (N, k)."""

    distances: Tensor
    indices: Tensor


def nearest(queries: Tensor, references: Tensor, k: int = 1) -> NearestNeighbours:
    """Return the k nearest of references (M, D) to each query (N, D), by Euclidean distance; exact.

    Raises:
        ValueError: fewer than k references.
    """
    if len(references) < k:
        raise ValueError(f"{len(references)} pictures have no {k} nearest")
    chunks = [block.topk(k, largest=False) for block in _distances(queries, references)]
    return NearestNeighbours(
        torch.cat([chunk.values for chunk in chunks]), torch.cat([chunk.indices for chunk in chunks])
    )


def kth_distance(points: Tensor, k: int) -> Tensor:
    """Return the distance (N,) of each of points (N, D) to its k-th nearest other point.

    Raises:
        ValueError: no more than k points.
    """
    if len(points) <= k:
        raise ValueError(f"{len(points)} pictures are too few for {k} neighbours each")
    return nearest(points, points, k + 1).distances[:, k]


def within_radius(queries: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Return bool (N,): each query (N, D) that lies within the radius (M,) of any centre (M, D)."""
    return torch.cat([(block <= radii).any(1) for block in _distances(queries, centres)])


def _distances(queries: Tensor, references: Tensor) -> Iterator[Tensor]:
    """Yield distances (n, M) of chunks of queries.

    They are computed in float64: rounding in the matrix product inside `cdist` would lose small distances. So
    are references in chunks: whole pictures, in float64 and once more inside `cdist`, would take gigabytes.
    """
    for chunk in queries.split(CHUNK):
        exact = chunk.double()
        yield torch.cat([torch.cdist(exact, part.double()) for part in references.split(CHUNK)], dim=1)
