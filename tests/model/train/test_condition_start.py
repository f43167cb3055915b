"""The start of conditions from the data: classes that look alike start alike."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from ditserve.model.nets.conditioner import means_of_others, scale_shares
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.factory import make_network
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.train.condition_start import (
    Floats,
    class_means,
    complete_conditions,
    discriminant,
    encode_means,
    start_conditions,
    start_mean,
    start_text,
)
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.missing_looks import complete_codes, fill_looks
from ditserve.model.train.trainer import Trainer
from tests.model.train.training_cases import tiny_config

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


def test_texts_are_read_as_far_as_they_tell() -> None:
    """Wordings of a class are recognised; those that say as little as others are left open."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(6, 16))
    classes = rng.integers(6, size=1200)
    texts = directions[classes] + 0.1 * rng.normal(size=(1200, 16))
    texts[::4] = 0.5 * rng.normal(size=(300, 16))
    weight, bias = discriminant(texts, classes, 6, 300)
    again = directions[classes] + 0.1 * rng.normal(size=(1200, 16))
    logits = torch.from_numpy(np.column_stack([again @ weight.T + bias, np.zeros(1200)]))
    shares = logits.softmax(1)
    assert (shares.argmax(1).numpy() == classes).mean() > 0.95
    vague = torch.from_numpy(np.append(texts.mean(0) @ weight.T + bias, 0.0)).softmax(0)
    assert vague.max() < 0.5


@pytest.mark.parametrize("start", ["data", "init"])
def test_a_run_starts_with_what_texts_say_of_labels(tmp_path: Path, bundle: Path, start: str) -> None:
    config = tiny_config(tmp_path)
    arrays = dict(np.load(config.data.path))
    # Names of 1, 4 and 7 letters, by an encoder that counts them.
    arrays["captions"] = np.array(["x" * (1 + 3 * name) for name in arrays["y"]])
    np.savez(config.data.path, **arrays)
    changes = {"condition_start": "data"} if start == "data" else {"init": str(bundle)}
    trainer = Trainer(
        TrainConfig.model_validate(
            {
                **config.model_dump(),
                **changes,
                "data": {**config.data.model_dump(), "text": "tests.model.data.test_texts:Lengths"},
                "model": {**config.model, "hidden_size": 32, "text_labels": True},
            }
        )
    )
    network = trainer.state.model
    assert isinstance(network, DiT)
    lengths = torch.tensor([[1.0], [4.0], [7.0]])
    shares = network.y_embedder.readers[0](lengths).softmax(1)
    assert shares.argmax(1).tolist() == [0, 1, 2]
    # All styles have the same texts, which say nothing of them.
    styles = network.y_embedder.readers[1](lengths).softmax(1)
    torch.testing.assert_close(styles, torch.full((3, 3), 1 / 3), atol=0.05, rtol=0)


# Each shape looks another way in each colour, on 2 channels of 4×4; the last shape is not there in the last.
LOOKS = RNG.normal(size=(12, 3, 32)) + SHAPES[:, None] + COLOURS
THERE = (LABELS[:, 0] < 11) | (LABELS[:, 1] < 2)
SHOWN = (LOOKS[LABELS[:, 0], LABELS[:, 1]] + 0.01 * RNG.normal(size=(len(LABELS), 32)))[THERE]


def started(maps: int) -> DiT:
    """Return a network whose conditional mean has started from the pictures."""
    config = DiTConfig(
        image_size=(4, 4), in_channels=2, hidden_size=32, depth=1, num_heads=2, classes=COUNTS,
        learn_sigma=False, mean_rank=20, mean_maps=maps,
    )  # fmt: skip
    network = DiT(config)
    assert network.conditional_mean is not None
    with torch.no_grad():
        pictures = SHOWN.astype(np.float32)
        started = start_mean(network.conditional_mean, pictures, LABELS[THERE], COUNTS, 0.3)
        for table, rows in zip(network.y_embedder.tables, started.tables, strict=True):
            table.get_parameter("weight")[:, config.hidden_size :] = torch.from_numpy(rows)
    return network


