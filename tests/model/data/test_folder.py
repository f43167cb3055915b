"""Folders and archives as people have them: what is read, what is left out, and that every file is told."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, features

from ditserve.model.data import __main__ as data
from ditserve.model.data.dataset import DataConfig
from ditserve.model.data.examples import DataError
from ditserve.model.data.image_files import SUFFIXES, ImageFiles
from ditserve.model.data.sources import Source, read_source
from tests.model.data.data_forms import add, encoded, pictures

PNG = encoded(pictures()[0])
FOLDERS = ("", "cat", "dog", "cat/flat", "cat/shaded", "dog/flat", ".hidden", "dog/__MACOSX", "cat/@eaDir")
FILES = ("a.png", "b.PNG", "._a.png", "c.avif", "d.jfif", "noted", "e.psd", "Thumbs.db", "f.webp")


def lay(root: Path, *names: str) -> Path:
    """Write a PNG, whatever the name says, at each place below `root`; ".psd" gets other bytes."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"8BPS" if file.suffix == ".psd" else PNG)
    return root


def names_read(source: Source) -> list[str]:
    assert isinstance(source.data, ImageFiles)
    return [Path(name).relative_to(source.path).as_posix() for name in source.data.names]


def read_or_refuse(path: Path) -> Source | None:
    """Return the source, or None where there is no picture to read."""
    try:
        return read_source(path, check=None)
    except DataError as error:
        if "holds no pictures" in str(error) or "is no data set" in str(error):
            return None
        raise


@settings(max_examples=60, deadline=None)
@given(st.sets(st.tuples(st.sampled_from(FOLDERS), st.sampled_from(FILES)), min_size=1))
def test_pictures_read_and_pictures_left_out_are_all_that_are_there(places: set[tuple[str, str]]) -> None:
    # A hidden file without a picture's suffix is not counted: nobody misses a Thumbs.db.
    there = sum(
        Path(file).suffix.lower() in SUFFIXES
        or not (folder.rpartition("/")[2].startswith((".", "__", "@")) or file == "Thumbs.db")
        for folder, file in places
    )
    with TemporaryDirectory() as root:
        path = lay(Path(root), *(f"{folder}/{file}".lstrip("/") for folder, file in places))
        source = read_or_refuse(path)
        if source is None:
            return
        assert len(source.data) + source.left_out.counts.total() == there
        assert not any("._" in name or ".hidden" in name or "MACOSX" in name for name in names_read(source))


@settings(max_examples=40, deadline=None)
@given(st.sets(st.tuples(st.sampled_from(FOLDERS[1:]), st.sampled_from(FILES)), min_size=1))
def test_an_archive_tells_of_every_member(places: set[tuple[str, str]]) -> None:
    there = sum(
        Path(file).suffix.lower() in SUFFIXES
        or not (folder.rpartition("/")[2].startswith((".", "__", "@")) or file == "Thumbs.db")
        for folder, file in places
    )
    with TemporaryDirectory() as root:
        path = Path(root, "set.tar")
        with tarfile.open(path, "w") as archive:
            for folder, file in sorted(places):
                add(archive, f"./{folder}/{file}", PNG)
        source = read_or_refuse(path)
        if source is None:
            return
        assert len(source.data) + source.left_out.counts.total() == there


@pytest.mark.parametrize("suffix", [".avif", ".jfif", ".jpe", ".pgm", ".jp2", ".JPG", "", ".jpg_large"])
def test_a_picture_is_read_whatever_its_suffix(suffix: str, tmp_path: Path) -> None:
    kind = {".avif": "avif", ".pgm": "ppm", ".jp2": "jpeg2000"}.get(suffix, "jpeg")
    if kind == "avif" and not features.check("avif"):
        pytest.skip("Pillow lacks AVIF: install pillow from PyPI")
    out = io.BytesIO()
    Image.fromarray(pictures()[0]).convert("L" if kind == "ppm" else "RGB").save(out, kind)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"0{suffix}").write_bytes(out.getvalue())
    dataset = DataConfig(path=tmp_path, hold_out=0).open()
    assert dataset.labels.tolist() == [[0], [1]]
    assert dataset.left_out == ()


