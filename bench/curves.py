"""How long a step takes by its rows, on machines that were measured or published, and what a count of steps is worth.

Pure: tables and interpolation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Rung


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of a step at some batch sizes; linear between them and beyond the last two."""

    name: str
    points: tuple[tuple[int, float], ...]
    max_rows: int

    def seconds(self, rows: int) -> float:
        for (less, faster), (more, slower) in pairwise(self.points):
            if rows <= more or more == self.points[-1][0]:
                return faster + (slower - faster) * (rows - less) / (more - less)
        return self.points[0][1]

    @property
    def peak(self) -> float:
        """Most rows a second, over all batch sizes."""
        return max(rows / self.seconds(rows) for rows in range(1, self.max_rows + 1))


CURVES: Mapping[str, Curve] = {
    # Qwen-Image at 512 px, H200, bfloat16, compiled: SGLang pull request 22183.
    "gpu": Curve("gpu", ((1, 0.167), (2, 0.183), (3, 0.186), (4, 0.240), (8, 0.425), (16, 0.832)), 16),
    # A row of 256 tokens keeps two AVX2 cores busy by itself: t = .08 + .92 rows, in units of one step.
    "cpu": Curve("cpu", ((1, 1.0), (16, 0.08 + 0.92 * 16)), 16),
}


def _rungs(solver: str, grid: str, fid: Mapping[int, float]) -> tuple[Rung, ...]:
    return tuple(Rung(f"{solver}-{n}", solver, n, grid, (0.0, 1.0), value) for n, value in fid.items())


# Published FID of DiT-XL/2 256 at guidance 1.5 (L2C, arXiv:2406.01733, table 1; SmoothCache; arXiv:2505.21114, table 2).
_DDIM = _rungs("ddim", "leading", {50: 2.26, 30: 2.66, 25: 2.75, 20: 3.48, 16: 4.68, 12: 7.07, 10: 12.38})
_DPM = _rungs("dpmpp-2m", "uniform-t", {10: 3.23, 9: 3.77, 8: 4.93, 7: 7.62, 6: 14.4})

LADDERS: Mapping[str, Ladder] = {"ddim": Ladder(_DDIM), "dpmpp": Ladder((*_DDIM, *_DPM))}
