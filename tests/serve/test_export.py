from __future__ import annotations

import errno
import json
import runpy
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_links import CLASSES, save_language, save_tiny_domain, save_tiny_prompt
from tiny_models import CONTEXT, build_siglip, randomised
from tiny_pictures import bmp_with_alpha, tiff_of_12_bits
from tiny_starter import build_starter
from trimtab import scripts
from trimtab.adapters.adapted import load_adapted
from trimtab.adapters.composing import load_composed
from trimtab.adapters.domain import DomainAdapted, DomainAdapters
from trimtab.adapters.gate import DomainGate
from trimtab.config import DomainAdapterConfig
from trimtab.data.images import read_image
from trimtab.errors import ModelError, TrimtabError
from trimtab.serve import export as module
from trimtab.serve import onnx_runtime
from trimtab.serve.export import export_onnx, quantise
from trimtab.serve.onnx_runtime import Encoder, read
from trimtab.towers.hf import load_base
from trimtab.towers.memory import PairMemory
from trimtab.towers.text_encoder import TextEncoder

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

TEXTS = ["a cat", "一只猫的照片", "a photo of a small red car on the road", "猫", "", "mixed 猫 text", "字" * 60]
TEXTS += ["naive\u0308", "ｶﾞﾗｽ"]


def check(model: Any, folder: Path, pictures: list[Image.Image]) -> Encoder:
    encoder = Encoder(folder, threads=1)
    assert np.allclose(encoder.encode_image(pictures), model.encode_image(pictures), atol=1e-5)
    assert np.allclose(encoder.encode_text(TEXTS), model.encode_text(TEXTS), atol=1e-5)
    for text in TEXTS:
        assert np.allclose(encoder.encode_text([text]), model.encode_text([text]), atol=1e-5)
    return encoder


