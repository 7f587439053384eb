"""A base with its adapters as one object: what `trimtab.load` returns for an adapted folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.adapters.domain import load_domain
from trimtab.adapters.files import (
    AdapterFile,
    check_base,
    check_student,
    copy_adapted,
    find_place,
    from_config,
    is_adapted_folder,
    is_composed_folder,
    lasting_place,
    read_adapter,
    rebuilt,
    saved_folder,
)
from trimtab.adapters.language import LanguageAdapter
from trimtab.adapters.prompted import load_prompt
from trimtab.config import LanguageAdapterConfig
from trimtab.errors import ModelError
from trimtab.files import digest_of
from trimtab.scripts import is_latin
from trimtab.towers.dual_encoder import DualEncoder, as_texts
from trimtab.towers.freezing import freeze
from trimtab.towers.hf import BUILT_IN, fetch_links, is_hub_id, load_base, resolve_folder
from trimtab.towers.text_encoder import TextEncoder
from trimtab.towers.tokens import check_texts

# The links that can be loaded.
_HAS_STUDENT = {"language": True, "fusion": True, "domain": False, "prompt": False}
_WITHOUT_STUDENT = {"domain": load_domain, "prompt": load_prompt}


class LanguageAdapted(DualEncoder):
    """A base whose text side also reads another language, through a frozen student and an adapter.

    Attributes:
        base: the dual encoder that the adapter fits; its image tower encodes the images.
        student: frozen text encoder of the target language.
        adapter: from the student's token states to the base's features.
        english: "route" sends texts in Latin script to the base's own text tower; "adapter" sends all texts
            through the adapter.
        languages: tags of the target languages of training, most pairs first; empty where that is not known.
        folder: the adapted folder.
    """

    def __init__(
        self,
        base: DualEncoder,
        student: TextEncoder,
        adapter: LanguageAdapter,
        *,
        layers: tuple[int, ...] = (-1,),
        english: Literal["route", "adapter"] = "route",
        languages: tuple[str, ...] = (),
        name: str = "",
        folder: Path | None = None,
    ) -> None:
        self.__dict__.update(base.__dict__)  # the towers are shared, not copied
        self.base = base
        self.student = student
        self.adapter: LanguageAdapter = freeze(adapter)
        self.layers = layers
        self.english = english
        self.languages = languages
        self.name = name or base.name
        self._known_fingerprint = "", ""
        self.folder = lasting_place(folder)
        self.text_inputs = student.text_inputs
        self.adapter.to(base.device)
        self.student.to(base.device)

    @property
    def fingerprint(self) -> str:
        """See `DualEncoder.fingerprint`; a domain below may have been turned since it was last asked for."""
        return self._once_for(self.base.fingerprint, lambda: self.fingerprint_on(self.base))

    def fingerprint_on(self, base: DualEncoder) -> str:
        """The fingerprint that this link has on a base."""
        layers = repr(tuple(self.layers))
        return digest_of(base.fingerprint, self.student.fingerprint, self.english, layers, *_tensor_parts(self.adapter))

    def to(self, device: str | torch.device) -> LanguageAdapted:
        """Move base, student and adapter; returns itself."""
        self.base.to(device)
        self.student.to(device)
        self.adapter.to(device)
        return self

    @property
    def image_fingerprint(self) -> str:
        """That of the base, whose image tower it is."""
        return self.base.image_fingerprint

    def encode_text(self, texts: Iterable[str] | str, *, batch_size: int = 256, progress: bool = False) -> np.ndarray:
        """As `DualEncoder.encode_text`; English goes to the base's tower when `english` is "route"."""
        texts = as_texts(texts)
        if self.english == "adapter":
            return super().encode_text(texts, batch_size=batch_size, progress=progress)
        latin = _which_are_latin(texts)
        embeddings = np.zeros((len(texts), self.embedding_dim), np.float32)
        truncated = 0
        for owner, encode, chosen in ((self.base, self.base.encode_text, latin), (self, super().encode_text, ~latin)):
            if chosen.any():
                picked = [texts[i] for i in np.flatnonzero(chosen)]
                embeddings[chosen] = encode(picked, batch_size=batch_size, progress=progress)
                truncated += owner.last_truncated
        self.last_truncated = truncated
        return embeddings

    def text_features(self, texts: Sequence[str] | str) -> Tensor:
        """As `DualEncoder.text_features`; English goes to the base's tower when `english` is "route"."""
        texts = as_texts(texts)
        latin = _which_are_latin(texts) if self.english == "route" else np.zeros(len(texts), dtype=bool)
        if not latin.any():
            return super().text_features(texts)
        order = np.argsort(~latin, kind="stable")
        picked = [texts[i] for i in order]
        count = int(latin.sum())
        parts = [self.base.text_features(picked[:count])]
        if count < len(texts):
            parts.append(super().text_features(picked[count:]))
        return torch.cat(parts)[torch.from_numpy(np.argsort(order)).to(self.device)]

    def pixel_features(self, pixels: dict[str, Tensor]) -> Tensor:
        """As the base's, which may have adapters of a domain."""
        return self.base.pixel_features(pixels)

    def token_features(self, tokens: dict[str, Tensor]) -> Tensor:
        """Features (B, D) of the student's tokens, through the adapter."""
        states, mask = self.student.states_of(tokens, self.layers)
        return self.adapter(states, mask)

    def _write(self, folder: str) -> None:
        copy_adapted(saved_folder(self.folder, "train it with `trimtab adapt`"), folder)


