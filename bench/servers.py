"""The servers that are compared, each started as its users start it, on this machine, one at a time."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from ditserve.bench.adapters import ADAPTERS, Adapter
from ditserve.bench.consumption import family
from ditserve.bench.peers.options import Options
from ditserve.bench.site import free_port
from ditserve.model.spec.errors import ModelError

ROOT = Path(__file__).resolve().parent.parent
NICE = ("nice", "-n", "5", "env")  # of the two cores' tasks the generator comes first, or it would be late
READY_S, POLL_S, STOP_S = 180.0, 0.2, 15.0


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to serve: `command` with {port} and {python}, asked through the adapter of that name. `flags` are our service's; a
    peer has a `batch`, a wait and a cap instead."""

    name: str
    command: tuple[str, ...]
    adapter: str
    batch: int = 1
    wait_s: float = 0.02
    cap: int = 8
    graphs: bool = False  # a peer that runs our ONNX graphs
    grid: tuple[tuple[int, float], ...] = ()  # batches and waits to try

    @property
    def ours(self) -> bool:
        return self.command[:2] == ("-m", "service")


@dataclass(frozen=True, slots=True)
class Place:
    """What all arms are given: the folder `bench.peers.model` wrote, the peers' interpreter, and compute threads."""

    model: Path
    python: Path
    threads: int


@dataclass(frozen=True, slots=True)
class Serving:
    """A server that is up."""

    url: str
    pid: int
    adapter: Adapter


class ServerFailed(ModelError):
    """It did not come up; the message ends with what it said."""


OURS = (
    *("-m", "service", "--port={port}", "--bundle={bundle}", "--threads={threads}", "--log-level=warning"),
    "--canary-s=0",
)
GRAPHS = (*OURS, "--precision=fp32")
WAITS = ((1, 0.0), (4, 0.01), (4, 0.05), (8, 0.05))
# What BentoML waits for it chooses by itself; what is tuned is when it gives up.
PATIENCE = ((1, 60.0), (4, 10.0), (4, 60.0), (8, 60.0))

ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("planner", GRAPHS, "service"),
        Arm("EDF", GRAPHS, "service-undegraded"),
        Arm("step FIFO", GRAPHS, "service-undated"),
        Arm(
            "one at a time",
            (*GRAPHS, "--max-rows=1", "--lookahead-rows=0"),
            "service-undated",
        ),
        Arm("torch eager", (*OURS, "--backend=torch"), "service-undated"),
        Arm("torch compiled", (*OURS, "--backend=torch", "--compile"), "service-undated"),
        Arm("ONNX INT8", (*OURS, "--precision=int8"), "service-undated"),
        Arm(
            "diffusers + lock",
            ("-m", "uvicorn", "ditserve.bench.peers.locked:app", "--port={port}", "--log-level=warning"),
            "peer",
            grid=((1, 0.0),),
        ),
        Arm("LitServe", ("-m", "ditserve.bench.peers.litserve_server"), "peer", grid=WAITS),
        Arm(
            "BentoML",
            ("-m", "bentoml", "serve", "ditserve.bench.peers.bentoml_server:Drawing", "--port={port}"),
            "bentoml",
            wait_s=60.0,
            grid=PATIENCE,
        ),
        Arm("Ray Serve", ("-m", "ditserve.bench.peers.ray_server"), "ray", grid=WAITS),
        Arm(
            "LitServe + our ONNX",
            ("-m", "ditserve.bench.peers.litserve_server"),
            "peer",
            graphs=True,
            grid=WAITS,
        ),
    )
}


@asynccontextmanager
async def serving(arm: Arm, place: Place) -> AsyncIterator[Serving]:
    """A server that is ready; it and all it started are gone afterwards.

    Raises:
        ServerFailed: it ended, or was not ready in time.
    """
    port = free_port()
    url, adapter = f"http://127.0.0.1:{port}", ADAPTERS[arm.adapter]
    bundle = place.model / "bundle"
    with tempfile.TemporaryDirectory(prefix="dit-bench-") as name:
        folder = Path(name)
        options = Options(
            str(place.model),
            str(bundle) if arm.graphs else "",
            port,
            place.threads,
            arm.batch,
            arm.wait_s,
            arm.cap,
        )
        options.write(folder)
        words = [each.format(port=port, bundle=bundle, threads=place.threads) for each in arm.command]
        python = sys.executable if arm.ours else str(place.python.absolute())
        environment = [f"PYTHONPATH={ROOT}", "RAY_USAGE_STATS_ENABLED=0", "BENTOML_DO_NOT_TRACK=True"]
        log = folder / "log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *NICE, *environment, python, *words, cwd=folder, stdout=output, stderr=output
            )
        try:
            await _ready(url + adapter.ready, process, log)
            yield Serving(url, process.pid, adapter)
        finally:
            await _stop(process)


async def _ready(url: str, process: asyncio.subprocess.Process, log: Path) -> None:
    async with httpx.AsyncClient(trust_env=False) as http:
        for _ in range(round(READY_S / POLL_S)):
            if process.returncode is not None:
                break
            try:
                if (await http.get(url)).is_success:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(POLL_S)
    raise ServerFailed("the server did not become ready:\n" + _end(log))


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Ask it to end; after a while, end it and all that it started."""
    started = family(process.pid)
    if process.returncode is None:
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_S)
    except TimeoutError:
        process.kill()
    await process.wait()
    for pid in started[1:]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
