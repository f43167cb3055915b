"""The content of a bundle after export, and the reasons that stop an export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from safetensors.torch import save_file

from ditserve.export.calibrate import TrajectorySettings
from ditserve.export.errors import ExportError
from ditserve.export.onnx import ExportOptions, export_bundle, main
from ditserve.export.source import open_source, parameters
from ditserve.export.verify import LIMITS, ParityLimits, open_session, run
from ditserve.model.nets.conditioner import null_labels
from ditserve.model.spec.bundle import Bundle
from tests.export.tiny import CONFIG, GRAPHS, tiny_dit, tiny_source


def through_graphs(
    bundle: Path, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor
) -> npt.NDArray[np.float32]:
    names = [factor.name for factor in Bundle.open(bundle).manifest.factors]
    columns = {name: labels[:, k].numpy() for k, name in enumerate(names)}
    embedding = run(open_session(bundle / "embedder.onnx"), columns)["embedding"]
    state = run(open_session(bundle / "conditioner.onnx"), {"timestep": t.numpy(), "embedding": embedding})
    output: npt.NDArray[np.float32] = run(open_session(bundle / "backbone.onnx"), {"x": x.numpy(), **state})[
        "output"
    ]
    return output


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_three_graphs_are_the_model_at_any_batch_size(tiny_bundle: Path, batch: int) -> None:
    source = open_source(tiny_bundle)
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 3, 16, 16, generator=generator)
    t = torch.randint(1000, (batch,), generator=generator).float()
    labels = null_labels(source.dit.config, batch).clone()
    labels[0] = torch.tensor([2, 1])
    with torch.no_grad():
        expected = source.network(x, t, labels)
    np.testing.assert_allclose(
        through_graphs(tiny_bundle, x, t, labels), expected.numpy(), rtol=1e-4, atol=1e-4
    )


def test_graphs_have_the_names_and_shapes_of_the_manifest(tiny_bundle: Path) -> None:
    state = {tensor.name: ["batch", *tensor.shape] for tensor in Bundle.open(tiny_bundle).manifest.state}
    expected = {
        "embedder.onnx": ({"label": ["batch"], "style": ["batch"]}, {"embedding": ["batch", 32]}),
        "conditioner.onnx": ({"timestep": ["batch"], "embedding": ["batch", 32]}, state),
        "backbone.onnx": ({"x": ["batch", 3, 16, 16], **state}, {"output": ["batch", 3, 16, 16]}),
    }
    for name, sides in expected.items():
        graph = onnx.load(tiny_bundle / name, load_external_data=False).graph
        shapes = tuple(
            {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in side}
            for side in (graph.input, graph.output)
        )
        assert shapes == sides


def test_nothing_of_the_exporting_machine_is_left(tiny_bundle: Path) -> None:
    for name in GRAPHS:
        proto = onnx.load(tiny_bundle / name, load_external_data=False)
        assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [20]
        assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
        raw = (tiny_bundle / name).read_bytes()
        assert not any(mark in raw for mark in (b"/home", b"site-packages", b".py", str(Path.cwd()).encode()))


def test_nodes_are_named_after_their_module(tiny_bundle: Path) -> None:
    nodes = onnx.load(tiny_bundle / "backbone.onnx", load_external_data=False).graph.node
    names = [node.name for node in nodes]
    assert {"blocks.1.attn.qkv/MatMul", "blocks.0.mlp.fc2/MatMul", "head.conv1/Conv"} <= set(names)
    assert len(set(names)) == len(names)
    assert sum(node.op_type == "Slice" for node in nodes) < 10  # modulation is split, not sliced apart


def test_weights_are_stored_once_in_half_precision(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    numbers = sum(parameter.numel() for parameter in parameters(tiny_dit()).values())
    assert bundle.manifest.files["weights.safetensors"].bytes < 2 * numbers + 8192
    assert bundle.manifest.provenance["export"]["weights"] == "fp16"
    assert sum((tiny_bundle / name).stat().st_size for name in GRAPHS) < 64_000


def test_the_parity_report_covers_every_noise_band(tiny_bundle: Path) -> None:
    parity = json.loads((tiny_bundle / "parity.json").read_text())
    for name in GRAPHS:
        bands = parity["graphs"][name]
        assert [band["low"] for band in bands] == [k / 10 for k in range(10)]
        assert max(band["relative_l2"] for band in bands) < 1e-5
    assert 0 < max(band["relative_l2"] for band in parity["weights"]["error"]) < 3e-3


def test_a_graph_beyond_its_limit_stops_the_export_and_leaves_the_target(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in own_bundle.iterdir()}
    monkeypatch.setattr("ditserve.export.onnx.write_graphs", lambda network, manifest, folder: None)
    monkeypatch.setitem(LIMITS, "fp32", ParityLimits(relative_l2=0.0, cosine=2.0))
    monkeypatch.setattr(
        "ditserve.export.parity.open_session", lambda path, **_: open_session(own_bundle / path.name)
    )
    with pytest.raises(ExportError, match="embedder"):
        export_bundle(
            open_source(own_bundle),
            own_bundle,
            ExportOptions(trajectories=TrajectorySettings(samples=1, steps=2)),
        )
    assert {file.name: file.read_bytes() for file in own_bundle.iterdir()} == before
    assert [path.name for path in own_bundle.parent.iterdir()] == [own_bundle.name]


def training_run(folder: Path, *, output: str = "/somewhere/else") -> Path:
    """Write a run of `model.train` with the weights of the tiny model into `folder`."""
    pixels = np.zeros((8, 16, 16, 3), np.uint8)
    y, s = np.arange(8) // 2, np.arange(8) % 2
    names, styles = np.array(["circle", "square", "triangle", "star"]), np.array(["flat", "shaded"])
    np.savez(folder / "pictures.npz", x=pixels, y=y, s=s, names=names, styles=styles)
    shape = {
        name: getattr(CONFIG, name)
        for name in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads")
    }
    shape |= {"learn_sigma": False, "qk_norm": True, "layout_rank": 4, "head_channels": 6}
    config = {
        "data": {"path": str(folder / "pictures.npz"), "hold_out": 0.0},
        "output": output,
        "model": shape,
        "diffusion": tiny_source().manifest.diffusion.model_dump(),
        "steps": 10,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for step, seed in ((5, 1), (9, 2)):
        checkpoint = folder / "checkpoints" / f"step-{step:07d}"
        checkpoint.mkdir(parents=True)
        save_file(parameters(tiny_dit(seed=seed)), checkpoint / "ema.safetensors")
        (checkpoint / "state.json").write_text(json.dumps({"step": step}))
    return folder


def test_a_training_run_is_read_at_its_newest_checkpoint(tmp_path: Path) -> None:
    source = open_source(training_run(tmp_path))
    assert source.manifest.version == "0.9"
    newest = parameters(tiny_dit(seed=2))
    assert all(torch.equal(tensor, newest[name]) for name, tensor in parameters(source.dit).items())
    assert [(f.name, len(f.classes)) for f in source.manifest.factors] == [("label", 4), ("style", 2)]
    written = source.manifest.model_dump_json()
    assert str(tmp_path) not in written
    assert "/somewhere" not in written
    assert source.manifest.provenance["training"]["data"]["path"] == "pictures.npz"


def test_a_checkpoint_that_is_being_written_is_passed_over(tmp_path: Path) -> None:
    folder = training_run(tmp_path)
    newest = folder / "checkpoints" / "step-0000009" / "ema.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert open_source(folder).manifest.version == "0.5"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("nothing", r"is neither a bundle .* nor a training run"),
        ("no checkpoint", r"checkpoints holds no readable checkpoint"),
        ("other weights", r"step-0000009: the weights do not fit the configuration; wrong shape"),
        ("no pictures", r"say where they are with --data"),
        (
            "bad config",
            r"config\.json is not the configuration of a training run: field steps: Field required",
        ),
    ],
)
def test_a_source_that_cannot_be_exported_is_one_sentence(
    tmp_path: Path, spoil: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = training_run(tmp_path)
    newest = folder / "checkpoints" / "step-0000009"
    if spoil == "nothing":
        (folder / "config.json").unlink()
    elif spoil == "no checkpoint":
        (folder / "checkpoints").rename(folder / "moved")
    elif spoil == "other weights":
        save_file(parameters(tiny_dit(replace(CONFIG, hidden_size=64))), newest / "ema.safetensors")
    elif spoil == "no pictures":
        (folder / "pictures.npz").unlink()
    else:
        config = json.loads((folder / "config.json").read_text())
        del config["steps"]
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=words):
        open_source(folder)
    assert main([str(folder), "--out", str(tmp_path / "bundle")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("export.onnx: ")
    assert error.count("\n") == 1


def test_a_card_says_which_class_a_request_gets_that_names_none(
    own_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card, style = tmp_path / "card.json", open_source(own_bundle).manifest.factors[1]
    command = [str(own_bundle), "--out", str(tmp_path / "out"), "--card", str(card), "--steps", "2"]
    card.write_text(json.dumps({"default_classes": {style.name: style.classes[0]}}))
    assert main(command) == 0
    defaults = [factor.default for factor in Bundle.open(tmp_path / "out").manifest.factors]
    assert defaults == [None, style.classes[0]]
    for wrong, message in (
        ({"size": "large"}, "no factor 'size'"),
        ({style.name: "none"}, "of factor style"),
    ):
        card.write_text(json.dumps({"default_classes": wrong}))
        assert main(command) == 2
        assert message in capsys.readouterr().err


def test_a_card_that_is_wrong_names_its_field(
    own_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "card.json"
    card.write_text('{"licence": 7}')
    assert main([str(own_bundle), "--out", str(tmp_path / "out"), "--card", str(card)]) == 2
    assert "licence" in capsys.readouterr().err
    assert main([str(own_bundle), "--out", str(tmp_path / "out"), "--name", "../up"]) == 2
    assert "name" in capsys.readouterr().err
