"""The command lines of export and model.convert: whatever is typed ends in a sentence and changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ditserve.export import half, int8, onnx, trt
from ditserve.export.golden import affordable_steps
from ditserve.model import convert
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.dit_config import published_config
from tests.export.tiny import graphs_of

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "export.onnx": onnx.main,
    "export.half": half.main,
    "export.int8": int8.main,
    "export.trt": trt.main,
    "model.convert": convert.main,
}
# Flags of each command that take a value; a value that is wrong for one is tried with all.
FLAGS = {
    "export.onnx": "--out --card --name --version --data --vae --weights --half --samples --steps --threads "
    "--golden",
    "export.half": "--precision --threads",
    "export.int8": "--target --weights --range --data --pictures --classifier --threads",
    "export.trt": "--precision --engines --backend --target --buckets --profiles --level --workspace-mib "
    "--progress",
    "model.convert": "--licence --function --heads --num-classes --size --classes --to",
}
VALUES = ["", " ", "-1", "0", "1e9", "nan", "inf", "ü", "a b", "..", "/", "/dev/null", "nowhere", "[1]", "{}"]
VALUES += ["%s", "--", "-", "\ud800", "x" * 300, "x/" * 3000, "a\0b", "9" * 30]
values = st.sampled_from(VALUES) | st.text(max_size=8)


def status(command: str, arguments: list[str]) -> int:
    """Return the exit status of a command, which argparse may also end."""
    try:
        return COMMANDS[command](arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("command", list(COMMANDS))
@given(data=st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_that_is_typed_ends_in_a_traceback(
    command: str, data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = FLAGS[command].split()
    positional = data.draw(st.lists(values, min_size=1, max_size=2))
    if command == "model.convert":
        positional = [data.draw(st.sampled_from(["import", "export"])), *positional]
    chosen = data.draw(st.lists(st.tuples(st.sampled_from(flags), values), max_size=4))
    arguments = [*positional, *(part for pair in chosen for part in pair)]
    assert status(command, arguments) in (1, 2)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out", "FILE"], "is a file: name a folder"),
        (["--out", "FOREIGN"], "did not write (mine.onnx)"),
        (["--out", "PARENT"], "contains the input"),
        (["--out", "BUNDLE/inside"], "lies in the input"),
        (["--out", "out", "--data", "out"], "is the input itself"),
        (["--out", "out", "--card", "FILE"], "Invalid JSON"),
        (["--out", "out", "--card", "nowhere"], "nowhere"),
        (["--out", "out", "--name", "ü"], "name"),
        (["--out", "out", "--version", "a b"], "version"),
        (["--out", "out", "--vae", "nowhere"], "nowhere"),
        (["--out", "out", "--samples", "0"], "must be at least 1"),
        (["--out", "out", "--samples", "1000000000"], "lower --samples or --steps"),
        (["--out", "out", "--steps", "-3"], "must be at least 1"),
        (["--out", "out", "--threads", "0"], "must be at least 1"),
    ],
)
def test_an_export_is_refused_before_anything_is_computed(
    own_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("kept")
    (tmp_path / "FOREIGN").mkdir()
    (tmp_path / "FOREIGN/mine.onnx").write_text("kept")
    monkeypatch.setattr("ditserve.export.onnx.calibration_rows", lambda *_: pytest.fail("computed"))
    places = {"PARENT": str(tmp_path), "BUNDLE/inside": f"{own_bundle}/inside"}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert status("export.onnx", [str(own_bundle), *(places.get(flag, flag) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_bundle_exported_in_its_own_place_keeps_what_others_left_there(
    tiny_bundle: Path, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditserve.export.onnx.write_graphs", graphs_of(tiny_bundle))
    kept = ("notes.txt", "mine.onnx", "mine.onnx.data")
    for name in kept:
        (own_bundle / name).write_text("kept")
    (own_bundle / "backbone.int8.onnx").write_text("of other weights")
    command = [str(own_bundle), "--out", str(own_bundle), "--half", "none", "--golden", "none"]
    assert onnx.main([*command, "--samples", "1", "--steps", "10"]) == 0
    assert all(
        (own_bundle / name).read_text() == "kept" for name in ("notes.txt", "mine.onnx", "mine.onnx.data")
    )
    manifest = Bundle.open(own_bundle).manifest
    assert not {"backbone.int8.onnx", "golden.png", "mine.onnx"} & manifest.files.keys()
    assert manifest.golden is None


def test_an_import_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/weights.safetensors").write_text("kept")
    (tmp_path / "names").write_bytes(b"\xff\xfe")
    (tmp_path / "dit.pt").touch()
    monkeypatch.setattr("ditserve.model.convert.read_weights", lambda *_: pytest.fail("read"))
    source = str(tmp_path / "dit.pt")
    for target, flags, words in [
        ("foreign", [], "did not write (weights.safetensors)"),
        ("dit.pt", [], "is the input itself"),
        ("new", ["--classes", str(tmp_path / "names")], "is no text in UTF-8"),
    ]:
        arguments = ["import", source, str(tmp_path / target), "--licence", "MIT", *flags]
        assert convert.main(arguments) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "foreign/weights.safetensors").read_text() == "kept"


def test_weights_never_overwrite_a_file(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = own_bundle.parent / "mine.pt"
    file.write_text("kept")
    assert convert.main(["export", str(own_bundle), str(file), "--to", "official"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert file.read_text() == "kept"


def test_the_golden_image_of_a_large_model_is_bounded() -> None:
    assert affordable_steps(published_config("DiT-XL/2"), 1.5) == 4
    assert affordable_steps(published_config("DiT-B/2"), 1.5) > 20
    assert affordable_steps(published_config("DiT-XL/2", image_size=(256, 256)), 1.0) == 1
