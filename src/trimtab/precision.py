"""Where lower precision pays: frozen towers whose outputs are cached in fp16 anyway."""

from __future__ import annotations

import contextlib
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
