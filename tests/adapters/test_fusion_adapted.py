from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_models import CORPUS, build_flava, randomised
from trimtab.adapters.adapted import load
from trimtab.adapters.fusion import FusionAdapted, load_fusion_adapted, save_fusion_adapter
from trimtab.adapters.resampler import FusionAdapter, ResamplerConfig
from trimtab.config import LanguageAdapterConfig
from trimtab.errors import ModelError, TrimtabError
from trimtab.towers.text_encoder import TextEncoder

ENGLISH, CHINESE = CORPUS[:5], CORPUS[12:17]
PATCHES, TOKENS = 17, 6


@pytest.fixture(scope="module")
def student(tiny_folder: Any) -> TextEncoder:
    return TextEncoder.load(tiny_folder("bert"), device="cpu")


def build(output_dim: int = 16) -> FusionAdapter:
    torch.manual_seed(0)
    adapter = FusionAdapter(
        LanguageAdapterConfig(width=8, heads=2, layers=1),
        ResamplerConfig(tokens=TOKENS, heads=2, layers=1),
        input_dim=16,
        output_dim=output_dim,
    )
    adapter.resampler.length.copy_(torch.tensor([-1.0, 0.5]))  # half of the student's tokens, without CLS and SEP
    return randomised(adapter)


@pytest.fixture
def adapted(tiny_base: Any, student: TextEncoder) -> FusionAdapted:
    return FusionAdapted(tiny_base("flava"), student, build())


def test_fused_states_of_another_language(adapted: FusionAdapted, pictures: list[Image.Image]) -> None:
    fused = adapted.fused(pictures, CHINESE)
    assert fused.cls is not None
    assert fused.cls.shape == (5, 24)
    assert fused.image.shape == (5, PATCHES, 24)
    counts = [1 + round(len(text) / 2) for text in CHINESE]  # one token per character
    assert fused.text_mask.sum(1).tolist() == counts
    assert fused.text.shape == (5, max(counts), 24)
    assert not fused.cls.requires_grad


def test_the_fingerprint_knows_all_that_embeddings_depend_on(tiny_base: Any, student: TextEncoder) -> None:
    base = tiny_base("flava")
    plain, same = (FusionAdapted(base, student, build()) for _ in range(2))
    others = [
        FusionAdapted(base, student, build(), english="adapter"),
        FusionAdapted(base, student, build(), layers=(-2,)),
        FusionAdapted(base, student, randomised(build(), seed=1)),
    ]
    assert plain.fingerprint == same.fingerprint == plain.fingerprint_on(base)
    assert len({plain.fingerprint, *(one.fingerprint for one in others)}) == 4


