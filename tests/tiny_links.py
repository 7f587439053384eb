"""Tiny adapted folders of all links on one base, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import tiny_models
from tiny_adapted import save_tiny_adapted
from trimtab.adapters.domain import DomainAdapters, save_domain
from trimtab.adapters.prompt import StructuredPrompt
from trimtab.adapters.prompted import save_prompt
from trimtab.config import DomainAdapterConfig, DomainPartConfig, GeneralConfig, InstanceConfig, PromptConfig
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.prompting import PromptTower
from trimtab.towers.text_encoder import TextEncoder

CLASSES = ("cat", "dog", "red car")


def save_language(
    folder: Path, base: DualEncoder, student: TextEncoder, *, english: str = "route", language: str = "zh"
) -> Path:
    described = save_tiny_adapted(folder, base, student)
    if english != "route":
        import json

        path = folder / "adapter.json"
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw["config"]["english"] = english
        raw["data"]["languages"] = {language: 9, "en": 1}
        path.write_text(json.dumps(raw), encoding="utf-8")
    return described


def save_tiny_domain(folder: Path, base: DualEncoder, *, seed: int = 1, **options: Any) -> Path:
    groups = [DomainAdapterConfig(tower="image", width=4), DomainAdapterConfig(tower="text", width=4)]
    torch.manual_seed(seed)
    adapters = DomainAdapters(base, groups)
    tiny_models.randomised(adapters, seed)
    return save_domain(folder, adapters, base=base, **options)


def save_tiny_prompt(
    folder: Path, base: DualEncoder, *, instance: bool = False, patches: bool = False, seed: int = 2
) -> Path:
    part = InstanceConfig(tokens=2, heads=2) if instance else None
    config = PromptConfig(GeneralConfig("a photo of a"), part, DomainPartConfig(patches=instance or patches, rate=1.0))
    prompt = StructuredPrompt(config, PromptTower(base), patch_width=16, classes=len(CLASSES), seed=seed)
    tiny_models.randomised(prompt, seed)
    return save_prompt(
        folder, prompt, base=base, classes=CLASSES, templates=["a photo of a {}"], class_scale=20.0, metrics={}
    )
