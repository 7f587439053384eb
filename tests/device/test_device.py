"""No machine of the tests has a GPU, so the code runs on a device that pretends to be one: see pretended.cpp."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SCENARIOS = ["encode", "language", "domain", "prompt", "few_shots", "composed", "exported", "fusion", "on_the_cpu"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The device, built with PyTorch's own headers in ten seconds."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C++ compiler, or not on Linux, where the pretended device is known to build")
    if subprocess.run(
        [compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", os.devnull], capture_output=True
    ).returncode:
        pytest.skip("the C++ compiler knows no C++20, in which PyTorch's headers are written")
    torch_folder = Path(torch.__file__).parent
    built = tmp_path_factory.mktemp("device") / "pretended.so"
    command = [compiler, "-shared", "-fPIC", "-std=c++20", "-O0", "-DAT_PER_OPERATOR_HEADERS"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={torch.compiled_with_cxx11_abi():d}", str(HERE / "pretended.cpp")]
    command += ["-isystem", str(torch_folder / "include"), f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    made = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[:3000]
    return built


@pytest.fixture(scope="module")
def problems(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in each scenario. All run in one process, which takes most of its time to start."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "on_device.py"), str(library), str(tmp_path_factory.mktemp("run"))]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert run.returncode == 0, run.stderr[-3000:]
    assert [line["name"] for line in lines] == SCENARIOS
    return {line["name"]: line["problem"] for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_as_on_the_cpu(problems: dict[str, str], scenario: str) -> None:
    assert not problems[scenario], problems[scenario]
