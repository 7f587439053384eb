from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPImageProcessorPil,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

import tiny_models
from real_packages import needs
from tiny_models import CORPUS, EMBEDDING_DIM, randomised
from tiny_starter import spread_activations
from trimtab.errors import ModelError
from trimtab.towers import starter
from trimtab.towers.efficientnet import EfficientNetLite0
from trimtab.towers.hf import load_base
from trimtab.towers.starter_model import (
    IMAGE_SIZE,
    SentenceBertConfig,
    SentenceBertModel,
    StarterAlignment,
    StarterVisionConfig,
    StarterVisionModel,
)

WIDTH = 16
TEXT = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def vision_config(**changes: Any) -> StarterVisionConfig:
    options = {
        "hidden_size": WIDTH, "width": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    }  # fmt: skip
    return StarterVisionConfig(**{**options, **changes})


def vision_model(**changes: Any) -> StarterVisionModel:
    torch.manual_seed(0)
    return StarterVisionModel(vision_config(**changes)).eval()


def text_model() -> SentenceBertModel:
    config = SentenceBertConfig(**TEXT, vocab_size=len(tiny_models.bert_tokenizer()), max_position_embeddings=64)
    return randomised(SentenceBertModel(config))  # type: ignore[return-value]


def feature_maps(count: int = 2) -> Tensor:
    return torch.rand(count, 1280, 7, 7, generator=torch.Generator().manual_seed(0))


# The image tower


def test_a_new_tower_is_the_class_mixture_alone() -> None:
    model = vision_model()
    with torch.no_grad():
        model.alignment.class_embeddings.normal_()
        pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
        feature_map = model.trunk(pixels)
        probabilities = model.trunk.logits(feature_map).softmax(dim=-1)
        pooled = model(pixels).pooler_output
    assert torch.equal(pooled, probabilities @ model.alignment.class_embeddings)
    assert pooled.shape == (2, WIDTH)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(2))


def test_the_alignment_adds_to_the_mixture() -> None:
    alignment = StarterAlignment(vision_config()).eval()
    probabilities = torch.zeros(2, 1000)
    with torch.no_grad():
        states = alignment.tokens(feature_maps())
        assert [tuple(state.shape) for state in states] == [(2, 50, 8)] * 3
        assert torch.equal(alignment(states[-1], probabilities), torch.zeros(2, WIDTH))
        torch.nn.init.normal_(alignment.output.weight)
        added = alignment(states[-1], probabilities)
        mixed = alignment(states[-1], probabilities + 0.5)
        assert added.abs().min() > 0
        torch.testing.assert_close(mixed, added)  # the class embeddings are still zero
        alignment.class_embeddings[7] = 1.5
        torch.testing.assert_close(alignment(states[-1], probabilities + 0.5), added + 0.75)


def test_layers_are_those_of_pytorch_with_gradients_and_without() -> None:
    alignment = StarterAlignment(vision_config()).eval()
    layer = alignment.layers[0]
    plain = torch.nn.TransformerEncoderLayer(
        layer.linear1.in_features,
        layer.self_attn.num_heads,
        layer.linear1.out_features,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    ).eval()
    plain.load_state_dict(layer.state_dict())
    x = alignment.embed(feature_maps()).detach()
    gradients = []
    for one in (layer, plain):
        image = x.clone().requires_grad_()
        output = one(image)
        output.square().sum().backward()
        assert image.grad is not None
        gradients.append(image.grad)
        with torch.no_grad():
            torch.testing.assert_close(one(x), output)
    torch.testing.assert_close(*gradients)


