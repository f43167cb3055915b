"""A trained model from disk: a bundle, or the newest checkpoint of a training run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from ditserve.model.data.dataset import Dataset
from ditserve.model.data.examples import DataError
from ditserve.model.data.latents import Latents
from ditserve.model.nets.autoencoder import Autoencoder, AutoencoderError, fingerprint, open_autoencoder
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.factory import Network, make_network
from ditserve.model.nets.unet import UNet
from ditserve.model.spec.bundle import (
    MANIFEST,
    WEIGHTS,
    Bundle,
    Defaults,
    LatentSpec,
    Manifest,
    StateTensor,
    write_atomic,
    write_manifest,
)
from ditserve.model.spec.diffusion import Schedule
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.network_config import NetworkConfig
from ditserve.model.spec.unet_config import UNetConfig
from ditserve.model.train.checkpoint import checkpoints
from ditserve.model.train.config import TrainConfig, load_config, mistake
from ditserve.model.train.tensor_blocks import read_whole
from ditserve.model.weights.official import WeightsError, check

FEATURE_MAPS = "feature_maps"  # a submodule of a student that its bundle goes without
DEFAULTS = Defaults(
    steps=50, solver="ddim", grid="trailing", guidance_scale=2.0, guidance_interval=(0.0, 1.0)
)


class OpenError(ModelError):
    """A model that cannot be opened; the message is one sentence naming the file."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An fp32 model in evaluation mode, and its manifest: a bundle's own, or the one a training run's bundle starts from."""

    network: Network
    manifest: Manifest

    @property
    def dit(self) -> DiT:
        """The network, for what is done to a DiT alone.

        Raises:
            OpenError: it is another.
        """
        if not isinstance(self.network, DiT):
            raise OpenError(f"{self.manifest.name} is a U-Net, and this is for a DiT: choose another model")
        return self.network

    @property
    def schedule(self) -> Schedule:
        """The noise schedule the model was trained on."""
        return self.manifest.diffusion.noise_schedule()


def open_model(path: Path, *, data: Path | None = None) -> Opened:
    """Open a bundle's folder or a run's; a run's averaged weights, and its class names from its pictures.

    `data` says where the run's pictures are, if not where they were.

    Raises:
        OpenError: neither of the two, no readable checkpoint, or weights that do not fit.
        BundleError: a bundle that is damaged.
    """
    if (path / MANIFEST).is_file():
        return _from_bundle(Bundle.open(path))
    if (path / "config.json").is_file():
        return _from_run(path, data)
    raise OpenError(
        f"{path} is neither a bundle (manifest.json) nor a training run (config.json and checkpoints/)"
    )


def run_config(source: Path) -> NetworkConfig:
    """The network a training run's JSON file and its pictures describe.

    Raises:
        OpenError: not a run's configuration, or its pictures are not where it says.
    """
    config = _recipe(source)
    return config.network(_dataset(config, None))


@overload
def build(config: DiTConfig, weights: Mapping[str, Tensor], origin: Path) -> DiT: ...
@overload
def build(config: UNetConfig, weights: Mapping[str, Tensor], origin: Path) -> UNet: ...
def build(config: NetworkConfig, weights: Mapping[str, Tensor], origin: Path) -> Network:
    """A network in evaluation mode holding `weights` in fp32; `origin` is named in errors.

    Raises:
        OpenError: the names or shapes are not those of `config`.
    """
    try:
        check(weights, config)
    except WeightsError as error:
        raise OpenError(f"{origin}: {error}") from None
    network = make_network(config).eval().requires_grad_(False)
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return network


def _from_bundle(bundle: Bundle) -> Opened:
    file = bundle.file(WEIGHTS)
    try:
        return Opened(build(bundle.manifest.config, load_file(file), file), bundle.manifest)
    except SafetensorError as error:
        raise OpenError(f"{file} is not a readable safetensors file: {error}") from None


def _from_run(path: Path, data: Path | None) -> Opened:
    config = _recipe(path / "config.json")
    dataset = _dataset(config, data)
    checkpoint, step, weights = _newest(path / "checkpoints")
    network = build(config.network(dataset), weights, checkpoint)
    return Opened(network, describe_run(path.resolve().name, config, dataset, network.config, step))


