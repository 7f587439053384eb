"""Shared fixtures: tiny models, built once per session, and a few pictures."""

from __future__ import annotations

import os
import signal

# Before any import of the hub client: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

# Nothing is timed: a busy machine is no mistake of the code.
settings.register_profile("trimtab", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("trimtab")


def pytest_configure() -> None:
    # A shell that starts the tests in the background has them ignore Ctrl-C, and so all processes that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model by its name in `tiny_models.BUILDERS`. Shared: copy before changing anything."""
    folders: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in folders:
            import tiny_models

            folders[name] = tiny_models.BUILDERS[name](tmp_path_factory.mktemp(name) / name)
        return folders[name]

    return build


@pytest.fixture(scope="session")
def tiny_base(tiny_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """Loaded tiny dual encoder by family, on the CPU. Shared: do not attach or change anything."""
    bases: dict[str, Any] = {}

    def load(family: str) -> Any:
        from trimtab.towers.hf import load_base

        if family not in bases:
            bases[family] = load_base(tiny_folder(family), device="cpu")
        return bases[family]

    return load


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Loaded tiny base by its name in `tiny_towers.BUILDERS`, on the CPU. Shared: leave it as it was."""
    bases: dict[str, Any] = {}

    def load(name: str) -> Any:
        import tiny_towers
        from trimtab.towers.hf import load_base

        if name not in bases:
            bases[name] = load_base(tiny_towers.BUILDERS[name](tmp_path_factory.mktemp(name) / name), device="cpu")
        return bases[name]

    return load


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Five RGB pictures of different sizes and content."""
    noise = np.random.default_rng(0)
    sizes = [(40, 50), (32, 32), (64, 33), (20, 90), (100, 41)]
    return [Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


@pytest.fixture(scope="session")
def two(pictures: list[Image.Image]) -> list[Image.Image]:
    """Two pictures; the narrow one has fewer patches in SigLIP 2."""
    return [pictures[0], pictures[2]]


@pytest.fixture
def two_cores() -> Iterator[None]:
    """Two threads for PyTorch, whatever the machine; a test may set others."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
