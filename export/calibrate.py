"""Calibration rows: inputs that the network sees along guided sampling trajectories, at all noise levels.

Parity is measured and INT8 is calibrated on these rows. The solver tables are those that the service uses. A
bundle keeps its set of rows, so that an engine can be verified on it on a machine without torch.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditserve.commands import command_line
from ditserve.export.errors import ExportError
from ditserve.model.nets.conditioner import null_labels
from ditserve.model.nets.factory import Network, NetworkConfig
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance, initial_noise
from ditserve.model.sampling.prompt import random_conditions
from ditserve.model.spec.grids import even_grid, noise_levels
from ditserve.model.spec.solvers import step_table, trajectory
from ditserve.model.train.loaded_model import LoadedModel

Backbone = Callable[[Tensor, tuple[Tensor, ...]], Tensor]  # (x, state) → output


@dataclass(frozen=True, slots=True)
class CalibrationRows:
    """Inputs of the network: x (N, C, H, W), timestep (N,), labels (N, F), and text (N, text_width) or None.

    `timestep` is what the network is told of the noise level. A model that takes no text has None.
    """

    x: Tensor
    timestep: Tensor
    labels: Tensor
    text: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def at(self, index: Tensor) -> CalibrationRows:
        """Return the rows at `index`."""
        text = None if self.text is None else self.text[index]
        return CalibrationRows(self.x[index], self.timestep[index], self.labels[index], text)

    def state(self, network: Network) -> tuple[Tensor, ...]:
        """Return the condition state that `network` computes for the rows."""
        return network.modulate(self.timestep, network.embed(self.labels, self.text))

    def with_null(self, config: NetworkConfig) -> CalibrationRows:
        """Return 2 N rows: these, then each again under the null condition."""
        labels = torch.cat([self.labels, null_labels(config, len(self))])
        text = None if self.text is None else torch.cat([self.text, torch.zeros_like(self.text)])
        x, timestep = torch.cat([self.x, self.x]), torch.cat([self.timestep, self.timestep])
        return CalibrationRows(x, timestep, labels, text)

    def digest(self) -> str:
        """Return the sha256 of all values. It names the set of rows that a scale or a score comes from."""
        sha = hashlib.sha256()
        for tensor in (self.x, self.timestep, self.labels, *([] if self.text is None else [self.text])):
            sha.update(tensor.contiguous().numpy().tobytes())
        return sha.hexdigest()

    def save(self, path: Path) -> None:
        """Write the rows, x in half precision: its values must already be representable there."""
        tensors = {"x": self.x.half(), "timestep": self.timestep, "labels": self.labels}
        save_file(tensors if self.text is None else {**tensors, "text": self.text}, path)
        path.chmod(0o644)

    @classmethod
    def load(cls, path: Path) -> CalibrationRows:
        """Return the rows that `save` wrote.

        Raises:
            ExportError: there is no such file.
        """
        if not path.is_file():
            folder = path.parent
            raise ExportError(
                f"{path} is missing: export the bundle again "
                f"with {command_line('export.onnx')} {folder} --out {folder}"
            )
        tensors = load_file(path)
        return cls(tensors["x"].float(), tensors["timestep"], tensors["labels"], tensors.get("text"))


@dataclass(frozen=True, slots=True)
class TrajectorySettings:
    """Guided DDIM runs of `samples` pictures; `seed` draws their classes, text embeddings and noise."""

    samples: int = 6
    steps: int = 20
    seed: int = 0


DEFAULT_TRAJECTORIES = TrajectorySettings()


@torch.no_grad()
def calibration_rows(source: LoadedModel, settings: TrajectorySettings) -> CalibrationRows:
    """Return every conditional row that the network sees on the trajectories; `with_null` adds the others."""
    labels, text = _conditions(source, settings)
    denoiser = _denoiser(source, labels, text)
    steps: list[CalibrationRows] = []

    def network(x: Tensor, level: float) -> Tensor:
        told = torch.full((len(x),), float(source.schedule.told(level)))
        steps.append(CalibrationRows(x.half().float(), told, labels, text))
        return denoiser(x, level)[:, : x.shape[1]]

    _sample(source, settings, network)
    return CalibrationRows(
        torch.cat([rows.x for rows in steps]),
        torch.cat([rows.timestep for rows in steps]),
        labels.repeat(len(steps), 1),
        None if text is None else text.repeat(len(steps), 1),
    )


@torch.no_grad()
def sample_pictures(source: LoadedModel, settings: TrajectorySettings) -> Tensor:
    """Return the finished samples (S, C, H, W) of the trajectories."""
    denoiser = _denoiser(source, *_conditions(source, settings))
    return _sample(source, settings, lambda x, level: denoiser(x, level)[:, : x.shape[1]])


def with_backbone(source: LoadedModel, backbone: Backbone) -> LoadedModel:
    """Return the same model with its backbone replaced by `backbone`."""
    network = copy.copy(source.network)
    vars(network)["backbone"] = backbone
    return LoadedModel(network, source.manifest)


def _conditions(source: LoadedModel, settings: TrajectorySettings) -> tuple[Tensor, Tensor | None]:
    random = np.random.Generator(np.random.Philox(key=[settings.seed, 1]))
    return random_conditions(source.network.config, settings.samples, random)


def _denoiser(source: LoadedModel, labels: Tensor, text: Tensor | None) -> Denoiser:
    embedding = source.network.embed(labels, text)
    channels = source.manifest.diffusion.guidance_channels
    guidance = Guidance(source.manifest.defaults.guidance_scale, channels=channels)
    return Denoiser(source.network, source.schedule, Conditions((embedding,)), guidance)


def _sample(
    source: LoadedModel, settings: TrajectorySettings, network: Callable[[Tensor, float], Tensor]
) -> Tensor:
    config, schedule = source.network.config, source.schedule
    steps = min(settings.steps, schedule.max_steps)
    levels = noise_levels(even_grid(schedule), steps, schedule)
    shape = (config.in_channels, *config.image_size)
    start = np.stack([initial_noise(settings.seed + k, shape) for k in range(settings.samples)])
    table, clip = step_table("ddim", levels, schedule), source.manifest.diffusion.clip_x0
    *_, (_, x0) = trajectory(table, torch.from_numpy(start), network, clip_x0=clip)
    return x0
