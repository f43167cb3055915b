"""Folders of pipelines: what is read from them, and what is refused in one sentence, with nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from ditserve.model import convert
from ditserve.model.spec.bundle import PIPELINE, Bundle
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.pipeline_bundle import cached_bundle
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.spec.pipeline_folder import read_pipeline
from ditserve.model.spec.pipeline_parts import PipelineFolderError
from ditserve.service.backends import load_backend
from tests.tiny_parts import clip_tokenizer
from tests.tiny_pipelines import save_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3") / "pipeline"
    save_pipeline("sd3", folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A model\n")
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "pipeline")
    return tmp_path / "pipeline"


def fields(file: str, **changes: Any) -> Change:
    """Return a change of the fields of a JSON file; None removes one."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | changes
        kept = {name: value for name, value in content.items() if value is not None}
        (folder / file).write_text(json.dumps(kept))

    return change


def pickled(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def sharded(folder: Path) -> None:
    index = {"weight_map": {"proj_out.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def moved(folder: Path, name: str, target: str) -> None:
    (folder / name).rename(folder / target)


def unreadable(folder: Path) -> None:
    (folder / "tokenizer_3" / "tokenizer.json").unlink()
    (folder / "tokenizer_3" / "spiece.model").write_bytes(b"no sentence pieces")


REFUSED: dict[str, tuple[Change, str]] = {
    "no index": (lambda folder: (folder / "model_index.json").unlink(), "model_index.json is missing"),
    "no transformer": (lambda folder: shutil.rmtree(folder / "transformer"), "transformer is missing"),
    "no vae": (lambda folder: shutil.rmtree(folder / "vae"), "vae is missing"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer_3"), "tokenizer_3 is missing"),
    "no vocabulary": (
        lambda folder: (folder / "tokenizer_3" / "tokenizer.json").unlink(),
        "tokenizer_3 has no tokenizer.json, nor another vocabulary",
    ),
    "a vocabulary that is not read": (unreadable, "could not be made of the other files there"),
    "shards without an index": (
        lambda folder: moved(folder / "transformer", WEIGHTS, WEIGHTS.replace(".", "-00001-of-00001.")),
        "has weights in shards, and no .safetensors.index.json of them",
    ),
    "nothing said of an encoder": (
        fields("model_index.json", text_encoder_3=None),
        "says nothing of text_encoder_3: [null, null] says that there is none",
    ),
    "a part that is a word": (
        fields("model_index.json", transformer="x"),
        "transformer must be a list of a library and a class, not x",
    ),
    "an unknown pipeline": (fields("model_index.json", _class_name="KandinskyPipeline"), "KandinskyPipeline"),
    "another transformer": (
        fields("transformer/config.json", _class_name="FluxTransformer2DModel"),
        "_class_name is FluxTransformer2DModel, not SD3Transformer2DModel",
    ),
    "pickled weights": (pickled, "pickled weights are never read"),
    "a missing shard": (sharded, "00001-of-00002.safetensors is missing"),
    "a scheduler of another kind": (
        fields("scheduler/scheduler_config.json", _class_name="LCMScheduler"),
        "_class_name LCMScheduler",
    ),
    "a scheduler with an unknown field": (
        fields("scheduler/scheduler_config.json", wobble=1.0),
        "field wobble",
    ),
    "a shift below 0": (fields("scheduler/scheduler_config.json", shift=-1.0), "field shift"),
    "a width that is none": (fields("transformer/config.json", joint_attention_dim="x"), "not 'x'"),
    "no width": (fields("transformer/config.json", joint_attention_dim=None), "joint_attention_dim"),
    "no channels": (fields("transformer/config.json", in_channels=None), "transformer: in_channels must be"),
    "an autoencoder that scales by 0": (fields("vae/config.json", scaling_factor=0), "above 0, not 0"),
    "another autoencoder without scale": (
        fields("vae/config.json", scaling_factor=None, _class_name="AutoencoderDC"),
        "scaling_factor",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_in_a_sentence(
    case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = REFUSED[case]
    change(folder)
    assert convert.main(["import", str(folder), str(tmp_path / "bundle"), "--licence=x"]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert words in message
    assert not (tmp_path / "bundle").exists()


def test_numbers_are_those_of_the_folder(folder: Path) -> None:
    found = read_pipeline(folder, name="tiny", licence="x")
    config, manifest = found.manifest.config, found.manifest
    assert isinstance(config, PipelineConfig)
    assert (config.text_tokens, config.text_size, config.pooled_size) == (256 + 77, 32, 24)
    assert (config.image_size, config.in_channels, config.largest_side) == ((8, 8), 4, 24)
    assert manifest.latents is not None
    assert manifest.latents.factor == 2
    assert manifest.latents.shift == (0.06,) * 4
    assert manifest.latents.scale == (1 / 0.4,) * 4
    assert manifest.diffusion.noise_scale == 1000.0
    assert manifest.diffusion.sigma_grid is not None
    assert manifest.diffusion.sigma_grid.shift == 3.0
    assert manifest.guidance == "classifier-free"
    assert dict(found.notes)["scheduler"] == "FlowMatchEulerDiscreteScheduler → euler, grid uniform"


def test_an_import_tells_what_it_found_and_links_the_weights(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert convert.main(["import", str(folder), str(tmp_path / "bundle")]) == 0
    told = capsys.readouterr().out
    assert "StableDiffusion3Pipeline" in told
    assert "SD3Transformer2DModel" in told
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.licence == "cc-by-4.0"
    assert not [name for name in bundle.manifest.files if "fp16" in name]
    taken = bundle.path / PIPELINE / "transformer" / weights.name
    assert taken.stat().st_ino == weights.stat().st_ino
    # A second import takes the place of the first.
    assert convert.main(["import", str(folder), str(tmp_path / "bundle"), "--licence=mine"]) == 0
    assert Bundle.open(tmp_path / "bundle").manifest.licence == "mine"


def halved(folder: Path, part: str, *, shards: bool) -> None:
    """Write the weights of a part in fp16 beside the full ones, as a variant of them."""
    (file,) = (folder / part).glob("*.safetensors")
    stem, tensors = file.name.partition(".")[0], {k: v.half() for k, v in load_file(file).items()}
    if not shards:
        save_file(tensors, folder / part / f"{stem}.fp16.safetensors", metadata={"format": "pt"})
        return
    index = dict[str, str]()
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        shard = f"{stem}.fp16-{number:05}-of-00002.safetensors"
        chosen = {name: tensors[name] for name in names}
        save_file(chosen, folder / part / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(names, shard)
    written = json.dumps({"metadata": {}, "weight_map": index})
    (folder / part / f"{stem}.safetensors.index.fp16.json").write_text(written)


@pytest.mark.parametrize("shards", [False, True])
def test_weights_of_a_variant_are_taken_where_there_are_no_full_ones(
    folder: Path, tmp_path: Path, shards: bool
) -> None:
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    for part in parts:
        halved(folder, part, shards=shards and part.startswith(("transformer", "text")))
    assert convert.main(["import", str(folder), str(tmp_path / "full"), "--size", "8", "8"]) == 0
    for part in parts:
        for file in (WEIGHTS, "model.safetensors"):
            (folder / part / file).unlink(missing_ok=True)
    assert convert.main(["import", str(folder), str(tmp_path / "half"), "--size", "8", "8"]) == 0
    outputs = []
    for name in ("full", "half"):
        bundle = Bundle.open(tmp_path / name)
        assert any("fp16" in file for file in bundle.manifest.files) == (name == "half" and shards)
        backend = load_backend("torch", bundle, threads=1)
        assert backend.text_encoder is not None
        embedding = backend.embed(np.zeros((1, 0), np.int64), backend.text_encoder.encode("a red fox")[None])
        state = backend.modulate(np.array([500.0], np.float32), embedding)
        outputs.append(backend.denoise(np.ones((1, 4, 8, 8), np.float32), state))
    assert 0.0 < np.abs(outputs[0] - outputs[1]).max() < 0.05 * np.abs(outputs[0]).max()


def test_a_shard_of_a_variant_that_is_missing_is_named(folder: Path, tmp_path: Path, capsys: Any) -> None:
    halved(folder, "transformer", shards=True)
    (folder / "transformer" / WEIGHTS).unlink()
    (folder / "transformer" / "diffusion_pytorch_model.fp16-00002-of-00002.safetensors").unlink()
    assert convert.main(["import", str(folder), str(tmp_path / "bundle")]) == 2
    assert "fp16-00002-of-00002.safetensors is missing, though" in capsys.readouterr().err


def test_weights_of_another_part_are_refused_where_they_are_opened(folder: Path, tmp_path: Path) -> None:
    (folder / "transformer" / WEIGHTS).unlink()
    shutil.copy(folder / "vae" / WEIGHTS, folder / "transformer")
    assert convert.main(["import", str(folder), str(tmp_path / "bundle")]) == 0
    with pytest.raises(ModelError, match=r"pipeline/transformer lacks the weights of \d+ tensors, such as "):
        load_backend("torch", Bundle.open(tmp_path / "bundle"))


def test_files_of_earlier_releases_of_diffusers_are_read(tmp_path: Path) -> None:
    """The class of the transformer was a general one, and the autoencoder stated no scale."""
    source = tmp_path / "pixart"
    save_pipeline("pixart", source)
    fields("transformer/config.json", _class_name="Transformer2DModel", norm_type="ada_norm_single")(source)
    fields("vae/config.json", scaling_factor=None)(source)
    assert convert.main(["import", str(source), str(tmp_path / "bundle")]) == 0
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.latents is not None
    assert bundle.manifest.latents.scale == (1 / 0.18215,) * 4
    assert load_backend("torch", bundle).name == "torch"


def test_a_tokenizer_of_an_earlier_release_of_transformers_is_completed(folder: Path, tmp_path: Path) -> None:
    fields("model_index.json", tokenizer_3=[None, None], text_encoder_3=[None, None])(folder)
    expected = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json")).encode("a red fox").ids
    shutil.rmtree(folder / "tokenizer")
    clip_tokenizer(folder / "tokenizer")
    assert not (folder / "tokenizer" / "tokenizer.json").exists()
    assert convert.main(["import", str(folder), str(tmp_path / "bundle")]) == 0
    file = tmp_path / "bundle" / PIPELINE / "tokenizer" / "tokenizer.json"
    assert Tokenizer.from_file(str(file)).encode("a red fox").ids == expected
    assert not (folder / "tokenizer" / "tokenizer.json").exists()


def test_a_damaged_file_is_found_when_the_bundle_is_opened(folder: Path, tmp_path: Path) -> None:
    assert convert.main(["import", str(folder), str(tmp_path / "bundle")]) == 0
    file = tmp_path / "bundle" / PIPELINE / "vae" / "config.json"
    content = file.read_text()
    file.unlink()
    file.write_text(content.replace("0.4", "0.5"))
    with pytest.raises(Exception, match=r"vae/config\.json differs from the hash"):
        Bundle.open(tmp_path / "bundle")


def test_a_pipeline_served_by_its_folder_is_brought_in_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    first = cached_bundle(folder)
    made = (first / "manifest.json").stat().st_mtime_ns
    assert cached_bundle(folder) == first
    assert (first / "manifest.json").stat().st_mtime_ns == made
    fields("scheduler/scheduler_config.json", shift=2.0)(folder)
    assert cached_bundle(folder) != first


def test_options_that_a_pipeline_states_itself_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.main(["import", str(folder), str(tmp_path / "bundle"), "--heads", "3"]) == 2
    assert "leave out --heads" in capsys.readouterr().err


def test_a_text_may_have_as_many_numbers_as_those_of_flux(folder: Path) -> None:
    fields("transformer/config.json", joint_attention_dim=4096, pooled_projection_dim=2048)(folder)
    found = read_pipeline(folder, name="tiny", licence="x", tokens=512)
    assert found.manifest.embedding_size == (512 + 77) * 4096 + 2048


def test_a_size_beyond_the_places_of_the_network_is_refused(folder: Path) -> None:
    with pytest.raises(PipelineFolderError, match="largest_side"):
        read_pipeline(folder, name="tiny", licence="x", size=(64, 64))


def test_without_its_largest_encoder_the_others_limit_a_prompt(folder: Path) -> None:
    fields("model_index.json", tokenizer_3=[None, None], text_encoder_3=[None, None])(folder)
    found = read_pipeline(folder, name="tiny", licence="x")
    config = found.manifest.config
    assert isinstance(config, PipelineConfig)
    assert (config.tokenizer, config.text_limit, config.text_tokens) == ("tokenizer", 77, 256 + 77)
    assert "text_encoder_3" not in found.parts
