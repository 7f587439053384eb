"""Embed pictures or texts of any number: shard by shard, each one done once, by one process or many."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.adapters.adapted import load
from trimtab.data.images import ImageError
from trimtab.data.shards import NOT_UTF8, readable_name
from trimtab.errors import DataError, ModelError
from trimtab.files import explain_disk_errors, write_json
from trimtab.serve.items import Input, Item, Work, encoded_picture, is_readable, items_of, open_input
from trimtab.serve.store import (
    DESCRIPTION_FILE,
    DTYPES,
    Description,
    Format,
    Kind,
    ModelReference,
    ShardNote,
    Skipped,
    input_digest,
    note_file,
    read_note,
    shard_file,
    shard_paths,
    write_description,
    write_shard,
)
from trimtab.towers.hf import portable

if TYPE_CHECKING:
    from trimtab.towers.dual_encoder import DualEncoder

PLAN_FILE = "plan.json"
ENGINES = ("local", "ray")
_ABANDONED = 3600  # seconds after which nobody is writing a file any more
Progress = Callable[[int, "int | None"], None]
"""Is called with the items done and, where it is known, their number in all."""


@dataclass(frozen=True)
class Job:
    """What every worker has to know.

    Attributes:
        model: what `trimtab.load` loads.
        fingerprint: which it must have.
        columns: see `Input.columns`.
        preparing: how the model must prepare what is embedded, see `input_digest`; "" is not compared.
    """

    model: str
    fingerprint: str
    out: str
    of: Kind
    columns: tuple[str, ...]
    format: Format = "parquet"
    dtype: str = "float32"
    batch_size: int = 64
    device: str = "auto"
    preparing: str = ""

    def load_model(self) -> DualEncoder:
        """The model, in a worker of its own.

        Raises:
            ModelError: what is found under its name is another model there.
        """
        model = load(self.model, device=self.device)
        other = self.preparing and self.preparing != input_digest(model, self.of)
        if model.fingerprint != self.fingerprint or other:
            raise ModelError(f"{self.model} is another model on a worker than where the job was started")
        return model


def embed(
    input: str | Path,
    model: str | Path | DualEncoder,
    out: str | Path,
    *,
    of: str = "auto",
    column: str | None = None,
    id_column: str | None = None,
    keep: tuple[str, ...] = (),
    root: str | Path | None = None,
    shard_size: int = 8192,
    batch_size: int = 64,
    format: str = "parquet",
    dtype: str = "float32",
    device: str = "auto",
    engine: str = "local",
    workers: int = 2,
    part: tuple[int, int] = (1, 1),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write an embeddings folder, or go on where an earlier run of the same job stopped.

    Args:
        input, of, column, id_column, keep, root: see `trimtab.serve.items.open_input`.
        model: what `trimtab.load` takes; for the engine "local" also a loaded model.
        shard_size: items per shard of a table or folder.
        batch_size: pictures or texts per forward pass.
        format: "parquet", or "npy" with the ids beside it.
        dtype: of the vectors on disk, "float32" or "float16".
        engine: "ray" has workers of a Ray cluster do the shards, which must share the file system.
        workers: of that cluster.
        part: (1, 4) does the first of four parts of the shards; the part that comes last makes the folder whole.
        progress: see `Progress`.

    Returns:
        what happened: folder, counts, and the first skipped items.

    Raises:
        DataError: the input or the options cannot be used, nothing of it could be embedded, or `out` holds another
            job's embeddings.
        ModelError: unknown or damaged model.
        TrimtabError: the disk is full; shards that were finished are kept.
    """
    source = open_input(input, of=of, column=column, id_column=id_column, keep=keep, root=root)
    _check_options(shard_size, batch_size, format, dtype, engine, part)
    total = source.check()  # whatever is wrong with a row shows now
    loaded = load(model, device=device) if isinstance(model, (str, Path)) else model
    out = Path(out)
    job = Job(
        portable(loaded.name),
        loaded.fingerprint,
        str(out.absolute()),
        source.of,
        source.columns,
        "npy" if format == "npy" else "parquet",
        dtype,
        batch_size,
        device,
        input_digest(loaded, source.of),
    )
    _check_names(*source.described().values(), job.out, job.model)
    with _claimed(out, part):
        _check_plan(out, job, source, shard_size)
        _clear_leftovers(out)
        digests: list[str] = []
        tell = _Teller(progress or (lambda *_: None), total)
        works = _unfinished(source.works(shard_size), out, digests, part, tell)
        if engine == "ray":
            from trimtab.serve.on_ray import run_on_ray

            run_on_ray(job, works, workers=workers, done=tell.add)
        else:
            for work in works:
                tell.add(make_shard(loaded, job, work))
        return _finish(out, job, source, loaded, digests)


