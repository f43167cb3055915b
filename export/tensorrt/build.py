"""One TensorRT build: from an ONNX file to a serialised engine, every silent failure turned into an error.

TensorRT reports a failure by `False`, `None` or -1, never by an exception. Each becomes a `BuildError` with
the collected log. Networks are strongly typed: the graph decides the precision, there is no precision flag.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ditserve.export.errors import ExportError
from ditserve.export.tensorrt.module import Log, TensorRt, listening
from ditserve.model.spec.sizes import Size


class BuildError(ExportError):
    """A build that TensorRT refused; `log` holds its error lines."""

    def __init__(self, message: str, log: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.log = tuple(log)


class BuildCancelled(ExportError):
    """A build that was stopped on request."""


class Monitor(Protocol):
    """A follower of a build; `step` returns False to stop it."""

    def start(self, phase: str, parent: str | None, steps: int) -> None: ...

    def step(self, phase: str, step: int) -> bool: ...

    def finish(self, phase: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Profile:
    """The batch sizes `min`..`max` of one optimisation profile, and the size `opt` that it is tuned for."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ExportError(
                f"a profile needs 1 <= min <= opt <= max, not {self.min}, {self.opt}, {self.max}"
            )


def profiles_for(buckets: Sequence[int], count: int = 1) -> tuple[Profile, ...]:
    """Return `count` profiles over the batch sizes `buckets`, each tuned for its largest.

    Buckets 1, 2, 4, 8 and 2 profiles give 1..2 and 4..8.

    Raises:
        ExportError: no buckets, a bucket below 1, or a count outside 1..len(buckets).
    """
    sizes = sorted(set(buckets))
    if not sizes or sizes[0] < 1 or not 1 <= count <= len(sizes):
        raise ExportError(
            f"{count} profiles cannot be made of the batch sizes {list(buckets)}: "
            f"give 1 to {len(sizes)} profiles"
        )
    edges = [k * len(sizes) // count for k in range(count + 1)]
    runs = [sizes[low:high] for low, high in itertools.pairwise(edges)]
    return tuple(Profile(run[0], run[-1], run[-1]) for run in runs)


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """The options of a build.

    Args:
        profiles: the batch sizes.
        size: the sides of x, used where the graph leaves them free.
        level: optimisation level 0..5, or None for TensorRT's own.
        workspace_mib: limit of the workspace in MiB, or None for TensorRT's own.
        tf32: allow TF32 in fp32 parts.
        targets: compute capabilities to compile for ahead of time, such as "sm89".
    """

    profiles: tuple[Profile, ...]
    size: Size = (0, 0)
    level: int | None = None
    workspace_mib: int | None = None
    tf32: bool = False
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Built:
    """A serialised engine, the timing cache after its build (may be empty), and the seconds it took."""

    plan: bytes
    timing_cache: bytes
    seconds: float


def build_engine(
    trt: TensorRt,
    graph: Path,
    options: BuildOptions,
    *,
    timing_cache: bytes = b"",
    monitor: Monitor | None = None,
) -> Built:
    """Compile `graph`; its external weights are found beside it.

    Raises:
        BuildError: TensorRT refused the graph, a profile or the build.
        BuildCancelled: `monitor.step` answered False.
    """
    started = time.monotonic()
    with listening(trt) as (logger, log):
        builder = _made(trt.module.Builder(logger), "a builder", log)
        network = _parse(trt, builder, logger, graph, log)
        config = _made(builder.create_builder_config(), "a builder configuration", log)
        _configure(trt, config, options, log)
        for profile in options.profiles:
            _add_profile(builder, network, config, profile, options.size, log)
        _use_cache(trt, config, timing_cache, log)
        relay = _relay(trt.module, monitor) if monitor else None
        if relay is not None:
            config.progress_monitor = relay
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            if relay is not None and relay.cancelled:
                raise BuildCancelled("the build was cancelled")
            raise BuildError(f"TensorRT cannot build {graph.name}: {_last(log)}", log.errors())
        return Built(bytes(plan), _cache_of(trt, config), time.monotonic() - started)


def _use_cache(trt: TensorRt, config: Any, content: bytes, log: Log) -> None:
    # TensorRT-RTX times nothing: its cache calls are deprecated and without effect.
    if trt.ahead_of_time:
        return
    cache = _made(config.create_timing_cache(content), "a timing cache", log)
    if not config.set_timing_cache(cache, False):
        raise BuildError("TensorRT does not accept the timing cache: delete it and build again", log.errors())


def _cache_of(trt: TensorRt, config: Any) -> bytes:
    cache = None if trt.ahead_of_time else config.get_timing_cache()
    return b"" if cache is None else bytes(cache.serialize())


def _parse(trt: TensorRt, builder: Any, logger: Any, graph: Path, log: Log) -> Any:
    flags = 1 << int(trt.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = _made(builder.create_network(flags), "a network", log)
    parser = trt.module.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(k) for k in range(parser.num_errors)]
        messages = [
            f"{error.node_name() or 'the graph'} ({error.node_operator()}): {error.desc()}"
            for error in errors
        ]
        more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
        raise BuildError(
            f"TensorRT cannot read {graph.name}: {messages[0] if messages else _last(log)}{more}",
            messages or log.errors(),
        )
    return network


def _configure(trt: TensorRt, config: Any, options: BuildOptions, log: Log) -> None:
    module = trt.module
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if not options.tf32:
        config.clear_flag(module.BuilderFlag.TF32)
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if not options.targets:
        return
    if not trt.ahead_of_time:
        raise ExportError(
            "tensorrt builds for the GPU it runs on; naming targets needs --backend tensorrt_rtx"
        )
    config.num_compute_capabilities = len(options.targets)
    for k, target in enumerate(options.targets):
        capability = getattr(module.ComputeCapability, target.upper(), None)
        if capability is None or not config.set_compute_capability(capability, k):
            known = ", ".join(name for name in module.ComputeCapability.__members__ if name.startswith("SM"))
            raise BuildError(f"TensorRT-RTX cannot compile for {target}: choose among {known}", log.errors())


def _add_profile(builder: Any, network: Any, config: Any, profile: Profile, size: Size, log: Log) -> None:
    optimization = _made(builder.create_optimization_profile(), "an optimisation profile", log)
    for k in range(network.num_inputs):
        tensor = network.get_input(k)
        rest = tuple(tensor.shape)[1:]
        if -1 in rest:
            rest = (rest[0], *size)  # (C, H, W)
        optimization.set_shape(tensor.name, (profile.min, *rest), (profile.opt, *rest), (profile.max, *rest))
    if config.add_optimization_profile(optimization) < 0:
        raise BuildError(
            f"TensorRT refuses the profile {profile.min}..{profile.max}: {_last(log)}", log.errors()
        )


def _relay(module: Any, monitor: Monitor) -> Any:
    """Return an object of TensorRT's monitor interface that calls ours.

    An exception must not cross that interface: TensorRT would print and lose it.
    """

    class Relay(module.IProgressMonitor):  # type: ignore[misc]  # the module is chosen at run time
        def __init__(self) -> None:
            super().__init__()
            self.cancelled = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            monitor.start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            monitor.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.cancelled = self.cancelled or not monitor.step(phase_name, step)
            return not self.cancelled

    return Relay()


def _made(result: Any, noun: str, log: Log) -> Any:
    """Return `result`, or raise if TensorRT answered None.

    Raises:
        BuildError: it is None.
    """
    if result is None:
        raise BuildError(f"TensorRT cannot make {noun}: {_last(log)}", log.errors())
    return result


def _last(log: Log) -> str:
    errors = log.errors()
    return errors[-1] if errors else "it gave no reason"
