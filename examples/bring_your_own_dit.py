"""Train a DiT in plain PyTorch, bring it into a bundle, export it, and serve it.

The network here learns to draw rough discs and squares in a minute or two. Put your own weights and loop
in their place.

    make test ARGS=--version                     # once: installs PyTorch and the export's packages
    .venv/bin/python examples/bring_your_own_dit.py --out shapes
    make serve ARGS="--bundle shapes"
    curl -s http://127.0.0.1:8000/generate -H 'Content-Type: application/json' -H 'Accept: image/png' \
         -d '{"condition": {"shape": "disc"}, "seed": 1}' -o disc.png
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ditserve.export.onnx import ExportOptions, export_bundle
from ditserve.model.nets.dit import DiT
from ditserve.model.spec.diffusion import add_noise
from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.manifest import Defaults, Factor, Manifest, StateTensor
from ditserve.model.train.loaded_model import LoadedModel

SHAPES = ("disc", "square")
SIZE = 16


def draw_shapes(labels: Tensor) -> Tensor:
    """Draw a shape of random place, size and grey per label: (N,) int64 → (N, 3, 16, 16) in [−1, 1]."""
    ys, xs = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    count = len(labels)
    x, y = torch.randint(6, 10, (2, count, 1, 1))
    radius = torch.randint(3, 6, (count, 1, 1))
    disc = (xs - x) ** 2 + (ys - y) ** 2 < radius**2
    square = torch.maximum((xs - x).abs(), (ys - y).abs()) < radius
    inside = torch.where(labels[:, None, None] == 0, disc, square)
    grey = torch.rand(count, 1, 1) * 0.8 - 1.0
    return torch.where(inside, grey, torch.tensor(1.0))[:, None].expand(-1, 3, -1, -1)


def train(network: DiT, diffusion: DiffusionSpec, steps: int) -> None:
    """Teach the network to predict the clean picture (x0), one label in ten being dropped for guidance."""
    schedule = diffusion.noise_schedule()
    timesteps = range(diffusion.timesteps)
    alphas = torch.from_numpy(schedule.alpha(timesteps)).float()
    sigmas = torch.from_numpy(schedule.sigma(timesteps)).float()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(1, steps + 1):
        labels = torch.randint(0, len(SHAPES), (32,))
        x0 = draw_shapes(labels)
        t = torch.randint(0, diffusion.timesteps, (32,))
        alpha, sigma = alphas[t][:, None, None, None], sigmas[t][:, None, None, None]
        x_t = add_noise(alpha, sigma, x0, torch.randn_like(x0))
        null = torch.tensor(len(SHAPES))  # the class that stands for "no condition"
        labels = torch.where(torch.rand(32) < 0.1, null, labels)
        loss = F.mse_loss(network(x_t, t, labels[:, None]), x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}")


parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("shapes"), help="the bundle to write")
parser.add_argument("--steps", type=int, default=1500, help="training steps")
options = parser.parse_args()

torch.manual_seed(0)
config = DiTConfig(
    image_size=(SIZE, SIZE),
    patch_size=2,
    in_channels=3,
    hidden_size=64,
    depth=3,
    num_heads=2,
    classes=(len(SHAPES),),
    learn_sigma=False,
)
diffusion = DiffusionSpec(schedule="cosine", prediction="x0")
network = DiT(config)
train(network, diffusion, options.steps)

manifest = Manifest(
    name="shapes",
    version="1",
    description="Discs and squares",
    config=config,
    diffusion=diffusion,
    factors=(Factor(name="shape", classes=SHAPES),),
    embedding_size=config.hidden_size,
    state=tuple(StateTensor(name=name, shape=shape) for name, shape in config.state()),
    defaults=Defaults(
        steps=20, solver="ddim", grid="trailing", guidance_scale=2.0, guidance_interval=(0.0, 1.0)
    ),
    licence="Apache-2.0",
)
# The ONNX graphs are compared with PyTorch before anything is written.
export_bundle(
    LoadedModel(network.eval().requires_grad_(False), manifest), options.out, ExportOptions(half="none")
)
print(f'wrote {options.out}: make serve ARGS="--bundle {options.out}"')
