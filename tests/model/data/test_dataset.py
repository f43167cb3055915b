"""The same data set is read from every form of data, and keeps the promises that a trainer relies on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ditserve.model.data.dataset import DataConfig, Dataset
from ditserve.model.data.examples import Pictures, to_model_space
from ditserve.model.spec.manifest import Factor
from tests.model.data.data_forms import CAPTIONS, CARD, FORMS, NAMES, PAIRS, STYLES, pictures

ALL = np.arange(len(PAIRS))


class Letters:
    """A text encoder for tests: it counts "a" and "e", and the length."""

    size = 3

    def encode(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.array([[text.count("a"), text.count("e"), len(text)] for text in sentences], np.float32)


@pytest.fixture(params=FORMS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return FORMS[request.param](tmp_path)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "letters", SimpleNamespace(Letters=Letters))
    return "letters:Letters"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_every_form_gives_the_same_data(path: Path, encoder: str) -> None:
    dataset: Dataset = DataConfig(path=path, hold_out=0, text=encoder).open()
    assert dataset.factors == (Factor(name="label", classes=NAMES), Factor(name="style", classes=STYLES))
    assert dataset.labels.tolist() == [list(pair) for pair in PAIRS]
    assert dataset.labels.dtype == np.int64
    assert (dataset.size, dataset.channels) == ((8, 8), 3)
    assert dataset.training.tolist() == ALL.tolist()
    assert (dataset.licence, list(dataset.attribution)) == (CARD["licence"], CARD["attribution"])
    assert dataset.skipped == ()
    assert dataset.texts is not None
    assert np.array_equal(dataset.texts.draw(ALL), Letters().encode(CAPTIONS))
    expected = pictures().astype(np.float32).transpose(0, 3, 1, 2) / np.float32(127.5) - 1
    batch = dataset.batch(ALL, rng())
    assert batch.dtype == np.float32
    assert np.array_equal(batch, expected)


def test_a_batch_is_in_the_order_asked_for(path: Path) -> None:
    dataset = DataConfig(path=path, hold_out=0).open()
    assert dataset.texts is None
    index = np.array([7, 0, 7, 3])
    assert np.array_equal(dataset.batch(index, rng()), dataset.batch(ALL, rng())[index])


def test_flips_are_drawn_from_the_generator_alone(path: Path) -> None:
    still, flipping = (DataConfig(path=path, hold_out=0, flip=flip).open() for flip in (False, True))
    upright, batch = still.batch(ALL, rng()), flipping.batch(ALL, rng(5))
    mirrored = np.array([not np.array_equal(one, other) for one, other in zip(upright, batch, strict=True)])
    assert 0 < mirrored.sum() < len(ALL)
    assert np.array_equal(batch[mirrored], upright[mirrored][..., ::-1])
    assert np.array_equal(flipping.batch(ALL, rng(5)), batch)
    assert not np.array_equal(flipping.batch(ALL, rng(6)), batch)


def test_selection_and_holding_out_do_not_depend_on_the_form(path: Path) -> None:
    dataset = DataConfig(path=path, names=("cat", "apple"), hold_out=0.5).open()
    assert dataset.factors[0].classes == ("apple", "cat")
    assert dataset.labels[:, 0].tolist() == [0] * 4 + [1] * 4
    assert np.array_equal(
        dataset.batch(np.array([4]), rng()), DataConfig(path=path).open().batch(np.array([8]), rng())
    )
    held = {(NAMES[(0, 2)[y]], STYLES[s]) for y, s in dataset.labels[dataset.held_out]}
    # The choice depends on the text of the pair alone.
    assert held == {("apple", "flat"), ("cat", "flat")}
    assert not dataset.held_out[dataset.training].any()


def test_a_data_set_can_be_resized(path: Path) -> None:
    dataset = DataConfig(path=path, hold_out=0).open()
    half = dataset.resized((4, 4))
    assert half.size == (4, 4)
    assert half.batch(ALL, rng()).shape == (len(ALL), 3, 4, 4)
    assert np.array_equal(
        half.batch(ALL, rng()), DataConfig(path=path, hold_out=0, size=4).open().batch(ALL, rng())
    )
    assert DataConfig(path=path, size=(4, 6)).open().size == (4, 6)


def test_moved_data_is_opened_at_its_new_path(path: Path) -> None:
    assert len(DataConfig(path=Path("gone")).open(path).labels) == len(PAIRS)


def test_pixels_are_converted_as_by_torch() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    expected = torch.from_numpy(every).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert np.array_equal(to_model_space(every), expected.numpy())


def test_large_arrays_stay_on_disk(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "set.npz",
        x=np.zeros((100, 32, 32, 3), np.uint8),
        y=np.arange(100) % 2,
        names=np.array(["a", "b"]),
    )
    dataset = DataConfig(path=tmp_path / "set.npz").open()
    assert isinstance(dataset, Pictures)
    assert isinstance(dataset.images, np.memmap)


def test_a_folder_without_captions_or_styles(tmp_path: Path) -> None:
    """Sub-folders that differ between classes are no styles: their pictures are read, as by ImageFolder."""
    flat = FORMS["folder"](tmp_path)
    (flat / "bee" / "shaded").rename(flat / "bee" / "other")
    dataset = DataConfig(path=flat, hold_out=0).open()
    assert [factor.name for factor in dataset.factors] == ["label"]
    assert dataset.labels[:, 0].tolist() == [y for y, _ in PAIRS]


def test_captions_need_no_classes(tmp_path: Path, encoder: str) -> None:
    flat = FORMS["folder"](tmp_path) / "apple" / "flat"
    dataset = DataConfig(path=flat, text=encoder, hold_out=0).open()
    assert dataset.factors == ()
    assert dataset.labels.shape == (2, 0)
    assert dataset.texts is not None
    assert dataset.texts.draw(np.arange(2)).shape == (2, 3)


def test_without_styles_no_class_loses_all_its_pictures(tmp_path: Path) -> None:
    """Without styles, pictures are held out rather than classes."""
    np.savez(
        tmp_path / "set.npz",
        x=np.zeros((600, 2, 2, 3), np.uint8),
        y=np.arange(600) % 200,
        names=np.array([f"name-{k}" for k in range(200)]),
    )
    dataset = DataConfig(path=tmp_path / "set.npz", hold_out=0.5).open()
    assert set(dataset.labels[dataset.training, 0]) == set(range(200))
    assert 0.4 * 400 < dataset.held_out.sum() < 0.6 * 400
