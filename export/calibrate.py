"""Calibration rows: inputs that the network sees along guided sampling trajectories, at all noise levels.

Parity is measured and INT8 is calibrated on these rows. The solver tables are those that the service uses. A
bundle keeps its set of rows, so that an engine can be verified on it on a machine without torch.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditserve.commands import command_line
from ditserve.export.errors import ExportError
from ditserve.model.nets.conditioner import null_labels
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.factory import Network, NetworkConfig
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance, initial_noise
from ditserve.model.sampling.prompt import random_conditions
from ditserve.model.spec.grids import even_grid, noise_levels
from ditserve.model.spec.network_config import frame_shape
from ditserve.model.spec.solvers import step_table, trajectory
from ditserve.model.train.loaded_model import LoadedModel

Backbone = Callable[[Tensor, tuple[Tensor, ...]], Tensor]  # (x, state) → output


@dataclass(frozen=True, slots=True)
class CalibrationRows:
    """Inputs of the network: x (N, C, H, W), timestep (N,), labels (N, F), and text (N, text_width) or None.

    `timestep` is what the network is told of the noise level. A model that takes no text has None, and so for
    `first_frame` (N, C, H, W), which is zeros in the rows that are told none.
    """

    x: Tensor
    timestep: Tensor
    labels: Tensor
    text: Tensor | None = None
    first_frame: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names, without those that are None."""
        fields = ((name, getattr(self, name)) for name in self.__slots__)
        return {name: tensor for name, tensor in fields if tensor is not None}

    def at(self, index: Tensor) -> CalibrationRows:
        """Return the rows at `index`."""
        return CalibrationRows(**{name: tensor[index] for name, tensor in self.tensors().items()})

    def embedding(self, network: Network) -> Tensor:
        """Return the condition embeddings (N, E) that `network` computes for the rows."""
        embedding = network.embed(self.labels, self.text)
        if self.first_frame is None or not isinstance(network, DiT):
            return embedding
        return network.tell_first_frame(embedding, self.first_frame)

    def state(self, network: Network) -> tuple[Tensor, ...]:
        """Return the condition state that `network` computes for the rows."""
        return network.modulate(self.timestep, self.embedding(network))

    def with_null(self, config: NetworkConfig) -> CalibrationRows:
        """Return 2 N rows: these, then each again under the null condition."""
        # A first frame is told beside the null condition too.
        under_null = {"labels": null_labels(config, len(self))}
        under_null |= {} if self.text is None else {"text": torch.zeros_like(self.text)}
        return CalibrationRows(
            **{
                name: torch.cat([tensor, under_null.get(name, tensor)])
                for name, tensor in self.tensors().items()
            }
        )

    def digest(self) -> str:
        """Return the sha256 of all values. It names the set of rows that a scale or a score comes from."""
        sha = hashlib.sha256()
        for tensor in self.tensors().values():
            sha.update(tensor.contiguous().numpy().tobytes())
        return sha.hexdigest()

    def save(self, path: Path) -> None:
        """Write the rows, x in half precision: its values must already be representable there."""
        save_file({**self.tensors(), "x": self.x.half()}, path)
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
        return cls(**{**tensors, "x": tensors["x"].float()})


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
    conditions = _conditions(source, settings)
    denoiser = _denoiser(source, conditions)
    steps: list[CalibrationRows] = []

    def network(x: Tensor, level: float) -> Tensor:
        told = torch.full((len(x),), float(source.schedule.told(level)))
        steps.append(replace(conditions, x=x.half().float(), timestep=told))
        return denoiser(x, level)[:, : x.shape[1]]

    _sample(source, settings, network)
    names = conditions.tensors()
    return CalibrationRows(**{name: torch.cat([rows.tensors()[name] for rows in steps]) for name in names})


@torch.no_grad()
def sample_pictures(source: LoadedModel, settings: TrajectorySettings) -> Tensor:
    """Return the finished samples (S, C, H, W) of the trajectories."""
    denoiser = _denoiser(source, _conditions(source, settings))
    return _sample(source, settings, lambda x, level: denoiser(x, level)[:, : x.shape[1]])


def with_backbone(source: LoadedModel, backbone: Backbone) -> LoadedModel:
    """Return the same model with its backbone replaced by `backbone`."""
    network = copy.copy(source.network)
    vars(network)["backbone"] = backbone
    return LoadedModel(network, source.manifest)


def _conditions(source: LoadedModel, settings: TrajectorySettings) -> CalibrationRows:
    """Return the conditions of the samples, as rows of no step; every other clip is told a first frame."""
    random, count = np.random.Generator(np.random.Philox(key=[settings.seed, 1])), settings.samples
    labels, text = random_conditions(source.network.config, count, random)
    frames = None
    if any(shape := frame_shape(source.network.config)):
        frames = torch.from_numpy(random.uniform(-1.0, 1.0, (count, *shape)).astype(np.float32))
        frames[1::2] = 0.0
    return CalibrationRows(torch.zeros(count), torch.zeros(count), labels, text, frames)


def _denoiser(source: LoadedModel, conditions: CalibrationRows) -> Denoiser:
    embedding = conditions.embedding(source.network)
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
