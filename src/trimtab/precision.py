"""Where lower precision pays: frozen towers whose outputs are cached in fp16 anyway."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from typing import Any

import torch


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run in hardware: newer GPUs, and CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # The private name is the only one that says "in hardware"; without it nothing is assumed.
        check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return bool(check and check())
    return False


def fast_inference(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16 where that is fast, else nothing."""
    return torch.autocast(device.type, torch.bfloat16) if has_fast_bf16(device) else contextlib.nullcontext()


def tune_allocator() -> None:
    """Keep freed memory in this process instead of giving it back after every layer (glibc only).

    Large activations are otherwise mapped and unmapped on each use, and on a CPU the page faults cost more than
    some of the layers.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 32 << 20)  # the largest value that glibc takes
        libc.mallopt(m_trim_threshold, 2**31 - 1)
