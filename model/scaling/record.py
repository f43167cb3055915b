"""A family of networks to train with equal compute, and what its runs have shown so far, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ditserve.model.scaling.law import Point
from ditserve.model.spec.bundle import write_atomic

RECORD = "scaling.json"
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Family(BaseModel):
    """What to train; see `model.scaling`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    train: Path
    set: tuple[str, ...] = ()
    models: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    flops: Positive
    looks: Annotated[int, Field(ge=1, le=12)] = 4
    hold_outs: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()


class Look(BaseModel):
    """A run at some point of its training."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    run: str
    model: str
    """Its name in the family."""
    network: str
    parameters: int
    pictures: int
    step: int
    flops: float
    loss: float

    @property
    def point(self) -> Point:
        return Point(self.run, self.parameters, self.pictures, self.flops, self.loss)


class Record(BaseModel):
    """scaling.json. `law`: what was fitted, and between which bounds 90 % of the fits to runs drawn again lie."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    family: Family
    machine: str
    looks: tuple[Look, ...] = ()
    law: dict[str, tuple[float, float, float]] = {}


def keep(record: Record, folder: Path) -> None:
    """Write a record into its folder."""
    write_atomic(folder / RECORD, (record.model_dump_json(indent=1) + "\n").encode())
