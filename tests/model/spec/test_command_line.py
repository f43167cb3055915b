"""The end of commands, and their old names, which still run."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ditserve.model.spec.command_line import count, finite, guarded, named_path, picture_file, positive, share
from ditserve.model.spec.errors import ModelError

ROOT = Path(__file__).parent.parent.parent.parent


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize("error", [ModelError("a"), ValueError("a"), OSError("a")])
def test_an_error_of_the_user_is_one_sentence(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded("model.sample", raising(error)) == 2
    assert capsys.readouterr().err == "model.sample: a\n"


def test_a_path_that_cannot_be_used_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded("model.sample", lambda: print(tmp_path.read_text())) == 2
    assert capsys.readouterr().err == f"model.sample: {tmp_path} cannot be used: Is a directory\n"


def test_other_ends_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded("model.sample", lambda: None) == 0
    assert guarded("model.sample", raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "model.sample: cancelled\n"
    with pytest.raises(KeyError):
        guarded("model.sample", raising(KeyError("a fault of ours")))


def test_positive_numbers() -> None:
    assert positive("12") == 12
    for text in ("0", "-1", "1.5", "many", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="must be at least 1"):
            positive(text)


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (count, {"0": 0, "7": 7}, ["-1", "²", "9" * 400, ""]),
        (finite, {"-1.5": -1.5, "1e3": 1000.0}, ["nan", "inf", "many", ""]),
        (share, {"0": 0.0, "1": 1.0}, ["1.1", "-0.1", "nan"]),
        (named_path, {"a b": Path("a b")}, ["", " ", "\0"]),
        (
            picture_file,
            {"a/b.PNG": Path("a/b.PNG")},
            ["a", "a.txt", ".png", "/dev/null/a.png"],
        ),
    ],
)
def test_argument_types(read: Callable[[str], object], good: dict[str, object], bad: list[str]) -> None:
    assert {text: read(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            read(text)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("you tried to allocate 9 bytes")])
def test_too_little_memory_is_a_sentence(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded("model.sample", raising(error)) == 2
    assert capsys.readouterr().err.startswith("model.sample: a number is too large for this machine")
    with pytest.raises(RuntimeError):
        guarded("model.sample", raising(RuntimeError("a fault of ours")))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.port", "model.convert"),
        ("model.curve", "model.train.curve"),
        ("model.classifier", "model.evaluation.classifier"),
    ],
)
def test_an_old_name_runs_the_command_and_says_the_new_one(old: str, new: str) -> None:
    command = [sys.executable, "-m", old, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: python -m {new}")
    assert done.stderr == f"{old} is now {new}: run python -m {new}\n"
