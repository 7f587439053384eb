"""Several links on one base: a language, a domain and prompts in one model, and the folder that holds them.

What each does, whatever the order in which they were given:

- Pictures go through the base's image tower with the adapters of the domain.
- Texts in Latin script go through the base's text tower with those adapters, other texts through the student and the
  adapter of the language, which was taught the space of the base as it was. With `english: adapter` all texts do.
- Prompts score the classes that they know, also by the names of `aliases`; another name that would be sent to the
  language link as a text is a class vector of it.

Links change nothing in each other, so nothing is trained again. Prompts alone depend on what they were trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.adapters.adapted import LanguageAdapted
from trimtab.adapters.domain import DomainAdapted
from trimtab.adapters.files import lasting_place
from trimtab.adapters.prompt import Pictures, PromptedClasses
from trimtab.adapters.prompted import PromptAdapted
from trimtab.errors import DataError
from trimtab.files import digest_of
from trimtab.scripts import is_latin
from trimtab.towers.classifier import Classifier, Spellings, check_class_names, class_vectors
from trimtab.towers.dual_encoder import DualEncoder

LINKS = ("domain", "language", "prompt")
"""In the order in which they lie on the base."""


class Composed(DualEncoder):
    """A base with several links.

    Attributes:
        base: the dual encoder below all of them.
        domain, language, prompt: the links; None where there is none. Each lies on those before it.
        aliases: other names of classes that the prompts know, such as 苹果 for apple.
        folder: the composed folder; None if it was put together in memory.
    """

    def __init__(
        self,
        base: DualEncoder,
        *,
        domain: DomainAdapted | None = None,
        language: LanguageAdapted | None = None,
        prompt: PromptAdapted | None = None,
        aliases: Mapping[str, str] | None = None,
        name: str = "",
        folder: Path | None = None,
    ) -> None:
        self.core: DualEncoder = language or domain or base
        self.__dict__.update({**self.core.__dict__, "core": self.core})  # the towers are shared, not copied
        self.base = base
        self.domain = domain
        self.language = language
        self.prompt = prompt
        self.aliases = dict(aliases or {})
        self._alias_spellings = Spellings(self.aliases)
        self.name = name or base.name
        self.folder = lasting_place(folder)
        if self.aliases:
            _check_aliases(self.aliases, prompt)
        self._known_fingerprint = "", ""

    @property
    def links(self) -> dict[str, Any]:
        """The links that there are, by name, lowest first."""
        return {name: one for name in LINKS if (one := getattr(self, name)) is not None}

    @property
    def fingerprint(self) -> str:
        """See `DualEncoder.fingerprint`; it follows the dials of the links."""
        return self._once_for(self.core.fingerprint, self._digest)

    @property
    def image_fingerprint(self) -> str:
        """See `DualEncoder.image_fingerprint`: a language and prompts leave pictures where they are."""
        return self.core.image_fingerprint

    def to(self, device: str | torch.device) -> Composed:
        """Move base and links; returns itself."""
        for one in (self.base, *self.links.values()):
            one.to(device)
        return self

    def encode_text(self, *args: Any, **options: Any) -> np.ndarray:
        """As `DualEncoder.encode_text`: by script to the base's tower or to the language link."""
        found = self.core.encode_text(*args, **options)
        self.last_truncated = self.core.last_truncated
        return found

    def text_features(self, texts: Sequence[str] | str) -> Tensor:
        """As `encode_text` sends them, not normalised."""
        return self.core.text_features(texts)

    def token_features(self, tokens: dict[str, Tensor]) -> Tensor:
        """Features (B, D) of what `text_inputs` returns: of a language link the student's tokens."""
        return self.core.token_features(tokens)

    def pixel_features(self, pixels: dict[str, Tensor]) -> Tensor:
        """As `DualEncoder.pixel_features`, through the adapters of the domain."""
        return self.core.pixel_features(pixels)

    def classifier(self, classes: Sequence[str] | None = None, *, templates: Sequence[str] | None = None) -> Classifier:
        """A classifier with what the prompts learned.

        Args:
            classes: names, in any language that the model reads; None takes those that the prompts were trained on.
            templates: hand templates, which replace the prompts.
        """
        if self.prompt is None or templates is not None:
            return super().classifier(classes, templates=templates)
        names = self.prompt.classes if classes is None else check_class_names(classes)
        if not any(self.prompted_name(name) is not None for name in names):
            return _NamesAlone(self, names)
        return _Prompted(self.prompt, self).classifier(names)

    def trained_name(self, name: str) -> str | None:
        """The class of training that a name stands for, by itself or by `aliases`; None if it is none."""
        assert self.prompt is not None
        if (own := self.prompt.trained_name(name)) is not None:
            return own
        alias = self._alias_spellings.find(name)
        return None if alias is None else self.aliases[alias]

    def prompted_name(self, name: str) -> str | None:
        """The name by which the prompts score a class; None if they do not, and the language link's vector does."""
        if (own := self.trained_name(name)) is not None:
            return own
        if self.language is None or (self.language.english == "route" and is_latin(name)):
            return name
        return None  # where English goes through the adapter, a name in Latin script may be of its language

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the composed folder; see `trimtab.adapters.composing.save_composed`."""
        from trimtab.adapters.composing import save_composed  # it builds on this module

        return save_composed(self, folder)

    def _with_domain(self) -> DomainAdapted:
        return super()._with_domain() if self.domain is None else self.domain  # type: ignore[return-value]

    def _digest(self) -> str:
        if self.prompt is None:
            return self.core.fingerprint
        parts: list[str | bytes] = ["prompt", self.core.fingerprint, json.dumps(sorted(self.aliases.items()))]
        parts += [json.dumps(self.prompt.classes), repr(self.prompt.class_scale)]
        for name, tensor in sorted(self.prompt.prompt.state_dict().items()):
            parts += [name, tensor.float().cpu().numpy().tobytes()]
        return digest_of(*parts)


def _check_aliases(aliases: Mapping[str, str], prompt: PromptAdapted | None) -> None:
    if prompt is None:
        raise DataError("names of classes were given, but there is no prompt link that knows classes")
    if unknown := [f"{name} for {own!r}" for name, own in aliases.items() if own not in prompt.classes]:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise DataError(
            f"other names of classes that the prompts of {prompt.name} do not know: {', '.join(unknown[:3])}{more}. "
            f"They know {', '.join(prompt.classes[:5])}" + (" ..." if len(prompt.classes) > 5 else "")
        )
    for name, own in aliases.items():
        if (known := prompt.spellings.find(name)) not in (None, own):
            raise DataError(
                f"{name!r} is given as another name of {own!r}, but the prompts of {prompt.name} know it as the class "
                f"{known!r}: leave it out of the names"
            )


# The classifier


class _NamesAlone(Classifier):
    """Classes none of which the prompts of a composed model score; to add one that they do is refused."""

    def _vectors(self, names: Sequence[str]) -> Any:
        if known := [name for name in names if self.model.prompted_name(name) is not None]:  # type: ignore[attr-defined]
            raise DataError(
                f"{known[0]!r} is scored by prompts, and the classes so far are not: name all of them at once, "
                "classifier([...])"
            )
        return super()._vectors(names)


class _Prompted(PromptAdapted):
    """The prompts of a composed model, for names that they score and names that they do not."""

    def __init__(self, prompt: PromptAdapted, model: Composed) -> None:
        self.__dict__.update(prompt.__dict__)
        self.composed = model

    def prompted(self, names: Sequence[str]) -> Any:
        """Classes (C) for `PromptClassifier`; those that the prompts do not score are fixed vectors."""
        own = [self.composed.prompted_name(name) for name in names]
        scored = list(dict.fromkeys(name for name in own if name is not None))
        others = [name for name, mapped in zip(names, own, strict=True) if mapped is None]
        classes = super().prompted(scored)
        if not others and scored == list(names):
            return classes
        vectors = torch.zeros(0, self.embedding_dim)
        if others:
            vectors = torch.from_numpy(class_vectors(self.composed, others))
        place = {name: at for at, name in enumerate(scored)}
        rest = iter(range(len(scored), len(scored) + len(others)))
        order = [place[name] if name is not None else next(rest) for name in own]
        return _MixedClasses(classes, vectors.to(self.base.device), order)


@dataclass
class _MixedClasses:
    """`PromptedClasses` beside class vectors (V, D), which count as the prompts weigh texts, in the order of the user's
    names."""

    inner: PromptedClasses
    vectors: Tensor
    order: list[int]

    @property
    def prompt(self) -> Any:
        return self.inner.prompt

    def __len__(self) -> int:
        return len(self.order)

    def embeddings(self) -> Tensor:
        return self.inner.embeddings()

    def weights(self, embeddings: Tensor) -> Tensor:  # (P, D) -> (C, D)
        return torch.cat([self.inner.weights(embeddings), self._weighted()])[self.order]

    def scored_by(self, embeddings: Tensor) -> Tensor:  # -> (C, F)
        prompted = self.inner.scored_by(embeddings)
        others = F.pad(self.vectors, (0, prompted.shape[1] - self.vectors.shape[1]))
        return torch.cat([prompted, others])[self.order]

    def scores(self, pictures: Pictures, embeddings: Tensor) -> Tensor:  # -> (B, C)
        scores = [self.inner.scores(pictures, embeddings), pictures.embeddings @ self._weighted().T]
        return torch.cat(scores, dim=1)[:, self.order]

    def _weighted(self) -> Tensor:
        return self.prompt.text_weight * self.vectors
