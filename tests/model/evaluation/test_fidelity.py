"""Distances between sets of features, compared with other implementations and on sets of known distance."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg  # type: ignore[import-untyped]
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors  # type: ignore[import-untyped]
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from ditserve.model.evaluation.fidelity import (
    energy_scores,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest,
    precision_recall,
)

Array = npt.NDArray[np.float64]
keeps_features = pytest.mark.filterwarnings(
    "ignore:Metric .* will save all extracted features:UserWarning",
    r"ignore:std... degrees of freedom:UserWarning",
)


class AsTheyAre(nn.Module):
    """A feature network for torchmetrics whose pictures are the features already."""

    num_features = 24

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1)[:, : self.num_features]


def features(n: int, seed: int, *, width: int = 24, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    """Return correlated features (n, width), with the same correlations for every seed."""
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    points = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return points @ mix / math.sqrt(width) * scale + shift


REAL, FAKE = features(300, 1), features(200, 2, shift=0.3, scale=1.2)


def by_matrix_root(a: Tensor, b: Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.real(scipy.linalg.sqrtm(s @ t))
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root))


def test_frechet_distance_agrees_with_scipys_matrix_root_and_with_torchmetrics() -> None:
    ours = frechet_distance(REAL, FAKE)
    assert ours == pytest.approx(by_matrix_root(REAL, FAKE), rel=1e-9)
    theirs = FrechetInceptionDistance(feature=AsTheyAre(), input_img_size=(24, 1, 1), normalize=False)
    theirs.set_dtype(torch.float64)
    theirs.update(REAL.double(), real=True)
    theirs.update(FAKE.double(), real=False)
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-5)


def test_frechet_distance_of_known_gaussians() -> None:
    # Two points ±1 and ±3 in one dimension, moved 5 apart: variances 2 and 18, (√2 − √18)² + 5².
    a, b = torch.tensor([[-1.0], [1.0]]), torch.tensor([[2.0], [8.0]])
    assert frechet_distance(a, b) == pytest.approx(25 + 2 + 18 - 2 * math.sqrt(36))
    assert frechet_distance(REAL, REAL) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_singular_covariances_is_finite_and_symmetric() -> None:
    few, other = features(10, 3), features(12, 4)
    assert frechet_distance(few, other) == pytest.approx(frechet_distance(other, few), rel=1e-6)
    assert frechet_distance(few, few + 2) == pytest.approx(24 * 4, rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 40), st.integers(1, 6), st.floats(-3, 3), st.integers(0, 1000))
def test_moving_a_set_adds_the_square_of_the_move(n: int, width: int, move: float, seed: int) -> None:
    points = features(n, seed, width=width)
    assert frechet_distance(points, points + move) == pytest.approx(width * move**2, rel=1e-4, abs=1e-4)


@keeps_features
def test_kernel_distance_agrees_with_torchmetrics() -> None:
    n = len(FAKE)
    theirs = KernelInceptionDistance(feature=AsTheyAre(), subsets=1, subset_size=n, normalize=False)
    theirs.update(REAL[:n].double(), real=True)
    theirs.update(FAKE.double(), real=False)
    ours = kernel_distance(REAL[:n], FAKE, subsets=1, size=n)
    assert ours.mean == pytest.approx(float(theirs.compute()[0]), rel=1e-6)


def test_kernel_distance_is_unbiased_where_the_frechet_distance_is_not() -> None:
    draws = [(features(30, 2 * k), features(30, 2 * k + 1)) for k in range(40)]
    kernel = np.array([kernel_distance(a, b, subsets=1).mean for a, b in draws])
    assert abs(kernel.mean()) < 3 * kernel.std() / math.sqrt(len(draws))
    assert min(frechet_distance(a, b) for a, b in draws) > 1


def test_kernel_distance_repeats_by_seed_and_says_how_subsets_differ() -> None:
    first = kernel_distance(REAL, FAKE, subsets=8, size=50, seed=3)
    assert first == kernel_distance(REAL, FAKE, subsets=8, size=50, seed=3)
    assert first != kernel_distance(REAL, FAKE, subsets=8, size=50, seed=4)
    assert first.std > 0


@keeps_features
@pytest.mark.parametrize("width", [5, 100])
def test_inception_score_agrees_with_torchmetrics(width: int) -> None:
    logits = torch.randn(60, width, generator=torch.Generator().manual_seed(0)) * 3
    network = AsTheyAre()
    network.num_features = width
    theirs = InceptionScore(feature=network, splits=1, normalize=False)
    theirs.update(logits.double())
    assert inception_score(logits.softmax(1)).mean == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


def test_inception_score_runs_from_one_to_the_number_of_classes() -> None:
    certain = torch.eye(4).repeat(5, 1)
    assert inception_score(certain).mean == pytest.approx(4)
    assert inception_score(torch.full((20, 4), 0.25)).mean == pytest.approx(1)
    assert inception_score(certain, splits=5).std == pytest.approx(0)


def by_scikit_learn(real: Array, fake: Array, k: int) -> tuple[float, float]:
    def share(queries: Array, centres: Array) -> float:
        own = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(centres)
        radii = own.kneighbors(centres)[0][:, k]
        distances, indices = (
            NearestNeighbors(n_neighbors=len(centres), algorithm="brute").fit(centres).kneighbors(queries)
        )
        return float((distances <= radii[indices]).any(1).mean())

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_agree_with_scikit_learn(k: int) -> None:
    theirs = by_scikit_learn(REAL.double().numpy(), FAKE.double().numpy(), k)
    assert precision_recall(REAL, FAKE, k) == pytest.approx(theirs)
    assert 0 < theirs[1] < theirs[0] or 0 < theirs[0] < theirs[1]  # so that neither can pass for the other


def test_precision_sees_wrong_pictures_and_recall_missing_ones() -> None:
    clusters = torch.cat([features(50, 5), features(50, 6, shift=100.0)])
    assert precision_recall(clusters, clusters[:50]) == (1.0, 0.5)
    assert precision_recall(clusters[:50], clusters) == (0.5, 1.0)


def test_nearest_agrees_with_scikit_learn_across_chunks() -> None:
    queries, references = features(600, 7), features(70, 8)
    distances, indices = NearestNeighbors(n_neighbors=3).fit(references.numpy()).kneighbors(queries.numpy())
    neighbours = nearest(queries, references, 3)
    np.testing.assert_allclose(neighbours.distances, distances, rtol=1e-5)
    np.testing.assert_array_equal(neighbours.indices, indices)


def test_nearest_tells_a_copy_from_a_near_copy() -> None:
    pictures = torch.rand(4, 5000, generator=torch.Generator().manual_seed(0)) + 100
    neighbours = nearest(torch.stack([pictures[2], pictures[1] + 1e-4]), pictures)
    assert neighbours.indices.flatten().tolist() == [2, 1]
    assert neighbours.distances.flatten().tolist() == pytest.approx([0, 1e-4 * math.sqrt(5000)], abs=1e-3)


def test_too_few_pictures_are_refused_in_a_sentence() -> None:
    one = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="at least 2 pictures"):
        frechet_distance(one, REAL[:, :3])
    with pytest.raises(ValueError, match="at least 2 pictures"):
        kernel_distance(one, REAL[:, :3])
    with pytest.raises(ValueError, match="1 pictures cannot be split in 2"):
        inception_score(torch.ones(1, 3), splits=2)
    with pytest.raises(ValueError, match="3 pictures are too few for 3 neighbours"):
        precision_recall(REAL[:3], FAKE)
    with pytest.raises(ValueError, match="have no 5 nearest"):
        nearest(REAL, REAL[:4], 5)


def test_the_energy_score_is_least_for_the_distribution_itself() -> None:
    # A reality of two colours, and models that are right, blurred, or always of one colour.
    generator = torch.Generator().manual_seed(0)

    def colours(n: int) -> Tensor:
        return torch.randint(2, (n, 1, 1, 1), generator=generator).float().expand(n, 3, 4, 4) * 2 - 1

    n = 2000
    real, right, blurred, one = (
        colours(n),
        colours(2 * n),
        torch.zeros(2 * n, 3, 4, 4),
        torch.ones(2 * n, 3, 4, 4),
    )
    scores = [float(energy_scores(pictures, real).mean()) for pictures in (right, blurred, one)]
    assert scores[0] == pytest.approx(0.5, abs=0.05)  # E|X − y| = 1, E|X − X'| = 1
    assert scores[1:] == pytest.approx([1.0, 1.0], abs=0.05)
    assert energy_scores(real.repeat(2, 1, 1, 1), real).abs().max() == 0
