"""The networks that can be trained and served: `make_network` builds one from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import overload

import torch
from torch import Tensor

from ditserve.model.nets.dit import DiT
from ditserve.model.nets.unet import UNet
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.network_kinds import NetworkConfig
from ditserve.model.spec.unet_config import UNetConfig

__all__ = ["Network", "NetworkConfig", "make_network", "network_of"]

Network = DiT | UNet


@overload
def make_network(config: DiTConfig) -> DiT: ...
@overload
def make_network(config: UNetConfig) -> UNet: ...
def make_network(config: NetworkConfig) -> Network:
    """Return the network of a configuration, freshly initialised."""
    return UNet(config) if isinstance(config, UNetConfig) else DiT(config)


@overload
def network_of(config: DiTConfig, weights: Mapping[str, Tensor]) -> DiT: ...
@overload
def network_of(config: UNetConfig, weights: Mapping[str, Tensor]) -> UNet: ...
def network_of(config: NetworkConfig, weights: Mapping[str, Tensor]) -> Network:
    """Return a network in evaluation mode whose parameters are the tensors `weights` themselves.

    Nothing is copied, which a large network would feel. The names and shapes must be those of `config`.
    """
    with torch.device("meta"):
        network = make_network(config)
    network.load_state_dict(dict(weights), assign=True)
    if isinstance(network, DiT):
        network.reset_positions()
    return network.eval().requires_grad_(False)
