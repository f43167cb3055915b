"""`python -m model.train.curve RUN`: draw a run's loss, gradient norm, rate and signals as RUN/curve.png."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ditserve.commands import command_line
from ditserve.model.spec.command_line import guarded, named_path
from ditserve.model.train.training_log import LOG, read_log

PANELS = (
    ("loss", ("loss", "smooth_loss"), "log"),
    ("gradient norm", ("grad_norm",), "log"),
    ("learning rate", ("lr",), "linear"),
    ("entropy of attention", ("attention_entropy", "attention_entropy_least"), "linear"),
    ("activations", ("activation_rms", "activation_peak"), "log"),
    ("load of experts", ("router_busiest", "router_left_out", "balance"), "linear"),
)


def draw_curve(folder: Path) -> Path:
    """Draw the log in `folder` into its curve.png, without a display. Return the path of the picture.

    Raises:
        ValueError: there is no log, or it has no lines yet.
    """
    lines = read_log(folder)
    if not lines:
        raise ValueError(
            f"{folder / LOG} has no lines yet: pass the folder of a run that has logged something"
        )
    logged = {key for line in lines for key, value in line.items() if value is not None}
    panels = [panel for panel in PANELS if logged.intersection(panel[1])]
    figure = Figure(figsize=(7, 7 * len(panels) / 3), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, keys, scale) in zip(axes, panels, strict=True):
        for key in logged.intersection(keys):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            faint = key == "loss"
            axis.plot(
                *zip(*points, strict=True),
                marker="." if len(points) < 50 else None,
                label=key,
                linewidth=0.6 if faint else 1.4,
                alpha=0.5 if faint else 1,
            )
        axis.set_yscale(scale)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend(fontsize=7)
    axis.set_xlabel("step")
    target = folder / "curve.png"
    figure.savefig(target, dpi=100)
    return target


def main(arguments: Sequence[str]) -> int:
    """Draw the curve of the run named on the command line. Return 0, or 2 after a mistake."""
    parser = argparse.ArgumentParser(
        prog=command_line("model.train.curve"), description="Draw a training run's curve."
    )
    parser.add_argument("run", type=named_path)
    options = parser.parse_args(arguments)
    return guarded("model.train.curve", lambda: print(f"wrote {draw_curve(options.run)}"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
