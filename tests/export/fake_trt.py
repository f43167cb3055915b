"""An imitation of the TensorRT module: the names that a build uses, each able to fail silently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

from ditserve.export.tensorrt.module import TensorRt


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3


class Flag(IntEnum):
    STRONGLY_TYPED = 1
    TF32 = 7
    DETAILED = 2
    WORKSPACE = 0


class ILogger:
    def log(self, severity: Severity, message: str) -> None: ...


class IProgressMonitor:
    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...

    def phase_finish(self, phase_name: str) -> None: ...

    def step_complete(self, phase_name: str, step: int) -> bool:
        return True


@dataclass
class Behaviour:
    """The failures of an imitated module, and the calls made to it."""

    parses: bool = True
    profile_index: int = 0
    accepts_cache: bool = True
    builds: bool = True
    lacks: str = ""  # the thing that comes back as None
    calls: list[Any] = field(default_factory=list)
    during: Callable[[], None] = lambda: None  # runs between two steps of a build


def fake_trt(behaviour: Behaviour, flavour: str = "tensorrt", version: str = "11.4.0") -> TensorRt:
    """Return a module whose builds follow `behaviour`."""
    calls = behaviour.calls

    class Config:
        progress_monitor: IProgressMonitor | None = None

        def clear_flag(self, flag: Flag) -> None:
            calls.append(("clear_flag", flag.name))

        def set_memory_pool_limit(self, pool: Flag, size: int) -> None:
            calls.append(("workspace", size))

        def create_timing_cache(self, data: bytes) -> Any:
            calls.append(("timing_cache", data))
            return SimpleNamespace(serialize=lambda: data + b"+")

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            self.cache = cache
            return behaviour.accepts_cache

        def get_timing_cache(self) -> Any:
            return self.cache

        def add_optimization_profile(self, profile: Any) -> int:
            return behaviour.profile_index

    class Profile:
        def set_shape(self, name: str, low: Any, opt: Any, high: Any) -> None:
            calls.append(("shape", name, low, opt, high))

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            self.logger = logger

        def create_network(self, flags: int) -> Any:
            calls.append(("network", flags))
            inputs = [
                SimpleNamespace(name="x", shape=(-1, 3, 4, 4)),
                SimpleNamespace(name="final", shape=(-1, 2, 8)),
            ]
            network = SimpleNamespace(num_inputs=len(inputs), get_input=lambda k: inputs[k])
            return None if behaviour.lacks == "network" else network

        def create_builder_config(self) -> Any:
            return None if behaviour.lacks == "configuration" else Config()

        def create_optimization_profile(self) -> Any:
            return None if behaviour.lacks == "profile" else Profile()

        def build_serialized_network(self, network: Any, config: Config) -> bytes | None:
            monitor = config.progress_monitor
            if monitor is not None:
                monitor.phase_start("compile", None, 3)
                for step in range(3):
                    behaviour.during()
                    if not monitor.step_complete("compile", step):
                        self.logger.log(Severity.ERROR, "Build canceled by user")
                        return None
                monitor.phase_finish("compile")
            if not behaviour.builds:
                self.logger.log(Severity.INFO, "trying")
                self.logger.log(
                    Severity.ERROR, "[graph_jit.cpp:278] no kernel for node blocks.1.mlp.fc1/MatMul"
                )
                return None
            return b"plan"

    class OnnxParser:
        def __init__(self, network: Any, logger: ILogger) -> None:
            self.errors = [
                SimpleNamespace(
                    desc=lambda: "not supported",
                    node_name=lambda: "blocks.0.attn/Softmax",
                    node_operator=lambda: "Softmax",
                ),
                SimpleNamespace(
                    desc=lambda: "no such axis", node_name=lambda: "", node_operator=lambda: "Add"
                ),
            ]
            self.num_errors = len(self.errors)

        def parse_from_file(self, path: str) -> bool:
            return behaviour.parses

        def get_error(self, index: int) -> Any:
            return self.errors[index]

    module = SimpleNamespace(
        ILogger=ILogger,
        IProgressMonitor=IProgressMonitor,
        Builder=Builder,
        OnnxParser=OnnxParser,
        NetworkDefinitionCreationFlag=Flag,
        BuilderFlag=Flag,
        ProfilingVerbosity=Flag,
        MemoryPoolType=Flag,
        __version__=version,
    )
    return TensorRt(module, flavour, version)
