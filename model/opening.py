"""A trained model from disk, ready to sample: a bundle, or the newest checkpoint of a training run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.bundle import MANIFEST, WEIGHTS, Bundle, Defaults, DiffusionSpec, Factor
from model.config import DiTConfig
from model.diffusion import Schedule, make_schedule
from model.dit import DiT
from model.pictures import DataError, load_npz
from model.weights import WeightsError, check

DEFAULTS = Defaults(
    steps=50, solver="ddim", grid="trailing", guidance_scale=2.0, guidance_interval=(0.0, 1.0)
)


class OpenError(Exception):
    """A model that cannot be opened; the message is one sentence naming the file."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A model in evaluation mode, and all that sampling needs to know about it."""

    name: str
    model: DiT
    diffusion: DiffusionSpec
    factors: tuple[Factor, ...]
    defaults: Defaults
    decoder: str

    @property
    def schedule(self) -> Schedule:
        """The noise schedule the model was trained on."""
        spec = self.diffusion
        return make_schedule(
            spec.schedule, spec.timesteps, prediction=spec.prediction, log_snr_shift=spec.log_snr_shift
        )


def open_model(path: Path, *, data: Path | None = None) -> Opened:
    """Open a bundle's folder or a run's; a run's averaged weights, and its class names from its pictures.

    `data` says where the run's pictures are, if not where they were.

    Raises:
        OpenError: neither of the two, no readable checkpoint, or weights that do not fit.
        BundleError: a bundle that is damaged.
    """
    if (path / MANIFEST).is_file():
        return _from_bundle(Bundle.open(path))
    if (path / "config.json").is_file():
        return _from_run(path, data)
    raise OpenError(
        f"{path} is neither a bundle (manifest.json) nor a training run (config.json and checkpoints/)"
    )


def _from_bundle(bundle: Bundle) -> Opened:
    manifest, file = bundle.manifest, bundle.file(WEIGHTS)
    try:
        model = _loaded(manifest.config, load_file(file), file)
    except SafetensorError as error:
        raise OpenError(f"{file} is not a readable safetensors file: {error}") from None
    return Opened(
        name=manifest.name,
        model=model,
        diffusion=manifest.diffusion,
        factors=manifest.factors,
        defaults=manifest.defaults,
        decoder=manifest.decoder,
    )


def _from_run(path: Path, data: Path | None) -> Opened:
    config, diffusion, factors = run_config(path / "config.json", data)
    checkpoint, weights = _newest(path / "checkpoints")
    return Opened(
        name=path.resolve().name,
        model=_loaded(config, weights, checkpoint),
        diffusion=diffusion,
        factors=factors,
        defaults=DEFAULTS,
        decoder="identity",
    )


def run_config(source: Path, data: Path | None = None) -> tuple[DiTConfig, DiffusionSpec, tuple[Factor, ...]]:
    """What a training run's JSON file and its pictures say: network, diffusion, and the names of classes.

    Raises:
        OpenError: not a run's configuration, or its pictures are not where it says (nor at `data`).
    """
    try:
        run: dict[str, Any] = json.loads(source.read_text())
        pictures = load_npz(**{**run["data"], "path": data or run["data"]["path"]})
        classes = tuple(len(factor.classes) for factor in pictures.factors)
        config = DiTConfig(**{**run["model"], "image_size": pictures.size, "classes": classes})
        return config, DiffusionSpec.model_validate(run["diffusion"]), pictures.factors
    except DataError as error:
        raise OpenError(f"sizes and class names come from the training pictures, and {error}") from None
    except (OSError, ValidationError, ValueError, KeyError, TypeError) as error:
        raise OpenError(f"{source} is not the configuration of a training run: {error}") from None


def _loaded(config: DiTConfig, weights: dict[str, Tensor], origin: Path) -> DiT:
    try:
        check(weights, config)
    except WeightsError as error:
        raise OpenError(f"{origin}: {error}") from None
    model = DiT(config).eval().requires_grad_(False)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


def _newest(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return path, load_file(path / "ema.safetensors")
        except (OSError, SafetensorError):
            continue  # being written or removed by a run that goes on
    raise OpenError(f"{folder} holds no readable checkpoint: let model.train write one first")
