"""Cuts: the worked example of the sweep, and the deadlines that no cut can save."""

from __future__ import annotations

import pytest

from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.cuts import CutSweep, Task, Timeline
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.planner import LOAD, ROOM, PlannedSample, Planner, Policy
from ditserve.service.rung import Consent, Rung

QUALITY = {20: 0.0, 10: 1.0, 6: 3.0}
LADDER = Ladder([Rung(f"ddim-{n}", "ddim", n, "trailing", (0.0, 1.0), q) for n, q in QUALITY.items()])
BY_STEPS = {rung.steps: rung for rung in LADDER.rungs}


def sample(name: str, steps: int, due: float, *, cut: bool = True) -> PlannedSample:
    """Return a sample with 10 steps left of a rung of `steps` steps."""
    return PlannedSample(
        id=name,
        deadline_at=due,
        rung=BY_STEPS[steps],
        remaining_steps=10,
        guided=False,
        consent=Consent(),
        allow_degraded=cut,
        started=steps > 10,
        noise=10 / steps,
    )


def crowd() -> list[PlannedSample]:
    return [sample("A", 10, 10.0), sample("B", 20, 12.0), sample("C", 10, 14.0, cut=False)]


def test_the_sweep_cuts_as_in_the_worked_example() -> None:
    tasks = [Task.of(planned, LADDER) for planned in crowd()]
    assert [task.floor() for task in tasks] == [(6, 6.0), (3, 3.0), (10, 10.0)]
    (cut,) = CutSweep(tasks, Timeline(2, [10.0, 12.0, 14.0]), margin=1.0).run()
    assert (cut.sample.id, cut.options[cut.at].steps, cut.steps, cut.rows) == ("B", 10, 5, 5.0)
    assert cut.reason == LOAD


def test_the_planner_makes_that_cut() -> None:
    costs = CostModel(fixed_s=0.8, per_row_s=0.1)  # a second for a pass of two rows
    planner = Planner(LADDER, Policy(margin=1.0))
    (change,) = planner.plan(crowd(), 0.0, costs, max_rows=2)
    assert (change.sample_id, change.rung.steps, change.reason) == ("B", 10, LOAD)


@pytest.mark.parametrize(("passes", "moved"), [(4.5, ["A", "B"]), (4.4, [])])
def test_nothing_is_cut_for_a_deadline_that_the_floors_do_not_meet(passes: float, moved: list[str]) -> None:
    """At their floors A and B have 6 + 3 = 9 rows left: 4.5 passes of two rows hold them, 4.4 do not."""
    tasks = [Task.of(planned, LADDER) for planned in crowd()[:2]]
    cut = CutSweep(tasks, Timeline(2, [100.0, passes]), margin=1.0).run()
    assert sorted(task.sample.id for task in cut) == moved


@pytest.mark.parametrize(("above", "reasons"), [(30, [ROOM]), (50, [])])
def test_a_sample_climbs_as_in_the_worked_example(above: int, reasons: list[str]) -> None:
    ladder = Ladder([Rung(f"ddim-{n}", "ddim", n, "trailing", (0.0, 1.0), 1 / n) for n in (above, 20)])
    high, low = ladder.rungs
    planned = PlannedSample("a", 40.0, low, 20, True, Consent(), True, False, 999, requested=high)
    costs = CostModel(fixed_s=0.8, per_row_s=0.1)  # a second for a pass of two rows
    changes = Planner(ladder, Policy(climb_margin=1.0)).plan([planned], 0.0, costs, max_rows=2)
    assert [change.reason for change in changes] == reasons
