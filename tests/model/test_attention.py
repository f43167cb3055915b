"""Attention maps: they are those of the forward pass, and the command paints them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from ditserve.model.attention import attention_maps, main, overlay
from ditserve.model.nets.blocks import Block
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.unet import UNet
from ditserve.model.spec.dit_config import DiTConfig
from tests.model.conftest import write_bundle
from tests.model.nets.unet_cases import TINY_UNET

Tiny = Callable[..., DiTConfig]
Make = Callable[..., DiT]


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as opened:
        return opened.size


@pytest.mark.parametrize("kind", ["adaln_zero", "in_context", "cross_attention"])
def test_maps_are_probabilities_between_image_tokens(tiny: Tiny, network: Make, kind: str) -> None:
    dit = network(tiny(blocks=kind, rope=True, qk_norm=True))
    state = dit.modulate(torch.zeros(2), dit.embed(torch.zeros(2, 2, dtype=torch.int64)))
    maps = attention_maps(dit, torch.randn(2, 3, 8, 4), state)
    assert [(tuple(attention.weights.shape), attention.rows, attention.columns) for attention in maps] == [
        ((2, 2, 8, 8), 4, 2)
    ] * 3
    for attention in maps:
        total = attention.weights.sum(-1)
        assert (
            (total < 1 - 1e-4).all() if kind == "in_context" else torch.allclose(total, torch.ones(2, 2, 8))
        )
    assert not cast(Block, dit.blocks[0]).attn._forward_pre_hooks


def test_first_map_by_hand(network: Make) -> None:
    """The map is softmax(q·k/√head) of the modulated input of the first block."""
    dit = network()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        state = dit.modulate(torch.zeros(1), dit.embed(torch.zeros(1, 2, dtype=torch.int64)))
        h = dit.x_embedder(x) + dit.pos_embed
        h = torch.nn.functional.layer_norm(h, (32,), eps=1e-6) * (1 + state[0][:, 1:2]) + state[0][:, 0:1]
        qkv = cast(Block, dit.blocks[0]).attn.qkv(h).chunk(3, dim=-1)
        q, k, _ = (part.reshape(1, 16, 2, 16).transpose(1, 2) for part in qkv)
        expected = torch.softmax(q @ k.transpose(-1, -2) / 4, dim=-1)
    assert torch.allclose(attention_maps(dit, x, state)[0].weights, expected, atol=1e-5)


def test_a_unet_has_maps_where_its_levels_attend() -> None:
    """The coarser level attends on the way down, in the middle, and twice on the way up, on its own grid."""
    unet = UNet(TINY_UNET).eval()
    state = unet.modulate(torch.zeros(1), unet.embed(torch.zeros(1, 2, dtype=torch.int64)))
    maps = attention_maps(unet, torch.randn(1, 3, 8, 16), state)
    assert [(attention.rows, attention.columns) for attention in maps] == [(4, 8)] * 4
    assert maps[0].heat().shape == (4, 8, 4, 8)
    assert all(torch.allclose(attention.weights.sum(-1), torch.ones(1)) for attention in maps)


def test_overlay_is_bright_where_the_heat_is() -> None:
    picture = np.full((8, 8, 3), 100, np.uint8)
    heat = np.zeros((2, 2), np.float32)
    heat[0, 1] = 0.3
    out = overlay(picture, heat, 4, frame=(1, 0))
    assert out.shape == (32, 32, 3)
    assert out[2, 29, 0] > out[29, 29, 0] + 50
    assert (out[16, :16] == 255).all()  # the frame of patch (1, 0)
    assert overlay(picture, np.zeros((2, 2), np.float32), 1).max() < 255


def test_command_line_on_a_unet(unet_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "maps.png"
    assert main([str(unet_bundle), "-c", "label=dog", "-o", str(out), "--query", "7", "0"]) == 0
    assert size_of(out) == (4 * 32, 2 * 32)


def test_command_line(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "maps.png"
    assert main([str(bundle), "-c", "label=dog", "--seed", "3", "-o", str(out), "--zoom", "2"]) == 0
    assert size_of(out) == (4 * 16, 2 * 16)  # the picture and three blocks; all patches, and one
    assert "64×32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--query", "8", "0"], "a pixel in rows 0..7 and columns 0..7, not 8 0"),
        (["-c", "label=q"], "no label 'q'"),
    ],
)
def test_errors_are_one_sentence(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(bundle), "-o", str(tmp_path / "out.png"), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"merge_tokens": 0.5}, "paint the model without merge_tokens"), ({"attention": "channel"}, "to paint")],
)
def test_networks_without_maps_of_tokens_are_refused(
    tiny: Tiny,
    network: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    bundle = write_bundle(network(tiny(**changes)), tmp_path / "bundle")
    assert main([str(bundle), "-o", str(tmp_path / "out.png")]) == 2
    assert message in capsys.readouterr().err


def test_maps_of_kinds_and_levels_are_probabilities(tiny: Tiny, network: Make) -> None:
    """Merged levels have the coarser grid; a window's map is zero outside of it."""
    shape = tiny(levels=(0, 1, 0), attention=("window:2", "full", "low_rank:3"))
    dit = network(shape)
    state = dit.modulate(torch.tensor([500.0]), dit.embed(torch.zeros(1, 2, dtype=torch.int64)))
    maps = attention_maps(dit, torch.randn(1, 3, 8, 8), state)
    assert [(each.rows, each.columns) for each in maps] == [(4, 4), (2, 2), (4, 4)]
    for each in maps:
        assert torch.allclose(each.weights.sum(-1), torch.ones(1), atol=1e-5)
    heat = maps[0].heat()
    assert heat[0, 0, :2, :2].sum() == pytest.approx(1.0, abs=1e-5)
