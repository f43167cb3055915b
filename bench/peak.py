"""The most single-precision operations a second that this machine's libraries reach, by multiplying large matrices."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

SIDES = (1024, 1536, 2048)
TIMES = 3


class Peak:
    """Products of square matrices by the fastest of torch, NumPy's BLAS and ONNX Runtime.

    Args:
        threads: of each library.
        clock: seconds, as the work that is held against the peak is timed.
    """

    def __init__(
        self, *, threads: int, clock: Callable[[], float] = time.perf_counter, seed: int = 0
    ) -> None:
        self._clock, self._threads = clock, threads
        torch.set_num_threads(threads)
        self.rates = self._calibrate(np.random.default_rng(seed))
        (self.library, self.side) = max(self.rates, key=lambda key: self.rates[key])

    def _calibrate(self, random: np.random.Generator) -> Mapping[tuple[str, int], float]:
        self._products: dict[tuple[str, int], Callable[[], object]] = {}
        for side in SIDES:
            a, b = random.standard_normal((2, side, side), np.float32)
            for library, product in _products(a, b, self._threads).items():
                self._products[library, side] = product
        return {key: self._rate(key, TIMES) for key in self._products}

    def now(self) -> float:
        """GFLOP/s of the fastest product, at this moment."""
        return self._rate((self.library, self.side), TIMES)

    def _rate(self, key: tuple[str, int], times: int) -> float:
        product, best = self._products[key], np.inf
        with threadpool_limits(self._threads, user_api="blas"):
            product()
            for _ in range(times):
                began = self._clock()
                product()
                best = min(best, self._clock() - began)
        return float(2 * key[1] ** 3 / best / 1e9)


def _products(
    a: np.ndarray[tuple[int, int], np.dtype[np.float32]],
    b: np.ndarray[tuple[int, int], np.dtype[np.float32]],
    threads: int,
) -> dict[str, Callable[[], object]]:
    first, second = torch.from_numpy(a), torch.from_numpy(b)
    session = _session(b, threads)
    return {
        "torch": lambda: first @ second,
        "numpy": lambda: a @ b,
        "onnxruntime": lambda: session.run(None, {"a": a}),
    }


def _session(b: np.ndarray[tuple[int, int], np.dtype[np.float32]], threads: int) -> ort.InferenceSession:
    """A graph of one product with a constant, which the runtime may pack beforehand."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, ["n", len(b)])],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(b, "b")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model.SerializeToString(), options)
