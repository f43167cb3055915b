"""One optimiser step after another: what `python -m model.train` drives, and what can be driven by hand.

trainer = Trainer(load_config(Path("run.json")))
trainer.step()                                      # {"loss": 1.33, "grad_norm": 2.75, "lr": 1.2e-05}
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ditserve.model.distributed.parallel import Share
from ditserve.model.distributed.precision import autocast, loss_scaler
from ditserve.model.distributed.processes import World
from ditserve.model.nets.conditioner import embedding_penalty
from ditserve.model.nets.factory import Network, make_network
from ditserve.model.spec.diffusion import add_noise
from ditserve.model.spec.errors import ModelError
from ditserve.model.train.activation_checkpointing import checkpoint_blocks
from ditserve.model.train.batch import Batch, BatchSource
from ditserve.model.train.checkpoint import TrainingState, checkpoints, restore, save
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.distillation import make_lesson, taught
from ditserve.model.train.distillation_config import ProgressiveDistillation
from ditserve.model.train.ema import Ema
from ditserve.model.train.load import describe_run, open_decoder
from ditserve.model.train.loaded_model import LoadedModel, save_model
from ditserve.model.train.loss import noise_tables, rows, squared_error, variational_term
from ditserve.model.train.optimizer import learning_rate, make_optimizer
from ditserve.model.train.prefetch import Prefetch
from ditserve.model.train.warm_start import WarmStart, warm_start


class Diverged(ModelError):
    """The loss or its gradient is NaN or infinite again and again; the message is one sentence."""


class Trainer:
    """Owns the network, its data and its state; `step()` is one optimiser step.

    Each process of a `world` trains on its share of every batch, and with its share of the network.

    Raises:
        ValueError, DataError: a configuration or data that cannot work.
        AutoencoderError: the decoder of the sample sheets cannot be opened.
    """

    def __init__(self, config: TrainConfig, world: World | None = None) -> None:
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch finds no GPU: take --device cpu")
        self.config, world = config, world or World(device=config.device)
        self.dataset = config.pictures()
        self.network_config = config.network(self.dataset)
        self.schedule = config.diffusion.noise_schedule()
        mine = config.parallel.rows(world, config.batch)
        self.source = BatchSource(config, self.dataset, self.network_config, mine)
        self.tables = noise_tables(
            self.schedule, config.space, config.loss_cap, config.device, floor=config.loss_floor
        )
        self.identity = config.identity(self.dataset)
        self.checkpoints = config.output / "checkpoints"
        self.batches: Prefetch[Batch] | None = None
        self.decoder = open_decoder(self.dataset, config.vae, config.device)
        torch.manual_seed(config.seed)
        model = make_network(self.network_config)
        for table in model.y_embedder.tables:
            nn.init.normal_(table.get_parameter("weight"), std=config.label_std)
        if config.checkpoint_blocks:
            checkpoint_blocks(model)
        self.warm: WarmStart | None = None
        if config.start is not None and not checkpoints(self.checkpoints):
            self.warm = warm_start(model, self.dataset.factors, config.start)
        self.lesson = make_lesson(config, self.dataset, model)
        if self.lesson is not None:
            self.identity |= self.lesson.identity
        self.share = Share(model, world, config.parallel, config.precision)
        ema, scaler = Ema(model, config.ema), loss_scaler(config.precision, config.device)
        self.state = TrainingState(self.share, make_optimizer(model, config), ema, scaler)

    def step(self) -> dict[str, float]:
        """Forward and backward over the batch, clip, update, average; a gradient that is not finite is passed over.

        Returns the loss, auxiliary losses by name, the gradient's norm and the learning rate.
        """
        config, state = self.config, self.state
        self.turn()
        batch = self.next_batch()
        told: dict[str, float] = {}
        state.optimizer.zero_grad(set_to_none=True)
        parts = list(batch.split(config.accumulate))
        for part in parts:
            weight = len(part) / len(batch)
            with self.share.piece(last=part is parts[-1]):
                total, losses = self.losses(part.to(config.device))
                state.scaler.scale(weight * total).backward()
            for name, loss in losses.items():
                told[name] = told.get(name, 0.0) + weight * loss.item()
        told = self.share.mean(told)
        state.scaler.unscale_(state.optimizer)
        norm = self.share.clip(config.clip)
        rate = learning_rate(config, state.step)
        if math.isfinite(told["loss"]) and math.isfinite(norm):
            self.update(rate)
        else:
            self.skip(told["loss"])
        state.scaler.update()
        state.step += 1
        return {**told, "grad_norm": norm, "lr": rate}

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What to descend, and what it is made of: "loss", and auxiliary terms by name, unweighted."""
        if self.lesson is not None:
            batch = self.lesson.pose(batch)
        config, tables, t = self.config, self.tables, batch.t
        x_t = add_noise(rows(tables.alpha, t), rows(tables.sigma, t), batch.x0, batch.noise)
        with autocast(config.precision, config.device):
            output = self.share.forward(x_t, t, batch.labels, batch.text)
        output = output.float()
        total = loss = squared_error(tables, output, batch.x0, batch.noise, t).mean()
        parts = {"loss": loss}
        if self.lesson is not None:
            total, lessons = taught(self.lesson, tables, output, batch, x_t, loss)
            parts |= lessons
        if config.diffusion.learn_sigma:
            parts["variational"] = variational_term(tables, output, batch.x0, x_t, t).mean()
            total = total + config.variational * tables.timesteps * parts["variational"]
        if config.embedding_l2:
            embedding = cast(Network, self.state.model).embed(batch.labels, batch.text)
            parts["embedding_l2"] = embedding_penalty(embedding)
            total = total + config.embedding_l2 * parts["embedding_l2"]
        return total, parts

    def turn(self) -> None:
        """Between two rounds of a distillation the student, averaged, becomes the teacher, and goes on from itself afresh.

        Raises:
            LoadError, BundleError: the teacher, an earlier round's student, cannot be opened.
            OSError: it cannot be kept.
        """
        config, state, spec = self.config, self.state, self.config.distillation
        if self.lesson is None:
            return
        if isinstance(spec, ProgressiveDistillation) and spec.begins(state.step):
            student = self.averaged()
            folder = config.output / spec.folder(state.step - 1)
            if state.share.world.first:
                said = describe_run(folder.name, config, self.dataset, self.network_config, state.step)
                save_model(folder, LoadedModel(student, said))
            state.share.world.agree(True)  # it is there for all of them
            with torch.no_grad():
                for parameter, average in zip(
                    state.model.parameters(), state.ema.first.values(), strict=True
                ):
                    parameter.copy_(average)
            state.optimizer.state.clear()
            state.ema = Ema(state.model, config.ema)
        self.lesson.begin(state.step)

    def update(self, rate: float) -> None:
        """Apply the gradient, and fold the result into the averages."""
        state = self.state
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.scaler.step(state.optimizer)
        state.ema.update(state.model.parameters())
        state.failures = 0

    def skip(self, loss: float) -> None:
        """Count a step without a finite gradient; what a smaller loss scale will cure is no failure."""
        state = self.state
        state.skipped += 1
        if not math.isfinite(loss) or state.scaler.get_scale() <= 1.0:
            state.failures += 1

    def next_batch(self) -> Batch:
        """The batch of the step at hand; the following ones are being made meanwhile."""
        if self.batches is None:
            rollbacks = self.state.rollbacks
            self.batches = Prefetch(
                lambda step: self.source.make(step, rollbacks),
                first=self.state.step,
                ahead=self.config.data.prefetch,
            )
        return next(self.batches)

    def close(self) -> None:
        """Forget the batches made ahead."""
        if self.batches is not None:
            self.batches.close()
            self.batches = None

    def resume(self) -> Path | None:
        """Continue from the newest checkpoint that can be read, if there is one.

        Raises:
            CheckpointError: it is of another run, or none can be read.
        """
        self.close()
        return restore(self.checkpoints, self.state, self.identity)

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: it cannot be written.
        """
        save(self.checkpoints, self.state, self.identity, keep=self.config.keep)

    def roll_back(self) -> str:
        """Return to the last checkpoint and go on from there with other pictures and noise; tells so.

        Raises:
            Diverged: that was done `rollback_limit` times already.
        """
        state, config = self.state, self.config
        step, skipped, rollbacks = state.step, state.skipped, state.rollbacks
        if rollbacks >= config.rollback_limit:
            raise Diverged(
                f"the loss or its gradient was not finite at step {step}, and {rollbacks} returns to a checkpoint did not help: "
                f"lower lr, raise warmup, or take precision fp32; {self.checkpoints} is intact"
            )
        path = self.resume()
        state.skipped, state.failures, state.rollbacks = skipped, 0, rollbacks + 1
        return f"no finite gradient at step {step}: back to {path}, with other noise"

    def averaged(self) -> Network:
        """A copy of the network with the averaged weights, in evaluation mode, at the picture size of this step."""
        size = self.source.at(max(0, self.state.step - 1)).size
        model = make_network(replace(self.network_config, image_size=size)).to(self.config.device)
        self.state.ema.copy_to(model, self.share.whole)
        return model.eval()
