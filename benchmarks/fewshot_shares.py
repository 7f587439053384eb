"""Shares of the groceries' training pictures: prompts beside supervised networks that are trained on the same pictures.

`resnet` is transformers' ResNet-18 from its configuration, from scratch. `trunk` is starter's EfficientNet, trained on
ImageNet, of which all weights are fine-tuned under a new head. Both see crops, mirrored or not, and keep the epoch that
is best on validation. Their budgets are small, as everything here: `NETWORKS` says them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from trimtab.adapters.adapted import load
from trimtab.config import PromptRecipe
from trimtab.data.labelled import LabelledPictures
from trimtab.data.packages import fetch_file
from trimtab.data.shots import Shots, take_share
from trimtab.files import digest_of
from trimtab.precision import fast_inference
from trimtab.recipes.fewshot import append_run, read_fewshot, read_runs, setting
from trimtab.recipes.fewshot_methods import METHODS, Episode, Split
from trimtab.recipes.prompt_features import PictureFeatures
from trimtab.recipes.prompt_fit import right
from trimtab.towers.efficientnet import load_packaged

DEFAULT = ("structured", "linear_probe", "coop", "resnet", "trunk")


@dataclass(frozen=True)
class Budget:
    """How a supervised network is trained."""

    build: Callable[[int], nn.Module] = field(repr=False)  # its address is no part of what a run is known by
    side: int
    epochs: int
    learning_rate: float
    batch: int = 32
    least_steps: int = 200
    half: bool = False


def resnet(classes: int) -> nn.Module:
    """ResNet-18 from its configuration."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=classes)
    model = ResNetForImageClassification(config)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Tensor) -> Tensor:
            return self.model(pixels).logits

    return Logits()


def trunk(classes: int) -> nn.Module:
    """The ImageNet trunk with a new head."""
    packaged = load_packaged(str(fetch_file("efficientnet-lite0", "*.pth")))

    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = packaged
            self.head = nn.Linear(1280, classes)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.head(F.dropout(self.trunk(pixels).mean((2, 3)), 0.2, self.training))

    return Headed()


NETWORKS = {
    "resnet": Budget(resnet, side=96, epochs=15, learning_rate=1e-3, half=True),
    "trunk": Budget(trunk, side=128, epochs=8, learning_rate=5e-4),
}


def shares(
    recipe: PromptRecipe,
    methods: Sequence[str],
    wanted: Sequence[float],
    seeds: Sequence[int],
    out: Path,
    say: Callable[[str], None],
) -> None:
    """Runs with the `wanted` shares that the file does not have yet; of networks with the first seed alone."""
    data = read_fewshot(recipe)
    assert data.validation is not None
    base = load(recipe.base)
    known = {run["key"] for run in read_runs(out)}
    tokens = recipe.resolved().prompt.reads_patches

    def split(pictures: LabelledPictures, *, views: int = 0) -> Split:
        features = PictureFeatures(
            base, pictures.images, views=views, options=recipe.data.augmentation, seed=0, tokens=tokens
        )
        return Split.of(features.fill(), pictures.labels)

    for method in methods or DEFAULT:
        for seed in seeds[:1] if method in NETWORKS else seeds:
            for share in wanted:
                how = str(NETWORKS[method]) if method in NETWORKS else setting(recipe, method)
                key = digest_of(how, data.digest, base.fingerprint, "share", method, str(seed), str(share))[:16]
                if key in known:
                    continue
                train = take_share(data.train, share, seed)
                started = time.monotonic()
                torch.manual_seed(seed)
                if method in NETWORKS:
                    top1 = supervised(NETWORKS[method], train, data.validation, data.test, seed)
                else:
                    draw = Shots(train, data.validation)
                    views = split(train, views=recipe.data.views)
                    episode = Episode(base, draw, views, split(data.validation), replace(recipe, seed=seed), seed)
                    fitted = METHODS[method](episode)
                    test = split(data.test)
                    top1 = right(fitted.logits(test), test.labels, fitted.scale)
                run: dict[str, Any] = {
                    "method": method, "dataset": "grocery", "share": share, "seed": seed, "top1": top1,
                    "n_train": len(train), "n_test": len(data.test), "seconds": round(time.monotonic() - started, 1),
                    "key": key,
                }  # fmt: skip
                append_run(out, run)
                say(f"grocery, {method}, {100 * share:g}%, seed {seed}: {top1:.1f}% in {run['seconds']:.0f} s")


def supervised(
    budget: Budget, train: LabelledPictures, validation: LabelledPictures, test: LabelledPictures, seed: int
) -> float:
    """Top-1 on the test pictures of the epoch that is best on validation."""
    room = round(1.15 * budget.side)
    seen, held = pixels_of(train, room), pixels_of(validation, budget.side)
    labels, held_labels = torch.from_numpy(train.labels), torch.from_numpy(validation.labels)
    model = budget.build(len(train.classes)).to(memory_format=torch.channels_last)
    per_epoch = max(1, len(train) // budget.batch)
    epochs = max(budget.epochs, -(-budget.least_steps // per_epoch))
    optimiser = torch.optim.AdamW(model.parameters(), lr=budget.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, budget.learning_rate, total_steps=epochs * per_epoch)
    rng = np.random.default_rng(seed)
    best, kept = -1.0, {}
    for _ in range(epochs):
        model.train()
        for some in np.array_split(rng.permutation(len(train))[: per_epoch * budget.batch], per_epoch):
            with fast_inference(torch.device("cpu")) if budget.half else torch.enable_grad():
                logits = model(augmented(seen[some], budget.side, rng))
            loss = F.cross_entropy(logits.float(), labels[some], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        found = share_right(model, held, held_labels)
        if found >= best:
            best, kept = found, {name: one.clone() for name, one in model.state_dict().items()}
    model.load_state_dict(kept)
    return share_right(model, pixels_of(test, budget.side), torch.from_numpy(test.labels))


def pixels_of(pictures: LabelledPictures, side: int) -> np.ndarray:
    """(N, 3, side, side) uint8."""
    found = np.empty((len(pictures), side, side, 3), np.uint8)
    for at, image in enumerate(pictures.images):
        found[at] = np.asarray(image.read().resize((side, side), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(found.transpose(0, 3, 1, 2))


def augmented(pixels: np.ndarray, side: int, rng: np.random.Generator) -> Tensor:
    """Random crops, mirrored or not."""
    top, left = rng.integers(0, pixels.shape[2] - side + 1, (2, len(pixels)))
    parts = []
    for one, y, x, flip in zip(pixels, top, left, rng.random(len(pixels)) < 0.5, strict=True):
        crop = one[:, y : y + side, x : x + side]
        parts.append(crop[:, :, ::-1] if flip else crop)
    return as_input(np.stack(parts))


def as_input(pixels: np.ndarray) -> Tensor:
    return ((torch.from_numpy(pixels).float() - 127) / 128).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def share_right(model: nn.Module, pixels: np.ndarray, labels: Tensor) -> float:
    model.eval()
    parts = [model(as_input(pixels[start : start + 64])).float() for start in range(0, len(pixels), 64)]
    return right(torch.cat(parts), labels)
