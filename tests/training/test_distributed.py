"""Several processes: the number is checked, and two take the same steps as one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny_run
from tiny_run import Problem
from trimtab.errors import TrimtabError
from trimtab.training.checkpoint import CheckpointFolder
from trimtab.training.distributed import announce_world, check_alone, check_world, rank_slice

LAUNCHED = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    ("actual", "requested", "environment"),
    [
        (1, None, {}),
        (1, 1, {}),
        (2, 2, {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", **LAUNCHED}),
        (1, None, LAUNCHED),
        (1, None, {"MASTER_ADDR": "127.0.0.1"}),
    ],
)
def test_agreeing_numbers_pass(actual, requested, environment):
    check_world(actual, requested, environment)


@pytest.mark.parametrize(
    ("actual", "requested", "environment", "message"),
    [
        (1, 4, {}, r"training\.processes asks for 4 processes but 1 run; .*torchrun --nproc_per_node 4"),
        (1, None, {"WORLD_SIZE": "2"}, r"WORLD_SIZE asks for 2 .*torchrun --nproc_per_node 2"),
        (2, 1, {}, "asks for 1 processes but 2 run; start it without a launcher, or set training.processes"),
        (1, None, {"MASTER_ADDR": "127.0.0.1", **LAUNCHED}, "accelerate launch .* started one .*torchrun"),
    ],
)
def test_fewer_or_more_than_asked_for_is_an_error(actual, requested, environment, message):
    with pytest.raises(TrimtabError, match=message):
        check_world(actual, requested, environment)


def test_what_runs_in_one_process_takes_no_others():
    for environment in ({}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}):
        check_alone("it runs", environment)
    with pytest.raises(TrimtabError, match=r"it runs in one process, but 2 were started: start it without torchrun"):
        check_alone("it runs", {"WORLD_SIZE": "2"})


def test_accelerate_launch_on_the_cpu_leaves_the_traces_that_give_it_away():
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    arguments = launch_command_parser().parse_args(["--cpu", "--num_processes", "2", "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    _, environment = prepare_simple_launcher_cmd_env(arguments)
    with pytest.raises(TrimtabError, match="started one"):
        check_world(1, None, environment)


def test_a_launchers_half_environment_is_told():
    code = "from trimtab.training.distributed import make_accelerator; make_accelerator()"
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
    found = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "WORLD_SIZE": "2"}, capture_output=True, text=True
    )
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert "TrimtabError: WORLD_SIZE asks for 2 processes, but MASTER_ADDR is not set" in last
    assert "torchrun --nproc_per_node 2" in last


def test_world_is_announced(capsys):
    world = announce_world()
    assert world.size == 1
    assert world.is_main
    assert "training with 1 process on" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_weighted_mean_over_ranks_is_the_mean_over_rows(size, count):
    batch = torch.randn(count, 2)
    parts = [rank_slice(batch, rank, size) for rank in range(size)]
    mean = sum(share * part.mean(0) for part, share in parts) / size
    torch.testing.assert_close(mean, batch.mean(0))
    if count >= size:
        assert torch.equal(torch.cat([part for part, _ in parts]), batch)


def test_batches_of_several_parts_are_cut_alike():
    rows, _ = rank_slice((torch.arange(4), list("abcd")), 1, 2)
    assert rows[0].tolist() == [2, 3]
    assert rows[1] == ["c", "d"]
    named, _ = rank_slice({"a": np.arange(4), "b": [0, 1, 2, 3]}, 0, 2)
    assert named["a"].tolist() == named["b"] == [0, 1]
    with pytest.raises(ValueError, match="one length"):
        rank_slice((torch.arange(4), [1]), 0, 2)


def test_two_processes_end_where_one_does(tmp_path):
    alone = Problem(dropout=0.0, noise=False)
    alone.train(tmp_path / "one")

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = [sys.executable, tiny_run.__file__, str(tmp_path / "two"), str(tmp_path / "two.safetensors"), "plain"]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common["OMP_NUM_THREADS"] = "1"
    ranks = [
        subprocess.Popen(
            script,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=60)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], errors
    assert "training with 2 processes on cpu" in errors[0]
    for name, tensor in load_file(tmp_path / "two.safetensors").items():
        torch.testing.assert_close(tensor, alone.model.state_dict()[name], atol=1e-5, rtol=1e-4)
    # Each rank's generators are kept, and one process may go on where two stopped.
    saved = CheckpointFolder(tmp_path / "two").load_newest()
    assert saved is not None
    assert len(saved.part("generators")["torch"]) == 2
    assert Problem(dropout=0.0, noise=False).train(tmp_path / "two").steps == alone.steps