def test_the_mask_covers_fusion_cls_image_and_text(
    adapted: FusionAdapted, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    forward = adapted.model.multimodal_model.forward

    def spy(hidden_states: Any, attention_mask: Any = None, **options: Any) -> Any:
        seen.append((hidden_states.shape, attention_mask))
        return forward(hidden_states, attention_mask=attention_mask, **options)

    monkeypatch.setattr(adapted.model.multimodal_model, "forward", spy)
    fused = adapted.fused(pictures, [ENGLISH[0], *CHINESE[:4]])
    (shape, mask), *_ = seen
    assert shape[1] == PATCHES + fused.text_mask.shape[1]
    assert mask.shape == (5, 1 + PATCHES + fused.text_mask.shape[1])
    assert mask[:, : 1 + PATCHES].all()
    assert torch.equal(mask[:, 1 + PATCHES :].bool(), fused.text_mask)


def test_routed_english_is_flavas_own_output(adapted: FusionAdapted, pictures: list[Image.Image]) -> None:
    tokens = adapted.base.text_inputs(ENGLISH)
    pixels = torch.cat([adapted.preprocess(picture)["pixel_values"] for picture in pictures])
    with torch.no_grad():
        expected = adapted.model(**tokens, pixel_values=pixels).multimodal_embeddings
    fused = adapted.fused(pictures, ENGLISH)
    assert torch.equal(fused.text_mask, tokens["attention_mask"].bool())
    assert fused.cls is not None
    torch.testing.assert_close(fused.cls, expected[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(fused.image, expected[:, 1 : 1 + PATCHES], atol=1e-5, rtol=0)
    real = fused.text_mask
    torch.testing.assert_close(fused.text[real], expected[:, 1 + PATCHES :][real], atol=1e-5, rtol=0)


def test_company_and_order_do_not_matter(adapted: FusionAdapted, pictures: list[Image.Image]) -> None:
    mixed = [CHINESE[0], ENGLISH[0], CHINESE[1], ENGLISH[3], CHINESE[2]]
    together = adapted.fused(pictures, mixed, batch_size=2)
    for i, (picture, text) in enumerate(zip(pictures, mixed, strict=True)):
        alone = adapted.fused([picture], [text])
        assert together.cls is not None
        assert alone.cls is not None
        torch.testing.assert_close(together.cls[i], alone.cls[0], atol=1e-5, rtol=1e-5)
        real = together.text_mask[i]
        torch.testing.assert_close(together.text[i][real], alone.text[0], atol=1e-5, rtol=1e-5)


def test_english_through_the_adapter(tiny_base: Any, student: TextEncoder) -> None:
    adapted = FusionAdapted(tiny_base("flava"), student, build(), english="adapter")
    states, mask = adapted.text_states(ENGLISH)
    _, expected, counted = adapted.fusion(*student.states(ENGLISH))
    for row, keep, wanted, wanted_keep in zip(states, mask, expected, counted, strict=True):
        torch.testing.assert_close(row[keep], wanted[wanted_keep])


def test_unpaired_input_is_refused(adapted: FusionAdapted, pictures: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match="5 images and 1 texts"):
        adapted.fused(pictures, CHINESE[:1])
    with pytest.raises(ValueError, match="at least one"):
        adapted.fused([], [])


def test_embeddings_come_from_the_estimated_cls(adapted: FusionAdapted, pictures: list[Image.Image]) -> None:
    states, _ = adapted.text_states(CHINESE)
    with torch.no_grad():
        features = adapted.model.text_projection(adapted.model.text_model.layernorm(states[:, 0]))
    expected = torch.nn.functional.normalize(features, dim=-1).numpy()
    np.testing.assert_allclose(adapted.encode_text(CHINESE), expected, atol=1e-5)
    np.testing.assert_array_equal(adapted.encode_text(ENGLISH), adapted.base.encode_text(ENGLISH))
    assert adapted.similarity(pictures, CHINESE).shape == (5, 5)


@torch.no_grad()
def test_saved_and_loaded_is_exact(adapted: FusionAdapted, pictures: list[Image.Image], tmp_path: Path) -> None:
    folder = save_fusion_adapter(
        tmp_path / "zh", adapted.fusion, base=adapted.base, student=adapted.student, metrics={"fused_cls": 0.5}
    )
    by_name = load_fusion_adapted(folder, device="cpu")
    shared = load_fusion_adapted(folder, base=adapted.base, student=adapted.student)
    expected = adapted.fused(pictures, CHINESE)
    for again in (by_name, shared, load(folder, device="cpu")):
        fused = again.fused(pictures, CHINESE)
        assert expected.cls is not None
        assert fused.cls is not None
        assert torch.equal(fused.cls, expected.cls)
        assert torch.equal(fused.text, expected.text)
        assert again.fingerprint == adapted.fingerprint
    copied = by_name.save_pretrained(tmp_path / "copy")
    again = load_fusion_adapted(copied, base=adapted.base, student=adapted.student)
    assert again.fingerprint == adapted.fingerprint


def test_other_bases_students_and_folders_are_refused(
    adapted: FusionAdapted, tiny_base: Any, tiny_folder: Any, tmp_path: Path
) -> None:
    folder = save_fusion_adapter(tmp_path / "zh", adapted.fusion, base=adapted.base, student=adapted.student)
    with pytest.raises(ModelError, match="was trained on the base"):
        load_fusion_adapted(folder, base=tiny_base("clip"), student=adapted.student)
    with pytest.raises(ModelError, match="was trained on the student"):
        load_fusion_adapted(folder, base=adapted.base, student=TextEncoder.load(tiny_folder("xlm-roberta")))
    with pytest.raises(ModelError, match="was trained on the base"):
        load(folder, base=tiny_base("clip"))
    with pytest.raises(ModelError, match="fuses nothing; the base must be a FLAVA"):
        FusionAdapted(tiny_base("clip"), adapted.student, build())
    with pytest.raises(ModelError, match=r"width 12; .* fuses 16"):
        FusionAdapted(tiny_base("flava"), adapted.student, build(output_dim=12))


def test_an_incomplete_description_is_refused(adapted: FusionAdapted, tmp_path: Path) -> None:
    folder = save_fusion_adapter(tmp_path / "zh", adapted.fusion, base=adapted.base, student=adapted.student)
    text = (folder / "adapter.json").read_text(encoding="utf-8")
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / "adapter.json").write_text(text.replace('"resampler": {', '"resampled": {'), encoding="utf-8")
    with pytest.raises(ModelError, match="lacks config 'resampler'"):
        load_fusion_adapted(tmp_path / "cut", base=adapted.base, student=adapted.student)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("english", "maybe", "english='maybe' rather than 'route'"),
        ("input_dim", "x", "wrong value"),
        ("adapter", 1, "must be a section"),
        ("input_dim", 10**13, "does not fit the fusion adapter|wrong size"),
        ("output_dim", 10**30, "wrong size"),
        ("resampler", {"tokens": 10**13, "heads": 1}, "does not fit the fusion adapter|wrong size"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(
    adapted: FusionAdapted, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    folder = save_fusion_adapter(tmp_path / "zh", adapted.fusion, base=adapted.base, student=adapted.student)
    description = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
    description["config"][key] = value
    (folder / "adapter.json").write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(TrimtabError, match=message):
        load_fusion_adapted(folder, base=adapted.base, student=adapted.student)


def test_base_and_student_are_found_from_anywhere(
    tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("flava", "bert"):
        shutil.copytree(tiny_folder(name), tmp_path / "models" / name)
    monkeypatch.chdir(tmp_path)
    base, student = load("models/flava", device="cpu"), TextEncoder.load("models/bert", device="cpu")
    folder = save_fusion_adapter(tmp_path / "zh", build(), base=base, student=student)
    monkeypatch.chdir(tmp_path / "models")
    assert np.isfinite(load(folder, device="cpu").encode_text(CHINESE)).all()
    shutil.rmtree(tmp_path / "models" / "flava")
    with pytest.raises(ModelError, match=r"names the base .*flava'.*--base .*base=\.\.\. of trimtab\.load"):
        load_fusion_adapted(folder)


def test_no_texts_at_all(adapted: FusionAdapted) -> None:
    states, mask = adapted.text_states([])
    assert (tuple(states.shape), tuple(mask.shape)) == ((0, 0, 16), (0, 0))


def test_bfloat16_base(tmp_path: Path, student: TextEncoder, pictures: list[Image.Image]) -> None:
    from trimtab.towers.hf import load_base

    base = load_base(build_flava(tmp_path / "flava"), device="cpu", dtype="bfloat16")
    half = FusionAdapted(base, student, build())
    fused = half.fused(pictures, [*CHINESE[:3], *ENGLISH[:2]])
    assert fused.text.dtype == torch.float32
    assert fused.text.isfinite().all()
    assert half.encode_text(CHINESE).shape == (5, 12)
