"""What the compiler made of a graph, read from the serialised plan: no GPU is needed for it.

A plan carries the sources and names of its CUDA kernels. From them one sees whether attention became one fused kernel and how many
INT8 products had their Q/DQ folded into the matrix multiplication.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

_KERNEL = re.compile(rb'extern "C" __global__ void (_?[A-Za-z0-9_]+)')
_FOLDED = re.compile(rb"__mye[0-9]+_folded_matmul")


@dataclass(frozen=True, slots=True)
class Fusion:
    """Distinct kernels; fused attention kernels among them; kernels that end in quantisation; INT8 matmuls with folded Q/DQ."""

    kernels: int
    attention: int
    quantising: int
    int8_matmuls: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def fusion_of(plan: bytes) -> Fusion:
    """Read `plan`; all zero where the plan does not carry sources."""
    names = set(_KERNEL.findall(plan))
    return Fusion(
        kernels=len(names),
        attention=sum(b"gemm_mha" in name for name in names),
        quantising=sum(b"RounCast" in name for name in names),
        int8_matmuls=len(set(_FOLDED.findall(plan))),
    )