def test_one_text_and_one_picture(tiny_base: Any, pictures: list[Image.Image], tmp_path: Path) -> None:
    model = tiny_base("clip")
    export_onnx(model, tmp_path / "out")
    pictures[0].save(tmp_path / "a.png")
    encoder = Encoder(tmp_path / "out", threads=1)
    assert np.allclose(encoder.encode_text("a cat"), model.encode_text("a cat"), atol=1e-5)
    assert np.allclose(encoder.encode_text(iter(["a", "cat"])), model.encode_text(["a", "cat"]), atol=1e-5)
    expected = model.encode_image(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for one in (tmp_path / "a.png", str(tmp_path / "a.png"), pictures[0], content, [content], iter([content])):
        assert np.allclose(encoder.encode_image(one), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["clip", "siglip", "chinese_clip", "altclip", "vision-text-dual-encoder", "flava"])
def test_families(tiny_base: Callable[[str], Any], family: str, pictures: list[Image.Image], tmp_path: Path) -> None:
    model = tiny_base(family)
    about = export_onnx(model, tmp_path / "out")
    assert about["parity"]["image"] < 1e-5
    assert about["parity"]["text"] < 1e-5
    check(model, tmp_path / "out", pictures)


def test_a_residual_image_tower(base_of: Callable[[str], Any], pictures: list[Image.Image], tmp_path: Path) -> None:
    model = base_of("clip-resnet")
    about = export_onnx(model, tmp_path / "out")
    assert max(about["parity"][tower] for tower in ("image", "text")) < 1e-5
    check(model, tmp_path / "out", pictures)


def build_siglip_in_python(folder: Path) -> Path:
    """SigLIP's own tokenizer asks for sentencepiece; this one is written in Python too, and needs no file."""
    from transformers import ByT5Tokenizer

    return build_siglip(folder, ByT5Tokenizer(model_max_length=CONTEXT))


def test_a_tokenizer_written_in_python(pictures: list[Image.Image], tmp_path: Path) -> None:
    model = load_base(str(build_siglip_in_python(tmp_path / "siglip")), device="cpu")
    about = export_onnx(model, tmp_path / "out")
    assert about["texts"][0]["tokenizer"] == "tokenizer"
    assert about["parity"]["text"] < 1e-5
    assert not (tmp_path / "out/tokenizer.json").exists()
    check(model, tmp_path / "out", pictures)
    export_onnx(model, tmp_path / "out")  # over the one before


def test_a_tokenizer_written_in_python_needs_transformers(
    tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_onnx(load_base(str(build_siglip_in_python(tmp_path / "siglip")), device="cpu"), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers sentencepiece"):
        Encoder(tmp_path / "out")


def test_a_tokenizer_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    model = load_base(str(build_siglip_in_python(tmp_path / "siglip")), device="cpu")
    own = type("OwnTokenizer", (ByT5Tokenizer,), {"__module__": "transformers_modules.own"})
    model.text_inputs.tokenizer.__class__ = own
    with pytest.raises(ModelError, match=r"\(OwnTokenizer\) is code of its own, which is not exported"):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_varying_sizes_are_refused(tiny_base: Callable[[str], Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="varying sizes"):
        export_onnx(tiny_base("siglip2"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def composed(tiny_base: Any, tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    place, base = tmp_path_factory.mktemp("links"), tiny_base("clip")
    student = TextEncoder.load(tiny_folder("bert"), device="cpu")
    domain = save_tiny_domain(place / "shop", base)
    parts = [domain, save_language(place / "zh", base, student)]
    parts.append(save_tiny_prompt(place / "prompt", load_adapted(domain, base=base)))
    return load_composed(parts, base=base)


@pytest.fixture(scope="module")
def loader(tiny_base: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an exported folder's own runtime.py defines."""
    out = tmp_path_factory.mktemp("loader") / "out"
    export_onnx(tiny_base("clip"), out)
    return runpy.run_path(str(out / "runtime.py"))


def test_all_links_are_inside(composed: Any, pictures: list[Image.Image], tmp_path: Path) -> None:
    about = export_onnx(composed, tmp_path / "out")
    assert [one["script"] for one in about["texts"]] == ["latin", "other"]
    assert about["fingerprint"] == composed.fingerprint
    encoder = check(composed, tmp_path / "out", pictures)
    classes = json.loads((tmp_path / "out/classes.json").read_text())
    logits = classes["scale"] * encoder.encode_image(pictures) @ np.load(tmp_path / "out/classes.npy").T
    expected = composed.classifier().scores(pictures)
    found = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert classes["classes"] == list(CLASSES)
    assert np.allclose(found, expected, atol=1e-4)
    base = composed.base.encode_image(pictures)
    assert not np.allclose(encoder.encode_image(pictures), base, atol=1e-3)


@pytest.mark.parametrize("gated", [False, True])
def test_prompts_that_look_at_patches(tiny_base: Any, pictures: list[Image.Image], tmp_path: Path, gated: bool) -> None:
    base = tiny_base("clip")
    domain: Any = load_adapted(save_tiny_domain(tmp_path / "shop", base), base=base)
    if gated:
        centre = torch.from_numpy(base.encode_image(pictures[:1]))
        near = np.sort(base.encode_image(pictures) @ centre[0].numpy())
        domain = DomainAdapted(base, domain.adapters, gate=DomainGate(centre, float(near[1]), float(near[3])))
    model = load_adapted(save_tiny_prompt(tmp_path / "prompt", domain, patches=True), base=domain)
    about = export_onnx(model, tmp_path / "out", pictures=pictures)
    assert about["parity"]["classes"] < 1e-5
    encoder = check(model, tmp_path / "out", pictures)
    assert encoder.classes == list(CLASSES)
    classifier = model.classifier()
    for some in (pictures[:1], pictures):
        assert np.allclose(encoder.class_scores(some), classifier.scores(some), atol=1e-5)
    assert encoder.predict(pictures) == [CLASSES[at] for at in classifier.scores(pictures).argmax(axis=1)]
    without = embedding_scores(model, pictures)
    assert not np.allclose(without, classifier.scores(pictures), atol=1e-3)  # so patches do count


def embedding_scores(model: Any, pictures: list[Image.Image]) -> np.ndarray:
    classes, embeddings = model.classifier()._known[1]
    with torch.no_grad():
        vectors = classes.weights(embeddings).numpy()
    scores = np.exp(model.class_scale * model.encode_image(pictures) @ vectors.T)
    return scores / scores.sum(axis=1, keepdims=True)


def test_prompts_of_each_picture_are_left_out(tiny_base: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny_base("clip")
    model = load_adapted(save_tiny_prompt(tmp_path / "prompt", base, instance=True), base=base)
    about = export_onnx(model, tmp_path / "out")
    assert "classes" not in about["parity"]
    assert "prompt.instance=null" in caplog.text
    assert json.loads((tmp_path / "out/export.json").read_text()) == about
    with pytest.raises(FileNotFoundError, match=r"classes\.json: prompts with an instance part"):
        Encoder(tmp_path / "out").predict([])


def test_a_model_without_prompts_has_no_classes(
    tiny_base: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "classes_left_out" not in export_onnx(tiny_base("clip"), tmp_path / "out")
    assert "classes" not in caplog.text
    with pytest.raises(FileNotFoundError, match="no prompts with classes"):
        Encoder(tmp_path / "out").predict([])


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_gate_is_inside(tiny_base: Any, pictures: list[Image.Image], tmp_path: Path, kind: str) -> None:
    base = tiny_base("clip")
    centre = torch.from_numpy(base.encode_image(pictures[:1]))
    near = np.sort(base.encode_image(pictures) @ centre[0].numpy())
    high = float(near[2:4].mean())  # some pictures are inside, some outside
    gate = DomainGate(centre, high if kind == "hard" else high - 0.2, high)
    plain = load_adapted(save_tiny_domain(tmp_path / "shop", base), base=base)
    model = DomainAdapted(base, plain.adapters, gate=gate)
    export_onnx(model, tmp_path / "out", pictures=pictures)
    encoder = check(model, tmp_path / "out", pictures)
    moved = np.abs(encoder.encode_image(pictures) - base.encode_image(pictures)).max(axis=1)
    assert moved.max() > 1e-3
    if kind == "hard":
        assert moved.min() < 1e-5


def test_adapters_beside_convolutions_are_inside(pictures: list[Image.Image], tmp_path: Path) -> None:
    base = load_base(str(build_starter(tmp_path / "starter")), device="cpu")
    groups = [DomainAdapterConfig("image", "conv", first=-2, width=4)]
    model = DomainAdapted(base, randomised(DomainAdapters(base, groups)))  # type: ignore[arg-type]
    export_onnx(model, tmp_path / "out", pictures=pictures[:2])
    found = Encoder(tmp_path / "out", threads=1).encode_image(pictures[:2])
    assert np.allclose(found, model.encode_image(pictures[:2]), atol=1e-5)
    assert np.abs(found - base.encode_image(pictures[:2])).max() > 1e-3


@pytest.mark.parametrize("gated", [False, True])
def test_a_memory_of_pictures_is_inside(
    gated: bool, tiny_base: Any, pictures: list[Image.Image], tmp_path: Path
) -> None:
    base = tiny_base("clip")
    plain = load_adapted(save_tiny_domain(tmp_path / "shop", base), base=base)
    keys = torch.from_numpy(plain.encode_image(pictures[:2]))
    memory = PairMemory(2, base.embedding_dim)
    memory.fill(keys, torch.randn(2, base.embedding_dim, generator=torch.Generator().manual_seed(0)))
    memory.weight.fill_(0.5)
    centre = torch.from_numpy(base.encode_image(pictures[:1]))
    gate = DomainGate(centre, 0.0, float(np.sort(base.encode_image(pictures) @ centre[0].numpy())[3]))
    model = DomainAdapted(base, plain.adapters, gate=gate if gated else None, memory=memory)
    export_onnx(model, tmp_path / "out", pictures=pictures)
    encoder = check(model, tmp_path / "out", pictures)
    assert np.abs(encoder.encode_image(pictures) - plain.encode_image(pictures)).max() > 1e-2


def test_english_through_the_adapter(
    tiny_base: Any, tiny_folder: Any, pictures: list[Image.Image], tmp_path: Path
) -> None:
    student = TextEncoder.load(tiny_folder("bert"), device="cpu", prefix="a photo of ")
    folder = save_language(tmp_path / "zh", tiny_base("clip"), student, english="adapter")
    model = load_adapted(folder, base=tiny_base("clip"), student=student)
    assert [one["script"] for one in export_onnx(model, tmp_path / "out")["texts"]] == ["all"]
    check(model, tmp_path / "out", pictures)


def test_the_loader_needs_neither_torch_nor_trimtab(
    tiny_base: Any, pictures: list[Image.Image], tmp_path: Path
) -> None:
    model = tiny_base("clip")
    export_onnx(model, tmp_path / "out")
    picture = pictures[0].convert("RGBA")
    picture.putalpha(90)
    picture.save(tmp_path / "a.png")
    code = (
        "import sys; from runtime import Encoder; import numpy as np\n"
        "e = Encoder('.'); t = e.encode_text(['a cat']); i = e.encode_image(['../a.png'])\n"
        "assert not {'torch', 'transformers', 'trimtab'} & set(sys.modules), sys.modules.keys()\n"
        "print(*np.concatenate([t, i]).ravel())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True, check=True
    )
    found = np.array(done.stdout.split(), float).reshape(2, -1)
    wanted = np.concatenate([model.encode_text("a cat"), model.encode_image(tmp_path / "a.png")])
    assert np.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["I;16", "I", "I of a PNG", "F", "F of bytes", "RGBA", "LA", "P", "1", "CMYK", "L"])
def test_pictures_are_read_alike(kind: str, tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 35 * 40, dtype=np.float32).reshape(35, 40)
    image = {
        "I;16": lambda: Image.fromarray((ramp * 65535).astype(np.uint16)),
        "I": lambda: Image.fromarray((ramp * 70000).astype(np.int32)),
        "I of a PNG": lambda: Image.fromarray((ramp * 300).astype(np.int32)),
        "F": lambda: Image.fromarray(ramp),
        "F of bytes": lambda: Image.fromarray(ramp * 200),
    }.get(kind, lambda: Image.fromarray((ramp * 255).astype(np.uint8)).convert(kind))()
    if kind == "I of a PNG":
        image.format = "PNG"  # type: ignore[misc]
    for orientation in range(10):
        image.getexif()[0x0112] = orientation
        assert np.array_equal(read(image), read_image(image))


@pytest.mark.parametrize(
    "name",
    [
        *("deep.png", "deep.tiff", "deep.pgm", "turned.jpg", "turned.png", "turned.tiff"),
        *("12.tiff", "white-at-0.tiff", "alpha-0.bmp"),
    ],
)
def test_files_are_read_alike(name: str, tmp_path: Path) -> None:
    deep, turned = module.made_files(tmp_path)
    (tmp_path / "12.tiff").write_bytes(tiff_of_12_bits(np.linspace(0, 4095, 600).reshape(20, 30)))
    with Image.open(deep) as image:
        image.save(tmp_path / "white-at-0.tiff", tiffinfo={0x0106: 0})
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
    pixels[..., 3] = 0
    (tmp_path / "alpha-0.bmp").write_bytes(bmp_with_alpha(pixels))
    if not (path := tmp_path / name).exists():
        with Image.open(turned if "turned" in name else deep) as image:
            image.save(path, **({"exif": image.getexif()} if "turned" in name else {}))
    for source in (path, Image.open(path)):
        assert np.array_equal(read(source), read_image(path))
    assert np.asarray(read(path)).std() > 20  # nothing is clipped away
    if "turned" in name:
        assert read(path).size == (200, 320)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_damaged_exif_does_not_matter(suffix: str, pictures: list[Image.Image], tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    pictures[0].save(path, exif=b"Exif\0\0MM\0\7\0\0\0\x08")  # no TIFF header
    assert np.array_equal(read(path), read_image(path))


def test_pixels_that_are_no_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        read(Image.fromarray(np.full((2, 2), np.nan, np.float32)))


def test_a_loader_that_reads_files_otherwise_fails_the_export(
    tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_runtime, "read", lambda source: read_image(source).transpose(Image.Transpose.ROTATE_90))
    with pytest.raises(ModelError, match="exported image tower"):
        export_onnx(tiny_base("clip"), tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "猫",
        "Ünï ①",
        "ｆｕｌｌ",
        "",
        "123!",
        "mixed 猫",
        "日本",
        "ж",
        "𝒜",
        "\U0001f600",
        "\u00b5m",
        "\u03bcm",
        "Hawai\u02bbi",
        "\u1d78",
    ],
)
def test_scripts_are_told_alike(loader: dict[str, Any], text: str) -> None:
    assert loader["is_latin"](text) == scripts.is_latin(text)


@pytest.mark.parametrize("text", ["a", "A\u0308pfel", "사과", "ｶﾞﾗｽ 3", "ﾞ", "كـتـاب", "ＡＢＣ①", ""])
def test_letters_have_one_form(loader: dict[str, Any], text: str) -> None:
    assert loader["normal_form"](text) == scripts.normal_form(text)
    assert loader["normal_form"](unicodedata.normalize("NFD", text)) == scripts.normal_form(text)


def test_a_difference_fails_the_export(tiny_base: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="differs from PyTorch's by"):
        export_onnx(tiny_base("clip"), tmp_path / "out", tolerance=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]


def test_folders_of_other_things_are_left_alone(tiny_base: Any, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ModelError, match="something else"):
        export_onnx(tiny_base("clip"), tmp_path)


def test_without_the_extra(tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(TrimtabError, match=r"trimtab\[onnx\]"):
        export_onnx(tiny_base("clip"), tmp_path / "out")


def test_int8(tiny_base: Any, pictures: list[Image.Image], tmp_path: Path) -> None:
    model = tiny_base("clip")
    export_onnx(model, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no int8 towers: export the model again with --int8"):
        Encoder(tmp_path / "out", int8=True)
    assert quantise(tmp_path / "out") == ["image-int8.onnx", "text-int8.onnx"]
    small = Encoder(tmp_path / "out", int8=True)
    cosines = (small.encode_image(pictures) * model.encode_image(pictures)).sum(axis=1)
    assert cosines.min() > 0.9
    assert cosines.max() < 1 - 1e-7


def test_int8_of_a_gate_is_int8_in_both_passes(tiny_base: Any, pictures: list[Image.Image], tmp_path: Path) -> None:
    import onnx

    base = tiny_base("clip")
    centre = torch.from_numpy(base.encode_image(pictures[:1]))
    near = np.sort(base.encode_image(pictures) @ centre[0].numpy())
    plain = load_adapted(save_tiny_domain(tmp_path / "shop", base), base=base)
    model = DomainAdapted(base, plain.adapters, gate=DomainGate(centre, float(near[2]), float(near[2])))
    export_onnx(model, tmp_path / "out", pictures=pictures)
    quantise(tmp_path / "out")
    graph = onnx.load(tmp_path / "out/image-int8.onnx").graph
    products = [node.op_type for node in graph.node if node.op_type.startswith("MatMul")]
    weights = {one.name: one.dims for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT}
    left = [name for name, shape in weights.items() if len(shape) == 2 and min(shape) > 1 and "onnx::MatMul" in name]
    assert not left, "weights that stayed as they were"
    assert products.count("MatMulInteger") > 24, "two layers of six products, twice"
    found = Encoder(tmp_path / "out", int8=True).encode_image(pictures)
    assert (found * model.encode_image(pictures)).sum(axis=1).min() > 0.8


def test_a_full_disk_leaves_no_part_of_a_quantised_tower(
    tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(source: Path, target: Path, **_: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "no space")

    export_onnx(tiny_base("clip"), tmp_path)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", cut_off)
    with pytest.raises(TrimtabError, match="disk is full"):
        quantise(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_made_pictures_have_several_shapes() -> None:
    assert len({one.size for one in module.made_pictures()}) >= 4
