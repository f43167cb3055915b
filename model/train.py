"""`python -m model.train --config run.json`: train a DiT, with exact resume.

Every random number is a function of (seed, step): the order of pictures, timesteps, noise and dropped conditions. So a run that
stops, even by SIGKILL, continues from its last checkpoint as if it had not stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from model.checkpoint import CheckpointError, TrainingState, restore, save
from model.conditioner import drop_labels
from model.diffusion import add_noise, loss_weights, training_target
from model.dit import DiT
from model.ema import Ema
from model.pictures import DataError, batch_indices
from model.recipe import TrainConfig, load_config
from model.sample import sample_sheet


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Warm-up, plateau, linear decay to zero over the last `decay · steps` steps."""
    falling = (config.steps - step) / max(1.0, config.decay * config.steps)
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup), falling)


class Trainer:
    """Owns the model, its data and its state; `step()` is one optimiser step."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.pictures = config.pictures()
        self.dit_config = config.network(self.pictures)
        self.schedule = config.diffusion.noise_schedule()
        torch.manual_seed(config.seed)
        model = DiT(self.dit_config).to(config.device)
        for table in model.y_embedder.tables:
            torch.nn.init.normal_(table.get_parameter("weight"), std=config.label_std)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.state = TrainingState(model, optimizer, Ema(model, config.ema))
        self.images = torch.from_numpy(self.pictures.images).permute(0, 3, 1, 2).contiguous()  # uint8
        self.labels = torch.from_numpy(self.pictures.labels)
        weights = loss_weights(self.schedule, config.loss_space, config.loss_cap)
        tables = (self.schedule.alphas, self.schedule.sigmas, weights)
        self.alpha, self.sigma, self.weight = (
            torch.from_numpy(table).float().to(config.device) for table in tables
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be continued."""
        config = self.config
        return {
            "model": json.loads(json.dumps(config.model)),
            "diffusion": config.diffusion.model_dump(mode="json"),
            "classes": list(self.dit_config.classes),
            "seed": config.seed,
            "batch": config.batch,
        }

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures (N, 3, H, W) in [−1, 1], labels (N, F) after dropout, timesteps (N,), noise: all by (seed, step)."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        train = self.pictures.training
        index = torch.from_numpy(train[batch_indices(len(train), self.config.batch, step, self.config.seed)])
        x0 = self.images[index].float() / 127.5 - 1
        rates = self.config.label_dropout * (
            len(self.dit_config.classes) if len(self.config.label_dropout) == 1 else 1
        )
        labels = drop_labels(self.labels[index], self.dit_config, rates, generator)
        t = torch.randint(self.schedule.timesteps, (len(index),), generator=generator)
        return x0, labels, t, torch.randn(x0.shape, generator=generator)

    def step(self) -> dict[str, float]:
        """Forward, backward, clip, update, average; returns loss, gradient norm and learning rate."""
        config, state = self.config, self.state
        x0, labels, t, noise = (part.to(config.device) for part in self.batch(state.step))
        alpha, sigma = self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)
        output = state.model(add_noise(alpha, sigma, x0, noise), t, labels)
        target = training_target(config.diffusion.prediction, alpha, sigma, x0, noise)
        error = (output.float() - target).square().flatten(1).mean(1)  # (N,)
        loss = (error * self.weight[t]).mean()
        if not torch.isfinite(loss):
            raise NonFiniteLoss(
                f"loss is {loss.item()} at step {state.step}: lower lr or raise warmup; the last checkpoint is intact"
            )
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
        rate = learning_rate(config, state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.step()
        state.ema.update(state.model.parameters())
        state.step += 1
        return {"loss": loss.item(), "grad_norm": norm.item(), "lr": rate}

    def averaged(self) -> DiT:
        """A copy of the model with the averaged weights, in evaluation mode."""
        model = DiT(self.dit_config).to(self.config.device)
        self.state.ema.copy_to(model)
        return model.eval()


def run(config: TrainConfig) -> None:
    """Train to `config.steps`, resuming from `config.output` if it holds a checkpoint."""
    trainer = Trainer(config)
    state, folder = trainer.state, config.output
    folder.mkdir(parents=True, exist_ok=True)
    if restore(folder / "checkpoints", state, trainer.identity):
        print(f"resumed at step {state.step}")
    (folder / "config.json").write_text(config.model_dump_json(indent=1) + "\n")
    parameters = sum(p.numel() for p in state.model.parameters())
    print(
        f"{parameters / 1e6:.2f} M parameters, {len(trainer.pictures.training)} pictures, classes {trainer.dit_config.classes}"
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    smooth, since, seen = None, time.monotonic(), 0
    with Progress(*columns) as progress, (folder / "log.jsonl").open("a") as log:
        task = progress.add_task("train", total=config.steps, completed=state.step, note="")
        while state.step < config.steps:
            record = trainer.step()
            smooth = record["loss"] if smooth is None else 0.98 * smooth + 0.02 * record["loss"]
            seen += config.batch
            if state.step % config.log_every == 0:
                rate, since, seen = seen / (time.monotonic() - since), time.monotonic(), 0
                note = f"loss {smooth:.4f}  grad {record['grad_norm']:.2f}  {rate:.0f} img/s"
                progress.update(task, completed=state.step, note=note)
                log.write(
                    json.dumps(
                        {"step": state.step, **record, "smooth_loss": smooth, "images_per_s": round(rate, 1)}
                    )
                    + "\n"
                )
                log.flush()
            if state.step % config.checkpoint_every == 0 or state.step == config.steps:
                save(folder / "checkpoints", state, trainer.identity)
            if state.step % config.sheet_every == 0 or state.step == config.steps:
                sheet = sample_sheet(trainer.averaged(), trainer.schedule, seed=config.seed)
                sheet.save(folder / f"sheet-{state.step:07d}.png")


def main(arguments: list[str]) -> int:
    """Command line: `--config FILE` and `--set key=value` overrides (dotted keys, JSON values)."""
    parser = argparse.ArgumentParser(prog="python -m model.train")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for example --set data.hold_out=0"
    )
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.set)
        torch.set_num_threads(config.threads or torch.get_num_threads())
        run(config)
    except ValidationError as error:
        first = error.errors()[0]
        return _refuse(f"{options.config}: {'.'.join(map(str, first['loc']))}: {first['msg']}")
    except (DataError, CheckpointError, NonFiniteLoss, ValueError, OSError) as error:
        return _refuse(str(error))
    return 0


def _refuse(sentence: str) -> int:
    print(f"model.train: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
