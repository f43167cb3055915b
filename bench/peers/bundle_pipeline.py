"""A bundle's own network as a peer would serve it, in PyTorch or around our graphs: batches of requests.

For models that diffusers has no class for. It is as generous as `Pipeline`: requests of one batch may differ
in steps, conditions, guidance and seeds, and only guided ones cost a second row. Conditions are computed at
every step, and texts are encoded with every request. The bundle's graph decodes latents in either case.
Runs in the peers' own environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ditserve.bench.peers.requests import PeerRequest, Pixels, draw_files, noise
from ditserve.model.nets.factory import Network
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.grids import noise_levels
from ditserve.model.spec.guidance import guided
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.solvers import step_table, trajectory
from ditserve.model.spec.text_encoder import text_encoder_name
from ditserve.model.train.loaded_model import load_bundle
from ditserve.service.backends import SentenceEncoder, load_backend, load_text_encoder

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


class GuidedNetwork(Protocol):
    """The calls of a network, as in `Backend`."""

    def embed(self, labels: Labels, text: Floats | None = None) -> Floats: ...
    def modulate(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]: ...
    def denoise(self, x: Floats, state: tuple[Floats, ...]) -> Floats: ...


class EagerNetwork:
    """A network in PyTorch, eager, between arrays."""

    def __init__(self, network: Network) -> None:
        self._network = network

    @torch.inference_mode()
    def embed(self, labels: Labels, text: Floats | None = None) -> Floats:
        given = None if text is None else torch.from_numpy(text)
        return self._network.embed(torch.from_numpy(labels), given).numpy()

    @torch.inference_mode()
    def modulate(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]:
        state = self._network.modulate(torch.from_numpy(timesteps), torch.from_numpy(embeddings))
        return tuple(tensor.numpy() for tensor in state)

    @torch.inference_mode()
    def denoise(self, x: Floats, state: tuple[Floats, ...]) -> Floats:
        return self._network.backbone(torch.from_numpy(x), tuple(map(torch.from_numpy, state))).numpy()


class BundlePipeline:
    """The network of a bundle, its text encoder if it takes text, and its decoder.

    Raises:
        ModelError: the bundle lacks its weights or its graphs, or its text encoder is not installed.
    """

    def __init__(self, bundle: Bundle, *, threads: int, graphs: bool) -> None:
        torch.set_num_threads(threads)
        self._manifest = bundle.manifest
        backend = load_backend("onnx", bundle, threads=threads, precision="fp32")
        self._decode = backend.decode
        self._network: GuidedNetwork = backend if graphs else EagerNetwork(load_bundle(bundle).network)
        self._encoder = _encoder(bundle.manifest)

    def __call__(self, requests: Sequence[PeerRequest]) -> list[bytes]:
        """Return the PNG files of a batch, in order."""
        return draw_files(requests, self._pictures)

    def _pictures(self, requests: Sequence[PeerRequest], steps: int) -> Pixels:
        return self._decode(self.draw(requests, steps))

    def draw(self, requests: Sequence[PeerRequest], steps: int) -> Floats:
        """Return what the network denoises (N, C, H, W), along the bundle's default solver and grid."""
        manifest = self._manifest
        config, defaults, diffusion = manifest.config, manifest.defaults, manifest.diffusion
        schedule = diffusion.noise_schedule()
        weights = [manifest.guidance_weight(request.guidance) for request in requests]
        second = np.array([k for k, weight in enumerate(weights) if weight != 1.0], np.int64)
        scale = np.array([weights[k] for k in second], np.float32)[:, None, None, None]
        embeddings = self._embeddings(requests, nothing=len(second))  # (N + guided, E)
        channels = config.in_channels

        def network(x: Floats, level: float) -> Floats:
            rows = np.concatenate([x, x[second]])  # (N + guided, C, H, W)
            told = np.full(len(rows), schedule.told(level), np.float32)
            out = self._network.denoise(rows, self._network.modulate(told, embeddings))[:, :channels].copy()
            out, unguided = out[: len(x)], out[len(x) :]
            if len(second):
                limit = diffusion.guidance_channels or channels
                out[second] = guided(out[second], unguided, scale, limit, diffusion.guidance_norm)
            return out

        table = step_table(defaults.solver, noise_levels(defaults.grid, steps, schedule), schedule)
        start = noise(requests, (channels, *config.image_size))
        *_, (image, _) = trajectory(table, start, network, clip_x0=diffusion.clip_x0)
        return np.asarray(image, np.float32)

    def _embeddings(self, requests: Sequence[PeerRequest], *, nothing: int) -> Floats:
        """Return the embeddings of the conditions, and then `nothing` times that of none."""
        factors = self._manifest.factors
        rows = [request.condition for request in requests] + [{}] * nothing
        labels = [[int(row.get(factor.name, len(factor.classes))) for factor in factors] for row in rows]
        text = None
        if self._encoder is not None:
            nothing_said = np.zeros(self._manifest.config.text_width, np.float32)
            texts = [str(row.get("text", "")) for row in rows]
            text = np.stack([self._encoder.encode(words) if words else nothing_said for words in texts])
        return self._network.embed(np.array(labels, np.int64).reshape(len(rows), len(factors)), text)


def _encoder(manifest: Manifest) -> SentenceEncoder | None:
    if not manifest.config.text_width:
        return None
    name = text_encoder_name(manifest, None, "--text-encoder")
    return load_text_encoder(name, manifest.config.text_tokens)
