"""The service as a user runs it: `python -m service` with the shipped bundle, real sockets and real kills."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.zoo import FLAGSHIP
from tests.service.queue.servers import free_port

ROOT = Path(__file__).parent.parent
MANIFEST = Bundle.open(FLAGSHIP, verify=False).manifest
SIDE = MANIFEST.config.image_size[0] * MANIFEST.upscale  # pixels
APPLE = {"condition": {"label": "red-apple", "style": "noto"}, "seed": 7, "steps": 10}


def wait_until(condition: Callable[[], Any], what: str, *, timeout_s: float = 120.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if found := condition():
                return found
        time.sleep(0.02)
    raise AssertionError(f"waited {timeout_s:.0f} s for {what}")


def children_of(pid: int) -> dict[int, str]:
    """Process id → command line of every descendant."""
    found: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if parent == pid:
                found |= {int(entry.name): command, **children_of(int(entry.name))}
    return found


class Service:
    """A running `python -m service` and a client of it."""

    def __init__(self, log: Path, *flags: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DIT_") and k != "REDIS_URL"}
        command = [sys.executable, "-m", "service", "--port", str(port), "--threads", "1", *flags]
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        self.client = httpx.Client(base_url=self.url, timeout=120)
        try:
            wait_until(lambda: self.alive() and self.client.get("/readyz").status_code == 200, "/readyz")
        except AssertionError:
            self.process.kill()
            raise AssertionError(f"the service did not become ready:\n{log.read_text()}") from None

    def alive(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"the service ended with {self.process.returncode}:\n{self.log.read_text()}")
        return True

    def generate(self, **body: Any) -> dict[str, Any]:
        answer = self.client.post("/generate", json={**APPLE, **body})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def worker(self) -> int:
        return next(
            pid
            for pid, command in children_of(self.process.pid).items()
            if "-m ditserve.service worker" in command
        )

    def stop(self) -> int:
        self.client.close()
        self.process.send_signal(signal.SIGINT)
        return self.process.wait()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    # Images are compared with those of a reference in the same precision.
    log = tmp_path_factory.mktemp("service") / "log.txt"
    running = Service(log, "--precision=fp32", "--trusted-proxies=127.0.0.1")
    yield running
    # One interrupt ends the supervisor with 0 and leaves no child behind.
    family = children_of(running.process.pid)
    assert len(family) >= 3  # Valkey, worker, API
    assert running.stop() == 0
    wait_until(
        lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), "the children to end", timeout_s=5
    )
    assert "Traceback" not in running.log.read_text()


def pixels(image: dict[str, Any] | bytes) -> npt.NDArray[np.int16]:
    raw = image if isinstance(image, bytes) else base64.b64decode(image["b64"])
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).astype(np.int16)


def test_a_png_of_a_red_apple(service: Service) -> None:
    answer = service.client.post("/generate", json={**APPLE, "steps": 20}, headers={"Accept": "image/png"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    picture = pixels(answer.content)
    assert picture.shape == (SIDE, SIDE, 3)
    middle = picture[SIDE * 7 // 16 : SIDE * 11 // 16, SIDE * 3 // 8 : SIDE * 5 // 8]
    red, green, blue = middle.reshape(-1, 3).mean(0)
    assert red > 130
    assert red > green + 60
    assert red > blue + 60
    assert picture[:4, :4].min() > 200  # a white corner


def test_json_tells_seed_steps_and_timings(service: Service) -> None:
    answer = service.generate(n=4)
    assert [image["seed"] for image in answer["images"]] == [7, 8, 9, 10]
    assert (answer["steps_requested"], answer["steps_used"], answer["degraded"]) == (10, 10, False)
    assert {"queue", "denoise", "decode", "encode"} <= set(answer["timings_ms"])
    pictures = [pixels(image) for image in answer["images"]]
    assert all(np.abs(pictures[0] - other).max() > 8 for other in pictures[1:])


def test_a_seed_means_an_image_alone_or_in_a_crowd(service: Service) -> None:
    alone = pixels(service.generate()["images"][0])

    async def crowd() -> list[Any]:
        async with httpx.AsyncClient(base_url=service.url, timeout=120) as client:
            bodies = [APPLE] + [
                {
                    "condition": {"label": k * 31},
                    "steps": 5 + 3 * k,
                    "guidance_scale": [1.0, 3.0][k % 2],
                    "sampler": ["ddim", "dpmpp-2m"][k % 2],
                }
                for k in range(6)
            ]
            answers = await asyncio.gather(*(client.post("/generate", json=body) for body in bodies))
            return [answer.json() for answer in answers]

    assert np.abs(pixels(asyncio.run(crowd())[0]["images"][0]) - alone).max() <= 1


def test_the_model_is_described(service: Service) -> None:
    model = service.client.get("/models").json()["models"][0]
    assert model["size"] == f"{SIDE}x{SIDE}"
    assert {factor["name"] for factor in model["factors"]} == {"label", "style"}
    assert "CC-BY-4.0" in model["licence"]
    assert "strawberry" in model["factors"][0]["classes"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"condition": {"label": "strawbery"}}, 422, "strawberry"),
        ({"condition": {"label": 100_000}}, 422, "label"),
        ({"condition": {"colour": "red"}}, 422, "colour"),
        ({"steps": 0}, 422, "steps"),
        ({"steps": "ten"}, 422, "steps"),
        ({"n": 1000}, 422, "n"),
        ({"sampler": "magic"}, 422, "ddim"),
        ({"stepz": 5}, 422, "stepz"),
        ({"format": "gif"}, 422, "format"),
        ({"seed": -1}, 422, "seed"),
    ],
)
def test_a_mistake_is_answered_with_a_problem_that_names_it(
    service: Service, body: dict[str, Any], status: int, words: str
) -> None:
    answer = service.client.post("/generate", json={**APPLE, **body})
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("application/problem+json")
    assert words in answer.text
    assert "Traceback" not in answer.text


def test_broken_and_huge_bodies_are_refused(service: Service) -> None:
    headers = {"Content-Type": "application/json"}
    assert service.client.post("/generate", content=b'{"steps": ', headers=headers).status_code == 400
    assert service.client.post("/generate", content=b" " * 10_000_000, headers=headers).status_code == 413


def test_metrics_count_what_happened(service: Service) -> None:
    service.generate()
    text = service.client.get("/metrics").text
    assert "dit_" in text
    images = [line for line in text.splitlines() if line.startswith("dit_images_total")]
    assert sum(float(line.split()[-1]) for line in images) >= 1


def test_a_short_request_does_not_wait_for_the_long_job_of_another_caller(service: Service) -> None:
    def seconds() -> float:
        began = time.monotonic()
        service.generate(steps=5)
        return time.monotonic() - began

    seconds()
    alone = min(seconds() for _ in range(3))
    with httpx.Client(
        base_url=service.url, headers={"X-Forwarded-For": "198.51.100.7"}, timeout=60
    ) as another:
        job = {**APPLE, "steps": 1000, "n": 4}
        accepted = another.post("/generate", json=job, headers={"Prefer": "respond-async"})
        place = accepted.headers["location"]
        wait_until(lambda: another.get(place).json()["state"] == "running", "the job to run")
        beside = min(seconds() for _ in range(3))
        assert another.get(place).json()["state"] == "running"
        assert another.delete(place).status_code == 200
    # Half of the machine, and a pass that another caller has begun: tens of times as long without shares.
    assert beside < 10 * alone


def test_a_killed_worker_loses_nothing(service: Service) -> None:
    expected = pixels(service.generate(steps=100)["images"][0])
    accepted = service.client.post(
        "/generate", json={**APPLE, "steps": 100}, headers={"Prefer": "respond-async"}
    )
    assert accepted.status_code == 202
    place = accepted.headers["location"]
    wait_until(lambda: service.client.get(place).json()["step"] > 0, "the first step")
    os.kill(service.worker(), signal.SIGKILL)
    wait_until(
        lambda: service.client.get(place).json()["state"] == "done", "the job to be done", timeout_s=90
    )
    job = service.client.get(place).json()
    assert job["attempt"] == 2
    assert np.abs(pixels(service.client.get(f"{place}/images/0").content) - expected).max() <= 1


def data_url(picture: npt.NDArray[Any]) -> str:
    file = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def test_an_edit_changes_as_much_as_its_strength_says_and_keeps_what_its_mask_keeps(service: Service) -> None:
    apple = pixels(service.generate(steps=20)["images"][0])
    # Green, and in another style.
    body = {
        "condition": {"label": "green-apple", "style": "twemoji"},
        "image": data_url(apple),
        "seed": 3,
        "steps": 20,
    }
    edits = [service.generate(**body, strength=strength) for strength in (0.1, 0.4, 1.0)]
    assert [edit["steps_used"] for edit in edits] == [2, 8, 20]
    assert [edit["steps_requested"] for edit in edits] == [2, 8, 20]
    changes = [float(np.abs(pixels(edit["images"][0]) - apple).mean()) for edit in edits]
    assert changes == sorted(changes)
    assert changes[0] < 0.3 * changes[-1]
    without = {name: value for name, value in body.items() if name != "image"}
    assert service.generate(**without)["images"][0]["b64"] != edits[-1]["images"][0]["b64"], "its metadata"
    np.testing.assert_array_equal(
        pixels(service.generate(**without)["images"][0]), pixels(edits[-1]["images"][0])
    )
    mask, half = np.zeros((SIDE, SIDE)), SIDE // 2
    mask[:, :half] = 255
    inpainted = pixels(service.generate(**body, mask=data_url(mask), strength=0.9)["images"][0])
    np.testing.assert_array_equal(inpainted[:, half:], apple[:, half:])
    assert np.abs(inpainted - apple)[:, :half].mean() > 10


def test_a_killed_worker_loses_no_edit(service: Service) -> None:
    apple = pixels(service.generate(steps=10)["images"][0])
    mask = np.zeros((SIDE, SIDE))
    mask[SIDE // 4 : SIDE * 3 // 4] = 255
    body = {**APPLE, "image": data_url(apple), "mask": data_url(mask), "strength": 0.8, "steps": 125}
    expected = pixels(service.generate(**body)["images"][0])
    accepted = service.client.post("/generate", json=body, headers={"Prefer": "respond-async"})
    place = accepted.headers["location"]
    job = wait_until(
        lambda: (found := service.client.get(place).json())["step"] > 0 and found, "the first step"
    )
    assert job["steps"] == 100
    os.kill(service.worker(), signal.SIGKILL)
    wait_until(
        lambda: service.client.get(place).json()["state"] == "done", "the job to be done", timeout_s=90
    )
    assert service.client.get(place).json()["attempt"] == 2
    np.testing.assert_array_equal(pixels(service.client.get(f"{place}/images/0").content), expected)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bundle", "no/such/folder"], "no/such/folder"),
        (["--steps", "5"], "--steps"),
        (["--port", "99999"], "port"),
    ],
)
def test_a_start_that_cannot_work_is_one_sentence(flags: list[str], words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_port_in_use_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "service", "--port", port]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert port in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_corrupt_bundle_is_one_sentence(tmp_path: Path) -> None:
    bundle = shutil.copytree(FLAGSHIP, tmp_path / "broken")
    manifest = json.loads((bundle / "manifest.json").read_text())
    name = next(iter(manifest["files"]))
    (bundle / name).write_bytes(b"x" * manifest["files"][name]["bytes"])
    command = [sys.executable, "-m", "service", "--bundle", str(bundle), "--port", str(free_port())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert name in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
