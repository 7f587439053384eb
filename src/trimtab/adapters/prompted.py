"""A base with learned prompts as one object, and its files: what `trimtab.load` returns for a folder of this link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from trimtab.adapters.files import (
    DESCRIPTION_FILE,
    AdapterFile,
    BaseReference,
    copy_adapted,
    from_config,
    lasting_place,
    reading_config,
    rebuilt,
    save_adapter,
    saved_folder,
)
from trimtab.adapters.prompt import LINK, Pictures, PromptedClasses, StructuredPrompt, extended
from trimtab.config import PromptConfig, to_mapping
from trimtab.errors import DataError, ModelError
from trimtab.towers.classifier import Classifier, Spellings, check_class_names
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.freezing import freeze
from trimtab.towers.passes import Passes, rows_of
from trimtab.towers.prompting import PromptTower, image_tokens

Known = tuple[PromptedClasses, torch.Tensor]


class PromptAdapted(DualEncoder):
    """A base that has learned to classify from few labelled pictures.

    Images and texts are encoded as by the base, and so it keeps the base's fingerprint; what was learned is in
    `classifier()`.

    Attributes:
        base: the dual encoder that the prompt fits.
        prompt: frozen here.
        classes: names that it was trained on.
        spellings: finds them where a user writes them a little otherwise.
        templates: hand templates that it was kept near to.
        class_scale: multiplies scores before the softmax, as fitted on validation.
        folder: the adapted folder.
    """

    def __init__(
        self,
        base: DualEncoder,
        prompt: StructuredPrompt,
        *,
        classes: Sequence[str],
        templates: Sequence[str],
        class_scale: float,
        tower: PromptTower | None = None,
        name: str = "",
        folder: Path | None = None,
    ) -> None:
        self.__dict__.update(base.__dict__)  # the towers are shared, not copied
        self.base = base
        self.prompt: StructuredPrompt = freeze(prompt).to(base.device)
        self.classes = tuple(classes)
        self.spellings = Spellings(self.classes)
        self.templates = tuple(templates)
        self.class_scale = class_scale
        self.name = name or base.name
        self.folder = lasting_place(folder)
        self.prompt_tower = tower or PromptTower(base)

    @property
    def fingerprint(self) -> str:
        """That of the base."""
        return self.base.fingerprint

    @property
    def image_fingerprint(self) -> str:
        """That of the base."""
        return self.base.image_fingerprint

    def to(self, device: str | torch.device) -> PromptAdapted:
        """Move base and prompt; returns itself. Classifiers made before stay where they were."""
        self.base.to(device)
        self.prompt.to(device)
        return self

    def encode_image(self, *args: Any, **options: Any) -> np.ndarray:
        """As the base's."""
        found = self.base.encode_image(*args, **options)
        self.last_skipped = self.base.last_skipped
        return found

    def encode_text(self, *args: Any, **options: Any) -> np.ndarray:
        """As the base's."""
        found = self.base.encode_text(*args, **options)
        self.last_truncated = self.base.last_truncated
        return found

    def text_features(self, texts: Sequence[str] | str) -> torch.Tensor:
        """As the base's."""
        return self.base.text_features(texts)

    def token_features(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        """As the base's."""
        return self.base.token_features(tokens)

    def pixel_features(self, pixels: dict[str, torch.Tensor]) -> torch.Tensor:
        """As the base's."""
        return self.base.pixel_features(pixels)

    def classifier(self, classes: Sequence[str] | None = None, *, templates: Sequence[str] | None = None) -> Classifier:
        """A classifier with what was learned.

        Args:
            classes: names; None takes those of training, which are known in other case and white space too. Of a name
                that training did not have, prompts know nothing but the name.
            templates: hand templates, which replace the prompts and all that was learned.
        """
        names = self.classes if classes is None else classes
        if templates is not None:
            return Classifier(self, names, templates=templates)
        return PromptClassifier(self, names)

    def trained_name(self, name: str) -> str | None:
        """The class of training that a name is, however it is written; None if it is none."""
        return self.spellings.find(name)

    def prompted(self, names: Sequence[str]) -> PromptedClasses:
        """Classes behind the prompt, of training or not; those of training by the names that they had there."""
        place = {name: at for at, name in enumerate(self.classes)}
        known = [self.spellings.find(name) for name in names]
        prompt = extended(self.prompt, [None if name is None else place[name] for name in known])
        return PromptedClasses(self.prompt_tower, prompt, [own or name for own, name in zip(known, names, strict=True)])

    def _write(self, folder: str) -> None:
        copy_adapted(saved_folder(self.folder, "save it with save_prompt"), folder)


class PromptClassifier(Classifier):
    """Classes behind learned prompts. With an instance part, each picture is scored by prompts of its own."""

    model: PromptAdapted

    def __init__(self, model: PromptAdapted, classes: Sequence[str]) -> None:
        config = model.prompt.config
        self.reads_embeddings = config.instance is None and not config.reads_patches
        names = check_class_names(classes)
        self.model = model
        self.templates = model.templates
        self.logit_scale = model.class_scale
        self._known = (names, self._vectors(names))
        self._warn_of_equal()

    def add_classes(self, names: Sequence[str] | str) -> None:
        """As `Classifier.add_classes`; of an added class prompts know its name alone."""
        added = check_class_names([names] if isinstance(names, str) else names, known=self.classes)
        whole = self.classes + added
        self._known = (whole, self._vectors(whole))
        self._warn_of_equal()

    @torch.no_grad()
    def _vectors(self, names: Sequence[str]) -> Known:
        classes = self.model.prompted(names)
        with self.model.turn:
            return classes, classes.embeddings()

    @torch.no_grad()
    def _compared(self, known: Known) -> np.ndarray:
        classes, embeddings = known
        return classes.scored_by(embeddings).cpu().numpy()

    @torch.no_grad()
    def _similarities(
        self, images: Any, known: Known, batch_size: int, on_error: Literal["raise", "skip"], progress: bool = False
    ) -> np.ndarray:
        if self.reads_embeddings:
            classes, embeddings = known
            weights = classes.weights(embeddings).cpu().numpy()
            return super()._similarities(images, weights, batch_size, on_error, progress)
        model = self.model
        if model._are_embeddings(images):
            raise DataError("this classifier looks at more of a picture than its embedding: give pictures")
        parts = [np.zeros((0, len(known[0])), np.float32)]
        batches = model.base.pixel_batches(images, batch_size=batch_size, on_error=on_error, progress=progress)
        passes = Passes(batch_size)
        for pixels in batches:
            parts += self._looked_at(pixels, known, passes)
        model.last_skipped = model.base.last_skipped
        return np.concatenate(parts)

    @torch.no_grad()
    def pixel_similarities(self, pixels: dict[str, torch.Tensor]) -> np.ndarray:
        """`similarities` (B, C) of what `DualEncoder.preprocess` returns, stacked along the first axis."""
        return np.concatenate(self._looked_at(pixels, self._known[1], Passes(len(next(iter(pixels.values()))))))

    def _looked_at(self, pixels: dict[str, torch.Tensor], known: Known, passes: Passes) -> list[np.ndarray]:
        model, (classes, embeddings) = self.model, known
        needs_tokens = classes.prompt.config.reads_patches

        def scored(pixels: dict[str, torch.Tensor], span: slice) -> np.ndarray:
            some = rows_of(pixels, span)
            features, tokens, mask = (
                image_tokens(model.base, some) if needs_tokens else (model.pixel_features(some), None, None)
            )
            tokens = None if tokens is None else tokens.float()
            pictures = Pictures(F.normalize(features.float(), dim=-1), tokens, mask)
            return classes.scores(pictures, embeddings).float().cpu().numpy()

        with model.turn:
            return passes.of(partial(scored, pixels), len(next(iter(pixels.values()))))


def save_prompt(
    folder: str | Path,
    prompt: StructuredPrompt,
    *,
    base: DualEncoder,
    classes: Sequence[str],
    templates: Sequence[str],
    class_scale: float,
    recipe: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    card: str = "",
) -> Path:
    """Write an adapted folder for `trimtab.load`; see `trimtab.adapters.files.save_adapter`."""
    return save_adapter(
        folder,
        link=LINK,
        tensors=prompt.state_dict(),
        config={
            "prompt": to_mapping(prompt.config),
            "patch_width": prompt.patch_width,
            "classes": list(classes),
            "templates": list(templates),
            "class_scale": class_scale,
        },
        base=BaseReference.of(base),
        recipe=recipe,
        data=data,
        metrics=metrics,
        card=card,
    )


def load_prompt(described: AdapterFile, base: DualEncoder, name: str, folder: Path) -> PromptAdapted:
    """Build what an adapted folder of this link describes, on the base that it was trained on.

    Raises:
        ModelError: the description is incomplete or does not fit its tensors.
    """
    where = described.folder / DESCRIPTION_FILE
    with reading_config(where):
        mapping = described.config["prompt"]
        classes, templates = (check_class_names(described.config[key]) for key in ("classes", "templates"))
        class_scale, patch_width = float(described.config["class_scale"]), int(described.config["patch_width"])
    if not class_scale > 0:
        raise ModelError(f"{where} has class_scale={class_scale}, no number above 0: copy the folder again")
    tower = PromptTower(base)
    config = from_config(PromptConfig, mapping, described)
    prompt = rebuilt(described, lambda: StructuredPrompt(config, tower, patch_width=patch_width, classes=len(classes)))
    return PromptAdapted(
        base,
        prompt,
        classes=classes,
        templates=templates,
        class_scale=class_scale,
        tower=tower,
        name=name,
        folder=folder,
    )
