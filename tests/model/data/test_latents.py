"""Latents prepared ahead equal those encoded on the fly, even if the work was shared or interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open

from ditserve.model.data import __main__ as data
from ditserve.model.data.dataset import DataConfig, DataError
from ditserve.model.data.examples import to_model_space
from ditserve.model.data.extraction import EncoderSettings, extract, plan_extraction, progress_of, write_index
from ditserve.model.data.latents import INDEX, LatentIndex, Latents
from tests.model.data.data_forms import CARD, FORMS, NAMES, PAIRS, pictures

ALL = np.arange(len(PAIRS))


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=8,
    ).eval()


@pytest.fixture(scope="module")
def autoencoder(vae: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The latents of the set in `data_forms`, in shards of five, made by the command."""
    root = tmp_path_factory.mktemp("prepared")
    source = FORMS["folder"](root)
    arguments = [
        "--autoencoder",
        str(autoencoder),
        "--out",
        str(root / "out"),
        "--shard",
        "5",
        "--batch",
        "3",
    ]
    assert data.main(["latents", str(source), *arguments]) == 0
    return root / "out"


def on_the_fly(
    vae: AutoencoderKL, *, mirrored: bool
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return means and log-variances (N, C, h, w) of all pictures."""
    x = torch.from_numpy(to_model_space(pictures()[:, :, ::-1] if mirrored else pictures()))
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
    return posterior.mean.numpy(), posterior.logvar.numpy()


def read(folder: Path, name: str) -> npt.NDArray[np.float32]:
    parts = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as shard:
            parts.append(shard.get_tensor(name))
    return np.concatenate(parts)


def test_shards_hold_the_moments_of_both_views(vae: AutoencoderKL, prepared: Path) -> None:
    assert len(list(prepared.glob("*.safetensors"))) == 3
    for view in (0, 1):
        mean, log_variance = on_the_fly(vae, mirrored=bool(view))
        np.testing.assert_allclose(read(prepared, "mean")[:, view], mean, atol=1e-5)
        np.testing.assert_allclose(read(prepared, "log_variance")[:, view], log_variance, atol=1e-5)


def test_statistics_are_those_of_draws(prepared: Path) -> None:
    index = LatentIndex.model_validate_json((prepared / INDEX).read_bytes())
    assert (index.picture_size, index.size, index.channels) == ((8, 8), (4, 4), 4)
    mean, std = read(prepared, "mean").astype(float), np.exp(read(prepared, "log_variance").astype(float) / 2)
    draws = mean + std * np.random.default_rng(0).standard_normal((400, *mean.shape))
    np.testing.assert_allclose(index.mean, draws.mean((0, 1, 2, 4, 5)), atol=0.02)
    np.testing.assert_allclose(index.std, draws.std((0, 1, 2, 4, 5)), rtol=0.02)


def test_clips_are_encoded_frame_by_frame(
    vae: AutoencoderKL, prepared: Path, autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four clips of three frames are the twelve pictures of the set in other words."""
    clips = tmp_path / "clips.npz"
    x = pictures().reshape(4, 3, 8, 8, 3)
    np.savez(clips, x=x, y=np.arange(4), names=np.array(list("abcd")))
    clips.with_suffix(".json").write_text(json.dumps({**CARD, "first_axis": "frames", "fps": 6}))
    out = tmp_path / "out"
    assert data.main(["latents", str(clips), "--autoencoder", str(autoencoder), "--out", str(out)]) == 0
    assert "4 latents of 4×3×4×4" in capsys.readouterr().out
    mean, _ = on_the_fly(vae, mirrored=True)
    mirrored = read(out, "mean")[:, 1].swapaxes(1, 2).reshape(12, 4, 4, 4)
    np.testing.assert_allclose(mirrored, mean, atol=1e-5)
    own, parts = (
        LatentIndex.model_validate_json((folder / INDEX).read_bytes()) for folder in (out, prepared)
    )
    np.testing.assert_allclose((own.mean, own.std), (parts.mean, parts.std), rtol=1e-4)
    dataset = DataConfig(path=out, hold_out=0, crossed=False).open()
    assert (dataset.size, dataset.first_axis, dataset.fps) == ((3, 4, 4), "frames", 6)
    still = DataConfig(path=prepared, hold_out=0).open()
    assert isinstance(dataset, Latents)
    assert isinstance(still, Latents)
    assert dataset.batch(np.arange(4), np.random.default_rng(1)).shape == (4, 4, 3, 4, 4)
    np.testing.assert_allclose(dataset.shift.ravel(), still.shift.ravel(), rtol=1e-4)


def test_training_data_is_drawn_and_normalised(vae: AutoencoderKL, prepared: Path) -> None:
    dataset = DataConfig(path=prepared, hold_out=0).open()
    assert (dataset.size, dataset.channels) == ((4, 4), 4)
    assert dataset.factors[0].classes == NAMES
    assert dataset.labels.tolist() == [list(pair) for pair in PAIRS]
    assert (dataset.licence, list(dataset.attribution)) == (CARD["licence"], CARD["attribution"])
    index = LatentIndex.model_validate_json((prepared / INDEX).read_bytes())
    mean, log_variance = on_the_fly(vae, mirrored=False)
    noise = np.random.default_rng(3).standard_normal(mean.shape, np.float32)
    shift, scale = (np.array(values, np.float32).reshape(4, 1, 1) for values in (index.mean, index.std))
    expected = (mean + np.exp(log_variance / 2) * noise - shift) / scale
    batch = dataset.batch(ALL, np.random.default_rng(3))
    assert batch.dtype == np.float32
    np.testing.assert_allclose(batch, expected, atol=1e-4)
    assert np.array_equal(dataset.batch(ALL, np.random.default_rng(3)), batch)


def test_published_scale_instead_of_statistics(vae: AutoencoderKL, prepared: Path) -> None:
    batch = (
        DataConfig(path=prepared, hold_out=0, latent_scale=0.18215)
        .open()
        .batch(ALL, np.random.default_rng(3))
    )
    mean, log_variance = on_the_fly(vae, mirrored=False)
    noise = np.random.default_rng(3).standard_normal(mean.shape, np.float32)
    np.testing.assert_allclose(batch, (mean + np.exp(log_variance / 2) * noise) * 0.18215, atol=1e-5)


def test_flips_mirror_the_picture_not_the_latent(vae: AutoencoderKL, prepared: Path) -> None:
    dataset = DataConfig(path=prepared, hold_out=0, flip=True, latent_scale=1.0).open()
    rng = np.random.default_rng(5)
    mirrored = (rng.random(len(ALL)) < 0.5)[:, None, None, None]
    (mean, log_variance), (mirror_mean, mirror_log) = (
        on_the_fly(vae, mirrored=view) for view in (False, True)
    )
    noise = rng.standard_normal(mean.shape, np.float32)
    expected = (
        np.where(mirrored, mirror_mean, mean)
        + np.exp(np.where(mirrored, mirror_log, log_variance) / 2) * noise
    )
    np.testing.assert_allclose(dataset.batch(ALL, np.random.default_rng(5)), expected, atol=1e-4)


def test_latents_have_one_size(prepared: Path) -> None:
    dataset = DataConfig(path=prepared).open()
    assert dataset.resized((4, 4)) is dataset
    with pytest.raises(DataError, match="latents of 4×4, not 8×8"):
        dataset.resized((8, 8))
    with pytest.raises(DataError, match="latents of 4×4, not 8×8"):
        DataConfig(path=prepared, size=8).open()


def same(one: Path, other: Path) -> bool:
    """Compare two folders bit for bit, except the order of safetensors' headers, which is not defined."""
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    for name in names:
        if not name.endswith(".safetensors"):
            assert (one / name).read_bytes() == (other / name).read_bytes()
            continue
        with safe_open(one / name, framework="np") as left, safe_open(other / name, framework="np") as right:
            assert left.metadata() == right.metadata()
            assert all(np.array_equal(left.get_tensor(key), right.get_tensor(key)) for key in left.keys())  # noqa: SIM118
    return True


def test_parts_and_interruptions_change_nothing(
    prepared: Path, autoencoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = prepared.parent / "folder", prepared.parent / "in-parts"
    job = plan_extraction(source, autoencoder, out, settings=EncoderSettings(shard=5, batch=3))
    for _ in extract(job, [1]):
        pass
    # A damaged shard counts as missing.
    (out / "00002.safetensors").write_bytes((out / "00001.safetensors").read_bytes()[:100])
    kept = (out / "00001.safetensors").stat().st_mtime_ns
    finished, missing = progress_of(job, job.shards)
    assert ([shard.count for shard in finished], missing) == ([5], [0, 2])
    assert write_index(job) is None
    options = ["--autoencoder", str(autoencoder), "--out", str(out), "--shard", "5", "--batch", "3"]
    arguments = ["latents", str(source), *options]
    assert data.main([*arguments, "--part", "2/2"]) == 0
    assert "the part that finishes last" in capsys.readouterr().out
    assert data.main([*arguments, "--part", "1/2"]) == 0
    assert "12 latents of 4×4×4" in capsys.readouterr().out
    assert (out / "00001.safetensors").stat().st_mtime_ns == kept
    assert same(out, prepared)


def test_several_processes_make_the_same_latents(prepared: Path, autoencoder: Path) -> None:
    out = prepared.parent / "by-processes"
    options = ["--autoencoder", str(autoencoder), "--out", str(out), "--shard", "5", "--batch", "3"]
    source = prepared.parent / "folder"
    assert data.main(["latents", str(source), *options, "--workers", "2"]) == 0
    np.testing.assert_allclose(read(out, "mean"), read(prepared, "mean"), atol=1e-5)
    assert len(DataConfig(path=out).open().labels) == len(PAIRS)


def test_broken_pictures_are_left_out_up_to_a_limit(
    autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = FORMS["folder"](tmp_path), tmp_path / "out"
    (source / "bee" / "flat" / "005.png").write_bytes(b"nothing")
    arguments = ["latents", str(source), "--autoencoder", str(autoencoder), "--out", str(out), "--size", "8"]
    assert data.main(arguments) == 2
    assert "005.png" in capsys.readouterr().err
    assert not (out / INDEX).exists()
    assert data.main([*arguments, "--corrupt-limit", "1"]) == 0
    dataset = DataConfig(path=out, hold_out=0).open()
    assert dataset.labels.tolist() == [list(pair) for k, pair in enumerate(PAIRS) if k != 5]
    assert len(dataset.skipped) == 1


def test_captions_come_along(prepared: Path) -> None:
    with safe_open(prepared / "00002.safetensors", framework="np") as shard:
        assert json.loads(shard.metadata()["captions"]) == ["a shaded cat", "a shaded cat"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--size", "9"], "9×9 does not divide by 2"),
        (["--shard", "4"], "with other settings: choose an empty folder"),
        (["--device", "cuda"], "no CUDA device"),
        (["--autoencoder", "nowhere"], "not an autoencoder's folder"),
    ],
)
def test_extractions_that_are_refused_before_any_work(
    prepared: Path, autoencoder: Path, capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    if "cuda" in change and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    source = prepared.parent / "folder"
    arguments = ["--autoencoder", str(autoencoder), "--out", str(prepared), "--shard", "5", *change]
    assert data.main(["latents", str(source), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_latents_of_latents_and_mixed_sizes(
    prepared: Path, autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--autoencoder", str(autoencoder), "--out", str(tmp_path / "out")]
    assert data.main(["latents", str(prepared), *arguments]) == 2
    assert "holds latents already" in capsys.readouterr().err
    source = FORMS["folder"](tmp_path)
    other = source / "apple" / "flat" / "000.png"
    other.write_bytes((prepared.parent / "folder" / "apple" / "flat" / "000.png").read_bytes())

    Image.new("RGB", (8, 10)).save(other)
    assert data.main(["latents", str(source), *arguments]) == 2
    assert "different sizes" in capsys.readouterr().err


def spoil_index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["shards"][0]["file"] = "../elsewhere.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def count_wrongly(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["shards"][0]["count"] = 7
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / INDEX).write_text("{}"), r"latents\.json: autoencoder"),
        (lambda folder: (folder / "00001.safetensors").unlink(), r"00001\.safetensors cannot be read"),
        (
            lambda folder: (folder / "00001.safetensors").write_bytes(b"no"),
            r"00001\.safetensors cannot be read",
        ),
        (spoil_index, "a shard outside of its folder"),
        (count_wrongly, r"00000\.safetensors does not hold"),
    ],
)
def test_damaged_latents_are_named(
    prepared: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(prepared, tmp_path / "copy")
    spoil(folder)
    with pytest.raises(DataError, match=message):
        DataConfig(path=folder).open()
