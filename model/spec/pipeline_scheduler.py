"""The scheduler of an imported pipeline: its noise, its solver and its grid. Pure.

A scheduler that takes other steps than the solvers of this project is refused, not replaced by one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.pipeline_config import PipelineConfig, PipelineFamily
from ditserve.model.spec.scheduler_config import SchedulerConfigError
from ditserve.model.spec.table_schedulers import check_published, is_flow

_DPM, _UNIPC, _DDIM = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler"
_EULER = "FlowMatchEulerDiscreteScheduler"
# Class → the values at which its steps are those of a solver here. A field that is left out or null has them.
_STEPS: Mapping[str, Mapping[str, Any]] = {
    _DPM: {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "final_sigmas_type": "zero",
        "variance_type": None,
        "lambda_min_clipped": -float("inf"),
    },
    _UNIPC: {
        "solver_type": "bh2",
        "predict_x0": True,
        "disable_corrector": [],
        "lower_order_final": True,
        "final_sigmas_type": "zero",
    },
    _DDIM: {"clip_sample": False, "set_alpha_to_one": True},
    _EULER: {},
}
# Of a field that is left out, where that is not a value above.
_LEFT_OUT = {"clip_sample": True}
# The same for every class of a table.
_TABLE: Mapping[str, Any] = {
    "steps_offset": 0,
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
}
# Class → the grids of its `timestep_spacing`, the default first.
_GRIDS: Mapping[str, Mapping[str, str]] = {
    _DPM: {"linspace": "uniform-t", "trailing": "trailing"},
    _DDIM: {"leading": "leading", "linspace": "linspace", "trailing": "trailing"},
}
_FLOWS = (_EULER, _DPM, _UNIPC)


def pipeline_diffusion(
    scheduler: Mapping[str, Any], family: PipelineFamily, config: PipelineConfig
) -> tuple[DiffusionSpec, str, str]:
    """Return the noise that the model was trained on, and the solver and grid of its scheduler.

    Raises:
        ValueError: the scheduler is of a class or has a value that is not known; the message names the field.
    """
    flow, name = is_flow(scheduler), str(scheduler.get("_class_name"))
    known = _FLOWS if flow else tuple(_GRIDS)
    if name not in known:
        raise ValueError(f"scheduler: _class_name {name} has no solver here; known are {', '.join(known)}")
    _check({**_LEFT_OUT, **scheduler}, _STEPS[name])
    if flow:
        return _flow(scheduler, family, config), _flow_solver(name, scheduler), "uniform"
    try:
        check_published(scheduler)
    except SchedulerConfigError as error:
        raise ValueError(f"scheduler: {error}") from None
    _check(scheduler, _TABLE)
    grids = _GRIDS[name]
    spacing = scheduler.get("timestep_spacing", next(iter(grids)))
    if spacing not in grids:
        raise ValueError(
            f"scheduler: timestep_spacing {spacing} is not known here; known are {', '.join(grids)}"
        )
    spec = DiffusionSpec(
        schedule="linear", prediction="epsilon", learn_sigma=config.learn_sigma, clip_x0=False
    )
    return spec, "ddim" if name == _DDIM else "dpmpp-2m", grids[spacing]


def _check(given: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    """Refuse a value at which the scheduler takes other steps than any solver here."""
    told = {field: given.get(field) for field in needed}
    wrong = [f"{field} {value}" for field, value in told.items() if value not in (None, needed[field])]
    if wrong:
        raise ValueError(f"scheduler: {', '.join(wrong)} is not known here")


def _flow_solver(name: str, scheduler: Mapping[str, Any]) -> str:
    if name != _UNIPC:
        return "euler" if name == _EULER else "dpmpp-2m"
    order = scheduler.get("solver_order", 2)
    if order not in (1, 2):
        raise ValueError(f"scheduler: solver_order {order} is not known here; known are 1 and 2")
    return f"unipc-{order}"


def _flow(scheduler: Mapping[str, Any], family: PipelineFamily, config: PipelineConfig) -> DiffusionSpec:
    if scheduler.get("use_dynamic_shifting") and not family.tells_tokens:
        raise ValueError("scheduler: use_dynamic_shifting true is not known for this pipeline")
    # The timesteps of other schedulers than Euler's are whole.
    whole = None if scheduler["_class_name"] == _EULER else scheduler.get("num_train_timesteps", 1000)
    return DiffusionSpec.model_validate(
        {
            "schedule": "flow",
            "prediction": "flow",
            "noise_input": family.noise_input,
            "noise_scale": family.noise_scale,
            "output_sign": family.output_sign,
            "noise_timesteps": whole,
            "guidance_norm": family.guidance_norm,
            "unguided_scale": family.unguided_scale,
            "clip_x0": False,
            "sigma_grid": {"scheduler": scheduler, "tokens": config.tokens, "ends": family.ends},
        }
    )
