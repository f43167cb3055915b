"""`python -m model.scaling FAMILY.json --data FILE --out FOLDER`: train networks of several sizes with equal compute, and fit a law.

    {"train": "model/zoo/emoji/train.json",            the recipe: everything but the network
     "flops": 2e12,                                    of training, each run's
     "models": {"DiT-96": {"patch_size": 8, "hidden_size": 96, "depth": 4, "num_heads": 3},
                "U-Net": {"network": "unet", "base_channels": 32, "multipliers": [1, 2, 2]}},
     "hold_outs": [0.03, 0.5],                         shares of pairs kept from training: less data to learn from
     "looks": 4}                                       losses measured along a run: at flops, flops/2, flops/4, …

Every run keeps the recipe's learning rate, constant, so that a loss midway is what a shorter run would have reached. Losses are
those of the averaged weights on the pairs that no run trains on. Writes results.json after every look (what is there already is
not trained again), and then scaling.json, scaling.png and scaling.md; each run's folder can be sampled and evaluated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.progress import Progress

from model.bundle import write_atomic
from model.checkpoint import CheckpointError
from model.dataset import Dataset
from model.describe import cost
from model.diffusion import add_noise
from model.objective import rows, squared_error
from model.pictures import DataError
from model.recipe import TrainConfig, load_config, mistake
from model.rehearsal import PASSES, memory
from model.scaling_figure import draw_law
from model.scaling_law import Point, bootstrap, fit
from model.trainer import Trainer

DRAWS = 16  # noise levels at which each held-out picture's loss is measured, spread evenly
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Family(BaseModel):
    """What to train; see the module."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    train: Path
    models: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    flops: Positive
    looks: Annotated[int, Field(ge=1, le=12)] = 4
    hold_outs: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()


