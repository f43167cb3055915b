"""One value of every message type, for the test that compares their bytes with recorded ones."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import numpy as np

from ditserve.model.spec.stretches import Stretch
from ditserve.service.engine.samples import Finished
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.fleet import DemandBucket, LoadedAdapter, Network, SlowSpell, Starting, WorkerState
from ditserve.service.jobs import AdapterUse, ConditionTerm, Image, Job, JobResult
from ditserve.service.rung import Rung
from ditserve.service.source_picture import SourcePicture

FULL = Rung("ddim-20", "ddim", 20, "leading", (0.0, 1.0), 0.0)
HALF = Rung("dpmpp-2m-8", "dpmpp-2m", 8, "uniform-t", (0.25, 0.75), 0.125)

PLAIN_JOB = Job(
    id="job-1",
    model="emoji",
    condition=(ConditionTerm((0,)),),
    mix="linear",
    seeds=(7,),
    steps=20,
    solver="ddim",
    grid="leading",
    guidance_scale=2.0,
    guidance_interval=(0.0, 1.0),
    format="png",
    previews=0,
    caller="alice",
    priority="normal",
    created_at=1_700_000_000.5,
    deadline_at=None,
    allow_degraded=True,
    min_steps=1,
    rung=None,
    reason=None,
    cost_rows=40,
)
FULL_JOB = Job(
    id="job-2",
    model="emoji",
    condition=(ConditionTerm((1, None), 0.25), ConditionTerm((None, 3), 1.0, "on a täble")),
    mix="spherical",
    seeds=(7, 2**63 - 1),
    steps=20,
    solver="ddim",
    grid="leading",
    guidance_scale=3.5,
    guidance_interval=(0.1, 0.9),
    format="webp",
    previews=5,
    caller="key:bob",
    priority="high",
    created_at=1_700_000_000.5,
    deadline_at=1_700_000_010.25,
    allow_degraded=False,
    min_steps=4,
    rung="dpmpp-2m-8",
    reason="load",
    cost_rows=320,
    trace={"traceparent": "00-1-2-01"},
    size=(32, 48),
    vocabulary="0123456789abcdef",
    windows=3,
    floor_rows=64,
    requested=FULL,
    admitted=HALF,
)
COMPOSED_JOB = replace(
    FULL_JOB,
    condition=(ConditionTerm((1, None), 1.5), ConditionTerm((None, 3), -0.5)),
    mix="compose",
    requested=replace(FULL, guidance_decay=0.75),
    admitted=replace(HALF, guidance_decay=0.75),
    negative_prompt="a blürred picture",
    min_quality=0.5,
    callback_url="https://hooks.example.org/dit?id=1",
)
STITCHED_JOB = replace(
    FULL_JOB,
    admitted=replace(HALF, stretches=(Stretch(0.5, "student", 0.25, guided=False), Stretch(0.25, "light"))),
)
PICTURE_JOB = replace(
    FULL_JOB,
    requested=replace(FULL, strength=0.25),
    admitted=replace(HALF, strength=0.25),
    source=SourcePicture(b"\x89PNG image", b"\x89PNG mask", 0.25),
)
ADAPTED_JOB = replace(
    FULL_JOB, adapters=(AdapterUse("noir", -0.5, "0123456789abcdef"), AdapterUse("pixel-art", 0.8, "feed"))
)
RESULT = JobResult(
    images=(Image(b"\x89PNG", 7, "image/png"), Image(b"\x00\xff", 8, "image/png")),
    steps_requested=20,
    steps_used=8,
    solver="dpmpp-2m",
    rung="dpmpp-2m-8",
    degraded=True,
    reason="load",
    timings_ms={"queue": 1.5, "denoise": 250.0, "decode": 3.0, "encode": 2.25},
    attempt=2,
    worker="w1",
    backbones=("student", "light"),
    denoised_at=1_700_000_002.5,
    bundle="fedcba9876543210",
)
STATE = WorkerState(
    worker="w1",
    models=("emoji",),
    max_rows=64,
    step_fixed_s=0.01,
    step_per_row_s=0.002,
    decode_s=0.005,
    running_samples=3,
    backlog_rows=120,
    last_step_age_s=0.25,
    updated_at=1_700_000_001.0,
    network=Network("onnx", "int8", 8),
    dues=(DemandBucket(1_700_000_010.25, 80, 32), DemandBucket(inf, 40, 40)),
    bundle="fedcba9876543210",
    given_rows=500,
    slow=(SlowSpell(1.0, 2.5), SlowSpell(4.0, 1.25)),
    hang_s=200.0,
    batch_rows=24,
    adapters=(LoadedAdapter("noir", "0123456789abcdef", 8), LoadedAdapter("pixel-art", "feed", 4)),
)
STARTING = Starting("w2", "emoji", "warming up")
SNAPSHOT = Snapshot(
    rung=HALF,
    scale=3.5,
    timesteps=(900, 600, 300),
    previous=950,
    cursor=1,
    taken=3,
    degraded=True,
    reason="load",
    latent=np.arange(12, dtype=np.float32).reshape(3, 2, 2),
    history=-np.arange(12, dtype=np.float32).reshape(3, 2, 2),
    noise=(1, 2, 3, 4, 5, 6, 7, 8, 9, 2**64 - 1, 4, 0, 0),
)
FINISHED = Finished(
    id="job-2/1/1",
    latent=np.full((3, 2, 2), 0.5, np.float32),
    steps_used=8,
    rung=HALF,
    degraded=True,
    reason="load",
    queue_ms=1.5,
    denoise_ms=250.0,
)
SAMPLES: list[Any] = [SNAPSHOT, FINISHED, None]
