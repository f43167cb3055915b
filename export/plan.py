"""The price of an export, told before it begins."""

from __future__ import annotations

from dataclasses import dataclass

from ditserve.export.calibrate import TrajectorySettings
from ditserve.model.evaluation.ladder import LadderMeasurement
from ditserve.model.train.loaded_model import LoadedModel

# Passes over the verification rows: one to make them, two for each comparison, one to probe half precision.
PASSES, HALF_PASSES = 5, 3


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """The work of an export.

    `rows` forward rows are verified, of `seconds_per_row` each; `ladder`, unless None, is measured besides.
    """

    rows: int
    seconds_per_row: float
    ladder: LadderMeasurement | None

    def __str__(self) -> str:
        def price(rows: int) -> str:
            return f"{rows:,} forward rows, about {_duration(rows * self.seconds_per_row)}"

        ladder = "no ladder is measured"
        if self.ladder is not None:
            ladder = f"to measure the ladder ({self.ladder.name}) {price(self.ladder.rows)}"
        return f"to verify the graphs {price(self.rows)}; {ladder}"


def verification_rows(model: LoadedModel, settings: TrajectorySettings, *, half: bool) -> int:
    """Return the forward rows that an export verifies its graphs with.

    Six trajectories of 20 steps are 120 rows, and as many under the null condition: 240. With five passes,
    and three for half precision, they are 1,920.
    """
    steps = min(settings.steps, model.manifest.diffusion.timesteps)
    return 2 * settings.samples * steps * (PASSES + HALF_PASSES * half)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