def test_every_place_of_the_feature_map_counts() -> None:
    alignment = randomised(StarterAlignment(vision_config()))
    maps = feature_maps(1).repeat(49, 1, 1, 1)
    for place in range(49):
        maps[place, :, place // 7, place % 7] += 1
    with torch.no_grad():
        output = alignment(alignment.tokens(maps)[-1], torch.zeros(49, 1000))
    assert len(output.unique(dim=0)) == 49  # positions tell them apart


def test_only_knowledge_is_out_of_training() -> None:
    frozen = {name for name, parameter in StarterAlignment(vision_config()).named_parameters()
              if not parameter.requires_grad}  # fmt: skip
    assert "class_embeddings" in frozen
    assert not frozen & {"project.weight", "positions", "output.weight", "layers.0.linear1.weight"}
    assert not SentenceBertModel(SentenceBertConfig(**TEXT, vocab_size=9)).centre.requires_grad


def test_sharpness_draws_the_mixture_to_the_likeliest_class() -> None:
    maps = feature_maps()
    soft, sharp = (vision_model(sharpness=value).class_probabilities(maps) for value in (1.0, 50.0))
    assert (sharp.max(dim=1).values > soft.max(dim=1).values).all()
    assert torch.equal(sharp.argmax(dim=1), soft.argmax(dim=1))
    torch.testing.assert_close(sharp.sum(dim=1), torch.ones(2))


def test_outputs_as_transformers_gives_them() -> None:
    model = vision_model()
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        plain, full = model(pixels), model(pixels, output_hidden_states=True)
        last, pooled = model(pixels, return_dict=False)
    assert plain.hidden_states is None
    assert len(full.hidden_states) == 3
    assert torch.equal(full.hidden_states[-1], full.last_hidden_state)
    assert torch.equal(last, full.last_hidden_state)
    assert torch.equal(pooled, plain.pooler_output)


# The text tower


def test_sentences_are_the_unit_mean_less_the_centre() -> None:
    model = text_model()
    tokens = tiny_models.bert_tokenizer()(["a cat", "a small red car on the road"], padding=True, return_tensors="pt")
    plain = BertModel(BertConfig(**model.config.to_diff_dict()), add_pooling_layer=False).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "centre"})
    with torch.no_grad():
        states = plain(**tokens).last_hidden_state
        output = model(**tokens)
        rows = [states[i, : int(tokens["attention_mask"][i].sum())].mean(dim=0) for i in range(2)]
        expected = F.normalize(torch.stack(rows), dim=-1) - model.centre
        torch.testing.assert_close(output.pooler_output, expected)
        torch.testing.assert_close(output.last_hidden_state, states)
        assert model.centre.abs().max() > 0

        alone = model(tokens["input_ids"][:1, :4], attention_mask=tokens["attention_mask"][:1, :4])
        torch.testing.assert_close(alone.pooler_output, output.pooler_output[:1], atol=1e-5, rtol=1e-4)
        unmasked = model(tokens["input_ids"][1:])
        torch.testing.assert_close(unmasked.pooler_output, output.pooler_output[1:])
        pair = model(**tokens, return_dict=False)
        assert torch.equal(pair[1], output.pooler_output)

        model.centre.add_(1)
        torch.testing.assert_close(model(**tokens).pooler_output, expected - 1)


# Both together


