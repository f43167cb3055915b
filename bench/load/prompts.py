"""The prompts of a file, for models that draw from texts."""

from __future__ import annotations

from pathlib import Path

from ditserve.model.spec.errors import ModelError


def read_prompts(file: Path) -> tuple[str, ...]:
    """Return the prompts of a text file, one a line.

    Raises:
        ModelError: it cannot be read, or has none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ModelError(f"--prompts {file} cannot be read: {error}") from None
    prompts = tuple(filter(None, map(str.strip, lines)))
    if not prompts:
        raise ModelError(f"--prompts {file} has no prompt: write one a line")
    return prompts
