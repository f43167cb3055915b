"""A block cache in the engine: first blocks run for the rows that are due, and what they change is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ditserve.model.spec.block_cache import BlockCache, extrapolated
from ditserve.model.spec.grids import noise_levels
from ditserve.model.spec.solvers import step_table
from ditserve.model.spec.stretches import Stretch
from ditserve.service.engine.engine import Engine
from ditserve.service.engine.samples import Finished
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.jobs import ConditionTerm
from ditserve.service.rung import Rung

Make = Callable[..., Any]
Floats = npt.NDArray[np.float32]

CACHED = (Stretch(0.0, "cached", 0.6),)


@pytest.fixture
def cached(make_caching_backend: Make) -> Any:
    return make_caching_backend(size_multiple=2)


@pytest.fixture
def engine_of(make_backend: Make, make_caching_backend: Make, make_engine: Make) -> Callable[..., Engine]:
    """Give a function that builds an engine whose network may have a block cache."""

    def make(cached: Any = None, **options: Any) -> Engine:
        backbones = {"cached": (cached or make_caching_backend(size_multiple=2), 0.6)}
        built: Engine = make_engine(make_backend(size_multiple=2), backbones=backbones, **options)
        return built

    return make


def run(engine: Engine) -> dict[str, Finished]:
    made = {}
    while not engine.idle:
        made.update({sample.id: sample for sample in engine.step().finished})
    return made


def by_hand(network: Any, rung: Rung, scales: Sequence[float], seed: int, colour: int) -> Floats:
    """Return the latent of DDIM, as plainly as possible: with the changes of each branch in a list."""
    schedule = network.manifest.diffusion.noise_schedule()
    levels = noise_levels(rung.grid, rung.steps, schedule)
    table = step_table(rung.solver, levels, schedule)
    x = np.random.Generator(np.random.Philox(seed)).standard_normal((1, 3, 4, 6), np.float32)
    known: dict[int, list[tuple[int, Floats]]] = {}
    since = 0
    for k, (scale, level) in enumerate(zip(scales, levels, strict=True)):
        if k and (scale == 1.0) != (scales[k - 1] == 1.0):
            known, since = {}, 0

        outputs = []
        for label in (colour, len(network.manifest.factors[0].classes))[: 1 + (scale != 1.0)]:
            state = network.modulate(np.full(1, level, np.float32), network.embed(np.array([[label]])))
            if network.block_cache.is_due(since):
                known.setdefault(label, []).append((k, network.trunk(x, state)))
            outputs.append(network.tail(x, state, extrapolated(known[label], k)))
        output, *nulls = outputs
        for null in nulls:
            output = null + np.float32(scale) * (output - null)
        since += 1
        _, x0_x, x0_out, a, b, *_ = (np.float32(column[k]) for column in table.columns)
        x = np.asarray(a * x + b * (x0_x * x + x0_out * output), np.float32)
    return np.asarray(x[0])


def test_a_change_goes_on_along_the_line_through_the_last_two() -> None:
    assert extrapolated([(0, 1.0)], 1) == 1.0
    assert extrapolated([(0, 1.0), (2, 2.0)], 3) == pytest.approx(2.5)
    assert extrapolated([(0, 1.0), (2, 2.0), (4, 5.0)], 6) == pytest.approx(8.0)
    cache = BlockCache(blocks=1, every=3)
    assert [cache.is_due(since) for since in range(5)] == [True, False, False, True, False]
    assert cache.row_cost(0.9, 0.1) == pytest.approx(0.4)


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.7)])
def test_first_blocks_run_at_due_steps_and_are_extrapolated_between(
    every: int, interval: tuple[float, float], engine_of: Any, make_caching_backend: Make, make_request: Make
) -> None:
    network = make_caching_backend(every=every, size_multiple=2)
    rung = Rung("cached", "ddim", 9, "trailing", interval, 0.0, stretches=CACHED)
    engine = engine_of(network)
    engine.add(make_request(rung=rung, colour=1))
    sample = engine._samples["a/0"]
    guided = sample.trajectory.guided
    made = run(engine)["a/0"].latent
    assert sum(network.batches) > sum(network.trunks)
    expected = by_hand(network, rung, [2.0 if acts else 1.0 for acts in guided], 7, 1)
    np.testing.assert_allclose(made, expected, atol=3e-6)


def test_rows_of_different_phase_share_passes(engine_of: Any, cached: Any, make_request: Make) -> None:
    rung = Rung("cached", "ddim", 8, "trailing", (0.0, 1.0), 0.0, stretches=CACHED)
    engine = engine_of(cached)
    engine.add(make_request("first", rung=rung))
    engine.step()
    engine.add(make_request("second", rung=rung))
    cached.trunks.clear()
    reports = [engine.step() for _ in range(4)]
    # The first sample is due at its even steps, the second at those between: two rows of four every time.
    assert [report.rows for report in reports] == [4] * 4
    assert cached.trunks == [2] * 4


@pytest.mark.parametrize("taken", range(1, 9))
@pytest.mark.parametrize("windows", [False, True])
def test_a_snapshot_is_continued_to_the_same_image(
    taken: int, windows: bool, engine_of: Any, make_request: Make
) -> None:
    rung = Rung("cached", "dpmpp-2m", 9, "trailing", (0.2, 0.9), 0.0, stretches=CACHED)
    shape = {"size": (8, 6), "windows": True} if windows else {}
    request = make_request(rung=rung, colour=1, seed=3, **shape)
    whole, first, second = (engine_of() for _ in range(3))
    whole.add(request)
    expected = run(whole)[request.id].latent
    first.add(request)
    for _ in range(taken):
        first.step()
    snapshot = Snapshot.from_wire(first.export(request.id).to_wire())
    second.add(request, snapshot)
    # It may be handed on before its first step there.
    third = engine_of()
    third.add(request, Snapshot.from_wire(second.export(request.id).to_wire()))
    for engine in (second, third):
        np.testing.assert_array_equal(run(engine)[request.id].latent, expected)


def test_a_snapshot_of_other_steps_is_refused(engine_of: Any, make_request: Make) -> None:
    rung = Rung("cached", "ddim", 8, "trailing", (0.0, 1.0), 0.0, stretches=CACHED)
    engine = engine_of()
    engine.add(make_request(rung=rung))
    for _ in range(3):
        engine.step()
    wire = engine.export("a/0").to_wire()
    assert wire["cached_steps"] == (0, 2)
    for wrong in ({"cached_steps": (0, 7)}, {"cached_steps": ()}, {"cached": wire["cached"][:-4]}):
        with pytest.raises(ValueError, match=r"cache|reshape"):
            Snapshot.from_wire({**wire, **wrong})


def test_a_move_to_another_rung_begins_a_new_cache(
    engine_of: Any, cached: Any, make_request: Make, make_rung: Make, make_planner: Make
) -> None:
    rung = Rung("cached", "ddim", 8, "trailing", (0.0, 1.0), 0.0, stretches=CACHED)
    fewer = replace(rung, name="fewer", steps=4)
    engine = engine_of(cached, planner=make_planner([("a/0", 600, fewer, "load")]))
    engine.add(make_request(rung=rung))
    while engine._samples["a/0"].rung == rung:
        engine.step()
    assert [known.step for known in engine._samples["a/0"].known_changes] == [0]
    assert run(engine)["a/0"].degraded


def test_a_resumed_sample_without_memory_for_a_row_stays_where_it_is(
    engine_of: Any, make_caching_backend: Make, make_request: Make
) -> None:
    rung = Rung("cached", "ddim", 8, "trailing", (0.0, 1.0), 0.0, stretches=CACHED)
    request = make_request(rung=rung)
    first = engine_of()
    first.add(request)
    for _ in range(3):
        first.step()
    network = make_caching_backend(size_multiple=2, memory_rows=0)
    second = engine_of(network)
    second.add(request, first.export(request.id))
    with pytest.raises(MemoryError):
        second.step()
    network.memory_rows = 8
    np.testing.assert_array_equal(run(second)[request.id].latent, run(first)[request.id].latent)


def test_a_snapshot_before_another_network_s_step_carries_no_cache(
    engine_of: Any, make_request: Make
) -> None:
    stretches = (Stretch(0.5, "cached", 0.6),)
    rung = Rung("cached", "ddim", 8, "trailing", (0.0, 1.0), 0.0, stretches=stretches)
    engine = engine_of()
    engine.add(make_request(rung=rung))
    carried = []
    for _ in range(7):
        engine.step()
        carried.append("cached" in engine.export("a/0").to_wire())
    assert carried == [True] * 3 + [False] * 4


def test_a_composed_sample_in_windows_equals_its_solo_run(engine_of: Any, make_request: Make) -> None:
    rung = Rung("cached", "ddim", 6, "trailing", (0.0, 1.0), 0.0, stretches=CACHED)
    terms = (ConditionTerm((0,), 2.0), ConditionTerm((1,), -0.5))
    request = make_request(rung=rung, condition=terms, mix="compose", size=(8, 6), windows=True)
    alone, beside = engine_of(), engine_of(max_rows=3)
    alone.add(request)
    beside.add(make_request("other", rung=rung, colour=2))
    beside.step()
    beside.add(request)
    np.testing.assert_array_equal(run(alone)[request.id].latent, run(beside)[request.id].latent)
