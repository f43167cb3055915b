"""Bundles: opening, refusals and their sentences, and atomic writing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditserve.model.spec.bundle import Bundle, write_atomic, write_manifest
from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.errors import BundleError
from ditserve.model.spec.manifest import Defaults, Factor, Manifest, StateTensor
from ditserve.model.spec.network_config import network_fields
from tests.model.nets.unet_cases import TINY_UNET

Tiny = Callable[..., DiTConfig]


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    (tmp_path / "backbone.onnx").write_bytes(b"graph")
    (tmp_path / "notes.txt").write_text("not part of it")
    manifest = Manifest(
        name="tiny",
        version="1.2",
        description="a test",
        config=tiny(blocks=("adaln", "adaln", "cross_attention")),
        diffusion=DiffusionSpec(schedule="cosine", prediction="v"),
        factors=(
            Factor(name="label", classes=("cat", "dog", "hen", "cow", "pig")),
            Factor(name="style", classes=("flat", "round", "line")),
        ),
        embedding_size=32,
        state=(StateTensor(name="tokens", shape=(2, 32)),),
        defaults=Defaults(
            steps=3, solver="ddim", grid="trailing", guidance_scale=2, guidance_interval=(0, 1)
        ),
        licence="MIT",
    )
    write_manifest(tmp_path, manifest)
    return tmp_path


def change(folder: Path, **fields: Any) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(data | fields))


def test_round_trip(folder: Path, tiny: Tiny) -> None:
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    assert manifest.config == tiny(blocks=("adaln", "adaln", "cross_attention"))
    assert set(manifest.files) == {"weights.safetensors", "backbone.onnx"}
    assert [(factor.name, len(factor.classes)) for factor in manifest.factors] == [("label", 5), ("style", 3)]
    assert bundle.file("backbone.onnx").read_bytes() == b"graph"
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_a_config_names_its_network_and_without_a_name_it_is_a_dit(folder: Path, tiny: Tiny) -> None:
    written = json.loads((folder / "manifest.json").read_text())["config"]
    assert written.pop("network") == "dit"
    change(folder, config=written)
    assert Bundle.open(folder).manifest.config == tiny(blocks=("adaln", "adaln", "cross_attention"))
    change(folder, config=network_fields(TINY_UNET))
    manifest = Bundle.open(folder).manifest
    assert manifest.config == TINY_UNET
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_files_outside_the_manifest_are_refused(folder: Path) -> None:
    for name in ("notes.txt", "../weights.safetensors"):
        with pytest.raises(BundleError, match=r"lists backbone\.onnx, weights\.safetensors"):
            Bundle.open(folder).file(name)


def test_altered_and_missing_files(folder: Path) -> None:
    (folder / "backbone.onnx").write_bytes(b"graqh")  # the same length
    assert Bundle.open(folder, verify=False).manifest.name == "tiny"
    with pytest.raises(BundleError, match=r"backbone\.onnx differs from the hash"):
        Bundle.open(folder)
    (folder / "backbone.onnx").write_bytes(b"longer than before")
    with pytest.raises(BundleError, match=r"backbone\.onnx differs"):
        Bundle.open(folder, verify=False)
    (folder / "backbone.onnx").unlink()
    with pytest.raises(BundleError, match=r"backbone\.onnx is missing"):
        Bundle.open(folder, verify=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema_version": 2}, "schema_version 2; this release reads 1"),
        ({"schema_version": None}, "schema_version None"),
        ({"colour": "red"}, "field colour"),
        ({"name": "../evil"}, "field name"),
        ({"config": {"depth": 0}}, "depth must be positive"),
        ({"config": {"depht": 3}}, "field config: a dit has no field 'depht'"),
        ({"config": {"network": "unet", "depth": 3}}, "field config: a unet has no field 'depth'"),
        ({"config": {"network": "mamba"}}, "field config: unknown network 'mamba'"),
        ({"config": 3}, "field config: the network's configuration must be an object"),
        ({"latents": {"shift": [0], "scale": [0]}}, "field latents.scale.0"),
        ({"decoder": "jpeg"}, "field decoder"),
        ({"decoder": "small"}, "field diffusion.clip_x0: must be false where the decoder is small"),
        ({"factors": [{"name": "Label", "classes": ["cat"]}]}, "field factors.0.name"),
        ({"factors": [{"name": "label", "classes": ["a"], "default": "b"}]}, "is not the name of one class"),
        ({"factors": [{"name": "label", "classes": ["a"], "default": "a"}]}, "field factors: label is what"),
        ({"factors": [{"name": "label", "classes": []}]}, "field factors.0.classes"),
        ({"files": {"../../etc/passwd": {"sha256": "0" * 64, "bytes": 1}}}, "field files"),
        ({"files": {"weights.safetensors": {"sha256": "short", "bytes": 1}}}, "field files"),
    ],
)
def test_manifests_that_are_refused(folder: Path, fields: dict[str, Any], message: str) -> None:
    change(folder, **fields)
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert message in str(caught.value)
    assert "manifest.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"), [(b"{", "not valid JSON"), (b"[]", "JSON object"), (b"\xff", "not valid JSON")]
)
def test_manifests_that_are_no_json(folder: Path, raw: bytes, message: str) -> None:
    (folder / "manifest.json").write_bytes(raw)
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json is missing; pass a folder"):
        Bundle.open(tmp_path / "absent")


def test_atomic_write_leaves_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    write_atomic(target, b"old")

    def crash(descriptor: int) -> None:
        raise OSError("power cut")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(OSError, match="power cut"):
        write_atomic(target, b"new")
    assert target.read_bytes() == b"old"


def test_opening_needs_no_torch() -> None:
    """The API process reads manifests, and starts without torch."""
    code = (
        "import sys, ditserve.model.spec.bundle, ditserve.model.spec.mixing; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
