"""Measure the error of every solver over the number of steps, where the exact answer is known.

    python -m bench.convergence [--bundle model/zoo/emoji64 [--data data/emoji64.npz] [--samples 16]]

The data are Gaussian, so the best network has a closed form and the error of a run is exact
(`bench.convergence.gaussian`). It is measured on a flow and on a variance-preserving process: inside the
noise range, where a solver has its theoretical order, and for whole runs from noise to image. With --bundle,
the solvers also draw pictures of a model, and their distance to its own long run is told. Heun's method is
measured beside the solvers that are served. Writes bench/results/convergence.{json,md,png}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from ditserve.bench import report
from ditserve.bench.convergence.gaussian import inner_error, measured_order, run_error
from ditserve.bench.convergence.pictures import REFERENCE, PictureError, picture_errors
from ditserve.bench.convergence.trials import TRIALS
from ditserve.bench.plots import Panel, draw_panels
from ditserve.model.spec.bundle import write_atomic
from ditserve.model.spec.command_line import named_path, positive
from ditserve.model.spec.diffusion import RectifiedFlow, Schedule, make_schedule
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.grids import even_grid, noise_levels

# By name: the process, and the two levels between which the order is measured. All strides are whole.
PROCESSES = {
    "flow": (Schedule(RectifiedFlow(), "flow", "sigma"), (0.9, 0.1)),
    "variance-preserving": (make_schedule("linear"), (900.0, 100.0)),
}
INNER_STEPS = (5, 10, 20, 40, 80, 160)
# Odd numbers only, which Heun's method has too.
CALLS = (3, 5, 7, 9, 11, 15, 19, 29, 49, 99, 249)
TOLD = (5, 7, 9, 11, 15, 19, 49)
# Of solvers that are the same without ancestral noise, or that draw another picture each time, one is drawn.
PICTURED = tuple(
    trial for trial in TRIALS if trial.name in {"ddim", "dpmpp-2m", "unipc-1", "unipc-2", "heun"}
)
PICTURE_CALLS = (5, 7, 9, 11, 15, 19)

Errors = Mapping[str, Mapping[int, float]]


def inner_errors(process: str) -> Errors:
    """Return the errors inside the noise range by trial and calls of the network."""
    schedule, ends = PROCESSES[process]
    errors: dict[str, dict[int, float]] = {}
    for trial in TRIALS:
        by_calls = errors.setdefault(trial.name, {})
        for steps in INNER_STEPS:
            levels = np.linspace(*ends, steps + 1).tolist()
            by_calls[len(trial.table(levels, schedule)) - 1] = inner_error(trial, levels, schedule)
    return errors


def run_errors(process: str) -> Errors:
    """Return the errors of whole runs by trial and calls of the network, those that a trial affords."""
    schedule, _ = PROCESSES[process]
    errors: dict[str, dict[int, float]] = {}
    for trial in TRIALS:
        for calls in CALLS:
            levels = noise_levels(even_grid(schedule), trial.grid_steps(calls), schedule)
            errors.setdefault(trial.name, {})[calls] = run_error(trial, levels, schedule)
    return errors


def order_rows() -> list[list[str]]:
    rows = []
    for trial in TRIALS:
        orders = [
            measured_order(trial, schedule, ends, INNER_STEPS[-1]) for schedule, ends in PROCESSES.values()
        ]
        rows.append([trial.name, str(trial.order), *(f"{order:.2f}" for order in orders)])
    return rows


def error_rows(errors: Errors, calls: Sequence[int]) -> list[list[str]]:
    """Return a row of each trial, the least error of each number of calls in bold."""
    least = {count: min(by_calls[count] for by_calls in errors.values()) for count in calls}
    return [
        [
            name,
            *(f"**{e:.4f}**" if e <= least[n] * 1.00005 else f"{e:.4f}" for n, e in at.items() if n in calls),
        ]
        for name, at in errors.items()
    ]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, marks, *rows)) + "\n"


def score_text(error: PictureError) -> str:
    return "" if error.real is None else f"{error.real:.4f} ± {error.error:.4f}"


def document(runs: Mapping[str, Errors], pictured: Mapping[str, Sequence[PictureError]], command: str) -> str:
    """Return the text of convergence.md."""
    parts = [
        "# Error over steps\n",
        f"Made by `{command}`. Data: normal distributions, whose best network is known.\n",
        "![Error over calls of the network](convergence.png)\n",
        f"## Order\n\nInside the noise range, between {INNER_STEPS[-2]} and {INNER_STEPS[-1]} steps.\n",
        markdown(["solver", "order in theory", *PROCESSES], order_rows()),
    ]
    for process, errors in runs.items():
        told = "Relative error of the standard deviation of the images, by calls of the network"
        parts += [f"## Whole runs: {process}\n\n{told}.\n"]
        parts += [markdown(["solver", *map(str, TOLD)], error_rows(errors, TOLD))]
    if pictured:
        columns = ["solver", *map(str, PICTURE_CALLS)]
        own = {name: {error.calls: error.own for error in errors} for name, errors in pictured.items()}
        told = f"Distance to the model's own run of {REFERENCE} steps of DDIM, by calls of the network"
        parts += [f"## Pictures of a model\n\n{told}.\n", markdown(columns, error_rows(own, PICTURE_CALLS))]
        scores = [[name, *map(score_text, errors)] for name, errors in pictured.items()]
        told = "Energy score against real pictures, ± the standard error of its difference from the first row"
        parts += [f"{told}.\n", markdown(columns, scores)]
    return "\n".join(parts)


def draw(inner: Mapping[str, Errors], runs: Mapping[str, Errors]) -> None:
    """Draw the errors: a row of panels for each process."""
    rows = []
    for process in PROCESSES:
        panels = (("inside the noise range", inner[process]), ("whole run", runs[process]))
        rows.append(
            [
                Panel(
                    f"{process}, {title}",
                    {name: list(points.items()) for name, points in errors.items() if name != "euler"},
                )
                for title, errors in panels
            ]
        )
    draw_panels(
        rows,
        report.result_path("convergence.png"),
        size=(10, 8),
        legend_columns=4,
        dpi=110,
        x="calls of the network",
        log=True,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("convergence", __doc__)
    parser.add_argument("--bundle", type=named_path, help="a model whose pictures are measured too")
    parser.add_argument("--data", type=named_path, help="the pictures it was trained on, to compare with")
    parser.add_argument("--samples", type=positive, default=16, help="conditions, each drawn twice")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, console, background = parse(arguments), Console(), report.BackgroundLoad()

    def work() -> None:
        if options.data is not None and options.bundle is None:
            raise ModelError("--data compares with the pictures of a model: name it with --bundle")
        torch.set_num_threads(1)
        inner = {process: inner_errors(process) for process in PROCESSES}
        runs = {process: run_errors(process) for process in PROCESSES}
        pictured: dict[str, list[PictureError]] = {}
        if options.bundle is not None:
            measured = picture_errors(
                options.bundle, options.data, PICTURED, PICTURE_CALLS, conditions=options.samples
            )
            total = len(PICTURED) * len(PICTURE_CALLS)
            for name, error in track(
                measured, "drawing pictures", total=total, console=console, transient=True
            ):
                pictured.setdefault(name, []).append(error)
        given = {} if options.bundle is None else vars(options)
        words = [f"--{key} {value}" for key, value in given.items() if value is not None]
        text = document(runs, pictured, " ".join(["python -m bench.convergence", *words]))
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        write_atomic(report.result_path("convergence.md"), text.encode())
        figures = {
            "inside": inner,
            "runs": runs,
            "pictures": {name: [asdict(error) for error in errors] for name, errors in pictured.items()},
        }
        report.save("convergence", options, background, figures)
        draw(inner, runs)

    return report.run_command("convergence", work)


if __name__ == "__main__":
    sys.exit(main())
