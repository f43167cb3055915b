"""Measures of generated pictures beside real ones: distances, label accuracy and memorisation.

Files are read and pictures are sampled elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ditserve.model.data.texture import grain, sharpness
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
from ditserve.model.spec.manifest import Factor

# From so many pictures on, the Inception Score is the average of ten splits, as is customary.
SPLITS_FROM = 5000
# A picture is a copy if its nearest training picture is closer than this share of the distance to the second.
COPY_RATIO = 1 / 3
# With fewer pictures, nearly every picture lies within the radius of some other one.
PICTURES_WITH_NEIGHBOURS = 30
# Splits in two halves that deviations are averaged over.
HALVINGS = 5
# With fewer pictures per feature than this, a note points out the bias of Fréchet distances.
PICTURES_PER_FEATURE = 10

REAL = "real"
TITLES = {
    "frechet_distance": "Fréchet distance ↓",
    "detail_frechet_distance": "Fréchet distance of details ↓",
    "kernel_distance": "kernel distance ↓",
    "kernel_distance_std": "… its deviation over subsets",
    "inception_score": "Inception Score ↑",
    "grain": "grain in flat areas, of 255 ↓",
    "sharpness": "energy of fine detail, as a share of the real ones'",
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
    "pixel_change": "change from frame to frame, as much as the real clips'",
    "pixel_jerk": "… its own change, which flicker makes large",
    "pixel_motion_error": "error of the change against the real clip of the labels ↓",
    "pixel_still_error": "… of a clip that stands still",
    "pixel_error": "error of the frames against the real clip ↓",
}

# The figures that depend on the feature network.
FEATURE_FIGURES = tuple(key for key in TITLES if "pixel" not in key and key not in ("grain", "sharpness"))

Figures = dict[str, float]


def distances(generated: PictureSet, reference: PictureSet, seed: int) -> Figures:
    """Return the Fréchet and kernel distances to a reference, precision, recall, Inception Score and texture.

    A figure that so few pictures cannot tell is left out; see `shortfalls`.
    """
    ours, theirs = generated.features, reference.features
    fewest = min(len(generated), len(reference))
    score = inception_score(ours.probabilities, 10 if len(generated) >= SPLITS_FROM else 1)
    figures = {
        "inception_score": score.mean,
        "grain": grain(generated.images),
        "sharpness": sharpness(generated.images, reference.images),
    }
    if fewest > ours.pooled.shape[1]:
        figures["frechet_distance"] = frechet_distance(theirs.pooled, ours.pooled)
    if theirs.detail is not None and ours.detail is not None and fewest > ours.detail.shape[1]:
        figures["detail_frechet_distance"] = frechet_distance(theirs.detail, ours.detail)
    if fewest > 1:
        kernel = kernel_distance(theirs.pooled, ours.pooled, seed=seed)
        figures |= {"kernel_distance": kernel.mean, "kernel_distance_std": kernel.std}
    if fewest >= PICTURES_WITH_NEIGHBOURS:
        figures["precision"], figures["recall"] = precision_recall(theirs.pooled, ours.pooled)
    return figures


def shortfalls(counts: Mapping[str, int], width: int) -> list[str]:
    """Return a sentence for each figure that cannot be told of `counts` pictures of each set.

    A Gaussian of `width` features needs more pictures than that. With 200 generated pictures and 128 features
    there is a Fréchet distance, with 2048 features there is none.

    Raises:
        ValueError: there are fewer than two training pictures, of which nothing can be told.
    """
    if counts[TRAINING] < 2:
        raise ValueError("the data holds one training picture, and figures need at least two: add pictures")
    needs = {"Fréchet distance": width + 1, "precision and recall": PICTURES_WITH_NEIGHBOURS}
    remedies = {GENERATED: "raise --limit", TRAINING: "add pictures, or raise --reference"}
    sentences = []
    for figure, needed in needs.items():
        few = [
            f"{counts[name]} {name} ones ({remedy})"
            for name, remedy in remedies.items()
            if counts[name] < needed
        ]
        if few:
            sentences.append(f"no {figure}, which needs {needed} pictures of each kind: {' and '.join(few)}")
    return sentences


def deviations(
    generated: PictureSet, figures: Figures, measured: Callable[[PictureSet], Figures], seed: int
) -> Figures:
    """Return the standard deviations that `figures` have from one set of seeds to another.

    The set is split in two halves, a few times. A mean over half as many pictures varies by √2 more, and the
    difference of two such means by 2: half the difference, as a root mean square, is the deviation of the
    whole. 0.60 and 0.70 for the halves are a deviation of 0.05. Figures that the halves are too few for have
    none.
    """
    squares: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(HALVINGS):
        order = torch.randperm(len(generated), generator=generator)
        one, other = (measured(generated.part(half)) for half in order.tensor_split(2))
        for key in figures.keys() & one.keys() & other.keys():
            squares.setdefault(key, []).append(((one[key] - other[key]) / 2) ** 2)
    return {key: math.sqrt(sum(values) / len(values)) for key, values in squares.items()}


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
    """The figures of each column, their deviations, and the nearest training pictures of all but TRAINING."""

    figures: dict[str, Figures]
    deviations: dict[str, Figures]
    nearest: dict[str, NearestTraining]


def measure(
    sets: Mapping[str, PictureSet], classifier: Classifier | None, factors: Sequence[Factor], seed: int
) -> EvaluationResult:
    """Return the figures of all sets, a column each, and the deviations of the column GENERATED.

    `sets` has TRAINING and GENERATED, and UNSEEN and REAL_UNSEEN if labels were held out. The column
    REAL shows the distances that chance alone makes: as many training pictures as were generated,
    against the other ones.

    Raises:
        ValueError: fewer than two training pictures.
        ClassifierError: pictures of a size the classifier does not read.
    """
    training, generated = sets[TRAINING], sets[GENERATED]

    def accuracy(pictures: PictureSet) -> Figures:
        return {} if classifier is None else label_accuracy(classifier, factors, pictures)

    def compared(pictures: PictureSet) -> Figures:
        return distances(pictures, training, seed) | accuracy(pictures)

    some, others = split_in_two(training, len(generated), seed)
    figures = {
        GENERATED: compared(generated),
        UNSEEN: {},
        REAL: distances(some, others, seed) | accuracy(some),
    }
    spread = deviations(generated, figures[GENERATED], compared, seed) if len(generated) > 1 else {}
    if len(others) > 1:
        figures[REAL] |= memorisation(nearest_training(some, others), some, others)
    neighbours = {}
    for name in (GENERATED, UNSEEN, REAL_UNSEEN):
        if name in sets:
            neighbours[name] = nearest_training(sets[name], training)
            column = figures.setdefault(name, {})
            column |= memorisation(neighbours[name], sets[name], training)
            column |= {} if name == GENERATED else accuracy(sets[name])
    shown = {name: column for name, column in figures.items() if column}
    return EvaluationResult(shown, {GENERATED: spread} if spread else {}, neighbours)


def notes(sets: Mapping[str, PictureSet], network: FeatureNetwork) -> list[str]:
    """Return sentences that a reader of the figures must know."""
    count, width = len(sets[GENERATED]), sets[GENERATED].features.pooled.shape[1]
    sentences = [network.note]
    if width < count < PICTURES_PER_FEATURE * width:
        sentences.append(
            f"{count} pictures are few for {width} features: Fréchet distances come out too large, "
            "and every figure moves with the count. "
            f"Compare with the column {REAL!r}, made of as many pictures, "
            "and with other models at this count alone."
        )
    return sentences


def markdown_table(columns: Mapping[str, Figures], spread: Mapping[str, Figures]) -> str:
    """Return a table with a line per figure that any column has, and a dash where a column lacks it.

    `spread` has the deviations of figures, by column, which stand behind them.
    """
    keys = [key for key in TITLES if any(key in figures for figures in columns.values())]
    keys += sorted({key for figures in columns.values() for key in figures} - set(TITLES))
    lines = ["| | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for key in keys:
        cells = [_cell(figures.get(key), spread.get(name, {}).get(key)) for name, figures in columns.items()]
        lines.append(f"| {TITLES.get(key, key.replace('_top', ' top-'))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(figure: float | None, deviation: float | None) -> str:
    if figure is None:
        return "–"
    return f"{figure:.4g}" if deviation is None else f"{figure:.4g} ± {deviation:.2g}"
