"""How far a set of pictures is from another, judged on features. Arithmetic on tensors: networks and files are elsewhere.

Every one of these estimates is biased by the number of pictures: compare only figures of equal counts and the same feature network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditserve.model.evaluation.neighbours import kth_distance, within


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over subsets or splits, and their standard deviation."""

    mean: float
    std: float


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to features (N, D) and (M, D); with Inception's features, FID.

    |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½, the last as the sum of the square roots of the eigenvalues of Σ₁^½ Σ₂ Σ₁^½,
    which are those of Σ₁Σ₂ and, unlike it, belong to a symmetric matrix: nothing becomes complex where covariances are singular.
    Too few pictures for D make it larger than it is. Source: Heusel et al., arXiv:1706.08500, eq. 6.

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
    """Mean (D,) and unbiased covariance (D, D), float64."""
    if len(features) < 2:
        raise ValueError("a Fréchet distance needs at least 2 pictures in each set")
    exact = features.double()
    mean = exact.mean(0)
    centred = exact - mean
    return mean, centred.T @ centred / (len(exact) - 1)


def kernel_distance(a: Tensor, b: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> Estimate:
    """Squared maximum mean discrepancy of features (N, D) and (M, D) under the kernel (x·y/D + 1)³; with Inception's, KID.

    Unbiased for any count: equal sets give 0 on average, and negative values occur. Averaged over `subsets` random subsets of
    `size` pictures, or of as many as there are. Source: Bińkowski et al., arXiv:1801.01401, §4.

    Raises:
        ValueError: fewer than two pictures in a set.
    """
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError("a kernel distance needs at least 2 pictures in each set")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(subsets):
        x, y = (
            rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)].double()
            for rows in (a, b)
        )
        same = sum(_kernel(rows, rows).fill_diagonal_(0).sum() / (size * (size - 1)) for rows in (x, y))
        found.append(same - 2 * _kernel(x, y).mean())
    values = torch.stack([torch.as_tensor(value) for value in found])
    return Estimate(float(values.mean()), float(values.std(correction=0)))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def inception_score(probabilities: Tensor, splits: int = 1) -> Estimate:
    """exp of the mean divergence of class probabilities (N, K) from their own average; 1 to K, higher is better.

    It grows with the count, and knows nothing of the training set. Source: Salimans et al., arXiv:1606.03498, §4.

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
    """(precision, recall) of features (M, D) against (N, D): the share of each set within reach of the other.

    A picture's reach is the distance to its k-th nearest neighbour in its own set. Precision: generated pictures that lie in
    the reach of a real one; recall: real pictures in the reach of a generated one. Reach shrinks as a set grows.
    Source: Kynkäänniemi et al., arXiv:1904.06991, eq. 1 and 2.

    Raises:
        ValueError: no more than k pictures in a set.
    """
    precision = within(generated, real, kth_distance(real, k)).double().mean()
    recall = within(real, generated, kth_distance(generated, k)).double().mean()
    return float(precision), float(recall)
