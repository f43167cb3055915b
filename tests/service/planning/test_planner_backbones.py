"""The planner over random ladders of several backbones: consent, costs, and how its work grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditserve.model.spec.stretches import Stretch
from ditserve.service.planning.ladder import Ladder, steps_left
from ditserve.service.planning.planner import ROOM, Change, PlannedSample, Planner, Policy
from ditserve.service.rung import Consent, Rung
from tests.service.planning.machine import MAX_ROWS, line, quick

WHOLE = (0.0, 1.0)
STRETCHES: list[tuple[Stretch, ...]] = [
    (),
    (Stretch(0.0, "student", 0.25, guided=False),),
    (Stretch(0.6, "light", 0.5),),
    (Stretch(0.7, ""), Stretch(0.3, "middle", 0.75), Stretch(0.0, "light", 0.5)),
    (Stretch(0.5, "student", 0.25, guided=False), Stretch(0.2, "light", 0.5)),
]


@dataclass(frozen=True)
class Case:
    """A ladder, and samples that stand somewhere on it."""

    ladder: Ladder
    crowd: list[PlannedSample]

    def plan(self) -> list[Change]:
        return Planner(self.ladder).plan(self.crowd, 0.0, line(), max_rows=MAX_ROWS)

    def rows(self, sample: PlannedSample, rung: Rung) -> float:
        steps = steps_left(sample.remaining_steps, sample.rung, rung)
        return sample.rows_left(self.ladder, rung, steps)


@st.composite
def rungs(draw: st.DrawFn) -> Rung:
    steps, stretches = draw(st.integers(1, 60)), draw(st.sampled_from(STRETCHES))
    name = f"{steps} {' '.join(part.backbone or 'own' for part in stretches)}"
    interval = draw(st.sampled_from([WHOLE, (0.1, 0.8)]))
    quality = draw(st.floats(0.0, 5.0))
    return Rung(name, "ddim", steps, "trailing", interval, quality, stretches=stretches)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ladder = Ladder(draw(st.lists(rungs(), min_size=1, max_size=12)))
    crowd = []
    for index in range(draw(st.integers(0, 12))):
        asked = ladder.requested("ddim", draw(st.integers(1, 60)), "trailing", WHOLE, True)
        consent = Consent(
            draw(st.integers(1, asked.steps)),
            draw(st.sampled_from([0.5, 2.0, float("inf")])),
            draw(st.booleans()),
        )
        allowed = draw(st.booleans())
        rung = draw(st.sampled_from([asked, *(ladder.below(asked, consent) if allowed else ())]))
        left = draw(st.integers(1, rung.steps))
        crowd.append(
            PlannedSample(
                id=str(index),
                deadline_at=draw(st.none() | st.floats(0.0, 300.0)),
                rung=rung,
                remaining_steps=left,
                guided=draw(st.booleans()),
                consent=consent,
                allow_degraded=allowed,
                started=left < rung.steps,
                noise=left / rung.steps,
                requested=asked,
            )
        )
    return Case(ladder, crowd)


@quick
@given(cases())
def test_every_move_is_one_that_the_request_consents_to(case: Case) -> None:
    changes = case.plan()
    assert len({change.sample_id for change in changes}) == len(changes)
    for change in changes:
        sample = case.crowd[int(change.sample_id)]
        assert sample.allow_degraded
        assert sample.deadline_at is not None
        assert sample.requested is not None
        if change.rung != sample.requested:
            assert sample.consent.allows(change.rung)
            assert change.rung in case.ladder.below(sample.requested, sample.consent)


@quick
@given(cases())
def test_a_cut_goes_down_the_ladder_and_a_climb_up_alone(case: Case) -> None:
    changes = case.plan()
    climbs = [change for change in changes if change.reason == ROOM]
    assert len(climbs) <= 1
    assert not climbs or len(changes) == 1
    for change in changes:
        sample = case.crowd[int(change.sample_id)]
        before, after = case.rows(sample, sample.rung), case.rows(sample, change.rung)
        if change in climbs:
            assert after > before
        else:
            options = (sample.requested or sample.rung, *case.ladder.below(sample.rung, sample.consent))
            assert change.rung in options
            assert change.rung != sample.rung


@quick
@given(cases())
def test_nobody_is_cut_where_all_could_take_their_turns_one_by_one(case: Case) -> None:
    """The plainest of schedules, in the order of deadlines and one sample at a time, is kept: no cut."""
    dated = sorted(
        (sample for sample in case.crowd if sample.deadline_at is not None),
        key=lambda sample: sample.deadline_at or 0.0,
    )
    now, most = 0.0, len(case.crowd) * line().predict(MAX_ROWS)
    for sample in dated:
        now += sample.remaining_steps * most * Policy().margin
        if now > (sample.deadline_at or 0.0):
            return
    assert all(change.reason == ROOM for change in case.plan())


@quick
@given(cases())
def test_demand_counts_every_row_by_the_cost_of_its_backbone(case: Case) -> None:
    buckets = Planner(case.ladder).demand(case.crowd, 0.0, line(), max_rows=MAX_ROWS)
    rows = sum(case.rows(sample, sample.rung) for sample in case.crowd)
    assert rows - 1e-3 <= sum(bucket.rows for bucket in buckets) <= rows + len(buckets)
    assert [bucket.at for bucket in buckets] == sorted(bucket.at for bucket in buckets)


@pytest.mark.parametrize("within", [20.0, 150.0, 3000.0])
def test_the_work_of_a_plan_grows_with_samples_times_rungs(
    within: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder = Ladder(
        Rung(f"{steps} {k}", "ddim", steps, "trailing", WHOLE, 60.0 / steps + k / 10, stretches=stretches)
        for steps in (50, 30, 20, 10, 4)
        for k, stretches in enumerate(STRETCHES)
    )
    asked = ladder.rungs[0]
    counted, rows_left = [0], Ladder.rows_left

    def counting(self: Ladder, *arguments: Any) -> float:
        counted[0] += 1
        return rows_left(self, *arguments)

    monkeypatch.setattr(Ladder, "rows_left", counting)

    def work(count: int) -> int:
        """Return how often the rows of a sample are counted."""
        samples = [
            PlannedSample(
                id=str(k),
                deadline_at=within * (1.0 + k / 16),
                rung=asked,
                remaining_steps=asked.steps,
                guided=True,
                consent=Consent(),
                allow_degraded=True,
                started=False,
                noise=1.0,
                requested=asked,
            )
            for k in range(count)
        ]
        counted[0] = 0
        Planner(ladder).plan(samples, 0.0, line(), max_rows=MAX_ROWS)
        return counted[0]

    options = 1 + len(ladder.below(asked, Consent()))
    assert options > 5
    for count in (64, 512):
        assert count <= work(count) <= 3 * count * options
