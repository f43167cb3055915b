"""Loading a trained model from disk: a bundle, or the newest checkpoint in the folder of a training run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from ditserve.model.data.dataset import Dataset
from ditserve.model.data.examples import DataError
from ditserve.model.data.latents import INDEX, Latents
from ditserve.model.nets.autoencoder import AUTOENCODER, PictureDecoder, open_decoder
from ditserve.model.spec.bundle import MANIFEST, Bundle, whole_of
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.grids import even_grid
from ditserve.model.spec.manifest import Defaults, LatentSpec, Manifest, Name, StateTensor
from ditserve.model.spec.network_config import NetworkConfig
from ditserve.model.spec.sizes import size_name
from ditserve.model.train.base_model import base_bundle
from ditserve.model.train.checkpoint import checkpoints, step_of
from ditserve.model.train.config import TrainConfig, first_mistake, load_config
from ditserve.model.train.dropout import condition_dropout
from ditserve.model.train.loaded_model import LoadedModel, LoadError, build, load_bundle
from ditserve.model.train.lora import AdaptedNetwork
from ditserve.model.train.tensor_shards import read_full

# The submodule of a student that feature matching trains; its bundle is written without it.
FEATURE_MAPS = "feature_maps"
# Sampling steps of a sample sheet, at most.
SHEET_STEPS = 20
DEFAULTS = Defaults(
    steps=50, solver="ddim", grid="trailing", guidance_scale=2.0, guidance_interval=(0.0, 1.0)
)


def load_model(path: Path, *, data: Path | None = None) -> LoadedModel:
    """Load a bundle, or a training run: its averaged weights, with the class names of its pictures.

    Of a folder that holds both, the newer state is loaded: the run, if it was trained on after the bundle was
    made. A line on stderr tells which of the two was opened. `data` is the path of the run's pictures if they
    have moved.

    Raises:
        LoadError: `path` is neither of the two, has no readable checkpoint, or has weights that do not fit.
        BundleError: a bundle that is damaged.
    """
    has_run = (path / "config.json").is_file()
    has_bundle = (path / MANIFEST).is_file() or whole_of(path) is not None
    if not (has_run or has_bundle):
        raise LoadError(
            f"{path} is neither a bundle (manifest.json) nor a training run (config.json and checkpoints/)"
        )
    is_run = opens_run(path)
    if has_run and has_bundle and (trained := _newest_step(path)) >= 0:
        opened = (
            f"the training run, at step {trained}" if is_run else f"the bundle, of step {_step_made(path)}"
        )
        print(f"{path} holds a bundle and a training run; opened {opened}", file=sys.stderr)
    return _load_run(path, data) if is_run else load_bundle(Bundle.open(path))


def opens_run(path: Path) -> bool:
    """Return True if `load_model` opens the training run in `path`, not a bundle.

    Raises:
        BundleError: a bundle that is damaged.
    """
    if not (path / "config.json").is_file():
        return False
    return not (path / MANIFEST).is_file() or _newest_step(path) > _step_made(path)


def _step_made(bundle: Path) -> int:
    """Return the training step that a bundle was made of, −1 if it does not tell."""
    return int(Bundle.open(bundle, verify=False).manifest.provenance.get("step", -1))


def _newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint of a run; −1 if it has none."""
    return max((step_of(path) for path in checkpoints(run / "checkpoints")), default=-1)


def run_config(source: Path) -> NetworkConfig:
    """Return the configuration of the network that a training run's JSON file and its pictures describe.

    Raises:
        LoadError: `source` is not a run's configuration, or its pictures are not where it says.
    """
    config = read_run_config(source)
    return config.network_config(_open_dataset(config, None))


def _load_run(path: Path, data: Path | None) -> LoadedModel:
    config = read_run_config(path / "config.json")
    dataset = _open_dataset(config, data)
    checkpoint, step, weights = _newest_checkpoint(path / "checkpoints")
    if config.lora:
        network = AdaptedNetwork(base_bundle(config.init), config.lora).merged(weights)
    else:
        network = build(config.network_config(dataset), weights, checkpoint)
    return LoadedModel(network, describe_run(model_name(path), config, dataset, network.config, step))


def read_run_config(source: Path) -> TrainConfig:
    """Return the configuration in a training run's JSON file.

    Raises:
        LoadError: it cannot be read, or is none.
    """
    try:
        return load_config(source)
    except ValidationError as error:
        detail = first_mistake(error)
    except (OSError, ValueError) as error:
        detail = str(error)
    raise LoadError(f"{source} is not the configuration of a training run: {detail}")


