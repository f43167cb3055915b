"""One optimiser step: every precision, micro-batches, and gradients that are not finite."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditserve.model.nets.dit import DiT
from ditserve.model.spec.diffusion import add_noise, loss_weights, training_target
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.optimizer import learning_rate
from ditserve.model.train.trainer import Diverged, Trainer
from ditserve.model.train.training import start
from tests.model.train.training_cases import tiny_config

UNET = {
    "network": "unet",
    "base_channels": 8,
    "multipliers": [1, 2],
    "head_size": 8,
    "attention": [1],
    "res_blocks": 1,
}
LEARNED = {"schedule": "linear", "prediction": "epsilon", "learn_sigma": True}


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.state.model.named_parameters()}


def gradients(config: TrainConfig) -> dict[str, Tensor]:
    """Return the gradients of the second step (in the first, zeroed layers block them)."""
    trainer = Trainer(config)
    trainer.step()
    trainer.step()
    return {name: p.grad.clone() for name, p in trainer.state.model.named_parameters() if p.grad is not None}


def plain(config: TrainConfig, steps: int) -> tuple[list[float], DiT]:
    """Train by the algorithm without options, written down once more. Return the losses and the network."""
    trainer, schedule = Trainer(config), config.diffusion.noise_schedule()
    torch.manual_seed(config.seed)
    network = trainer.network_config
    model = DiT(network)  # type: ignore[arg-type]
    for table in model.y_embedder.tables:
        torch.nn.init.normal_(table.get_parameter("weight"), std=config.label_std)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=config.betas, weight_decay=0, fused=True
    )
    weight = torch.from_numpy(loss_weights(schedule, range(1000), "v", config.loss_cap)).float()
    alphas = torch.from_numpy(schedule.alpha(range(1000))).float()
    sigmas = torch.from_numpy(schedule.sigma(range(1000))).float()
    losses = []
    for step in range(steps):
        batch = trainer.source.make(step)
        t = batch.t.long()
        alpha, sigma = alphas[t].view(-1, 1, 1, 1), sigmas[t].view(-1, 1, 1, 1)
        output = model(add_noise(alpha, sigma, batch.x0, batch.noise), t, batch.labels)
        target = training_target("x0", alpha, sigma, batch.x0, batch.noise)
        loss = ((output - target).square().flatten(1).mean(1) * weight[t]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def test_a_step_is_the_plain_algorithm_bit_for_bit(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, label_std=0.3)
    trainer = Trainer(config)
    metrics = [trainer.step() for _ in range(4)]
    losses, model = plain(config, 4)
    assert [values["loss"] for values in metrics] == losses
    assert all(torch.equal(weights(trainer)[name], p) for name, p in model.named_parameters())
    assert [values["lr"] for values in metrics] == [learning_rate(config, step) for step in range(4)]


@pytest.mark.parametrize("pieces", [2, 3, 5])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(tmp_path: Path, pieces: int) -> None:
    whole = gradients(tiny_config(tmp_path, batch=5))
    cut = gradients(tiny_config(tmp_path, batch=5, accumulate=pieces))
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_the_full(tmp_path: Path, precision: str) -> None:
    full, half = Trainer(tiny_config(tmp_path)), Trainer(tiny_config(tmp_path, precision=precision))
    metrics = [(full.step(), half.step()) for _ in range(4)]
    for one, other in metrics:
        assert other["loss"] == pytest.approx(one["loss"], rel=0.02)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.05)
    assert all(p.dtype == torch.float32 for p in half.state.model.parameters())
    assert half.state.scaler.get_scale() == (65536.0 if precision == "fp16" else 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_learns_what_a_cpu_learns(tmp_path: Path, precision: str) -> None:
    here, there = (
        Trainer(tiny_config(tmp_path)),
        Trainer(tiny_config(tmp_path, device="cuda", precision=precision)),
    )
    losses = [(here.step()["loss"], there.step()["loss"]) for _ in range(8)]
    for cpu, gpu in losses:
        assert gpu == pytest.approx(cpu, rel=1e-3 if precision == "fp32" else 0.05)


def test_an_overflow_that_a_smaller_scale_cures_is_skipped_and_no_failure(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path, precision="fp16"))
    trainer.step()
    state = trainer.state
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 1e38})
    before = weights(trainer)
    metrics = trainer.step()
    assert math.isfinite(metrics["loss"])
    assert (state.step, state.skipped, state.failures) == (2, 1, 0)
    assert state.scaler.get_scale() == pytest.approx(5e37)
    assert all(torch.equal(before[name], p) for name, p in weights(trainer).items())
    assert state.ema.updates == 1


@pytest.mark.parametrize("model", [{}, UNET])
def test_recomputing_blocks_changes_nothing_but_memory(tmp_path: Path, model: dict[str, Any]) -> None:
    shape = {"model": model} if model else {}
    kept, again = (Trainer(tiny_config(tmp_path, checkpoint_blocks=flag, **shape)) for flag in (False, True))
    assert [kept.step()["loss"] for _ in range(3)] == [again.step()["loss"] for _ in range(3)]
    ours, theirs = weights(kept), weights(again)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_blocks_are_recomputed_by_themselves_in_deep_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = tiny_config(tmp_path).model
    deep, deeper = (Trainer(tiny_config(tmp_path, model={**shape, "depth": depth})) for depth in (24, 25))
    assert (deep.recomputes, deeper.recomputes) == (False, True)
    deeper.config.output.mkdir()
    start(deeper)
    assert "25 blocks keep their inputs alone" in capsys.readouterr().out
    assert not Trainer(
        tiny_config(tmp_path, model={**shape, "depth": 25}, checkpoint_blocks=False)
    ).recomputes


EXPERTS = {"patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2, "experts": 4}


def test_tokens_that_choose_experts_are_spread_over_them(tmp_path: Path) -> None:
    model = {**EXPERTS, "routing": "token_choice"}
    course = {"lr": 0.03, "steps": 100, "schedule": "constant"}
    plain, balanced = (
        Trainer(tiny_config(tmp_path, model=model, balance=weight, checkpoint_blocks=weight == 1, **course))
        for weight in (0, 1)
    )
    for trainer in (plain, balanced):
        uneven(trainer)
    assert "balance" not in plain.step()
    loads = [balanced.step()["balance"] for _ in range(60)]
    assert loads[0] > 1.8
    assert 0.9 < sum(loads[-10:]) / 10 < 1.2
    default = tiny_config(tmp_path, model=model)
    assert default.balance_weight(plain.network_config) == 0.01
    chosen = Trainer(tiny_config(tmp_path, model=EXPERTS))
    assert chosen.step().keys() == {"loss", "grad_norm", "lr"}


def uneven(trainer: Trainer) -> None:
    """Make all tokens prefer the first expert of each block."""
    for name, parameter in trainer.state.model.named_parameters():
        if name.endswith("router.bias"):
            with torch.no_grad():
                parameter[0] = 2.0


def test_auxiliary_losses_are_told_apart_and_kept_out_of_the_loss(tmp_path: Path) -> None:
    plain, learned = (
        Trainer(tiny_config(tmp_path, diffusion=LEARNED, embedding_l2=weight, variational=weight))
        for weight in (0.0, 0.1)
    )
    without, metrics = plain.step(), learned.step()
    assert without.keys() == {"loss", "variational", "grad_norm", "lr"}
    assert metrics.keys() == {"loss", "variational", "embedding_l2", "grad_norm", "lr"}
    assert metrics["loss"] == without["loss"]
    assert metrics["variational"] > 0
    assert metrics["grad_norm"] > without["grad_norm"]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": UNET},
        {"diffusion": LEARNED},
        {"diffusion": {"schedule": "cosine", "prediction": "v"}, "timesteps": "logit-normal"},
        {
            "loss_space": "epsilon",
            "precision": "bf16",
            "accumulate": 2,
            "weight_decay": 0.01,
            "schedule": "cosine",
        },
    ],
)
def test_every_objective_learns(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = Trainer(tiny_config(tmp_path, **{"steps": 30, "batch": 6, "lr": 5e-3, **changes}))
    batches = [trainer.source.make(step) for step in range(5)]

    def loss() -> float:
        with torch.no_grad():
            return sum(trainer.losses(batch)[1]["loss"].item() for batch in batches)

    before = loss()
    for _ in range(30):
        trainer.step()
    assert loss() < 0.95 * before


def test_the_average_is_what_is_sampled(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path, stages=[{"size": 4, "steps": 2}, {"size": 8}]))
    for size in ((4, 4), (4, 4), (8, 8)):
        trainer.step()
        averaged = trainer.averaged_network()
        assert averaged.config.image_size == size
    named = dict(averaged.named_parameters())
    assert all(torch.equal(named[key], tensor) for key, tensor in trainer.state.ema.first.items())
    assert any(not torch.equal(named[key], p) for key, p in trainer.state.model.named_parameters())
    assert not averaged.training


def test_a_step_without_a_finite_loss_changes_no_weight(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path))
    trainer.step()
    before = weights(trainer)
    usual, trainer.noise = trainer.noise, replace(trainer.noise, floor=float("nan"))
    assert math.isnan(trainer.step()["loss"])
    assert all(torch.equal(before[name], p) for name, p in weights(trainer).items())
    state = trainer.state
    assert (state.step, state.skipped, state.failures, state.ema.updates) == (2, 1, 1, 1)
    trainer.noise = usual
    trainer.step()
    assert (state.skipped, state.failures) == (1, 0)


def test_going_back_to_a_checkpoint_tries_other_noise_and_gives_up_in_the_end(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path, rollback_limit=2))
    state = trainer.state
    trainer.step()
    trainer.save()
    saved, first = weights(trainer), trainer.step()["loss"]
    for count in (1, 2):
        state.skipped = 5
        assert trainer.roll_back().startswith("no finite gradient at step 2: back to ")
        assert (state.step, state.skipped, state.rollbacks) == (1, 5, count)
        assert all(torch.equal(saved[name], p) for name, p in weights(trainer).items())
        assert trainer.step()["loss"] != first
    with pytest.raises(Diverged, match=r"not finite at step 2, and 2 returns .* did not help: lower lr"):
        trainer.roll_back()


def test_a_gpu_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no GPU"):
        Trainer(tiny_config(tmp_path, device="cuda"))
