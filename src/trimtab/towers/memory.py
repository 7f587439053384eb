"""A memory of pairs: what one side of a training pair looks like, and where its other side lies.

As a translation memory it looks words up whose English features are known, rather than have them regressed.

A regression from thousands of words to their English features keeps the neighbours of each, but only half of its
direction, and nearness to pictures needs the direction. So what lies near a word of the training pairs is moved to
where the word's translation lies. In a domain, pictures near those of the training pairs are moved towards the captions
of these. Both are nearest neighbours beside a trained model, as in kNN-MT (Khandelwal et al., arXiv
2010.00710) and, for images, in Tip-Adapter (Zhang et al., arXiv 2111.03930). Nothing here is trained.

`trimtab export --format merged` copies the class: it needs torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DIRECTIONS = 16  # most directions in which sentences around a word may differ


class PairMemory(nn.Module):
    """Features (B, D) to unit features (B, D), moved towards the partners of the nearest keys.

    Nearness is told without the directions in which one template differs from another, so that a word is known in any
    of them. With cosines c to the keys and w = exp(sharpness * (c - 1)), the result is the direction of
    f + weight * sum(w v) / max(1, sum(w)): far from every key that is f.

    Args:
        count: pairs, N.
        dim: D.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor
    value_scale: Tensor
    directions: Tensor
    sharpness: Tensor
    weight: Tensor

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        for name in ("key", "value"):  # whole numbers of 8 bits: a quarter of the size, and the same neighbours
            self.register_buffer(f"{name}s", torch.zeros(count, dim, dtype=torch.int8))
            self.register_buffer(f"{name}_scale", torch.zeros(count))
        self.register_buffer("directions", torch.zeros(dim, DIRECTIONS))
        self.register_buffer("sharpness", torch.tensor(15.0))
        self.register_buffer("weight", torch.tensor(0.0))
        self._floats: dict[str, tuple[Tensor, int, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.keys)

    @torch.no_grad()
    def fill(self, keys: Tensor, values: Tensor, variants: Tensor | None = None) -> None:
        """Take pairs in.

        Args:
            keys: (N, D) what the adapters make of words, or of pictures.
            values: (N, D) what they should have made: the features of translations, or of captions.
            variants: (S, T, D) what the adapter makes of S words in T templates each, the same for all words.
        """
        if variants is not None and variants.shape[1] > 1:
            means = F.normalize(variants.float(), dim=-1).mean(dim=0)  # (T, D)
            rank = min(len(means) - 1, DIRECTIONS)
            _, _, rows = torch.linalg.svd(means - means.mean(dim=0), full_matrices=False)
            self.directions.zero_()
            self.directions[:, :rank] = rows[:rank].T
        pairs = ((self.keys, self.key_scale, self._apart(keys)), (self.values, self.value_scale, values))
        for whole, scale, rows in pairs:
            unit = F.normalize(rows.float(), dim=-1)
            scale.copy_(unit.abs().amax(dim=-1).clamp_min(1e-12) / 127)
            whole.copy_((unit / scale[:, None]).round())

    def forward(self, features: Tensor) -> Tensor:  # (B, D) -> (B, D)
        unit = F.normalize(features.float(), dim=-1)
        cosines = self._apart(unit) @ self._float("keys").T * self.key_scale  # (B, N)
        near = (self.sharpness * (cosines - 1)).exp()
        recalled = (near * self.value_scale) @ self._float("values") / near.sum(dim=-1, keepdim=True).clamp_min(1)
        return F.normalize(unit + self.weight * recalled, dim=-1)

    def _float(self, name: str) -> Tensor:
        """A buffer of whole numbers as float32 (N, D), which takes longer than one text's search and so is kept."""
        whole: Tensor = getattr(self, name)
        if torch.jit.is_tracing() or torch.compiler.is_compiling() or whole.is_inference():
            return whole.float()
        kept = self._floats.get(name)
        if kept is None or kept[0] is not whole or kept[1] != whole._version:  # moved, or filled anew
            with torch.inference_mode(False):  # else what a search keeps could not be trained through
                kept = self._floats[name] = (whole, whole._version, whole.float())
        return kept[2]

    def _apart(self, features: Tensor) -> Tensor:
        """Without what templates add."""
        features = features.float()
        return F.normalize(features - features @ self.directions @ self.directions.T, dim=-1)
