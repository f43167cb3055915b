"""Data that cannot be trained on is refused with one sentence, before anything starts."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from ditserve.model.data.dataset import DataConfig, DataError
from ditserve.model.data.labels import Catalogue, select_examples
from tests.model.data.data_forms import FORMS, add, encoded, pictures

X = pictures()[:2]
TWO = np.array(["a", "b"])
PNG = encoded(X[0])


def save(**arrays: np.ndarray) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        np.savez(root / "set.npz", **arrays)  # type: ignore[arg-type]
        return root / "set.npz"

    return write


def truncated_npz(root: Path) -> Path:
    file = FORMS["npz"](root)
    file.write_bytes(file.read_bytes()[:-200])
    return file


def with_objects(root: Path) -> Path:
    np.savez(root / "set.npz", x=X, y=np.arange(2), names=np.array(["a", None], dtype=object))
    return root / "set.npz"


def shards_that_differ(**arrays: np.ndarray) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        good = {"x": X, "y": np.arange(2), "names": TWO}
        np.savez(root / "0.npz", **good)  # type: ignore[arg-type]
        np.savez(root / "1.npz", **(good | arrays))  # type: ignore[arg-type]
        return root

    return write


def empty(root: Path) -> Path:
    (root / "nothing").mkdir()
    return root / "nothing"


def no_pictures(root: Path) -> Path:
    (root / "class").mkdir()
    (root / "class" / "notes.txt").write_text("none")
    return root


def two_sizes(root: Path) -> Path:
    for name, size in (("a", 4), ("b", 6)):
        (root / name).mkdir()
        Image.new("RGB", (size, 4)).save(root / name / "0.png")
    return root


def unknown(root: Path) -> Path:
    (root / "set.tar.gz").write_bytes(b"")
    return root / "set.tar.gz"


def split(*names: str) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        for name in names:
            (root / name).mkdir(parents=True)
            (root / name / "0.png").write_bytes(PNG)
        return root

    return write


def split_shards(root: Path) -> Path:
    for name in ("train-00", "val-00"):
        np.savez(root / f"{name}.npz", x=X, y=np.arange(2), names=TWO)
    return root


def looped(root: Path) -> Path:
    split("a", "b")(root)
    (root / "a" / "again").symlink_to(root)
    return root


def archive(**members: bytes) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        with tarfile.open(root / "set.tar", "w") as tar:
            for name, content in members.items():
                add(tar, name.replace("_", "."), content)
        return root / "set.tar"

    return write


def cut_archive(root: Path) -> Path:
    archive(a_png=encoded(X[0]), a_cls=b"0", b_png=encoded(X[1]), b_cls=b"1")(root)
    file = root / "set.tar"
    file.write_bytes(file.read_bytes()[:2300])
    return file


def listed(root: Path) -> Path:
    (root / "classes.txt").write_text("cat\ndog\n")
    return archive(a_png=encoded(X[0]), a_cls=b"0", b_png=encoded(X[1]), b_cls=b"2")(root)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "none.npz", "does not exist: pass an .npz"),
        (unknown, "is no data set: pass an .npz"),
        (save(x=X, y=np.arange(2)), "lacks the array 'names'"),
        (save(x=X.astype(float), y=np.arange(2), names=TWO), "must be uint8"),
        (save(x=X[:, :, :, :2], y=np.arange(2), names=TWO), "must be uint8"),
        (save(x=X[:0], y=np.arange(0), names=TWO), "holds no pictures"),
        (save(x=X, y=np.arange(3), names=TWO), "y has 3 entries where 2 are needed"),
        (save(x=X, y=np.array([0.0, 1.0]), names=TWO), "y must be integers"),
        (save(x=X, y=np.arange(2), names=TWO, styles=TWO), "s must be integers"),
        (save(x=X, y=np.array([0, 2]), names=TWO), "picture 1 has name 2, but there are only 2 names"),
        (save(x=X, y=np.array([-1, 1]), names=TWO), "picture 0 has name -1"),
        (save(x=X, y=np.arange(2), s=np.array([0, 5]), styles=TWO, names=TWO), "has style 5"),
        (truncated_npz, "cannot be read as arrays"),
        (with_objects, "cannot be read as arrays"),
        (shards_that_differ(x=pictures(4, 4)[:2]), "1.npz holds pictures of 4×4, but .*0.npz of 8×8"),
        (shards_that_differ(names=np.array(["a", "c"])), "1.npz has other names than .*0.npz"),
        (empty, "is no data set"),
        (no_pictures, "holds no pictures"),
        (save(x=X, y=np.arange(2), s=np.arange(2), names=TWO, styles=TWO), "no class remains"),
        (
            split("train", "val"),
            "holds 'train' and 'val', which are splits rather than classes: set data.path",
        ),
        (split("Training", "test2017", "notes"), "holds 'Training' and 'test2017', which are splits"),
        (split("a/train", "a/valid", "b/train", "b/valid"), "splits rather than styles"),
        (split_shards, "splits rather than shards of one set"),
        (looped, "leads back to .*: remove this link"),
        (two_sizes, r"different sizes \(4×4, 4×6\): set"),
        (archive(), "holds no pictures"),
        (archive(a_png=PNG, a_cls=b"0", b_cls=b"1"), "b.cls has no picture"),
        (archive(a_png=PNG, a_cls=b"0", b_png=PNG), "b.png lacks a label"),
        (archive(a_png=PNG, a_json=b"{"), "its json is not valid"),
        (archive(a_png=PNG, a_json=b"[]"), "must be an object"),
        (archive(a_png=PNG, a_cls=b"\xff"), "a.cls is not UTF-8"),
        (archive(a_png=PNG, a_json=b" " * (1 << 20) + b"{}"), "longer than"),
        (cut_archive, "not a readable, uncompressed tar"),
        (listed, "picture 1 has name 2, but there are only 2 names"),
    ],
)
def test_faulty_data_is_refused(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    path = make(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        DataConfig(path=path).open()
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": ("dodo",)}, "has no name 'dodo'"),
        ({"groups": ("food",)}, "has no group 'food'"),
        ({"hold_out": 0.9999}, "no picture remains to train on"),
        ({"text": "nonsense"}, "field text: text encoder 'nonsense'"),
    ],
)
def test_a_choice_that_leaves_nothing(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    config = DataConfig.model_validate({"path": FORMS["npz"](tmp_path), **fields})
    with pytest.raises(DataError, match=message):
        assert config.open().texts is None


def test_missing_captions_are_named(tmp_path: Path) -> None:
    folder = FORMS["folder"](tmp_path)
    (folder / "bee" / "flat" / "004.txt").unlink()
    with pytest.raises(DataError, match="picture 4 has no caption"):
        DataConfig(path=folder, text="minilm").open()


def test_a_card_with_a_wrong_field(tmp_path: Path) -> None:
    file = FORMS["npz"](tmp_path)
    (tmp_path / "set.json").write_text('{"license": "MIT"}')
    with pytest.raises(DataError, match=r"set\.json: license"):
        DataConfig(path=file).open()


def bomb(file: Path) -> None:
    Image.new("1", (200, 200)).save(file)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-60])


def test_an_empty_path_is_not_the_working_folder() -> None:
    with pytest.raises(ValidationError, match="it is empty"):
        DataConfig.model_validate({"path": " "})


@pytest.mark.parametrize("form", ["folder", "tar"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda file: file.write_bytes(b""), "not a picture"),
        (lambda file: file.write_bytes(b"GIF89a nonsense"), ""),
        (lambda file: Image.new("I;16", (8, 8)).save(file), "not 8 bits"),
        (cut, ""),
        (bomb, "pixels"),
    ],
)
def test_broken_pictures_are_counted_named_and_left_out(
    tmp_path: Path, form: str, spoil: Callable[[Path], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    folder = FORMS["folder"](tmp_path)
    spoil(folder / "bee" / "flat" / "005.png")
    if form == "tar":
        with tarfile.open(tmp_path / "set.tar", "w") as archive:
            for file in sorted(folder.rglob("*.png")):
                add(archive, file.name, file.read_bytes())
                add(
                    archive,
                    f"{file.stem}.json",
                    f'{{"label": "{file.parts[-3]}", "style": "{file.parts[-2]}"}}'.encode(),
                )
    path = {"folder": folder, "tar": tmp_path / "set.tar"}[form]
    with pytest.raises(
        DataError, match=rf"1 pictures cannot be read, and corrupt_limit is 0: .*005\.png: .*{reason}"
    ):
        DataConfig(path=path).open()
    dataset = DataConfig(path=path, corrupt_limit=1, hold_out=0).open()
    assert len(dataset.skipped) == 1
    assert len(dataset.labels) == 11
    left = np.delete(pictures(), 5, axis=0).astype(np.float32).transpose(0, 3, 1, 2) / np.float32(127.5) - 1
    assert np.array_equal(dataset.batch(np.arange(11), np.random.default_rng()), left)


def test_only_broken_pictures(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "0.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"holds no readable picture: .*0\.png"):
        DataConfig(path=tmp_path, corrupt_limit=9).open()


def test_a_picture_examined_by_its_header_may_still_fail_and_is_named(tmp_path: Path) -> None:
    folder = FORMS["folder"](tmp_path)
    cut(folder / "bee" / "flat" / "005.png")
    dataset = DataConfig(path=folder, check="header", hold_out=0).open()
    assert dataset.size == (8, 8)
    with pytest.raises(DataError, match=r"005\.png"):
        dataset.batch(np.array([5]), np.random.default_rng())


def test_links_in_a_tar_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(PNG)
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for key in ("a", "b"):
            link = tarfile.TarInfo(f"{key}.png")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
            archive.addfile(link)
            add(archive, f"{key}.cls", key.encode())
    with pytest.raises(DataError, match="has no picture"):
        DataConfig(path=tmp_path / "set.tar").open()


@pytest.mark.parametrize("name", [os.fsdecode(b"\xff\xfe"), "", "a" * 1001])
def test_a_name_that_no_bundle_can_hold_is_refused(tmp_path: Path, name: str) -> None:
    catalogue = Catalogue(np.arange(4) % 2, ("cat", name), np.zeros(4, np.int64))
    with pytest.raises(DataError, match=r"pets: label .* cannot be the name of a class") as caught:
        select_examples(catalogue, tmp_path / "pets", hold_out=0)
    str(caught.value).encode()
