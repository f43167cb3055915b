"""The U-Net: it has the interface of the DiT and the shape of ADM, and it learns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from pydantic import TypeAdapter
from torch import Tensor

from ditserve.model.nets.factory import make_network
from ditserve.model.nets.unet import ResBlock, UNet, group_norm
from ditserve.model.spec.network_config import network_config, network_fields
from ditserve.model.spec.unet_config import UNetConfig, UNetStage
from tests.model.nets.unet_cases import TINY_UNET

OPTIONS: dict[str, dict[str, Any]] = {
    "labels": {},
    "learned sigma": {"learn_sigma": True},
    "text and fusion": {"text_size": 6, "fusion": "mlp"},
    "unconditional": {"classes": ()},
    "one level": {"multipliers": (1,), "attention": ()},
}


def randomised(config: UNetConfig = TINY_UNET) -> UNet:
    generator = torch.Generator().manual_seed(0)
    unet = UNet(config).eval()
    for parameter in unet.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return unet


def inputs(config: UNetConfig = TINY_UNET, rows: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 3, 8, 8, generator=generator)
    t = torch.randint(1000, (rows,), generator=generator)
    columns = [[k % (count + 1) for count in config.classes] for k in range(rows)]
    text = torch.randn(rows, config.text_size, generator=generator) if config.text_size else None
    return x, t, torch.tensor(columns, dtype=torch.int64).reshape(rows, -1), text


@pytest.fixture(params=OPTIONS)
def variant(request: pytest.FixtureRequest) -> UNetConfig:
    return replace(TINY_UNET, **OPTIONS[request.param])


def test_split_is_forward_to_the_bit_and_state_is_as_declared(variant: UNetConfig) -> None:
    unet = randomised(variant)
    x, t, labels, text = inputs(variant)
    with torch.no_grad():
        state = unet.modulate(t, unet.embed(labels, text))
        whole = unet(x, t, labels, text)
        assert torch.equal(whole, unet.backbone(x, state))
    assert [tuple(part.shape[1:]) for part in state] == [shape for _, shape in variant.state()]
    assert unet.embed(labels, text).shape == (4, variant.hidden_size)
    assert whole.shape == (4, variant.out_channels, 8, 8)
    assert len(state) == variant.depth


def test_every_input_matters_and_rows_are_independent() -> None:
    unet = randomised()
    x, t, labels, _ = inputs()
    with torch.no_grad():
        base = unet(x, t, labels)
        for changed in (
            unet(x + 1, t, labels),
            unet(x, (t + 500) % 1000, labels),
            unet(x, t, labels.flip(0)),
        ):
            assert (changed - base).abs().max() > 1e-4
        assert torch.allclose(unet(x[2:3], t[2:3], labels[2:3]), base[2:3], atol=1e-5)


def test_starts_at_zero_and_learns(variant: UNetConfig) -> None:
    torch.manual_seed(0)
    unet = UNet(variant)
    x, t, labels, text = inputs(variant)
    assert not unet(x, t, labels, text).any()
    target = torch.randn(4, variant.out_channels, 8, 8, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = F.mse_loss(unet(x, t, labels, text), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    still = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in still if name != "y_embedder.no_text"] == []


def test_block_norm_is_scaled_and_shifted_by_the_condition() -> None:
    block = ResBlock(UNetStage(16, 16), 64, 16)
    h, state = torch.randn(2, 16, 4, 4), torch.randn(2, 2, 16)
    scale, shift = state[:, 0, :, None, None], state[:, 1, :, None, None]
    inner = F.group_norm(block.conv1(F.silu(F.group_norm(h, 16, block.norm1.weight, block.norm1.bias))), 16)
    expected = h + block.conv2(F.silu(inner * (1 + scale) + shift))
    assert torch.allclose(block(h, state), expected, atol=1e-5)


def test_shape_is_diffusers_unet_of_the_same_settings() -> None:
    """Its residual blocks have the channels of those in diffusers' U-Net of ADM's kind."""
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


def test_compiles_without_graph_breaks_at_any_size() -> None:
    """Every option is in this configuration."""
    config = replace(TINY_UNET, learn_sigma=True, text_size=6, fusion="mlp")
    unet = randomised(config)
    _, t, labels, text = inputs(config)
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    for size in ((8, 8), (4, 12)):
        x = torch.randn(4, 3, *size)
        with torch.no_grad():
            assert torch.allclose(compiled(x, t, labels, text), unet(x, t, labels, text), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inference(dtype: torch.dtype) -> None:
    x, t, labels, _ = inputs()
    with torch.no_grad():
        full = randomised()(x, t, labels)
        half = randomised().to(dtype)(x.to(dtype), t, labels)
    assert half.dtype == dtype
    assert (half.float() - full).norm() / full.norm() < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_statistics_are_fp32(dtype: torch.dtype) -> None:
    """In half precision, the sum of four thousand numbers around 30 would lose their mean."""
    h = (torch.randn(1, 32, 64, 64) + 30).to(dtype)
    exact = F.group_norm(h.double(), 32)
    assert (group_norm(32).to(dtype)(h).double() - exact).abs().max() < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("x", "t", "labels", "message"),
    [
        ((4, 3, 5, 8), (4,), [0, 0], "size 5x8 is not divisible"),
        ((4, 4, 8, 8), (4,), [0, 0], r"x must be \(N, 3, H, W\), not \(4, 4, 8, 8\)"),
        ((3, 8, 8), (4,), [0, 0], r"x must be \(N, 3, H, W\), not \(3, 8, 8\)"),
        ((4, 3, 8, 8), (), [0, 0], "one timestep per row"),
        ((4, 3, 8, 8), (4, 1), [0, 0], "one timestep per row"),
        ((4, 3, 8, 8), (3,), [0, 0], "one timestep per row"),
        ((4, 3, 8, 8), (4,), [0, 4], r"label 4 of factor 1 must be in 0\.\.3"),
        ((4, 3, 8, 8), (4,), [-1, 0], r"label -1 of factor 0 must be in 0\.\.5"),
        ((4, 3, 8, 8), (4,), [0], r"labels must be \(N, 2\)"),
    ],
)
def test_bad_inputs_are_refused(
    x: tuple[int, ...], t: tuple[int, ...], labels: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        randomised()(torch.zeros(x), torch.zeros(t), torch.tensor([labels] * 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (9, 8)}, "image_size 9x8 is not divisible by the halvings between 2 levels, 2"),
        ({"text_size": -1}, "text_size must be the width"),
        ({"fusion": "product"}, "unknown fusion 'product'"),
        ({"base_channels": 0}, "base_channels must be positive"),
        ({"attention": 1}, "attention must be a tuple of whole numbers, not 1"),
        ({"classes": 5}, "classes must be a tuple"),
        ({"multipliers": ()}, "one or more"),
        ({"attention": (2,)}, r"levels in 0\.\.1"),
        ({"base_channels": 20}, "level 1 has 40 channels, not a multiple of head_size 16"),
        ({"classes": (0,)}, "leave a factor out"),
    ],
)
def test_configs_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    fields = TypeAdapter(UNetConfig).dump_python(TINY_UNET) | changes
    with pytest.raises(ValueError, match=message):
        UNetConfig(**fields)


def test_networks_by_configuration() -> None:
    fields = network_fields(TINY_UNET)
    assert fields["network"] == "unet"
    config = network_config(fields)
    assert config == TINY_UNET
    assert isinstance(make_network(config), UNet)
