"""The translations of operations of torch: each computes in ONNX Runtime what torch does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention

from ditserve.export.graph import _export, _GraphSpec


def heads(x: Tensor) -> Tensor:
    """Return the pixels of (B, 3, H, W) as the tokens of one head (B, 1, H · W, 3)."""
    return x.flatten(2).transpose(1, 2)[:, None]


def attend(x: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    return attention(heads(x), heads(2 * x), heads(x.sin()), mask, scale=scale)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": attend,
    "attention with a scale": lambda x: attend(x, scale=0.1),
    "a mask of numbers": lambda x: attend(x, heads(x)[..., :1].transpose(2, 3)),
    "a mask of truths": lambda x: attend(x, heads(x)[..., :1].transpose(2, 3) > -0.5),
    "squeeze of one": lambda x: x[:, :1].squeeze(1),
    "squeeze of a free dimension": lambda x: x.squeeze(2),
}


class Operation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.compute = OPERATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_translation_computes_the_same(name: str) -> None:
    module = Operation(name)
    spec = _GraphSpec(module, {"x": torch.randn(2, 3, 4, 6)}, ("y",), sides=(1, 1), strict=False)
    graph = _export(spec).SerializeToString()
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for batch, height, width in ((3, 5, 4), (1, 2, 7)):
        x = torch.randn(batch, 3, height, width)
        (y,) = session.run(["y"], {"x": x.numpy()})
        np.testing.assert_allclose(y, module(x).numpy(), atol=1e-6)
