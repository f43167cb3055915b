"""What generated pictures are worth beside real ones: figures, and the pictures nearest to them. Files and sampling are elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ditserve.model.evaluation.classifier import Classifier, read, top
from ditserve.model.evaluation.features import FeatureNetwork
from ditserve.model.evaluation.fidelity import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from ditserve.model.evaluation.neighbours import Nearest, nearest
from ditserve.model.evaluation.picture_sets import GENERATED, REAL_UNSEEN, TRAINING, UNSEEN, Set
from ditserve.model.spec.bundle import Factor

SPLITS_FROM = 5000  # pictures from which an Inception Score is the customary average of ten
COPIED = (
    1 / 3
)  # of the distance to the second nearest: closer than that to the nearest, a picture counts as copied

ENOUGH = 10  # pictures a feature, below which the bias of a Fréchet distance is pointed out

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

OF_FEATURES = tuple(
    key for key in TITLES if "pixel" not in key
)  # of figures, those that depend on the feature network

Figures = dict[str, float]


def distances(shown: Set, reference: Set, seed: int) -> Figures:
    """How far a set is from a reference: Fréchet distances, kernel distance, precision and recall; and its Inception Score."""
    kernel = kernel_distance(reference.features.pooled, shown.features.pooled, seed=seed)
    score = inception_score(shown.features.probabilities, 10 if len(shown) >= SPLITS_FROM else 1)
    precision, recall = precision_recall(reference.features.pooled, shown.features.pooled)
    figures = {
        "frechet_distance": frechet_distance(reference.features.pooled, shown.features.pooled),
        "kernel_distance": kernel.mean,
        "kernel_distance_std": kernel.std,
        "inception_score": score.mean,
        "precision": precision,
        "recall": recall,
    }
    if reference.features.detail is not None and shown.features.detail is not None:
        figures["detail_frechet_distance"] = frechet_distance(
            reference.features.detail, shown.features.detail
        )
    return figures


def halves(real: Set, count: int, seed: int) -> tuple[Set, Set]:
    """Real pictures in two: `count` at random, or half where there are fewer than twice as many, and the others."""
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
    count = min(count, len(real) // 2)
    return real.part(order[:count]), real.part(order[count:])


def accuracies(classifier: Classifier, factors: Sequence[Factor], shown: Set) -> Figures:
    """How often the classifier sees what was asked for, per factor: `<factor>_top1`, and `_top5` of more than ten classes.

    Classes go by name; factors and classes the classifier does not know are left out.
    """
    reading = read(classifier, shown.images)
    found = {}
    for factor, logits in zip(classifier.card.factors, reading.logits, strict=True):
        column = next((k for k, each in enumerate(factors) if each.name == factor.name), None)
        if column is None:
            continue
        place = {name: k for k, name in enumerate(factor.classes)}
        known = torch.tensor([place.get(name, -1) for name in factors[column].classes])[
            shown.labels[:, column]
        ]
        kept = known >= 0
        if kept.any():
            for k in (1, 5) if len(factor.classes) > 10 else (1,):
                found[f"{factor.name}_top{k}"] = top(logits[kept], known[kept], k)
    return found


@dataclass(frozen=True, slots=True)
class Closeness:
    """Of each of N pictures its two nearest training pictures: by pixels (root mean square, in 0 … 1), and by features."""

    pixels: Nearest
    features: Nearest


def closeness(shown: Set, training: Set) -> Closeness:
    """The nearest training pictures of each.

    Raises:
        ValueError: fewer than two training pictures.
    """
    scale = 2 * math.sqrt(training.images[0].numel())  # of the range −1 … 1, over all numbers of a picture
    pixels = nearest(shown.images.flatten(1), training.images.flatten(1), 2)
    return Closeness(
        Nearest(pixels.distances / scale, pixels.indices),
        nearest(shown.features.pooled, training.features.pooled, 2),
    )


def memorisation(found: Closeness, shown: Set, training: Set) -> Figures:
    """How near the nearest training pictures are, how often they show the labels asked for, and how many are copies.

    A copy is nearer than a third of the distance to the second nearest: Gu et al., arXiv:2310.02664, after Yoon et al., "Diffusion
    when They Fail to Memorize", ICML 2023 workshop SPIGM.
    """
    figures = {}
    for space, near in (("pixel", found.pixels), ("feature", found.features)):
        first, second = near.distances[:, 0], near.distances[:, 1]
        for share in (0.05, 0.5, 0.95):
            figures[f"nearest_{space}_p{share * 100:.0f}"] = float(first.quantile(share))
        own = (training.labels[near.indices[:, 0]] == shown.labels).all(1)
        figures[f"nearest_{space}_own"] = float(own.double().mean())
        figures[f"nearest_{space}_copied"] = float((first < COPIED * second).double().mean())
    return figures


@dataclass(frozen=True, slots=True)
class Found:
    """Figures of each column, and how near the pictures of the generated ones are to training pictures."""

    figures: dict[str, Figures]
    near: dict[str, Closeness]


def measure(
    sets: Mapping[str, Set], classifier: Classifier | None, factors: Sequence[Factor], seed: int
) -> Found:
    """All figures of the sets that there are: TRAINING and GENERATED always, UNSEEN and REAL_UNSEEN where labels were held out.

    REAL is what distances are where nothing but chance differs: as many training pictures as were generated, against the others.

    Raises:
        ValueError: too few pictures.
        ClassifierError: pictures of a size the classifier does not read.
    """
    training, generated = sets[TRAINING], sets[GENERATED]
    some, others = halves(training, len(generated), seed)
    figures = {
        GENERATED: distances(generated, training, seed),
        UNSEEN: {},
        REAL: distances(some, others, seed) | memorisation(closeness(some, others), some, others),
        REAL_UNSEEN: {},
    }
    near = {
        name: closeness(sets[name], training) for name in (GENERATED, UNSEEN, REAL_UNSEEN) if name in sets
    }
    for name, found in near.items():
        figures[name] |= memorisation(found, sets[name], training)
    if classifier is not None:
        shown = {**sets, REAL: some}
        for name in set(figures) & set(shown):
            figures[name] |= accuracies(classifier, factors, shown[name])
    return Found({name: each for name, each in figures.items() if each}, near)


def notes(sets: Mapping[str, Set], network: FeatureNetwork) -> list[str]:
    """What must be known to read the figures."""
    count, width = len(sets[GENERATED]), sets[GENERATED].features.pooled.shape[1]
    found = [network.note]
    if count < ENOUGH * width:
        found.append(
            f"{count} pictures are few for {width} features: Fréchet distances come out too large, and every figure moves with the "
            f"count. Compare with the column {REAL!r}, made of as many pictures, and with other models at this count alone."
        )
    return found


def markdown(columns: Mapping[str, Figures]) -> str:
    """A table with a line per figure that any column has, a dash where one lacks it."""
    keys = [key for key in TITLES if any(key in figures for figures in columns.values())]
    keys += sorted({key for figures in columns.values() for key in figures} - set(TITLES))
    lines = ["| | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for key in keys:
        cells = [f"{figures[key]:.4g}" if key in figures else "–" for figures in columns.values()]
        lines.append(f"| {TITLES.get(key, key.replace('_top', ' top-'))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
