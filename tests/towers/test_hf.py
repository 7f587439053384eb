"""What `load_base` refuses, and that each message names the thing and the remedy."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from tiny_starter import build_starter
from trimtab.errors import ModelError
from trimtab.towers import hf
from trimtab.towers.hf import load_base, portable
from trimtab.towers.text_encoder import TextEncoder


@pytest.fixture
def clip_copy(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("clip"), tmp_path / "clip"))


def load(folder: Path | str, **options: object) -> object:
    return load_base(folder, device="cpu", **options)  # type: ignore[arg-type]


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_weights_are_refused(clip_copy: Path) -> None:
    weights = load_file(clip_copy / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, clip_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the weights of CLIPModel: text_projection\.weight"):
        load(clip_copy)


def test_misshapen_weights_are_refused(clip_copy: Path) -> None:
    weights = load_file(clip_copy / "model.safetensors")
    weights["text_projection.weight"] = torch.zeros(3, 3)
    save_file(weights, clip_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"another shape .*text_projection\.weight"):
        load(clip_copy)


def test_unused_weights_do_no_harm(clip_copy: Path) -> None:
    weights = load_file(clip_copy / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(tiny_models.CONTEXT)[None]
    save_file(weights, clip_copy / "model.safetensors", metadata={"format": "pt"})
    load(clip_copy)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_damaged_safetensors_are_named(clip_copy: Path, keep: int) -> None:
    path = clip_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or cut short"):
        load(clip_copy)


def test_local_names_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "starter", "e5-small"):
        (tmp_path / name).mkdir()
    assert portable("model") == str(tmp_path / "model")
    for name in ("someone/model", "starter", "e5-small"):
        assert portable(name) == name
    assert portable("./starter") == str(tmp_path / "starter")


def test_a_hub_model_without_safetensors_is_named_with_the_way_out(
    clip_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    (clip_copy / "model.safetensors").unlink()  # its other weights are never fetched
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(clip_copy))
    for read in (load, TextEncoder.load):
        with pytest.raises(ModelError, match=r"owner/clip has no safetensors weights.*call save_pretrained\(folder\)"):
            read("owner/clip")


def test_pickled_weights_are_refused(clip_copy: Path) -> None:
    (clip_copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors file"):
        load(clip_copy)
    torch.save({}, clip_copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only in pytorch_model\.bin"):
        load(clip_copy)


def test_missing_shard_is_refused(clip_copy: Path) -> None:
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(clip_copy / "model.safetensors"), "b.safetensors")}
    (clip_copy / "model.safetensors").rename(clip_copy / "a.safetensors")
    (clip_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks b\.safetensors, which model\.safetensors\.index\.json lists: fetch"):
        load(clip_copy)
    (clip_copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="has no weight_map: fetch it again"):
        load(clip_copy)
    (clip_copy / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor .*, only a\.safetensors: fetch what"):
        load(clip_copy)


def test_missing_tokenizer_is_refused(clip_copy: Path) -> None:
    for path in clip_copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        load(clip_copy)


def test_damaged_tokenizer_is_refused(clip_copy: Path) -> None:
    (clip_copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"the tokenizer of .* cannot be loaded"):
        load(clip_copy)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("SiglipTokenizer", ImportError("SiglipTokenizer requires the SentencePiece library")),
        ("XLMRobertaTokenizer", ValueError("`tiktoken` is required to read a `tiktoken` file")),
    ],
)
def test_a_missing_sentencepiece_is_told_with_the_extra(
    kind: str, error: Exception, clip_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def fail(*_: object, **__: object) -> None:
        raise error

    (clip_copy / "tokenizer.json").rename(clip_copy / "spiece.model")
    edit_json(clip_copy / "tokenizer_config.json", tokenizer_class=kind)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r'needs the package sentencepiece: pip install "trimtab\[siglip\]"'):
        load(clip_copy)


def test_another_missing_package_is_told_in_the_words_of_transformers(
    clip_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def fail(*_: object, **__: object) -> None:
        raise ImportError("this needs jieba")

    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ModelError, match="needs another package: this needs jieba"):
        load(clip_copy)


def test_tokenizer_of_a_larger_model_is_refused(clip_copy: Path) -> None:
    path = clip_copy / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 9999, "content": "<extra>"})
    raw["model"]["vocab"]["<extra>"] = 9999
    path.write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="token ids up to 9999, but the text tower only has"):
        load(clip_copy)


def test_tokenizer_without_the_end_token_is_warned_of(clip_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = json.loads((clip_copy / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 7
    (clip_copy / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        load(clip_copy)
    assert "does not write token 7" in caplog.text


def test_missing_image_processor_is_refused(clip_copy: Path) -> None:
    (clip_copy / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="has no image processor"):
        load(clip_copy)


def test_unknown_image_processor_is_refused(clip_copy: Path) -> None:
    for name in ("FancyImageProcessor", "os.system", "AutoModel"):
        edit_json(clip_copy / "preprocessor_config.json", image_processor_type=name)
        with pytest.raises(ModelError, match=f"asks for the image processor {name!r}"):
            load(clip_copy)


@pytest.mark.parametrize("name", ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor"])
def test_image_processors_come_without_torchvision(clip_copy: Path, name: str) -> None:
    path = clip_copy / "preprocessor_config.json"
    edit_json(path, image_processor_type=name)
    assert type(load(clip_copy).image_processor).__name__ == "CLIPImageProcessorPil"  # type: ignore[attr-defined]


def test_image_processor_inside_a_processor_file(clip_copy: Path) -> None:
    path = clip_copy / "preprocessor_config.json"
    inner = json.loads(path.read_text())
    path.unlink()
    outer = {"processor_class": "CLIPProcessor", "image_processor": inner}
    (clip_copy / "processor_config.json").write_text(json.dumps(outer))
    assert load(clip_copy).image_processor.crop_size["height"] == tiny_models.IMAGE_SIZE  # type: ignore[attr-defined]


def test_image_processor_of_another_size_is_refused(clip_copy: Path) -> None:
    edit_json(clip_copy / "preprocessor_config.json", crop_size={"height": 64, "width": 64})
    with pytest.raises(ModelError, match="does not fit its image tower"):
        load(clip_copy)


def test_damaged_configurations_are_named(clip_copy: Path) -> None:
    path = clip_copy / "config.json"
    whole = path.read_text()
    for text, message in (
        ("{", "is not a JSON object"),
        ("[]", "is not a JSON object"),
        ("[" * 100_000, "is not a JSON object"),
        ("{}", "has no model_type"),
        ('{"model_type": "clip", "projection_dim": "x"}', "cannot be used"),
        ('{"model_type": "bert"}', "is a 'bert' model; a base must be one of clip, siglip"),
        ('{"model_type": "no-such-model"}', "cannot be used"),
    ):
        path.write_text(text)
        with pytest.raises(ModelError, match=message):
            load(clip_copy)
    path.unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(clip_copy)
    path.write_text(whole)
    (clip_copy / "adapter.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is an adapted folder.* take the base that `trimtab info .*` names"):
        load(clip_copy)


def test_open_clip_folder_points_to_convert(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ModelError, match="trimtab convert"):
        load(tmp_path)
    with pytest.raises(ModelError, match="trimtab convert"):
        load(tmp_path / "open_clip_config.json")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "runs/a/b", "what is this", "", "~/nowhere-at-all"])
def test_unknown_folders_are_refused_without_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ModelError, match=r"there is no such folder; give 'starter'"):
        load(name)


def test_hub_id_offline_fails_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"unknown model 'nobody/nothing'.*HF_HUB_OFFLINE"):
        load("nobody/nothing")
    assert time.monotonic() - start < 2


def test_hub_errors_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*args: object, **options: object) -> str:
        raise RuntimeError("401 Client Error.\nPlease log in")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=r"the hub says: 401 Client Error\.;"):
        load("owner/private")


def test_hub_id_fetches_no_pickle_and_no_code(clip_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, list[str]] = {}

    def fetch(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(clip_copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    base = load("owner/clip")
    assert base.name == "owner/clip"  # type: ignore[attr-defined]
    assert not {"*.py", "*.bin", "*.pt"} & set(asked["owner/clip"])


REMOTE_CODE = """
import pathlib, torch
from transformers import PreTrainedConfig, PreTrainedModel
pathlib.Path(__file__).with_name("ran").touch()

