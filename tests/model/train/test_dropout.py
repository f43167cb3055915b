"""Dropout of conditions: how often all of them are absent, and that old runs draw as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ditserve.model.nets.conditioner import drop_labels, null_labels
from ditserve.model.train.batch import BatchSource
from ditserve.model.train.dropout import ConditionDropout, condition_dropout
from ditserve.model.train.load import describe_run, run_defaults
from tests.model.train.training_cases import tiny_config


@pytest.mark.parametrize(
    ("fields", "joint", "unconditional"),
    [
        ({}, 0.0909, 0.1),
        ({"label_dropout": [0.5, 0.5]}, 0.0, 0.25),
        ({"label_dropout": [0.1, 0.2]}, 0.0816, 0.1),
        ({"label_dropout": 0}, 0.0, 0.0),
        ({"label_dropout": [0.1, 0]}, 0.0, 0.0),
        ({"joint_dropout": 0}, 0.0, 0.01),
        ({"label_dropout": 0, "joint_dropout": 0.2}, 0.2, 0.2),
    ],
)
def test_the_rate_of_rows_without_any_condition(
    tmp_path: Path, fields: dict[str, Any], joint: float, unconditional: float
) -> None:
    config = tiny_config(tmp_path, batch=4000, **fields)
    dataset = config.open_dataset()
    dropout = condition_dropout(config, dataset)
    assert dropout.joint == pytest.approx(joint, abs=1e-4)
    assert dropout.unconditional == pytest.approx(unconditional)
    network = config.network_config(dataset)
    labels = BatchSource(config, dataset, network).make(0).labels
    null = (labels == null_labels(network, len(labels))).all(1).double().mean()
    assert float(null) == pytest.approx(unconditional, abs=0.02)
    guided = run_defaults(config, dataset, 1).guidance_scale != 1
    assert guided == (unconditional > 0)
    manifest = describe_run("run", config, dataset, network, 1)
    assert manifest.guidance == ("classifier-free" if guided else "none")


def test_text_counts_as_a_condition_and_is_dropped_with_the_others(tmp_path: Path) -> None:
    dropout = ConditionDropout((0.0, 0.0), 0.0, 1.0)
    config = tiny_config(tmp_path)
    network = config.network_config(config.open_dataset())
    labels, text = dropout.apply(
        torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 3), network, torch.Generator()
    )
    assert torch.equal(labels, null_labels(network, 5))
    assert text is not None
    assert not text.any()
    assert ConditionDropout((0.1,), 0.1, 0.0).unconditional == pytest.approx(0.01)


def test_a_text_stands_in_place_of_the_first_label(tmp_path: Path) -> None:
    dropout = ConditionDropout((0.1, 0.5), 0.2, 0.0, instead=0.3)
    assert dropout.unconditional == pytest.approx((0.3 * 0.2 + 0.7 * 0.1) * 0.5)
    config = tiny_config(tmp_path)
    network = config.network_config(config.open_dataset())
    generator = torch.Generator().manual_seed(0)
    labels, text = dropout.apply(
        torch.zeros(4000, 2, dtype=torch.int64), torch.ones(4000, 3), network, generator
    )
    assert text is not None
    told, labelled = text.any(1), labels == 0
    assert not (told & labelled[:, 0]).any()
    assert float(told.float().mean()) == pytest.approx(0.3 * 0.8, abs=0.03)
    assert float(labelled[:, 0].float().mean()) == pytest.approx(0.7 * 0.9, abs=0.03)
    assert float(labelled[:, 1].float().mean()) == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="text_instead needs texts and labels"):
        condition_dropout(tiny_config(tmp_path, text_instead=0.5), config.open_dataset())


def test_a_model_without_conditions_has_no_rows_without() -> None:
    assert ConditionDropout((), None, 0.0).unconditional == 0


def test_without_a_joint_rate_the_draws_are_those_of_before(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    network = config.network_config(config.open_dataset())
    labels = torch.zeros(64, 2, dtype=torch.int64)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    dropped, _ = ConditionDropout((0.1, 0.4), None, 0.0).apply(labels, None, network, generators[0])
    assert torch.equal(dropped, drop_labels(labels, network, (0.1, 0.4), generators[1]))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
