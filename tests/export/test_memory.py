"""The memory of an import and of an export, measured on processes of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from ditserve.bench.machine.networks import random_network
from ditserve.bench.memory import FEW_ROWS, GOALS, command_peak
from ditserve.export.calibrate import TrajectorySettings
from ditserve.export.plan import LIBRARIES, peak_bytes
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.dit_config import published_config
from ditserve.model.train.loaded_model import save_model
from ditserve.model.weights.official import to_official
from tests.export.tiny import CONFIG, tiny_source

# One block of 170 MB.
WIDE = replace(CONFIG, hidden_size=1536, depth=1, num_heads=8, layout_rank=0, head_channels=0, patch_size=8)


def test_an_export_takes_no_more_memory_than_it_says(tmp_path: Path) -> None:
    model = tiny_source(WIDE)
    expected = peak_bytes(model, TrajectorySettings(samples=1, steps=2))
    save_model(tmp_path / "model", model)
    words = ("-m", "export.onnx", str(tmp_path / "model"), "--out", str(tmp_path / "out"))
    peak, told = command_peak(*words, *FEW_ROWS)
    assert f"at most about {expected / 1e9:.1f} GB of memory" in told
    assert LIBRARIES / 2 < peak < expected


def test_an_import_holds_the_weights_once(tmp_path: Path) -> None:
    sizes, peaks = [], []
    # The difference of two leaves out the libraries.
    for name in ("DiT-S/8", "DiT-B/8"):
        network = random_network(published_config(name))
        source, bundle = tmp_path / "weights.safetensors", tmp_path / "bundle"
        save_file(to_official(network.state_dict(), network.config), source)
        words = ("-m", "model.convert", "import", str(source), str(bundle))
        peak, _ = command_peak(*words, "--licence", "none", "--predicts-noise")
        assert Bundle.open(bundle).manifest.config == network.config
        sizes.append(sum(parameter.nbytes for parameter in network.parameters()))
        peaks.append(peak)
    weights = sizes[1] - sizes[0]
    assert weights < peaks[1] - peaks[0] < GOALS["import"] * weights
