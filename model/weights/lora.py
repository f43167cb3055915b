"""Files of low-rank adapters, in the layouts of PEFT, diffusers and kohya, for a network that is there.

    PEFT        base_model.model.blocks.0.attn.qkv.lora_A.weight  (r, in), lora_B (out, r); alpha is beside it
    diffusers   transformer.…lora_A.weight, or lora.down.weight and lora.up.weight; alpha in the metadata
    kohya       lora_unet_blocks_0_attn_qkv.lora_down.weight, lora_up.weight, alpha

A term counts alpha / r, alpha being r where a file does not tell it. Other names of the layers of imported
families are left to diffusers, see `model.nets.pipelines.lora`. A file that does not fit is refused with one
sentence that names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from ditserve.model.nets.lora import Layers, LowRank
from ditserve.model.spec.adapters import AdapterFile
from ditserve.model.spec.bundle import WEIGHTS, Bundle
from ditserve.model.spec.errors import ModelError

LARGEST_RANK: Final = 512
# The metadata in which a file of `model.train` names the weights that it was trained on.
BASE: Final = "ditserve.base"
# The metadata in which diffusers keeps the configuration of PEFT.
DIFFUSERS_CONFIG_KEY: Final = "lora_adapter_metadata"
PREFIXES: Final = ("base_model.model.", "transformer.", "diffusion_model.")
KOHYA: Final = ("lora_unet_", "lora_transformer_")
TEXT_ENCODERS: Final = ("text_encoder", "lora_te", "te1", "te2")
DORA: Final = re.compile(r"dora_scale|lora_magnitude_vector")
# The end of a key → the part of a term that it is.
PARTS: Final = {
    **dict.fromkeys((".lora_A.weight", ".lora_A.default.weight"), "down"),
    **dict.fromkeys((".lora_down.weight", ".lora.down.weight"), "down"),
    **dict.fromkeys((".lora_B.weight", ".lora_B.default.weight"), "up"),
    **dict.fromkeys((".lora_up.weight", ".lora.up.weight"), "up"),
    ".alpha": "alpha",
}
Tensors = dict[str, Tensor]


def adapter_base(bundle: Bundle) -> dict[str, str]:
    """Return what an adapter that `model.train` makes says of the bundle that it was trained on."""
    files = bundle.manifest.files
    return {"name": bundle.manifest.name, "sha256": files[WEIGHTS].sha256 if WEIGHTS in files else ""}


class AdapterError(ModelError):
    """An adapter that does not fit the network; the message is one sentence that names the file."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRankTerms:
    """The terms of an adapter by the layer that each is added to, in fp32."""

    terms: Mapping[str, LowRank]

    @property
    def rank(self) -> int:
        """The largest rank of a term."""
        return max(len(term.down) for term in self.terms.values())


def read_adapter(
    file: AdapterFile,
    layers: Layers,
    *,
    base: Mapping[str, str],
    translate: Callable[[Tensors], Tensors] | None = None,
) -> LowRankTerms:
    """Read an adapter of the network whose layers may be changed are `layers`.

    Args:
        base: what a file of `model.train` must say that it was trained on; other files say nothing of it.
        translate: returns the tensors with the names of the network's layers, for names of other projects.

    Raises:
        AdapterError: it is none, of another network, or holds what cannot be added to these layers.
        BundleError: it was changed or cannot be read.
    """
    weights, config = file.read()
    try:
        tensors = load(weights)
    except SafetensorError as error:
        raise AdapterError(f"{file.path} cannot be read as safetensors: {error}") from None
    metadata = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")]).get("__metadata__", {})
    try:
        _check_base(metadata.get(BASE), base)
        settings = _Settings.read(config.decode(), metadata.get(DIFFUSERS_CONFIG_KEY))
        parts = _parts(tensors, layers, translate)
        terms = {layer: _term(layer, found, layers[layer], settings) for layer, found in parts.items()}
    except (ValueError, UnicodeDecodeError) as error:
        raise AdapterError(f"{file.path}: {error}") from None
    return LowRankTerms(terms)


@dataclass(frozen=True, slots=True)
class _Settings:
    """The scale in PEFT's configuration: alpha, with exceptions by layer, over r or its root."""

    alpha: float | None = None
    alphas: Mapping[str, float] | None = None
    root: bool = False

    @classmethod
    def read(cls, peft: str, diffusers: str | None) -> _Settings:
        """Return the settings of PEFT's adapter_config.json, or of the metadata of diffusers.

        Raises:
            ValueError: they cannot be read, or ask for more than terms of low rank.
        """
        if not peft and diffusers is None:
            return cls()
        fields = _object(peft or str(diffusers))
        if not peft:
            fields = {name.removeprefix("transformer."): value for name, value in fields.items()}
        for name, plain in (("use_dora", False), ("bias", "none"), ("modules_to_save", None)):
            if fields.get(name) not in (plain, None, []):
                raise ValueError(f"its {name} is {fields[name]!r}: only plain LoRA is served")
        alphas = fields.get("alpha_pattern") or {}
        if not isinstance(alphas, dict):
            raise ValueError("its alpha_pattern must be a JSON object")
        for number in (fields.get("lora_alpha", 1.0), *alphas.values()):
            if not isinstance(number, int | float) or not isfinite(number):
                raise ValueError(f"its lora_alpha is {number!r}, which is no number")
        return cls(fields.get("lora_alpha"), alphas, bool(fields.get("use_rslora")))

    def scale(self, layer: str, rank: int, alpha: float | None) -> float:
        """Return the factor of the term of a layer; `alpha` is that of the file itself."""
        if alpha is None:
            exceptions = (value for key, value in (self.alphas or {}).items() if _fits(key, layer))
            alpha = next(exceptions, self.alpha)
        return 1.0 if alpha is None else alpha / (sqrt(rank) if self.root else rank)


