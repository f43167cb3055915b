"""The start of conditions from the data: classes that look alike start alike."""

from __future__ import annotations

import numpy as np
import torch

from ditserve.model.train.condition_start import (
    class_means,
    encode_means,
    start_text,
)

RNG = np.random.default_rng(0)
COUNTS = (12, 3)
# Twelve shapes in three colours, on 2 channels of 4×4, forty pictures of each pair.
SHAPES, COLOURS = RNG.normal(size=(12, 32)), RNG.normal(size=(3, 32))
LABELS = np.stack(np.meshgrid(range(12), range(3), range(40), indexing="ij")[:2], -1).reshape(-1, 2)
PICTURES = SHAPES[LABELS[:, 0]] + COLOURS[LABELS[:, 1]] + 0.1 * RNG.normal(size=(len(LABELS), 32))


def test_means_of_the_factors_add_up_to_the_pictures() -> None:
    means = class_means(PICTURES.astype(np.float32), LABELS, COUNTS)
    assert [mean.shape for mean in means] == [(12, 32), (3, 32)]
    explained = sum(mean[LABELS[:, factor]] for factor, mean in enumerate(means))
    left = PICTURES - PICTURES.mean(0) - explained
    assert left.var() < 0.02 * PICTURES.var()


def test_codes_keep_the_distances_of_the_means() -> None:
    means = class_means(PICTURES.astype(np.float32), LABELS, COUNTS)
    codes = encode_means(means, 64, 0.3)
    together = np.concatenate(codes)
    assert together.shape == (15, 64)
    np.testing.assert_allclose(together.std(), 0.3)
    # Two classes that look alike are neighbours.
    twin = [np.concatenate([means[0], means[0][:1] + 0.1]), means[1]]
    codes = encode_means(twin, 64, 0.3)
    distances = np.linalg.norm(codes[0] - codes[0][0], axis=1)
    assert np.argsort(distances)[1] == 12
    assert distances[12] < 0.5 * np.sort(distances)[2]


def test_texts_start_as_the_best_linear_map() -> None:
    embeddings, told = RNG.normal(size=(500, 8)), RNG.normal(size=(8, 5))
    text = torch.nn.Linear(8, 5)
    with torch.no_grad():
        start_text(text, embeddings.astype(np.float32), embeddings @ told + 2.0)
        mapped = text(torch.from_numpy(embeddings).float()).numpy()
    np.testing.assert_allclose(mapped, embeddings @ told + 2.0, atol=0.02)
