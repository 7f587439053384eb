"""Every few-shot method that is compared, `METHODS`: all see the same shots, validation pictures, features and views.

A method fits a classifier on an `Episode` and says what it chose; choices are made on its validation pictures alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.adapters.prompt import Pictures
from trimtab.config import ContextConfig, DomainPartConfig, PromptRecipe
from trimtab.data.classes import warn_of_equal
from trimtab.data.shots import Shots
from trimtab.data.templates import default_templates
from trimtab.errors import RecipeError
from trimtab.evaluation.ranking import TIE
from trimtab.objectives.probes import KeyCache, Linear, fit_logistic, fit_lp_plus_plus, train_keys
from trimtab.recipes.fewshot_lora import STEPS, LowRank
from trimtab.recipes.prompt_features import PictureFeatures
from trimtab.recipes.prompt_fit import LabelledFeatures, fit_prompt, right
from trimtab.towers.classifier import class_vectors
from trimtab.towers.dual_encoder import DualEncoder

PENALTIES = tuple(10.0**power for power in range(-1, -7, -1))
STRENGTHS = (10.0, 50.0, 250.0)
ALPHAS = (0.0, *(2.0**power for power in range(-3, 7)))
BETAS = tuple(2.0**power for power in range(-1, 7))
_READ = 1024  # pictures whose patch tokens are in memory while their embeddings are read


@dataclass(frozen=True, eq=False)
class Split:
    """Some pictures as every method sees them.

    Attributes:
        features: what the frozen image tower says of them.
        embeddings: (V, N, D) unit norm, in each view, the picture itself first.
        labels: (N,).
        patches: (V, N, Wi) unit-norm means of the patch tokens; None where there are none.
    """

    features: PictureFeatures
    embeddings: Tensor
    labels: Tensor
    patches: Tensor | None = None

    @classmethod
    def of(cls, features: PictureFeatures, labels: np.ndarray) -> Split:
        """Reads the embeddings out of the cache."""
        views, patches = [], []
        for view in range(features.views + 1):
            parts = [
                _seen(features.pictures(np.arange(start, min(start + _READ, len(features))), view))
                for start in range(0, len(features), _READ)
            ]
            views.append(torch.cat([embeddings for embeddings, _ in parts]))
            patches.append(torch.cat([mean for _, mean in parts]))
        means = torch.stack(patches) if features.tokens else None
        return cls(features, torch.stack(views), torch.from_numpy(labels), means)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: np.ndarray, labels: np.ndarray | None = None) -> Split:
        """Some of them, by position, with other labels if given."""
        own = self.labels[positions] if labels is None else torch.from_numpy(labels)
        patches = None if self.patches is None else self.patches[:, positions]
        return Split(self.features.take(positions), self.embeddings[:, positions], own, patches)


@dataclass(frozen=True, eq=False)
class Episode:
    """What one run of a method sees.

    Attributes:
        draw: the pictures themselves, for methods that train the image tower.
        train, validation: shots with their views, and pictures to choose by.
        recipe: options of the methods that learn prompts.
        seed: of whatever a method draws.
    """

    base: DualEncoder
    draw: Shots
    train: Split
    validation: Split
    recipe: PromptRecipe
    seed: int

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of the labels."""
        return self.draw.train.classes

    def all_views(self) -> tuple[Tensor, Tensor]:
        """Embeddings (V * N, D) of the shots in every view, and their labels."""
        views = self.train.embeddings
        return views.flatten(0, 1), self.train.labels.repeat(len(views))

    def text(self, *, ensemble: bool = False) -> Tensor:
        """Unit-norm embeddings (C, D) of the class names in the first of the hand templates, or in all of them."""
        templates = self.recipe.templates or tuple(default_templates(self.classes)[1])
        return _class_texts(self.base, self.classes, templates if ensemble else templates[:1])


@dataclass(frozen=True, eq=False)
class Fitted:
    """A classifier and what is worth knowing of it.

    Attributes:
        logits: (N, C) of pictures.
        parameters: trained numbers.
        chosen: what validation chose.
        scale: what cosines are multiplied with in the logits; 1 where there are none.
    """

    logits: Callable[[Split], Tensor]
    parameters: int = 0
    chosen: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0


Method = Callable[[Episode], Fitted]


