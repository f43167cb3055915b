"""A sample that leaves one engine under way and joins another ends in the same image, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest

from ditserve.service.engine.samples import Finished, SampleRequest
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.jobs import ConditionTerm
from ditserve.service.planning.planner import LOAD
from tests.service.engine.stepping import finished, run

Make = Callable[..., Any]


def moved(first: Any, second: Any, request: SampleRequest, after: int) -> Finished:
    """`after` steps on one engine and, by way of the wire, the rest on another."""
    first.add(request)
    for _ in range(after):
        first.step()
    snapshot = first.export(request.id)
    wire = msgpack.unpackb(msgpack.packb(snapshot.to_wire()))
    second.add(request, Snapshot.from_wire(wire))
    return finished(run(second))[request.id]


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "ddpm", "euler", "unipc-1", "unipc-2"])
@pytest.mark.parametrize("after", [1, 4, 7])
def test_the_image_is_the_same(
    solver: str, after: int, make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    request = make_request(rung=make_rung(solver, 8, interval=(0.1, 0.8)))
    whole = finished(run(make_engine(), [request]))["a/0"]
    made = moved(make_engine(), make_engine(), request, after)
    np.testing.assert_array_equal(made.latent, whole.latent)
    assert (made.steps_used, made.rung, made.degraded) == (8, whole.rung, False)


def test_a_composed_sample_goes_on_with_its_conditions_and_its_decay(
    make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    rung = replace(make_rung("dpmpp-2m", 8, interval=(0.1, 0.8)), guidance_decay=1.5)
    terms = (ConditionTerm((0,), 2.0), ConditionTerm((1,), -0.5))
    request = make_request(rung=rung, condition=terms, mix="compose")
    whole = finished(run(make_engine(), [request]))["a/0"]
    made = moved(make_engine(), make_engine(), request, 3)
    np.testing.assert_array_equal(made.latent, whole.latent)


def test_a_sample_on_another_trajectory_stays_on_it(
    make_engine: Make, make_request: Make, make_rung: Make, make_planner: Make
) -> None:
    before, after = make_rung("dpmpp-2m", 10), make_rung("dpmpp-2m", 5)
    request = make_request(rung=before)

    def planner() -> Any:
        return make_planner([("a/0", 699, after, LOAD)])

    whole = finished(run(make_engine(planner=planner()), [request]))["a/0"]
    made = moved(make_engine(planner=planner()), make_engine(planner=make_planner()), request, 4)
    np.testing.assert_array_equal(made.latent, whole.latent)
    assert (made.steps_used, made.rung, made.degraded, made.reason) == (
        whole.steps_used,
        after,
        True,
        LOAD,
    )


def test_a_sample_that_has_done_nothing_has_nothing_to_export(make_engine: Make, make_request: Make) -> None:
    engine = make_engine()
    engine.add(make_request())
    assert engine.export("a/0") is None
    assert engine.export("unknown") is None


def test_a_snapshot_of_another_size_is_refused_and_costs_no_slot(
    make_engine: Make, make_request: Make
) -> None:
    engine, request = make_engine(), make_request()
    engine.add(request)
    engine.step()
    wire = engine.export("a/0").to_wire()
    pixels = np.zeros((3, 8, 8), "<f4").tobytes()
    foreign = Snapshot.from_wire({**wire, "shape": (3, 8, 8), "latent": pixels, "history": pixels})
    other = make_engine()
    free = other.free_samples
    with pytest.raises(ValueError, match="another size"):
        other.add(request, foreign)
    assert other.free_samples == free


@pytest.mark.parametrize(
    "damage",
    [
        {"latent": b"123"},
        {"latent": None},
        {"history": None},
        {"earlier": b"123"},
        {"earlier": None},
        {"shape": (1, 2)},
        {"cursor": 99},
        {"noise": (1, 2)},
        {"rung": {}},
        {"timesteps": None},
    ],
)
def test_what_is_not_a_snapshot_is_refused(
    damage: dict[str, Any], make_engine: Make, make_request: Make
) -> None:
    engine = make_engine()
    engine.add(make_request())
    engine.step()
    wire = engine.export("a/0").to_wire()
    with pytest.raises(ValueError, match=r"."):
        Snapshot.from_wire({**wire, **damage})
