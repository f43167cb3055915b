"""The same few pictures in every form of data set."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

NAMES, STYLES = ("apple", "bee", "cat"), ("flat", "shaded")
# Two pictures of each (name, style), in ImageFolder's order.
PAIRS = [(y, s) for y in range(3) for s in range(2) for _ in range(2)]
CAPTIONS = [f"a {STYLES[s]} {NAMES[y]}" for y, s in PAIRS]
KEYS = [f"{k:03d}" for k in range(len(PAIRS))]
CARD = {"licence": "CC0-1.0", "attribution": ["Nobody"]}


def pictures(height: int = 8, width: int = 8) -> npt.NDArray[np.uint8]:
    """Return 12 pictures, uint8 (12, H, W, 3), that differ everywhere."""
    return np.random.default_rng(0).integers(0, 256, (len(PAIRS), height, width, 3), np.uint8)


def encoded(picture: npt.NDArray[np.uint8], kind: str = "png") -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, kind)
    return out.getvalue()


def arrays(rows: slice = slice(None)) -> dict[str, npt.NDArray[np.generic]]:
    return {
        "x": pictures()[rows],
        "y": np.array([y for y, _ in PAIRS])[rows],
        "s": np.array([s for _, s in PAIRS])[rows],
        "names": np.array(NAMES),
        "styles": np.array(STYLES),
        "captions": np.array(CAPTIONS)[rows],
    }


def npz(root: Path) -> Path:
    np.savez(root / "set.npz", **arrays())  # type: ignore[arg-type]
    return carded(root / "set.npz", root / "set.json")


def npz_compressed(root: Path) -> Path:
    np.savez_compressed(root / "set.npz", **arrays())  # type: ignore[arg-type]
    return carded(root / "set.npz", root / "set.json")


def npz_shards(root: Path) -> Path:
    folder = root / "shards"
    folder.mkdir()
    for k, rows in enumerate((slice(0, 5), slice(5, 6), slice(6, None))):
        np.savez(folder / f"part-{k}.npz", **arrays(rows))  # type: ignore[arg-type]
    return carded(folder, folder / "card.json")


def npy(root: Path) -> Path:
    folder = root / "npy"
    folder.mkdir()
    for name, array in arrays().items():
        np.save(folder / f"{name}.npy", array)
    return carded(folder, folder / "card.json")


def folder(root: Path) -> Path:
    path = root / "folder"
    for key, (y, s), picture, caption in zip(KEYS, PAIRS, pictures(), CAPTIONS, strict=True):
        inner = path / NAMES[y] / STYLES[s]
        inner.mkdir(parents=True, exist_ok=True)
        (inner / f"{key}.png").write_bytes(encoded(picture))
        (inner / f"{key}.txt").write_text(caption + "\n")
    return carded(path, path / "card.json")


def tar(root: Path) -> Path:
    """Write two archives; the members of a sample are not in alphabetical order."""
    path = root / "tars"
    path.mkdir()
    for k, rows in enumerate((range(7), range(7, len(PAIRS)))):
        with tarfile.open(path / f"{k}.tar", "w") as archive:
            for row in rows:
                y, s = PAIRS[row]
                labels = json.dumps({"label": NAMES[y], "style": STYLES[s]}).encode()
                add(archive, f"deep/{KEYS[row]}.json", labels)
                add(archive, f"deep/{KEYS[row]}.png", encoded(pictures()[row]))
                add(archive, f"deep/{KEYS[row]}.txt", CAPTIONS[row].encode())
    return carded(path, path / "card.json")


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def carded(path: Path, card: Path) -> Path:
    card.write_text(json.dumps(CARD))
    return path


FORMS: dict[str, Callable[[Path], Path]] = {
    form.__name__: form for form in (npz, npz_compressed, npz_shards, npy, folder, tar)
}