def _open_dataset(config: TrainConfig, data: Path | None) -> Dataset:
    of_latents = (config.data.path / INDEX).is_file()
    if data is not None and of_latents and not (data / INDEX).is_file():
        # The pictures that a run's latents were made of have another size than these.
        data = None
    try:
        return config.open_dataset(data)
    except DataError as error:
        raise LoadError(f"sizes and class names come from the training pictures, and {error}") from None


def _newest_checkpoint(folder: Path) -> tuple[Path, int, dict[str, Tensor]]:
    """Return the path, the step and the averaged weights of the newest readable checkpoint."""
    for path in reversed(checkpoints(folder)):
        try:
            state: dict[str, Any] = json.loads((path / "state.json").read_text())
            averages = read_full(path, "ema", state.get("index"))
            weights = {
                name: tensor for name, tensor in averages.items() if not name.startswith(f"{FEATURE_MAPS}.")
            }
            return path, int(state["step"]), weights
        except (OSError, ValueError, KeyError, SafetensorError):
            # A run in progress may be writing or removing this checkpoint: take an older one.
            continue
    raise LoadError(
        f"{folder} holds no readable checkpoint: let model.train write one first (checkpoint_every)"
    )


def run_defaults(config: TrainConfig, dataset: Dataset, step: int) -> Defaults:
    """Return the sampling defaults of the bundle of a run at `step`.

    They have no more steps than the model has timesteps, and no guidance where no row trains the
    unconditional prediction.
    """
    changes: dict[str, Any] = {
        "steps": min(DEFAULTS.steps, config.diffusion.timesteps),
        "grid": even_grid(config.diffusion.noise_schedule()),
    }
    if not condition_dropout(config, dataset).unconditional:
        changes["guidance_scale"] = 1.0
    if config.distillation:
        changes |= config.distillation.defaults(step)
    return DEFAULTS.model_copy(update=changes)


def model_name(folder: Path) -> str:
    """Return the name of a model in `folder`, which is the folder's.

    Raises:
        LoadError: it cannot be the name of a bundle.
    """
    name = folder.resolve().name
    try:
        return TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise LoadError(
            f"the folder's name {name!r} is to be the model's, which has letters from a to z, digits, '.', "
            "'_' and '-', and begins with a letter or a digit: choose another name"
        ) from None


def describe_run(
    name: str, config: TrainConfig, dataset: Dataset, shape: NetworkConfig, step: int
) -> Manifest:
    """Return the manifest that the bundle of a run at `step` starts from."""
    kind = "Diffusion Transformer" if isinstance(shape, DiTConfig) else "U-Net"
    latents = _latent_spec(dataset) if isinstance(dataset, Latents) else None
    maker = {AUTOENCODER: dataset.moments.index.autoencoder} if isinstance(dataset, Latents) else {}
    values = "latents" if latents else "pixels"
    training = config.model_dump(mode="json", exclude={"output", "init", "vae"})
    training["data"]["path"] = config.data.path.name
    if config.distillation:
        training["distillation"]["teacher"] = config.distillation.teacher.name
    return Manifest(
        name=name,
        version=f"0.{step}",
        description=f"{kind} over {size_name(shape.image_size, '×')} {values}",
        config=shape,
        diffusion=config.diffusion_of(dataset),
        factors=dataset.factors,
        first_axis=dataset.first_axis,
        fps=dataset.fps,
        decoder=dataset.moments.index.decoder if isinstance(dataset, Latents) else "identity",
        latents=latents,
        embedding_size=shape.embedding_size,
        state=tuple(StateTensor(name=tensor, shape=dims) for tensor, dims in shape.state()),
        defaults=run_defaults(config, dataset, step),
        guidance="classifier-free" if condition_dropout(config, dataset).unconditional else "none",
        licence=dataset.licence or "unspecified",
        attribution=dataset.attribution,
        provenance={"training": training, "step": step, "pictures": len(dataset.training), **maker},
    )


def open_sheet_decoder(manifest: Manifest, vae: Path | None, device: str = "cpu") -> PictureDecoder | None:
    """Open the autoencoder that decodes a run's sample sheets. None: it is on latents, without `vae`.

    Raises:
        AutoencoderError: `vae` is given for a run on pixels, cannot be opened, or did not make these latents.
    """
    return None if manifest.latents and vae is None else open_decoder(manifest, vae, device)


def _latent_spec(dataset: Latents) -> LatentSpec:
    return LatentSpec(
        shift=tuple(dataset.shift.flatten().tolist()),
        scale=tuple(dataset.scale.flatten().tolist()),
        factor=dataset.moments.index.picture_size[-1] // dataset.moments.index.size[-1],
    )