def told(network: DiT, *labels: tuple[int, int]) -> Floats:
    assert network.conditional_mean is not None
    with torch.no_grad():
        embedding = network.embed(torch.tensor(labels))[:, network.config.hidden_size :]
        return network.conditional_mean.mean(embedding).flatten(1).double().numpy()


def test_a_conditional_mean_starts_as_what_each_class_looks_like_in_each_map() -> None:
    network = started(maps=3)
    *seen, unseen = [(shape, colour) for shape in range(12) for colour in range(3)]
    expected = np.array([LOOKS[pair] for pair in seen])
    assert (told(network, *seen) - expected).var() < 0.01 * expected.var()
    # A pair that no picture shows is nearer to what it is than the mean picture.
    error, of_mean = told(network, unseen)[0] - LOOKS[unseen], SHOWN.mean(0) - LOOKS[unseen]
    assert np.square(error).sum() < np.square(of_mean).sum()
    # Without a colour a shape is the mean of its colours, and without either it is that of all pictures.
    np.testing.assert_allclose(told(network, (4, 3))[0], LOOKS[4].mean(0), atol=0.1)
    np.testing.assert_allclose(told(network, (12, 3))[0], SHOWN.mean(0), atol=0.1)


def test_a_pair_that_is_not_shown_looks_as_in_the_map_most_like_its_own() -> None:
    looks = RNG.normal(size=(6, 3, 8))
    looks[:, 2] = looks[:, 0] + 0.1 * RNG.normal(size=(6, 8))
    shown = np.ones((6, 3), bool)
    shown[4, 0] = shown[5, 0] = shown[5, 2] = shown[3] = False
    filled = fill_looks(np.where(shown[:, :, None], looks, 0.0), shown)
    np.testing.assert_array_equal(filled[4, 0], looks[4, 2])
    # The most similar map lacks it as well.
    np.testing.assert_array_equal(filled[5], looks[5, [1, 1, 1]])
    assert not filled[3].any()
    np.testing.assert_array_equal(filled[:3], looks[:3])


def test_codes_are_completed_where_pictures_are_missing() -> None:
    """Codes learned without a pair tell what its class looks like in another map; shown pairs stay."""
    network, shown = started(maps=3), np.ones((12, 3), bool)
    shown[11, 2] = False
    offsets = np.stack([LOOKS[shown[:, colour], colour].mean(0) for colour in range(3)])
    looks = np.where(shown[:, :, None], LOOKS - offsets, 0.0)
    wanted = fill_looks(looks, shown)[11, 2] + offsets[2]
    with torch.no_grad():
        codes = network.y_embedder.tables[0].get_parameter("weight")
        codes[11, -20:] += 0.02 * torch.from_numpy(RNG.normal(size=20))
        pairs = [(shape, colour) for shape in range(12) for colour in range(3)][:-1]
        before, seen = told(network, (11, 2))[0], told(network, *pairs)
        assert complete_codes(network, looks, shown, offsets, (0, 1)) == 1
    after = told(network, (11, 2))[0]
    assert np.square(after - wanted).sum() < 0.5 * np.square(before - wanted).sum()
    moved = np.square(told(network, *pairs) - seen).mean(1)
    assert not moved[:-2].any()
    assert moved.max() < 0.3 * seen.var()


