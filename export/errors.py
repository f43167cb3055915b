"""The one error of this package."""

from __future__ import annotations

from ditserve.model.spec.errors import ModelError


class ExportError(ModelError):
    """An export that cannot be done, or whose result is not good enough. The message is one sentence."""
