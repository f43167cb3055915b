"""The configuration of any network, to and from JSON; its field `network` names the kind, "dit" by default.

Pure: no torch, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ditserve.model.spec.dit_config import DiTConfig, published_config
from ditserve.model.spec.errors import ModelError, wrong_field
from ditserve.model.spec.network_kinds import NetworkConfig as NetworkConfig
from ditserve.model.spec.pipeline_config import FAMILIES, NEGATIVE, PipelineConfig
from ditserve.model.spec.sizes import Size
from ditserve.model.spec.unet_config import UNetConfig

BundleConfig = NetworkConfig | PipelineConfig
CONFIGS: dict[str, type[DiTConfig] | type[UNetConfig]] = {"dit": DiTConfig, "unet": UNetConfig}
PIPELINE_KIND = "pipeline"
Config = TypeVar("Config", DiTConfig, UNetConfig, PipelineConfig)


def size_multiples(config: BundleConfig) -> Size | None:
    """Return the number that must divide each side of a size, or None if only the trained size works."""
    if isinstance(config, PipelineConfig):
        return (config.patch_size,) * 2
    if isinstance(config, DiTConfig):
        # A layout path has a bias for every token of one size.
        return None if config.has_layout else config.size_multiples
    return (1 << (len(config.multipliers) - 1),) * 2


def size_multiple(config: BundleConfig) -> int | None:
    """Return the number that must divide height and width, or None if only the trained size works."""
    multiples = size_multiples(config)
    return None if multiples is None else math.lcm(*multiples[-2:])


def graph_multiples(config: BundleConfig) -> Size | None:
    """Return `size_multiples` of the network's graph, which may hold the positions of one size."""
    fixed = isinstance(config, PipelineConfig) and FAMILIES[config.family].positions_of_one_size
    return None if fixed else size_multiples(config)


def graph_multiple(config: BundleConfig) -> int | None:
    """Return `size_multiple` of the network's graph."""
    multiples = graph_multiples(config)
    return None if multiples is None else math.lcm(*multiples[-2:])


def negative_mark(config: BundleConfig) -> str:
    """Return what is put before a text that guidance subtracts, for an encoder that tells these apart."""
    plain = isinstance(config, PipelineConfig) and FAMILIES[config.family].plain_negatives
    return NEGATIVE if plain else ""


def frame_shape(config: BundleConfig) -> Size:
    """Return the shape (C, H, W) of a first frame that the network can be told; (0,): it is told none."""
    return config.frame_shape if isinstance(config, DiTConfig) else (0,)


def network_config(given: Mapping[str, Any]) -> NetworkConfig:
    """Return the configuration of JSON fields. `name` starts from a published size of the DiT.

    Raises:
        ValueError: an unknown kind or field, a value of a wrong type, or a configuration that cannot work.
    """
    rest = dict(given)
    kind, name = rest.pop("network", "dit"), rest.pop("name", None)
    if str(kind) not in CONFIGS:
        raise ValueError(f"unknown network {kind!r}: choose among {', '.join(CONFIGS)}")
    if name is not None:
        if kind != "dit":
            raise ValueError(f"name is for published sizes of the DiT, not for a {kind}")
        rest = {**asdict(published_config(str(name))), **rest}
    # One value stands for all blocks.
    for field in ("blocks", "attention", "levels"):
        if kind == "dit" and isinstance(rest.get(field), str | int):
            rest[field] = [rest[field]]
    return _validated(kind, UNetConfig, rest) if kind == "unet" else _validated(kind, DiTConfig, rest)


def bundle_config(given: Mapping[str, Any]) -> BundleConfig:
    """Return the configuration in a manifest, which may be that of an imported pipeline.

    Raises:
        ValueError: as `network_config`.
    """
    if given.get("network") != PIPELINE_KIND:
        return network_config(given)
    rest = {name: value for name, value in given.items() if name != "network"}
    return _validated(PIPELINE_KIND, PipelineConfig, rest)


def network_fields(config: BundleConfig) -> dict[str, Any]:
    """Return the fields that `bundle_config` reads, in JSON's types: the kind, then all others."""
    kinds = (kind for kind, config_type in CONFIGS.items() if isinstance(config, config_type))
    fields = TypeAdapter(type(config)).dump_python(config, mode="json")
    return {"network": next(kinds, PIPELINE_KIND), **fields}


def own_config(name: str, config: BundleConfig) -> NetworkConfig:
    """Return the configuration of the model `name`, if the network is one of this project.

    Raises:
        ModelError: it is an imported pipeline.
    """
    if isinstance(config, PipelineConfig):
        raise ModelError(f"{name} is an imported pipeline, and this is for models of ditserve's own networks")
    return config


def _validated(kind: str, config_type: type[Config], given: Mapping[str, Any]) -> Config:
    known = [field.name for field in fields(config_type)]
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise ValueError(f"a {kind} has no field {unknown[0]!r}: it has {', '.join(known)}")
    try:
        return TypeAdapter(config_type).validate_python(given)
    except ValidationError as error:
        field, message = wrong_field(error)
        raise ValueError(f"{field.partition('.')[0]}: {message}" if field else message) from None
