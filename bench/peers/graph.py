"""The same pipeline around our ONNX graphs: the same batches and solver, on our runtime.

The scheduler is then the only difference to our service. Needs nothing of the service except its backend.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ditserve.bench.peers.options import PeerOptions
from ditserve.bench.peers.pipeline import Pipeline
from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends import Backend, load_backend


class GraphTransformer:
    """A backend in place of diffusers' transformer; it too computes the conditions at every step."""

    def __init__(self, backend: Backend, config: Any) -> None:
        self.config, self._backend = config, backend

    def __call__(self, x: torch.Tensor, *, timestep: torch.Tensor, class_labels: torch.Tensor) -> Any:
        backend = self._backend
        state = backend.modulate(timestep.float().numpy(), backend.embed(class_labels[:, None].numpy()))
        return SimpleNamespace(sample=torch.from_numpy(backend.denoise(x.numpy(), state).copy()))


def open_pipeline(options: PeerOptions) -> Pipeline:
    """Open the pipeline around our graphs if the options name a bundle, else around diffusers' network."""
    pipeline = Pipeline(Path(options.model), threads=options.threads)
    if options.bundle:
        bundle = Bundle.open(Path(options.bundle))
        backend = load_backend("onnx", bundle, threads=options.threads, precision="fp32")
        pipeline.transformer = GraphTransformer(backend, pipeline.transformer.config)
    return pipeline
