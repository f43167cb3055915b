"""The configurations of the networks that this project builds and trains. Pure.

Apart from `network_config`, which reads JSON: networks are built where pydantic is not installed.
"""

from __future__ import annotations

from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.unet_config import UNetConfig

NetworkConfig = DiTConfig | UNetConfig
