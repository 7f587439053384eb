"""Structured prompts: [General][Instance][Domain] in front of a frozen text tower, and class vectors behind it.

- General: context tokens that all classes share, started from a template's embeddings (CoOp: arXiv 2109.01134).
- Instance: visual-guided attention. Learned queries attend over the frozen image tower's patch tokens; what they see
  shifts the last M context tokens, for each picture by itself. The shift starts at zero, so an untrained prompt is
  exactly the General part alone.
- Domain: the class name, learned tokens behind it, and residual vectors that are added to class embeddings.

Nothing here knows data or losses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.config import InstanceConfig, PromptConfig
from trimtab.errors import RecipeError
from trimtab.towers.prefix_reuse import can_reuse, reused_features
from trimtab.towers.prompting import PromptLayout, PromptTower

LINK = "prompt"
_INIT_STD = 0.02


class Pictures(NamedTuple):
    """What the frozen image tower says of B pictures.

    Attributes:
        embeddings: (B, D), unit norm.
        tokens: (B, N, Wi) patch tokens; None where no part reads them.
        mask: (B, N) bool, False on padding; None if all tokens are real.
    """

    embeddings: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None

    def patch_tokens(self) -> Tensor:
        """(B, N, Wi)."""
        if self.tokens is None:
            raise ValueError("this prompt reads patch tokens, and these pictures have none")
        return self.tokens


class VisualAttention(nn.Module):
    """Learned queries over the patch tokens of a picture; each gives the shift of one context token.

    Args:
        patch_width: Wi.
        width: W of the states that are shifted.
    """

    def __init__(self, config: InstanceConfig, patch_width: int, width: int) -> None:
        super().__init__()
        inner = config.width or width
        if inner % config.heads:
            raise RecipeError(
                f"prompt.instance.heads={config.heads} does not divide the width {inner}: give "
                "prompt.instance.width, a multiple"
            )
        self.heads = config.heads
        self.norm = nn.LayerNorm(patch_width, elementwise_affine=False)
        self.queries = nn.Parameter(torch.zeros(config.tokens, inner))  # at first they see the mean of all patches
        self.key = nn.Linear(patch_width, inner)
        self.value = nn.Linear(patch_width, inner)
        self.output = nn.Linear(inner, width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, pictures: Pictures) -> Tensor:
        """Shifts (B, M, W)."""
        tokens = self.norm(pictures.patch_tokens())
        values = self._split(self.value(tokens))  # (B, heads, N, d)
        seen = self._weights(tokens, pictures.mask) @ values
        return self.output(seen.transpose(1, 2).flatten(2))

    def attention(self, pictures: Pictures) -> Tensor:
        """(B, M, N) how much each query looks at each patch token, the mean over heads; each row has the sum 1."""
        return self._weights(self.norm(pictures.patch_tokens()), pictures.mask).mean(dim=1)

    def _weights(self, tokens: Tensor, mask: Tensor | None) -> Tensor:  # (B, heads, M, N)
        keys = self._split(self.key(tokens))
        queries = self._split(self.queries[None])
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(keys.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1)

    def _split(self, x: Tensor) -> Tensor:  # (B, T, inner) -> (B, heads, T, d)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class MetaToken(nn.Module):
    """CoCoOp's meta-net: one vector of the picture's embedding shifts all context tokens alike.

    Unlike in the published code its last layer starts at zero.
    """

    def __init__(self, config: InstanceConfig, embedding_dim: int, width: int) -> None:
        super().__init__()
        inner = config.width or max(1, embedding_dim // 16)
        self.down = nn.Linear(embedding_dim, inner)
        self.up = nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, pictures: Pictures) -> Tensor:
        """Shifts (B, 1, W)."""
        return self.up(F.relu(self.down(pictures.embeddings)))[:, None]


class StructuredPrompt(nn.Module):
    """All that is learned of a prompt.

    Args:
        tower: sizes, and the embeddings of the text that the context starts from.
        patch_width: Wi; 0 if the image tower gives no patch tokens.
        classes: C.
        seed: of what starts at random.

    Attributes:
        general: (P, W).
        instance: None if switched off.
        class_tokens: (C, E, W) behind each name; None without.
        text_weight: multiplies cosines with class embeddings; another than 1 only beside vectors.
        raw_residual, raw_patches: `residual` and `patches` divided by `domain.rate`: so much faster they learn.

    Raises:
        RecipeError: sizes that do not go together.
    """

    text_weight: Tensor

    def __init__(
        self, config: PromptConfig, tower: PromptTower, *, patch_width: int, classes: int, seed: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.patch_width = patch_width
        dim = tower.base.embedding_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.general = nn.Parameter(_context(config, tower))
            self.instance = self._instance(config.instance, tower, patch_width, dim)
            tokens = config.domain.tokens
            self.class_tokens = nn.Parameter(_INIT_STD * torch.randn(classes, tokens, tower.width)) if tokens else None
        self.raw_residual = nn.Parameter(torch.zeros(classes, dim)) if config.domain.residual else None
        self.raw_patches = nn.Parameter(torch.zeros(classes, patch_width)) if config.domain.patches else None
        self.register_buffer("text_weight", torch.ones(()))

    @property
    def residual(self) -> Tensor | None:
        """(C, D), added to unit class embeddings; None without."""
        return None if self.raw_residual is None else self.config.domain.rate * self.raw_residual

    @property
    def patches(self) -> Tensor | None:
        """(C, Wi), compared with the pooled patch tokens of pictures; None without."""
        return None if self.raw_patches is None else self.config.domain.rate * self.raw_patches

    def vectors(self) -> list[Tensor]:
        """`residual` and `patches`, as far as there are any."""
        return [vectors for vectors in (self.residual, self.patches) if vectors is not None]

    def compared(self, pictures: Pictures) -> Tensor:
        """What `vectors` are compared with, side by side (B, F)."""
        parts = [pictures.embeddings] if self.raw_residual is not None else []
        return torch.cat([*parts, self.pooled(pictures)] if self.raw_patches is not None else parts, dim=1)

    @torch.no_grad()
    def set_vectors(self, vectors: Tensor) -> None:
        """Fill `residual` and `patches` from (C, F), in the order of `compared`."""
        start = 0
        for raw in (self.raw_residual, self.raw_patches):
            if raw is not None:
                raw.copy_(vectors[:, start : start + raw.shape[1]] / self.config.domain.rate)
                start += raw.shape[1]

    def pooled(self, pictures: Pictures) -> Tensor:
        """Unit vectors (B, Wi): the patch tokens as the instance queries look at them, else their mean."""
        tokens = pictures.patch_tokens()
        if isinstance(self.instance, VisualAttention):
            weights = self.instance.attention(pictures).mean(dim=1)  # (B, N)
        elif pictures.mask is not None:
            weights = pictures.mask / pictures.mask.sum(dim=1, keepdim=True)
        else:
            weights = tokens.new_full(tokens.shape[:2], 1 / tokens.shape[1])
        return F.normalize(torch.einsum("bn,bnw->bw", weights, tokens), dim=-1)

    @property
    def trained_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _instance(
        self, config: InstanceConfig | None, tower: PromptTower, patch_width: int, dim: int
    ) -> VisualAttention | MetaToken | None:
        if config is None:
            return None
        if not 0 <= config.layer < tower.layers:
            raise RecipeError(
                f"prompt.instance.layer={config.layer}, but the text tower of {tower.base.name} has the layers 0 to "
                f"{tower.layers - 1} (or -1 to -{tower.layers}): set prompt.instance.layer to one of them"
            )
        width = tower.state_width if config.layer else tower.width
        if config.kind == "meta":
            return MetaToken(config, dim, width)
        if config.tokens > len(self.general):
            raise RecipeError(
                f"prompt.instance.tokens={config.tokens} shift as many context tokens, but general has "
                f"{len(self.general)}: give prompt.general.tokens, or fewer prompt.instance.tokens"
            )
        return VisualAttention(config, patch_width, width)


def _context(config: PromptConfig, tower: PromptTower) -> Tensor:
    """Start of the context tokens (P, W): a text's embeddings, behind random ones where more are asked for."""
    general = config.general
    if general.init == "auto":
        raise ValueError("init=auto depends on class names: `settled` of `trimtab.recipes.prompt_fit` takes them")
    start = tower.embedded(general.init).cpu() if general.init else torch.zeros(0, tower.width)
    count = len(start) if general.tokens is None else general.tokens
    if count < len(start):
        raise RecipeError(
            f"prompt.general.tokens={count}, but init={general.init!r} has {len(start)} tokens: give at least as many, "
            "or a shorter text"
        )
    added = _INIT_STD * torch.randn(count - len(start), tower.width)
    return torch.cat([added, start.to(added.device)])  # of shapes alone where the prompt is built without memory


