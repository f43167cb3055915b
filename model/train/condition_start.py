"""The start of a network's conditions from its data, before the first step.

A class starts as what its pictures have in common: their mean, in principal components. A text starts as what
a linear map of its sentence embedding tells of that. So classes that look alike start alike, which gradient
descent finds slowly: each of a thousand classes has its turn once in a thousand rows. A network with a
conditional mean starts with what its classes look like, too, and learns what is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from ditserve.model.data.dataset import Dataset
from ditserve.model.nets.conditioner import SCALE_ROWS, ConditionalMean, ConditionEmbedder, scale_shares
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.factory import Network
from ditserve.model.train.batch import TrainingBatch
from ditserve.model.train.loss import TrainingNoise
from ditserve.model.train.missing_looks import complete_codes, fill_looks

Floats = npt.NDArray[np.float64]

# The examples that are looked at, at most, and read at a time.
EXAMPLES, CHUNK = 1 << 15, 256
# The rows of batches that scales are fitted to, at least.
SCALED_ROWS = 1 << 11
# The weight of the overall mean in the mean of a class, in pictures.
SHRINKAGE = 1.0
# Texts of every example that the reading of labels is fitted to, and the last that its sharpness is.
DRAWS = 3
# The part of the variance of texts that counts for all directions alike, and the factors of what is read.
SHRUNK, SHARPNESS = 0.1, 0.5 ** np.arange(0, 8, 0.5)
# The ridge of the map of texts, whose sentence embeddings have length 1.
RIDGE = 0.3
# Components are multiplied by their variance to this power, so that fine differences tell as well.
WHITENING = -0.25


def start_conditions(network: Network, dataset: Dataset, *, std: float, seed: int) -> None:
    """Set the label tables and the text map of `network` from the training examples.

    The tables together have standard deviation `std`. Null classes and "no text" stay as they are, and tell a
    conditional mean the mean of all. Nothing changes without label factors, or where no example has
    all of its labels.
    """
    rng = np.random.default_rng(seed)
    counts = [len(factor.classes) for factor in dataset.factors]
    # What is not labelled whole tells nothing of its classes.
    index = labelled_examples(dataset, counts, rng)
    if not counts or not len(index):
        return
    flat, labels = read_pictures(dataset, index, rng), dataset.labels[index]
    mean = network.conditional_mean if isinstance(network, DiT) else None
    with torch.no_grad():
        codes = encode_means(class_means(flat, labels, counts), network.config.hidden_size, std)
        told = sum(rows[labels[:, factor]] for factor, rows in enumerate(codes))
        if mean is not None:
            of_mean = start_mean(mean, flat, labels, counts, std)
            # A text tells what a picture shows; how it is drawn, the label does.
            told = np.concatenate([told, sum(rows[labels[:, k]] for k, rows in enumerate(of_mean.codes))], 1)
        for factor, table in enumerate(network.y_embedder.tables):
            weight = cast(nn.Embedding, table).weight
            rows = codes[factor]
            weight[: len(rows), : rows.shape[1]] = torch.from_numpy(rows).float()
            if mean is not None:
                weight[:, rows.shape[1] :] = torch.from_numpy(of_mean.tables[factor]).float()
        if network.y_embedder.readers:
            start_readers(network.y_embedder, dataset, seed=seed)
        elif dataset.texts is not None and network.y_embedder.text is not None:
            if mean is not None:
                network.y_embedder.no_text[network.config.hidden_size :] = 0
            embeddings = np.concatenate([dataset.texts.draw(chunk, rng) for chunk in chunked(index)])
            start_text(network.y_embedder.text, embeddings[:, : dataset.texts.size], np.asarray(told))


def complete_conditions(network: Network, dataset: Dataset, *, seed: int) -> None:
    """Let the classes of a trained conditional mean tell what they look like in maps that lack them.

    See `model.train.missing_looks`. Nothing else of the network changes.

    Raises:
        ValueError: the network has no mean of several maps, no labels choose among them, or no example has
            all of its labels.
    """
    mean = network.conditional_mean if isinstance(network, DiT) else None
    counts = [len(factor.classes) for factor in dataset.factors]
    coded, gated = factors_of_mean(counts, 0 if mean is None else mean.maps)
    if not isinstance(network, DiT) or gated is None:
        raise ValueError(
            "condition_start: missing is for a model with mean_maps that a label chooses: leave it out"
        )
    rng = np.random.default_rng(seed)
    index = labelled_examples(dataset, counts, rng)
    if not len(index):
        raise ValueError("condition_start: missing needs pictures with all of their labels: leave it out")
    labels, shape = dataset.labels[index], (counts[coded], counts[gated])
    flat = read_pictures(dataset, index, rng)
    offsets, looks, shown = looks_in_maps(flat, labels[:, coded], labels[:, gated], shape)
    with torch.no_grad():
        complete_codes(network, looks, shown, offsets, (coded, gated))


def chunked(index: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Return examples in the parts that are read at a time."""
    return [index[first : first + CHUNK] for first in range(0, len(index), CHUNK)]


