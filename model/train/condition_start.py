"""The start of a network's conditions from its data, before the first step.

A class starts as what its pictures have in common: their mean, in principal components. A text starts as what
a linear map of its sentence embedding tells of that. So classes that look alike start alike, which gradient
descent finds slowly: each of a thousand classes has its turn once in a thousand rows. A network with a
conditional mean starts with what its classes look like, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ditserve.model.data.dataset import Dataset
from ditserve.model.nets.conditioner import ConditionalMean
from ditserve.model.nets.dit import DiT
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

    The tables together have standard deviation `std`. Null classes and "no text" stay as they are, or are
    zeros in a network with a conditional mean. Nothing changes without label factors, or where no example has
    all of its labels.
    """
    rng = np.random.default_rng(seed)
    counts = [len(factor.classes) for factor in dataset.factors]
    # What is not labelled whole tells nothing of its classes.
    index = dataset.training[(dataset.labels[dataset.training] < counts).all(1)]
    if not counts or not len(index):
        return
    if len(index) > EXAMPLES:
        index = np.sort(rng.choice(index, EXAMPLES, replace=False))
    chunks = [index[first : first + CHUNK] for first in range(0, len(index), CHUNK)]
    pictures = np.concatenate([dataset.batch(chunk, rng) for chunk in chunks])  # (N, C, H, W)
    flat, labels = pictures.reshape(len(index), -1), dataset.labels[index]
    mean = network.conditional_mean if isinstance(network, DiT) else None
    with torch.no_grad():
        if mean is None:
            codes = encode_means(class_means(flat, labels, counts), network.config.hidden_size, std)
        else:
            codes = start_mean(mean, flat, labels, counts, std)
        for table, rows in zip(network.y_embedder.tables, codes, strict=True):
            weight = cast(nn.Embedding, table).weight
            weight[: len(rows)] = torch.from_numpy(rows).float()
            if mean is not None:
                weight[len(rows) :] = 0
        if dataset.texts is not None and network.y_embedder.text is not None:
            if mean is not None:
                network.y_embedder.no_text.zero_()
            told = sum(rows[labels[:, factor]] for factor, rows in enumerate(codes))
            embeddings = np.concatenate([dataset.texts.draw(chunk, rng) for chunk in chunks])
            start_text(network.y_embedder.text, embeddings[:, : dataset.texts.size], np.asarray(told))


def class_means(
    pictures: npt.NDArray[np.floating[Any]], labels: npt.NDArray[np.int64], counts: Sequence[int]
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


def start_mean(
    mean: ConditionalMean,
    pictures: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    counts: Sequence[int],
    std: float,
) -> list[Floats]:
    """Set a conditional mean to that of pictures (N, L); return the codes (classes, D) of each factor.

    The factor of most classes has codes, and another, of as many classes as there are maps or fewer, chooses
    among the maps: each is the linear one from the codes to the pictures of its class. A class of pictures
    that are not there looks in a map like its mean over the others. Null classes choose all maps alike, and
    tell the offset alone. Where several factors are left, the codes tell nothing of them.
    """
    maps, rows, length = mean.basis.shape
    coded = int(np.argmax(counts))
    fitting = [k for k in range(len(counts)) if k != coded and counts[k] <= maps and maps > 1]
    gated = max(fitting, key=lambda factor: counts[factor], default=None)
    gate = np.zeros(len(pictures), np.int64) if gated is None else labels[:, gated]
    used = 1 if gated is None else counts[gated]
    centre = pictures.mean(0, dtype=np.float64)
    offsets = class_means(pictures, gate[:, None], [used])[0]
    looks = looks_in_maps(pictures - centre - offsets[gate], labels[:, coded], gate, (counts[coded], used))
    left, values, right = np.linalg.svd(looks.reshape(counts[coded], -1), full_matrices=False)
    size = mean.codes.in_features
    kept = min(rows - 1, len(values), size - (0 if gated is None else used))
    scale = np.maximum(values[:kept], 1e-9 * values[0]) ** (1 + 2 * WHITENING)
    codes = left[:, :kept] * scale
    factor = std / codes.std()
    mean.basis.zero_()
    basis = (right[:kept] * (values[:kept] / scale / factor)[:, None]).reshape(kept, used, length)
    mean.basis[:used, 0] = torch.from_numpy(centre + offsets).float()
    mean.basis[:used, 1 : 1 + kept] = torch.from_numpy(basis).float().transpose(0, 1)
    tables = [np.zeros((count, size)) for count in counts]
    first = 0 if gated is None else used
    tables[coded][:, first : first + kept] = factor * codes
    mean.codes.weight.zero_()
    mean.codes.bias.zero_()
    mean.codes.weight[:kept, first : first + kept] = torch.eye(kept)
    if mean.gates is not None:
        mean.gates.weight.zero_()
        mean.gates.bias.zero_()
        mean.gates.bias[:used] = 1 / used
        if gated is not None:
            # A class's own gate is 1, all others 0; they are told by their distances from being alike.
            apart = std * used**0.5
            tables[gated][:, :used] = apart * (np.eye(used) - 1 / used)
            mean.gates.weight[:used, :used] = torch.eye(used) / apart
    return tables


def looks_in_maps(
    pictures: Floats, classes: npt.NDArray[np.int64], maps: npt.NDArray[np.int64], counts: tuple[int, int]
) -> Floats:
    """Return the mean of the pictures (N, L) of each class in each map, (classes, maps, L).

    Where a class has none in a map, it is the mean of the class over all maps.
    """
    cells, shape = classes * counts[1] + maps, (counts[0] * counts[1], pictures.shape[1])
    looks, shown = np.zeros(shape), np.bincount(cells, minlength=shape[0])[:, None]
    np.add.at(looks, cells, pictures)
    looks /= np.maximum(shown, 1)
    of_class = class_means(pictures, classes[:, None], counts[:1])[0].repeat(counts[1], axis=0)
    return np.where(shown > 0, looks, of_class).reshape(*counts, -1)


def start_text(text: nn.Linear, embeddings: npt.NDArray[np.float32], codes: Floats) -> None:
    """Set the map of sentence embeddings (N, size) to the best linear one to codes (N, D)."""
    given = np.column_stack([embeddings, np.ones(len(embeddings))]).astype(np.float64)
    weights = np.linalg.solve(given.T @ given + RIDGE * np.eye(given.shape[1]), given.T @ codes)
    text.weight.copy_(torch.from_numpy(weights[:-1].T))
    text.bias.copy_(torch.from_numpy(weights[-1]))
