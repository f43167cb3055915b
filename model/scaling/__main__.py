"""`python -m model.scaling FAMILY.json --data FILE --out FOLDER`: train networks of several sizes with equal compute, and fit a law.

    {"train": "model/zoo/emoji/train.json",            the recipe: everything but the network
     "set": ["data.size=32"],                          fields of it that differ here
     "flops": 2e12,                                    of training, each run's
     "models": {"DiT-96": {"patch_size": 8, "hidden_size": 96, "depth": 4, "num_heads": 3},
                "U-Net": {"network": "unet", "base_channels": 32, "multipliers": [1, 2, 2]}},
     "hold_outs": [0.03, 0.5],                         shares of pairs kept from training: less data to learn from
     "looks": 4}                                       losses measured along a run: at flops, flops/2, flops/4, …

Every run keeps the recipe's learning rate, constant, so that a loss midway is what a shorter run would have reached. Losses are
those of the averaged weights on the pairs that no run trains on. Writes scaling.json after every look (what is there already is not
trained again), and at the end what it found: the law, if there are enough DiTs for one, in scaling.json, scaling.md with the
networks side by side, and scaling.png. Each run's folder can be sampled and evaluated.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

from ditserve.model.data.dataset import Dataset
from ditserve.model.data.examples import DataError
from ditserve.model.nets.autoencoder import AutoencoderError
from ditserve.model.nets.cost import cost
from ditserve.model.scaling.figure import draw_law
from ditserve.model.scaling.law import bootstrap, fit
from ditserve.model.scaling.record import RECORD, Family, Look, Record, keep
from ditserve.model.spec.bundle import write_atomic
from ditserve.model.spec.diffusion import add_noise
from ditserve.model.train.checkpoint import CheckpointError
from ditserve.model.train.config import TrainConfig, load_config, mistake
from ditserve.model.train.dry_run import PASSES, StageCost, rehearse
from ditserve.model.train.loss import rows, squared_error
from ditserve.model.train.trainer import Trainer

DRAWS = 16  # noise levels at which each held-out picture's loss is measured, spread evenly


@dataclass(frozen=True, slots=True)
class Run:
    """A network to train, with so many multiply-adds of a row, and the floating-point operations of an optimiser step."""

    title: str
    model: str
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
    recipe = load_config(family.train, family.set)
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
            run = Run(title, name, config, cost(config.network(dataset)).macs)
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
    task = progress.add_task(run.title, total=config.steps, completed=state.step)
    due = {config.steps >> k for k in range(looks)}
    while state.step < config.steps:
        trainer.step()
        progress.update(task, completed=state.step)
        if state.step in due:
            yield Look(
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


def measured(family: Family, planned: Sequence[Run], out: Path) -> Record:
    """Train what is not in scaling.json yet, and return all of it.

    Raises:
        ValueError: the folder holds the results of another family, or they cannot be read.
    """
    file = out / RECORD
    record = Record(
        family=family, machine=f"{torch.get_num_threads()} of {os.cpu_count()} cores, {platform.platform()}"
    )
    if file.is_file():
        try:
            record = Record.model_validate_json(file.read_text())
        except ValidationError as error:
            raise ValueError(f"{file} does not hold a family's results: {mistake(error)}") from None
    if record.family != family:
        raise ValueError(f"{file} holds the results of another family: choose another --out")
    unseen = min(planned, key=lambda run: run.config.data.hold_out).config.pictures()
    with Progress(console=Console(stderr=True)) as progress:
        for run in planned:
            done = {look.step for look in record.looks if look.run == run.title}
            if run.config.steps in done:
                continue
            for look in look_along(run, family.looks, unseen, progress):
                if look.step not in done:
                    record = record.model_copy(update={"looks": (*record.looks, look)})
                    keep(record, out)
    return record


def speeds(planned: Sequence[Run]) -> dict[str, StageCost]:
    """What training each network of the family costs, tried out for a few steps."""
    found: dict[str, StageCost] = {}
    for run in planned:
        if run.model not in found:
            with closing(Trainer(run.config)) as trainer:
                *_, found[run.model] = rehearse(trainer)
    return found


def summary(record: Record, costs: Mapping[str, StageCost]) -> str:
    """Markdown: the family's networks, and what each cost and learned from so many pictures."""
    last = {look.run: look for look in sorted(record.looks, key=lambda look: look.step)}
    amounts = sorted({look.pictures for look in last.values()}, reverse=True)
    titles = [f"loss, {pictures} pictures" for pictures in amounts]
    lines = [
        " | ".join(["| ", "parameters", "GFLOPs a row", "training memory", "images/s", "steps", *titles])
        + " |",
        "|---" + "|---:" * (5 + len(titles)) + "|",
    ]
    for name, each in costs.items():
        mine = {look.pictures: look for look in last.values() if look.model == name}
        any_of = next(iter(mine.values()))
        losses = [f"{mine[pictures].loss:.4f}" for pictures in amounts]
        facts = [
            name,
            f"{any_of.parameters / 1e6:.2f} M",
            f"{2 * each.macs / 1e9:.3f}",
            f"{each.memory.total / 2**20:.0f} MiB",
            f"{each.images_per_s:.0f}",
            f"{any_of.step}",
        ]
        lines.append(f"| {' | '.join([*facts, *losses])} |")
    return "\n".join(lines)


def report(record: Record, costs: Mapping[str, StageCost], draws: int, out: Path) -> str:
    """Write scaling.md and scaling.json, and scaling.png where the DiTs of the family suffice for a fit; returns the text."""
    points = [look.point for look in record.looks if look.network == "dit"]
    family = record.family
    changes = f" with {', '.join(family.set)}" if family.set else ""
    lines = [
        "# Scaling",
        f"Every network had {family.flops:.3g} floating-point operations of training by `{family.train}`{changes}, for each amount of "
        f"pictures. Loss: that of the averaged weights on pairs which none was trained on. On {record.machine}; images/s over a few "
        f"steps, at a load average of {os.getloadavg()[0]:.1f}.",
        summary(record, costs),
    ]
    found: dict[str, tuple[float, float, float]] = {}
    try:
        law = fit(points)
    except ValueError as error:
        lines.append(f"No law was fitted: {error}.")
    else:
        laws = bootstrap(points, law, draws=draws)
        found["irreducible"] = interval(law.irreducible, [each.irreducible for each in laws])
        for name, term in law.terms.items():
            found[f"{name}_exponent"] = interval(term.exponent, [each.terms[name].exponent for each in laws])
            found[f"{name}_coefficient"] = interval(term.plain, [each.terms[name].plain for each in laws])
        draw_law(points, law, laws, out / "scaling.png")
        lines += [
            "| DiTs: L = Σ coefficient · variable^−exponent + irreducible | fit | 90 % of runs drawn again |\n|---|---:|---:|\n"
            + "\n".join(
                f"| {name.replace('_', ' ')} | {fitted:.4g} | {low:.4g} – {high:.4g} |"
                for name, (fitted, low, high) in found.items()
            ),
            "![Loss over parameters, pictures and compute](scaling.png)",
        ]
    keep(record.model_copy(update={"law": found}), out)
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
        planned = list(runs(family, options.data, options.out))
        record = measured(family, planned, options.out)
        print(report(record, speeds(planned), options.draws, options.out))
    except (DataError, CheckpointError, AutoencoderError, ValueError, OSError) as error:
        sentence = f"{options.family}: {mistake(error)}" if isinstance(error, ValidationError) else str(error)
        print(f"model.scaling: {sentence}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