class OddConfig(PreTrainedConfig):
    model_type = "odd"

class OddModel(PreTrainedModel):
    config_class = OddConfig
    def __init__(self, config):
        super().__init__(config)
        self.table = torch.nn.Embedding(600, 8)
        self.pixel = torch.nn.Linear(3, 8)
        self.post_init()
    def get_text_features(self, input_ids, attention_mask):
        return self.table(input_ids).mean(1)
    def get_image_features(self, pixel_values):
        return self.pixel(pixel_values.mean((2, 3)))
"""


def test_remote_code_runs_only_when_trusted(clip_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    (clip_copy / "odd.py").write_text(REMOTE_CODE)
    auto_map = {"AutoConfig": "odd.OddConfig", "AutoModel": "odd.OddModel"}
    (clip_copy / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": auto_map}))
    weights = {"table.weight": torch.randn(600, 8), "pixel.weight": torch.randn(8, 3), "pixel.bias": torch.zeros(8)}
    save_file(weights, clip_copy / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelError, match="trust_remote_code=True"):
        load(clip_copy)
    assert not list(tmp_path.rglob("ran"))

    base = load(clip_copy, trust_remote_code=True)
    assert base.encode_text(["a cat"]).shape == (1, 8)  # type: ignore[attr-defined]


def test_auto_map_of_a_known_family_is_not_run(clip_copy: Path) -> None:
    edit_json(clip_copy / "config.json", auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.EvilConfig"})
    (clip_copy / "evil.py").write_text("raise SystemExit('this must not run')")
    load(clip_copy)


def test_devices_and_precisions() -> None:
    assert hf.pick_device("auto").type in ("cpu", "cuda", "mps")
    assert hf.pick_device("cpu") == torch.device("cpu")
    for device in ("toaster", "meta:x", "cuda:99"):
        with pytest.raises(ModelError, match="cannot be used here"):
            hf.pick_device(device)
    with pytest.raises(ModelError, match="choose one of float32, bfloat16, float16"):
        hf.pick_dtype("int8")


def test_of_a_backends_reasons_the_first_sentence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*_: object, **__: object) -> None:
        raise NotImplementedError("Could not run on 'MPS'. This could be because.\nCPU: registered at x.cpp:1")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(ModelError, match=r"^device 'mps' cannot be used here \(Could not run on 'MPS'\): choose"):
        hf.pick_device("mps")


@pytest.mark.parametrize("family", sorted(tiny_models.DUAL_ENCODERS))
def test_batches_do_not_matter_where_the_tokenizer_pads_on_the_left(
    family: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder(family), tmp_path / "left"))
    edit_json(folder / "tokenizer_config.json", padding_side="left")
    base = load_base(folder, device="cpu")
    assert base.text_inputs.tokenizer.padding_side == "left"
    texts = ["a cat", "people walking in the rain", "the house near the river"]
    together = base.encode_text(texts)
    for text, row in zip(texts, together, strict=True):
        np.testing.assert_allclose(base.encode_text(text)[0], row, atol=1e-5)
    if not family.startswith("siglip"):  # which pad to their limit, on the side that the tokenizer says
        plain = load_base(tiny_folder(family), device="cpu")
        np.testing.assert_allclose(plain.encode_text(texts), together, atol=1e-6)


def test_a_text_tower_without_a_pooled_vector_is_named(tmp_path: Path) -> None:
    from transformers import DistilBertConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderModel, ViTConfig

    folder = tiny_models.build_vision_text(tmp_path / "distil")
    vocabulary = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = ViTConfig(**sizes, image_size=32, patch_size=8)
    text = DistilBertConfig(vocab_size=vocabulary, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=12)
    VisionTextDualEncoderModel(config).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"text tower of .*distil \(model type 'distilbert'\).*pools its tokens"):
        load(folder)


def test_missing_pooler_is_no_concern_of_a_student(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Many text encoders come without their pooling head, which a student never uses."""
    folder = tiny_folder("bert")
    assert not any("pooler" in name for name in load_file(folder / "model.safetensors"))
    first, second = (TextEncoder.load(folder, device="cpu") for _ in range(2))
    assert first.fingerprint == second.fingerprint  # the random pooler does not count


