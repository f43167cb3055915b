"""The one error of this package."""

from __future__ import annotations


class ExportError(Exception):
    """An export that cannot be done or is not good enough; the message is one sentence."""