@pytest.mark.parametrize("stray", ["stats.npz", "backup.tar", "shot.png", "report.pdf", "c/.keep"])
def test_a_stray_beside_class_folders_changes_nothing_and_is_told(stray: str, tmp_path: Path) -> None:
    lay(tmp_path, "a/flat/0.png", "a/shaded/0.png", "b/flat/0.png", "b/shaded/0.png", "b/flat/._0.png")
    lay(tmp_path, stray) if stray.endswith(".png") else (tmp_path / stray).parent.mkdir(exist_ok=True)
    (tmp_path / stray).touch()
    dataset = DataConfig(path=tmp_path, hold_out=0).open()
    assert [factor.classes for factor in dataset.factors] == [("a", "b"), ("flat", "shaded")]
    assert len(dataset.labels) == 4
    told = "; ".join(dataset.left_out)
    assert "1 left out: hidden" in told
    assert stray.startswith("c") or "beside the class folders" in told or "not a picture" in told


def test_a_folder_behind_a_link_is_read_once(tmp_path: Path) -> None:
    lay(tmp_path / "store", "one/0.png", "one/1.png")
    root = lay(tmp_path / "set", "a/0.png", "b/0.png")
    for name in ("c", "d"):
        (root / name).symlink_to(tmp_path / "store" / "one")
    (root / "e").symlink_to(root / "a")
    (root / "a" / "9.png").symlink_to(tmp_path / "nowhere.png")
    source = read_source(root)
    assert names_read(source) == ["a/0.png", "b/0.png", "c/0.png", "c/1.png"]
    assert source.left_out.counts.total() == 2 + 2 + 1


def test_loose_pictures_that_hide_styles_are_told(tmp_path: Path) -> None:
    lay(tmp_path, "a/flat/0.png", "b/flat/0.png", "b/1.png")
    dataset = DataConfig(path=tmp_path, hold_out=0).open()
    assert [factor.name for factor in dataset.factors] == ["label"]
    assert "not read as styles, because b/1.png lies beside them" in dataset.left_out[-1]


def test_a_flat_folder_and_a_single_class_have_no_factors(tmp_path: Path) -> None:
    lay(tmp_path, "only/0.png", "only/1.png", "empty/notes.psd")
    for path in (tmp_path, tmp_path / "only"):
        dataset = DataConfig(path=path, hold_out=0).open()
        assert (dataset.factors, dataset.labels.shape) == ((), (2, 0))


def test_describe_counts_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay(tmp_path, "a/0.png", "b/0.png", "b/.trash/1.png", "x.png", "c/1.psd", "c/2.psd")
    assert data.main(["describe", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for line in ("2 left out: not a picture (.psd)", "1 left out: hidden", "1 left out: loose beside", "'c'"):
        assert line in printed
    assert "1 without pictures: c" in printed


def rotated(kind: str, orientation: int, late: bool) -> bytes:
    """Return a picture of 6×4 whose Exif data say how to turn it; `late`: behind the pixels of a PNG."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    out = io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(out, kind, exif=exif)
    raw = out.getvalue()
    if not late:
        return raw
    start = raw.index(b"eXIf") - 4
    chunk = raw[start : start + 12 + int.from_bytes(raw[start : start + 4])]
    end = raw.index(b"IEND") - 4
    return raw[:start] + raw[start + len(chunk) : end] + chunk + raw[end:]


KINDS: Sequence[tuple[str, bool]] = [("jpeg", False), ("png", False), ("png", True), ("webp", False)]
KINDS = [*KINDS, ("tiff", False), *([("avif", False)] if features.check("avif") else [])]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "late"), KINDS)
def test_the_header_tells_the_size_of_the_upright_picture(
    kind: str, late: bool, orientation: int, tmp_path: Path
) -> None:
    file = tmp_path / f"0.{kind}"
    file.write_bytes(rotated(kind, orientation, late))
    images = ImageFiles((file,), np.array([[0, 0, -1]]), ("0",))
    assert images.size(0) == images[0].shape[:2] == ((6, 4) if orientation > 4 else (4, 6))
