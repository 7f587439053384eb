"""The engine `ray` on a local cluster of two workers; skipped where Ray is not installed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trimtab.errors import ModelError, TrimtabError
from trimtab.serve.embed import Job, embed
from trimtab.serve.items import Work, open_input
from trimtab.serve.on_ray import Worker, run_on_ray
from trimtab.serve.store import ShardNote

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def photos(tmp_path: Path, pictures: list[Image.Image]) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for at in range(20):
        pictures[at % 5].rotate(at).save(folder / f"{at:02d}.png")
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name.startswith("shard")}


def test_two_workers_write_the_same_shards(tiny_folder: Callable[[str], Path], photos: Path, tmp_path: Path) -> None:
    model = str(tiny_folder("clip"))
    local = embed(photos, model, tmp_path / "local", shard_size=4, device="cpu")
    cluster = embed(photos, model, tmp_path / "ray", shard_size=4, device="cpu", engine="ray", workers=2)
    assert {**cluster, "folder": ""} == {**local, "folder": ""}
    assert shards(tmp_path / "ray") == shards(tmp_path / "local")


def test_a_killed_worker_loses_nothing(
    tiny_folder: Callable[[str], Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, mark, original = str(tiny_folder("clip")), tmp_path / "killed", Worker.make

    def die_once(self: Worker, work: Work) -> Any:
        if work.number == 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, work)

    monkeypatch.setattr(Worker, "make", die_once)
    outcome = embed(photos, model, tmp_path / "ray", shard_size=4, device="cpu", engine="ray", workers=2)
    assert mark.exists()
    assert (outcome["count"], outcome["skipped"], outcome["unfinished_shards"]) == (20, 1, 0)
    embed(photos, model, tmp_path / "local", shard_size=4, device="cpu")
    assert shards(tmp_path / "ray") == shards(tmp_path / "local")


def job(model: Path, photos: Path, out: Path, fingerprint: str) -> tuple[Job, Iterator[Work]]:
    source = open_input(photos)
    return Job(str(model), fingerprint, str(out), "images", source.columns, device="cpu"), source.works(4)


def test_more_workers_than_the_cluster_has_room_for(
    tiny_folder: Callable[[str], Path], photos: Path, tmp_path: Path, tiny_base: Any
) -> None:
    made, works = job(tiny_folder("clip"), photos, tmp_path, tiny_base("clip").fingerprint)
    notes: list[ShardNote] = []
    run_on_ray(made, works, workers=3, done=notes.append, cpus_each=2)  # both of the cluster for one of them
    assert sorted(note.rows + note.skipped for note in notes) == [1, 4, 4, 4, 4, 4]


def test_a_shard_that_kills_every_worker_ends_the_job(
    tiny_folder: Callable[[str], Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Any
) -> None:
    def die(self: Any, work: Work) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Worker, "make", die)
    made, works = job(tiny_folder("clip"), photos, tmp_path / "out", tiny_base("clip").fingerprint)
    with pytest.raises(TrimtabError, match="ended its worker 3 times"):
        run_on_ray(made, works, workers=1, done=lambda note: None)


def test_a_worker_with_another_model_is_refused(
    tiny_folder: Callable[[str], Path], photos: Path, tmp_path: Path
) -> None:
    made, works = job(tiny_folder("clip"), photos, tmp_path / "out", "0" * 64)
    with pytest.raises(ModelError, match="another model on a worker"):
        run_on_ray(made, works, workers=1, done=lambda note: None)
