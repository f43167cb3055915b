"""The pipeline that every peer serves: diffusers' DiT, drawing pictures for a batch of requests.

The loop is that of diffusers' `DiTPipeline`, which requires a VAE and guides every request, while a model on
pixels has no VAE. This one is more generous than that: requests of one batch may differ in steps, classes,
guidance and seeds. Those with equally many steps share every pass, and only guided ones cost a second row.
Runs in the peers' own environment.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, DPMSolverMultistepScheduler

from ditserve.bench.peers.options import TRANSFORMER
from ditserve.bench.peers.requests import PeerRequest, Pixels, draw_files, noise


class Pipeline:
    def __init__(self, folder: Path, *, threads: int) -> None:
        torch.set_num_threads(threads)
        self.transformer = DiTTransformer2DModel.from_pretrained(
            folder / TRANSFORMER, local_files_only=True
        ).eval()
        self.scheduler: dict[str, Any] = json.loads((folder / "scheduler.json").read_text())

    def __call__(self, requests: Sequence[PeerRequest]) -> list[bytes]:
        """Return the PNG files of a batch, in order."""
        return draw_files(requests, lambda alike, steps: pixels(self.draw(alike, steps)))

    @torch.inference_mode()
    def draw(self, requests: Sequence[PeerRequest], steps: int) -> torch.Tensor:
        """Return images (N, C, H, W) in [-1, 1], from the noise that our service draws for the same seeds."""
        config = self.transformer.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        x = torch.from_numpy(noise(requests, shape))
        guided = torch.tensor([k for k, request in enumerate(requests) if request.guidance != 1.0]).long()
        scale = torch.tensor([requests[k].guidance for k in guided.tolist()])[:, None, None, None]
        null = torch.full((len(guided),), config.num_embeds_ada_norm)
        labels = torch.cat([torch.tensor([_label(request) for request in requests]), null])  # (N + guided,)
        scheduler = DPMSolverMultistepScheduler.from_config(self.scheduler)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            rows = torch.cat([x, x[guided]])  # (N + guided, C, H, W)
            out = self.transformer(rows, timestep=t.expand(len(rows)), class_labels=labels).sample
            out, null_out = out[: len(requests)], out[len(requests) :]
            out[guided] = null_out + scale * (out[guided] - null_out)
            x = scheduler.step(out, t, x).prev_sample
        return x


def _label(request: PeerRequest) -> int:
    (label,) = request.condition.values()
    return int(label)


def pixels(images: torch.Tensor) -> Pixels:
    """Return images (N, 3, H, W) in [-1, 1] as RGB (N, H, W, 3)."""
    scaled = (127.5 * images + 127.5).round().clamp(0, 255).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).numpy()
