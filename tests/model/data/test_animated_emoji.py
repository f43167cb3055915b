"""The set of animated emoji, built offline from tarballs like those of the registry."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditserve.model.data import __main__ as data
from ditserve.model.data.animated_emoji import PACKAGES, STYLES
from ditserve.model.data.dataset import DataConfig
from ditserve.model.data.emoji import NAMES, IconSet
from ditserve.model.data.examples import DataError

EMOJI = {
    "👋": {"name": "waving hand", "slug": "waving_hand", "group": "People & Body"},
    "☄️": {"name": "comet", "slug": "comet", "group": "Travel & Places"},
    "🐝": {"name": "honeybee", "slug": "honeybee", "group": "Animals & Nature"},
}


def animation(colours: list[tuple[int, int, int, int]]) -> bytes:
    """Return a WebP of one-coloured frames, a tenth of a second each."""
    frames = [Image.new("RGBA", (32, 32), colour) for colour in colours]
    file = io.BytesIO()
    more = {"save_all": True, "append_images": frames[1:], "duration": 100} if len(frames) > 1 else {}
    frames[0].save(file, "WEBP", lossless=True, **more)
    return file.getvalue()


def pack(folder: Path, package: IconSet, files: dict[str, bytes]) -> None:
    name = package.package.lstrip("@").replace("/", "-")
    with tarfile.open(folder / f"{name}-{package.version}.tgz", "w:gz") as archive:
        for file, content in files.items():
            member = tarfile.TarInfo(f"package/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def tarballs(tmp_path: Path) -> Path:
    """Tarballs of a hand in two tones, a comet, a bee that stands still, and an emoji without a name."""
    greys = [(20 * k, 20 * k, 20 * k, 255) for k in range(10)]
    pack(tmp_path, NAMES, {"data-by-emoji.json": json.dumps(EMOJI).encode()})
    drawn = [
        {"assets/1f44b.webp": animation(greys), "README.md": b"no drawing"},
        {"assets/1f44b-1f3fe.webp": animation(greys[::-1])},
        {"assets/2604.webp": animation([(255, 0, 0, 25 * k) for k in range(10)])},
        {"assets/1f41d.webp": animation(greys[:1]), "assets/1f9ff.webp": animation(greys)},
    ]
    for package, files in zip(PACKAGES, drawn, strict=True):
        pack(tmp_path, package, files)
    return tmp_path


def build(tarballs: Path, *options: str) -> Path:
    target = tarballs / "out" / "clips.npz"
    line = ["animated-emoji", "--size", "16", "--out", str(target), "--tarballs", str(tarballs), *options]
    assert data.main(line) == 0
    return target


def test_clips_are_spread_over_the_whole_animation(tarballs: Path) -> None:
    with np.load(build(tarballs, "--frames", "5")) as arrays:
        assert arrays["x"].shape == (3, 5, 16, 16, 3)
        assert arrays["names"].tolist() == ["comet", "waving-hand"]
        assert arrays["styles"].tolist() == list(STYLES)
        drawn = {
            (str(arrays["names"][y]), STYLES[s]): clip
            for y, s, clip in zip(arrays["y"], arrays["s"], arrays["x"], strict=True)
        }
    assert drawn.keys() == {("waving-hand", "default"), ("waving-hand", "medium-dark"), ("comet", "default")}
    assert drawn["waving-hand", "default"][:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160]
    assert drawn["waving-hand", "medium-dark"][:, 0, 0, 0].tolist() == [180, 140, 100, 60, 20]
    # What is transparent is white.
    assert drawn["comet", "default"][:, 8, 8].tolist() == [
        [255, 255 - 50 * k, 255 - 50 * k] for k in range(5)
    ]


def test_the_card_tells_the_pace_and_the_licence(tarballs: Path) -> None:
    target = build(tarballs, "--frames", "5")
    card = json.loads(target.with_suffix(".json").read_text())
    assert (card["first_axis"], card["fps"], card["licence"]) == ("frames", 5.0, "MIT")
    assert all("Microsoft" in credit for credit in card["attribution"])
    assert "3 clips of 5 frames, 16×16" in target.with_suffix(".md").read_text()
    # The same set may be built again, in other sizes too.
    build(tarballs, "--frames", "4")


def test_clips_are_batches_of_five_dimensions(tarballs: Path) -> None:
    path = build(tarballs, "--frames", "5")
    dataset = DataConfig(path=path, size=8, crossed=False, hold_out=0, flip=True).open()
    assert (dataset.size, dataset.channels, dataset.first_axis, dataset.fps) == ((5, 8, 8), 3, "frames", 5.0)
    batch = dataset.batch(np.arange(3), np.random.default_rng(0))
    assert batch.shape == (3, 3, 5, 8, 8)
    assert -1 <= batch.min() < batch.max() <= 1
    with pytest.raises(
        DataError, match=r"field size: 4x8x8 is for clips of 4 frames, and .* holds clips of 5"
    ):
        DataConfig(path=path, size=(4, 8, 8), crossed=False).open()


def test_three_axes_of_no_known_meaning_are_refused(tarballs: Path) -> None:
    path = build(tarballs, "--frames", "5")
    path.with_suffix(".json").unlink()
    with pytest.raises(DataError, match=r"clips\.json: field first_axis: say what the first"):
        DataConfig(path=path, crossed=False).open()
    path.with_suffix(".json").write_text('{"first_axis": "frames"}')
    with pytest.raises(DataError, match="fps: frames need it"):
        DataConfig(path=path, crossed=False).open()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "1"], "frames must be in 2..256, not 1"),
        (["--size", "600"], "size must be in 8..512 pixels, not 600"),
    ],
)
def test_bad_options_are_one_sentence(
    tarballs: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tarballs / "clips.npz"
    line = ["animated-emoji", "--out", str(target), "--tarballs", str(tarballs), *options]
    assert data.main(line) == 2
    assert message in capsys.readouterr().err
    assert not target.exists()


def test_a_damaged_package_is_named(tarballs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tarballs / "lobehub-fluent-emoji-anim-2-1.0.0.tgz").write_bytes(b"no archive")
    line = ["animated-emoji", "--out", str(tarballs / "clips.npz"), "--tarballs", str(tarballs)]
    assert data.main(line) == 2
    assert "lobehub-fluent-emoji-anim-2-1.0.0.tgz is damaged" in capsys.readouterr().err


def test_packages_without_movement_are_refused(tarballs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in PACKAGES:
        pack(tarballs, package, {"assets/1f41d.webp": animation([(0, 0, 0, 255)])})
    line = ["animated-emoji", "--out", str(tarballs / "clips.npz"), "--tarballs", str(tarballs)]
    assert data.main(line) == 2
    assert "hold no animated emoji" in capsys.readouterr().err
