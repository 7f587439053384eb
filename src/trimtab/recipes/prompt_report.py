"""The page that a run of the prompt link leaves beside its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import trimtab
from trimtab.adapters.prompt import VisualAttention
from trimtab.config import PromptRecipe, to_yaml
from trimtab.data.images import read_image
from trimtab.evaluation.blocks import Block, LinePanel, Lines, Series, Tile
from trimtab.evaluation.prompt_blocks import (
    Looked,
    NearWords,
    attention_maps,
    confident_mistakes,
    confusion_matrix,
    nearest_words,
)
from trimtab.evaluation.report import Report, write_report
from trimtab.evaluation.summaries import reproducibility
from trimtab.recipes.folders import training_folder
from trimtab.recipes.prompt_fit import FittedPrompt, LabelledFeatures
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.prompting import PromptTower

_WORDS = 6
_SHOWN = 6


def prompt_blocks(fitted: FittedPrompt, pictures: LabelledFeatures, *, name: str = "") -> list[Block]:
    """Everything to see of a prompt, measured on some pictures.

    Args:
        name: of these pictures, such as "test".
    """
    files = pictures.features.files
    scores = fitted.scores(pictures.features)
    taken = scores.argmax(axis=1)
    note = f"On {len(pictures):,} {name} pictures." if name else ""
    blocks: list[Block] = []
    if isinstance(fitted.prompt.instance, VisualAttention):
        blocks.append(_attention(fitted, pictures, files, taken))
    blocks.append(
        nearest_words(
            near_words(fitted),
            note="The learned tokens are vectors between words: the nearest ones are a hint at most.",
        )
    )
    blocks.append(confusion_matrix(pictures.labels, taken, fitted.classes, note=note))
    if (taken != pictures.labels).any():
        blocks.append(confident_mistakes(files, pictures.labels, scores, fitted.classes, note=note))
    return blocks


def write_prompt_report(
    recipe: PromptRecipe, fitted: FittedPrompt, pictures: LabelledFeatures, outcome: Mapping[str, Any], *, name: str
) -> Path:
    """Write ``<out>.training/report.html``; returns it.

    Args:
        pictures: what is shown and measured: test pictures, or those of validation where there are none.
        outcome: what `trimtab.recipes.prompt.adapt_prompt` returns.
        name: "test" or "validation".
    """
    found = fitted.top1(pictures)
    zero = outcome[name]["zero_shot"]
    tiles = [
        Tile("Named right", found, "%", f"{name}; hand templates {zero:.1f}%"),
        Tile("Classes", len(fitted.classes), "", f"{outcome['pictures']['train']:,} pictures to learn from"),
        Tile("Trained", outcome["trained_parameters"], "numbers", recipe.method),
    ]
    again = reproducibility(
        {
            "seed": recipe.seed,
            "base": recipe.base,
            "trimtab": trimtab.__version__,
            **{f"{key} (s)": round(value) for key, value in outcome.get("seconds", {}).items()},
        },
        command="trimtab adapt RECIPE.yaml",
        recipe=to_yaml(recipe),
    )
    html, _ = write_report(
        training_folder(recipe.out),
        Report(
            f"{len(fitted.classes)} classes from {outcome['pictures']['train']:,} pictures",
            f"It names {found:.1f}% of {len(pictures):,} {name} pictures, where hand templates name {zero:.1f}%.",
            tiles,
            [*curves(outcome.get("history", [])), *prompt_blocks(fitted, pictures, name=name), again],
            context="trimtab adapt, prompt link",
            footer=f"trimtab {trimtab.__version__}, seed {recipe.seed}",
        ),
    )
    return html


@torch.no_grad()
def near_words(fitted: FittedPrompt) -> list[NearWords]:
    """The General tokens, what they started from, and the whole words that are nearest to each."""
    tower: PromptTower = fitted.task.classes.tower
    tokenizer: Any = tower.base.text_inputs.tokenizer
    # Tables may have more rows than there are tokens, and a tokenizer written in Python raises an error at these.
    table = tower._table.weight[: len(tokenizer)].detach().float()
    general = fitted.prompt.general.detach().float()
    init = fitted.prompt.config.general.init
    start = tower.tokens_of([init])[0] if init else []
    lead = len(general) - len(start)
    words = tokenizer.convert_ids_to_tokens(list(range(len(table))))
    special = set(tokenizer.all_special_tokens)
    usable = torch.tensor([word is not None and word not in special and _is_word(word) for word in words])
    cosines = F.normalize(general, dim=-1) @ F.normalize(table, dim=-1).T  # (P, V)
    cosines[:, ~usable] = -torch.inf
    best = cosines.topk(min(_WORDS, int(usable.sum())), dim=1)
    found = []
    for at in range(len(general)):
        own = start[at - lead] if at >= lead else None
        moved = float((general[at] - table[own]).norm()) if own is not None else float(general[at].norm())
        near = [(_plain(words[i]), float(c)) for c, i in zip(best.values[at], best.indices[at].tolist(), strict=True)]
        found.append(NearWords(_plain(words[own]) if own is not None else "", moved, near))
    return found


@torch.no_grad()
def _attention(
    fitted: FittedPrompt, pictures: LabelledFeatures, files: Sequence[Any], taken: np.ndarray
) -> Block:  # fmt: skip
    """Maps of a few pictures of different classes, right ones and wrong ones."""
    instance = fitted.prompt.instance
    assert isinstance(instance, VisualAttention)
    chosen: list[int] = []
    for label in dict.fromkeys(pictures.labels.tolist()):
        mine = np.flatnonzero(pictures.labels == label)
        wrong = mine[taken[mine] != label]
        chosen.append(int(wrong[0] if len(wrong) and len(chosen) % 3 == 2 else mine[0]))
        if len(chosen) == _SHOWN:
            break
    weights = instance.attention(pictures.features.pictures(np.array(chosen))).cpu().numpy()
    names = fitted.classes
    looked = []
    for at, one in zip(chosen, weights, strict=True):
        right = taken[at] == pictures.labels[at]
        said = names[pictures.labels[at]] if right else f"{names[pictures.labels[at]]}, taken for {names[taken[at]]}"
        looked.append(Looked(as_seen(fitted.task.classes.tower.base, files[at]), one, said, bool(right)))
    note = "Each query makes one learned token of the picture's own prompt. Bright patches are looked at most."
    return attention_maps(looked, note=note)


def as_seen(base: DualEncoder, picture: Any) -> Image.Image:
    """What of a picture the image tower gets, resized and perhaps cropped: patches are parts of this."""
    processor: Any = base.image_processor
    image = read_image(picture)
    pixels = base.preprocess(image)["pixel_values"][0].float()  # (3, H, W)
    if pixels.ndim != 3:  # patches in a row, of the whole picture
        return image
    if getattr(processor, "do_normalize", False):
        mean, deviation = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        pixels = pixels * deviation[:, None, None] + mean[:, None, None]
    if getattr(processor, "do_rescale", True):
        pixels = pixels * 255
    return Image.fromarray(pixels.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())


def curves(history: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Losses and validation top-1 over steps, as far as they were recorded.

    The losses have a panel each: training's has further terms, and validation's is of calibrated scores.
    """
    panels = []
    for kind, key, title, label in (
        ("train", "loss", "Loss", "training"),
        ("validation", "loss", "Loss", "validation"),
        ("validation", "top1", "Top-1", "%, validation"),
    ):
        points = [(one["step"], one[key]) for one in history if one.get("kind") == kind and key in one]
        if len(points) > 1:
            xs, ys = zip(*points, strict=True)
            panels.append(LinePanel([Series("prompts", xs, ys)], title, "step", label))
    return [Lines(panels, title="Training")] if panels else []


def _is_word(token: str) -> bool:
    """Whether a token begins a word and has letters: pieces within words say little."""
    return not token.startswith("##") and sum(letter.isalpha() for letter in token) > 1


def _plain(token: str) -> str:
    return token.replace("</w>", "").replace("Ġ", "").replace("▁", "")
