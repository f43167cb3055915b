"""Another network in a bundle: which fit, what it costs, and that the ladder draws with it."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ditserve.export.backbone import add_backbone, main
from ditserve.export.decoder import save_autoencoder
from ditserve.export.errors import ExportError
from ditserve.model.evaluation.front import OperatingPoint
from ditserve.model.evaluation.ladder import draw_inputs, draw_pictures
from ditserve.model.evaluation.ladder_plan import stitched_points
from ditserve.model.nets.autoencoder import SmallVae, autoencoder_folder
from ditserve.model.nets.small_autoencoder import (
    SmallAutoencoder,
    load_small_autoencoder,
    save_small_autoencoder,
)
from ditserve.model.spec.bundle import MANIFEST, Bundle, whole_of, write_manifest
from ditserve.model.spec.errors import BundleError
from ditserve.model.spec.manifest import StretchSpec
from ditserve.model.spec.output_folder import OutputError, revision
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import LoadedModel, load_bundle, save_model
from ditserve.service.backends import load_backend
from ditserve.service.images import to_pixels

ROOT = Path(__file__).parents[2]

TINY = ROOT / "model" / "zoo" / "tiny"


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a bundle with a further backbone that is its own once more."""
    folder = tmp_path_factory.mktemp("twins") / "twins"
    shutil.copytree(TINY, folder)
    spec = add_backbone(folder, "twin", TINY)
    assert 0.3 < spec.row_cost < 3.0
    return folder


def test_a_further_backbone_is_a_bundle_within_the_bundle(twins: Path) -> None:
    bundle = Bundle.open(twins)
    twin = bundle.backbone("twin")
    assert twin.manifest.config == bundle.manifest.config
    assert load_bundle(twin).network.state_dict().keys() == load_bundle(bundle).network.state_dict().keys()
    # Commands that read a bundle find it by its folder.
    assert Bundle.open(twins / "backbones" / "twin").manifest.name == "tiny-twin"
    with pytest.raises(BundleError, match="no backbone 'other': it has twin"):
        bundle.backbone("other")
    (twins / "backbones" / "twin" / "weights.safetensors").touch()
    assert "backbones/twin/weights.safetensors" in bundle.manifest.files


