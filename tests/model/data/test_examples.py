"""The order of training examples, and batches made ahead of their use."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditserve.model.data.examples import batch_indices
from ditserve.model.train.batch import Prefetch


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
def test_an_epoch_shows_every_picture_once_whatever_the_batch(count: int, batch: int, seed: int) -> None:
    steps = -(-count * 2 // batch)
    order = np.concatenate([batch_indices(count, batch, step, seed) for step in range(steps)])
    assert sorted(order[:count]) == list(range(count))
    assert sorted(order[count : 2 * count]) == list(range(count))


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 30))
def test_the_order_is_that_of_the_seed_whatever_the_batch(count: int, batch: int, step: int) -> None:
    whole = np.concatenate([batch_indices(count, 1, k, 3) for k in range(step * batch, (step + 1) * batch)])
    assert np.array_equal(batch_indices(count, batch, step, 3), whole)


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_batches_made_ahead_come_in_order(ahead: int) -> None:
    with Prefetch(lambda step: step * step, first=3, ahead=ahead) as squares:
        assert [next(squares) for _ in range(20)] == [step * step for step in range(3, 23)]


def test_a_slow_batch_is_waited_for() -> None:
    """The second batch is finished before the first, and yet comes second."""
    second = threading.Event()

    def make(step: int) -> int:
        if step:
            second.set()
        else:
            assert second.wait(10)
        return step

    with Prefetch(make, ahead=2) as made:
        assert [next(made), next(made)] == [0, 1]


def test_an_error_is_raised_in_the_place_of_its_batch() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("no third")
        return step

    with Prefetch(make, ahead=3) as made:
        assert [next(made), next(made)] == [0, 1]
        with pytest.raises(ValueError, match="no third"):
            next(made)


def test_closing_waits_only_for_running_batches() -> None:
    made: list[int] = []
    ahead = Prefetch(made.append, ahead=1)
    next(ahead)
    ahead.close()
    count = len(made)
    assert count <= 3
    with pytest.raises(RuntimeError, match="after shutdown"):
        [next(ahead) for _ in range(count + 2)]
