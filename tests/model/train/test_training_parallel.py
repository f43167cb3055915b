"""`torchrun -m model.train`: several processes train as one would; others can resume their run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ditserve.model.train import training
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.load import load_model
from ditserve.model.train.tensor_shards import read_full
from ditserve.model.train.trainer import Trainer
from tests.model.train.parallel_runs import HALF_WAY, runs
from tests.model.train.training_cases import assert_same, config_file, newest_state, tiny_run, write_pictures

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def launch(raw: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    return launch_command("--config", config_file(raw, folder))


def launch_command(*words: str, module: str = "model.train") -> subprocess.Popen[str]:
    command = [sys.executable, *TORCHRUN, module, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def elements(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def newest(output: Path) -> Path:
    return sorted((output / "checkpoints").glob("step-*"))[-1]


def test_a_run_goes_on_after_a_process_is_killed_with_other_processes(tmp_path: Path) -> None:
    several = {"precision": "fp16", "embedding_l2": 0.01, "accumulate": 2, "ema": [0.9, 0.99]}
    raw = {**tiny_run(tmp_path), **several, "steps": 60, "checkpoint_every": 2}
    output = Path(str(raw["output"]))
    killed = launch({**raw, "parallel": {"mode": "fsdp"}}, tmp_path)
    while not list(output.glob("checkpoints/step-*[1-9]")) and killed.poll() is None:
        time.sleep(0.001)
    workers = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    killed.communicate()
    stopped = int(newest(output).name.removeprefix("step-"))
    assert 0 < stopped < 60
    raw["steps"] = stopped + 4

    sharded = newest(output)
    whole = read_full(sharded, "ema", json.loads((sharded / "state.json").read_text())["index"])
    held = load_file(sharded / "ema-00001-of-00002.safetensors")
    assert elements(held) < 0.51 * elements(whole)
    loaded = load_model(output).network.state_dict()
    assert all(torch.equal(whole[name], tensor) for name, tensor in loaded.items())
    trainer = Trainer(TrainConfig.model_validate(raw))
    assert trainer.resume() == sharded
    assert all(torch.equal(whole[name], average) for name, average in trainer.state.ema.first.items())

    resumed = launch({**raw, "parallel": {"mode": "ddp"}}, tmp_path)
    output_text, _ = resumed.communicate()
    assert resumed.returncode == 0, output_text
    assert output_text.count(f"resumed from {sharded}") == 1
    assert (newest(output) / "ema.safetensors").is_file()
    alone = TrainConfig.model_validate({**raw, "output": str(tmp_path / "alone")})
    training.train(alone)
    assert losses(output) == pytest.approx(losses(alone.output), rel=2e-3)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The folder of `parallel_runs`, the fields that are common to its runs, and what it printed."""
    folder = tmp_path_factory.mktemp("together")
    raw = tiny_run(folder)
    config_file(raw, folder)
    process = launch_command(str(folder), module="tests.model.train.parallel_runs")
    text, _ = process.communicate()
    assert process.returncode == 0, text
    return folder, raw, text


def test_a_sharded_run_that_is_resumed_is_the_uninterrupted_one_bit_for_bit(
    together: tuple[Path, dict[str, Any], str],
) -> None:
    folder, _, text = together
    outputs = [folder / "straight", folder / "straight-resumed"]
    assert f"resumed from {outputs[1] / HALF_WAY}" in text
    straight, resumed = (newest(output) for output in outputs)
    assert straight.name == resumed.name == "step-0000004"
    assert len(list(straight.glob("*-of-00002.safetensors"))) == 2 * 4  # weights, moments, two averages
    assert_same(newest_state(outputs[0]), newest_state(outputs[1]))
    assert (straight / "state.json").read_text() == (resumed / "state.json").read_text()


def test_a_run_in_tensor_parallel_is_the_run_of_one_process(
    together: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    folder, raw, _ = together
    output, run = folder / "tensor", runs(folder, raw)["tensor"]
    alone = TrainConfig.model_validate({**run, "parallel": {}, "output": str(tmp_path / "alone")})
    training.train(alone)
    assert losses(output) == pytest.approx(losses(alone.output), rel=1e-5)
    theirs, ours = (np.asarray(Image.open(folder / "sheet-0000004.png")) for folder in (output, alone.output))
    assert np.abs(theirs.astype(int) - ours).max() <= 2


def test_a_pipeline_is_the_run_of_one_process_which_goes_on_with_it(
    together: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    folder, raw, text = together
    output, resumed, run = folder / "pipeline", folder / "pipeline-resumed", runs(folder, raw)["pipeline"]
    alone = {**run, "parallel": {}, "output": str(tmp_path / "alone")}
    training.train(TrainConfig.model_validate(alone))
    assert losses(output) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    index = json.loads((newest(output) / "state.json").read_text())["index"]
    theirs = read_full(newest(output), "ema", index)
    for name, tensor in read_full(newest(tmp_path / "alone"), "ema", None).items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-6)
    assert f"resumed from {resumed / HALF_WAY}" in text
    assert_same(newest_state(output), newest_state(resumed))
    for folder_of_run in (output, tmp_path / "alone"):
        longer = {**run, "parallel": {}, "steps": 6, "output": str(folder_of_run)}
        training.train(TrainConfig.model_validate(longer))
    assert losses(output) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


def test_the_first_process_chooses_the_recipe_of_all(tmp_path: Path) -> None:
    data, output = write_pictures(tmp_path / "set.npz"), tmp_path / "run"
    few = ("--set", "data.hold_out=0", "--batch", "4", "--steps", "2")
    process = launch_command("--data", str(data), "--output", str(output), *few)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert text.count("the recipe;") == 1
    assert newest(output).name == "step-0000002"
    # A mistake of the first process ends all, in its own sentence.
    process = launch_command("--data", str(tmp_path / "missing"), "--output", str(tmp_path / "other"))
    text, _ = process.communicate()
    assert process.returncode
    assert text.count(f"model.train: {tmp_path / 'missing'}") == 1


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    config = TrainConfig.model_validate({**tiny_run(tmp_path), "parallel": {"tensor": 2}})
    with pytest.raises(ValueError, match=r"parallel\.tensor 2 does not divide the 1 processes of this run"):
        Trainer(config)
