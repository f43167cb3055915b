"""`python -m export.trt BUNDLE`: TensorRT engines of a bundle's backbone, built once per model and GPU.

Engines are kept in the bundle by GPU and TensorRT version, and built again only if something they depend on
changed. On a GPU each engine is then run against the fp32 graph and timed. An engine that is wrong is not
kept, nor an INT8 engine that is not faster than half precision. `--check` builds nothing and reports the
state of each engine; `--compile-only` compiles and keeps nothing. Ctrl-C stops a build cleanly.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ditserve.commands import command_line
from ditserve.export.errors import ExportError
from ditserve.export.tensorrt.build import (
    BuildCancelled,
    BuildError,
    BuildOptions,
    build_engine,
    profiles_for,
)
from ditserve.export.tensorrt.engine_runner import EngineRunner
from ditserve.export.tensorrt.engines import (
    amend,
    drop,
    find_device,
    fusion_of,
    recorded_options,
    store,
    timing_cache,
)
from ditserve.export.tensorrt.module import FLAVOURS, TensorRt, load_trt
from ditserve.export.tensorrt.progress import (
    CancellableMonitor,
    ProgressReporter,
    interruptible,
    json_reporter,
    terminal_reporter,
)
from ditserve.export.tensorrt.trial import FASTER, TrialReference, speedup, trial_reference, try_engine
from ditserve.model.spec.bundle import CALIBRATION, Bundle
from ditserve.model.spec.command_line import named_path, positive
from ditserve.model.spec.engine_cache import FOLDER, GRAPHS, CachedEngine, EngineOrigin, engine_origin
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.network_config import own_config
from ditserve.model.spec.output_folder import BUNDLE, ENGINES, claim

BUCKETS = (1, 2, 4, 8, 16, 32)
HALVES = ("fp16", "bf16")
SHORT = ("fresh", "built", "compiles")  # states that need no explanation
STALE, REFUSED, CANCELLED = 1, 2, 130


@dataclass(frozen=True, slots=True)
class BuildOutcome:
    """The state of the engine in one precision, and the record of the engine if there is one.

    `state` is "fresh", "built", "compiles", "dropped: …", or the reason why the engine must not be loaded.
    """

    origin: EngineOrigin
    state: str
    record: Mapping[str, Any]

    @property
    def dropped(self) -> bool:
        return self.state.startswith("dropped")


@dataclass(frozen=True, slots=True)
class BuildTask:
    """The engines of one command: of which bundle, how they are built, and where they are kept."""

    trt: TensorRt
    bundle: Bundle
    engines: Path
    options: BuildOptions
    buckets: tuple[int, ...] = BUCKETS  # batch sizes to be timed

    def check(self, origin: EngineOrigin) -> BuildOutcome:
        """Return the state of the engine as it is now, without building it."""
        cached = CachedEngine.of(self.engines, origin)
        problem = cached.problem(origin, recorded_options(self.options))
        return BuildOutcome(origin, problem or "fresh", _record(cached) if problem is None else {})

    def build(
        self,
        origin: EngineOrigin,
        *,
        force: bool = False,
        keep: bool = True,
        monitor: CancellableMonitor | None = None,
    ) -> BuildOutcome:
        """Build one engine unless a fresh one is there; with `keep=False` only compile it.

        Raises:
            BuildError, BuildCancelled: see `build_engine`; an engine that was there before stays.
        """
        cached = CachedEngine.of(self.engines, origin)
        outcome = self.check(origin)
        if keep and not force and outcome.state == "fresh":
            return outcome
        cache = timing_cache(cached) if keep else b""
        built = build_engine(
            self.trt, self.bundle.file(origin.graph), self.options, timing_cache=cache, monitor=monitor
        )
        facts = {"fusion": fusion_of(built.plan).as_dict(), "executed": False}
        if not keep:
            sizes = {"bytes": len(built.plan), "seconds": built.seconds}
            return BuildOutcome(origin, "compiles", {**sizes, **facts})
        store(cached, origin, self.options, built, facts)
        return BuildOutcome(origin, "built", _record(cached))

    def try_out(self, outcome: BuildOutcome, reference: TrialReference) -> BuildOutcome:
        """Run an engine that was not run yet, and add its errors and times to its record.

        Raises:
            ExportError: its error is beyond the limit of its precision; it is then removed.
        """
        if outcome.record["executed"]:
            return outcome
        cached, precision = CachedEngine.of(self.engines, outcome.origin), outcome.origin.precision
        engine = EngineRunner(self.trt, cached.engine.read_bytes())
        try:
            amend(cached, try_engine(engine, precision, reference, self.buckets))
        except ExportError:
            drop(cached)
            raise
        finally:
            engine.close()
        return replace(outcome, record=_record(cached))

    def drop_slow_int8(self, outcomes: Sequence[BuildOutcome], *, keep: bool) -> list[BuildOutcome]:
        """Remove an INT8 engine that is not `FASTER` than half precision, unless `keep`."""
        times = {
            outcome.origin.precision: outcome.record["milliseconds"]
            for outcome in outcomes
            if "milliseconds" in outcome.record
        }
        half = next((times[name] for name in HALVES if name in times), None)
        if keep or half is None or "int8" not in times:
            return list(outcomes)
        ratio = speedup(half, times["int8"])
        if ratio >= FASTER:
            return list(outcomes)
        state = (
            f"dropped: {ratio:.2f} times as fast as half precision, {FASTER} is asked for: "
            "--keep-int8 keeps it"
        )
        remaining = []
        for outcome in outcomes:
            if outcome.origin.precision == "int8":
                drop(CachedEngine.of(self.engines, outcome.origin))
                outcome = replace(outcome, state=state)
            remaining.append(outcome)
        return remaining


def _record(cached: CachedEngine) -> Mapping[str, Any]:
    record: Mapping[str, Any] = json.loads(cached.record.read_text())
    return record


def precisions(bundle: Bundle, requested: Sequence[str], *, every: bool) -> list[str]:
    """Return the precisions to build: all with a graph, or those requested, or by default half precision.

    Half precision is always built beside INT8, which must be faster than it.
    """
    present = [name for name in (*HALVES, "int8") if GRAPHS[name][0] in bundle.manifest.files]
    chosen = present if every else list(requested) or present[:1] or ["fp16"]
    halves = [name for name in present if name in HALVES][:1]
    return [*halves, *chosen] if "int8" in chosen and not set(chosen) & set(HALVES) else chosen


def main(arguments: list[str]) -> int:
    """Run the command line.

    Return 0 if done, 1 if `--check` found an engine missing or stale, 2 if refused with one sentence, 130 if
    cancelled.
    """
    options = _parse(arguments)
    log: Sequence[str] = ()
    reporting = {"bars": lambda: terminal_reporter(Console(stderr=True)), "json": json_reporter}
    with reporting[options.progress]() as reporter:
        try:
            return _run(options, reporter)
        except BuildCancelled as error:
            status, message = CANCELLED, str(error)
        except (ModelError, ValueError, OSError) as error:
            status, message = REFUSED, str(error)
            if isinstance(error, BuildError) and options.verbose:
                log = error.log
        reporter.report({"event": "failed", "error": message})
    print(f"export.trt: {message}", *log, sep="\n", file=sys.stderr)
    return status


def _run(options: argparse.Namespace, reporter: ProgressReporter) -> int:
    bundle = Bundle.open(options.bundle)
    own_config(bundle.manifest.name, bundle.manifest.config)
    trt = load_trt(options.backend)
    build = BuildOptions(
        profiles=profiles_for(options.buckets, options.profiles),
        size=bundle.manifest.config.image_size,
        level=options.level,
        workspace_mib=options.workspace_mib,
        tf32=options.tf32,
        targets=tuple(options.target),
    )
    device = find_device(trt, build)
    task = BuildTask(trt, bundle, options.engines or bundle.path / FOLDER, build, options.buckets)
    origins = [
        engine_origin(bundle, name, GRAPHS[name][0], flavour=trt.flavour, version=trt.version, device=device)
        for name in precisions(bundle, options.precision or (), every=options.all)
    ]
    if options.check:
        outcomes = [task.check(origin) for origin in origins]
    else:
        # Engines lie in the bundle or in a folder of their own.
        folder, kind = (task.engines, ENGINES) if options.engines else (bundle.path, BUNDLE)
        # Who waits finds what the other has built.
        on_wait = partial(_tell_waiting, reporter) if options.wait else None
        with nullcontext() if options.compile_only else claim(folder, kind, on_wait=on_wait):
            outcomes = _build_and_try(task, origins, options, reporter)
    for outcome in outcomes:
        done = {"state": outcome.state, "seconds": outcome.record.get("seconds")}
        reporter.report({"event": "done", "precision": outcome.origin.precision, **done})
    _print(Console(stderr=True), task, outcomes, options.command)
    return STALE if options.check and any(outcome.state != "fresh" for outcome in outcomes) else 0


def _tell_waiting(reporter: ProgressReporter, owner: str) -> None:
    reporter.report({"event": "waiting", "owner": owner})


def _build_and_try(
    task: BuildTask, origins: Sequence[EngineOrigin], options: argparse.Namespace, reporter: ProgressReporter
) -> list[BuildOutcome]:
    """Build the engines and, if they are for this machine, try each out."""
    tried = not (options.target or options.compile_only)
    if tried:
        # A bundle without calibration rows is refused now, before hours of building.
        task.bundle.file(CALIBRATION)
    outcomes = _build(task, origins, options, reporter)
    if tried and not all(outcome.record["executed"] for outcome in outcomes):
        reference = trial_reference(task.bundle)
        outcomes = [task.try_out(outcome, reference) for outcome in outcomes]
    return task.drop_slow_int8(outcomes, keep=options.keep_int8)


def _build(
    task: BuildTask, origins: Sequence[EngineOrigin], options: argparse.Namespace, reporter: ProgressReporter
) -> list[BuildOutcome]:
    outcomes = []
    for number, origin in enumerate(origins, 1):
        reporter.report(
            {"event": "start", "precision": origin.precision, "number": number, "of": len(origins)}
        )
        monitor = reporter.monitor(origin.precision)
        with interruptible(monitor):
            outcomes.append(
                task.build(origin, force=options.force, keep=not options.compile_only, monitor=monitor)
            )
    return outcomes


def _print(console: Console, task: BuildTask, outcomes: Sequence[BuildOutcome], command: str) -> None:
    manifest = task.bundle.manifest
    table = Table(title=f"{manifest.name} {manifest.version}, {task.trt.flavour} {task.trt.version}")
    for heading in ("", "state", "MB", "s", "kernels", "MHA", "INT8", "rel. L2", "ms by batch size"):
        table.add_column(heading)
    for outcome in outcomes:
        state = outcome.state if outcome.state in SHORT else "dropped" if outcome.dropped else "no"
        table.add_row(outcome.origin.precision, state, *_cells(outcome.record))
    console.print(table)
    for outcome in outcomes:
        if outcome.state not in SHORT:
            remedy = "" if outcome.dropped else f"; build it with {command}"
            hint = f"{outcome.origin.precision}: {outcome.state}{remedy}"
            console.print(hint, soft_wrap=True, highlight=False)


def _cells(record: Mapping[str, Any]) -> list[str]:
    """Return an engine's row of the table: fused attention kernels under MHA, folded products under INT8."""
    if not record:
        return []
    fusion = record["fusion"]
    cells = [f"{record['bytes'] / 1e6:.1f}", f"{record['seconds']:.1f}"]
    cells += [str(fusion[name]) for name in ("kernels", "attention", "int8_matmuls")]
    if record["executed"]:
        times = " ".join(f"{size}:{value:.2f}" for size, value in record["milliseconds"].items())
        cells += [f"{max(band['relative_l2'] for band in record['error']):.1e}", times]
    return cells


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_line("export.trt"), description="Build TensorRT engines of a bundle's backbone."
    )
    add = parser.add_argument
    add("bundle", type=named_path)
    add("--precision", action="append", choices=tuple(GRAPHS), help="repeat for more; default: half")
    add("--all", action="store_true", help="every precision the bundle has a graph for")
    add("--engines", type=named_path, help="folder of the engines; default: the bundle's own")
    add("--backend", choices=("auto", *FLAVOURS), default="auto")
    add("--target", action="append", default=[], metavar="SM", help="compile for sm89, … (tensorrt_rtx)")
    add("--buckets", type=_sizes, default=BUCKETS, metavar="1,2,4", help="batch sizes that will be served")
    add("--profiles", type=positive, default=1, help="optimisation profiles to spread the buckets over")
    add("--level", type=int, choices=range(6), help="optimisation level")
    add("--workspace-mib", type=positive)
    add("--tf32", action="store_true", help="allow TF32 in fp32 parts")
    add("--force", action="store_true", help="build even if the engine is fresh")
    add("--keep-int8", action="store_true", help="keep INT8 though it is no faster than half precision")
    add("--check", action="store_true", help="build nothing; 1 if an engine is missing or stale")
    add("--compile-only", action="store_true", help="compile and keep nothing")
    add("--progress", choices=("bars", "json"), default="bars", help="json: an event a line on stdout")
    add("--wait", action="store_true", help="wait for another process that builds there")
    add("--verbose", action="store_true", help="print TensorRT's log after an error")
    options = parser.parse_args(arguments)
    once = ("--check", "--force", "--compile-only", "--wait", "--verbose")
    kept = [argument for argument in arguments if argument not in once]
    options.command = f"{command_line('export.trt')} {shlex.join(kept)}"
    return options


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(positive(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of batch sizes such as 1,2,4") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
