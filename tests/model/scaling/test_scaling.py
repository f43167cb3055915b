"""A family of tiny networks, from its configuration to the law: equal compute, resumption, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ditserve.model.nets.cost import cost
from ditserve.model.scaling.__main__ import main
from ditserve.model.scaling.family import Family, plan_runs
from ditserve.model.scaling.law import Law, LawTerm
from ditserve.model.scaling.record import Measurement, ScalingRecord
from ditserve.model.scaling.report import interval, network_table, write_report
from ditserve.model.train.dry_run import MemoryEstimate, StageCost
from ditserve.model.train.load import load_model
from tests.model.train.training_cases import tiny_run, write_pictures

MODELS: dict[str, dict[str, Any]] = {
    "DiT-16": {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 1},
    "DiT-32": {"patch_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 2},
    "U-Net": {
        "network": "unet",
        "base_channels": 8,
        "multipliers": [1, 2],
        "res_blocks": 1,
        "attention": [],
        "head_size": 8,
    },
}


RECORD = ScalingRecord(
    family=Family(train=Path("run.json"), models={"a": {}}, flops=1.0), machine="1 of 2 cores, Linux"
)


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Any]:
    """Return a family of two DiTs and a U-Net, on eight names in two styles."""
    config = tiny_run(tmp_path)
    config["data"]["path"] = str(write_pictures(tmp_path / "set.npz", names=tuple("acdefghi")))
    config["data"]["hold_out"] = 0.3
    (tmp_path / "run.json").write_text(json.dumps(config))
    return {"train": str(tmp_path / "run.json"), "models": MODELS, "flops": 8e7, "looks": 2}


def command(family: dict[str, Any], folder: Path) -> list[str]:
    file = folder / "family.json"
    file.write_text(json.dumps(family))
    return [str(file), "--out", str(folder / "out"), "--draws", "3"]


def looks(folder: Path) -> tuple[Measurement, ...]:
    return ScalingRecord.model_validate_json((folder / "out" / "scaling.json").read_text()).looks


def test_all_runs_get_the_same_compute_and_are_measured_on_the_way(
    family: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(family, tmp_path)) == 0
    measured = looks(tmp_path)
    assert [look.run for look in measured] == [name for name in MODELS for _ in range(2)]
    for half, full in zip(measured[::2], measured[1::2], strict=True):
        assert half.step == full.step // 2
        assert full.flops == pytest.approx(8e7, rel=0.6 / full.step)
        assert half.loss > 0
    assert len({look.step for look in measured[1::2]}) == 3
    text = capsys.readouterr().out
    assert "| U-Net | " in text
    assert "No law was fitted: 4 measured losses are too few to fit 5 numbers" in text
    assert load_model(tmp_path / "out" / "DiT-32").dit.config.hidden_size == 32


def test_what_was_measured_is_not_trained_again(family: dict[str, Any], tmp_path: Path) -> None:
    family["models"] = {"DiT-16": MODELS["DiT-16"]}
    assert main(command(family, tmp_path)) == 0
    file = tmp_path / "out" / "scaling.json"
    complete = json.loads(file.read_text())
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out" / "DiT-16").rglob("*"))]
    assert main(command(family, tmp_path)) == 0
    assert json.loads(file.read_text()) == complete
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "out" / "DiT-16").rglob("*"))] == times
    newest = sorted((tmp_path / "out" / "DiT-16" / "checkpoints").iterdir())[-1]
    (newest / "state.json").unlink()  # as if it had been killed after the first look
    file.write_text(json.dumps({**complete, "looks": complete["looks"][:1]}))
    assert main(command(family, tmp_path)) == 0
    again = looks(tmp_path)
    assert [look.loss for look in again] == [look["loss"] for look in complete["looks"]]


def test_less_data_is_what_more_pairs_held_out_leave(family: dict[str, Any], tmp_path: Path) -> None:
    family |= {"models": {"DiT-16": MODELS["DiT-16"]}, "hold_outs": [0.3, 0.6], "looks": 1, "flops": 2e7}
    assert main(command(family, tmp_path)) == 0
    more, less = looks(tmp_path)
    assert more.pictures > less.pictures
    assert (more.run, less.run) == ("DiT-16, 0.3 held out", "DiT-16, 0.6 held out")


def test_rates_fall_with_the_square_root_of_the_parameters_if_asked(
    family: dict[str, Any], tmp_path: Path
) -> None:
    family |= {"models": {**MODELS, "named": "DiT-S/4"}, "flops": 1e12, "looks": 1}
    for scaled in (False, True):
        given = Family.model_validate({**family, "scale_lr": scaled})
        runs = list(plan_runs(given, None, tmp_path / "out"))
        sizes = [cost(run.config.network_config(run.config.open_dataset())).parameters for run in runs]
        rates = [run.config.lr * (size**0.5 if scaled else 1) for run, size in zip(runs, sizes, strict=True)]
        assert rates == pytest.approx([rates[0]] * 4)
        assert runs[0].config.lr == 1e-3
    assert sizes[3] > 30e6


def test_a_family_that_follows_a_law_is_fitted_and_drawn(tmp_path: Path) -> None:
    law = Law({"parameters": LawTerm(0.4, 0.35, 1e6), "flops": LawTerm(0.5, 0.28, 1e12)}, 0.2)
    measured = [
        Measurement(
            run=f"DiT-{size:.0e}",
            model=f"DiT-{size:.0e}",
            network="dit",
            parameters=int(size),
            pictures=1000,
            step=k,
            flops=flops,
            loss=float(law.loss(parameters=size, flops=flops)),
        )
        for size in (3e5, 1e6, 3e6, 1e7)
        for k, flops in enumerate((1e11, 1e12, 1e13))
    ]
    unet = measured[0].model_copy(update={"run": "U-Net", "network": "unet", "loss": 9.0})
    text = write_report(RECORD.model_copy(update={"looks": (*measured, unet)}), {}, 5, tmp_path)
    assert (tmp_path / "scaling.md").read_text() == text
    fitted = ScalingRecord.model_validate_json((tmp_path / "scaling.json").read_text()).law
    assert fitted["parameters_exponent"][0] == pytest.approx(0.35, rel=1e-2)
    assert fitted["irreducible"][0] == pytest.approx(0.2, rel=1e-2)
    with Image.open(tmp_path / "scaling.png") as picture:
        assert picture.width > picture.height > 300


def test_the_table_shows_the_last_look_of_each_run() -> None:
    sizes: dict[str, Any] = {"parameters": 1_500_000, "pictures": 9, "step": 10, "flops": 2e12}
    look = Measurement(run="a, 0.1 held out", model="a", network="dit", loss=0.5, **sizes)
    earlier = look.model_copy(update={"step": 5, "loss": 0.7})
    fewer = look.model_copy(update={"run": "a, 0.5 held out", "pictures": 5, "loss": 0.6})
    cost = StageCost((8, 8), 10, 500_000_000, 1, 12.0, 1.0, MemoryEstimate(99 << 20, 0, 0, 0, 0, 0))
    record = RECORD.model_copy(update={"looks": (look, earlier, fewer)})
    header, _, *rows = network_table(record, {"a": cost}).splitlines()
    assert header.endswith("| steps | loss, 9 pictures | loss, 5 pictures |")
    assert rows == ["| a | 1.50 M | 1.000 | 99 MiB | 12 | 10 | 0.5000 | 0.6000 |"]


def test_an_interval_is_the_middle_nine_tenths() -> None:
    assert interval(7.0, [float(k) for k in range(101)]) == (7.0, 5.0, 95.0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"flops": 1e3}, "raise flops or lower looks"),
        ({"flops": -1}, "flops: "),
        ({"models": {"x": {"hidden_sise": 3}}}, "has no field 'hidden_sise'"),
        ({"hold_outs": [0.0001]}, "the loss is measured on those"),
        ({"colour": 1}, "colour"),
        ({"train": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_a_family_that_cannot_be_trained_is_refused(
    changes: dict[str, Any],
    sentence: str,
    family: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(command({**family, **changes}, tmp_path)) == 2
    message = capsys.readouterr().err
    assert message.startswith("model.scaling: ")
    assert message.count("\n") == 1
    assert sentence in message


def test_results_of_another_family_are_kept(
    family: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scaling.json").write_text(RECORD.model_dump_json())
    assert main(command(family, tmp_path)) == 2
    assert "results of another family" in capsys.readouterr().err
    (tmp_path / "out" / "scaling.json").write_text('{"family": 3, "looks": []}')
    assert main(command(family, tmp_path)) == 2
    assert "out/scaling.json does not hold a family's results: field family" in capsys.readouterr().err
