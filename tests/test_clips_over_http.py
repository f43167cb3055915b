"""Clips and stills of two models in one service: from the export to files that other programs play."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageSequence

from ditserve.export.block_cache import add_block_caches
from ditserve.export.calibrate import TrajectorySettings
from ditserve.export.ladder import LadderOptions
from ditserve.export.onnx import ExportOptions, export_bundle
from ditserve.model.nets.autoencoder import autoencoder_folder, open_decoder
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.small_autoencoder import (
    SmallAutoencoder,
    SmallAutoencoderConfig,
    save_small_autoencoder,
)
from ditserve.model.sampling.denoise import CachingDenoiser, Denoiser, Guidance, denoise
from ditserve.model.sampling.prompt import combine_conditions
from ditserve.model.spec.block_cache import BlockCache
from ditserve.model.spec.bundle import write_manifest
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.grids import noise_levels
from ditserve.model.spec.manifest import LatentSpec, RungSpec, StretchSpec
from ditserve.model.spec.solvers import step_table
from ditserve.model.spec.source import SourceLatent
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import LoadedModel
from ditserve.service.images import to_pixels
from tests.export.tiny import CONFIG, tiny_network, tiny_source
from tests.test_end_to_end import ROOT, Service, wait_until

Pixels = npt.NDArray[np.uint8]
STILL = replace(CONFIG, qk_norm=False, layout_rank=0, head_channels=0)
CLIP = replace(STILL, image_size=(6, 16, 16), rope=True, first_frame=True)
# Over latents, four of whose channels stand for 2×2 pixels.
LATENT = replace(CLIP, image_size=(6, 8, 8), patch_size=2, in_channels=4)
FIRST: Pixels = np.random.default_rng(2).integers(0, 256, (16, 16, 3)).astype(np.uint8)
BODY = {"model": "clips", "condition": {"label": "star"}, "seed": 5, "steps": 6, "guidance_scale": 3.0}


def export(folder: Path, config: DiTConfig, vae: Path | None = None, **manifest: Any) -> Path:
    described = tiny_source(replace(config, in_channels=3)).manifest.model_copy(
        update={**manifest, "config": config}
    )
    checked = type(described).model_validate(described.model_dump())
    options = ExportOptions(
        weights="fp32",
        half="none",
        trajectories=TrajectorySettings(samples=1, steps=10),
        vae=vae,
        ladder=LadderOptions("none"),
    )
    export_bundle(LoadedModel(tiny_network(config), checked), folder, options)
    return folder


def export_latent(folder: Path) -> Path:
    """Export clips of latents, whose autoencoder takes frame after frame."""
    autoencoder = folder.with_name("autoencoder")
    autoencoder.mkdir()
    torch.manual_seed(0)
    shape = SmallAutoencoderConfig(latent_channels=4, widths=(8,), blocks=(1,))
    save_small_autoencoder(autoencoder, SmallAutoencoder(shape), {})
    latents = LatentSpec(shift=(0.1, -0.2, 0.0, 0.3), scale=(1.0, 0.7, 1.2, 1.0), factor=2)
    diffusion = tiny_source(STILL).manifest.diffusion.model_copy(update={"clip_x0": False})
    described = {"decoder": "small", "latents": latents, "diffusion": diffusion}
    export(folder, LATENT, autoencoder, name="latent-clips", **described)
    # All that a request may be degraded to are 6 steps with a block cache.
    manifest = add_block_caches(folder, (2,))
    defaults = manifest.defaults
    rung = RungSpec(
        name="cached", solver=defaults.solver, steps=6, grid=defaults.grid, rows=7.0, quality=0.5,
        stretches=(StretchSpec(above=0.0, backbone="every-2"),),
    )  # fmt: skip
    write_manifest(folder, manifest.model_copy(update={"ladder": (rung,)}))
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "stills": export(tmp_path_factory.mktemp("stills") / "bundle", STILL, name="stills"),
        "clips": export(tmp_path_factory.mktemp("clips") / "bundle", CLIP, name="clips"),
        "latent-clips": export_latent(tmp_path_factory.mktemp("latent-clips") / "bundle"),
    }


@pytest.fixture(scope="module")
def service(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    log = tmp_path_factory.mktemp("service") / "log.txt"
    running = Service(log, f"--bundle={','.join(map(str, bundles.values()))}", "--precision=fp32")
    yield running
    assert running.stop() == 0
    assert "Traceback" not in log.read_text()


def drawn(service: Service, media_type: str, **fields: Any) -> bytes:
    answer = service.client.post("/generate", json={**BODY, **fields}, headers={"accept": media_type})
    assert (answer.status_code, answer.headers["content-type"]) == (200, media_type), answer.text
    return answer.content


def frames_of(data: bytes) -> tuple[Pixels, int]:
    """Return the frames of an animated picture, and the milliseconds that it plays."""
    with Image.open(io.BytesIO(data)) as image:
        frames = [(np.asarray(f.convert("RGB")), f.info["duration"]) for f in ImageSequence.Iterator(image)]
    return np.stack([pixels for pixels, _ in frames]), round(sum(duration for _, duration in frames))


def data_url(pixels: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@torch.no_grad()
def expected(bundle: Path, first: Pixels | None = None, cache: BlockCache | None = None) -> Pixels:
    """Return the frames that torch draws offline, where the network is told `first` and it is put back.

    With `cache` its first blocks run at some steps only.
    """
    model = load_model(bundle)
    assert isinstance(model.network, DiT)
    autoencoder = open_decoder(model.manifest, autoencoder_folder(bundle, None))
    embedding = model.network.embed(torch.tensor([[3, 2]]))
    conditions, source = combine_conditions([embedding], [1.0], "linear", 1), None
    if first is not None:
        frame = autoencoder.encode(torch.from_numpy(first).permute(2, 0, 1)[None] / 127.5 - 1)[0]
        clip = frame[:, None].expand(-1, 6, -1, -1)
        drawn = (torch.arange(6) > 0).float()[None, :, None, None].expand(1, *clip.shape[1:])
        source = SourceLatent(clip, drawn)
        conditions = conditions.begun(model.network, clip[:, 0])
    denoiser = Denoiser(model.network, model.schedule, conditions, Guidance(3.0))
    if cache is not None:
        denoiser = CachingDenoiser(model.network, model.schedule, conditions, Guidance(3.0), cache)
    defaults = model.manifest.defaults
    levels = noise_levels(defaults.grid, 6, model.schedule)
    clips = model.manifest.diffusion.clip_x0
    *_, x0 = denoise(
        denoiser, step_table(defaults.solver, levels, model.schedule), [5], clip_x0=clips, source=source
    )
    frames: Pixels = to_pixels(autoencoder.decode(x0).numpy())[0]
    if first is not None:
        frames[0] = first
    return frames


@pytest.mark.parametrize("model", ["clips", "latent-clips"])
def test_a_clip_is_served_as_it_is_sampled_offline(
    model: str, service: Service, bundles: dict[str, Path]
) -> None:
    frames, plays_ms = frames_of(drawn(service, "image/apng", model=model))
    assert (frames.shape, plays_ms) == ((6, 16, 16, 3), 750)
    assert np.abs(frames.astype(int) - expected(bundles[model])).max() <= 1
    for media_type in ("image/webp", "image/gif"):
        lossy, plays_ms = frames_of(drawn(service, media_type, model=model, fps=24))
        assert (lossy.shape, plays_ms) == (frames.shape, 250)
    with av.open(io.BytesIO(drawn(service, "video/mp4", fps=12)), "r") as container:
        video = container.streams.video[0]
        assert (len(list(container.decode(video))), video.average_rate) == (6, Fraction(12))


@pytest.mark.parametrize("first", [None, FIRST], ids=["", "first-frame"])
def test_a_clip_that_is_degraded_to_a_block_cache_is_the_one_drawn_offline(
    first: Pixels | None, service: Service, bundles: dict[str, Path]
) -> None:
    # 1,000 steps of so many take longer.
    body = {**BODY, "model": "latent-clips", "steps": 1000, "n": 16, "deadline_ms": 2000}
    body |= {} if first is None else {"image": data_url(first)}
    answer = service.client.post("/generate", json={**body, "format": "apng"})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert (told["rung"], told["backbones"], told["degraded"]) == ("cached", ["every-2"], True)
    assert told["steps_used"] == 6
    frames, _ = frames_of(base64.b64decode(told["images"][0]["b64"]))
    cache = BlockCache(blocks=1, every=2)
    exact = expected(bundles["latent-clips"], first, cache)
    assert np.abs(frames.astype(int) - exact).max() <= 1
    assert (exact != expected(bundles["latent-clips"], first)).mean() > 0.01


@pytest.mark.parametrize("model", ["clips", "latent-clips"])
def test_a_network_that_is_told_a_first_frame_draws_what_follows_it(
    model: str, service: Service, bundles: dict[str, Path]
) -> None:
    given, _ = frames_of(drawn(service, "image/apng", model=model, image=data_url(FIRST)))
    np.testing.assert_array_equal(given[0], FIRST)
    assert np.abs(given.astype(int) - expected(bundles[model], FIRST)).max() <= 1
    # Another picture of the same class and seed, right after it, begins another clip.
    other, _ = frames_of(drawn(service, "image/apng", model=model, image=data_url(FIRST // 2)))
    assert (given[1:] != other[1:]).mean() > 0.1


def test_a_clip_may_be_longer_and_larger(service: Service) -> None:
    asked: list[tuple[dict[str, Any], tuple[int, ...]]] = [
        ({"frames": 8, "size": "20x16", "model": "latent-clips"}, (8, 16, 20, 3)),
        ({"frames": 10}, (10, 16, 16, 3)),
        ({"frames": 12, "windows": True}, (12, 16, 16, 3)),
        ({"frames": 3, "size": "32x16"}, (3, 16, 32, 3)),
    ]
    for fields, shape in asked:
        frames, _ = frames_of(drawn(service, "image/apng", **fields))
        assert frames.shape == shape
    still = Image.open(io.BytesIO(drawn(service, "image/webp", frames=1)))
    assert (still.size, getattr(still, "n_frames", 1)) == ((16, 16), 1)


def test_stills_are_drawn_beside_clips_and_keep_their_formats(service: Service) -> None:
    clips = {model["name"]: model for model in service.client.get("/models").json()["models"]}
    assert [clips[name]["kind"] for name in ("stills", "clips")] == ["picture", "clip"]
    still = Image.open(io.BytesIO(drawn(service, "image/png", model="stills")))
    assert still.size == (16, 16)
    refused = service.client.post("/generate", json={**BODY, "model": "stills", "frames": 2})
    assert refused.status_code == 422
    assert "frames: This model makes pictures" in refused.json()["detail"]


def test_a_clip_is_drawn_again_where_its_worker_died_and_stills_go_on(service: Service) -> None:
    long = {
        **BODY, "steps": 700, "frames": 24, "previews": 40, "format": "apng", "image": data_url(FIRST)
    }  # fmt: skip
    job = service.client.post("/generate", json=long, headers={"prefer": "respond-async"}).json()
    wait_until(lambda: state_of(service, job)["step"] > 0, "the first step", timeout_s=60)
    os.kill(worker_of(service, job), signal.SIGKILL)
    drawn(service, "image/png", model="stills", steps=6)
    wait_until(lambda: state_of(service, job)["state"] == "done", "the clip", timeout_s=120)
    assert state_of(service, job)["attempt"] == 2
    again, _ = frames_of(service.client.get(job["links"]["images"][0]).content)
    alone, _ = frames_of(drawn(service, "image/apng", **{**long, "previews": 0}))
    np.testing.assert_array_equal(again, alone)
    np.testing.assert_array_equal(again[0], FIRST)
    events = service.client.get(job["links"]["events"]).text
    assert '"content_type":"image/webp"' in events


def test_the_command_line_saves_a_clip(service: Service, tmp_path: Path) -> None:
    target = tmp_path / "star.gif"
    command = [sys.executable, "-m", "service", "generate", "star", "--model=clips", "--steps=4", "--fps=10"]
    done = subprocess.run(
        [*command, f"--url={service.url}", "-o", str(target)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(target)), done.stderr
    frames, plays_ms = frames_of(target.read_bytes())
    assert (len(frames), plays_ms) == (6, 600)
    with Image.open(target) as image:
        written = json.loads(image.info["comment"])
    assert (written["frames"], written["fps"], written["steps"]) == ("6", "10.0", "4")


def worker_of(service: Service, job: dict[str, Any]) -> int:
    """Return the process that draws a job: its number is part of the worker's name."""
    with service.client.stream("GET", job["links"]["events"]) as stream:
        started = next(line for line in stream.iter_lines() if '"worker"' in line)
    return int(json.loads(started.removeprefix("data: "))["worker"].split("-")[-2])


def state_of(service: Service, job: dict[str, Any]) -> dict[str, Any]:
    return dict(service.client.get(job["links"]["self"]).json())
