"""Names of layers in adapters of other projects, as diffusers knows them for the families it has.

The trainers of FLUX, Qwen-Image, Lumina and others name the layers of the authors' own modules, some of which
are several here. Diffusers converts them; PixArt has no such conversion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
from torch import Tensor

from ditserve.model.spec.pipeline_config import FAMILIES, FamilyName

Tensors = dict[str, Tensor]


def translation(family: FamilyName) -> Callable[[Tensors], Tensors] | None:
    """Return the function that renames the tensors of an adapter of a family; None if there is none."""
    pipelines = (getattr(diffusers, name, None) for name in FAMILIES[family].pipelines)
    known: Any = next((pipeline for pipeline in pipelines if hasattr(pipeline, "lora_state_dict")), None)
    return None if known is None else known.lora_state_dict
