"""The pipeline that every peer serves: diffusers' DiT, drawing pictures for a batch of requests.

The loop is that of diffusers' `DiTPipeline`, which requires a VAE and guides every request, while a model on
pixels has no VAE. This one is more generous than that: requests of one batch may differ in steps, classes,
guidance and seeds. Those with equally many steps share every pass, and only guided ones cost a second row.
Runs in the peers' own environment.
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
class PeerRequest:
    """A request for a picture of class `label`; a `guidance` of 1 is none."""

    label: int
    steps: int
    guidance: float
    seed: int

    @classmethod
    def read(cls, fields: dict[str, Any]) -> PeerRequest:
        return cls(int(fields["label"]), int(fields["steps"]), float(fields["guidance"]), int(fields["seed"]))


class Pipeline:
    def __init__(self, folder: Path, *, threads: int) -> None:
        torch.set_num_threads(threads)
        self.transformer = DiTTransformer2DModel.from_pretrained(
            folder / "transformer", local_files_only=True
        ).eval()
        self.scheduler: dict[str, Any] = json.loads((folder / "scheduler.json").read_text())

    def __call__(self, requests: Sequence[PeerRequest]) -> list[bytes]:
        """Return the PNG files of a batch, in order."""
        files: dict[int, bytes] = {}
        for steps in dict.fromkeys(request.steps for request in requests):
            indices = [k for k, request in enumerate(requests) if request.steps == steps]
            images = self.draw([requests[k] for k in indices], steps)
            files |= dict(zip(indices, map(png, pixels(images)), strict=True))
        return [files[k] for k in range(len(requests))]

    @torch.inference_mode()
    def draw(self, requests: Sequence[PeerRequest], steps: int) -> torch.Tensor:
        """Return images (N, C, H, W) in [-1, 1], from the noise that our service draws for the same seeds."""
        config = self.transformer.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        generators = [np.random.Generator(np.random.Philox(request.seed)) for request in requests]
        noise = np.stack([random.standard_normal(shape, dtype=np.float32) for random in generators])
        x = torch.from_numpy(noise)
        guided = torch.tensor([k for k, request in enumerate(requests) if request.guidance != 1.0]).long()
        scale = torch.tensor([requests[k].guidance for k in guided.tolist()])[:, None, None, None]
        null = torch.full((len(guided),), config.num_embeds_ada_norm)
        labels = torch.cat([torch.tensor([request.label for request in requests]), null])  # (N + guided,)
        scheduler = DPMSolverMultistepScheduler.from_config(self.scheduler)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            rows = torch.cat([x, x[guided]])  # (N + guided, C, H, W)
            out = self.transformer(rows, timestep=t.expand(len(rows)), class_labels=labels).sample
            out, null_out = out[: len(requests)], out[len(requests) :]
            out[guided] = null_out + scale * (out[guided] - null_out)
            x = scheduler.step(out, t, x).prev_sample
        return x


def pixels(images: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return images (N, 3, H, W) in [-1, 1] as RGB (N, H, W, 3)."""
    scaled = (127.5 * images + 127.5).round().clamp(0, 255).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).numpy()


def png(image: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """Return a picture (H, W, 3) as a PNG file, by the encoder and with the settings of our service."""
    out = BytesIO()
    Image.fromarray(image).save(out, format="png", compress_level=6)
    return out.getvalue()
