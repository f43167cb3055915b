"""`python -m model.train --data FOLDER` or `--config run.json`: train a network, with exact resume.

With `--data` alone the recipe follows from the pictures and this machine (`model.train.recipe`). On several
GPUs or machines, as `parallel` of the configuration says: torchrun --nproc-per-node 8 -m
model.train --config run.json
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, redirect_stdout
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console

from ditserve.commands import command_line
from ditserve.model.distributed.processes import World, join_processes, made_by_first
from ditserve.model.spec.command_line import guarded, named_path
from ditserve.model.spec.output_folder import RUN, check_folder
from ditserve.model.train.config import TrainConfig, first_mistake
from ditserve.model.train.dry_run import estimate_stages, format_estimate
from ditserve.model.train.recipe import recipe_table, run_fields
from ditserve.model.train.trainer import Trainer
from ditserve.model.train.training import train

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


def main(arguments: list[str]) -> int:
    """Run the command line and return its exit status; an error is one sentence on stderr and status 2."""
    options = _parser().parse_args(arguments)
    return guarded("model.train", lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Train, or estimate the cost with `--dry-run`.

    Raises:
        ModelError, ValueError: a run that cannot work.
        KeyboardInterrupt: it was stopped; the message says how it goes on.
    """
    flags = [f"{field}={value}" for field in FLAGS if (value := getattr(options, field)) is not None]
    try:
        config = _configuration(options, [*options.set, *flags])
        torch.set_num_threads(config.threads or torch.get_num_threads())
        with join_processes(config.device) as world, _first_prints(world):
            if not options.dry_run:
                train(config, world)
            elif world.size > 1:
                raise ValueError("--dry-run is of one process: leave torchrun out")
            else:
                check_folder(config.output, RUN, apart=(config.data.path,))
                with closing(Trainer(config)) as trainer:
                    for line in format_estimate(trainer, estimate_stages(trainer)):
                        print(line)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on from the last checkpoint") from None
    except ValidationError as error:
        raise ValueError(f"{options.config or options.data}: {first_mistake(error)}") from None
    except OSError as error:
        place = error.filename or "the output folder"
        raise ValueError(f"{place} cannot be used: {error.strerror or error}") from None


def _configuration(options: argparse.Namespace, overrides: Sequence[str]) -> TrainConfig:
    """Return the run that the command line describes."""
    if options.config is None and options.data is None:
        raise ValueError("say what to train on: --data FOLDER, or a run's --config FILE")
    fields = made_by_first(lambda: _fields(options, overrides))
    if "data" not in fields:
        raise ValueError(f"{options.config} names no data: say what to train on with --data")
    return TrainConfig.model_validate(fields)


def _fields(options: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the fields of the run; print what was chosen for it."""
    fields, choices = run_fields(options.config, options.data, overrides)
    if choices:
        Console().print(recipe_table(choices))
    elif options.config is None:
        print(f"{fields['output']} is there already: it goes on with its own recipe, its config.json")
    return fields


@contextmanager
def _first_prints(world: World) -> Iterator[None]:
    """Discard what processes other than the first print."""
    with open(os.devnull, "w") as nowhere, nullcontext() if world.is_first else redirect_stdout(nowhere):
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=command_line("model.train"), description="Train a network.")
    parser.add_argument(
        "--config",
        type=named_path,
        help="JSON with the fields of TrainConfig (model/train/config.py)",
    )
    parser.add_argument(
        "--data",
        type=named_path,
        help="pictures to train on: a folder, .npz, .tar or latents; what --config leaves open is chosen",
    )
    for field, keywords in FLAGS.items():
        parser.add_argument(f"--{field}", **keywords)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
