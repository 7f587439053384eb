"""CLIP-LoRA (Zanella & Ben Ayed, arXiv 2405.18541), the strong baseline that trains inside both towers.

Low-rank updates of queries, keys and values of every attention layer, by the `peft` library, on a copy of the base.
What lies below the first updated layer of the image tower is still frozen and cached; what lies above is run in every
step, and so are all class texts. That makes it the dearest method here by far, so its steps are few: `STEPS`, where the
paper takes 500 per shot.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.config import ViewsConfig
from trimtab.data.shards import PictureFile
from trimtab.data.templates import fill_all
from trimtab.errors import ModelError
from trimtab.files import cache_home
from trimtab.precision import fast_inference
from trimtab.recipes.domain_states import ImageStates
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.layers import TowerCut, TowerName, sites
from trimtab.training.trackers import progress_reporter

STEPS = 150
RANK = 2
BATCH = 32
LEARNING_RATE = 1e-3
DROPOUT = 0.25
_QUERIES = ("q_proj", "k_proj", "v_proj", "query", "key", "value")
_CLASSES_AT_ONCE = 128


def check_lora(base: DualEncoder) -> None:
    """Refuse what `LowRank` cannot work with.

    Raises:
        ModelError: peft is missing, or the base is an adapted folder.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ModelError("the method clip_lora needs peft: pip install 'trimtab[peft]'") from error
    if type(base) is not DualEncoder:  # what was trained beside the towers would not go into the copy
        raise ModelError(
            f"clip_lora trains inside the towers of a base, and {base.name} is one with adapters or prompts: leave "
            "clip_lora out, or take the base below it"
        )


class LowRank:
    """A copy of a base with low-rank updates in both towers, and a classifier of its own class texts.

    Args:
        template: sentence for class names.
        views: of the training pictures.

    Attributes:
        parameters: trained numbers.

    Raises:
        ModelError: peft is missing, a tower has no attention layer that is known, or the base is an adapted folder.
    """

    def __init__(
        self,
        base: DualEncoder,
        classes: tuple[str, ...],
        template: str,
        *,
        views: int,
        options: ViewsConfig,
    ) -> None:
        check_lora(base)
        from peft import LoraConfig, inject_adapter_in_model

        self.base, self.views, self.options = base, views, options
        self.model = copy.copy(base)
        self.model.model = copy.deepcopy(base.model)
        towers: tuple[TowerName, ...] = ("image", "text")
        targets = [name for tower in towers for name in _attention(self.model, tower)]
        settings: dict[str, Any] = {
            "r": RANK,
            "lora_alpha": 1.0,
            "use_rslora": True,
            "lora_dropout": DROPOUT,
            "target_modules": "|".join(map(re.escape, targets)),
        }
        inject_adapter_in_model(LoraConfig(**settings), self.model.model)
        self.updates = [one for name, one in self.model.model.named_parameters() if "lora_" in name]
        self.parameters = sum(one.numel() for one in self.updates)
        lowest = sites(base, "image", "layers")[0]
        self._lower, self._upper = TowerCut(base, "image", lowest), TowerCut(self.model, "image", lowest)
        self._texts = self.model.text_inputs(fill_all([template], classes))

    def train(self, pictures: tuple[PictureFile, ...], labels: np.ndarray, seed: int, *, steps: int = STEPS) -> None:
        """Cross-entropy over all classes on batches of the pictures, each in one of its views."""
        states = self._states(pictures, views=self.views)
        rng = np.random.default_rng([seed, 6])
        optimiser = torch.optim.AdamW(self.updates, lr=LEARNING_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        with self._at_work(training=True):
            for _ in range(steps):
                items = rng.choice(len(pictures), min(BATCH, len(pictures)), replace=False)
                below = states(items, rng.integers(0, self.views + 1, len(items)))
                with fast_inference(self.base.device):
                    classes = self._class_embeddings()
                images = F.normalize(self._upper.upper(below).float(), dim=-1)
                logits = self.base.logit_scale * images @ classes.T
                loss = F.cross_entropy(logits, torch.from_numpy(labels[items]).to(logits.device))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()

    @torch.no_grad()
    def logits(self, pictures: tuple[PictureFile, ...]) -> Tensor:
        """(N, C) of pictures as they are."""
        states = self._states(pictures)
        with self._at_work(training=False):
            classes = self._class_embeddings()
            parts = []
            for start in range(0, len(pictures), 256):
                items = np.arange(start, min(start + 256, len(pictures)))
                images = F.normalize(self._upper.upper(states(items, np.zeros_like(items))).float(), dim=-1)
                parts.append(self.base.logit_scale * images @ classes.T)
        return torch.cat(parts).cpu()

    def _class_embeddings(self) -> Tensor:
        count = len(self._texts["input_ids"])
        parts = [
            self.model.token_features(
                {name: one[start : start + _CLASSES_AT_ONCE] for name, one in self._texts.items()}
            )
            for start in range(0, count, _CLASSES_AT_ONCE)
        ]
        return F.normalize(torch.cat(parts).float(), dim=-1)

    def _states(self, pictures: tuple[PictureFile, ...], *, views: int = 0) -> ImageStates:
        states = ImageStates(
            self.base,
            self._lower,
            pictures,
            viewed=len(pictures),
            views=views,
            options=self.options,
            seed=0,
        )
        with progress_reporter("pictures", "pictures") as report:
            states.fill(cache_home() / "features", report)
        return states

    @contextlib.contextmanager
    def _at_work(self, *, training: bool) -> Iterator[None]:
        """Dropout of the updates alone, and no fused layer, which would read the frozen weights past them."""
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        for name, module in self.model.model.named_modules():
            if "lora_dropout" in name:
                module.train(training)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(before)


def _attention(base: DualEncoder, tower: TowerName) -> list[str]:
    """Names of the layers that make queries, keys and values: three maps, or one module that holds all."""
    found = []
    for site in sites(base, tower, "layers"):
        layer = base.model.get_submodule(site.path)
        for name, module in layer.named_modules():
            if isinstance(module, nn.MultiheadAttention) or (
                isinstance(module, nn.Linear) and name.rpartition(".")[2] in _QUERIES
            ):
                found.append(f"{site.path}.{name}")
    if not found:
        raise ModelError(f"the {tower} tower of {base.name} has no attention layers that clip_lora knows")
    return found
