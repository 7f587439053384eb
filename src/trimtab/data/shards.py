"""Pictures on disk: plain files, and members of webdataset shards, which are read in place and never unpacked.

A shard is an uncompressed tar file. Members of the same stem make a sample: a picture, with its caption in a
`.txt` or `.json` member. Only names, pictures and these two kinds of text are ever looked at: a pickle or any
other member stays unread.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from PIL import Image

from trimtab.data.images import DEFAULT_MAX_PIXELS, ImageError, StoredPicture, check_image, is_address, read_image
from trimtab.errors import DataError
from trimtab.files import digest_of, write_json

T = TypeVar("T")
UNREADABLE_SUFFIXES = (".heic", ".heif", ".hif", ".jxl", ".jp2", ".svg")
"""Of pictures in formats that are not read: they are counted and listed, not passed over."""
PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm"),
    *UNREADABLE_SUFFIXES,
)
"""What a file in a folder of pictures, or a member of a shard, is named when it is a picture."""
NOT_UTF8 = "the name is not UTF-8: rename it, for example with convmv"
"""Why a file whose `readable_name` is another one is left out."""

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_SHARDS = 100_000
_MAX_MEMBER = 256 << 20  # bytes of a picture in a shard; it is read as a whole
_MAX_TEXT = 1 << 20
_SAMPLE = 4096
# How JPEG, PNG, GIF and WebP begin: compressed, so that another picture has another size or another end.
_COMPRESSED = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP", re.DOTALL)
_MAX_ASPECT = 500  # towers refuse narrower strips
_DECODING_THREADS = 4
_NOTED = 4096


@dataclass(frozen=True, slots=True)
class PictureFile(StoredPicture):
    """Where a picture lies. Nothing is open, so threads and processes may share it.

    Two are equal when they name the same bytes on disk.

    Attributes:
        path: the picture's own file, or the shard that holds it.
        name: path below the folder of the data, with `/`: it stays when the folder moves.
        offset: of a shard member, where in the shard its bytes begin; None for a plain file.
        length: of a shard member, its bytes.
    """

    path: Path
    name: str = field(compare=False)
    offset: int | None = None
    length: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return str(self.path) if self.offset is None else f"{self.path}: {PurePosixPath(self.name).name}"

    def exists(self) -> bool:
        """Whether the file is there; a folder is not."""
        try:
            return self.path.is_file()
        except OSError:  # a folder that may not be searched
            return False

    def size(self) -> int:
        """Bytes of the encoded picture."""
        return self.path.stat().st_size if self.offset is None else self.length

    def read_bytes(self) -> bytes:
        """The encoded picture."""
        if self.offset is None:
            return self.path.read_bytes()
        return self._part(0, self.length)

    def digest(self) -> str:
        """Hex SHA-256 of the size and the first and last 4 KiB, which is all of a small picture: cheap, and another
        one for whatever is encoded anew. Of formats that may be uncompressed, such as BMP, it is over all bytes."""
        end = self.size()
        head = self._part(0, _SAMPLE)
        rest = max(_SAMPLE, end - _SAMPLE) if _COMPRESSED.match(head) else _SAMPLE
        return digest_of(str(end), head, self._part(rest, end))

    def read(self, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
        """Decode to RGB, as `trimtab.data.images.read_image` does.

        Raises:
            ImageError: it is missing, or no whole picture of a known format.
        """
        return self._by(lambda source: read_image(source, max_pixels=max_pixels))

    def check(self) -> tuple[int, int]:
        """Width and height of what can be read, as `trimtab.data.images.check_image`."""
        return self._by(check_image)

    def _by(self, reader: Callable[[Path | bytes], T]) -> T:
        if self.offset is None:
            return reader(self.path)
        if self.length > _MAX_MEMBER:
            raise ImageError(str(self), f"has {self.length >> 20} MB, the limit is {_MAX_MEMBER >> 20} MB")
        try:
            return reader(self.read_bytes())
        except ImageError as error:
            raise ImageError(str(self), error.reason) from None
        except OSError as error:
            raise ImageError(str(self), f"cannot be read ({error.strerror or error})") from error

    def _part(self, start: int, length: int) -> bytes:
        end = self.size()
        with self.path.open("rb") as stream:
            stream.seek((self.offset or 0) + start)
            return stream.read(max(0, min(length, end - start)))


@contextlib.contextmanager
def explain_vanished(picture: PictureFile | None = None) -> Iterator[None]:
    """Turn the error of a picture that is gone, or cannot be read any more, into a message with file and remedy.

    Args:
        picture: that is read, if only one is; some errors name no file.

    Raises:
        DataError: in place of the OSError.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{picture or error.filename}: cannot be read any more ({error.strerror}): start again"
        ) from error


