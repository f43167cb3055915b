"""Output folders: foreign files stay to the byte, one process at a time, published as a whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditserve.model.spec.bundle import BUNDLE_FILES
from ditserve.model.spec.output_folder import (
    BUNDLE,
    EVALUATION,
    KINDS,
    MARKER,
    RUN,
    OutputError,
    check_apart,
    check_folder,
    check_new_file,
    claim,
    kind_of,
    replacement,
)

Tree = dict[str, bytes]


def tree(folder: Path) -> Tree:
    """Return all files below a folder by their path, and the targets of links."""
    return {
        str(path.relative_to(folder)): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def describe(folder: Path, kind: str) -> None:
    """Write the file that tells the kind of a folder."""
    pattern, fields = KINDS[kind]
    file = folder / pattern.replace("*", "some")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict.fromkeys(fields)))


def old_bundle(folder: Path) -> None:
    """Write a bundle with graphs that the next one lacks."""
    describe(folder, BUNDLE)
    for name in ("weights.safetensors", "backbone.onnx", "backbone.int8.onnx", "parity.json"):
        (folder / name).write_bytes(b"old")


# Names of our own files among those of others: in a foreign folder they are foreign too.
names = st.sampled_from(
    [*BUNDLE_FILES, "manifest.json", "config.json", "a.onnx", "b.onnx.data", "notes", ".hidden", "x/y"]
)
contents = st.sampled_from([b"", b"{}", b"[1]", b'{"name": "web app"}', b"\xff\x00"])


@given(st.dictionaries(names, contents, min_size=1), st.sampled_from(list(KINDS)))
@settings(deadline=None, max_examples=60)
def test_a_foreign_folder_is_refused_and_stays_to_the_byte(files: Tree, kind: str) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "out"
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        for hold in (claim, replacement):
            with pytest.raises(OutputError, match="did not write"), hold(folder, kind):
                raise AssertionError("held a foreign folder")
        assert tree(folder) == files
        assert os.listdir(parent) == ["out"]


@given(st.dictionaries(names, contents), st.booleans())
@settings(deadline=None, max_examples=60)
def test_what_others_keep_in_a_bundle_survives_its_replacement(files: Tree, fails: bool) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "bundle"
        old_bundle(folder)
        ours = BUNDLE_FILES | {"manifest.json"}
        foreign = {name: content for name, content in files.items() if name not in ours}
        for name, content in foreign.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        (folder / "link").symlink_to("nowhere")
        before = tree(folder)
        try:
            with replacement(folder, BUNDLE) as scratch:
                (scratch / "weights.safetensors").write_bytes(b"new")
                describe(scratch, BUNDLE)
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert tree(folder) == before
        else:
            after = tree(folder)
            assert {name: after[name] for name in (*foreign, "link")} == {**foreign, "link": b"nowhere"}
            assert after.keys() - foreign.keys() == {"weights.safetensors", "manifest.json", "link"}
        assert os.listdir(parent) == ["bundle"]


def test_each_kind_is_known_by_its_file(tmp_path: Path) -> None:
    for kind in KINDS:
        folder = tmp_path / kind
        describe(folder, kind)
        assert kind_of(folder) == kind
        with claim(folder, kind):
            assert (folder / MARKER).is_file()
        assert not (folder / MARKER).exists()
        other = EVALUATION if kind != EVALUATION else RUN
        with pytest.raises(OutputError, match=f"is a {kind}: choose another folder for the {other}"):
            check_folder(folder, other)


def test_a_bundle_in_the_folder_of_a_run_is_the_run(tmp_path: Path) -> None:
    describe(tmp_path, BUNDLE)
    describe(tmp_path, RUN)
    assert kind_of(tmp_path) == RUN


def test_an_unfinished_output_is_known_by_its_marker(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with claim(out, EVALUATION):
        (out / "part").touch()
    assert kind_of(out) == EVALUATION
    with claim(out, EVALUATION):
        pass
    with pytest.raises(OutputError, match="is a report of an evaluation"):
        check_folder(out, RUN)


def test_a_folder_that_stays_empty_is_not_left_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "out", RUN):
        raise ZeroDivisionError
    assert not (tmp_path / "out").exists()


def test_files_and_broken_places_are_refused_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(OutputError, match="is a file: name a folder"), claim(file, RUN):
        pass
    with pytest.raises(OutputError, match="is there already"):
        check_new_file(file)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"), claim(tmp_path / "loop", RUN):
        pass
    (tmp_path / ".out.writing").mkdir()
    (tmp_path / ".out.writing" / "mine").touch()
    with pytest.raises(OutputError, match="in the way"), replacement(tmp_path / "out", BUNDLE):
        pass
    assert (tmp_path / ".out.writing" / "mine").exists()
    assert file.read_text() == "kept"


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("data", "is the input itself"),
        ("data/class", "lies in the input"),
        ("link", "is the input itself"),
        ("link/new/deep", "lies in the input"),
        (".", "contains the input"),
        ("data/../data/x", "lies in the input"),
    ],
)
def test_an_output_apart_from_its_inputs(tmp_path: Path, output: str, words: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    with pytest.raises(OutputError, match=words):
        check_apart(tmp_path / output, tmp_path / "data")
    check_apart(tmp_path / "data2", tmp_path / "data")


def test_the_root_of_all_folders_is_no_output() -> None:
    with pytest.raises(OutputError, match="is the root"), claim(Path("/"), BUNDLE):
        pass


HOLDER = """
import sys
from pathlib import Path
from ditserve.model.spec.output_folder import BUNDLE, replacement
with replacement(Path(sys.argv[1]), BUNDLE) as scratch:
    (scratch / "weights.safetensors").write_bytes(b"half")
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_of_two_processes_is_refused_and_a_dead_owner_is_succeeded(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    old_bundle(out)
    before = tree(out)
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        with (
            pytest.raises(OutputError, match=f"being written by process {owner.pid} on "),
            claim(out, BUNDLE),
        ):
            raise AssertionError("held twice")
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    with replacement(out, BUNDLE) as scratch:
        assert os.listdir(scratch) == [MARKER]
        assert {name: content for name, content in tree(out).items() if name != MARKER} == before
        describe(scratch, BUNDLE)
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_folder_that_is_held_can_be_waited_for(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    old_bundle(out)
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        told: list[str] = []

        def on_wait(name: str) -> None:
            told.append(name)
            # The process ends, and with it the wait.
            assert owner.stdin is not None
            owner.stdin.close()

        with claim(out, BUNDLE, on_wait=on_wait) as folder:
            assert owner.wait() == 0
            assert (folder / "weights.safetensors").read_bytes() == b"half"
        assert len(told) == 1
        assert told[0].startswith(f"process {owner.pid} on ")


def test_a_death_in_the_middle_of_the_swap_is_mended(tmp_path: Path) -> None:
    out, replaced = tmp_path / "bundle", tmp_path / ".bundle.replaced"
    old_bundle(out)
    (out / "notes").write_text("kept")
    before = tree(out)
    out.rename(replaced)
    (replaced / MARKER).touch()
    with claim(out, BUNDLE):  # died before the new one was in place
        pass
    assert tree(out) == before
    out.rename(replaced)
    (replaced / MARKER).touch()
    describe(out, BUNDLE)
    with claim(out, BUNDLE):  # died before the user's files had moved
        pass
    assert (out / "notes").read_text() == "kept"
    assert os.listdir(tmp_path) == ["bundle"]
