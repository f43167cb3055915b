"""Schedulers of diffusers for a table of timesteps: the published process, checked field by field. Pure.

`model.spec.scheduler_config` has those of a flow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditserve.model.spec.scheduler_config import SchedulerConfigError

# The published process: the fields that tell a process, and the values of them.
PUBLISHED: Mapping[str, Any] = {
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
SAMPLING = frozenset({
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


def check_published(fields: Mapping[str, Any]) -> None:
    """Refuse a scheduler of another process than the published one.

    Raises:
        SchedulerConfigError: it is of another process, or has a field that none of the published process has.
    """
    known = {name: value for name, value in fields.items() if not name.startswith("_")}
    wrong = [f"{name} {known[name]}" for name, value in PUBLISHED.items() if known.get(name, value) != value]
    if wrong:
        raise SchedulerConfigError(
            f"is not of the published diffusion: {', '.join(wrong)} cannot be imported"
        )
    unknown = sorted(known.keys() - PUBLISHED.keys() - SAMPLING)
    if unknown:
        raise SchedulerConfigError(
            f"field {unknown[0]}: no scheduler of the published diffusion has it: remove it, or "
            "check how it is spelled"
        )
