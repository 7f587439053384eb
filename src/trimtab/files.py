"""Files that are either whole or absent: atomic writes, digests, the cache folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError


def cache_home() -> Path:
    """Folder for fetched packages, built models and feature caches.

    ``TRIMTAB_CACHE`` when set, else ``trimtab`` below ``XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if explicit := os.environ.get("TRIMTAB_CACHE"):
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"


@contextlib.contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `target` that replaces it when the block ends without error.

    The bytes are flushed to disk before the rename, so that after a kill or a power cut `target` is either
    the old file or the new one, never a part. Of a link what it leads to is replaced. Into a pipe or a device, which
    cannot be replaced, the bytes are written when they are whole.
    """
    target = Path(target)
    with explain_disk_errors(target):
        special = is_special(target)
        if special:
            folder = Path(tempfile.gettempdir())
        else:
            target = followed(target)
            folder = target.parent
            folder.mkdir(parents=True, exist_ok=True)
        # Of the name only the start, as with the rest it could be longer than a name can be.
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{target.name[:40]}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        with explain_disk_errors(target):
            yield temporary
            if special:
                with temporary.open("rb") as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
                return
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def followed(path: Path) -> Path:
    """What a link leads to, whether that is there or not; any other path as it is."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def is_special(path: Path) -> bool:
    """Whether `path` is, or leads to, a pipe, a terminal or a device: something to write into, not to replace."""
    return path.exists() and not (path.is_file() or path.is_dir())


@contextlib.contextmanager
def explain_disk_errors(target: Path) -> Iterator[None]:
    """Turn "no space", "read-only", "denied" and names that cannot be into messages with the file and the remedy.

    Raises:
        TrimtabError: in place of the OSError; other errors pass through.
    """
    remedies = {
        errno.ENOSPC: "the disk is full: free some space or choose another folder",
        errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.EACCES: "permission denied: choose a folder that you may write to",
        errno.ENAMETOOLONG: "its name is too long: choose a shorter one",
        errno.ELOOP: "its links lead in a circle: choose another place",
    }
    try:
        yield
    except OSError as error:
        # safetensors wraps the OS error in text, so the number is not always there.
        remedy = remedies.get(error.errno or 0)
        if remedy is None:
            raise
        raise TrimtabError(f"cannot write {target}: {remedy}; files written before are intact") from error


def build_folder(folder: Path, last: str, build: Callable[[Path], object]) -> Path:
    """Have `build` fill a folder, unless it is there already; it is then whole, or absent.

    Safe to call from several processes: one builds, the others wait for it.

    Args:
        last: name of a file that `build` writes; a folder with it is whole.
        build: gets the path of an empty folder, which becomes `folder`.

    Raises:
        TrimtabError: the disk is full or the folder cannot be written.
    """
    from filelock import FileLock

    if (folder / last).exists():
        return folder
    with explain_disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / last).exists():
                # One level down: the temporary folder itself is closed to other users.
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".build-") as scratch:
                    built = Path(scratch) / "built"
                    built.mkdir()
                    build(built)
                    open_up(built)
                    shutil.rmtree(folder, ignore_errors=True)
                    built.rename(folder)
    return folder


def open_up(folder: str | Path) -> None:
    """Give all files in a folder the rights of ordinary new ones: those of safetensors are closed to other users."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~_umask())


def write_text(target: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: str | Path, value: Any) -> None:
    """Write JSON atomically, with keys in the order given and non-ASCII text readable."""
    write_text(target, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def sha256_of(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(*parts: str | bytes) -> str:
    """Hex SHA-256 over parts, unambiguous about where one part ends and the next begins."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
