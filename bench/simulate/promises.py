"""The study of promises: how many accepted deadlines are broken, on quiet and on noisy hosts.

Every request asks for 50 steps within 4 s and forbids fewer. The load is offered to what the hosts can do on
average. A host's stalls can be longer than the deadline: then nothing keeps what was promised before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ditserve.bench.load.workload import Traffic
from ditserve.bench.simulate.fleet import WORKERS_A_HOST, SimulatedFleet
from ditserve.bench.simulate.host import NOISY, STEADY, mean_pace
from ditserve.bench.simulate.sample import SimulatedSample
from ditserve.bench.simulate.scenario import CURVES, PLANNED_EVERY_STEP, SimulatedCluster
from ditserve.service.planning.ladder import Ladder

STEPS, WITHIN_S = 50, 4.0
SEEDS = (1, 2, 3)  # of arrivals and of stalls, whose tails are so heavy that one run says little
HOSTS = {"quiet": STEADY, "noisy": NOISY}


@dataclass(frozen=True, slots=True)
class PromiseOutcome:
    """Some runs: the shares of all refused, of the accepted broken, and of the capacity used in time.

    `taken_on_return` is the share of the refused that were accepted when they first came back as told; None
    where nobody comes back.
    """

    workers: int
    apis: int
    host: str
    load: float
    requests: int
    refused: float
    broken: float
    used: float
    taken_on_return: float | None


def study_promises(
    workers: int,
    host: str,
    load: float,
    *,
    apis: int = 1,
    returning: bool = False,
    seconds: float = 20.0,
    seeds: Sequence[int] = SEEDS,
) -> PromiseOutcome:
    """Offer `load` times the mean capacity for so many simulated seconds, once a seed."""
    curve, regimes = CURVES["tiny"], HOSTS[host]
    slo = WITHIN_S / (STEPS * curve.seconds(1))
    cluster = SimulatedCluster(
        curve, Ladder([]), workers, slo, regimes=regimes, returning=returning, apis=apis
    )
    rate = load * curve.peak * workers * mean_pace(regimes) / STEPS
    traffic = Traffic(mix=((STEPS, 1.0),), refusing=1.0)
    samples: list[SimulatedSample] = []
    work_s = 0.0
    for seed in seeds:
        fleet = SimulatedFleet(PLANNED_EVERY_STEP, cluster, seed=seed)
        run = fleet.run(traffic.draw(max(1, int(rate * seconds)), rate, seed))
        ended = max(sample.finished or sample.arrived for sample in run)
        work_s += sum(worker.host.work(ended) for worker in fleet.workers)
        samples += run
    accepted = [sample for sample in samples if not sample.rejected]
    in_time = sum(sample.in_time for sample in accepted)
    returned = [sample for sample in samples if sample.came_back]
    return PromiseOutcome(
        workers=workers,
        apis=apis,
        host=host,
        load=load,
        requests=len(samples),
        refused=1.0 - len(accepted) / len(samples),
        broken=1.0 - in_time / max(1, len(accepted)),
        used=in_time * STEPS / (curve.peak * work_s),
        taken_on_return=(
            sum(sample.taken_on_return for sample in returned) / len(returned) if returned else None
        ),
    )


def markdown(outcomes: list[PromiseOutcome]) -> str:
    """Return the outcomes as a table."""
    lines = [
        "# Promises in the simulator",
        "",
        "Made by `python -m bench.simulate --promises`. Requests for 50 steps within 4 s that forbid fewer;",
        f"up to {WORKERS_A_HOST} workers share a host; {len(SEEDS)} runs a row. Times are simulated: none",
        "depends on the machine.",
        "",
        "| workers | APIs | host | load | requests | refused | broken of the accepted | capacity used in time"
        " | taken on first return |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for o in outcomes:
        returned = "" if o.taken_on_return is None else f"{o.taken_on_return:.0%}"
        shares = f"{o.refused:.0%} | {o.broken:.1%} | {o.used:.0%} | {returned}"
        lines.append(f"| {o.workers} | {o.apis} | {o.host} | {o.load:g} | {o.requests} | {shares} |")
    return "\n".join(lines) + "\n"
