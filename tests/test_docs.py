"""The documents: links lead somewhere, commands exist with the flags shown, and README stays short."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from ditserve.service.__main__ import COMMANDS, TOOLS
from ditserve.service.settings import Settings

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "model/zoo").glob("*/README.md")]
)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
FLAGS = {f"--{name.replace('_', '-')}" for name in Settings.model_fields} | {"--help", "--print-config"}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def links(text: str) -> Iterator[str]:
    """Yield the targets of Markdown links, images and HTML sources that are files here."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose):
        path = next(filter(None, target))
        if not re.match(r"[a-z]+:|#", path):
            yield path.partition("#")[0]


def commands(text: str) -> Iterator[list[str]]:
    """Yield the command lines of fenced `sh` blocks as words, comments and continuations resolved."""
    for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s(?:&&|\|)\s", line):
                try:
                    yield shlex.split(part, comments=True)
                except ValueError:  # a program in quotes over several lines
                    continue


def modules(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (module, flags) of every `python -m` of ours, in blocks and in prose."""
    inline = [part.split() for part in re.findall(r"`([^`\n]*python -m [^`\n]*)`", text)]
    for words in [*commands(text), *inline]:
        for position, word in enumerate(words[:-1]):
            if word == "-m" and words[position + 1].partition(".")[0] in (
                "bench",
                "export",
                "model",
                "service",
            ):
                rest = words[position + 2 :]
                yield words[position + 1], [flag.partition("=")[0] for flag in rest if flag.startswith("--")]


def source(module: str) -> str:
    """Return the text of a module, or of all files of a package that can be run."""
    path = ROOT / module.replace(".", "/")
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py").read_text()
    assert (path / "__main__.py").is_file(), f"there is no command {module}"
    return "".join(file.read_text() for file in path.glob("*.py"))


def shared_options(text: str) -> str:
    """Return the text of the functions `add_…_options` of other modules that a command calls."""
    found = []
    for module, names in re.findall(r"^from ditserve\.(\S+) import (\([^)]*\)|.*)$", text, re.MULTILINE):
        for name in re.findall(r"\badd_\w+_options\b", names):
            _, _, after = source(module).partition(f"\ndef {name}(")
            assert after, f"{module} has no {name}"
            found.append(after.partition("\n\n\n")[0])
    return "".join(found)


def taken(flag: str, text: str) -> bool:
    """Tell whether a command takes a flag: it is written out, or made of a name in a loop over names."""
    return f'"{flag}"' in text or ('f"--{' in text and f'"{flag[2:]}"' in text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_somewhere(document: Path) -> None:
    missing = [target for target in links(document.read_text()) if not (document.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_commands_exist_with_the_flags_that_are_shown(document: Path) -> None:
    for module, flags in modules(document.read_text()):
        text = source(module)
        if module == "service":
            text += source("service.client.cli") + source("service.api_keys")
        text += shared_options(text)
        unknown = [flag for flag in flags if flag not in FLAGS and not taken(flag, text)]
        assert unknown == [], f"python -m {module} has no {', '.join(unknown)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_commands_of_the_service_and_targets_of_make_exist(document: Path) -> None:
    for words in commands(document.read_text()):
        if words[:1] == ["make"]:
            assert words[1:2] == [] or words[1] in TARGETS
        if "-m" in words[:-2] and words[words.index("-m") + 1] == "service":
            command = words[words.index("-m") + 2]
            assert command.startswith("-") or command in {*COMMANDS, *TOOLS, "dead"}


def test_readme_can_be_read_in_three_minutes() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 900


def test_the_glossary_has_at_most_25_words() -> None:
    glossary = (ROOT / "docs/architecture.md").read_text().partition("## Glossary")[2].partition("\n## ")[0]
    assert 10 <= len(re.findall(r"^\| ", glossary, re.MULTILINE)) - 1 <= 25


def test_the_checks_can_fail() -> None:
    assert list(links("see [there](nowhere.md) and [out](https://example.com)")) == ["nowhere.md"]
    shown = "```sh\n.venv/bin/python -m model.sample x --no-such 3  # comment\n```"
    assert list(modules(shown)) == [("model.sample", ["--no-such"])]
    assert not taken("--no-such", source("model.sample"))
    with pytest.raises(AssertionError, match=r"no command model\.nothing"):
        source("model.nothing")
