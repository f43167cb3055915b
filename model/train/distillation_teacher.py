"""A teacher: a frozen model, asked what the image is behind the noise."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ditserve.model.data.dataset import Dataset
from ditserve.model.distributed.precision import autocast
from ditserve.model.nets.conditioner import null_labels
from ditserve.model.nets.factory import Network
from ditserve.model.spec.bundle import Factor
from ditserve.model.spec.diffusion import guidance_weight, guided
from ditserve.model.spec.network_config import NetworkConfig
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import LoadedModel
from ditserve.model.train.loss import noise_tables, rows


class Teacher:
    """A frozen model, and its estimate of the image at any noise, guided by `scale` unless that is None."""

    def __init__(self, opened: LoadedModel, config: TrainConfig, scale: float | None = None) -> None:
        manifest, self.config = opened.manifest, config
        self.network: Network = opened.network.to(config.device)
        self.clip_x0, self.channels = manifest.diffusion.clip_x0, manifest.diffusion.guidance_channels
        self.tables = noise_tables(opened.schedule, "x0", device=config.device)
        self.guided = scale not in (None, 1.0)
        total, interval = opened.schedule.timesteps, manifest.defaults.guidance_interval
        weights = [guidance_weight(scale or 1.0, t, total, interval) for t in range(total)]
        self.guidance = torch.tensor(weights, device=config.device)

    @torch.no_grad()
    def image(self, x: Tensor, t: Tensor, labels: Tensor, text: Tensor | None) -> Tensor:
        """x (N, C, H, W) at timesteps t (N,) and its conditions → the estimate of the image (N, C, H, W), not clipped."""
        null = null_labels(self.network.config, len(x), x.device)
        with autocast(self.config.precision, self.config.device):
            empty = self.network(x, t, null) if self.guided else None
            output = self.network(x, t, labels, text)
        if empty is not None:
            output = guided(output, empty, rows(self.guidance, t), self.channels or x.shape[1])
        prediction: Tensor = output[:, : x.shape[1]].float()
        return rows(self.tables.x0_x, t) * x + rows(self.tables.x0_out, t) * prediction


def open_teacher(source: Path, config: TrainConfig, dataset: Dataset, student: NetworkConfig) -> LoadedModel:
    """The model at `source`, if a student of this run can learn from it.

    Raises:
        LoadError, BundleError: it cannot be opened.
        ValueError: it is over other conditions, another size or other noise.
    """
    opened = load_model(source)
    manifest, theirs = opened.manifest, opened.network.config
    if tuple(manifest.factors) != tuple(dataset.factors):
        said = _factors(manifest.factors), _factors(dataset.factors)
        raise ValueError(
            f"distillation.teacher {source} has other conditions ({said[0]}) than the data ({said[1]}): "
            "train on the data that the teacher was trained on, with the same selection of it"
        )
    pairs = {
        "image size": (theirs.image_size, student.image_size),
        "number of channels": (theirs.in_channels, student.in_channels),
        "text_size": (theirs.text_size, student.text_size),
    }
    pairs |= {
        field: (getattr(manifest.diffusion, field), getattr(config.diffusion, field))
        for field in ("schedule", "timesteps", "log_snr_shift")
    }
    for what, (their, our) in pairs.items():
        if their != our:
            raise ValueError(
                f"distillation.teacher {source} has {what} {their}, and the student {our}: make them agree"
            )
    return opened


def _factors(factors: Sequence[Factor]) -> str:
    return ", ".join(f"{len(factor.classes)} of {factor.name}" for factor in factors) or "none"


def fingerprint(network: Network) -> str:
    """Which weights these are."""
    sha = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        sha.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
