"""Previews by projection: fitted once, near to what the decoder makes, of the picture's size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ditserve.bench.previews import unexplained_share
from ditserve.service.backends import Floats
from ditserve.service.images import to_pixels
from ditserve.service.settings import Settings
from ditserve.service.worker.parts import build_engine, worker_parts
from ditserve.service.worker.previews import PreviewDecoder, fitted_latents

CHANNELS, FACTOR = 5, 4


class BentDecoder:
    """A decoder of bent mixes of channels, with a texture within each latent's square of pixels."""

    calls = 0

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        self.calls += 1
        mixes = np.random.default_rng(0).standard_normal((3, CHANNELS)).astype(np.float32)
        images = np.tanh(0.4 * np.einsum("kc,nchw->nkhw", mixes, latents) + 0.2)
        large = images.repeat(FACTOR, axis=2).repeat(FACTOR, axis=3)
        return to_pixels(large + np.resize(np.array([0.1, -0.1], np.float32), large.shape[-1]))


def test_previews_are_near_to_what_the_decoder_makes_and_of_its_size() -> None:
    decoder = BentDecoder()
    previews = PreviewDecoder(decoder, channels=CHANNELS, factor=FACTOR)
    latents = np.random.default_rng(1).standard_normal((2, CHANNELS, 6, 10)).astype(np.float32)
    assert previews.decode(latents).shape == decoder.decode(latents).shape == (2, 24, 40, 3)
    assert previews.decode(latents).dtype == np.uint8
    assert unexplained_share(decoder, previews, channels=CHANNELS, factor=FACTOR) < 0.1


def test_the_projection_is_fitted_once_and_is_the_same_everywhere() -> None:
    decoder = BentDecoder()
    latents = fitted_latents(CHANNELS, seed=3)
    one = PreviewDecoder(decoder, channels=CHANNELS, factor=FACTOR)
    assert decoder.calls == 0
    first = one.decode(latents)
    np.testing.assert_array_equal(one.decode(latents), first)
    assert decoder.calls == 1
    other = PreviewDecoder(BentDecoder(), channels=CHANNELS, factor=FACTOR)
    np.testing.assert_array_equal(other.decode(latents), first)


def test_latents_that_it_is_fitted_to_are_as_networks_make_them() -> None:
    latents = fitted_latents(16)
    assert abs(float(latents.std()) - 1.0) < 0.1
    # Neighbours are alike, as in pictures.
    assert np.corrcoef(latents[..., 1:].ravel(), latents[..., :-1].ravel())[0, 1] > 0.4


def test_a_projection_of_an_autoencoder_explains_a_part_of_its_pictures() -> None:
    """Even of a random one, whose colours hardly follow the latent's own pixel."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[dev]'")
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[dev]'")
    from tests.tiny_parts import vae

    torch.manual_seed(2)
    module = vae(4).eval()

    class Autoencoder:
        def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
            with torch.no_grad():
                return to_pixels(module.decode(torch.from_numpy(latents)).sample.numpy())

    autoencoder = Autoencoder()
    previews = PreviewDecoder(autoencoder, channels=4, factor=2)
    assert unexplained_share(autoencoder, previews, channels=4, factor=2) < 0.95


@pytest.mark.parametrize(("decoder", "projected"), [("pipeline", True), ("sd-vae", True), ("small", False)])
def test_previews_of_a_small_decoder_are_decoded(make_backend: Any, decoder: str, projected: bool) -> None:
    backend = make_backend()
    backend.manifest = backend.manifest.model_copy(update={"decoder": decoder})
    unused: Any = SimpleNamespace()
    parts = worker_parts(
        {"": backend}, build_engine({"": backend}, Settings.load([])), unused, unused, unused
    )
    assert (parts.previews is not None) == projected
