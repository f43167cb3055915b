"""`python -m model.train.autoencoder --config run.json`: train the small autoencoder, with exact resume."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ditserve.model.spec.bundle import write_atomic
from ditserve.model.train.autoencoder.config import AutoencoderTrainConfig
from ditserve.model.train.autoencoder.trainer import AutoencoderTrainer
from ditserve.model.train.training import StopSignals
from ditserve.model.train.training_log import TrainingLog


def run(config: AutoencoderTrainConfig) -> None:
    torch.set_num_threads(config.threads or torch.get_num_threads())
    config.output.mkdir(parents=True, exist_ok=True)
    trainer = AutoencoderTrainer(config)
    resumed = trainer.resume()
    print(f"resumed from {resumed}" if resumed else "started", len(trainer.dataset.training), "pictures")
    state = trainer.state
    write_atomic(config.output / "config.json", (config.model_dump_json(indent=1) + "\n").encode())
    with TrainingLog(config, state) as log, StopSignals() as stop:
        while state.step < config.steps:
            metrics = trainer.step()
            last = state.step == config.steps
            if last or state.step % config.sheet_every == 0:
                figures, sheet = trainer.measure()
                metrics |= figures
                sheet.save(config.output / f"sheet-{state.step:07d}.png")
                log.print(f"step {state.step}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
            log.record(state, metrics)
            if last or stop.received or state.step % config.checkpoint_every == 0:
                trainer.save()
            if stop.received and not last:
                raise KeyboardInterrupt


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--config", type=Path, required=True)
    run(AutoencoderTrainConfig.model_validate_json(p.parse_args().config.read_text()))
