"""Output distillation: the target of the student, its progress, and teachers that it cannot learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditserve.model.nets.cost import cost
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance
from ditserve.model.train import training
from ditserve.model.train.__main__ import main
from ditserve.model.train.batch import TrainingBatch
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.distillation.objective import OutputDistillation, distillation_loss, make_objective
from ditserve.model.train.distillation.teacher import Teacher
from ditserve.model.train.dry_run import PASSES, estimate_stages
from ditserve.model.train.load import FEATURE_MAPS, load_model
from ditserve.model.train.loss import TrainingNoise
from ditserve.model.train.trainer import Trainer
from tests.model.train.distillation.distillation_cases import write_teacher
from tests.model.train.training_cases import (
    assert_same,
    config_file,
    newest_state,
    tiny_config,
    tiny_run,
    write_pictures,
)

OTHER_TOKENS = {"patch_size": 2, "hidden_size": 8, "num_heads": 2}
UNET = {"network": "unet", "base_channels": 64, "multipliers": [1, 1], "attention": [1]}
LINEAR = {"schedule": "linear", "prediction": "x0"}
FEATURES: dict[str, Any] = {"features": [[0, 1]], "feature_weight": 0.5}


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return write_teacher(tmp_path)


def student(folder: Path, teacher: Path, changes: dict[str, Any] | None = None, **fields: Any) -> TrainConfig:
    """Return the run of a smaller student."""
    small = {"patch_size": 4, "hidden_size": 8, "depth": 1, "num_heads": 2}
    spec = {"kind": "output", "teacher": str(teacher), **fields}
    return tiny_config(folder, model=small, distillation=spec, **(changes or {}))


def batch_of(trainer: Trainer) -> TrainingBatch:
    """Return a batch at noise levels from none to all."""
    batch = trainer.source.make(0)
    t = torch.tensor([0, 30, 600, 999])
    return TrainingBatch(batch.x0, batch.labels, t, batch.noise)


def noisy(trainer: Trainer, batch: TrainingBatch) -> Tensor:
    row = trainer.noise.at(batch.t)
    return row.noisy(batch.x0, batch.noise)


def test_the_student_comes_nearer_to_its_teacher(tmp_path: Path, teacher: Path) -> None:
    config = student(tmp_path, teacher, {"steps": 150, "lr": 1e-2, "batch": 16}, **FEATURES)
    trainer = Trainer(config)
    metrics = [trainer.step() for _ in range(150)]
    for name in ("teacher", "features"):
        first, last = (np.mean([step[name] for step in part]) for part in (metrics[:10], metrics[-10:]))
        assert last < 0.7 * first, name


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("theirs", ["epsilon", "v", "x0"])
def test_the_target_is_the_teachers_estimate_in_the_students_terms(
    tmp_path: Path, prediction: str, theirs: str
) -> None:
    write_teacher(tmp_path, diffusion={"schedule": "cosine", "prediction": theirs})
    changes = {"diffusion": {"schedule": "cosine", "prediction": prediction}}
    trainer = Trainer(student(tmp_path, tmp_path / "teacher", changes))
    batch = batch_of(trainer)
    # At t = 999 an estimate from predicted noise is all rounding.
    batch = batch[:3]
    x_t, model = noisy(trainer, batch), load_model(tmp_path / "teacher")
    alpha, sigma = (
        torch.from_numpy(of(batch.t.numpy())).float().view(-1, 1, 1, 1)
        for of in (model.schedule.alpha, model.schedule.sigma)
    )
    raw = model.network(x_t, batch.t, batch.labels)
    image = {"epsilon": (x_t - sigma * raw) / alpha, "v": alpha * x_t - sigma * raw, "x0": raw}[theirs]
    perfect = {"epsilon": (x_t - alpha * image) / sigma, "v": (alpha * x_t - image) / sigma, "x0": image}
    assert trainer.objective is not None
    row = TrainingNoise(trainer.schedule, "x0").at(batch.t)
    for output, far in ((perfect[prediction], False), (perfect[prediction] + 1, True)):
        total, parts = distillation_loss(trainer.objective, row, output, batch, x_t, torch.tensor(7.0))
        assert (parts["teacher"] > 1e-2) if far else (parts["teacher"] < 1e-8)
        assert total == parts["teacher"]


def test_the_teacher_is_guided_as_it_is_when_it_is_sampled(tmp_path: Path, teacher: Path) -> None:
    model, config = load_model(teacher), tiny_config(tmp_path)
    trainer = Trainer(config)
    batch = batch_of(trainer)
    conditions = Conditions((model.network.embed(batch.labels),))
    for scale in (None, 2.5):
        estimate = Teacher(model, config, scale).estimate_x0(
            batch.x0, torch.full((4,), 300), batch.labels, None
        )
        sampled = Denoiser(model.network, model.schedule, conditions, Guidance(scale or 1.0))(batch.x0, 300)
        torch.testing.assert_close(estimate, sampled, rtol=1e-5, atol=1e-6)


def test_the_teachers_share_of_the_loss_is_its_weight(tmp_path: Path, teacher: Path) -> None:
    plain = Trainer(student(tmp_path, teacher).model_copy(update={"distillation": None}))
    batch = batch_of(plain)
    by_data, _ = plain.losses(batch)
    totals = {}
    for weight in (0.0, 0.25, 1.0):
        trainer = Trainer(student(tmp_path, teacher, weight=weight))
        total, parts = trainer.losses(batch)
        totals[weight] = total.item()
        assert parts["loss"] == by_data
        assert total.item() == pytest.approx(weight * parts["teacher"].item() + (1 - weight) * by_data.item())
    assert totals[0.0] == by_data.item()
    assert len(set(totals.values())) == 3


def test_feature_maps_learn_and_are_no_part_of_the_model(tmp_path: Path, teacher: Path) -> None:
    config = student(tmp_path, teacher, {"steps": 4}, **FEATURES)
    trainer = Trainer(config)
    maps = {
        name: tensor.clone()
        for name, tensor in trainer.state.model.named_parameters()
        if name.startswith(FEATURE_MAPS)
    }
    assert {name: tuple(tensor.shape) for name, tensor in maps.items()} == {
        f"{FEATURE_MAPS}.0.weight": (16, 8),
        f"{FEATURE_MAPS}.0.bias": (16,),
    }
    training.train(config)
    saved = newest_state(config.output)
    assert not torch.equal(saved[f"model.{FEATURE_MAPS}.0.weight"], maps[f"{FEATURE_MAPS}.0.weight"])
    trained = load_model(config.output)
    assert not any(name.startswith(FEATURE_MAPS) for name in trained.network.state_dict())
    assert trained.manifest.provenance["training"]["distillation"]["teacher"] == "teacher"


def test_a_student_of_a_guided_teacher_is_not_guided_by_default(tmp_path: Path, teacher: Path) -> None:
    for scale, default in ((None, 2.0), (3.0, 1.0)):
        config = student(
            tmp_path, teacher, {"steps": 1, "output": str(tmp_path / f"{scale}")}, guidance_scale=scale
        )
        training.train(config)
        assert load_model(config.output).manifest.defaults.guidance_scale == default


def test_a_resumed_student_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, teacher: Path) -> None:
    changes = {"steps": 6, "ema": [0.9, 0.99]}
    straight = student(tmp_path, teacher, {**changes, "output": str(tmp_path / "straight")}, **FEATURES)
    training.train(straight)
    resumed = student(tmp_path, teacher, changes, **FEATURES)
    trainer = Trainer(resumed)
    for _ in range(3):
        trainer.step()
    trainer.save()
    training.train(resumed)
    assert_same(newest_state(straight.output), newest_state(resumed.output))


def test_a_run_without_a_teacher_has_no_objective(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path))
    assert trainer.objective is None
    assert make_objective(trainer.config, trainer.dataset, trainer.averaged_network()) is None


def test_a_dry_run_counts_the_teacher(tmp_path: Path, teacher: Path) -> None:
    guided = Trainer(student(tmp_path, teacher, guidance_scale=2.0))
    (stage,) = estimate_stages(guided)
    mine, theirs = (cost(shape).macs for shape in (guided.network_config, load_model(teacher).network.config))
    assert stage.step_flops == 2 * guided.config.batch * (PASSES * mine + 2 * theirs)
    assert stage.memory.teacher == 4 * sum(p.numel() for p in load_model(teacher).network.parameters())


def test_a_dry_run_writes_nothing(tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = student(tmp_path, teacher, **FEATURES).model_dump(mode="json")
    assert main(["--config", config_file(raw, tmp_path), "--dry-run"]) == 0
    assert "img/s" in capsys.readouterr().out
    assert not Path(raw["output"]).exists()


@pytest.mark.parametrize(
    ("spec", "changes", "sentence"),
    [
        ({"teacher": "nowhere"}, {}, "nowhere is neither a bundle"),
        ({"weight": 2}, {}, "distillation.output.weight: Input should be less than or equal to 1"),
        ({"wieght": 1}, {}, "there is no field distillation.output.wieght"),
        ({"features": [[3, 0]]}, {}, "the student has no block 3, its blocks are 0 to 0"),
        ({"features": [[0, 2]]}, {}, "the teacher has no block 2, its blocks are 0 to 1"),
        ({"features": [[0, 0]]}, {"model": OTHER_TOKENS}, "token by token"),
        ({"features": [[0, 0]]}, {"model": UNET}, "is for a DiT"),
        ({}, {"stages": [{"size": 4, "steps": 2}, {"size": 8}]}, "leave out stages, or distillation"),
        ({}, {"data": {"size": 4}}, "has image size (8, 8), and the student (4, 4)"),
        ({}, {"diffusion": LINEAR}, "has schedule cosine, and the student linear"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_in_a_sentence(
    tmp_path: Path,
    teacher: Path,
    capsys: pytest.CaptureFixture[str],
    spec: dict[str, Any],
    changes: dict[str, Any],
    sentence: str,
) -> None:
    raw = tiny_run(tmp_path)
    raw["data"] |= changes.pop("data", {})
    raw |= {"model": {**raw["model"], "hidden_size": 8, "depth": 1}, **changes}
    raw["distillation"] = {"kind": "output", "teacher": str(teacher), **spec}
    assert main(["--config", config_file(raw, tmp_path)]) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1


def test_a_teacher_of_other_conditions_is_refused(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = student(tmp_path, teacher).model_dump(mode="json")
    raw["data"]["path"] = str(write_pictures(tmp_path / "other.npz", ("x", "y")))
    assert main(["--config", config_file(raw, tmp_path)]) == 2
    assert "has other conditions (3 of label, 2 of style) than the data (2 of label, 2 of style)" in (
        capsys.readouterr().err
    )


def test_a_run_is_not_continued_with_another_teacher(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = student(tmp_path, teacher, {"steps": 2}).model_dump(mode="json")
    assert main(["--config", config_file(raw, tmp_path)]) == 0
    moved = teacher.rename(tmp_path / "moved")
    raw["distillation"]["teacher"], raw["steps"] = str(moved), 3
    assert main(["--config", config_file(raw, tmp_path)]) == 0
    (tmp_path / "second").mkdir()
    other = write_teacher(
        tmp_path / "second", model={"patch_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 2}
    )
    raw["distillation"]["teacher"], raw["steps"] = str(other), 4
    assert main(["--config", config_file(raw, tmp_path)]) == 2
    assert "was trained with another teacher" in capsys.readouterr().err


def test_the_objective_without_rounds_is_output_distillation(tmp_path: Path, teacher: Path) -> None:
    objective = Trainer(student(tmp_path, teacher, weight=0.5)).objective
    assert isinstance(objective, OutputDistillation)
    assert objective.weight == 0.5
