"""The pictures that an evaluation generates and compares: they are the ones that sampling gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from ditserve.model.data.dataset import DataConfig, Dataset
from ditserve.model.data.examples import DataError, Pictures
from ditserve.model.evaluation.picture_sets import (
    GENERATED,
    TRAINING,
    EvaluationPlan,
    choose_examples,
    choose_rows,
    generate,
    open_data,
    picture_size,
    real_pictures,
    round_to_8_bits,
    told,
)
from ditserve.model.nets.autoencoder import Identity, PictureDecoder
from ditserve.model.nets.dit import DiT
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance, denoise
from ditserve.model.spec.bundle import Bundle, write_manifest
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.grids import grid
from ditserve.model.spec.manifest import Factor
from ditserve.model.spec.solvers import step_table
from ditserve.model.train.load import load_model

NAMES, STYLES = ("cat", "dog", "fox", "owl", "bee"), ("flat", "shaded", "line")
PLAN = EvaluationPlan(
    limit=100,
    per_pair=1,
    reference=100,
    steps=3,
    solver="ddim",
    grid="trailing",
    guidance_scale=2.0,
    guidance_interval=(0.0, 1.0),
    seed=5,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set with one picture of every name in every style, 8×8."""
    labels = np.array([[y, s] for y in range(5) for s in range(3)])
    x = np.random.default_rng(0).integers(0, 256, (15, 8, 8, 3), np.uint8)
    file = tmp_path / "drawn.npz"
    np.savez(file, x=x, y=labels[:, 0], s=labels[:, 1], names=np.array(NAMES), styles=np.array(STYLES))
    return file


def trained_on(bundle: Path, **config: object) -> None:
    manifest = Bundle.open(bundle).manifest
    data = {"path": "elsewhere.npz", "names": NAMES, **config}
    write_manifest(bundle, manifest.model_copy(update={"provenance": {"training": {"data": data}}}))


def open_both(bundle: Path, data: Path, **config: object) -> Dataset:
    trained_on(bundle, **config)
    return open_data(load_model(bundle), data)


def test_data_is_split_as_in_training_and_not_mirrored(bundle: Path, data: Path) -> None:
    dataset = open_both(bundle, data, hold_out=0.3, flip=True)
    assert 0 < dataset.held_out.sum() < 8
    assert not isinstance(dataset, Pictures) or not dataset.flip


def test_without_recorded_training_data_nothing_is_held_out(bundle: Path, data: Path) -> None:
    dataset = open_data(load_model(bundle), data)
    assert dataset.held_out.sum() == 0
    assert dataset.factors[0].classes == NAMES


def test_data_of_other_classes_is_refused(bundle: Path, data: Path, tmp_path: Path) -> None:
    trained_on(bundle, names=("cat", "dog"))
    with pytest.raises(DataError, match=r"drawn\.npz has other classes than the model"):
        open_data(load_model(bundle), data)
    with pytest.raises(DataError, match=r"none\.npz"):
        open_data(load_model(bundle), tmp_path / "none.npz")


def test_labels_of_training_and_unseen_labels_are_chosen_apart(bundle: Path, data: Path) -> None:
    dataset = open_both(bundle, data, hold_out=0.3)
    seen, unseen = choose_examples(dataset, PLAN)
    assert sorted(seen) == dataset.training.tolist()
    assert sorted(unseen) == np.flatnonzero(dataset.held_out).tolist()
    assert seen != sorted(seen)
    more, _ = choose_examples(dataset, replace(PLAN, per_pair=None))
    assert (len(more), more[: len(seen)]) == (PLAN.limit, seen)
    assert {tuple(row) for row in dataset.labels[more]} == {tuple(row) for row in dataset.labels[seen]}
    assert choose_examples(dataset, replace(PLAN, limit=4))[0] == seen[:4]
    twice, unseen_twice = choose_examples(dataset, replace(PLAN, limit=4, per_pair=2))
    assert twice == [seen[0], seen[0], seen[1], seen[1]]
    assert len(unseen_twice) == 2 * len(unseen)


