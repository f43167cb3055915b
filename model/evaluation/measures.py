"""Measures of generated pictures beside real ones: distances, label accuracy and memorisation.

Files are read and pictures are sampled elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ditserve.model.evaluation.classifier_network import Classifier, classify, top_k_accuracy
from ditserve.model.evaluation.features import FeatureNetwork
from ditserve.model.evaluation.fidelity import (
    NearestNeighbours,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest,
    precision_recall,
)
from ditserve.model.evaluation.picture_sets import GENERATED, REAL_UNSEEN, TRAINING, UNSEEN, PictureSet
from ditserve.model.spec.bundle import Factor

# From so many pictures on, the Inception Score is the average of ten splits, as is customary.
SPLITS_FROM = 5000
# A picture is a copy if its nearest training picture is closer than this share of the distance to the second.
COPY_RATIO = 1 / 3
# With fewer pictures per feature than this, a note points out the bias of Fréchet distances.
PICTURES_PER_FEATURE = 10

REAL = "real"
TITLES = {
    "frechet_distance": "Fréchet distance ↓",
    "detail_frechet_distance": "Fréchet distance of details ↓",
    "kernel_distance": "kernel distance ↓",
    "kernel_distance_std": "… its deviation over subsets",
    "inception_score": "Inception Score ↑",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "nearest_pixel_p5": "pixel distance to the nearest training picture, 5 % are below",
    "nearest_pixel_p50": "… median",
    "nearest_pixel_p95": "… 95 % are below",
    "nearest_pixel_own": "nearest training picture shows the labels asked for",
    "nearest_pixel_copied": "nearer than ⅓ of the distance to the second nearest",
    "nearest_feature_p5": "feature distance to the nearest training picture, 5 % are below",
    "nearest_feature_p50": "… median",
    "nearest_feature_p95": "… 95 % are below",
    "nearest_feature_own": "nearest training picture shows the labels asked for",
    "nearest_feature_copied": "nearer than ⅓ of the distance to the second nearest",
}

# The figures that depend on the feature network.
FEATURE_FIGURES = tuple(key for key in TITLES if "pixel" not in key)

Figures = dict[str, float]


def distances(generated: PictureSet, reference: PictureSet, seed: int) -> Figures:
    """Return the Fréchet and kernel distances to a reference, precision, recall, and the Inception Score."""
    ours, theirs = generated.features, reference.features
    kernel = kernel_distance(theirs.pooled, ours.pooled, seed=seed)
    score = inception_score(ours.probabilities, 10 if len(generated) >= SPLITS_FROM else 1)
    precision, recall = precision_recall(theirs.pooled, ours.pooled)
    figures = {
        "frechet_distance": frechet_distance(theirs.pooled, ours.pooled),
        "kernel_distance": kernel.mean,
        "kernel_distance_std": kernel.std,
        "inception_score": score.mean,
        "precision": precision,
        "recall": recall,
    }
    if theirs.detail is not None and ours.detail is not None:
        figures["detail_frechet_distance"] = frechet_distance(theirs.detail, ours.detail)
    return figures


def split_in_two(real: PictureSet, count: int, seed: int) -> tuple[PictureSet, PictureSet]:
    """Split real pictures at random into `count` (at most half of them) and the others."""
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
    count = min(count, len(real) // 2)
    return real.part(order[:count]), real.part(order[count:])


def label_accuracy(classifier: Classifier, factors: Sequence[Factor], pictures: PictureSet) -> Figures:
    """Return how often the classifier sees the label asked for.

    Each factor has a figure `<factor>_top1`, and with more than ten classes also `<factor>_top5`. Classes are
    matched by name. Factors and classes that the classifier does not know are left out.
    """
    output = classify(classifier, pictures.images)
    figures = {}
    for factor, logits in zip(classifier.card.factors, output.logits, strict=True):
        column = next((k for k, known in enumerate(factors) if known.name == factor.name), None)
        if column is None:
            continue
        class_of = {name: k for k, name in enumerate(factor.classes)}
        # The model's classes as the classifier numbers them, −1 where it does not know one.
        renumbered = torch.tensor([class_of.get(name, -1) for name in factors[column].classes])
        labels = renumbered[pictures.labels[:, column]]  # (N,)
        known_rows = labels >= 0
        if known_rows.any():
            for k in (1, 5) if len(factor.classes) > 10 else (1,):
                figures[f"{factor.name}_top{k}"] = top_k_accuracy(logits[known_rows], labels[known_rows], k)
    return figures


@dataclass(frozen=True, slots=True)
class NearestTraining:
    """The two nearest training pictures of each of N pictures, (N, 2).

    `pixels`: by the root mean square of pixel differences, in 0 … 1. `features`: by the distance of features.
    """

    pixels: NearestNeighbours
    features: NearestNeighbours


def nearest_training(pictures: PictureSet, training: PictureSet) -> NearestTraining:
    """Find the two nearest training pictures of each picture.

    Raises:
        ValueError: fewer than two training pictures.
    """
    # From a Euclidean distance over values in −1 … 1 to a root mean square in 0 … 1.
    scale = 2 * math.sqrt(training.images[0].numel())
    pixels = nearest(pictures.images.flatten(1), training.images.flatten(1), 2)
    return NearestTraining(
        NearestNeighbours(pixels.distances / scale, pixels.indices),
        nearest(pictures.features.pooled, training.features.pooled, 2),
    )


def memorisation(neighbours: NearestTraining, pictures: PictureSet, training: PictureSet) -> Figures:
    """Return figures of how closely pictures repeat the training set.

    They are the distance to the nearest training picture, how often that shows the labels asked for, and the
    share of copies. A picture is a copy if its nearest training picture is closer than a third of the
    distance to the second nearest: at distances of 0.1 and 0.4 it is, at 0.2 and 0.4 it is not. Source: Gu et
    al., arXiv:2310.02664, after Yoon et al., "Diffusion Probabilistic Models Generalize when They Fail to
    Memorize", ICML 2023 workshop SPIGM.
    """
    figures = {}
    for space, near in (("pixel", neighbours.pixels), ("feature", neighbours.features)):
        first, second = near.distances[:, 0], near.distances[:, 1]
        for share in (0.05, 0.5, 0.95):
            figures[f"nearest_{space}_p{share * 100:.0f}"] = float(first.quantile(share))
        same_labels = (training.labels[near.indices[:, 0]] == pictures.labels).all(1)
        figures[f"nearest_{space}_own"] = float(same_labels.double().mean())
        figures[f"nearest_{space}_copied"] = float((first < COPY_RATIO * second).double().mean())
    return figures


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """The figures of each column, and the nearest training pictures of each set but TRAINING."""

    figures: dict[str, Figures]
    nearest: dict[str, NearestTraining]


def measure(
    sets: Mapping[str, PictureSet], classifier: Classifier | None, factors: Sequence[Factor], seed: int
) -> EvaluationResult:
    """Return the figures of all sets, a column each.

    `sets` has TRAINING and GENERATED, and UNSEEN and REAL_UNSEEN if labels were held out. The column
    REAL shows the distances that chance alone makes: as many training pictures as were generated,
    against the other ones.

    Raises:
        ValueError: too few pictures.
        ClassifierError: pictures of a size the classifier does not read.
    """
    training, generated = sets[TRAINING], sets[GENERATED]
    some, others = split_in_two(training, len(generated), seed)
    figures = {
        GENERATED: distances(generated, training, seed),
        UNSEEN: {},
        REAL: distances(some, others, seed) | memorisation(nearest_training(some, others), some, others),
        REAL_UNSEEN: {},
    }
    compared = [name for name in (GENERATED, UNSEEN, REAL_UNSEEN) if name in sets]
    neighbours = {name: nearest_training(sets[name], training) for name in compared}
    for name in compared:
        figures[name] |= memorisation(neighbours[name], sets[name], training)
    if classifier is not None:
        pictures = {**sets, REAL: some}
        for name in set(figures) & set(pictures):
            figures[name] |= label_accuracy(classifier, factors, pictures[name])
    return EvaluationResult({name: column for name, column in figures.items() if column}, neighbours)


def notes(sets: Mapping[str, PictureSet], network: FeatureNetwork) -> list[str]:
    """Return sentences that a reader of the figures must know."""
    count, width = len(sets[GENERATED]), sets[GENERATED].features.pooled.shape[1]
    sentences = [network.note]
    if count < PICTURES_PER_FEATURE * width:
        sentences.append(
            f"{count} pictures are few for {width} features: Fréchet distances come out too large, "
            "and every figure moves with the count. "
            f"Compare with the column {REAL!r}, made of as many pictures, "
            "and with other models at this count alone."
        )
    return sentences


def markdown_table(columns: Mapping[str, Figures]) -> str:
    """Return a table with a line per figure that any column has, and a dash where a column lacks it."""
    keys = [key for key in TITLES if any(key in figures for figures in columns.values())]
    keys += sorted({key for figures in columns.values() for key in figures} - set(TITLES))
    lines = ["| | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for key in keys:
        cells = [f"{figures[key]:.4g}" if key in figures else "–" for figures in columns.values()]
        lines.append(f"| {TITLES.get(key, key.replace('_top', ' top-'))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
