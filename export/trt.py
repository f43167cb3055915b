"""`python -m export.trt BUNDLE`: TensorRT engines of a bundle's backbone, built once per model and GPU.

Engines are kept in the bundle under the GPU and TensorRT version and rebuilt only when something they depend on changed. On a GPU
each is then run against the fp32 graph and timed; one that is wrong is not kept, nor INT8 that is no faster. `--check` builds
nothing and tells; `--compile-only` compiles and keeps nothing. Ctrl-C stops a build cleanly.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ditserve.export.errors import ExportError
from ditserve.export.tensorrt.build import (
    BuildCancelled,
    BuildError,
    BuildOptions,
    build_engine,
    profiles_for,
)
from ditserve.export.tensorrt.engine_run import EngineRun
from ditserve.export.tensorrt.engines import amend, drop, find_device, recorded, store, timing_cache
from ditserve.export.tensorrt.fusion import fusion_of
from ditserve.export.tensorrt.module import FLAVOURS, TensorRt, load_trt
from ditserve.export.tensorrt.progress import Cancellable, Progression, bars, interruptible, lines
from ditserve.export.tensorrt.trial import FASTER, Reference, reference_of, speedup, try_engine
from ditserve.export.verify import CALIBRATION
from ditserve.model.spec.bundle import Bundle, BundleError
from ditserve.model.spec.engine_cache import FOLDER, GRAPHS, CachedEngine, EngineOrigin, engine_origin

BUCKETS = (1, 2, 4, 8, 16, 32)
HALVES = ("fp16", "bf16")
SHORT = ("fresh", "built", "compiles")  # states that need no explanation
STALE, REFUSED, CANCELLED = 1, 2, 130


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one precision, and the record of its engine where there is one."""

    origin: EngineOrigin
    state: str  # "fresh", "built", "compiles", "dropped: …", or why the engine must not be loaded
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """Builds of one command: where the engines go, and how they are made."""

    trt: TensorRt
    bundle: Bundle
    engines: Path
    options: BuildOptions
    buckets: tuple[int, ...] = BUCKETS  # batch sizes to be timed at

    def check(self, origin: EngineOrigin) -> Outcome:
        """Whether the engine may be loaded, without building."""
        slot = CachedEngine.of(self.engines, origin)
        problem = slot.problem(origin, recorded(self.options))
        return Outcome(origin, problem or "fresh", _record(slot) if problem is None else {})

    def make(
        self,
        origin: EngineOrigin,
        *,
        force: bool = False,
        keep: bool = True,
        monitor: Cancellable | None = None,
    ) -> Outcome:
        """Build one engine unless a fresh one is there; `keep=False` compiles only.

        Raises:
            BuildError, BuildCancelled: see `build_engine`; what was there before stays.
        """
        slot = CachedEngine.of(self.engines, origin)
        found = self.check(origin)
        if keep and not force and found.state == "fresh":
            return found
        cache = timing_cache(slot) if keep else b""
        built = build_engine(
            self.trt, self.bundle.file(origin.graph), self.options, timing_cache=cache, monitor=monitor
        )
        facts = {"fusion": fusion_of(built.plan).as_dict(), "executed": False}
        if not keep:
            sizes = {"bytes": len(built.plan), "seconds": built.seconds}
            return Outcome(origin, "compiles", {**sizes, **facts})
        store(slot, origin, self.options, built, facts)
        return Outcome(origin, "built", _record(slot))

    def try_out(self, outcome: Outcome, reference: Reference) -> Outcome:
        """Run an engine that has not been run yet, and put what was measured into its record.

        Raises:
            ExportError: it is off by more than its precision may be; it is then removed.
        """
        if outcome.record["executed"]:
            return outcome
        slot, precision = CachedEngine.of(self.engines, outcome.origin), outcome.origin.precision
        engine = EngineRun(self.trt, slot.engine.read_bytes())
        try:
            amend(slot, try_engine(engine, precision, reference, self.buckets))
        except ExportError:
            drop(slot)
            raise
        finally:
            engine.close()
        return replace(outcome, record=_record(slot))

    def weigh(self, outcomes: Sequence[Outcome], *, keep: bool) -> list[Outcome]:
        """Remove an INT8 engine that is not faster than half precision, unless it is to be kept."""
        times = {
            each.origin.precision: each.record["milliseconds"]
            for each in outcomes
            if "milliseconds" in each.record
        }
        half = next((times[name] for name in HALVES if name in times), None)
        if keep or half is None or "int8" not in times:
            return list(outcomes)
        ratio = speedup(half, times["int8"])
        if ratio >= FASTER:
            return list(outcomes)
        why = f"dropped: {ratio:.2f} times as fast as half precision, {FASTER} is asked for: --keep-int8 keeps it"
        for each in outcomes:
            if each.origin.precision == "int8":
                drop(CachedEngine.of(self.engines, each.origin))
        return [replace(each, state=why) if each.origin.precision == "int8" else each for each in outcomes]


def _record(slot: CachedEngine) -> Mapping[str, Any]:
    record: Mapping[str, Any] = json.loads(slot.record.read_text())
    return record


def precisions(bundle: Bundle, asked: Sequence[str], *, every: bool) -> list[str]:
    """Which to build: those asked for, or half precision; with INT8 always half precision, which it must beat."""
    present = [name for name in (*HALVES, "int8") if GRAPHS[name][0] in bundle.manifest.files]
    chosen = present if every else list(asked) or present[:1] or ["fp16"]
    halves = [name for name in present if name in HALVES][:1]
    return [*halves, *chosen] if "int8" in chosen and not set(chosen) & set(HALVES) else chosen


