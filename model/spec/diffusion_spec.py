"""The part of a manifest and of a recipe that says what noise a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator

from ditserve.model.spec.bundle_bounds import Size, Steps
from ditserve.model.spec.diffusion import (
    NoiseInput,
    Prediction,
    RectifiedFlow,
    Schedule,
    VariancePreserving,
    variance_preserving,
)
from ditserve.model.spec.guidance import GuidanceNorm
from ditserve.model.spec.scheduler_config import GridReading, SchedulerConfigError, read_scheduler_config
from ditserve.model.spec.sigma_grids import SigmaGrid


class StrictModel(BaseModel):
    """A value of a manifest: frozen, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


class DiffusionSpec(StrictModel):
    """The noise that a model was trained on, what its network is told of it, and the meaning of its output.

    schedule     "linear" and "cosine" are tables of timesteps, "flow" a rectified flow, in sigma 0..1
    timesteps    the noise levels of a table; of a flow the most steps of a run
    noise_input  what the network is told, times noise_scale: "timestep" of a table; of a flow "sigma" or
                 "1-sigma", by default 1000 · sigma
    sigma_grid   the rule of the grids of a flow: its fields, or {"scheduler": a `scheduler_config.json` of
                 diffusers} with what that leaves open (`GridReading`)
    output_sign  -1 if the network's output is the negative of its prediction
    noise_timesteps  the network is told sigma rounded down to one of so many timesteps; None: as it is
    step_counts  the numbers of steps that a distilled model was trained for; empty: any
    guidance_channels  the first channels, which guidance acts on; None: all
    guidance_norm      what guidance leaves the norm of as it was; None: nothing (see `guided`)
    unguided_scale     the guidance scale at which there is no guidance: 1, or 0 where a request's scale is
                       1 less than the weight of the difference, as that of Z-Image is
    """

    schedule: Literal["linear", "cosine", "flow"]
    timesteps: Steps = 1000
    log_snr_shift: Annotated[float, Field(ge=-20, le=20)] = 0.0
    prediction: Prediction
    noise_input: NoiseInput = "timestep"
    sigma_grid: SigmaGrid | None = None
    noise_scale: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    noise_timesteps: Steps | None = None
    output_sign: Literal[1, -1] = 1
    step_counts: tuple[Steps, ...] = ()
    learn_sigma: bool = False
    clip_x0: bool = True
    guidance_channels: Size | None = None
    guidance_norm: GuidanceNorm | None = None
    unguided_scale: Literal[0, 1] = 1

    @model_validator(mode="before")
    @classmethod
    def _flow_is_told_sigma(cls, data: Any) -> Any:
        """Set what the network of a flow is told to 1000 · sigma where that is left out."""
        flow = isinstance(data, dict) and data.get("schedule") == "flow"
        return {"noise_input": "sigma", "noise_scale": 1000.0, **data} if flow else data

    @field_validator("sigma_grid", mode="before")
    @classmethod
    def _read_scheduler(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "scheduler" not in value:
            return value
        known = dict(value)
        config = known.pop("scheduler")
        if not isinstance(config, Mapping):
            raise ValueError("scheduler must be the object of a scheduler_config.json")
        try:
            return read_scheduler_config(config, TypeAdapter(GridReading).validate_python(known))
        except SchedulerConfigError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _check_fields_agree(self) -> DiffusionSpec:
        if self.schedule != "flow" and self.sigma_grid is not None:
            raise ValueError("sigma_grid is for flows: leave it out of a table of timesteps")
        if self.schedule == "flow":
            for field, value in (("log_snr_shift", self.log_snr_shift), ("learn_sigma", self.learn_sigma)):
                if value:
                    raise ValueError(f"{field} is for tables of timesteps: leave it out of a flow")
        if any(count > self.timesteps for count in self.step_counts):
            raise ValueError(f"step_counts must be at most the {self.timesteps} timesteps")
        # A table of one timestep, because a long one takes time and memory.
        self._schedule_on(min(self.timesteps, 1))
        return self

    def noise_schedule(self) -> Schedule:
        """Return the schedule that the model was trained on."""
        return self._schedule_on(self.timesteps)

    def _schedule_on(self, timesteps: int) -> Schedule:
        process: RectifiedFlow | VariancePreserving = RectifiedFlow(timesteps, self.sigma_grid or SigmaGrid())
        if self.schedule != "flow":
            process = variance_preserving(self.schedule, timesteps, self.log_snr_shift)
        return Schedule(
            process,
            self.prediction,
            self.noise_input,
            self.noise_scale,
            self.output_sign,
            self.step_counts,
            self.noise_timesteps,
        )
