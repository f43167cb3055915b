"""Sampling in torch, from a model at hand: the offline twin of the service's engine, on the same solver tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.conditioner import null_labels
from model.diffusion import Schedule, grid, guidance_weight
from model.dit import DiT
from model.solvers import StepTable, step_table


def noise(seed: int, shape: tuple[int, int, int]) -> np.ndarray[tuple[int, int, int], np.dtype[np.float32]]:
    """The noise (C, H, W) a seed means, everywhere: here and in the service."""
    drawn = np.random.Generator(np.random.Philox(seed)).standard_normal(shape, dtype=np.float32)
    return drawn.reshape(shape)


@torch.no_grad()
def denoise(
    model: DiT,
    schedule: Schedule,
    labels: Tensor,
    x: Tensor,
    table: StepTable,
    *,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    clip_x0: bool = True,
) -> Iterator[tuple[int, Tensor]]:
    """Walk x (N, C, H, W) down `table` for labels (N, F); yields (step, x0 estimate), the last being the sample.

    Deterministic solvers only (`table.s` all zero).

    Raises:
        ValueError: the table is stochastic.
    """
    if np.any(table.s):
        raise ValueError(f"solver {table.solver} is stochastic; choose a deterministic one here")
    history = torch.zeros_like(x)
    null = null_labels(model.config, len(labels), labels.device)
    conditions, empty = model.embed(labels), model.embed(null)
    for i, t in enumerate(table.timestep):
        time = torch.full((len(x),), float(t), device=x.device)
        output = model.backbone(x, model.modulate(time, conditions))[:, : x.shape[1]]
        weight = guidance_weight(guidance_scale, int(t), schedule.timesteps, guidance_interval)
        if weight != 1:
            uncond = model.backbone(x, model.modulate(time, empty))[:, : x.shape[1]]
            output = uncond + weight * (output - uncond)
        x0 = float(table.x0_x[i]) * x + float(table.x0_out[i]) * output
        x0 = x0.clamp(-1, 1) if clip_x0 else x0
        x = float(table.a[i]) * x + float(table.b[i]) * x0 + float(table.c[i]) * history
        history = x0
        yield i, x0


def to_pixels(x: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """(N, 3, H, W) in [−1, 1] → uint8 (N, H, W, 3)."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def picture_grid(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], columns: int) -> Image.Image:
    """Pictures uint8 (N, H, W, 3) row by row in one picture, short last row padded with white."""
    n, height, width, _ = pixels.shape
    rows = -(-n // columns)
    padded = np.full((rows * columns, height, width, 3), 255, np.uint8)
    padded[:n] = pixels
    tiled = (
        padded.reshape(rows, columns, height, width, 3)
        .swapaxes(1, 2)
        .reshape(rows * height, columns * width, 3)
    )
    return Image.fromarray(tiled)


def sample_sheet(
    model: DiT,
    schedule: Schedule,
    *,
    classes: Sequence[int] = (),
    steps: int = 20,
    guidance_scale: float = 2.0,
    seed: int = 0,
    columns: int = 20,
) -> Image.Image:
    """A sheet of samples: one column per class of the first factor (evenly spread unless given), one row per class of the second."""
    count = model.config.classes[0]
    chosen = list(classes) or [k * count // columns for k in range(min(columns, count))]
    others = range(model.config.classes[1]) if len(model.config.classes) > 1 else range(1)
    rows = [[c, o] + list(model.config.classes[2:]) for o in others for c in chosen]
    labels = torch.tensor(rows)[:, : len(model.config.classes)]
    height, width = model.config.image_size
    x = torch.from_numpy(
        np.stack([noise(seed + k, (model.config.in_channels, height, width)) for k in range(len(rows))])
    )
    table = step_table("ddim", grid("trailing", steps, schedule.timesteps), schedule)
    device = next(model.parameters()).device
    parts = []
    for piece, chunk in zip(x.split(32), labels.split(32), strict=True):
        *_, (_, x0) = denoise(
            model, schedule, chunk.to(device), piece.to(device), table, guidance_scale=guidance_scale
        )
        parts.append(x0)
    return picture_grid(to_pixels(torch.cat(parts)), len(chosen))
