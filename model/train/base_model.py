"""The bundle that a low-rank adapter is trained for, and what a run with `lora` takes from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ditserve.model.data.dataset import DataError, Dataset
from ditserve.model.data.latents import Latents
from ditserve.model.spec.bundle import MANIFEST, Bundle
from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.network_config import network_fields, own_config

# Attention and MLP of every block, of a DiT or a U-Net.
TARGETS = ("blocks.*.attn.*", "blocks.*.cross.*", "blocks.*.mlp.*", "blocks.*.attention.*")


class LowRankConfig(BaseModel):
    """A low-rank adapter to train in place of the network, which stays as `init` has it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    rank: Annotated[int, Field(ge=1, le=512)] = 8
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """A term counts alpha / rank; None: as much as the rank."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = TARGETS
    """Patterns of the names of the linear layers that get a term, such as "blocks.*.attn.*"."""

    @property
    def scale(self) -> float:
        """The factor of a term."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def base_bundle(init: Any) -> Bundle:
    """Open the bundle that a run with `lora` starts from.

    Raises:
        ValueError: `init` is no bundle of a network of ours.
    """
    if init is None:
        raise ValueError("lora needs init, the folder of the bundle to adapt")
    if not (Path(init) / MANIFEST).is_file():
        raise ValueError(f"lora needs init, the folder of the bundle to adapt, and {init} is none")
    try:
        bundle = Bundle.open(init, verify=False)
        own_config(bundle.manifest.name, bundle.manifest.config)
    except ModelError as error:
        raise ValueError(str(error)) from None
    return bundle


def fields_of_base(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a run with `lora`: its network, noise and picture size are those of the bundle.

    Raises:
        ValueError: `init` is no bundle, or a field says otherwise.
    """
    manifest = base_bundle(fields.get("init")).manifest
    network = network_fields(manifest.config)
    model = {name: value for name, value in network.items() if name not in ("image_size", "classes")}
    if fields.get("model", model) != model:
        raise ValueError("an adapter is of the network of init: leave model out")
    noise = manifest.diffusion.model_dump(mode="json")
    try:
        same = DiffusionSpec.model_validate(fields.get("diffusion", noise)) == manifest.diffusion
    except ValidationError:
        same = False
    if not same:
        raise ValueError("an adapter is of the noise of init: leave diffusion out")
    data = fields.get("data")
    if isinstance(data, dict) and manifest.latents is None:
        data = {"size": network["image_size"], **data}
    return {**fields, "model": model, "diffusion": noise, **({} if data is None else {"data": data})}


def in_terms_of(manifest: Manifest, dataset: Dataset, source: Path) -> Dataset:
    """Return a data set as a bundle numbers its classes and normalises its latents.

    A factor that it lacks is not given.

    Raises:
        DataError: it has a factor or a class that the bundle has not, or pictures in place of latents.
    """
    factors, latents = manifest.factors, manifest.latents
    if latents is not None and not isinstance(dataset, Latents):
        raise DataError(
            f"{source} holds pictures, the bundle to adapt denoises latents: "
            "encode them by model.data latents"
        )
    columns = {factor.name: column for factor, column in zip(dataset.factors, dataset.labels.T, strict=True)}
    own = {factor.name: factor.classes for factor in dataset.factors}
    known = {factor.name: factor.classes for factor in factors}
    for name, classes in own.items():
        unknown = [label for label in classes if label not in known.get(name, ())]
        if unknown:
            raise DataError(
                f"{source}: {unknown[0]!r} is no {name} of the bundle to adapt: take the name of one, or put "
                "the pictures into one folder, without classes"
            )
    labels = [
        np.array([classes.index(label) for label in own[name]])[columns[name]]
        if name in own
        else np.full(len(dataset.labels), len(classes))
        for name, classes in known.items()
    ]
    stacked = np.stack(labels, axis=1) if labels else np.zeros((len(dataset.labels), 0), np.int64)
    # Pictures and latents are dataclasses of these fields.
    changed: Any = replace(cast(Any, dataset), labels=stacked, factors=tuple(factors))
    if latents is not None:
        shift, scale = np.array([latents.shift, latents.scale], np.float32)[..., None, None]
        changed = replace(changed, shift=shift, scale=scale)
    return cast(Dataset, changed)
