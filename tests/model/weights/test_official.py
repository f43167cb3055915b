"""Weights of other layouts: compared with diffusers' DiT, and with the published layout by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from ditserve.model.nets.dit import DiT
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.weights.diffusers import from_diffusers, to_diffusers
from ditserve.model.weights.official import (
    OFFICIAL_TABLE,
    WeightsError,
    check_weights,
    from_official,
    to_official,
)

Make = Callable[..., DiT]
PLAIN = DiTConfig(image_size=(8, 8), hidden_size=16, depth=2, num_heads=2, classes=(5,))
SHARED = ".norm1.emb."


@pytest.fixture
def published() -> dict[str, Tensor]:
    """Random weights under the names and in the shapes of the published release, at width 384."""
    d, generator = 384, torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (d, 4, 2, 2),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (6, d),
        "blocks.0.attn.qkv.weight": (3 * d, d),
        "blocks.0.attn.qkv.bias": (3 * d,),
        "blocks.0.attn.proj.weight": (d, d),
        "blocks.0.attn.proj.bias": (d,),
        "blocks.0.mlp.fc1.weight": (4 * d, d),
        "blocks.0.mlp.fc1.bias": (4 * d,),
        "blocks.0.mlp.fc2.weight": (d, 4 * d),
        "blocks.0.mlp.fc2.bias": (d,),
        "blocks.0.adaLN_modulation.1.weight": (6 * d, d),
        "blocks.0.adaLN_modulation.1.bias": (6 * d,),
        "final_layer.linear.weight": (2 * 2 * 8, d),
        "final_layer.linear.bias": (2 * 2 * 8,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }
    state = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    return {"pos_embed": DiT(replace(PLAIN, hidden_size=d)).pos_embed[None], **state}


@pytest.fixture
def theirs() -> DiTTransformer2DModel:
    """A small random DiT of diffusers whose embedder copies agree, as they do in released weights."""
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(tensor.shape, generator=generator) * 0.3
        for name, tensor in model.state_dict().items()
    }
    for name in state:
        if SHARED in name:
            state[name] = state[name.replace("blocks.1.", "blocks.0.")]
    model.load_state_dict(state)
    return model


def outputs(theirs: DiTTransformer2DModel, ours: DiT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 4, 8, 8, generator=generator)
    t, labels = torch.tensor([0, 50, 500, 999]), torch.tensor([0, 3, 4, 5])  # 5 is the null class
    with torch.no_grad():
        return theirs(x, t, labels, return_dict=False)[0], ours(x, t, labels[:, None])


def test_diffusers_weights_give_the_outputs_of_diffusers(theirs: DiTTransformer2DModel) -> None:
    weights, config = from_diffusers(theirs.state_dict(), dict(theirs.config), function="diffusers")
    ours = DiT(config).eval()
    ours.load_state_dict(weights)
    expected, got = outputs(theirs, ours)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_published_function_differs_from_that_of_diffusers(theirs: DiTTransformer2DModel) -> None:
    weights, config = from_diffusers(theirs.state_dict(), dict(theirs.config), function="published")
    assert (config.frequency_shift, config.mlp_norm_eps) == (0, 1e-6)
    ours = DiT(config).eval()
    ours.load_state_dict(weights)
    expected, got = outputs(theirs, ours)
    assert (got[0] - expected[0]).abs().max() <= 1e-3  # at t = 0 the frequencies do not matter
    assert (got[3] - expected[3]).abs().max() > 1e-2


def test_our_weights_in_diffusers_give_our_outputs(network: Make) -> None:
    ours = network(replace(PLAIN, frequency_shift=1, mlp_norm_eps=1e-5))
    state, fields = to_diffusers(ours.state_dict(), ours.config)
    theirs = DiTTransformer2DModel.from_config(fields).eval()
    theirs.load_state_dict(state)
    expected, got = outputs(theirs, ours)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_published_to_diffusers_and_back_to_the_bit(published: dict[str, Tensor]) -> None:
    weights, config = from_official(published)
    state, fields = to_diffusers(weights, config)
    again, same = from_diffusers(state, fields, function="published")
    back = to_official(again, same)
    assert same == config
    assert back.keys() == published.keys()
    assert all(torch.equal(back[name], published[name]) for name in published)


def test_configuration_is_read_off_the_published_shapes(published: dict[str, Tensor]) -> None:
    _, config = from_official(published)
    assert config == replace(PLAIN, hidden_size=384, num_heads=6, depth=1)
    del published["pos_embed"]
    assert from_official(published, image_size=(4, 8))[1].image_size == (4, 8)
    assert from_official(published, image_size=(8, 8), num_heads=6)[1].num_heads == 6
    with pytest.raises(WeightsError, match="width 384 has 6 heads, not 12"):
        from_official(published, image_size=(8, 8), num_heads=12)
    with pytest.raises(WeightsError, match=r"image size .* must be given"):
        from_official(published)


def test_unknown_width_needs_heads(network: Make) -> None:
    state = to_official(network(PLAIN).state_dict(), PLAIN)
    with pytest.raises(WeightsError, match=r"hidden size 16 .* heads must be given"):
        from_official(state)
    assert from_official(state, num_heads=2)[1] == PLAIN


def test_trained_positions_are_refused(published: dict[str, Tensor]) -> None:
    published["pos_embed"] = published["pos_embed"] + 0.01
    with pytest.raises(WeightsError, match="not the 2-D sine-cosine table"):
        from_official(published)


def test_everything_wrong_is_listed(published: dict[str, Tensor]) -> None:
    del published["blocks.0.attn.proj.bias"]
    published["blocks.0.attn.rel_pos"] = torch.zeros(1)
    published["t_embedder.mlp.2.bias"] = torch.zeros(7)
    with pytest.raises(WeightsError) as caught:
        from_official(published)
    message = str(caught.value)
    assert "missing (1): blocks.0.attn.proj.bias" in message
    assert "extra (1): blocks.0.attn.rel_pos" in message
    assert "wrong shape (1): t_embedder.mlp.2.bias (7,) instead of (384,)" in message


def test_long_lists_are_cut() -> None:
    with pytest.raises(WeightsError, match=r"missing \(\d\d\): .* …"):
        check_weights({}, PLAIN)


def test_no_dit_at_all() -> None:
    with pytest.raises(WeightsError, match=r"missing \(4\): x_embedder"):
        from_official({"conv_in.weight": torch.zeros(1)})


def test_drifted_copies_are_refused(theirs: DiTTransformer2DModel) -> None:
    state = dict(theirs.state_dict())
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    state[name] = state[name] + 1e-6
    with pytest.raises(WeightsError, match=r"embedding_table\.weight disagree: block 1 differs"):
        from_diffusers(state, dict(theirs.config), function="published")


def test_missing_and_extra_in_diffusers(theirs: DiTTransformer2DModel) -> None:
    state = dict(theirs.state_dict())
    state["pos_embed"] = torch.zeros(1)  # old converters leave it; it is computed
    del state["transformer_blocks.1.attn1.to_k.bias"]
    state["lora.down"] = torch.zeros(1)
    with pytest.raises(WeightsError) as caught:
        from_diffusers(state, dict(theirs.config), function="published")
    assert "missing (1): transformer_blocks.1.attn1.to_k.bias" in str(caught.value)
    assert "extra (1): lora.down" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"norm_type": "layer_norm"}, "norm_type 'layer_norm'"), ({"num_attention_heads": 0}, "makes no DiT")],
)
def test_other_diffusers_models_are_refused(
    theirs: DiTTransformer2DModel, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        from_diffusers(theirs.state_dict(), {**theirs.config, **fields}, function="published")


@pytest.mark.parametrize(
    "changes",
    [
        *({"qk_norm": True}, {"blocks": ("adaln",)}, {"classes": (5, 3)}, {"base_size": (4, 4)}),
        *(
            {"shared_modulation": True},
            {"condition_gate": True},
            {"experts": 2},
            {"mean_rank": 2, "learn_sigma": False},
        ),
    ],
)
def test_only_plain_models_are_exported(network: Make, changes: dict[str, Any]) -> None:
    dit = network(replace(PLAIN, **changes))
    for convert in (to_official, to_diffusers):
        with pytest.raises(WeightsError, match=f"undo {next(iter(changes))}"):
            convert(dit.state_dict(), dit.config)


def test_options_that_a_layout_lacks_are_refused(network: Make) -> None:
    dit = network(replace(PLAIN, frequency_shift=1))
    with pytest.raises(WeightsError, match="no sign for it"):
        to_official(dit.state_dict(), dit.config)
    wide = network(replace(PLAIN, image_size=(4, 8)))
    with pytest.raises(WeightsError, match="square"):
        to_diffusers(wide.state_dict(), wide.config)


def test_table_name_is_the_only_one_that_differs(published: dict[str, Tensor]) -> None:
    weights, _ = from_official(published)
    assert published.keys() - weights.keys() == {"pos_embed", OFFICIAL_TABLE}