@pytest.fixture(scope="module")
def tiny_starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dual encoder of both towers, with random weights, saved as an ordinary folder."""
    text, vision = text_model(), vision_model()
    randomised(vision.alignment)
    spread_activations(vision.trunk)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=EMBEDDING_DIM
    )
    model = VisionTextDualEncoderModel(config=config, vision_model=vision, text_model=text)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = CLIPImageProcessorPil(size=side, do_center_crop=False)
    return tiny_models._save(tmp_path_factory.mktemp("starter") / "m", model, tiny_models.bert_tokenizer(), processor)


def test_the_folder_gives_what_transformers_gives(tiny_starter: Path, pictures: list[Image.Image]) -> None:
    base = load_base(tiny_starter, device="cpu")
    model = AutoModel.from_pretrained(tiny_starter).eval()
    assert isinstance(model.vision_model, StarterVisionModel)
    assert isinstance(model.text_model, SentenceBertModel)
    tokens = tiny_models.bert_tokenizer()(CORPUS, padding=True, return_tensors="pt")
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    pixels = CLIPImageProcessorPil(size=side, do_center_crop=False)(images=pictures, return_tensors="pt")
    with torch.no_grad():
        texts = F.normalize(model.text_projection(model.text_model(**tokens).pooler_output), dim=-1)
        images = F.normalize(model.visual_projection(model.vision_model(**pixels).pooler_output), dim=-1)
    np.testing.assert_allclose(base.encode_text(CORPUS, batch_size=5), texts, atol=1e-5)
    np.testing.assert_allclose(base.encode_image(pictures, batch_size=2), images, atol=1e-5)
    assert np.abs(base.encode_image(pictures[:2])[0] - base.encode_image(pictures[:2])[1]).max() > 1e-4


def test_saving_keeps_embeddings_and_fingerprint(tiny_starter: Path, tmp_path: Path) -> None:
    base = load_base(tiny_starter, device="cpu")
    again = load_base(base.save_pretrained(tmp_path / "again"), device="cpu")
    assert again.fingerprint == base.fingerprint
    np.testing.assert_allclose(again.encode_text(CORPUS), base.encode_text(CORPUS), atol=1e-6)
    assert again.model.vision_model.config.width == 8


@pytest.mark.parametrize("name", ["text_model.centre", "vision_model.alignment.class_embeddings"])
def test_our_own_weights_must_be_there(tiny_starter: Path, tmp_path: Path, name: str) -> None:
    for path in tiny_starter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        load_base(tmp_path, device="cpu")


# Building it from packages


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Tiny packages and alignment; the returned function writes the alignment file with some changes."""
    vision, text = vision_model(), text_model()
    bert = BertModel(BertConfig(**text.config.to_diff_dict()))  # with a pooler, which is not used
    folder = tiny_models._save(tmp_path / "minilm/model", randomised(bert), tiny_models.bert_tokenizer())
    torch.save(EfficientNetLite0().state_dict(), tmp_path / "lite0.pth")
    files = {"minilm": folder / "config.json", "efficientnet-lite0": tmp_path / "lite0.pth"}
    monkeypatch.setattr(starter, "fetch_file", lambda key, pattern: files[key])
    monkeypatch.setattr("trimtab.towers.efficientnet.from_packaged_names", lambda state: state)
    monkeypatch.setattr(starter, "StarterVisionConfig", lambda **changes: vision_config(**changes))
    monkeypatch.setattr(starter, "committed_weights", lambda: tmp_path / "alignment.safetensors")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    ours = {
        f"vision_model.alignment.{name}": value for name, value in randomised(vision.alignment).state_dict().items()
    }
    ours |= {"text_model.centre": torch.linspace(0, 1, WIDTH), "logit_scale": torch.tensor(math.log(30.0))}

    def write(metadata: dict[str, str] | None = None, **changes: Tensor | None) -> Path:
        tensors = {**ours, **{name.replace("__", "."): value for name, value in changes.items()}}
        stored = {name: value.half().contiguous() for name, value in tensors.items() if value is not None}
        save_file(
            stored, tmp_path / "alignment.safetensors", metadata if metadata is not None else {"sharpness": "2.5"}
        )
        return tmp_path / "alignment.safetensors"

    return write


