"""Sessions of ONNX Runtime: opened on an execution provider that really runs, with a backend's errors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any, Final, cast

import numpy.typing as npt
import onnxruntime as ort

from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.engine_cache import FOLDER, NoGpuError, engine_origin, first_gpu
from ditserve.model.spec.heap import compact_heap
from ditserve.service.backends import BackendUnavailable, Floats, OutOfMemory

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
BACKBONES: Final = {"fp32": "backbone.onnx", "fp16": "backbone.fp16.onnx", "int8": "backbone.int8.onnx"}
# Provider → packages to install for it.
NEEDS: Final = {
    CUDA: "onnxruntime-gpu[cuda,cudnn] in place of onnxruntime",
    TENSORRT: "onnxruntime-gpu[cuda,cudnn] in place of onnxruntime, and tensorrt-cu13",
}

Arrays = Mapping[str, npt.NDArray[Any]]
# A provider, or a provider with its options.
ProviderEntry = str | tuple[str, dict[str, str]]

EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
SPINNING = "session.intra_op.allow_spinning"
_OUT_OF_MEMORY = re.compile(
    r"bad_alloc|failed to allocate|out of memory|CUDNN_STATUS_ALLOC_FAILED", re.IGNORECASE
)


def session_options(threads: int, *, spin: bool = False) -> ort.SessionOptions:
    """Return the options of a session: its compute threads, and no log below errors."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry(SPINNING, "1" if spin else "0")
    return options


def require_providers(providers: Sequence[str]) -> None:
    """Raise unless this build of ONNX Runtime has all `providers`.

    Raises:
        BackendUnavailable: one is missing; the message names the package to install.
    """
    for name in providers:
        if name not in ort.get_available_providers():
            known = ", ".join((CPU, *NEEDS))
            remedy = f"install {NEEDS[name]}" if name in NEEDS else f"choose among {known}"
            raise BackendUnavailable(f"this ONNX Runtime has no {name}: {remedy}")


def open_session(
    bundle: Bundle, name: str, options: ort.SessionOptions, providers: Sequence[ProviderEntry] = (CPU,)
) -> ort.InferenceSession:
    """Open a session of the graph `name` that really runs on the first of `providers`.

    Raises:
        BackendUnavailable: it cannot be loaded, or ONNX Runtime would silently run it elsewhere.
        BundleError: the bundle lacks it.
    """
    path, folder = bundle.file(name), bundle.graph_folder(name)
    if folder is not None:
        # A graph that is opened by its path may not refer to weights outside its folder. The others keep
        # their options: this entry would change what their own references mean.
        spin = options.get_session_config_entry(SPINNING) == "1"
        options = session_options(options.intra_op_num_threads, spin=spin)
        options.add_session_config_entry(EXTERNAL_FOLDER, str(folder))
    if providers[0] != CPU:
        # CUDA's libraries may be installed as packages, where the system's loader does not find them.
        ort.preload_dlls()
    try:
        with compact_heap():
            graph = path if folder is None else path.read_bytes()
            session = ort.InferenceSession(graph, options, providers=list(providers))
    # The runtime's exceptions share no base class of their own.
    except Exception as error:
        raise BackendUnavailable(
            f"{path} cannot be loaded by ONNX Runtime: {str(error).splitlines()[0]}"
        ) from error
    first = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if first not in session.get_providers():
        raise BackendUnavailable(
            f"{first} does not start and ONNX Runtime would compute on the CPU instead: "
            f"install {NEEDS.get(first, first)}"
        )
    return session


def run_session(session: ort.InferenceSession, outputs: Sequence[str], inputs: Arrays) -> list[Floats]:
    """Run `session` and return the named outputs.

    Raises:
        OutOfMemory: the device has no memory for this many rows.
    """
    with translated_errors():
        return cast(list[Floats], session.run(outputs, inputs))


@contextmanager
def translated_errors() -> Iterator[None]:
    """Raise `OutOfMemory` for an error of the runtime that is one; only its message tells."""
    try:
        yield
    except Exception as error:
        if _OUT_OF_MEMORY.search(str(error)):
            raise OutOfMemory(str(error)) from error
        raise


def provider_entries(bundle: Bundle, precision: str, providers: Sequence[str]) -> list[ProviderEntry]:
    """Return `providers` with their options, as a session takes them.

    CUDA computes fp32 without TF32, which is its default: TF32 has errors of 1e-3, which change with the
    batch. TensorRT keeps its engines in the bundle, under the same keys as `export.trt`.

    Raises:
        BackendUnavailable: TensorRT is asked for, and there is no GPU or no package of it.
    """
    entries: list[ProviderEntry] = []
    for name in providers:
        if name == TENSORRT:
            entries.append((TENSORRT, _engine_cache_options(bundle, precision)))
        elif name == CUDA:
            entries.append(cuda_entry())
        else:
            entries.append(name)
    return entries


def cuda_entry(**options: str) -> ProviderEntry:
    """Return CUDA without TF32, and with more `options` of the provider."""
    return CUDA, {"use_tf32": "0", **options}


def _engine_cache_options(bundle: Bundle, precision: str) -> dict[str, str]:
    try:
        device = first_gpu()
        version = f"{ort.__version__}-{metadata.version('tensorrt-cu13')}"
    except NoGpuError as error:
        raise BackendUnavailable(f"{TENSORRT} needs a GPU, and {error}") from None
    except metadata.PackageNotFoundError:
        raise BackendUnavailable(
            f"{TENSORRT} needs the package tensorrt-cu13, which is not installed"
        ) from None
    origin = engine_origin(
        bundle, precision, BACKBONES[precision], flavour="onnxruntime", version=version, device=device
    )
    folder = bundle.path / FOLDER / origin.folder
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": origin.key({})[:16],
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }
