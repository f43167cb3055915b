"""The examples and README's programs, run as they stand against a running service."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditserve.model.data.sources import read_source
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.zoo import FLAGSHIP
from tests.test_end_to_end import ROOT, SIDE, Service

PROGRAMS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("service") / "log.txt", "--precision=fp32")
    yield running
    running.stop()


def run(*words: str, folder: Path) -> list[str]:
    """Run a program with this checkout's packages in `folder`, and return the lines it printed."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def example(name: str, *arguments: str, folder: Path) -> list[str]:
    return run(str(ROOT / "examples" / name), *arguments, folder=folder)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text()
    assert [path.name for path in (ROOT / "examples").glob("*.py") if f'"{path.name}"' not in source] == []


def test_generate(service: Service, tmp_path: Path) -> None:
    lines = example("generate.py", "--url", service.url, folder=tmp_path)
    assert lines == ["strawberry-7.png", "strawberry-8.png", "20 of 20 steps"]
    assert size_of(tmp_path / "strawberry-8.png") == (SIDE, SIDE)


def test_openai_client(service: Service, tmp_path: Path) -> None:
    assert example("openai_client.py", "--url", service.url, folder=tmp_path) == ["openai.png"]
    assert size_of(tmp_path / "openai.png") == (SIDE, SIDE)


def test_stream_previews(service: Service, tmp_path: Path) -> None:
    lines = example("stream_previews.py", "--url", service.url, folder=tmp_path)
    assert lines[-1].startswith("done ")
    previews = sorted(path.name for path in tmp_path.glob("strawberry-step-*.png"))
    assert previews == [f"strawberry-step-{step:02}.png" for step in (5, 10, 15)]
    assert size_of(tmp_path / "strawberry.png") == (SIDE, SIDE)


def test_async_jobs(service: Service, tmp_path: Path) -> None:
    lines = example("async_jobs.py", "--url", service.url, folder=tmp_path)
    assert lines == ["strawberry done", "fox done", "rocket cancelled"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["fox.png", "strawberry.png"]


def test_edit_picture(service: Service, tmp_path: Path) -> None:
    example("edit_picture.py", "--url", service.url, "--edits", "cat-face:fox", folder=tmp_path)
    with Image.open(tmp_path / "edits.png") as sheet:
        pixels = np.asarray(sheet, np.float64)
    source, little, half, much, masked = np.split(pixels, 5, axis=1)
    away = [np.abs(edit - source).mean() for edit in (little, half, much)]
    assert 0 < away[0] < away[1] < away[2]
    np.testing.assert_array_equal(masked[SIDE // 2 :], source[SIDE // 2 :])
    assert np.abs(masked[: SIDE // 2] - source[: SIDE // 2]).mean() > away[0]


def test_bring_your_own_dit(tmp_path: Path) -> None:
    lines = example("bring_your_own_dit.py", "--steps", "10", folder=tmp_path)
    assert lines[-1] == 'wrote shapes: make serve ARGS="--bundle shapes"'
    assert (tmp_path / "shapes/backbone.onnx").is_file()


def test_emoji_folder(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "set.npz",
        x=np.zeros((3, 8, 8, 3), np.uint8),
        y=[0, 0, 1],
        s=[0, 1, 0],
        names=["fox", "flag"],
        groups=["Animals & Nature", "Flags"],
        styles=["fluent", "fluent-flat"],
    )
    assert example("emoji_folder.py", "set.npz", "out", folder=tmp_path) == ["2 pictures are in out"]
    source = read_source(tmp_path / "out")
    assert (source.catalogue.names, len(source.data), source.card.licence) == (("nature",), 2, "MIT")


def test_unseen_prompts(tmp_path: Path) -> None:
    captions = ["a fox\n\nfox, noto", "an owl", *(f"bee {k}\n\nbees {k}\nbee" for k in range(8))]
    np.savez(tmp_path / "set.npz", captions=captions)
    lines = example("unseen_prompts.py", "set.npz", "3", folder=tmp_path)
    assert lines == ["fox, noto", "bees 2", "bees 5"]
    assert len(example("unseen_prompts.py", "set.npz", "100", folder=tmp_path)) == 9


def test_handheld_style(tmp_path: Path) -> None:
    """Its classes are some of the shipped model, so that an adapter of that can be trained on them."""
    classes = Bundle.open(FLAGSHIP, verify=False).manifest.factors[0].classes
    count = len(classes)
    np.savez(
        tmp_path / "set.npz",
        x=np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), np.uint8),
        y=np.arange(count),
        s=np.ones(count, int),
        names=classes,
        styles=["noto", "fluent-flat"],
    )
    assert example("handheld_style.py", "set.npz", "out", folder=tmp_path) == ["20 pictures are in out"]
    source = read_source(tmp_path / "out")
    assert (len(source.catalogue.names), len(source.data), source.card.licence) == (20, 20, "MIT")
    picture = Image.open(next((tmp_path / "out").glob("*/picture.png")))
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) <= 4


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_of_the_readme(service: Service, tmp_path: Path, program: str) -> None:
    run("-c", program.replace("http://127.0.0.1:8000", service.url), folder=tmp_path)


def test_the_readme_shows_programs() -> None:
    assert len(PROGRAMS) == 2