def read_pictures(
    dataset: Dataset, index: npt.NDArray[np.int64], rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Return the pictures of examples as rows (N, C·H·W)."""
    pictures = np.concatenate([dataset.batch(chunk, rng) for chunk in chunked(index)])
    return pictures.reshape(len(pictures), -1)


def labelled_examples(
    dataset: Dataset, counts: Sequence[int], rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return training examples that have all of their labels: all, or as many as are looked at."""
    index = dataset.training[(dataset.labels[dataset.training] < counts).all(1)]
    return np.sort(rng.choice(index, EXAMPLES, replace=False)) if len(index) > EXAMPLES else index


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


@dataclass(frozen=True, slots=True)
class MeanTables:
    """The numbers that each class of each factor tells of the mean picture.

    `codes` (classes, M) is what a text may tell too; `tables` (classes + 1, M) has gates and the null class.
    """

    codes: list[Floats]
    tables: list[Floats]


def start_mean(
    mean: ConditionalMean,
    pictures: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    counts: Sequence[int],
    std: float,
) -> MeanTables:
    """Set a conditional mean to that of pictures (N, L); return what its conditions tell.

    The factor of most classes has codes, and another, of as many classes as there are maps or fewer, chooses
    among the maps: each is the linear one from the codes to the pictures of its class. A class that a map
    lacks looks there as in the map most like it. Null classes choose all maps alike, and
    tell the offset alone. Where several factors are left, the codes tell nothing of them.
    """
    maps, rows, length = mean.basis.shape
    coded, gated = factors_of_mean(counts, maps)
    gate = np.zeros(len(pictures), np.int64) if gated is None else labels[:, gated]
    used = 1 if gated is None else counts[gated]
    offsets, looks, shown = looks_in_maps(pictures, labels[:, coded], gate, (counts[coded], used))
    looks = fill_looks(looks, shown)
    left, values, right = np.linalg.svd(looks.reshape(counts[coded], -1), full_matrices=False)
    kept = min(rows - 1, len(values))
    scale = np.maximum(values[:kept], 1e-9 * values[0]) ** (1 + 2 * WHITENING)
    found = left[:, :kept] * scale
    factor = std / found.std()
    mean.basis.zero_()
    basis = (right[:kept] * (values[:kept] / scale / factor)[:, None]).reshape(kept, used, length)
    mean.basis[:used, 0] = torch.from_numpy(offsets).float()
    mean.basis[:used, 1 : 1 + kept] = torch.from_numpy(basis).float().transpose(0, 1)
    tables = [np.zeros((count + 1, maps + rows - 1)) for count in counts]
    tables[coded][:-1, maps : maps + kept] = factor * found
    codes = [table[:-1].copy() for table in tables]
    if gated is None:
        tables[coded][:, 0] = 1
    else:
        tables[gated][:, :used] = np.vstack([np.eye(used), np.full((1, used), 1 / used)])
    return MeanTables(codes, tables)


def factors_of_mean(counts: Sequence[int], maps: int) -> tuple[int, int | None]:
    """Return the factor of the codes, which has most classes, and the one that chooses among maps, if any."""
    coded = max(range(len(counts)), key=lambda factor: counts[factor], default=0)
    fitting = [k for k in range(len(counts)) if k != coded and counts[k] <= maps and maps > 1]
    return coded, max(fitting, key=lambda factor: counts[factor], default=None)


def looks_in_maps(
    pictures: npt.NDArray[np.float32],
    classes: npt.NDArray[np.int64],
    maps: npt.NDArray[np.int64],
    counts: tuple[int, int],
) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """Return the means (maps, L) of the pictures (N, L) of maps, those of each class in each map, and where.

    The second, (classes, maps, L), are less the first; where a class has no picture in a map, they are zero,
    and the last (classes, maps) is False.
    """
    offsets = pictures.mean(0, dtype=np.float64) + class_means(pictures, maps[:, None], counts[1:])[0]
    cells, shape = classes * counts[1] + maps, (counts[0] * counts[1], pictures.shape[1])
    looks, shown = np.zeros(shape), np.bincount(cells, minlength=shape[0])[:, None]
    np.add.at(looks, cells, pictures - offsets[maps])
    looks /= np.maximum(shown, 1)
    return offsets, looks.reshape(*counts, -1), (shown > 0).reshape(counts)


def start_scales(
    network: DiT, mean: ConditionalMean, noise: TrainingNoise, batches: Iterable[TrainingBatch]
) -> None:
    """Set the scales of a conditional mean to what batches with levels of all kinds tell.

    At each timestep those of the mean and of x are the best linear prediction of what the run trains towards,
    and that of the blocks is the standard deviation of its error, so that the blocks train towards numbers of
    size 1 at every level.
    """
    count = SCALE_ROWS
    gram, told = torch.zeros(count, 2, count, 2).double(), torch.zeros(count, 2).double()
    moments, first = [], network.config.hidden_size
    with torch.no_grad():
        for batch in batches:
            row = noise.at(batch.t)
            x = row.noisy(batch.x0, batch.noise)
            embedding = network.embed(batch.labels, batch.text)
            told_mean = mean.mean(embedding[:, first : first + network.config.mean_size])
            pictures = [told_mean, x, row.target(batch.x0, batch.noise)]
            columns = torch.stack(pictures, 1).flatten(2).double()  # (N, 3, C·H·W)
            moments.append((scale_shares(row.told.double()), columns @ columns.mT / columns.shape[2]))
    for share, products in moments:
        gram += torch.einsum("ni,nj,npq->ipjq", share, share, products[:, :2, :2])
        told += torch.einsum("ni,np->ip", share, products[:, :2, 2])
    square = gram.reshape(2 * count, 2 * count)
    ridge = 1e-6 * square.diagonal().mean() * torch.eye(2 * count).double()
    best = torch.linalg.solve(square + ridge, told.flatten()).reshape(count, 2)
    left, rows = torch.zeros(count).double(), torch.zeros(count).double()
    for share, products in moments:
        signed = F.pad(share @ best, (0, 1), value=-1.0)  # (N, 3)
        left += share.T @ torch.einsum("np,nq,npq->n", signed, signed, products)
        rows += share.sum(0)
    spread = (left / rows.clamp(min=1e-9)).clamp(min=1e-8).sqrt()
    mean.scales.data = torch.cat([best, spread[:, None]], 1).float()


def start_readers(embedder: ConditionEmbedder, dataset: Dataset, *, seed: int) -> None:
    """Set what a text tells of labels to what the wordings of the training examples tell of theirs.

    It is a linear discriminant (Fisher, 1936) of sentence embeddings, as sharp as suits wordings that it is
    not fitted to. The null class is like the mean text. The map of texts, of what the classes do not tell,
    starts at zero.
    """
    rng, counts = np.random.default_rng(seed), [len(factor.classes) for factor in dataset.factors]
    index = labelled_examples(dataset, counts, rng)
    if dataset.texts is None or embedder.text is None or not len(index):
        return
    chunks = chunked(index) * DRAWS
    texts = np.concatenate([dataset.texts.draw(chunk, rng)[:, : dataset.texts.size] for chunk in chunks])
    labels = dataset.labels[np.concatenate(chunks)]
    with torch.no_grad():
        for layer in (embedder.text, *embedder.readers):
            for parameter in layer.parameters():
                parameter.zero_()
        embedder.no_text.zero_()
        for factor, count in enumerate(counts):
            weight, bias = discriminant(texts.astype(np.float64), labels[:, factor], count, len(index))
            reader = cast(nn.Linear, embedder.readers[factor])
            reader.weight[:count] = torch.from_numpy(weight).float()
            reader.bias[:count] = torch.from_numpy(bias).float()


def discriminant(
    texts: Floats, classes: npt.NDArray[np.int64], count: int, tried: int
) -> tuple[Floats, Floats]:
    """Return weights (count, size) and biases of the logits of classes, where that of none is 0.

    The last `tried` of the texts (N, size) say how sharp they are to be, and the others all else; where there
    are no others, all.
    """
    fitted, known = (texts[:-tried], classes[:-tried]) if len(texts) > tried else (texts, classes)
    centre = fitted.mean(0)
    shown = np.bincount(known, minlength=count)[:, None]
    means = np.zeros((count, texts.shape[1]))
    np.add.at(means, known, fitted - centre)
    means /= np.maximum(shown, 1)
    spread = fitted - centre - means[known]
    covariance = spread.T @ spread / len(spread)
    # Wordings that are all alike have no spread.
    least = SHRUNK * spread.var(0).mean() + 1e-6 * (fitted.var(0).mean() + 1e-12)
    covariance += least * np.eye(len(covariance))
    weight = np.linalg.solve(covariance, means.T).T
    bias = -0.5 * (weight * means).sum(1) - weight @ centre
    logits = torch.from_numpy(np.column_stack([texts[-tried:] @ weight.T + bias, np.zeros(tried)])).float()
    right = torch.from_numpy(classes[-tried:])
    loss = [float(F.cross_entropy(sharpness * logits, right)) for sharpness in SHARPNESS.tolist()]
    best = SHARPNESS[int(np.argmin(loss))]
    return best * weight, best * bias


def start_text(text: nn.Linear, embeddings: npt.NDArray[np.float32], codes: Floats) -> None:
    """Set the map of sentence embeddings (N, size) to the best linear one to codes (N, D)."""
    given = np.column_stack([embeddings, np.ones(len(embeddings))]).astype(np.float64)
    weights = np.linalg.solve(given.T @ given + RIDGE * np.eye(given.shape[1]), given.T @ codes)
    text.weight.copy_(torch.from_numpy(weights[:-1].T))
    text.bias.copy_(torch.from_numpy(weights[-1]))
