"""The small autoencoder: it learns, resumes to the bit, and its folder encodes and decodes everywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ditserve.model.data import __main__ as data
from ditserve.model.data.dataset import DataConfig
from ditserve.model.nets.autoencoder import (
    AUTOENCODER,
    AutoencoderError,
    SmallVae,
    encoder_fingerprint,
    fingerprint,
    open_autoencoder,
    open_decoder,
    open_latent_autoencoder,
)
from ditserve.model.nets.small_autoencoder import (
    SmallAutoencoder,
    SmallAutoencoderConfig,
    load_small_autoencoder,
)
from ditserve.model.spec.manifest import LatentSpec
from ditserve.model.train.autoencoder.__main__ import main
from ditserve.model.train.autoencoder.config import load_autoencoder_config
from ditserve.model.train.autoencoder.trainer import AutoencoderTrainer
from ditserve.model.train.checkpoint import checkpoints
from ditserve.service.images import to_pixels
from tests.export.tiny import CONFIG, tiny_source

SMALL = {"latent_channels": 3, "widths": [8, 12], "blocks": [1, 1], "noise": 0.05}


def pictures(path: Path, count: int = 48) -> Path:
    """Write squares of a colour on white, 16×16, in four classes."""
    random = np.random.default_rng(0)
    x = np.full((count, 16, 16, 3), 255, np.uint8)
    for image in x:
        top, left = random.integers(0, 8, 2)
        image[top : top + 8, left : left + 8] = random.integers(0, 256, 3)
    np.savez(path, x=x, y=np.arange(count) % 4, names=np.array(["a", "b", "c", "d"]))
    return path


def run(folder: Path, **changes: object) -> Path:
    fields = {
        "data": {"path": str(pictures(folder / "set.npz")), "hold_out": 0.2},
        "output": str(folder / "run"),
        "autoencoder": SMALL,
        "steps": 60,
        "batch": 8,
        "crop": 8,
        "warmup": 5,
        "lr": 5e-3,
        "checkpoint_every": 20,
        "sheet_every": 30,
        "log_every": 10,
        "threads": 1,
    } | changes
    file = folder / "run.json"
    file.write_text(json.dumps(fields))
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("autoencoder")
    assert main(["--config", str(run(folder))]) == 0
    return folder / "run"


def test_it_learns_and_tells_what_it_learned(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    measured = [line["psnr"] for line in lines if "psnr" in line]
    assert measured[-1] > measured[0]
    assert (trained / "sheet-0000060.png").is_file()
    card = json.loads((trained / "autoencoder" / "autoencoder.json").read_text())
    assert card["figures"]["psnr"] == measured[-1]
    assert card["training"]["step"] == 60
    assert "/" not in card["training"]["data"]["path"]


def test_a_run_that_was_stopped_ends_with_the_same_weights(trained: Path, tmp_path: Path) -> None:
    assert main(["--config", str(run(tmp_path, steps=40))]) == 0
    # wsd ends at the last step: the second part runs as the whole does.
    for path in checkpoints(tmp_path / "run" / "checkpoints")[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert main(["--config", str(run(tmp_path))]) == 0
    ours, theirs = (folder / "autoencoder" / "weights.safetensors" for folder in (trained, tmp_path / "run"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_another_run_is_not_continued(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(run(trained.parent, edge_weight=2.0))]) == 2
    assert "edge_weight" in capsys.readouterr().err


def test_a_decoder_is_trained_alone_on_latents_that_stay(trained: Path, tmp_path: Path) -> None:
    before = load_small_autoencoder(trained / "autoencoder")
    file = run(tmp_path, decoder_of=str(trained / "autoencoder"), steps=30)
    fields = json.loads(file.read_text())
    del fields["autoencoder"]
    file.write_text(json.dumps(fields))
    assert main(["--config", str(file)]) == 0
    after = load_small_autoencoder(tmp_path / "run" / "autoencoder")
    for half, same in (("encoder", True), ("decoder", False)):
        ours, theirs = (getattr(network, half).state_dict().values() for network in (before, after))
        assert all(map(torch.equal, ours, theirs)) is same
    card = json.loads((tmp_path / "run" / "autoencoder" / "autoencoder.json").read_text())
    assert card["training"]["decoder_of"] == "autoencoder"
    # Networks that were trained on its latents take it, and so do latents of it the first.
    maker = fingerprint(trained / "autoencoder")
    assert card["encoder_of"] == encoder_fingerprint(trained / "autoencoder") == maker
    manifest = tiny_source(replace(CONFIG, in_channels=3, image_size=(4, 4))).manifest.model_copy(
        update={
            "decoder": "small",
            "latents": LatentSpec(shift=(0.0,) * 3, scale=(1.0,) * 3, factor=4),
            "provenance": {AUTOENCODER: maker},
        }
    )
    open_decoder(manifest, tmp_path / "run" / "autoencoder")
    other = manifest.model_copy(update={"provenance": {AUTOENCODER: "0" * 64}})
    with pytest.raises(AutoencoderError, match="is not what made the latents"):
        open_decoder(other, tmp_path / "run" / "autoencoder")


def test_frames_of_clips_are_pictures(trained: Path, tmp_path: Path) -> None:
    clips = np.load(pictures(tmp_path / "stills.npz"))["x"].reshape(16, 3, 16, 16, 3)
    set_of_clips = tmp_path / "clips.npz"
    np.savez(set_of_clips, x=clips, y=np.arange(16) % 4, names=np.array(["a", "b", "c", "d"]))
    set_of_clips.with_suffix(".json").write_text(json.dumps({"first_axis": "frames", "fps": 4}))
    data = {"path": str(set_of_clips), "hold_out": 0.2}
    file = run(tmp_path, data=data, decoder_of=str(trained / "autoencoder"), autoencoder=SMALL, steps=4)
    trainer = AutoencoderTrainer(load_autoencoder_config(file))
    # What fits begins as it was: here, everything.
    before = load_small_autoencoder(trained / "autoencoder").state_dict().values()
    assert all(map(torch.equal, before, trainer.network.state_dict().values()))
    frames = {frame.tobytes() for frame in clips.reshape(-1, 16, 16, 3)}
    drawn = set()
    for seed in range(8):
        planes = trainer._pictures(np.arange(16), np.random.default_rng(seed)).numpy()
        drawn |= {picture.tobytes() for picture in to_pixels(planes)}
    assert drawn <= frames
    assert len(drawn) > 24
    assert main(["--config", str(file)]) == 0


def test_a_lighter_decoder_is_trained_for_an_encoder_that_stays(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lighter = {**SMALL, "decoder_widths": [4, 8], "decoder_blocks": [0, 1], "full_width": 0}
    folder = str(trained / "autoencoder")
    assert main(["--config", str(run(tmp_path, decoder_of=folder, autoencoder=lighter))]) == 0
    before = load_small_autoencoder(trained / "autoencoder")
    after = load_small_autoencoder(tmp_path / "run" / "autoencoder")
    assert all(map(torch.equal, before.encoder.state_dict().values(), after.encoder.state_dict().values()))
    weights = [sum(part.numel() for part in network.decoder.parameters()) for network in (before, after)]
    assert 3 * weights[1] < weights[0]
    images = torch.from_numpy(
        DataConfig(path=tmp_path / "set.npz", hold_out=0)
        .open()
        .batch(np.arange(16), np.random.default_rng(0))
    )
    errors = [(network.decode(before.encode(images)) - images).abs().mean() for network in (before, after)]
    assert errors[1] < 2 * errors[0]
    assert encoder_fingerprint(tmp_path / "run" / "autoencoder") == fingerprint(trained / "autoencoder")
    other = {**lighter, "widths": [8, 16]}
    assert main(["--config", str(run(tmp_path, decoder_of=folder, autoencoder=other))]) == 2
    assert "autoencoder.widths is (8, 16), and that of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_of": "nowhere"}, "nowhere"),
        ({"autoencoder": {"decoder_widths": [8]}}, "decoder_widths must be 3 positive channels"),
        ({"crop": 6}, "crop 6 is not divisible by 4"),
        ({"crop": 32}, "crop 32 is larger than the pictures"),
        ({"autoencoder": {"widths": [8], "blocks": [1, 1]}}, "blocks must be 1 counts"),
        ({"autoencoder": {"depth": 2}}, "autoencoder.depth"),
        ({"leanring_rate": 1}, "leanring_rate"),
    ],
)
def test_mistakes_are_one_sentence(
    changes: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(run(tmp_path, **changes))]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_latents_are_made_and_decoded_by_its_folder(trained: Path, tmp_path: Path) -> None:
    folder, out = trained / "autoencoder", tmp_path / "latents"
    source = pictures(tmp_path / "set.npz", 12)
    assert data.main(["latents", str(source), "--autoencoder", str(folder), "--out", str(out)]) == 0
    latents = DataConfig(path=out, hold_out=0).open()
    assert (latents.channels, latents.size) == (3, (4, 4))
    index = json.loads((out / "latents.json").read_text())
    assert index["decoder"] == "small"
    spec = LatentSpec(shift=tuple(index["mean"]), scale=tuple(index["std"]), factor=4)
    vae = open_latent_autoencoder(folder, spec)
    assert isinstance(open_autoencoder("small", folder, spec), SmallVae)
    shown = DataConfig(path=source, hold_out=0).open()
    images = torch.from_numpy(shown.batch(np.arange(12), np.random.default_rng(0)))
    network = load_small_autoencoder(folder)
    assert torch.allclose(vae.decode(vae.encode(images)), network.decode(network.encode(images)), atol=1e-5)
    drawn = vae.encode(images, torch.Generator().manual_seed(0)) - vae.encode(images)
    assert drawn[:, 0].std().item() == pytest.approx(0.05 / spec.scale[0], rel=0.2)
    with pytest.raises(AutoencoderError, match="3 latent channels, the model's latents 4"):
        open_autoencoder("small", folder, LatentSpec(shift=(0.0,) * 4, scale=(1.0,) * 4))
    with pytest.raises(AutoencoderError, match="not of the kind of the model's autoencoder"):
        open_autoencoder("sd-vae", folder)


def test_a_damaged_folder_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "autoencoder.json").write_bytes((trained / "autoencoder" / "autoencoder.json").read_bytes())
    with pytest.raises(AutoencoderError, match="cannot be read as a small autoencoder"):
        open_latent_autoencoder(tmp_path)


def test_a_picture_decoded_in_parts_is_the_picture_decoded_whole() -> None:
    """No layer looks further than its convolutions, so the inside of a part is that of the whole."""
    torch.manual_seed(0)
    vae = SmallVae(SmallAutoencoder(SmallAutoencoderConfig(widths=(8, 12), blocks=(1, 1))))
    latents = torch.randn(1, 8, 24, 24)
    whole = vae.decode(latents)
    part = vae.decode(latents[:, :, :, :20])
    assert torch.allclose(part[..., :40], whole[..., :40], atol=1e-5)
