"""Nothing here looks up or calls a host by itself: every connection of real processes is recorded.

`strace` records the system calls, so that no resolver and no library of C, Rust or Go can pass it by.
ONNX Runtime, where nothing tells it not to, looks up a host about nine seconds after its import: a process
that does so proves that the recording hears it, and says how long the others have to be silent.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image

from ditserve.model.spec.zoo import TINY
from tests.service.queue.servers import free_port
from tests.test_end_to_end import wait_until
from tests.tiny_pipelines import save_pipeline

ROOT = Path(__file__).parent.parent
TRACED = ["strace", "-f", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-s", "200"]
# In the background of a shell SIGINT is ignored, which a process hands down.
UNTOLD = """
import onnxruntime, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
print("imported", flush=True)
signal.pause()
"""
# Opens all parts of an imported pipeline, in their own code, and draws a row.
PIPELINE = """
import sys, numpy as np
from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends import load_backend, load_pipeline_texts
bundle = Bundle.open(sys.argv[1])
backend = load_backend("torch", bundle, threads=1)
text = load_pipeline_texts(bundle).encode("a red fox")
print(text.shape)
"""


def calls_out(trace: str) -> list[str]:
    """Return the calls that ask a resolver or reach another host."""
    out = []
    for line in trace.splitlines():
        port = re.search(r"sin6?_port=htons\((\d+)\)", line)
        host = re.search(r'inet_(?:addr\("|pton\(AF_INET6, ")([^"]+)"', line)
        far = host is not None and not re.match(r"127\.|::1$|::ffff:127\.", host[1])
        # Some machines resolve through a daemon.
        daemon = "resolve" in line and "AF_UNIX" in line
        if far or daemon or (port is not None and port[1] in ("53", "853")):
            out.append(line)
    return out


def databases(home: Path) -> list[str]:
    """Return the databases that the telemetry of ONNX Runtime has left in a home."""
    return [file.name for file in home.rglob("*onnxruntime*.db")]


class Recording:
    """A folder with the home of a user, the trace of one process tree, and what it printed."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.home, self.trace, self.log = folder / "home", folder / "trace", folder / "log"
        self.home.mkdir()
        # No variable of a CI, with which some libraries are silent by themselves.
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), "OMP_NUM_THREADS": "1"}

    @contextmanager
    def running(self, *words: str) -> Iterator[None]:
        """Run Python with `words` until the block ends; then stop it as Ctrl-C does."""
        with self.log.open("wb") as output:
            process = subprocess.Popen(
                [*TRACED, "-o", str(self.trace), sys.executable, *words],
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(120)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def run(self, *words: str) -> None:
        with self.log.open("wb") as output:
            command = [*TRACED, "-o", str(self.trace), sys.executable, *words]
            status = subprocess.run(
                command, cwd=ROOT, env=self.environment, stdout=output, stderr=output, check=False
            ).returncode
        assert status == 0, self.log.read_text()

    def databases(self) -> list[str]:
        return databases(self.home)


needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="strace is not installed; on Debian: apt-get install strace"
)


@needs_strace
def test_the_service_calls_nobody_while_the_bare_library_does(tmp_path: Path) -> None:
    port = free_port()
    service, bare = Recording(tmp_path / "service"), Recording(tmp_path / "bare")
    flags = [f"--bundle={TINY}", f"--port={port}", "--threads=1"]
    with service.running("-m", "service", *flags):
        wait_until(lambda: "is ready on" in service.log.read_text(), "the greeting", timeout_s=90)
        answer = httpx.post(
            f"http://127.0.0.1:{port}/generate", json={"condition": {}, "steps": 2}, timeout=60
        )
        assert answer.status_code == 200, answer.text
        with bare.running("-c", UNTOLD):
            wait_until(lambda: "imported" in bare.log.read_text(), "the import")
            telemetry = bare.databases()
            if telemetry:
                # By then the service has lived longer with its own import.
                wait_until(lambda: calls_out(bare.trace.read_text()), "a call of the library", timeout_s=60)
    assert calls_out(service.trace.read_text()) == []
    assert service.databases() == []
    if not telemetry:
        pytest.skip("silent; but no build of ONNX Runtime with telemetry is here, to prove what is heard")


