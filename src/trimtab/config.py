"""Recipes as frozen dataclasses: a configuration that exists is valid.

`load_recipe` reads YAML plus ``key=value`` overrides; the dataclasses below are the whole vocabulary. Each
checks itself when made and says which value is wrong and what is allowed. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from trimtab import strict_yaml
from trimtab.errors import RecipeError
from trimtab.strict_yaml import from_mapping, to_mapping, to_yaml

__all__ = [
    "RECIPES",
    "ContrastiveConfig",
    "DistillationConfig",
    "DomainAdapterConfig",
    "DomainData",
    "LanguageAdapterConfig",
    "LanguageData",
    "LanguageRecipe",
    "MemoryBankConfig",
    "PairSource",
    "Recipe",
    "StudentConfig",
    "TextSource",
    "TrainingConfig",
    "ViewsConfig",
    "from_mapping",
    "load_recipe",
    "recipe_from_mapping",
    "to_mapping",
    "to_yaml",
]


def _require(config: Any, name: str, ok: bool, allowed: str) -> None:
    if not ok:
        raise RecipeError(f"{name}={getattr(config, name)!r} must be {allowed}")


# ---------------------------------------------------------------------------------------- language link


@dataclass(frozen=True)
class TextSource:
    """One file of parallel text, or a prepared source such as ``cedict`` or ``cldr:zh``.

    Attributes:
        path: CSV, TSV, JSONL or Parquet file, or the name of a prepared source.
        target: column with the target-language text.
        english: column with its English translation.
        language: code of the target language; a column ``language`` in the file takes precedence.
        weight: how often its pairs are drawn relative to other sources' pairs.
        limit: use at most this many pairs, those of highest weight first.
    """

    SHORTHAND: ClassVar[str] = "path"

    path: str
    target: str = "target"
    english: str = "english"
    language: str = "zh"
    weight: float = 1.0
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("path", "target", "english", "language"):
            _require(self, name, bool(getattr(self, name).strip()), "non-empty text")
        _require(self, "english", self.english != self.target, f"another column than target={self.target!r}")
        _require(self, "weight", self.weight > 0, "above 0")
        _require(self, "limit", self.limit is None or self.limit >= 1, "at least 1, or null for all")


@dataclass(frozen=True)
class LanguageData:
    """Parallel text of the language link and how it is drawn.

    Attributes:
        train: sources of training pairs.
        validation: sources of validation pairs; when empty, `validation_size` pairs are split off `train`.
        validation_size: pairs used for validation, at most.
        max_chars: longer sides are dropped (and counted).
        english_share: fraction of English-English pairs mixed into each epoch, 0 <= share < 1.
        language_balance: languages are drawn with probability proportional to pairs ** language_balance:
            1 is proportional to their size, 0 all alike.
        phrases: number of phrases composed from the training pairs' nouns ("two red apples"), for languages
            that `trimtab.data.phrases` knows.
        exclude: files (CSV, TSV, JSONL, Parquet) whose column ``text`` no training pair may have as its target,
            so that evaluation on them stays honest.
        epoch_pairs: pairs drawn per epoch; null draws as many as there are.
    """

    train: tuple[TextSource, ...]
    validation: tuple[TextSource, ...] = ()
    validation_size: int = 1000
    max_chars: int = 300
    english_share: float = 0.1
    language_balance: float = 0.5
    phrases: int = 0
    exclude: tuple[str, ...] = ()
    epoch_pairs: int | None = None

    def __post_init__(self) -> None:
        _require(self, "train", len(self.train) > 0, "at least one source of pairs")
        _require(self, "validation_size", self.validation_size >= 2, "at least 2")
        _require(self, "max_chars", self.max_chars >= 1, "at least 1")
        _require(self, "english_share", 0 <= self.english_share < 1, "at least 0 and below 1")
        _require(self, "language_balance", 0 <= self.language_balance <= 1, "from 0 to 1")
        _require(self, "phrases", self.phrases >= 0, "at least 0")
        _require(self, "epoch_pairs", self.epoch_pairs is None or self.epoch_pairs >= 1, "at least 1, or null")


@dataclass(frozen=True)
class StudentConfig:
    """The frozen text encoder of the target language.

    Attributes:
        name: ``e5-small``, or a transformers folder or hub id.
        layers: hidden layers whose token states are concatenated; -1 is the last.
        prefix: put before every text (E5 wants "query: "); null takes the encoder's own.
    """

    SHORTHAND: ClassVar[str] = "name"

    name: str = "e5-small"
    layers: tuple[int, ...] = (-1,)
    prefix: str | None = None

    def __post_init__(self) -> None:
        _require(self, "name", bool(self.name.strip()), "non-empty text")
        distinct = 0 < len(self.layers) == len(set(self.layers))
        _require(self, "layers", distinct, "one or more different layer numbers, for example [-1] or [6, -1]")


@dataclass(frozen=True)
class LanguageAdapterConfig:
    """Down linear -> Transformer layers -> Up linear -> pooling.

    Attributes:
        width: inner width, a multiple of `heads`.
        layers: Transformer encoder layers, 0 to 12 (the published work has 1 or 2).
        feedforward: inner width of the feed-forward block as a multiple of `width`.
        init: ``ridge`` starts from the closed-form linear map, ``random`` from nothing.
    """

    width: int = 384
    layers: int = 2
    heads: int = 6
    feedforward: int = 4
    pooling: Literal["mean", "cls", "attention"] = "mean"
    dropout: float = 0.0
    init: Literal["ridge", "random"] = "ridge"

    def __post_init__(self) -> None:
        _require(self, "heads", self.heads >= 1, "at least 1")
        divisible = self.width >= 1 and self.width % self.heads == 0
        _require(self, "width", divisible, f"a positive multiple of heads={self.heads}")
        _require(self, "layers", 0 <= self.layers <= 12, "from 0 to 12")
        _require(self, "feedforward", self.feedforward >= 1, "at least 1")
        _require(self, "dropout", 0 <= self.dropout < 1, "at least 0 and below 1")


@dataclass(frozen=True)
class DistillationConfig:
    """Weights of the terms in `trimtab.objectives.distillation`; a term of weight 0 is not computed.

    Attributes:
        logit_scale: multiplies cosines in the InfoNCE term.
        targets: ``standardise`` regresses teacher vectors with zero mean and unit variance per dimension,
            ``sum`` the raw vectors with the squares summed over dimensions.
    """

    mse: float = 1.0
    cosine: float = 0.0
    infonce: float = 0.0
    gram: float = 0.0
    logit_scale: float = 20.0
    targets: Literal["standardise", "sum"] = "standardise"

    def __post_init__(self) -> None:
        terms = ("mse", "cosine", "infonce", "gram")
        for name in terms:
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        some = any(getattr(self, name) > 0 for name in terms)
        _require(self, "mse", some, "above 0, or one of cosine, infonce, gram")
        _require(self, "logit_scale", self.logit_scale > 0, "above 0")


# ------------------------------------------------------------------------------------ domain link: data


@dataclass(frozen=True)
class PairSource:
    """Pictures with captions, or pictures of classes whose captions templates and descriptions make.

    Attributes:
        path: a table (CSV, TSV, JSONL, Parquet); a folder with a folder of pictures per class; or shards, as one
            ``.tar`` or a pattern such as ``shard-{000..012}.tar``.
        image: column with the picture's path.
        text: column (of shards: key in JSON members) with the caption; in JSONL and Parquet also a list of captions.
        label: column (or key) with a class name, which is read instead of `text`. A folder always has classes.
        root: folder of a table's pictures; null takes the folder of the table.
        templates: captions of a class, ``{}`` standing for its name.
        descriptions: table with the columns ``class`` and ``description``, whose sentences are further captions.
        share: fraction of the images to use, every caption alike; a smaller share lies within a larger one.
        limit: use at most this many images.
    """

    SHORTHAND: ClassVar[str] = "path"

    path: str
    image: str = "image"
    text: str = "text"
    label: str | None = None
    root: str | None = None
    templates: tuple[str, ...] = ("a photo of a {}",)
    descriptions: str | None = None
    share: float = 1.0
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("path", "image", "text"):
            _require(self, name, bool(getattr(self, name).strip()), "non-empty text")
        for name in ("label", "root", "descriptions"):
            value = getattr(self, name)
            _require(self, name, value is None or bool(value.strip()), "non-empty text, or null")
        for name in ("text", "label"):
            _require(self, name, getattr(self, name) != self.image, f"another column than image={self.image!r}")
        places = [template.count("{}") for template in self.templates]
        _require(self, "templates", set(places) == {1}, "one or more texts with exactly one {} each")
        _require(self, "share", 0 < self.share <= 1, "above 0 and at most 1")
        _require(self, "limit", self.limit is None or self.limit >= 1, "at least 1, or null for all")


@dataclass(frozen=True)
class ViewsConfig:
    """How far an augmented view of a picture may be from the picture.

    Attributes:
        crop_min: smallest part of the area that a view shows; 1 always shows all of it.
        flip: mirror every other view; false where writing or handedness matters.
        colour: largest relative change of brightness, contrast and saturation; the hue turns by at most an eighth
            of it, as a fraction of the circle. 0 leaves colours alone.
    """

    crop_min: float = 0.5
    flip: bool = True
    colour: float = 0.2

    def __post_init__(self) -> None:
        _require(self, "crop_min", 0 < self.crop_min <= 1, "above 0 and at most 1")
        _require(self, "colour", 0 <= self.colour < 1, "at least 0 and below 1")


@dataclass(frozen=True)
class DomainData:
    """Pictures with captions for the domain link.

    Attributes:
        train: sources of training pairs.
        validation: sources of validation pairs; when empty, `validation_share` of the images is split off `train`.
        validation_share: fraction of the images used for validation, every caption alike.
        views: augmented views per image that are cached beside the picture itself; 0 for the picture alone.
        augmentation: how far these views may be from the picture.
        check_duplicates: leave training pictures out that validation has too; false only warns of them.
    """

    train: tuple[PairSource, ...]
    validation: tuple[PairSource, ...] = ()
    validation_share: float = 0.1
    views: int = 0
    augmentation: ViewsConfig = field(default_factory=ViewsConfig)
    check_duplicates: bool = True

    def __post_init__(self) -> None:
        _require(self, "train", len(self.train) > 0, "at least one source of pairs")
        _require(self, "validation_share", 0 < self.validation_share <= 0.5, "above 0 and at most 0.5")
        _require(self, "views", self.views >= 0, "at least 0")


# --------------------------------------------------------------------- domain link: objective and memory bank


@dataclass(frozen=True)
class ContrastiveConfig:
    """Weights of the terms in `trimtab.objectives.contrastive`; a term of weight 0 is not computed.

    Attributes:
        image_to_text: weight of finding an image's captions among the texts; with the default of both terms their
            sum is CLIP's loss.
        text_to_image: weight of finding a text's images in the batch.
        logit_scale: multiplies cosines; null starts from the base's own.
        learn_logit_scale: train it with the adapters; false keeps it as it is.
        label_smoothing: share of every target that is spread over all candidates alike.
        hard_negatives: texts from the memory bank added to every batch as negatives of its images; 0 for none.
    """

    image_to_text: float = 0.5
    text_to_image: float = 0.5
    logit_scale: float | None = None
    learn_logit_scale: bool = False
    label_smoothing: float = 0.0
    hard_negatives: int = 0

    def __post_init__(self) -> None:
        for name in ("image_to_text", "text_to_image"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        _require(self, "image_to_text", self.image_to_text + self.text_to_image > 0, "above 0, or text_to_image")
        _require(self, "logit_scale", self.logit_scale is None or self.logit_scale > 0, "above 0, or null")
        _require(self, "label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1")
        _require(self, "hard_negatives", self.hard_negatives >= 0, "at least 0")
        useful = self.hard_negatives == 0 or self.image_to_text > 0
        _require(self, "hard_negatives", useful, "0 when image_to_text is 0, the only term that uses them")


@dataclass(frozen=True)
class MemoryBankConfig:
    """How hard pairs are found, and how much more often and more heavily they are trained on.

    A pair is drawn in proportion to (eps + difficulty) ** gamma, with difficulties from 0 to 1.

    Attributes:
        enabled: false draws all pairs alike, still `epoch_share` of them per epoch.
        difficulty: ``margin`` by how far the hardest wrong caption is ahead, ``rank`` by how many are, ``loss`` by
            the caption's probability among all; ``learnability`` by how much higher that loss is than a
            reference's, so that pairs nobody can learn (wrong captions) do not count as hard.
        gamma: 0 draws all pairs alike; the higher, the more the hard ones.
        eps: what an easy pair counts; the lower, the steeper.
        floor: least probability relative to drawing all alike; 0 for none.
        cap: greatest probability relative to drawing all alike; null for none.
        tail: share of the pairs, the hardest, whose difficulty is lowered to that of the next hardest: mislabelled
            pairs look hardest. 0 for none.
        momentum: of the running difficulty; 0 keeps the latest difficulty only.
        importance: 1 weighs pairs by the inverse of how likely they were drawn, which undoes in the loss what
            sampling does (its variance stays lower); 0 leaves it.
        instance_weight: 0 weighs the losses of pairs alike, 1 in proportion to their difficulty.
        epoch_share: fraction of the pairs drawn per epoch, none twice. At 1 an epoch has every pair once, however
            hard, and only weights can tell them apart.
    """

    enabled: bool = True
    difficulty: Literal["margin", "rank", "loss", "learnability"] = "margin"
    gamma: float = 1.0
    eps: float = 0.1
    floor: float = 0.2
    cap: float | None = 4.0
    tail: float = 0.02
    momentum: float = 0.5
    importance: float = 0.0
    instance_weight: float = 0.0
    epoch_share: float = 0.5

    def __post_init__(self) -> None:
        _require(self, "gamma", 0 <= self.gamma <= 10, "from 0 to 10")
        _require(self, "eps", 1e-6 <= self.eps <= 1e6, "from 1e-6 to 1e6")
        _require(self, "cap", self.cap is None or self.cap >= 1, "at least 1, or null for no cap")
        _require(self, "tail", 0 <= self.tail < 1, "at least 0 and below 1")
        _require(self, "momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        for name in ("floor", "importance", "instance_weight"):
            _require(self, name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        _require(self, "epoch_share", 0 < self.epoch_share <= 1, "above 0 and at most 1")


# --------------------------------------------------------------------------------- domain link: adapters


@dataclass(frozen=True)
class DomainAdapterConfig:
    """One group of adapters: the same kind beside each layer of a range, in one tower.

    Attributes:
        tower: ``image`` or ``text``.
        kind: ``bottleneck`` (Down, GELU, Up) and ``transformer`` (Down, Transformer layers, Up) sit beside
            Transformer layers; ``conv`` (1x1 down, depthwise 3x3, 1x1 up) beside the blocks of a convolutional trunk.
        first, last: the range, both included, counted from 0 at the pixels or tokens; negative numbers count
            from the end, so that 0 and -1 take all and -2 and -1 the last two.
        width: inner width; for ``transformer`` a multiple of `heads`.
        layers: Transformer layers between Down and Up, 1 or 2; ``transformer`` only.
        heads: attention heads; ``transformer`` only.
    """

    tower: Literal["image", "text"]
    kind: Literal["bottleneck", "transformer", "conv"] = "bottleneck"
    first: int = 0
    last: int = -1
    width: int = 64
    layers: int = 1
    heads: int = 4

    def __post_init__(self) -> None:
        same_sign = (self.first < 0) == (self.last < 0)
        _require(self, "last", not same_sign or self.first <= self.last, f"at or after first={self.first}")
        _require(self, "width", self.width >= 1, "at least 1")
        if self.kind == "transformer":
            _require(self, "layers", self.layers in (1, 2), "1 or 2")
            _require(self, "heads", self.heads >= 1, "at least 1")
            _require(self, "width", self.width % self.heads == 0, f"a multiple of heads={self.heads}")
        else:
            for name, default in (("layers", 1), ("heads", 4)):
                ours = getattr(self, name) == default
                _require(self, name, ours, f"left out: only kind=transformer has it, not kind={self.kind}")
        _require(self, "tower", self.kind != "conv" or self.tower == "image", "image for kind=conv")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (Hu et al., arXiv 2106.09685) by the `peft` library, the baseline with ``method: lora``.

    Attributes:
        targets: endings of the names of the modules that get it: linear layers and convolutions.
        first_block: of a convolutional trunk only blocks from this one on count, so that what lies below can be
            cached as it is for adapters; null takes all.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "query", "key", "value")
    first_block: int | None = None

    def __post_init__(self) -> None:
        _require(self, "rank", self.rank >= 1, "at least 1")
        _require(self, "alpha", self.alpha > 0, "above 0")
        _require(self, "targets", len(self.targets) > 0, "one or more endings of module names")


# --------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class TrainingConfig:
    """What the one training loop needs to know, whatever the link.

    Attributes:
        batch_size: items per optimiser step over all processes together.
        warmup: fraction of all steps in which the learning rate rises from 0.
        clip: largest gradient norm; null never clips.
        precision: ``auto`` is bf16 where the device computes in it (newer GPUs and CPUs), else fp32.
        checkpoint_every: optimiser steps between checkpoints; every epoch ends with one too.
        log_every: optimiser steps between records for trackers and history.
        ema: decay of an exponential moving average of the weights that is validated and kept instead of
            them; null for none.
        collapse_at: training stops when validation reports a collapse above this: 0 is as spread out as the
            teacher's features, 1 a constant output.
        processes: number of processes expected; null takes what the launcher gives.
    """

    epochs: int = 10
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: float | None = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint_every: int = 500
    log_every: int = 20
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    ema: float | None = None
    collapse_at: float = 0.95
    processes: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "checkpoint_every", "log_every"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        _require(self, "learning_rate", self.learning_rate > 0, "above 0")
        _require(self, "weight_decay", self.weight_decay >= 0, "at least 0")
        _require(self, "warmup", 0 <= self.warmup < 1, "a fraction of the steps, at least 0 and below 1")
        _require(self, "clip", self.clip is None or self.clip > 0, "above 0, or null for no clipping")
        _require(self, "trackers", len(set(self.trackers)) == len(self.trackers), "without repeats")
        _require(self, "ema", self.ema is None or 0 < self.ema < 1, "between 0 and 1, or null for none")
        _require(self, "collapse_at", 0 < self.collapse_at <= 1, "above 0 and at most 1")
        _require(self, "processes", self.processes is None or self.processes >= 1, "at least 1, or null")


# ---------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe:
    """The language link: a base learns to read another language from parallel text alone.

    Attributes:
        base: ``starter``, or a transformers folder or hub id.
        out: the adapted folder to write.
        english: ``route`` sends English text to the original tower, ``adapter`` through the adapter.
    """

    link: Literal["language"] = "language"
    base: str = "starter"
    student: StudentConfig = field(default_factory=StudentConfig)
    out: str = "runs/language"
    seed: int = 0
    data: LanguageData
    adapter: LanguageAdapterConfig = field(default_factory=LanguageAdapterConfig)
    objective: DistillationConfig = field(default_factory=DistillationConfig)
    english: Literal["route", "adapter"] = "route"
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        _require(self, "base", bool(self.base.strip()), "non-empty text")
        _require(self, "out", bool(self.out.strip()), "the folder to write")
        _require(self, "seed", 0 <= self.seed < 2**32, "from 0 to 4294967295")
        contrastive = self.objective.infonce > 0 or self.objective.gram > 0
        if contrastive and self.training.batch_size < 2:
            raise RecipeError(
                f"training.batch_size={self.training.batch_size} must be at least 2 with "
                "objective.infonce or objective.gram, which compare the rows of a batch"
            )

    @property
    def languages(self) -> tuple[str, ...]:
        """Target languages named by the training sources, in their order."""
        return tuple(dict.fromkeys(source.language for source in self.data.train))


@dataclass(frozen=True, kw_only=True)
class DomainRecipe:
    """The domain link: a base learns a business domain from its pictures and captions.

    Attributes:
        base: ``starter``, or a transformers folder or hub id.
        out: the folder to write: an adapted folder, or for ``full`` and ``lora`` a transformers folder.
        method: ``adapter`` is the link; the others are its baselines on the same data and budget: ``full`` trains
            all weights (continual fine-tuning), ``lora`` low-rank updates by `peft`, ``probe`` one linear map on
            each tower's features.
        adapters: groups of adapters, for ``method: adapter``.
        general: pictures with captions of no particular domain, to tell what is forgotten; never trained on.
        alphas: settings of the dial at which domain and general scores are compared, if there are general pictures.
    """

    link: Literal["domain"] = "domain"
    base: str = "starter"
    out: str = "runs/domain"
    seed: int = 0
    method: Literal["adapter", "full", "lora", "probe"] = "adapter"
    data: DomainData
    adapters: tuple[DomainAdapterConfig, ...] = ()
    lora: LoraConfig = field(default_factory=LoraConfig)
    objective: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    bank: MemoryBankConfig = field(default_factory=MemoryBankConfig)
    general: tuple[PairSource, ...] = ()
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        _require(self, "base", bool(self.base.strip()), "non-empty text")
        _require(self, "out", bool(self.out.strip()), "the folder to write")
        _require(self, "seed", 0 <= self.seed < 2**32, "from 0 to 4294967295")
        has = bool(self.adapters)
        _require(self, "adapters", has or self.method != "adapter", "at least one group, with method=adapter")
        if self.training.batch_size < 2:
            raise RecipeError(f"training.batch_size={self.training.batch_size} must be at least 2: pairs are compared")


Recipe: TypeAlias = LanguageRecipe | DomainRecipe
"""Any recipe; grows into a union with each link."""

RECIPES: dict[str, type[Recipe]] = {"language": LanguageRecipe, "domain": DomainRecipe}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply ``key=value`` overrides.

    Raises:
        RecipeError: the file is missing or unreadable, is no UTF-8 or no YAML, or describes no valid recipe.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"recipe {path} does not exist; recipes/ has examples to start from") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from error
    return recipe_from_mapping(strict_yaml.parse(text, str(path)), str(path), overrides)


def recipe_from_mapping(mapping: Any, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """Build the recipe that `mapping` describes; its ``link`` decides which kind.

    Args:
        where: what to call the mapping in messages.

    Raises:
        RecipeError: see `load_recipe`.
    """
    if not isinstance(mapping, dict):
        found = "nothing" if mapping is None else f"a {type(mapping).__name__}"
        raise RecipeError(f"{where}: a recipe is a mapping with the key 'link', but this holds {found}")
    link = mapping.get("link")
    for override in overrides:
        if override.startswith("link="):
            link = override.removeprefix("link=").strip()
    recipe = RECIPES.get(link) if isinstance(link, str) else None
    if recipe is None:
        problem = "has no key 'link'" if link is None else f"link={link!r:.60} is unknown"
        raise RecipeError(f"{where}: {problem}; link is one of {_names(RECIPES)}")
    merged = strict_yaml.apply_overrides(recipe, mapping, overrides)
    return from_mapping(recipe, merged, where)


def _names(choices: Collection[str]) -> str:
    return ", ".join(repr(choice) for choice in choices)
