"""Pictures in arrays: an .npz file, a folder of .npy files, or a folder with many of either."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ditserve.model.data.examples import DataError, Images
from ditserve.model.data.folder import check_splits, count_pictures, is_hidden, visible
from ditserve.model.data.labels import Catalogue, LeftOut
from ditserve.model.spec.heap import memory_bytes
from ditserve.model.spec.sizes import size_name

LOCAL_HEADER = 30  # bytes before the name in a zip file, APPNOTE 4.3.7
OPTIONAL = ("groups", "captions")
SMALL = 1 << 16  # bytes; smaller arrays are read rather than mapped
READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

Arrays = Mapping[str, npt.NDArray[Any]]


class ConcatenatedImages:
    """Several sets of pictures, indexed as one. Nothing is read before it is asked for."""

    def __init__(self, parts: Sequence[Images]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part][index - (int(self.ends[part - 1]) if part else 0)]


def read_arrays(path: Path, *, captions: bool) -> tuple[Images, Catalogue, LeftOut]:
    """Read pictures and labels from the arrays at `path`.

    `path` is an .npz file, a folder of .npy files with the same names, or a folder of shards in either form.
    Shards are read in the order of their file names, and must agree in names, styles and groups. The arrays
    are `x` uint8 (N, H, W, 3), or (N, F, H, W, 3) of clips and volumes; `y` integer (N,) into `names`;
    optionally `s` integer (N,) into `styles`, `groups` per name, and `captions` (N,). Arrays stored without
    compression (`np.savez`, `np.save`) are mapped and may exceed memory.

    Raises:
        DataError: a file is damaged, an array is missing or of the wrong type or shape, or shards disagree
            or are named as splits.
    """
    if path.is_dir() and not (path / "x.npy").is_file():
        folders = [file.parent for file in path.glob("*/x.npy") if not is_hidden(file.parent.name)]
        files = sorted([*visible(path, "*.npz"), *folders])
        check_splits(path, [file.stem for file in files], "shards of one set")
    else:
        files = [path]
    _check_memory(files)
    images, catalogues = zip(*(_read(file, captions) for file in files), strict=True)
    left_out = LeftOut(Counter({"beside the arrays": count_pictures(path) if path.is_dir() else 0}))
    if len(files) == 1:
        return images[0], catalogues[0], left_out
    for file, x, catalogue in zip(files, images, catalogues, strict=True):
        if x.shape[1:] != images[0].shape[1:]:
            raise DataError(
                f"{file} holds pictures of {size_name(x.shape[1:-1], '×')}, "
                f"but {files[0]} of {size_name(images[0].shape[1:-1], '×')}"
            )
        for field in ("names", "styles", "groups"):
            if getattr(catalogue, field) != getattr(catalogues[0], field):
                raise DataError(f"{file} has other {field} than {files[0]}: shards of one set must agree")
    merged = replace(
        catalogues[0],
        y=np.concatenate([catalogue.y for catalogue in catalogues]),
        s=np.concatenate([catalogue.s for catalogue in catalogues]),
        captions=tuple(caption for catalogue in catalogues for caption in catalogue.captions),
    )
    return ConcatenatedImages(images), merged, left_out


def _check_memory(files: Sequence[Path]) -> None:
    """Refuse compressed arrays that would fill more than half of the memory: they cannot be mapped."""
    size = 0
    for file in files:
        # A file that cannot be opened is reported by the reader, which knows more about it.
        with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
            size += sum(
                member.file_size
                for member in archive.infolist()
                if member.compress_type != zipfile.ZIP_STORED
            )
    if size > memory_bytes() // 2:
        raise DataError(
            f"{files[0]}: these compressed arrays take {size / 2**30:.0f} GiB of memory: "
            "write them with numpy.savez, which is mapped"
        )


def _read(file: Path, captioned: bool) -> tuple[npt.NDArray[np.uint8], Catalogue]:
    arrays = _load(file)
    missing = {"x", "y", "names"} - set(arrays)
    if missing:
        raise DataError(
            f"{file} lacks the array {sorted(missing)[0]!r}: it needs x (uint8 N,H,W,3), y and names"
        )
    x = arrays["x"]
    if x.dtype != np.uint8 or x.ndim not in (4, 5) or x.shape[-1] != 3:
        raise DataError(
            f"{file}: x must be uint8 (N, H, W, 3), pictures of one size, or (N, F, H, W, 3), clips of one, "
            f"not {x.dtype} {x.shape}"
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
                array.stem: np.load(array, mmap_mode="r", allow_pickle=False) for array in file.glob("*.npy")
            }
        with zipfile.ZipFile(file) as archive:
            return {
                member.filename.removesuffix(".npy"): _load_member(archive, member, file)
                for member in archive.infolist()
            }
    except (OSError, EOFError, KeyError, ValueError, struct.error, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{file} cannot be read as arrays: {error}") from None


def _load_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: Path) -> npt.NDArray[Any]:
    """Load one array of an .npz: map it if it is uncompressed and large, else read it."""
    if member.compress_type != zipfile.ZIP_STORED or member.file_size < SMALL:
        with archive.open(member) as stream:
            return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
    with file.open("rb") as raw:
        raw.seek(member.header_offset)
        # The header ends with the lengths of the name and of the extra field, which follow it.
        lengths = raw.read(LOCAL_HEADER)[-4:]
        raw.seek(sum(struct.unpack("<HH", lengths)), os.SEEK_CUR)
        shape, fortran, dtype = READ_HEADER[np.lib.format.read_magic(raw)](raw)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds Python objects")
        return np.memmap(file, dtype, "r", raw.tell(), shape, "F" if fortran else "C")
