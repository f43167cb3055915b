"""Every silent failure of TensorRT becomes one sentence; a build can be followed and stopped."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ditserve.export.errors import ExportError
from ditserve.export.tensorrt.build import (
    BuildCancelled,
    BuildError,
    BuildOptions,
    Profile,
    build_engine,
    profiles_for,
)
from ditserve.export.tensorrt.module import load_trt
from tests.export.fake_trt import Behaviour, fake_trt

OPTIONS = BuildOptions(profiles=(Profile(1, 2, 4),))
GRAPH = Path("backbone.fp16.onnx")


@dataclass
class Recorder:
    """A monitor that stops the build at `stop_at` steps."""

    stop_at: int = 99
    seen: list[tuple[str, ...]] = field(default_factory=list)

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self.seen.append(("start", phase))

    def step(self, phase: str, step: int) -> bool:
        self.seen.append(("step", phase))
        return len(self.seen) < self.stop_at

    def finish(self, phase: str) -> None:
        self.seen.append(("finish", phase))


def test_a_build_is_strongly_typed_profiled_and_cached() -> None:
    behaviour = Behaviour()
    monitor = Recorder()
    options = BuildOptions(profiles=(Profile(1, 2, 4),), level=3, workspace_mib=64)
    built = build_engine(fake_trt(behaviour), GRAPH, options, timing_cache=b"old", monitor=monitor)
    assert (built.plan, built.timing_cache) == (b"plan", b"old+")
    assert ("network", 2) in behaviour.calls  # 1 << STRONGLY_TYPED
    assert ("clear_flag", "TF32") in behaviour.calls
    assert ("workspace", 64 << 20) in behaviour.calls
    assert ("shape", "x", (1, 3, 4, 4), (2, 3, 4, 4), (4, 3, 4, 4)) in behaviour.calls
    assert ("shape", "final", (1, 2, 8), (2, 2, 8), (4, 2, 8)) in behaviour.calls
    assert [entry[0] for entry in monitor.seen] == ["start", "step", "step", "step", "finish"]


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (
            Behaviour(parses=False),
            r"cannot read backbone\.fp16\.onnx: blocks\.0\.attn/Softmax \(Softmax\): not supported "
            r"\(and 1 more\)",
        ),
        (Behaviour(profile_index=-1), r"refuses the profile 1\.\.4"),
        (Behaviour(accepts_cache=False), r"timing cache: delete it"),
        (
            Behaviour(builds=False),
            r"cannot build backbone\.fp16\.onnx: no kernel for node blocks\.1\.mlp\.fc1/MatMul$",
        ),
        (Behaviour(lacks="network"), "cannot make a network"),
        (Behaviour(lacks="configuration"), "cannot make a builder configuration"),
        (Behaviour(lacks="profile"), "cannot make an optimisation profile"),
    ],
)
def test_what_tensorrt_answers_by_none_or_false_is_an_error(behaviour: Behaviour, words: str) -> None:
    with pytest.raises(BuildError, match=words) as refused:
        build_engine(fake_trt(behaviour), GRAPH, OPTIONS)
    assert "\n" not in str(refused.value)


def test_the_log_of_one_build_does_not_leak_into_the_next() -> None:
    trt = fake_trt(Behaviour(builds=False))
    for _ in range(2):
        with pytest.raises(BuildError) as refused:
            build_engine(trt, GRAPH, OPTIONS)
        assert len(refused.value.log) == 1


def test_a_monitor_that_says_no_cancels() -> None:
    with pytest.raises(BuildCancelled):
        build_engine(fake_trt(Behaviour()), GRAPH, OPTIONS, monitor=Recorder(stop_at=2))


def test_targets_need_the_compiler_that_has_them() -> None:
    with pytest.raises(ExportError, match="tensorrt_rtx"):
        build_engine(fake_trt(Behaviour()), GRAPH, BuildOptions(profiles=OPTIONS.profiles, targets=("sm89",)))


@pytest.mark.parametrize("sizes", [(2, 1, 4), (1, 4, 2), (0, 1, 1)])
def test_a_profile_out_of_order_never_reaches_tensorrt(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ExportError, match="min <= opt <= max"):
        Profile(*sizes)


@pytest.mark.parametrize(
    ("buckets", "count", "expected"),
    [
        ((1,), 1, [(1, 1, 1)]),
        ((4, 1, 2, 2), 1, [(1, 4, 4)]),
        ((1, 2, 4, 8), 2, [(1, 2, 2), (4, 8, 8)]),
        ((1, 2, 4), 3, [(1, 1, 1), (2, 2, 2), (4, 4, 4)]),
    ],
)
def test_buckets_become_profiles(
    buckets: tuple[int, ...], count: int, expected: list[tuple[int, int, int]]
) -> None:
    assert [(p.min, p.opt, p.max) for p in profiles_for(buckets, count)] == expected


@pytest.mark.parametrize(("buckets", "count"), [((), 1), ((0, 1), 1), ((1, 2), 3), ((1,), 0)])
def test_impossible_profiles_are_refused(buckets: tuple[int, ...], count: int) -> None:
    with pytest.raises(ExportError, match="profiles cannot be made"):
        profiles_for(buckets, count)


def test_a_missing_tensorrt_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditserve.export.tensorrt.module._import", lambda name: None)
    with pytest.raises(ExportError, match="pip install tensorrt-cu13"):
        load_trt("tensorrt")


def test_an_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = fake_trt(Behaviour(), version="10.9.0.34").module
    monkeypatch.setattr("ditserve.export.tensorrt.module._import", lambda name: old)
    with pytest.raises(ExportError, match=r"10\.9\.0\.34 is too old: install 10\.12"):
        load_trt("tensorrt")
