"""The model that all compared systems serve: an official DiT, as big as the shipped one, in both formats.

    python -m bench.peers.model FOLDER [--like model/zoo/emoji64]

The shipped model has two factors of labels, normalised queries and keys, and a bias per token and head, none
of which diffusers' `DiTTransformer2DModel` can hold. So width, depth, heads, patches and classes are the
shipped model's, and the rest is diffusers' class as it is, with random weights: the cost of a step does not
depend on their values. Our bundle is imported from what diffusers saved, so both compute one function, and
the command compares their images before it ends. The bundle's ladder is the shipped model's, since a model
with random weights has no quality of its own to measure.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel

from ditserve.bench import report
from ditserve.bench.engine_overhead import open_engine
from ditserve.bench.peers.pipeline import Pipeline
from ditserve.bench.peers.requests import PeerRequest
from ditserve.export import onnx
from ditserve.model.spec.bundle import Bundle, write_manifest
from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.manifest import Defaults, Manifest
from ditserve.model.weights.files import write_bundle
from ditserve.model.weights.imported import ImportOptions
from ditserve.model.weights.imports import read_weights
from ditserve.service.backends import Backend, load_backend
from ditserve.service.engine.samples import SampleRequest
from ditserve.service.jobs import ConditionTerm
from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Consent

SOLVER, GRID = "dpmpp-2m", "trailing"
DIFFUSION = DiffusionSpec(schedule="linear", prediction="x0", clip_x0=False)
# The same solver and noise as diffusers' configuration.
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 2e-2,
    "prediction_type": "sample",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "timestep_spacing": "trailing",
    "final_sigmas_type": "zero",
}
TOLERANCE = 1e-4  # of images in [-1, 1]
PROBES = (
    PeerRequest({"label": 0}, 20, 2.0, 1),
    PeerRequest({"label": 1}, 20, 1.0, 2),
    PeerRequest({"label": 2}, 50, 3.0, 3),
)


def write_model(folder: Path, like: Manifest) -> float:
    """Write the model in both formats to `folder`; return the largest difference of their images.

    Raises:
        ValueError: the images differ by more than `TOLERANCE`, or `like` is not a DiT.
    """
    write_weights(folder, like)
    bundle = folder / "bundle"
    status = onnx.main(
        [str(folder / "imported"), f"--out={bundle}", "--name=official", "--weights=fp32", "--half=none"]
    )
    if status:
        raise ValueError("the bundle could not be exported")
    error = difference(folder, load_backend("onnx", Bundle.open(bundle), threads=1, precision="fp32"))
    if error > TOLERANCE:
        raise ValueError(f"our images and diffusers' differ by {error:.1e}: they do not run one model")
    return error


def write_weights(folder: Path, like: Manifest) -> None:
    """Write the files that diffusers reads, and in `imported/` a bundle of the same weights, without graphs.

    Raises:
        ValueError: `like` is not a DiT.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _random_network(like).save_pretrained(folder / "transformer")
    (folder / "scheduler.json").write_text(json.dumps(SCHEDULER))
    found = read_weights(folder, ImportOptions(function="diffusers", predicts_noise=True))
    manifest = write_bundle(
        folder / "imported",
        found,
        licence=like.licence,
        classes=like.factors[0].classes,
    )
    changes = {
        "diffusion": DIFFUSION,
        "description": f"official architecture, random weights, as big as {like.name}",
        "ladder": like.ladder,
        "defaults": Defaults(
            steps=50, solver=SOLVER, grid=GRID, guidance_scale=2.0, guidance_interval=(0.0, 1.0)
        ),
    }
    write_manifest(folder / "imported", manifest.model_copy(update=changes))


def _random_network(like: Manifest) -> Any:
    config = like.config
    if not isinstance(config, DiTConfig):
        raise ValueError(f"{like.name} is no DiT")
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_size,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        num_layers=config.depth,
        sample_size=config.image_size[0],
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.classes[0],
    )
    first, *others = network.transformer_blocks
    # diffusers copies the embedders of time and class into every block.
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return network


def difference(folder: Path, backend: Backend) -> float:
    """Return the largest difference between the images of diffusers and of our engine, over `PROBES`."""
    pipeline = Pipeline(folder, threads=1)
    ladder = Ladder.from_manifest(backend.manifest)
    engine = open_engine(backend, CostModel(), rows=8)
    for k, probe in enumerate(PROBES):
        rung = ladder.requested(SOLVER, probe.steps, GRID, (0.0, 1.0), True)
        engine.add(
            SampleRequest(
                id=str(k),
                condition=(ConditionTerm((probe.condition["label"],)),),
                mix="linear",
                seed=probe.seed,
                rung=rung,
                requested=rung,
                guidance_scale=probe.guidance,
                previews=0,
                deadline_at=None,
                allow_degraded=False,
                consent=Consent(),
            )
        )
    ours: dict[str, Any] = {}
    while not engine.idle:
        ours |= {sample.id: sample.latent for sample in engine.step().finished}
    theirs = [pipeline.draw([probe], probe.steps)[0].numpy() for probe in PROBES]
    return max(float(np.abs(ours[str(k)] - image).max()) for k, image in enumerate(theirs))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = report.parser("peers.model", __doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--like", type=Path, default=report.DEFAULT_BUNDLE)
    options = parser.parse_args(arguments)

    def work() -> None:
        error = write_model(options.folder, Bundle.open(options.like).manifest)
        print(f"{options.folder}: diffusers and our engine draw the same images within {error:.1e}")

    return report.run_command("peers.model", work)


if __name__ == "__main__":
    sys.exit(main())
