"""The networks that can be trained and served: `make_network` builds one from its configuration."""

from __future__ import annotations

from typing import overload

from ditserve.model.nets.dit import DiT
from ditserve.model.nets.unet import UNet
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.network_config import NetworkConfig
from ditserve.model.spec.unet_config import UNetConfig

__all__ = ["Network", "NetworkConfig", "make_network"]

Network = DiT | UNet


@overload
def make_network(config: DiTConfig) -> DiT: ...
@overload
def make_network(config: UNetConfig) -> UNet: ...
def make_network(config: NetworkConfig) -> Network:
    """Return the network of a configuration, freshly initialised."""
    return UNet(config) if isinstance(config, UNetConfig) else DiT(config)
