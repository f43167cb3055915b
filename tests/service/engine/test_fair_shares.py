"""Fair shares: callers share the passes of an engine by their weights, whatever runs and whatever is due."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditserve.service.engine.fair_shares import FIRST_STEP_LEAD, LONGEST_LEAD, Flow
from ditserve.service.engine.scheduler import Candidates, Scheduler

ROWS = 8  # of a full pass


@dataclass(eq=False)
class Running:
    """A sample that takes its steps; `ended` is the pass that was its last, from 1."""

    caller: str
    steps: int
    rows: int = 2
    weight: float = 1.0
    deadline_at: float | None = None
    size: Hashable = None
    added_at: float = 0.0
    taken: int = 0
    began: int = 0
    ended: int = 0

    @property
    def flow(self) -> Flow:
        return Flow(self.caller, self.weight)

    @property
    def least_steps(self) -> int:
        return self.steps - self.taken


class Machine:
    """Runs passes of at most `room` rows, which take `fixed_s` seconds and `row_s` for each row."""

    def __init__(self, room: int, fixed_s: float = 0.0) -> None:
        self.scheduler, self.room, self.fixed_s = Scheduler(max_rows=64), room, fixed_s
        self.samples: list[Running] = []
        self.passes, self.now, self.row_s = 0, 0.0, 1.0
        self.rows = Counter[str]()  # that each caller has had

    def add(self, *samples: Running) -> None:
        for sample in samples:
            sample.added_at = self.now
        self.samples += samples

    def run(self, passes: int = 1) -> None:
        for _ in range(passes):
            by_size = groupby(sorted(self.samples, key=lambda s: str(s.size)), key=lambda s: s.size)
            candidates = [
                Candidates(list(group), self.room, self._seconds, size=size) for size, group in by_size
            ]
            batch = self.scheduler.next_batch(candidates, now=self.now).samples
            self.passes += 1
            self.now += self._seconds(sum(sample.rows for sample in batch))
            for sample in batch:
                self._step(sample)

    def run_until(self, *samples: Running) -> int:
        """Return the passes that it takes until all these are done."""
        before = self.passes
        while not all(sample.ended for sample in samples):
            self.run()
        return self.passes - before

    def _seconds(self, rows: int) -> float:
        return self.fixed_s + self.row_s * rows

    def _step(self, sample: Running) -> None:
        sample.taken += 1
        sample.began = sample.began or self.passes
        self.rows[sample.caller] += sample.rows
        if sample.taken == sample.steps:
            sample.ended = self.passes
            self.samples.remove(sample)


@pytest.mark.parametrize(("images", "room"), [(1, 2), (1, 1), (4, 2), (4, 8), (4, 64)])
def test_a_short_request_beside_anothers_long_job_takes_at_most_twice_its_time(
    images: int, room: int
) -> None:
    machine = Machine(room)
    machine.add(*(Running("long", 1000) for _ in range(images)))
    machine.run(100)
    short = Running("short", 5)
    machine.add(short)
    assert machine.run_until(short) <= 2 * 5


def test_a_short_request_beside_a_long_job_of_the_same_caller_goes_first() -> None:
    machine = Machine(2)
    machine.add(Running("a", 1000))
    machine.run(10)
    short = Running("a", 5)
    machine.add(short)
    assert machine.run_until(short) == 5


def test_a_long_request_is_not_overtaken_for_ever_by_short_ones_of_the_same_caller() -> None:
    machine = Machine(2)
    long = Running("a", 20)
    machine.add(long)
    while not long.ended:
        machine.add(Running("a", 2))
        machine.run(1)
        assert machine.passes < 1000


@pytest.mark.parametrize("fixed_s", [0.0, 2.0, 50.0])
def test_singles_beside_a_flood_take_twice_their_time_and_leave_it_half_of_the_machine(
    fixed_s: float,
) -> None:
    machine = Machine(64, fixed_s)
    machine.add(*(Running("flood", 50) for _ in range(250)))
    machine.run(10)
    flood_alone = machine.rows["flood"] / machine.now
    began, before = machine.now, machine.rows["flood"]
    for _ in range(5):
        single = Running("single", 10)
        machine.add(single)
        machine.run_until(single)
        assert machine.now - single.added_at <= 2 * 10 * (fixed_s + 2)
    assert (machine.rows["flood"] - before) / (machine.now - began) >= flood_alone / 2


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_a_sample_of_many_rows_and_one_of_few_share_the_time(weight: float) -> None:
    machine = Machine(64)
    machine.add(Running("many rows", 1000, rows=32), Running("few rows", 1000, weight=weight))
    machine.run(400)
    assert machine.rows["few rows"] == pytest.approx(weight * machine.rows["many rows"], abs=32 * weight + 2)


@pytest.mark.parametrize("room", [2, ROWS])
def test_priority_is_the_weight_of_a_share(room: int) -> None:
    machine = Machine(room)
    for name, weight in (("high", 4.0), ("normal", 1.0), ("low", 0.25)):
        machine.add(*(Running(name, 10_000, weight=weight) for _ in range(8)))
    machine.run(1050)
    shares = {name: rows / machine.rows.total() for name, rows in machine.rows.items()}
    expected = {"high": 4 / 5.25, "normal": 1 / 5.25, "low": 0.25 / 5.25}
    assert shares == pytest.approx(expected, abs=0.01)


def test_a_share_that_was_not_used_is_not_saved_up() -> None:
    machine = Machine(ROWS)
    machine.add(*(Running("many", 10_000) for _ in range(40)), Running("few", 10_000))
    machine.run(500)
    before = machine.rows.copy()
    machine.add(*(Running("few", 10_000) for _ in range(40)))
    machine.run(10)
    assert machine.rows["many"] - before["many"] >= 10 * ROWS / 2 - ROWS


def test_a_caller_of_many_requests_in_turn_has_the_share_of_one() -> None:
    machine = Machine(2)
    machine.add(Running("steady", 10_000))
    while machine.passes < 1000:
        if not any(sample.caller == "quick" for sample in machine.samples):
            machine.add(Running("quick", 1))
        machine.run(1)
    assert machine.rows["steady"] == pytest.approx(1000, abs=4)


def test_a_stall_of_the_machine_leaves_no_debt() -> None:
    machine = Machine(2)
    machine.add(*(Running(name, 1000) for name in "ab"))
    for k in range(200):
        machine.row_s = 1000.0 if k == 100 else 1.0
        machine.run(1)
    assert machine.rows["a"] == pytest.approx(machine.rows["b"], abs=4)


def test_sizes_of_one_caller_advance_at_one_pace_and_have_one_share() -> None:
    machine = Machine(ROWS)
    small = [Running("a", 1000, size="small") for _ in range(12)]
    large = [Running("a", 1000, rows=4, size="large") for _ in range(2)]
    machine.add(*small, *large, *(Running("b", 1000) for _ in range(12)))
    machine.run(400)
    assert machine.rows["a"] == pytest.approx(machine.rows["b"], abs=2 * ROWS)
    paces = [sum(sample.taken for sample in samples) / len(samples) for samples in (small, large)]
    assert paces[0] == pytest.approx(paces[1], abs=3)


def test_a_caller_owns_the_machine_not_by_declaring_deadlines() -> None:
    """Everything of the flood is due sooner than it can be done."""
    machine = Machine(2)
    flood = [Running("flood", 50, deadline_at=60.0) for _ in range(250)]
    machine.add(*flood)
    machine.run(20)
    newcomer = Running("newcomer", 20)
    machine.add(newcomer)
    assert machine.run_until(newcomer) <= 3 * newcomer.steps
    assert newcomer.began <= 20 + FIRST_STEP_LEAD + 2
    machine.add(Running("other", 10_000), Running("third", 10_000))
    machine.run(2 * LONGEST_LEAD)
    before = machine.rows.copy()
    machine.run(300)
    assert min(machine.rows[name] - before[name] for name in ("flood", "other", "third")) >= 600 / 3 - 8


def test_deadlines_still_come_before_the_share_of_a_long_job() -> None:
    machine = Machine(2)
    machine.add(Running("long", 1000))
    machine.run(10)
    dated = Running("dated", 50, deadline_at=machine.now + 120)  # a pass of two rows takes 2 s
    machine.add(dated)
    machine.run_until(dated)
    assert machine.now <= dated.deadline_at  # type: ignore[operator]


callers = st.lists(
    st.tuples(
        st.sampled_from([0.25, 1.0, 4.0]),  # weight
        st.integers(1, 12),  # samples
        st.integers(0, 40),  # passes before it comes
    ),
    min_size=2,
    max_size=5,
)


@settings(max_examples=100, deadline=None)
@given(callers=callers, rows=st.integers(1, 4), room=st.integers(1, 12))
def test_no_caller_starves(callers: Sequence[tuple[float, int, int]], rows: int, room: int) -> None:
    """A caller that could fill every pass has had its share since it came, but for a pass of each caller."""
    machine = Machine(room)
    before: list[int] = [0] * len(callers)
    for _ in range(120):
        for number, (weight, samples, comes) in enumerate(callers):
            if comes == machine.passes:
                machine.add(*(Running(str(number), 10**6, rows, weight) for _ in range(samples)))
                before[number] = machine.rows.total()
        if machine.samples:
            machine.run()
        else:
            machine.passes += 1
    total = sum(weight for weight, *_ in callers)
    full = max(rows, room // rows * rows)
    for number, (weight, samples, _) in enumerate(callers):
        if samples * rows >= full:
            share = weight / total * (machine.rows.total() - before[number])
            assert machine.rows[str(number)] >= share - full * (1 + len(callers) * weight / total)
