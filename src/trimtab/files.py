"""Files that are either whole or absent: atomic writes, digests, the cache folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError


def cache_home() -> Path:
    """Folder for fetched packages, built models and feature caches.

    ``TRIMTAB_CACHE`` when set, else ``trimtab`` below ``XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        TrimtabError: it lies below a home folder, and the user has none, as in many containers.
    """
    try:
        if explicit := os.environ.get("TRIMTAB_CACHE"):
            return Path(explicit).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"
    except RuntimeError as error:
        raise TrimtabError(
            "there is no home folder for the cache: set TRIMTAB_CACHE to a folder that you may write to"
        ) from error


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


_DENIED = "permission denied: choose a folder that you may write to"
if os.name == "nt":
    _DENIED = f"permission denied, or another program has it open: stop that, or {_DENIED.partition(': ')[2]}"
_LOCK_DENIED = (
    "permission denied: where several users share the folder, each of them needs umask 002, and the folder their group "
    "and mode 2775 (chgrp, chmod); or choose a folder that you may write to"
)
_NO_LOCKS = (
    "its disk does not support file locks: mount it with them (flock of Lustre, lockd or version 4 of NFS), or choose "
    "a folder on another disk"
)


@contextlib.contextmanager
def explain_disk_errors(target: Path) -> Iterator[None]:
    """Turn "no space", "read-only", "denied", "no locks", files in the way and names that cannot be into messages with
    the file and the remedy.

    Raises:
        TrimtabError: in place of the OSError, or of an error that speaks of one, as those of safetensors do; other
            errors pass through.
    """
    remedies = {
        errno.ENOSPC: "the disk is full: free some space or choose another folder",
        errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.EACCES: _DENIED,
        errno.ENAMETOOLONG: "its name is too long: choose a shorter one",
        errno.ELOOP: "its links lead in a circle: choose another place",
        errno.EEXIST: "it is, or lies below, a file: choose another folder",
        errno.ENOTDIR: "it is, or lies below, a file: choose another folder",
        **dict.fromkeys((errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS), _NO_LOCKS),
    }
    try:
        yield
    except Exception as error:
        named = None if isinstance(error, OSError) else re.search(r"\(os error (\d+)\)$", str(error))
        number = int(named[1]) if named else getattr(error, "errno", None)
        remedy = remedies.get(number) if isinstance(number, int) else None
        if remedy is None:
            raise
        if number == errno.EACCES and os.name != "nt" and str(getattr(error, "filename", "")).endswith(".lock"):
            remedy = _LOCK_DENIED
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


@contextlib.contextmanager
def atomic_folder(target: str | Path, last: str) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target` when the block ends without error.

    What lies there stays until then, and after an error; a link is followed. One process at a time: leftovers of one
    that was killed are cleared away. A folder that has to stay where it is, such as the mount point of a volume or the
    current folder, is emptied and filled file by file.

    Args:
        last: name of the file that says that the folder is whole; file by file, it goes first and comes last.

    Raises:
        TrimtabError: another process writes this folder, the disk is full, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    target = Path(target).resolve()
    with explain_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        place = target if _is_fixed(target) else target.parent
        lock = FileLock(_scratch_of(target, place)[2])
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise TrimtabError(f"another process is writing {target}: wait for it, or stop it") from None
        try:
            new, old, _ = _scratch_of(target, target if _is_current(target) else place)
            if old.is_dir() and not target.exists():
                old.rename(target)
            for left in (new, old):
                shutil.rmtree(left, ignore_errors=True)
            new.mkdir()
            try:
                yield new
                _put_in_place(new, target, last)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        finally:
            lock.release()


def replaceable(target: Path, last: str) -> bool:
    """Whether `atomic_folder` may write to `target`: nothing is there, or what it wrote before."""
    new, old, lock = _scratch_of(target.resolve(), target)

    def is_ours() -> bool:
        return (target / last).is_file() or old.is_dir()

    try:  # twice, as another process may be replacing it
        return is_ours() or not set(target.iterdir()) - {new, old, lock} or is_ours()
    except (FileNotFoundError, NotADirectoryError):
        return not target.is_file()


def _scratch_of(target: Path, place: Path) -> tuple[Path, Path, Path]:
    """Where the new folder is built, where the old one waits, and the lock."""
    new, old, lock = (place / f".{target.name}.{word}" for word in ("new", "old", "lock"))
    return new, old, lock


def _is_fixed(target: Path) -> bool:
    """Whether it is a folder that cannot be renamed."""
    return target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK))


def _is_current(target: Path) -> bool:
    """Whether a shell would be left in a folder that is gone if this one were renamed."""
    return target.is_dir() and target.samefile(os.curdir)


def _put_in_place(new: Path, target: Path, last: str) -> None:
    if new.parent == target:
        _fill(new, target, last)
        return
    old = new.with_suffix(".old")
    try:
        if target.exists():
            target.rename(old)
    except OSError:  # a mount point of the same disk
        inside = target / new.name
        try:
            shutil.move(new, inside)
            _fill(inside, target, last)
        finally:
            shutil.rmtree(inside, ignore_errors=True)
        return
    try:
        new.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _fill(new: Path, target: Path, last: str) -> None:
    """Exchange the content of `target`, by renames, for that of `new` inside it."""
    scratch = _scratch_of(target, target)
    old = scratch[1]

    def move(source: Path, to: Path, *, whole: bool) -> None:
        found = [path for path in source.iterdir() if path not in scratch]
        for path in sorted(found, key=lambda path: (path.name == last) == whole):
            path.rename(to / path.name)

    old.mkdir()
    try:
        move(target, old, whole=False)
        try:
            move(new, target, whole=True)
        except BaseException:
            move(target, new, whole=False)
            raise
    except BaseException:
        move(old, target, whole=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def open_up(folder: str | Path) -> None:
    """Give all files in a folder the rights of ordinary new ones: those of safetensors are closed to other users."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~_umask())