def test_completing_needs_maps_and_a_model_to_start_from(tmp_path: Path, bundle: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(ValueError, match="missing completes the model that a run starts from: set init"):
        TrainConfig.model_validate({**config.model_dump(), "condition_start": "missing"})
    changes = {
        "condition_start": "missing",
        "init": str(bundle),
        "model": {**config.model, "hidden_size": 32},
    }
    with pytest.raises(ValueError, match="missing is for a model with mean_maps that a label chooses"):
        Trainer(TrainConfig.model_validate({**config.model_dump(), **changes}))
    dataset = copy.copy(config.open_dataset())
    vars(dataset)["labels"] = np.full_like(dataset.labels, 99)
    maps = {**config.model, "mean_rank": 4, "mean_maps": 2, "learn_sigma": False}
    network = make_network(config.model_copy(update={"model": maps, "init": bundle}).network_config(dataset))
    with pytest.raises(ValueError, match="missing needs pictures with all of their labels"):
        complete_conditions(network, dataset, seed=0)


def test_hidden_rows_are_told_the_mean_of_the_other_maps() -> None:
    network, pairs = started(maps=3), torch.tensor([[4, 0], [4, 0], [5, 3]])
    conditional, hidden = network.conditional_mean, torch.tensor([False, True, True])
    assert conditional is not None
    told_of = network.embed(pairs)[:, network.config.hidden_size :]
    plain = conditional.mean(told_of)
    with means_of_others(network, hidden):
        means = conditional.mean(told_of)
    assert torch.equal(means[0], plain[0])
    np.testing.assert_allclose(means[1].flatten().detach(), LOOKS[4, 1:].mean(0), atol=0.1)
    torch.testing.assert_close(means[2], plain[2], msg="no map is chosen: all are alike")
    assert torch.equal(conditional.mean(told_of), plain)


def test_a_conditional_mean_of_one_map_is_what_a_class_has_in_common() -> None:
    network, labels = started(maps=1), LABELS[THERE]
    expected = np.array([SHOWN[labels[:, 0] == shape].mean(0) for shape in range(12)])
    left = told(network, *((shape, 0) for shape in range(12))) - expected
    assert left.var() < 0.01 * expected.var()


@pytest.mark.parametrize("prediction", ["x0", "flow", "v"])
def test_the_output_starts_about_the_best_linear_one(tmp_path: Path, prediction: str) -> None:
    schedule = "cosine" if prediction == "v" else "flow"
    config = tiny_config(
        tmp_path, batch=256, diffusion={"schedule": schedule, "prediction": prediction}, loss_cap=None
    )
    model = {**config.model, "mean_rank": 1, "learn_sigma": False}
    config = config.model_copy(
        update={"model": model, "condition_start": "data", "label_dropout": (0.0,), "joint_dropout": 0.0}
    )
    trainer = Trainer(config)
    network = trainer.state.model
    assert isinstance(network, DiT)
    mean = network.conditional_mean
    assert mean is not None
    batch = trainer.source.make_at_all_levels(10**6)
    row = trainer.noise.at(batch.t)
    x, target = row.noisy(batch.x0, batch.noise), row.target(batch.x0, batch.noise)
    with torch.no_grad():
        output = network(x, row.told, batch.labels)
        scales = scale_shares(row.told) @ mean.scales
        told = mean.mean(network.embed(batch.labels)[:, 16:])
    error = (output - target).flatten(1)
    # The error is as large as the blocks' scale says, and no row's own best scales would do much better.
    assert (error.square().mean(1).sqrt() / scales[:, 2]).mean().item() == pytest.approx(1, abs=0.1)
    best = [
        np.linalg.lstsq(np.stack([m, n], 1), y, rcond=None)[1][0] / len(y)
        for m, n, y in zip(
            told.flatten(1).numpy(), x.flatten(1).numpy(), target.flatten(1).numpy(), strict=True
        )
    ]
    assert error.square().mean().item() < 1.15 * np.mean(best)


@pytest.mark.parametrize("shape", [{}, {"mean_rank": 4, "mean_maps": 2, "learn_sigma": False}])
def test_pictures_that_are_not_labelled_whole_tell_nothing(tmp_path: Path, shape: dict[str, int]) -> None:
    config = tiny_config(tmp_path, condition_start="data")
    config = config.model_copy(update={"model": {**config.model, **shape}})
    dataset = config.open_dataset()
    labels = dataset.labels.copy()
    labels[dataset.training[::3], -1] = len(dataset.factors[-1].classes)
    some, none = copy.copy(dataset), copy.copy(dataset)
    vars(some)["labels"] = labels
    vars(none)["labels"] = np.full_like(labels, max(len(factor.classes) for factor in dataset.factors))
    for data, starts in ((some, True), (none, False)):
        network = make_network(config.network_config(dataset))
        before = network.y_embedder.tables[0].get_parameter("weight").clone()
        start_conditions(network, data, std=0.3, seed=0)
        after = network.y_embedder.tables[0].get_parameter("weight")
        assert torch.isfinite(after).all()
        assert torch.equal(before, after) is not starts