def test_a_bundle_of_its_own_may_lie_in_a_folder_of_that_name(twins: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backbones" / "own"
    shutil.copytree(twins, folder)
    (folder / "autoencoder").mkdir()
    shutil.copy2(twins / MANIFEST, tmp_path)
    assert (whole_of(folder), whole_of(folder / "backbones" / "twin")) == (None, folder)
    assert Bundle.open(folder).manifest.name == "tiny"
    assert autoencoder_folder(folder, None) == folder / "autoencoder"


def test_a_stretch_of_the_same_network_draws_the_same_pictures(twins: Path) -> None:
    bundle = Bundle.open(twins)
    model = LoadedModel(
        load_bundle(bundle).network, bundle.manifest, {"twin": load_bundle(bundle.backbone("twin")).network}
    )
    inputs = draw_inputs(model, 1, None)
    own = draw_pictures(model, inputs, OperatingPoint("ddim", 6, "trailing", (0.0, 1.0)))
    for parts in ([(0.0, "twin")], [(0.5, "twin")], [(0.5, ""), (0.0, "twin")]):
        stretches = tuple(StretchSpec(above=above, backbone=name) for above, name in parts)
        point = OperatingPoint("ddim", 6, "trailing", (0.0, 1.0), stretches)
        assert draw_pictures(model, inputs, point).equal(own), point.name


def test_another_decoder_of_the_same_latents_comes_along(prompted_bundle: Path, tmp_path: Path) -> None:
    """A lighter decoder draws what the further network finishes, as a bundle of its own and in a service."""
    own, source = tmp_path / "own", tmp_path / "source"
    for folder in (own, source):
        shutil.copytree(prompted_bundle, folder)
    torch.manual_seed(1)
    lighter = SmallAutoencoder(
        replace(load_small_autoencoder(own / "autoencoder").config, decoder_widths=(4,), full_width=0)
    )
    save_small_autoencoder(source / "autoencoder", lighter, {})
    manifest = Bundle.open(own).manifest
    save_autoencoder(SmallVae(lighter, manifest.latents), source, manifest.config.in_channels)
    write_manifest(source, manifest)
    add_backbone(own, "same", prompted_bundle)
    add_backbone(own, "light", source)
    bundle = Bundle.open(own)
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    parts = {"": bundle, "same": bundle.backbone("same"), "light": bundle.backbone("light")}
    assert [part.manifest.decoder for part in parts.values()] == ["small", "identity", "small"]
    for kind in ("onnx", "torch"):
        decoded = {}
        for name, part in parts.items():
            with closing(load_backend(kind, part, precision="fp32")) as backend:
                if name != "same":
                    decoded[name] = backend.decode(latents)
        assert (decoded[""] != decoded["light"]).mean() > 0.5
        vae = SmallVae(load_small_autoencoder(own / "backbones" / "light" / "autoencoder"), manifest.latents)
        expected = to_pixels(vae.decode(torch.from_numpy(latents)).numpy())
        assert np.abs(decoded["light"].astype(int) - expected).max() <= 1
    folder = own / "backbones" / "light"
    assert autoencoder_folder(folder, None) == folder / "autoencoder"
    assert Bundle.open(folder).file("encoder.onnx") == own / "encoder.onnx"
    other = manifest.model_copy(update={"provenance": {**manifest.provenance, "autoencoder": "0" * 64}})
    write_manifest(source, other)
    with pytest.raises(ExportError, match="is of another latents than"):
        add_backbone(own, "light", source)


def test_the_points_to_measure_have_every_backbone_at_either_end(twins: Path) -> None:
    manifest = Bundle.open(twins).manifest
    names = {point.name for point in stitched_points(manifest)}
    assert {"ddim-8 twin", "ddim-8 twin>0.5", "dpmpp-2m-6 own>0.3 twin"} <= names
    half = next(point for point in stitched_points(manifest) if point.name == "ddim-8 twin")
    assert half.rows(manifest) == pytest.approx(16 * manifest.backbones["twin"].row_cost, abs=1e-3)


def test_a_student_with_guidance_built_in_is_never_guided(tmp_path: Path) -> None:
    own, student = tmp_path / "own", tmp_path / "student"
    for folder in (own, student):
        shutil.copytree(TINY, folder)
    manifest = Bundle.open(TINY).manifest
    distillation = {"kind": "progressive", "guidance_scale": 2.0}
    training = {**manifest.provenance["training"], "distillation": distillation}
    steps = {"step_counts": (4, 2)}
    defaults = manifest.defaults.model_copy(update={"steps": 4})
    write_manifest(
        student,
        manifest.model_copy(
            update={
                "provenance": {**manifest.provenance, "training": training},
                "diffusion": manifest.diffusion.model_copy(update=steps),
                "defaults": defaults,
                "ladder": (),
                "golden": None,
            }
        ),
    )
    assert main([str(own), "few", str(student)]) == 0
    spec = Bundle.open(own).manifest.backbones["few"]
    assert (spec.guidance, spec.step_counts) == ("none", (4, 2))
    points = stitched_points(Bundle.open(own).manifest)
    assert [point.steps for point in points if point.stretches[0].above == 0.0] == [4, 2]
    assert points[0].rows(Bundle.open(own).manifest) == pytest.approx(4 * spec.row_cost, abs=1e-3)


def test_a_new_network_of_a_name_takes_the_rungs_of_the_old_one_away(twins: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(twins, folder)
    manifest = Bundle.open(folder).manifest
    rung = manifest.ladder[0].model_copy(
        update={"name": "by twin", "stretches": (StretchSpec(above=0.0, backbone="twin"),)}
    )
    write_manifest(folder, manifest.model_copy(update={"ladder": (*manifest.ladder, rung)}))
    assert Bundle.open(folder).manifest.ladder[-1].name == "by twin"
    spec = manifest.backbones["twin"]
    other = {"twin": spec.model_copy(update={"row_cost": spec.row_cost * 2})}
    assert manifest.with_backbones(other).ladder == manifest.ladder
    # What is written for one network has no others.
    loaded = load_bundle(Bundle.open(folder))
    save_model(
        tmp_path / "alone",
        replace(loaded, manifest=loaded.manifest.model_copy(update={"golden": None})),
    )
    alone = Bundle.open(tmp_path / "alone").manifest
    assert (alone.backbones, alone.ladder) == ({}, manifest.ladder)


@pytest.mark.parametrize(
    ("stretches", "sentence"),
    [
        ([{"above": 0.5, "backbone": "gone"}], "the bundle has no backbone 'gone' (it has twin)"),
        ([{"above": 0.2, "backbone": "twin"}, {"above": 0.5, "backbone": ""}], "above must fall"),
        ([{"above": 1.5, "backbone": "twin"}], "above"),
    ],
)
def test_stretches_that_cannot_be_are_refused_by_their_field(
    twins: Path, tmp_path: Path, stretches: list[dict[str, object]], sentence: str
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(twins, folder)
    data = json.loads((folder / MANIFEST).read_text())
    data["ladder"][0]["stretches"] = stretches
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError) as refused:
        Bundle.open(folder)
    assert sentence in str(refused.value)
    assert "ladder.0" in str(refused.value)


def test_a_network_of_other_latents_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(TINY, folder)
    assert main([str(folder), "big", str(ROOT / "model" / "zoo" / "emoji64")]) == 2
    assert "is of another" in capsys.readouterr().err
    assert Bundle.open(folder).manifest.backbones == {}
    assert main([str(folder), "itself", str(folder)]) == 2


def test_weights_that_both_have_are_stored_once(twins: Path, tmp_path: Path) -> None:
    """All of a twin's weights but the backbone's own are left out, and it draws by itself from its folder."""
    folder = tmp_path / "bundle"
    shutil.copytree(twins, folder)
    bundle = Bundle.open(folder)
    spec, twin = bundle.manifest.backbones["twin"], bundle.backbone("twin")
    stored = bundle.manifest.files
    assert "y_embedder.tables.0.weight" in spec.shared_weights
    assert stored["backbones/twin/weights.safetensors"].bytes < stored["weights.safetensors"].bytes
    for name, tensor in load_bundle(twin).network.state_dict().items():
        assert tensor.equal(load_bundle(bundle).network.state_dict()[name]), name
    alone = Bundle.open(folder / "backbones" / "twin")
    labels, levels = np.array([[3, 1]]), np.array([0.5], np.float32)
    noise = np.random.default_rng(0).standard_normal((1, 3, 32, 32), dtype=np.float32)
    drawn = []
    for each, backend in ((bundle, "onnx"), (twin, "onnx"), (alone, "onnx"), (alone, "torch")):
        with closing(load_backend(backend, each, threads=1, precision="fp32")) as opened:
            state = opened.modulate(levels, opened.embed(labels))
            drawn.append(opened.decode(opened.denoise(noise, state)))
    assert all(np.array_equal(drawn[0], other) for other in drawn[1:3])
    assert np.abs(drawn[0].astype(int) - drawn[3]).max() <= 1
    assert load_model(folder / "backbones" / "twin").manifest.name == "tiny-twin"
    with pytest.raises(OutputError, match="is a further network of"), revision(folder / "backbones" / "twin"):
        pass
    assert main([str(folder), "again", str(folder / "backbones" / "twin")]) == 2
