"""Where lower precision pays: frozen towers whose outputs are cached in fp16 anyway."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import Any

import torch
from torch import nn


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run in hardware: newer GPUs, and CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # The private name is the only one that says "in hardware"; without it nothing is assumed.
        check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return bool(check and check())
    return False


def resolved_precision(precision: str, device: torch.device) -> str:
    """A recipe's `training.precision` as ``bf16`` or ``fp32``: ``auto`` takes the first where it is fast."""
    if precision == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    return precision


def fast_training(precision: str, device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where `resolved_precision` says so. It may be entered many times."""
    enabled = resolved_precision(precision, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def fast_inference(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16 where that is fast, else nothing."""
    return torch.autocast(device.type, torch.bfloat16) if has_fast_bf16(device) else contextlib.nullcontext()


def tune_allocator() -> None:
    """Keep freed memory in this process instead of giving it back after every layer (glibc only).

    Large activations are otherwise mapped and unmapped on each use, and on a CPU the page faults cost more than
    some of the layers. What is kept at the end of a heap is bounded: without a bound, training was seen to hold 8 GB.
    """
    _tell_allocator(mapped_from=32 << 20, kept=kept_memory())  # the first is the largest value that glibc takes


def return_large_blocks() -> None:
    """Give blocks of 8 MiB and more back to the system as they are freed (glibc only), in a process that lasts.

    By itself glibc keeps blocks of up to 32 MiB after some were freed, and for each thread apart: a server held 3 GB
    for ever after a few pictures of 40 megapixels, whose pixels Pillow puts into blocks of 16 MiB.
    """
    _tell_allocator(mapped_from=8 << 20)


def _tell_allocator(*, mapped_from: int, kept: int | None = None) -> None:
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, mapped_from)
        if kept is not None:
            libc.mallopt(m_trim_threshold, kept)


def kept_memory() -> int:
    """Bytes of freed memory that `tune_allocator` keeps: 1 GiB, less on machines with under 8 GiB."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(1 << 30, memory // 8)


def slow_in_bf16(tower: nn.Module, device: torch.device, first: nn.Module | None = None) -> bool:
    """Whether a tower, from its module `first` on, has depthwise convolutions that a CPU trains slowly in bf16.

    Without bf16 in hardware a step through them takes tens of times as long as in fp32. With it their backward pass
    still has slow kernels, so they are let through only if they keep away from these (``avoids_slow_bf16``, as
    `trimtab.towers.efficientnet.SamePadConv` does): then a step is faster than in fp32. The forward pass alone is fast
    in hardware in any case: see `fast_inference`.
    """
    if device.type != "cpu":
        return False
    fast = has_fast_bf16(device)
    modules = list(tower.modules())
    start = next((number for number, one in enumerate(modules) if one is first), 0)
    return any(
        isinstance(one, nn.Conv2d) and one.groups > 1 and not (fast and getattr(one, "avoids_slow_bf16", False))
        for one in modules[start:]
    )
