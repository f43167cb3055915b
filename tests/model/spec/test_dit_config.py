"""Configurations: the published sizes, refusals and their sentences, and the condition state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from ditserve.model.spec.dit_config import BLOCK_KINDS, PATCHES, SIZES, DiTConfig, published_config

Tiny = Callable[..., DiTConfig]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", PATCHES)
def test_published_sizes_are_those_of_the_paper(size: str, patch: int) -> None:
    config = published_config(f"DiT-{size}/{patch}")
    assert (config.depth, config.hidden_size, config.num_heads) == SIZES[size]
    assert config.tokens == (32 // patch) ** 2
    assert config.classes == (1000,)
    assert config.out_channels == 8


def test_a_published_config_takes_changes() -> None:
    assert published_config("DiT-S/2", learn_sigma=False, classes=(10,)).out_channels == 4


@pytest.mark.parametrize("name", ["DiT-S/3", "DiT-M/2", "dit-s/2", "DiT-S/2 ", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="DiT-S/2"):
        published_config(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "hidden_size 30 is not divisible by num_heads 4: use .* 28"),
        ({"hidden_size": 30, "num_heads": 2}, "multiple of 4"),
        ({"hidden_size": 0}, "hidden_size must be positive"),
        ({"depth": -1}, "depth must be positive"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be positive"),
        ({"mlp_norm_eps": 0.0}, "mlp_norm_eps must be positive"),
        ({"patch_size": 3}, "8x8 is not divisible by patch_size 3"),
        ({"patch_size": 0}, "patch_size must be positive"),
        ({"image_size": (8, 0)}, "image_size must be two or three positive"),
        ({"image_size": (8,)}, "image_size must be two or three positive"),
        ({"base_size": (7, 8)}, "base_size 7x8 is not divisible"),
        ({"blocks": ("adaln", "gated", "adaln")}, "unknown block kind 'gated': choose among adaln_zero"),
        ({"blocks": "gated"}, "unknown block kind 'gated'"),
        ({"blocks": ("adaln", "adaln")}, "names 2 kinds for depth 3"),
        ({"depth": 2.5}, "depth must be positive and whole, not 2.5"),
        ({"image_size": 8}, "image_size must be two or three positive"),
        ({"classes": 5}, "classes must be a tuple of numbers, one per label factor, not 5"),
        ({"classes": (5, 0)}, "leave a factor out"),
        ({"text_size": -1}, "text_size"),
        ({"fusion": "product"}, "unknown fusion 'product': choose among sum, mlp"),
        ({"layout_rank": -1}, "layout_rank"),
        ({"mean_rank": -1}, "mean_rank must be 0"),
        ({"mean_maps": 0, "mean_rank": 2}, "mean_maps must be positive"),
        ({"mean_maps": 2}, "mean_maps is for mean_rank"),
        ({"rope": True, "hidden_size": 12}, "head size that is a multiple of 4, not 6"),
        ({"frequency_shift": 2}, "0 .published DiT. or 1 .diffusers."),
        ({"head_channels": 2}, r"at least in_channels \(3\)"),
        ({"head_channels": 6, "learn_sigma": True}, "turn learn_sigma off"),
        ({"shared_modulation": True, "blocks": "in_context"}, "shared_modulation needs blocks that are all"),
        ({"condition_gate": True, "blocks": ("adaln", "adaln", "adaln_zero")}, "condition_gate needs blocks"),
        ({"experts": 1}, "experts must be 0"),
        ({"experts": 4, "top_k": 4}, "top_k 4 must be below experts 4"),
        ({"experts": 4, "top_k": 0}, "top_k must be positive"),
        ({"experts": 4, "swiglu": True}, "leave out swiglu, or experts"),
        ({"experts": 17}, "experts 17 are more than the 16 tokens"),
        ({"experts": 4, "routing": "hash"}, "unknown routing 'hash': choose among expert_choice"),
        ({"shared_expert": True}, "shared_expert is for experts: set experts, or leave it out"),
        ({"top_k": 2}, "top_k is for experts"),
        ({"routing": "token_choice"}, "routing is for experts"),
        (
            {"attention": "low_rank:17"},
            "low_rank:17 has more mixes than a picture has tokens at its level, 16",
        ),
    ],
)
def test_configs_that_cannot_work_are_refused_with_the_remedy(
    tiny: Tiny, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_lists_of_json_become_tuples(tiny: Tiny) -> None:
    config = tiny(image_size=[8, 16], classes=[5], blocks=["adaln"], base_size=[8, 8])
    assert config == tiny(image_size=(8, 16), classes=(5,), blocks=("adaln",), base_size=(8, 8))
    assert hash(config)
    assert tiny(blocks="adaln").plan == ("adaln",) * 3


def test_json_round_trip_and_unknown_fields(tiny: Tiny) -> None:
    adapter = TypeAdapter(DiTConfig)
    config = tiny(blocks=("adaln_zero", "adaln", "cross_attention"), base_size=(4, 4))
    assert adapter.validate_json(adapter.dump_json(config)) == config
    with pytest.raises(ValidationError, match="heads"):
        adapter.validate_python({"heads": 3})


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_state_of_each_kind(tiny: Tiny, kind: str) -> None:
    vectors = {"adaln_zero": 6, "adaln": 4}.get(kind, 0)
    expected = [(f"block_{k}", (vectors, 32)) for k in range(3)] if vectors else [("tokens", (2, 32))]
    expected += [("final", (2, 32))] if vectors else []
    assert list(tiny(blocks=(kind,)).state()) == expected


def test_state_of_a_hybrid_plan_with_layout(tiny: Tiny) -> None:
    config = tiny(blocks=("adaln_zero", "adaln", "cross_attention"), layout_rank=2)
    assert dict(config.state()) == {
        "block_0": (6, 32),
        "block_1": (4, 32),
        "tokens": (2, 32),
        "layout": (16, 32),
    }
    assert not config.adaptive_final


def test_positions_are_squeezed_per_axis_and_never_stretched(tiny: Tiny) -> None:
    assert tiny().position_scale((4, 4)) == (1.0, 1.0)
    assert tiny().position_scale((8, 4)) == (0.5, 1.0)
    assert tiny().position_scale((2, 16)) == (1.0, 0.25)
    assert tiny(image_size=(16, 16), base_size=(8, 8)).position_scale((8, 8)) == (0.5, 0.5)
