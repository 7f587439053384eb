"""Options and recipe of the language link."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from trimtab.config.checks import check_run, expand_home, require
from trimtab.config.training import TrainingConfig
from trimtab.errors import RecipeError

_ENGLISH_SHARE = 0.1  # of the pairs drawn, where English goes through the adapter


@dataclass(frozen=True)
class TextSource:
    """One file of parallel text, or a prepared source such as ``cedict`` or ``cldr:zh``.

    Attributes:
        path: CSV, TSV, JSONL or Parquet file, or the name of a prepared source.
        target: column with the target-language text.
        english: column with its English translation.
        language: code of the target language; a column ``language`` in the file takes precedence.
        weight: how often its pairs are drawn relative to other pairs of the same language; how often languages are
            drawn says `LanguageData.language_balance`.
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
            require(self, name, bool(getattr(self, name).strip()), "non-empty text")
        require(self, "english", self.english != self.target, f"another column than target={self.target!r}")
        require(self, "weight", self.weight > 0, "above 0")
        require(self, "limit", self.limit is None or self.limit >= 1, "at least 1, or null for all")
        expand_home(self, "path")


@dataclass(frozen=True)
class LanguageData:
    """Parallel text of the language link and how it is drawn.

    Attributes:
        train: sources of training pairs.
        validation: sources of validation pairs; when empty, `validation_size` pairs are split off `train`.
        validation_size: pairs used for validation, at most.
        max_chars: longer sides are dropped (and counted).
        english_share: fraction of English-English pairs mixed into each epoch, 0 <= share < 1; null becomes 0.1 in a
            recipe of ``english: adapter``, and 0 where English never reaches the adapter.
        language_balance: languages are drawn with probability proportional to pairs ** language_balance:
            1 is proportional to their size, 0 all alike.
        phrases: number of phrases composed from the training pairs' nouns ("two red apples"), for languages
            that `trimtab.data.phrases` knows.
        templates: number of the training pairs' nouns that also stand in a default template ("a photo of a {}"), as
            classes do when they are named, for languages that `trimtab.data.templates` knows.
        exclude: files (CSV, TSV, JSONL, Parquet) whose column ``text`` no training pair may have as its target,
            so that evaluation on them stays honest.
        epoch_pairs: pairs drawn per epoch; null draws as many as there are.
    """

    train: tuple[TextSource, ...]
    validation: tuple[TextSource, ...] = ()
    validation_size: int = 1000
    max_chars: int = 300
    english_share: float | None = None
    language_balance: float = 0.5
    phrases: int = 0
    templates: int = 0
    exclude: tuple[str, ...] = ()
    epoch_pairs: int | None = None

    def __post_init__(self) -> None:
        require(self, "train", len(self.train) > 0, "at least one source of pairs")
        require(self, "validation_size", self.validation_size >= 2, "at least 2")
        require(self, "max_chars", self.max_chars >= 1, "at least 1")
        share = self.english_share
        require(self, "english_share", share is None or 0 <= share < 1, "at least 0 and below 1, or null")
        require(self, "language_balance", 0 <= self.language_balance <= 1, "from 0 to 1")
        require(self, "phrases", self.phrases >= 0, "at least 0")
        require(self, "templates", self.templates >= 0, "at least 0")
        require(self, "epoch_pairs", self.epoch_pairs is None or self.epoch_pairs >= 1, "at least 1, or null")
        expand_home(self, "exclude")


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
        require(self, "name", bool(self.name.strip()), "non-empty text")
        distinct = 0 < len(self.layers) == len(set(self.layers))
        require(self, "layers", distinct, "one or more different layer numbers, for example [-1] or [6, -1]")
        expand_home(self, "name")


@dataclass(frozen=True)
class LanguageAdapterConfig:
    """Down linear -> Transformer layers -> pooling -> Up linear, beside paths from the mean of the states.

    Attributes:
        width: inner width, a multiple of `heads`.
        layers: Transformer encoder layers, 0 to 12 (the published work has 1 or 2).
        feedforward: inner width of the feed-forward block as a multiple of `width`.
        hidden: width of one hidden layer on the mean of the states, which learns single words by heart; 0 for none.
        init: ``ridge`` starts from the closed-form linear map, ``random`` from nothing.
        memory: most nouns of the training pairs whose English features are kept after training, to look them up; see
            `trimtab.towers.memory`. 0 for none.
    """

    width: int = 384
    layers: int = 2
    heads: int = 6
    feedforward: int = 4
    hidden: int = 0
    pooling: Literal["mean", "cls", "attention"] = "mean"
    dropout: float = 0.0
    init: Literal["ridge", "random"] = "ridge"
    memory: int = 0

    def __post_init__(self) -> None:
        require(self, "heads", self.heads >= 1, "at least 1")
        divisible = self.width >= 1 and self.width % self.heads == 0
        require(self, "width", divisible, f"a positive multiple of heads={self.heads}")
        require(self, "layers", 0 <= self.layers <= 12, "from 0 to 12")
        require(self, "feedforward", self.feedforward >= 1, "at least 1")
        require(self, "hidden", self.hidden >= 0, "at least 0")
        require(self, "memory", self.memory >= 0, "at least 0")
        require(self, "dropout", 0 <= self.dropout < 1, "at least 0 and below 1")


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
            require(self, name, getattr(self, name) >= 0, "at least 0")
        some = any(getattr(self, name) > 0 for name in terms)
        require(self, "mse", some, "above 0, or one of cosine, infonce, gram")
        require(self, "logit_scale", self.logit_scale > 0, "above 0")


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
        check_run(self)
        if self.data.english_share is None:
            share = _ENGLISH_SHARE if self.english == "adapter" else 0.0
            object.__setattr__(self, "data", replace(self.data, english_share=share))
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