@pytest.mark.parametrize("family", ["clip", "siglip", "starter"])
def test_input_digests_survive_saving_and_see_changes(
    family: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    base = load_base(build_starter(tmp_path / "s") if family == "starter" else tiny_folder(family), device="cpu")
    folder = base.save_pretrained(tmp_path / "again")
    again = load_base(folder, device="cpu", dtype="bfloat16")
    digests = (base.text_input_digest, base.image_input_digest)
    assert (again.text_input_digest, again.image_input_digest) == digests
    edit_json(folder / "preprocessor_config.json", image_mean=[0.4, 0.5, 0.6])
    edit_json(folder / "tokenizer_config.json", model_max_length=8)
    other = load_base(folder, device="cpu")
    assert other.fingerprint == base.fingerprint  # which names weights alone
    assert other.text_input_digest != base.text_input_digest
    assert other.image_input_digest != base.image_input_digest


def test_siglip_2_of_a_fixed_resolution_reads_lower_case(tmp_path: Path) -> None:
    """It comes as a SigLIP model with Gemma's tokenizer, which keeps capitals; it was trained without them."""
    folder = tiny_models.build_siglip(tmp_path, tiny_models.siglip2_tokenizer("GemmaTokenizer"))
    base = load_base(folder, device="cpu")
    assert type(base.text_inputs.tokenizer).__name__.startswith("Gemma")
    one, other, different = base.encode_text(["A Cat", "a cat", "a bat"])
    np.testing.assert_array_equal(one, other)
    assert np.abs(one - different).max() > 1e-3
    base.save_pretrained(tmp_path / "again")
    again = load_base(tmp_path / "again", device="cpu")
    np.testing.assert_allclose(again.encode_text(["A Cat"])[0], one, atol=1e-6)
    assert again.text_input_digest == base.text_input_digest
