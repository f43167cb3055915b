"""Guidance that leaves norms as they were, and a network that is told whole timesteps of a flow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ditserve.model.spec.diffusion import RectifiedFlow, Schedule
from ditserve.model.spec.guidance import GuidanceNorm, guided
from ditserve.model.spec.sigma_grids import SigmaGrid

SHAPE = (3, 4, 6, 8)
AXES: dict[GuidanceNorm, tuple[int, ...]] = {"line": (-1,), "token": (-5, -3, -1)}


@pytest.mark.parametrize("norm", AXES)
def test_norms_are_those_of_the_conditional_output(norm: GuidanceNorm) -> None:
    rng = np.random.default_rng(0)
    cond, uncond = rng.standard_normal((2, *SHAPE))
    scale = np.array([4.0, 1.0, 0.5])[:, None, None, None]
    mixed, plain = guided(cond, uncond, scale, norm=norm), guided(cond, uncond, scale)
    view = SHAPE if norm == "line" else (3, 4, 3, 2, 4, 2)
    lengths = [np.linalg.norm(x.reshape(view), axis=AXES[norm][0]) for x in (mixed, cond)]
    if norm == "token":
        lengths = [(x.reshape(view) ** 2).sum(AXES[norm]) for x in (mixed, cond)]
    np.testing.assert_allclose(*lengths)
    # A part keeps its direction, and a row of scale 1 is the conditional output.
    ratio = (mixed / plain).reshape(view)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio.mean(AXES[norm], keepdims=True), view))
    np.testing.assert_allclose(mixed[1], cond[1])
    tensors = guided(torch.from_numpy(cond), torch.from_numpy(uncond), torch.from_numpy(scale), norm=norm)
    np.testing.assert_allclose(tensors.numpy(), mixed)


def test_sigma_is_rounded_down_to_a_timestep() -> None:
    flow = RectifiedFlow(1000, SigmaGrid())
    told = Schedule(flow, "flow", "sigma", 1000.0, noise_timesteps=1000).told([0.9996, 0.5, 0.0019])
    assert told.tolist() == [999.0, 500.0, 1.0]
    told = Schedule(flow, "flow", "1-sigma", 1.0, noise_timesteps=1000).told([0.9996])
    assert told.tolist() == [np.float32(0.001)]
