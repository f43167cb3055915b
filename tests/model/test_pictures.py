"""Loading labelled pictures, and the order they are trained in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.pictures import DataError, batch_indices, load_npz

STYLES = ("flat", "shaded")
NAMES = ("apple", "bee", "cat", "dog")


@pytest.fixture
def crossed(tmp_path: Path) -> Path:
    """Every name in every style but the last name, which has only one."""
    pairs = [(y, s) for y in range(4) for s in range(2)][:-1]
    file = tmp_path / "set.npz"
    np.savez(
        file,
        x=np.arange(len(pairs), dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8),
        y=np.array([y for y, _ in pairs]),
        s=np.array([s for _, s in pairs]),
        names=np.array(NAMES),
        styles=np.array(STYLES),
        groups=np.array(["food", "animals", "animals", "animals"]),
    )
    return file


def test_names_missing_a_style_are_left_out(crossed: Path) -> None:
    pictures = load_npz(crossed)
    assert pictures.factors[0].classes == ("apple", "bee", "cat")
    assert pictures.factors[1].classes == STYLES
    assert pictures.labels.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]
    assert pictures.images[3, 0, 0, 0] == 3


def test_groups_and_names_select_their_union(crossed: Path) -> None:
    assert load_npz(crossed, groups=["animals"], names=["apple"]).factors[0].classes == (
        "apple",
        "bee",
        "cat",
    )
    assert load_npz(crossed, groups=["animals"]).factors[0].classes == ("bee", "cat")


def test_held_out_pairs_do_not_depend_on_the_selection(tmp_path: Path) -> None:
    count = 400
    file = tmp_path / "many.npz"
    groups = np.array(["a", "b"])[np.arange(count) % 2]
    names = np.array([f"name-{k}" for k in range(count)])
    np.savez(file, x=np.zeros((count, 2, 2, 3), np.uint8), y=np.arange(count), names=names, groups=groups)
    whole, part = load_npz(file, hold_out=0.1), load_npz(file, groups=["b"], hold_out=0.1)
    held = {whole.factors[0].classes[k] for k in np.flatnonzero(whole.held_out)}
    assert 0.05 * count < len(held) < 0.16 * count
    assert {part.factors[0].classes[k] for k in np.flatnonzero(part.held_out)} == held & set(
        part.factors[0].classes
    )
    assert set(whole.training) == set(range(count)) - set(np.flatnonzero(whole.held_out))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 4, 4, 3), np.uint8), "y": np.arange(2)}, "lacks the array 'names'"),
        ({"x": np.zeros((2, 4, 4, 3)), "y": np.arange(2), "names": np.array(["a", "b"])}, "must be uint8"),
        (
            {"x": np.zeros((1, 4, 4, 3), np.uint8), "y": np.zeros(1, int), "names": np.array(["a"])},
            "at least 2",
        ),
    ],
)
def test_unusable_arrays_are_named(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    file = tmp_path / "bad.npz"
    np.savez(file, **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message) as error:
        load_npz(file)
    assert str(file) in str(error.value)


def test_a_missing_file_and_an_unknown_group_are_named(crossed: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_npz(tmp_path / "none.npz")
    with pytest.raises(DataError, match="no group 'plants'"):
        load_npz(crossed, groups=["plants"])


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
def test_an_epoch_shows_every_picture_once_whatever_the_batch(count: int, batch: int, seed: int) -> None:
    steps = -(-count * 2 // batch)
    order = np.concatenate([batch_indices(count, batch, step, seed) for step in range(steps)])
    assert sorted(order[:count]) == list(range(count))
    assert sorted(order[count : 2 * count]) == list(range(count))
