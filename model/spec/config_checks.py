"""Checks of fields that the configurations of all our networks have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

Fusion = Literal["sum", "mlp"]


def check_counts(config: object, *fields: str) -> None:
    """Raise ValueError unless each of the fields is a positive whole number."""
    for field in fields:
        value = getattr(config, field)
        if not isinstance(value, int) or value <= 0:
            raise ValueError(f"{field} must be positive and whole, not {value!r}")


def check_conditions(classes: Sequence[int], text_size: int, fusion: str) -> None:
    """Raise ValueError unless classes, text size and fusion are as `DiTConfig` says."""
    if not isinstance(classes, tuple) or not all(isinstance(count, int) for count in classes):
        raise ValueError(f"classes must be a tuple of numbers, one per label factor, not {classes!r}")
    if any(count < 1 for count in classes):
        raise ValueError(
            "every entry of classes must be at least 1; leave a factor out instead of giving it 0 classes"
        )
    if not isinstance(text_size, int) or text_size < 0:
        raise ValueError(f"text_size must be the width of text embeddings or 0, not {text_size!r}")
    if fusion not in get_args(Fusion):
        raise ValueError(f"unknown fusion {fusion!r}: choose among {', '.join(get_args(Fusion))}")
