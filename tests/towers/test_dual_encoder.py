from __future__ import annotations

import io
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_models
from tiny_models import CONTEXT, CORPUS
from trimtab.data.images import ImageError
from trimtab.data.shards import PictureFile
from trimtab.errors import DataError, ModelError, TrimtabError
from trimtab.towers.hf import load_base


@pytest.fixture
def clip(tiny_base: Any) -> Any:
    return tiny_base("clip")


@pytest.fixture
def files(tmp_path: Path, pictures: list[Image.Image]) -> list[Path]:
    paths = [tmp_path / f"{index}.png" for index in range(len(pictures))]
    for path, picture in zip(paths, pictures):
        picture.save(path)
    return paths


def test_images_from_any_source_are_the_same(clip: Any, files: list[Path], pictures: list[Image.Image]) -> None:
    expected = clip.encode_image(pictures)
    sources = {
        "paths": files,
        "strings": [str(path) for path in files],
        "bytes": [path.read_bytes() for path in files],
        "arrays": [np.asarray(picture) for picture in pictures],
        "generator": (path for path in files),
        "mixed": [files[0], pictures[1], np.asarray(pictures[2]), str(files[3]), files[4].read_bytes()],
    }
    for kind, images in sources.items():
        np.testing.assert_allclose(clip.encode_image(images, batch_size=3), expected, atol=1e-6, err_msg=kind)


def test_one_image_and_one_stack(clip: Any, files: list[Path], pictures: list[Image.Image]) -> None:
    for image in (files[0], str(files[0]), pictures[0], np.asarray(pictures[0]), PictureFile(files[0], files[0].name)):
        assert clip.encode_image(image).shape == (1, clip.embedding_dim)
    stack = np.stack([np.asarray(pictures[1])] * 3)
    assert clip.encode_image(stack).shape == (3, clip.embedding_dim)


def test_nothing_gives_nothing(clip: Any) -> None:
    for empty in (clip.encode_image([]), clip.encode_text([]), clip.encode_text(iter([]))):
        assert empty.shape == (0, clip.embedding_dim)
        assert empty.dtype == np.float32
    assert clip.similarity([], CORPUS).shape == (0, len(CORPUS))


def test_one_text_is_one_text(clip: Any) -> None:
    np.testing.assert_allclose(clip.encode_text("a cat"), clip.encode_text(["a cat"]))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_do_not_change_embeddings(clip: Any, pictures: list[Image.Image], batch_size: int) -> None:
    np.testing.assert_allclose(
        clip.encode_text(CORPUS, batch_size=batch_size, progress=True), clip.encode_text(CORPUS), atol=1e-6
    )
    np.testing.assert_allclose(
        clip.encode_image(pictures, batch_size=batch_size, progress=True),
        clip.encode_image(pictures),
        atol=1e-6,
    )


@pytest.mark.parametrize("family", sorted(tiny_models.DUAL_ENCODERS))
def test_threads_do_not_mix_their_texts(family: str, tiny_base: Any, two_cores: None) -> None:
    base, texts = tiny_base(family), CORPUS * 5
    embeddings = base.encode_text(texts, batch_size=2)
    torch.set_num_threads(1)
    np.testing.assert_allclose(embeddings, base.encode_text(texts, batch_size=2), atol=1e-6)


