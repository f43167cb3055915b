"""The time of a step in torch by its rows: eager, with captured kernels, compiled; fp16, bf16 and FP8.

The networks have random weights, on which times do not depend. Inputs and outputs stay on the device. The
share is of the rate of a product of large matrices in the same numbers. Needs torch alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditserve.bench.gpu.measuring import Measuring, main
from ditserve.bench.gpu.parts.device import peak
from ditserve.bench.gpu.timing import captured, timed
from ditserve.model.nets.cost import cost
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.low_precision import Backbone, fp8_objection, lower_precision
from ditserve.model.spec.dit_config import DiTConfig, published_config

# 24 blocks of SD3-medium for pictures of 1024 pixels. Its tokens attend to 154 of a text by cross-attention,
# where those of SD3 attend to both at once.
SD3_SHAPED = DiTConfig(
    image_size=(128, 128),
    in_channels=16,
    hidden_size=1536,
    depth=24,
    num_heads=24,
    patch_size=2,
    learn_sigma=False,
    text_size=1536,
    text_tokens=154,
)
TOY = DiTConfig(image_size=(8, 8), in_channels=4, hidden_size=32, depth=2, num_heads=2, patch_size=2)
PRECISIONS = ("bf16", "fp16", "fp8")
RUNTIMES = ("eager", "captured", "compiled")
SPREAD = 0.02  # of the noise on weights that start at zero
PASSES, TOY_PASSES = 24, 1


@dataclass(frozen=True, slots=True)
class TimedNetwork:
    """A network to time: its name in the results, its configuration, and the numbers of rows.

    Without a configuration it is that of the bundle.
    """

    name: str
    config: DiTConfig | None
    rows: Sequence[int]


def networks(part: Measuring) -> list[TimedNetwork]:
    """Return DiT-XL/2, one with the shape of SD3-medium, and that of the bundle if it is a DiT."""
    if part.toy:
        return [TimedNetwork("toy", TOY, (1, 3))]
    chosen = [
        TimedNetwork("DiT-XL/2", published_config("DiT-XL/2"), (1, 4, 16, 32)),
        TimedNetwork("SD3-medium-shaped", SD3_SHAPED, (1, 4, 8)),
    ]
    own = bundle_config(part.bundle)
    return chosen if own is None else [*chosen, TimedNetwork(part.bundle.name, own, (1, 16, 64, 256))]


def bundle_config(bundle: Path) -> DiTConfig | None:
    """Return the network of a bundle, read without pydantic; None for one of another kind."""
    fields = json.loads((bundle / "manifest.json").read_text())["config"]
    kind = fields.pop("network", "dit")
    if kind != "dit":
        return None
    return DiTConfig(**{name: _tuples(value) for name, value in fields.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def measure(part: Measuring) -> None:
    for network in networks(part):
        for precision in PRECISIONS:
            names = [
                point_name(network.name, runtime, precision, rows)
                for runtime in RUNTIMES
                for rows in network.rows
            ]
            objection = fp8_objection(torch.device(part.device)) if precision == "fp8" else None
            if objection is not None:
                part.point(f"{network.name} {precision}", partial(_refuse, objection))
            elif part.missing(*names):
                _time_network(part, network, precision)
                if part.device.startswith("cuda"):
                    torch.cuda.empty_cache()


def point_name(network: str, runtime: str, precision: str, rows: int) -> str:
    return f"{network} {runtime} {precision} {rows}"


def _time_network(part: Measuring, network: TimedNetwork, precision: str) -> None:
    """Time a network in one precision in every runtime, by its rows. Its blocks are compiled at the end."""
    assert network.config is not None
    flops = 2 * cost(network.config).backbone_macs
    peak_tflops = part.point(f"peak {precision}", partial(peak, part, precision)).get("tflops")
    model = random_network(network.config, part.device)
    backbone = lower_precision(model, precision)

    def figures(runtime: str, rows: int) -> dict[str, Any]:
        run = partial(_pass, backbone, *random_inputs(model.config, rows, part.device))
        found = step_figures(run, runtime, part.device, TOY_PASSES if part.toy else PASSES)
        rate = rows / found["device_ms"]  # rows a millisecond
        share = None if peak_tflops is None else rate * flops / 1e9 / peak_tflops
        return {"network": network.name, "precision": precision, "rows": rows, **found} | {
            "rows_per_s": 1e3 * rate,
            "share": share,
        }

    for runtime in RUNTIMES:
        if runtime == "compiled":
            # A compiler of C++ would take most of the time of a toy.
            model.compile_blocks("eager" if part.toy else "inductor")
        for rows in network.rows:
            part.point(point_name(network.name, runtime, precision, rows), partial(figures, runtime, rows))


Run = Callable[[], Tensor]


def _refuse(reason: str) -> dict[str, Any]:
    raise ValueError(reason)


def random_network(config: DiTConfig, device: str) -> DiT:
    """Return a DiT on a device whose weights all matter."""
    torch.manual_seed(0)
    with torch.device(device):
        network = DiT(config).eval().requires_grad_(False)
        for tensor in network.parameters():
            tensor.add_(torch.randn_like(tensor), alpha=SPREAD)
    return network


def random_inputs(config: DiTConfig, rows: int, device: str) -> tuple[Tensor, list[Tensor]]:
    """Return latents (rows, C, H, W) and the condition state of as many rows."""
    generator = torch.Generator(device).manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, device=device, generator=generator)

    x = normal(config.in_channels, *config.image_size)
    return x, [0.1 * normal(*shape) for _, shape in config.state()]


def _pass(backbone: Backbone, x: Tensor, state: Sequence[Tensor]) -> Tensor:
    with torch.inference_mode():
        return backbone(x, state)


def step_figures(run: Run, runtime: str, device: str, passes: int) -> dict[str, Any]:
    """Time a pass; of one with captured kernels tell whether it gives the bits of the same not captured."""
    figures: dict[str, Any] = {"runtime": runtime}
    expected = run()
    if runtime != "eager":
        replay = captured(run, device)
        if device.startswith("cuda"):
            figures["equal_to_uncaptured"] = bool(torch.equal(expected, _output(replay)))
        time = timed(replay, device, passes)
    else:
        time = timed(run, device, passes)
    if not bool(torch.isfinite(expected).all()):
        raise ValueError("the output has numbers that are not finite")
    return figures | asdict(time)


def _output(replay: Callable[[], object]) -> Tensor:
    output = replay()
    assert isinstance(output, Tensor)
    return output


if __name__ == "__main__":
    main("steps", measure)
