"""The matrix-multiply peak: the most single-precision operations a second on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float32]]

SIDES = (1024, 1536, 2048)
REPEATS = 3


class MatmulPeak:
    """Products of square matrices by the fastest of torch, NumPy's BLAS and ONNX Runtime.

    Args:
        threads: of each library.
        clock: seconds; the same clock must time the work that is compared with the peak.

    Attributes:
        rates: GFLOP/s by library and side, measured at construction.
    """

    def __init__(
        self, *, threads: int, clock: Callable[[], float] = time.perf_counter, seed: int = 0
    ) -> None:
        self._clock, self._threads = clock, threads
        self._products: dict[tuple[str, int], Callable[[], object]] = {}
        torch.set_num_threads(threads)
        random = np.random.default_rng(seed)
        for side in SIDES:
            a, b = random.standard_normal((2, side, side), np.float32)
            for library, product in _products(a, b, threads).items():
                self._products[library, side] = product
        self.rates: Mapping[tuple[str, int], float] = {key: self._rate(key) for key in self._products}
        self.library, self.side = max(self.rates, key=lambda key: self.rates[key])

    def now(self) -> float:
        """Return the GFLOP/s of the fastest product at this moment."""
        return self._rate((self.library, self.side))

    def _rate(self, key: tuple[str, int]) -> float:
        product, best = self._products[key], np.inf
        with threadpool_limits(self._threads, user_api="blas"):
            product()
            for _ in range(REPEATS):
                began = self._clock()
                product()
                best = min(best, self._clock() - began)
        return float(2 * key[1] ** 3 / best / 1e9)


def _products(a: Matrix, b: Matrix, threads: int) -> dict[str, Callable[[], object]]:
    first, second = torch.from_numpy(a), torch.from_numpy(b)
    session = _session(b, threads)
    return {
        "torch": lambda: first @ second,
        "numpy": lambda: a @ b,
        "onnxruntime": lambda: session.run(None, {"a": a}),
    }


def _session(b: Matrix, threads: int) -> ort.InferenceSession:
    """Return a graph of one product with the constant `b`, which the runtime may pack beforehand."""
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
