"""Options and recipe of the prompt link."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trimtab.config.checks import check_run, expand_home, require
from trimtab.config.domain import ViewsConfig
from trimtab.config.training import TrainingConfig
from trimtab.errors import RecipeError


@dataclass(frozen=True)
class LabelSource:
    """Pictures with class names.

    Attributes:
        path: a table (CSV, TSV, JSONL, Parquet); a folder with a folder of pictures per class; or shards, as one
            ``.tar`` or a pattern such as ``shard-{000..012}.tar``.
        image: column with the picture's path.
        label: column (of shards: key in JSON members) with the class name, or with its number from 0 in
            `PromptData.classes`. A folder names its classes itself.
        root: folder of a table's pictures; null takes the folder of the table.
    """

    SHORTHAND: ClassVar[str] = "path"

    path: str
    image: str = "image"
    label: str = "label"
    root: str | None = None

    def __post_init__(self) -> None:
        for name in ("path", "image", "label"):
            require(self, name, bool(getattr(self, name).strip()), "non-empty text")
        require(self, "root", self.root is None or bool(self.root.strip()), "non-empty text, or null")
        require(self, "label", self.label != self.image, f"another column than image={self.image!r}")
        expand_home(self, "path", "root")


@dataclass(frozen=True)
class PromptData:
    """Labelled pictures for the prompt link.

    Attributes:
        train: sources of training pictures.
        validation: sources of validation pictures; when empty, pictures of `train` that are not trained on: of
            every class as many as `shots`, at most 4; with `allow_fewer` a quarter of a class that has few.
        test: sources that are looked at once, when everything is chosen; may be empty.
        classes: file with one class name per line, which says which classes there are and in what order; null
            takes the names found in `train`, sorted.
        shots: training pictures per class; null takes all.
        views: augmented views per training picture that are cached beside the picture itself.
        augmentation: how far these views may be from the picture.
        allow_fewer: take what there is of a class that has fewer than `shots` pictures; false refuses such a class.
    """

    train: tuple[LabelSource, ...]
    validation: tuple[LabelSource, ...] = ()
    test: tuple[LabelSource, ...] = ()
    classes: str | None = None
    shots: int | None = None
    views: int = 0
    augmentation: ViewsConfig = field(default_factory=ViewsConfig)
    allow_fewer: bool = False

    def __post_init__(self) -> None:
        require(self, "train", len(self.train) > 0, "at least one source of labelled pictures")
        require(self, "classes", self.classes is None or bool(self.classes.strip()), "the path of a file, or null")
        require(self, "shots", self.shots is None or self.shots >= 1, "at least 1, or null for all")
        require(self, "views", self.views >= 0, "at least 0")
        expand_home(self, "classes")


@dataclass(frozen=True)
class GeneralConfig:
    """Learned tokens that all classes share (context of CoOp: Zhou et al., arXiv 2109.01134).

    Attributes:
        init: text whose embeddings they start from; ``auto`` takes one that goes with the script of the class names, "a
            photo of a" with Latin; null starts at random.
        tokens: how many; null takes as many as `init` has. Beyond those, further ones start at random before it.
    """

    init: str | None = "auto"
    tokens: int | None = None

    def __post_init__(self) -> None:
        require(self, "init", self.init is None or bool(self.init.strip()), "non-empty text, or null")
        require(self, "tokens", self.tokens is None or self.tokens >= 1, "at least 1, or null")
        require(self, "tokens", self.init is not None or self.tokens is not None, "a number when init is null")


@dataclass(frozen=True)
class InstanceConfig:
    """Tokens that are made for each picture.

    Attributes:
        kind: ``attention`` has learned queries attend over the picture's patch tokens; ``meta`` makes one vector of
            the picture's embedding that is added to every general token (CoCoOp: Zhou et al., arXiv 2203.05557).
        tokens: how many; ``attention`` only.
        width: inner width, for ``attention`` a multiple of `heads`; null takes that of the text tower's input (for
            ``meta`` a sixteenth of the embedding).
        heads: attention heads; ``attention`` only.
        layer: of the text tower at which they join the other tokens. 0 is its input, as prompts are defined; a later
            layer is another, cheaper model: what lies below is then the same for all pictures. Negative numbers
            count from the end. ``attention`` only.
        top_k: classes of each picture, the best without these tokens, that are scored with them (in training the
            true class always is). null scores all.
    """

    kind: Literal["attention", "meta"] = "attention"
    tokens: int = 2
    width: int | None = None
    heads: int = 4
    layer: int = 0
    top_k: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "heads"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "width", self.width is None or self.width >= 1, "at least 1, or null")
        require(self, "top_k", self.top_k is None or self.top_k >= 2, "at least 2, or null for all classes")
        if self.kind == "attention" and self.width is not None:
            require(self, "width", self.width % self.heads == 0, f"a multiple of heads={self.heads}")
        require(self, "layer", self.kind == "attention" or self.layer == 0, "0 for kind=meta")


@dataclass(frozen=True)
class DomainPartConfig:
    """What is learned of each class beside its name.

    Attributes:
        tokens: learned tokens behind each name.
        residual: a vector for each class that is added to its text embedding (Yu et al., arXiv 2211.10277); it
            starts at zero.
        patches: a second vector for each class, compared with the picture's patch tokens as the instance queries
            pool them (without queries, with their mean); it starts at zero.
        solve: start both kinds of vectors, which are zero otherwise, from those that fit the pictures best before
            anything else is learned; validation chooses the weight of their squared length, and that of the text.
        rate: multiplies the learning rate of both kinds of vectors.
    """

    tokens: int = 0
    residual: bool = False
    patches: bool = True
    solve: bool = True
    rate: float = 1.0

    def __post_init__(self) -> None:
        require(self, "tokens", self.tokens >= 0, "at least 0")
        require(self, "rate", self.rate > 0, "above 0")


@dataclass(frozen=True)
class PromptConfig:
    """The parts of a structured prompt; each can be switched off.

    Attributes:
        general: context tokens of all classes. Alone they are CoOp.
        instance: tokens made for each picture; null for none.
        domain: what is learned of each class.
    """

    general: GeneralConfig = field(default_factory=GeneralConfig)
    instance: InstanceConfig | None = field(default_factory=InstanceConfig)
    domain: DomainPartConfig = field(default_factory=DomainPartConfig)

    @property
    def reads_patches(self) -> bool:
        """Whether patch tokens are needed beside embeddings."""
        return self.domain.patches or (self.instance is not None and self.instance.kind == "attention")


@dataclass(frozen=True)
class PromptObjective:
    """Weights of the terms in `trimtab.objectives.prompt`; a term of weight 0 is not computed.

    Attributes:
        logit_scale: multiplies scores in training; null takes the base's own.
        label_smoothing: of the cross-entropy, whose weight is 1.
        template: of the distance of class embeddings from those of hand templates.
        separation: of what classes have come nearer to each other than hand templates put them.
        frozen: of the divergence of predictions from those of hand templates.
        residual: of the mean squared length of a class's vectors; null takes what `domain.solve` has chosen, else 0.
        classes_per_step: classes whose embeddings are computed with gradient in a step: those of the batch and as
            many others as fit. The other classes take part as they were when last computed. null computes all.
    """

    logit_scale: float | None = None
    label_smoothing: float = 0.0
    template: float = 1.0
    separation: float = 0.0
    frozen: float = 0.0
    residual: float | None = None
    classes_per_step: int | None = None

    def __post_init__(self) -> None:
        require(self, "logit_scale", self.logit_scale is None or self.logit_scale > 0, "above 0, or null")
        require(self, "label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1")
        for name in ("template", "separation", "frozen"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        require(self, "residual", self.residual is None or self.residual >= 0, "at least 0, or null")
        few = self.classes_per_step
        require(self, "classes_per_step", few is None or few >= 2, "at least 2, or null for all")


@dataclass(frozen=True)
class ContextConfig:
    """A first phase in which the general tokens learn alone, with all classes in every step.

    Class vectors explain few pictures so well that nothing is left for the context to learn beside them; a context
    that has learned first serves classes without vectors as well.

    Attributes:
        steps: optimiser steps; the last weights go on to the second phase.
        learning_rate: of this phase.
        template: weight of the distance of class embeddings from those of hand templates in this phase.
    """

    steps: int = 50
    learning_rate: float = 1e-2
    template: float = 1.0

    def __post_init__(self) -> None:
        require(self, "steps", self.steps >= 1, "at least 1")
        require(self, "learning_rate", self.learning_rate > 0, "above 0")
        require(self, "template", self.template >= 0, "at least 0")


@dataclass(frozen=True, kw_only=True)
class PromptRecipe:
    """The prompt link: few labelled pictures turn a base into a classifier.

    Attributes:
        base: ``starter``, a transformers folder or hub id, or an adapted folder of the domain link. One of the language
            link is taken too; prompts then stand in the text tower of its base, which reads the class names.
        out: the adapted folder to write.
        method: ``structured`` trains the parts as `prompt` and `objective` say. ``coop`` is General alone with
            cross-entropy alone, and ``cocoop`` adds to it an instance part of the kind ``meta``; of `prompt` they
            take only `general`, and of `objective` only `logit_scale`, `label_smoothing` and `classes_per_step`.
        steps: optimiser steps of the run, however many pictures there are, spread over `training.epochs`, each of
            which ends with validation; null takes every picture once per epoch.
        select: which weights are kept: ``last``, or those with the best top-1 (``top1``) or the least loss (``loss``)
            on validation, among those at the start and after each epoch.
        templates: hand templates of the frozen class embeddings; empty chooses by the script of the names.
        context: a phase before all else in which the general tokens learn alone; null for none, and for ``coop`` and
            ``cocoop``.
    """

    link: Literal["prompt"] = "prompt"
    base: str = "starter"
    out: str = "runs/prompt"
    seed: int = 0
    method: Literal["structured", "coop", "cocoop"] = "structured"
    data: PromptData
    prompt: PromptConfig = field(default_factory=PromptConfig)
    objective: PromptObjective = field(default_factory=PromptObjective)
    steps: int | None = 30
    select: Literal["last", "top1", "loss"] = "loss"
    templates: tuple[str, ...] = ()
    context: ContextConfig | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        check_run(self)
        places = [template.count("{}") for template in self.templates]
        require(self, "templates", set(places) <= {1}, "texts with exactly one {} each")
        if self.steps is not None and self.steps < self.training.epochs:
            raise RecipeError(f"steps={self.steps} must be at least training.epochs={self.training.epochs}, or null")
        if self.training.processes not in (None, 1):
            raise RecipeError(f"training.processes={self.training.processes} must be 1: prompts train in one process")

    def resolved(self) -> PromptRecipe:
        """The recipe with what its method leaves of the parts and terms."""
        if self.method == "structured":
            return self
        meta = InstanceConfig(kind="meta", top_k=self.prompt.instance.top_k if self.prompt.instance else None)
        own = self.objective
        return dataclasses.replace(
            self,
            prompt=PromptConfig(
                self.prompt.general,
                meta if self.method == "cocoop" else None,
                DomainPartConfig(tokens=0, residual=False, patches=False, solve=False),
            ),
            objective=PromptObjective(
                logit_scale=own.logit_scale,
                label_smoothing=own.label_smoothing,
                template=0.0,
                classes_per_step=own.classes_per_step,
            ),
            context=None,
        )

    def of_context(self) -> PromptRecipe:
        """The recipe of the first phase.

        Raises:
            ValueError: there is none.
        """
        if self.context is None:
            raise ValueError("this recipe has no context")
        training = dataclasses.replace(
            self.training, epochs=1, batch_size=2 * self.training.batch_size, learning_rate=self.context.learning_rate
        )
        return dataclasses.replace(
            self,
            prompt=PromptConfig(self.prompt.general, None, DomainPartConfig(patches=False, solve=False)),
            objective=PromptObjective(
                logit_scale=self.objective.logit_scale,
                label_smoothing=self.objective.label_smoothing,
                template=self.context.template,
            ),
            steps=self.context.steps,
            select="last",
            context=None,
            training=training,
        )
