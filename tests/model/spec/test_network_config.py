"""Configurations in JSON: the network they describe, and refusals."""

from __future__ import annotations

from typing import Any

import pytest

from ditserve.model.spec.dit_config import DiTConfig, published_config
from ditserve.model.spec.network_config import network_config, network_fields
from ditserve.model.spec.unet_config import UNetConfig
from tests.model.nets.unet_cases import TINY_UNET


@pytest.mark.parametrize("config", [DiTConfig(depth=2, blocks=("adaln", "adaln_zero")), TINY_UNET])
def test_fields_are_read_back(config: DiTConfig | UNetConfig) -> None:
    assert network_config(network_fields(config)) == config


def test_a_config_is_a_dit_unless_it_names_another_network() -> None:
    assert network_config({"depth": 2, "blocks": "adaln"}) == DiTConfig(depth=2, blocks=("adaln",))
    assert network_config({"name": "DiT-S/8", "depth": 3}) == published_config("DiT-S/8", depth=3)
    assert network_config({"network": "unet", "base_channels": 64}) == UNetConfig(base_channels=64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"network": "mamba"}, "unknown network 'mamba': choose among dit, unet"),
        ({"network": ["dit"]}, "unknown network"),
        ({"heads": 2}, "a dit has no field 'heads': it has image_size"),
        ({"network": "unet", "depth": 2}, "a unet has no field 'depth'"),
        ({"network": "unet", "name": "DiT-S/2"}, "published sizes of the DiT"),
        ({"name": "DiT-M/2"}, "unknown model name"),
        ({"name": 3}, "unknown model name"),
        ({"depth": "deep"}, "depth: Input should be a valid integer"),
        ({"blocks": "mamba"}, "blocks: Input should be 'adaln_zero'"),
        ({"image_size": 32}, "image_size: Input should be a valid tuple"),
        ({"learn_sigma": "perhaps"}, "learn_sigma: Input should be a valid boolean"),
        ({"hidden_size": 30, "num_heads": 4}, "^hidden_size 30 is not divisible"),
        ({"network": "unet", "attention": [5]}, r"^attention names levels in 0\.\.2"),
    ],
)
def test_configs_that_cannot_work_are_refused_in_one_sentence(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        network_config(fields)
    assert "\n" not in str(caught.value)
