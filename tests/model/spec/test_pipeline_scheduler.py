"""Schedulers of imported pipelines: the solver that takes their steps, or one sentence."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest

from ditserve.model.spec.pipeline_config import FAMILIES, PipelineConfig
from ditserve.model.spec.pipeline_scheduler import pipeline_diffusion

CONFIG = PipelineConfig(
    family="pixart",
    transformer={},
    image_size=(8, 8),
    in_channels=4,
    text_tokens=12,
    text_size=8,
    text_limit=12,
    tokenizer="tokenizer",
)
FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def fields(name: str, **changes: Any) -> dict[str, Any]:
    """Return the configuration that diffusers saves of a scheduler."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(**changes)
    return {key: value for key, value in scheduler.config.items() if key != "_use_default_values"} | {
        "_class_name": f"{name}Scheduler"
    }


@pytest.mark.parametrize(
    ("scheduler", "solver", "grid"),
    [
        (fields("DDIM", clip_sample=False), "ddim", "leading"),
        (fields("DDIM", clip_sample=False, timestep_spacing="trailing"), "ddim", "trailing"),
        (fields("DPMSolverMultistep"), "dpmpp-2m", "uniform-t"),
        (fields("DPMSolverMultistep", **FLOW), "dpmpp-2m", "uniform"),
        (fields("UniPCMultistep", **FLOW), "unipc-2", "uniform"),
        (fields("UniPCMultistep", solver_order=1, **FLOW), "unipc-1", "uniform"),
        (fields("FlowMatchEulerDiscrete", shift=3.0), "euler", "uniform"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpmpp-2m", "uniform-t"),
    ],
)
def test_a_scheduler_has_its_solver_and_grid(scheduler: dict[str, Any], solver: str, grid: str) -> None:
    assert pipeline_diffusion(scheduler, FAMILIES["pixart"], CONFIG)[1:] == (solver, grid)


@pytest.mark.parametrize(
    ("scheduler", "field"),
    [
        (fields("DDIM"), "clip_sample"),
        ({"_class_name": "DDIMScheduler"}, "clip_sample"),
        (fields("DDIM", clip_sample=False, set_alpha_to_one=False), "set_alpha_to_one"),
        (fields("DDIM", clip_sample=False, steps_offset=1), "steps_offset"),
        (fields("DDIM", clip_sample=False, thresholding=True), "thresholding"),
        (fields("DDIM", clip_sample=False) | {"wobble": 1}, "wobble"),
        (fields("DDIM", clip_sample=False) | {"timestep_spacing": "random"}, "timestep_spacing"),
        (fields("DDIM", clip_sample=False, beta_schedule="scaled_linear"), "beta_schedule"),
        (fields("DDIM", clip_sample=False, trained_betas=[0.1] * 1000), "trained_betas"),
        (fields("DPMSolverMultistep", solver_order=3), "solver_order"),
        (fields("DPMSolverMultistep", algorithm_type="sde-dpmsolver++"), "algorithm_type"),
        (fields("DPMSolverMultistep", solver_type="heun"), "solver_type"),
        (fields("DPMSolverMultistep", final_sigmas_type="sigma_min"), "final_sigmas_type"),
        (fields("DPMSolverMultistep", lambda_min_clipped=-5.0), "lambda_min_clipped"),
        (fields("DPMSolverMultistep", use_karras_sigmas=True), "use_karras_sigmas"),
        (fields("DPMSolverMultistep", solver_order=1, **FLOW), "solver_order"),
        (fields("UniPCMultistep", solver_order=3, **FLOW), "solver_order"),
        (fields("UniPCMultistep", solver_type="bh1", **FLOW), "solver_type"),
        (fields("UniPCMultistep", disable_corrector=[0], **FLOW), "disable_corrector"),
        (fields("UniPCMultistep"), "_class_name"),
        (fields("EulerDiscrete"), "_class_name"),
        (fields("LCM"), "_class_name"),
    ],
)
def test_other_steps_are_refused_by_the_name_of_the_field(scheduler: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)scheduler: .*{field}"):
        pipeline_diffusion(scheduler, FAMILIES["pixart"], CONFIG)