def test_too_little_memory_for_a_batch_changes_no_embedding(
    clip: Any, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, texts = clip.encode_image(pictures), clip.encode_text(CORPUS)
    for name in ("pixel_features", "token_features"):
        whole = getattr(clip, name)

        def small(tensors: dict[str, torch.Tensor], whole: Any = whole) -> torch.Tensor:
            if len(next(iter(tensors.values()))) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return whole(tensors)

        monkeypatch.setattr(clip, name, small)
    np.testing.assert_allclose(clip.encode_image(pictures), images, atol=1e-6)
    np.testing.assert_allclose(clip.encode_text(CORPUS), texts, atol=1e-6)


def test_bad_image_stops_with_its_name(clip: Any, files: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff not a picture")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        clip.encode_image([*files, broken])
    with pytest.raises(ImageError, match="no such file"):
        clip.encode_image(tmp_path / "absent.png")


def test_bad_images_are_skipped_on_request(clip: Any, files: list[Path], tmp_path: Path) -> None:
    images = [files[0], tmp_path / "absent.png", files[1], "http://example.org/a.png", files[2]]
    embeddings = clip.encode_image(images, on_error="skip", batch_size=2)
    np.testing.assert_allclose(embeddings, clip.encode_image(files[:3]), atol=1e-6)
    clip.encode_image(images, on_error="skip")
    assert clip.last_skipped.indices == [1, 3]
    assert "absent.png" in clip.last_skipped[0].source

    assert clip.encode_image(images[1:2], on_error="skip").shape == (0, clip.embedding_dim)
    clip.encode_image(files)
    assert clip.last_skipped == []


def test_a_strip_does_not_fill_the_memory(clip: Any, tmp_path: Path) -> None:
    path = tmp_path / "strip.png"
    Image.new("RGB", (1, 20_000)).save(path)
    with pytest.raises(ImageError, match=r"strip\.png: is too narrow"):
        clip.encode_image(path)


def test_wrong_arguments(clip: Any) -> None:
    with pytest.raises(ValueError, match="on_error='ignore'"):
        clip.encode_image([], on_error="ignore")
    with pytest.raises(ValueError, match="batch_size=0"):
        clip.encode_text(["a"], batch_size=0)
    for encode in (clip.encode_image, clip.encode_text):
        with pytest.raises(TypeError, match=r"batch_size=2\.0 must be a whole number"):
            encode([], batch_size=2.0)
    with pytest.raises(DataError, match=r"give embeddings as a NumPy array, tensor\.numpy\(\)"):
        clip.similarity(torch.ones(1, clip.embedding_dim), ["a"])
    with pytest.raises(DataError, match="text 1 is a NoneType"):
        clip.encode_text(["a", None])
    with pytest.raises(DataError, match="text 0 is not valid Unicode"):
        clip.encode_text(["\ud800"])


def test_long_texts_are_cut_and_counted(clip: Any, caplog: pytest.LogCaptureFixture) -> None:
    long = "cat " * 100
    with caplog.at_level(logging.WARNING):
        clip.encode_text([long, "a cat", long + "dog"])
    assert clip.last_truncated == 2
    assert len(caplog.records) == 1
    assert f"2 of 3 texts were longer than the {CONTEXT} tokens" in caplog.text
    ids = clip.text_inputs([long])["input_ids"][0]
    assert len(ids) == CONTEXT
    assert ids[-1] == clip.text_inputs.tokenizer.eos_token_id

    clip.encode_text(["a cat"])
    assert clip.last_truncated == 0


def test_similarity_takes_embeddings_or_inputs(clip: Any, pictures: list[Image.Image]) -> None:
    from_inputs = clip.similarity(pictures, CORPUS)
    from_embeddings = clip.similarity(clip.encode_image(pictures), clip.encode_text(CORPUS))
    assert from_inputs.shape == (len(pictures), len(CORPUS))
    np.testing.assert_array_equal(from_inputs, from_embeddings)


def test_torch_features_are_the_embeddings_before_the_norm(clip: Any, pictures: list[Image.Image]) -> None:
    texts, images = clip.text_features(CORPUS), clip.image_features(pictures)
    assert not texts.requires_grad
    normalise = torch.nn.functional.normalize
    np.testing.assert_allclose(normalise(texts, dim=-1).numpy(), clip.encode_text(CORPUS), atol=1e-5)
    np.testing.assert_allclose(normalise(images, dim=-1).numpy(), clip.encode_image(pictures), atol=1e-5)


def test_low_precision_gives_float32_and_the_same_fingerprint(clip: Any, tiny_folder: Any) -> None:
    half = load_base(tiny_folder("clip"), device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert half.fingerprint == clip.fingerprint
    embeddings = half.encode_text(CORPUS)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, clip.encode_text(CORPUS), atol=0.1)


def test_damaged_weights_are_noticed(tiny_folder: Any) -> None:
    base = load_base(tiny_folder("clip"), device="cpu")
    base.model.text_projection.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinity for a text"):
        base.encode_text(["a cat"])


def test_saving_over_a_model_replaces_it(clip: Any, tmp_path: Path) -> None:
    for _ in range(2):
        clip.save_pretrained(tmp_path / "model")
    assert load_base(tmp_path / "model", device="cpu").fingerprint == clip.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # no temporary folder stays


def test_full_disk_is_explained(clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(clip.model, "save_pretrained", full)
    with pytest.raises(TrimtabError, match="disk is full"):
        clip.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_push_to_hub_uploads_the_saved_folder(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    seen: dict[str, Any] = {}

    class Hub:
        def __init__(self, token: str | None = None) -> None:
            seen["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> str:
            return f"https://hub.example/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            seen["files"] = {path.name for path in Path(folder_path).iterdir()}

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert clip.push_to_hub("me/model", token="t") == "https://hub.example/me/model"
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= seen["files"]


def test_push_to_hub_offline_is_explained(clip: Any) -> None:
    with pytest.raises(TrimtabError, match="cannot upload to me/model"):
        clip.push_to_hub("me/model")


# What is no picture, and what is no text


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((3, 9, 8), np.uint8), r"array \(3, 9, 8\) is one picture with its channels first.*transpose"),
        (torch.zeros(3, 8, 8), "pictures are a Tensor: give paths"),
        (io.BytesIO(b"x"), "pictures are a BytesIO: give paths, the bytes of files"),
        (None, "pictures are a NoneType"),
        (7, "pictures are a int"),
    ],
)
def test_what_is_taken_for_no_picture(clip: Any, images: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        clip.encode_image(images)


def test_a_grey_picture_as_wide_as_the_embeddings_is_not_taken_for_them(clip: Any) -> None:
    grey = np.random.default_rng(0).random((9, clip.embedding_dim), np.float32)
    with pytest.raises(DataError, match=r"rows have unit norm.*uint8 or in a list"):
        clip.similarity(grey, "a")
    assert clip.similarity([grey], "a").shape == (1, 1)
    unit = clip.encode_image([grey]).astype(np.float16)  # as embeddings are kept on disk
    assert np.allclose(clip.similarity(unit, "a"), clip.similarity([grey], "a"), atol=1e-3)


def test_paths_and_bytes_of_any_kind(clip: Any, files: list[Path]) -> None:
    class Place:
        def __fspath__(self) -> str:
            return str(files[0])

    expected = clip.encode_image(files[0])
    assert np.array_equal(clip.encode_image(Place()), expected)
    assert np.array_equal(clip.encode_image(bytearray(files[0].read_bytes())), expected)


def test_what_is_no_text(clip: Any) -> None:
    assert torch.equal(clip.text_features("a cat"), clip.text_features(["a cat"]))
    for texts in (None, 7):
        with pytest.raises(DataError, match=r"texts are a .*: give a text, or several"):
            clip.encode_text(texts)


def test_a_loaded_model_says_how_it_gets_to_another_process(clip: Any) -> None:
    with pytest.raises(ModelError, match=r"cannot be pickled: give other processes its name, and trimtab\.load"):
        pickle.dumps(clip)


def test_what_has_items_and_a_length_is_taken_as_torch_takes_it(clip: Any, pictures: list[Image.Image]) -> None:
    class Items:
        def __init__(self, items: list[Any]) -> None:
            self.items = items

        def __getitem__(self, at: int) -> Any:
            return self.items[at]

        def __len__(self) -> int:
            return len(self.items)

    assert np.array_equal(clip.encode_image(Items(pictures)), clip.encode_image(pictures))
    assert np.array_equal(clip.encode_text(Items(CORPUS[:3])), clip.encode_text(CORPUS[:3]))


def test_a_row_of_zeros_may_stand_for_a_picture_that_was_left_out(clip: Any, pictures: list[Image.Image]) -> None:
    vectors = clip.encode_image(pictures[:2])
    vectors[1] = 0
    assert clip.similarity(vectors, "a")[1] == 0
