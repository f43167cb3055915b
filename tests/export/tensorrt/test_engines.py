"""An engine is kept only if it is built from the present inputs, correct, and (INT8) fast enough."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.progress import Progress
from safetensors.numpy import save_file

from ditserve.export.errors import ExportError
from ditserve.export.tensorrt.build import BuildOptions, profiles_for
from ditserve.export.tensorrt.engines import find_device, fusion_of, recorded_options
from ditserve.export.tensorrt.progress import BarMonitor, EventMonitor, interruptible
from ditserve.export.tensorrt.trial import TrialReference, speedup, try_engine
from ditserve.export.trt import BuildTask, main, precisions
from ditserve.model.spec.bundle import Bundle, write_manifest
from ditserve.model.spec.engine_cache import (
    GRAPHS,
    CachedEngine,
    Device,
    EngineOrigin,
    NoGpuError,
    engine_origin,
)
from ditserve.service.backends import load_backend
from tests.export.fake_trt import Behaviour, fake_trt
from tests.export.tiny import tiny_source

OPTIONS = BuildOptions(profiles=profiles_for((1, 2, 4)))
GPU = Device("NVIDIA L4", "sm89")
TRT = fake_trt(Behaviour())


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle whose files have only hashes to them: the builder is imitated."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name in ("weights.safetensors", "backbone.onnx", "backbone.fp16.onnx", "backbone.int8.fp16.onnx"):
        (folder / name).write_bytes(name.encode())
    save_file({"x": np.zeros((1, 3, 16, 16), np.float16)}, folder / "calibration.safetensors")
    write_manifest(folder, tiny_source().manifest)
    return Bundle.open(folder)


def task(bundle: Bundle, behaviour: Behaviour | None = None, options: BuildOptions = OPTIONS) -> BuildTask:
    trt = TRT if behaviour is None else fake_trt(behaviour)
    return BuildTask(trt, bundle, bundle.path / "engines", options)


def origin(bundle: Bundle, precision: str = "fp16", version: str = "11.4.0") -> EngineOrigin:
    graph = GRAPHS[precision][0]
    return engine_origin(bundle, precision, graph, flavour="tensorrt", version=version, device=GPU)


def test_an_engine_is_built_once_and_lies_under_gpu_and_version(bundle: Bundle) -> None:
    fp16, work = origin(bundle), task(bundle)
    assert work.check(fp16).state == "not built"
    assert work.build(fp16).state == "built"
    folder = bundle.path / "engines" / "l4-sm89-tensorrt-11.4.0"
    files = ["backbone.fp16.engine", "backbone.fp16.json", "report.json", "timing.cache"]
    assert sorted(f.name for f in folder.iterdir()) == files
    record = json.loads((folder / "report.json").read_text())["engines"][0]
    assert record["key"] == fp16.key(recorded_options(OPTIONS))
    assert record["executed"] is False
    assert work.build(fp16).state == "fresh"
    assert work.build(fp16, force=True).state == "built"
    Bundle.open(bundle.path)


def test_whatever_an_engine_depends_on_makes_it_stale(bundle: Bundle) -> None:
    fp16 = origin(bundle)
    task(bundle).build(fp16)
    cached = CachedEngine.of(bundle.path / "engines", fp16)
    assert cached.problem(fp16) is None
    assert cached.problem(replace(fp16, graph_sha256="0" * 64)) == "built with another graph sha256"
    assert cached.problem(replace(fp16, weights_sha256="0" * 64)) == "built with another weights sha256"
    wider = BuildOptions(profiles=profiles_for((1, 8)))
    assert task(bundle, options=wider).check(fp16).state == "built with another options"
    other = replace(fp16, version="11.5.0", capability="sm90")
    assert cached.problem(other) == "built with another version, capability"
    cached.engine.write_bytes(b"plam")
    assert cached.problem(fp16) == "backbone.fp16.engine is damaged"
    cached.record.write_text("{}")
    assert cached.problem(fp16) == "backbone.fp16.json is damaged"


def test_every_part_of_an_origin_and_every_option_is_in_the_key(bundle: Bundle) -> None:
    fp16, options = origin(bundle), recorded_options(OPTIONS)
    keys = {fp16.key(options)}
    for change in (
        {"precision": "fp32"},
        {"graph_sha256": "0" * 64},
        {"weights_sha256": "0" * 64},
        {"flavour": "tensorrt_rtx"},
        {"version": "11.5.0"},
        {"device": "NVIDIA L40"},
        {"capability": "sm90"},
    ):
        keys.add(replace(fp16, **change).key(options))
    for other in (replace(OPTIONS, level=5), replace(OPTIONS, tf32=True), replace(OPTIONS, size=(8, 8))):
        keys.add(fp16.key(recorded_options(other)))
    assert len(keys) == 1 + 7 + 3


def test_a_failed_build_leaves_the_old_engine(bundle: Bundle) -> None:
    fp16 = origin(bundle)
    task(bundle).build(fp16)
    with pytest.raises(ExportError):
        task(bundle, Behaviour(builds=False)).build(fp16, force=True)
    assert task(bundle).check(fp16).state == "fresh"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_and_the_next_one_does_as_before(bundle: Bundle, number: signal.Signals) -> None:
    fp16 = origin(bundle)
    before = signal.getsignal(number)
    bars = BarMonitor(Progress(disable=True))
    work = task(bundle, Behaviour(during=lambda: signal.raise_signal(number)))
    with interruptible(bars), pytest.raises(ExportError, match="cancelled"):
        work.build(fp16, monitor=bars)
    assert signal.getsignal(number) is before
    assert work.check(fp16).state == "not built"


def test_progress_can_be_read_by_machines() -> None:
    events: list[dict[str, Any]] = []
    monitor = EventMonitor("fp16", events.append)
    monitor.start("Building", None, 2)
    monitor.start("Inner", "Building", 9)
    assert monitor.step("Inner", 0)
    assert monitor.step("Building", 0)
    monitor.cancel()
    assert not monitor.step("Building", 1)
    assert events == [
        {"event": "phase", "precision": "fp16", "phase": "Building"},
        {"event": "step", "precision": "fp16", "done": 1, "total": 2},
        {"event": "step", "precision": "fp16", "done": 2, "total": 2},
    ]


def test_without_a_gpu_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Device:
        raise NoGpuError("no NVIDIA GPU answers nvidia-smi")

    monkeypatch.setattr("ditserve.export.tensorrt.engines.first_gpu", none)
    with pytest.raises(ExportError, match="machine that serves"):
        find_device(TRT, OPTIONS)
    with pytest.raises(ExportError, match="--target sm89"):
        find_device(fake_trt(Behaviour(), "tensorrt_rtx"), OPTIONS)
    targets = replace(OPTIONS, targets=("SM89", "sm80"))
    assert find_device(TRT, targets) == Device("aot", "sm80-sm89")


@pytest.mark.parametrize(
    ("asked", "every", "expected"),
    [
        ((), False, ["fp16"]),
        ((), True, ["fp16", "int8"]),
        (("int8",), False, ["fp16", "int8"]),  # what it must beat
        (("fp32",), False, ["fp32"]),
    ],
)
def test_int8_is_built_beside_half_precision(
    bundle: Bundle, asked: tuple[str, ...], every: bool, expected: list[str]
) -> None:
    assert precisions(bundle, asked, every=every) == expected


class Answering:
    """An engine that is off by `error` and takes `seconds` a row."""

    def __init__(self, reference: TrialReference, error: float, seconds: float) -> None:
        self.reference, self.error, self.time, self.calls = reference, error, seconds, 0

    def __call__(self, inputs: Any, output_shape: tuple[int, ...]) -> Any:
        start, self.calls = self.calls, self.calls + output_shape[0]
        return self.reference.output[start : self.calls] * (1 + self.error)

    def seconds(self, inputs: Any, output_shape: tuple[int, ...]) -> float:
        assert len(inputs["x"]) == output_shape[0]
        return self.time * output_shape[0]


@pytest.fixture
def reference() -> TrialReference:
    drawn = np.random.default_rng(0)
    x, t = drawn.standard_normal((20, 3, 4, 4)).astype(np.float32), np.linspace(0, 1, 20)
    return TrialReference({"x": x}, 2 * x, t)


def test_an_engine_is_tried_in_every_noise_band_and_timed_at_every_batch_size(
    reference: TrialReference,
) -> None:
    record = try_engine(Answering(reference, 1e-3, 0.002), "fp16", reference, (1, 8))
    assert len(record["error"]) == 10
    assert max(band["relative_l2"] for band in record["error"]) == pytest.approx(1e-3, rel=0.01)
    assert record["milliseconds"] == {"1": 2.0, "8": 16.0}
    with pytest.raises(ExportError, match=r"the fp16 engine is off by 5\.00e-02"):
        try_engine(Answering(reference, 5e-2, 0.002), "fp16", reference, (1, 8))


def test_speed_is_compared_over_all_batch_sizes() -> None:
    assert speedup({"1": 2.0, "8": 8.0}, {"1": 1.0, "8": 8.0}) == pytest.approx(2**0.5)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, reference: TrialReference) -> dict[str, float]:
    """A GPU whose engines take as long as the table says; with "wrong" set they are off by a tenth."""
    table = {"fp16": 1.0, "int8": 0.5, "wrong": 0.0}

    def run(trt: Any, plan: bytes) -> Any:
        precision = next(names)
        engine = Answering(reference, 0.1 if table["wrong"] else 1e-3, table[precision])
        engine.close = lambda: None  # type: ignore[attr-defined]
        return engine

    names = iter(("fp16", "int8"))
    monkeypatch.setattr("ditserve.export.trt.load_trt", lambda flavour: TRT)
    monkeypatch.setattr("ditserve.export.trt.find_device", lambda *_: GPU)
    monkeypatch.setattr("ditserve.export.trt.EngineRunner", run)
    monkeypatch.setattr("ditserve.export.trt.trial_reference", lambda bundle: reference)
    return table


def states(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Return the states by precision that the last command printed."""
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {event["precision"]: event["state"] for event in events if event["event"] == "done"}


