"""`python -m model.train.autoencoder --config run.json`: train the small autoencoder, with exact resume.

The folder OUTPUT/autoencoder holds the autoencoder as it was last measured; `model.data latents` and `--vae`
take it.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from pydantic import ValidationError

from ditserve.commands import command_line
from ditserve.model.nets.autoencoder import encoder_fingerprint
from ditserve.model.nets.small_autoencoder import ENCODER_OF, save_small_autoencoder
from ditserve.model.spec.bundle import write_atomic
from ditserve.model.spec.command_line import guarded, named_path
from ditserve.model.spec.output_folder import AUTOENCODER_RUN, claim
from ditserve.model.train.autoencoder.config import AutoencoderTrainConfig, load_autoencoder_config
from ditserve.model.train.autoencoder.trainer import AutoencoderTrainer
from ditserve.model.train.config import first_mistake
from ditserve.model.train.training import StopSignals
from ditserve.model.train.training_log import TrainingLog


def main(arguments: list[str]) -> int:
    """Run the command line and return its exit status; an error is one sentence on stderr and status 2."""
    parser = argparse.ArgumentParser(
        prog=command_line("model.train.autoencoder"), description="Train the small autoencoder."
    )
    parser.add_argument(
        "--config",
        type=named_path,
        required=True,
        help="JSON with the fields of AutoencoderTrainConfig (model/train/autoencoder/config.py)",
    )
    options = parser.parse_args(arguments)
    return guarded("model.train.autoencoder", lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Train to the end, from the newest checkpoint if there is one.

    Raises:
        ModelError, ValueError: a run that cannot work.
        KeyboardInterrupt: it was stopped; the message says how it goes on.
    """
    try:
        config = load_autoencoder_config(options.config)
    except ValidationError as error:
        raise ValueError(f"{options.config}: {first_mistake(error)}") from None
    torch.set_num_threads(config.threads or torch.get_num_threads())
    with claim(config.output, AUTOENCODER_RUN, apart=(config.data.path,)):
        trainer = AutoencoderTrainer(config)
        resumed = trainer.resume()
        parameters = trainer.state.parallel.parameter_count / 1e6
        print(f"resumed from {resumed}" if resumed else f"{config.output} is new")
        print(f"{parameters:.2f} M parameters, {len(trainer.dataset.training)} pictures")
        write_atomic(config.output / "config.json", (config.model_dump_json(indent=1) + "\n").encode())
        run_steps(trainer)


def run_steps(trainer: AutoencoderTrainer) -> None:
    """Run the remaining steps: log, save, measure. Raises KeyboardInterrupt if asked to stop."""
    config, state = trainer.config, trainer.state
    with TrainingLog(config, state) as log, StopSignals() as stop:
        while state.step < config.steps:
            metrics = trainer.step()
            last = state.step == config.steps
            if last or state.step % config.sheet_every == 0:
                figures = write_autoencoder(trainer)
                metrics |= figures
                described = ", ".join(f"{name} {value:g}" for name, value in figures.items())
                log.print(f"step {state.step}: {described}")
            log.record(state, metrics)
            if last or stop.received or state.step % config.checkpoint_every == 0:
                trainer.save()
            if stop.received and not last:
                raise KeyboardInterrupt("stopped; the same command goes on from the last checkpoint")


def write_autoencoder(trainer: AutoencoderTrainer) -> dict[str, float]:
    """Write the averaged autoencoder and a sheet of what it reconstructs; return its figures."""
    config, step = trainer.config, trainer.state.step
    measured = trainer.measure()
    measured.sheet.save(config.output / f"sheet-{step:07d}.png")
    folder = config.output / "autoencoder"
    folder.mkdir(exist_ok=True)
    card: dict[str, Any] = {
        "figures": measured.figures,
        "training": training_record(config, step),
        "licence": trainer.dataset.licence,
        "attribution": list(trainer.dataset.attribution),
    }
    if config.decoder_of is not None:
        card[ENCODER_OF] = encoder_fingerprint(config.decoder_of)
    save_small_autoencoder(folder, trainer.averaged_network(), card)
    return measured.figures


def training_record(config: AutoencoderTrainConfig, step: int) -> dict[str, object]:
    """Return what the card of an autoencoder tells of its training; paths of this machine are left out."""
    record = config.model_dump(mode="json", exclude={"output"})
    record["data"]["path"] = config.data.path.name
    if config.decoder_of is not None:
        record["decoder_of"] = config.decoder_of.name
    return {**record, "step": step}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
