"""`python -m export.trt BUNDLE`: TensorRT engines of a bundle's backbone, built once per model and GPU.

Engines are kept in the bundle under the GPU and TensorRT version and rebuilt only when something they depend on changed. `--check`
builds nothing and tells; `--compile-only` compiles and keeps nothing. Ctrl-C stops a build cleanly.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from export.engines import GRAPHS, Recipe, Slot, find_device, recipe
from export.errors import ExportError
from export.fusion import Fusion, fusion_of
from export.trt_build import BuildCancelled, BuildError, BuildOptions, build_engine, profiles_for
from export.trt_module import FLAVOURS, TensorRt, load_trt
from model.bundle import Bundle, BundleError

BUCKETS = (1, 2, 4, 8, 16, 32)
STALE, REFUSED, CANCELLED = 1, 2, 130


@dataclass(slots=True)
class Bars:
    """A build's phases as nested progress bars; `cancel` makes TensorRT stop at its next step."""

    progress: Progress
    cancelled: bool = False
    tasks: dict[str, TaskID] = field(default_factory=dict)
    depth: dict[str, int] = field(default_factory=dict)

    def cancel(self) -> None:
        self.cancelled = True

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self.depth[phase] = self.depth.get(parent or "", -1) + 1
        if self.depth[phase] < 3:
            self.tasks[phase] = self.progress.add_task("  " * self.depth[phase] + phase[:60], total=steps)

    def step(self, phase: str, step: int) -> bool:
        if phase in self.tasks:
            self.progress.update(self.tasks[phase], completed=step + 1)
        return not self.cancelled

    def finish(self, phase: str) -> None:
        if phase in self.tasks:
            self.progress.remove_task(self.tasks.pop(phase))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one precision."""

    recipe: Recipe
    state: str  # "fresh", "built", "compiles", or why the engine must not be loaded
    megabytes: float | None = None
    seconds: float | None = None
    fusion: Fusion | None = None


def check_engines(bundle: Bundle, recipes: Sequence[Recipe]) -> list[Outcome]:
    """Whether each engine may be loaded, without building."""
    return [Outcome(made, Slot.of(bundle.path, made).problem(made) or "fresh") for made in recipes]


def make_engine(
    trt: TensorRt,
    bundle: Bundle,
    made: Recipe,
    options: BuildOptions,
    *,
    force: bool = False,
    keep: bool = True,
    bars: Bars | None = None,
) -> Outcome:
    """Build one engine unless a fresh one is there; `keep=False` compiles only.

    Raises:
        BuildError, BuildCancelled: see `build_engine`; what was there before stays.
    """
    slot = Slot.of(bundle.path, made)
    if keep and not force and slot.problem(made) is None:
        return Outcome(made, "fresh")
    cache = slot.timing_cache() if keep else b""
    built = build_engine(trt, bundle.file(made.graph), options, timing_cache=cache, monitor=bars)
    fusion = fusion_of(built.plan)
    if keep:
        slot.store(made, built, {"fusion": fusion.as_dict(), "executed": False})
    return Outcome(made, "built" if keep else "compiles", len(built.plan) / 1e6, built.seconds, fusion)


@contextmanager
def interruptible(bars: Bars) -> Iterator[None]:
    """Ctrl-C cancels the build instead of raising inside TensorRT, where the exception would be swallowed."""

    def on_interrupt(_: int, __: FrameType | None) -> None:
        bars.cancel()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def main(arguments: list[str]) -> int:
    """Command line; 0 done, 1 `--check` found an engine missing or stale, 2 refused with one sentence, 130 cancelled."""
    options = _parse(arguments)
    try:
        return _run(options)
    except BuildCancelled as error:
        print(f"export.trt: {error}", file=sys.stderr)
        return CANCELLED
    except (ExportError, BundleError, OSError) as error:
        print(f"export.trt: {error}", file=sys.stderr)
        if isinstance(error, BuildError) and options.verbose:
            print(*error.log, sep="\n", file=sys.stderr)
        return REFUSED


def _run(options: argparse.Namespace) -> int:
    bundle = Bundle.open(options.bundle)
    trt = load_trt(options.backend)
    build = BuildOptions(
        profiles=profiles_for(options.buckets, options.profiles),
        level=options.level,
        workspace_mib=options.workspace_mib,
        tf32=options.tf32,
        targets=tuple(options.target),
    )
    device = find_device(trt, build)
    present = [name for name in ("fp16", "bf16", "int8") if GRAPHS[name][0] in bundle.manifest.files]
    chosen = present if options.all else options.precision or present[:1] or ["fp16"]
    recipes = [recipe(bundle, precision, build, trt, device) for precision in chosen]
    console = Console(stderr=True)
    if options.check:
        outcomes = check_engines(bundle, recipes)
        _print(console, bundle, trt, outcomes, options.command)
        return STALE if any(outcome.state != "fresh" for outcome in outcomes) else 0
    outcomes = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for made in recipes:
            bars = Bars(progress)
            with interruptible(bars):
                keep = not options.compile_only
                outcomes.append(
                    make_engine(trt, bundle, made, build, force=options.force, keep=keep, bars=bars)
                )
    _print(console, bundle, trt, outcomes, options.command)
    return 0


def _print(
    console: Console, bundle: Bundle, trt: TensorRt, outcomes: Sequence[Outcome], command: str
) -> None:
    table = Table(title=f"{bundle.manifest.name} {bundle.manifest.version}, {trt.flavour} {trt.version}")
    for heading in ("precision", "state", "MB", "seconds", "kernels", "fused attention", "INT8 matmuls"):
        table.add_column(heading)
    for outcome in outcomes:
        f = outcome.fusion
        numbers = (outcome.megabytes, outcome.seconds)
        cells = ["" if number is None else f"{number:.1f}" for number in numbers]
        cells += ["", "", ""] if f is None else [str(n) for n in (f.kernels, f.attention, f.int8_matmuls)]
        table.add_row(outcome.recipe.precision, outcome.state, *cells)
    console.print(table)
    for outcome in outcomes:
        if outcome.state not in ("fresh", "built", "compiles"):
            hint = f"{outcome.recipe.precision}: {outcome.state}; build it with {command}"
            console.print(hint, soft_wrap=True, highlight=False)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m export.trt", description="Build TensorRT engines of a bundle's backbone."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--precision",
        action="append",
        choices=tuple(GRAPHS),
        help="repeat for more; default: the half precision",
    )
    parser.add_argument("--all", action="store_true", help="every precision the bundle has a graph for")
    parser.add_argument("--backend", choices=("auto", *FLAVOURS), default="auto")
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="SM",
        help="compile ahead of time for sm89, … (tensorrt_rtx)",
    )
    parser.add_argument(
        "--buckets", type=_sizes, default=BUCKETS, metavar="1,2,4", help="batch sizes that will be served"
    )
    parser.add_argument(
        "--profiles", type=int, default=1, help="optimisation profiles to spread the buckets over"
    )
    parser.add_argument("--level", type=int, choices=range(6), help="optimisation level")
    parser.add_argument("--workspace-mib", type=int)
    parser.add_argument("--tf32", action="store_true", help="allow TF32 in fp32 parts")
    parser.add_argument("--force", action="store_true", help="build even if the engine is fresh")
    parser.add_argument(
        "--check", action="store_true", help="build nothing; 1 if an engine is missing or stale"
    )
    parser.add_argument("--compile-only", action="store_true", help="compile and keep nothing")
    parser.add_argument("--verbose", action="store_true", help="print TensorRT's log after an error")
    options = parser.parse_args(arguments)
    words = [word for word in arguments if word not in ("--check", "--force", "--compile-only", "--verbose")]
    options.command = shlex.join(["python", "-m", "export.trt", *words])
    return options


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of batch sizes such as 1,2,4") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
