"""Recipes as frozen dataclasses: a configuration that exists is valid.

`load_recipe` reads YAML plus ``key=value`` overrides; the dataclasses of the modules beside this one, one
per link, are the whole vocabulary. Each checks itself when made and says which value is wrong and what is allowed.
Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from trimtab import strict_yaml
from trimtab.config.domain import (
    LARGEST_SCALE,
    ContrastiveConfig,
    DomainAdapterConfig,
    DomainData,
    DomainRecipe,
    GateConfig,
    LoraConfig,
    MapViewsConfig,
    MemoryBankConfig,
    PairSource,
    ViewsConfig,
)
from trimtab.config.language import (
    DistillationConfig,
    LanguageAdapterConfig,
    LanguageData,
    LanguageRecipe,
    StudentConfig,
    TextSource,
)
from trimtab.config.prompt import (
    ContextConfig,
    DomainPartConfig,
    GeneralConfig,
    InstanceConfig,
    LabelSource,
    PromptConfig,
    PromptData,
    PromptObjective,
    PromptRecipe,
)
from trimtab.config.training import TrainingConfig
from trimtab.errors import RecipeError
from trimtab.strict_yaml import from_mapping, to_mapping, to_yaml

__all__ = [
    "LARGEST_SCALE",
    "RECIPES",
    "ContextConfig",
    "ContrastiveConfig",
    "DistillationConfig",
    "DomainAdapterConfig",
    "DomainData",
    "DomainPartConfig",
    "GateConfig",
    "GeneralConfig",
    "InstanceConfig",
    "LabelSource",
    "LanguageAdapterConfig",
    "LanguageData",
    "LanguageRecipe",
    "LoraConfig",
    "MapViewsConfig",
    "MemoryBankConfig",
    "PairSource",
    "PromptConfig",
    "PromptData",
    "PromptObjective",
    "PromptRecipe",
    "Recipe",
    "StudentConfig",
    "TextSource",
    "TrainingConfig",
    "ViewsConfig",
    "from_mapping",
    "load_recipe",
    "recipe_from_mapping",
    "to_mapping",
    "to_yaml",
]

Recipe: TypeAlias = LanguageRecipe | DomainRecipe | PromptRecipe
"""Any recipe; grows into a union with each link."""

RECIPES: dict[str, type[Recipe]] = {"language": LanguageRecipe, "domain": DomainRecipe, "prompt": PromptRecipe}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply ``key=value`` overrides.

    Raises:
        RecipeError: the file is missing or unreadable, is no UTF-8 or no YAML, or describes no valid recipe.
    """
    path = Path(path)
    if path.parent == Path("recipes") and not path.exists():  # away from a clone
        path = shipped_recipe(path.name) or path
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"recipe {path} does not exist; recipes/ has examples to start from") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from error
    return recipe_from_mapping(strict_yaml.parse(text, str(path)), str(path), overrides)


def shipped_recipe(name: str) -> Path | None:
    """A recipe that comes with trimtab, from the repository or from the installed package; None if there is none."""
    package = Path(__file__).parents[1]
    places = (package.parents[1] / "recipes" / name, package / "recipes" / "yaml" / name)
    return next((place for place in places if place.is_file()), None)


def recipe_from_mapping(mapping: Any, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """Build the recipe that `mapping` describes; its ``link`` decides which kind.

    Args:
        where: what to call the mapping in messages.

    Raises:
        RecipeError: see `load_recipe`.
    """
    if not isinstance(mapping, dict):
        found = "nothing" if mapping is None else f"a {type(mapping).__name__}"
        raise RecipeError(f"{where}: a recipe is a mapping with the key 'link', but this holds {found}")
    link = mapping.get("link")
    for override in overrides:
        if override.startswith("link="):
            link = override.removeprefix("link=").strip()
    recipe = RECIPES.get(link) if isinstance(link, str) else None
    if recipe is None:
        problem = "has no key 'link'" if link is None else f"link={link!r:.60} is unknown"
        raise RecipeError(f"{where}: {problem}; link is one of {_names(RECIPES)}")
    merged = strict_yaml.apply_overrides(recipe, mapping, overrides)
    return from_mapping(recipe, merged, where)


def _names(choices: Collection[str]) -> str:
    return ", ".join(repr(choice) for choice in choices)
