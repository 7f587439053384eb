"""Merged folders, read by a program in which Trimtab cannot be imported."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_links import save_language, save_tiny_domain, save_tiny_prompt
from tiny_towers import BUILDERS
from trimtab import files
from trimtab.adapters.adapted import load_adapted
from trimtab.adapters.composing import load_composed
from trimtab.errors import ModelError
from trimtab.serve import merging
from trimtab.serve.merging import merge, why_not
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.hf import load_base
from trimtab.towers.text_encoder import TextEncoder

TEXTS = ["a cat", "一只猫的照片", "猫", "a photo of a small red car on the road", "字" * 60]

# Whoever imports trimtab gets an error.
_ALONE = """
import sys
sys.modules["trimtab"] = None
import numpy as np, torch
from PIL import Image
folder, prefix, texts, out = sys.argv[1], sys.argv[2], sys.argv[3].split("|"), sys.argv[4]
"""
_TRANSFORMERS = """
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
tokens = tokenizer([prefix + text for text in texts], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    np.save(out, model(**tokens).pooler_output.numpy())
"""
_SENTENCES = """
from sentence_transformers import SentenceTransformer
np.save(out, SentenceTransformer(folder, trust_remote_code=True, device="cpu").encode(texts))
"""
_PICTURES = """
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(folder)
with torch.no_grad():
    found = model.get_image_features(**processor([Image.open(path) for path in texts], return_tensors="pt"))
found = getattr(found, "pooler_output", found)
np.save(out, torch.nn.functional.normalize(found, dim=-1).numpy())
"""


def alone(code: str, folder: Path, texts: list[str], place: Path, prefix: str = "") -> np.ndarray:
    """What a program without Trimtab makes of `texts`."""
    out = place / "vectors.npy"
    command = [sys.executable, "-c", _ALONE + code, str(folder), prefix, "|".join(texts), str(out)]
    environment = {"HF_HOME": str(place / "hub"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(out)


@pytest.fixture(scope="module")
def language(tiny_base: Any, tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With a prefix, whose tokens the adapter does not see."""
    student = TextEncoder.load(tiny_folder("bert"), device="cpu", prefix="a photo of ")
    folder = save_language(tmp_path_factory.mktemp("zh") / "zh", tiny_base("clip"), student)
    return load_adapted(folder, base=tiny_base("clip"), student=student)


@pytest.fixture(scope="module")
def merged(language: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "out"
    about = merge(language, folder)
    assert float(about["largest difference"]) < 1e-5
    return folder


def test_the_text_encoder_loads_with_transformers_alone(language: Any, merged: Path, tmp_path: Path) -> None:
    found = alone(_TRANSFORMERS, merged, TEXTS, tmp_path, prefix="a photo of ")
    assert np.allclose(found, DualEncoder.encode_text(language, TEXTS), atol=1e-5)
    other = [text for text in TEXTS if not text.isascii()]  # these the model itself sends there
    assert np.allclose(found[[not text.isascii() for text in TEXTS]], language.encode_text(other), atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("sentence_transformers") is None, reason="needs the extra bench")
def test_the_text_encoder_loads_with_sentence_transformers(language: Any, merged: Path, tmp_path: Path) -> None:
    found = alone(_SENTENCES, merged, TEXTS, tmp_path)  # which sets the prefix by itself
    assert np.allclose(found, DualEncoder.encode_text(language, TEXTS), atol=1e-5)


def test_its_base_lies_beside_it(language: Any, merged: Path, pictures: list[Image.Image]) -> None:
    base = load_base(str(merged / "base"), device="cpu")
    assert np.array_equal(base.encode_image(pictures), language.encode_image(pictures))
    assert {path.name for path in merged.iterdir()} >= {"text_encoder.py", "modules.json", "README.md", "config.json"}
    assert "trimtab" not in {line.split()[1].partition(".")[0] for line in _imports(merged / "text_encoder.py")}


def _imports(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]


@pytest.mark.parametrize("name", ["starter", "clip-resnet"])
def test_towers_of_our_own_are_brought_along(name: str, tmp_path: Path, pictures: list[Image.Image]) -> None:
    base = load_base(str(BUILDERS[name](tmp_path / name)), device="cpu")
    about = merge(base, tmp_path / "out")
    assert "trust_remote_code=True" in about["load_with"]
    paths = []
    for at, picture in enumerate(pictures):
        picture.convert("RGB").save(tmp_path / f"{at}.png")
        paths.append(str(tmp_path / f"{at}.png"))
    found = alone(_PICTURES, tmp_path / "out", paths, tmp_path)
    assert np.allclose(found, base.encode_image(paths), atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "attention"])
@pytest.mark.parametrize(("init", "hidden", "memory"), [("ridge", 0, 0), ("random", 0, 5), ("ridge", 7, 0)])
def test_every_adapter(
    tiny_base: Any, tiny_folder: Any, tmp_path: Path, pooling: str, init: str, hidden: int, memory: int
) -> None:
    import tiny_models
    from trimtab.adapters.adapted import LanguageAdapted
    from trimtab.adapters.language import LanguageAdapter
    from trimtab.config import LanguageAdapterConfig

    base, student = tiny_base("clip"), TextEncoder.load(tiny_folder("bert"), device="cpu")
    config = LanguageAdapterConfig(
        width=12,
        layers=2,
        heads=2,
        hidden=hidden,
        init=init,  # type: ignore[arg-type]
        pooling=pooling,  # type: ignore[arg-type]
        memory=memory,
    )
    adapter = LanguageAdapter(config, input_dim=2 * student.hidden_size, output_dim=base.embedding_dim)
    tiny_models.randomised(adapter, 3)
    if adapter.memory is not None:
        adapter.memory.fill(*torch.randn(2, memory, base.embedding_dim), torch.randn(4, 3, base.embedding_dim))
        adapter.memory.weight.fill_(4.0)
        adapter.memory.sharpness.fill_(1.0)
    model = LanguageAdapted(base, student, adapter, layers=(0, -1), name="tiny")
    assert merging.write_text_encoder(model, tmp_path / "out") < 1e-5


def test_what_no_folder_can_hold_is_refused_with_the_reason(
    tiny_base: Any, tiny_folder: Any, language: Any, tmp_path: Path
) -> None:
    base = tiny_base("clip")
    domain = load_adapted(save_tiny_domain(tmp_path / "shop", base), base=base)
    prompt = load_adapted(save_tiny_prompt(tmp_path / "prompt", base), base=base)
    both = load_composed([tmp_path / "shop", language.folder], base=base, student=language.student)
    padded = TextEncoder.load(tiny_folder("siglip"), device="cpu")
    other = load_adapted(save_language(tmp_path / "padded", base, padded), base=base, student=padded)
    for model, words in [(domain, "GELU"), (prompt, "prompts are inputs"), (both, "GELU"), (other, "padded in a way")]:
        assert words in why_not(model)
        with pytest.raises(ModelError, match=r"(?s)cannot be merged.*--format onnx"):
            merge(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    each = load_adapted(save_tiny_prompt(tmp_path / "each", base, instance=True), base=base)
    assert "except its classes: prompts with an instance part" in why_not(each)
    assert "except" not in why_not(prompt)
    both.alpha = 0.0
    assert "base" in {path.name for path in Path(merge(both, tmp_path / "out")["folder"]).iterdir()}


def test_a_format_that_cannot_hold_the_model_either_is_not_named(tiny_base: Any, tmp_path: Path) -> None:
    base = tiny_base("siglip2")
    model = load_adapted(save_tiny_domain(tmp_path / "shop", base), base=base)
    assert "ONNX cannot hold it either: the image processor of" in why_not(model)
    assert "--format onnx" not in why_not(model)


def test_another_result_is_not_kept(language: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "TOLERANCE", 1e-12)
    with pytest.raises(ModelError, match="not kept"):
        merge(language, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {".out.lock"}


def test_a_mounted_folder_is_filled_where_it_is(
    tiny_base: Any, tmp_path: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "volume"
    out.mkdir()
    before = out.stat().st_ino
    monkeypatch.setattr(files.os.path, "ismount", lambda path: Path(path) == out)
    base = tiny_base("clip")
    merge(base, out)
    assert out.stat().st_ino == before
    assert np.array_equal(load_base(str(out), device="cpu").encode_image(pictures), base.encode_image(pictures))
    with pytest.raises(ModelError, match="holds other files"):
        merge(base, out)
    for path in out.iterdir():
        if not path.name.startswith("."):  # a lock file stays
            path.unlink()
    merge(base, out)
    assert (out / "config.json").is_file()
