"""The scheduler of a diffusers pipeline, which tells the noise that its network was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.scheduler_config import GridReading, SchedulerConfigError, read_scheduler_config
from ditserve.model.weights.official import WeightsError

# The published process: the fields that tell a process, and the values of them.
_PUBLISHED: Mapping[str, Any] = {
    "prediction_type": "epsilon",
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
# The fields of diffusers' schedulers of such a table that tell how to sample it.
# fmt: off
_SAMPLING = frozenset({
    "algorithm_type", "clip_sample", "clip_sample_range", "disable_corrector", "dynamic_thresholding_ratio",
    "euler_at_final", "final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped",
    "lower_order_final", "predict_x0", "sample_max_value", "set_alpha_to_one", "shift_terminal", "sigma_max",
    "sigma_min", "skip_prk_steps", "solver_order", "solver_p", "solver_type", "steps_offset", "thresholding",
    "time_shift_type", "timestep_spacing", "timestep_type", "use_beta_sigmas", "use_dynamic_shifting",
    "use_exponential_sigmas", "use_flow_sigmas", "use_karras_sigmas", "use_lu_lambdas", "variance_type",
})
# fmt: on


def is_flow(fields: Mapping[str, Any]) -> bool:
    """Return whether the fields of a scheduler's configuration are those of a flow."""
    return bool(
        "Flow" in str(fields.get("_class_name"))
        or fields.get("use_flow_sigmas")
        or fields.get("prediction_type") == "flow_prediction"
    )


def scheduler_flow(file: Path, fields: Mapping[str, Any], config: DiTConfig) -> tuple[DiffusionSpec, str]:
    """Return the flow of a scheduler, whose network is told sigma times the timesteps, and a note on it.

    Raises:
        WeightsError: a field is unknown, or a value gives no grid of ours.
    """
    told = float(fields.get("num_train_timesteps", 1000))
    try:
        grid = read_scheduler_config(fields, GridReading(tokens=config.tokens))
        diffusion = DiffusionSpec(
            schedule="flow", prediction="flow", noise_scale=told, sigma_grid=grid, clip_x0=False
        )
    except SchedulerConfigError as error:
        raise WeightsError(f"{file}: {error}") from None
    except ValidationError:
        raise WeightsError(f"{file}: field num_train_timesteps: must be at most a million") from None
    shift = "that follows from the size" if grid.dynamic else f"of {grid.shift:g}"
    return diffusion, (
        f"the pipeline's {fields['_class_name']} says that it is a flow with a shift {shift}; taken as "
        f"diffusers does it, the network is told {told:g} · sigma and its output points to the noise"
    )


def check_published(file: Path, fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a note on what the scheduler of the published process tells of the prediction.

    Raises:
        WeightsError: it is of another process, or has a field that none of the published process has.
    """
    known = {name: value for name, value in fields.items() if not name.startswith("_")}
    wrong = [f"{name} {known[name]}" for name, value in _PUBLISHED.items() if known.get(name, value) != value]
    if wrong:
        raise WeightsError(f"{file} is not of the published diffusion: {', '.join(wrong)} cannot be imported")
    unknown = sorted(known.keys() - _PUBLISHED.keys() - _SAMPLING)
    if unknown:
        raise WeightsError(
            f"{file}: field {unknown[0]}: no scheduler of the published diffusion has it: remove it, or "
            "check how it is spelled"
        )
    return ("the pipeline's scheduler says that it predicts the noise",) if "prediction_type" in known else ()
