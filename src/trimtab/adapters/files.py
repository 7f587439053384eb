"""Adapted folders: a few small files that name their base by fingerprint, never a copy of it.

``adapter.safetensors`` holds the trained tensors, ``adapter.json`` everything else, ``README.md`` is the
model card. Reading is strict: a folder is whole, finite and of a known schema, or it is refused. No pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import platform
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from trimtab.config import from_mapping
from trimtab.errors import DataError, ModelError, RecipeError
from trimtab.files import atomic_path, read_description, upgrade_from

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trimtab.towers.dual_encoder import DualEncoder

logger = logging.getLogger(__name__)
_Module = TypeVar("_Module", bound="nn.Module")
_Config = TypeVar("_Config")

SCHEMA_VERSION = 2  # 1 was that of trimtab 0.1, which knew no `text_input_digest` and no `image_input_digest`
TENSORS_FILE = "adapter.safetensors"
DESCRIPTION_FILE = "adapter.json"
CARD_FILE = "README.md"
COMPOSED_FILE = "composed.json"
_REQUIRED = ("schema_version", "link", "base", "config", "tensors", "tensors_sha256")


class Fingerprinted(Protocol):
    """Anything with a name and a fingerprint: a `DualEncoder`, a `TextEncoder`."""

    name: str

    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class BaseReference:
    """The base that an adapter fits.

    Attributes:
        text_input_digest, image_input_digest: see `DualEncoder`; "" in folders that do not say.
    """

    name: str
    fingerprint: str
    family: str = ""
    embedding_dim: int = 0
    text_input_digest: str = ""
    image_input_digest: str = ""

    @classmethod
    def of(cls, base: DualEncoder) -> BaseReference:
        """The reference to a loaded base."""
        digests = (base.text_input_digest, base.image_input_digest)
        return cls(base.name, base.fingerprint, base.family, base.embedding_dim, *digests)


@dataclass(frozen=True)
class StudentReference:
    """The frozen text encoder below a language adapter, and how its states are taken."""

    name: str
    fingerprint: str
    prefix: str = ""
    layers: tuple[int, ...] = (-1,)
    max_tokens: int | None = None


@dataclass(frozen=True)
class AdapterFile:
    """What an adapted folder says.

    Attributes:
        link: "language", "domain" or "prompt".
        config: sizes and options from which the adapter module is built again.
        tensors: the module's state, on the CPU; empty if only the description was read.
        tokenizer: what is known of the student's tokenizer.
        versions: of the packages that wrote the folder.
        recipe: the resolved recipe.
        data: digests and counts of the training data.
        metrics: as measured at the end of training.
    """

    folder: Path
    link: str
    config: dict[str, Any]
    base: BaseReference
    student: StudentReference | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def is_adapted_folder(folder: str | Path) -> bool:
    """Whether a folder claims to be an adapted model."""
    return (Path(folder) / DESCRIPTION_FILE).is_file()


def is_composed_folder(folder: str | Path) -> bool:
    """Whether a folder claims to be several links together; see `trimtab.adapters.composing`."""
    return (Path(folder) / COMPOSED_FILE).is_file()


def save_adapter(
    folder: str | Path,
    *,
    link: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    base: BaseReference,
    student: StudentReference | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    card: str = "",
) -> Path:
    """Write an adapted folder. Each file is replaced as a whole, and a mixture of old and new is never read.

    Args:
        tensors: the adapter module's ``state_dict()``.
        config: JSON values; numbers that are not finite become null here and in `metrics`.
        card: text of the model card.

    Raises:
        ModelError: a tensor holds NaN or infinity, or there is none.
        TrimtabError: the disk is full or the folder cannot be written.
    """
    from safetensors.torch import save

    folder = Path(folder)
    if not tensors:
        raise ModelError(f"{folder}: there are no tensors to save")
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    _refuse_not_finite(folder, state)
    payload = save(state)
    description = {
        "schema_version": SCHEMA_VERSION,
        "link": link,
        "base": asdict(base),
        "student": asdict(student) if student else None,
        "tokenizer": dict(tokenizer or {}),
        "config": dict(config),
        "tensors": {name: list(tensor.shape) for name, tensor in sorted(state.items())},
        "tensors_sha256": hashlib.sha256(payload).hexdigest(),
        "data": dict(data or {}),
        "recipe": dict(recipe or {}),
        "metrics": dict(metrics or {}),
        "versions": _versions(),
    }
    text = json.dumps(_finite(description), ensure_ascii=False, indent=2, allow_nan=False, default=str)
    files = {DESCRIPTION_FILE: (text + "\n").encode(), TENSORS_FILE: payload}
    if card:
        files[CARD_FILE] = card.encode()
    # All are written before the first is renamed; the description, entered first, is renamed last.
    with contextlib.ExitStack() as stack:
        for name, content in files.items():
            stack.enter_context(atomic_path(folder / name)).write_bytes(content)
    return folder


def read_adapter(folder: str | Path, *, tensors: bool = True) -> AdapterFile:
    """Read and check an adapted folder.

    Args:
        tensors: False reads the description alone, fast and without torch.

    Raises:
        ModelError: not an adapted folder, of a newer schema, damaged, or with tensors that are not those that
            the description lists; the message names file and remedy.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise ModelError(f"{folder} is not an adapted folder: it has no {DESCRIPTION_FILE}")
    raw = read_description(path, SCHEMA_VERSION, ModelError, "copy the folder again")
    if missing := [key for key in _REQUIRED if key not in raw]:
        raise ModelError(f"{path} lacks {', '.join(missing)}: copy the folder again")
    refuse_newer(raw, path)
    try:
        student = raw.get("student")
        described = AdapterFile(
            folder=folder,
            link=str(raw["link"]),
            config=dict(raw["config"]),
            base=BaseReference(**raw["base"]),
            student=StudentReference(**{**student, "layers": tuple(student["layers"])}) if student else None,
            tensors=_read_tensors(folder / TENSORS_FILE, raw) if tensors else {},
            **{key: dict(raw.get(key) or {}) for key in ("tokenizer", "versions", "recipe", "data", "metrics")},
            schema_version=raw["schema_version"],
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} has a value of a wrong kind ({error}): copy the folder again") from error
    return described


