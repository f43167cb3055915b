"""Folders of single families: the values that their pipelines cannot have are refused, in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.spec.pipeline_folder import FoundPipeline, read_pipeline
from ditserve.model.spec.pipeline_parts import PipelineFolderError
from tests.tiny_pipelines import save_pipeline

pytestmark = [
    # Two parts of diffusers say so of themselves.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]


def read(folder: Path, family: str, **changes: dict[str, Any]) -> FoundPipeline:
    """Return a tiny pipeline, read with other fields in the configurations of its parts."""
    save_pipeline(family, folder)
    for part, fields in changes.items():
        (file,) = (folder / part).glob("*config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return read_pipeline(folder, name="tiny", licence="x", tokens=40)


@pytest.mark.parametrize(
    ("family", "part", "fields", "message"),
    [
        ("lumina2", "scheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting true is not known"),
        ("sana", "transformer", {"guidance_embeds": True}, "guidance_embeds true is not known"),
        ("lumina2", "transformer", {"axes_lens": [40, 16, 16]}, "a text may have 39 tokens at most, not 40"),
        ("qwen_image", "vae", {"latents_std": [1.0, 1.0]}, "2 channels do not fit"),
        ("z_image", "transformer", {"_class_name": "Other"}, "_class_name is Other"),
    ],
)
def test_a_value_that_the_pipeline_cannot_have_is_refused(
    family: str, part: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(PipelineFolderError, match=message):
        read(tmp_path / "pipeline", family, **{part: fields})


@pytest.mark.parametrize(
    ("family", "side", "largest"),
    [("auraflow", 12, 12), ("lumina2", 8, 32), ("z_image", 32, 32), ("sana", 8, None), ("chroma", 128, None)],
)
def test_sizes_are_those_that_the_network_has_places_for(
    family: str, side: int, largest: int | None, tmp_path: Path
) -> None:
    config = read(tmp_path / "pipeline", family).manifest.config
    assert isinstance(config, PipelineConfig)
    assert (config.image_size, config.largest_side) == ((side, side), largest)