def write_pictures(folder: Path) -> Path:
    for name, value in (("dark", 40), ("light", 200)):
        (folder / name).mkdir(parents=True)
        for k in range(4):
            Image.new("RGB", (16, 16), (value, value, 10 * k)).save(folder / name / f"{k}.png")
    return folder


def commands(tmp_path: Path) -> dict[str, list[list[str]]]:
    """Return what is run of each kind of work, at its smallest."""
    few = ["--samples", "1", "--steps", "2", "--ladder", "none", "--half", "none"]
    short = ["--device", "cpu", "--steps", "2", "--set", "data.size=16", "--set", "threads=1"]
    pictures, run, bundle = str(tmp_path / "pictures"), str(tmp_path / "run"), str(tmp_path / "imported")
    return {
        "export": [["-m", "export.onnx", str(TINY), "--out", str(tmp_path / "out"), *few]],
        "train": [["-m", "model.train", "--data", pictures, "--output", run, *short]],
        "sample": [["-m", "model.sample", str(TINY), "--steps", "2", "-o", str(tmp_path / "drawn.png")]],
        "import": [
            ["-m", "model.convert", "import", str(tmp_path / "pixart"), bundle, "--licence=x", "--tokens=12"],
            ["-c", PIPELINE, bundle],
        ],
    }


@needs_strace
@pytest.mark.parametrize("kind", ["export", "train", "sample", "import"])
def test_a_command_calls_nobody(kind: str, tmp_path: Path) -> None:
    if kind == "train":
        write_pictures(tmp_path / "pictures")
    if kind == "import":
        save_pipeline("pixart", tmp_path / "pixart")
    for number, words in enumerate(commands(tmp_path)[kind]):
        recording = Recording(tmp_path / f"recording-{number}")
        recording.run(*words)
        assert calls_out(recording.trace.read_text()) == []
        assert recording.databases() == []


# What imports ONNX Runtime, as it is started; its database of telemetry is there at once.
STARTS = {
    "a worker": ["-c", "import ditserve.service.backends.onnx"],
    "export": ["-m", "export.int8", "--help"],
    "model": ["-c", "import model.sample, onnxruntime"],
    "bench": ["-c", "import ditserve.bench.machine.operators"],
    "tests": ["-c", "import tests.conftest, onnxruntime"],
}


def test_telemetry_is_off_before_the_first_import(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install onnxruntime")
    left = {}
    for name, words in {"without us": ["-c", "import onnxruntime"], **STARTS}.items():
        home = tmp_path / name
        home.mkdir()
        # Builds are silent by themselves where they see the variables of a CI.
        variables = {"PATH": os.environ["PATH"], "HOME": str(home)}
        subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=variables, check=True, stdout=subprocess.DEVNULL
        )
        left[name] = databases(home)
    if not left.pop("without us"):
        pytest.skip("this build of ONNX Runtime has no telemetry: pip install 'onnxruntime>=1.32' on Linux")
    assert not any(left.values()), left


def test_the_record_tells_far_from_near() -> None:
    near = [
        'connect(3, {sa_family=AF_UNIX, sun_path="/var/run/nscd/socket"}, 110) = -1',
        'connect(8, {sa_family=AF_INET, sin_port=htons(8000), sin_addr=inet_addr("127.0.0.1")}, 16) = 0',
        "connect(8, {sa_family=AF_INET6, sin6_port=htons(80), sin6_flowinfo=htonl(0), "
        'inet_pton(AF_INET6, "::1", &sin6_addr), sin6_scope_id=0}, 28) = 0',
    ]
    far = [
        'connect(8, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("127.0.0.53")}, 16) = 0',
        'sendto(8, "", 0, 0, {sa_family=AF_INET, sin_port=htons(9), sin_addr=inet_addr("10.0.0.1")}, 16) = 1',
        "connect(8, {sa_family=AF_INET6, sin6_port=htons(443), sin6_flowinfo=htonl(0), "
        'inet_pton(AF_INET6, "2001:db8::1", &sin6_addr), sin6_scope_id=0}, 28) = -1',
        'connect(3, {sa_family=AF_UNIX, sun_path="/run/systemd/resolve/io.systemd.Resolve"}, 42) = 0',
    ]
    assert calls_out("\n".join([*near, *far])) == far
