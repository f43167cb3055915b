"""The root of the errors that `model`, `export` and `bench` raise for their users."""

from __future__ import annotations


class ModelError(Exception):
    """A request that cannot be met; the message is one sentence that names the fault and the remedy."""
