"""LightningDiT's own files: the configuration of a training, and the mean and deviation of its latents.

The configuration lies in a checkpoint, or as YAML beside it. It tells how the model is sampled, and how its
latents were normalised. Source: Yao et al., arXiv:2501.01423.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.errors import wrong_field
from ditserve.model.spec.manifest import Defaults, LatentSpec
from ditserve.model.spec.sigma_grids import SigmaGrid
from ditserve.model.weights.flows import TrainerArguments
from ditserve.model.weights.official import WeightsError
from ditserve.model.weights.state_files import read_stored

STATISTICS = "latents_stats.pt"
# Model type → (depth, hidden size, heads), besides the sizes of DiT.
LIGHTNING_SIZES = {"1p0B": (24, 1536, 24), "1p6B": (28, 1792, 28)}
# The option of ours that each field of the configuration's `model` asks for.
_OPTIONS = {"use_qknorm": "qk_norm", "use_swiglu": "swiglu", "use_rope": "rope", "use_rmsnorm": "rms_norm"}


class _Section(BaseModel):
    """A part of the configuration. Fields that say nothing of the function are left unread."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class _Transport(_Section):
    path_type: str
    prediction: str


class _Model(_Section):
    model_type: str | None = None
    use_qknorm: bool = False
    use_swiglu: bool = False
    use_rope: bool = False
    use_rmsnorm: bool = False


class _Data(_Section):
    image_size: Annotated[int, Field(ge=1)] | None = None
    num_classes: Annotated[int, Field(ge=1)] | None = None
    latent_norm: bool = False
    latent_multiplier: Annotated[float, Field(gt=0)] = 0.18215


class _Vae(_Section):
    downsample_ratio: Annotated[int, Field(ge=1, le=64)] = 16


class _Sample(_Section):
    """The sampling: N times 0 … 1, both ends included, are N − 1 steps."""

    mode: str = "ODE"
    sampling_method: str = "euler"
    reverse: bool = False
    num_sampling_steps: Annotated[int, Field(ge=2, le=1001)]
    cfg_scale: Annotated[float, Field(ge=0, le=100)] = 1.0
    cfg_interval_start: Annotated[float, Field(ge=0, le=1)] = 0.0
    timestep_shift: Annotated[float, Field(ge=0)] = 0.0


class LightningConfig(_Section):
    """The configuration of a training; the defaults are those of its code."""

    transport: _Transport
    model: _Model | None = None
    data: _Data = _Data()
    vae: _Vae = _Vae()
    sample: _Sample | None = None

    @property
    def arguments(self) -> TrainerArguments:
        return TrainerArguments(
            model=self.model.model_type if self.model else None,
            prediction=self.transport.prediction,
            path_type=self.transport.path_type,
            num_classes=self.data.num_classes,
            kind="lightningdit",
        )

    def check_network(self, path: Path, config: DiTConfig) -> None:
        """Raise WeightsError where the weights are not those that the configuration describes."""
        for name, option in _OPTIONS.items() if self.model else ():
            told, found = getattr(self.model, name), getattr(config, option)
            if told != found:
                raise WeightsError(
                    f"the configuration of {path} says model.{name} {str(told).lower()}, and the weights "
                    f"{'have' if found else 'lack'} it"
                )
        sides = None if self.data.image_size is None else self.data.image_size // self.vae.downsample_ratio
        if sides is not None and config.image_size != (sides, sides):
            raise WeightsError(
                f"the configuration of {path} says data.image_size {self.data.image_size} and "
                f"vae.downsample_ratio {self.vae.downsample_ratio}, and the weights are for latents of "
                f"{config.image_size[0]}x{config.image_size[1]}"
            )

    def sampling(self, otherwise: Defaults) -> tuple[Defaults, SigmaGrid | None]:
        """Return the defaults of a request and the grid; `otherwise` where it is another solver's run.

        Its shift a of the time t is a shift 1 / a of sigma = 1 - t, and it guides from t on.
        """
        sample = self.sample
        if sample is None or (sample.mode, sample.sampling_method, sample.reverse) != ("ODE", "euler", False):
            return otherwise, None
        defaults = Defaults(
            steps=sample.num_sampling_steps - 1,
            solver="euler",
            grid="uniform",
            guidance_scale=max(1.0, sample.cfg_scale),
            guidance_interval=(0.0, 1.0 - sample.cfg_interval_start),
        )
        return defaults, SigmaGrid(shift=1.0 / sample.timestep_shift) if sample.timestep_shift else None


def lightning_config(path: Path, stored: Mapping[str, Any]) -> LightningConfig | None:
    """Return the configuration in a checkpoint, or in the YAML file beside it; None: there is none.

    The file has the checkpoint's own name or that of `config.yaml`, and tells the transport.

    Raises:
        WeightsError: it cannot be read, or a field is wrong.
    """
    source, fields = path, stored
    for file in () if stored else (path.with_suffix(".yaml"), path.with_name("config.yaml")):
        if file.is_file():
            source, fields = file, _read_yaml(file)
            break
    if "transport" not in fields:
        return None
    try:
        return LightningConfig.model_validate(fields)
    except ValidationError as error:
        field, message = wrong_field(error)
        raise WeightsError(f"the configuration in {source}: field {field}: {message}") from None


def _read_yaml(file: Path) -> Mapping[str, Any]:
    try:
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise WeightsError(f"{file} cannot be read as YAML: {str(error).splitlines()[0]}") from None
    return fields if isinstance(fields, Mapping) else {}


def latent_spec(path: Path, told: LightningConfig | None, channels: int) -> tuple[LatentSpec, str]:
    """Return the normalisation of the latents, and a note that tells where it comes from.

    Latents were divided by their deviation after their mean was subtracted, and then multiplied. The mean and
    the deviation are those of `latents_stats.pt` beside the weights.

    Raises:
        WeightsError: the file is needed and missing, or holds something else.
    """
    factor = (told.vae if told else _Vae()).downsample_ratio
    multiplier = told.data.latent_multiplier if told else 1.0
    words = "" if told else "; assumed: latents multiplied by 1, and a latent for 16 pixels on a side"
    if told and not told.data.latent_norm:
        shift, scale = (0.0,) * channels, (1.0 / multiplier,) * channels
        note = f"the latents were multiplied by {multiplier:g}"
    else:
        file = path.with_name(STATISTICS)
        if not file.is_file():
            raise WeightsError(
                f"{path} needs {STATISTICS} beside it, the mean and the deviation of the latents that it was "
                "trained on: put the file of its release or of its data there"
            )
        shift, deviation = _statistics(file, channels)
        scale = tuple(value / multiplier for value in deviation)
        note = f"the latents are normalised by {STATISTICS} and the multiplier {multiplier:g}"
    try:
        return LatentSpec(shift=shift, scale=scale, factor=factor), note + words
    except ValidationError as error:
        raise WeightsError(f"the latents of {path}: {': '.join(wrong_field(error))}") from None


def _statistics(file: Path, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation by channel."""
    stored = read_stored(file)
    values = []
    for name in ("mean", "std"):
        tensor = stored.get(name) if isinstance(stored, dict) else None
        if not isinstance(tensor, Tensor) or tensor.numel() != channels:
            raise WeightsError(f"{file} must hold {name}, {channels} numbers, one for each channel")
        numbers = tensor.to(torch.float64).flatten().tolist()
        if not all(math.isfinite(number) for number in numbers) or (name == "std" and min(numbers) <= 0):
            raise WeightsError(f"{file}: {name} holds numbers that are not finite, or a deviation of 0")
        values.append(tuple(numbers))
    return values[0], values[1]
