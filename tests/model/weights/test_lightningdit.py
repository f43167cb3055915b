"""Imports of LightningDiT: the function that its paper writes down, sampled as its configuration says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from ditserve.model.convert import main
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance, denoise, initial_noise
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.grids import noise_levels
from ditserve.model.spec.solvers import step_table
from ditserve.model.train.load import load_model
from tests.model.weights.lightningdit_reference import (
    CHANNELS,
    CLASSES,
    HEAD,
    HEADS,
    SIDE,
    lightning_config,
    lightning_run,
    lightningdit,
    random_lightningdit,
)

SEED, LABEL = 3, 2
MEAN, STD = torch.linspace(-1, 1, CHANNELS), torch.linspace(0.5, 2, CHANNELS)


def statistics(folder: Path, **changes: Any) -> None:
    shape = (1, CHANNELS, 1, 1)
    stored = {"mean": MEAN.reshape(shape), "std": STD.reshape(shape), **changes}
    torch.save(stored, folder / "latents_stats.pt")


def imported(folder: Path, stored: Any, *options: str) -> int:
    torch.save(stored, folder / "0080000.pt")
    return main(["import", str(folder / "0080000.pt"), str(folder / "bundle"), "--licence", "MIT", *options])


def drawn(bundle: Path) -> Tensor:
    """Return our sample with the defaults of the bundle."""
    model = load_model(bundle)
    defaults, schedule = model.manifest.defaults, model.schedule
    conditions = Conditions((model.network.embed(torch.tensor([[LABEL]])),))
    channels = model.manifest.diffusion.guidance_channels
    guidance = Guidance(defaults.guidance_scale, defaults.guidance_interval, channels)
    levels = noise_levels(defaults.grid, defaults.steps, schedule)
    denoiser = Denoiser(model.network, schedule, conditions, guidance)
    table = step_table(defaults.solver, levels, schedule)
    *_, image = denoise(denoiser, table, [SEED], clip_x0=model.manifest.diffusion.clip_x0)
    return image


def reference(state: dict[str, Tensor], config: dict[str, dict[str, Any]]) -> Tensor:
    noise = torch.from_numpy(initial_noise(SEED, (CHANNELS, SIDE, SIDE)))[None]
    return lightning_run(state, noise, LABEL, config["sample"])


def error(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


VARIANTS: dict[str, dict[str, bool]] = {
    "as published": {},
    "RMSNorm of queries and keys": {"qk_norm": True},
    "LayerNorm of queries and keys": {"qk_norm": True, "rms": False},
    "no shift": {"shift": False},
    "plain MLP, no rotary positions": {"swiglu": False, "rope": False},
    "norms alone": {"swiglu": False, "rope": False, "qk_norm": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_lightningdit_is_drawn_as_its_own_code_draws_it(variant: str, tmp_path: Path) -> None:
    options = VARIANTS[variant]
    state = random_lightningdit(**options)
    model = {"use_qknorm": options.get("qk_norm", False), "use_swiglu": options.get("swiglu", True)}
    model |= {"use_rope": options.get("rope", True), "use_rmsnorm": options.get("rms", True)}
    config = lightning_config(model=model)
    statistics(tmp_path)
    heads = () if options.get("rope", True) or options.get("qk_norm") else ("--heads", str(HEADS))
    assert imported(tmp_path, {"model": {}, "ema": state, "config": config}, *heads) == 0
    assert error(drawn(tmp_path / "bundle"), reference(state, config)) <= 1e-5


def test_its_configuration_is_kept_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statistics(tmp_path)
    stored = {"ema": random_lightningdit(), "config": lightning_config(data={"latent_multiplier": 0.5})}
    assert imported(tmp_path, stored) == 0
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.decoder == "sd-vae"
    assert manifest.latents is not None
    assert manifest.latents.factor == 16
    torch.testing.assert_close(torch.tensor(manifest.latents.shift), MEAN)
    torch.testing.assert_close(torch.tensor(manifest.latents.scale), STD / 0.5)
    assert (manifest.defaults.steps, manifest.defaults.guidance_scale) == (8, 2.5)
    assert manifest.defaults.guidance_interval == (0.0, 0.875)
    assert manifest.diffusion.guidance_channels == 3
    printed = capsys.readouterr().out
    for words in (
        "it is a flow as lightningdit trains (model LightningDiT-tiny/1",
        "its weights tell num_heads, rms_norm, rope, swiglu",
        "8 steps of Euler's method with a shift of 3.333, guided by 2.5 where sigma is in 0 … 0.875",
        "the latents are normalised by latents_stats.pt and the multiplier 0.5",
    ):
        assert words in printed


@pytest.mark.parametrize("name", ["0080000.yaml", "config.yaml"])
def test_a_configuration_beside_the_weights_is_read(name: str, tmp_path: Path) -> None:
    state, config = random_lightningdit(), lightning_config()
    statistics(tmp_path)
    (tmp_path / name).write_text(yaml.safe_dump(config))
    assert imported(tmp_path, state) == 0
    assert error(drawn(tmp_path / "bundle"), reference(state, config)) <= 1e-5


def test_without_a_configuration_the_function_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = random_lightningdit()
    statistics(tmp_path)
    bare = ("--num-classes", str(CLASSES))
    assert imported(tmp_path, state, *bare) == 2
    assert "say --function sit, repa or lightningdit for a flow" in capsys.readouterr().err
    assert imported(tmp_path, state, *bare, "--function", "lightningdit") == 0
    assert "assumed: latents multiplied by 1, and a latent for 16 pixels" in capsys.readouterr().out
    model = load_model(tmp_path / "bundle")
    x, t, y = torch.randn(2, CHANNELS, SIDE, SIDE), torch.tensor([0.1, 0.9]), torch.tensor([1, CLASSES])
    with torch.no_grad():
        assert error(model.network(x, t, y[:, None]), lightningdit(state, x, t, y)) <= 1e-5


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"transport": {"path_type": "GVP"}}, "only a linear path with a velocity"),
        ({"transport": {"prediction": "noise"}}, "only a linear path with a velocity"),
        ({"model": {"use_rope": False}}, "says model.use_rope false, and the weights have it"),
        ({"model": {"use_qknorm": True}}, "says model.use_qknorm true, and the weights lack it"),
        ({"model": {"model_type": "LightningDiT-XL/1"}}, "says that it is a LightningDiT-XL/1"),
        ({"data": {"image_size": 256}}, "weights are for latents of 6x6"),
        ({"data": {"num_classes": 9}}, "9 classes with the null class need 10"),
        ({"data": {"latent_multiplier": 0}}, "field data.latent_multiplier: Input should be greater than 0"),
        ({"vae": {"downsample_ratio": 0}}, "field vae.downsample_ratio"),
        ({"sample": {"timestep_shift": -1}}, "field sample.timestep_shift"),
        ({"sample": {"num_sampling_steps": 1}}, "field sample.num_sampling_steps"),
        ({"sample": {"cfg_interval_start": 1.5}}, "field sample.cfg_interval_start"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_in_one_sentence(
    sections: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics(tmp_path)
    stored = {"ema": random_lightningdit(), "config": lightning_config(**sections)}
    assert imported(tmp_path, stored) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mean": torch.zeros(4)}, "must hold mean, 5 numbers"),
        ({"std": torch.zeros(CHANNELS)}, "std holds numbers that are not finite, or a deviation of 0"),
        ({"mean": torch.full((CHANNELS,), float("nan"))}, "mean holds numbers that are not finite"),
        ({"std": None}, "must hold std"),
        (None, "needs latents_stats.pt beside it"),
    ],
)
def test_statistics_that_are_missing_or_damaged_are_told(
    changes: dict[str, Any] | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if changes is not None:
        statistics(tmp_path, **changes)
    assert imported(tmp_path, {"ema": random_lightningdit(), "config": lightning_config()}) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_latents_that_were_not_normalised_need_no_statistics(tmp_path: Path) -> None:
    data = {"latent_norm": False, "latent_multiplier": 0.25}
    stored = {"ema": random_lightningdit(), "config": lightning_config(data=data)}
    assert imported(tmp_path, stored) == 0
    latents = Bundle.open(tmp_path / "bundle").manifest.latents
    assert latents is not None
    assert (latents.shift[0], latents.scale[0]) == (0.0, 4.0)


def _half_normed(state: dict[str, Tensor]) -> None:
    del state["blocks.1.norm1.weight"]


def _other_angles(state: dict[str, Tensor]) -> None:
    state["feat_rope.freqs_cos"] = state["feat_rope.freqs_cos"].roll(1, 0)


def _no_final_norm(state: dict[str, Tensor]) -> None:
    del state["final_layer.norm_final.weight"]


def _short_norm(state: dict[str, Tensor]) -> None:
    state["blocks.0.norm1.weight"] = state["blocks.0.norm1.weight"][:7]


def _short_swiglu(state: dict[str, Tensor]) -> None:
    state["blocks.0.mlp.w12.weight"] = state["blocks.0.mlp.w12.weight"][:9]


def _no_axes(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({name: torch.tensor(1.0)})


def _layer_norm_of_queries(state: dict[str, Tensor]) -> None:
    for k in range(2):
        for name in ("q_norm", "k_norm"):
            state[f"blocks.{k}.attn.{name}.weight"] = torch.ones(HEAD)
            state[f"blocks.{k}.attn.{name}.bias"] = torch.zeros(HEAD)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_half_normed, "blocks.1 has no norm1.weight, and other blocks have one"),
        (_other_angles, "feat_rope.freqs_cos turns by other angles"),
        (_no_final_norm, "final_layer.norm_final.weight is missing"),
        (_short_norm, "blocks.0.norm1.weight has 7 numbers"),
        (_short_swiglu, "the shapes of the weights do not fit together"),
        (_no_axes("pos_embed"), "the image size cannot be read off the positions"),
        (_no_axes("feat_rope.freqs_cos"), "the shapes of the weights do not fit together"),
        (_no_axes("blocks.0.norm1.weight"), "the shapes of the weights do not fit together"),
        (_no_axes("x_embedder.proj.weight"), "the weights are not a published DiT's"),
        (_no_axes("final_layer.linear.weight"), "or a linear map have other"),
        (_layer_norm_of_queries, "the blocks have RMSNorm, and their queries LayerNorm"),
    ],
)
def test_weights_that_do_not_fit_together_are_told(
    damage: Callable[[dict[str, Tensor]], None],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = random_lightningdit()
    damage(state)
    assert imported(tmp_path, {"ema": state, "config": lightning_config()}) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
