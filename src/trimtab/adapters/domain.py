"""Adapters beside frozen layers: ``layer(x) + alpha * adapter(x)``; `trimtab.adapters.kinds` has the adapters.

`alpha` stays a dial: at 0 the adapters are not even called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trimtab.adapters.files import (
    CARD_FILE,
    DESCRIPTION_FILE,
    AdapterFile,
    BaseReference,
    from_config,
    lasting_place,
    read_adapter,
    reading_config,
    rebuilt,
    save_adapter,
    saved_folder,
)
from trimtab.adapters.gate import DomainGate, mixed
from trimtab.adapters.kinds import KINDS
from trimtab.config import DomainAdapterConfig, to_mapping
from trimtab.errors import ModelError, RecipeError
from trimtab.files import digest_of
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.freezing import freeze
from trimtab.towers.layers import (
    Site,
    TowerCut,
    TowerName,
    layer_input,
    lowest_site,
    padding_mask,
    sites,
    tower_module,
)
from trimtab.towers.memory import PairMemory
from trimtab.towers.prompting import ImageTokens, image_tokens, tokens_in_pass
from trimtab.towers.states_below import StatesBelow

LINK = "domain"
_LOGIT_SCALE = "logit_scale"
_GATE, _MEMORY = "gate.", "memory."  # of the names of their tensors


class DomainAdapters(nn.Module):
    """All adapters of one model; `attach` puts them to work, as a context or until `detach`.

    While attached they act in everything that runs the base's towers, in any thread. Several sets can be attached to
    one base together; each adds its own.

    Args:
        base: what they will fit; it is not kept.
        groups: kinds and places. Groups may share layers only if they are of different kinds.

    Attributes:
        adapters: by tower, part, index and kind: ``image_layers_1_bottleneck``.

    Raises:
        RecipeError: no group, layers that the base does not have, or a layer that two groups of one kind claim.
        ModelError: the layers of that kind of tower are not known.
    """

    def __init__(self, base: DualEncoder, groups: Sequence[DomainAdapterConfig], *, alpha: float = 1.0) -> None:
        super().__init__()
        if not groups:
            raise RecipeError("adapters: give at least one group, such as {tower: image, kind: bottleneck}")
        self.groups = tuple(groups)
        self.adapters = nn.ModuleDict()
        self._sites: dict[str, Site] = {}
        for group in self.groups:
            for site in sites_of(base, group):
                key = f"{site.tower}_{site.part}_{site.index}_{group.kind}"
                if key in self._sites:
                    raise RecipeError(
                        f"adapters: two groups with kind={group.kind} claim {site}; let their ranges not overlap"
                    )
                self._sites[key] = site
                self.adapters[key] = KINDS[group.kind][1](group, site)
        self._base: DualEncoder | None = None
        self._handles: list[RemovableHandle] = []
        self._masks: dict[TowerName, Tensor | None] = {}
        self.alpha = alpha

    @property
    def alpha(self) -> float:
        """Multiplies what the adapters add: 0 is the base, bit for bit, and 1 the model as trained."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        if not math.isfinite(value):
            raise RecipeError(f"alpha={value} must be a finite number: 0 is the base, 1 the model as trained")
        base = self._base
        self.detach()
        self._alpha = float(value)
        if base is not None:
            self.attach(base)

    @property
    def trained_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def placed(self) -> list[tuple[Site, nn.Module]]:
        """Each adapter with the layer or block that it sits beside."""
        return [(site, self.adapters[key]) for key, site in self._sites.items()]

    def attach(self, base: DualEncoder) -> DomainAdapters:
        """Put the adapters beside the layers of `base` until `detach`, or for a block: ``with adapters.attach(base):``.

        Raises:
            ModelError: they are attached already, or `base` has other layers than they were made for.
        """
        if self._base is not None:
            raise ModelError(f"these adapters are attached to {self._base.name} already: detach them first")
        parts = {(site.tower, site.part) for site in self._sites.values()}
        own = {(tower, part): sites(base, tower, part) for tower, part in parts}
        for site in self._sites.values():
            if site not in own[site.tower, site.part]:
                raise ModelError(f"the adapters do not fit {base.name}: its {site} is not that of their own base")
        self._base = base
        if self.alpha == 0:  # hooks alone can lead PyTorch to other kernels, with other last bits
            return self
        for tower in dict.fromkeys(site.tower for site in self._sites.values()):
            hook = partial(self._note_mask, tower)
            self._handles.append(tower_module(base, tower).register_forward_pre_hook(hook, with_kwargs=True))
        for key, site in self._sites.items():
            layer = base.model.get_submodule(site.path)
            self._handles.append(layer.register_forward_hook(partial(self._add, key), with_kwargs=True))
        return self

    def detach(self) -> None:
        """Leave the base as it was; does nothing if not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._masks.clear()
        self._base = None

    def __enter__(self) -> DomainAdapters:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _note_mask(self, tower: TowerName, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._masks[tower] = padding_mask(module, args, kwargs)

    def _add(self, key: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        adapter, site = self.adapters[key], self._sites[key]
        x = layer_input(args, kwargs).to(next(adapter.parameters()).dtype)
        added = adapter(x, self._masks.get(site.tower))
        states = (states + self._alpha * added).to(states.dtype)
        return (states, *output[1:]) if isinstance(output, tuple) else states


def sites_of(base: DualEncoder, group: DomainAdapterConfig) -> list[Site]:
    """The layers or blocks that a group chooses.

    Raises:
        RecipeError: the tower has no such part, or fewer layers.
        ModelError: the layers of that kind of tower are not known.
    """
    part = KINDS[group.kind][0]
    found = sites(base, group.tower, part)
    count = len(found)
    first, last = (number + count if number < 0 else number for number in (group.first, group.last))
    if not 0 <= first <= last < count:
        raise RecipeError(
            f"adapters: first={group.first}, last={group.last} is no range of the {count} {part} of the "
            f"{group.tower} tower of {base.name}; number them 0 to {count - 1}, or -{count} to -1 from the end"
        )
    return found[first : last + 1]


class DomainAdapted(DualEncoder):
    """A base that knows a domain, by adapters on its layers.

    The base stays as it was: the adapters are attached for each pass through this object and no longer. Passes of
    this object wait for each other; the base itself must not run in another thread meanwhile.

    Attributes:
        base: the dual encoder that the adapters fit.
        adapters: frozen here.
        gate: leaves pictures from elsewhere to the base; None adapts all. The part of the image tower above the lowest
            adapter then runs twice for each picture that is adapted, and once for the others.
        memory: moves pictures near those of training towards the captions of these; None moves none.
        states_below: what lies below the adapters, shared with other models of the base; None keeps nothing.
        folder: the adapted folder.
    """

    def __init__(
        self,
        base: DualEncoder,
        adapters: DomainAdapters,
        *,
        gate: DomainGate | None = None,
        memory: PairMemory | None = None,
        logit_scale: float | None = None,
        name: str = "",
        folder: Path | None = None,
    ) -> None:
        self.__dict__.update(base.__dict__)  # the towers are shared, not copied
        self.base = base
        self.adapters: DomainAdapters = freeze(adapters).to(base.device)
        self._gate: DomainGate | None = gate.to(base.device) if gate is not None else None
        self._memory: PairMemory | None = memory.to(base.device) if memory is not None else None
        self._states_below: StatesBelow | None = None
        self.name = name or base.name
        self.folder = lasting_place(folder)
        self._own_scale = logit_scale is not None
        if logit_scale is not None:
            self.logit_scale = logit_scale
        self._fingerprint = self._digest()

    @property
    def alpha(self) -> float:
        """See `DomainAdapters.alpha`; another alpha is another fingerprint."""
        return self.adapters.alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.adapters.alpha = value
        self._fingerprint = self._digest()

    @property
    def gate(self) -> DomainGate | None:
        """Which pictures are adapted; another gate, or none, is another fingerprint."""
        return self._gate

    @gate.setter
    def gate(self, gate: DomainGate | None) -> None:
        self._gate = gate
        self._fingerprint = self._digest()

    @property
    def memory(self) -> PairMemory | None:
        """Of training pictures; another memory, or none, is another fingerprint."""
        return self._memory

    @memory.setter
    def memory(self, memory: PairMemory | None) -> None:
        self._memory = memory
        self._fingerprint = self._digest()

    @property
    def states_below(self) -> StatesBelow | None:
        """See above."""
        return self._states_below

    @states_below.setter
    def states_below(self, states: StatesBelow | None) -> None:
        self._states_below = states

    def _with_domain(self) -> DomainAdapted:
        return self

    def to(self, device: str | torch.device) -> DomainAdapted:
        """Move base and adapters; returns itself."""
        self.base.to(device)
        self.adapters.to(device)
        for each in (self.gate, self.memory):
            if each is not None:
                each.to(device)
        return self

    def token_features(self, tokens: dict[str, Tensor]) -> Tensor:
        """As `DualEncoder.token_features`, through the adapters."""
        with self.turn, self.adapters.attach(self.base):
            return self.base.token_features(tokens)

    def pixel_features(self, pixels: dict[str, Tensor]) -> Tensor:
        """As `DualEncoder.pixel_features`, through the adapters as far as the gate lets them."""
        with self.turn:
            if self.alpha == 0 or (self.gate is None and self.states_below is None):
                with self.adapters.attach(self.base):
                    return self.recalled(self.base.pixel_features(pixels))
            cut, below = self._below(pixels)
            if self.gate is not None:
                return self._gated(self.gate, cut, below)
            with self.adapters.attach(self.base):
                return self.recalled(cut.upper(below))

    def image_tokens(self, pixels: dict[str, Tensor]) -> ImageTokens:
        """Features and patch tokens (B, N, Wi) of pictures; both as far as the gate lets the adapters change them."""
        with self.turn:
            if self.alpha == 0:
                return image_tokens(self.base, pixels)
            if self.gate is None:
                with self.adapters.attach(self.base):
                    adapted = image_tokens(self.base, pixels)
                return adapted._replace(features=self.recalled(adapted.features))
            # Of all pictures, in and outside: an export to ONNX cannot choose between them.
            plain, adapted = self._both_tokens(pixels)
            adapted = adapted._replace(features=self.recalled(adapted.features))
            share = self.gate(plain.features)  # (B,)
            tokens = torch.lerp(plain.tokens, adapted.tokens, share[:, None, None].to(plain.tokens.dtype))
            return ImageTokens(mixed(plain.features, adapted.features, share), tokens, plain.mask)

    def _below(self, pixels: dict[str, Tensor]) -> tuple[TowerCut, dict[str, Tensor]]:
        """The cut at the lowest adapter, and what pictures are below it."""
        cut = TowerCut(self.base, "image", lowest_site(self.adapters, "image"))
        return cut, cut.lower(pixels) if self.states_below is None else self.states_below.lower(cut, pixels)

    def _both_tokens(self, pixels: dict[str, Tensor]) -> tuple[ImageTokens, ImageTokens]:
        """Of the base and of the adapters, from one pass below the lowest of these."""
        cut, below = self._below(pixels)
        plain = tokens_in_pass(self.base, pixels, lambda: cut.upper(below)) or image_tokens(self.base, pixels)
        with self.adapters.attach(self.base):
            # Patch tokens that lie below the adapters need a whole pass.
            adapted = tokens_in_pass(self.base, pixels, lambda: cut.upper(below)) or image_tokens(self.base, pixels)
        return plain, adapted

    def recalled(self, adapted: Tensor) -> Tensor:
        """Features (B, D) as the memory moves them, as far as `alpha` has it; their lengths stay."""
        if self.memory is None or self.alpha == 0:
            return adapted
        moved = (self.memory(adapted) * adapted.norm(dim=-1, keepdim=True)).to(adapted.dtype)
        return torch.lerp(adapted, moved, min(max(self.alpha, 0.0), 1.0))

    def _gated(self, gate: DomainGate, cut: TowerCut, below: dict[str, Tensor]) -> Tensor:
        features = cut.upper(below)  # (B, D)
        share = gate(features)  # (B,)
        inside = share > 0
        if not inside.any():
            return features
        with self.adapters.attach(self.base):
            adapted = self.recalled(cut.upper({name: one[inside] for name, one in below.items()}))
        features = features.clone()
        features[inside] = mixed(features[inside], adapted, share[inside])
        return features

    def _digest(self) -> str:
        # The base's scale is part of the base, and rounded where it is loaded in bf16.
        scale = repr(self.logit_scale) if self._own_scale else ""
        parts: list[str | bytes] = [self.base.fingerprint, repr(self.alpha), scale]
        for name, tensor in sorted(self.adapters.state_dict().items()):
            parts += [name, tensor.float().cpu().numpy().tobytes()]
        for prefix, each in ((_GATE, self.gate), (_MEMORY, self.memory)):
            for name, tensor in each.state_dict().items() if each is not None else ():
                parts += [prefix + name, tensor.float().cpu().numpy().tobytes()]
        return digest_of(*parts)

    def _write(self, folder: str) -> None:
        before = saved_folder(self.folder, "save it with save_domain")
        # As it is now, which the folder may not be: the dial can be turned, gate and memory taken out or exchanged.
        kept = read_adapter(before)
        card = before / CARD_FILE
        tensors = _tensors(self.adapters, self.gate, self.memory)
        if (scale := kept.tensors.get(_LOGIT_SCALE)) is not None:
            tensors[_LOGIT_SCALE] = scale
        save_adapter(
            folder,
            link=LINK,
            tensors=tensors,
            config=_config(self.adapters, self.gate, self.memory),
            base=kept.base,
            recipe=kept.recipe,
            data=kept.data,
            metrics=kept.metrics,
            card=card.read_text(encoding="utf-8") if card.is_file() else "",
        )


def save_domain(
    folder: str | Path,
    adapters: DomainAdapters,
    *,
    base: DualEncoder,
    gate: DomainGate | None = None,
    memory: PairMemory | None = None,
    logit_scale: float | None = None,
    recipe: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    card: str = "",
) -> Path:
    """Write an adapted folder for `trimtab.load`; see `trimtab.adapters.files.save_adapter`.

    Args:
        logit_scale: multiplies cosines, if it was trained; None keeps the base's.
    """
    tensors = _tensors(adapters, gate, memory)
    if logit_scale is not None:
        tensors[_LOGIT_SCALE] = torch.tensor(float(logit_scale))
    return save_adapter(
        folder,
        link=LINK,
        tensors=tensors,
        config=_config(adapters, gate, memory),
        base=BaseReference.of(base),
        recipe=recipe,
        data=data,
        metrics=metrics,
        card=card,
    )


def _tensors(adapters: DomainAdapters, gate: DomainGate | None, memory: PairMemory | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(adapters.state_dict())
    for prefix, each in ((_GATE, gate), (_MEMORY, memory)):
        if each is not None:
            tensors |= {prefix + name: tensor for name, tensor in each.state_dict().items()}
    return tensors


def _config(adapters: DomainAdapters, gate: DomainGate | None, memory: PairMemory | None) -> dict[str, Any]:
    return {
        "adapters": to_mapping(adapters.groups),
        "gate": gate.kind if gate else "none",
        "memory": len(memory) if memory is not None else 0,
        "alpha": adapters.alpha,
    }


def load_domain(described: AdapterFile, base: DualEncoder, name: str, folder: Path) -> DomainAdapted:
    """Build what an adapted folder of this link describes, on the base that it was trained on.

    Raises:
        ModelError: the description is incomplete or does not fit its tensors.
    """
    where = described.folder / DESCRIPTION_FILE
    with reading_config(where):
        mappings, alpha = list(described.config["adapters"]), float(described.config["alpha"])
    groups = tuple(from_config(DomainAdapterConfig, mapping, described) for mapping in mappings)
    tensors = dict(described.tensors)
    scale = tensors.pop(_LOGIT_SCALE, None)
    if scale is not None and (scale.numel() != 1 or scale <= 0):
        raise ModelError(f"{where} has a logit_scale that is no number above 0: copy the folder again")
    gate, memory = _load_gate(tensors, base, where), _load_memory(tensors, base, described)
    adapters = rebuilt(replace(described, tensors=tensors), lambda: DomainAdapters(base, groups, alpha=alpha))
    number = None if scale is None else float(scale)
    return DomainAdapted(base, adapters, gate=gate, memory=memory, logit_scale=number, name=name, folder=folder)


def _load_gate(tensors: dict[str, Tensor], base: DualEncoder, where: Path) -> DomainGate | None:
    """Take the gate's tensors out of `tensors`; None if there are none."""
    found = _taken(tensors, _GATE)
    if not found:
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    centres = shapes.get("centres", ())
    if shapes != {"centres": (*centres[:1], base.embedding_dim), "low": (), "high": ()} or 0 in centres:
        raise ModelError(f"{where} has a gate that does not fit {base.name} ({shapes}): copy the folder again")
    return DomainGate(found["centres"], float(found["low"]), float(found["high"]))


def _load_memory(tensors: dict[str, Tensor], base: DualEncoder, described: AdapterFile) -> PairMemory | None:
    """Take the memory's tensors out of `tensors`; None if there are none."""
    found = _taken(tensors, _MEMORY)
    if not found:
        return None
    count = next((tensor.shape[0] for name, tensor in found.items() if name == "keys" and tensor.dim()), 0)
    try:
        return rebuilt(replace(described, tensors=found), lambda: PairMemory(count, base.embedding_dim))
    except ModelError as error:
        where = described.folder / DESCRIPTION_FILE
        raise ModelError(
            f"{where} has a memory that does not fit {base.name} ({error}): copy the folder again"
        ) from None


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
