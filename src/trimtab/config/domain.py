"""Options and recipe of the domain link."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trimtab.config.checks import check_run, expand_home, require
from trimtab.config.training import TrainingConfig
from trimtab.errors import RecipeError

LARGEST_SCALE = 100.0
"""A logit_scale that is given or learned is kept at or below this, as in CLIP's own training, or at or below the base's
own where that is larger, as SigLIP's is."""


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
        templates: captions of a class, ``{}`` standing for its name; null takes one that goes with the script of most
            names in this source, "a photo of a {}" with Latin.
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
    templates: tuple[str, ...] | None = None
    descriptions: str | None = None
    share: float = 1.0
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("path", "image", "text"):
            require(self, name, bool(getattr(self, name).strip()), "non-empty text")
        for name in ("label", "root", "descriptions"):
            value = getattr(self, name)
            require(self, name, value is None or bool(value.strip()), "non-empty text, or null")
        for name in ("text", "label"):
            require(self, name, getattr(self, name) != self.image, f"another column than image={self.image!r}")
        given = self.templates is None or {template.count("{}") for template in self.templates} == {1}
        require(self, "templates", given, "one or more texts with exactly one {} each, or null")
        require(self, "share", 0 < self.share <= 1, "above 0 and at most 1")
        require(self, "limit", self.limit is None or self.limit >= 1, "at least 1, or null for all")
        expand_home(self, "path", "root", "descriptions")


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
        require(self, "crop_min", 0 < self.crop_min <= 1, "above 0 and at most 1")
        require(self, "colour", 0 <= self.colour < 1, "at least 0 and below 1")


@dataclass(frozen=True)
class MapViewsConfig:
    """How far the cached feature map of a picture is changed in a step; see `trimtab.towers.map_views`.

    Attributes:
        crop_min: smallest part of the area that is left; 1 always leaves all of it.
        flip: mirror every other map; false where writing or handedness matters.
        erase: share of the maps of which a rectangle is erased, at most a quarter of it.
    """

    crop_min: float = 1.0
    flip: bool = False
    erase: float = 0.0

    def __post_init__(self) -> None:
        require(self, "crop_min", 0 < self.crop_min <= 1, "above 0 and at most 1")
        require(self, "erase", 0 <= self.erase <= 1, "from 0 to 1")

    @property
    def changes(self) -> bool:
        """Whether a map is changed at all."""
        return self.crop_min < 1 or self.flip or self.erase > 0


@dataclass(frozen=True)
class DomainData:
    """Pictures with captions for the domain link.

    Attributes:
        train: sources of training pairs.
        validation: sources of validation pairs; when empty, `validation_share` of the images is split off `train`.
        validation_share: fraction of the images used for validation, every caption alike.
        views: augmented views per image that are cached beside the picture itself; 0 for the picture alone.
        augmentation: how far these views may be from the picture.
        map_augmentation: how far cached maps are changed further, anew in each step; for cuts in a convolutional trunk.
        check_duplicates: leave training pictures out that validation has too; false only warns of them.
    """

    train: tuple[PairSource, ...]
    validation: tuple[PairSource, ...] = ()
    validation_share: float = 0.1
    views: int = 0
    augmentation: ViewsConfig = field(default_factory=ViewsConfig)
    map_augmentation: MapViewsConfig = field(default_factory=MapViewsConfig)
    check_duplicates: bool = True

    def __post_init__(self) -> None:
        require(self, "train", len(self.train) > 0, "at least one source of pairs")
        require(self, "validation_share", 0 < self.validation_share <= 0.5, "above 0 and at most 0.5")
        require(self, "views", self.views >= 0, "at least 0")


# --------------------------------------------------------------------- domain link: objective and memory bank


