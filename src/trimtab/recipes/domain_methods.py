"""What is trained in the domain link: adapters, or one of the baselines on the same data and budget.

Every method says where each tower may be cut, what a folder of it holds, and what it is at a setting of `alpha`:
0 is the base, 1 the trained model.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.adapters.domain import DomainAdapted, DomainAdapters, save_domain
from trimtab.adapters.files import CARD_FILE
from trimtab.adapters.gate import DomainGate
from trimtab.config import DomainRecipe
from trimtab.errors import ModelError, RecipeError
from trimtab.files import write_text
from trimtab.recipes.folders import ADAPTED_FILES
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.layers import PROJECTIONS, PartName, Site, TowerCut, TowerName, lowest_site, refuse_wrong_cut, sites
from trimtab.towers.memory import PairMemory
from trimtab.towers.states_below import StatesBelow


class Method(nn.Module):
    """Modules in training, and how they meet the base.

    Attributes:
        files: names of the files of a folder of it; None for a transformers folder.
        label: what it is, for people.
    """

    files: ClassVar[tuple[str, ...] | None] = None
    label: ClassVar[str]

    def __init__(self, base: DualEncoder, recipe: DomainRecipe) -> None:
        super().__init__()
        self.base = base
        self.recipe = recipe

    @property
    def trained_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(one.numel() for one in self.parameters() if one.requires_grad)

    @property
    def base_parameters(self) -> int:
        """How many numbers the base has, without what the method put into it."""
        return sum(one.numel() for one in self.base.model.parameters())

    def cut(self, tower: TowerName) -> TowerCut | None:
        """Where everything below is frozen; None if nothing is.

        Raises:
            ModelError: the layers of that kind of tower are not known.
        """
        raise NotImplementedError

    def head(self, tower: TowerName) -> nn.Module | None:
        """What is trained on top of a tower's features."""
        return None

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """While it trains or is measured, the base's towers run with it."""
        yield

    @contextlib.contextmanager
    def at_alpha(self, alpha: float, logit_scale: float) -> Iterator[DualEncoder]:
        """The model at one setting of the dial."""
        raise NotImplementedError

    def save(self, folder: Path, logit_scale: float, *, card: str, **facts: Any) -> None:
        """Write what `trimtab.load` reads, at the end of a run: a method may take itself apart for it.

        Args:
            card: text of the model card.
            facts: for an adapted folder; see `trimtab.adapters.domain.save_domain`.
        """
        with self.at_alpha(1.0, logit_scale) as model:
            model.save_pretrained(folder)
        write_text(folder / CARD_FILE, card)


class Adapters(Method):
    """The link itself.

    Attributes:
        gate: which pictures are adapted, once that is known; not in training.
        memory: of the training pictures, once training has ended.
        states_below: shared by the models of all settings of the dial.
    """

    files = ADAPTED_FILES
    label = "adapters"

    def __init__(self, base: DualEncoder, recipe: DomainRecipe) -> None:
        super().__init__(base, recipe)
        self.adapters = DomainAdapters(base, recipe.adapters).to(base.device)
        self.gate: DomainGate | None = None
        self.memory: PairMemory | None = None
        self.states_below = StatesBelow()

    def cut(self, tower: TowerName) -> TowerCut:
        cut = TowerCut(self.base, tower, lowest_site(self.adapters, tower))
        refuse_wrong_cut(cut, self.adapters)
        return cut

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        with self.adapters.attach(self.base):
            yield

    @contextlib.contextmanager
    def at_alpha(self, alpha: float, logit_scale: float) -> Iterator[DualEncoder]:
        flags = [one.requires_grad for one in self.adapters.parameters()]
        model = DomainAdapted(
            self.base, self.adapters, gate=self.gate, memory=self.memory, logit_scale=logit_scale
        )  # fmt: skip
        model.alpha = alpha
        model.states_below = self.states_below
        try:
            yield model
        finally:
            model.alpha = 1.0
            for one, flag in zip(self.adapters.parameters(), flags, strict=True):
                one.requires_grad_(flag)

    def save(self, folder: Path, logit_scale: float, *, card: str, **facts: Any) -> None:
        options: dict[str, Any] = {"base": self.base, "gate": self.gate, "memory": self.memory}
        save_domain(folder, self.adapters, **options, logit_scale=logit_scale, card=card, **facts)


