"""Samples whose rows live on a device: the pictures of the host, and what crosses the bus for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from ditserve.model.spec.adapters import adapter_files
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.source import SourceLatent
from ditserve.service.backends.resident import MOST_STEPS
from ditserve.service.backends.torch import TorchBackend
from ditserve.service.engine import engine as engine_module
from ditserve.service.engine import resident
from ditserve.service.engine.samples import SampleRequest
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.jobs import AdapterUse, ConditionTerm
from ditserve.service.planning.planner import LOAD
from tests.service.conftest import POISON, FakeBackend
from tests.service.engine.imitated_device import CountingStream, DeviceBackend, OperationsOutsideLaunches
from tests.service.engine.stepping import failed, finished, previews, run
from tests.service.engine.test_engine_flow import SD3, SIT
from tests.service.engine.test_engine_pictures import MASKED, PICTURE
from tests.service.tiny_adapters import write_adapter
from tests.service.tiny_bundle import write_bundle

Make = Callable[..., Any]

SOLVERS = ["ddim", "ddpm", "euler", "dpmpp-2m", "unipc-1", "unipc-2"]


def assert_same(there: dict[str, Any], here: dict[str, Any]) -> None:
    assert there.keys() == here.keys()
    for name, sample in here.items():
        np.testing.assert_array_equal(there[name].latent, sample.latent, err_msg=name)
        assert replace(there[name], latent=None, queue_ms=0, denoise_ms=0) == replace(
            sample, latent=None, queue_ms=0, denoise_ms=0
        )


@pytest.mark.parametrize(
    "diffusion",
    [
        {"prediction": "epsilon"},
        {"prediction": "v", "clip_x0": True},
        {"prediction": "x0", "guidance_channels": 2},
        SD3,
        SIT,
    ],
)
def test_every_solver_draws_the_pictures_of_the_host_alone_and_in_company(
    diffusion: dict[str, Any], make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    flow = diffusion.get("schedule") == "flow"
    requests = [
        make_request(
            f"{solver}-{scale}/0",
            colour=k % 3,
            seed=k,
            guidance_scale=scale,
            rung=make_rung(solver, 9 + k, "uniform" if flow else "uniform-t", (0.2, 0.7)),
        )
        for k, solver in enumerate(SOLVERS)
        for scale in (1.0, 2.5)
    ]
    here = finished(run(make_engine(FakeBackend(**diffusion)), requests))
    there = finished(run(make_engine(DeviceBackend(**diffusion)), requests))
    assert_same(there, here)
    for request in requests[::3]:
        alone = finished(run(make_engine(DeviceBackend(**diffusion)), [request]))
        np.testing.assert_array_equal(alone[request.id].latent, here[request.id].latent)


@pytest.fixture
def long_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a turn have as many steps as it may."""
    monkeypatch.setattr(resident, "TURN_S", 1e9)


@pytest.fixture
def mixed(make_request: Make, make_rung: Make) -> list[SampleRequest]:
    """Give samples of all kinds that live on the device: noise, intervals, previews, pictures, masks."""
    return [
        make_request("plain/0"),
        make_request("noisy/0", seed=1, rung=make_rung("ddpm", 11, "uniform-t", (0.3, 0.6)), previews=3),
        make_request("multistep/0", colour=1, rung=make_rung("unipc-2", 9, "uniform-t", (0.2, 0.8))),
        make_request("masked/0", source=MASKED, rung=make_rung("dpmpp-2m", 10, strength=0.6), previews=2),
        make_request("edited/0", source=SourceLatent(PICTURE), rung=make_rung("ddim", 10, strength=0.5)),
        make_request("unconditional/0", colour=None, rung=make_rung("euler", 5)),
    ]


def test_turns_of_several_steps_draw_the_pictures_of_single_steps(
    mixed: list[SampleRequest], long_turns: None, make_engine: Make
) -> None:
    here, reports = run(make_engine(), mixed), run(make_engine(DeviceBackend()), mixed)
    assert_same(finished(reports), finished(here))
    assert max(report.steps for report in reports) > 1
    assert sum(report.steps for report in reports if report.rows) == len(run(make_engine(), mixed))

    def shown(some: list[Any]) -> dict[tuple[str, int], Any]:
        return {(preview.id, preview.step): preview for preview in previews(some)}

    there, expected = shown(reports), shown(here)
    assert there.keys() == expected.keys()
    for key, preview in expected.items():
        np.testing.assert_array_equal(there[key].latent, preview.latent)
        assert there[key].steps == preview.steps


