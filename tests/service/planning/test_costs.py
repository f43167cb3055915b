"""The cost model: it learns the curve it is shown, follows the machine, and finds the batch worth running."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ditserve.service.planning.costs import CostModel, Waits

quick = settings(max_examples=60, deadline=None)  # wall time says nothing on a shared machine


GPU = {1: 0.167, 2: 0.183, 3: 0.186, 4: 0.240, 8: 0.425, 16: 0.832}


def taught(curve: dict[int, float]) -> CostModel:
    costs = CostModel()
    for rows, seconds in curve.items():
        costs.observe(rows, seconds)
    return costs


def test_before_any_observation_it_is_the_guess() -> None:
    costs = CostModel(fixed_s=0.01, per_row_s=0.1)
    assert costs.predict(3) == pytest.approx(0.31)
    assert (costs.fixed_s, costs.per_row_s) == (0.01, 0.1)


def test_one_observation_scales_the_guess() -> None:
    costs = CostModel(fixed_s=0.01, per_row_s=0.1)
    costs.observe(1, 0.22)
    assert costs.predict(1) == pytest.approx(0.22)
    assert costs.predict(2) == pytest.approx(0.42)


@pytest.mark.parametrize("rows", list(GPU))
def test_a_batch_size_that_was_run_is_predicted_as_it_ran(rows: int) -> None:
    assert taught(GPU).predict(rows) == pytest.approx(GPU[rows])


def test_between_sizes_it_interpolates() -> None:
    assert taught(GPU).predict(6) == pytest.approx((0.240 + 0.425) / 2)


def test_it_fits_a_line_and_extends_it() -> None:
    costs = taught({rows: 0.08 + 0.92 * rows for rows in (1, 2, 4)})
    assert costs.fixed_s == pytest.approx(0.08)
    assert costs.per_row_s == pytest.approx(0.92)
    assert costs.predict(32) == pytest.approx(0.08 + 0.92 * 32)


def test_the_machine_saturates_where_more_rows_stop_paying() -> None:
    assert taught(GPU).saturation_rows(16) == 7
    assert taught({rows: 0.08 + 0.92 * rows for rows in (1, 2, 4, 8, 16)}).saturation_rows(16) == 2


def test_saturation_is_as_in_the_worked_example() -> None:
    assert taught({1: 1.0, 2: 1.1, 4: 1.3, 8: 2.5}).saturation_rows(8) == 4


def test_it_follows_a_machine_that_slows_down_at_every_batch_size() -> None:
    costs = taught(GPU)
    for _ in range(100):
        costs.observe(8, 2 * GPU[8])
    assert costs.predict(8) == pytest.approx(2 * GPU[8], rel=0.02)
    assert costs.predict(1) > 1.3 * GPU[1]
    assert costs.per_row_s > 1.3 * taught(GPU).per_row_s


def test_settling_on_one_batch_size_does_not_forget_the_others() -> None:
    costs, noise = taught(GPU), random.Random(0)
    for _ in range(5000):
        costs.observe(8, GPU[8] * noise.lognormvariate(0.0, 0.05))
    assert costs.predict(1) == pytest.approx(GPU[1], rel=0.1)
    assert costs.saturation_rows(16) in (6, 7, 8)


def test_predictions_stay_close_under_noise() -> None:
    costs, noise = taught(GPU), random.Random(1)
    errors = []
    for _ in range(2000):
        rows = noise.choice(list(GPU))
        seconds = GPU[rows] * noise.lognormvariate(0.0, 0.05)
        errors.append(abs(costs.predict(rows) / GPU[rows] - 1))
        costs.observe(rows, seconds)
    errors.sort()
    assert errors[len(errors) // 2] < 0.03
    assert errors[int(0.95 * len(errors))] < 0.10


def test_one_wild_step_says_little() -> None:
    costs = taught(GPU)
    costs.observe(8, 1000 * GPU[8])
    assert costs.predict(8) < 1.4 * GPU[8]


def test_stalls_count_for_as_long_as_they_last() -> None:
    costs, noise = taught({1: 0.01, 8: 0.02}), random.Random(2)
    passes = [0.02 + (0.5 if noise.random() < 0.04 else 0.0) for _ in range(3000)]
    for seconds in passes:
        costs.observe(8, seconds)
    # Most passes take 20 ms, but a hundred of them take 4 s.
    assert costs.predict(8) > 0.8 * sum(passes) / len(passes)
    # A size that does not run now is as much slower.
    assert costs.predict(1) == pytest.approx(0.5 * costs.predict(8), rel=0.1)


def test_a_neighbour_is_believed_at_once_and_forgotten_late() -> None:
    costs = taught({8: 0.02})
    for _ in range(2000):
        costs.observe(8, 0.02)
    for _ in range(round(3.0 / 0.08)):
        costs.observe(8, 0.08)
    assert costs.predict(8) > 0.045
    for _ in range(round(3.0 / 0.02)):
        costs.observe(8, 0.02)
    assert 0.022 < costs.predict(8) < 0.05
    for _ in range(round(100.0 / 0.02)):
        costs.observe(8, 0.02)
    assert costs.predict(8) == pytest.approx(0.02, rel=0.05)


def test_a_stalled_warm_up_does_not_spoil_the_shape() -> None:
    costs = taught({1: 0.01, 2: 0.5, 4: 0.016, 8: 0.02})
    for _ in range(2):
        for rows, seconds in {1: 0.01, 2: 0.012, 4: 0.016, 8: 0.02}.items():
            costs.observe(rows, seconds)
    assert costs.saturation_rows(8) == 8
    assert costs.predict(2) == pytest.approx(0.012, rel=0.3)


def test_the_time_of_the_host_does_not_grow_with_the_rows() -> None:
    costs = taught({1: 0.001, 64: 0.02})
    for _ in range(500):
        costs.observe(1, 0.011, 0.01)
    assert costs.predict(1) == pytest.approx(0.011, rel=0.05)
    assert costs.predict(64) == pytest.approx(0.03, rel=0.05)
    assert costs.saturation_rows(64) > 32


def test_a_wait_for_a_processor_slows_the_pace_as_in_the_worked_example() -> None:
    costs = taught({8: 0.006})
    for _ in range(500):
        costs.observe(8, 0.03, 0.008, waits=Waits(0.016, 0.006))
    assert costs.predict(8) == pytest.approx(0.03, rel=0.01)
    assert costs.slow_spells()[0].factor == pytest.approx(1.0, rel=0.01)


def test_neighbours_that_interrupt_long_passes_alone_do_not_make_large_batches_seem_dear() -> None:
    curve = {1: 0.001, 4: 0.002, 16: 0.006, 64: 0.022}
    alone, told, untold = taught(curve), CostModel(), CostModel()
    for _ in range(20):
        for rows, seconds in curve.items():
            # The neighbour takes a processor once for every 4 ms that the pass has had it.
            waited_s = 0.012 * (seconds // 0.004)
            told.observe(rows, seconds + waited_s, waits=Waits(waited_s))
            untold.observe(rows, seconds + waited_s)
    assert told.saturation_rows(64) == alone.saturation_rows(64) == 24
    assert untold.saturation_rows(64) < 10


def test_the_line_to_a_batch_is_as_in_the_worked_example() -> None:
    costs = taught({1: 0.002, 10: 0.005, 64: 0.05})
    fixed_s, per_row_s = costs.line(10)
    assert fixed_s == pytest.approx(0.00167, rel=0.01)
    assert per_row_s == pytest.approx(0.00033, rel=0.02)
    assert fixed_s + 10 * per_row_s == pytest.approx(costs.predict(10))
    assert costs.fixed_s + 10 * costs.per_row_s > 1.3 * costs.predict(10)


@quick
@given(st.dictionaries(st.integers(1, 64), st.floats(1e-4, 10.0), min_size=1, max_size=6), st.integers(1, 64))
def test_a_line_ends_where_the_batch_is(curve: dict[int, float], rows: int) -> None:
    costs = taught(curve)
    fixed_s, per_row_s = costs.line(rows)
    assert fixed_s >= 0 < per_row_s
    assert fixed_s + rows * per_row_s == pytest.approx(costs.predict(rows))


def test_an_idle_machine_is_found_fast_again() -> None:
    costs = taught({1: 0.01})
    for _ in range(1000):
        costs.observe(1, 0.08)
    assert costs.slowed
    assert costs.predict(1) > 0.07
    for _ in range(60):
        costs.observe_idle(1, 0.01, 1.0)
    assert not costs.slowed
    assert costs.predict(1) == pytest.approx(0.01, rel=0.1)


def test_slow_spells_are_forgotten_on_a_machine_that_idles() -> None:
    """Else one found too slow for any promise would never be asked again."""
    costs = taught({1: 0.1})
    costs.observe(1, 20.0)
    for _ in range(400):
        costs.observe(1, 0.1)
    assert costs.predict(1) < 0.11
    assert costs.slowed
    for _ in range(60):
        costs.observe_idle(1, 0.1, 1.0)
    assert not costs.slowed


def test_a_machine_with_slow_spells_says_how_slow_it_may_be_and_for_how_long() -> None:
    costs = taught({1: 0.1})
    for second in range(60):
        for _ in range(10 if second % 10 else 2):
            costs.observe(1, 0.1 if second % 10 else 0.5)
    short, *_, long = costs.slow_spells()
    assert short.over_s < long.over_s
    assert short.factor > 2.5
    assert 1.0 <= long.factor < 1.5


def test_decoding_is_learned_apart() -> None:
    costs = CostModel()
    assert costs.decode_s == 0.0
    costs.observe_decode(0.5)
    assert costs.decode_s == pytest.approx(0.5)
    for _ in range(100):
        costs.observe_decode(0.1)
    assert costs.decode_s == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("bad", [{"fixed_s": -1.0}, {"per_row_s": 0.0}, {"decode_s": -1.0}])
def test_impossible_guesses_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="cannot"):
        CostModel(**bad)


def test_a_batch_has_at_least_one_row() -> None:
    with pytest.raises(ValueError, match="max_rows"):
        CostModel().saturation_rows(0)


@quick
@given(st.lists(st.tuples(st.integers(-2, 64), st.floats(-1.0, 1e4)), max_size=60), st.integers(1, 64))
@example([(1, 3.9e-221)], 1)
@example([(1, 1.0), (49, 1.0), (64, 153.09375)], 1)
def test_whatever_is_observed_time_is_positive_and_rows_are_not_free(
    observed: list[tuple[int, float]], max_rows: int
) -> None:
    costs = CostModel()
    for rows, seconds in observed:
        costs.observe(rows, seconds)
    assert costs.fixed_s >= 0 < costs.per_row_s
    assert all(costs.predict(rows) > 0 for rows in (1, 2, 7, 64, 500))
    assert 1 <= costs.saturation_rows(max_rows) <= max_rows


def test_rows_cost_no_less_than_the_images_that_are_made_of_them() -> None:
    costs = CostModel(fixed_s=0.001, per_row_s=0.0004)
    assert costs.line(10) == pytest.approx((0.001, 0.0004))
    costs.observe_decode(0.024)
    assert costs.line(10) == pytest.approx((0.001, 0.0004)), "the rows of an image are not known"
    costs.observe_image(30)
    fixed_s, per_row_s = costs.line(10)
    assert fixed_s + 10 * per_row_s == pytest.approx(0.008)
    costs.observe_image(300)
    assert costs.line(10)[1] < per_row_s
    assert costs.predict(10) == pytest.approx(0.005), "a step takes no longer"


def test_a_step_beside_which_the_host_works_takes_the_longer_of_the_two() -> None:
    """A device takes 1 ms and 0.1 ms a row; the host takes 2 ms a step, whatever its rows."""
    costs = CostModel()
    for _ in range(200):
        for rows in (1, 8, 32):
            device_s = 0.001 + 0.0001 * rows
            costs.observe(rows, max(device_s, 0.002), 0.002, device_s=device_s)
    assert costs.predict(1) == pytest.approx(0.002, rel=0.05)
    assert costs.predict(8) == pytest.approx(0.002, rel=0.05)
    assert costs.predict(32) == pytest.approx(0.0042, rel=0.05)
