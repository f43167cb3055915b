"""Several processes take the steps that one would take, as replicas, sharded or in tensor parallelism."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh

from ditserve.model.distributed.parallel import ParallelNetwork, single_process
from ditserve.model.distributed.pipeline import check_pipeline
from ditserve.model.distributed.processes import ParallelSpec, World, join_processes
from ditserve.model.distributed.tensor_parallel import parallelize_blocks
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.factory import make_network
from ditserve.model.nets.unet import UNet
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.network_config import NetworkConfig
from ditserve.model.train.optimizer import HALF_DTYPES
from ditserve.model.train.tensor_shards import SectionReader, read_full, write_shards
from tests.model.distributed.parallel_cases import (
    ALL_OPTIONS,
    EXPERTS,
    FOUR,
    PAIR,
    REWRITTEN,
    TINY,
    random_network,
    sections_of,
    train,
)
from tests.model.nets.unet_cases import TINY_UNET

Outcome = Callable[[int], Path]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Return the folder of results of two or four processes; each number of processes is run once."""
    folders: dict[int, Path] = {}

    def launch(processes: int) -> Path:
        if processes not in folders:
            folders[processes] = tmp_path_factory.mktemp("together")
            torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            program = ["-m", "tests.model.distributed.parallel_cases", str(folders[processes])]
            process = subprocess.run(
                [sys.executable, "-m", *torchrun, *program], capture_output=True, text=True, check=False
            )
            assert process.returncode == 0, process.stderr[-4000:]
        return folders[processes]

    return launch


@pytest.mark.parametrize("name", [*PAIR, *FOUR])
def test_several_processes_train_as_one(name: str, outcome: Outcome) -> None:
    case = {**PAIR, **FOUR}[name]
    together = load_file(outcome(2 if name in PAIR else 4) / f"{name}.safetensors")
    by_one = train(
        case,
        ParallelNetwork(
            random_network(case.config), World(), ParallelSpec(), HALF_DTYPES.get(case.precision)
        ),
    )
    assert together.keys() == by_one.keys()
    rounded = case.precision == "bf16" or "compress" in case.spec
    relative, absolute = (0.1, 5e-3) if rounded else (1e-5, 1e-6)
    if "compress" in case.spec:
        # Gradients in bf16 are near, and not the same.
        assert not torch.allclose(together["norms"], by_one["norms"], rtol=1e-6, atol=0)
    for key, tensor in by_one.items():
        torch.testing.assert_close({key: together[key]}, {key: tensor}, rtol=relative, atol=absolute)


@pytest.mark.parametrize("processes", [2, 4])
def test_any_processes_read_what_any_others_wrote(processes: int, outcome: Outcome) -> None:
    expected = sections_of(single_process(random_network(ALL_OPTIONS)))
    for number, case in enumerate(REWRITTEN[processes]):
        folder = outcome(processes) / ("parts" + "".join(f"-{k}" for k in range(number + 1)))
        index = json.loads((folder / "index.json").read_text())
        files = processes if case.spec != {"mode": "ddp"} else 1
        assert len(list(folder.glob("model*.safetensors"))) == files
        for section, tensors in expected.items():
            tensors_read = read_full(folder, section, index)
            assert tensors_read.keys() == tensors.keys()
            assert all(torch.equal(tensors_read[key], tensor) for key, tensor in tensors.items())


def test_a_process_holds_and_writes_its_share_only(outcome: Outcome) -> None:
    folder = outcome(2) / "parts-0"
    whole = sum(tensor.numel() for tensor in random_network(ALL_OPTIONS).state_dict().values())
    held = [sum(t.numel() for t in load_file(file).values()) for file in sorted(folder.glob("model*"))]
    assert sum(held) == whole
    assert max(held) < 0.51 * whole


def test_a_block_that_is_missing_is_told(outcome: Outcome) -> None:
    folder = outcome(2) / "parts-0"
    index = json.loads((folder / "index.json").read_text())
    reader = SectionReader(folder, "model", index)
    reader.shards["blocks.0.attn.qkv.weight"].pop()
    with pytest.raises(ValueError, match=r"model lacks a block of blocks\.0\.attn\.qkv\.weight"):
        reader.read_full("blocks.0.attn.qkv.weight")


def test_one_process_writes_tensors_under_their_own_names(tmp_path: Path) -> None:
    network = random_network(TINY)
    write_shards(tmp_path, single_process(network), {"model": network.state_dict()})
    assert load_file(tmp_path / "model.safetensors").keys() == network.state_dict().keys()


def test_a_process_by_itself_is_the_world() -> None:
    with join_processes("cpu") as world:
        assert world == World(rank=0, size=1, local_rank=0, device="cpu")
        assert world.is_first
        assert world.all_agree(True)
        assert not world.all_agree(False)


def test_rows_are_shared_out_between_replicas() -> None:
    spec = ParallelSpec(tensor=2)
    assert [spec.rows(World(rank, 4), 6) for rank in range(4)] == [
        range(3),
        range(3),
        range(3, 6),
        range(3, 6),
    ]
    with pytest.raises(ValueError, match="batch 5 is not divisible by 2 replicas"):
        spec.rows(World(0, 4), 5)
    with pytest.raises(ValueError, match=r"parallel\.tensor 2 does not divide the 3 processes"):
        spec.rows(World(0, 3), 6)


@pytest.mark.parametrize(
    ("config", "stages", "complaint"),
    [
        (TINY_UNET, 2, r"parallel\.pipeline 2 is for a DiT, not for a U-Net"),
        (TINY, 3, r"parallel\.pipeline 3 is more than the 2 blocks"),
        (EXPERTS, 2, r"parallel\.pipeline does not balance experts"),
    ],
)
def test_blocks_that_cannot_be_shared_out_are_refused(
    config: NetworkConfig, stages: int, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_pipeline(make_network(config), stages)


@pytest.mark.parametrize(
    "fields",
    [{"mode": "fsdp", "pipeline": 2}, {"tensor": 2, "pipeline": 2}, {"mode": "fsdp", "compress": "bf16"}],
)
def test_divisions_that_exclude_each_other_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="leave these out"):
        ParallelSpec(**fields)


@pytest.mark.parametrize(
    ("config", "size", "complaint"),
    [
        (TINY, 3, r"parallel\.tensor 3 does not divide num_heads 2"),
        (replace(TINY, num_heads=4, mlp_ratio=0.9), 4, r"does not divide the MLP's width 14"),
        (TINY_UNET, 2, r"parallel\.tensor 2 is for a DiT, not for a U-Net"),
        (EXPERTS, 2, r"parallel\.tensor 2 does not divide experts"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(config: NetworkConfig, size: int, complaint: str) -> None:
    mesh = cast(DeviceMesh, SimpleNamespace(size=lambda: size))
    with pytest.raises(ValueError, match=complaint):
        parallelize_blocks(DiT(config) if isinstance(config, DiTConfig) else UNet(config), mesh)
