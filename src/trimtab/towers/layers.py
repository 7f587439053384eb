"""Where the layers of a tower are, and running a tower from states that were cached below a layer.

`LAYOUTS` is all that is known of each kind of tower. A `TowerCut` runs the lower part once and the upper part as
often as wanted. The upper part is the family's own forward pass with the lower modules taken out, so that masks,
pooling and projections are those of the model and not a copy.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from trimtab.errors import ModelError, RecipeError
from trimtab.towers.dual_encoder import DualEncoder

TowerName = Literal["image", "text"]
PartName = Literal["layers", "blocks"]


@dataclass(frozen=True)
class Part:
    """Modules of a tower that adapters can sit beside; all names are paths below the tower.

    Attributes:
        paths: lists of modules, or single modules, from the lowest. Names change between versions of transformers;
            those that a tower has count.
        below: what runs before the first of them.
    """

    paths: tuple[str, ...]
    below: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """What is known of one kind of tower.

    Attributes:
        layers: Transformer layers, if there are any.
        blocks: convolutional blocks, which all lie below the layers.
        causal: a token sees only those before it.
        carried: inputs that are read again above the first layer.
        cuts_itself: the tower has `lower` and `upper` of its own, as `StarterVisionModel` does.
    """

    layers: Part
    blocks: Part | None = None
    causal: bool = False
    carried: tuple[str, ...] = ()
    cuts_itself: bool = False


_CLIP_IMAGE = Layout(Part(("encoder.layers",), below=("embeddings", "pre_layrnorm")))
_SIGLIP = Layout(Part(("encoder.layers",), below=("embeddings",)))
_BERT = Layout(Part(("encoder.layer",), below=("embeddings",)))

# By the `model_type` of the tower's own configuration.
LAYOUTS: dict[str, Layout] = {
    # image towers
    "clip_vision_model": _CLIP_IMAGE,
    "chinese_clip_vision_model": _CLIP_IMAGE,
    "altclip_vision_model": _CLIP_IMAGE,
    "siglip_vision_model": _SIGLIP,
    "siglip2_vision_model": Layout(_SIGLIP.layers, carried=("pixel_attention_mask",)),
    "vit": Layout(Part(("layers", "encoder.layer"), below=("embeddings",))),
    "flava_image_model": _BERT,
    "dinov2": _BERT,
    "dinov2_with_registers": _BERT,
    "trimtab_starter_vision": Layout(
        Part(
            ("alignment.layers",),
            below=(
                *("trunk", "alignment.feature_mean", "alignment.feature_std", "alignment.class_embeddings"),
                *("alignment.project", "alignment.project_pooled", "alignment.positions"),
            ),
        ),
        blocks=Part(("trunk.blocks", "trunk.head"), below=("trunk.stem",)),
        cuts_itself=True,
    ),
    "trimtab_clip_resnet": Layout(Part((), below=()), blocks=Part(("blocks",), below=("stem",)), cuts_itself=True),
    # text towers
    "clip_text_model": Layout(Part(("encoder.layers",), below=("embeddings",)), causal=True),
    "siglip_text_model": _SIGLIP,
    "siglip2_text_model": _SIGLIP,
    "chinese_clip_text_model": _BERT,
    "altclip_text_model": Layout(
        Part(("roberta.encoder.layers", "roberta.encoder.layer"), below=("roberta.embeddings",))
    ),
    "flava_text_model": _BERT,
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "trimtab_sentence_bert": _BERT,
}

# The first that a model has: FLAVA's name, then the wrapped towers of earlier transformers.
_TOWERS: dict[TowerName, tuple[str, ...]] = {
    "image": ("image_model", "vision_model.vision_model", "vision_model"),
    "text": ("text_model.text_model", "text_model"),
}
PROJECTIONS: dict[TowerName, tuple[str, ...]] = {
    "image": ("visual_projection", "image_projection"),
    "text": ("text_projection",),
}
"""The last linear map of a tower, by the names that families give it; not every family has one."""


@dataclass(frozen=True)
class Site:
    """One layer or block of a tower.

    Attributes:
        index: its number within its part, from 0 at the pixels or tokens.
        path: the module below ``base.model``.
        width_in, width_out: width of the token states, or channels of the maps, that enter and leave it.
        stride: by which a block shrinks its map.
        causal: see `Layout`.
    """

    tower: TowerName
    part: PartName
    index: int
    path: str
    width_in: int
    width_out: int
    stride: int = 1
    causal: bool = False

    def __str__(self) -> str:
        return f"{self.tower}.{self.part}.{self.index}"

    def is_below(self, other: Site) -> bool:
        """Whether it runs before `other`, a site of the same tower."""
        return (self.part == "layers", self.index) < (other.part == "layers", other.index)


@runtime_checkable
class Placed(Protocol):
    """A module whose parts sit beside layers of a tower: `trimtab.adapters.domain.DomainAdapters`."""

    def placed(self) -> list[tuple[Site, nn.Module]]:
        """Each part with its site."""


def sites(base: DualEncoder, tower: TowerName, part: PartName) -> list[Site]:
    """The layers or blocks of a tower, from the lowest.

    Raises:
        ModelError: the tower is of a kind that is not in `LAYOUTS`.
        RecipeError: the tower has no such part; the message says what it has.
    """
    path, module, layout = _find(base, tower)
    if part == "layers":
        found = _modules(module, layout.layers)
        if not found and layout.blocks is not None:
            raise RecipeError(
                f"the {tower} tower of {base.name} ({module.config.model_type}) has no Transformer layers; it has "
                f"{len(_modules(module, layout.blocks))} convolutional blocks, which take kind=conv, as in "
                "recipes/domain-grocery.yaml"
            )
        widths = [_layer_width(layer) for _, layer in found]
        return [
            Site(tower, part, index, f"{path}.{name}", width, width, causal=layout.causal)
            for index, ((name, _), width) in enumerate(zip(found, widths, strict=True))
        ]
    if layout.blocks is None:
        raise RecipeError(
            f"the {tower} tower of {base.name} ({module.config.model_type}) has no convolutional blocks; it has "
            f"{len(_modules(module, layout.layers))} Transformer layers, which take kind=bottleneck or "
            "transformer, as in recipes/domain-clip.yaml"
        )
    return [
        Site(tower, part, index, f"{path}.{name}", *_block_sizes(block))
        for index, (name, block) in enumerate(_modules(module, layout.blocks))
    ]


def tower_module(base: DualEncoder, tower: TowerName) -> nn.Module:
    """The module of a tower: every pass of images or texts goes through its call.

    Raises:
        ModelError: as for `sites`.
    """
    return _find(base, tower)[1]


def padding_mask(tower: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The mask (B, T) of real tokens or patches in a call of `tower`; None if all are real.

    It is read here and not at a layer, which gets it in a form that depends on the attention kernel: as a bias, as
    booleans, or not at all if nothing is padded.
    """
    given = inspect.signature(tower.forward).bind_partial(*args, **kwargs).arguments
    mask = given.get("attention_mask")
    return given.get("pixel_attention_mask") if mask is None else mask