def make_shard(model: DualEncoder, job: Job, work: Work) -> ShardNote:
    """Embed one shard and write it; the note comes last and makes it count."""
    items, damage = items_of(work, job.of)
    items = list(items)
    encode = _encode_pictures if job.of == "images" else _encode_texts
    vectors, skipped, unread = encode(model, items, job.batch_size)
    if damage:
        name = Path(work.archive or "").name
        skipped[len(items)] = Skipped(name, name, f"the shard {damage}: what follows is lost")
    used = [item for at, item in enumerate(items) if at not in skipped]
    rows = [(item.id, item.source, *item.kept) for item in used]
    columns = {name: [row[at] for row in rows] for at, name in enumerate(job.columns)}
    return write_shard(
        Path(job.out),
        work.number,
        columns,
        vectors.astype(DTYPES[job.dtype]),
        format=job.format,
        items=work.digest,
        skipped=list(skipped.values()),
        unread=unread,
    )


Encoded = tuple[np.ndarray, dict[int, Skipped], list[str]]
"""Vectors, what was left out by its place, and the ids of what the system did not let be read."""


def _encode_pictures(model: DualEncoder, items: list[Item], batch_size: int) -> Encoded:
    skipped: dict[int, Skipped] = {}
    unread: list[str] = []
    given: list[int] = []

    def sources() -> Iterator[Path | bytes]:
        for at, item in enumerate(items):
            try:
                found = encoded_picture(item)
            except ImageError as error:
                skipped[at] = Skipped(item.id, item.source, error.reason)
                if error.unread:
                    unread.append(item.id)
                continue
            given.append(at)
            yield found

    vectors = model.encode_image(sources(), batch_size=batch_size, on_error="skip")
    for position, _, reason in model.last_skipped:
        item = items[given[position]]
        skipped[given[position]] = Skipped(item.id, item.source, reason)
        if position in model.last_skipped.unread:
            unread.append(item.id)
    return vectors, dict(sorted(skipped.items())), unread


def _encode_texts(model: DualEncoder, items: list[Item], batch_size: int) -> Encoded:
    skipped = {
        at: Skipped(item.id, item.source, "is empty") for at, item in enumerate(items) if not item.source.strip()
    }
    texts = [item.source for at, item in enumerate(items) if at not in skipped]
    return model.encode_text(texts, batch_size=batch_size), skipped, []


# Which shards are to be done


class _Teller:
    """Counts what is done for whoever shows it."""

    def __init__(self, progress: Progress, total: int | None) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, note: ShardNote) -> None:
        self.done += note.rows + note.skipped
        self.progress(self.done, self.total)


def _unfinished(
    works: Iterator[Work], out: Path, digests: list[str], part: tuple[int, int], tell: _Teller
) -> Iterator[Work]:
    """Shards of this part that no earlier run has finished; notes the digests of all."""
    for work in works:
        digests.append(work.digest)
        if work.number % part[1] != part[0] - 1:
            continue
        note = read_note(out, work.number)
        if note is not None and note.items == work.digest and not _readable_now(work, note.unread):
            tell.add(note)
        else:
            (out / DESCRIPTION_FILE).unlink(missing_ok=True)  # it was of an earlier input
            yield work


def _readable_now(work: Work, unread: tuple[str, ...]) -> bool:
    """Whether one of the pictures that could not be read can be now."""
    if work.items is None:
        return bool(unread)
    wanted = set(unread)
    return any(is_readable(item) for item in work.items if item.id in wanted)


