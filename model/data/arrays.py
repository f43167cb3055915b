"""Pictures in arrays: an .npz file, a folder of .npy files, or a folder with many of either."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ditserve.model.data.examples import DataError, Images
from ditserve.model.data.labels import Catalogue

LOCAL_HEADER = 30  # bytes before the name in a zip file, APPNOTE 4.3.7
OPTIONAL = ("groups", "captions")
SMALL = 1 << 16  # bytes that are read rather than mapped
READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

Arrays = Mapping[str, npt.NDArray[Any]]


class Shards:
    """Arrays one after another, as one; int64 index arithmetic only, nothing is read before it is asked for."""

    def __init__(self, parts: Sequence[Images]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part][index - (int(self.ends[part - 1]) if part else 0)]


def read_arrays(path: Path, *, captions: bool) -> tuple[Images, Catalogue]:
    """Arrays `x` uint8 (N, H, W, 3), `y` name index, `names`; optionally `s` and `styles`, `groups` per name, `captions`.

    `path` is an .npz, a folder of such .npy files, or a folder of shards in either form whose names and styles agree, in the
    order of their file names. Arrays on disk uncompressed (`np.savez`, `np.save`) are mapped and may exceed memory.

    Raises:
        DataError: a file that is damaged, lacks an array or has one of the wrong kind, or shards that disagree.
    """
    if path.is_dir() and not (path / "x.npy").is_file():
        files = sorted([*path.glob("*.npz"), *(file.parent for file in path.glob("*/x.npy"))])
    else:
        files = [path]
    _check_memory(files)
    parts = [_read(file, captions) for file in files]
    images, first = [part[0] for part in parts], parts[0][1]
    for file, (x, catalogue) in zip(files, parts, strict=True):
        if x.shape[1:] != images[0].shape[1:]:
            raise DataError(
                f"{file} holds pictures of {x.shape[1]}×{x.shape[2]}, but {files[0]} of {images[0].shape[1]}×{images[0].shape[2]}"
            )
        for field in ("names", "styles", "groups"):
            if getattr(catalogue, field) != getattr(first, field):
                raise DataError(f"{file} has other {field} than {files[0]}: shards of one set must agree")
    if len(parts) == 1:
        return images[0], first
    catalogues = [part[1] for part in parts]
    merged = replace(
        first,
        y=np.concatenate([each.y for each in catalogues]),
        s=np.concatenate([each.s for each in catalogues]),
        captions=tuple(caption for each in catalogues for caption in each.captions),
    )
    return Shards(images), merged


def _check_memory(files: Sequence[Path]) -> None:
    """Compressed arrays cannot be mapped; refuse those that memory cannot hold."""
    held = 0
    for file in files:
        with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(file) as archive:  # reading it says more
            held += sum(
                each.file_size for each in archive.infolist() if each.compress_type != zipfile.ZIP_STORED
            )
    if held > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2:
        raise DataError(
            f"{files[0]}: these compressed arrays take {held / 2**30:.0f} GiB of memory: write them with numpy.savez, which is mapped"
        )


def _read(file: Path, captioned: bool) -> tuple[npt.NDArray[np.uint8], Catalogue]:
    arrays = _load(file)
    missing = {"x", "y", "names"} - set(arrays)
    if missing:
        raise DataError(
            f"{file} lacks the array {sorted(missing)[0]!r}: it needs x (uint8 N,H,W,3), y and names"
        )
    x = arrays["x"]
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3:
        raise DataError(
            f"{file}: x must be uint8 (N, H, W, 3), pictures of one size, not {x.dtype} {x.shape}"
        )
    if not len(x):
        raise DataError(f"{file} holds no pictures")
    names, styles, groups = (_words(arrays, field) for field in ("names", "styles", "groups"))
    captions = (_words(arrays, "captions") or ("",) * len(x)) if captioned else ()
    y = _numbers(arrays, "y", file)
    s = _numbers(arrays, "s", file) if styles else np.zeros_like(y)
    needed = {
        "y": (y, len(x)),
        "s": (s, len(x)),
        "groups": (groups, len(names)),
        "captions": (captions, len(x)),
    }
    for field, (values, count) in needed.items():
        if len(values) not in (count, 0 if field in OPTIONAL else count):
            raise DataError(f"{file}: {field} has {len(values)} entries where {count} are needed")
    return x, Catalogue(y, names, s, styles, groups, captions)


def _words(arrays: Arrays, field: str) -> tuple[str, ...]:
    return tuple(str(word) for word in arrays[field]) if field in arrays else ()


def _numbers(arrays: Arrays, field: str, file: Path) -> npt.NDArray[np.int64]:
    array = arrays.get(field)
    if array is None or array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{file}: {field} must be integers (N,)")
    return array.astype(np.int64)


def _load(file: Path) -> Arrays:
    try:
        if file.is_dir():
            return {
                each.stem: np.load(each, mmap_mode="r", allow_pickle=False) for each in file.glob("*.npy")
            }
        with zipfile.ZipFile(file) as archive:
            return {
                member.filename.removesuffix(".npy"): _member(archive, member, file)
                for member in archive.infolist()
            }
    except (OSError, EOFError, KeyError, ValueError, struct.error, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{file} cannot be read as arrays: {error}") from None


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: Path) -> npt.NDArray[Any]:
    """One array of an .npz: mapped if it is stored as it is and worth it, else read."""
    if member.compress_type != zipfile.ZIP_STORED or member.file_size < SMALL:
        with archive.open(member) as stream:
            return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
    with file.open("rb") as raw:
        raw.seek(member.header_offset)
        lengths = raw.read(LOCAL_HEADER)[-4:]  # of the name and of the extra field that follow
        raw.seek(sum(struct.unpack("<HH", lengths)), os.SEEK_CUR)
        shape, fortran, dtype = READ_HEADER[np.lib.format.read_magic(raw)](raw)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds Python objects")
        return np.memmap(file, dtype, "r", raw.tell(), shape, "F" if fortran else "C")
