"""Which engine may be loaded: exactly the one built from what is wanted now."""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.progress import Progress

from export.engines import Device, Slot, find_device, recipe
from export.errors import ExportError
from export.fusion import fusion_of
from export.trt import Bars, check_engines, interruptible, main, make_engine
from export.trt_build import BuildOptions, profiles_for
from model.bundle import Bundle, write_manifest
from tests.export.fake_trt import Behaviour, fake_trt
from tests.export.tiny import tiny_source

OPTIONS = BuildOptions(profiles=profiles_for((1, 2, 4)))
GPU = Device("NVIDIA L4", "sm89")
TRT = fake_trt(Behaviour())


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Files that only their hashes matter of: the builder is not real here."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name in ("weights.safetensors", "backbone.onnx", "backbone.fp16.onnx"):
        (folder / name).write_bytes(name.encode())
    write_manifest(folder, tiny_source().manifest)
    return Bundle.open(folder)


def test_an_engine_is_built_once_and_lies_under_gpu_and_version(bundle: Bundle) -> None:
    made = recipe(bundle, "fp16", OPTIONS, TRT, GPU)
    assert [outcome.state for outcome in check_engines(bundle, [made])] == ["not built"]
    assert make_engine(TRT, bundle, made, OPTIONS).state == "built"
    folder = bundle.path / "engines" / "l4-sm89-tensorrt-11.4.0"
    assert sorted(f.name for f in folder.iterdir()) == [
        "backbone.fp16.engine",
        "backbone.fp16.json",
        "report.json",
        "timing.cache",
    ]
    record = json.loads((folder / "report.json").read_text())["engines"][0]
    assert record["key"] == made.key
    assert record["executed"] is False
    assert make_engine(TRT, bundle, made, OPTIONS).state == "fresh"
    assert make_engine(TRT, bundle, made, OPTIONS, force=True).state == "built"
    Bundle.open(bundle.path)


def test_whatever_an_engine_depends_on_makes_it_stale(bundle: Bundle) -> None:
    made = recipe(bundle, "fp16", OPTIONS, TRT, GPU)
    make_engine(TRT, bundle, made, OPTIONS)
    slot = Slot.of(bundle.path, made)
    assert slot.problem(made) is None
    assert slot.problem(replace(made, graph_sha256="0" * 64)) == "built with another graph sha256"
    assert slot.problem(replace(made, weights_sha256="0" * 64)) == "built with another weights sha256"
    wider = recipe(bundle, "fp16", BuildOptions(profiles=profiles_for((1, 8))), TRT, GPU)
    assert slot.problem(wider) == "built with another options"
    assert (
        slot.problem(replace(made, version="11.5.0", capability="sm90"))
        == "built with another version, capability"
    )
    slot.engine.write_bytes(b"plam")
    assert slot.problem(made) == "backbone.fp16.engine is damaged"
    slot.record.write_text("{}")
    assert slot.problem(made) == "backbone.fp16.json is damaged"


def test_every_part_of_a_recipe_is_in_its_key(bundle: Bundle) -> None:
    made = recipe(bundle, "fp16", OPTIONS, TRT, GPU)
    others = [
        recipe(bundle, "fp32", OPTIONS, TRT, GPU),
        recipe(bundle, "fp16", replace(OPTIONS, level=5), TRT, GPU),
        recipe(bundle, "fp16", replace(OPTIONS, tf32=True), TRT, GPU),
        recipe(bundle, "fp16", OPTIONS, fake_trt(Behaviour(), version="11.5.0"), GPU),
        recipe(bundle, "fp16", OPTIONS, TRT, Device("NVIDIA L4", "sm90")),
        recipe(bundle, "fp16", OPTIONS, TRT, Device("NVIDIA L40", "sm89")),
    ]
    assert len({made.key, *(other.key for other in others)}) == 1 + len(others)


def test_a_missing_graph_names_the_command_that_makes_it(bundle: Bundle) -> None:
    with pytest.raises(ExportError, match=r"export\.int8 --target tensorrt"):
        recipe(bundle, "int8", OPTIONS, TRT, GPU)


def test_a_failed_build_leaves_the_old_engine(bundle: Bundle) -> None:
    made = recipe(bundle, "fp16", OPTIONS, TRT, GPU)
    make_engine(TRT, bundle, made, OPTIONS)
    with pytest.raises(ExportError):
        make_engine(fake_trt(Behaviour(builds=False)), bundle, made, OPTIONS, force=True)
    assert Slot.of(bundle.path, made).problem(made) is None


def test_ctrl_c_cancels_and_the_next_one_raises_again(bundle: Bundle) -> None:
    made = recipe(bundle, "fp16", OPTIONS, TRT, GPU)
    before = signal.getsignal(signal.SIGINT)
    bars = Bars(Progress(disable=True))
    trt = fake_trt(Behaviour(during=lambda: signal.raise_signal(signal.SIGINT)))
    with interruptible(bars), pytest.raises(ExportError, match="cancelled"):
        make_engine(trt, bundle, made, OPTIONS, bars=bars)
    assert signal.getsignal(signal.SIGINT) is before
    assert check_engines(bundle, [made])[0].state == "not built"


def test_the_gpu_is_asked_of_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="NVIDIA H100 80GB HBM3, 9.0\n")
    )
    device = find_device(TRT, OPTIONS)
    assert (device.name, device.capability, device.slug) == (
        "NVIDIA H100 80GB HBM3",
        "sm90",
        "h100-80gb-hbm3-sm90",
    )


def test_without_a_gpu_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ExportError, match="machine that serves"):
        find_device(TRT, OPTIONS)
    with pytest.raises(ExportError, match="--target sm89"):
        find_device(fake_trt(Behaviour(), "tensorrt_rtx"), OPTIONS)


def test_command_line_checks_builds_and_checks_again(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("export.trt.load_trt", lambda flavour: TRT)
    monkeypatch.setattr("export.trt.find_device", lambda *_: GPU)
    arguments = [str(bundle.path), "--buckets", "1,2"]
    assert main([*arguments, "--check"]) == 1
    assert f"build it with python -m export.trt {bundle.path} --buckets 1,2" in capsys.readouterr().err
    assert main([*arguments, "--compile-only"]) == 0
    assert not (bundle.path / "engines").exists()
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    assert main([*arguments, "--precision", "int8"]) == 2
    assert "backbone.int8.fp16.onnx" in capsys.readouterr().err
    assert main([str(bundle.path / "nowhere")]) == 2


def test_fusion_counts_kernels_by_name() -> None:
    plan = b"".join(
        b'extern "C" __global__ void ' + name + b"("
        for name in (b"__myl_FcAdd", b"gemm_mha_v2_1", b"gemm_mha_v2_1", b"MinMaxRounCast")
    )
    fusion = fusion_of(plan + b"__mye12_folded_matmul __mye13_folded_matmul __mye12_folded_matmul")
    assert fusion.as_dict() == {"kernels": 3, "attention": 1, "quantising": 1, "int8_matmuls": 2}
