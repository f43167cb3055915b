"""The study of fairness: how long one caller's short requests take beside what others do on one worker.

The service's own scheduler, with real ratios of time between passes of few and of many rows. No request has a
deadline. What is claimed is not simulated: everything is in the engine from the start, or from when it is
asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ditserve.bench.simulate.scenario import CURVES, StepTimeCurve
from ditserve.service.engine.fair_shares import Flow
from ditserve.service.engine.scheduler import Candidates, Scheduler
from ditserve.service.jobs import WEIGHTS
from ditserve.service.planning.costs import CostModel

SHORT_STEPS = 5
ROUNDS = 20  # short requests, one after the other


class FairSample:
    """One image of two rows a step; satisfies the scheduler's protocol for samples that wait for steps."""

    deadline_at: float | None = None
    rows = 2

    def __init__(self, flow: Flow, steps: int, added_at: float = 0.0) -> None:
        self.flow, self.steps, self.added_at = flow, steps, added_at
        self.taken = 0

    @property
    def least_steps(self) -> int:
        return self.steps - self.taken


@dataclass(frozen=True, slots=True)
class FairnessOutcome:
    """The seconds of a short request alone and beside others, and of the longest wait for its first step.

    `fair_s` is what it would take on its share of the machine. `others_keep` is the part of their rows a
    second that the others still have beside it, and `others_fair` their share of the machine.
    """

    scenario: str
    curve: str
    alone_s: float
    fair_s: float
    mean_s: float
    worst_s: float
    first_step_s: float
    others_keep: float
    others_fair: float

    @property
    def of_fair(self) -> float:
        return self.worst_s / self.fair_s


class FairEngine:
    """The engine of one worker on a steady machine."""

    def __init__(self, curve: StepTimeCurve) -> None:
        self.now = 0.0
        self.samples: list[FairSample] = []
        self.rows = Counter[Flow]()  # that each flow has had
        self._curve, self._scheduler = curve, Scheduler(max_rows=curve.max_rows)
        costs = CostModel()
        for rows in range(1, curve.max_rows + 1):
            costs.observe(rows, curve.seconds(rows))
        self._costs, self._best = costs, costs.saturation_rows(curve.max_rows)

    def step(self) -> Sequence[FairSample]:
        """Let the scheduler's next batch take a step; return its samples."""
        candidates = Candidates(self.samples, self._best, self._costs.predict)
        batch = self._scheduler.next_batch([candidates], now=self.now).samples
        self.now += self._curve.seconds(sum(sample.rows for sample in batch))
        for sample in batch:
            sample.taken += 1
            self.rows[sample.flow] += sample.rows
        self.samples = [sample for sample in self.samples if sample.taken < sample.steps]
        return batch

    def answer(self, request: FairSample) -> tuple[float, float]:
        """Run until a request is done; return the seconds until its first step and until its last."""
        request.added_at = self.now
        self.samples.append(request)
        first_s = 0.0
        while request.taken < request.steps:
            self.step()
            if request.taken == 1 and not first_s:
                first_s = self.now - request.added_at
        return first_s, self.now - request.added_at


def crowd(caller: str, samples: int, steps: int, priority: str = "normal") -> list[FairSample]:
    flow = Flow(caller, WEIGHTS[priority])
    return [FairSample(flow, steps) for _ in range(samples)]


SCENARIOS = {
    "one job of 1000 steps": crowd("other", 1, 1000),
    "four images of 1000 steps": crowd("other", 4, 1000),
    "a flood of 250 of 50 steps": crowd("other", 250, 50),
    "a flood of high priority": crowd("other", 250, 50, "high"),
}


def study_fairness(scenario: str, curve: str) -> FairnessOutcome:
    """Send short requests one after the other beside a scenario."""
    alone = FairEngine(CURVES[curve])
    own = Flow("own", WEIGHTS["normal"])
    _, alone_s = alone.answer(FairSample(own, SHORT_STEPS))
    engine = FairEngine(CURVES[curve])
    engine.samples = [FairSample(sample.flow, sample.steps) for sample in SCENARIOS[scenario]]
    others = engine.samples[0].flow
    weight = others.weight
    for _ in range(ROUNDS):
        # The others have been alone for a while.
        engine.step()
    alone_rate = engine.rows[others] / engine.now
    began_s, began_rows = engine.now, engine.rows[others]
    times = [engine.answer(FairSample(own, SHORT_STEPS)) for _ in range(ROUNDS)]
    rate = (engine.rows[others] - began_rows) / (engine.now - began_s)
    return FairnessOutcome(
        scenario=scenario,
        curve=curve,
        alone_s=alone_s,
        fair_s=alone_s * (own.weight + weight) / own.weight,
        mean_s=sum(total for _, total in times) / ROUNDS,
        worst_s=max(total for _, total in times),
        first_step_s=max(first for first, _ in times),
        others_keep=rate / alone_rate,
        others_fair=weight / (own.weight + weight),
    )


def shares_by_priority(curve: str, passes: int = 400) -> dict[str, float]:
    """Return the part of the machine that a caller of each priority is given, where all have much to do."""
    engine = FairEngine(CURVES[curve])
    for priority in WEIGHTS:
        engine.samples += crowd(priority, 100, 1000, priority)
    for _ in range(passes):
        engine.step()
    return {flow.caller: rows / engine.rows.total() for flow, rows in engine.rows.items()}


def fairness_table(outcomes: Iterable[FairnessOutcome], shares: Mapping[str, float]) -> str:
    """Return the outcomes as a table, with the part of the machine that each priority is given."""
    lines = [
        "# Fairness in the simulator",
        "",
        f"Made by `python -m bench.simulate --fairness`. A caller asks for {SHORT_STEPS} steps again and",
        "again beside what another caller has running. The fair time is that of a share by weight; the worst",
        "is told as a multiple of it.",
        "Seconds are simulated. The last column is the part of their rows a second that the others keep.",
        "",
        "| beside | machine | alone s | fair s | mean s | worst s | of fair | first step s | they keep |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for o in outcomes:
        times = f"{o.alone_s:.3g} | {o.fair_s:.3g} | {o.mean_s:.3g} | {o.worst_s:.3g}"
        parts = f"{o.of_fair:.1f}× | {o.first_step_s:.3g} | {o.others_keep:.0%}"
        lines.append(f"| {o.scenario} | {o.curve} | {times} | {parts} |")
    by_priority = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    lines += ["", f"Callers of each priority with much to do share a machine: {by_priority}."]
    return "\n".join(lines) + "\n"
