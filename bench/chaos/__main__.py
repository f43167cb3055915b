"""Break the service while it works, and check that every accepted job ends once, with the right image.

    python -m bench.chaos [--seconds 60] [--seed 1] [--clients 6] [--workers 2] [--bundle model/zoo/emoji64]
        [--scenarios crashes,eviction] [--other-api FOLDER] [--out bench/results/chaos.json]
        [--report bench/results/chaos.md]

A durable Valkey, APIs and workers run as processes of their own, anew for each scenario. Clients send jobs of
every kind and pursue each to its end, while faults happen in an order that the seed decides. Each image is
compared with that of the same request run alone and undisturbed, each answer with the API's document. Ends
with status 1 if a job was lost that Redis kept, answered twice or with a wrong image, if somebody waits for
ever, or if an answer is in no document.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ditserve.bench import report
from ditserve.bench.chaos.clients import LoadClient, ReferenceRequest, reference_requests, with_images
from ditserve.bench.chaos.doors import opened
from ditserve.bench.chaos.faults import LEASE_S
from ditserve.bench.chaos.log import ChaosLog, failed
from ditserve.bench.chaos.scenarios import SCENARIOS, ScenarioRun
from ditserve.bench.load.cluster import TestCluster, running_cluster
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.errors import ModelError
from ditserve.service.errors import QueueUnavailable, ServiceError
from ditserve.service.launch.valkey import scratch_folder
from ditserve.service.queue.broker import Broker
from ditserve.service.settings import Settings

DRAIN_S = 0.3
EMPTY_S = 30.0  # for the queue to be empty after the last request
TERMINAL = {"done", "failed", "cancelled"}
# The columns of the report after the scenario's name: figure of the summary, heading.
COLUMNS = {
    "requests": "requests",
    "accepted": "accepted",
    "lost": "lost",
    "lost_by_redis": "lost with Redis' data",
    "answered_twice": "answered twice",
    "waiting": "waiting for ever",
    "undocumented": "undocumented answers",
    "wrong_images": "wrong images",
}


async def audit(cluster: TestCluster, log: ChaosLog) -> None:
    """Count the jobs that ended more than once, and the attempts of each.

    Raises:
        RuntimeError: jobs are still queued.
    """
    broker = await Broker.connect(cluster.redis_url)
    try:
        for outcome in log.accepted:
            try:
                status = await broker.status(outcome.job) if outcome.job else None
                if status is None:
                    continue
                ends = [event.kind async for event in broker.events(status.id) if event.kind in TERMINAL]
            except ServiceError as error:
                if isinstance(error, QueueUnavailable) or not log.redis_loses:
                    raise
                continue
            log.answered_twice += len(ends) > 1 or (not ends and not log.redis_loses)
            log.attempts[status.attempt] += 1
        until = time.monotonic() + EMPTY_S
        while queued := (await broker.load()).queued_jobs:
            if time.monotonic() > until:
                raise RuntimeError(f"{queued} jobs are still queued")
            await asyncio.sleep(0.2)
    finally:
        await broker.aclose()


async def run(
    name: str, options: argparse.Namespace, requests: list[ReferenceRequest], progress: Progress
) -> ChaosLog:
    """Run one scenario. `requests` without images get them first, from the undisturbed service."""
    scenario = SCENARIOS[name]
    log, rng = ChaosLog(redis_loses=scenario.redis_loses), random.Random(f"{options.seed} {name}")
    with scratch_folder() as temporary:
        folder = Path(temporary)
        unlike = scenario.unlike(options, folder)
        async with (
            running_cluster(folder, _settings(options), workers=options.workers, unlike=unlike) as cluster,
            opened(cluster.urls) as doors,
        ):
            if not requests[0].images:
                requests[:] = await with_images(doors, requests)
            seeds = [rng.random() for _ in range(options.clients)]
            clients = [LoadClient(doors, requests, random.Random(seed), log.outcomes) for seed in seeds]
            showing = asyncio.create_task(_show(progress, name, log, options.seconds))
            await scenario.drive(ScenarioRun(cluster, clients, log, rng, options.seconds))
            showing.cancel()
            await cluster.wait_ready()
            await audit(cluster, log)
    return log


def _settings(options: argparse.Namespace) -> Settings:
    return Settings.parse(
        [
            f"--bundle={options.bundle.resolve()}",
            "--threads=1",
            "--precision=fp32",
            f"--lease-s={LEASE_S}",
            f"--drain-s={DRAIN_S}",
            "--log-level=warning",
            f"--ready-workers={options.workers}",
        ]
    )


async def _show(progress: Progress, name: str, log: ChaosLog, seconds: float) -> None:
    task, began = progress.add_task("", total=seconds), time.monotonic()
    while True:
        last = log.faults[-1][1] if log.faults else "…"
        text = f"{name}: {len(log.outcomes)} requests, {len(log.faults)} faults ({last})"
        progress.update(task, completed=time.monotonic() - began, description=text)
        await asyncio.sleep(0.2)


def markdown(summaries: Mapping[str, Mapping[str, Any]], options: argparse.Namespace) -> str:
    """Return the report: a row for each scenario, and the reason of those that did not run."""
    lines = [
        "# Chaos",
        "",
        f"`{_command(options)}`: each scenario for {options.seconds:g} s, {options.clients} clients, "
        f"{options.workers} workers, {report.machine()['cores']} cores.",
        "",
        f"| scenario | faults | {' | '.join(COLUMNS.values())} | broken promises |",
        "|---|" + "---:|" * (len(COLUMNS) + 2),
    ]
    for name, summary in summaries.items():
        if "not_run" in summary:
            continue
        figures = [summary[column] for column in COLUMNS]
        share = f"{summary['broken']} of {summary['promised']}"
        row = [f"`{name}`", sum(summary["faults"].values()), *figures, share]
        lines.append(f"| {' | '.join(map(str, row))} |")
    lines += ["", *(f"- `{name}`: {SCENARIOS[name].about}" for name in summaries)]
    lines += [f"- `{name}` was not run: {s['not_run']}" for name, s in summaries.items() if "not_run" in s]
    return "\n".join(lines) + "\n"


def _command(options: argparse.Namespace) -> str:
    words = ["python -m bench.chaos", f"--seconds {options.seconds:g}", f"--seed {options.seed}"]
    words += [f"--bundle {options.bundle}"] if options.bundle != report.DEFAULT_BUNDLE else []
    words += ["--other-api FOLDER"] if options.other_api else []
    return " ".join(words)


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no {unknown[0]!r} among {', '.join(SCENARIOS)}")
    return names


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("chaos", __doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults go on in each scenario")
    parser.add_argument("--seed", type=int, default=1, help="of faults and requests")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="of a plain request")
    parser.add_argument("--bundle", type=Path, default=report.DEFAULT_BUNDLE)
    parser.add_argument("--scenarios", type=_names, default=list(SCENARIOS), help="names between commas")
    parser.add_argument("--other-api", type=Path, help="a checkout of another version, whose API runs beside")
    parser.add_argument("--out", type=Path, help="file for the result, as JSON")
    parser.add_argument("--report", type=Path, help="file for the report, as Markdown")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a promise was broken."""
    options, background = parse(arguments), report.BackgroundLoad()
    summaries: dict[str, dict[str, Any]] = {}

    def work() -> None:
        if options.other_api and not (options.other_api / "service").is_dir():
            raise ModelError(f"--other-api: {options.other_api} is no checkout, it has no folder service")
        factor = Bundle.open(options.bundle).manifest.factors[0]
        requests = reference_requests(factor.classes, factor.name, steps=options.steps)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            for name in options.scenarios:
                if reason := SCENARIOS[name].lacking(options):
                    summaries[name] = {"not_run": reason}
                else:
                    log = asyncio.run(run(name, options, requests, progress))
                    summaries[name] = log.summary()
        text = markdown(summaries, options)
        print(text, end="")
        if options.report:
            options.report.write_text(text)
        if options.out:
            report.write_json(options.out, report.record(options, background, {"scenarios": summaries}))

    if status := report.run_command("chaos", work):
        return status
    return int(any("not_run" not in summary and failed(summary) for summary in summaries.values()))


if __name__ == "__main__":
    sys.exit(main())
