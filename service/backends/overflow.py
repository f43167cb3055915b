"""The overflow probe: a short run of a network in half precision, before anybody is served.

fp16 ends at 65504, and the residuals of some text-to-image networks go beyond it. Such a network draws black
or noisy pictures, without an error.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np

from ditserve.model.spec.grids import even_grid, noise_levels
from ditserve.model.spec.solvers import step_table, trajectory
from ditserve.service.backends import Backend, BackendUnavailable, Floats

# Over the whole range of noise.
STEPS: Final = 4
# The empty one is that which guidance subtracts.
PROMPTS: Final = ("a red fox in the snow", "")
REMEDIES: Final = {"fp16": "bf16 or fp32", "bf16": "fp32"}


def refuse_overflow(backend: Backend) -> None:
    """Draw from two prompts in a few unguided steps with an imported pipeline, and count what is not finite.

    Raises:
        BackendUnavailable: there is such a number; the message names the precisions to choose.
    """
    manifest, encoder = backend.manifest, backend.text_encoder
    assert encoder is not None
    texts = np.stack([encoder.encode(prompt) for prompt in PROMPTS])
    embeddings = backend.embed(np.zeros((len(texts), 0), np.int64), texts)
    if manifest.guidance_embedded is not None:
        embeddings[:, -1] = manifest.guidance_embedded
    config, schedule = manifest.config, manifest.diffusion.noise_schedule()

    def denoised(x: Floats, level: float) -> Floats:
        told = np.full(len(x), schedule.told(level), np.float32)
        output = backend.denoise(x.astype(np.float32), backend.modulate(told, embeddings))
        wrong = output.size - int(np.isfinite(output).sum())
        if wrong:
            raise BackendUnavailable(
                f"{manifest.name} overflows in {backend.precision}: at noise level {level:.3g}, {wrong:,} of "
                f"{output.size:,} numbers are not finite; choose --precision {REMEDIES[backend.precision]}"
            )
        return output[:, : config.in_channels]

    shape = (len(texts), config.in_channels, *config.image_size)
    start = np.random.Generator(np.random.Philox(0)).standard_normal(shape, np.float32)
    levels = noise_levels(even_grid(schedule), min(STEPS, schedule.max_steps), schedule)
    deque(trajectory(step_table("ddim", levels, schedule), start, denoised), maxlen=0)
