"""A malicious bundle with correct hashes: nothing in it is executed, and nothing outside it is read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors import SafetensorError

from ditserve.model.spec.bundle import Bundle, write_manifest
from ditserve.model.spec.errors import BundleError
from ditserve.service.backends import BackendUnavailable, load_backend
from tests.service.tiny_bundle import MANIFEST, write_bundle


class Trap:
    """An object that an attacker pickles: loading it would write a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return Path.touch, (str(self.mark),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    write_bundle(folder, weights=False)
    return folder


def refused(folder: Path, backend: str) -> str:
    """Make the hashes of the bundle fit, and return the message with which `backend` refuses it."""
    write_manifest(folder, MANIFEST)
    with pytest.raises((BackendUnavailable, SafetensorError)) as caught:
        load_backend(backend, Bundle.open(folder), threads=1)
    return str(caught.value)


@pytest.mark.parametrize(("backend", "name"), [("torch", "weights.safetensors"), ("onnx", "backbone.onnx")])
def test_a_pickle_under_another_name_is_not_loaded(folder: Path, backend: str, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Trap(folder / "mark"), protocol=2))
    assert refused(folder, backend)
    assert not (folder / "mark").exists()


def test_a_graph_does_not_read_files_beside_its_bundle(folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.write_bytes(bytes(1 << 16))
    graph: Any = onnx.load(folder / "backbone.onnx")
    tensor = next(tensor for tensor in graph.graph.initializer if tensor.name == "down")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "../secret"), ("offset", "0"), ("length", str(4 * 192 * 32))):
        tensor.external_data.add(key=key, value=value)
    (folder / "backbone.onnx").write_bytes(graph.SerializeToString())
    assert "escapes model directory" in refused(folder, "onnx")


def test_a_manifest_does_not_name_files_beside_its_bundle(folder: Path) -> None:
    written = (folder / "manifest.json").read_text().replace('"backbone.onnx"', '"../secret"')
    (folder / "manifest.json").write_text(written)
    with pytest.raises(BundleError, match="field files"):
        Bundle.open(folder)
