"""The pipeline around our ONNX graphs instead of diffusers' network: the same batches, the same solver, our runtime.

What is left between this and our service is the scheduler. Needs nothing of the service but its backend.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ditserve.bench.peers.options import Options
from ditserve.bench.peers.pipeline import Pipeline
from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends import Backend, load_backend


class Graph:
    """Called as diffusers' transformer is; conditions are computed at every step, as it does."""

    def __init__(self, backend: Backend, config: Any) -> None:
        self.config, self._backend = config, backend

    def __call__(self, x: torch.Tensor, *, timestep: torch.Tensor, class_labels: torch.Tensor) -> Any:
        backend = self._backend
        state = backend.modulate(timestep.float().numpy(), backend.embed(class_labels[:, None].numpy()))
        return SimpleNamespace(sample=torch.from_numpy(backend.denoise(x.numpy(), state).copy()))


def open_pipeline(options: Options) -> Pipeline:
    """Around our graphs if the options name a bundle, else around diffusers' network."""
    pipeline = Pipeline(Path(options.model), threads=options.threads)
    if options.bundle:
        backend = load_backend(
            "onnx", Bundle.open(Path(options.bundle)), threads=options.threads, precision="fp32"
        )
        pipeline.transformer = Graph(backend, pipeline.transformer.config)
    return pipeline
