"""Windows offline: the blend of the guided outputs of each window, as the service blends them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from ditserve.model.nets.dit import DiT
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance
from ditserve.model.sampling.windows import WindowDenoiser
from ditserve.model.spec.diffusion import RectifiedFlow, Schedule, make_schedule
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.windows import windows_over

Tiny = Callable[..., DiTConfig]
Make = Callable[..., DiT]
SCHEDULES = {
    "table": (make_schedule("cosine", 1000, prediction="x0"), 500.0),
    "flow": (Schedule(RectifiedFlow(), "flow", "1-sigma", output_sign=-1), 0.45),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@torch.no_grad()
def test_windows_are_blended_as_in_the_service(kind: str, tiny: Tiny, network: Make) -> None:
    schedule, level = SCHEDULES[kind]
    dit = network(tiny())
    conditions = Conditions((dit.embed(torch.zeros((2, len(dit.config.classes)), dtype=torch.int64)),))
    parts = dit, schedule, conditions, Guidance(2.0)
    height, width = dit.config.image_size
    x = torch.randn(2, dit.config.in_channels, height + 3, 2 * width)
    output = WindowDenoiser(*parts)(x, level)
    windows = windows_over((height + 3, 2 * width), (height, width))
    for sample in range(2):
        crops = np.empty((len(windows), x.shape[1], height, width), np.float32)
        windows.crop(x[sample].numpy(), crops)
        predicted = [Denoiser(*parts)(torch.from_numpy(crop).expand(2, -1, -1, -1), level) for crop in crops]
        expected = windows.blend(np.stack([rows[sample].numpy() for rows in predicted]))
        np.testing.assert_allclose(output[sample].numpy(), expected, atol=1e-5)
    own = x[..., :height, :width]
    assert torch.equal(WindowDenoiser(*parts)(own, level), Denoiser(*parts)(own, level))
    with pytest.raises(ValueError, match="has no window"):
        WindowDenoiser(*parts)(own[..., :-1], level)
