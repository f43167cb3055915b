"""A DiT of ours in torch: the precisions it takes, and the choice among them on a GPU, which is imitated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch

from ditserve.model.nets.dit import DiT
from ditserve.model.nets.layers import Attention
from ditserve.model.spec.adapters import AdapterFile
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.manifest import FileEntry
from ditserve.service.backends import BackendUnavailable, load_backend, torch_precision
from tests.service.backends.random_rows import random_rows

LIMITS = {"fp16": 5e-3, "bf16": 4e-2, "fp8": 8e-2}


@pytest.mark.parametrize("precision", list(LIMITS))
def test_its_output_is_that_of_fp32_but_for_rounding(
    bundle: Bundle, rng: np.random.Generator, precision: str
) -> None:
    exact = load_backend("torch", bundle, threads=1)
    x, state = random_rows(exact, rng, 5)
    lowered = load_backend("torch", bundle, threads=1, precision=precision)
    assert (exact.precision, lowered.precision) == ("fp32", precision)
    expected, actual = exact.denoise(x, state), lowered.denoise(x, state)
    assert actual.dtype == np.float32
    assert 1e-6 < np.linalg.norm(actual - expected) / np.linalg.norm(expected) < LIMITS[precision]


def test_fp8_is_refused_where_the_device_has_none(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_precision, "fp8_objection", lambda device: "it has no products in FP8")
    with pytest.raises(BackendUnavailable, match=r"fp8 cannot be computed here: it has no .*; leave it out$"):
        load_backend("torch", bundle, precision="fp8")


def test_fp8_and_adapters_exclude_each_other(bundle: Bundle, tmp_path: Path) -> None:
    adapter = AdapterFile("style", tmp_path / "style.safetensors", "1")
    with pytest.raises(BackendUnavailable, match="takes no adapters: choose bf16"):
        load_backend("torch", bundle, precision="fp8", adapters=[adapter])


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sets how many times as fast the second of each timed pair is."""

    def set_ratios(*values: float) -> None:
        left: Iterator[float] = iter(values)

        def speedup(one: Any, other: Any, clock: Any) -> float:
            one(), other()
            return next(left)

        monkeypatch.setattr(torch_precision, "speedup", speedup)

    return set_ratios


@pytest.mark.parametrize(
    ("metrics", "measured", "chosen", "why"),
    [
        ({"fp8_quality_loss": 0.004}, (1.8, 1.3), "fp8", "2.34"),
        (
            {"fp8_quality_loss": 0.004},
            (1.8, 1.1),
            "fp16",
            "1.10 times as fast as fp16 here, 1.2 is asked",
        ),
        ({"fp8_quality_loss": 0.02}, (1.8,), "fp16", "it costs 2.0% of quality"),
        ({}, (1.8,), "fp16", "its cost in quality is not on record"),
        ({"fp8_quality_loss": 0.004}, (1.01,), "fp32", "no faster here (1.01 times)"),
    ],
)
def test_the_fastest_precision_on_record_is_chosen(
    bundle: Bundle,
    ratios: Callable[..., None],
    metrics: dict[str, float],
    measured: tuple[float, ...],
    chosen: str,
    why: str,
) -> None:
    files = {**bundle.manifest.files, "backbone.fp16.onnx": FileEntry(sha256="0" * 64, bytes=1)}
    manifest = bundle.manifest.model_copy(update={"metrics": metrics, "files": files})
    network = load_backend("torch", bundle)._model  # type: ignore[attr-defined]
    ratios(*measured)
    with structlog.testing.capture_logs() as logs:
        assert torch_precision.fastest_precision(network, manifest, adapted=False) == chosen
    (choice,) = logs
    assert choice["precision"] == chosen
    assert why in " ".join(map(str, choice.values()))


@pytest.mark.parametrize(("ratio", "computed"), [(1.2, 80), (1.01, 72)])
def test_heads_of_72_are_computed_80_wide_where_that_is_faster(
    ratios: Callable[..., None], ratio: float, computed: int
) -> None:
    config = DiTConfig(image_size=(4, 4), hidden_size=144, depth=1, num_heads=2, patch_size=2)
    network = DiT(config)
    ratios(ratio)
    torch_precision.widen_heads(network, torch.float32)
    layers = [module for module in network.modules() if isinstance(module, Attention)]
    assert {layer.computed_width for layer in layers} == {computed}
    assert torch_precision.chosen_kernels(network, compiled=True) == (
        "heads of 80, compiled" if computed == 80 else "compiled"
    )


def test_blocks_that_do_not_gain_stay_as_they_are_written(
    monkeypatch: pytest.MonkeyPatch, ratios: Callable[..., None]
) -> None:
    config = DiTConfig(image_size=(4, 4), hidden_size=16, depth=2, num_heads=2, patch_size=2)
    monkeypatch.setattr(torch_precision, "_on_cpu", lambda network: False)
    whole = DiT.compile_blocks
    monkeypatch.setattr(DiT, "compile_blocks", lambda network: whole(network, "eager"))
    for ratio, kept in ((1.3, True), (1.0, False)):
        network = DiT(config).eval()
        ratios(ratio)
        assert torch_precision.compile_if_faster(network, network.backbone) is kept
        assert all((block._compiled_call_impl is not None) is kept for block in network.blocks)