def _which_are_latin(texts: Sequence[str]) -> np.ndarray:
    """(N,) bool.

    Raises:
        DataError: an item is not a text.
    """
    check_texts(texts)
    return np.array([is_latin(text) for text in texts], dtype=bool)


def load_adapted(
    folder: str | Path,
    *,
    base: str | Path | DualEncoder | None = None,
    student: str | Path | TextEncoder | None = None,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Any:
    """Load an adapted folder together with the base and the student that it names.

    Args:
        base, student: where they are now, or the loaded objects, if not where the folder says.
        trust_remote_code: run Python code from the folders of base and student.

    Returns:
        By the folder's link: a `LanguageAdapted`, a `trimtab.adapters.domain.DomainAdapted`, a
        `trimtab.adapters.prompted.PromptAdapted` or a `trimtab.adapters.fusion.FusionAdapted`.

    Raises:
        ModelError: the folder is damaged, or base or student are not those it was trained on.
    """
    described = read_adapter(folder)
    if _HAS_STUDENT.get(described.link) != (described.student is not None):
        raise ModelError(f"{folder} holds a {described.link!r} adapter, which this version cannot load")
    below = {}
    if student is not None and described.student is None:
        if described.link != "prompt" or isinstance(base, DualEncoder):
            raise ModelError(no_student(folder))
        below = {"student": student}  # of the language that the prompts stand on
    if base is None:
        base = find_place(folder, "base", described.base.name)
    if not isinstance(base, DualEncoder):
        # Prompts may stand on a model that has adapters of its own.
        base = (load if described.link == "prompt" else load_base)(
            str(base), device=device, dtype=dtype, trust_remote_code=trust_remote_code, **below
        )
    check_base(described, base)
    if described.student is None:
        return _WITHOUT_STUDENT[described.link](described, base, str(folder), Path(folder))
    student = load_student(described, student=student, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if described.link == "fusion":
        from trimtab.adapters.fusion import load_fusion_adapted  # it builds on this module

        return load_fusion_adapted(folder, base=base, student=student)
    return load_language(described, base, student)


def no_student(*folders: object) -> str:
    """What to say where a student is given to adapted folders that have none."""
    return f"{' and '.join(map(str, folders))}: no language link, so there is no student to be found elsewhere"


def load_student(described: AdapterFile, *, student: str | Path | TextEncoder | None, **options: Any) -> TextEncoder:
    """The student that an adapted folder names, or that is given; `options` go to `TextEncoder.load`.

    Raises:
        ModelError: it is not the one that the adapter was trained on.
    """
    wanted = described.student
    if student is None and wanted is not None:
        student = find_place(described.folder, "student", wanted.name)
    if not isinstance(student, TextEncoder) and wanted is not None:
        student = TextEncoder.load(str(student), prefix=wanted.prefix, max_tokens=wanted.max_tokens, **options)
    assert isinstance(student, TextEncoder)
    check_student(described, student)
    return student


def load_language(described: AdapterFile, base: DualEncoder, student: TextEncoder) -> LanguageAdapted:
    """Build what an adapted folder of the language link describes.

    Args:
        base: what it was trained on, or that with adapters of a domain.

    Raises:
        ModelError: the description is incomplete or does not fit its tensors.
    """
    assert described.student is not None
    adapter = rebuilt(described, lambda: build_language_adapter(described))
    english = where_english_goes(described)
    counted = described.data.get("languages")
    return LanguageAdapted(
        base,
        student,
        adapter,
        layers=described.student.layers,
        english=english,
        languages=tuple(tag for tag in counted if tag != "en") if isinstance(counted, dict) else (),
        name=str(described.folder),
        folder=described.folder,
    )


def where_english_goes(described: AdapterFile) -> Literal["route", "adapter"]:
    """Which way an adapted folder sends English texts; see `LanguageAdapted`.

    Raises:
        ModelError: the folder does not say, or names another way.
    """
    english = described.config.get("english")
    if english not in ("route", "adapter"):
        raise ModelError(f"{described.folder}/adapter.json has english={english!r} rather than 'route' or 'adapter'")
    return cast(Literal["route", "adapter"], english)


def build_language_adapter(described: AdapterFile) -> LanguageAdapter:
    """The module that an adapted folder describes, not yet filled."""
    try:
        config = from_config(LanguageAdapterConfig, described.config["adapter"], described)
        sizes = {name: int(described.config[name]) for name in ("input_dim", "output_dim")}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"lacks config {error}" if isinstance(error, KeyError) else f"has a wrong size ({error})"
        raise ModelError(f"{described.folder}/adapter.json {reason}: copy the folder again") from error
    return LanguageAdapter(config, **sizes)


def load(
    name: str | os.PathLike[str],
    *,
    links: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] = (),
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    **places: Any,
) -> DualEncoder:
    """Load a base, an adapted folder or a composed folder.

    Args:
        name: "starter", a transformers folder or hub id (CLIP, SigLIP, ChineseCLIP, AltCLIP,
            VisionTextDualEncoder, FLAVA), or an adapted or composed folder or its hub id.
        links: adapted folders of this base, one of each link, that shall work together; or one of them.
        device: "auto" takes a GPU where there is one; or a torch device.
        dtype: precision of the weights.
        trust_remote_code: run Python code from a model folder.
        places: for an adapted or composed folder, `base=` and `student=` where these are now.

    Raises:
        ModelError: unknown, incomplete or damaged model, an adapter of another base, or links that do not go together.
    """
    if unknown := sorted(places.keys() - {"base", "student"}):
        raise TypeError(f"load() got an unexpected keyword argument {unknown[0]!r}")
    links = [links] if isinstance(links, (str, os.PathLike)) else links
    options: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    name = os.fspath(name)
    named = [name, *(os.fspath(one) for one in links)]
    first, *others = (local_folder(one, trust_remote_code=trust_remote_code) for one in named)
    if others or is_composed_folder(first):
        from trimtab.adapters.composing import load_composed  # it builds on this module

        model: DualEncoder = load_composed([first, *others], **options, **places)
    elif is_adapted_folder(first):
        model = load_adapted(first, **options, **places)
    elif places:
        raise ModelError(f"{name} is not an adapted folder: {', '.join(places)} have no meaning for it")
    else:
        return load_base(str(name), **options)
    if first is not name and not others:
        model.name = str(name)
    return model


def local_folder(name: str | Path, *, trust_remote_code: bool = False) -> str | Path:
    """Where an adapted or composed folder of the model hub lies once it is fetched; any other name as it is.

    Raises:
        ModelError: as for `trimtab.towers.hf.resolve_folder`.
    """
    if str(name) in BUILT_IN or Path(name).exists():
        return name
    folder = resolve_folder(name, trust_remote_code=trust_remote_code)
    if is_composed_folder(folder):
        return fetch_links(name) if is_hub_id(name) else folder
    return folder if is_adapted_folder(folder) else name


def _tensor_parts(adapter: nn.Module) -> Iterator[str | bytes]:
    for name, tensor in sorted(adapter.state_dict().items()):
        yield name
        yield tensor.float().cpu().contiguous().numpy().tobytes()
