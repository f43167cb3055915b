"""The grid of a flow model, read from the `scheduler_config.json` of a diffusers folder. Pure.

Only the grid is read here. A field that no scheduler of that class has, or a value that would give another
grid than ours, is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ditserve.model.spec.errors import ModelError, wrong_field
from ditserve.model.spec.sigma_grids import DynamicShift, SigmaGrid, Spacing, shifted

Shift = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class SchedulerConfigError(ModelError):
    """A scheduler configuration that gives no grid; the message is one sentence that names the field."""


@dataclass(frozen=True, slots=True)
class GridReading:
    """The facts that a scheduler's configuration leaves open.

    `tokens` is the number of tokens of an image of the model's own size, which a dynamic shift asks for.
    `ends` says who places the line before the shift: "scheduler", as `set_timesteps(steps)` does, or
    "pipeline", which hands in 1, 1 - 1/N … 1/N, as those of FLUX, Qwen-Image and Lumina-2 do. `mu` is the
    rule of a dynamic shift: "tokens" by the fields of the configuration, "flux2" as the pipeline of FLUX.2.
    """

    tokens: int = 0
    ends: Literal["scheduler", "pipeline"] = "scheduler"
    mu: Literal["tokens", "flux2"] = "tokens"

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


AS_SCHEDULER = GridReading()


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    num_train_timesteps: Count = 1000


class _Spaced(_Fields):
    """The fields that the schedulers share; their defaults are those of diffusers."""

    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    base_shift: Number | None = 0.5
    max_shift: Number | None = 1.15
    base_image_seq_len: Count = 256
    max_image_seq_len: Count = 4096
    shift_terminal: Annotated[float, Field(ge=0, lt=1)] | None = None
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False

    @model_validator(mode="after")
    def _check_fields_agree(self) -> _Spaced:
        names = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        chosen = [name for name in names if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other: set one of them")
        if self.base_image_seq_len >= self.max_image_seq_len:
            raise ValueError("base_image_seq_len must be below max_image_seq_len")
        return self

    @property
    def spacing(self) -> Spacing:
        if self.use_karras_sigmas:
            return "karras"
        if self.use_exponential_sigmas:
            return "exponential"
        return "beta" if self.use_beta_sigmas else "uniform"

    def dynamic(self, mu: str) -> DynamicShift | None:
        if not self.use_dynamic_shifting:
            return None
        if mu == "flux2":
            return DynamicShift("flux2")
        if self.base_shift is None or self.max_shift is None:
            raise ValueError("base_shift and max_shift must be numbers where use_dynamic_shifting is true")
        return DynamicShift(
            self.time_shift_type,
            base_tokens=self.base_image_seq_len,
            max_tokens=self.max_image_seq_len,
            base_shift=self.base_shift,
            max_shift=self.max_shift,
        )


class _Euler(_Spaced):
    """FlowMatchEulerDiscreteScheduler."""

    shift: Shift = 1.0
    invert_sigmas: Literal[False] = False
    stochastic_sampling: Literal[False] = False

    def grid(self, reading: GridReading) -> SigmaGrid:
        # A static shift is applied twice to the last sigma: to the table of the training, and to the grid.
        training_end = 1.0 / self.num_train_timesteps
        if not self.use_dynamic_shifting:
            training_end = shifted(training_end, self.shift)
        return SigmaGrid(
            spacing=self.spacing,
            shift=self.shift,
            dynamic=self.dynamic(reading.mu),
            terminal=self.shift_terminal or None,
            last=training_end if reading.ends == "scheduler" else 0.0,
            reaches_last=reading.ends == "scheduler",
            tokens=reading.tokens,
        )


class _Heun(_Fields):
    """FlowMatchHeunDiscreteScheduler, each of whose sigmas but the first is visited twice."""

    shift: Shift = 1.0

    def grid(self, reading: GridReading) -> SigmaGrid:
        return _Euler(num_train_timesteps=self.num_train_timesteps, shift=self.shift).grid(reading)


class _Multistep(_Spaced):
    """UniPCMultistepScheduler and DPMSolverMultistepScheduler; of both the fields that are no grid's."""

    use_flow_sigmas: Literal[True]
    flow_shift: Shift = 1.0
    final_sigmas_type: Literal["zero"] = "zero"
    # Without use_flow_sigmas these would be read; the other spacings are not those of a flow there.
    use_karras_sigmas: Literal[False] | None = False
    use_exponential_sigmas: Literal[False] | None = False
    use_beta_sigmas: Literal[False] | None = False
    time_shift_type: Literal["exponential"] = "exponential"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: list[float] | None = None
    rescale_betas_zero_snr: bool = False
    # These are the solver's.
    prediction_type: str = "flow_prediction"
    solver_order: int = 2
    solver_type: str = ""
    lower_order_final: bool = True
    thresholding: Literal[False] = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0


