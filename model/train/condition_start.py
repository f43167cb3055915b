"""The start of a network's conditions from its data, before the first step.

A class starts as what its pictures have in common: their mean, in principal components. A text starts as what
a linear map of its sentence embedding tells of that. So classes that look alike start alike, which gradient
descent finds slowly: each of a thousand classes has its turn once in a thousand rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ditserve.model.data.dataset import Dataset
from ditserve.model.nets.factory import Network

Floats = npt.NDArray[np.float64]

# The examples that are looked at, at most, and read at a time.
EXAMPLES, CHUNK = 1 << 15, 256
# The weight of the overall mean in the mean of a class, in pictures.
SHRINKAGE = 1.0
# The ridge of the map of texts, whose sentence embeddings have length 1.
RIDGE = 0.3
# Components are multiplied by their variance to this power, so that fine differences tell as well.
WHITENING = -0.25


def start_conditions(network: Network, dataset: Dataset, *, std: float, seed: int) -> None:
    """Set the label tables and the text map of `network` from the training examples.

    The tables together have standard deviation `std`. Null classes and "no text" stay as they are, and so
    does a network without label factors.
    """
    rng = np.random.default_rng(seed)
    index = dataset.training
    if len(index) > EXAMPLES:
        index = np.sort(rng.choice(index, EXAMPLES, replace=False))
    chunks = [index[first : first + CHUNK] for first in range(0, len(index), CHUNK)]
    pictures = np.concatenate([dataset.batch(chunk, rng) for chunk in chunks])  # (N, C, H, W)
    counts, labels = [len(factor.classes) for factor in dataset.factors], dataset.labels[index]
    if not counts:
        return
    means = class_means(pictures.reshape(len(index), -1), labels, counts)
    codes = encode_means(means, network.config.hidden_size, std)
    with torch.no_grad():
        for table, rows in zip(network.y_embedder.tables, codes, strict=True):
            cast(nn.Embedding, table).weight[: len(rows)] = torch.from_numpy(rows).float()
        if dataset.texts is not None and network.y_embedder.text is not None:
            told = sum(rows[labels[:, factor]] for factor, rows in enumerate(codes))
            embeddings = np.concatenate([dataset.texts.draw(chunk, rng) for chunk in chunks])
            start_text(network.y_embedder.text, embeddings[:, : dataset.texts.size], np.asarray(told))


def class_means(
    pictures: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], counts: Sequence[int]
) -> list[Floats]:
    """Return the (classes, L) of each factor whose sum is near the pictures (N, L) less their mean.

    The factor with the fewest classes comes first, and the next explains what is left.
    """
    rest = pictures - pictures.mean(0, dtype=np.float64)
    means: dict[int, Floats] = {}
    for factor in sorted(range(len(counts)), key=lambda factor: counts[factor]):
        total = np.zeros((counts[factor], rest.shape[1]))
        np.add.at(total, labels[:, factor], rest)
        shown = np.bincount(labels[:, factor], minlength=counts[factor])[:, None]
        means[factor] = total / (shown + SHRINKAGE)
        rest -= means[factor][labels[:, factor]]
    return [means[factor] for factor in range(len(counts))]


def encode_means(means: Sequence[Floats], size: int, std: float) -> list[Floats]:
    """Return the codes (classes, size) of each factor's means, with standard deviation `std` together.

    They are the first `size` principal components of all means; where there are fewer, zeros follow.
    """
    together = np.concatenate(means)  # (K, L)
    variance, left = np.linalg.eigh(together @ together.T)
    kept = np.argsort(variance)[::-1][: min(size, len(together))]
    kept = kept[variance[kept] > 1e-9 * variance[kept[0]]]
    codes = np.zeros((len(together), size))
    # Column k of `left` times the root of its variance holds the means' components along direction k.
    codes[:, : len(kept)] = left[:, kept] * variance[kept] ** (0.5 + WHITENING)
    return np.split(codes * (std / codes.std()), np.cumsum([len(mean) for mean in means])[:-1])


def start_text(text: nn.Linear, embeddings: npt.NDArray[np.float32], codes: Floats) -> None:
    """Set the map of sentence embeddings (N, size) to the best linear one to codes (N, D)."""
    given = np.column_stack([embeddings, np.ones(len(embeddings))]).astype(np.float64)
    weights = np.linalg.solve(given.T @ given + RIDGE * np.eye(given.shape[1]), given.T @ codes)
    text.weight.copy_(torch.from_numpy(weights[:-1].T))
    text.bias.copy_(torch.from_numpy(weights[-1]))
