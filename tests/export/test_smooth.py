"""Smoothing changes no output, and lowers the error of INT8 if channels differ in size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ditserve.export.calibrate import CalibrationRows, TrajectorySettings, calibration_rows
from ditserve.export.errors import ExportError
from ditserve.export.half import FP16_MAX, probe_activations
from ditserve.export.smooth import input_peaks, int8_linears, search_alpha, simulate_int8, smooth
from ditserve.export.source import parameters
from ditserve.model.spec.dit_config import BlockKind
from ditserve.model.train.loaded_model import LoadedModel
from tests.export.tiny import CONFIG, tiny_source


def rows_of(source: LoadedModel, seed: int = 0) -> CalibrationRows:
    kept = calibration_rows(source, TrajectorySettings(samples=2, steps=4, seed=seed))
    return kept.with_null(source.network.config)


def answer(source: LoadedModel, rows: CalibrationRows) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = source.dit(rows.x, rows.timestep, rows.labels)
    return output


@pytest.mark.parametrize(
    "blocks",
    [("adaln_zero",), ("adaln",), ("cross_attention",), ("in_context",), ("adaln_zero", "cross_attention")],
)
@pytest.mark.parametrize("swiglu", [False, True])
def test_a_smoothed_model_is_the_same_function(blocks: tuple[BlockKind, ...], swiglu: bool) -> None:
    source = tiny_source(replace(CONFIG, blocks=blocks, swiglu=swiglu, rms_norm=swiglu))
    rows = rows_of(source)
    other = LoadedModel(smooth(source.dit, input_peaks(source.dit, rows), 0.5), source.manifest)
    before, after = parameters(source.dit), parameters(other.dit)
    assert not torch.equal(after["blocks.0.attn.proj.weight"], before["blocks.0.attn.proj.weight"])
    torch.testing.assert_close(answer(other, rows), answer(source, rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "depth": 6,
            "attention": ("window:2+1", "neighbourhood:1", "axial", "low_rank:3", "linear", "channel"),
            "levels": (0, 0, 0, 1, 1, 0),
            "conv_mlp": True,
        },
        {"experts": 4, "shared_expert": True, "condition_gate": True},
        {"shared_modulation": True},
    ],
)
def test_a_smoothed_variant_is_the_same_function(changes: dict[str, Any]) -> None:
    """Attention over tokens is smoothed; attention over channels, and a shared modulation, are not."""
    source = tiny_source(replace(CONFIG, **changes))
    rows = rows_of(source)
    other = LoadedModel(smooth(source.dit, input_peaks(source.dit, rows), 0.5), source.manifest)
    before, after = parameters(source.dit), parameters(other.dit)
    assert not torch.equal(after["blocks.0.attn.proj.weight"], before["blocks.0.attn.proj.weight"])
    torch.testing.assert_close(answer(other, rows), answer(source, rows), rtol=1e-4, atol=1e-4)


def test_smoothing_rescues_a_model_with_outlier_channels() -> None:
    source = tiny_source()
    for name, tensor in parameters(source.dit).items():
        if name.endswith("adaLN_modulation.1.bias") and name.startswith("blocks"):
            tensor[32:34] += 40.0  # the scale of two channels before attention
            tensor[4 * 32 : 4 * 32 + 2] += 40.0  # and before the MLP
    fit, held_out = rows_of(source, 1), rows_of(source, 2)
    alpha, errors = search_alpha(source.dit, fit, held_out)
    assert alpha > 0
    assert errors[alpha] < 0.7 * errors[0.0]


def test_what_becomes_int8_is_one_table() -> None:
    names = int8_linears(tiny_source().dit)
    assert list(names) == [
        f"blocks.{k}.{layer}" for k in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]


def test_simulated_int8_is_near_but_not_equal() -> None:
    source = tiny_source()
    rows = rows_of(source)
    exact = answer(source, rows)
    error = (simulate_int8(source.dit, input_peaks(source.dit, rows), rows) - exact).norm() / exact.norm()
    assert 1e-5 < float(error) < 0.1


def test_the_calibration_rows_are_what_a_guided_run_sees() -> None:
    source = tiny_source()
    kept = calibration_rows(source, TrajectorySettings(samples=3, steps=5))
    rows = kept.with_null(source.network.config)
    assert len(rows) == 2 * 3 * 5
    assert rows.timestep.unique().tolist() == [199.0, 399.0, 599.0, 799.0, 999.0]
    null = torch.tensor(source.manifest.config.classes)
    assert int((rows.labels == null).all(1).sum()) == 15
    assert torch.equal(rows.x[:15], rows.x[15:])
    again = calibration_rows(source, TrajectorySettings(samples=3, steps=5))
    assert kept.digest() == again.digest()
    assert kept.digest() != calibration_rows(source, TrajectorySettings(samples=3, steps=5, seed=1)).digest()


@pytest.mark.parametrize("text_size", [0, 5])
def test_the_calibration_rows_are_kept_to_the_last_bit(tmp_path: Path, text_size: int) -> None:
    source = tiny_source(replace(CONFIG, text_size=text_size))
    kept = calibration_rows(source, TrajectorySettings(samples=2, steps=3))
    kept.save(tmp_path / "rows.safetensors")
    assert CalibrationRows.load(tmp_path / "rows.safetensors").digest() == kept.digest()
    if text_size:
        assert kept.text is not None
        torch.testing.assert_close(kept.text.norm(dim=1), torch.ones(6))
    with pytest.raises(ExportError, match=r"other\.safetensors is missing: export the bundle again"):
        CalibrationRows.load(tmp_path / "other.safetensors")


def test_calibration_does_not_disturb_random_numbers() -> None:
    source = tiny_source()
    before = torch.get_rng_state()
    rows_of(source)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_probe_sends_a_model_that_overflows_to_bf16() -> None:
    source = tiny_source()
    rows = rows_of(source)
    assert probe_activations(source.dit, rows).precision == "fp16"
    parameters(source.dit)["blocks.1.mlp.fc2.bias"][0] += FP16_MAX
    peak = probe_activations(source.dit, rows)
    assert peak.precision == "bf16"
    assert peak.module.startswith("blocks.1")


def test_the_probe_looks_at_the_backbone_alone() -> None:
    """The conditioner stays in fp32, so its activations may have any size."""
    source = tiny_source()
    rows = rows_of(source)
    before = probe_activations(source.dit, rows)
    # The SiLU behind it gives 0.
    parameters(source.dit)["t_embedder.mlp.2.bias"][0] -= FP16_MAX
    assert probe_activations(source.dit, rows).precision == before.precision
