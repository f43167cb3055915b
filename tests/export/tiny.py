"""A bundle small enough for every test: an exported two-block DiT of random weights over 16×16 pixels."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch

from ditserve.export.calibrate import CalibrationRows, TrajectorySettings
from ditserve.export.half import write_half
from ditserve.export.onnx import ExportOptions, export_bundle
from ditserve.export.quantize import write_int8
from ditserve.export.source import open_source
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.factory import Network, NetworkConfig, make_network
from ditserve.model.spec.bundle import CALIBRATION, Bundle, write_manifest
from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.manifest import Factor, Manifest, RungSpec, StateTensor
from ditserve.model.train.load import DEFAULTS
from ditserve.model.train.loaded_model import LoadedModel

ROOT = Path(__file__).resolve().parents[2]
GRAPHS = ("embedder.onnx", "conditioner.onnx", "backbone.onnx")
CONFIG = DiTConfig(
    image_size=(16, 16),
    patch_size=4,
    in_channels=3,
    hidden_size=32,
    depth=2,
    num_heads=2,
    classes=(4, 2),
    learn_sigma=False,
    qk_norm=True,
    layout_rank=4,
    head_channels=6,
)


CLIPS = replace(
    CONFIG, image_size=(4, 16, 16), layout_rank=0, hidden_size=24, attention=("space", "time"), rope=True,
    first_frame=True,
)  # fmt: skip


def tiny_dit(config: DiTConfig = CONFIG, *, seed: int = 0) -> DiT:
    """Return a DiT of random weights."""
    network = tiny_network(config, seed=seed)
    assert isinstance(network, DiT)
    return network


def tiny_network(config: NetworkConfig, *, seed: int = 0) -> Network:
    """Return a network whose every weight matters: as published, it would start with an output of zero."""
    generator = torch.Generator().manual_seed(seed)
    network = make_network(config).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = int(np.prod(parameter.shape[1:])) if parameter.ndim > 1 else 1
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.copy_(centre + noise * (fan_in**-0.5 if parameter.ndim > 1 else 0.1))
    return network


def tiny_source(config: NetworkConfig = CONFIG, *, seed: int = 0) -> LoadedModel:
    """Return a model and manifest that `export_bundle` makes a bundle of."""
    words = (("circle", "square", "triangle", "star"), ("flat", "shaded"))
    names = ("label", "style")
    manifest = Manifest(
        name="tiny",
        version="1",
        description="Random weights, for tests",
        config=config,
        diffusion=DiffusionSpec(schedule="cosine", prediction="x0", log_snr_shift=-1.0),
        factors=tuple(
            Factor(name=n, classes=w[:count])
            for n, w, count in zip(names, words, config.classes, strict=False)
        ),
        first_axis="frames" if len(config.image_size) == 3 else None,
        fps=8.0 if len(config.image_size) == 3 else None,
        embedding_size=config.embedding_size,
        state=tuple(StateTensor(name=name, shape=shape) for name, shape in config.state()),
        defaults=DEFAULTS,
        ladder=(
            RungSpec(name="full", solver="ddim", steps=50, grid="trailing", rows=100, quality=0.0),
            RungSpec(name="half", solver="ddim", steps=25, grid="trailing", rows=50, quality=0.1),
            RungSpec(name="fast", solver="dpmpp-2m", steps=10, grid="trailing", rows=20, quality=0.3),
        ),
        licence="Apache-2.0",
    )
    return LoadedModel(tiny_network(config, seed=seed), manifest)


def cached_tiny_bundle(cache: Path) -> Path:
    """Return the folder of the tiny bundle: exported once per version of the code, and kept in `cache`."""

    def make(folder: Path) -> None:
        export_bundle(
            tiny_source(),
            folder,
            ExportOptions(half="none", trajectories=TrajectorySettings(samples=2, steps=10)),
        )

    return cached(cache, "tiny", make)


def cached_clip_bundle(cache: Path) -> Path:
    """Return the folder of a bundle of random weights that draws clips of four frames, eight in a second."""

    def make(folder: Path) -> None:
        settings = TrajectorySettings(samples=2, steps=4)
        export_bundle(tiny_source(CLIPS), folder, ExportOptions(half="none", trajectories=settings))

    return cached(cache, "clips", make)


def cached_full_bundle(cache: Path) -> Path:
    """Return the folder of the tiny bundle with an fp16 backbone, and INT8 backbones for CPU and TensorRT."""

    def make(folder: Path) -> None:
        shutil.copytree(cached_tiny_bundle(cache), folder)
        source = open_source(folder)
        rows = CalibrationRows.load(folder / CALIBRATION).with_null(CONFIG)
        write_int8(source.dit, folder, rows, "cpu", reduce_range=True)
        write_int8(source.dit, folder, rows, "tensorrt", reduce_range=False)
        write_half(source, folder, rows, "fp16")
        write_manifest(folder, source.manifest)

    return cached(cache, "full", make)


def graphs_of(bundle: Path) -> Callable[[Network, Manifest, Path], None]:
    """Return a stand-in for `write_graphs`, which takes the graphs of a bundle of the same weights."""

    def copy(network: Network, manifest: Manifest, folder: Path) -> None:
        for name in GRAPHS:
            shutil.copy(bundle / name, folder)

    return copy


def cached(cache: Path, name: str, make: Callable[[Path], None], *sources: Path) -> Path:
    """Return the folder of a bundle that is made once per version of the code, and of `sources`."""
    sha = hashlib.sha256(f"{torch.__version__} {onnx.__version__} {ort.__version__}".encode())
    rooms = (ROOT / "model/spec", ROOT / "model/nets", ROOT / "export")
    for file in sorted([Path(__file__), *sources, *(path for room in rooms for path in room.glob("*.py"))]):
        sha.update(file.read_bytes())
    target = cache / f"{name}-{sha.hexdigest()[:16]}"
    if not target.is_dir():
        scratch = cache / f".{name}-{os.getpid()}"
        shutil.rmtree(scratch, ignore_errors=True)
        make(scratch)
        for stale in cache.glob(f"{name}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        try:
            scratch.rename(target)
        except OSError:  # another test process was faster
            shutil.rmtree(scratch)
    Bundle.open(target)
    return target
