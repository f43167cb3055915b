"""The recipe of a run on one's own pictures: what the pictures and the machine suggest for each open field.

    python -m model.train --data photos --dry-run           # prints the recipe and its price
    python -m model.train --data photos --set batch=32      # trains; config.json in the run holds all fields

A field that is given, in a file or by `--set`, stays as it is, and what is chosen after it fits it. The run
shall end within `BUDGET_S` on this machine, whose speed is measured on the network itself for a second.

    data.size  the pictures' own, if they have one small size; else the largest of `SIDES` that most have
    model      the largest of `NETWORKS` that so many pictures can teach, with enough steps in the time
    steps      as many as the time allows, up to `PASSES` over the pictures
    lr         0.002 for width 64 as in the zoo, falling with the square root of the width
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ditserve.model.data.dataset import DataConfig
from ditserve.model.data.labels import select_examples
from ditserve.model.data.latents import Moments
from ditserve.model.data.sources import read_source
from ditserve.model.nets.factory import make_network
from ditserve.model.spec.bundle import bundle_name
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.network_config import NetworkConfig, network_config
from ditserve.model.spec.sizes import Size
from ditserve.model.train.base_model import fields_of_base
from ditserve.model.train.config import set_fields
from ditserve.model.train.run_config import read_fields

BUDGET_S = 40 * 60
PROBE_S = 0.5
SIDES = {"cpu": (16, 32, 64), "cuda": (16, 32, 64, 128)}
TOKENS = {"cpu": 64, "cuda": 256}  # of a picture, at most
BATCH = {"cpu": 16, "cuda": 128}
# (Pictures that teach it, hidden size, depth, heads), small to large.
NETWORKS = ((0, 64, 3, 2), (200, 128, 5, 4), (1_000, 192, 7, 3), (10_000, 384, 12, 6))
ENOUGH_STEPS, LEAST_STEPS, MOST_STEPS = 8_000, 500, 100_000
PASSES = 500
# Share of the pictures that may be unreadable; with more, something is wrong with the set.
BROKEN = 0.05
# The fields that are chosen beside a configuration file: without them other pictures cannot be trained on.
NEEDED = frozenset({"data.size", "data.corrupt_limit", "diffusion", "model", "steps"})
PIXEL_NOISE = {"schedule": "cosine", "prediction": "x0", "log_snr_shift": -1.0}
LATENT_NOISE = {"schedule": "linear", "prediction": "epsilon", "clip_x0": False}


@dataclass(frozen=True, slots=True)
class Choice:
    """A field of a TrainConfig, such as "data.size", its value, and the reason in a few words."""

    field: str
    value: Any
    reason: str


def run_fields(
    config: Path | None, data: Path | None, overrides: Sequence[str]
) -> tuple[dict[str, Any], tuple[Choice, ...]]:
    """Return the fields of a run, and the choices among them.

    Without `data` they are those of the file `config`. With `data` alone all open fields are chosen, but a
    run that is there already goes on with its own. With both, the fields of the file hold for other pictures:
    those about its own pictures, and its output, are left out.

    Raises:
        OSError, ValueError: the file cannot be read, or an override cannot be set.
        DataError: the data does not exist or holds nothing readable.
        ValidationError: a field of the data is wrong.
    """
    fields = read_fields(config) if config else {}
    if data is None:
        return set_fields(fields, overrides), ()
    section = fields.get("data")
    fields["data"] = {**(section if isinstance(section, dict) else {}), "path": str(data)}
    for field in ("groups", "names"):
        fields["data"].pop(field, None)
    fields["output"] = f"runs/{bundle_name(data if data.is_dir() else data.with_suffix(''))}"
    set_fields(fields, overrides)
    if fields.get("lora") is not None:
        fields = fields_of_base(fields)
    saved = Path(str(fields["output"])) / "config.json"
    if config is None and saved.is_file():
        before = read_fields(saved)
        old = before.get("data")
        before["data"] = {**(old if isinstance(old, dict) else {}), "path": str(data)}
        return set_fields({**before, "output": fields["output"]}, overrides), ()
    recipe = Recipe(fields, only=NEEDED if config else None)
    output = Choice("output", fields["output"], "checkpoints, log and sheets of the run")
    return recipe.fields, (output, *recipe.choices)


class Recipe:
    """The choice of every field that is left open in `fields`, of those in `only` unless it is None.

    Raises:
        DataError: the data does not exist or holds nothing readable.
        ValidationError, ValueError: a given field of the data or of the network is wrong.
    """

    def __init__(self, fields: dict[str, Any], only: frozenset[str] | None = None) -> None:
        self.fields, self.only = fields, only
        self.choices: list[Choice] = []
        data = DataConfig.model_validate(fields["data"])
        self.source = read_source(data.path, captions=data.text is not None, check=data.check)
        self.examples = select_examples(
            self.source.catalogue,
            data.path,
            groups=data.groups,
            names=data.names,
            crossed=data.crossed,
            hold_out=data.hold_out,
        )
        self.count = int((~self.examples.held_out).sum())
        self.latents = self.source.data.index if isinstance(self.source.data, Moments) else None
        gpu = torch.cuda.is_available()
        self.choose("device", "cuda" if gpu else "cpu", "there is a GPU" if gpu else "there is no GPU")
        self.device = "cuda" if fields.get("device") == "cuda" else "cpu"
        self.size = self._choose_data(data)
        if self.latents:
            self.choose("diffusion", LATENT_NOISE, "latents, as in the paper")
        self.choose("diffusion", PIXEL_NOISE, "pixels, as in the zoo")
        self.choose("batch", min(BATCH[self.device], self.count), f"usual on {self.device}")
        self.batch = self._whole("batch", 32)
        self._choose_network()
        self._choose_course()

    def choose(self, field: str, value: Any, reason: str) -> None:
        """Choose the value of a field, if it is open."""
        section, _, name = field.rpartition(".")
        parent = self.fields[section] if section else self.fields
        if name not in parent and (self.only is None or field in self.only):
            parent[name] = value
            self.choices.append(Choice(field, value, reason))

    def _whole(self, field: str, default: int) -> int:
        """Return a field that is a whole number, or `default`: a wrong one is refused with others later."""
        value = self.fields.get(field, default)
        return value if isinstance(value, int) and value > 0 else default

    def _choose_data(self, data: DataConfig) -> Size:
        """Choose the size, and how many unreadable pictures may be left out. Return the size."""
        broken, sizes = self.source.broken, self.source.sizes
        if len(broken) <= max(1, BROKEN * self.count):
            reason = f"cannot be read: {broken[0]}" if broken else "all can be read"
            self.choose("data.corrupt_limit", len(broken), reason)
        own = next(iter(sizes))
        if data.size is not None:
            return data.size_of(self.source)
        if self.latents or (len(sizes) == 1 and self._is_small(own)):
            return own
        shorter = sorted(min(size[-2:]) for size, number in sizes.items() for _ in range(number))
        most = shorter[len(shorter) // 4]
        side = max((side for side in SIDES[self.device] if side <= most), default=SIDES[self.device][0])
        self.choose("data.size", side, f"most pictures have {most} pixels or more; the rest is cropped")
        return (*own[:-2], side, side)

    def _is_small(self, size: Size) -> bool:
        """Return True for a size that the network given, or one of few tokens, takes as it is."""
        shape = self.fields.get("model")
        patch = shape.get("patch_size") if isinstance(shape, dict) else None
        patch = patch if isinstance(patch, int) and patch > 0 else patch_size(size, TOKENS[self.device])
        fits = size[-2] % patch == size[-1] % patch == 0
        return (
            fits and max(size[-2:]) <= SIDES[self.device][-1] and _tokens(size, patch) <= TOKENS[self.device]
        )

    def _choose_network(self) -> None:
        """Choose the largest network that has time enough to learn, and the number of steps."""
        most = min(MOST_STEPS, max(LEAST_STEPS, PASSES * self.count // self.batch))
        wanted = min(ENOUGH_STEPS, most)
        if "model" in self.fields:
            self.network = self._network_config(self.fields["model"])
            rate = 0.0 if "steps" in self.fields else images_per_s(self.network, self.batch, self.device)
        else:
            shape, rate = self._largest(wanted)
            self.choose("model", shape, f"for {self.count:,} pictures; {rate:,.0f} of them a second here")
            self.network = self._network_config(shape)
        if "stages" not in self.fields:
            affordable = int(rate * BUDGET_S / self.batch)
            steps = max(min(LEAST_STEPS, most), min(most, affordable))
            reason = f"{steps * self.batch // self.count:,} passes over the pictures"
            self.choose("steps", steps, reason if steps == most else f"{BUDGET_S // 60} minutes here")

    def _largest(self, wanted: int) -> tuple[dict[str, Any], float]:
        """Return the largest network that takes `wanted` steps in the time, and its pictures a second."""
        shapes = [self._shape(*numbers) for pictures, *numbers in NETWORKS if self.count >= pictures]
        best = shapes[0], images_per_s(self._network_config(shapes[0]), self.batch, self.device)
        for shape in shapes[1:]:
            rate = images_per_s(self._network_config(shape), self.batch, self.device)
            if rate * BUDGET_S < wanted * self.batch:
                break
            best = shape, rate
        return best

    def _shape(self, width: int, depth: int, heads: int) -> dict[str, Any]:
        patch = 2 if self.latents else patch_size(self.size, TOKENS[self.device])
        # A convolution over the seams of large patches, as the zoo's emoji model has it.
        seams = {"head_channels": 12} if patch >= 8 else {}
        shape = {"patch_size": patch, "hidden_size": width, "depth": depth, "num_heads": heads}
        return {**shape, "qk_norm": True, **seams}

    def _network_config(self, shape: Any) -> NetworkConfig:
        """Return the configuration of a network on these pictures, without text."""
        channels = self.latents.channels if self.latents else 3
        classes = tuple(len(factor.classes) for factor in self.examples.factors)
        given = {"name": shape} if isinstance(shape, str) else shape
        if not isinstance(given, dict):
            raise ValueError(f"model is {shape!r}: give the fields of a network, or a name such as DiT-S/2")
        noise = self.fields["diffusion"]
        learned = bool(noise.get("learn_sigma")) if isinstance(noise, dict) else False
        basis = {"learn_sigma": learned, "in_channels": channels}
        return network_config({**basis, **given, "image_size": self.size, "classes": classes})

    def _choose_course(self) -> None:
        """Choose the learning rate, the averages, and how often the run saves and shows itself."""
        steps = self._whole("steps", ENOUGH_STEPS)
        width = self.network.hidden_size if isinstance(self.network, DiTConfig) else 192
        if self.latents:
            self.choose("lr", 1e-4, "latents, as in the paper")
        else:
            self.choose("lr", float(f"{0.002 * math.sqrt(64 / width):.2g}"), f"the width is {width}")
            self.choose("label_std", 0.3, "short runs learn classes faster from it")
            self.choose("loss_cap", 5.0, "as in the zoo")
        self.choose("ema", 0.999 if steps >= 3_000 else 0.99, f"{steps:,} steps")
        self.choose("warmup", min(100, steps // 10), f"{steps:,} steps")
        self.choose("precision", "bf16" if self.device == "cuda" else "fp32", f"usual on {self.device}")
        self.choose("checkpoint_every", max(50, steps // 20), "a twentieth of the run is lost at most")
        self.choose("sheet_every", max(1, steps // 5), "five sample sheets")


def images_per_s(config: NetworkConfig, batch: int, device: str) -> float:
    """Return the pictures a second that a network trains on here, measured for `PROBE_S` after a warm-up."""
    network, batch = make_network(config).to(device), min(batch, BATCH[device])
    x = torch.randn(batch, config.in_channels, *config.image_size, device=device)
    t = torch.full((batch,), 500.0, device=device)
    labels = torch.zeros((batch, len(config.classes)), dtype=torch.int64, device=device)
    text = torch.zeros((batch, config.text_width), device=device) if config.text_size else None
    began, done = time.perf_counter(), -1
    while done < 1 or time.perf_counter() - began < PROBE_S:
        network(x, t, labels, text).square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        done += 1
        if done == 0:
            began = time.perf_counter()
    return done * batch / (time.perf_counter() - began)


def patch_size(size: Size, tokens: int) -> int:
    """Return the smallest patch up to 8 that cuts a size into at most `tokens`; else the largest."""
    fitting = [patch for patch in range(1, 9) if math.gcd(*size[-2:]) % patch == 0]
    return next((patch for patch in fitting if _tokens(size, patch) <= tokens), fitting[-1])


def _tokens(size: Size, patch: int) -> int:
    return math.prod(size[:-2]) * (size[-2] // patch) * (size[-1] // patch)


def recipe_table(choices: Sequence[Choice]) -> Table:
    """Return the choices as a table for a terminal."""
    table = Table("field", "value", "because", title="the recipe; --set FIELD=VALUE changes it")
    for choice in choices:
        value = choice.value.items() if isinstance(choice.value, dict) else ()
        parts = ", ".join(f"{name} {part}" for name, part in value)
        table.add_row(choice.field, parts or str(choice.value), choice.reason)
    return table