def plain_name(name: Any) -> str:
    """A name of a file that lies in the folder of the description that names it.

    Raises:
        ValueError: it leads to another place, on this system or on another.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
        raise ValueError(f"{name!r} is no plain file name")
    return name


def write_text(target: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(target: str | Path, value: Any) -> None:
    """Write JSON atomically, with keys in the order given and non-ASCII text readable."""
    write_text(target, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_description(path: Path, schema: int, error: type[TrimtabError], again: str) -> dict[str, Any]:
    """A JSON description of a schema that is known; the schema is looked at before all else, as newer ones may differ.

    Args:
        schema: the newest that is known.
        error: the kind of error to raise.
        again: the remedy where it is damaged.

    Raises:
        TrimtabError: as `error`; damaged, not ours, or of a newer schema.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path} is damaged ({problem}): {again}") from problem
    if not isinstance(raw, dict):
        raise error(f"{path} is not a JSON object: it was not written by trimtab")
    found = raw.get("schema_version")
    if type(found) is not int or found < 1:
        raise error(f"{path} is damaged (it has no valid schema_version): {again}")
    if found > schema:
        raise error(f"{path} has schema {found}; this trimtab reads up to {schema}. {upgrade_from(raw)}")
    return raw


def upgrade_from(description: dict[str, Any]) -> str:
    """Who wrote a description that is newer than this version, and what to do."""
    versions = description.get("versions")  # of whatever shape newer schemas have
    writer = versions.get("trimtab", "a newer version") if isinstance(versions, dict) else "a newer version"
    return f"It was written by trimtab {writer}: upgrade this one to at least that version"


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


def _listed_umask() -> int | None:
    """The umask where the system lists it, None elsewhere."""
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next((int(line.split()[1], 8) for line in lines if line.startswith("Umask:")), None)
    return None


def _umask_by_change() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# A umask can be asked for only by setting another one, and files that other threads make meanwhile would be open to
# everybody. So it is read where it is listed (Linux); elsewhere once, here, before there are threads.
_UMASK = _umask_by_change() if _listed_umask() is None else None


def _umask() -> int:
    if _UMASK is not None:
        return _UMASK
    found = _listed_umask()
    return 0o077 if found is None else found  # unreadable all of a sudden: rather too closed than too open
