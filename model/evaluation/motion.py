"""The motion of generated clips, beside that of the real clips of the same labels.

Figures are of pixels, in steps of 255. A clip that stands still has no change, one that flickers much jerk:

    pixel_change        the mean difference of neighbouring frames, |x_{f+1} − x_f|
    pixel_jerk          the mean change of that difference, |x_{f+2} − 2·x_{f+1} + x_f|
    pixel_motion_error  the mean error of the differences against those of the real clip
    pixel_still_error   the same of a clip without motion: an error above it is worse than none
    pixel_error         the mean error of the frames themselves

A data set has one clip of a name and a skin tone, so that motion can be compared frame by frame; where labels
have several clips, the errors are against one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ditserve.model.data.dataset import Dataset
from ditserve.model.evaluation.measures import REAL
from ditserve.model.evaluation.picture_sets import (
    GENERATED,
    UNSEEN,
    EvaluationPlan,
    generate,
    real_pictures,
)
from ditserve.model.nets.autoencoder import PictureDecoder
from ditserve.model.train.loaded_model import LoadedModel

# From numbers in −1..1 to steps of 255.
STEPS = 127.5


@dataclass(frozen=True, slots=True)
class MotionResult:
    """The figures of each column, and the clips (N, 3, F, H, W): generated, and real ones of their labels."""

    figures: dict[str, dict[str, float]]
    generated: Tensor
    real: Tensor


def measure_motion(
    model: LoadedModel,
    decoder: PictureDecoder,
    dataset: Dataset,
    plan: EvaluationPlan,
    rows: Mapping[str, Sequence[int]],
) -> MotionResult:
    """Generate clips for the examples of `choose_rows`, and compare them with the examples."""
    columns, clips = {}, {}
    for name in (GENERATED, UNSEEN):
        if index := rows.get(name):
            seed = plan.seed if name == GENERATED else plan.seed + len(rows[GENERATED])
            drawn = generate(model, decoder, dataset, index, replace(plan, seed=seed))
            clips[name] = torch.cat(list(drawn)), torch.cat(list(real_pictures(dataset, decoder, index)))
            columns[name] = motion(clips[name][0]) | motion_errors(*clips[name])
    generated, real = clips[GENERATED]
    return MotionResult({**columns, REAL: motion(real)}, generated, real)


def motion(clips: Tensor) -> dict[str, float]:
    """Return the change and the jerk of clips (N, 3, F, H, W); clips of two frames have no jerk."""
    change = clips.diff(dim=2)
    figures = {"pixel_change": _mean(change)}
    return figures if clips.shape[2] < 3 else {**figures, "pixel_jerk": _mean(change.diff(dim=2))}


def motion_errors(clips: Tensor, real: Tensor) -> dict[str, float]:
    """Return the errors of clips (N, 3, F, H, W) against real ones, clip by clip."""
    change = real.diff(dim=2)
    return {
        "pixel_motion_error": _mean(clips.diff(dim=2) - change),
        "pixel_still_error": _mean(change),
        "pixel_error": _mean(clips - real),
    }


def _mean(values: Tensor) -> float:
    return STEPS * float(values.abs().mean())