class Look(BaseModel):
    """A run at some point of its training."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    run: str
    network: str
    parameters: int
    macs: int
    pictures: int
    step: int
    flops: float
    loss: float
    memory_mib: float
    images_per_s: float

    @property
    def point(self) -> Point:
        return Point(self.run, self.parameters, self.pictures, self.flops, self.loss)


@dataclass(frozen=True, slots=True)
class Run:
    """A network to train, with so many multiply-adds of a row, and the floating-point operations of an optimiser step."""

    name: str
    config: TrainConfig
    macs: int

    @property
    def step_flops(self) -> float:
        return 2.0 * PASSES * self.macs * self.config.batch


def runs(family: Family, data: Path | None, out: Path) -> Iterator[Run]:
    """Every network with every amount of data; the steps are those that the compute allows.

    Raises:
        OSError, ValueError, DataError: the recipe, its data, or a network that cannot work.
    """
    recipe = load_config(family.train)
    shares = family.hold_outs or (recipe.data.hold_out,)
    for share in shares:
        chosen = {**recipe.data.model_dump(), "hold_out": share, **({"path": data} if data else {})}
        for name, network in family.models.items():
            title = name if len(shares) == 1 else f"{name}, {share:g} held out"
            config = recipe.model_copy(
                update={
                    "data": type(recipe.data).model_validate(chosen),
                    "output": out / title.replace(", ", "-").replace(" ", "-"),
                    "model": network,
                    "schedule": "constant",
                    "init": None,
                    "stages": (),
                }
            )
            dataset = config.pictures()
            if not dataset.held_out.any():
                raise DataError(
                    "hold_out keeps no pair from training, and the loss is measured on those: raise it"
                )
            run = Run(title, config, cost(config.network(dataset)).macs)
            steps = round(family.flops / run.step_flops)
            if steps < 2 ** (family.looks - 1):
                raise ValueError(
                    f"{family.flops:g} flops are {steps} steps of {name}: raise flops or lower looks"
                )
            yield replace(run, config=config.model_copy(update={"steps": steps}))


@torch.no_grad()
def held_out_loss(trainer: Trainer, dataset: Dataset) -> float:
    """The training loss of the averaged weights on the held-out pictures of `dataset`, at the same noise for every network."""
    index = np.flatnonzero(dataset.held_out)
    x0 = torch.from_numpy(dataset.batch(index, np.random.default_rng(0)))
    labels = torch.from_numpy(dataset.labels[index])
    text = None if dataset.text is None else torch.from_numpy(dataset.text[index])
    network, tables, generator = trainer.averaged(), trainer.tables, torch.Generator().manual_seed(0)
    losses = []
    for k in range(DRAWS):
        t = ((torch.rand(len(index), generator=generator) + k) / DRAWS * tables.timesteps).long()
        noise = torch.randn(x0.shape, generator=generator)
        output = network(add_noise(rows(tables.alpha, t), rows(tables.sigma, t), x0, noise), t, labels, text)
        losses.append(squared_error(tables, output.float(), x0, noise, t).mean())
    return float(torch.stack(losses).mean())


def look_along(run: Run, looks: int, unseen: Dataset, progress: Progress) -> Iterator[Look]:
    """Train a run, resuming it if it was stopped, and measure it on the way."""
    config, trainer = run.config, Trainer(run.config)
    trainer.resume()
    config.output.mkdir(parents=True, exist_ok=True)
    write_atomic(config.output / "config.json", (config.model_dump_json(indent=1) + "\n").encode())
    state = trainer.state
    task = progress.add_task(run.name, total=config.steps, completed=state.step)
    due = {config.steps >> k for k in range(looks)}
    began, first = time.monotonic(), state.step
    while state.step < config.steps:
        trainer.step()
        progress.update(task, completed=state.step)
        if state.step in due:
            rate = (state.step - first) * config.batch / (time.monotonic() - began)
            yield Look(
                run=run.name,
                network=str(config.model.get("network", "dit")),
                parameters=sum(p.numel() for p in state.model.parameters()),
                macs=run.macs,
                pictures=len(trainer.dataset.training),
                step=state.step,
                flops=state.step * run.step_flops,
                loss=held_out_loss(trainer, unseen),
                memory_mib=round(memory(trainer).total / 2**20, 1),
                images_per_s=round(rate, 1),
            )
            trainer.close()  # a batch was taken to measure memory: the next step must get its own
            trainer.save()
            began, first = time.monotonic(), state.step
    trainer.close()


def measured(family: Family, data: Path | None, out: Path) -> list[Look]:
    """Train what is not in results.json yet, and return all looks.

    Raises:
        ValueError: the folder holds the results of another family.
    """
    file, said = out / "results.json", family.model_dump(mode="json")
    kept = json.loads(file.read_text()) if file.is_file() else {"family": said, "looks": []}
    if kept["family"] != said:
        raise ValueError(f"{file} holds the results of another family: choose another --out")
    looks = [Look.model_validate(look) for look in kept["looks"]]
    planned = list(runs(family, data, out))
    smallest = min(planned, key=lambda run: run.config.data.hold_out)
    unseen = smallest.config.pictures()
    with Progress(console=Console(stderr=True)) as progress:
        for run in planned:
            done = {look.step for look in looks if look.run == run.name}
            if run.config.steps in done:
                continue
            for look in look_along(run, family.looks, unseen, progress):
                if look.step not in done:
                    looks.append(look)
                    record = {"family": said, "looks": [each.model_dump() for each in looks]}
                    write_atomic(file, (json.dumps(record, indent=1) + "\n").encode())
    return looks


def summary(looks: Sequence[Look]) -> str:
    """Markdown: the last look of every run, side by side."""
    last = {look.run: look for look in sorted(looks, key=lambda look: look.step)}
    lines = [
        "| | parameters | GFLOPs a row | training memory | images/s | pictures | steps | training FLOPs | held-out loss |",
        "|---" + "|---:" * 8 + "|",
    ]
    for run, look in last.items():
        lines.append(
            f"| {run} | {look.parameters / 1e6:.2f} M | {2 * look.macs / 1e9:.3f} | {look.memory_mib:.0f} MiB | {look.images_per_s:.0f} "
            f"| {look.pictures} | {look.step} | {look.flops:.2e} | {look.loss:.4f} |"
        )
    return "\n".join(lines)


def report(looks: Sequence[Look], draws: int, out: Path) -> str:
    """Write scaling.md, and scaling.json and scaling.png where the DiTs of the family suffice for a fit; returns the text."""
    points = [look.point for look in looks if look.network == "dit"]
    lines = ["# Scaling", summary(looks)]
    try:
        law = fit(points)
    except ValueError as error:
        lines.append(f"No law was fitted: {error}.")
    else:
        laws = bootstrap(points, law, draws=draws)
        found = {"irreducible": interval(law.irreducible, [each.irreducible for each in laws])}
        for name, term in law.terms.items():
            found[f"{name}_exponent"] = interval(term.exponent, [each.terms[name].exponent for each in laws])
            found[f"{name}_coefficient"] = interval(term.plain, [each.terms[name].plain for each in laws])
        write_atomic(out / "scaling.json", (json.dumps(found, indent=1) + "\n").encode())
        draw_law(points, law, laws, out / "scaling.png")
        lines += [
            "| DiTs: L = Σ coefficient · variable^−exponent + irreducible | fit | 90 % of runs drawn again |\n|---|---:|---:|\n"
            + "\n".join(
                f"| {name.replace('_', ' ')} | {fitted:.4g} | {low:.4g} – {high:.4g} |"
                for name, (fitted, low, high) in found.items()
            ),
            "![Loss over parameters, pictures and compute](scaling.png)",
        ]
    text = "\n\n".join(lines) + "\n"
    write_atomic(out / "scaling.md", text.encode())
    return text


def interval(fitted: float, drawn: Sequence[float]) -> tuple[float, float, float]:
    """The fitted number, and between which bounds 90 % of the drawn ones lie."""
    low, high = np.quantile(drawn, [0.05, 0.95])
    return fitted, float(low), float(high)


def main(arguments: Sequence[str]) -> int:
    """Command line; whatever is wrong is said in one sentence, with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m model.scaling", description="Train a family and fit its scaling law."
    )
    parser.add_argument("family", type=Path, help="a JSON file")
    parser.add_argument("--data", type=Path, help="the pictures, if not where the recipe says")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--draws", type=int, default=200, help="of runs, for the confidence of the fit")
    options = parser.parse_args(arguments)
    try:
        family = Family.model_validate_json(options.family.read_text())
        options.out.mkdir(parents=True, exist_ok=True)
        print(report(measured(family, options.data, options.out), options.draws, options.out))
    except (DataError, CheckpointError, ValueError, OSError) as error:
        sentence = f"{options.family}: {mistake(error)}" if isinstance(error, ValidationError) else str(error)
        print(f"model.scaling: {sentence}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
