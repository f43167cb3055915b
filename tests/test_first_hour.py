"""A stranger's first hour at toy size: a folder of pictures is trained on, judged, exported and served."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from ditserve.export import onnx
from ditserve.model import evaluate
from ditserve.model.evaluation import classifier
from ditserve.model.train import __main__ as train
from tests.test_end_to_end import Service

CLASSES = ("ant", "bee, honey bee", "cat", "dog", "elk", "fox")
FORMATS = ("png", "jpg", "webp", "gif", "bmp", *(["avif"] if features.check("avif") else []))
EACH = 7


def write_pictures(folder: Path) -> Path:
    """Write pictures of six colours in mixed formats and sizes, with a broken one and a hidden one."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        colour = 40 + 170 * np.array([number % 2, number // 2 % 2, number // 4 % 2])
        for k in range(EACH):
            size = (20 + 5 * k, 24 + 3 * number, 3)
            pixels = np.clip(colour + rng.normal(0, 20, size), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k}.{FORMATS[(k + number) % len(FORMATS)]}")
    whole = (folder / "cat" / "0.webp").read_bytes()
    (folder / "cat" / "cut.webp").write_bytes(whole[: len(whole) // 2])
    (folder / "cat" / "._0.webp").write_bytes(whole)
    return folder


def test_from_a_folder_of_pictures_to_a_picture_over_http(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, run, bundle = write_pictures(tmp_path / "my pets"), tmp_path / "pets", tmp_path / "served"
    command = ["--data", str(pictures), "--output", str(run), "--device", "cpu", "--set", "threads=1"]
    short = ["--steps", "40", "--set", "data.size=16", "--set", "sheet_every=40"]
    assert train.main([*command, *short, "--dry-run"]) == 0
    assert "corrupt_limit" in (told := capsys.readouterr().out)
    assert "1 left out: hidden" in told
    assert train.main([*command, *short]) == 0
    assert (run / "sheet-0000040.png").is_file()
    capsys.readouterr()

    # The evaluation names the command that makes the judge it lacks.
    judged = [str(run), "--data", str(pictures), "--limit", "12", "--steps", "1"]
    assert evaluate.main(judged) == 2
    assert "python -m model.evaluation.classifier --config" in capsys.readouterr().err
    judge = ["--config", str(run / "config.json"), "--out", str(tmp_path / "judge"), "--epochs", "1"]
    assert classifier.main([*judge, "--widths", "4", "8"]) == 0
    assert evaluate.main([*judged, "--classifier", str(tmp_path / "judge")]) == 0
    assert json.loads((run / "evaluation.json").read_text())["pictures"]["generated"] == 12

    quick = ["--samples", "1", "--steps", "2", "--ladder", "none", "--half", "none"]
    assert onnx.main([str(run), "--out", str(bundle), *quick]) == 0
    service = Service(tmp_path / "log.txt", "--bundle", str(bundle), "--precision=fp32")
    try:
        for condition in ({"label": "honey bee"}, {"label": 1}):
            answer = service.client.post(
                "/generate",
                json={"condition": condition, "seed": 1, "steps": 3},
                headers={"accept": "image/png"},
            )
            assert answer.status_code == 200, answer.text
            with Image.open(io.BytesIO(answer.content)) as image:
                assert image.size == (16, 16)
                assert json.loads(image.info["condition"]) == {"label": "bee, honey bee"}
    finally:
        assert service.stop() == 0
