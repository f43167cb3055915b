"""The optimiser steps of an autoencoder's run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ditserve.model.data.dataset import Dataset
from ditserve.model.data.examples import batch_indices
from ditserve.model.distributed.parallel import single_process
from ditserve.model.nets.small_autoencoder import SmallAutoencoder
from ditserve.model.train.autoencoder.config import AutoencoderTrainConfig
from ditserve.model.train.checkpoint import TrainingState, restore, save
from ditserve.model.train.ema import Ema
from ditserve.model.train.optimizer import autocast, learning_rate, loss_scaler, make_optimizer

# Held-out pictures whose reconstruction is measured and shown.
SHOWN = 16


class AutoencoderTrainer:
    """The owner of an autoencoder in training; `step()` is one optimiser step.

    Every random number is a function of (seed, step), so a stopped run goes on as if it had not stopped.
    """

    def __init__(self, config: AutoencoderTrainConfig) -> None:
        self.config = config
        self.dataset: Dataset = config.data.open()
        torch.manual_seed(config.seed)
        network = SmallAutoencoder(config.network)
        self.state = TrainingState(
            single_process(network),
            make_optimizer(network, config),
            Ema(network, config.ema),
            loss_scaler(config.precision, config.device),
        )
        self.checkpoints = config.output / "checkpoints"

    @property
    def identity(self) -> dict[str, Any]:
        """The values that must be equal for a checkpoint to be continued."""
        fields = ("autoencoder", "crop", "batch", "edge_weight", "latent_weight", "seed", "ema", "precision")
        dumped = self.config.model_dump(mode="json")
        return {**{key: dumped[key] for key in fields}, "content": self.dataset.fingerprint()}

    def resume(self) -> Path | None:
        """Restore the newest checkpoint; return its path, or None."""
        return restore(self.checkpoints, self.state, self.identity)

    def save(self) -> None:
        """Write a checkpoint."""
        save(self.checkpoints, self.state, self.identity, keep=self.config.keep)

    def step(self) -> dict[str, float]:
        """Train on one batch. Return the loss and its terms, the gradient's norm and the learning rate."""
        config, state = self.config, self.state
        images = self.batch(state.step)
        generator = torch.Generator().manual_seed(1_000_003 * config.seed + state.step)
        factor = config.network.factor
        shape = (
            len(images),
            config.network.latent_channels,
            images.shape[2] // factor,
            images.shape[3] // factor,
        )
        noise = torch.randn(shape, generator=generator)
        with autocast(config.precision, config.device):
            latents = state.model.encode(images)
            decoded = state.model.decode(latents + config.network.noise * noise)
        terms = {
            "pixels": (decoded - images).abs().mean(),
            "edges": edge_error(decoded, images),
            "latents": latents.square().mean(),
        }
        loss = terms["pixels"] + config.edge_weight * terms["edges"] + config.latent_weight * terms["latents"]
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.clip or math.inf)
        rate = learning_rate(config, state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        if torch.isfinite(norm):
            state.optimizer.step()
            state.ema.update(state.model.parameters())
        else:
            state.skipped += 1
        state.step += 1
        return {
            "loss": loss.item(),
            **{k: v.item() for k, v in terms.items()},
            "grad_norm": float(norm),
            "lr": rate,
        }

    def batch(self, step: int) -> Tensor:
        """Return the pictures of a step, (n, 3, H, W) in [−1, 1], cropped as the configuration says."""
        config, dataset = self.config, self.dataset
        rng = np.random.default_rng([config.seed, step])
        index = dataset.training[batch_indices(len(dataset.training), config.batch, step, config.seed)]
        images = torch.from_numpy(dataset.batch(index, rng))
        if config.crop is None:
            return images
        height, width = images.shape[2:]
        tops, lefts = (rng.integers(0, side - config.crop + 1, len(images)) for side in (height, width))
        return torch.stack(
            [
                image[:, t : t + config.crop, l : l + config.crop]
                for image, t, l in zip(images, tops, lefts, strict=True)
            ]
        )

    @torch.no_grad()
    def measure(self) -> tuple[dict[str, float], Image.Image]:
        """Return reconstruction figures of the averaged weights on held-out pictures, and a sheet of them."""
        network = SmallAutoencoder(self.config.network)
        self.state.ema.copy_to(network)
        index = np.flatnonzero(self.dataset.held_out)[:64]
        images = torch.from_numpy(self.dataset.batch(index, np.random.default_rng(0)))
        decoded = torch.cat([network.decode(network.encode(part)) for part in images.split(16)]).clamp(-1, 1)
        rows = torch.stack([images[:SHOWN], decoded[:SHOWN]])  # (2, n, 3, H, W)
        sheet = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (2H, n·W, 3)
        picture = Image.fromarray(((sheet + 1) * 127.5).round().byte().numpy())
        return {"psnr": psnr(decoded, images), "grain": grain(decoded, images)}, picture


def edge_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the mean absolute error of differences between neighbours, of pictures (N, 3, H, W); scalar."""
    difference = ours - theirs
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def psnr(ours: Tensor, theirs: Tensor) -> float:
    """Return the mean peak signal-to-noise ratio in dB of pictures (N, 3, H, W) in [−1, 1]."""
    errors = (ours - theirs).square().mean((1, 2, 3))
    return float((10 * torch.log10(4 / errors.clamp(min=1e-10))).mean())


def grain(ours: Tensor, theirs: Tensor) -> float:
    """Return the mean difference of neighbours, of 255, where `theirs` (N, 3, H, W) is flat.

    Flat is a position whose 3×3 surroundings differ by less than one of 255 in each channel.
    """
    highest, lowest = F.max_pool2d(theirs, 3, 1, 1), -F.max_pool2d(-theirs, 3, 1, 1)
    flat = ((highest - lowest).amax(1) < 1 / 127.5)[:, :, 1:]  # (N, H, W − 1)
    differences = ours.diff(dim=-1).abs().mean(1) * 127.5
    return float(differences[flat].mean())
