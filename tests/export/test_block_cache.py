"""A block cache: two graphs of one network, and pictures that are the same offline and in every backend."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch

from ditserve.export import block_cache
from ditserve.export.block_cache import add_block_caches, main
from ditserve.export.errors import ExportError
from ditserve.export.graph import trunk_graph
from ditserve.export.verify import open_session, run
from ditserve.model.evaluation.front import OperatingPoint
from ditserve.model.evaluation.ladder import draw_inputs, draw_pictures
from ditserve.model.evaluation.ladder_plan import stitched_points
from ditserve.model.spec.bundle import MANIFEST, Bundle
from ditserve.model.spec.errors import BundleError
from ditserve.model.spec.grids import even_grid
from ditserve.model.spec.manifest import Manifest, StretchSpec
from ditserve.model.train.loaded_model import LoadedModel, load_bundle
from ditserve.service.backends import BlockCaching, CachingBackend, load_backend
from ditserve.service.engine.samples import SampleRequest
from ditserve.service.jobs import ConditionTerm
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Consent, Rung
from tests.export.tiny import CONFIG, tiny_dit
from tests.service.backends.drawing import drawn


@pytest.fixture(scope="module", params=["pictures", "clips"])
def cached_bundle(
    request: pytest.FixtureRequest, tiny_bundle: Path, clip_bundle: Path, tmp_path_factory: Any
) -> Path:
    """Give a bundle with block caches: of pictures of one size, or of clips of any."""
    folder: Path = tmp_path_factory.mktemp("cached") / "bundle"
    shutil.copytree(tiny_bundle if request.param == "pictures" else clip_bundle, folder)
    add_block_caches(folder)
    return folder


def test_the_networks_are_the_bundle_s_own_with_its_weights(cached_bundle: Path) -> None:
    bundle = Bundle.open(cached_bundle)
    manifest = bundle.manifest
    caches = {name: spec.block_cache for name, spec in manifest.backbones.items()}
    assert {name: cache and cache.every for name, cache in caches.items()} == {"every-2": 2, "every-3": 3}
    assert manifest.metrics["block_cache_relative_l2"] < 1e-4
    for name, first, last in (("trunk", "x", "change"), ("tail", "change", "output")):
        graph = onnx.load(cached_bundle / f"{name}.onnx", load_external_data=False).graph
        assert first in {value.name for value in graph.input}
        assert [value.name for value in graph.output] == [last]
        # One copy of the weights.
        assert {entry.value for tensor in graph.initializer for entry in tensor.external_data[:1]} == {
            "weights.safetensors"
        }
    part = bundle.backbone("every-2")
    assert part.path == bundle.path
    assert "trunk.onnx" in part.manifest.files
    assert "backbone.onnx" not in part.manifest.files


@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.parametrize("every", [2, 3])
def test_a_picture_of_the_service_is_the_one_drawn_offline(
    cached_bundle: Path, kind: str, every: int
) -> None:
    bundle = Bundle.open(cached_bundle)
    manifest, network = bundle.manifest, load_bundle(bundle).network
    model = LoadedModel(network, manifest, {f"every-{every}": network})
    stretches = (StretchSpec(above=0.0, backbone=f"every-{every}"),)
    point = OperatingPoint("dpmpp-2m", 8, even_grid(model.schedule), (0.2, 0.9), stretches)
    inputs = draw_inputs(model, 2, None)
    offline = draw_pictures(model, inputs, point).numpy()
    plain = draw_pictures(model, inputs, replace(point, stretches=())).numpy()
    assert not np.allclose(plain, offline, atol=1e-3)
    rung = Rung(
        "cached", point.solver, 8, point.grid, (0.2, 0.9), 0.0, stretches=manifest.stretches(stretches)
    )
    requests = [
        asked(f"{seed}/0", seed, rung, tuple(map(_class, labels, manifest.config.classes)), manifest)
        for seed, labels in enumerate(inputs.labels.tolist())
    ]
    with closing(load_backend(kind, bundle, threads=1, precision="fp32")) as backend:
        assert isinstance(backend, BlockCaching)
        cache = manifest.backbones[f"every-{every}"].block_cache
        assert cache is not None
        caching = backend.with_block_cache(bundle, cache)
        assert isinstance(caching, CachingBackend)
        made = drawn(backend, requests, backbones={f"every-{every}": caching})
        caching.close()
        # The other still has its weights.
        whole = replace(rung, stretches=())
        drawn(backend, [replace(requests[0], rung=whole, requested=whole)])
    served = np.stack([made[request.id] for request in requests])
    if manifest.decoder == "identity":
        served = served.clip(-1, 1)
    np.testing.assert_allclose(served, offline, atol=2e-4)


def asked(
    name: str, seed: int, rung: Rung, labels: tuple[int | None, ...], manifest: Manifest
) -> SampleRequest:
    return SampleRequest(
        id=name,
        condition=(ConditionTerm(labels),),
        mix="linear",
        seed=seed,
        rung=rung,
        requested=rung,
        guidance_scale=manifest.defaults.guidance_scale,
        previews=0,
        deadline_at=None,
        allow_degraded=True,
        consent=Consent(),
    )


def _class(index: int, classes: int) -> int | None:
    return None if index == classes else index


def test_both_parts_together_are_the_network(cached_bundle: Path) -> None:
    model = load_bundle(Bundle.open(cached_bundle))
    network, config = model.dit, model.dit.config
    # Clips may be of another size.
    size = config.image_size if config.has_layout else (2, 12, 20)
    x = torch.randn(2, config.in_channels, *size, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(2, len(config.classes), dtype=torch.int64)
    with torch.no_grad():
        state = network.modulate(torch.full((2,), 500.0), network.embed(labels))
        change = network.trunk(x, state, 1)
        together = network.tail(x, state, change, 1)
    assert change.shape == (2, *(s // p for s, p in zip(size, config.patch, strict=True)), config.hidden_size)
    torch.testing.assert_close(together, network.backbone(x, state), atol=1e-5, rtol=1e-5)


def test_the_ladder_tries_whole_pictures_with_every_cache(cached_bundle: Path) -> None:
    manifest = Bundle.open(cached_bundle).manifest
    points = [point for point in stitched_points(manifest) if point.stretches]
    assert {len(point.stretches) for point in points} == {1}
    assert {point.stretches[0].above for point in points} == {0.0}
    point = next(point for point in points if point.steps == 10 and "every-3" in point.name)
    assert point.rows(manifest) == pytest.approx(20 * manifest.backbones["every-3"].row_cost, abs=1e-3)
    assert Ladder.from_manifest(manifest).rungs[0].stretches == ()


@pytest.mark.parametrize("size", [(16, 24), (4, 8, 12)])
def test_a_table_of_positions_is_stored_by_axis(size: tuple[int, ...], tmp_path: Path) -> None:
    config = replace(CONFIG, image_size=size, patch_size=2, head_channels=0, layout_rank=4)
    network = tiny_dit(config)
    graph = trunk_graph(network, 1)
    onnx.save(graph, tmp_path / "trunk.onnx")
    stored = {
        tensor.name: tensor.dims for tensor in graph.graph.initializer if tensor.name.startswith("pos_")
    }
    assert max(np.prod(dims) for dims in stored.values()) < network.pos_embed.numel() / 4
    x = torch.randn(2, config.in_channels, *size, generator=torch.Generator().manual_seed(0))
    state = network.modulate(torch.full((2,), 500.0), network.embed(torch.zeros(2, 2, dtype=torch.int64)))
    session = open_session(tmp_path / "trunk.onnx")
    inputs = {"x": x.numpy(), **{n: t.numpy() for n, t in zip(network.state_names, state, strict=True)}}
    change = run(session, {entry.name: inputs[entry.name] for entry in session.get_inputs()})["change"]
    np.testing.assert_allclose(change, network.trunk(x, state, 1).numpy(), atol=2e-5)


def test_a_user_s_mistakes_are_told(
    own_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, sentence in (
        (["--blocks", "2"], "backbones.every-2.block_cache.blocks: must be below the 2 blocks, not 2"),
        (["--every", "1"], "every: Input should be greater than or equal to 2"),
        (["--every", "99"], "every: Input should be less than or equal to 16"),
    ):
        assert main([str(own_bundle), *arguments]) == 2
        assert sentence in capsys.readouterr().err
    assert not (own_bundle / "trunk.onnx").exists()
    assert main([str(tmp_path / "nowhere")]) == 2
    assert main([str(own_bundle), "--every", "4"]) == 0
    assert "run at one of 4 steps" in capsys.readouterr().out
    # Another time they take the place of those before.
    assert list(add_block_caches(own_bundle, (2,)).backbones) == ["every-2"]
    manifest = json.loads((own_bundle / MANIFEST).read_text())
    manifest["backbones"]["other"] = {
        **manifest["backbones"]["every-2"],
        "block_cache": {"blocks": 3, "every": 3},
    }
    (own_bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"block_cache\.blocks: must be below"):
        Bundle.open(own_bundle)


def test_a_network_that_is_no_dit_has_no_blocks_to_cache(own_bundle: Path, monkeypatch: Any) -> None:
    loaded = load_bundle(Bundle.open(own_bundle))
    other = replace(loaded, network=cast(Any, torch.nn.Linear(1, 1)))
    monkeypatch.setattr(block_cache, "load_bundle", lambda bundle: other)
    with pytest.raises(ExportError, match="is a U-Net"):
        add_block_caches(own_bundle)