def test_a_batch_is_padded_to_a_captured_size_and_no_number_changes(
    mixed: list[SampleRequest], long_turns: None, make_engine: Make
) -> None:
    backend = DeviceBackend(buckets=(1, 2, 4, 8, 16))
    made = finished(run(make_engine(backend, max_rows=16), mixed))
    assert_same(made, finished(run(make_engine(max_rows=16), mixed)))
    assert set(backend.batches) <= {1, 2, 4, 8, 16}


def test_a_learned_variance_is_that_of_the_host(
    long_turns: None, make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    config = replace(FakeBackend().manifest.config, learn_sigma=True)
    fields: dict[str, Any] = {"config": config, "learn_sigma": True, "prediction": "epsilon"}
    requests = [
        make_request("learned/0", rung=make_rung("ddpm", 12, "respaced", (0.2, 0.7))),
        make_request("plain/0", rung=make_rung("dpmpp-2m", 12, "trailing")),
    ]
    here = finished(run(make_engine(FakeBackend(**fields)), requests))
    there = finished(run(make_engine(DeviceBackend(**fields)), requests))
    for name, sample in here.items():
        # The exponential of torch differs from numpy's in the last bit.
        scale = np.abs(sample.latent).max()
        np.testing.assert_allclose(there[name].latent, sample.latent, atol=1e-5 * scale)


def test_a_sample_moves_between_rungs_as_on_the_host(
    long_turns: None, make_engine: Make, make_planner: Make, make_request: Make, make_rung: Make
) -> None:
    requests = [
        make_request("a/0", rung=make_rung("dpmpp-2m", 20, "uniform-t", (0.2, 0.8))),
        make_request("b/0", source=MASKED, rung=make_rung("ddim", 10, strength=0.6)),
        make_request("c/0", rung=make_rung("ddim", 16, "trailing")),
    ]
    few, source = make_rung("unipc-2", 8, "uniform-t", (0.2, 0.8)), make_rung("ddim", 5, strength=0.6)

    def drawn(backend: Any) -> dict[str, Any]:
        # Both move before their first step, because in a turn of several no sample moves.
        planner = make_planner([("a/0", 1000, few, LOAD), ("b/0", 1000, source, LOAD)])
        return finished(run(make_engine(backend, planner=planner), requests))

    assert_same(drawn(DeviceBackend()), drawn(FakeBackend()))


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp-2m", "unipc-2"])
def test_a_sample_moves_under_way_as_on_the_host(
    solver: str,
    monkeypatch: pytest.MonkeyPatch,
    make_engine: Make,
    make_planner: Make,
    make_request: Make,
    make_rung: Make,
) -> None:
    # It moves at the same step: the planner is asked before each.
    monkeypatch.setattr(engine_module, "HELD_S", 0.0)
    requests = [make_request(rung=make_rung(solver, 20, "uniform-t")), make_request("b/0", seed=8)]
    after = make_rung("dpmpp-2m", 8, "trailing", (0.2, 0.8))

    def drawn(backend: Any) -> dict[str, Any]:
        planner = make_planner([("a/0", 600, after, LOAD)])
        return finished(run(make_engine(backend, planner=planner), requests))

    there, here = drawn(DeviceBackend()), drawn(FakeBackend())
    assert_same(there, here)
    assert here["a/0"].reason == LOAD


@pytest.mark.parametrize("kinds", [(FakeBackend, DeviceBackend), (DeviceBackend, FakeBackend)])
def test_a_checkpoint_goes_from_the_device_to_the_host_and_back(
    kinds: tuple[type, type], mixed: list[SampleRequest], make_engine: Make
) -> None:
    whole = finished(run(make_engine(), mixed))
    first, second = (make_engine(kind()) for kind in kinds)
    for request in mixed:
        first.add(request)
    for _ in range(4):
        first.step()
    for request in mixed:
        wire = msgpack.unpackb(msgpack.packb(first.export(request.id).to_wire()))
        second.add(request, Snapshot.from_wire(wire))
    made = finished(run(second))
    for name, sample in made.items():
        np.testing.assert_array_equal(sample.latent, whole[name].latent, err_msg=name)


def test_a_slot_forgets_the_picture_of_its_last_sample(make_engine: Make, make_request: Make) -> None:
    engine = make_engine(DeviceBackend(), slots=1)
    run(engine, [make_request("masked/0", source=MASKED)])
    made = finished(run(engine, [make_request("plain/0")]))
    assert_same(made, finished(run(make_engine(), [make_request("plain/0")])))


def test_windows_compositions_and_other_sizes_run_on_the_host_beside_those_on_the_device(
    long_turns: None, mixed: list[SampleRequest], make_engine: Make, make_request: Make
) -> None:
    terms = (ConditionTerm((0,), 1.5), ConditionTerm((1,)))
    requests = [
        *mixed,
        make_request("windows/0", size=(6, 8), windows=True),
        make_request("composed/0", condition=terms, mix="compose"),
        make_request("larger/0", size=(8, 6)),
    ]
    there = finished(run(make_engine(DeviceBackend(size_multiple=2)), requests))
    assert_same(there, finished(run(make_engine(FakeBackend(size_multiple=2)), requests)))


def test_a_sample_whose_numbers_are_not_finite_fails_at_its_step_and_its_company_goes_on(
    long_turns: None, make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    poisoned = make_request("bad/0", colour=POISON, rung=make_rung("ddim", 6))
    well = make_request("well/0", rung=make_rung("ddpm", 9))
    engine = make_engine(DeviceBackend())
    reports = run(engine, [poisoned, well])
    assert [sample.id for report in reports for sample in report.failed] == ["bad/0"]
    assert "at step 1 of 6 is not finite" in str(failed(reports)["bad/0"].error)
    alone = finished(run(make_engine(), [well]))["well/0"]
    np.testing.assert_array_equal(finished(reports)["well/0"].latent, alone.latent)
    assert engine.free_samples == 16


def test_a_cancelled_sample_is_heard_of_no_more_and_its_slot_is_another_s(
    make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    engine = make_engine(DeviceBackend(), slots=1)
    engine.add(make_request("gone/0", rung=make_rung("ddim", 2)))
    engine.step()
    engine.step()  # Its last step is under way.
    engine.cancel("gone/0")
    engine.add(make_request("gone/0", seed=9))
    made = [sample for report in run(engine) for sample in report.finished]
    assert len(made) == 1
    expected = finished(run(make_engine(), [make_request("gone/0", seed=9)]))["gone/0"]
    np.testing.assert_array_equal(made[0].latent, expected.latent)


def test_what_is_under_way_is_handed_back_too(make_engine: Make, make_request: Make, make_rung: Make) -> None:
    engine = make_engine(DeviceBackend())
    engine.add(make_request("last/0", rung=make_rung("ddim", 1)))
    engine.add(make_request("first/0", rung=make_rung("ddim", 9)))
    engine.step()
    assert not engine.idle
    assert set(engine.hand_back()) == {"last/0", "first/0"}
    assert engine.idle


def test_without_memory_for_a_batch_the_cap_falls_and_no_number_is_lost(
    mixed: list[SampleRequest], make_engine: Make
) -> None:
    backend = DeviceBackend(buckets=(1, 2, 4, 8), memory_rows=4)
    engine = make_engine(backend)
    assert_same(finished(run(engine, mixed)), finished(run(make_engine(), mixed)))
    assert engine.scheduler.max_rows == 4
    assert max(backend.batches) <= 4
    # A device without room for a guided sample keeps none.
    backend = DeviceBackend(buckets=(1, 2, 4, 8), memory_rows=1)
    assert_same(finished(run(make_engine(backend), mixed)), finished(run(make_engine(), mixed)))
    assert backend.stream.counts.launches == 0


def test_a_cache_too_small_for_a_batch_leaves_the_rows_on_the_host(
    mixed: list[SampleRequest], make_engine: Make
) -> None:
    backend = DeviceBackend()
    made = finished(run(make_engine(backend, modulation_bytes=0), mixed))
    assert_same(made, finished(run(make_engine(modulation_bytes=0), mixed)))
    assert backend.stream.counts.launches == 0


def test_the_network_of_a_bundle_draws_on_its_device_with_adapters_and_without(
    tmp_path: Path, long_turns: None, make_engine: Make, make_request: Make
) -> None:
    write_bundle(tmp_path, weights=True)
    write_adapter(tmp_path, "noir", seed=1)
    bundle, files = Bundle.open(tmp_path), adapter_files(tmp_path / "adapters")
    here, there = (TorchBackend(bundle, adapters=files) for _ in range(2))
    there.stream = stream = CountingStream()
    use = (AdapterUse("noir", 0.8, "noir"),)
    plain = [make_request(f"{k}/0", condition=(ConditionTerm((k, 0)),), seed=k) for k in range(3)]
    adapted = replace(plain[0], id="adapted/0", adapters=use)
    for requests in (plain, [*plain, adapted]):
        launched = stream.counts.launches
        expected, made = (finished(run(make_engine(backend), requests)) for backend in (here, there))
        assert stream.counts.launches > launched
        for name, sample in expected.items():
            np.testing.assert_allclose(made[name].latent, sample.latent, atol=1e-5)
    # A picture does not depend on the numbers of those beside it, nor on the batches of others.
    assert np.abs(made["adapted/0"].latent - made["0/0"].latent).max() > 1e-3


def test_a_step_costs_the_host_two_small_copies_a_turn_one_launch_and_one_flag(
    make_engine: Make, make_request: Make, make_rung: Make, long_turns: None
) -> None:
    backend = DeviceBackend()
    engine, rung = make_engine(backend, max_rows=16), make_rung("unipc-2", 6 * MOST_STEPS, "uniform-t")
    for k in range(16):
        engine.add(make_request(f"{k}/0", colour=k % 3, guidance_scale=1.0, rung=rung))
    engine.step()
    before, turns = replace(backend.stream.counts), 4
    with OperationsOutsideLaunches(backend.stream) as outside:
        steps = sum(engine.step().steps for _ in range(turns))
    counts = backend.stream.counts
    assert steps == turns * MOST_STEPS
    assert counts.launches - before.launches == steps
    assert counts.uploads - before.uploads == 2 * turns
    # Seven whole numbers of eight bytes and twelve of four, a row and step.
    assert counts.uploaded_bytes - before.uploaded_bytes <= steps * 16 * (8 * 7 + 4 * 12)
    assert counts.downloads - before.downloads == turns
    assert counts.downloaded_bytes - before.downloaded_bytes == steps * 16
    assert counts.waits - before.waits == turns
    assert (counts.allocations, counts.captures) == (before.allocations, before.captures)
    # Beside the launches torch copies those, and sets the counter to zero.
    assert outside.names == {"aten.copy_.default", "aten.zero_.default"}


def test_samples_that_step_together_are_not_planned_again_until_something_changes(
    make_engine: Make, make_planner: Make, make_request: Make, make_rung: Make
) -> None:
    now, planner = [0.0], make_planner()
    engine = make_engine(DeviceBackend(), planner=planner, clock=lambda: now[0])
    engine.add(make_request("a/0", rung=make_rung("ddim", 20)))
    engine.step()
    engine.step()
    assert len(planner.seen) == 1
    engine.add(make_request("b/0", rung=make_rung("ddim", 20)))
    engine.step()
    assert len(planner.seen) == 2
    engine.cancel("b/0")
    engine.step()
    assert len(planner.seen) == 3
    engine.step()
    now[0] += engine_module.HELD_S
    engine.step()
    assert len(planner.seen) == 4


def test_a_batch_that_is_held_together_is_planned_anew_where_memory_runs_out(
    make_engine: Make, make_request: Make, make_rung: Make
) -> None:
    backend = DeviceBackend(buckets=(1, 2, 4, 8))
    engine = make_engine(backend, clock=lambda: 0.0)
    rung = make_rung("ddim", 12, "uniform-t", (0.0, 0.5))
    requests = [make_request(f"{k}/0", seed=k, rung=rung) for k in range(4)]
    for request in requests:
        engine.add(request)
    engine.step()
    # From half of the way on they are guided: eight rows, for which there is no room any more.
    backend.memory_rows = 4
    made = finished(run(engine))
    assert_same(made, finished(run(make_engine(), requests)))
    assert engine.condition_caches[0].modulations.hits > 0
