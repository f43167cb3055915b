"""What the network really sees: rows along sampling trajectories, at all noise levels, guided, the null condition included.

Parity is measured and INT8 is calibrated on these rows, walked by the same solver tables the service walks. A bundle keeps the set
it was judged and calibrated on, so that an engine can be judged by it on a machine without torch.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditserve.export.errors import ExportError
from ditserve.model.nets.conditioner import null_labels
from ditserve.model.nets.factory import Network, NetworkConfig
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance, initial_noise
from ditserve.model.spec.diffusion import grid
from ditserve.model.spec.solvers import step_table, trajectory
from ditserve.model.train.loaded_model import LoadedModel

Backbone = Callable[[Tensor, tuple[Tensor, ...]], Tensor]  # (x, state) → output


@dataclass(frozen=True, slots=True)
class Rows:
    """Inputs of the network: x (N, C, H, W), timestep (N,), labels (N, F), and text (N, text_size) where the model takes it."""

    x: Tensor
    timestep: Tensor
    labels: Tensor
    text: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def at(self, index: Tensor) -> Rows:
        """The rows at `index`."""
        text = None if self.text is None else self.text[index]
        return Rows(self.x[index], self.timestep[index], self.labels[index], text)

    def state(self, network: Network) -> tuple[Tensor, ...]:
        """Their condition state."""
        return network.modulate(self.timestep, network.embed(self.labels, self.text))

    def with_null(self, config: NetworkConfig) -> Rows:
        """These rows, and then each again under the null condition."""
        labels = torch.cat([self.labels, null_labels(config, len(self))])
        text = None if self.text is None else torch.cat([self.text, torch.zeros_like(self.text)])
        return Rows(torch.cat([self.x, self.x]), torch.cat([self.timestep, self.timestep]), labels, text)

    def digest(self) -> str:
        """sha256 over all values, to name the set that a scale or a score comes from."""
        sha = hashlib.sha256()
        for tensor in (self.x, self.timestep, self.labels, *([] if self.text is None else [self.text])):
            sha.update(tensor.contiguous().numpy().tobytes())
        return sha.hexdigest()

    def save(self, path: Path) -> None:
        """Write them, the latents in half precision, in which they must be already."""
        tensors = {"x": self.x.half(), "timestep": self.timestep, "labels": self.labels}
        save_file(tensors if self.text is None else {**tensors, "text": self.text}, path)
        path.chmod(0o644)

    @classmethod
    def load(cls, path: Path) -> Rows:
        """The rows that `save` wrote.

        Raises:
            ExportError: there are none.
        """
        if not path.is_file():
            raise ExportError(
                f"{path} is missing: export the bundle again with python -m export.onnx {path.parent} --out {path.parent}"
            )
        tensors = load_file(path)
        return cls(tensors["x"].float(), tensors["timestep"], tensors["labels"], tensors.get("text"))


@dataclass(frozen=True, slots=True)
class Walk:
    """Guided DDIM runs of `samples` pictures, their classes, text embeddings and noise drawn by `seed`."""

    samples: int = 6
    steps: int = 20
    seed: int = 0


WALK = Walk()


@torch.no_grad()
def trajectories(source: LoadedModel, walk: Walk) -> Rows:
    """Every conditional row the network sees along `walk`; `with_null` gives the others."""
    labels, text = _conditions(source, walk)
    denoiser = _denoiser(source, labels, text)
    seen: list[Rows] = []

    def network(x: Tensor, t: int) -> Tensor:
        seen.append(Rows(x.half().float(), torch.full((len(x),), float(t)), labels, text))
        return denoiser(x, t)[:, : x.shape[1]]

    _sampled(source, walk, network)
    return Rows(
        torch.cat([rows.x for rows in seen]),
        torch.cat([rows.timestep for rows in seen]),
        labels.repeat(len(seen), 1),
        None if text is None else text.repeat(len(seen), 1),
    )


@torch.no_grad()
def pictures(source: LoadedModel, walk: Walk) -> Tensor:
    """The finished samples (S, C, H, W) of `walk`."""
    denoiser = _denoiser(source, *_conditions(source, walk))
    return _sampled(source, walk, lambda x, t: denoiser(x, t)[:, : x.shape[1]])


def with_backbone(source: LoadedModel, backbone: Backbone) -> LoadedModel:
    """The same model, except that `backbone` does the work."""
    served = copy.copy(source.network)
    vars(served)["backbone"] = backbone
    return LoadedModel(served, source.manifest)


def _conditions(source: LoadedModel, walk: Walk) -> tuple[Tensor, Tensor | None]:
    """Labels (S, F), and random text embeddings of length 1, as encoders give them."""
    config, count = source.network.config, walk.samples
    drawn = np.random.Generator(np.random.Philox(key=[walk.seed, 1]))
    columns = [drawn.integers(0, size, count) for size in config.classes]
    labels = (
        torch.from_numpy(np.stack(columns, axis=1)) if columns else torch.zeros(count, 0, dtype=torch.int64)
    )
    if not config.text_size:
        return labels, None
    text = torch.from_numpy(drawn.standard_normal((count, config.text_size), dtype=np.float32))
    return labels, text / text.norm(dim=1, keepdim=True)


def _denoiser(source: LoadedModel, labels: Tensor, text: Tensor | None) -> Denoiser:
    embedding = source.network.embed(labels, text)
    scale, channels = source.manifest.defaults.guidance_scale, source.manifest.diffusion.guidance_channels
    return Denoiser(
        source.network, source.schedule, Conditions((embedding,)), Guidance(scale, channels=channels)
    )


def _sampled(source: LoadedModel, walk: Walk, network: Callable[[Tensor, int], Tensor]) -> Tensor:
    config, schedule = source.network.config, source.schedule
    steps = grid("trailing", min(walk.steps, schedule.timesteps), schedule.timesteps)
    shape = (config.in_channels, *config.image_size)
    start = torch.from_numpy(np.stack([initial_noise(walk.seed + k, shape) for k in range(walk.samples)]))
    clip = source.manifest.diffusion.clip_x0
    *_, (_, x0) = trajectory(step_table("ddim", steps, schedule), start, network, clip_x0=clip)
    return x0
