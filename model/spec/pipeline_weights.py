"""The sizes of an imported transformer, read from the heads of its files; nothing here imports torch."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ditserve.model.spec.errors import ModelError

# The weights whose input is what the network is told of the noise, of the guidance scale and of the pooled
# text, and not of latents or tokens. A test watches the inputs of all modules.
MODULATION = re.compile(
    r"(?:^|\.)(?:adaln_single|adaLN_modulation|distilled_guidance_layer|img_mod|t_embedder|time_embed"
    r"|time_step_proj|time_text_embed|timestep_embedder|txt_mod|norm(?:\d|_out)?(?:_context)?\.linear(?:_1)?)\."
)
LARGEST_HEAD = 100 << 20  # bytes, as in safetensors itself


@dataclass(frozen=True, slots=True)
class WeightSizes:
    """Parameters and bytes of all weights, and bytes of those that compute modulations alone."""

    parameters: int
    bytes: int
    modulation_bytes: int


def weight_sizes(folder: Path) -> WeightSizes:
    """Return the sizes of the weights in the folder of a transformer.

    Raises:
        ModelError: a file of weights is damaged.
    """
    parameters = total = modulation = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                head = json.loads(stream.read(min(length, LARGEST_HEAD)))
            head.pop("__metadata__", None)
            for name, entry in head.items():
                begin, end = entry["data_offsets"]
                parameters += prod(entry["shape"])
                total += end - begin
                modulation += (end - begin) if MODULATION.search(name) else 0
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ModelError(f"{file} is no readable safetensors file: {error}") from None
    return WeightSizes(parameters, total, modulation)
