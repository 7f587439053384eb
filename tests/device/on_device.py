"""What Trimtab does on the pretended device: ``python on_device.py LIBRARY FOLDER [NAME ...]``.

Every scenario compares with the same on the CPU. It is a program of its own, since a registered device cannot be taken
back. It prints a line of JSON for each: its name, and what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from torch import Tensor

import tiny_domain
import tiny_language
import tiny_links
import tiny_models
import tiny_prompt
from trimtab import precision
from trimtab.adapters.adapted import load
from trimtab.adapters.resampler import FusionAdapter, ResamplerConfig
from trimtab.config import LanguageAdapterConfig
from trimtab.recipes import fewshot_methods
from trimtab.recipes.domain import adapt_domain
from trimtab.recipes.export import export
from trimtab.recipes.fewshot import Plan, fewshot
from trimtab.recipes.language import adapt_language
from trimtab.recipes.prompt import adapt_prompt
from trimtab.towers.hf import load_base
from trimtab.towers.text_encoder import TextEncoder
from trimtab.training.distributed import make_accelerator

HERE = "pretended"
DEVICES = (HERE, "cpu")
TEXTS = ["a photo of a cat", "一只猫的照片", "two apples and one orange", "dog"]
FOLDER = Path()


def register(library: str) -> None:
    """Load the device and give PyTorch the module ``torch.pretended`` that it asks of any."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(HERE)
    module: Any = ModuleType(f"torch.{HERE}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.set_device = module.manual_seed_all = module.synchronize = lambda *_: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch._register_device_module(HERE, module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=False)


def turn_to(device: str) -> Path:
    """Have runs find this device, and a cache of their own in the folder that is given."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState.default_device = property(lambda _: torch.device(device))  # Accelerate knows no pretended one
    folder = FOLDER / f"on-{device}"
    os.environ["TRIMTAB_CACHE"] = str(folder / "cache")
    folder.mkdir(exist_ok=True)
    return folder


def tiny(name: str) -> Path:
    folder = FOLDER / "models" / name
    return folder if folder.exists() else tiny_models.BUILDERS[name](folder)


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [
        Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in [(40, 50), (32, 32), (64, 33)]
    ]


def alike(one: Any, other: Any, tolerance: float = 1e-4) -> None:
    one, other = (each.detach().cpu().numpy() if isinstance(each, Tensor) else each for each in (one, other))
    np.testing.assert_allclose(one, other, atol=tolerance, rtol=0)


def alike_models(folder: str | Path, links: Sequence[Path] = ()) -> Any:
    """A model on the device, which gives what it gives on the CPU."""
    here, there = (load(str(folder), device=device, links=links) for device in DEVICES)
    assert here.device.type == HERE
    alike(here.encode_image(pictures()), there.encode_image(pictures()))
    alike(here.encode_text(TEXTS), there.encode_text(TEXTS))
    alike(here.classifier(["cat", "dog"]).scores(pictures()), there.classifier(["cat", "dog"]).scores(pictures()))
    assert here.fingerprint == there.fingerprint
    return here


def alike_runs(run: Callable[[Path], Any], name: str) -> None:
    """A run on the device, and one on the CPU that ends as it does."""
    models = []
    for device in DEVICES:
        out = turn_to(device) / name
        run(out)
        models.append(alike_models(out))
    here, there = models
    # Adam makes something of gradients that are all but 0, so rounding is seen.
    alike(here.encode_image(pictures()), there.encode_image(pictures()), 1e-2)
    alike(here.encode_text(TEXTS), there.encode_text(TEXTS), 1e-2)
    alike(here.classifier(["cat", "dog"]).scores(pictures()), there.classifier(["cat", "dog"]).scores(pictures()), 5e-2)


def encode() -> None:
    for family in ("clip", "siglip2"):
        alike_models(tiny(family))


def language() -> None:
    pairs = tiny_language.write_pairs(FOLDER / "pairs.csv", tiny_language.toy_pairs(150))
    alike_runs(
        lambda out: adapt_language(
            tiny_language.toy_recipe(tiny("clip"), tiny("bert"), pairs, out, training={"epochs": 2})
        ),
        "language",
    )


def domain() -> None:
    train = tiny_domain.write_pairs(FOLDER / "domain-train", 48)
    validation = tiny_domain.write_pairs(FOLDER / "domain-validation", 24, first=100)
    changes = {
        "adapters": [{"tower": "image", "width": 8}], "gate": {"kind": "soft"}, "memory": 20,
        "objective": {"hard_negatives": 4}, "training": {"epochs": 2},
    }  # fmt: skip
    alike_runs(
        lambda out: adapt_domain(tiny_domain.toy_recipe(tiny("clip"), train, validation, out, **changes)), "domain"
    )


def prompt() -> None:
    table = tiny_prompt.write_labelled(FOLDER / "prompt-train", 32)
    alike_runs(lambda out: adapt_prompt(tiny_prompt.toy_recipe(tiny("clip"), table, out, steps=8)), "prompt")


def few_shots() -> None:
    """All methods, on the same shots."""
    train = tiny_prompt.write_labelled(FOLDER / "shots", 32)
    test = tiny_prompt.write_labelled(FOLDER / "test", 24, first=100)
    fewshot_methods.STRENGTHS, fewshot_methods.BETAS, fewshot_methods.ALPHAS = (50.0,), (1.0, 8.0), (0.0, 1.0)
    found = []
    for device in DEVICES:
        folder = turn_to(device)
        recipe = tiny_prompt.toy_recipe(
            tiny("vision-text-dual-encoder"), train, folder / "out", data={"test": str(test)}, steps=4,
            training={"epochs": 2},
        )  # fmt: skip
        plan = Plan((2,), (1,), tuple(fewshot_methods.METHODS))
        found.append(fewshot(recipe, plan, folder / "runs.jsonl", progress=lambda _: None))
    for here, there in zip(*found, strict=True):
        assert here["method"] == there["method"]
        assert abs(here["top1"] - there["top1"]) < 5, (here, there)  # one picture of 24


def links() -> list[Path]:
    """Adapted folders of all links on one base."""
    place = FOLDER / "links"
    if not place.exists():
        base = load_base(str(tiny("clip")), device="cpu")
        tiny_links.save_language(place / "language", base, TextEncoder.load(str(tiny("bert")), device="cpu"))
        tiny_links.save_tiny_domain(place / "domain", base)
        tiny_links.save_tiny_prompt(place / "prompt", base)
    return [place / "language", place / "domain", place / "prompt"]


def composed() -> None:
    language_link, _, prompt_link = links()
    model = alike_models(tiny("clip"), [language_link, prompt_link])
    before = model.encode_text(TEXTS)
    alike(model.to("cpu").encode_text(TEXTS), before)
    alike(model.to(HERE).encode_text(TEXTS), before)


def exported() -> None:
    """A loaded model is exported, and stays where it is."""
    for link, options in zip(links(), ({"format": "merged"}, {}, {}), strict=True):
        model = load(str(link), device=HERE)
        before = model.encode_text(TEXTS), model.classifier(["cat", "dog"]).scores(pictures())
        export(model, FOLDER / f"exported-{link.name}", **options)
        assert model.device.type == HERE
        alike(model.encode_text(TEXTS), before[0])
        alike(model.classifier(["cat", "dog"]).scores(pictures()), before[1])


def fusion() -> None:
    """The start of a fusion adapter, which is fitted in float64: the device has none."""
    generator = torch.Generator().manual_seed(0)
    states, teacher = torch.randn(40, 6, 10, generator=generator), torch.randn(40, 5, 16, generator=generator)
    mask, teacher_mask = torch.ones(40, 6), torch.ones(40, 5)
    mask[::2, 4:] = teacher_mask[::2, 4:] = 0
    fitted = []
    for device in DEVICES:
        torch.manual_seed(0)
        adapter = FusionAdapter(
            LanguageAdapterConfig(width=12, layers=1, heads=2, init="ridge"), ResamplerConfig(tokens=8, heads=2),
            input_dim=10, output_dim=16,
        ).to(device)  # fmt: skip
        adapter.fit(*(one.to(device) for one in (states, mask, teacher, teacher_mask)), ridge=1e-2)
        fitted.append(adapter.state_dict())
    for name, tensor in fitted[0].items():
        alike(tensor, fitted[1][name])


def on_the_cpu() -> None:
    """Whoever keeps to the CPU trains there."""
    turn_to(HERE)
    assert make_accelerator(cpu=True).device.type == "cpu"
    turn_to(HERE)
    assert make_accelerator().device.type == HERE


SCENARIOS = (encode, language, domain, prompt, few_shots, composed, exported, fusion, on_the_cpu)


if __name__ == "__main__":
    library, place, *names = sys.argv[1:]
    FOLDER = Path(place)
    register(library)
    precision.has_fast_bf16 = lambda device: False  # type: ignore[assignment]  # devices are compared in float32
    turn_to(HERE)
    for scenario in SCENARIOS:
        if not names or scenario.__name__ in names:
            problem, start = "", time.monotonic()
            try:
                scenario()
            except Exception:
                problem = traceback.format_exc()
            print(
                json.dumps({"name": scenario.__name__, "problem": problem, "seconds": time.monotonic() - start}),
                flush=True,
            )
