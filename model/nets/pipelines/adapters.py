"""The transformers of diffusers, asked: one function a family, from a batch of rows to its output.

Each row has its own noise level and its own text; the modules take vectors of both. What a pipeline packs,
numbers or lists on the way stays in here: latents are (B, C, H, W) on either side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Rows(NamedTuple):
    """The rows of a forward pass, in the precision of the module.

    x         latents (B, C, H, W)
    noise     what the network is told of their noise levels (B,), in fp32
    text      tokens (B, L, D), padding included
    mask      1 for the tokens that are no padding (B, L); None: the network looks at all
    pooled    the whole texts (B, P); None: the network is given none
    guidance  the scales that the network is told (B,), in fp32; None: it is told none
    factor    the pixels that a latent covers on a side
    """

    x: Tensor
    noise: Tensor
    text: Tensor
    mask: Tensor | None
    pooled: Tensor | None
    guidance: Tensor | None
    factor: int


def _pixart(module: nn.Module, rows: Rows) -> Tensor:
    known: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if module.use_additional_conditions:
        height, width = (side * rows.factor for side in rows.x.shape[2:])
        known["resolution"] = rows.x.new_tensor([[height, width]]).expand(len(rows.x), 2)
        known["aspect_ratio"] = rows.x.new_tensor([[height / width]]).expand(len(rows.x), 1)
    return _output(
        module(
            rows.x,
            encoder_hidden_states=rows.text,
            encoder_attention_mask=rows.mask,
            timestep=rows.noise,
            added_cond_kwargs=known,
            return_dict=False,
        )
    )


def _sd3(module: nn.Module, rows: Rows) -> Tensor:
    return _output(
        module(
            hidden_states=rows.x,
            timestep=rows.noise,
            encoder_hidden_states=rows.text,
            pooled_projections=rows.pooled,
            return_dict=False,
        )
    )


def _flux(module: nn.Module, rows: Rows) -> Tensor:
    height, width = rows.x.shape[2:]
    output = module(
        hidden_states=pack(rows.x),
        timestep=rows.noise,
        guidance=rows.guidance,
        pooled_projections=rows.pooled,
        encoder_hidden_states=rows.text,
        txt_ids=rows.x.new_zeros(rows.text.shape[1], 3),
        img_ids=_places(height // 2, width // 2, rows.x),
        return_dict=False,
    )
    return unpack(_output(output), height, width)


def _sana(module: Any, rows: Rows) -> Tensor:
    return _output(
        module(
            rows.x,
            encoder_hidden_states=rows.text,
            encoder_attention_mask=rows.mask,
            timestep=rows.noise * module.config.timestep_scale,
            return_dict=False,
        )
    )


def _lumina2(module: nn.Module, rows: Rows) -> Tensor:
    return _output(
        module(
            hidden_states=rows.x,
            timestep=rows.noise,
            encoder_hidden_states=rows.text,
            # It counts the tokens.
            encoder_attention_mask=_seen(rows).long(),
            return_dict=False,
        )
    )


def _auraflow(module: nn.Module, rows: Rows) -> Tensor:
    return _output(module(rows.x, encoder_hidden_states=rows.text, timestep=rows.noise, return_dict=False))


def _chroma(module: nn.Module, rows: Rows) -> Tensor:
    height, width = rows.x.shape[2:]
    tokens = pack(rows.x)
    output = module(
        hidden_states=tokens,
        timestep=rows.noise,
        encoder_hidden_states=rows.text,
        txt_ids=rows.x.new_zeros(rows.text.shape[1], 3),
        img_ids=_places(height // 2, width // 2, rows.x),
        # As numbers it would be added to the products of the attention.
        attention_mask=nn.functional.pad(_seen(rows), (0, tokens.shape[1]), value=True),
        return_dict=False,
    )
    return unpack(_output(output), height, width)


def _qwen_image(module: nn.Module, rows: Rows) -> Tensor:
    height, width = rows.x.shape[2:]
    output = module(
        hidden_states=pack(rows.x),
        timestep=rows.noise,
        encoder_hidden_states=rows.text,
        encoder_hidden_states_mask=_seen(rows),
        # One for all: they are of one size, and a list as long as the batch would make a graph of that alone.
        img_shapes=[[(1, height // 2, width // 2)]],
        return_dict=False,
    )
    return unpack(_output(output), height, width)


def _z_image(module: nn.Module, rows: Rows) -> Tensor:
    texts = [text[seen] for text, seen in zip(rows.text, _seen(rows), strict=True)]
    images = module(list(rows.x.unsqueeze(2)), rows.noise, texts, return_dict=False)[0]
    return torch.stack(images).squeeze(2)


ADAPTERS: Mapping[str, Callable[[nn.Module, Rows], Tensor]] = {
    "pixart": _pixart,
    "sd3": _sd3,
    "flux": _flux,
    "sana": _sana,
    "lumina2": _lumina2,
    "auraflow": _auraflow,
    "chroma": _chroma,
    "qwen_image": _qwen_image,
    "z_image": _z_image,
}


def _seen(rows: Rows) -> Tensor:
    """Return a mask of bool (B, L). The first token is seen even of a row without a text."""
    assert rows.mask is not None
    seen = rows.mask > 0
    seen[:, 0] = True
    return seen


def _output(returned: Any) -> Tensor:
    """Return the first of what a module returns, its output."""
    output: Tensor = returned[0]
    return output


def pack(x: Tensor) -> Tensor:
    """Return latents (B, C, H, W) as tokens (B, H/2 · W/2, 4 C) of 2 × 2 pixels."""
    batch, channels, height, width = x.shape
    squares = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(batch, -1, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens (B, H/2 · W/2, 4 C) of 2 × 2 pixels as latents (B, C, H, W)."""
    batch, _, numbers = tokens.shape
    squares = tokens.reshape(batch, height // 2, width // 2, numbers // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(batch, numbers // 4, height, width)


def _places(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return the places (rows · columns, 3) of an image's tokens: 0, row and column."""
    row = torch.arange(rows, device=like.device, dtype=like.dtype)[:, None].expand(rows, columns)
    column = torch.arange(columns, device=like.device, dtype=like.dtype).expand(rows, columns)
    return torch.stack([torch.zeros_like(row), row, column], dim=2).reshape(rows * columns, 3)
