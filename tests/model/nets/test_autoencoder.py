"""Autoencoders: the identity, and the SD-VAE with a small random AutoencoderKL."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import AutoencoderKL

from ditserve.model.nets.autoencoder import (
    AUTOENCODER,
    AutoencoderError,
    Identity,
    SdVae,
    fingerprint,
    open_autoencoder,
    open_decoder,
)
from ditserve.model.spec.bundle import parse_manifest
from ditserve.model.spec.manifest import LatentSpec

ROOT = Path(__file__).parents[3]


@pytest.fixture
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )


def test_identity_changes_nothing() -> None:
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(Identity().decode(x), x)


def test_scale_is_the_published(vae: AutoencoderKL) -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    ours = SdVae(vae)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        assert torch.allclose(ours.encode(images), posterior.mean * 0.18215)
        drawn = posterior.sample(torch.Generator().manual_seed(1)) * 0.18215
        assert torch.allclose(ours.encode(images, torch.Generator().manual_seed(1)), drawn)
        latents = torch.randn(2, 4, 8, 8)
        assert torch.allclose(ours.decode(latents), vae.decode(latents / 0.18215).sample, atol=1e-6)


def test_latents_normalised_by_channel(vae: AutoencoderKL) -> None:
    spec = LatentSpec(shift=(0.1, 0.2, 0.3, 0.4), scale=(1.0, 2.0, 3.0, 4.0))
    plain, ours = SdVae(vae), SdVae(vae, spec)
    images, shift, scale = torch.rand(2, 3, 16, 16) * 2 - 1, *torch.tensor([spec.shift, spec.scale])
    latents = ours.encode(images)
    raw = latents * scale[:, None, None] + shift[:, None, None]
    assert torch.allclose(raw, plain.encode(images) / 0.18215, atol=1e-5)
    assert torch.allclose(ours.decode(latents), plain.decode(raw * 0.18215), atol=1e-5)
    with pytest.raises(AutoencoderError, match="has 4 latent channels, the model's latents 1"):
        SdVae(vae, LatentSpec(shift=(0.0,), scale=(1.0,)))


def test_large_latents_are_decoded_in_tiles(vae: AutoencoderKL) -> None:
    """No tile is larger than `tile`, and the picture is nearly that of decoding whole."""
    latents = torch.randn(1, 4, 24, 40)
    whole = SdVae(vae, tile=0).decode(latents)
    ours = SdVae(vae, tile=16)
    with mock.patch.object(vae.decoder, "forward", wraps=vae.decoder.forward) as decoder:
        tiled = ours.decode(latents)
        assert decoder.call_count > 1
        assert max(max(call.args[0].shape[2:]) for call in decoder.call_args_list) == 16
        decoder.reset_mock()
        ours.decode(latents[:, :, :16, :16])
        assert decoder.call_count == 1
    assert tiled.shape == whole.shape == (1, 3, 48, 80)
    assert (tiled - whole).abs().mean() < 0.25 * whole.abs().mean()


def test_opened_from_a_folder(vae: AutoencoderKL, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path)
    opened = open_autoencoder("sd-vae", tmp_path)
    latents = torch.randn(1, 4, 8, 8)
    assert torch.allclose(opened.decode(latents), SdVae(vae).decode(latents), atol=1e-6)
    assert isinstance(open_autoencoder("identity"), Identity)


def test_autoencoders_that_cannot_be_opened_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AutoencoderError, match="--vae"):
        open_autoencoder("sd-vae")
    with pytest.raises(AutoencoderError, match=r"no config\.json"):
        open_autoencoder("sd-vae", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AutoencoderError, match="cannot be read as an AutoencoderKL"):
        open_autoencoder("sd-vae", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(AutoencoderError, match="pip install diffusers"):
        open_autoencoder("sd-vae", tmp_path)


def test_a_wrong_autoencoder_is_refused_before_anything_is_sampled(
    vae: AutoencoderKL, tmp_path: Path
) -> None:
    """Other channels, another maker, a pixel model, a pipeline, another class, weights that are not whole."""
    folder, other = tmp_path / "pipeline" / "vae", tmp_path / "other"
    vae.save_pretrained(folder)
    manifest = parse_manifest((ROOT / "model/zoo/tiny/manifest.json").read_bytes(), ROOT)
    with pytest.raises(AutoencoderError, match=r"works on pixels.*leave --vae out"):
        open_decoder(manifest, folder)
    latent = manifest.model_copy(update={"decoder": "sd-vae"})
    with pytest.raises(AutoencoderError, match="has 4 latent channels, and the model 3"):
        open_decoder(latent, folder)
    config = replace(manifest.config, in_channels=4)
    made = {AUTOENCODER: fingerprint(folder)}
    fitting = latent.model_copy(update={"config": config, "provenance": made})
    assert isinstance(open_decoder(fitting, folder), SdVae)
    torch.nn.init.ones_(vae.quant_conv.weight)
    vae.save_pretrained(other)
    with pytest.raises(AutoencoderError, match="not what made the latents"):
        open_decoder(fitting, other)
    with pytest.raises(AutoencoderError, match=f"pass {folder}"):
        open_decoder(fitting, tmp_path / "pipeline")
    fields = json.loads((other / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "layers_per_block": 2}))
    with pytest.raises(AutoencoderError, match="its weights lack"):
        open_decoder(fitting, folder)
    (other / "config.json").write_text(json.dumps({**fields, "_class_name": "AutoencoderTiny"}))
    with pytest.raises(AutoencoderError, match="holds AutoencoderTiny"):
        open_decoder(fitting, other)