@functools.lru_cache(maxsize=4)
def _class_texts(base: DualEncoder, classes: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
    """Encoded once for all runs of a sweep."""
    vectors = class_vectors(base, classes, templates)
    warn_of_equal(classes, vectors, tie=TIE)
    return torch.from_numpy(vectors)


def _seen(pictures: Pictures) -> tuple[Tensor, Tensor]:
    """Embeddings (B, D), and unit means (B, Wi) of the patch tokens: of no width where there are none.

    On the CPU: what methods fit on them is small.
    """
    tokens, mask, embeddings = pictures.tokens, pictures.mask, pictures.embeddings.cpu()
    if tokens is None:
        return embeddings, embeddings[:, :0]
    weights = tokens.new_ones(tokens.shape[:2]) if mask is None else mask.float()
    mean = torch.einsum("bn,bnw->bw", weights, tokens)
    return embeddings, F.normalize(mean, dim=-1).cpu()


def template(episode: Episode) -> Fitted:
    """Zero-shot: class names in one hand-written sentence."""
    return _by_text(episode.text(), episode.base.logit_scale)


def ensemble(episode: Episode) -> Fitted:
    """Zero-shot: the mean over several hand-written sentences."""
    return _by_text(episode.text(ensemble=True), episode.base.logit_scale)


def linear_probe(episode: Episode) -> Fitted:
    """Logistic regression whose penalty validation chooses, coarsely first and then between its neighbours."""
    return _logistic(episode, lambda pictures: pictures.embeddings)


def linear_probe_patches(episode: Episode) -> Fitted:
    """The same on embeddings and mean patch tokens side by side: what structured prompts see, without a prompt.

    Raises:
        RecipeError: the recipe's prompt reads no patch tokens, or the image tower has none.
    """
    if episode.train.patches is None:
        raise RecipeError("linear_probe_patches needs patch tokens: leave it out, or take a recipe that reads them")
    return _logistic(episode, _beside)


def _beside(pictures: Split) -> Tensor:
    assert pictures.patches is not None
    return torch.cat([pictures.embeddings, pictures.patches], dim=-1)


def _logistic(episode: Episode, inputs: Callable[[Split], Tensor]) -> Fitted:
    views = inputs(episode.train)
    features, labels = views.flatten(0, 1), episode.train.labels.repeat(len(views))
    held = inputs(episode.validation)[0]
    tried: dict[float, Linear] = {}
    start: Linear | None = None

    def best() -> float:
        return _best_on(held, episode.validation.labels, tried.items())[0]

    for penalty in PENALTIES:  # strongest first, so that of equal ones it wins
        start = tried[penalty] = fit_logistic(features, labels, len(episode.classes), penalty, start)
    for step in (10**0.5, 10**0.25):
        middle = best()
        for penalty in (middle * step, middle / step):
            tried[penalty] = fit_logistic(features, labels, len(episode.classes), penalty, tried[middle])
    chosen = best()
    probe = tried[chosen]
    parameters = probe.weight.numel() + probe.bias.numel()
    return Fitted(lambda pictures: probe(inputs(pictures)[0]), parameters, {"penalty": chosen})


def lp_plus_plus(episode: Episode) -> Fitted:
    """LP++ (Huang et al., arXiv 2404.02285); validation chooses where it starts from and how long it runs."""
    features, labels = episode.all_views()
    text = episode.text()
    shots = len(episode.train) / len(episode.classes)
    tried = (
        ((strength, step), blend)
        for strength in STRENGTHS
        for step, blend in enumerate(fit_lp_plus_plus(features, labels, text, shots=shots, strength=strength))
    )
    (strength, step), blend = _best(episode, tried)
    parameters = blend.visual.numel() + blend.bias.numel() + blend.alpha.numel()
    return Fitted(_on_embeddings(blend), parameters, {"strength": strength, "step": step})


def tip_adapter_f(episode: Episode) -> Fitted:
    """Tip-Adapter-F (Zhang et al., arXiv 2207.09519); validation chooses alpha, beta and the epoch."""
    views = episode.train.embeddings  # (V, N, D)
    labels = episode.train.labels
    keys = F.normalize(views.mean(0), dim=-1)
    values = F.one_hot(labels, len(episode.classes)).float()
    text, scale = episode.text(), episode.base.logit_scale
    rng = np.random.default_rng([episode.seed, 5])

    def draw(epoch: int) -> tuple[Tensor, Tensor]:
        order = torch.from_numpy(rng.permutation(len(labels)))
        view = torch.from_numpy(rng.integers(0, len(views), len(labels)))
        return views[view, order], labels[order]

    def candidates(of: Tensor) -> Iterable[tuple[tuple[float, float], KeyCache]]:
        for alpha, beta in itertools.product(ALPHAS, BETAS):
            yield (alpha, beta), KeyCache(of, values, text, scale, alpha, beta)

    # The keys cannot move without a weight: the training starts from the best that has one.
    weighted = ((name, one) for name, one in candidates(keys) if name[0] > 0)
    _, start = _best(episode, weighted, scale)
    tried = (
        ((alpha, beta, epoch), cache)
        for epoch, moved in enumerate(train_keys(start, draw))
        for (alpha, beta), cache in candidates(moved)
    )
    (alpha, beta, epoch), cache = _best(episode, tried, scale)
    return Fitted(_on_embeddings(cache), keys.numel(), {"alpha": alpha, "beta": beta, "epoch": epoch}, scale)


def clip_lora(episode: Episode) -> Fitted:
    """CLIP-LoRA (Zanella & Ben Ayed, arXiv 2405.18541), cut to few steps; nothing is chosen."""
    data = episode.recipe.data
    templates = episode.recipe.templates or tuple(default_templates(episode.classes)[1])
    lora = LowRank(episode.base, episode.classes, templates[0], views=data.views, options=data.augmentation)
    train = episode.draw.train
    lora.train(train.images, train.labels, episode.seed)

    def logits(pictures: Split) -> Tensor:
        return lora.logits(tuple(pictures.features.files))

    return Fitted(logits, lora.parameters, {"steps": STEPS}, episode.base.logit_scale)


def _by_text(text: Tensor, scale: float) -> Fitted:
    return Fitted(_on_embeddings(lambda images: scale * images @ text.T), scale=scale)


def _on_embeddings(classify: Callable[[Tensor], Tensor]) -> Callable[[Split], Tensor]:
    return lambda pictures: classify(pictures.embeddings[0])


def _best(episode: Episode, candidates: Iterable[tuple[Any, Any]], scale: float = 1.0) -> tuple[Any, Any]:
    """Name and classifier of the candidate with most of the validation pictures right; among equal ones with the least
    cross-entropy, then the first."""
    return _best_on(episode.validation.embeddings[0], episode.validation.labels, candidates, scale)


def _best_on(
    images: Tensor, labels: Tensor, candidates: Iterable[tuple[Any, Any]], scale: float = 1.0
) -> tuple[Any, Any]:
    found: tuple[Any, Any] | None = None
    mark = (-1.0, 0.0)
    for name, classify in candidates:
        logits = classify(images)
        mine = (right(logits, labels, scale), -float(F.cross_entropy(logits, labels)))
        if mine > mark:
            found, mark = (name, classify), mine
    if found is None:
        raise ValueError("no candidate gives a finite loss")
    return found


def learned(change: Callable[[PromptRecipe], PromptRecipe]) -> Method:
    """A method that learns prompts: the recipe, changed."""

    def method(episode: Episode) -> Fitted:
        train, held = (
            LabelledFeatures(part.features, part.labels.numpy()) for part in (episode.train, episode.validation)
        )
        recipe = change(episode.recipe)
        fitted = fit_prompt(episode.base, recipe, train, held, episode.classes, episode.seed, last=False)
        by_embedding = fitted.prompt.instance is None and not fitted.prompt.config.reads_patches

        def logits(pictures: Split) -> Tensor:
            seen = Pictures(pictures.embeddings[0].to(episode.base.device)) if by_embedding else pictures.features
            return torch.from_numpy(fitted.logits(seen))

        chosen = {"select": recipe.select, "class_scale": fitted.class_scale}
        return Fitted(logits, fitted.prompt.trained_parameters, chosen, fitted.class_scale)

    return method


def _parts(recipe: PromptRecipe, *, instance: bool = True, domain: bool = True, residual: bool = True) -> PromptRecipe:
    """The structured prompt without some of its parts."""
    prompt = recipe.prompt
    if not instance:
        prompt = replace(prompt, instance=None)
    if not residual:
        prompt = replace(prompt, domain=replace(prompt.domain, residual=False))
    if not domain:
        prompt = replace(prompt, domain=DomainPartConfig(tokens=0, residual=False, patches=False, solve=False))
    return replace(recipe, method="structured", prompt=prompt)


def _context_first(recipe: PromptRecipe) -> PromptRecipe:
    """The structured prompt whose general tokens learn alone before all else."""
    return replace(_parts(recipe), context=recipe.context or ContextConfig())


def coop(recipe: PromptRecipe) -> PromptRecipe:
    """CoOp with settings of its own, chosen on validation: all classes in every step, the last weights."""
    return replace(
        recipe,
        method="coop",
        steps=400,
        select="last",
        objective=replace(recipe.objective, classes_per_step=None),
        training=replace(recipe.training, epochs=1, batch_size=128, learning_rate=1e-2),
    )


CHANGES: dict[str, Callable[[PromptRecipe], PromptRecipe]] = {
    "structured": _parts,
    "structured_context": _context_first,
    "general_domain": functools.partial(_parts, instance=False),
    "general_instance": functools.partial(_parts, domain=False),
    "general": functools.partial(_parts, instance=False, domain=False),
    "coop": coop,
    "cocoop": lambda recipe: replace(recipe, method="cocoop"),
}
"""What methods that learn prompts make of the recipe; `general` has its terms, `coop` cross-entropy alone."""

PROMPT_METHODS: dict[str, Method] = {name: learned(change) for name, change in CHANGES.items()}

PROBES = ("linear_probe", "linear_probe_patches")
"""Methods that learn from pictures alone: what classes are called does not matter to them."""

METHODS: dict[str, Method] = {
    "template": template,
    "ensemble": ensemble,
    "linear_probe": linear_probe,
    "linear_probe_patches": linear_probe_patches,
    "lp_plus_plus": lp_plus_plus,
    "tip_adapter_f": tip_adapter_f,
    "clip_lora": clip_lora,
    **PROMPT_METHODS,
}
"""All of them."""
