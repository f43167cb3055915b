"""The picture that a sample starts from, as a latent, and the part of it that stays. Pure.

A sample starts at the noise level of its first step with the noise of its seed added to the picture, and not
from noise alone. With a mask the rest of the picture is put back after every step, at the noise level that
the sample has reached and with the same noise; after the last step, clean. Both are what diffusers' pipelines
from picture to picture, and for inpainting, do. Arrays are of numpy or tensors of torch. All arithmetic is
element by element, so that a sample's numbers do not depend on the samples beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Generic

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.diffusion import Array, Schedule, add_noise

Floats = npt.NDArray[np.float32]

# The strength where none is said.
DEFAULT_STRENGTH: Final = 0.8


def walked_steps(steps: int, strength: float) -> int:
    """Return how many of a run's steps, the last ones, are walked from a picture: the share, rounded up.

    diffusers' pipelines from picture to picture count in the same way: 10 steps at 0.55 are 6.
    """
    return max(1, steps - int(steps - steps * strength))


@dataclass(frozen=True, slots=True, eq=False)
class SourceLatent(Generic[Array]):
    """A clean latent (C, H, W), and a mask (1, H, W) in 0..1 of what is repainted; None: all of it."""

    latent: Array
    mask: Array | None = None


def first_frame(picture: SourceLatent[Floats], frames: int) -> SourceLatent[Floats]:
    """Return the source of a clip (C, F, H, W) that begins with a picture (C, H, W).

    The first frame stays. The others start from the same picture, with the noise that the strength adds: at
    full strength from noise alone.
    """
    latent = np.repeat(picture.latent[:, None], frames, axis=1)
    mask = np.ones((1, *latent.shape[1:]), np.float32)
    mask[:, 0] = 0.0
    return SourceLatent(latent, mask)


@dataclass(frozen=True, slots=True, eq=False)
class NoisySource(Generic[Array]):
    """A source with the noise (…, C, H, W) of a sample, or of several, that walk by `schedule`."""

    source: SourceLatent[Array]
    noise: Array
    schedule: Schedule

    def start(self, level: float, strength: float) -> Array:
        """Return the latent before the first step, at `level`; at full strength it is the noise alone."""
        return self.noise if strength == 1.0 else self._at(level)

    def keep(self, latent: Array, level: float | None) -> Array:
        """Return a latent at a noise level, or a clean one (None), with the part that stays put back."""
        mask = self.source.mask
        if mask is None:
            return latent
        known = self.source.latent if level is None else self._at(level)
        kept: Array = (1.0 - mask) * known + mask * latent
        return kept

    def shares(self, level: float | None) -> tuple[float, float]:
        """Return the shares of the picture and of the noise in what stays at a level, or clean (None)."""
        if level is None:
            return 1.0, 0.0
        return float(self.schedule.alpha(level)), float(self.schedule.sigma(level))

    def _at(self, level: float) -> Array:
        alpha, sigma = self.shares(level)
        return add_noise(alpha, sigma, self.source.latent, self.noise)
