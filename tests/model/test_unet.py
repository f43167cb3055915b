"""The U-Net baseline: the DiT's interface, ADM's shape, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from pydantic import TypeAdapter

from model.network import make_network, network_config
from model.unet import ResBlock, Stage, UNet, UNetConfig

TINY = UNetConfig(
    image_size=(8, 8),
    in_channels=3,
    base_channels=16,
    multipliers=(1, 2),
    res_blocks=1,
    attention=(1,),
    head_size=16,
    classes=(5, 3),
    learn_sigma=False,
)


def randomised(config: UNetConfig = TINY) -> UNet:
    generator = torch.Generator().manual_seed(0)
    unet = UNet(config).eval()
    for parameter in unet.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return unet


def inputs(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(rows, 3, 8, 8, generator=generator),
        torch.randint(1000, (rows,), generator=generator),
        torch.tensor([[k % 6, k % 4] for k in range(rows)]),
    )


def test_split_is_forward_to_the_bit_and_state_is_as_declared() -> None:
    unet = randomised()
    x, t, labels = inputs()
    state = unet.modulate(t, unet.embed(labels))
    assert [tuple(part.shape[1:]) for part in state] == [shape for _, shape in TINY.state()]
    assert unet.embed(labels).shape == (4, TINY.hidden_size)
    out = unet(x, t, labels)
    assert out.shape == x.shape
    assert torch.equal(out, unet.backbone(x, state))


def test_every_input_matters_and_rows_are_independent() -> None:
    unet = randomised()
    x, t, labels = inputs()
    with torch.no_grad():
        base = unet(x, t, labels)
        for changed in (
            unet(x + 1, t, labels),
            unet(x, (t + 500) % 1000, labels),
            unet(x, t, labels.flip(0)),
        ):
            assert (changed - base).abs().max() > 1e-4
        assert torch.allclose(unet(x[2:3], t[2:3], labels[2:3]), base[2:3], atol=1e-5)


def test_starts_at_zero_and_learns() -> None:
    torch.manual_seed(0)
    unet = UNet(TINY)
    x, t, labels = inputs()
    assert not unet(x, t, labels).any()
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = F.mse_loss(unet(x, t, labels), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert [name for name, p in unet.named_parameters() if p.grad is None] == []


def test_block_norm_is_scaled_and_shifted_by_the_condition() -> None:
    block = ResBlock(Stage(16, 16), 64, 16)
    h, state = torch.randn(2, 16, 4, 4), torch.randn(2, 2, 16)
    scale, shift = state[:, 0, :, None, None], state[:, 1, :, None, None]
    inner = F.group_norm(block.conv1(F.silu(F.group_norm(h, 16, block.norm1.weight, block.norm1.bias))), 16)
    expected = h + block.conv2(F.silu(inner * (1 + scale) + shift))
    assert torch.allclose(block(h, state), expected, atol=1e-5)


def test_shape_is_diffusers_unet_of_the_same_settings() -> None:
    """As many residual blocks with the same channels as diffusers' ADM-like U-Net: three levels, two blocks each."""
    ours = UNetConfig(base_channels=32, multipliers=(1, 2, 3), res_blocks=2, attention=(1, 2), head_size=16)
    theirs = UNet2DModel(
        block_out_channels=(32, 64, 96),
        layers_per_block=2,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        norm_num_groups=32,
    )
    channels = sorted(
        (module.in_channels, module.out_channels)
        for module in theirs.modules()
        if type(module).__name__ == "ResnetBlock2D"
    )
    assert sorted((stage.inputs, stage.outputs) for stage in ours.stages()) == channels


def test_other_sizes_and_compilation() -> None:
    unet = randomised()
    _, t, labels = inputs()
    x = torch.randn(4, 3, 4, 12)
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x, t, labels), unet(x, t, labels), atol=1e-6)
    with pytest.raises(ValueError, match="not divisible"):
        unet(torch.randn(4, 3, 5, 8), t, labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (9, 8)}, "image_size 9x8 is not divisible"),
        ({"base_channels": 0}, "base_channels must be positive"),
        ({"multipliers": ()}, "one or more"),
        ({"attention": (2,)}, r"levels in 0\.\.1"),
        ({"base_channels": 20}, "level 1 has 40 channels, not a multiple of head_size 16"),
        ({"classes": (0,)}, "leave a factor out"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    fields = TypeAdapter(UNetConfig).dump_python(TINY) | changes
    with pytest.raises(ValueError, match=message):
        UNetConfig(**fields)


def test_networks_by_configuration() -> None:
    fields = TypeAdapter(UNetConfig).dump_python(TINY, mode="json")
    config = network_config({"network": "unet", **fields})
    assert config == TINY
    assert isinstance(make_network(config), UNet)
    with pytest.raises(ValueError, match="published sizes of the DiT"):
        network_config({"network": "unet", "name": "DiT-S/2"})
