"""A block cache: the first blocks of a DiT run at some steps only. Pure.

At the steps between, what they change of the tokens is not computed but extrapolated linearly from the last
two times that it was (Δ-DiT, Chen et al., arXiv:2406.01125; TaylorSeer, Liu et al., arXiv:2503.06923).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, cast

from pydantic import Field

from ditserve.model.spec.diffusion import Array
from ditserve.model.spec.diffusion_spec import StrictModel


class BlockCache(StrictModel):
    """The first `blocks` blocks run at every `every`-th step."""

    blocks: Annotated[int, Field(ge=1, le=1000)]
    every: Annotated[int, Field(ge=2, le=16)]

    def is_due(self, since: int) -> bool:
        """Return whether the blocks run at a step, the `since`-th one since the cache was empty."""
        return since % self.every == 0

    def row_cost(self, trunk: float, tail: float) -> float:
        """Return the mean cost of a row whose first blocks cost `trunk`, and the rest of it `tail`."""
        return trunk / self.every + tail


def extrapolated(known: Sequence[tuple[int, Array]], step: int) -> Array:
    """Return the change at a step, on the line through the last two `known`, (step, change) each.

    Of one change alone it is that. Example: 1.0 at step 0 and 2.0 at step 2 are 2.5 at step 3.
    """
    last, change = known[-1]
    if len(known) == 1:
        return change
    earlier, other = known[-2]
    return cast(Array, change + (change - other) * ((step - last) / (last - earlier)))
