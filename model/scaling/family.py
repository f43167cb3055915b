"""A family of networks to train with equal compute, and the training runs that it consists of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ditserve.model.data.examples import DataError
from ditserve.model.nets.cost import cost
from ditserve.model.train.config import NetworkFields, TrainConfig, load_config
from ditserve.model.train.dry_run import PASSES

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Family(BaseModel):
    """The networks to train, the compute of each run, and the amounts of data.

    {"train": "model/zoo/emoji64/train.json",   the training configuration, without the network
     "set": ["data.size=32"],                 fields of it that differ here
     "flops": 2e12,                           of training, for each run
     "models": {"DiT-96": {"patch_size": 8, "hidden_size": 96, "depth": 4, "num_heads": 3},
                "U-Net": {"network": "unet", "base_channels": 32, "multipliers": [1, 2, 2]}},
     "hold_outs": [0.03, 0.5],                shares of pairs kept from training: less data to learn from
     "looks": 4,                              losses measured along a run: at flops, flops/2, flops/4, …
     "scale_lr": true}                        rates fall with the square root of the parameters

    A network is given by its fields, or by the name of a published size such as "DiT-S/2". With `scale_lr`
    the first network has the rate of the training configuration, and one with four times its parameters half
    of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    train: Path
    set: tuple[str, ...] = ()
    models: Annotated[dict[str, NetworkFields], Field(min_length=1)]
    flops: Positive
    looks: Annotated[int, Field(ge=1, le=12)] = 4
    hold_outs: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    scale_lr: bool = False


@dataclass(frozen=True, slots=True)
class FamilyRun:
    """The run of one network, named `model` in the family; `macs` are multiply-adds of a forward row."""

    title: str
    model: str
    config: TrainConfig
    macs: int

    @property
    def step_flops(self) -> float:
        """Floating-point operations of an optimiser step."""
        return 2.0 * PASSES * self.macs * self.config.batch


def plan_runs(family: Family, data: Path | None, out: Path) -> Iterator[FamilyRun]:
    """Yield a run of every network with every amount of data, with as many steps as the compute allows.

    A step of a network of 1e6 multiply-adds a row and batch 32 takes 2 · 3 · 1e6 · 32 = 1.92e8 operations, so
    2e12 allow 10,417 steps. `data` is the path of the pictures if they have moved.

    Raises:
        OSError, ValueError, DataError: the training configuration, its data, or a network cannot work.
    """
    base = load_config(family.train, family.set)
    hold_outs = family.hold_outs or (base.data.hold_out,)
    first = 0  # parameters of the first network
    for hold_out in hold_outs:
        fields = {**base.data.model_dump(), "hold_out": hold_out, **({"path": data} if data else {})}
        with_data = base.model_copy(update={"data": type(base.data).model_validate(fields)})
        dataset = with_data.open_dataset()
        if not dataset.held_out.any():
            raise DataError(
                "hold_out keeps no pair from training, and the loss is measured on those: raise it"
            )
        for name, network in family.models.items():
            title = name if len(hold_outs) == 1 else f"{name}, {hold_out:g} held out"
            config = with_data.model_copy(
                update={
                    "output": out / title.replace(", ", "-").replace(" ", "-"),
                    "model": network,
                    "schedule": "constant",
                    "init": None,
                    "stages": (),
                }
            )
            network_cost = cost(config.network_config(dataset))
            first = first or network_cost.parameters
            run = FamilyRun(title, name, config, network_cost.macs)
            steps = round(family.flops / run.step_flops)
            if steps < 2 ** (family.looks - 1):
                raise ValueError(
                    f"{family.flops:g} flops are {steps} steps of {name}: raise flops or lower looks"
                )
            rate = base.lr * (math.sqrt(first / network_cost.parameters) if family.scale_lr else 1.0)
            yield replace(run, config=config.model_copy(update={"steps": steps, "lr": rate}))
