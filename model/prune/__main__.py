"""`python -m model.prune MODEL --data FILE --heads 0.33 --mlp 0.5 -o BUNDLE`: take away the heads and MLP channels that matter least.

Every block loses as many, so what remains is an ordinary, smaller network: it is described, exported and served like any other. Which
ones go is measured on training pictures (`model.importance`). Beside the bundle of weights stands recover.json, the configuration of the
training that makes up for the loss, with the whole model as its teacher; edit it as you like:

    python -m model.train --config BUNDLE/recover.json
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ditserve.model.data.dataset import Dataset
from ditserve.model.data.examples import DataError
from ditserve.model.evaluation.picture_sets import open_data
from ditserve.model.nets.dit import DiT
from ditserve.model.prune.importance import Importance, gated, importance
from ditserve.model.spec.bundle import BundleError, Manifest, write_atomic
from ditserve.model.spec.command_line import positive
from ditserve.model.spec.diffusion import Prediction
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.network_config import network_fields
from ditserve.model.train.batch import Batch
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import LoadedModel, LoadError, build, save_model
from ditserve.model.train.loss import NoiseTables, noise_tables

CHUNK = 16  # pictures of a backward pass
RECOVER = "recover.json"
RECOVERY = 10  # the recovery is so many times shorter than the training was
SETTLED = 0.25  # of the training's learning rate: the network is not to be learnt anew


class PruneError(ModelError):
    """A model that cannot be pruned so; the message is one sentence."""


def pruned_config(dit: DiT, heads: float, mlp: float) -> DiTConfig:
    """The configuration left when shares `heads` and `mlp` in 0 … 1 of every block's heads and channels are gone.

    Raises:
        PruneError: a share that leaves nothing, or takes nothing away though it is not 0.
    """
    config = dit.config
    groups = gated(dit)
    kept = _left("heads", groups["blocks.0.attn.proj"], heads, 1)
    multiple = 8 if config.swiglu else 1  # SwiGLU's width is a multiple of eight
    channels = _left("mlp", groups["blocks.0.mlp.fc2"], mlp, multiple)
    width = kept * config.head_size
    changes: dict[str, Any] = {}
    if kept != config.num_heads:
        changes |= {"num_heads": kept, "attention_width": None if width == config.hidden_size else width}
    if channels != groups["blocks.0.mlp.fc2"]:
        size = 3 * channels // 2 if config.swiglu else channels
        ratio = size / config.hidden_size
        whole = int(config.hidden_size * ratio) == size
        changes |= {"mlp_ratio": ratio if whole else math.nextafter(ratio, math.inf)}
    return replace(config, **changes)


def _left(what: str, count: int, share: float, multiple: int) -> int:
    if not 0 <= share < 1:
        raise PruneError(f"--{what} is the share to take away, from 0 up to but not 1: not {share:g}")
    left = round((count - share * count) / multiple) * multiple
    if share and not 0 < left < count:
        least = multiple / count
        raise PruneError(
            f"--{what} {share:g} of {count} takes away {count - left} and leaves {left}: choose between {least:.2g} and {1 - least:.2g}"
        )
    return left if share else count


def prune(dit: DiT, found: Importance, config: DiTConfig) -> DiT:
    """What is left of `dit` when it shall be of `config`: of every block the heads and channels that matter most, in their order."""
    weights = dict(dit.state_dict())
    keep_heads, channels = config.num_heads, gated_channels(config)
    for name, groups in gated(dit).items():
        count = channels if name.endswith("mlp.fc2") else keep_heads
        keep = found[name].topk(count).indices.sort().values
        head = 1 if name.endswith("mlp.fc2") else dit.config.head_size
        for linear, dim, parts in _maps(name, dit):
            for leaf in ("weight", "bias") if dim == 0 else ("weight",):
                full = weights[f"{linear}.{leaf}"]
                cut = full.unflatten(dim, (parts, groups, head)).index_select(dim + 1, keep)
                weights[f"{linear}.{leaf}"] = cut.flatten(dim, dim + 2)
    return build(config, weights, Path("pruned"))


def gated_channels(config: DiTConfig) -> int:
    """The MLP channels of every block."""
    with torch.device("meta"):
        return gated(DiT(replace(config, depth=1, blocks=config.plan[:1])))["blocks.0.mlp.fc2"]


def _maps(name: str, dit: DiT) -> Iterator[tuple[str, int, int]]:
    """Where the groups that enter a linear map are made and used: linear map, dimension, and matrices stacked in it."""
    block, branch, _ = name.rsplit(".", 2)
    yield name, 1, 1
    if branch == "attn":
        yield f"{block}.attn.qkv", 0, 3
    elif branch == "cross":
        yield f"{block}.cross.q", 0, 1
        yield f"{block}.cross.kv", 0, 2
    else:
        yield f"{block}.mlp.fc1", 0, 2 if dit.config.swiglu else 1


def pictures(opened: LoadedModel, dataset: Dataset, count: int, seed: int) -> Iterator[Batch]:
    """`count` training pictures with their conditions, at noise levels spread evenly."""
    generator = torch.Generator().manual_seed(seed)
    order = np.random.default_rng(seed).permutation(dataset.training)[:count]
    total = opened.schedule.timesteps
    levels = torch.randperm(len(order), generator=generator) * total // len(order)
    for start in range(0, len(order), CHUNK):
        index = order[start : start + CHUNK]
        x0 = torch.from_numpy(dataset.batch(index, np.random.default_rng([seed, start])))
        text = None if dataset.text is None else torch.from_numpy(dataset.text[index])
        noise = torch.randn(x0.shape, generator=generator)
        yield Batch(x0, torch.from_numpy(dataset.labels[index]), levels[start : start + CHUNK], noise, text)


def loss_tables(opened: LoadedModel) -> NoiseTables:
    """Those of the loss the model was trained by, as far as it tells."""
    told = opened.manifest.provenance.get("training", {})
    usual: Prediction = "epsilon" if opened.schedule.prediction == "epsilon" else "v"
    return noise_tables(opened.schedule, told.get("loss_space") or usual, told.get("loss_cap"))


def recovery(opened: LoadedModel, left: DiTConfig, source: Path, data: Path, out: Path) -> dict[str, Any]:
    """The fields of the run that makes up for the loss, with the whole model as teacher."""
    told: dict[str, Any] = opened.manifest.provenance.get("training", {})
    usual, derived = (
        DiTConfig(),
        {"image_size", "classes", "in_channels", "learn_sigma", "text_size"},
    )
    shape = {
        name: value
        for name, value in network_fields(left).items()
        if name not in derived and value != getattr(usual, name, "dit")
    }
    return {
        **{key: value for key, value in told.items() if key != "stages"},
        "data": {**told.get("data", {}), "path": str(data)},
        "output": str(out.with_name(f"{out.name}-recovered")),
        "init": str(out),
        "model": shape,
        "diffusion": opened.manifest.diffusion.model_dump(mode="json"),
        "steps": max(1, told.get("steps", 100_000) // RECOVERY),
        "lr": SETTLED * told.get("lr", 1e-3),
        "distillation": {"kind": "output", "teacher": str(source), "weight": 0.5},
    }


def manifest_of(opened: LoadedModel, left: DiTConfig, options: argparse.Namespace) -> Manifest:
    """What the smaller model says about itself: all that was measured on the whole one is left out."""
    whole = opened.manifest
    told = {"of": f"{whole.name} {whole.version}", "heads": options.heads, "mlp": options.mlp}
    return whole.model_copy(
        update={
            "name": re.sub(r"[^A-Za-z0-9._-]", "-", options.out.resolve().name),
            "config": left,
            "ladder": (),
            "golden": None,
            "metrics": {},
            "files": {},
            "provenance": {**whole.provenance, "pruning": {**told, "pictures": options.pictures}},
        }
    )


def run(options: argparse.Namespace) -> str:
    """Do what the command line says and tell what came of it; see `main` for what can go wrong."""
    opened = load_model(options.model)
    dit = opened.dit
    left = pruned_config(dit, options.heads, options.mlp)
    if left == dit.config:
        raise PruneError("nothing is to be taken away: give --heads or --mlp")
    if options.out.resolve() == options.model.resolve():
        raise PruneError(
            f"{options.out} is the model itself, and the teacher of the recovery: choose another -o"
        )
    dataset = open_data(opened, options.data)
    batches = pictures(opened, dataset, options.pictures, options.seed)
    smaller = prune(dit, importance(dit, loss_tables(opened), batches), left)
    save_model(options.out, LoadedModel(smaller, manifest_of(opened, left, options)))
    fields = recovery(opened, left, options.model, options.data, options.out)
    write_atomic(options.out / RECOVER, (json.dumps(fields, indent=1) + "\n").encode())
    before, after = (sum(p.numel() for p in each.parameters()) / 1e6 for each in (dit, smaller))
    return (
        f"wrote {options.out}: {before:.2f} M parameters became {after:.2f} M, {dit.config.num_heads} heads "
        f"{left.num_heads}, {gated_channels(dit.config)} MLP channels {gated_channels(left)}\n"
        f"python -m model.train --config {options.out / RECOVER}    makes up for the loss"
    )


def main(arguments: Sequence[str]) -> int:
    """Command line; whatever is wrong is said in one sentence, with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m model.prune", description="Take away the heads and MLP channels that matter least."
    )
    parser.add_argument("model", type=Path, help="a bundle of a DiT, or a training run")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the folder of the smaller bundle")
    parser.add_argument("--data", type=Path, required=True, help="the data it was trained on")
    parser.add_argument(
        "--heads", type=float, default=0.0, help="share of every block's heads to take away (0)"
    )
    parser.add_argument(
        "--mlp", type=float, default=0.0, help="share of every block's MLP channels to take away (0)"
    )
    parser.add_argument("--pictures", type=positive, default=256, help="to measure importance on (256)")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures' choice and noise (0)")
    options = parser.parse_args(arguments)
    try:
        print(run(options))
    except (PruneError, LoadError, BundleError, DataError, ValueError, OSError) as error:
        print(f"model.prune: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
