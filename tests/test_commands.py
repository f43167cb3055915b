"""The command `ditserve`: one list of all that can be run, and messages that name commands by it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ditserve import __main__ as console
from ditserve import commands
from ditserve.bench import __main__ as bench
from ditserve.commands import COMMANDS, command_line

ROOT = Path(__file__).parent.parent
# Old names of others, and a writer of documents.
UNLISTED = {"model.classifier", "model.curve", "model.port", "service.settings"}


def runnable(*packages: str) -> set[str]:
    """Return the modules that end in `if __name__ == "__main__"`, as `python -m` names them."""
    found = set()
    for package in packages:
        for file in (ROOT / package).rglob("*.py"):
            if re.search(r"^if __name__ == ", file.read_text(), re.MULTILINE):
                name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
                found.add(name.removesuffix(".__main__"))
    return found


def test_the_list_holds_every_command() -> None:
    listed = {command.words.partition(" ")[0] for command in COMMANDS.values()}
    assert runnable("model", "export", "service") - UNLISTED == listed - {"bench"}
    benches = {name.removeprefix("bench.") for name in runnable("bench")} - {"bench"}
    assert set(bench.benchmarks()) == {name for name in benches if "." not in name}


def test_help_tells_of_each_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ditserve", "--help"])
    assert console.main() == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        assert [line for line in lines if re.match(rf"  {name} +{re.escape(command.summary)}$", line)]
    assert max(map(len, lines)) <= 100


def test_a_command_has_its_own_help() -> None:
    run = [sys.executable, "-m", "ditserve", "keys", "add", "--help"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m service keys add")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["srve"], "error: unknown command 'srve'; did you mean serve?\n"),
        (["xyzzy", "80"], "error: unknown command 'xyzzy'; ditserve --help lists them\n"),
    ],
)
def test_an_unknown_command_is_one_sentence(
    words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ditserve", *words])
    assert (console.main(), capsys.readouterr().err) == (2, sentence)


def test_a_fault_of_ours_is_not_told_as_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "broken", commands.Command("model.nothing", "", "train"))
    monkeypatch.setattr(sys, "argv", ["ditserve", "broken"])
    with pytest.raises(ImportError, match=r"ditserve\.model\.nothing"):
        console.main()


def test_commands_are_named_as_they_are_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command_line("export.half --precision fp16") == "python -m export.half --precision fp16"
    monkeypatch.setattr(commands, "IN_CHECKOUT", False)
    assert command_line("export.half --precision fp16") == "ditserve half --precision fp16"
    assert command_line("model.train.curve") == "ditserve curve"
    assert command_line("service") == "ditserve serve"
    assert command_line("service keys") == "ditserve keys"
    assert command_line("bench.ladder") == "ditserve bench ladder"


def named_in_code(text: str) -> list[str]:
    """Return the commands in string constants that are no docstrings."""
    tree = ast.parse(text)
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    texts = [node.value for node in constants if isinstance(node.value, str) and id(node) not in documents]
    return [found for text in texts for found in re.findall(r"python -m (?:model|export|service)\S*", text)]


def test_messages_name_commands_by_the_list() -> None:
    files = [file for package in ("model", "export", "service") for file in (ROOT / package).rglob("*.py")]
    found = {str(file.relative_to(ROOT)): named_in_code(file.read_text()) for file in files}
    # The head of docs/configuration.md, which is of the repository.
    allowed = {"service/settings.py": ["python -m service.settings", "python -m service"]}
    assert {name: names for name, names in found.items() if names} == allowed
    assert named_in_code('"""python -m model.x"""\nraise ValueError(f"{a}: python -m model.y")') == [
        "python -m model.y"
    ]