def _fits(pattern: str, layer: str) -> bool:
    """Return whether PEFT's pattern is the end of a layer's name."""
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", layer) is not None
    except re.error:
        raise ValueError(f"its alpha_pattern {pattern!r} is no pattern") from None


def _object(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"its configuration is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError("its configuration must be a JSON object")
    return fields


def _check_base(stated: str | None, base: Mapping[str, str]) -> None:
    """Raise `ValueError` for an adapter that was trained on other weights, if it says so."""
    if stated is None:
        return
    said = _object(stated)
    if said != dict(base):
        raise ValueError(
            f"it was trained on other weights, those of {said.get('name')}: train it again on this bundle"
        )


def _parts(
    tensors: Tensors, layers: Layers, translate: Callable[[Tensors], Tensors] | None
) -> dict[str, dict[str, Tensor]]:
    """Return the parts of the term of each layer. Raise `ValueError` for a key that is none of them."""
    if not tensors:
        raise ValueError("it holds no tensors")
    if others := [key for key in sorted(tensors) if key.startswith(TEXT_ENCODERS)]:
        raise ValueError(
            f"{others[0]} changes a text encoder, and only the network can be adapted: leave it out"
        )
    # Diffusers would leave them out without a word.
    if others := [key for key in sorted(tensors) if DORA.search(key)]:
        raise ValueError(f"{others[0]} is of DoRA: only plain LoRA is served")
    found, unknown = _sorted_out(tensors, layers)
    if unknown and translate is not None:
        try:
            translated, lost = translate(dict(tensors)), _lost(tensors, translate)
        # A conversion raises what its code stumbles over.
        except Exception:
            translated, lost = {}, []
        if lost:
            raise ValueError(f"{lost[0]} is no layer of this network by another name")
        if translated:
            found, unknown = _sorted_out(translated, layers)
    if unknown:
        raise ValueError(
            f"{unknown[0]} is no term of a layer of this network"
            + (": it is an adapter of another one" if not found else ", or not of one that can be adapted")
        )
    return found


def _lost(tensors: Tensors, translate: Callable[[Tensors], Tensors]) -> list[str]:
    """Return the names of layers that a translation leaves out, as that of diffusers does without a word.

    The tensors of each layer are replaced by its number, and alpha by the rank, so that nothing is scaled:
    the numbers that come out are those of the layers that are taken over.
    """
    ends = {key: next((end for end in PARTS if key.endswith(end)), "") for key in tensors}
    names = {key: key.removesuffix(end) for key, end in ends.items()}
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names.values()), start=1)}
    ranks = {names[key]: len(tensors[key]) for key, end in ends.items() if PARTS.get(end) == "down"}
    marked = {
        key: torch.full(
            tensor.shape,
            float(ranks.get(names[key], 1) if ends[key] == ".alpha" else numbers[names[key]]),
        )
        for key, tensor in tensors.items()
    }
    taken = {tensor.flatten()[0].item() for tensor in translate(marked).values() if tensor.numel()}
    return [name for name, number in numbers.items() if number not in taken]


def _sorted_out(tensors: Tensors, layers: Layers) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return the parts of the terms by layer, and the keys that are none."""
    flat = {layer.replace(".", "_"): layer for layer in layers}
    found: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for key, tensor in sorted(tensors.items()):
        end = next((end for end in PARTS if key.endswith(end)), "")
        layer = _layer(key.removesuffix(end), layers, flat) if end else None
        if layer is None:
            unknown.append(key)
        elif PARTS[end] in found.setdefault(layer, {}):
            raise ValueError(f"{key} is there in two layouts: keep one")
        else:
            found[layer][PARTS[end]] = tensor
    return found, unknown


def _layer(name: str, layers: Layers, flat: Mapping[str, str]) -> str | None:
    """Return the layer that a key names: with a prefix, or with underscores as kohya writes it."""
    for prefix in KOHYA:
        if name.startswith(prefix):
            return flat.get(name.removeprefix(prefix))
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name if name in layers else None


def _term(layer: str, parts: Mapping[str, Tensor], module: nn.Linear, settings: _Settings) -> LowRank:
    """Return the term of a layer. Raises `ValueError` unless its tensors fit."""
    for part, tensor in parts.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{layer}: {part} is of {tensor.dtype}: take floating point")
        if not bool(torch.isfinite(tensor.float()).all()):
            raise ValueError(f"{layer}: {part} holds NaN or infinite numbers")
    for part in ("down", "up"):
        if part not in parts:
            raise ValueError(f"{layer} has no {part} matrix: the file is not whole")
    down, up = parts["down"].float(), parts["up"].float()
    rank, inputs, outputs = down.shape[0] if down.ndim else 0, module.in_features, module.out_features
    if down.shape != (rank, inputs) or up.shape != (outputs, rank):
        raise ValueError(
            f"{layer} maps {inputs} numbers to {outputs}, and the matrices are {tuple(down.shape)} and "
            f"{tuple(up.shape)}: it is an adapter of another network"
        )
    if not 1 <= rank <= LARGEST_RANK:
        raise ValueError(f"{layer} has rank {rank}: adapters have 1 to {LARGEST_RANK}")
    alpha = parts.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"{layer}: alpha is {tuple(alpha.shape)}, and must be one number")
    scale = settings.scale(layer, rank, None if alpha is None else float(alpha.float().item()))
    return LowRank(down, up * scale)
