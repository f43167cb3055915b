"""The trial of an engine on the bundle's calibration rows, with imitations of TensorRT and CUDA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ditserve.export.calibrate import CalibrationRows
from ditserve.export.errors import ExportError
from ditserve.export.parity import forward
from ditserve.export.source import open_source
from ditserve.export.tensorrt.engine_runner import EngineRunner
from ditserve.export.tensorrt.module import TensorRt
from ditserve.export.tensorrt.trial import trial_reference
from ditserve.model.spec.bundle import CALIBRATION, Bundle
from tests.export.fake_cuda import Engine, Runtime, module_of
from tests.export.fake_trt import ILogger


def engine_runner(engine: Engine | None, runtime: Runtime) -> EngineRunner:
    module = module_of(engine)
    module.ILogger = ILogger
    return EngineRunner(TensorRt(module, "tensorrt", "11.4.0"), b"plan", runtime)


def test_the_reference_is_the_fp32_model_on_the_calibration_rows(tiny_bundle: Path) -> None:
    source = open_source(tiny_bundle)
    rows = CalibrationRows.load(tiny_bundle / CALIBRATION).with_null(source.network.config)
    reference = trial_reference(Bundle.open(tiny_bundle), threads=1)
    assert len(reference.output) == len(rows)
    np.testing.assert_allclose(reference.output, forward(source.network, rows).numpy(), atol=1e-4)
    assert (999 * reference.noise).round().tolist() == rows.timestep.tolist()


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_an_engine_answers_for_each_batch_size(rows: int) -> None:
    runtime = Runtime()
    engine = Engine(runtime, "final")
    running = engine_runner(engine, runtime)
    drawn = np.random.default_rng(rows)
    inputs = {"x": drawn.standard_normal((rows, 3, 16, 16)), "final": drawn.standard_normal((rows, 2, 32))}
    output = running(inputs, (rows, 3, 16, 16))
    expected = 2 * inputs["x"] + inputs["final"].reshape(rows, -1).mean(1)[:, None, None, None]
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, expected, atol=1e-5)
    assert engine.contexts[0].profile == (0 if rows <= 2 else 1)
    assert running.seconds(inputs, (rows, 3, 16, 16)) > 0
    running.close()
    assert not runtime.memory


def test_what_goes_wrong_is_one_sentence() -> None:
    runtime = Runtime()
    with pytest.raises(ExportError, match="cannot load the engine it built"):
        engine_runner(None, runtime)
    running = engine_runner(Engine(runtime, "x"), runtime)
    x = np.zeros((9, 3, 16, 16), np.float32)
    with pytest.raises(ExportError, match="no profile of the engine takes 9 rows"):
        running({"x": x}, x.shape)
    runtime.fail = {"cudaMemcpy": 700}
    with pytest.raises(ExportError, match="cudaMemcpy fails with CUDA error 700"):
        running({"x": x[:1]}, (1, 3, 16, 16))
