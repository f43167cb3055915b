"""The configuration of any network, to and from JSON; its field `network` names the kind, "dit" by default.

Pure: no torch, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ditserve.model.spec.dit_config import DiTConfig, published_config
from ditserve.model.spec.errors import wrong_field
from ditserve.model.spec.unet_config import UNetConfig

NetworkConfig = DiTConfig | UNetConfig
CONFIGS: dict[str, type[DiTConfig] | type[UNetConfig]] = {"dit": DiTConfig, "unet": UNetConfig}


def size_multiple(config: NetworkConfig) -> int | None:
    """Return the number that must divide height and width, or None if only the trained size works."""
    if isinstance(config, DiTConfig):
        # A layout path has a bias for every token of one size.
        return None if config.layout_rank else config.patch_size
    return 1 << (len(config.multipliers) - 1)


def network_config(given: Mapping[str, Any]) -> NetworkConfig:
    """Return the configuration of JSON fields. `name` starts from a published size of the DiT.

    Raises:
        ValueError: an unknown kind or field, a value of a wrong type, or a configuration that cannot work.
    """
    rest = dict(given)
    kind, name = rest.pop("network", "dit"), rest.pop("name", None)
    if str(kind) not in CONFIGS:
        raise ValueError(f"unknown network {kind!r}: choose among {', '.join(CONFIGS)}")
    known = [field.name for field in fields(CONFIGS[kind])]
    unknown = sorted(rest.keys() - set(known))
    if unknown:
        raise ValueError(f"a {kind} has no field {unknown[0]!r}: it has {', '.join(known)}")
    if name is not None:
        if kind != "dit":
            raise ValueError(f"name is for published sizes of the DiT, not for a {kind}")
        rest = {**asdict(published_config(str(name))), **rest}
    if isinstance(rest.get("blocks"), str):
        rest["blocks"] = [rest["blocks"]]
    try:
        return TypeAdapter(CONFIGS[kind]).validate_python(rest)
    except ValidationError as error:
        field, message = wrong_field(error)
        raise ValueError(f"{field.partition('.')[0]}: {message}" if field else message) from None


def network_fields(config: NetworkConfig) -> dict[str, Any]:
    """Return the fields that `network_config` reads, in JSON's types: the kind, then all others."""
    kind = next(kind for kind, config_type in CONFIGS.items() if isinstance(config, config_type))
    return {"network": kind, **TypeAdapter(type(config)).dump_python(config, mode="json")}
