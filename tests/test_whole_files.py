from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab import files
from trimtab.errors import TrimtabError
from trimtab.files import (
    atomic_folder,
    atomic_path,
    build_folder,
    cache_home,
    digest_of,
    explain_disk_errors,
    replaceable,
    sha256_of,
    write_json,
    write_text,
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_cache_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRIMTAB_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_home() == tmp_path / "home" / ".cache" / "trimtab"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_home() == tmp_path / "xdg" / "trimtab"
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "own"))
    assert cache_home() == tmp_path / "own"
    monkeypatch.setenv("TRIMTAB_CACHE", "~/own")  # as a container's or a service's settings would say it
    assert cache_home() == tmp_path / "home" / "own"


@pytest.mark.skipif(os.name == "nt", reason="users of Windows have no entry in passwd")
@pytest.mark.parametrize("explicit", [None, "~/own"])
def test_a_user_without_a_home_is_told_of_the_variable(monkeypatch: pytest.MonkeyPatch, explicit: str | None) -> None:
    import pwd

    def absent(uid: int) -> None:
        raise KeyError(f"uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "TRIMTAB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    if explicit is not None:
        monkeypatch.setenv("TRIMTAB_CACHE", explicit)
    monkeypatch.setattr(pwd, "getpwuid", absent)
    with pytest.raises(TrimtabError, match="set TRIMTAB_CACHE"):
        cache_home()


# Atomic writes


def test_writing_makes_folders_and_leaves_one_file(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "text.txt"
    write_text(target, "猫\n")
    assert target.read_bytes() == "猫\n".encode()
    assert names_in(target.parent) == ["text.txt"]
    write_json(target, {"z": 1, "a": ["猫"]})
    assert target.read_text(encoding="utf-8") == '{\n  "z": 1,\n  "a": [\n    "猫"\n  ]\n}\n'


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "text.txt"
    write_text(target, "old")

    def fail() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert target.read_text() == "old"
    assert names_in(tmp_path) == ["text.txt"]


def test_the_target_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "text.txt"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent  # a rename across file systems is a copy
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for name in ("old.txt", "new.txt"):
        (tmp_path / name).symlink_to(Path("real", name))
    write_text(tmp_path / "real" / "old.txt", "old")
    for name in ("old.txt", "new.txt"):
        write_text(tmp_path / name, "written")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "real" / name).read_text() == "written"
    assert names_in(tmp_path / "real") == ["new.txt", "old.txt"]


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX pipe")
def test_pipes_are_written_into(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to("pipe")
    for path in (pipe, tmp_path / "link"):
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit(pipe.read_text)
            write_text(path, "text")
            assert read.result(10) == "text"
        assert pipe.is_fifo()
    assert names_in(tmp_path) == ["link", "pipe"]


def test_names_may_be_as_long_as_the_system_takes(tmp_path: Path) -> None:
    write_text(tmp_path / ("猫" * 83 + ".json"), "text")  # 254 bytes
    with pytest.raises(TrimtabError, match="its name is too long: choose a shorter one"):
        write_text(tmp_path / ("a" * 256), "text")


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "text.txt", "")
    finally:
        os.umask(old)
    assert (tmp_path / "text.txt").stat().st_mode & 0o777 == 0o640


def test_the_umask_is_never_changed_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that another thread makes in that moment would be open to everybody."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
    write_text(tmp_path / "text.txt", "")
    assert (tmp_path / "text.txt").is_file()


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_without_a_list_of_the_system_the_umask_is_that_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: int
) -> None:
    monkeypatch.setattr(files, "_UMASK", mask)
    write_text(tmp_path / "text.txt", "")
    assert (tmp_path / "text.txt").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.ENOLCK, "does not support file locks: mount it with them"),
        (errno.EOPNOTSUPP, "does not support file locks"),
        (errno.ENOSYS, "does not support file locks"),
    ],
)
def test_disk_errors_name_file_and_remedy(tmp_path: Path, number: int, words: str) -> None:
    target = tmp_path / "weights.safetensors"
    write_text(target, "old")
    with pytest.raises(TrimtabError, match=words) as caught, atomic_path(target):
        raise OSError(number, "as the system says it")
    assert str(target) in str(caught.value)
    assert target.read_text() == "old"
    assert names_in(tmp_path) == ["weights.safetensors"]


