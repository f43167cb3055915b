"""The bundle of a pruned model, and recover.json: the training that makes up for the loss of quality."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditserve.commands import command_line
from ditserve.model.evaluation.picture_sets import open_data
from ditserve.model.prune.importance import importance, noise_of, training_batches
from ditserve.model.prune.pruning import PruneError, mlp_channels, prune, pruned_config
from ditserve.model.spec.bundle import bundle_name, write_atomic
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.network_config import network_fields
from ditserve.model.spec.output_folder import BUNDLE, replacement
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import LoadedModel, save_model

RECOVER = "recover.json"
# Steps of the recovery are those of the training divided by this.
RECOVERY_DIVISOR = 10
# Learning rate of the recovery, relative to that of the training: the network is not learned anew.
RECOVERY_LR = 0.25


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """The shares of heads and MLP channels to remove, and the pictures that importance is measured on.

    `tokens` is the share of tokens that is merged into others, without weights that are removed.
    """

    heads: float = 0.0
    mlp: float = 0.0
    tokens: float = 0.0
    pictures: int = 256
    seed: int = 0


def write_pruned_bundle(source: Path, data: Path, out: Path, options: PruneOptions) -> str:
    """Prune the model at `source` into a bundle at `out`, by its training data at `data`. Return a summary.

    Raises:
        PruneError: the shares cannot be removed.
        OutputError: `out` must not be written; it is for example the model itself, the recovery's teacher.
        LoadError, BundleError: the model cannot be loaded, or is no DiT.
        DataError, ValueError: the data cannot be read, or is not what the model was trained on.
        OSError: the bundle cannot be written.
    """
    with replacement(out, BUNDLE, apart=(source, data)) as scratch:
        model = load_model(source)
        dit = model.dit
        config = pruned_config(dit, options.heads, options.mlp, options.tokens)
        if config == dit.config:
            raise PruneError("nothing is to be taken away: give --heads, --mlp or --tokens")
        dataset = open_data(model, data)
        batches = training_batches(model, dataset, options.pictures, options.seed)
        pruned = prune(dit, importance(dit, noise_of(model), batches), config)
        save_model(scratch, LoadedModel(pruned, pruned_manifest(model.manifest, config, out, options)))
        fields = recovery_fields(model, config, source, data, out)
        write_atomic(scratch / RECOVER, (json.dumps(fields, indent=1) + "\n").encode())
    before, after = (sum(p.numel() for p in network.parameters()) / 1e6 for network in (dit, pruned))
    return (
        f"wrote {out}: {before:.2f} M parameters became {after:.2f} M, {dit.config.num_heads} heads "
        f"{config.num_heads}, {mlp_channels(dit.config)} MLP channels {mlp_channels(config)},\n"
        f"{config.merge_tokens:.0%} of the tokens are merged into others\n"
        f"{command_line('model.train')} --config {out / RECOVER}    makes up for the loss"
    )


def recovery_fields(
    model: LoadedModel, config: DiTConfig, source: Path, data: Path, out: Path
) -> dict[str, Any]:
    """Return the training configuration that makes up for the loss; the whole model is the teacher.

    `config` is that of the pruned network, at `out`.
    """
    training: dict[str, Any] = model.manifest.provenance.get("training", {})
    default = DiTConfig()
    from_data = {"image_size", "classes", "in_channels", "learn_sigma", "text_size"}
    shape = {
        name: value
        for name, value in network_fields(config).items()
        if name not in from_data and value != getattr(default, name, "dit")
    }
    return {
        **{key: value for key, value in training.items() if key != "stages"},
        "data": {**training.get("data", {}), "path": str(data)},
        "output": str(out.with_name(f"{out.name}-recovered")),
        "init": str(out),
        "model": shape,
        "diffusion": model.manifest.diffusion.model_dump(mode="json"),
        "steps": max(1, training.get("steps", 100_000) // RECOVERY_DIVISOR),
        "lr": RECOVERY_LR * training.get("lr", 1e-3),
        "distillation": {"kind": "output", "teacher": str(source), "weight": 0.5},
    }


def pruned_manifest(whole: Manifest, config: DiTConfig, out: Path, options: PruneOptions) -> Manifest:
    """Return the manifest of the pruned model, without anything that was measured on the whole one."""
    shares = {"heads": options.heads, "mlp": options.mlp, "tokens": options.tokens}
    pruning = {"of": f"{whole.name} {whole.version}", **shares}
    return whole.model_copy(
        update={
            "name": bundle_name(out),
            "config": config,
            "ladder": (),
            "golden": None,
            "metrics": {},
            "files": {},
            "provenance": {**whole.provenance, "pruning": {**pruning, "pictures": options.pictures}},
        }
    )
