"""Output folders: where a command may write, held by one process, and replaced as a whole.

A folder is written to only if it is new, empty, or an earlier output of the same kind. `KINDS` tells a kind
by the file that describes it, so that a folder from an earlier release is known too. While a process holds
the folder, the file `.ditserve` in it names the process and is locked. The system drops the lock of a process
that died. Files that no command wrote are never overwritten or deleted.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ditserve.model.spec.bundle import BUNDLE_FILES, MANIFEST, PARTS, Bundle
from ditserve.model.spec.errors import ModelError

MARKER = ".ditserve"
POLL_S = 0.2  # between looks at a folder that another process holds
BUNDLE, RUN, EVALUATION = "bundle", "training run", "report of an evaluation"
LATENTS, SCALING, CLASSIFIER = "set of latents", "scaling study", "classifier"
DIFFUSERS, ENGINES = "diffusers model", "set of engines"
AUTOENCODER_RUN = "autoencoder's training run"
# Kind of folder → the file that describes it, and fields that tell this file from others of its name. A
# folder is of the first kind that fits.
KINDS: dict[str, tuple[str, frozenset[str]]] = {
    AUTOENCODER_RUN: ("config.json", frozenset({"data", "output", "steps", "autoencoder"})),
    RUN: ("config.json", frozenset({"data", "output", "steps"})),
    BUNDLE: (MANIFEST, frozenset({"schema_version", "config", "diffusion"})),
    LATENTS: ("latents.json", frozenset({"schema_version", "autoencoder", "shards"})),
    SCALING: ("scaling.json", frozenset({"family", "looks"})),
    CLASSIFIER: ("classifier.json", frozenset({"image_size", "widths", "factors"})),
    DIFFUSERS: ("config.json", frozenset({"_class_name", "num_embeds_ada_norm"})),
    ENGINES: ("*/report.json", frozenset({"engines"})),
    EVALUATION: ("evaluation.json", frozenset({"model", "figures"})),
}
# A run whose configuration was moved away is told by its checkpoints.
CHECKPOINT = ("checkpoints/step-*/state.json", frozenset({"step", "skipped", "index"}))
# The report of an export is not listed in the manifest. A bundle that takes the place of another has its own.
REPLACED = BUNDLE_FILES | {"parity.json", *PARTS}


class OutputError(ModelError):
    """An output that must not be written; the message is one sentence that names the folder."""


@contextmanager
def claim(
    path: Path,
    *kinds: str,
    apart: tuple[Path, ...] = (),
    shared: bool = False,
    on_wait: Callable[[str], None] | None = None,
) -> Iterator[Path]:
    """Hold the output folder `path`, and yield it without links. It is made if it is missing.

    `kinds` are the kinds that it may be of; the first is that of a new folder. The inputs in `apart` must not
    contain it, nor lie in it. With `shared`, others that ask for it shared may write too. With `on_wait`,
    which is called with the name of who holds it, the folder is waited for. Folders that were made here and
    are still empty in the end are removed again.

    Raises:
        OutputError: the folder is foreign, of another kind, held by another process, or overlaps an input.
        OSError: it cannot be made or written.
    """
    folder = Path(os.path.realpath(path))
    if folder == folder.parent:
        raise OutputError(f"{path} is the root of all folders: choose another folder")
    _recover(folder)
    check_folder(path, *kinds, apart=apart)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder, kinds[0], shared=shared, on_wait=on_wait):
            yield folder
    finally:
        with suppress(OSError):
            for empty in made:
                empty.rmdir()


@contextmanager
def replacement(path: Path, kind: str, *, apart: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Hold the output folder `path`, and yield an empty folder beside it that takes its place in the end.

    After an error, `path` is as before. What other commands and the user keep in it moves along.

    Raises:
        OutputError, OSError: as `claim`.
    """
    with claim(path, kind, apart=apart) as folder:
        if folder.is_mount():
            raise OutputError(f"{path} is a mount point, which cannot be replaced: choose a folder inside it")
        scratch = _sibling(folder, "writing")
        _remove_leftover(scratch)
        scratch.mkdir()
        (scratch / MARKER).touch()
        try:
            yield scratch
            (scratch / MARKER).unlink(missing_ok=True)
            _swap(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def revision(path: Path) -> Iterator[Path]:
    """Hold the bundle `path`, and yield a copy of it that takes its place in the end.

    Raises:
        BundleError: `path` is no bundle.
        OutputError, OSError: as `claim`; or `path` is a further network in a bundle.
    """
    bundle = Bundle.open(path, verify=False)
    if bundle.whole is not None:
        raise OutputError(
            f"{path} is a further network of {bundle.whole}: "
            "change the bundle that it was made of, and add that anew"
        )
    with replacement(path, BUNDLE) as scratch:
        for name in {*bundle.manifest.files, *REPLACED, MANIFEST}:
            if (bundle.path / name).is_file():
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(bundle.path / name, scratch / name)
        yield scratch


def check_folder(path: Path, *kinds: str, apart: tuple[Path, ...] = ()) -> None:
    """Refuse an output folder that `claim` would refuse, except that nobody need hold it. Nothing is written.

    Raises:
        OutputError: the folder is a file, foreign, of another kind, or overlaps an input.
    """
    check_apart(path, *apart)
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputError(f"{path} is a file: name a folder to write")
    names = sorted(entry.name for entry in path.iterdir() if entry.name != MARKER)
    kind = kind_of(path)
    if kind is None and names:
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise OutputError(
            f"{path} holds files that ditserve did not write ({some}): choose a new or an empty folder"
        )
    if kind is not None and kind not in kinds:
        raise OutputError(f"{path} is a {kind}: choose another folder for the {kinds[0]}")


def check_apart(path: Path, *inputs: Path) -> None:
    """Refuse an output that is one of the inputs, lies in one, or contains one; links are followed.

    Raises:
        OutputError: they overlap.
    """
    output = Path(os.path.realpath(path))
    for source in inputs:
        real = Path(os.path.realpath(source))
        if output == real:
            raise OutputError(f"{path} is the input itself: choose another output")
        if real in output.parents:
            raise OutputError(f"the output {path} lies in the input {source}: choose another folder")
        if output in real.parents:
            raise OutputError(f"the output {path} contains the input {source}: choose another folder")


def check_new_file(path: Path) -> None:
    """Refuse an output file that is there already: nothing tells who wrote it.

    Raises:
        OutputError: there is something at `path`.
    """
    if path.exists() or path.is_symlink():
        raise OutputError(f"{path} is there already: choose another name, or remove it")


def kind_of(folder: Path) -> str | None:
    """Return the kind of an output folder; None if no command of ours wrote it."""
    marked = _fields(folder / MARKER).get("kind")
    return _described_kind(folder) or (marked if isinstance(marked, str) and marked in KINDS else None)


def _described_kind(folder: Path) -> str | None:
    for kind, (pattern, fields) in [*KINDS.items(), (RUN, CHECKPOINT)]:
        if any(fields <= _fields(file).keys() for file in folder.glob(pattern)):
            return kind
    return None


def _fields(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is none."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def _locked(
    folder: Path, kind: str, *, shared: bool, on_wait: Callable[[str], None] | None
) -> Iterator[None]:
    """Hold the lock of a folder, and name this process in its marker.

    The marker stays in the end only where no other file tells the kind of the folder.
    """
    marker = folder / MARKER
    with ExitStack() as stack:
        descriptor = _lock(marker, shared=shared, on_wait=on_wait)
        stack.callback(os.close, descriptor)
        owner = {"kind": kind, "pid": os.getpid(), "host": socket.gethostname()}
        _write(descriptor, owner)
        try:
            yield
        finally:
            if os.listdir(folder) == [MARKER] or _described_kind(folder):
                marker.unlink(missing_ok=True)
            else:
                _write(descriptor, {"kind": kind})


def _lock(marker: Path, *, shared: bool, on_wait: Callable[[str], None] | None = None) -> int:
    """Return the descriptor of the locked marker, after a wait for it if `on_wait` is given.

    Raises:
        OutputError: another process holds it, and it is not waited for.
    """
    told = ""
    while True:
        descriptor = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            # The owner may have deleted the marker between the two calls.
            if os.path.exists(marker) and os.path.samestat(os.fstat(descriptor), os.stat(marker)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            owner = _fields(marker)
            known = owner.keys() >= {"pid", "host"}
            name = f"process {owner['pid']} on {owner['host']}" if known else "another process"
            if on_wait is None:
                raise OutputError(
                    f"{marker.parent} is being written by {name}: wait for it, or choose another output"
                ) from None
            if name != told:
                on_wait(name)
                told = name
            time.sleep(POLL_S)
            continue
        os.close(descriptor)


def _write(descriptor: int, content: dict[str, Any]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(content) + "\n").encode(), 0)


def _sibling(folder: Path, purpose: str) -> Path:
    return folder.with_name(f".{folder.name}.{purpose}")


def _swap(scratch: Path, folder: Path) -> None:
    """Put `scratch` in the place of `folder`; what is not part of a bundle moves over."""
    for file in scratch.iterdir():
        if (folder / file.name).is_dir() and file.name not in PARTS:
            raise OutputError(f"{folder / file.name} is a folder where a file is to be written: move it away")
    shutil.copymode(folder, scratch)
    replaced = _sibling(folder, "replaced")
    folder.rename(replaced)
    try:
        scratch.rename(folder)
    except OSError:
        replaced.rename(folder)
        raise
    _carry_over(replaced, folder)


def _carry_over(replaced: Path, folder: Path) -> None:
    """Move what only `replaced` has into `folder`, unless it is part of a bundle; remove the rest."""
    for entry in list(replaced.iterdir()):
        known = entry.name in REPLACED | {MARKER} or (folder / entry.name).exists()
        if entry.name in PARTS:
            shutil.rmtree(entry)
        elif known and not entry.is_dir():
            entry.unlink()
        else:
            entry.rename(folder / entry.name)
    replaced.rmdir()


def _recover(folder: Path) -> None:
    """Finish what a process that died has left in the middle of `_swap`."""
    replaced = _sibling(folder, "replaced")
    if not (replaced / MARKER).is_file():
        return
    descriptor = _lock(replaced / MARKER, shared=False)
    try:
        if folder.exists():
            _carry_over(replaced, folder)
        else:
            replaced.rename(folder)
    finally:
        os.close(descriptor)


def _remove_leftover(scratch: Path) -> None:
    """Remove what a process that died was writing.

    Raises:
        OutputError: it was none of ours.
    """
    if scratch.exists() and not (scratch / MARKER).is_file():
        raise OutputError(f"{scratch} is in the way: move it, or choose another output")
    shutil.rmtree(scratch, ignore_errors=True)
