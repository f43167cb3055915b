"""A teacher: a frozen model that estimates the image behind the noise."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ditserve.model.data.dataset import Dataset
from ditserve.model.nets.conditioner import null_labels
from ditserve.model.nets.factory import Network
from ditserve.model.nets.layers import along_rows
from ditserve.model.spec.class_names import same_classes
from ditserve.model.spec.guidance import guidance_weight, guided
from ditserve.model.spec.manifest import Factor
from ditserve.model.spec.network_config import NetworkConfig
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import LoadedModel
from ditserve.model.train.loss import TrainingNoise
from ditserve.model.train.optimizer import autocast


class Teacher:
    """A frozen model that estimates the image at any noise level, guided by `scale` unless that is None."""

    def __init__(self, model: LoadedModel, config: TrainConfig, scale: float | None = None) -> None:
        manifest, self.config = model.manifest, config
        self.network: Network = model.network.to(config.device)
        self.clip_x0, self.channels = manifest.diffusion.clip_x0, manifest.diffusion.guidance_channels
        self.noise = TrainingNoise(model.schedule, "x0", device=config.device)
        self.scale, self.interval = scale or 1.0, manifest.defaults.guidance_interval

    @property
    def guided(self) -> bool:
        """True if the estimates are guided."""
        return self.scale != 1.0

    @torch.no_grad()
    def estimate_x0(self, x: Tensor, t: Tensor, labels: Tensor, text: Tensor | None) -> Tensor:
        """Return the estimate of the image (N, C, H, W), not clipped.

        `x` is (N, C, H, W) at noise levels `t` (N,), with labels (N, F) and text (N, text_width).
        """
        row = self.noise.at(t)
        weights = torch.tensor(
            [guidance_weight(self.scale, level, self.noise.schedule, self.interval) for level in t.tolist()],
            device=x.device,
        )
        # As in serving, a row whose guidance is off at its level has no unconditional pass.
        steered = torch.nonzero(weights != 1.0).flatten()
        with autocast(self.config.precision, self.config.device):
            output = self.network(x, row.told, labels, text).float()
            if len(steered):
                null = null_labels(self.network.config, len(steered), x.device)
                unconditional = self.network(x[steered], row.told[steered], null).float()
                conditional = output[steered]
                weight = along_rows(weights[steered], x)
                output[steered] = guided(conditional, unconditional, weight, self.channels or x.shape[1])
        prediction: Tensor = output[:, : x.shape[1]]
        return row.image(x, prediction)


def open_teacher(source: Path, config: TrainConfig, dataset: Dataset, student: NetworkConfig) -> LoadedModel:
    """Load the model at `source` and check that a student of this run can learn from it.

    Raises:
        LoadError, BundleError: it cannot be loaded.
        ValueError: it has other conditions, another size or other noise.
    """
    model = load_model(source)
    manifest, teacher = model.manifest, model.network.config
    if not same_classes(manifest.factors, dataset.factors):
        raise ValueError(
            f"distillation.teacher {source} has other conditions ({_describe(manifest.factors)}) than the "
            f"data ({_describe(dataset.factors)}): train on the data that the teacher was "
            "trained on, with the same selection of it"
        )
    pairs = {
        "image size": (teacher.image_size, student.image_size),
        "number of channels": (teacher.in_channels, student.in_channels),
        "text_size": (teacher.text_size, student.text_size),
        "text_tokens": (teacher.text_tokens, student.text_tokens),
    }
    pairs |= {
        field: (getattr(manifest.diffusion, field), getattr(config.diffusion, field))
        for field in ("schedule", "timesteps", "log_snr_shift")
    }
    for what, (of_teacher, of_student) in pairs.items():
        if of_teacher != of_student:
            raise ValueError(
                f"distillation.teacher {source} has {what} {of_teacher}, and the student {of_student}: "
                "make them agree"
            )
    return model


def _describe(factors: Sequence[Factor]) -> str:
    return ", ".join(f"{len(factor.classes)} of {factor.name}" for factor in factors) or "none"


def fingerprint(network: Network) -> str:
    """Return 16 hexadecimal digits that identify the weights."""
    sha = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        sha.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
