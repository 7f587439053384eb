from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tiny_vectors import MODEL, made, write_embeddings
from trimtab.errors import DataError, ModelError, TrimtabError
from trimtab.files import sha256_of
from trimtab.serve import index as module
from trimtab.serve import indexing
from trimtab.serve.index import Index
from trimtab.serve.indexing import build_index, choose_kind, remarks
from trimtab.serve.store import Embeddings

faiss = pytest.importorskip("faiss")

VECTORS = made(1500)


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embeddings(tmp_path_factory.mktemp("vectors") / "e", VECTORS, shard_size=400)


@pytest.fixture(scope="module")
def folders(embeddings: Path) -> dict[str, Path]:
    made: dict[str, Path] = {}
    for kind in ("flat", "hnsw", "ivfpq"):
        made[kind] = embeddings.parent / kind
        build_index(embeddings, made[kind], kind=kind)
    return made


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="no list of mapped files")
def test_no_file_is_deleted_that_is_mapped(embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses it."""
    unlink, seen = Path.unlink, []

    def watched(self: Path, **options: Any) -> None:
        seen.append(self.name)
        assert str(self) not in Path("/proc/self/maps").read_text()
        unlink(self, **options)

    monkeypatch.setattr(Path, "unlink", watched)
    build_index(embeddings, tmp_path / "i", kind="hnsw")
    assert "vectors.f16" in seen


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivfpq"])
def test_it_finds_what_comparing_with_all_finds(folders: dict[str, Path], kind: str) -> None:
    index = Index.open(folders[kind])
    assert (len(index), index.dim, index.kind, index.of) == (1500, 16, kind, "images")
    assert index.model_fingerprint == MODEL.fingerprint
    queries = made(50, seed=1)
    cosines = queries @ VECTORS.T
    best = np.argsort(-cosines, axis=1)[:, :10]
    hits = index.search(queries, 10)
    shares = [len({f"图{row}" for row in rows} & set(ids)) / 10 for rows, ids in zip(best, hits.ids, strict=True)]
    assert np.mean(shares) >= (1 if kind == "flat" else 0.9)
    for row, (ids, scores, items) in enumerate(zip(*hits, strict=True)):
        assert scores == sorted(scores, reverse=True)
        assert [item["id"] for item in items] == ids
        assert items[0]["image"] == f"{ids[0]}.jpg"
        expected = [cosines[row, int(one[1:])] for one in ids]
        assert np.allclose(scores, expected, atol=2e-3)  # ivfpq keeps halves


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivfpq"])
def test_recall_is_measured_and_written(folders: dict[str, Path], kind: str) -> None:
    recall = json.loads((folders[kind] / "index.json").read_text())["recall"]
    assert recall["at"] == 10
    assert recall["queries"] == 200
    assert recall["recall"] >= 0.95
    assert ("tried" in recall) == (kind != "flat")


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_many_are_found_as_well_as_few(folders: dict[str, Path], kind: str) -> None:
    queries = made(20, seed=4)
    index = Index.open(folders[kind])
    for k in (100, 700, 1500):
        wanted = -np.sort(-(queries @ VECTORS.T), axis=1)[:, k - 1]
        for scores, least in zip(index.search(queries, k).scores, wanted, strict=True):
            assert len(scores) == k
            assert np.mean(np.array(scores) >= least - 1e-3) >= 0.95


def test_a_graph_whose_walk_ends_early(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss.HNSW, "nb_neighbors", lambda *_: 0)  # as if it were large
    index = Index.open(folders["hnsw"])
    index._faiss.hnsw.entry_point = -1
    assert [len(ids) for ids in index.search(VECTORS[:3], 50).ids] == [50] * 3


def test_what_was_found_is_found_again_by_its_id(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index.open(folders["flat"])
    known = index.search(VECTORS[:3], 40).metadata
    assert [[index.find(item["id"]) for item in one] for one in known] == known
    monkeypatch.setattr(module, "_ROWS_KEPT", 10)
    index.search(VECTORS[:3], 40)
    assert len(index._rows) <= 120
    assert index.find("图399") == {"id": "图399", "image": "图399.jpg"}
    assert index.find("nowhere") is None


def test_indexes_are_told_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    build_index(write_embeddings(tmp_path / "e", VECTORS[:3]), tmp_path / "i")
    folder = Path(shutil.copytree(folders["flat"], tmp_path / "j"))
    one, same, other = (Index.open(at).checksum for at in (folders["flat"], folder, tmp_path / "i"))
    assert one == same != other


def test_one_vector_and_more_than_there_are(embeddings: Path, tmp_path: Path) -> None:
    small = write_embeddings(tmp_path / "e", VECTORS[:3])
    build_index(small, tmp_path / "i")
    hits = Index.open(tmp_path / "i").search(VECTORS[1] * 7, k=50)
    assert hits.ids[0][0] == "图1"
    assert len(hits.ids[0]) == 3
    assert hits.scores[0][0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_taken(folders: dict[str, Path], dtype: Any) -> None:
    assert Index.open(folders["flat"]).search(VECTORS[:2].astype(dtype), 1).ids == [["图0"], ["图1"]]


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (np.ones((2, 16), np.int64), "not floats"),
        (np.array([["a"] * 16]), "not floats"),
        (np.ones((2, 15), np.float32), "16 dimensions"),
        (np.full((1, 16), np.nan, np.float32), "NaN"),
        (np.zeros((1, 16), np.float32), "all zero"),
        (np.ones((1, 1, 16), np.float32), "shape"),
    ],
)
def test_wrong_queries_are_refused(folders: dict[str, Path], vectors: np.ndarray, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Index.open(folders["flat"]).search(vectors)


def test_another_model_is_refused(folders: dict[str, Path]) -> None:
    index = Index.open(folders["flat"])
    same_pictures = SimpleNamespace(name="a", fingerprint="a" * 64, image_fingerprint=MODEL.image_fingerprint)
    index.check_model(same_pictures)  # type: ignore[arg-type]
    other = SimpleNamespace(name="b", fingerprint="b" * 64, image_fingerprint="b" * 64)
    with pytest.raises(ModelError, match=r"'tiny'.*another model"):
        index.check_model(other)  # type: ignore[arg-type]
    # What another adapter makes of pictures may be the same, and of texts is not.
    assert MODEL.fits(replace(MODEL, fingerprint="a" * 64), "images")
    assert not MODEL.fits(replace(MODEL, fingerprint="a" * 64), "texts")


@pytest.mark.parametrize("name", ["index.faiss", "items.arrow", "vectors.f16"])
@pytest.mark.parametrize("damage", ["missing", "short", "changed"])
def test_missing_and_damaged_files_are_named(folders: dict[str, Path], tmp_path: Path, name: str, damage: str) -> None:
    folder = Path(shutil.copytree(folders["ivfpq"], tmp_path / "i"))
    data = bytearray((folder / name).read_bytes())
    if damage == "missing":
        (folder / name).unlink()
    elif damage == "short":
        (folder / name).write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 255
        (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"{name}.*(missing|cut short|damaged)"):
        Index.open(folder)


def test_a_description_is_checked(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no index\.json"):
        Index.open(tmp_path)
    about = json.loads((folders["flat"] / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**about, "schema_version": 2}))
    with pytest.raises(DataError, match="upgrade"):
        Index.open(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"damaged .*: make the index again"):
        Index.open(tmp_path)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivfpq"])
@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"files": 3},
        {"files": {}},
        {"files": {"index.faiss": {}, "items.arrow": {}, "vectors.f16": {}}},
        {"search": None},
        {"search": {"ef_search": "x"}},
        {"search": {"nprobe": 0}},
        {"dim": "x"},
        {"dim": 8},
        {"kind": "tree"},
        {"of": []},
        {"count": None},
    ],
)
def test_damage_in_a_description_is_told(folders: dict[str, Path], tmp_path: Path, kind: str, change: Any) -> None:
    folder = Path(shutil.copytree(folders[kind], tmp_path / "i"))
    about = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**about, **change}))
    with pytest.raises(DataError, match="index again"):
        Index.open(folder, verify=False)


def sealed(folder: Path, **changes: Any) -> Path:
    """An index folder whose description has the checksums of its files as they are now."""
    about = {**json.loads((folder / "index.json").read_text()), **changes}
    about["files"] = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in about["files"]
    }
    (folder / "index.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("path", ["index.json", "embeddings.json"])
@pytest.mark.parametrize("schema", [True, 1.0, "1", None])
def test_a_schema_is_a_whole_number(tmp_path: Path, path: str, schema: Any) -> None:
    (tmp_path / path).write_text(json.dumps({"schema_version": schema}))
    with pytest.raises(DataError, match="no valid schema_version"):
        (Index if path == "index.json" else Embeddings).open(tmp_path)


@pytest.mark.parametrize("path", ["index.json", "embeddings.json"])
def test_descriptions_that_are_nested_too_deeply_are_damaged(tmp_path: Path, path: str) -> None:
    (tmp_path / path).write_text('{"schema_version": 1, "a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(DataError, match=rf"{path} is damaged"):
        (Index if path == "index.json" else Embeddings).open(tmp_path)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivfpq"])
def test_an_index_of_another_class_is_not_read(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    other = {"flat": "hnsw", "hnsw": "ivfpq", "ivfpq": "flat"}[kind]
    folder = Path(shutil.copytree(folders[kind], tmp_path / "i"))
    shutil.copy(folders[other] / "index.faiss", folder)
    with pytest.raises(DataError, match=rf"index\.faiss begins with .*, as no {kind} index does"):
        Index.open(sealed(folder))


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_an_index_of_another_class_inside_is_refused(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(folders[kind], tmp_path / "i"))
    found = faiss.read_index(str(folder / "index.faiss"))
    inner = faiss.IndexScalarQuantizer(16, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    inner.train(VECTORS)
    inner.add(VECTORS if kind == "hnsw" else VECTORS[: found.nlist])
    found.own_fields = False
    setattr(found, "storage" if kind == "hnsw" else "quantizer", inner)
    faiss.write_index(found, str(folder / "index.faiss"))
    with pytest.raises(DataError, match="IndexScalarQuantizer where IndexFlatIP should be"):
        Index.open(sealed(folder))


@pytest.mark.parametrize("inside", [False, True], ids=["elsewhere", "in its folder"])
def test_lists_in_another_file_are_never_opened(folders: dict[str, Path], tmp_path: Path, inside: bool) -> None:
    folder = Path(shutil.copytree(folders["ivfpq"], tmp_path / "i"))
    lists = (folder if inside else tmp_path) / "lists.bin"
    found = faiss.read_index(str(folder / "index.faiss"))
    on_disk = faiss.OnDiskInvertedLists(found.nlist, found.code_size, str(lists))
    on_disk.merge_from(found.invlists, 0)
    found.replace_invlists(on_disk, False)
    faiss.write_index(found, str(folder / "index.faiss"))
    lists.chmod(0o400)
    before = lists.stat()
    with pytest.raises(DataError, match=r"cannot be read .*: index again"):
        Index.open(sealed(folder))
    assert (lists.stat().st_mtime_ns, lists.stat().st_atime_ns) == (before.st_mtime_ns, before.st_atime_ns)
    lists.unlink()
    with pytest.raises(DataError, match="IO_FLAG_ONDISK_SAME_DIR"):  # not: there is no such file
        Index.open(sealed(folder))


@pytest.mark.parametrize("size", [0, 10, 1500 * 16 * 2 + 1])
def test_vectors_of_another_size_are_told(folders: dict[str, Path], tmp_path: Path, size: int) -> None:
    folder = Path(shutil.copytree(folders["ivfpq"], tmp_path / "i"))
    (folder / "vectors.f16").write_bytes(bytes(size))
    with pytest.raises(DataError, match=r"vectors\.f16 has .* where 48,000 should be: index again"):
        Index.open(sealed(folder))


@pytest.mark.parametrize("lacking", ["id", "image", "price"])
def test_items_that_lack_a_column_are_told(folders: dict[str, Path], tmp_path: Path, lacking: str) -> None:
    import pyarrow as pa

    folder = Path(shutil.copytree(folders["flat"], tmp_path / "i"))
    table = pa.table({name: ["a"] * 1500 for name in ("id", "image", "price") if name != lacking})
    with pa.OSFile(str(folder / "items.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=rf"items\.arrow has no column '{lacking}'"):
        Index.open(sealed(folder, columns=["id", "image", "price"]))


def test_settings_that_faiss_cannot_hold_are_told(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["hnsw"], tmp_path / "i"))
    with pytest.raises(DataError, match="index again"):
        Index.open(sealed(folder, search={"ef_search": 10**12}))


OUTSIDE = ["../x", "/etc/hostname", "..", ".", "", "a/b", "..\\x", "C:x", "a\0"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_files_outside_the_folder_are_not_looked_at(folders: dict[str, Path], tmp_path: Path, name: Any) -> None:
    folder = Path(shutil.copytree(folders["flat"], tmp_path / "i"))
    about = json.loads((folder / "index.json").read_text())
    about["files"][name] = {"bytes": 1, "sha256": ""}
    (folder / "index.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match=r"is damaged .* is no plain file name"):
        Index.open(folder)


@pytest.mark.parametrize("name", [*OUTSIDE, 3])
def test_shards_outside_the_folder_are_not_read(tmp_path: Path, name: Any) -> None:
    folder = write_embeddings(tmp_path / "e", VECTORS[:5])
    about = json.loads((folder / "embeddings.json").read_text())
    about["shards"][0]["file"] = name
    (folder / "embeddings.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match=r"is damaged .* is no plain file name"):
        Embeddings.open(folder)


@pytest.mark.parametrize("when", ["_check_files", "_map_items", "import_faiss", "read_description"])
def test_an_index_that_is_replaced_while_it_is_opened(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    folder = Path(shutil.copytree(folders["ivfpq"], tmp_path / "i"))
    original = getattr(module, when)

    def replaced(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        read = original(*arguments, **options) if when == "read_description" else None
        folder.rename(tmp_path / "old")
        shutil.copytree(folders["flat"], folder, copy_function=shutil.copy)
        return read or original(*arguments, **options)

    monkeypatch.setattr(module, when, replaced)
    index = Index.open(folder)
    assert index.kind == "flat"
    assert index.search(VECTORS[:1], 1).ids == [["图0"]]


def test_an_index_between_the_renames_that_replace_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda _: shutil.copytree(folders["flat"], tmp_path / "i"))
    assert len(Index.open(tmp_path / "i")) == 1500


# Making one


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_a_copy_counts_as_much_as_the_one_that_was_meant(tmp_path: Path, kind: str) -> None:
    folder = write_embeddings(tmp_path / "e", np.repeat(made(1000), 3, axis=0), shard_size=3000)
    about = build_index(folder, tmp_path / "i", kind=kind)
    assert about["recall"]["recall"] >= 0.95
    assert not list(remarks(about))


def test_queries_are_asked_without_their_copies(tmp_path: Path) -> None:
    """Which would be their ten nearest, and found by any setting."""
    vectors = np.concatenate([np.repeat(made(100), 20, axis=0), made(1000, seed=1)])
    about = build_index(write_embeddings(tmp_path / "e", vectors, shard_size=3000), tmp_path / "i", kind="ivfpq")
    best, copies = indexing._exact(vectors[:5], vectors.astype(np.float16), 10, indexing._COPY)
    assert (copies >= 20).all()
    assert (best < indexing._COPY).all()
    assert about["recall"]["recall"] >= 0.95
    assert about["search"]["nprobe"] > 4


def test_many_copies_make_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "FLAT_UP_TO", 100)
    vectors = np.concatenate([np.repeat(made(1), 150, axis=0), made(850, seed=1)])
    folder = write_embeddings(tmp_path / "e", vectors)
    about = build_index(folder, tmp_path / "i")
    assert (about["kind"], about["copies"]) == ("flat", 150)
    assert "150 of 1,000 vectors" in "".join(remarks(about))
    assert "--kind flat" in "".join(remarks(build_index(folder, tmp_path / "i", kind="hnsw")))
    assert build_index(write_embeddings(tmp_path / "f", vectors[100:]), tmp_path / "i")["kind"] == "hnsw"


def test_a_graph_bears_some_copies_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "FLAT_UP_TO", 100)
    vectors = np.concatenate([np.repeat(made(10), 60, axis=0), made(600, seed=1)])
    about = build_index(write_embeddings(tmp_path / "e", vectors), tmp_path / "i")
    assert (about["kind"], about["copies"]) == ("hnsw", 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_a_full_disk_is_told(embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    original = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *a, **o: original(Path("/dev/full") if self.suffix == ".f16" else self, *a, **o)
    )
    with pytest.raises(TrimtabError, match="the disk is full"):
        build_index(embeddings, tmp_path / "i", kind=kind)


def test_kinds_follow_the_size() -> None:
    assert [choose_kind(count) for count in (1, 50_000, 50_001, 2_000_001)] == ["flat", "flat", "hnsw", "ivfpq"]


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_formats_are_alike(tmp_path: Path, format: str) -> None:
    folder = write_embeddings(tmp_path / "e", VECTORS[:250].astype(np.float16), format=format, dtype="float16")
    build_index(folder, tmp_path / "i")
    assert Index.open(tmp_path / "i").search(VECTORS[249], 1).ids == [["图249"]]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "shard-00001.parquet of 3 files is missing"),
        ("changed", "checksum differs"),
        ("none", "no embeddings.json"),
    ],
)
def test_embeddings_that_are_not_whole(tmp_path: Path, damage: str, words: str) -> None:
    folder = write_embeddings(tmp_path / "e", VECTORS[:250])
    path = folder / "shard-00001.parquet"
    if damage == "missing":
        path.unlink()
    elif damage == "changed":
        path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    else:
        folder = tmp_path
    with pytest.raises(DataError, match=words):
        build_index(folder, tmp_path / "i")
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize("name", ["shard-00001.npy", "shard-00001.jsonl"])
def test_both_files_of_an_npy_shard_are_checked(tmp_path: Path, name: str) -> None:
    folder = write_embeddings(tmp_path / "e", VECTORS[:250], format="npy")
    path = folder / name
    path.write_bytes(path.read_bytes().replace("图107".encode(), "图108".encode()) + b"\n")
    with pytest.raises(DataError, match=rf"{name} is damaged .*: delete it"):
        build_index(folder, tmp_path / "i")
    path.unlink()
    with pytest.raises(DataError, match=rf"{name} of 6 files is missing: run the same"):
        build_index(folder, tmp_path / "i")


def test_descriptions_without_the_checksum_of_ids_are_read(tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "e", VECTORS[:250], format="npy")
    about = json.loads((folder / "embeddings.json").read_text())
    for shard in about["shards"]:
        del shard["columns_sha256"]
    (folder / "embeddings.json").write_text(json.dumps(about))
    assert build_index(folder, tmp_path / "i")["count"] == 250


def test_vectors_of_another_type_are_refused(tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "e", (VECTORS[:9] * 9).astype(np.int32))
    with pytest.raises(DataError, match="holds int32"):
        build_index(folder, tmp_path / "i")
    bad = VECTORS[:9].copy()
    bad[3, 3] = np.nan
    with pytest.raises(DataError, match="NaN"):
        build_index(write_embeddings(tmp_path / "f", bad), tmp_path / "i")


def test_folders_of_other_things_are_left_alone(embeddings: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="something else"):
        build_index(embeddings, tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "dear"
    build_index(embeddings, tmp_path / "i")
    build_index(embeddings, tmp_path / "i", kind="hnsw")  # an index is replaced
    assert Index.open(tmp_path / "i").kind == "hnsw"


def test_two_at_once_are_refused(embeddings: Path, tmp_path: Path) -> None:
    def again(*_: int) -> None:
        build_index(embeddings, tmp_path / "i")

    with pytest.raises(TrimtabError, match="another process is writing"):
        build_index(embeddings, tmp_path / "i", progress=again)
    build_index(embeddings, tmp_path / "i")
    assert len(Index.open(tmp_path / "i")) == 1500


def test_the_index_of_the_current_folder_is_replaced(
    embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(embeddings, tmp_path / "i")
    monkeypatch.chdir(tmp_path / "i")
    build_index(embeddings, ".", kind="hnsw")
    assert Index.open(".").kind == "hnsw"


def test_recall_of_given_queries(embeddings: Path, tmp_path: Path) -> None:
    queries = write_embeddings(tmp_path / "q", made(60, seed=3))
    about = build_index(embeddings, tmp_path / "i", kind="hnsw", queries=queries)
    assert about["recall"]["queries_of"] == "queries"
    assert about["recall"]["queries"] == 60
    with pytest.raises(DataError, match="16"):
        build_index(embeddings, tmp_path / "i", queries=write_embeddings(tmp_path / "r", made(9, 8)))
    taught_later = replace(MODEL, fingerprint="a" * 64)  # it differs in its texts alone
    queries = write_embeddings(tmp_path / "t", made(60, seed=3), of="texts", model=taught_later)
    assert build_index(embeddings, tmp_path / "i", queries=queries)["recall"]["queries"] == 60


def test_queries_that_were_changed_are_refused(embeddings: Path, tmp_path: Path) -> None:
    queries = write_embeddings(tmp_path / "q", made(60, seed=3), format="npy")
    path = queries / "shard-00000.npy"
    np.save(path, np.load(path)[:, ::-1])
    with pytest.raises(DataError, match=r"shard-00000\.npy"):
        build_index(embeddings, tmp_path / "i", queries=queries)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"shard-00000\.npy"):
        list(Embeddings.open(queries).blocks(verify=False))


def test_queries_that_tell_nothing_are_refused(embeddings: Path, tmp_path: Path) -> None:
    other = replace(MODEL, name="other", fingerprint="a" * 64, image_fingerprint="b" * 64)
    queries = write_embeddings(tmp_path / "q", made(60, seed=3), model=other)
    with pytest.raises(DataError, match=r"'other'.*'tiny'.*another model"):
        build_index(embeddings, tmp_path / "i", queries=queries)
    with pytest.raises(DataError, match="no embeddings"):
        build_index(embeddings, tmp_path / "i", queries=write_embeddings(tmp_path / "none", made(0)))
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize(("options", "words"), [({"kind": "ivf"}, "flat, hnsw, ivfpq"), ({"recall": 0.0}, "above 0")])
def test_impossible_options(embeddings: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        build_index(embeddings, tmp_path / "i", **options)


def test_too_few_for_codes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few to train"):
        build_index(write_embeddings(tmp_path / "e", VECTORS[:20]), tmp_path / "i", kind="ivfpq")


def test_checksums_are_compared_unless_told_otherwise(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["flat"], tmp_path / "i"))
    data = bytearray((folder / "index.faiss").read_bytes())
    data[-3] ^= 1  # the last bits of a vector
    (folder / "index.faiss").write_bytes(data)
    with pytest.raises(DataError, match="checksum"):
        Index.open(folder)
    assert len(Index.open(folder, verify=False)) == len(Index.open(folders["flat"]))
