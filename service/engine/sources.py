"""The picture that a sample starts from, as a latent, and the part of it that stays. Pure.

A sample starts at the noise level of its first step with the noise of its seed added to the picture, and not
from noise alone. With a mask the rest of the picture is put back after every step, at the noise level that
the sample has reached and with the same noise; after the last step, clean. Both are arithmetic on one latent,
so a sample's numbers do not depend on the samples beside it. As diffusers' pipelines from picture to picture,
and for inpainting.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.diffusion import Schedule, add_noise

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class SourceLatent:
    """A clean latent (C, H, W), and a mask (1, H, W) in 0..1 of what is repainted; None: all of it."""

    latent: Floats
    mask: Floats | None = None


@dataclass(frozen=True, slots=True, eq=False)
class NoisySource:
    """A source with the noise (C, H, W) of one seed, for a sample that walks by `schedule`."""

    source: SourceLatent
    noise: Floats
    schedule: Schedule

    def at(self, level: float) -> Floats:
        """Return the latent (C, H, W) of the picture at a noise level."""
        alpha, sigma = np.float32(self.schedule.alpha(level)), np.float32(self.schedule.sigma(level))
        return add_noise(alpha, sigma, self.source.latent, self.noise)

    def keep(self, latent: Floats, level: float) -> Floats:
        """Return a sample's latent (C, H, W) at a noise level with the part that stays put back."""
        mask = self.source.mask
        return latent if mask is None else (1.0 - mask) * self.at(level) + mask * latent