def save_model(folder: Path, opened: Opened) -> None:
    """Write a bundle of weights alone, fp32; `python -m export.onnx` gives it graphs.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in opened.network.state_dict().items()}
    write_atomic(folder / WEIGHTS, serialise(weights))
    write_manifest(folder, opened.manifest)


def run_defaults(config: TrainConfig, step: int) -> Defaults:
    """What the bundle of a run at `step` does where a request says nothing."""
    told = config.distillation.defaults(step) if config.distillation else {}
    return DEFAULTS.model_copy(update=told)


def _recipe(source: Path) -> TrainConfig:
    try:
        return load_config(source)
    except ValidationError as error:
        detail = mistake(error)
    except (OSError, ValueError) as error:
        detail = str(error)
    raise OpenError(f"{source} is not the configuration of a training run: {detail}")


def _dataset(config: TrainConfig, data: Path | None) -> Dataset:
    try:
        return config.pictures(data)
    except DataError as error:
        raise OpenError(f"sizes and class names come from the training pictures, and {error}") from None


def describe_run(
    name: str, config: TrainConfig, dataset: Dataset, shape: NetworkConfig, step: int
) -> Manifest:
    """The manifest that the bundle of a run at `step` starts from."""
    kind = "Diffusion Transformer" if isinstance(shape, DiTConfig) else "U-Net"
    latents = _latents(dataset) if isinstance(dataset, Latents) else None
    places = "latents" if latents else "pixels"
    training = config.model_dump(mode="json", exclude={"output", "init"})
    training["data"]["path"] = config.data.path.name
    if config.distillation:
        training["distillation"]["teacher"] = config.distillation.teacher.name
    return Manifest(
        name=name,
        version=f"0.{step}",
        description=f"{kind} over {shape.image_size[0]}×{shape.image_size[1]} {places}",
        config=shape,
        diffusion=config.diffusion,
        factors=dataset.factors,
        decoder="sd-vae" if latents else "identity",
        latents=latents,
        embedding_size=shape.hidden_size,
        state=tuple(StateTensor(name=tensor, shape=dims) for tensor, dims in shape.state()),
        defaults=run_defaults(config, step),
        licence=dataset.licence or "unspecified",
        attribution=dataset.attribution,
        provenance={"training": training, "step": step, "pictures": len(dataset.training)},
    )


def open_decoder(dataset: Dataset, vae: Path | None, device: str = "cpu") -> Autoencoder | None:
    """What makes pictures of a run's samples; None for one on latents without the folder of their SD-VAE.

    Raises:
        ValueError: a folder where pictures need none.
        AutoencoderError: it cannot be opened, or did not make these latents.
    """
    if not isinstance(dataset, Latents):
        if vae is not None:
            raise ValueError("vae is for runs on latents, and this one is on pictures: leave it out")
        return open_autoencoder("identity")
    if vae is None:
        return None
    decoder = open_autoencoder("sd-vae", vae, _latents(dataset), device)
    if fingerprint(vae) != dataset.moments.index.autoencoder:
        raise AutoencoderError(
            f"{vae} is not what made the latents in {dataset.moments.folder}: take that one"
        )
    return decoder


def _latents(dataset: Latents) -> LatentSpec:
    return LatentSpec(
        shift=tuple(dataset.shift.flatten().tolist()), scale=tuple(dataset.scale.flatten().tolist())
    )


def _newest(folder: Path) -> tuple[Path, int, dict[str, Tensor]]:
    for path in reversed(checkpoints(folder)):
        try:
            state: dict[str, Any] = json.loads((path / "state.json").read_text())
            weights = read_whole(path, "ema", state.get("index"))
            own = {name: each for name, each in weights.items() if not name.startswith(f"{FEATURE_MAPS}.")}
            return path, int(state["step"]), own
        except (OSError, ValueError, KeyError, SafetensorError):
            continue  # being written or removed by a run that goes on
    raise OpenError(
        f"{folder} holds no readable checkpoint: let model.train write one first (checkpoint_every)"
    )