def test_int8_is_kept_only_where_it_is_faster(
    bundle: Bundle, on_gpu: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    on_gpu["int8"] = 0.95
    assert main([str(bundle.path), "--all", "--progress", "json"]) == 0
    by_precision = states(bundle, capsys)
    assert by_precision["fp16"] == "built"
    assert by_precision["int8"].startswith("dropped: 1.05 times as fast as half precision")
    assert [file.name for file in bundle.path.glob("engines/*/*.engine")] == ["backbone.fp16.engine"]


@pytest.mark.parametrize(("seconds", "flags"), [(0.5, []), (2.0, ["--keep-int8"])])
def test_int8_stays_if_it_is_faster_or_asked_for(
    bundle: Bundle,
    on_gpu: dict[str, float],
    capsys: pytest.CaptureFixture[str],
    seconds: float,
    flags: list[str],
) -> None:
    on_gpu["int8"] = seconds
    assert main([str(bundle.path), "--all", "--progress", "json", *flags]) == 0
    assert states(bundle, capsys) == {"fp16": "built", "int8": "built"}
    (report,) = bundle.path.glob("engines/*/report.json")
    records = json.loads(report.read_text())["engines"]
    assert [record["executed"] for record in records] == [True, True]
    assert all(len(record["error"]) == 10 for record in records)
    assert main([str(bundle.path), "--all", "--progress", "json", *flags]) == 0  # nothing is run again
    assert states(bundle, capsys) == {"fp16": "fresh", "int8": "fresh"}


def test_an_engine_that_is_wrong_is_not_kept(
    bundle: Bundle, on_gpu: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    on_gpu["wrong"] = 1.0
    assert main([str(bundle.path), "--progress", "json"]) == 2
    captured = capsys.readouterr()
    assert "the fp16 engine is off by" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["event"] == "failed"
    assert not list(bundle.path.glob("engines/*/*.engine"))


def test_command_line_checks_builds_and_checks_again(
    bundle: Bundle, on_gpu: dict[str, float], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [str(bundle.path), "--buckets", "1,2"]
    assert main([*arguments, "--check"]) == 1
    assert f"build it with python -m export.trt {bundle.path} --buckets 1,2" in capsys.readouterr().err
    assert main([*arguments, "--compile-only"]) == 0
    assert not (bundle.path / "engines").exists()
    assert main(arguments) == 0
    assert "1:" in capsys.readouterr().err  # milliseconds by batch size, in the table
    assert main([*arguments, "--check"]) == 0
    assert main([*arguments, "--engines", str(tmp_path / "elsewhere"), "--check"]) == 1
    assert main([*arguments, "--precision", "bf16"]) == 2
    assert "backbone.bf16.onnx" in capsys.readouterr().err
    assert main([str(bundle.path / "nowhere")]) == 2


def test_a_bundle_without_calibration_rows_is_refused_before_building(
    bundle: Bundle, on_gpu: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle.path / "calibration.safetensors").unlink()
    write_manifest(bundle.path, bundle.manifest)
    assert main([str(bundle.path)]) == 2
    assert "calibration.safetensors" in capsys.readouterr().err
    assert not (bundle.path / "engines").exists()


def test_engines_are_built_without_torch() -> None:
    """The image that serves on a GPU builds its engines itself, and has no torch."""
    program = (
        "import sys, ditserve.export.trt; sys.exit(bool({'torch', 'onnx', 'diffusers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_fusion_counts_kernels_by_name() -> None:
    plan = b"".join(
        b'extern "C" __global__ void ' + name + b"("
        for name in (b"__myl_FcAdd", b"gemm_mha_v2_1", b"gemm_mha_v2_1", b"MinMaxRounCast")
    )
    fusion = fusion_of(plan + b"__mye12_folded_matmul __mye13_folded_matmul __mye12_folded_matmul")
    assert fusion.as_dict() == {"kernels": 3, "attention": 1, "quantising": 1, "int8_matmuls": 2}


@pytest.mark.gpu
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-5), ("fp16", 1e-2), ("int8", 1e-1)])
def test_an_engine_built_here_answers_as_the_cpu_does(
    full_bundle: Path, tmp_path: Path, precision: str, error: float
) -> None:
    """TensorRT itself, from the graph to the rows that the service gets."""
    pytest.importorskip("tensorrt", reason="tensorrt is not installed: pip install -e '.[gpu]'")
    assert main([str(full_bundle), f"--precision={precision}", f"--engines={tmp_path}"]) == 0
    bundle = Bundle.open(full_bundle)
    engine = load_backend("tensorrt", bundle, precision=precision, engines=tmp_path)
    graph = load_backend("onnx", bundle, threads=1, precision="fp32")
    random = np.random.default_rng(0)
    for rows in (1, 3, 8):
        x = random.standard_normal((rows, 3, 16, 16), np.float32)
        state = graph.modulate(
            random.integers(0, 1000, rows).astype(np.float32),
            graph.embed(random.integers(0, [5, 3], (rows, 2))),
        )
        expected, actual = graph.denoise(x, state), engine.denoise(x, state)
        assert np.linalg.norm(actual - expected) < error * np.linalg.norm(expected)
    engine.close()