def test_packages_and_alignment_make_a_base(parts: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = load_file(parts())
    base = load_base("starter", device="cpu")
    assert base.name == "starter"
    assert base.embedding_dim == WIDTH
    assert base.logit_scale == pytest.approx(30, rel=1e-2)
    state = base.model.state_dict()
    for name, value in ours.items():
        assert torch.equal(state[name], value.float()), name
    assert base.model.vision_model.config.sharpness == 2.5
    trunk = torch.load(Path(starter.fetch_file("efficientnet-lite0", "*")), weights_only=True)
    assert torch.equal(base.model.vision_model.trunk.classifier.weight, trunk["classifier.weight"])
    bert = load_file(starter.minilm_folder() / "model.safetensors")
    word = "embeddings.word_embeddings.weight"
    assert torch.equal(base.model.text_model.get_parameter(word), bert[word])

    monkeypatch.setattr(starter, "build_starter", lambda folder: pytest.fail("built twice"))
    assert load_base("starter", device="cpu").fingerprint == base.fingerprint


def test_what_training_added_to_the_trunk_is_added(parts: Callable[..., Path]) -> None:
    up, down, bias = torch.randn(1280, 2), torch.randn(2, 320), torch.full((320,), 0.25)
    added = {"up.head.0.weight": up, "down.head.0.weight": down, "whole.blocks.15.project.1.bias": bias}
    parts(**{f"{starter.ADDED}{name}".replace(".", "__"): value for name, value in added.items()})
    state = load_base("starter", device="cpu").model.state_dict()
    packaged = torch.load(Path(starter.fetch_file("efficientnet-lite0", "*")), weights_only=True)
    more = {"head.0.weight": (up.half().float() @ down.half().float())[..., None, None]}
    more["blocks.15.project.1.bias"] = bias
    for name, value in packaged.items():
        torch.testing.assert_close(state[f"vision_model.trunk.{name}"], value + more.get(name, 0))


@pytest.mark.parametrize(("name", "shape"), [("head.9.weight", (3,)), ("head.0.weight", (2, 2))])
def test_what_cannot_be_added_is_refused(parts: Callable[..., Path], name: str, shape: tuple[int, ...]) -> None:
    parts(**{f"{starter.ADDED}whole.{name}".replace(".", "__"): torch.zeros(shape)})
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        starter.ensure_starter()


def test_half_a_product_is_refused(parts: Callable[..., Path]) -> None:
    parts(**{f"{starter.ADDED}up.head.0.weight".replace(".", "__"): torch.zeros(1280, 2)})
    with pytest.raises(ModelError, match="install trimtab again"):
        starter.ensure_starter()


def test_images_and_texts_stay_in_the_text_towers_space(
    parts: Callable[..., Path], pictures: list[Image.Image]
) -> None:
    """Nothing is trained for projections of random start; they must do nothing."""
    parts()
    base = load_base("starter", device="cpu")
    with torch.no_grad():
        pixels = base.preprocess(pictures[0])
        pooled = base.model.vision_model(**pixels).pooler_output
        torch.testing.assert_close(base.image_features(pictures[:1]), pooled)
        tokens = base.text_inputs(CORPUS[:3])
        torch.testing.assert_close(base.text_features(CORPUS[:3]), base.model.text_model(**tokens).pooler_output)


def test_oblong_pictures_are_seen_whole(parts: Callable[..., Path]) -> None:
    parts()
    base = load_base("starter", device="cpu")
    picture = Image.new("RGB", (90, 30), "white")
    picture.paste("black", (0, 0, 5, 30))
    pixels = base.preprocess(picture)["pixel_values"]
    assert pixels.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert pixels[0, :, :, 0].max() < -0.9
    assert pixels[0, :, :, -1].min() > 0.9  # (255 - 127) / 128 = 1, as the trunk was trained


def test_another_alignment_is_another_base(parts: Callable[..., Path]) -> None:
    parts()
    first = starter.ensure_starter()
    parts(logit_scale=torch.tensor(1.0))
    second = starter.ensure_starter()
    assert first != second
    assert load_base(first, device="cpu").fingerprint != load_base(second, device="cpu").fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_model__centre": None}, r"1 tensors are missing, unknown or of another shape: \['text_model.centre'\]"),
        ({"logit_scale": None}, "logit_scale"),
        ({"vision_model__alignment__output__weight": None}, "alignment.output.weight"),
        ({"vision_model__alignment__output__weight": torch.zeros(2, 2)}, "alignment.output.weight"),
        ({"stranger": torch.zeros(1)}, "stranger"),
        ({"metadata": {}}, "cannot be read .*sharpness.*: install trimtab again"),
        ({"metadata": {"sharpness": "high"}}, "cannot be read .*high.*: install trimtab again"),
    ],
)
def test_alignments_that_do_not_fit_are_refused(
    parts: Callable[..., Path], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    parts(**changes)
    with pytest.raises(ModelError, match=message) as caught:
        starter.ensure_starter()
    assert "alignment.safetensors" in str(caught.value)
    assert not list((tmp_path / "cache" / "models").glob("starter-*/"))


def test_a_missing_or_damaged_alignment_is_told(parts: Callable[..., Path]) -> None:
    path = parts()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"alignment\.safetensors cannot be read .*: install trimtab again"):
        starter.ensure_starter()
    path.unlink()
    with pytest.raises(ModelError, match="starter's alignment is not in this installation"):
        load_base("starter", device="cpu")
    with pytest.raises(ModelError, match="cannot be read"):
        starter.build_starter(path.parent / "out")


@pytest.mark.parametrize("name", ["embeddings.LayerNorm.bias", "encoder.layer.1.output.dense.weight"])
def test_a_text_package_that_is_not_whole_is_refused(parts: Callable[..., Path], name: str) -> None:
    path = starter.minilm_folder() / "model.safetensors"
    weights = load_file(path)
    save_file({key: value for key, value in weights.items() if key != name}, path)
    with pytest.raises(ModelError, match=f"the packaged MiniLM lacks .*{name}"):
        starter.load_text_tower()
    save_file({**weights, "stranger": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"unknown .*stranger"):
        starter.load_text_tower()


@needs("minilm")
def test_the_real_text_tower_knows_meaning() -> None:
    from transformers import AutoTokenizer

    tower = starter.load_text_tower()
    tokens = AutoTokenizer.from_pretrained(starter.minilm_folder())(
        ["a cat on a sofa", "a kitten lies on the couch", "stock prices fell"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        embeddings = tower(**tokens).pooler_output
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))  # the centre is still zero
    similarity = embeddings @ embeddings.T
    assert similarity[0, 1] > 0.5
    assert similarity[0, 2] < 0.2
