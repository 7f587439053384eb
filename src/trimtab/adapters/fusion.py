"""A FLAVA that reads another language, as one object: its embeddings, and its fused states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.adapters.adapted import LanguageAdapted, load_student, where_english_goes
from trimtab.adapters.files import (
    DESCRIPTION_FILE,
    BaseReference,
    StudentReference,
    check_base,
    find_place,
    from_config,
    read_adapter,
    reading_config,
    rebuilt,
    save_adapter,
)
from trimtab.adapters.resampler import FusionAdapter, ResamplerConfig
from trimtab.config import LanguageAdapterConfig, to_mapping
from trimtab.errors import ModelError
from trimtab.files import digest_of
from trimtab.scripts import is_latin
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.freezing import fingerprint, freeze
from trimtab.towers.fusion import fuse, image_sequence, teacher_sequence
from trimtab.towers.hf import load_base, portable
from trimtab.towers.text_encoder import TextEncoder

if TYPE_CHECKING:
    from trimtab.data.images import ImageSource

LINK = "fusion"


@dataclass(frozen=True)
class FusedStates:
    """Output of the fusion transformer for N pairs of image and text.

    Attributes:
        cls: (N, F), or None if the fusion transformer has no CLS token.
        image: (N, P, F), the image's CLS and patches.
        text: (N, L, F).
        text_mask: (N, L) bool, true for text states that count.
    """

    cls: Tensor | None
    image: Tensor
    text: Tensor
    text_mask: Tensor


class FusionAdapted(LanguageAdapted):
    """A FLAVA whose text side also reads another language, for embeddings and for fusion with an image.

    Attributes:
        fusion: the `FusionAdapter`; the other attributes are those of `LanguageAdapted`.

    Raises:
        ModelError: the base is no FLAVA, or the adapter is of another width.
    """

    def __init__(
        self,
        base: DualEncoder,
        student: TextEncoder,
        adapter: FusionAdapter,
        *,
        layers: tuple[int, ...] = (-1,),
        english: Literal["route", "adapter"] = "route",
        name: str = "",
        folder: Path | None = None,
    ) -> None:
        check_fusion_base(base)
        width = base.model.text_to_mm_projection.in_features
        if adapter.output_dim != width:
            raise ModelError(f"the adapter gives states of width {adapter.output_dim}; {base.name} fuses {width}")
        self.fusion = freeze(adapter).to(base.device)
        super().__init__(
            base,
            student,
            adapter.language,
            layers=layers,
            english=english,
            name=name,
            folder=folder,
        )

    def fingerprint_on(self, base: DualEncoder) -> str:
        """As `LanguageAdapted.fingerprint_on`, with what the fusion transformer reads."""
        return digest_of(super().fingerprint_on(base), fingerprint(self.fusion))

    def to(self, device: str | torch.device) -> FusionAdapted:
        """Move base, student and adapter; returns itself."""
        super().to(device)
        self.fusion.to(device)
        return self

    def token_features(self, tokens: dict[str, Tensor]) -> Tensor:
        """Features (B, D) of the student's tokens: the estimated CLS state through FLAVA's own text head."""
        states, mask = self.student.states_of(tokens, self.layers)
        cls = self.adapter(states, mask)[:, : self.fusion.output_dim]
        return self.model.text_projection(self.model.text_model.layernorm(cls.to(self.dtype)))

    @torch.no_grad()
    def text_states(self, texts: Sequence[str], *, batch_size: int = 64) -> tuple[Tensor, Tensor]:
        """What the fusion transformer reads of texts.

        Returns:
            States (N, L, H), padded with zeros, and their mask (N, L) bool. English is FLAVA's own sequence when
            `english` is "route"; any other text has at most 1 + M states.
        """
        texts = list(texts)
        if not texts:
            nothing = torch.zeros(0, 0, self.fusion.output_dim, device=self.device, dtype=self.dtype)
            return nothing, torch.zeros(0, 0, device=self.device, dtype=torch.bool)
        rows: list[Tensor] = [torch.empty(0)] * len(texts)
        routed = [self.english == "route" and is_latin(text) for text in texts]
        for own in (True, False):
            chosen = [i for i, latin in enumerate(routed) if latin == own]
            for start in range(0, len(chosen), batch_size):
                part = chosen[start : start + batch_size]
                encode = self._own_states if own else self._adapted_states
                with self.turn:
                    found = encode([texts[i] for i in part])
                for i, states in zip(part, found, strict=True):
                    rows[i] = states
        longest = max(len(row) for row in rows)
        mask = torch.tensor([[k < len(row) for k in range(longest)] for row in rows], device=self.device)
        return torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows]), mask

    @torch.no_grad()
    def fused(self, images: Sequence[ImageSource], texts: Sequence[str], *, batch_size: int = 16) -> FusedStates:
        """Multimodal states of images, each with its text, through the frozen fusion transformer.

        All of them are kept in memory: (N, 1 + P + L, F) values, about 0.7 MB per pair for the published FLAVA.

        Raises:
            ValueError: there are not as many images as texts, or none.
            ImageError: an image cannot be used.
        """
        if len(images) != len(texts) or len(texts) == 0:
            raise ValueError(f"{len(images)} images and {len(texts)} texts: give pairs, at least one")
        text, mask = self.text_states(texts)
        parts = []
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            pixels = torch.cat([self._read(image)["pixel_values"] for image in images[rows]])
            with self.turn:
                states = image_sequence(self.model, pixels.to(self.device, self.dtype))
                parts.append(fuse(self.model, text[rows], mask[rows], states))
        fused = torch.cat(parts).float()  # (N, 1 + P + L, F)
        first = int(self.model.multimodal_model.use_cls_token)
        last = fused.shape[1] - mask.shape[1]
        return FusedStates(fused[:, 0] if first else None, fused[:, first:last], fused[:, last:], mask)

    def _own_states(self, texts: list[str]) -> list[Tensor]:
        tokens = self.base.text_inputs(texts)
        ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
        states = teacher_sequence(self.model, ids, mask)
        return [row[: int(length)] for row, length in zip(states, mask.sum(dim=1), strict=True)]

    def _adapted_states(self, texts: list[str]) -> list[Tensor]:
        _, states, counted = self.fusion(*self.student.states(texts, self.layers))
        return [row[keep] for row, keep in zip(states.to(self.dtype), counted, strict=True)]


def check_fusion_base(base: DualEncoder) -> None:
    """Refuse a base that fuses nothing.

    Raises:
        ModelError: the base is no FLAVA.
    """
    if base.family != "flava":
        raise ModelError(f"{base.name} is a {base.family!r} model, which fuses nothing; the base must be a FLAVA")


def save_fusion_adapter(
    folder: str | Path,
    adapter: FusionAdapter,
    *,
    base: DualEncoder,
    student: TextEncoder,
    layers: tuple[int, ...] = (-1,),
    english: Literal["route", "adapter"] = "route",
    recipe: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    card: str = "",
) -> Path:
    """Write an adapted folder for `load_fusion_adapted`; see `trimtab.adapters.files.save_adapter`."""
    config = {
        "adapter": to_mapping(adapter.language.config),
        "resampler": to_mapping(adapter.resampler.config),
        "input_dim": adapter.language.down.in_features,
        "output_dim": adapter.output_dim,
        "english": english,
    }
    return save_adapter(
        folder,
        link=LINK,
        tensors=adapter.state_dict(),
        config=config,
        base=replace(BaseReference.of(base), name=portable(base.name)),
        student=StudentReference(
            portable(student.name), student.fingerprint, student.prefix, layers, student.max_tokens
        ),
        recipe=recipe,
        data=data,
        metrics=metrics,
        card=card,
    )


def load_fusion_adapted(
    folder: str | Path,
    *,
    base: str | Path | DualEncoder | None = None,
    student: str | Path | TextEncoder | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> FusionAdapted:
    """Load an adapted folder of a fusion model together with the base and the student that it names.

    Args:
        base, student: where they are now, or the loaded objects, if not where the folder says.

    Raises:
        ModelError: the folder is damaged or of another kind, or base or student are not those it was trained on.
    """
    described = read_adapter(folder)
    if described.link != LINK or described.student is None:
        raise ModelError(f"{folder} holds a {described.link!r} adapter, not one of a fusion model: use trimtab.load")
    if base is None:
        base = find_place(folder, "base", described.base.name)
    if not isinstance(base, DualEncoder):
        base = load_base(str(base), device=device, dtype=dtype)
    check_base(described, base)
    student = load_student(described, student=student, device=device, dtype=dtype)
    with reading_config(described.folder / DESCRIPTION_FILE):
        language = from_config(LanguageAdapterConfig, described.config["adapter"], described)
        resampler = from_config(ResamplerConfig, described.config["resampler"], described)
        sizes = {name: int(described.config[name]) for name in ("input_dim", "output_dim")}
    adapter = rebuilt(described, lambda: FusionAdapter(language, resampler, **sizes))
    return FusionAdapted(
        base,
        student,
        adapter,
        layers=described.student.layers,
        english=where_english_goes(described),
        name=str(folder),
        folder=Path(folder),
    )
