"""The price of an export, told before it begins."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ditserve.export.calibrate import TrajectorySettings
from ditserve.export.errors import ExportError
from ditserve.model.evaluation.ladder import LadderMeasurement
from ditserve.model.spec.heap import memory_bytes
from ditserve.model.spec.network_config import NetworkConfig
from ditserve.model.train.loaded_model import LoadedModel

# Passes over the verification rows: to make them, with the weights as given and as stored, twice to expect
# and verify; to probe half precision and to verify it.
PASSES, HALF_PASSES = 5, 2
# A row is expected and computed, and both are laid side by side to be compared.
COPIES = 4
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
            ladder = f"to measure the ladder ({self.ladder.name}) {price(round(self.ladder.rows))}"
        memory = f"at most about {self.peak_bytes / 1e9:.1f} GB of memory"
        return f"to verify the graphs {price(self.rows)}; {ladder}; {memory}"


def verification_rows(model: LoadedModel, settings: TrajectorySettings) -> int:
    """Return the rows that an export verifies its graphs with.

    Six trajectories of 20 steps are 120 rows, and as many under the null condition: 240.

    Raises:
        ExportError: this machine has not the memory for them.
    """
    rows = 2 * settings.samples * min(settings.steps, model.schedule.max_steps)
    needed, memory = rows * row_bytes(model.network.config), memory_bytes()
    if needed > memory:
        raise ExportError(
            f"{rows:,} rows to verify take {needed / 2**30:,.0f} GiB, and this machine has "
            f"{memory / 2**30:,.0f}: lower --samples or --steps"
        )
    return rows


def forward_rows(model: LoadedModel, settings: TrajectorySettings, *, half: bool) -> int:
    """Return the forward rows of an export: all passes over the verification rows.

    240 rows are passed five times, and seven times with half precision: 1,680.
    """
    return verification_rows(model, settings) * (PASSES + HALF_PASSES * half)


def row_bytes(config: NetworkConfig) -> int:
    """Return the bytes of a verification row, which has a condition state, beside the copies that compare it.

    A DiT-XL/2 of 256 px has a state of 774 kB and latents of 49 kB, of which four copies are 3.3 MB.
    """
    numbers = (config.in_channels + config.out_channels) * math.prod(config.image_size)
    return 4 * COPIES * (numbers + sum(math.prod(shape) for _, shape in config.state()))


def peak_bytes(model: LoadedModel, settings: TrajectorySettings) -> float:
    """Return an upper bound of the memory that an export takes.

    It is that of the libraries, of the weights in fp32 with the copies that the runtime makes while it opens
    a graph, and of the rows. For the 2.7 GB of a DiT-XL/2 and 240 rows: 0.65 + 1.5 · 2.7 + 0.8 = 5.5 GB.
    """
    weights = sum(parameter.numel() * 4 for parameter in model.network.parameters())
    rows = verification_rows(model, settings) * row_bytes(model.network.config)
    return LIBRARIES + 1.5 * weights + rows


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
