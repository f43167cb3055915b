"""Weight decay by parameter, and the learning rate over a run."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ditserve.model.nets.factory import make_network
from ditserve.model.spec.network_config import network_config
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.optimizer import Muon, learning_rate, make_optimizer, orthogonalised
from ditserve.model.train.trainer import Trainer
from tests.model.train.training_cases import tiny_config


@pytest.mark.parametrize(
    ("model", "spared"),
    [
        ({"layout_rank": 2, "qk_norm": True, "text_size": 6}, {"layout.basis", "y_embedder.no_text"}),
        (
            {"network": "unet", "base_channels": 8, "multipliers": (1, 2), "head_size": 8, "attention": (1,)},
            set(),
        ),
    ],
)
def test_matrices_decay_and_nothing_else(tmp_path: Path, model: dict[str, Any], spared: set[str]) -> None:
    shape = {"hidden_size": 16, "depth": 2, "num_heads": 2} if "network" not in model else {}
    network = make_network(network_config({**shape, **model, "image_size": [8, 8], "classes": [3, 2]}))
    optimizer = make_optimizer(network, tiny_config(tmp_path, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decaying, rest = ({names[id(p)]: p for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert decaying.keys() | rest.keys() == set(names.values())
    assert all(p.ndim >= 2 and name.endswith(".weight") for name, p in decaying.items())
    assert {name for name, p in rest.items() if p.ndim >= 2} == {
        "y_embedder.tables.0.weight",
        "y_embedder.tables.1.weight",
        *(spared - {"y_embedder.no_text"}),
    }
    assert spared <= rest.keys()


def test_muon_has_the_matrices_of_blocks_and_every_update_has_the_size_of_adamws(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, optimizer="muon", lr=0.01, warmup=0, batch=8)
    trainer = Trainer(config)
    before = {name: p.detach().clone() for name, p in trainer.state.model.named_parameters()}
    muon = {id(p) for p in trainer.state.optimizer.param_groups[0]["params"]}
    for _ in range(3):
        trainer.step()
    for name, parameter in trainer.state.model.named_parameters():
        of_block = name.startswith("blocks.") and parameter.ndim == 2
        assert (id(parameter) in muon) == of_block, name
        assert set(trainer.state.optimizer.state[parameter]) == (
            {"momentum_buffer"} if of_block else {"step", "exp_avg", "exp_avg_sq"}
        )
        # AdamW moves a weight by about the rate a step, and Muon on the average by a fifth of that.
        moved = (parameter.detach() - before[name]).square().mean().sqrt().item()
        assert moved < 3 * 0.011, name
        # Before the last layer, nothing learns in the first step: it starts at zero.
        assert moved > 0 or "y_embedder" in name, name


def test_muon_takes_the_steps_of_torchs_with_products_in_fp32() -> None:
    torch.manual_seed(0)
    start, ended = [torch.randn(shape) for shape in ((6, 10), (12, 5))], []
    for kind in (Muon, partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")):
        matrices = [nn.Parameter(matrix.clone()) for matrix in start]
        opt = kind(matrices, lr=0.1, weight_decay=0.01)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for matrix in matrices:
                matrix.grad = torch.randn(matrix.shape, generator=generator)
            opt.step()
        ended.append([matrix.detach() for matrix in matrices])
    for ours, theirs in zip(*ended, strict=True):
        assert torch.allclose(ours, theirs, atol=0.01)  # theirs are bf16
    values = torch.linalg.svdvals(orthogonalised(start[0], 5))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_muon_is_for_whole_matrices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optimizer muon needs whole matrices: take parallel mode ddp"):
        tiny_config(tmp_path, optimizer="muon", parallel={"mode": "fsdp"})


def rates(tmp_path: Path, **changes: Any) -> list[float]:
    config: TrainConfig = tiny_config(tmp_path, steps=100, warmup=10, lr=1.0, **changes)
    return [learning_rate(config, step) for step in range(100)]


def test_the_rate_warms_up_stays_and_falls(tmp_path: Path) -> None:
    values = rates(tmp_path, schedule="wsd", decay=0.2)
    assert values[0] == pytest.approx(0.1)
    assert values[10:80] == [1.0] * 70
    assert values[90] == pytest.approx(0.5)
    assert values[99] == pytest.approx(0.05)


def test_a_constant_rate_stays(tmp_path: Path) -> None:
    assert rates(tmp_path, schedule="constant")[9:] == [1.0] * 91


def test_a_cosine_falls_to_zero(tmp_path: Path) -> None:
    values = rates(tmp_path, schedule="cosine")
    assert values[4] == pytest.approx(0.5)
    assert values[10] == 1.0
    assert values[55] == pytest.approx(0.5)
    assert values[99] == pytest.approx(0.0, abs=1e-3)
    assert all(a >= b for a, b in pairwise(values[10:]))


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_falling_rate_ends_at_the_least_one(tmp_path: Path, schedule: str) -> None:
    values = rates(tmp_path, schedule=schedule, min_lr=0.25)
    assert values[0] == pytest.approx(0.1)
    assert values[10] == 1.0
    assert 0.25 <= min(values[10:]) == values[99] < 0.29
    with pytest.raises(ValueError, match=r"min_lr 2 is above lr 1"):
        tiny_config(tmp_path, lr=1.0, min_lr=2.0)