def refuse_newer(description: dict[str, Any], path: Path) -> None:
    """Refuse a description that says more of its base or student than is known here.

    Raises:
        ModelError: naming the keys and the version that wrote it.
    """
    for role, kind in (("base", BaseReference), ("student", StudentReference)):
        found = description.get(role)
        if not isinstance(found, dict) or "fingerprint" not in found:
            continue
        if unknown := sorted(found.keys() - {one.name for one in fields(kind)}):
            raise ModelError(
                f"{path}: {', '.join(unknown)} of the {role} is not known to this trimtab. {upgrade_from(description)}"
            )


def rebuilt(adapter: AdapterFile, build: Callable[[], _Module]) -> _Module:
    """The module of an adapted folder with its tensors.

    Args:
        build: makes it by what the description says; it is called twice.

    Raises:
        ModelError: names or shapes differ, or sizes are described that no module can have.
    """
    import torch

    # A description of some lines can ask for any memory: none is taken before its sizes are known to be the tensors'.
    try:
        with torch.device("meta"):
            check_fit(build(), adapter)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        where = adapter.folder / DESCRIPTION_FILE
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{where} has a wrong size ({reason}): copy the folder again") from error
    with torch.random.fork_rng(devices=[]):  # the random weights that it starts with are not the caller's draw
        module = build()
    load_into(module, adapter)
    return module


def load_into(module: nn.Module, adapter: AdapterFile) -> None:
    """Put an adapter's tensors into its module: all of them, and nothing else.

    Raises:
        ModelError: names or shapes differ.
    """
    check_fit(module, adapter)
    module.load_state_dict(adapter.tensors)


