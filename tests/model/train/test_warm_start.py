"""Initial weights: tensors that fit are taken over, label tables by the names of their classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ditserve.model.nets.dit import DiT
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.manifest import Factor
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import LoadError
from ditserve.model.train.warm_start import warm_start

STYLE = Factor(name="style", classes=("line", "flat"))
LABEL = Factor(name="label", classes=("owl", "new", "cat"))


def start(bundle: Path, network: DiT, *factors: Factor) -> tuple[dict[str, Any], dict[str, Any], str]:
    summary = str(warm_start(network, factors, bundle))
    return dict(load_model(bundle).network.state_dict()), dict(network.state_dict()), summary


def test_tables_follow_the_names_of_factors_and_classes(bundle: Path, tiny: Callable[..., DiTConfig]) -> None:
    ours, mine, summary = start(bundle, DiT(tiny(classes=(2, 3))), STYLE, LABEL)
    assert summary.endswith("tensors taken over; 4 of 5 classes known")
    label, style = ours["y_embedder.tables.0.weight"], ours["y_embedder.tables.1.weight"]
    assert torch.equal(mine["y_embedder.tables.0.weight"], style[[2, 0, 3]])
    # A new class starts as the null class, the last row.
    assert torch.equal(mine["y_embedder.tables.1.weight"], label[[3, 5, 0, 5]])
    assert all(torch.equal(mine[key], ours[key]) for key in ours if "tables" not in key)


def test_what_does_not_fit_starts_afresh(bundle: Path, tiny: Callable[..., DiTConfig]) -> None:
    network = DiT(tiny(depth=4, classes=(3,)))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    ours, mine, summary = start(bundle, network, Factor(name="colour", classes=("red", "green", "blue")))
    assert "start afresh (blocks.3." in summary
    assert summary.endswith("0 of 3 classes known")
    assert torch.equal(mine["blocks.2.attn.qkv.weight"], ours["blocks.2.attn.qkv.weight"])
    assert torch.equal(mine["blocks.3.attn.qkv.weight"], before["blocks.3.attn.qkv.weight"])
    assert torch.equal(mine["y_embedder.tables.0.weight"], before["y_embedder.tables.0.weight"])


def test_a_model_of_which_nothing_fits_is_refused(bundle: Path, tiny: Callable[..., DiTConfig]) -> None:
    with pytest.raises(LoadError, match=f"nothing of {bundle} fits"):
        warm_start(torch.nn.Linear(2, 2), (LABEL,), bundle)
