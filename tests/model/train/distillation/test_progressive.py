"""Progressive distillation: one step of the student is two of its teacher, in every round, also resumed."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance
from ditserve.model.spec.diffusion import CLEAN
from ditserve.model.spec.grids import grid
from ditserve.model.train import training
from ditserve.model.train.__main__ import main
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.distillation.progressive import ProgressiveDistillation
from ditserve.model.train.load import DEFAULTS, load_model, run_defaults
from ditserve.model.train.optimizer import learning_rate
from ditserve.model.train.trainer import Trainer
from tests.model.train.distillation.distillation_cases import write_teacher
from tests.model.train.training_cases import assert_same, config_file, newest_state, tiny_config, tiny_run

COSINE = {"schedule": "cosine"}
ROUNDS = {"sampling_steps": [6, 3], "round_steps": 8}


def config(folder: Path, spec: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    """Return a run of two rounds whose first teacher is in `folder`."""
    teacher = folder / "teacher"
    if not teacher.exists():
        write_teacher(folder, diffusion=changes.get("diffusion", tiny_run(folder)["diffusion"]))
    fields = {"kind": "progressive", "teacher": str(teacher), **ROUNDS, **(spec or {})}
    return tiny_config(folder, distillation=fields, **{"steps": 16, **changes})


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_one_step_to_the_target_ends_where_the_teacher_ends_in_two(
    tmp_path: Path, prediction: str, scale: float | None
) -> None:
    diffusion = {"schedule": "cosine", "prediction": prediction, "log_snr_shift": -1.0}
    trainer = Trainer(config(tmp_path, {"guidance_scale": scale}, diffusion=diffusion))
    objective, batch = trainer.objective, trainer.source.make(0)
    assert isinstance(objective, ProgressiveDistillation)
    batch = objective.prepare_batch(batch)
    x = torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(3))
    target = objective.target(batch, x)
    teacher = load_model(tmp_path / "teacher")

    def alpha(t: float) -> float:
        return float(teacher.schedule.alpha(t))

    def sigma(t: float) -> float:
        return float(teacher.schedule.sigma(t))

    levels = (*grid("trailing", 12), CLEAN)
    for row, t in enumerate(batch.t.tolist()):
        embedding = teacher.network.embed(batch.labels[row : row + 1])
        guided = Denoiser(teacher.network, teacher.schedule, Conditions((embedding,)), Guidance(scale or 1.0))
        at = levels.index(t)
        z = x[row : row + 1]
        # DDIM: arXiv:2010.02502, eq. 12 with eta 0.
        for now, after in pairwise(levels[at : at + 3]):
            output = guided(z, now)
            image = output if prediction == "x0" else alpha(now) * z - sigma(now) * output
            image = image.clip(-1, 1)
            z = alpha(after) * image + sigma(after) * (z - alpha(now) * image) / sigma(now)
        end = levels[at + 2]
        ratio = sigma(end) / sigma(t)  # arXiv:2202.00512, algorithm 2
        expected = (z - ratio * x[row : row + 1]) / (alpha(end) - ratio * alpha(t))
        torch.testing.assert_close(target[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_the_student_is_taught_at_the_noise_levels_of_its_own_steps(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, batch=64))
    objective = trainer.objective
    assert isinstance(objective, ProgressiveDistillation)
    batch = trainer.source.make(0)
    prepared = objective.prepare_batch(batch)
    assert set(prepared.t.tolist()) == set(grid("trailing", 6))
    # A row is moved to the start of the step that its own noise level lies in: 332 to 332, 333 to 499.
    assert bool((prepared.t >= batch.t).all())


def test_the_loss_is_weighted_as_in_the_paper(tmp_path: Path) -> None:
    t = torch.arange(1000)
    plain = Trainer(config(tmp_path, loss_cap=None)).noise.at(t)
    snr = (plain.alpha / plain.sigma).square().flatten()
    torch.testing.assert_close(plain.weight, snr + 1, rtol=1e-3, atol=0)
    truncated = Trainer(config(tmp_path, loss_cap=None, loss_space="epsilon", loss_floor=1)).noise.at(t)
    torch.testing.assert_close(truncated.weight, snr.clamp(min=1), rtol=1e-3, atol=0)


def test_the_student_starts_as_its_teacher_and_becomes_the_next(tmp_path: Path) -> None:
    run = config(tmp_path, {"guidance_scale": 2.0}, ema=[0.5], checkpoint_every=8)
    trainer = Trainer(run)
    teacher = load_model(tmp_path / "teacher").network.state_dict()
    assert all(
        torch.equal(tensor, teacher[name]) for name, tensor in trainer.state.model.state_dict().items()
    )
    training.train(run)
    first = load_model(run.output / "rounds" / "6-steps")
    objective = Trainer(run).objective
    assert isinstance(objective, ProgressiveDistillation)
    assert objective.teacher.guided
    objective.select_teacher(8)
    # The first student has learned the guided output.
    assert not objective.teacher.guided
    assert len(objective.student_steps.level) == 3
    second = objective.teacher.network.state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.network.state_dict().items())
    assert not torch.equal(second["blocks.0.mlp.fc1.weight"], teacher["blocks.0.mlp.fc1.weight"])


def test_a_bundle_of_few_steps_takes_them_by_default(tmp_path: Path) -> None:
    run = config(tmp_path, {"guidance_scale": 2.0}, checkpoint_every=8)
    training.train(run)
    for folder, steps in ((run.output / "rounds" / "6-steps", 6), (run.output, 3)):
        defaults = load_model(folder).manifest.defaults
        assert (defaults.steps, defaults.solver, defaults.grid) == (steps, "ddim", "trailing")
        assert defaults.guidance_scale == 1.0
    unguided = config(tmp_path)
    dataset = unguided.open_dataset()
    assert [run_defaults(unguided, dataset, step).steps for step in (1, 8, 9, 16)] == [6, 6, 3, 3]
    assert run_defaults(unguided, dataset, 16).guidance_scale == DEFAULTS.guidance_scale


def test_a_round_begins_afresh(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, ema=[0.5, 0.9]))
    for _ in range(8):
        trainer.step()
    average = {name: tensor.clone() for name, tensor in trainer.state.ema.first.items()}
    trainer.next_round()
    state = trainer.state
    assert not state.optimizer.state
    assert state.ema.updates == 0
    parameters: dict[str, torch.Tensor] = dict(state.model.named_parameters())
    for averages in (*state.ema.averages.values(), parameters):
        assert all(torch.equal(averages[name], tensor) for name, tensor in average.items())


def test_each_round_has_the_learning_rates_of_a_run(tmp_path: Path) -> None:
    run = config(tmp_path, schedule="cosine", warmup=2, steps=20)
    rates = [learning_rate(run, step) / run.lr for step in range(20)]
    assert rates[:2] == rates[8:10] == [0.5, 1.0]
    assert rates[7] == pytest.approx(0.5 * (1 + math.cos(math.pi * 5 / 6)))
    assert rates[19] == pytest.approx(0.5 * (1 + math.cos(math.pi * 9 / 10)))


@pytest.mark.parametrize("step", [8, 11])  # between the rounds, in the second
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, step: int) -> None:
    straight = config(tmp_path, {"guidance_scale": 2.0}, output=str(tmp_path / "straight"))
    training.train(straight)
    resumed = config(tmp_path, {"guidance_scale": 2.0})
    trainer = Trainer(resumed)
    for _ in range(step):
        trainer.step()
    trainer.save()
    training.train(resumed)
    assert_same(newest_state(straight.output), newest_state(resumed.output))


@pytest.mark.parametrize(
    ("spec", "changes", "sentence"),
    [
        (
            {"sampling_steps": [8, 3]},
            {},
            "each must be half of the one before, such as [16, 8, 4], not [8, 3]",
        ),
        ({"sampling_steps": [600]}, {}, "the first teacher takes 1200 steps, and there may be 1000"),
        ({}, {"steps": 8}, "the last round of distillation begins at step 8: raise steps above it"),
        ({}, {"loss_floor": 9}, "loss_floor 9 is above loss_cap 5: lower it"),
        ({"features": [[0, 0]]}, {}, "there is no field distillation.progressive.features"),
        ({}, {"diffusion": COSINE | {"prediction": "v"}}, "both predict v, or both x0, not x0 and v"),
        ({}, {"diffusion": COSINE | {"prediction": "epsilon"}}, "not x0 and epsilon"),
    ],
)
def test_what_cannot_be_done_in_fewer_steps_is_refused_in_a_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spec: dict[str, Any],
    changes: dict[str, Any],
    sentence: str,
) -> None:
    raw = config(tmp_path).model_dump(mode="json")
    raw |= changes
    raw["distillation"] |= spec
    assert main(["--config", config_file(raw, tmp_path)]) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1
