"""The source of an export: a model from disk, and the texts that its bundle shall carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from torch import Tensor

from ditserve.export.errors import ExportError
from ditserve.model.nets.factory import Network
from ditserve.model.spec.manifest import Defaults, Name
from ditserve.model.train.load import load_model, opens_run, read_run_config
from ditserve.model.train.loaded_model import LoadedModel, LoadError


class ModelCard(BaseModel):
    """The texts and defaults of a bundle; a field that is None keeps what the source says."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Name | None = None
    version: Name | None = None
    description: str | None = None
    licence: str | None = None
    attribution: tuple[str, ...] | None = None
    defaults: Defaults | None = None
    default_classes: dict[str, str] | None = None

    def given(self) -> dict[str, Any]:
        """Return the fields that are not None."""
        return {key: value for key in type(self).model_fields if (value := getattr(self, key)) is not None}


def open_source(path: Path, *, data: Path | None = None) -> LoadedModel:
    """Open a training run or a bundle by `load_model`, with this package's error and a hint.

    Raises:
        ExportError: what is there cannot be opened.
        BundleError: a bundle that is damaged.
    """
    try:
        return load_model(path, data=data)
    except LoadError as error:
        hint = "; say where they are with --data" if "training pictures" in str(error) else ""
        raise ExportError(f"{error}{hint}") from None


def training_pictures(path: Path) -> Path | None:
    """Return where the training run in `path` has its pictures; None for a bundle.

    Raises:
        LoadError: the run's configuration cannot be read.
    """
    return read_run_config(path / "config.json").data.path if opens_run(path) else None


def parameters(network: Network) -> dict[str, Tensor]:
    """Return the weights by their published names."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


@torch.no_grad()
def round_weights(network: Network, dtype: torch.dtype) -> None:
    """Round the weights of `network` to `dtype`, in place."""
    for parameter in network.parameters():
        parameter.copy_(parameter.to(dtype))


def free_weights(network: Network) -> None:
    """Free the weights of `network`, which cannot be used afterwards.

    Forgetting the network is not enough: the exporter's rewrite rules remember the last graph, and its
    tensors.
    """
    for parameter in network.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)


@torch.no_grad()
def restore_weights(network: Network, file: Path) -> None:
    """Give the weights of `network` the values in `file`, in place."""
    with safe_open(file, "pt") as stored:
        for name, parameter in network.named_parameters():
            parameter.copy_(stored.get_tensor(name))