def main(arguments: list[str]) -> int:
    """Command line; 0 done, 1 `--check` found an engine missing or stale, 2 refused with one sentence, 130 cancelled."""
    options = _parse(arguments)
    log: Sequence[str] = ()
    progress = {"bars": lambda: bars(Console(stderr=True)), "json": lines}[options.progress]
    with progress() as progression:
        try:
            return _run(options, progression)
        except BuildCancelled as error:
            status, message = CANCELLED, str(error)
        except (ExportError, BundleError, OSError) as error:
            status, message = REFUSED, str(error)
            if isinstance(error, BuildError) and options.verbose:
                log = error.log
        progression.tell({"event": "failed", "error": message})
    print(f"export.trt: {message}", *log, sep="\n", file=sys.stderr)
    return status


def _run(options: argparse.Namespace, progression: Progression) -> int:
    bundle = Bundle.open(options.bundle)
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
    job = Job(trt, bundle, options.engines or bundle.path / FOLDER, build, options.buckets)
    origins = [
        engine_origin(bundle, name, GRAPHS[name][0], flavour=trt.flavour, version=trt.version, device=device)
        for name in precisions(bundle, options.precision or (), every=options.all)
    ]
    if options.check:
        outcomes = [job.check(origin) for origin in origins]
    else:
        runs = not (options.target or options.compile_only)
        if runs:
            bundle.file(CALIBRATION)  # before hours of building
        outcomes = _build(job, origins, options, progression)
        if runs and not all(outcome.record["executed"] for outcome in outcomes):
            reference = reference_of(bundle)
            outcomes = [job.try_out(outcome, reference) for outcome in outcomes]
        outcomes = job.weigh(outcomes, keep=options.keep_int8)
    for outcome in outcomes:
        done = {"state": outcome.state, "seconds": outcome.record.get("seconds")}
        progression.tell({"event": "done", "precision": outcome.origin.precision, **done})
    _print(Console(stderr=True), job, outcomes, options.command)
    return STALE if options.check and any(outcome.state != "fresh" for outcome in outcomes) else 0


def _build(
    job: Job, origins: Sequence[EngineOrigin], options: argparse.Namespace, progression: Progression
) -> list[Outcome]:
    outcomes = []
    for number, origin in enumerate(origins, 1):
        progression.tell(
            {"event": "start", "precision": origin.precision, "number": number, "of": len(origins)}
        )
        monitor = progression.monitor(origin.precision)
        with interruptible(monitor):
            outcomes.append(
                job.make(origin, force=options.force, keep=not options.compile_only, monitor=monitor)
            )
    return outcomes


def _print(console: Console, job: Job, outcomes: Sequence[Outcome], command: str) -> None:
    manifest = job.bundle.manifest
    table = Table(title=f"{manifest.name} {manifest.version}, {job.trt.flavour} {job.trt.version}")
    for heading in ("", "state", "MB", "s", "kernels", "MHA", "INT8", "rel. L2", "ms by batch size"):
        table.add_column(heading)
    for outcome in outcomes:
        state = outcome.state if outcome.state in SHORT else "dropped" if _dropped(outcome) else "no"
        table.add_row(outcome.origin.precision, state, *_cells(outcome.record))
    console.print(table)
    for outcome in outcomes:
        if outcome.state not in SHORT:
            remedy = "" if _dropped(outcome) else f"; build it with {command}"
            hint = f"{outcome.origin.precision}: {outcome.state}{remedy}"
            console.print(hint, soft_wrap=True, highlight=False)


def _dropped(outcome: Outcome) -> bool:
    return outcome.state.startswith("dropped")


def _cells(record: Mapping[str, Any]) -> list[str]:
    """What is known of an engine, as the table shows it: fused attention kernels under MHA, folded products under INT8."""
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
        prog="python -m export.trt", description="Build TensorRT engines of a bundle's backbone."
    )
    add = parser.add_argument
    add("bundle", type=Path)
    add("--precision", action="append", choices=tuple(GRAPHS), help="repeat for more; default: half")
    add("--all", action="store_true", help="every precision the bundle has a graph for")
    add("--engines", type=Path, help="folder of the engines; default: the bundle's own")
    add("--backend", choices=("auto", *FLAVOURS), default="auto")
    add("--target", action="append", default=[], metavar="SM", help="compile for sm89, … (tensorrt_rtx)")
    add("--buckets", type=_sizes, default=BUCKETS, metavar="1,2,4", help="batch sizes that will be served")
    add("--profiles", type=int, default=1, help="optimisation profiles to spread the buckets over")
    add("--level", type=int, choices=range(6), help="optimisation level")
    add("--workspace-mib", type=int)
    add("--tf32", action="store_true", help="allow TF32 in fp32 parts")
    add("--force", action="store_true", help="build even if the engine is fresh")
    add("--keep-int8", action="store_true", help="keep INT8 though it is no faster than half precision")
    add("--check", action="store_true", help="build nothing; 1 if an engine is missing or stale")
    add("--compile-only", action="store_true", help="compile and keep nothing")
    add("--progress", choices=("bars", "json"), default="bars", help="json: an event a line on stdout")
    add("--verbose", action="store_true", help="print TensorRT's log after an error")
    options = parser.parse_args(arguments)
    passing = ("--check", "--force", "--compile-only", "--verbose")
    options.command = shlex.join(
        ["python", "-m", "export.trt", *(word for word in arguments if word not in passing)]
    )
    return options


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of batch sizes such as 1,2,4") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
