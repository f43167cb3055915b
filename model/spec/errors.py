"""The root of the errors that `model`, `export` and `bench` raise for their users."""

from __future__ import annotations

from pydantic import ValidationError


class ModelError(Exception):
    """A request that cannot be met; the message is one sentence that names the fault and the remedy."""


class BundleError(ModelError):
    """A bundle that cannot be used; the message is one sentence that names the file."""


def wrong_field(error: ValidationError) -> tuple[str, str]:
    """Return the first field that is wrong, such as "data.path", and a sentence that says why.

    The field is empty where the sentence is about several fields, which it names.
    """
    first = error.errors()[0]
    return ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
