"""Sampling offline: seeds, solvers, guidance, combined conditions, and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from model.bundle import Defaults, DiffusionSpec, Factor, Manifest, StateTensor, write_manifest
from model.config import DiTConfig
from model.denoise import Conditions, Denoiser, Guidance, denoise, noise
from model.diffusion import Schedule, grid, make_schedule
from model.dit import DiT
from model.opening import OpenError, open_model
from model.sample import (
    SampleError,
    Term,
    class_sheet,
    combine,
    embeddings,
    main,
    parse_condition,
    picture_grid,
    sample_sheet,
    to_pixels,
)
from model.solvers import learned_log_variance, step_table, variance_bounds

Tiny = Callable[..., DiTConfig]
Make = Callable[..., DiT]
FACTORS = (
    Factor(name="label", classes=("cat", "dog", "fox", "owl", "bee")),
    Factor(name="style", classes=("flat", "shaded", "line")),
)


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as opened:
        return opened.size


class CountingEncoder:
    """Three numbers about a sentence; stands in for a language model."""

    size = 3

    def encode(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.array([[len(each), each.count(" ") + 1, 1] for each in sentences], np.float32)


@pytest.fixture
def schedule() -> Schedule:
    return make_schedule("cosine", prediction="x0")


@pytest.fixture
def bundle(network: Make, tmp_path: Path) -> Path:
    """A bundle of a tiny random model."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    dit = network()
    save_file(dit.state_dict(), folder / "weights.safetensors")
    manifest = Manifest(
        name="tiny",
        version="1",
        description="",
        config=dit.config,
        diffusion=DiffusionSpec(schedule="cosine", prediction="x0"),
        factors=FACTORS,
        embedding_size=32,
        state=tuple(StateTensor(name=name, shape=shape) for name, shape in dit.config.state()),
        defaults=Defaults(
            steps=3, solver="ddim", grid="trailing", guidance_scale=2, guidance_interval=(0, 1)
        ),
        licence="MIT",
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def finished_run(network: Make, tiny: Tiny, tmp_path: Path) -> Path:
    """A training run's folder as the trainer leaves it."""
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "set.npz",
        x=rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8),
        y=np.arange(5),
        names=np.array(FACTORS[0].classes),
    )
    shape = {
        "patch_size": 2,
        "in_channels": 3,
        "hidden_size": 32,
        "depth": 3,
        "num_heads": 2,
        "learn_sigma": False,
    }
    folder = tmp_path / "run"
    step = folder / "checkpoints/step-0000010"
    step.mkdir(parents=True)
    (step.parent / "step-0000020").mkdir()  # being written: the one before it is used
    save_file(dict(network(tiny(classes=(5,))).named_parameters()), step / "ema.safetensors")
    config = {"data": {"path": str(tmp_path / "set.npz")}, "model": shape}
    config["diffusion"] = {"schedule": "cosine", "prediction": "x0"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def final(denoiser: Denoiser, solver: str, steps: int, seeds: Sequence[int], **options: Any) -> Tensor:
    table = step_table(solver, grid("trailing", steps), denoiser.schedule, **options)
    *_, x0 = denoise(denoiser, table, seeds)
    return x0


def conditions(dit: DiT, *labels: list[int], rows: int = 1) -> list[Tensor]:
    return [dit.embed(torch.tensor([label])).expand(rows, -1) for label in labels]


def test_a_seed_is_its_own_noise() -> None:
    expected = np.random.Generator(np.random.Philox(7)).standard_normal((3, 8, 8), dtype=np.float32)
    np.testing.assert_array_equal(noise(7, (3, 8, 8)), expected)


@pytest.mark.parametrize(
    ("solver", "options"), [("ddim", {}), ("dpmpp-2m", {}), ("ddpm", {}), ("ddim", {"eta": 0.5})]
)
def test_a_sample_does_not_depend_on_its_batch(
    network: Make, schedule: Schedule, solver: str, options: dict[str, Any]
) -> None:
    dit = network()
    three = Denoiser(dit, schedule, Conditions(tuple(conditions(dit, [1, 2], rows=3))), Guidance(2.0))
    one = Denoiser(dit, schedule, Conditions(tuple(conditions(dit, [1, 2]))), Guidance(2.0))
    together, alone = final(three, solver, 4, [5, 6, 7], **options), final(one, solver, 4, [6], **options)
    assert torch.allclose(together[1:2], alone, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_ddim_by_hand(network: Make, schedule: Schedule) -> None:
    """x0 → noise → next x, as in arXiv:2010.02502 eq. 12, with guidance on the raw output."""
    dit = network()
    label, null = torch.tensor([[1, 2]]), torch.tensor([[5, 3]])
    x = torch.from_numpy(noise(3, (3, 8, 8)))[None]
    steps = grid("trailing", 4)
    with torch.no_grad():
        for now, after in zip(steps, (*steps[1:], -1), strict=True):
            t = torch.tensor([float(now)])
            empty = dit(x, t, null)
            x0 = (empty + 1.7 * (dit(x, t, label) - empty)).clamp(-1, 1)
            epsilon = (x - schedule.alpha(now) * x0) / schedule.sigma(now)
            x = schedule.alpha(after) * x0 + schedule.sigma(after) * epsilon
    denoiser = Denoiser(dit, schedule, Conditions(tuple(conditions(dit, [1, 2]))), Guidance(1.7))
    assert torch.allclose(final(denoiser, "ddim", 4, [3]), x, atol=1e-4)


def test_learned_variance_scales_the_noise(tiny: Tiny, network: Make) -> None:
    """One DDPM step on a model of learned variance, written out: the mean plus exp(log variance / 2) · z."""
    dit = network(tiny(learn_sigma=True))
    schedule = make_schedule("linear")
    table = step_table("ddpm", (900, 400), schedule)
    denoiser = Denoiser(dit, schedule, Conditions(tuple(conditions(dit, [1, 2]))))
    first, second = denoise(denoiser, table, [3])
    source = np.random.Generator(np.random.Philox(3))
    x, z = (torch.from_numpy(source.standard_normal((1, 3, 8, 8), dtype=np.float32)) for _ in range(2))
    with torch.no_grad():
        output, v = dit(x, torch.tensor([900.0]), torch.tensor([[1, 2]])).chunk(2, dim=1)
        x0 = (table.x0_x[0] * x + table.x0_out[0] * output).clamp(-1, 1)
        low, high = variance_bounds((900, 400), schedule)
        deviation = torch.exp(0.5 * learned_log_variance(v, low[0], high[0]))
        x = table.a[0] * x + table.b[0] * x0 + deviation * z
        output, _ = dit(x.float(), torch.tensor([400.0]), torch.tensor([[1, 2]])).chunk(2, dim=1)
    assert torch.allclose(first, x0.float(), atol=1e-4)
    assert torch.allclose(
        second, (table.x0_x[1] * x + table.x0_out[1] * output).clamp(-1, 1).float(), atol=1e-3
    )


def test_guidance_interval_and_channels(network: Make, schedule: Schedule) -> None:
    dit = network()
    x, parts = torch.randn(2, 3, 8, 8), Conditions(tuple(conditions(dit, [1, 2], rows=2)))

    def output(guidance: Guidance, t: int = 500) -> Tensor:
        return Denoiser(dit, schedule, parts, guidance)(x, t)

    plain, full = output(Guidance()), output(Guidance(3.0))
    assert torch.equal(output(Guidance(3.0, interval=(0.6, 1.0))), plain)
    assert torch.equal(output(Guidance(3.0, interval=(0.4, 1.0))), full)
    two = output(Guidance(3.0, channels=2))
    assert torch.equal(two[:, :2], full[:, :2])
    assert torch.equal(two[:, 2:], plain[:, 2:])
    assert not torch.allclose(output(Guidance(3.0, decay=2.0)), full)


def test_composition_is_a_sum_of_differences(network: Make, schedule: Schedule) -> None:
    dit = network()
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([500.0])
    cat, fox, empty = (dit(x, t, torch.tensor([label])) for label in ([0, 3], [2, 3], [5, 3]))
    parts = combine([e[0] for e in conditions(dit, [0, 3], [2, 3])], [3, 1], "compose", 1)
    got = Denoiser(dit, schedule, parts, Guidance(2.0))(x, 500)
    assert torch.allclose(got, empty + 2 * (0.75 * (cat - empty) + 0.25 * (fox - empty)), atol=1e-4)


def test_layers_and_mixes_differ_from_either(network: Make, schedule: Schedule) -> None:
    dit = network()
    x = torch.randn(1, 3, 8, 8)
    cat, fox = (e[0] for e in conditions(dit, [0, 3], [2, 3]))
    outs = [
        Denoiser(dit, schedule, combine(parts, [1] * len(parts), how, 1))(x, 500)  # type: ignore[arg-type]
        for parts, how in (
            ([cat], "linear"),
            ([fox], "linear"),
            ([cat, fox], "linear"),
            ([cat, fox], "spherical"),
            ([cat, fox], "layers"),
            ([cat, fox], "compose"),
        )
    ]
    for k, one in enumerate(outs):
        assert all(not torch.allclose(one, other, atol=1e-5) for other in outs[k + 1 :])
    same = Denoiser(dit, schedule, combine([cat, cat], [1, 1], "layers", 1))(x, 500)
    assert torch.allclose(same, outs[0], atol=1e-6)


def test_pixels_and_picture_grid() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).reshape(5, 1, 1, 1).expand(5, 3, 2, 2)
    pixels = to_pixels(x)
    assert pixels[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    picture = np.asarray(picture_grid(pixels, 3))
    assert picture.shape == (4, 6, 3)
    assert picture[0, ::2, 0].tolist() == [0, 0, 128]
    assert picture[2, ::2, 0].tolist() == [255, 255, 255]  # the last is padding


def test_class_sheets() -> None:
    assert class_sheet((3, 2)) == ([(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)], 3)
    assert class_sheet((100,), 4) == ([(0,), (25,), (50,), (75,)], 4)
    assert class_sheet((2, 1, 9)) == ([(0, 0, None), (1, 0, None)], 2)
    assert class_sheet((), 2) == ([(), ()], 2)


def test_sheet_of_a_model(network: Make, schedule: Schedule) -> None:
    assert sample_sheet(network(), schedule, steps=2).size == (5 * 8, 3 * 8)


def test_conditions_are_parsed() -> None:
    assert parse_condition("", FACTORS) == Term((None, None))
    assert parse_condition("style=line,label=fox,weight=0.5", FACTORS) == Term((2, 2), None, 0.5)
    assert parse_condition("text=a fox, in snow,label=fox", FACTORS) == Term((2, None), "a fox, in snow")
    for text, message in (
        ("colour=red", "no factor 'colour'; it has label, style"),
        ("label=caat", r"no class 'caat'; did you mean cat"),
        ("label=zzzzz", "for example cat, dog, fox"),
        ("label=cat,weight=much", "not a number"),
    ):
        with pytest.raises(SampleError, match=message):
            parse_condition(text, FACTORS)


def test_text_goes_through_the_named_encoder(
    tiny: Tiny, network: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.sample.open_encoder", lambda name: CountingEncoder())
    dit = network(tiny(text_size=3))
    terms = [Term((1, None), "a fox"), Term((1, None))]
    with_text, without = embeddings(dit, terms, "counting")
    labels = torch.tensor([[1, 3]])
    assert torch.allclose(with_text, dit.embed(labels, torch.tensor([[5.0, 2.0, 1.0]]))[0])
    assert torch.allclose(without, dit.embed(labels)[0])
    with pytest.raises(SampleError, match="gives 3 numbers, the model takes 7"):
        embeddings(network(tiny(text_size=7)), terms, "counting")
    with pytest.raises(SampleError, match="takes no text"):
        embeddings(network(), terms, "counting")


def test_command_line_on_a_bundle(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep/out.png"
    command = [str(bundle), "-c", "label=fox,style=flat", "-c", "label=cat", "--count", "3", "-o", str(out)]
    assert main([*command, "--combine", "layers", "--progress"]) == 0
    assert size_of(out) == (24, 8)
    told = capsys.readouterr().out
    assert f"wrote {out} (24×8)" in told
    first = out.read_bytes()
    assert main([*command, "--combine", "layers", "--seed", "1"]) == 0
    assert out.read_bytes() != first


def test_command_line_without_condition_makes_a_sheet(bundle: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "sheet.png")
    assert main([str(bundle), "-o", out, "--solver", "ddpm", "--steps", "2", "--size", "16", "8"]) == 0
    assert size_of(Path(out)) == (5 * 8, 3 * 16)


def test_command_line_on_a_run(finished_run: Path, tmp_path: Path) -> None:
    assert main([str(finished_run), "-c", "label=owl", "--steps", "2", "-o", str(tmp_path / "out.png")]) == 0
    opened = open_model(finished_run)
    assert opened.factors[0].classes == FACTORS[0].classes
    assert opened.model.config.classes == (5,)
    (finished_run / "checkpoints/step-0000010/ema.safetensors").unlink()
    with pytest.raises(OpenError, match="no readable checkpoint"):
        open_model(finished_run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "neither a bundle"),
        (["BUNDLE", "-c", "label=dgo"], "did you mean dog"),
        (["BUNDLE", "-c", "label=cat", "-c", "label=fox,weight=-1"], "sum to more than 0"),
        (["BUNDLE", "--steps", "2000"], r"steps must be in 1..1000"),
        (["BUNDLE", "--solver", "magic"], "solver must be one of"),
        (["BUNDLE", "--size", "7", "8"], "not a multiple of the patch"),
        (["BUNDLE", "--interval", "0.5", "0.2"], "interval"),
        (["BUNDLE", "-c", "text=a fox"], "takes no text"),
        (["RUN", "--data", "absent.npz"], "absent.npz does not exist"),
        (["BROKEN"], "not the configuration of a training run"),
    ],
)
def test_errors_are_one_sentence(
    bundle: Path,
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text('{"model": 3}')
    places = {"BUNDLE": str(bundle), "RUN": str(finished_run), "BROKEN": str(tmp_path / "broken")}
    command = [places.get(argument, argument) for argument in arguments]
    assert main([*command, "-o", str(tmp_path / "out.png")]) == 2
    captured = capsys.readouterr().err
    assert message.replace("\\", "") in captured
    assert captured.strip().count("\n") == 0
    assert captured.startswith("model.sample: ")


def test_weights_that_do_not_fit_are_listed(bundle: Path, network: Make) -> None:
    state = dict(network().state_dict())
    state["x_embedder.proj.bias"] = torch.zeros(3)
    save_file(state, bundle / "weights.safetensors")
    from_manifest = json.loads((bundle / "manifest.json").read_text())
    write_manifest(bundle, Manifest.model_validate(from_manifest))
    with pytest.raises(OpenError, match=r"wrong shape \(1\): x_embedder.proj.bias \(3,\) instead of \(32,\)"):
        open_model(bundle)
