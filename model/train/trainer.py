"""The optimiser steps of a run: driven by `python -m model.train`, or by hand.

trainer = Trainer(load_config(Path("run.json")))
trainer.step()                                      # {"loss": 1.33, "grad_norm": 2.75, "lr": 1.2e-05}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ditserve.model.distributed.parallel import ParallelNetwork
from ditserve.model.distributed.processes import World
from ditserve.model.nets.conditioner import embedding_penalty, means_of_others
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.experts import balance_loss, observed_routers
from ditserve.model.nets.factory import Network, make_network
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.errors import ModelError
from ditserve.model.train.base_model import base_bundle
from ditserve.model.train.batch import BatchSource, Prefetch, TrainingBatch
from ditserve.model.train.checkpoint import TrainingState, checkpoints, restore, save, saved_identity
from ditserve.model.train.condition_start import (
    SCALED_ROWS,
    complete_conditions,
    start_conditions,
    start_readers,
    start_scales,
)
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.distillation.config import ProgressiveDistillationConfig
from ditserve.model.train.distillation.objective import (
    DistillationObjective,
    distillation_loss,
    make_objective,
)
from ditserve.model.train.ema import Ema
from ditserve.model.train.identity import run_identity
from ditserve.model.train.load import describe_run, model_name, open_sheet_decoder
from ditserve.model.train.loaded_model import LoadedModel, save_model
from ditserve.model.train.lora import AdaptedNetwork, write_adapter
from ditserve.model.train.loss import PosteriorTables, RowNoise, squared_error, variational_term
from ditserve.model.train.optimizer import (
    HALF_DTYPES,
    autocast,
    learning_rate,
    loss_scaler,
    make_optimizer,
    muon_matrices,
)
from ditserve.model.train.recompute import checkpoint_blocks
from ditserve.model.train.warm_start import WarmStart, warm_start


class Diverged(ModelError):
    """The loss or its gradient is NaN or infinite again and again; the message is one sentence."""


class Trainer:
    """The owner of a network in training, its data and its state; `step()` is one optimiser step.

    Each process of a `world` trains on its rows of every batch, and with its part of the network.

    Raises:
        ValueError, DataError: a configuration or data that cannot work.
        AutoencoderError: the decoder of the sample sheets cannot be opened.
    """

    def __init__(self, config: TrainConfig, world: World | None = None) -> None:
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch finds no GPU: take --device cpu")
        if config.joint_dropout is None and (saved := saved_identity(config.output / "checkpoints")):
            # What is left out goes on as the run began: before there was this field, without it.
            config = config.model_copy(update={"joint_dropout": saved.get("joint_dropout", 0.0)})
        self.config, world = config, world or World(device=config.device)
        self.dataset = config.open_dataset()
        self.network_config = config.network_config(self.dataset)
        self.noise = config.training_noise
        self.schedule = self.noise.schedule
        self.posterior: PosteriorTables | None = None
        if config.diffusion.learn_sigma:
            self.posterior = PosteriorTables.of(self.schedule, config.device)
        rows = config.parallel.rows(world, config.batch)
        self.source = BatchSource(config, self.dataset, self.network_config, rows)
        self.identity = run_identity(config, self.dataset)
        self.checkpoints = config.output / "checkpoints"
        self.batches: Prefetch[TrainingBatch] | None = None
        # The bundle of the run is described before hours are spent on its weights.
        manifest = describe_run(model_name(config.output), config, self.dataset, self.network_config, 0)
        self.decoder = open_sheet_decoder(manifest, config.vae, config.device)
        torch.manual_seed(config.seed)
        self.warm_start: WarmStart | None = None
        self.objective: DistillationObjective | None = None
        self.adapted: AdaptedNetwork | None = None
        if config.lora is not None:
            self.adapted = AdaptedNetwork(base_bundle(config.init), config.lora, config.device)
        model = self.adapted or self._whole_network()
        self.recomputes = config.recomputes(self.network_config)
        if self.recomputes:
            checkpoint_blocks(self.adapted.base if self.adapted else cast(Network, model))
        self.parallel = ParallelNetwork(model, world, config.parallel, HALF_DTYPES.get(config.precision))
        ema, scaler = Ema(model, config.ema), loss_scaler(config.precision, config.device)
        muon = muon_matrices(model) if config.optimizer == "muon" else ()
        self.state = TrainingState(self.parallel, make_optimizer(model, config, muon=muon), ema, scaler)

    def _whole_network(self) -> Network:
        """Return the network to train as a whole, and open the teacher that it has."""
        config, model = self.config, make_network(self.network_config)
        for table in model.y_embedder.tables:
            nn.init.normal_(table.get_parameter("weight"), std=config.label_std)
        if config.start is not None and not checkpoints(self.checkpoints):
            self.warm_start = warm_start(model, self.dataset.factors, config.start)
            if "y_embedder.readers.0.weight" in self.warm_start.fresh and config.condition_start != "data":
                start_readers(model.y_embedder, self.dataset, seed=config.seed)
            if config.condition_start == "missing":
                complete_conditions(model, self.dataset, seed=config.seed)
        if config.condition_start == "data" and not checkpoints(self.checkpoints):
            start_conditions(model, self.dataset, std=config.label_std, seed=config.seed)
            if isinstance(model, DiT) and model.conditional_mean is not None:
                # All rows of each batch: processes must agree.
                source = BatchSource(config, self.dataset, self.network_config)
                batches = map(source.make_at_all_levels, range(-(-SCALED_ROWS // config.batch)))
                start_scales(model, model.conditional_mean, replace(self.noise, device="cpu"), batches)
        self.objective = make_objective(config, self.dataset, model)
        if self.objective is not None:
            self.identity |= self.objective.identity
        return model

    def step(self) -> dict[str, float]:
        """Train on one batch: forward, backward, clip, update, average.

        A gradient that is not finite is skipped. Return the loss, auxiliary losses by name, the gradient's
        norm and the learning rate.
        """
        config, state = self.config, self.state
        self.next_round()
        batch = self.next_batch()
        state.optimizer.zero_grad(set_to_none=True)
        metrics = self.parallel.all_reduce_mean(
            self._gradients(batch) if self.parallel.pipeline is None else self._pipelined(batch)
        )
        state.scaler.unscale_(state.optimizer)
        norm = self.parallel.clip_gradients(config.clip)
        rate = learning_rate(config, state.step)
        if math.isfinite(metrics["loss"]) and math.isfinite(norm):
            self.update(rate)
        else:
            self.skip(metrics["loss"])
        state.scaler.update()
        state.step += 1
        return {**metrics, "grad_norm": norm, "lr": rate}

    def _gradients(self, batch: TrainingBatch) -> dict[str, float]:
        """Add the gradient of a batch, in micro-batches. Return the mean of its losses by name."""
        metrics: dict[str, float] = {}
        pieces = list(batch.split(self.config.accumulate))
        for piece in pieces:
            weight = len(piece) / len(batch)
            with self.parallel.gradient_sync(last=piece is pieces[-1]):
                total, losses = self.losses(piece.to(self.config.device))
                self.state.scaler.scale(weight * total).backward()
            add_losses(metrics, losses, weight)
        return metrics

    def _pipelined(self, batch: TrainingBatch) -> dict[str, float]:
        """Do the same where the blocks are shared out: micro-batches flow through the processes.

        Raises:
            ValueError: the rows cannot be cut into equal micro-batches.
        """
        config, pipeline = self.config, self.parallel.pipeline
        assert pipeline is not None
        if len(batch) % config.accumulate:
            raise ValueError(
                f"accumulate {config.accumulate} does not divide the {len(batch)} rows of a pipeline into "
                "equal pieces: change batch or accumulate"
            )
        batch, metrics = batch.to(config.device), dict[str, float]()
        noise = self.noise.at(batch.t)
        x_t = noise.noisy(batch.x0, batch.noise)

        def loss(output: Tensor, rows: Tensor) -> Tensor:
            first, end = int(rows[0]), int(rows[-1]) + 1
            piece = batch[first:end]
            total, losses = self.loss_terms(piece, self.noise.at(piece.t), x_t[first:end], output)
            add_losses(metrics, losses, len(piece) / len(batch))
            return total * (len(piece) / len(batch))

        pipeline.run(
            (x_t, noise.told, batch.labels, batch.text),
            config.accumulate,
            loss,
            lambda: autocast(config.precision, config.device),
        )
        self.parallel.average_pipelines()
        return pipeline.of_last(metrics)

    def losses(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to descend, () fp32, and its unweighted terms by name ("loss": squared error)."""
        if self.objective is not None:
            batch = self.objective.prepare_batch(batch)
        config, noise = self.config, self.noise.at(batch.t)
        x_t = noise.noisy(batch.x0, batch.noise)
        with (
            observed_routers(self.state.model) as scores,
            means_of_others(self.state.model, batch.hidden),
            autocast(config.precision, config.device),
        ):
            output = self.parallel.forward(x_t, noise.told, *batch.conditions)
        total, terms = self.loss_terms(batch, noise, x_t, output.float())
        if weight := config.balance_weight(self.network_config):
            terms["balance"] = balance_loss(scores, cast(DiTConfig, self.network_config).top_k)
            total = total + weight * terms["balance"]
        return total, terms

    def loss_terms(
        self, batch: TrainingBatch, noise: RowNoise, x_t: Tensor, output: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the same of the output for the noisy pictures `x_t`, without the balance of experts."""
        config = self.config
        total = loss = squared_error(noise, output, batch.x0, batch.noise).mean()
        terms = {"loss": loss}
        if self.objective is not None:
            total, of_teacher = distillation_loss(self.objective, noise, output, batch, x_t, loss)
            terms |= of_teacher
        if self.posterior is not None:
            bound = variational_term(self.posterior, noise, output, batch.x0, x_t, batch.t).mean()
            terms["variational"] = bound
            total = total + config.variational * self.posterior.timesteps * bound
        if config.embedding_l2:
            embedding = cast(Network, self.state.model).embed(batch.labels, batch.text)
            terms["embedding_l2"] = embedding_penalty(embedding)
            total = total + config.embedding_l2 * terms["embedding_l2"]
        return total, terms

    def next_round(self) -> None:
        """Start the next round of a distillation if it begins at this step; select the teacher of this step.

        Between two rounds the averaged student is kept as a bundle and becomes the teacher. The next student
        starts from it, with a fresh optimiser and fresh averages.

        Raises:
            LoadError, BundleError: the teacher, an earlier round's student, cannot be loaded.
            OSError: the student cannot be written.
        """
        config, state, spec = self.config, self.state, self.config.distillation
        if self.objective is None:
            return
        if isinstance(spec, ProgressiveDistillationConfig) and spec.starts_round(state.step):
            student = self.averaged_network()
            folder = config.output / spec.student_folder(state.step - 1)
            if self.parallel.world.is_first:
                manifest = describe_run(folder.name, config, self.dataset, self.network_config, state.step)
                save_model(folder, LoadedModel(student, manifest))
            # A barrier: every process reads the student's bundle.
            self.parallel.world.all_agree(True)
            with torch.no_grad():
                for parameter, average in zip(
                    state.model.parameters(), state.ema.first.values(), strict=True
                ):
                    parameter.copy_(average)
            state.optimizer.state.clear()
            state.ema = Ema(state.model, config.ema)
        self.objective.select_teacher(state.step)

    def update(self, rate: float) -> None:
        """Apply the gradient with learning rate `rate`, and update the averages."""
        state = self.state
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.scaler.step(state.optimizer)
        state.ema.update(state.model.parameters())
        state.failures = 0

    def skip(self, loss: float) -> None:
        """Count a step without a finite gradient; it is no failure if a smaller loss scale will help."""
        state = self.state
        state.skipped += 1
        if not math.isfinite(loss) or state.scaler.get_scale() <= 1.0:
            state.failures += 1

    def next_batch(self) -> TrainingBatch:
        """Return the batch of the current step; later ones are made meanwhile."""
        if self.batches is None:
            rollbacks = self.state.rollbacks
            self.batches = Prefetch(
                lambda step: self.source.make(step, rollbacks),
                first=self.state.step,
                ahead=self.config.data.prefetch,
            )
        return next(self.batches)

    def close(self) -> None:
        """Drop the batches made early."""
        if self.batches is not None:
            self.batches.close()
            self.batches = None

    def resume(self) -> Path | None:
        """Restore the newest checkpoint that can be read. Return its path; None if there is none.

        Raises:
            CheckpointError: it is of another run, or none of several can be read.
        """
        self.close()
        return restore(self.checkpoints, self.state, self.identity)

    def save(self) -> None:
        """Write a checkpoint, and the averaged adapter of a run that trains one.

        Raises:
            CheckpointError: it cannot be written.
            OSError: the adapter cannot be written.
        """
        save(self.checkpoints, self.state, self.identity, keep=self.config.keep)
        if self.adapted and self.parallel.world.is_first:
            write_adapter(self.adapter_file, self.adapted, self.state.ema.first)

    @property
    def adapter_file(self) -> Path:
        """The file of the adapter, named as the run is."""
        return self.config.output / f"{model_name(self.config.output)}.safetensors"

    def roll_back(self) -> str:
        """Restore the last checkpoint, to go on with other pictures and noise. Return a sentence for the log.

        Raises:
            Diverged: the run was rolled back `rollback_limit` times already.
        """
        state, config = self.state, self.config
        step, skipped, rollbacks = state.step, state.skipped, state.rollbacks
        if rollbacks >= config.rollback_limit:
            raise Diverged(
                f"the loss or its gradient was not finite at step {step}, and {rollbacks} returns to a "
                f"checkpoint did not help: lower lr, raise warmup, or take precision fp32; "
                f"{self.checkpoints} is intact"
            )
        path = self.resume()
        state.skipped, state.failures, state.rollbacks = skipped, 0, rollbacks + 1
        return f"no finite gradient at step {step}: back to {path}, with other noise"

    def averaged_network(self) -> Network:
        """Return the network with averaged weights, in evaluation mode, at this step's picture size."""
        if self.adapted:
            return self.adapted.merged(self.state.ema.first)
        size = self.source.dataset_at(max(0, self.state.step - 1)).size
        model = make_network(replace(self.network_config, image_size=size)).to(self.config.device)
        self.state.ema.copy_to(model, self.parallel.full_tensor)
        return model.eval()


def add_losses(metrics: dict[str, float], losses: Mapping[str, Tensor], weight: float) -> None:
    """Add the losses of a micro-batch, with its weight, to those of the batch."""
    for name, loss in losses.items():
        metrics[name] = metrics.get(name, 0.0) + weight * loss.item()
