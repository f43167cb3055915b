"""Translations of operations of torch to ONNX, in place of the exporter's own."""

from __future__ import annotations

from typing import Any, Final

import onnx_ir as ir
import torch
from onnxscript import opset20 as op

from ditserve.export.errors import ExportError

# The score of a key that attention must not see.
MASKED: Any = -30000.0


def _attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    """Return the nodes of softmax(scale·q·kᵀ)·v for (B, H, T, d); `scale` is 1/√d unless given.

    A boolean mask says which keys count; one of numbers is added to the scores.
    The exporter's own translation has ten more nodes for the transpose of the keys, and copies them twice.

    Raises:
        ExportError: the attention is of another kind.
    """
    if dropout_p or is_causal:
        raise ExportError("attention with dropout or a causal mask has no translation")
    factor: Any = q.shape[3] ** -0.5 if scale is None else scale
    scores = op.MatMul(op.Mul(q, op.CastLike(factor, q)), op.Transpose(k, perm=[0, 1, 3, 2]))
    if mask is not None and mask.dtype != ir.DataType.BOOL:
        scores = op.Add(scores, mask)
    elif mask is not None:
        # Far below any score, and representable in fp16; its exponential is zero.
        scores = op.Where(mask, scores, op.CastLike(MASKED, scores))
    return op.MatMul(op.Softmax(scores, axis=-1), v)


def _squeezed(x: Any, axis: int) -> Any:
    """Return the nodes of `x.squeeze(axis)`, which leaves alone a dimension that is free or larger than 1.

    The exporter's own translation takes a free dimension away, and the graph is then not valid.
    """
    axes: Any = op.Constant(value_ints=[axis])
    return op.Squeeze(x, axes) if x.shape[axis] == 1 else op.Identity(x)


def _added(x: Any, other: Any, alpha: float = 1.0) -> Any:
    """Return the nodes of `x + alpha · other`, whatever the size of `other`.

    The exporter takes a scalar below 1e-8 for zero and removes its addition. That is Sana's 1e-15, without
    which its attention divides 0 by 0. A constant with a dimension is left alone.
    """
    number: Any = alpha
    if isinstance(other, float):
        constant: Any = ir.tensor([other], dtype=x.dtype)
        other = op.Constant(value=constant)
    if x.dtype == ir.DataType.BOOL:
        return op.Or(x, other)
    return op.Add(x, other if alpha == 1.0 else op.Mul(other, op.CastLike(number, other)))


TRANSLATIONS: Final[dict[Any, Any]] = {
    torch.ops.aten.add.Tensor: _added,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
    torch.ops.aten.squeeze.dim: _squeezed,
}
