"""The precision of the backbone in ONNX Runtime: as wanted, or chosen by speed and cost in quality."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Final

import numpy as np
import onnxruntime as ort
import structlog

from ditserve.commands import command_line
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.manifest import Manifest
from ditserve.service.backends import BackendUnavailable
from ditserve.service.backends.measured_choice import FASTER, quality_objection, speedup
from ditserve.service.backends.sessions import BACKBONES, CPU, open_session, provider_entries, run_session

OUTDATED: Final = (
    "an older export wrote it; write it again with "
    f"{command_line('export.half')} or {command_line('export.int8')}"
)

log = structlog.get_logger()


def open_backbone(
    bundle: Bundle, wanted: str, options: ort.SessionOptions, providers: Sequence[str]
) -> tuple[str, ort.InferenceSession]:
    """Open the backbone in the precision `wanted`, or in one chosen by "auto"; return precision and session.

    "auto" on the CPU is INT8 if the bundle's own record says that it costs at most `QUALITY_BUDGET`
    and it is `FASTER` times as fast here, else fp32. On another provider "auto" is fp16 if the bundle
    has it, else fp32.

    Raises:
        BackendUnavailable: the graph cannot be loaded, or takes half precision.
        BundleError: the bundle has no graph of this precision.
    """
    if wanted == "auto" and providers[0] == CPU:
        return _fp32_or_int8(bundle, options)
    if wanted == "auto":
        wanted = "fp16" if BACKBONES["fp16"] in bundle.manifest.files else "fp32"
    return wanted, _open(bundle, wanted, options, providers)


def _open(
    bundle: Bundle, precision: str, options: ort.SessionOptions, providers: Sequence[str]
) -> ort.InferenceSession:
    if precision == "int8":
        exact = "0" if _seven_bit_weights(bundle.manifest) else "1"
        options.add_session_config_entry("session.x64quantprecision", exact)
    entries = provider_entries(bundle, precision, providers)
    session = open_session(bundle, BACKBONES[precision], options, entries)
    if session.get_inputs()[0].type != "tensor(float)":
        raise BackendUnavailable(f"{bundle.file(BACKBONES[precision])} takes half precision: {OUTDATED}")
    return session


def _fp32_or_int8(bundle: Bundle, options: ort.SessionOptions) -> tuple[str, ort.InferenceSession]:
    fp32 = _open(bundle, "fp32", options, (CPU,))
    against_int8 = _objection_to_int8(bundle)
    if against_int8 is None:
        int8 = _open(bundle, "int8", options, (CPU,))
        speedup = _speedup(fp32, int8, bundle.manifest)
        if speedup >= FASTER:
            log.info("precision chosen", precision="int8", speedup=round(speedup, 2))
            return "int8", int8
        against_int8 = f"it is no faster here ({speedup:.2f} times)"
    log.info("precision chosen", precision="fp32", against_int8=against_int8)
    return "fp32", fp32


def _objection_to_int8(bundle: Bundle) -> str | None:
    """Return why the bundle's own record does not allow INT8, or None if it does."""
    if BACKBONES["int8"] not in bundle.manifest.files:
        return "the bundle has none"
    return quality_objection(bundle.manifest, "int8")


def _seven_bit_weights(manifest: Manifest) -> bool:
    """Return True if INT8 weights have 7 bits.

    The fast kernels of a CPU without VNNI saturate on 8-bit weights, so that it must take its exact kernels.
    On 7-bit weights they do not saturate.
    """
    return manifest.metrics.get("int8_weight_bits") == 7


def _speedup(fp32: ort.InferenceSession, int8: ort.InferenceSession, manifest: Manifest) -> float:
    """Return how many times as fast `int8` takes a step of one row, by processor time.

    What other processes do with the processor is not in the time of this one.
    """
    config, random = manifest.config, np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"x": (config.in_channels, *config.image_size)}
    shapes |= {tensor.name: tensor.shape for tensor in manifest.state}
    inputs = {name: random.standard_normal((1, *shape), np.float32) for name, shape in shapes.items()}
    one, other = (partial(run_session, session, ["output"], inputs) for session in (fp32, int8))
    return speedup(one, other, time.process_time)