@dataclass
class ShardSample:
    """Members of one stem.

    Attributes:
        picture: the picture, or why there is none.
        text: content of the `.txt` member, "" without one.
        record: content of the `.json` member, empty without one.
        problem: why `text` or `record` could not be read.
        more_pictures: how many pictures were passed over, as the sample has one already.
    """

    picture: PictureFile | str = "the shard has no picture beside the caption"
    text: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    more_pictures: int = 0


def expand_shards(pattern: str) -> list[Path]:
    """Files that a pattern such as `shard-{000..012}.tar` names, in order; a path without braces names itself.

    Raises:
        DataError: an address or a command, a range that runs backwards or is too long, a missing shard.
    """
    if is_address(pattern):
        raise DataError(
            f"{pattern!r} is an address or a command, and neither is ever opened: download the shards first"
        )
    paths = [Path(name) for name in _expand(pattern, pattern)]
    if missing := [path for path in paths if not path.is_file()]:
        more = f" and {len(missing) - 1} more of {len(paths)} shards" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]}{more}: no such file (current folder: {Path.cwd()})")
    return paths


def _expand(pattern: str, whole: str) -> Iterator[str]:
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    if not 0 <= int(last) - int(first) < _MAX_SHARDS:
        raise DataError(
            f"{whole!r}: {match[0]} must run upwards over at most {_MAX_SHARDS:,} shards, for example {{000..012}}"
        )
    # As shells do it: a leading zero at either end pads all numbers to the longer one.
    padded = any(end.startswith("0") and len(end) > 1 for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    for number in range(int(first), int(last) + 1):
        for rest in _expand(pattern[match.end() :], whole):
            yield f"{pattern[: match.start()]}{number:0{width}d}{rest}"


def read_shard(path: Path) -> tuple[dict[str, ShardSample], str]:
    """Index one shard: samples by stem, in the order of the file, and what is wrong with the file, if anything.

    Of a shard that is cut off or damaged come the samples before the damage. A sample of which a member stands there
    twice has neither picture nor texts.

    Raises:
        DataError: the file cannot be opened, is compressed or no tar file, or has a member whose path is absolute
            or holds `..`.
    """
    samples: dict[str, ShardSample] = {}
    repeated: dict[str, PurePosixPath] = {}
    seen: set[PurePosixPath] = set()
    try:
        with path.open("rb") as stream:
            members, damage = _members(path, stream)
            for member in members:
                if (name := _add(samples, path, member, stream)) is None:
                    continue
                if name in seen:
                    repeated.setdefault(_stem(name), name)
                seen.add(name)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    for stem, name in repeated.items():  # as where shards with the same numbers were joined to one
        problem = (
            f"{name} stands in the shard more than once, so that nobody knows which text belongs to which picture: "
            "pack it again with a name of its own for each sample"
        )
        samples[stem] = ShardSample(problem, problem=problem)
    return samples, damage


def _members(path: Path, stream: BinaryIO) -> tuple[list[tarfile.TarInfo], str]:
    """Members that lie within the file as a whole, and what is wrong with the file."""
    end = stream.seek(0, 2)
    stream.seek(0)
    members: list[tarfile.TarInfo] = []
    try:
        archive = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115 - it owns nothing: the stream is the caller's
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: is not an uncompressed tar file ({error}): unpack .tar.gz with gunzip, or pack it again"
        ) from error
    try:
        last = -1
        for member in archive:
            # A damaged header may give a size below 0, after which tarfile would read the same header for ever.
            if member.size < 0 or member.offset <= last:
                return members, "a header is damaged"
            if member.isreg() and not member.issparse() and member.offset_data + member.size > end:
                return members, f"is cut off within {member.name!r}"
            last = member.offset
            members.append(member)
    except Exception as error:  # tarfile fails in every way on arbitrary bytes
        return members, f"is cut off or damaged ({error or type(error).__name__})"
    stream.seek(archive.offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        return members, "is cut off or damaged (it has no end mark)"
    return members, ""


def _add(
    samples: dict[str, ShardSample], path: Path, member: tarfile.TarInfo, stream: BinaryIO
) -> PurePosixPath | None:
    """Put a member into its sample and return its readable name; None if it is of no kind that is looked at."""
    name = PurePosixPath(readable_name(member.name))
    if name.is_absolute() or ".." in name.parts or "\0" in member.name:
        raise DataError(
            f"{path}: member {member.name!r} leads out of the shard: pack it again with plain relative names"
        )
    suffix = name.suffix.lower()
    if name.name.startswith(".") or member.isdir() or suffix not in (*PICTURE_SUFFIXES, ".txt", ".json"):
        return None
    sample = samples.setdefault(_stem(name), ShardSample())
    plain = member.isreg() and not member.issparse()
    if suffix in PICTURE_SUFFIXES:
        if not plain:
            sample.picture = f"{name} is a link or a sparse file, and these are not followed: pack the file itself"
        elif isinstance(sample.picture, str) or sample.picture.name.lower().endswith(UNREADABLE_SUFFIXES):
            sample.picture = PictureFile(path, f"{path.name}/{name}", member.offset_data, member.size)
        else:
            sample.more_pictures += 1
        return name
    if not plain or member.size > _MAX_TEXT:
        sample.problem = f"{name} is no plain file of at most {_MAX_TEXT >> 20} MB"
        return name
    stream.seek(member.offset_data)
    try:
        text = stream.read(member.size).decode("utf-8-sig")
        if suffix == ".txt":
            sample.text = text
        elif isinstance(record := json.loads(text), dict):
            sample.record = record
        else:
            sample.problem = f"{name} is not a JSON object"
    except UnicodeDecodeError:
        sample.problem = f"{name} is not UTF-8"
    except (ValueError, RecursionError) as error:
        sample.problem = f"{name} is not JSON ({error})"
    return name


def _stem(name: PurePosixPath) -> str:
    """What the members of a sample have in common."""
    return str(name.with_suffix(""))


def picture_names(names: Iterable[str]) -> list[str]:
    """Those that name pictures, sorted; hidden files, such as a Mac's `._a.jpg`, are none."""
    return sorted(name for name in names if not name.startswith(".") and name.lower().endswith(PICTURE_SUFFIXES))


def readable_name(name: str) -> str:
    """The name of a file; bytes that are no UTF-8, which no table, JSON or digest could take, are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def find_damaged(
    pictures: Sequence[PictureFile], notes: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[PictureFile, str]:
    """Why some pictures cannot be used. All are decoded, unless a run before has noted the answer.

    Args:
        pictures: files that are there.
        notes: folder of such answers, one for every `_NOTED` pictures, so that a run which is stopped in their middle
            has not decoded in vain; a changed file makes a new one. None always decodes.
        progress: told how many pictures of how many are done.
    """
    damaged: dict[PictureFile, str] = {}
    pool = ThreadPoolExecutor(min(_DECODING_THREADS, os.cpu_count() or 1))
    try:
        for start in range(0, len(pictures), _NOTED):
            some = pictures[start : start + _NOTED]
            damaged |= _find_damaged(some, notes and notes / f"decoded-{digest_of(*map(_state, some))}.json", pool)
            if progress:
                progress(start + len(some), len(pictures))
    finally:
        pool.shutdown(cancel_futures=True)
    return damaged


def _find_damaged(
    pictures: Sequence[PictureFile], note: Path | None, pool: ThreadPoolExecutor
) -> dict[PictureFile, str]:
    if note is not None:
        with contextlib.suppress(OSError, ValueError, TypeError, IndexError, RecursionError):
            return {pictures[int(position)]: str(reason) for position, reason in json.loads(note.read_text("utf-8"))}
    damaged = [(position, reason) for position, reason in enumerate(pool.map(_why_unusable, pictures)) if reason]
    if note is not None:
        write_json(note, damaged)
    return {pictures[position]: reason for position, reason in damaged}


def _state(picture: PictureFile) -> str:
    """What changes when the file does."""
    with explain_vanished():
        status = picture.path.stat()
    return f"{picture.path}\0{picture.offset}\0{status.st_size}\0{status.st_mtime_ns}"


def _why_unusable(picture: PictureFile) -> str:
    with contextlib.suppress(ImageError):
        if not _is_narrow(*picture.check()):
            return ""
    # What is not plainly usable is read in full, whose word counts.
    try:
        width, height = picture.read().size
    except ImageError as error:
        return error.reason
    return f"is too narrow ({width}x{height})" if _is_narrow(width, height) else ""


def _is_narrow(width: int, height: int) -> bool:
    return max(width, height) > _MAX_ASPECT * min(width, height)
