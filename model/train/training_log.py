"""The log of a training run: a progress bar, lines of log.jsonl, and TensorBoard if asked for."""

from __future__ import annotations

import json
import math
import os
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ditserve.model.spec.bundle import write_atomic
from ditserve.model.train.checkpoint import TrainingState
from ditserve.model.train.run_config import RunConfig

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None  # type: ignore[assignment, misc]

LOG = "log.jsonl"
# Decay of the smoothed loss, per step.
SMOOTHING = 0.98


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log; a line that was cut short is left out."""
    lines = []
    for text in (folder / LOG).read_text().splitlines() if (folder / LOG).is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


class TrainingLog:
    """The log of one run, from `state.step` on.

    Later lines, of a run that was killed or rolled back, are dropped. Of several processes, the first one
    writes the log.

    Raises:
        ValueError: TensorBoard is asked for and not installed.
        OSError: the folder cannot be written.
    """

    def __init__(self, config: RunConfig, state: TrainingState) -> None:
        if config.tensorboard and SummaryWriter is None:
            raise ValueError(
                "tensorboard is not installed: pip install tensorboard, or leave tensorboard out"
            )
        self.config, self.folder = config, config.output
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.progress = Progress(*columns)
        self.task = self.progress.add_task("train", total=config.steps, completed=state.step, note="")
        self.writes = state.parallel.world.is_first
        board = config.tensorboard and self.writes
        self.board = SummaryWriter(str(self.folder / "tensorboard")) if board else None
        self.rewind(state.step)

    def rewind(self, step: int) -> None:
        """Drop the lines logged after `step`."""
        kept = [line for line in read_log(self.folder) if line["step"] <= step]
        if self.writes:
            write_atomic(self.folder / LOG, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.smooth: float | None = kept[-1].get("smooth_loss") if kept else None
        self.last_step, self.last_line, self.last_place = -1, dict[str, float | None](), 0
        self.since, self.images = time.monotonic(), 0

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if self.board is not None:
            self.board.close()

    def print(self, sentence: str) -> None:
        """Print a sentence above the progress bar."""
        self.progress.console.print(sentence, highlight=False, soft_wrap=True)

    def record(self, state: TrainingState, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a step; write a line every `log_every` steps and after the last one."""
        if not self.writes:
            return
        loss = metrics["loss"]
        if math.isfinite(loss):
            self.smooth = loss if self.smooth is None else SMOOTHING * self.smooth + (1 - SMOOTHING) * loss
        self.images += self.config.batch
        if state.step % self.config.log_every and state.step < self.config.steps:
            return
        rate = self.images / (time.monotonic() - self.since)
        self.since, self.images = time.monotonic(), 0
        self.progress.update(self.task, completed=state.step, note=_note(self.smooth, metrics, rate, state))
        line = {
            **metrics,
            "smooth_loss": self.smooth,
            "images_per_s": round(rate, 1),
            "skipped": state.skipped,
            "rollbacks": state.rollbacks,
            "scale": state.scaler.get_scale(),
            "peak_memory_mib": round(peak_memory(self.config.device) / 2**20),
        }
        self._write(state.step, line)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Add figures that are not measured at every step to the line of `step`, or make it one."""
        if not (self.writes and figures):
            return
        self._write(step, figures if step == self.last_step else {**figures, "smooth_loss": self.smooth})

    def _write(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Write a line, or the last one again with more figures if it is of this step."""
        finite = {
            key: value if value is not None and math.isfinite(value) else None
            for key, value in figures.items()
        }
        again = step == self.last_step
        line = {**(self.last_line if again else {}), **finite}
        with (self.folder / LOG).open("r+") as log:
            self.last_place = log.seek(self.last_place if again else 0, os.SEEK_SET if again else os.SEEK_END)
            log.write(json.dumps({"step": step, **line}) + "\n")
        self.last_step, self.last_line = step, line
        if self.board is not None:
            for key, value in finite.items():
                if value is not None:
                    self.board.add_scalar(key, value, step)


def _note(smooth: float | None, metrics: Mapping[str, float], rate: float, state: TrainingState) -> str:
    loss = "" if smooth is None else f"loss {smooth:.4f}  "
    skipped = f"  {state.skipped} skipped" if state.skipped else ""
    return f"{loss}grad {metrics['grad_norm']:.2f}  {rate:.0f} img/s{skipped}"


def peak_memory(device: str) -> int:
    """Return the most bytes this process has held: on the GPU if it trains on one, else in main memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # ru_maxrss is in KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