@dataclass(frozen=True)
class ContrastiveConfig:
    """Weights of the terms in `trimtab.objectives.contrastive`; a term of weight 0 is not computed.

    Attributes:
        image_to_text: weight of finding an image's captions among the texts; with the default of both terms their
            sum is CLIP's loss.
        text_to_image: weight of finding a text's images in the batch.
        logit_scale: multiplies cosines, at most 100 or the base's own if that is larger; null starts from the latter.
        learn_logit_scale: train it with the adapters, up to the same bound; false keeps it as it is.
        label_smoothing: share of every target that is spread over all candidates alike.
        hard_negatives: texts from the memory bank added to every batch as negatives of its images; 0 for none. Without
            ``bank.enabled`` there are none.
    """

    image_to_text: float = 0.5
    text_to_image: float = 0.5
    logit_scale: float | None = None
    learn_logit_scale: bool = False
    label_smoothing: float = 0.0
    hard_negatives: int = 0

    def __post_init__(self) -> None:
        for name in ("image_to_text", "text_to_image"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        require(self, "image_to_text", self.image_to_text + self.text_to_image > 0, "above 0, or text_to_image")
        scale = self.logit_scale
        # Whether it is above the base's own too, the run says, which knows the base.
        allowed = f"above 0 to {LARGEST_SCALE:g}, or null; to the base's own scale where that is larger"
        require(self, "logit_scale", scale is None or 0 < scale < math.inf, allowed)
        require(self, "label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1")
        require(self, "hard_negatives", self.hard_negatives >= 0, "at least 0")
        useful = self.hard_negatives == 0 or self.image_to_text > 0
        require(self, "hard_negatives", useful, "0 when image_to_text is 0, the only term that uses them")


@dataclass(frozen=True)
class MemoryBankConfig:
    """How hard pairs are found, and how much more often and more heavily they are trained on.

    A pair is drawn in proportion to (eps + difficulty) ** gamma, with difficulties from 0 to 1.

    Attributes:
        enabled: false draws all pairs alike, still `epoch_share` of them per epoch, and adds no hard negatives.
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
        require(self, "gamma", 0 <= self.gamma <= 10, "from 0 to 10")
        require(self, "eps", 1e-6 <= self.eps <= 1e6, "from 1e-6 to 1e6")
        require(self, "cap", self.cap is None or self.cap >= 1, "at least 1, or null for no cap")
        require(self, "tail", 0 <= self.tail < 1, "at least 0 and below 1")
        require(self, "momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        for name in ("floor", "importance", "instance_weight"):
            require(self, name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        require(self, "epoch_share", 0 < self.epoch_share <= 1, "above 0 and at most 1")


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
        require(self, "last", not same_sign or self.first <= self.last, f"at or after first={self.first}")
        require(self, "width", self.width >= 1, "at least 1")
        if self.kind == "transformer":
            require(self, "layers", self.layers in (1, 2), "1 or 2")
            require(self, "heads", self.heads >= 1, "at least 1")
            require(self, "width", self.width % self.heads == 0, f"a multiple of heads={self.heads}")
        else:
            for name, default in (("layers", 1), ("heads", 4)):
                ours = getattr(self, name) == default
                require(self, name, ours, f"left out: only kind=transformer has it, not kind={self.kind}")
        require(self, "tower", self.kind != "conv" or self.tower == "image", "image for kind=conv")


@dataclass(frozen=True)
class GateConfig:
    """Whether pictures that do not look like the domain keep the base's features; see `trimtab.adapters.gate`.

    Attributes:
        kind: ``none`` adapts every picture; ``hard`` only those that look like the training pictures, as the base
            sees them; ``soft`` has the adapters fade out between.
        keep: share of the validation pictures that are adapted as a whole.
        centres: how many groups of training pictures are told apart, at most.
    """

    SHORTHAND: ClassVar[str] = "kind"

    kind: Literal["none", "soft", "hard"] = "none"
    keep: float = 0.99
    centres: int = 64

    def __post_init__(self) -> None:
        require(self, "keep", 0.5 <= self.keep <= 1, "from 0.5 to 1")
        require(self, "centres", self.centres >= 1, "at least 1")


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
        require(self, "rank", self.rank >= 1, "at least 1")
        require(self, "alpha", self.alpha > 0, "above 0")
        require(self, "targets", len(self.targets) > 0, "one or more endings of module names")


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
        gate: leaves pictures from elsewhere to the base, for ``method: adapter`` with a frozen text tower.
        memory: most training pictures that are kept with their captions, to look up what a picture is near to after
            training; see `trimtab.towers.memory`. 0 for none, and only for ``method: adapter``.
        least_steps: optimiser steps that a run has at least; with few pairs it has more epochs than `training.epochs`.
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
    gate: GateConfig = field(default_factory=GateConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    objective: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    bank: MemoryBankConfig = field(default_factory=MemoryBankConfig)
    memory: int = 0
    least_steps: int = 0
    general: tuple[PairSource, ...] = ()
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        check_run(self)
        require(self, "memory", self.memory >= 0, "at least 0")
        require(self, "least_steps", self.least_steps >= 0, "at least 0")
        require(self, "alphas", all(0 <= alpha <= 2 for alpha in self.alphas), "from 0 (the base) over 1 to 2")
        has = bool(self.adapters)
        require(self, "adapters", has or self.method != "adapter", "at least one group, with method=adapter")
        adapts_texts = self.method == "adapter" and any(one.tower == "text" for one in self.adapters)
        if self.gate.kind != "none" and adapts_texts:
            raise RecipeError(
                f"gate={self.gate.kind} needs a frozen text tower, as captions must fit adapted pictures and those "
                "that are left to the base alike: take the groups with tower=text out of adapters, or set gate=none"
            )
        if self.training.batch_size < 2:
            raise RecipeError(f"training.batch_size={self.training.batch_size} must be at least 2: pairs are compared")
