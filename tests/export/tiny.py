"""A bundle small enough for every test: a two-block DiT over 16×16 pixels with random weights, exported for real."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import torch

from export.onnx import Options, export_bundle
from export.source import DEFAULTS, Source
from model.bundle import Bundle, DiffusionSpec, Factor, Manifest, RungSpec, StateTensor
from model.config import DiTConfig
from model.dit import DiT

ROOT = Path(__file__).resolve().parents[2]
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


def tiny_dit(config: DiTConfig = CONFIG, *, seed: int = 0) -> DiT:
    """A DiT whose every weight matters: the published initialisation would answer zero."""
    generator = torch.Generator().manual_seed(seed)
    dit = DiT(config).eval().requires_grad_(False)
    for name, parameter in dit.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = int(np.prod(parameter.shape[1:])) if parameter.ndim > 1 else 1
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        parameter.copy_(centre + noise * (fan_in**-0.5 if parameter.ndim > 1 else 0.1))
    return dit


def tiny_source(config: DiTConfig = CONFIG, *, seed: int = 0) -> Source:
    """A model and manifest of which `export_bundle` makes a bundle."""
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
        embedding_size=config.hidden_size,
        state=tuple(StateTensor(name=name, shape=shape) for name, shape in config.state()),
        defaults=DEFAULTS,
        ladder=(
            RungSpec(name="full", solver="ddim", steps=50, grid="trailing", rows=100, quality=0.0),
            RungSpec(name="half", solver="ddim", steps=25, grid="trailing", rows=50, quality=0.1),
            RungSpec(name="fast", solver="dpmpp-2m", steps=10, grid="trailing", rows=20, quality=0.3),
        ),
        licence="Apache-2.0",
    )
    return Source(tiny_dit(config, seed=seed), manifest)


def cached_tiny_bundle(cache: Path) -> Path:
    """The folder of the tiny bundle, exported once per version of the code and kept in `cache`."""
    sha = hashlib.sha256(f"{torch.__version__} {onnx.__version__}".encode())
    sources = [Path(__file__), *(ROOT / "export").glob("*.py"), *(ROOT / "model").glob("*.py")]
    for file in sorted(sources):
        sha.update(file.read_bytes())
    target = cache / f"tiny-{sha.hexdigest()[:16]}"
    if not target.is_dir():
        scratch = cache / f".tiny-{os.getpid()}"
        export_bundle(tiny_source(), scratch, Options(half="none", samples=2, steps=10))
        try:
            scratch.rename(target)
        except OSError:  # another test process was faster
            shutil.rmtree(scratch)
    Bundle.open(target)
    return target
