"""Folders of pipelines: what is read from them, and what is refused in one sentence, with nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditserve.model import convert
from ditserve.model.spec.bundle import PIPELINE, Bundle
from ditserve.model.spec.pipeline_bundle import cached_bundle
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.spec.pipeline_folder import PipelineFolderError, read_pipeline
from tests.tiny_pipelines import save_pipeline

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


REFUSED: dict[str, tuple[Change, str]] = {
    "no index": (lambda folder: (folder / "model_index.json").unlink(), "model_index.json is missing"),
    "no transformer": (lambda folder: shutil.rmtree(folder / "transformer"), "transformer is missing"),
    "no vae": (lambda folder: shutil.rmtree(folder / "vae"), "vae is missing"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer_3"), "tokenizer_3 is missing"),
    "no vocabulary": (
        lambda folder: (folder / "tokenizer_3" / "tokenizer.json").unlink(),
        "tokenizer_3/tokenizer.json is missing",
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
    "a width that is none": (fields("transformer/config.json", joint_attention_dim="x"), "text_size"),
    "no width": (fields("transformer/config.json", joint_attention_dim=None), "joint_attention_dim"),
    "an autoencoder without scale": (fields("vae/config.json", scaling_factor=None), "scaling_factor"),
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
