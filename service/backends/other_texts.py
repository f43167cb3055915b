"""Text encoders other than BERT: models of the library transformers, and classes that the operator names.

The former need PyTorch, the latter whatever they import. Both speak the protocol of `model.nets.text`, which
encodes many sentences at once.
"""

from __future__ import annotations

from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import numpy as np

from ditserve.model.spec.bundle import digest
from ditserve.model.spec.errors import ModelError
from ditserve.service.backends import BackendUnavailable, Floats

TORCH_TEXT: Final = "ditserve.model.nets.text"


class OtherEncoder:
    """An encoder that takes sentences one by one. Without a key of its own, its encodings are not shared.

    Raises:
        BackendUnavailable: it does not give `tokens` states behind each embedding.
    """

    def __init__(self, name: str, encoder: Any, tokens: int, key: str | None = None) -> None:
        self._encoder = encoder
        self.key = key or str(getattr(encoder, "key", "") or uuid4().hex)
        try:
            self.size = int(encoder.size) * (1 + tokens)
            shape = np.shape(encoder.encode(["a"]))
        # A class of somebody else may raise anything.
        except Exception as error:
            raise BackendUnavailable(f"text encoder {name!r} cannot encode a sentence: {error}") from error
        if shape != (1, self.size):
            raise BackendUnavailable(
                f"text encoder {name!r} gives {shape} numbers for a sentence, not (1, {self.size})"
            )

    def encode(self, sentence: str) -> Floats:
        """Return the encoding (size,) of a sentence."""
        encoding: Floats = np.asarray(self._encoder.encode([sentence])[0], np.float32)
        return encoding


def open_class(name: str, tokens: int) -> OtherEncoder:
    """Open `package.module:Class`; it is made with `tokens=` only if there are any.

    Raises:
        BackendUnavailable: it cannot be made, or cannot encode.
        ImportError: its module cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        encoder = getattr(import_module(module), attribute)(**({"tokens": tokens} if tokens else {}))
    except (AttributeError, TypeError, ValueError, OSError) as error:
        raise BackendUnavailable(f"text encoder {name!r} cannot be opened: {error}") from error
    return OtherEncoder(name, encoder, tokens)


def open_folder(folder: str, tokens: int) -> OtherEncoder:
    """Open the text model in a folder of transformers' layout.

    Raises:
        BackendUnavailable: it cannot be read.
        ImportError: PyTorch is not installed.
    """
    try:
        encoder = import_module(TORCH_TEXT).open_encoder(f"transformers:{folder}", tokens)
    except ModelError as error:
        raise BackendUnavailable(str(error)) from error
    files = "".join(digest(file) for file in sorted(Path(folder).iterdir()) if file.is_file())
    return OtherEncoder(folder, encoder, tokens, sha256(f"{files}{tokens}".encode()).hexdigest())
