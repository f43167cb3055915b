"""The pipeline that a peer serves: diffusers' or a bundle's own network, or the same around our ONNX graphs.

Around our graphs there are the same batches and the same solver on our runtime. The scheduler is then the
only difference to our service. Needs nothing of the service except its backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ditserve.bench.peers.bundle_pipeline import BundlePipeline
from ditserve.bench.peers.options import TRANSFORMER, PeerOptions
from ditserve.bench.peers.pipeline import Pipeline
from ditserve.bench.peers.requests import PeerRequest
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


def open_pipeline(options: PeerOptions) -> Callable[[Sequence[PeerRequest]], list[bytes]]:
    """Open the pipeline: around diffusers' network if the model's folder has one, else a bundle's."""
    bundle, threads = Path(options.bundle), options.threads
    if not (Path(options.model) / TRANSFORMER).is_dir():
        return BundlePipeline(Bundle.open(bundle), threads=threads, graphs=options.graphs)
    pipeline = Pipeline(Path(options.model), threads=threads)
    if options.graphs:
        backend = load_backend("onnx", Bundle.open(bundle), threads=threads, precision="fp32")
        pipeline.transformer = GraphTransformer(backend, pipeline.transformer.config)
    return pipeline