def _finish(out: Path, job: Job, source: Input, model: DualEncoder, digests: list[str]) -> dict[str, Any]:
    """Write the description if all shards are there, and say what happened."""
    notes = [read_note(out, number) for number in range(len(digests))]
    missing = [at for at, note in enumerate(notes) if note is None or note.items != digests[at]]
    whole = [note for note in notes if note is not None]
    skipped = [one for note in whole for one in note.listed]
    counts = {"count": sum(note.rows for note in whole), "skipped": sum(note.skipped for note in whole)}
    if not missing:
        if not counts["count"]:
            _refuse_nothing(source, counts["skipped"], skipped)
        for number in _numbers_from(out, len(digests)):  # of an earlier, longer input
            (out / DESCRIPTION_FILE).unlink(missing_ok=True)
            # The note goes last, as a kill before it leaves what the next run finds here.
            for path in (*shard_paths(out / shard_file(number, job.format)), out / note_file(number)):
                path.unlink(missing_ok=True)
        shards = tuple(note.described() for note in whole)
        about = Description(
            job.of, ModelReference.of(model), model.embedding_dim, job.dtype, job.format, counts["count"],
            counts["skipped"], job.columns, shards, source.described(),
        )  # fmt: skip
        write_description(out, about, skipped)
    return {
        "folder": str(out),
        "of": job.of,
        **counts,
        "dim": model.embedding_dim,
        "shards": len(digests),
        "unfinished_shards": len(missing),
        "skipped_items": [asdict(one) for one in skipped],
    }


def _refuse_nothing(source: Input, count: int, skipped: Sequence[Skipped]) -> None:
    if not skipped:
        raise DataError(f"{source.path}: holds no {source.of}")
    example = skipped[0]
    hint = ""
    if source.place == "table" and source.of == "images":
        hint = f". If the column {source.column!r} holds texts, say --of texts, with a folder of its own"
    raise DataError(
        f"{source.path}: none of the {count:,} {source.of} can be used, for example {example.source or example.id!r}: "
        f"{example.reason}{hint}"
    )


def _numbers_from(out: Path, first: int) -> Iterator[int]:
    while (out / note_file(first)).is_file():
        yield first
        first += 1


def _check_plan(out: Path, job: Job, source: Input, shard_size: int) -> None:
    """Write down what the folder is for, or refuse a folder that is for something else."""
    plan = {
        "model": job.fingerprint,
        "preparing": job.preparing,
        "of": job.of,
        "columns": list(job.columns),
        "format": job.format,
        "dtype": job.dtype,
        "shard_size": None if source.place == "archives" else shard_size,
        "place": source.place,
    }
    path = out / PLAN_FILE
    if not path.is_file():
        others = [one.name for one in out.iterdir() if not one.name.startswith(".")]
        if not others:
            write_json(path, plan)
        elif PLAN_FILE not in others:  # else another part has written it in this moment
            raise DataError(f"{out} holds other files ({min(others)} ...): choose a folder of its own")
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}): delete {out}, or choose another folder") from error
    before.setdefault("preparing", job.preparing)  # earlier versions did not write it
    if other := [name for name, value in plan.items() if before.get(name) != value]:
        raise DataError(
            f"{out} holds the embeddings of another job ({', '.join(other)} differ): choose another folder, or "
            "delete it"
        )


def _clear_leftovers(out: Path) -> None:
    """Delete what killed runs were writing. Runs in other numbers of parts have other locks, so age tells it apart."""
    for path in out.glob(".shard-*.tmp"):
        with contextlib.suppress(OSError):  # renamed or deleted meanwhile, or another user's
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()


@contextlib.contextmanager
def _claimed(out: Path, part: tuple[int, int]) -> Iterator[None]:
    """One process at a time for each part; the folder is not whole while one works."""
    from filelock import FileLock, Timeout

    with explain_disk_errors(out):
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} is a file: choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / f".part-{part[0]}-of-{part[1]}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise DataError(f"another process is embedding into {out}: wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


def _check_names(*names: str) -> None:
    """Refuse names that neither a description nor a table could hold, before the work."""
    for name in names:
        if (shown := readable_name(name)) != name:
            raise DataError(f"{shown}: {NOT_UTF8}")


def _check_options(
    shard_size: int, batch_size: int, format: str, dtype: str, engine: str, part: tuple[int, int]
) -> None:
    for name, number in (("shard_size", shard_size), ("batch_size", batch_size)):
        if number < 1:
            raise DataError(f"{name}={number} must be at least 1")
    for name, value, known in (
        ("format", format, ("parquet", "npy")),
        ("dtype", dtype, tuple(DTYPES)),
        ("engine", engine, ENGINES),
    ):
        if value not in known:
            raise DataError(f"{name}={value!r} is unknown; choose {' or '.join(known)}")
    if not 1 <= part[0] <= part[1]:
        raise DataError(f"part={part[0]}/{part[1]} must be of the form 1/4: the first of four")
