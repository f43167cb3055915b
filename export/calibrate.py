"""What the network really sees: rows along sampling trajectories, at all noise levels, guided, the null condition included.

Parity is measured and INT8 is calibrated on these rows, walked by the same solver tables the service walks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.bundle import Manifest
from model.conditioner import null_labels
from model.denoise import noise
from model.diffusion import Schedule, grid, guided
from model.dit import DiT
from model.solvers import step_table

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rows:
    """Inputs of the network: x (N, C, H, W), timestep (N,) and labels (N, F)."""

    x: Tensor
    timestep: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def at(self, index: Tensor) -> Rows:
        """The rows at `index`."""
        return Rows(self.x[index], self.timestep[index], self.labels[index])

    def digest(self) -> str:
        """sha256 over all values, to name the set that a scale or a score comes from."""
        sha = hashlib.sha256()
        for tensor in (self.x, self.timestep, self.labels):
            sha.update(tensor.contiguous().numpy().tobytes())
        return sha.hexdigest()


Backbone = Callable[[Tensor, tuple[Tensor, ...]], Tensor]  # (x, state) → output


@dataclass(frozen=True, slots=True)
class Walk:
    """Guided DDIM runs of `samples` pictures, their classes and noise drawn by `seed`."""

    samples: int = 4
    steps: int = 20
    seed: int = 0


def trajectories(dit: DiT, manifest: Manifest, schedule: Schedule, walk: Walk) -> Rows:
    """Every row the network sees along `walk`: at each step the conditional and the null rows."""
    seen = [rows for rows, _ in _steps(dit, manifest, schedule, walk, dit.backbone)]
    return Rows(
        *(torch.cat(parts) for parts in zip(*((r.x, r.timestep, r.labels) for r in seen), strict=True))
    )


def pictures(dit: DiT, manifest: Manifest, schedule: Schedule, walk: Walk, backbone: Backbone) -> Tensor:
    """The finished samples (S, C, H, W) of `walk` when `backbone` does the work."""
    *_, (_, x0) = _steps(dit, manifest, schedule, walk, backbone)
    return x0


@torch.no_grad()
def _steps(
    dit: DiT, manifest: Manifest, schedule: Schedule, walk: Walk, backbone: Backbone
) -> Iterator[tuple[Rows, Tensor]]:
    """The rows of each step, and the estimate of the pictures after it."""
    config, spec, count = dit.config, manifest.diffusion, walk.samples
    drawn = np.random.Generator(np.random.Philox(key=[walk.seed, 1]))
    labels = torch.from_numpy(np.stack([drawn.integers(0, size, count) for size in config.classes], axis=1))
    labels = torch.cat([labels, null_labels(config, count)])
    shape = (config.in_channels, *config.image_size)
    x = torch.from_numpy(np.stack([noise(walk.seed + k, shape) for k in range(count)]))  # (S, C, H, W)
    table = step_table(
        "ddim", grid("trailing", min(walk.steps, schedule.timesteps), schedule.timesteps), schedule
    )
    for i, t in enumerate(table.timestep):
        rows = Rows(torch.cat([x, x]), torch.full((2 * count,), float(t)), labels)
        output = backbone(rows.x, dit.modulate(rows.timestep, dit.embed(labels)))[:, : config.in_channels]
        mixed = guided(
            output[:count], output[count:], manifest.defaults.guidance_scale, spec.guidance_channels
        )
        x0 = float(table.x0_x[i]) * x + float(table.x0_out[i]) * mixed
        x0 = x0.clamp(-1, 1) if spec.clip_x0 else x0
        x = float(table.a[i]) * x + float(table.b[i]) * x0
        yield rows, x0
