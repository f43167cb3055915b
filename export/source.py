"""Where an export starts: a training run's folder or a bundle, read into one model and one manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from export.errors import ExportError
from model.bundle import MANIFEST, WEIGHTS, Bundle, Defaults, Manifest, StateTensor
from model.config import DiTConfig
from model.diffusion import Schedule, make_schedule
from model.dit import DiT
from model.pictures import DataError, Pictures, load_npz
from model.train import TrainConfig

DEFAULTS = Defaults(
    steps=50, solver="ddim", grid="trailing", guidance_scale=2.0, guidance_interval=(0.0, 1.0)
)


class Card(BaseModel):
    """What a bundle says about itself; unset fields keep what the source says."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str | None = None
    version: str | None = None
    description: str | None = None
    licence: str | None = None
    attribution: tuple[str, ...] | None = None
    defaults: Defaults | None = None

    def told(self) -> dict[str, Any]:
        """The fields that are set."""
        return {key: value for key in type(self).model_fields if (value := getattr(self, key)) is not None}


@dataclass(frozen=True, slots=True)
class Source:
    """An fp32 model in evaluation mode and the manifest of the bundle it becomes (its `files` are not filled in)."""

    dit: DiT
    manifest: Manifest

    @property
    def schedule(self) -> Schedule:
        return schedule_of(self.manifest)


def schedule_of(manifest: Manifest) -> Schedule:
    """The noise schedule a bundle was trained on."""
    spec = manifest.diffusion
    return make_schedule(
        spec.schedule, spec.timesteps, prediction=spec.prediction, log_snr_shift=spec.log_snr_shift
    )


def open_source(path: Path, *, data: Path | None = None) -> Source:
    """Read a bundle, or the newest readable checkpoint of a training run; `data` overrides where the run's pictures are.

    Raises:
        ExportError: neither of the two, no readable checkpoint, or weights that do not fit the configuration.
        BundleError: a bundle that is damaged.
    """
    if (path / MANIFEST).is_file():
        return _from_bundle(Bundle.open(path))
    if (path / "config.json").is_file():
        return _from_run(path, data)
    raise ExportError(
        f"{path} is neither a bundle (manifest.json) nor a training run (config.json and checkpoints/)"
    )


def build(config: DiTConfig, weights: Mapping[str, Tensor], origin: Path) -> DiT:
    """A DiT in evaluation mode holding `weights`; `origin` is named in errors.

    Raises:
        ExportError: the names or shapes are not those of `config`.
    """
    dit = DiT(config).eval().requires_grad_(False)
    try:
        dit.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except RuntimeError as error:
        detail = re.sub(r"\s+", " ", str(error)).partition(": ")[2][:200]
        raise ExportError(
            f"{origin} does not hold the weights its configuration describes: {detail}"
        ) from None
    return dit


def _from_bundle(bundle: Bundle) -> Source:
    file = bundle.file(WEIGHTS)
    return Source(build(bundle.manifest.config, _read(file), file), bundle.manifest)


def _from_run(path: Path, data: Path | None) -> Source:
    try:
        config = TrainConfig.model_validate_json((path / "config.json").read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ExportError(f"{path / 'config.json'}: field {field}: {first['msg']}") from None
    pictures = _pictures(config, data)
    checkpoint, state, weights = _newest(path / "checkpoints")
    classes = tuple(len(factor.classes) for factor in pictures.factors)
    dit = build(
        DiTConfig(**{**config.model, "image_size": pictures.size, "classes": classes}), weights, checkpoint
    )
    return Source(dit, _describe(path.resolve().name, config, pictures, dit.config, state))


def _describe(
    name: str, config: TrainConfig, pictures: Pictures, shape: DiTConfig, state: Mapping[str, Any]
) -> Manifest:
    training = config.model_dump(mode="json", exclude={"output"})
    training["data"]["path"] = config.data.path.name
    return Manifest(
        name=name,
        version=f"0.{state['step']}",
        description=f"Diffusion Transformer over {shape.image_size[0]}×{shape.image_size[1]} pixels",
        config=shape,
        diffusion=config.diffusion,
        factors=pictures.factors,
        embedding_size=shape.hidden_size,
        state=tuple(StateTensor(name=tensor, shape=dims) for tensor, dims in shape.state()),
        defaults=DEFAULTS,
        licence="unspecified",
        provenance={"training": training, "step": state["step"], "pictures": len(pictures.training)},
    )


def _pictures(config: TrainConfig, data: Path | None) -> Pictures:
    chosen = config.data
    try:
        return load_npz(
            data or chosen.path, groups=chosen.groups, names=chosen.names, hold_out=chosen.hold_out
        )
    except DataError as error:
        raise ExportError(
            f"class names come from the training pictures, and {error}; say where they are with --data"
        ) from None


def _newest(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return path, json.loads((path / "state.json").read_text()), load_file(path / "ema.safetensors")
        except (OSError, ValueError, SafetensorError):
            continue  # being written or removed by a run that goes on
    raise ExportError(
        f"{folder} holds no readable checkpoint: let model.train write one first (checkpoint_every)"
    )


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ExportError(f"{file} is not a readable safetensors file: {error}") from None


def parameters(dit: DiT) -> dict[str, Tensor]:
    """The weights by published name."""
    return {name: parameter.detach() for name, parameter in dit.named_parameters()}


def rounded(dit: DiT, dtype: torch.dtype) -> DiT:
    """A copy of `dit` whose fp32 weights have been through `dtype`."""
    return build(
        dit.config, {name: tensor.to(dtype) for name, tensor in parameters(dit).items()}, Path("weights")
    )
