from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import subprocess
import sys

import pytest
import torch

from trimtab.precision import (
    fast_inference,
    fast_training,
    has_fast_bf16,
    kept_memory,
    slow_in_bf16,
    tune_allocator,
)
from trimtab.towers.efficientnet import SamePadConv


@pytest.mark.parametrize("supported", [True, False])
def test_processors_are_asked_for_hardware(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported, raising=False)
    cpu = torch.device("cpu")
    assert has_fast_bf16(cpu) is supported
    with fast_inference(cpu):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if supported else torch.float32)
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_nothing_is_assumed_of_unknown_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    for device in ("cpu", "mps"):
        assert not has_fast_bf16(torch.device(device))
        assert isinstance(fast_inference(torch.device(device)), contextlib.nullcontext)


def test_emulation_on_older_gpus_is_not_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not has_fast_bf16(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert has_fast_bf16(torch.device("cuda"))


@pytest.mark.parametrize("fast", [False, True])
def test_training_precision_follows_the_recipe_or_the_machine(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.precision.has_fast_bf16", lambda _: fast)
    found = {}
    for name in ("auto", "fp32", "bf16"):
        with fast_training(name, torch.device("cpu")):
            found[name] = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    fp32, bf16 = torch.float32, torch.bfloat16
    assert found == {"auto": bf16 if fast else fp32, "fp32": fp32, "bf16": bf16}


@pytest.mark.parametrize("fast", [False, True])
def test_depthwise_convolutions_stay_out_of_bf16_unless_they_take_care(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.precision.has_fast_bf16", lambda _: fast)
    cpu = torch.device("cpu")
    plain, careful = torch.nn.Conv2d(4, 4, 3, groups=4), SamePadConv(4, 4, 3, 1, groups=4)
    assert slow_in_bf16(plain, cpu)
    assert slow_in_bf16(careful, cpu) is not fast
    assert not slow_in_bf16(torch.nn.Conv2d(4, 4, 3), cpu)
    tower = torch.nn.Sequential(plain, torch.nn.Linear(4, 4))
    assert slow_in_bf16(tower, cpu)
    assert not slow_in_bf16(tower, cpu, tower[1])
    assert not slow_in_bf16(plain, torch.device("cuda"))


@pytest.mark.parametrize(("memory", "kept"), [(64 << 30, 1 << 30), (8 << 30, 1 << 30), (2 << 30, 256 << 20)])
def test_freed_memory_is_kept_up_to_a_bound(memory: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {}

    class Library:
        def mallopt(self, option: int, value: int) -> None:
            told[option] = value

    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": memory >> 12, "SC_PAGE_SIZE": 1 << 12}.__getitem__)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    tune_allocator()
    assert told == {-1: kept, -3: 32 << 20}
    assert kept_memory() == kept


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", None)
    monkeypatch.setattr("sys.platform", "darwin")
    tune_allocator()


_LARGE_BLOCKS = """
import sys
from pathlib import Path
from trimtab.precision import return_large_blocks

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 >> 10

if sys.argv[1] == "tuned":
    return_large_blocks()
del_me = b"x" * (30 << 20)  # from here on glibc keeps blocks of this size
del del_me
before, blocks, small = held(), [], []
for _ in range(10):
    blocks.append(b"x" * (16 << 20))
    small.append(b"y" * 5000)
blocks.clear()
print(held() - before)
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="another allocator")
def test_large_blocks_go_back_to_the_system() -> None:
    def megabytes(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", _LARGE_BLOCKS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert megabytes("plain") > 100
    assert megabytes("tuned") < 30
