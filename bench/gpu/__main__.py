"""Measure all that a GPU is asked for, in minutes: peak, correctness, steps, the service, and training.

    python -m bench.gpu --all --minutes 9 --out FOLDER [--bundle model/zoo/emoji64]
    python -m bench.gpu steps service --out FOLDER
    python -m bench.gpu --all --toy --out FOLDER        tries every part on the CPU, at the size of a toy

Each part runs in a process of its own under a limit of its own, and what it lacks is told. A part that has
its result is not run again, and one that ended before goes on where it was: run the same command again. Needs
torch; every further package is for the parts that use it. Writes FOLDER/gpu.json and gpu.md, and a JSON file
and a log for each part.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from ditserve.bench.gpu.markdown import report
from ditserve.bench.gpu.part_process import MeasuredSetting, run_part
from ditserve.bench.gpu.result_files import PartResult, read_part, write_text
from ditserve.commands import command_line
from ditserve.model.spec.zoo import BENCHMARKED, TINY

try:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError:
    # Progress is told line by line.
    Progress = None  # type: ignore[assignment,misc]

# Part → its share of the time, in the order in which they run. What one leaves is there for the next.
PARTS = {
    "device": 2,
    "correctness": 5,
    "attention": 2,
    "steps": 14,
    "host": 3,
    "service": 18,
    "training": 6,
    "graphs": 10,
}
LEAST_S = 5.0  # less is not worth the start of a process
INTERRUPTED = 130
_DEVICE = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"

Tell = Callable[[str], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for.

    Return 0 if all are done, 1 if some are not or
    something is wrong, 2 after a mistake.
    """
    options = parse(arguments)
    # Whoever ends this command ends its parts.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        setting = _setting(options)
        results = _run_all(setting, options.parts, 60 * options.minutes)
    except (OSError, ValueError) as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.gpu: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    unfinished = [f"{result.part}: {result.status}" for result in results if not result.done]
    print(f"wrote {setting.out / 'gpu.md'} and {setting.out / 'gpu.json'}")
    if unfinished:
        print("not all is done: " + "; ".join(unfinished) + ". The same command goes on from here.")
    wrong = [name for result in results for name in result.wrong]
    if wrong:
        print("wrong: " + "; ".join(wrong))
    return 1 if unfinished or wrong else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary = " ".join((__doc__ or "").partition("\n\n")[0].split())
    parser = argparse.ArgumentParser(prog=command_line("bench.gpu"), description=summary)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--all", action="store_true", help="every part")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--bundle", type=Path, help="the model that is served; default: the shipped one")
    parser.add_argument("--toy", action="store_true", help="on the CPU, tiny: whether the parts work")
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}: choose among {', '.join(PARTS)}")
    if options.all == bool(options.parts):
        parser.error("name the parts to run, or --all")
    if options.minutes <= 0:
        parser.error("--minutes must be positive")
    options.parts = [part for part in PARTS if options.all or part in options.parts]
    return options


def _setting(options: argparse.Namespace) -> MeasuredSetting:
    """Return what is measured on what. Raise `ValueError` if that is not there."""
    bundle = options.bundle or (TINY if options.toy else BENCHMARKED)
    manifest = bundle / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"{bundle} is no bundle: it has no manifest.json")
    device = "cpu" if options.toy else "cuda"
    name = "cpu" if options.toy else _gpu_name()
    try:
        version = str(json.loads(manifest.read_text())["version"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{manifest} cannot be read: it names no version of a model") from None
    identity = {"device": name, "bundle": f"{bundle.resolve().name} {version}"}
    options.out.mkdir(parents=True, exist_ok=True)
    return MeasuredSetting(options.out, device, bundle, options.toy, identity)


def _gpu_name() -> str:
    """Return the name of the GPU that torch uses. Raise `ValueError` if there is none."""
    answer = subprocess.run([sys.executable, "-c", _DEVICE], capture_output=True, text=True, check=False)
    if answer.returncode:
        reason = (answer.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise ValueError(f"torch cannot be used: {reason}")
    if not (name := answer.stdout.strip()):
        raise ValueError("torch sees no CUDA device; --toy tries the parts on the CPU")
    return name


def _run_all(setting: MeasuredSetting, parts: Sequence[str], seconds: float) -> list[PartResult]:
    """Run the parts one after the other, each for its share of the time that is left."""
    end, results = time.monotonic() + seconds, list[PartResult]()
    for number, part in enumerate(parts):
        left_s = end - time.monotonic()
        limit_s = left_s * PARTS[part] / sum(PARTS[name] for name in parts[number:])
        known = read_part(setting.out, part, setting.identity)
        if known.done:
            print(f"{part}: has its result")
        elif limit_s < LEAST_S:
            known.status = "no time was left"
        else:
            with _progress(part, limit_s) as tell:
                known = run_part(part, setting, limit_s, on_point=tell)
            print(f"{part}: {known.status}, {len(known.points)} points, {known.seconds:.0f} s")
            for name, reason in known.errors.items():
                print(f"  {name}: {reason}")
        results.append(known)
        _write(setting)
    return results


def _write(setting: MeasuredSetting) -> None:
    """Write what all parts have found so far, also in earlier runs."""
    results = [read_part(setting.out, part, setting.identity) for part in PARTS]
    whole = {"setting": dict(setting.identity), "parts": {r.part: asdict(r) for r in results}}
    write_text(setting.out / "gpu.json", json.dumps(whole, indent=1) + "\n")
    write_text(setting.out / "gpu.md", report(results, setting.identity))


@contextmanager
def _progress(part: str, limit_s: float) -> Iterator[Tell]:
    """Show the points of a part: on a bar of its time, or as lines where there is no terminal, or no rich."""
    if Progress is None or not sys.stderr.isatty():
        print(f"{part}: at most {limit_s:.0f} s", flush=True)
        yield lambda point: print(f"  {part}: {point}", flush=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(part, total=limit_s)
        yield lambda point: bar.update(
            task, description=f"{part}: {point}", completed=bar.tasks[task].elapsed or 0.0
        )


if __name__ == "__main__":
    sys.exit(main())
