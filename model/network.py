"""The networks one can train: a configuration in JSON says which (`"network": "unet"`), the DiT being the default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.config import DiTConfig, named
from model.dit import DiT
from model.unet import UNet, UNetConfig

NetworkConfig = DiTConfig | UNetConfig
Network = DiT | UNet
CONFIGS: dict[str, type[DiTConfig] | type[UNetConfig]] = {"dit": DiTConfig, "unet": UNetConfig}


def network_config(fields: Mapping[str, Any]) -> NetworkConfig:
    """A configuration from its fields; `network` names the kind, `name` starts from a published size of the DiT.

    Raises:
        ValueError: an unknown kind or field, or a configuration that cannot work.
    """
    rest = dict(fields)
    kind, name = rest.pop("network", "dit"), rest.pop("name", None)
    if kind not in CONFIGS:
        raise ValueError(f"unknown network {kind!r}: choose among {', '.join(CONFIGS)}")
    unknown = sorted(rest.keys() - set(CONFIGS[kind].__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"a {kind} has no field {unknown[0]!r}: it has {', '.join(CONFIGS[kind].__dataclass_fields__)}"
        )
    if name is not None:
        if kind != "dit":
            raise ValueError(f"name is for published sizes of the DiT, not for a {kind}")
        return named(name, **rest)
    return CONFIGS[kind](**rest)


def make_network(config: NetworkConfig) -> Network:
    """The network of a configuration, freshly initialised."""
    return UNet(config) if isinstance(config, UNetConfig) else DiT(config)
