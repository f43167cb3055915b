"""Pruning: unimportant groups are removed, an ordinary network remains, and it is exported and recovers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from ditserve.export.graph import backbone_graph
from ditserve.model.nets.cost import cost
from ditserve.model.nets.dit import DiT
from ditserve.model.prune.__main__ import main
from ditserve.model.prune.importance import group_counts, importance
from ditserve.model.prune.pruned_bundle import RECOVER
from ditserve.model.prune.pruning import PruneError, prune, pruned_config
from ditserve.model.spec.diffusion import add_noise, make_schedule
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.network_config import network_config, network_fields
from ditserve.model.train.batch import TrainingBatch
from ditserve.model.train.config import load_config
from ditserve.model.train.load import load_model
from ditserve.model.train.loss import TrainingNoise, squared_error
from ditserve.model.train.trainer import Trainer
from ditserve.model.weights.official import WeightsError, to_official
from tests.model.train.distillation.distillation_cases import write_teacher
from tests.model.train.training_cases import write_pictures

NOISE = TrainingNoise(make_schedule("cosine", prediction="x0"), "v", 5.0)
KINDS: dict[str, dict[str, Any]] = {
    "adaln_zero": {"qk_norm": True, "mlp_ratio": 1.9},
    "swiglu": {"swiglu": True, "rope": True, "blocks": ("adaln",)},
    "cross_attention": {"blocks": ("cross_attention",)},
    "in_context": {"blocks": ("in_context",), "layout_rank": 2},
}


def some(dit: DiT, count: int = 6) -> TrainingBatch:
    config, generator = dit.config, torch.Generator().manual_seed(1)
    shape = (count, config.in_channels, *config.image_size)
    labels = torch.stack([torch.arange(count) % (classes + 1) for classes in config.classes], dim=1)
    t = torch.arange(count) * 150
    return TrainingBatch(
        torch.rand(shape, generator=generator) * 2 - 1, labels, t, torch.randn(shape, generator=generator)
    )


def drawn(dit: DiT) -> Tensor:
    batch = some(dit)
    with torch.no_grad():
        return cast(Tensor, dit(batch.noise, batch.t, batch.labels))


@pytest.fixture(params=list(KINDS.values()), ids=list(KINDS))
def dit(request: pytest.FixtureRequest, network: Callable[..., DiT], tiny: Callable[..., DiTConfig]) -> DiT:
    return network(tiny(hidden_size=24, num_heads=3, depth=2, **request.param))


def measured(dit: DiT) -> dict[str, Tensor]:
    return importance(dit, NOISE, [some(dit)])


def test_taking_nothing_away_changes_nothing(dit: DiT) -> None:
    config = pruned_config(dit, 0, 0)
    assert config == dit.config
    same = prune(dit, measured(dit), config).state_dict()
    assert all(torch.equal(same[name], tensor) for name, tensor in dit.state_dict().items())


def test_what_does_nothing_goes_first_and_is_not_missed(dit: DiT) -> None:
    size, heads = dit.config.head_size, dit.config.num_heads
    with torch.no_grad():
        for k, block in enumerate(cast(Any, dit.blocks)):
            gone = slice(k * size, (k + 1) * size)  # another head in every block
            block.attn.proj.weight[:, gone] = 0
            if hasattr(block, "cross"):
                block.cross.proj.weight[:, gone] = 0
            block.mlp.fc2.weight[:, k : 8 + k] = 0
    channels = group_counts(dit)["blocks.0.mlp.fc2"]
    config = pruned_config(dit, 1 / heads, 8 / channels)
    assert (config.num_heads, config.heads_width, config.head_size) == (2, 2 * size, size)
    smaller = prune(dit, measured(dit), config)
    assert group_counts(smaller)["blocks.0.mlp.fc2"] == channels - 8
    torch.testing.assert_close(drawn(smaller), drawn(dit), rtol=1e-5, atol=1e-5)
    assert network_config(json.loads(json.dumps(network_fields(config)))) == config
    assert cost(config).macs < cost(dit.config).macs


def test_importance_is_the_squared_first_order_change_of_each_pictures_loss(
    network: Callable[..., DiT], tiny: Callable[..., DiTConfig]
) -> None:
    dit = network(tiny(depth=2))
    batch = some(dit)
    importances = importance(dit, NOISE, [batch[0:4], batch[4:6]])
    assert importances.keys() == group_counts(dit).keys()
    for name, values in importances.items():
        weight = dit.get_submodule(name).get_parameter("weight")
        weight.requires_grad_()
        total = torch.zeros(len(values))
        for k in range(len(batch)):
            row = batch[k : k + 1]
            at = NOISE.at(row.t)
            x_t = add_noise(at.alpha, at.sigma, row.x0, row.noise)
            loss = squared_error(at, dit(x_t, row.t, row.labels), row.x0, row.noise).sum()
            (slope,) = torch.autograd.grad(loss, weight)
            total += (slope * weight).detach().unflatten(1, (len(values), -1)).sum((0, 2)).square()
        torch.testing.assert_close(values, total / len(batch), rtol=1e-3, atol=1e-6)
        weight.requires_grad_(False)


def test_shares_that_cannot_be_taken_are_refused(dit: DiT) -> None:
    for heads, mlp, message in (
        (1.0, 0.0, "--heads is the share to take away, from 0 up to but not 1: not 1"),
        (-0.1, 0.0, "--heads is the share"),
        (0.1, 0.0, "--heads 0.1 of 3 takes away 0 and leaves 3"),
        (0.9, 0.0, "--heads 0.9 of 3 takes away 3 and leaves 0"),
        (0.0, 0.001, "--mlp 0.001 of "),
    ):
        with pytest.raises(PruneError, match=message):
            pruned_config(dit, heads, mlp)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Write a bundle over the pictures of set.npz."""
    shape = {"patch_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 4, "qk_norm": True}
    return write_teacher(tmp_path, "whole", model=shape, loss_cap=4)


def command(whole: Path, *more: str) -> list[str]:
    folder = whole.parent
    return [
        str(whole),
        "--data",
        str(folder / "set.npz"),
        "-o",
        str(folder / "less"),
        "--pictures",
        "6",
        *more,
    ]


def test_a_pruned_bundle_is_exported_and_recovers_from_its_teacher(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(whole, "--heads", "0.5", "--mlp", "0.25")) == 0
    message = capsys.readouterr().out
    assert "4 heads 2, 64 MLP channels 48" in message
    less = load_model(whole.parent / "less")
    assert less.network.config == replace(
        load_model(whole).dit.config, num_heads=2, attention_width=8, mlp_ratio=3.0
    )
    assert (less.manifest.ladder, less.manifest.golden, less.manifest.metrics) == ((), None, {})
    assert less.manifest.provenance["pruning"]["of"].startswith("whole")
    state = less.network.modulate(torch.tensor([500.0]), less.network.embed(torch.tensor([[1, 0]])))
    x = torch.randn(1, 3, 8, 8)
    session = ort.InferenceSession(backbone_graph(less.network).SerializeToString())
    names = [value.name for value in session.get_inputs()]
    fed = dict(zip(names, [tensor.numpy() for tensor in (x, *state)], strict=True))
    np.testing.assert_allclose(
        session.run(None, fed)[0], less.network.backbone(x, state).numpy(), rtol=1e-4, atol=1e-5
    )

    recover = load_config(whole.parent / "less" / RECOVER, ["steps=3", "batch=2"])
    trainer = Trainer(recover)
    assert trainer.warm_start is not None
    assert not trainer.warm_start.fresh
    assert trainer.network_config == less.network.config
    taken = less.network.state_dict()
    assert all(torch.equal(tensor, taken[name]) for name, tensor in trainer.state.model.state_dict().items())
    assert {"loss", "teacher"} <= trainer.step().keys()
    assert recover.loss_cap == 4


def test_mistakes_are_told_in_a_sentence(
    whole: Path, unet_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_pictures(whole.parent / "other.npz", ("x", "y"))
    for arguments, sentence in (
        (command(whole), "nothing is to be taken away: give --heads, --mlp or --tokens"),
        (command(whole, "--heads", "1"), "--heads is the share"),
        (command(whole, "--heads", "0.5", "-o", str(whole)), "is the input itself"),
        (command(whole, "--mlp", "0.5", "--data", str(other)), "has other classes than the model"),
        ([str(unet_bundle), *command(whole, "--mlp", "0.5")[1:]], "is a U-Net"),
        ([str(whole.parent / "none"), *command(whole)[1:]], "neither a bundle"),
    ):
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert message.startswith("model.prune: ")
        assert sentence in message
        assert message.count("\n") == 1


def test_a_narrow_attention_is_not_of_the_published_layout(tiny: Callable[..., DiTConfig]) -> None:
    config = tiny(classes=(5,), num_heads=1, attention_width=16)
    with pytest.raises(WeightsError, match="undo attention_width"):
        to_official(DiT(config).state_dict(), config)


@pytest.mark.parametrize(
    ("width", "message"), [(0, "must be positive"), (10, "attention_width 10 is not divisible")]
)
def test_the_width_of_attention_is_checked(tiny: Callable[..., DiTConfig], width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(num_heads=4, attention_width=width)
