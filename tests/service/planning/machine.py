"""A ladder and a machine to plan on."""

from __future__ import annotations

from hypothesis import settings

from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Rung

quick = settings(max_examples=30, deadline=None)  # wall time says nothing on a shared machine

WHOLE = (0.0, 1.0)
FID = {50: 2.26, 30: 2.66, 20: 3.48, 16: 4.68, 12: 7.07, 10: 12.38}
LADDER = Ladder([Rung(f"ddim-{n}", "ddim", n, "trailing", WHOLE, fid) for n, fid in FID.items()])
BY_STEPS = {rung.steps: rung for rung in LADDER.rungs}
MAX_ROWS = 8


def line() -> CostModel:
    """One second a step of one row, .1 for every row more: batches of 8 are worth running."""
    return CostModel(fixed_s=0.9, per_row_s=0.1)