class Full(Method):
    """Continual fine-tuning of all weights of both towers; its dial mixes weights (WiSE-FT, arXiv 2109.01903).

    The statistics of batch norms stay as they are, as small data would spoil them.
    """

    label = "continual fine-tuning"

    def __init__(self, base: DualEncoder, recipe: DomainRecipe) -> None:
        super().__init__(base, recipe)
        self.model = base.model
        in_towers = _in_towers(base)
        for name, parameter in base.model.named_parameters():
            parameter.requires_grad_(in_towers(name) and parameter.is_floating_point())
        self._before: dict[str, Tensor] = {
            name: one.detach().clone() for name, one in base.model.state_dict().items() if one.is_floating_point()
        }

    def cut(self, tower: TowerName) -> None:
        return None

    @contextlib.contextmanager
    def at_alpha(self, alpha: float, logit_scale: float) -> Iterator[DualEncoder]:
        model, before = self.base.model, self.base.logit_scale
        current = {name: one.detach().clone() for name, one in model.state_dict().items()}
        mixed = {name: torch.lerp(one, current[name], alpha) for name, one in self._before.items()}
        if isinstance(scale := getattr(model, "logit_scale", None), Tensor):
            mixed["logit_scale"] = torch.full_like(scale, math.log(logit_scale)).detach()
        self.base.logit_scale = logit_scale
        try:
            model.load_state_dict(current | mixed)
            yield self.base
        finally:
            self.base.logit_scale = before
            model.load_state_dict(current)


class Lora(Method):
    """Low-rank updates by `peft` on the modules that the recipe names; its dial scales them."""

    label = "LoRA"

    def __init__(self, base: DualEncoder, recipe: DomainRecipe) -> None:
        super().__init__(base, recipe)
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ModelError("method=lora needs peft: pip install 'trimtab[peft]'") from error
        options: dict[str, Any] = {
            "r": recipe.lora.rank,
            "lora_alpha": recipe.lora.alpha,
            "target_modules": "|".join(map(re.escape, self._targets())),
        }
        inject_adapter_in_model(LoraConfig(**options), base.model)
        base.model.eval()
        # They alone, as the frozen rest need not be in every checkpoint.
        self.updates = nn.ParameterDict(
            {name.replace(".", "|"): one for name, one in base.model.named_parameters() if "lora_" in name}
        )

    @property
    def base_parameters(self) -> int:
        return super().base_parameters - self.trained_parameters

    def cut(self, tower: TowerName) -> TowerCut | None:
        touched = {name.replace("|", ".") for name in self.updates}
        cut = TowerCut(self.base, tower, None)
        if any(name.startswith(f"{path}.") for name in touched for path in cut.paths_below()):
            places = [*self._sites(tower, "blocks"), *self._sites(tower, "layers")]
            lowest = (site for site in places if any(name.startswith(f"{site.path}.") for name in touched))
            cut = TowerCut(self.base, tower, next(lowest, None))
        try:
            refuse_wrong_cut(cut)
        except RecipeError:  # updates in the embeddings, or in a projection alone
            return None
        return cut

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        # PyTorch's fused layer would read the frozen weights past the updates.
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(before)

    @contextlib.contextmanager
    def at_alpha(self, alpha: float, logit_scale: float) -> Iterator[DualEncoder]:
        layers = [layer for _, layer in self._layers()]
        before = self.base.logit_scale
        for layer in layers:
            layer.scale_layer(alpha)
        self.base.logit_scale = logit_scale
        try:
            with self.at_work():
                yield self.base
        finally:
            self.base.logit_scale = before
            for layer in layers:
                layer.unscale_layer()

    def save(self, folder: Path, logit_scale: float, *, card: str, **facts: Any) -> None:
        model = self.base.model
        for name, layer in self._layers():
            layer.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer.get_base_layer())
        if isinstance(scale := getattr(model, "logit_scale", None), Tensor):
            with torch.no_grad():
                scale.fill_(math.log(logit_scale))
        self.base.save_pretrained(folder)
        write_text(folder / CARD_FILE, card)

    def _targets(self) -> list[str]:
        model, lora = self.base.model, self.recipe.lora
        endings = tuple(f".{target}" for target in lora.targets)
        in_towers = _in_towers(self.base)
        below = [f"{site.path}." for site in self._sites("image", "blocks")[: lora.first_block or 0]]
        named = [
            name
            for name, module in model.named_modules()
            if f".{name}".endswith(endings)
            and in_towers(name)
            and isinstance(module, (nn.Linear, nn.Conv2d))
            # Its attention reads the weights of this part without calling it.
            and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
            and not name.startswith(tuple(below))
        ]
        if not named:
            raise RecipeError(f"lora.targets={list(lora.targets)}: no name of a layer of {self.base.name} ends so")
        return named

    def _layers(self) -> list[tuple[str, Any]]:
        from peft.tuners.lora import LoraLayer

        return [(name, one) for name, one in self.base.model.named_modules() if isinstance(one, LoraLayer)]

    def _sites(self, tower: TowerName, part: PartName) -> list[Site]:
        try:
            return sites(self.base, tower, part)
        except RecipeError:  # not every tower has convolutional blocks
            return []


