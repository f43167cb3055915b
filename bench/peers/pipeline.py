"""diffusers' DiT drawing pictures for a batch of requests: what every peer serves.

The loop is that of diffusers' `DiTPipeline` (which insists on a VAE and on guidance for everybody; a model on pixels has no
VAE). It is generous: requests of one batch may differ in their steps, classes, guidance and seeds; those of equally many steps
share every pass, and only guided ones cost a second row. Runs in the peers' own environment.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, DPMSolverMultistepScheduler
from PIL import Image

CONTENT_TYPE = "image/png"


@dataclass(frozen=True, slots=True)
class Wish:
    """What a client asks a peer for: a picture of class `label`; a `guidance` of 1 is none."""

    label: int
    steps: int
    guidance: float
    seed: int

    @classmethod
    def read(cls, fields: dict[str, Any]) -> Wish:
        return cls(int(fields["label"]), int(fields["steps"]), float(fields["guidance"]), int(fields["seed"]))


class Pipeline:
    def __init__(self, folder: Path, *, threads: int) -> None:
        torch.set_num_threads(threads)
        self.transformer = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
        self.scheduler: dict[str, Any] = json.loads((folder / "scheduler.json").read_text())

    def __call__(self, wishes: Sequence[Wish]) -> list[bytes]:
        """The PNG files of a batch, in order."""
        files: dict[int, bytes] = {}
        for steps in dict.fromkeys(wish.steps for wish in wishes):
            alike = [place for place, wish in enumerate(wishes) if wish.steps == steps]
            images = self.draw([wishes[place] for place in alike], steps)
            files |= dict(zip(alike, map(png, pixels(images)), strict=True))
        return [files[place] for place in range(len(wishes))]

    @torch.inference_mode()
    def draw(self, wishes: Sequence[Wish], steps: int) -> torch.Tensor:
        """Images (N, C, H, W) in [-1, 1], from the noise our service draws for the same seeds."""
        config = self.transformer.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        noise = [np.random.Generator(np.random.Philox(wish.seed)) for wish in wishes]
        x = torch.from_numpy(np.stack([each.standard_normal(shape, dtype=np.float32) for each in noise]))
        guided = torch.tensor([k for k, wish in enumerate(wishes) if wish.guidance != 1.0], dtype=torch.long)
        scale = torch.tensor([wishes[k].guidance for k in guided.tolist()])[:, None, None, None]
        null = torch.full((len(guided),), config.num_embeds_ada_norm)
        labels = torch.cat([torch.tensor([wish.label for wish in wishes]), null])  # (N + guided,)
        scheduler = DPMSolverMultistepScheduler.from_config(self.scheduler)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            rows = torch.cat([x, x[guided]])  # (N + guided, C, H, W)
            out = self.transformer(rows, timestep=t.expand(len(rows)), class_labels=labels).sample
            out, null_out = out[: len(wishes)], out[len(wishes) :]
            out[guided] = null_out + scale * (out[guided] - null_out)
            x = scheduler.step(out, t, x).prev_sample
        return x


def pixels(images: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(N, 3, H, W) in [-1, 1] to RGB (N, H, W, 3)."""
    scaled = (127.5 * images + 127.5).round().clamp(0, 255).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).numpy()


def png(image: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """A picture (H, W, 3) as a file, by the encoder our service uses and with its settings."""
    out = BytesIO()
    Image.fromarray(image).save(out, format="png", compress_level=6)
    return out.getvalue()
