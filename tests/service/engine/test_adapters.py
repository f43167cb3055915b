"""Samples with adapters in one engine: the picture of each is the one it has alone, whatever else runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditserve.model.nets.dit import DiT
from ditserve.model.spec.adapters import adapter_files
from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends import BackendUnavailable
from ditserve.service.engine.conditions import ConditionCaches
from ditserve.service.engine.samples import SampleRequest
from ditserve.service.jobs import AdapterUse, ConditionTerm
from tests.service.engine.stepping import finished, run
from tests.service.tiny_adapters import BACKBONE, CONDITIONER, write_adapter
from tests.service.tiny_bundle import write_bundle

torch = pytest.importorskip("torch", reason="adapters need torch: pip install 'ditserve[torch]'")
from ditserve.service.backends.torch import TorchBackend  # noqa: E402

Make = Callable[..., Any]
NOIR, PIXELS, TONE = (
    AdapterUse(name, scale, name) for name, scale in (("noir", 0.8), ("pixels", -1.5), ("tone", 1.0))
)
USES: dict[str, tuple[AdapterUse, ...]] = {
    "none": (),
    "noir": (NOIR,),
    "both": (NOIR, PIXELS),
    "tone": (TONE,),
    "all": (NOIR, PIXELS, TONE),
    "weaker": (AdapterUse("tone", 0.25, "tone"),),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("tiny")
    write_bundle(folder, weights=True)
    write_adapter(folder, "noir", seed=1)
    write_adapter(folder, "pixels", BACKBONE[:1], rank=5, seed=2)
    write_adapter(folder, "tone", CONDITIONER, seed=3)
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def backend(bundle: Bundle) -> TorchBackend:
    return TorchBackend(bundle, adapters=adapter_files(bundle.path / "adapters"))


@pytest.fixture
def make_adapted(make_request: Make) -> Callable[..., SampleRequest]:
    def make(name: str, **fields: Any) -> SampleRequest:
        given = {"condition": (ConditionTerm((1, 0)),), "adapters": USES[name], **fields}
        request: SampleRequest = make_request(name, **given)
        return request

    return make


def test_a_sample_in_company_is_the_sample_alone(
    backend: TorchBackend, make_engine: Make, make_adapted: Make
) -> None:
    together = finished(run(make_engine(backend), [make_adapted(name) for name in USES]))
    latents = {}
    for name in USES:
        alone = finished(run(make_engine(backend), [make_adapted(name)]))[name]
        latents[name] = alone.latent
        np.testing.assert_allclose(together[name].latent, alone.latent, atol=2e-5)
    for name in ("noir", "both", "tone", "weaker"):
        assert np.abs(latents[name] - latents["none"]).max() > 1e-3, "it does something"
    assert np.abs(latents["tone"] - latents["weaker"]).max() > 1e-3
    assert np.abs(latents["all"] - latents["both"]).max() > 1e-3


def test_samples_in_windows_and_composed_ones_are_drawn_with_their_adapters(
    backend: TorchBackend, make_engine: Make, make_adapted: Make
) -> None:
    composed = {"condition": (ConditionTerm((1, 0), 0.5), ConditionTerm((2, 1), 0.5)), "mix": "compose"}
    windows = {"size": (12, 16), "windows": True}
    for fields in (composed, windows, {**composed, **windows}):
        plain, noir = (
            finished(run(make_engine(backend), [make_adapted(name, **fields)]))[name]
            for name in ("none", "all")
        )
        assert np.abs(plain.latent - noir.latent).max() > 1e-3
        both = finished(
            run(make_engine(backend), [make_adapted("none", **fields), make_adapted("all", **fields)])
        )
        np.testing.assert_allclose(both["all"].latent, noir.latent, atol=2e-5)
        np.testing.assert_allclose(both["none"].latent, plain.latent, atol=2e-5)


def test_the_caches_tell_conditions_by_the_adapters_of_the_conditioner(backend: TorchBackend) -> None:
    caches = ConditionCaches(backend)
    terms = (ConditionTerm((1, 0)),)
    keys = {name: caches.conditioning(terms, adapters=uses) for name, uses in USES.items()}
    plain = keys["none"]
    for name in ("noir", "both"):
        assert keys[name].conditions[0].key == plain.conditions[0].key, "they change the backbone alone"
        assert keys[name].unconditional.key == plain.unconditional.key
    told = {keys[name].conditions[0].key for name in ("none", "tone", "weaker")}
    assert len(told) == 3
    assert keys["all"].conditions[0].key == keys["tone"].conditions[0].key
    assert keys["tone"].unconditional.key != plain.unconditional.key


@pytest.mark.parametrize("capacity", [0, 1 << 20])
def test_pictures_are_the_same_with_the_caches_on_and_off(
    capacity: int, backend: TorchBackend, make_engine: Make, make_adapted: Make
) -> None:
    requests = [make_adapted(name) for name in ("none", "tone", "weaker", "all")]
    expected = finished(run(make_engine(backend), requests))
    drawn = finished(run(make_engine(backend, modulation_bytes=capacity), requests))
    for name, sample in drawn.items():
        np.testing.assert_array_equal(sample.latent, expected[name].latent)


def test_another_engine_continues_a_sample_with_its_adapters(
    backend: TorchBackend, make_engine: Make, make_adapted: Make
) -> None:
    request = make_adapted("all")
    whole = finished(run(make_engine(backend), [request]))["all"]
    first = make_engine(backend)
    first.add(request)
    for _ in range(3):
        first.step()
    second = make_engine(backend)
    second.add(request, first.export("all"))
    np.testing.assert_array_equal(finished(run(second))["all"].latent, whole.latent)


def test_an_adapter_that_does_not_fit_is_one_sentence(bundle: Bundle, tmp_path: Path) -> None:
    path = write_adapter(tmp_path, "noir", rank=600)
    with pytest.raises(BackendUnavailable, match=f"^{path}: blocks.* has rank 600: adapters have 1 to 512$"):
        TorchBackend(bundle, adapters=adapter_files(path.parent))


def test_a_compiled_backbone_draws_the_same(
    bundle: Bundle, backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graph is traced and run as it is: code for this processor takes long to make."""
    monkeypatch.setattr(DiT, "compile_blocks", partialmethod(DiT.compile_blocks, "eager"))
    compiled = TorchBackend(bundle, adapters=adapter_files(bundle.path / "adapters"), compile=True)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((3, 3, 8, 8), np.float32)
    embeddings = backend.embed(np.array([[0, 1], [1, 0], [4, 1]]))
    state = backend.modulate(np.array([900.0, 500.0, 3.0], np.float32), embeddings)
    rows = [USES["both"], (), USES["noir"]]
    with backend.adapters.applied(rows):  # type: ignore[union-attr]
        expected = backend.denoise(x, state)
    plain = compiled.denoise(x, state)
    with compiled.adapters.applied(rows):  # type: ignore[union-attr]
        drawn = compiled.denoise(x, state)
    np.testing.assert_allclose(drawn, expected, atol=1e-5)
    np.testing.assert_allclose(compiled.denoise(x, state), plain, atol=0)
    assert np.abs(plain - drawn)[0].max() > 1e-3


def test_in_half_precision_rows_are_drawn_with_their_adapters(bundle: Bundle, backend: TorchBackend) -> None:
    half = TorchBackend(bundle, adapters=adapter_files(bundle.path / "adapters"), precision="bf16")
    x = np.random.default_rng(0).standard_normal((3, 3, 8, 8), np.float32)
    state = backend.modulate(
        np.array([900.0, 500.0, 3.0], np.float32), backend.embed(np.array([[0, 1], [1, 0], [4, 1]]))
    )
    rows = [USES["both"], (), USES["noir"]]
    drawn: list[np.ndarray] = []
    for each in (backend, half):
        with each.adapters.applied(rows):  # type: ignore[union-attr]
            drawn.append(each.denoise(x, state))
    assert np.linalg.norm(drawn[1] - drawn[0]) / np.linalg.norm(drawn[0]) < 4e-2
    assert np.abs(half.denoise(x, state) - drawn[1])[0].max() > 1e-3