class PromptedClasses(nn.Module):
    """Class names behind a prompt, through a frozen text tower: pictures in, cosines out.

    Args:
        names: C class names, for whose class-specific parts the prompt was made.

    Attributes:
        prompt: what is trained.
        layout: tokens of the names.

    Raises:
        DataError: a name does not fit into the tower's context.
    """

    def __init__(self, tower: PromptTower, prompt: StructuredPrompt, names: Sequence[str]) -> None:
        super().__init__()
        self.tower = tower
        self.prompt = prompt
        self.names = tuple(names)
        self.layout = tower.layout(names, prompt=len(prompt.general), extra=prompt.config.domain.tokens)

    def __len__(self) -> int:
        return len(self.names)

    def embeddings(self, classes: Tensor | None = None) -> Tensor:
        """Unit embeddings (C, D), or of some classes, by General and Domain tokens; residual vectors are not in it."""
        layout, extra = self._rows(classes)
        features = self.tower.features(layout, self.prompt.general[None], extra)
        return F.normalize(features.float(), dim=-1)

    def weights(self, embeddings: Tensor) -> Tensor:
        """Class vectors (C, D) of unit class embeddings: weighted, the residual vectors added."""
        weighted = self.prompt.text_weight * embeddings
        return weighted if self.prompt.residual is None else weighted + self.prompt.residual

    def scored_by(self, embeddings: Tensor) -> Tensor:
        """What tells classes apart, (C, F): `weights`, beside them the vectors for patch tokens if there are any."""
        weights, patches = self.weights(embeddings), self.prompt.patches
        return weights if patches is None else torch.cat([weights, patches], dim=1)

    def scores(self, pictures: Pictures, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores (B, C) of pictures: cosines with class embeddings, plus products with residual vectors.

        Args:
            embeddings: (C, D) from `embeddings`.
            labels: (B,) true classes, which are always scored with the picture's own prompts; None outside training.
        """
        instance, patches = self.prompt.config.instance, self.prompt.patches
        exact = torch.autocast(embeddings.device.type, enabled=False)  # cosines in bf16 would be too coarse
        with exact:
            scores = pictures.embeddings @ self.weights(embeddings).T
            if patches is not None:
                scores = scores + self.prompt.pooled(pictures) @ patches.T
        if instance is None:
            return scores
        chosen = None
        if instance.top_k is not None and instance.top_k < len(self):
            chosen = best_classes(scores.detach(), instance.top_k, labels)
        own = self.of_pictures(pictures, chosen)  # (B, k, D)
        with exact:
            # Only the class embedding is another one; what was added to it stays.
            common = embeddings.expand(len(own), -1, -1) if chosen is None else embeddings[chosen]
            common = common.detach() if instance.layer else common
            moved = self.prompt.text_weight * torch.einsum("bd,bkd->bk", pictures.embeddings, own - common)
        return scores + moved if chosen is None else scores.scatter_add(1, chosen, moved)

    def of_pictures(self, pictures: Pictures, chosen: Tensor | None = None) -> Tensor:
        """Unit class embeddings (B, k, D) by each picture's own prompts.

        Args:
            chosen: (B, k) classes of each picture; None takes all.
        """
        instance, config = self.prompt.instance, self.prompt.config.instance
        assert instance is not None
        assert config is not None
        shift = instance(pictures)  # (B, M, W)
        if not config.layer and can_reuse(self.tower):
            features = reused_features(self.tower, self.layout, self._shifted(shift), chosen, self.prompt.class_tokens)
            return F.normalize(features.float(), dim=-1)
        count = len(self) if chosen is None else chosen.shape[1]
        flat = torch.arange(len(self), device=shift.device).repeat(len(shift)) if chosen is None else chosen.flatten()
        if config.layer:
            # What lies below the layer is the same for all pictures; gradients reach it by `embeddings` alone.
            used, rows = flat.unique(return_inverse=True)
            layout, extra = self._rows(used)
            with torch.no_grad():
                states = self.tower.entering(layout, config.layer, self.prompt.general[None], extra)
            shifts = shift.repeat_interleave(count, dim=0)
            features = self.tower.shifted(layout, config.layer, states, rows, shifts)
        else:
            layout, extra = self._rows(flat)
            features = self.tower.features(layout, self._shifted(shift).repeat_interleave(count, dim=0), extra)
        return F.normalize(features.float().view(len(shift), count, -1), dim=-1)

    def _shifted(self, shift: Tensor) -> Tensor:  # (B, M, W) -> (B, P, W)
        general = self.prompt.general
        if self.prompt.config.instance is not None and self.prompt.config.instance.kind == "meta":
            return general + shift
        kept = shift.new_zeros(len(shift), len(general) - shift.shape[1], shift.shape[2])
        return general + torch.cat([kept, shift], dim=1)

    def _rows(self, classes: Tensor | None) -> tuple[PromptLayout, Tensor | None]:
        extra = self.prompt.class_tokens
        if classes is None:
            return self.layout, extra
        return self.layout.take(classes), None if extra is None else extra[classes]


def best_classes(scores: Tensor, count: int, labels: Tensor | None = None) -> Tensor:
    """(B, count) best classes of each row of scores (B, C), among them that of `labels` (B,) if given."""
    if labels is not None:
        scores = scores.scatter(1, labels[:, None], torch.inf)
    return scores.topk(count, dim=1).indices


def extended(prompt: StructuredPrompt, places: Sequence[int | None]) -> StructuredPrompt:
    """The prompt for other classes: what was learned of class `places[c]`, or of an unseen class (None) its mean.

    Vectors that are added to what a name says are zero for an unseen class.
    """
    other = copy.copy(prompt)
    other._parameters = dict(prompt._parameters)
    seen = [0 if place is None else place for place in places]
    unseen = torch.tensor([place is None for place in places], device=prompt.general.device)
    if prompt.class_tokens is not None:
        tokens = prompt.class_tokens.detach()
        chosen = torch.where(unseen[:, None, None], tokens.mean(dim=0), tokens[seen])
        other.class_tokens = nn.Parameter(chosen, requires_grad=False)
    for name in ("raw_residual", "raw_patches"):
        if (vectors := getattr(prompt, name)) is not None:
            kept = vectors.detach()[seen].masked_fill(unseen[:, None], 0)
            setattr(other, name, nn.Parameter(kept, requires_grad=False))
    return other
