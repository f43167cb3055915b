"""The wheel, installed with its requirements alone in an environment of its own, away from the checkout.

The requirements are those of the extra that `make serve` installs. They are linked from this environment, and
pip, without an index, checks that nothing is missing. The text encoder comes beside them, without
what it asks for.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import httpx
import pytest
from PIL import Image

from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.zoo import EMOJI64, FLAGSHIP, ZOO
from tests.systemd_unit import exec_words
from tests.test_end_to_end import wait_until
from tests.test_packaging import closure

ROOT = Path(__file__).parent.parent
LARGEST_MB = 75
DATA = {".json", ".html", ".lua", ".onnx", ".safetensors", ".txt"}  # besides code


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    return next(folder.glob("*.whl"))


class Installed:
    """An environment with the wheel, a home, and a folder to work in."""

    def __init__(self, folder: Path, wheel: Path, *extras: str) -> None:
        self.folder, self.bin = folder / "else where", folder / "venv" / "bin"
        self.folder.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.bin.parent], check=True)
        self.packages = next(self.bin.parent.glob("lib/python*/site-packages"))
        for name in closure(*extras, "minilm"):
            for file in metadata.distribution(name).files or ():
                # Scripts name the interpreter of the environment that they were made in.
                if ".." not in file.parts:
                    target = self.packages / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.symlink_to(str(file.locate()))
        pip = [sys.executable, "-m", "pip", f"--python={self.bin / 'python'}", "--quiet"]
        wanted = f"{wheel}[{','.join(extras)}]" if extras else str(wheel)
        subprocess.run([*pip, "install", "--no-index", "--isolated", wanted], check=True)
        # Modules in the current folder that nothing of ours may import.
        for name in ("ditserve", "numpy", "random"):
            (self.folder / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
        self.environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.bin / "ditserve", *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel, "serve")


@pytest.fixture(scope="module")
def url(installed: Installed) -> Iterator[str]:
    """Run the command line of the systemd unit, `ditserve serve`, with a free port from its environment."""
    log, (program, *words) = installed.folder / "log.txt", exec_words()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [installed.bin / program, *words],
            cwd=installed.folder,
            env=installed.environment | {"DIT_PORT": "0", "DIT_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    try:
        wait_until(lambda: process.poll() is not None or "is ready on" in log.read_text(), "the greeting")
        found = re.search(r"is ready on (http://\S+)", log.read_text())
        assert found is not None, log.read_text()
        yield found[1]
        # As the unit reloads and stops it.
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "bundle unchanged" in log.read_text(), "the bundle to be opened anew")
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def test_the_wheel_holds_the_code_and_what_it_reads(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name) for name in archive.namelist()}
    code = {name for name in names if name.parts[0] == "ditserve"}
    assert {name.parts[0] for name in names - code} == {next(iter(names - code)).parts[0]}
    assert {name.suffix for name in code} - {".py"} == DATA | {".png"}
    assert {name.name for name in code if name.suffix == ".png"} == {"golden.png"}
    assert not [name for name in code if {"tests", "results", "docs"} & set(name.parts)]
    assert wheel.stat().st_size < LARGEST_MB * 10**6
    # All code, and all of each bundle that is read; none of the one that is for exercises alone.
    for package in ("model", "export", "service", "bench"):
        sources = {Path("ditserve") / file.relative_to(ROOT) for file in (ROOT / package).rglob("*.py")}
        assert sources <= code
    for folder in ZOO.iterdir():
        if (folder / "manifest.json").is_file():
            listed = {*Bundle.open(folder, verify=False).manifest.files, "manifest.json"}
            if folder in (EMOJI64, ZOO / "animated-emoji"):
                listed = set()
            own = Path("ditserve") / folder.relative_to(ROOT)
            assert {str(name.relative_to(own)) for name in code if name.is_relative_to(own)} == listed


def test_nothing_of_the_checkout_is_imported(installed: Installed) -> None:
    program = "import sys, ditserve.service.settings as s; print(s.__file__, *sys.path, sep='\\n')"
    done = subprocess.run(
        [installed.bin / "python", "-P", "-c", program],
        cwd=installed.folder,
        env=installed.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    file, *paths = done.stdout.splitlines()
    assert Path(file).is_relative_to(installed.packages)
    assert not [path for path in paths if path and Path(path).resolve().is_relative_to(ROOT)]
    assert not (installed.packages / "torch").exists()


def test_it_serves_the_shipped_model_from_any_folder(installed: Installed, url: str) -> None:
    factor = Bundle.open(FLAGSHIP, verify=False).manifest.factors[0]
    name = factor.classes[0].partition(",")[0]
    drawn = installed.run("generate", name, "--url", url, "--steps", "4", "-o", "drawn.png")
    assert (drawn.returncode, drawn.stdout.strip()) == (0, "drawn.png"), drawn.stderr
    with Image.open(installed.folder / "drawn.png") as image:
        assert image.format == "PNG"
        assert image.size[0] >= 32


def test_the_pages_come_along(url: str) -> None:
    for path in ("/", "/docs"):
        answer = httpx.get(f"{url}{path}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")


def test_it_tells_of_the_bundles_that_came_with_it(installed: Installed) -> None:
    listed = json.loads(installed.run("models", "--json").stdout)
    assert {Path(entry["folder"]).name for entry in listed} >= {FLAGSHIP.name}
    assert all(entry["state"].startswith("ready") for entry in listed)
    folder = next(entry["folder"] for entry in listed if Path(entry["folder"]).name == FLAGSHIP.name)
    assert installed.run("schema", folder).stdout.startswith("model")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train"], "ditserve train needs the package torch, which the extra train brings: "),
        (["export", "x"], "ditserve export needs the package torch, which the extra export brings: "),
        (
            ["schema", "."],
            ". is not a bundle: manifest.json is missing; pass a folder written by ditserve export",
        ),
    ],
)
def test_a_command_that_lacks_its_extra_says_which(
    words: list[str], sentence: str, installed: Installed
) -> None:
    done = installed.run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {sentence}")
    assert len(done.stderr.splitlines()) == 1


def test_help_of_an_installed_command_names_it_as_it_is_run(installed: Installed) -> None:
    assert installed.run("keys", "--help").stdout.startswith("usage: ditserve keys ")
    assert installed.run("api", "--help").stdout.startswith("usage: ditserve api ")
