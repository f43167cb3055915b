"""A trained model in memory: a network with its weights, and the manifest that describes it.

This module needs neither data sets nor training configurations; `model.train.load` also loads the folder of a
training run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from safetensors import SafetensorError
from safetensors.torch import save as serialise
from torch import Tensor

from ditserve.model.nets.dit import DiT
from ditserve.model.nets.factory import Network, network_of
from ditserve.model.nets.unet import UNet
from ditserve.model.spec.bundle import WEIGHTS, Bundle, write_atomic, write_manifest
from ditserve.model.spec.diffusion import Schedule
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.network_config import NetworkConfig, own_config
from ditserve.model.spec.unet_config import UNetConfig
from ditserve.model.weights.official import WeightsError, check_weights
from ditserve.model.weights.stored import load_weights


class LoadError(ModelError):
    """A model that cannot be loaded; the message is one sentence naming the file."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An fp32 network in evaluation mode, and its manifest.

    The manifest is that of the bundle, or the one that the bundle of a training run starts from. `backbones`
    are the networks of further backbones by name, for those who draw with them.
    """

    network: Network
    manifest: Manifest
    backbones: Mapping[str, Network] = field(default_factory=dict)

    @property
    def dit(self) -> DiT:
        """The network, for operations that only a DiT has.

        Raises:
            LoadError: the network is a U-Net.
        """
        if not isinstance(self.network, DiT):
            raise LoadError(f"{self.manifest.name} is a U-Net, and this is for a DiT: choose another model")
        return self.network

    @property
    def schedule(self) -> Schedule:
        """The noise schedule the model was trained on."""
        return self.manifest.diffusion.noise_schedule()


@overload
def build(config: DiTConfig, weights: Mapping[str, Tensor], origin: Path) -> DiT: ...
@overload
def build(config: UNetConfig, weights: Mapping[str, Tensor], origin: Path) -> UNet: ...
def build(config: NetworkConfig, weights: Mapping[str, Tensor], origin: Path) -> Network:
    """Build a network in evaluation mode that holds `weights` in fp32; `origin` is named in errors.

    Weights that are in fp32 already are shared with the network, not copied.

    Raises:
        LoadError: the names or shapes are not those of `config`.
    """
    try:
        check_weights(weights, config)
    except WeightsError as error:
        raise LoadError(f"{origin}: {error}") from None
    return network_of(config, {name: tensor.float() for name, tensor in weights.items()})


def load_bundle(bundle: Bundle) -> LoadedModel:
    """Load the weights of a bundle.

    Raises:
        LoadError: the weights cannot be read or do not fit the manifest.
    """
    config = own_config(bundle.manifest.name, bundle.manifest.config)
    file = bundle.file(WEIGHTS)
    try:
        return LoadedModel(build(config, load_weights(bundle), file), bundle.manifest)
    except SafetensorError as error:
        raise LoadError(f"{file} is not a readable safetensors file: {error}") from None


def save_model(folder: Path, model: LoadedModel) -> None:
    """Write a bundle with weights only, in fp32; `python -m export.onnx` adds the graphs.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.network.state_dict().items()}
    write_atomic(folder / WEIGHTS, serialise(weights))
    write_manifest(folder, model.manifest)
