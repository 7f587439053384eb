"""Put links together on one base, refuse what does not go together, and keep the result in one folder."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trimtab import __version__
from trimtab.adapters.adapted import LanguageAdapted, load_language, load_student, no_student
from trimtab.adapters.cards import card_head, shown_name
from trimtab.adapters.composed import LINKS, Composed
from trimtab.adapters.domain import DomainAdapted, load_domain
from trimtab.adapters.files import (
    CARD_FILE,
    COMPOSED_FILE,
    DESCRIPTION_FILE,
    TENSORS_FILE,
    AdapterFile,
    BaseReference,
    check_base,
    check_inputs,
    find_place,
    is_adapted_folder,
    is_composed_folder,
    read_adapter,
    refuse_newer,
)
from trimtab.adapters.prompted import load_prompt
from trimtab.errors import ModelError
from trimtab.files import atomic_folder, read_description, replaceable, write_json, write_text
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.hf import load_base, portable

SCHEMA_VERSION = 1


def load_composed(
    parts: Sequence[str | Path],
    *,
    aliases: Mapping[str, str] | None = None,
    base: str | Path | DualEncoder | None = None,
    student: Any = None,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Composed:
    """Put links together in memory.

    Args:
        parts: a base, adapted folders and composed folders, in any order. Without a base that which the links name.
        aliases: see `Composed`; those of a composed folder are kept.
        base, student: where they are now, or the loaded objects.

    Raises:
        ModelError: links that do not go together; the message says why.
    """
    names, found, known = _sort(parts)
    if student is not None and "language" not in found:
        raise ModelError(no_student(*parts))
    options: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    root = _root_name(names, found)
    if base is None and not names:
        root = find_place(parts[0], "base", root)
    loaded = base if isinstance(base, DualEncoder) else load_base(str(base or root), **options)
    for name in ("domain", "language"):
        if name in found:
            check_base(found[name], loaded)
    domain = language = prompt = None
    if "domain" in found:
        domain = load_domain(found["domain"], loaded, str(found["domain"].folder), found["domain"].folder)
    core: DualEncoder = domain or loaded
    if "language" in found:
        language = load_language(found["language"], core, load_student(found["language"], student=student, **options))
        core = language
    if "prompt" in found:
        described = found["prompt"]
        if len(parts) > 1 or not is_composed_folder(parts[0]):  # of that it was checked when it was made
            _check_prompt(described, loaded, domain, language)
        check_inputs(described, loaded)
        prompt = load_prompt(described, core, str(described.folder), described.folder)
    single = parts[0] if len(parts) == 1 and is_composed_folder(parts[0]) else None
    together = functools.partial(
        Composed,
        loaded,
        domain=domain,
        language=language,
        prompt=prompt,
        name=str(single) if single else "+".join([loaded.name, *(Path(one.folder).name for one in found.values())]),
        folder=Path(single) if single else None,
    )
    if single:  # new names are part of the fingerprint, so the folder is compared without them
        _check_fingerprint(together(aliases=known), Path(single))
    return together(aliases={**known, **(aliases or {})})


def _sort(parts: Sequence[str | Path]) -> tuple[list[str], dict[str, AdapterFile], dict[str, str]]:
    """Names of bases, the links by name in canonical order, and aliases of composed folders."""
    names: list[str] = []
    found: dict[str, AdapterFile] = {}
    aliases: dict[str, str] = {}
    for part in parts:
        if is_composed_folder(part):
            about = read_composed(part)
            folders = [Path(part) / name for name in about["links"]]
            aliases |= about["aliases"]
        elif is_adapted_folder(part):
            folders = [Path(part)]
        else:
            names.append(str(part))
            continue
        for folder in folders:
            described = read_adapter(folder)
            if described.link not in LINKS:
                raise ModelError(
                    f"{folder} is a {described.link} link, which replaces the way of the texts into a fusion "
                    f"transformer; what can be put together are {', '.join(LINKS)} links"
                )
            if described.link in found:
                raise ModelError(
                    f"{found[described.link].folder} and {folder} are both {described.link} links, and a model has "
                    "room for one: leave one out, or train one link on the data of both"
                )
            found[described.link] = described
    return names, {name: found[name] for name in LINKS if name in found}, aliases


def _root_name(names: list[str], found: Mapping[str, AdapterFile]) -> str:
    if len(names) > 1:
        raise ModelError(
            f"{' and '.join(map(repr, names))} are both no adapted folders, and one base is all that links can lie on. "
            "A model that was trained as a whole (method full, lora or probe) can only be the base"
        )
    if not found:
        raise ModelError(f"{names[0] if names else 'nothing'}: give at least one adapted folder to put on a base")
    if names:
        return names[0]
    for name in ("language", "domain"):
        if name in found:
            return found[name].base.name
    base = found["prompt"].base.name
    if is_adapted_folder(base) or is_composed_folder(base):
        raise ModelError(f"{found['prompt'].folder} was trained on {base}: give that folder too")
    return base


def _check_prompt(
    described: AdapterFile, base: DualEncoder, domain: DomainAdapted | None, language: LanguageAdapted | None
) -> None:
    """Refuse prompts that were trained on other towers than those that they would stand on."""
    towers = domain or base
    if described.base.fingerprint in _fingerprints(towers, language):
        return
    if domain is not None and (alpha := domain.alpha) != 1:  # the dial may have been turned after the prompts
        domain.alpha = 1.0
        same = _fingerprints(domain, language)
        domain.alpha = alpha
        if described.base.fingerprint in same:
            return
    own = described.base.name
    trained = f"{described.folder} holds prompts that were trained on {own!r}"
    if domain is not None and described.base.fingerprint in _fingerprints(base, language):
        raise ModelError(
            f"{trained}, without the domain link {domain.name}: its adapters move pictures and texts away from where "
            f"these prompts learned to find them. Train the prompts again with base={domain.name}, or leave one out"
        )
    if is_adapted_folder(own) or is_composed_folder(own):
        raise ModelError(f"{trained}, and that is not among the links: give that folder too, as it was then")
    check_base(described, towers)


def _fingerprints(towers: DualEncoder, language: LanguageAdapted | None) -> set[str]:
    """What prompts may name as their base, on these towers: prompts leave a further language as it is."""
    return {towers.fingerprint} | ({language.fingerprint_on(towers)} if language is not None else set())


# Files


def save_composed(model: Composed, folder: str | Path) -> Path:
    """Write a composed folder: ``composed.json`` and, in a folder for each link, the link's own files.

    Raises:
        ModelError: a link was never saved, or the folder holds something else.
        TrimtabError: another process writes the folder, the disk is full, or it cannot be written.
    """
    folder = Path(folder)
    if not replaceable(folder, COMPOSED_FILE):
        raise ModelError(f"{folder} holds something else than a composed model: choose another folder")
    base = replace(BaseReference.of(model.base), name=portable(model.base.name))
    about = {
        "schema_version": SCHEMA_VERSION,
        "base": asdict(base),
        "links": list(model.links),
        "aliases": model.aliases,
        "fingerprint": model.fingerprint,
        "versions": {"trimtab": __version__},
    }
    with atomic_folder(folder, COMPOSED_FILE) as built:
        for name, link in model.links.items():
            (built / name).mkdir()
            link._write(str(built / name))
        write_text(built / CARD_FILE, _card(model))
        write_json(built / COMPOSED_FILE, about)
    return folder


def read_composed(folder: str | Path) -> dict[str, Any]:
    """The description of a composed folder.

    Raises:
        ModelError: damaged, of a newer schema, or with the files of a link missing.
    """
    path = Path(folder) / COMPOSED_FILE
    raw = read_description(path, SCHEMA_VERSION, ModelError, "compose again, or copy the folder again")
    refuse_newer(raw, path)
    try:
        links = list(raw["links"])
        raw["base"] = asdict(BaseReference(**raw["base"]))
        raw["aliases"] = {str(name): str(own) for name, own in raw["aliases"].items()}
        raw["fingerprint"] = str(raw["fingerprint"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is damaged ({error}): compose again, or copy the folder again") from error
    for name in links:
        if name not in LINKS:
            raise ModelError(f"{path} names a link {name!r}, which is none of {', '.join(LINKS)}")
        for file in (DESCRIPTION_FILE, TENSORS_FILE):
            if not (Path(folder) / name / file).is_file():
                raise ModelError(f"{folder}/{name} lacks {file}: copy the folder again")
    return raw


def _check_fingerprint(model: Composed, folder: Path) -> None:
    if model.fingerprint != read_composed(folder)["fingerprint"]:
        raise ModelError(
            f"{folder} is not what was composed: the files of its links have changed since. Compose them again"
        )


def _card(model: Composed) -> str:
    lines = [f"- `{name}/`, from `{Path(link.name).name}`" for name, link in model.links.items()]
    aliases = f"\n{len(model.aliases)} other names of classes are in `{COMPOSED_FILE}`.\n" if model.aliases else ""
    student = [model.links["language"].student.name] if "language" in model.links else []
    head = card_head(["clip", *model.links], models=[model.base.name, *student])
    return (
        f"{head}\n# {' and '.join(model.links)} on {shown_name(model.base.name)}\n\nA model of Trimtab: adapters, "
        "without the base. `trimtab.load` on this folder gives it.\n\n" + "\n".join(lines) + f"\n{aliases}"
    )
