"""Figures of sets of known quality: copies, unrelated pictures, and wrong labels."""

from __future__ import annotations

import pytest
import torch

from ditserve.model.evaluation.classifier_network import Classifier, ClassifierCard
from ditserve.model.evaluation.features import FeatureNetwork, Features
from ditserve.model.evaluation.measures import (
    REAL,
    deviations,
    distances,
    label_accuracy,
    markdown_table,
    measure,
    memorisation,
    nearest_training,
    notes,
    shortfalls,
    split_in_two,
)
from ditserve.model.evaluation.picture_sets import GENERATED, REAL_UNSEEN, TRAINING, UNSEEN, PictureSet
from ditserve.model.spec.manifest import Factor

LABELS = Factor(name="label", classes=tuple(f"name{k}" for k in range(12)))


def pictures(count: int = 40, seed: int = 0, *, detail: bool = True) -> PictureSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1
    flat = images.flatten(1)
    probabilities = torch.rand(count, 12, generator=generator).softmax(1)
    labels = torch.arange(count)[:, None] % 12
    return PictureSet(images, labels, Features(flat[:, :6], flat[:, 6:16] if detail else None, probabilities))


def reader(*labels: str) -> Classifier:
    """Return a classifier that ranks `labels` in the order given, whatever the picture shows."""
    card = ClassifierCard(image_size=(4, 4), widths=(3, 4), factors=(Factor(name="label", classes=labels),))
    network = Classifier(card).eval()
    with torch.no_grad():
        network.heads[0].get_parameter("weight").zero_()
        network.heads[0].get_parameter("bias").copy_(torch.arange(len(labels), 0, -1))
    return network


def test_copies_are_counted_as_copies() -> None:
    training = pictures()
    copied = training.part(torch.arange(10))
    figures = memorisation(nearest_training(copied, training), copied, training)
    for space in ("pixel", "feature"):
        assert figures[f"nearest_{space}_copied"] == figures[f"nearest_{space}_own"] == 1
        assert figures[f"nearest_{space}_p95"] == pytest.approx(0, abs=1e-6)


def test_unrelated_pictures_are_not_copies_and_distances_are_root_mean_squares() -> None:
    training, others = pictures(), pictures(20, seed=1)
    figures = memorisation(nearest_training(others, training), others, training)
    assert figures["nearest_pixel_copied"] == figures["nearest_feature_copied"] == 0
    assert figures["nearest_pixel_own"] < 0.5
    assert figures["nearest_pixel_p5"] < figures["nearest_pixel_p50"] < figures["nearest_pixel_p95"]
    black = PictureSet(
        torch.full((2, 3, 4, 4), -1.0), torch.zeros(2, 1), training.part(torch.arange(2)).features
    )
    white = PictureSet(
        torch.full((2, 3, 4, 4), 1.0), torch.zeros(2, 1), training.part(torch.arange(2)).features
    )
    assert nearest_training(black, white).pixels.distances.tolist() == [[1, 1], [1, 1]]


def test_distances_see_a_copy_of_the_set_and_a_brighter_one() -> None:
    training = pictures()
    same, brighter = distances(training, training, 0), distances(moved(training, 0.5), training, 0)
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-8)
    assert same["detail_frechet_distance"] == pytest.approx(0, abs=1e-8)
    assert (same["precision"], same["recall"]) == (1, 1)
    assert brighter["frechet_distance"] == pytest.approx(6 * 0.5**2, rel=1e-5)
    assert brighter["detail_frechet_distance"] == pytest.approx(10 * 0.5**2, rel=1e-5)
    assert brighter["kernel_distance"] > same["kernel_distance"]


def moved(shown: PictureSet, by: float) -> PictureSet:
    detail = shown.features.detail
    assert detail is not None
    features = Features(shown.features.pooled + by, detail + by, shown.features.probabilities)
    return PictureSet(shown.images, shown.labels, features)


def test_without_features_of_detail_their_distance_is_left_out() -> None:
    assert "detail_frechet_distance" not in distances(pictures(detail=False), pictures(), 0)


