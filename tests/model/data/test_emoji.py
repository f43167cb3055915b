"""The emoji set, built offline from tarballs like those of the registry."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditserve.model.data import __main__ as data
from ditserve.model.data.dataset import DataConfig
from ditserve.model.data.emoji import ICON_SETS, KEYWORDS, NAMES, IconSet, render

EMOJI = {
    "🍎": {"name": "red apple", "slug": "red_apple", "group": "Food & Drink"},
    "🐝": {"name": "honeybee", "slug": "honeybee", "group": "Animals & Nature"},
    "🇫🇷": {"name": "flag France", "slug": "france", "group": "Flags"},
}


def icon(colour: str) -> dict[str, Any]:
    return {"body": f'<rect x="8" y="8" width="16" height="16" fill="{colour}"/>'}


def pack(folder: Path, icons: IconSet, name: str, content: dict[str, Any]) -> None:
    raw = json.dumps(content).encode()
    package = icons.package.lstrip("@").replace("/", "-")
    with tarfile.open(folder / f"{package}-{icons.version}.tgz", "w:gz") as archive:
        member = tarfile.TarInfo(f"package/{name}")
        member.size = len(raw)
        archive.addfile(member, io.BytesIO(raw))


@pytest.fixture
def tarballs(tmp_path: Path) -> Path:
    """Tarballs in which every style draws the apple red; only the first has the bee, by an alias."""
    pack(tmp_path, NAMES, "data-by-emoji.json", EMOJI)
    pack(tmp_path, KEYWORDS, "dist/emoji-en-US.json", {"🍎": ["red_apple", "fruit", ":)"], "🐝": ["insect"]})
    for k, icon_set in enumerate(ICON_SETS):
        icons = {
            "red-apple": icon("red"),
            "france": icon("blue"),
            **({"bee": icon("yellow")} if k == 0 else {}),
        }
        aliases = {"honeybee": {"parent": "bee"}} if k == 0 else {}
        pack(
            tmp_path, icon_set, "icons.json", {"icons": icons, "aliases": aliases, "width": 32, "height": 32}
        )
    return tmp_path


def test_every_style_is_rendered_with_its_names_and_groups(tarballs: Path) -> None:
    target = tarballs / "out" / "set.npz"
    assert data.main(["emoji", "--size", "16", "--out", str(target), "--tarballs", str(tarballs)]) == 0
    with np.load(target) as arrays:
        assert arrays["x"].shape == (len(ICON_SETS) + 1, 16, 16, 3)
        assert list(arrays["names"]) == ["honeybee", "red-apple"]
        assert list(arrays["groups"]) == ["Animals & Nature", "Food & Drink"]
        assert list(arrays["styles"]) == [icon_set.style for icon_set in ICON_SETS]
        apple = arrays["x"][arrays["y"] == 1]
        captions = [caption.splitlines() for caption in arrays["captions"]]
    assert all("red apple" in lines or "honeybee" in lines for lines in captions)
    assert any("fruit" in line for lines in captions for line in lines)
    assert (apple[:, 0, 0] == 255).all()  # white around
    assert (apple[:, 8, 8] == [255, 0, 0]).all()
    card = target.with_suffix(".md").read_text()
    assert all(icons.licence in card and icons.package in card for icons in ICON_SETS)
    # The bee is not drawn in every style.
    dataset = DataConfig(path=target, hold_out=0).open()
    assert [factor.name for factor in dataset.factors] == ["style"]
    assert "of classes that are not there in every style" in dataset.left_out[0]


def test_licence_and_credits_reach_the_data_set(tarballs: Path) -> None:
    target = tarballs / "set.npz"
    icons = {"red-apple": icon("red"), "honeybee": icon("blue")}
    for icon_set in ICON_SETS:
        pack(tarballs, icon_set, "icons.json", {"icons": icons})
    assert data.main(["emoji", "--size", "16", "--out", str(target), "--tarballs", str(tarballs)]) == 0
    dataset = DataConfig(path=target, hold_out=0).open()
    assert dataset.licence == "Apache-2.0 AND CC-BY-4.0 AND MIT"
    assert len(dataset.attribution) == len(ICON_SETS)
    assert all(any(icons.credit in line for line in dataset.attribution) for icons in ICON_SETS)


def test_a_drawing_that_is_not_square_is_centred(tarballs: Path) -> None:
    wide = {"body": '<rect width="32" height="16" fill="red"/>', "height": 16}
    pack(tarballs, ICON_SETS[0], "icons.json", {"icons": {"red-apple": wide}, "width": 32, "height": 32})
    target = tarballs / "set.npz"
    assert data.main(["emoji", "--size", "16", "--out", str(target), "--tarballs", str(tarballs)]) == 0
    with np.load(target) as arrays:
        picture = arrays["x"][0]
    assert (picture[:4] == 255).all()
    assert (picture[4:12] == [255, 0, 0]).all()
    assert (picture[12:] == 255).all()


def test_edges_are_smooth() -> None:
    circle = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="32" height="32">'
        '<circle cx="16" cy="16" r="13"/></svg>'
    )
    assert len(np.unique(render(circle, 16))) > 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "iconify-json-noto-1.2.9.tgz").unlink(),
            "iconify-json-noto-1.2.9.tgz is missing",
        ),
        (lambda folder: (folder / "iconify-json-noto-1.2.9.tgz").write_bytes(b"no"), "is damaged"),
    ],
)
def test_a_missing_or_damaged_package_is_named(
    tarballs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    spoil: Any,
    message: str,
) -> None:
    monkeypatch.setenv("PATH", "")
    spoil(tarballs)
    assert (
        data.main(["emoji", "--size", "16", "--out", str(tarballs / "x.npz"), "--tarballs", str(tarballs)])
        == 2
    )
    assert message in capsys.readouterr().err


def test_an_absurd_size_is_refused(tarballs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["emoji", "--size", "4", "--tarballs", str(tarballs)]) == 2
    assert "8..512" in capsys.readouterr().err
