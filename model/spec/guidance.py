"""Classifier-free guidance: arithmetic on the outputs of a network, and its weight at each noise level.

Pure: numpy only; no torch, no I/O. `guided` takes numpy arrays and torch tensors alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ditserve.model.spec.diffusion import Array, Schedule
from ditserve.model.spec.stretches import Stretch, stretch_at

# The numbers whose norm guidance leaves as it is in the conditional output: a line of pixels of one channel
# (Lumina-Image 2.0), or the squares of 2 x 2 pixels of all channels that are a token (Qwen-Image).
GuidanceNorm = Literal["line", "token"]


def guided(
    cond: Array, uncond: Array, scale: Any, channels: int | None = None, norm: GuidanceNorm | None = None
) -> Array:
    """Return the output of classifier-free guidance, uncond + scale · (cond - uncond), as a new array.

    `cond` and `uncond` are outputs (B, C, …) of one shape; `scale` is a number or broadcasts against
    them, such as (B, 1, 1, 1). With `channels` = k in 0..C only the first k channels are guided and the
    others are those of `cond`: the published DiT guides 3 of 4. With `norm` the result is scaled to the norm
    of `cond`. Source: Ho & Salimans, arXiv:2207.12598.
    """
    mixed: Array = uncond + scale * (cond - uncond)
    if norm is not None:
        mixed = _with_norms_of(cond, mixed, norm)
    if channels is not None:
        mixed[:, channels:] = cond[:, channels:]
    return mixed


def _with_norms_of(cond: Array, x: Array, over: GuidanceNorm) -> Array:
    """Return `x` (..., C, H, W), scaled to the norms of `cond`."""
    *front, height, width = x.shape
    squares = (*front, height // 2, 2, width // 2, 2)
    shape, axes = (tuple(x.shape), (-1,)) if over == "line" else (squares, (-5, -3, -1))
    parts, wanted = x.reshape(shape), cond.reshape(shape)
    ratio = (wanted**2).sum(axis=axes, keepdims=True) / (parts**2).sum(axis=axes, keepdims=True)
    scaled: Array = (parts * ratio**0.5).reshape(x.shape)
    return scaled


def check_guidance(interval: tuple[float, float], decay: float) -> None:
    """Raise ValueError unless 0 <= low <= high <= 1 for the interval, and |decay| <= 20."""
    low, high = interval
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"a guidance interval must satisfy 0 <= low <= high <= 1, not {interval}")
    if not abs(decay) <= 20.0:
        raise ValueError(f"guidance decay must be in -20..20, not {decay}")


def guidance_weight(
    scale: float,
    level: float,
    schedule: Schedule,
    interval: tuple[float, float] = (0.0, 1.0),
    decay: float = 0.0,
) -> float:
    """Return the guidance scale at a level: scale · exp(-decay · level / span), or 1.0 outside `interval`.

    `interval` is [low, high], inclusive, in shares of the noise range: t / (T - 1), or sigma of a flow
    (Kynkäänniemi et al., arXiv:2404.07724). At weight 1.0 a sample needs no unconditional row. A scale of 1
    is no guidance, whatever the decay. With a positive `decay` noisier samples are guided less, with a
    negative one more. For scale 4, T = 1000, interval (0.2, 0.8) and no decay, the weight is 4 at timestep
    500 and 1 at timesteps 100 and 900.

    Raises:
        ValueError: an interval or decay that `check_guidance` refuses, or a level that is not noisy.
    """
    check_guidance(interval, decay)
    process = schedule.process
    if not process.clean < level <= process.noisiest:
        raise ValueError(
            f"a noise level must be above {process.clean:g} and at most {process.noisiest:g}, not {level}"
        )
    if scale == 1.0 or not interval[0] <= schedule.share(level) <= interval[1]:
        return 1.0
    return float(scale) * math.exp(-decay * level / process.span)


def forward_rows(
    levels: Sequence[float],
    schedule: Schedule,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    decay: float = 0.0,
    *,
    conditions: int = 1,
    stretches: Sequence[Stretch] = (),
) -> float:
    """Return the rows of one picture: at every step one for each condition whose outputs are composed, and
    one more where guidance acts.

    20 steps with guidance in an interval that holds 12 of them are 20 · 1 + 12 = 32 rows of one condition,
    and 20 · 3 + 12 = 72 of three. Rows of other backbones count by their cost, in rows of the model's own.
    """
    rows = 0.0
    for level in levels:
        stretch = stretch_at(stretches, schedule.share(level))
        weight = guidance_weight(scale, level, schedule, interval, decay)
        # As the engine counts, which holds the weights in float32.
        guided = stretch.guided and np.float32(weight) != 1.0
        rows += stretch.row_cost * (conditions + guided)
    return rows
