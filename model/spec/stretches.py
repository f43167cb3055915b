"""Stretches: the backbones that a trajectory uses, each over a part of the noise range. Pure.

A bundle may hold several backbones of one latent space: its own, lighter ones, and a student that was
distilled with guidance. A rung names one for each noise level (Pan et al., T-Stitch, arXiv:2402.14167).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Stretch:
    """The noise levels from `above` on, up to the stretch before it, and the backbone that denoises them.

    `above` is in 0..1 of the noise range. `backbone` is a name in the bundle, "" is its own one. `row_cost`
    is the work of one of its rows, in rows of the own one. Guidance acts only where the network is `guided`.
    """

    above: float
    backbone: str
    row_cost: float = 1.0
    guided: bool = True


# The rest of the range, and all of it where a rung names no other backbone.
OWN: Final = Stretch(0.0, "")


def stretch_at(stretches: Sequence[Stretch], share: float) -> Stretch:
    """Return the stretch of a noise level at `share` of the range; `stretches` go from noise to picture."""
    return next((stretch for stretch in stretches if share >= stretch.above), OWN)
