"""Callers share the passes of an engine: counted in passes, whatever a pass takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ditserve.service.engine.engine import Engine

Make = Callable[..., Any]


def passes_until(engine: Engine, name: str) -> int:
    passes = 0
    while name in engine.progress():
        engine.step()
        passes += 1
    return passes


@pytest.mark.parametrize(("images", "max_rows"), [(1, 1), (1, 2), (4, 2), (4, 8), (4, 64)])
def test_a_short_request_beside_anothers_long_job_takes_at_most_twice_its_passes(
    make_engine: Make, make_request: Make, make_rung: Make, images: int, max_rows: int
) -> None:
    engine = make_engine(max_rows=max_rows)
    for k in range(images):
        engine.add(make_request(f"long/{k}", rung=make_rung(steps=1000), caller="long"))
    for _ in range(20):
        engine.step()
    engine.add(make_request("short/0", rung=make_rung(steps=5), caller="short"))
    assert passes_until(engine, "short/0") <= 2 * 5


def test_the_shorter_of_one_callers_requests_goes_first(
    make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    engine = make_engine(max_rows=2)
    engine.add(make_request("long/0", rung=make_rung(steps=1000)))
    engine.step()
    engine.add(make_request("short/0", rung=make_rung(steps=5)))
    assert passes_until(engine, "short/0") == 5


def test_a_size_of_its_own_is_no_second_share(
    make_backend: Make, make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    engine = make_engine(make_backend(size_multiple=2), max_rows=2)
    rung = make_rung(steps=300)
    costs = {(4, 6): 1.0, (2, 6): 0.5, (4, 12): 2.0, (8, 6): 2.0}
    for size in costs:
        engine.add(make_request(f"many/{size}", rung=rung, size=size, caller="many"))
    engine.add(make_request("one/0", rung=rung, caller="one"))
    for _ in range(200):
        engine.step()
    taken = {name: steps for name, (steps, _) in engine.progress().items()}
    many = sum(cost * taken[f"many/{size}"] for size, cost in costs.items())
    assert taken["one/0"] == pytest.approx(many, rel=0.1)


def test_priority_keeps_its_effect_once_claimed(
    make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    engine = make_engine(max_rows=2)
    for name, weight in (("high", 4.0), ("normal", 1.0)):
        engine.add(make_request(f"{name}/0", rung=make_rung(steps=1000), caller="one", weight=weight))
    for _ in range(100):
        engine.step()
    taken = {name: steps for name, (steps, _) in engine.progress().items()}
    assert taken["high/0"] == pytest.approx(4 * taken["normal/0"], abs=4)
