"""Every option of every command of `model`, with values that nobody means: refused in a sentence, or done."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditserve.model.data import emoji
from ditserve.model.evaluation.classifier_network import Classifier, ClassifierCard, save_classifier
from ditserve.model.spec.bundle import Bundle
from tests.model.train.training_cases import config_file, tiny_run

NASTY = [
    *("", " ", ".", "..", "0", "-1", "1.5", "1e9", "nan", "inf", "-inf", "²", "١"),
    *("9" * 12, "9" * 15, "9" * 400, "x" * 300, "ü x", "a,b=c", "=", "{}", "[]", "null", "\0"),
    *("/dev/null", "/proc/version", "file", "file/x.png", "x.png", "none.json", "label=cat", "label=,"),
    *("weight=nan", "999,5", "1/0", "0/1", "3x", "x3", "lr.x=1", "lr=[]", "batch=1e9", "model=1", "data=2"),
]
# What takes as long as the user asks for.
ENDLESS = {("model.evaluation.classifier", "epochs")}

# Commands that are refused after their options are read, because what they need is no part of a test.
REFUSED = {"model.scaling", "model.train.curve", "model.data latents"}

Arguments = list[str]


def commands(root: Path, bundle: Path) -> dict[str, Arguments]:
    """Return arguments with which each command works, or is refused after the options are read."""
    raw = tiny_run(root) | {"steps": 2}
    (root / "family.json").write_text(json.dumps({"train": "none.json", "models": {"a": {}}, "flops": 1e6}))
    manifest = Bundle.open(bundle).manifest
    card = ClassifierCard(image_size=(8, 8), widths=(4, 6), factors=manifest.factors)
    (root / "judge").mkdir()
    save_classifier(Classifier(card), root / "judge", card)
    config = config_file(raw, root)
    labels = np.array([[y, s] for y in range(5) for s in range(3) for _ in range(4)])
    np.savez(
        root / "drawn.npz",
        x=np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8),
        y=labels[:, 0],
        s=labels[:, 1],
        names=np.array(manifest.factors[0].classes),
        styles=np.array(manifest.factors[1].classes),
    )
    drawn = ["--data", "drawn.npz"]
    evaluated = [*drawn, "--classifier", "judge", "--out", "out", "--limit", "2", "--steps", "1"]
    small = ["--epochs", "1", "--widths", "2", "2"]
    return {
        "model.sample": [str(bundle), "--steps", "1", "-o", "sample.png"],
        "model.attention": [str(bundle), "-o", "attention.png"],
        "model.describe": [str(bundle)],
        "model.evaluate": [str(bundle), *evaluated],
        "model.evaluation.classifier": ["--config", config, *drawn, "--out", "new", *small],
        "model.prune": [str(bundle), "--data", "drawn.npz", "-o", "pruned", "--mlp", "0.5"],
        "model.scaling": ["family.json", "--out", "scaling"],
        "model.train": ["--config", config, "--dry-run"],
        "model.train.curve": ["none"],
        "model.data describe": ["set.npz"],
        "model.data latents": ["set.npz", "--autoencoder", "none", "--out", "latents"],
        "model.data emoji": [],
    }


class Read(Exception):
    """The parser of a command, thrown instead of reading its arguments."""


def options_of(main: Callable[[Arguments], int], words: Arguments) -> Iterator[argparse.Action]:
    """Yield what a command takes, read from its own parser."""

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise Read(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Read) as caught:
            main([])
    parser = caught.value.args[0]
    for word in words:
        parser = next(action.choices[word] for action in parser._actions if action.choices)
    yield from (action for action in parser._actions if action.nargs != 0)


NAMES = [
    *("model.sample", "model.attention", "model.describe", "model.evaluate", "model.evaluation.classifier"),
    *("model.prune", "model.scaling", "model.train", "model.train.curve"),
    *("model.data describe", "model.data latents", "model.data emoji"),
]


@pytest.mark.parametrize("name", NAMES)
def test_no_value_of_any_option_ends_in_a_traceback(
    name: str,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emoji, "build", lambda *_: None)
    (tmp_path / "file").touch()
    module, *words = name.split()
    base = commands(tmp_path, bundle)[name]
    spec = find_spec(f"ditserve.{module}")
    is_package = spec is not None and spec.submodule_search_locations is not None
    main = importlib.import_module(f"ditserve.{module}" + ".__main__" * is_package).main
    assert main([*words, *base]) == (2 if name in REFUSED else 0)
    for number, action in enumerate(options_of(main, words)):
        if (module, action.dest) in ENDLESS:
            continue
        # Every option gets half of the values, its neighbour the others.
        for value in NASTY[number % 2 :: 2]:
            values = [value] * (action.nargs if isinstance(action.nargs, int) else 1)
            flag = action.option_strings[-1:]
            typed = [*words, *base, *flag, *values] if flag else [*words, *values, *base[1:]]
            capsys.readouterr()
            try:
                status = main(typed)
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            assert status in (0, 2), typed
            error = capsys.readouterr().err
            assert "Traceback" not in error, typed
            assert status == 0 or f"python -m {module}" in error or f"{module}: " in error, typed
