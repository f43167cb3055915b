"""`python -m model.train --config run.json`: train a network, with exact resume.

On several GPUs or machines, as `parallel` of the configuration says: torchrun --nproc-per-node 8 -m model.train --config run.json

Every random number is a function of (seed, step): the order of pictures, timesteps, noise and dropped conditions. So a run that
stops, even by SIGKILL, continues from its last checkpoint as if it had not stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from ditserve.model.data.examples import DataError
from ditserve.model.data.sources import NAMED
from ditserve.model.distributed.processes import World, joined
from ditserve.model.nets.autoencoder import Autoencoder, AutoencoderError
from ditserve.model.sampling.sheet import sample_sheet
from ditserve.model.spec.bundle import BundleError, write_atomic
from ditserve.model.train.checkpoint import CheckpointError, check_room
from ditserve.model.train.config import TrainConfig, load_config, mistake
from ditserve.model.train.curve import draw_curve
from ditserve.model.train.dry_run import rehearse, show
from ditserve.model.train.load import run_defaults
from ditserve.model.train.loaded_model import LoadError
from ditserve.model.train.logbook import Journal
from ditserve.model.train.trainer import Diverged, Trainer

SHEET_STEPS = 20  # at most, of a sample on a sheet
MISTAKES = DataError, CheckpointError, LoadError, BundleError, AutoencoderError, Diverged, ValueError


def run(config: TrainConfig, world: World | None = None) -> None:
    """Train to `config.steps`, resuming from `config.output` if it holds a checkpoint.

    Raises:
        ValueError, DataError, LoadError, BundleError, AutoencoderError: a run that cannot work.
        CheckpointError, OSError: a folder that cannot be written, or holds another run.
        Diverged: the loss is not finite again and again.
    """
    with closing(Trainer(config, world)) as trainer:
        begin(trainer)
        if trainer.state.step < config.steps:
            advance(trainer)
            if trainer.share.world.first:
                draw_curve(config.output)


def advance(trainer: Trainer) -> None:
    """Step after step to the end: log, save, show samples, and go back where the way is lost."""
    config, state = trainer.config, trainer.state
    with Journal(config, state) as journal:
        while state.step < config.steps:
            told = trainer.step()
            journal.record(state, told)
            last = state.step == config.steps
            due = last or state.step % config.checkpoint_every == 0
            if state.failures >= config.skip_limit or (due and not state.finite()):
                journal.say(trainer.roll_back())
                journal.rewind(state.step)
                continue
            if due and (last or not state.failures):
                trainer.save()
            if trainer.decoder is not None and (last or state.step % config.sheet_every == 0):
                draw_sheet(trainer, trainer.decoder)


def draw_sheet(trainer: Trainer, decoder: Autoencoder) -> None:
    """Samples of the averaged weights as they are now."""
    config, step = trainer.config, trainer.state.step
    averaged, said = trainer.averaged(), run_defaults(config, step)
    if trainer.share.world.first:
        sheet = sample_sheet(
            averaged,
            trainer.schedule,
            decoder,
            steps=min(SHEET_STEPS, said.steps),
            guidance_scale=said.guidance_scale,
            seed=config.seed,
            clip_x0=config.diffusion.clip_x0,
        )
        sheet.save(config.output / f"sheet-{step:07d}.png")


def begin(trainer: Trainer) -> None:
    """Resume, or start from `init` or from nothing; say what runs, and make sure that it can be written."""
    config, state = trainer.config, trainer.state
    config.output.mkdir(parents=True, exist_ok=True)
    resumed = trainer.resume()
    if resumed is not None:
        print(f"resumed from {resumed}")
    elif trainer.warm is not None:
        print(f"{config.start}: {trainer.warm}")
    if state.step >= config.steps:
        print(f"{config.output} is at step {state.step} already: raise steps to train on")
    print(
        f"{state.share.elements / 1e6:.2f} M parameters, {len(trainer.source.training)} pictures, classes {trainer.network_config.classes}"
    )
    print(config.model_dump_json())
    if skipped := trainer.dataset.skipped:
        print(f"{len(skipped)} pictures cannot be read and are left out: {'; '.join(skipped[:NAMED])}")
    if trainer.decoder is None:
        print("no sample sheets: vae does not name the folder of the SD-VAE that made these latents")
    check_room(config.output, state, keep=config.keep)
    if state.share.world.first:
        write_atomic(config.output / "config.json", (config.model_dump_json(indent=1) + "\n").encode())
    if resumed is None:
        trainer.save()
    if config.compile:
        state.model.compile()


def main(arguments: list[str]) -> int:
    """Command line: `--config FILE`, and fields of it by flag; a mistake is one sentence and status 2."""
    options = _parser().parse_args(arguments)
    named = [f"{field}={value}" for field in FLAGS if (value := getattr(options, field)) is not None]
    try:
        config = load_config(options.config, [*options.set, *named])
        torch.set_num_threads(config.threads or torch.get_num_threads())
        with joined(config.device) as world, _quiet(world):
            if not options.dry_run:
                run(config, world)
            elif world.size > 1:
                raise ValueError("--dry-run is of one process: leave torchrun out")
            else:
                with closing(Trainer(config)) as trainer:
                    for line in show(trainer, rehearse(trainer)):
                        print(line)
    except KeyboardInterrupt:
        return _refuse("stopped; the same command goes on from the last checkpoint")
    except ValidationError as error:
        return _refuse(f"{options.config}: {mistake(error)}")
    except OSError as error:
        return _refuse(f"{error.filename or 'the output folder'} cannot be used: {error.strerror or error}")
    except MISTAKES as error:
        return _refuse(str(error))
    return 0


FLAGS: dict[str, dict[str, Any]] = {
    "output": {
        "metavar": "FOLDER",
        "help": "of the run: checkpoints, log, sheets; an earlier run in it is continued",
    },
    "steps": {"metavar": "N"},
    "batch": {"metavar": "N", "help": "pictures of one step"},
    "device": {"metavar": "cpu|cuda"},
    "seed": {"metavar": "N"},
}


@contextmanager
def _quiet(world: World) -> Iterator[None]:
    """Only the first process tells how it goes on."""
    with open(os.devnull, "w") as nowhere, nullcontext() if world.first else redirect_stdout(nowhere):
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model.train", description="Train a network.")
    parser.add_argument(
        "--config", type=Path, required=True, help="JSON with the fields of TrainConfig (model/recipe.py)"
    )
    for field, told in FLAGS.items():
        parser.add_argument(f"--{field}", **told)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any field: --set data.hold_out=0 --set lr=3e-4",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tell parameters, memory, speed and duration; write nothing"
    )
    return parser


def _refuse(sentence: str) -> int:
    print(f"model.train: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
