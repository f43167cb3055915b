"""Variants side by side: what was trained and judged is not done again, and the table holds all of them."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ditserve.bench import report
from ditserve.bench.variants.forward import NETWORKS, SCAN, ForwardCost, build, measure_forward
from ditserve.bench.variants.scan import STATES, SelectiveScan
from ditserve.bench.variants.table import VariantResult, markdown
from ditserve.model.scaling.family import Family
from tests.model.train.training_cases import tiny_run, write_pictures

command = importlib.import_module("ditserve.bench.variants.__main__")
TINY = {"patch_size": 16, "hidden_size": 16, "depth": 1, "num_heads": 2}
MODELS = {"full": TINY, "windows": {**TINY, "attention": "window:2"}}


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line for two tiny networks, with one cost of a row alone that is made up."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    made_up = ForwardCost("full", 64, 1.0, 1 << 20, None)
    monkeypatch.setattr(command, "forward_costs", lambda sides, threads: [made_up])
    data = write_pictures(tmp_path / "large.npz", names=tuple("acdefghi"), size=64)
    run = tiny_run(tmp_path)
    run["data"] |= {"path": str(data), "hold_out": 0.3}
    (tmp_path / "run.json").write_text(json.dumps(run))
    family = {"train": str(tmp_path / "run.json"), "models": MODELS, "flops": 2e7, "looks": 1}
    (tmp_path / "family.json").write_text(json.dumps(family))
    paths = ["--data", str(data), "--out", str(tmp_path / "out"), "--family", str(tmp_path / "family.json")]
    return [*paths, "--pictures", "4", "--seeds", "2"]


def test_all_variants_stand_in_one_table(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.main(arguments) == 0
    record = json.loads((tmp_path / "results/variants.json").read_text())
    assert [row["name"] for row in record["trained"]] == [
        *("full", "full, 25% merged", "full, 50% merged", "windows")
    ]
    whole, _, merged, windows = record["trained"]
    assert {row["beside"] for row in record["trained"]} == {"full"}
    assert len(whole["losses"]) == len(windows["distances"]) == 2
    assert merged["losses"] == []
    assert merged["macs"] < whole["macs"]
    assert merged["distances"] != whole["distances"]
    assert windows["attention_macs"] < whole["attention_macs"]
    text = (tmp_path / "results/variants.md").read_text()
    assert sum(line.startswith("|windows|") for line in text.splitlines()) == 1
    assert (tmp_path / "results/variants.png").is_file()
    assert (tmp_path / "results/variants-trained.png").is_file()
    monkeypatch.setattr(command.Judge, "distance", lambda *_: pytest.fail("judged again"))
    trained = sorted((tmp_path / "out").rglob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in trained]
    assert command.main(arguments) == 0
    assert [path.stat().st_mtime_ns for path in trained] == times


def test_the_table_grows_with_every_network(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends in the middle has a table of what was done, and goes on there."""
    judge = command.Judge.distance

    def interrupted(self: object, variant: Any) -> float:
        if variant.title == "windows":
            raise KeyboardInterrupt
        return float(judge(self, variant))

    monkeypatch.setattr(command.Judge, "distance", interrupted)
    assert command.main(arguments) == 130
    record = json.loads((tmp_path / "results/variants.json").read_text())
    assert [len(row["distances"]) for row in record["trained"]] == [1, 1, 1]
    assert "One seed tells no variant from another" in (tmp_path / "results/variants.md").read_text()
    assert "and with 1 of 2 seeds" in (tmp_path / "results/variants.md").read_text()
    monkeypatch.setattr(command.Judge, "distance", judge)
    assert command.main(arguments) == 0
    record = json.loads((tmp_path / "results/variants.json").read_text())
    assert [len(row["distances"]) for row in record["trained"]] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("distances", "row_ms", "pays"),
    [
        ([5.0, 5.2, 4.8], 10.0, True),
        ([5.0, 5.2, 4.8], 11.0, False),
        ([6.0, 6.4, 5.6], 9.0, True),
        ([6.0, 6.4, 5.6], 9.9, False),
        ([7.0, 7.2, 6.8], 9.0, False),
    ],
)
def test_a_variant_pays_that_is_nearer_or_faster_and_not_worse(
    distances: list[float], row_ms: float, pays: bool
) -> None:
    plain = VariantResult("full", "full", 64, 1, 1, 1, 1, 1, [0.1] * 3, [6.0, 6.2, 5.8], 10.0, 1, 1)
    other = replace(plain, name="other", distances=distances, row_ms=row_ms)
    text = markdown([plain, other], [], command.parse(["--flops", "4e12", "--seeds", "3"]))
    assert ("Pay: other. Do not: none." in text) is pays
    assert ("Pay: none. Do not: other." in text) is not pays


def test_a_mistake_is_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*arguments, "--flops", "-1"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("bench.variants: ")
    assert message.count("\n") == 1
    assert command.main([*arguments, "--family", "nowhere.json"]) == 2


def test_pictures_that_cannot_be_judged_are_refused_before_training(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = json.loads((tmp_path / "family.json").read_text())
    (tmp_path / "family.json").write_text(json.dumps({**family, "set": ["data.size=32"]}))
    assert command.main(arguments) == 2
    assert "data.size is 32×32, and the classifier that judges reads 64×64" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_family_that_ships_can_be_built() -> None:
    """Every kind is in it at 64 and at 256 tokens, beside the U-Net."""
    family = Family.model_validate_json(command.FAMILY.read_text())
    assert "U-Net" in family.models
    for tokens in (64, 256):
        assert sum(f"{tokens} tokens" in name for name in family.models) >= 7


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_of_a_row_alone_runs(name: str) -> None:
    network = build(name, 16)
    x, labels = torch.randn(1, 3, 32, 32), torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        assert network(x, torch.full((1,), 500.0), labels).shape == x.shape


def test_time_and_memory_of_a_row_are_measured() -> None:
    cost = measure_forward("full", 48, 1)
    assert cost.tokens == 48 * 48
    assert cost.forward_ms > 0
    # The hidden channels of the MLP alone.
    assert cost.forward_bytes > cost.tokens * 4 * 192 * 4
    assert cost.training_ms is None


def test_a_scan_is_its_recurrence() -> None:
    """Channel by channel and state by state, in plain numbers."""
    torch.manual_seed(0)
    scan, x = SelectiveScan(2), torch.randn(1, 4, 2)
    with torch.no_grad():
        actual = scan(x)
        write, read = scan.read_write(x).chunk(2, dim=-1)
        step = torch.nn.functional.softplus(scan.step(x))
        for channel in range(2):
            states = [0.0] * STATES
            for t in range(4):
                delta, value = float(step[0, t, channel]), float(x[0, t, channel])
                for k in range(STATES):
                    decay = torch.exp(torch.tensor(-delta * (k + 1)))
                    states[k] = float(decay) * states[k] + delta * float(write[0, t, k]) * value
                total = sum(state * float(read[0, t, k]) for k, state in enumerate(states))
                assert float(actual[0, t, channel]) == pytest.approx(total + value, abs=1e-4)
    assert SCAN in NETWORKS
