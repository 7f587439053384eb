"""Several processes: the number is checked, and two take the same steps as one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import tiny_run
from tiny_run import Problem
from trimtab.errors import TrimtabError
from trimtab.training.checkpoint import CheckpointFolder
from trimtab.training.distributed import (
    announce_world,
    check_alone,
    check_launcher,
    check_world,
    explain_lost_processes,
    make_accelerator,
    rank_slice,
)

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


@pytest.mark.parametrize("name", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_the_variable_that_asks_for_processes_is_named(name):
    code = "from trimtab.training.distributed import make_accelerator; make_accelerator()"
    kept = {key: value for key, value in os.environ.items() if key not in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")}
    found = subprocess.run([sys.executable, "-c", code], env={**kept, name: "2"}, capture_output=True, text=True)
    last = found.stderr.strip().splitlines()[-1]
    assert f"TrimtabError: {name} asks for 2 processes, but MASTER_ADDR is not set" in last
    assert last.endswith(f"or unset {name}")


@pytest.mark.parametrize(
    "setting", ["ACCELERATE_USE_DEEPSPEED=true", "ACCELERATE_USE_MEGATRON_LM=True", "ACCELERATE_MIXED_PRECISION=fp8"]
)
def test_ways_of_training_that_are_not_ours_are_refused(setting, monkeypatch):
    monkeypatch.setenv(*setting.split("="))
    with pytest.raises(TrimtabError, match=rf"{setting} is set.*unset it, or start it with: torchrun"):
        make_accelerator()


def test_settings_of_the_launcher_that_change_nothing_are_told_once(caplog):
    check_launcher({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "false"})
    assert not caplog.records
    check_launcher({"ACCELERATE_MIXED_PRECISION": "fp16", "RANK": "1"})
    assert not caplog.records
    check_launcher({"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_FSDP": "true"})
    messages = [record.getMessage() for record in caplog.records]
    assert any("ACCELERATE_MIXED_PRECISION=fp16 changes nothing" in one for one in messages)
    assert any("ACCELERATE_USE_FSDP=true changes nothing" in one for one in messages)


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:13491."


@pytest.mark.parametrize("error", [RuntimeError(GLOO), dist.DistBackendError("NCCL error: remote process exited")])
def test_the_end_of_another_process_is_no_bug_of_this_one(error):
    said = r"another process .* ended.*resume \(.*(closed|exited)"
    with pytest.raises(TrimtabError, match=said), explain_lost_processes():
        raise error


def test_a_port_that_is_taken_is_no_lost_process(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29500")
    taken = dist.DistNetworkError("The server socket has failed to listen. port: 29500, name: EADDRINUSE")
    with pytest.raises(TrimtabError, match=r"^MASTER_PORT=29500 is taken.*give another"), explain_lost_processes():
        raise taken


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), explain_lost_processes():
        raise RuntimeError("shapes do not fit")


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