class TowerCut:
    """A tower in two halves: what lies below a site, to be computed once and cached, and the rest.

    Not for several threads at once: the model is changed while a half runs.

    Attributes:
        site: the first layer or block of the upper half; None cuts above everything, in a tower of any kind, so
            that the features themselves are cached.

    Raises:
        ModelError: the base has no such site.
    """

    def __init__(self, base: DualEncoder, tower: TowerName, site: Site | None) -> None:
        self.base = base
        self.tower = tower
        self.site = site
        if site is None:
            return
        if site.tower != tower or site not in sites(base, tower, site.part):
            raise ModelError(f"{base.name} has no {site} in its {tower} tower: take one from sites()")
        self._path, self._module, self._layout = _find(base, tower)

    def __repr__(self) -> str:
        return f"TowerCut({self.base.name!r}, {self.site or f'above the {self.tower} tower'})"

    @torch.no_grad()
    def lower(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the lower half.

        Args:
            inputs: what `DualEncoder.text_inputs` or `preprocess` gives.

        Returns:
            Tensors with a leading axis B, which are all that `upper` needs of an image: ``states`` that enter the
            site, (B, T, D) or (B, C, H, W), and what the rest reads beside them; or ``features`` (B, D) if
            there is no site.
        """
        if self.site is None:
            return {"features": self._features(inputs)}
        if self._layout.cuts_itself:
            pixels = self.base._on_device(inputs)["pixel_values"]
            return self._module.lower(pixels, self.site.part, self.site.index)
        carried = {name: inputs[name] for name in self._layout.carried if name in inputs}
        return {"states": self.entering(inputs), **self.base._on_device(carried)}

    def upper(self, below: dict[str, Tensor], inputs: dict[str, Tensor] | None = None) -> Tensor:
        """Run the upper half; gradients reach whatever is trained in it.

        Args:
            below: from `lower`, in any precision. Text states may be padded to another length than they were
                computed at, with any values.
            inputs: the token tensors of texts, padded as their states are; not used for images.

        Returns:
            Features (B, D), as `DualEncoder.token_features` and `pixel_features` give them.
        """
        if self.site is None:
            return below["features"].to(self.base.device)
        below = self.base._on_device(below)
        if self._layout.cuts_itself:
            pooled = self._module.upper(below, self.site.part, self.site.index)
            return self.base.model.visual_projection(pooled)
        states = below["states"]
        if self.tower == "image":
            # The embeddings are taken out: only the kind and precision of the pixels are looked at.
            inputs = {"pixel_values": states} | {name: below[name] for name in self._layout.carried if name in below}
        elif inputs is None or inputs["input_ids"].shape != states.shape[:2]:
            raise ValueError(f"text states {tuple(states.shape)} need the inputs of these texts, padded alike")
        with self._starting_from(states, self.site):
            return self._features(inputs)

    def token_mask(self, inputs: dict[str, Tensor]) -> Tensor:
        """Which token states (B, T) a cache must keep: those that are not padding, or all if the tower sees it."""
        mask = inputs.get("attention_mask")
        if mask is None or self.base.text_inputs.pad_to_limit:
            return torch.ones_like(inputs["input_ids"], dtype=torch.bool)
        return mask.bool()

    def paths_below(self) -> list[str]:
        """Paths below ``base.model`` of the modules and parameters that the lower half computes with."""
        if self.site is None:
            model, names = self.base.model, (*_TOWERS[self.tower], *PROJECTIONS[self.tower])
            known = [name for name in names if _submodule(model, name) is not None]
            return known or [name for name, _ in model.named_children()]  # a model with code of its own
        part = self._layout.layers if self.site.part == "layers" else self._layout.blocks
        assert part is not None  # the site is one of it
        lower = [site.path for site in sites(self.base, self.tower, self.site.part) if site.is_below(self.site)]
        return [f"{self._path}.{name}" for name in part.below] + lower

    def _features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.base.token_features(inputs) if self.tower == "text" else self.base.pixel_features(inputs)

    def entering(self, inputs: dict[str, Tensor]) -> Tensor:
        """States (B, T, D) or (B, C, H, W) that enter the site, in a pass that ends there; gradients flow as given."""
        assert self.site is not None, "above everything nothing is entered"
        site = self.site

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
            raise _Reached(layer_input(args, kwargs))

        handle = self.base.model.get_submodule(site.path).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._features(inputs)
        except _Reached as reached:
            return reached.states
        finally:
            handle.remove()
        raise ModelError(f"the {self.tower} features of {self.base.name} do not pass through {site.path}")

    @contextlib.contextmanager
    def _starting_from(self, states: Tensor, site: Site) -> Iterator[None]:
        """Within it the tower has only the layers from `site` on, and what comes before them returns `states`."""
        name = site.path.removeprefix(f"{self._path}.").rpartition(".")[0]
        owner, _, attribute = name.rpartition(".")
        with contextlib.ExitStack() as stack:
            upper = self._module.get_submodule(name)[site.index :]
            stack.enter_context(_set(self._module.get_submodule(owner), attribute, upper))
            for path in self._layout.layers.below:
                if (module := _submodule(self._module, path)) is not None:
                    stack.enter_context(_set(module, "forward", lambda *_, **__: states))
            yield


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The states in a call of a layer or block."""
    return args[0] if args else kwargs["hidden_states"]


def lowest_site(adapters: Placed, tower: TowerName) -> Site | None:
    """Where to cut a tower so that all adapters are in the upper half; None if it has no adapter."""
    lowest: Site | None = None
    for site, _ in adapters.placed():
        if site.tower == tower and (lowest is None or site.is_below(lowest)):
            lowest = site
    return lowest


def refuse_wrong_cut(cut: TowerCut, modules: nn.Module | Iterable[nn.Module] = ()) -> None:
    """Refuse to cache states that training would change.

    Args:
        modules: what is trained beside the base's own weights; adapters are found anywhere in it.

    Raises:
        RecipeError: something that requires a gradient lies below the cut.
    """
    below = cut.paths_below()
    wrong = [
        name
        for name, parameter in cut.base.model.named_parameters()
        if parameter.requires_grad and any(name == path or name.startswith(f"{path}.") for path in below)
    ]
    for module in [modules] if isinstance(modules, nn.Module) else modules:
        for placed in (part for part in module.modules() if isinstance(part, Placed)):
            wrong += [
                f"the adapter at {site}"
                for site, adapter in placed.placed()
                if site.tower == cut.tower and (cut.site is None or site.is_below(cut.site))
                if any(parameter.requires_grad for parameter in adapter.parameters())
            ]
    if wrong:
        some = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise RecipeError(
            f"the {cut.tower} tower of {cut.base.name} cannot be cached at {cut.site or 'its features'}: {some} would "
            "be trained below, and the cache would go stale. Cut below the lowest of them, or freeze them"
        )


class _Reached(Exception):  # noqa: N818 - no error: it ends a pass that is not needed further
    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


@contextlib.contextmanager
def _set(owner: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for a while. A method of the class is covered and uncovered again."""
    covered = name not in owner.__dict__ and name not in owner._modules
    before = None if covered else getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if covered:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _find(base: DualEncoder, tower: TowerName) -> tuple[str, Any, Layout]:
    """Path and module of a tower, and its layout."""
    kind = "unknown"
    for path in _TOWERS[tower]:
        if (module := _submodule(base.model, path)) is not None:
            kind = getattr(getattr(module, "config", None), "model_type", kind)
            if kind in LAYOUTS:
                return path, module, LAYOUTS[kind]
    raise ModelError(
        f"the layers of the {tower} tower of {base.name} are not known (its kind is {kind!r}); known are those of "
        f"{', '.join(LAYOUTS)}"
    )


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _modules(tower: nn.Module, part: Part) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for path in part.paths:
        module = _submodule(tower, path)
        if isinstance(module, nn.ModuleList):
            found += [(f"{path}.{index}", one) for index, one in enumerate(module)]
        elif module is not None:
            found.append((path, module))
    return found


def _layer_width(layer: nn.Module) -> int:
    """Every kind of layer normalises its states."""
    return next(one.normalized_shape[0] for one in layer.modules() if isinstance(one, nn.LayerNorm))


def _block_sizes(block: Any) -> tuple[int, int, int]:
    """Channels in and out, and stride: the block's own, or that of convolutions that follow each other."""
    convolutions = [one for one in block.modules() if isinstance(one, nn.Conv2d)]
    stride = getattr(block, "stride", None) or math.prod(one.stride[0] for one in convolutions)
    return convolutions[0].in_channels, convolutions[-1].out_channels, stride
