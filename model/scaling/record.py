"""The measurements of a family of training runs, on disk as scaling.json."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ditserve.model.scaling.family import Family
from ditserve.model.scaling.law import LossPoint
from ditserve.model.spec.bundle import write_atomic

RECORD = "scaling.json"


class Measurement(BaseModel):
    """The held-out loss of a run at one step of its training; `model` is the network's name in the family."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    run: str
    model: str
    network: str
    parameters: int
    pictures: int
    step: int
    flops: float
    loss: float

    @property
    def point(self) -> LossPoint:
        return LossPoint(self.run, self.parameters, self.pictures, self.flops, self.loss)


class ScalingRecord(BaseModel):
    """The content of scaling.json: the family, and its measurements (`looks`).

    `law` maps each fitted number to (value, low, high); 90 % of the fits to resampled runs lie between low
    and high.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    family: Family
    machine: str
    looks: tuple[Measurement, ...] = ()
    law: dict[str, tuple[float, float, float]] = {}


def write_record(record: ScalingRecord, folder: Path) -> None:
    """Write scaling.json into a folder."""
    write_atomic(folder / RECORD, (record.model_dump_json(indent=1) + "\n").encode())
