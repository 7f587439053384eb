from __future__ import annotations

import contextlib

import pytest
import torch

from trimtab.precision import fast_inference, has_fast_bf16


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