class Probe(Method):
    """One linear map on the features of each frozen tower, from the identity on; saved within the projections.

    No classifier over fixed classes, as linear probes often are: both towers stay usable for any text.
    """

    label = "linear probe"

    def __init__(self, base: DualEncoder, recipe: DomainRecipe) -> None:
        super().__init__(base, recipe)
        self._projections: dict[TowerName, nn.Linear] = {}
        self.heads = nn.ModuleDict()
        for tower, names in PROJECTIONS.items():
            found = [one for name in names if isinstance(one := getattr(base.model, name, None), nn.Linear)]
            if not found:
                raise RecipeError(f"method=probe needs a base with projections; {base.name} ({base.family}) has none")
            self._projections[tower] = found[0]
            head = nn.Linear(base.embedding_dim, base.embedding_dim, bias=False)
            nn.init.eye_(head.weight)
            self.heads[tower] = head
        self.heads.to(base.device)

    def cut(self, tower: TowerName) -> TowerCut:
        return TowerCut(self.base, tower, None)

    def head(self, tower: TowerName) -> nn.Module:
        return self.heads[tower]

    @contextlib.contextmanager
    def at_alpha(self, alpha: float, logit_scale: float) -> Iterator[DualEncoder]:
        model, before = self.base.model, self.base.logit_scale
        parameters: list[Tensor] = [one for projection in self._projections.values() for one in projection.parameters()]
        if isinstance(scale := getattr(model, "logit_scale", None), Tensor):
            parameters.append(scale)
        kept = [one.detach().clone() for one in parameters]
        with torch.no_grad():
            if isinstance(scale, Tensor):
                scale.fill_(math.log(logit_scale))
            for tower, projection in self._projections.items():
                head = self.heads[tower].get_parameter("weight")
                for one in (projection.weight, projection.bias):
                    if one is not None:
                        one.copy_(torch.lerp(one, head @ one, alpha))
        self.base.logit_scale = logit_scale
        try:
            yield self.base
        finally:
            self.base.logit_scale = before
            with torch.no_grad():
                for one, was in zip(parameters, kept, strict=True):
                    one.copy_(was)


def _in_towers(base: DualEncoder) -> Callable[[str], bool]:
    """Whether a module or parameter of that name is of one of the towers: FLAVA has layers that no features pass."""
    towers: tuple[TowerName, ...] = ("image", "text")
    paths = [path for tower in towers for path in TowerCut(base, tower, None).paths_below()]
    return lambda name: any(name == path or name.startswith(f"{path}.") for path in paths)


METHODS: dict[str, type[Method]] = {"adapter": Adapters, "full": Full, "lora": Lora, "probe": Probe}