def example(labels: list[list[int]], held_out: list[bool], factors: tuple[Factor, ...]) -> Pictures:
    count = len(held_out)
    return Pictures(
        rows=np.arange(count),
        labels=np.array(labels, np.int64).reshape(count, -1),
        factors=factors,
        held_out=np.array(held_out),
        images=np.zeros((count, 8, 8, 3), np.uint8),
        size=(8, 8),
    )


def test_a_held_out_picture_of_a_label_met_in_training_is_not_unseen() -> None:
    factors = (Factor(name="label", classes=("a", "b", "c")),)
    dataset = example([[0], [0], [1], [2], [2]], [False, True, False, True, True], factors)
    seen, unseen = choose_examples(dataset, PLAN)
    assert sorted(seen) == [0, 2]
    assert unseen in ([3], [4])


def test_unlabelled_pictures_are_as_many_as_the_limit() -> None:
    dataset = example([], [False] * 6, ())
    seen, unseen = choose_examples(dataset, replace(PLAN, limit=4))
    assert len(seen) == 4
    assert unseen == []
    assert len(choose_examples(dataset, replace(PLAN, limit=20))[0]) == 20
    assert choose_rows(dataset, PLAN).keys() == {TRAINING, GENERATED}


def test_pictures_are_those_sampling_makes_of_the_same_seeds(bundle: Path, data: Path) -> None:
    opened = load_model(bundle)
    dataset = open_data(opened, data)
    pictures = torch.cat(list(generate(opened, Identity(), dataset, [3, 7], PLAN)))
    embedding = opened.network.embed(torch.from_numpy(dataset.labels[[3, 7]]))
    denoiser = Denoiser(opened.network, opened.schedule, Conditions((embedding,)), Guidance(2.0))
    *_, expected = denoise(denoiser, step_table("ddim", grid("trailing", 3, 1000), opened.schedule), [5, 6])
    assert torch.equal(pictures, round_to_8_bits(expected))


def test_real_pictures_equal_the_data_bit_for_bit(bundle: Path, data: Path) -> None:
    dataset = open_data(load_model(bundle), data)
    pictures = torch.cat(list(real_pictures(dataset, Identity(), [4, 2])))
    with np.load(data) as arrays:
        drawn = arrays["x"][[4, 2]]
    assert np.array_equal(((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy(), drawn)
    assert list(real_pictures(dataset, Identity(), [])) == []


def test_a_model_on_latents_is_compared_with_the_pictures_themselves(bundle: Path, data: Path) -> None:
    opened = load_model(bundle)
    latent = replace(opened, manifest=opened.manifest.model_copy(update={"decoder": "sd-vae"}))
    assert picture_size(latent) == (64, 64)
    with pytest.raises(DataError, match=r"drawn\.npz holds pictures and the model denoises latents"):
        open_data(latent, data)
    dataset = open_data(latent, data, pictures=True)
    # A decoder would be asked for more than it can do.
    (pictures,) = real_pictures(dataset, cast(PictureDecoder, None), [4, 2])
    assert pictures.shape == (2, 3, 64, 64)


def test_a_model_is_told_what_the_plan_says(tmp_path: Path, data: Path) -> None:
    with np.load(data) as arrays:
        captions = np.array([f"picture {k}" + ("\n\nno {k}" if k % 2 else "") for k in range(15)])
        np.savez(tmp_path / "told.npz", **arrays, captions=captions)
    fields = {"path": tmp_path / "told.npz", "hold_out": 0, "text": "tests.model.data.test_texts:Lengths"}
    dataset = DataConfig.model_validate(fields).open()
    network = DiT(DiTConfig(hidden_size=8, depth=1, num_heads=1, classes=(5, 3), text_size=1))
    index = np.array([1, 3])
    labels, text = told(dataset, index, network, PLAN)
    assert labels.tolist() == [[0, 1], [1, 0]]
    assert text is not None
    assert told(dataset, index, network, replace(PLAN, given="labels"))[1] is None
    labels, text = told(dataset, index, network, replace(PLAN, given="text", wordings="unseen"))
    assert labels.tolist() == [[5, 3], [5, 3]]
    assert text is not None
    assert text.tolist() == [[6.0], [6.0]]
    # Those without such a wording are not asked for.
    seen, _ = choose_examples(dataset, replace(PLAN, wordings="unseen"))
    assert {k % 2 for k in seen} == {1}
