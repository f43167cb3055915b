"""Whose pictures a data set holds, in a JSON file beside it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ditserve.model.data.examples import DataError


class Card(BaseModel):
    """`card.json` in a data set's folder, or `emoji.json` beside `emoji.npz`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    licence: str | None = None
    """An SPDX expression, for what is trained on the data."""
    attribution: tuple[str, ...] = ()
    """Who must be credited, one line each."""


def card_file(source: Path) -> Path:
    """Where the card of a data set is."""
    return source / "card.json" if source.is_dir() else source.with_suffix(".json")


def read_card(source: Path) -> Card:
    """The card of a data set; an empty one where there is none.

    Raises:
        DataError: there is one, and it is not as `Card` says.
    """
    file = card_file(source)
    if not file.is_file():
        return Card()
    try:
        return Card.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{file}: {'.'.join(map(str, first['loc'])) or 'card'}: {first['msg']}") from None
