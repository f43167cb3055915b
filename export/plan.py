"""The price of an export, told before it begins."""

from __future__ import annotations

from dataclasses import dataclass

from ditserve.export.calibrate import TrajectorySettings
from ditserve.model.evaluation.ladder import LadderMeasurement
from ditserve.model.train.loaded_model import LoadedModel

# Passes over the verification rows: to make them, with the weights as given and as stored, twice to expect
# and verify; to probe half precision and to verify it.
PASSES, HALF_PASSES = 5, 2
# Bytes of the libraries that an export loads, and of what they hold while they trace a graph.
LIBRARIES = 0.65e9


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """The work of an export.

    `rows` forward rows are verified, of `seconds_per_row` each; `ladder`, unless None, is measured besides.
    `peak_bytes` is the most memory that it takes.
    """

    rows: int
    seconds_per_row: float
    peak_bytes: float
    ladder: LadderMeasurement | None

    def __str__(self) -> str:
        def price(rows: int) -> str:
            return f"{rows:,} forward rows, about {_duration(rows * self.seconds_per_row)}"

        ladder = "no ladder is measured"
        if self.ladder is not None:
            ladder = f"to measure the ladder ({self.ladder.name}) {price(self.ladder.rows)}"
        memory = f"at most about {self.peak_bytes / 1e9:.1f} GB of memory"
        return f"to verify the graphs {price(self.rows)}; {ladder}; {memory}"


def verification_rows(model: LoadedModel, settings: TrajectorySettings, *, half: bool) -> int:
    """Return the forward rows that an export verifies its graphs with.

    Six trajectories of 20 steps are 120 rows, and as many under the null condition: 240. With five passes,
    and two for half precision, they are 1,680.
    """
    steps = min(settings.steps, model.schedule.max_steps)
    return 2 * settings.samples * steps * (PASSES + HALF_PASSES * half)


def peak_bytes(model: LoadedModel, *, half: bool) -> float:
    """Return an upper bound of the memory that an export takes.

    It is that of the libraries, of the weights in fp32, and of a copy in half precision, or of the copies
    that the runtime makes while it opens a graph. For the 2.7 GB of a DiT-XL/2: 0.65 + 1.6 · 2.7 = 5.0 GB.
    """
    weights = sum(parameter.numel() * 4 for parameter in model.network.parameters())
    return LIBRARIES + (1.6 if half else 1.4) * weights


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
