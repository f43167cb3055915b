"""What the network really sees: rows along sampling trajectories, at all noise levels, guided, the null condition included.

Parity is measured and INT8 is calibrated on these rows, walked by the same solver tables the service walks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.bundle import Manifest
from model.conditioner import null_labels
from model.diffusion import Schedule, grid, guided
from model.dit import DiT
from model.sample import noise
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


@torch.no_grad()
def trajectories(
    dit: DiT, manifest: Manifest, schedule: Schedule, *, samples: int = 4, steps: int = 20, seed: int = 0
) -> Rows:
    """The rows of `samples` guided DDIM runs over classes drawn by `seed`: for each step the conditional and the null rows."""
    config, spec = dit.config, manifest.diffusion
    drawn = np.random.Generator(np.random.Philox(key=[seed, 1]))
    labels = torch.from_numpy(np.stack([drawn.integers(0, count, samples) for count in config.classes], axis=1))
    shape = (config.in_channels, *config.image_size)
    x = torch.from_numpy(np.stack([noise(seed + k, shape) for k in range(samples)]))  # (S, C, H, W)
    null = null_labels(config, samples)
    table = step_table("ddim", grid("trailing", min(steps, schedule.timesteps), schedule.timesteps), schedule)
    seen: list[Rows] = []
    for i, t in enumerate(table.timestep):
        rows = Rows(torch.cat([x, x]), torch.full((2 * samples,), float(t)), torch.cat([labels, null]))
        seen.append(rows)
        output = dit(rows.x, rows.timestep, rows.labels)[:, : config.in_channels]
        mixed = guided(output[:samples], output[samples:], manifest.defaults.guidance_scale, spec.guidance_channels)
        x0 = float(table.x0_x[i]) * x + float(table.x0_out[i]) * mixed
        x0 = x0.clamp(-1, 1) if spec.clip_x0 else x0
        x = float(table.a[i]) * x + float(table.b[i]) * x0
    return Rows(*(torch.cat(parts) for parts in zip(*((r.x, r.timestep, r.labels) for r in seen), strict=True)))