def check_fit(module: nn.Module, adapter: AdapterFile) -> None:
    """Refuse tensors that are not those of a module.

    Raises:
        ModelError: names or shapes differ.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    if problem := _differences(found, expected):
        raise ModelError(
            f"{adapter.folder / TENSORS_FILE} does not fit the {adapter.link} adapter that "
            f"{DESCRIPTION_FILE} describes: {problem}"
        )


def find_place(folder: str | Path, role: str, name: str) -> str:
    """Where the base or student of an adapted folder is now.

    If its folder is not where the adapted folder says, as on another machine, one of that name beside the
    adapted folder is taken. Whether it is the same is for `check_base` and `check_student` to say.

    Args:
        role: "base" or "student", as `trimtab.load` calls it.
        name: what the adapted folder calls it; hub ids and built-in models have no place.

    Raises:
        ModelError: it is not there either; names both places.
    """
    by_system = (PurePosixPath(name), PureWindowsPath(name))
    absolute = next((path for path in by_system if path.is_absolute()), None)
    if absolute is None or Path(name).exists():
        return name
    here = Path(folder).resolve()
    above = here.parent.parent if is_composed_folder(here.parent) else here.parent
    beside = above / absolute.name
    if beside.is_dir() and beside != here:
        logger.warning("%s names the %s %r, and there is no such folder: %s is taken", folder, role, name, beside)
        return str(beside)
    raise ModelError(
        f"{folder} names the {role} {name!r}, and there is no such folder: put it there or at {beside}, or say "
        f"where it is now: trimtab relocate {shlex.quote(str(folder))} --{role} ..., or {role}=... of trimtab.load"
    )


def lasting_place(folder: Path | None) -> Path | None:
    """The folder as it is called from anywhere: the current one may be another when a model is saved."""
    return None if folder is None else folder.resolve()


def saved_folder(folder: Path | None, how: str) -> Path:
    """The adapted folder that a model was loaded from.

    Args:
        how: to get one, for a model that has none.

    Raises:
        ModelError: the model was never saved, or its folder was moved or deleted since.
    """
    if folder is None:
        raise ModelError(f"this adapted model was never saved: {how}")
    if not (folder / DESCRIPTION_FILE).is_file():
        raise ModelError(f"{folder}, which this model was loaded from, is not there any more: load it from where it is")
    return folder


def copy_adapted(folder: Path, target: str | Path) -> None:
    """Copy the files of an adapted folder, and no others that lie in it."""
    for path in folder.iterdir():
        if path.name in (DESCRIPTION_FILE, TENSORS_FILE, CARD_FILE):
            shutil.copy(path, target)


def check_base(adapter: AdapterFile, base: DualEncoder) -> None:
    """Refuse a base that the adapter was not trained on.

    Raises:
        ModelError: naming both models and both fingerprints, or what prepares texts or pictures otherwise.
    """
    _check_same(adapter, "base", adapter.base, base)
    check_inputs(adapter, base)


def check_inputs(adapter: AdapterFile, base: DualEncoder) -> None:
    """Refuse a base whose texts or pictures are prepared otherwise than when the adapter was trained.

    Raises:
        ModelError: naming both models and what differs.
    """
    for what, key in (("tokenizer or context length", "text_input_digest"), ("image processor", "image_input_digest")):
        wanted = getattr(adapter.base, key)
        if wanted and wanted != getattr(base, key):
            raise ModelError(
                f"{adapter.folder} was trained on the base {adapter.base.name!r} with another {what} than "
                f"{base.name!r} has: load it with its own base, or train it again on this one"
            )


def check_student(adapter: AdapterFile, student: Fingerprinted) -> None:
    """Refuse a student that the adapter was not trained on.

    Raises:
        ModelError: naming both models and both fingerprints.
    """
    if adapter.student is None:
        raise ModelError(f"{adapter.folder} is a {adapter.link} adapter without a student")
    _check_same(adapter, "student", adapter.student, student)


def _check_same(
    adapter: AdapterFile, role: str, wanted: BaseReference | StudentReference, found: Fingerprinted
) -> None:
    if wanted.fingerprint != found.fingerprint:
        raise ModelError(
            f"{adapter.folder} was trained on the {role} {wanted.name!r} (fingerprint "
            f"{wanted.fingerprint[:16]}), not on {found.name!r} (fingerprint {found.fingerprint[:16]}): load "
            f"it with its own {role}, or train it again on this one"
        )


def _read_tensors(path: Path, raw: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        payload = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror or error}): copy the folder again") from error
    try:
        state = load(payload)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"{path} is damaged or cut short ({error}): copy the folder again") from error
    expected = {name: tuple(shape) for name, shape in raw["tensors"].items()}
    if problem := _differences({name: tuple(tensor.shape) for name, tensor in state.items()}, expected):
        raise ModelError(f"{path} does not hold what {DESCRIPTION_FILE} lists: {problem}")
    _refuse_not_finite(path, state)
    if hashlib.sha256(payload).hexdigest() != raw["tensors_sha256"]:
        raise ModelError(
            f"{path} and {DESCRIPTION_FILE} do not belong together (the checksum differs): copy the folder again"
        )
    return state


def _differences(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """What is missing, unexpected or misshapen, in words; empty if nothing is."""
    parts = []
    if missing := sorted(expected.keys() - found.keys()):
        parts.append(f"missing {_some(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        parts.append(f"unexpected {_some(unexpected)}")
    shapes = [
        f"{name} is {found[name]} rather than {expected[name]}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    if shapes:
        parts.append(_some(shapes))
    return "; ".join(parts)


def _some(names: Sequence[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _refuse_not_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if bad:
        raise ModelError(
            f"{path}: NaN or infinity in {_some(bad)}; the adapter cannot be used. Take an earlier "
            "checkpoint or train again with a lower learning rate"
        )


def _finite(value: Any) -> Any:
    """A copy with null for numbers that JSON cannot write."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("trimtab", "torch", "transformers", "tokenizers", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def from_config(cls: type[_Config], mapping: Any, adapter: AdapterFile) -> _Config:
    """Options out of an adapted folder's config.

    Raises:
        ModelError: an option that this version does not know, or a value that it refuses.
    """
    try:
        return from_mapping(cls, mapping, str(adapter.folder / DESCRIPTION_FILE))
    except RecipeError as error:
        raise ModelError(
            f"{error}. {upgrade_from({'versions': adapter.versions})}, or copy the folder again"
        ) from error


@contextlib.contextmanager
def reading_config(where: Path) -> Iterator[None]:
    """Within it, a missing or wrong value of a description's config is a `ModelError` that names the file.

    Args:
        where: the description.
    """
    try:
        yield
    except KeyError as error:
        raise ModelError(f"{where} lacks config {error}: copy the folder again") from error
    except (TypeError, ValueError, OverflowError, DataError) as error:
        raise ModelError(f"{where} has a wrong value ({error}): copy the folder again") from error
