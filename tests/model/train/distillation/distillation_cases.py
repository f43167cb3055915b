"""Teachers small enough for a test: bundles of random networks over the pictures of `training_cases`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ditserve.model.nets.factory import Network
from ditserve.model.train.load import describe_run
from ditserve.model.train.loaded_model import LoadedModel, save_model
from ditserve.model.train.trainer import Trainer
from tests.model.train.training_cases import tiny_config


def randomise(network: Network, seed: int = 0) -> Network:
    """Make every parameter random: nothing is zero, so that no path is hidden."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        scale = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return network.eval()


def write_teacher(folder: Path, name: str = "teacher", **changes: Any) -> Path:
    """Write a bundle that a run over the same pictures, with `changes` to its fields, could have left."""
    config = tiny_config(folder, output=str(folder / "untrained"), **changes)
    trainer = Trainer(config)
    network = randomise(trainer.averaged_network())
    save_model(
        folder / name, LoadedModel(network, describe_run(name, config, trainer.dataset, network.config, 1))
    )
    return folder / name
