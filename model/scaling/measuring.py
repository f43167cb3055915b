"""Measuring a family: every network is trained, and its held-out loss is measured on the way."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

from ditserve.model.data.dataset import Dataset
from ditserve.model.scaling.family import Family, FamilyRun
from ditserve.model.scaling.record import RECORD, Measurement, ScalingRecord, write_record
from ditserve.model.spec.bundle import write_atomic
from ditserve.model.train.config import first_mistake
from ditserve.model.train.dry_run import StageCost, estimate_stages
from ditserve.model.train.loss import squared_error
from ditserve.model.train.trainer import Trainer

# Noise levels at which each held-out picture's loss is measured, spread evenly.
NOISE_LEVELS = 16


def measure_family(family: Family, runs: Sequence[FamilyRun], out: Path) -> ScalingRecord:
    """Train the runs that are not in scaling.json yet. Return the record of all of them.

    scaling.json is written after every measurement.

    Raises:
        ValueError: the folder holds the results of another family, or they cannot be read.
    """
    file = out / RECORD
    machine = f"{torch.get_num_threads()} of {os.cpu_count()} cores, {platform.platform()}"
    record = ScalingRecord(family=family, machine=machine)
    if file.is_file():
        try:
            record = ScalingRecord.model_validate_json(file.read_text())
        except ValidationError as error:
            raise ValueError(f"{file} does not hold a family's results: {first_mistake(error)}") from None
    if record.family != family:
        raise ValueError(f"{file} holds the results of another family: choose another --out")
    # The pairs that the run with the smallest hold-out keeps from training; no run trains on them.
    unseen = min(runs, key=lambda run: run.config.data.hold_out).config.open_dataset()
    with Progress(console=Console(stderr=True)) as progress:
        for run in runs:
            done = {look.step for look in record.looks if look.run == run.title}
            if run.config.steps in done:
                continue
            for look in _train_and_measure(run, family.looks, unseen, progress):
                if look.step not in done:
                    record = record.model_copy(update={"looks": (*record.looks, look)})
                    write_record(record, out)
    return record


def _train_and_measure(
    run: FamilyRun, looks: int, unseen: Dataset, progress: Progress
) -> Iterator[Measurement]:
    """Train or resume a run. Yield `looks` measurements: after all steps, a half, a quarter, …"""
    config, trainer = run.config, Trainer(run.config)
    trainer.resume()
    config.output.mkdir(parents=True, exist_ok=True)
    write_atomic(config.output / "config.json", (config.model_dump_json(indent=1) + "\n").encode())
    state = trainer.state
    task = progress.add_task(run.title, total=config.steps, completed=state.step)
    due = {config.steps >> k for k in range(looks)}
    while state.step < config.steps:
        trainer.step()
        progress.update(task, completed=state.step)
        if state.step in due:
            yield Measurement(
                run=run.title,
                model=run.model,
                network=str(config.model.get("network", "dit")),
                parameters=sum(p.numel() for p in state.model.parameters()),
                pictures=len(trainer.dataset.training),
                step=state.step,
                flops=state.step * run.step_flops,
                loss=held_out_loss(trainer, unseen),
            )
            trainer.save()
    trainer.close()


@torch.no_grad()
def held_out_loss(trainer: Trainer, dataset: Dataset) -> float:
    """Return the training loss of the averaged weights on the held-out pictures of `dataset`.

    The noise is the same for every network.
    """
    index = np.flatnonzero(dataset.held_out)
    x0 = torch.from_numpy(dataset.batch(index, np.random.default_rng(0)))
    labels = torch.from_numpy(dataset.labels[index])
    text = None if dataset.texts is None else torch.from_numpy(dataset.texts.draw(index))
    network, process = trainer.averaged_network(), trainer.schedule.process
    generator = torch.Generator().manual_seed(0)
    losses = []
    for k in range(NOISE_LEVELS):
        shares = (torch.rand(len(index), generator=generator) + k) / NOISE_LEVELS
        row = trainer.noise.at(torch.from_numpy(process.trained_levels(shares.numpy())))
        noise = torch.randn(x0.shape, generator=generator)
        output = network(row.noisy(x0, noise), row.told, labels, text)
        losses.append(squared_error(row, output.float(), x0, noise).mean())
    return float(torch.stack(losses).mean())


def measure_costs(runs: Sequence[FamilyRun]) -> dict[str, StageCost]:
    """Return the cost of training each network of the family, measured over a few steps."""
    costs: dict[str, StageCost] = {}
    for run in runs:
        if run.model not in costs:
            with closing(Trainer(run.config)) as trainer:
                *_, costs[run.model] = estimate_stages(trainer)
    return costs
