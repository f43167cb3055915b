"""The optimiser steps of an autoencoder's run, and the measures of what it has learned."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ditserve.model.data.dataset import Dataset
from ditserve.model.data.examples import DataError, batch_indices
from ditserve.model.data.texture import edge_error, grain, psnr, ssim
from ditserve.model.distributed.parallel import single_process
from ditserve.model.nets.autoencoder import SmallVae, fingerprint, open_latent_autoencoder
from ditserve.model.nets.small_autoencoder import SmallAutoencoder, SmallAutoencoderConfig
from ditserve.model.train.autoencoder.config import AutoencoderTrainConfig
from ditserve.model.train.checkpoint import TrainingState, restore, save
from ditserve.model.train.ema import Ema
from ditserve.model.train.optimizer import loss_scaler, make_optimizer, scheduled_rate
from ditserve.model.train.warm_start import load_fitting

# Held-out pictures that are measured, and that are shown.
MEASURED, SHOWN = 64, 12
# Fields that may change when a run is continued.
CHANGEABLE = frozenset(
    [
        *("output", "steps", "lr", "schedule", "warmup", "decay", "clip", "threads", "device", "data"),
        *("checkpoint_every", "keep", "sheet_every", "log_every", "tensorboard"),
    ]
)


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """Pictures encoded and decoded: `figures` of them by name, and a sheet with the real ones above."""

    figures: dict[str, float]
    sheet: Image.Image


class AutoencoderTrainer:
    """The owner of an autoencoder in training; `step()` is one optimiser step.

    Every random number is a function of (seed, step), so a stopped run goes on as if it had not stopped.

    Raises:
        AutoencoderError: `decoder_of` cannot be read.
        DataError: the data cannot be opened, holds latents, or has a size that does not suit; `decoder_of`
            is of diffusers.
    """

    def __init__(self, config: AutoencoderTrainConfig) -> None:
        self.config = config
        self.dataset: Dataset = config.data.open()
        torch.manual_seed(config.seed)
        network = self._start().to(config.device)
        self.spec = network.config
        self._check_size()
        self.state = TrainingState(
            single_process(network),
            make_optimizer(network, config),
            Ema(network, config.ema),
            loss_scaler("fp32", config.device),
        )
        self.checkpoints = config.output / "checkpoints"
        fixed = {key: value for key, value in config.model_dump(mode="json").items() if key not in CHANGEABLE}
        self.identity: dict[str, Any] = {**fixed, "content": self.dataset.fingerprint()}
        # As in the checkpoints of releases whose decoders were all like their encoders.
        for field in ("decoder_widths", "decoder_blocks", "full_width"):
            if getattr(config.autoencoder, field) == getattr(SmallAutoencoderConfig, field):
                del self.identity["autoencoder"][field]
        if config.decoder_of is None:
            # As in the checkpoints of releases that always trained both halves.
            del self.identity["decoder_of"]
        else:
            self.identity["decoder_of"] = fingerprint(config.decoder_of)

    def _start(self) -> SmallAutoencoder:
        """Return the autoencoder that training starts from."""
        folder = self.config.decoder_of
        if folder is None:
            return SmallAutoencoder(self.config.autoencoder)
        opened = open_latent_autoencoder(folder)
        if not isinstance(opened, SmallVae):
            raise DataError(f"decoder_of: {folder} holds no autoencoder of model.train.autoencoder")
        network = opened.autoencoder
        if "autoencoder" in self.config.model_fields_set:
            network = self._with_new_decoder(network)
        network.train().decoder.requires_grad_(True)
        return network

    def _with_new_decoder(self, trained: SmallAutoencoder) -> SmallAutoencoder:
        """Return the encoder of an autoencoder with a decoder of the configured sizes.

        Its weights begin as those of the trained one, as far as their shapes are the same.
        """
        sizes = self.config.autoencoder
        for field in ("latent_channels", "widths", "blocks", "noise"):
            own, asked = getattr(trained.config, field), getattr(sizes, field)
            if own != asked:
                raise DataError(
                    f"autoencoder.{field} is {asked}, and that of {self.config.decoder_of}, whose encoder "
                    f"stays, {own}: name another decoder by decoder_widths and decoder_blocks"
                )
        network = SmallAutoencoder(sizes)
        load_fitting(network, trained.state_dict())
        network.encoder.requires_grad_(False)
        return network

    def _check_size(self) -> None:
        factor, crop, path = self.spec.factor, self.config.crop, self.config.data.path
        if self.dataset.channels != 3:
            raise DataError(f"{path} holds latents: an autoencoder learns from pictures")
        sides = self.dataset.size[-2:]
        if any(side % factor for side in sides):
            raise DataError(f"{path}: sides of {sides} do not divide by {factor}: set data.size")
        if crop is not None and crop % factor:
            raise DataError(f"crop {crop} is not divisible by {factor}, the autoencoder's reduction")
        if crop is not None and crop > min(sides):
            raise DataError(f"crop {crop} is larger than the pictures of {path}, {sides}")

    @property
    def network(self) -> SmallAutoencoder:
        """The autoencoder in training."""
        return cast(SmallAutoencoder, self.state.model)

    def resume(self) -> Path | None:
        """Restore the newest checkpoint that can be read. Return its path; None if there is none.

        Raises:
            CheckpointError: it is of another run, or none of several can be read.
        """
        return restore(self.checkpoints, self.state, self.identity)

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: it cannot be written.
        """
        save(self.checkpoints, self.state, self.identity, keep=self.config.keep)

    def step(self) -> dict[str, float]:
        """Train on one batch. Return the loss and its terms, the gradient's norm and the learning rate.

        A gradient that is not finite is skipped.
        """
        config, state = self.config, self.state
        losses = self.losses(self.batch(state.step))
        state.optimizer.zero_grad(set_to_none=True)
        cast(Any, losses["loss"]).backward()
        norm = self.state.parallel.clip_gradients(config.clip)
        rate = scheduled_rate(config, state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        if np.isfinite(norm):
            state.optimizer.step()
            state.ema.update(self.network.parameters())
        else:
            state.skipped += 1
        state.step += 1
        return {**{name: loss.item() for name, loss in losses.items()}, "grad_norm": norm, "lr": rate}

    def losses(self, images: Tensor) -> dict[str, Tensor]:
        """Return the loss of pictures (N, 3, H, W), and the terms that it is the weighted sum of."""
        config, spec = self.config, self.spec
        generator = torch.Generator().manual_seed(1_000_003 * config.seed + self.state.step)
        height, width = (side // spec.factor for side in images.shape[2:])
        noise = torch.randn((len(images), spec.latent_channels, height, width), generator=generator)
        images = images.to(config.device)
        latents = self.network.encode(images)
        decoded = self.network.decode(latents + spec.noise * noise.to(config.device))
        pixels, edges = (decoded - images).abs().mean(), edge_error(decoded, images)
        size = latents.square().mean()
        loss = pixels + config.edge_weight * edges + config.latent_weight * size
        return {"loss": loss, "pixels": pixels, "edges": edges, "latents": size}

    def batch(self, step: int) -> Tensor:
        """Return the pictures of a step, (n, 3, H, W) in [−1, 1], cropped as the configuration says.

        Of a clip it is one frame.
        """
        config, dataset = self.config, self.dataset
        rng = np.random.default_rng([config.seed, step])
        index = dataset.training[batch_indices(len(dataset.training), config.batch, step, config.seed)]
        images, crop = self._pictures(index, rng), config.crop
        if crop is None:
            return images
        tops, lefts = (rng.integers(0, side - crop + 1, len(images)) for side in images.shape[2:])
        corners = zip(images, tops, lefts, strict=True)
        return torch.stack([image[:, top : top + crop, left : left + crop] for image, top, left in corners])

    def _pictures(self, index: npt.NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        """Return examples (n, 3, H, W); of each clip a frame that is drawn."""
        images = torch.from_numpy(self.dataset.batch(index, rng))
        if images.ndim == 4:
            return images
        frames = torch.from_numpy(rng.integers(0, images.shape[2], len(images)))
        return images[torch.arange(len(images)), :, frames]

    def averaged_network(self) -> SmallAutoencoder:
        """Return the autoencoder with averaged weights, in evaluation mode, on the CPU."""
        network = SmallAutoencoder(self.spec)
        self.state.ema.copy_to(network)
        return network.eval().requires_grad_(False)

    def measure(self) -> Reconstruction:
        """Return how well the averaged weights reconstruct held-out pictures; without any, trained ones.

        `psnr` is in dB, `ssim` at most 1, `grain` of 255, and `decode_ms` of one picture with the threads of
        this process.
        """
        network, dataset = self.averaged_network(), self.dataset
        index = np.flatnonzero(dataset.held_out)[:MEASURED]
        index = index if len(index) else dataset.training[:MEASURED]
        images = self._pictures(index, np.random.default_rng(0))
        latents = torch.cat([network.encode(part) for part in images.split(16)])
        began = time.perf_counter()
        decoded = torch.cat([network.decode(latent) for latent in latents.split(1)]).clamp(-1, 1)
        decode_ms = 1e3 * (time.perf_counter() - began) / len(images)
        rows = torch.stack([images[:SHOWN], decoded[:SHOWN]])  # (2, n, 3, H, W)
        sheet = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (2H, n·W, 3)
        figures = {"psnr": psnr(decoded, images), "ssim": ssim(decoded, images)}
        figures |= {"grain": grain(decoded), "decode_ms": decode_ms}
        return Reconstruction(
            {name: round(value, 3) for name, value in figures.items()},
            Image.fromarray(((sheet + 1) * 127.5).round().byte().numpy()),
        )