@pytest.mark.parametrize("step", ["tempfile.mkstemp", "pathlib.Path.mkdir"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(step, denied)
    with pytest.raises(TrimtabError, match=r"cannot write .*result\.json: permission denied"):
        write_json(tmp_path / "result.json", {})


@pytest.mark.skipif(os.name == "nt", reason="needs flock")
@pytest.mark.parametrize("taker", ["a built folder", "a replaced folder", "a cache", "a run"])
def test_a_disk_without_locks_is_told_by_whatever_takes_one(
    tmp_path: Path, taker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    from trimtab.data.cache import cached_vectors
    from trimtab.training.checkpoint import CheckpointFolder

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(TrimtabError, match="does not support file locks"):  # noqa: PT012 - one of four
        if taker == "a built folder":
            build_folder(tmp_path / "model", "whole", lambda folder: None)
        elif taker == "a replaced folder":
            with atomic_folder(tmp_path / "out", "whole"):
                pass
        elif taker == "a cache":
            cached_vectors(tmp_path, ["key"], ["x"], lambda texts: np.ones((len(texts), 4), np.float32))
        else:
            with CheckpointFolder(tmp_path / "run").locked():
                pass


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_a_lock_file_of_another_user_is_told(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "k.lock", r"umask 002.*mode 2775"),
        (tmp_path / "k", "choose a folder that you may"),
    ):
        with pytest.raises(TrimtabError, match=rf"permission denied.*{words}"), explain_disk_errors(tmp_path / "k"):
            raise PermissionError(errno.EACCES, "denied", str(path))


def test_other_errors_pass_through(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "x"), OSError("without a number"), ValueError("x")):
        with pytest.raises(type(error)), explain_disk_errors(tmp_path):
            raise error


# Folders built once


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    calls = []

    def build(folder: Path) -> None:
        assert folder.is_dir()
        assert not list(folder.iterdir())
        calls.append(folder)
        write_text(folder / "part", "1")
        write_text(folder / "last", "2")

    target = tmp_path / "models" / "one"
    assert build_folder(target, "last", build) == target
    assert build_folder(target, "last", build) == target
    assert len(calls) == 1
    assert names_in(target) == ["last", "part"]
    assert names_in(target.parent) == ["one", "one.lock"]


def test_a_folder_that_failed_is_absent_and_built_again(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write_text(folder / "part", "1")
        raise OSError(errno.ENOSPC, "full")

    target = tmp_path / "one"
    with pytest.raises(TrimtabError, match="disk is full"):
        build_folder(target, "last", fail)
    assert names_in(tmp_path) == ["one.lock"]
    build_folder(target, "last", lambda folder: write_text(folder / "last", ""))
    assert names_in(target) == ["last"]


def test_a_folder_that_is_not_whole_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "one"
    write_text(target / "rubbish", "")
    build_folder(target, "last", lambda folder: write_text(folder / "last", ""))
    assert names_in(target) == ["last"]


def test_built_folders_can_be_read_by_others(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        folder = build_folder(tmp_path / "one", "last", lambda folder: write_text(folder / "last", ""))
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o755


def test_two_at_once_build_one(tmp_path: Path) -> None:
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        time.sleep(0.05)
        write_text(folder / "last", "")

    threads = [threading.Thread(target=build_folder, args=(tmp_path / "one", "last", build)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert names_in(tmp_path / "one") == ["last"]


# Folders that are replaced


def replace(target: Path, text: str) -> None:
    with atomic_folder(target, "last") as folder:
        assert not list(folder.iterdir())
        write_text(folder / "inner" / text, "")
        write_text(folder / "last", text)


def visible(folder: Path) -> list[str]:
    return [name for name in names_in(folder) if not name.startswith(".")]


@pytest.fixture(params=["renamed", "linked", "current", "mounted", "bound", "within a closed folder"])
def target(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "at" / "index"
    replace(folder, "one")
    rename = Path.rename

    def busy(self: Path, to: Path) -> Path:
        if self == folder:
            raise OSError(errno.EBUSY, "busy")
        return rename(self, to)

    if request.param == "linked":
        (tmp_path / "link").symlink_to(folder)
        return tmp_path / "link"
    if request.param == "current":
        monkeypatch.chdir(folder)
        return Path()
    if request.param == "mounted":
        monkeypatch.setattr(files.os.path, "ismount", lambda path: path == folder)
    elif request.param == "within a closed folder":
        monkeypatch.setattr(files.os, "access", lambda path, _: path != folder.parent)
    if request.param in ("mounted", "bound"):
        monkeypatch.setattr(Path, "rename", busy)
    return folder


def test_a_folder_is_replaced_when_it_is_whole(target: Path) -> None:
    with pytest.raises(ValueError, match="no"), atomic_folder(target, "last"):
        raise ValueError("no")
    assert visible(target) == ["inner", "last"]
    assert replaceable(target, "last")
    replace(target, "two")
    assert visible(target) == ["inner", "last"]
    assert names_in(target / "inner") == [(target / "last").read_text()] == ["two"]
    assert not [name for name in names_in(target.resolve().parent) if name.endswith((".new", ".old"))]
    assert set(names_in(target)) <= {"inner", "last", ".index.lock"}


def test_an_error_while_it_is_replaced_puts_the_old_one_back(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fails(self: Path, to: Path) -> Path:
        if (self.parent.name == ".index.new" and self.name == "last") or self.name == ".index.new":
            raise OSError(errno.EIO, "worn out")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="worn out"):
        replace(target, "two")
    assert visible(target) == ["inner", "last"]
    assert names_in(target / "inner") == [(target / "last").read_text()] == ["one"]


def test_one_process_at_a_time_replaces_a_folder(target: Path) -> None:
    with atomic_folder(target, "last") as folder:
        with pytest.raises(TrimtabError, match="another process is writing"):
            replace(target, "two")
        write_text(folder / "last", "three")
    assert (target / "last").read_text() == "three"


def test_the_current_folder_has_the_lock_of_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(tmp_path / "index", "one")
    with atomic_folder(tmp_path / "index", "last") as folder:
        monkeypatch.chdir(tmp_path / "index")
        with pytest.raises(TrimtabError, match="another process is writing"):
            replace(Path(), "two")
        write_text(folder / "last", "three")


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    replace(tmp_path / "index", "one")
    write_text(tmp_path / ".index.new" / "part", "")
    (tmp_path / "index").rename(tmp_path / ".index.old")  # between the two renames
    with pytest.raises(ValueError, match="no"), atomic_folder(tmp_path / "index", "last"):
        raise ValueError("no")
    assert names_in(tmp_path) == [".index.lock", "index"]


def test_what_may_be_replaced(tmp_path: Path) -> None:
    assert replaceable(tmp_path / "absent", "last")
    assert replaceable(tmp_path, "last")
    write_text(tmp_path / f".{tmp_path.name}.lock", "")
    assert replaceable(tmp_path, "last")
    write_text(tmp_path / "letter.txt", "")
    assert not replaceable(tmp_path, "last")
    assert not replaceable(tmp_path / "letter.txt", "last")
    write_text(tmp_path / "last", "")
    assert replaceable(tmp_path, "last")


# Digests


def test_sha256_of_files(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)  # more than one chunk
    (tmp_path / "data").write_bytes(data)
    assert sha256_of(tmp_path / "data") == hashlib.sha256(data).hexdigest()


PARTS = st.lists(st.one_of(st.text(alphabet="ab"), st.binary(max_size=3)), max_size=4)


@given(PARTS, PARTS)
def test_digests_tell_lists_of_parts_apart(one: list[str | bytes], other: list[str | bytes]) -> None:
    def as_bytes(parts: list[str | bytes]) -> list[bytes]:
        return [part.encode() if isinstance(part, str) else part for part in parts]

    assert (digest_of(*one) == digest_of(*other)) == (as_bytes(one) == as_bytes(other))


@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.booleans(), st.none()), max_size=5))
def test_json_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, value: dict[str, object]) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    try:
        write_json(path, value)
    except UnicodeEncodeError:  # half a surrogate pair is no text
        return
    assert json.loads(path.read_text(encoding="utf-8")) == value
    assert list(json.loads(path.read_text(encoding="utf-8"))) == list(value)