class _UniPC(_Multistep):
    """UniPCMultistepScheduler."""

    predict_x0: bool = True
    disable_corrector: list[int] = []
    solver_p: None = None
    sigma_min: None = None
    sigma_max: None = None

    def grid(self, reading: GridReading) -> SigmaGrid:
        return SigmaGrid(
            shift=self.flow_shift,
            dynamic=self.dynamic(reading.mu),
            terminal=self.shift_terminal or None,
            last=1.0 / self.num_train_timesteps if reading.ends == "scheduler" else 0.0,
            # As there, log(alpha) of the first step stays finite.
            highest=1.0 - 1e-6,
            tokens=reading.tokens,
        )


class _DPMSolver(_Multistep):
    """DPMSolverMultistepScheduler."""

    shift_terminal: None = None
    algorithm_type: str = "dpmsolver++"
    euler_at_final: bool = False
    use_lu_lambdas: Literal[False] = False
    lambda_min_clipped: float = -float("inf")
    variance_type: str | None = None

    def grid(self, reading: GridReading) -> SigmaGrid:
        # Its line starts one timestep of the training below 1.
        first = 1.0 - 1.0 / self.num_train_timesteps if reading.ends == "scheduler" else 1.0
        return SigmaGrid(
            shift=self.flow_shift, dynamic=self.dynamic(reading.mu), first=first, tokens=reading.tokens
        )


_CLASSES: Mapping[str, type[_Euler | _Heun | _UniPC | _DPMSolver]] = {
    "FlowMatchEulerDiscreteScheduler": _Euler,
    "FlowMatchHeunDiscreteScheduler": _Heun,
    "UniPCMultistepScheduler": _UniPC,
    "DPMSolverMultistepScheduler": _DPMSolver,
}


def read_scheduler_config(config: Mapping[str, Any], reading: GridReading = AS_SCHEDULER) -> SigmaGrid:
    """Return the grid of the flow that a `scheduler_config.json` describes.

    Raises:
        SchedulerConfigError: the class is none of a flow, a field is unknown, or a value gives another grid.
    """
    name = str(config.get("_class_name"))
    if name not in _CLASSES:
        raise SchedulerConfigError(
            f"scheduler configuration: field _class_name: {name!r} gives no grid of a flow; known are "
            f"{', '.join(_CLASSES)}"
        )
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        return _CLASSES[name].model_validate(fields).grid(reading)
    except ValidationError as error:
        field, message = wrong_field(error)
        kind = error.errors()[0]["type"]
        if kind == "extra_forbidden":
            message = f"a {name} has no such field: remove it, or check how it is spelled"
        if kind == "missing":
            message = "it must be true: without it the scheduler is none of a flow"
        where = f"field {field}: " if field else ""
        raise SchedulerConfigError(f"scheduler configuration: {where}{message}") from None
    except ValueError as error:
        raise SchedulerConfigError(f"scheduler configuration: {error}") from None