def test_accuracy_matches_classes_by_name() -> None:
    shown = pictures(24)
    factors = (LABELS,)
    # "name0" is always the likeliest. Two of the twelve labels are unknown: they do not count.
    ten = label_accuracy(reader(*(f"name{k}" for k in range(10))), factors, shown)
    assert ten == {"label_top1": pytest.approx(0.1)}
    twelve = label_accuracy(reader(*(f"name{k}" for k in (3, 1, 2, 0, *range(4, 12)))), factors, shown)
    assert twelve == {"label_top1": pytest.approx(1 / 12), "label_top5": pytest.approx(5 / 12)}
    assert label_accuracy(reader("dog", "cat"), factors, shown) == {}
    assert label_accuracy(reader("name0"), (Factor(name="style", classes=("name0",)),), shown) == {}


def test_a_split_is_disjoint_and_of_the_size_asked_for() -> None:
    training = pictures()
    some, others = split_in_two(training, 15, seed=1)
    assert (len(some), len(others)) == (15, 25)
    rows = torch.cat([some.images, others.images]).flatten(1)
    assert len(rows.unique(dim=0)) == 40
    assert len(split_in_two(training, 1000, seed=1)[0]) == 20


def test_all_columns_are_measured_and_the_missing_left_out() -> None:
    sets = {
        TRAINING: pictures(),
        GENERATED: pictures(12, 1),
        UNSEEN: pictures(5, 2),
        REAL_UNSEEN: pictures(5, 3),
    }
    measurement = measure(sets, None, (LABELS,), seed=0)
    assert set(measurement.figures) == {GENERATED, UNSEEN, REAL, REAL_UNSEEN}
    assert "frechet_distance" in measurement.figures[REAL]
    assert "frechet_distance" not in measurement.figures[UNSEEN]
    assert set(measurement.nearest) == {GENERATED, UNSEEN, REAL_UNSEEN}
    fewer = measure({name: sets[name] for name in (TRAINING, GENERATED)}, None, (LABELS,), seed=0)
    assert set(fewer.figures) == {GENERATED, REAL}
    assert fewer.figures[GENERATED] == measurement.figures[GENERATED]


def test_too_few_pictures_for_a_figure_are_told_and_the_figure_left_out() -> None:
    counts = {GENERATED: 6, TRAINING: 40}
    frechet, neighbours = shortfalls(counts, width=6)
    assert (
        frechet
        == "no Fréchet distance, which needs 7 pictures of each kind: 6 generated ones (raise --limit)"
    )
    assert "no precision and recall, which needs 30 pictures of each kind: 6 generated" in neighbours
    assert shortfalls({GENERATED: 40, TRAINING: 40}, width=6) == []
    assert "40 training ones (add pictures" in shortfalls({GENERATED: 50, TRAINING: 40}, width=40)[0]
    figures = distances(pictures(6, 1), pictures(), 0)
    assert not {"frechet_distance", "precision", "recall"} & set(figures)
    assert "kernel_distance" in figures
    with pytest.raises(ValueError, match="at least two"):
        shortfalls({GENERATED: 9, TRAINING: 1}, width=2)


def test_deviations_are_those_from_seed_to_seed() -> None:
    """The mean of a feature has the deviation σ/√N, which many sets of other seeds show too."""

    def mean(shown: PictureSet) -> dict[str, float]:
        return {"mean": float(shown.features.pooled[:, 0].mean())}

    sets = [pictures(100, seed) for seed in range(60)]
    expected = float(torch.tensor([mean(shown)["mean"] for shown in sets]).std())
    estimates = [deviations(shown, mean(shown), mean, 0)["mean"] for shown in sets]
    assert sum(estimates) / len(estimates) == pytest.approx(expected, rel=0.25)


def test_a_note_warns_of_few_pictures() -> None:
    def network(shown: torch.Tensor) -> Features:
        raise AssertionError("not read")

    judge = FeatureNetwork("x", "of x", 6, network)
    assert notes({GENERATED: pictures(60)}, judge) == ["of x"]
    assert notes({GENERATED: pictures(59)}, judge)[1].startswith("59 pictures are few for 6 features")


def test_a_table_has_a_line_per_figure_and_a_dash_where_there_is_none() -> None:
    columns = {"a": {"label_top1": 0.5, "precision": 0.25}, "b": {"precision": 1.0}}
    text = markdown_table(columns, {"a": {"precision": 0.019}})
    assert text.splitlines()[2:] == ["| precision ↑ | 0.25 ± 0.019 | 1 |", "| label top-1 | 0.5 | – |"]
