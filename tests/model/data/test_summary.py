"""`python -m model.data describe`: the summary that a user reads before training on a set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditserve.model.data import __main__ as data
from tests.model.data.data_forms import FORMS, pictures


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("form", FORMS)
def test_a_set_is_described_and_nothing_is_written(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = FORMS[form](tmp_path)
    before = files(tmp_path)
    assert data.main(["describe", str(path)]) == 0
    printed = capsys.readouterr().out
    for fact in (
        "pictures  12: 8×8 (12)",
        "names     3",
        "styles    2",
        "crossed   3",
        "captions  12 of 12",
        "CC0-1.0",
    ):
        assert fact in printed
    assert files(tmp_path) == before


def test_broken_pictures_and_sizes_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = FORMS["folder"](tmp_path)
    (folder / "bee" / "flat" / "004.png").write_bytes(b"nothing")
    Image.new("RGB", (20, 30)).save(folder / "bee" / "flat" / "005.png")
    assert data.main(["describe", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "8×8 (10), 30×20 (1)" in printed
    assert "broken    1" in printed
    assert "004.png" in printed


def test_data_that_cannot_be_trained_on_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(
        tmp_path / "set.npz",
        x=pictures(),
        y=np.zeros(12, int),
        s=np.zeros(12, int),
        names=np.array(["only"]),
        styles=np.array(["flat", "shaded"]),
    )
    assert data.main(["describe", str(tmp_path / "set.npz")]) == 2
    printed = capsys.readouterr()
    assert "names     1: 12 of 'only'" in printed.out
    assert "no class remains" in printed.err


def test_a_contact_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.png"
    assert data.main(["describe", str(FORMS["npz"](tmp_path)), "--sheet", str(sheet)]) == 0
    with Image.open(sheet) as image:
        assert image.size == (12 * 64, 64)
    with pytest.raises(SystemExit, match="2"):
        data.main(["describe", str(tmp_path / "set.npz"), "--sheet", str(tmp_path / "sheet")])
    assert "--sheet: must end in .png" in capsys.readouterr().err
