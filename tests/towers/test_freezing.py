from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel

import tiny_models
from trimtab.towers.freezing import fingerprint, freeze, image_processor_digest, tokenizer_digest


def small_bert(**changes: object) -> BertModel:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return BertModel(BertConfig(**{**sizes, "vocab_size": 20, **changes}))  # type: ignore[arg-type]


def test_frozen_modules_stay_in_eval_mode() -> None:
    frozen = freeze(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
    parent = nn.ModuleDict({"tower": frozen, "adapter": nn.Dropout(0.5)})
    parent.train()
    assert parent["adapter"].training
    frozen[1].train()  # a part that is reached directly
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in parent.parameters())
    parent.eval()
    assert not any(module.training for module in parent.modules())


def test_a_copy_of_a_frozen_module_is_frozen_too() -> None:
    original = freeze(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    twin = copy.deepcopy(original)
    twin.train()
    assert not twin.training
    assert twin[0].weight is not original[0].weight


def test_fingerprint_sees_weights_and_settings() -> None:
    reference = fingerprint(small_bert())
    assert len(reference) == 64
    assert fingerprint(small_bert()) == reference
    changed = small_bert()
    changed.embeddings.word_embeddings.weight.data[3, 3] += 1e-3
    assert fingerprint(changed) != reference
    assert fingerprint(small_bert(hidden_act="gelu_new")) != reference  # same weights, another function
    assert fingerprint(small_bert(num_attention_heads=4)) != reference


def test_fingerprint_ignores_what_changes_nothing() -> None:
    reference = fingerprint(small_bert())
    assert fingerprint(small_bert(hidden_dropout_prob=0.3, use_cache=False)) == reference
    model = small_bert()
    model.config._name_or_path = "somewhere/else"
    model.config.architectures = ["Other"]
    model.config.transformers_version = "99"
    assert fingerprint(model) == reference
    assert fingerprint(small_bert().double()) == reference
    assert fingerprint(model, exclude=["pooler."]) != reference


def test_fingerprint_survives_renamed_modules() -> None:
    """Later transformers versions rename modules; the same folder must still be the same base."""
    first, second = nn.Module(), nn.Module()
    first.q, first.k = nn.Linear(2, 3), nn.Linear(3, 2)
    second.key, second.query = first.k, first.q
    assert fingerprint(first) == fingerprint(second)


def test_half_precision_on_disk_is_the_same_model(tmp_path: Path) -> None:
    half = small_bert().half()
    half.save_pretrained(tmp_path)
    loaded = BertModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert fingerprint(loaded) == fingerprint(half)


def test_nested_settings_count(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import CLIPModel

    one = CLIPModel.from_pretrained(tiny_folder("clip"))
    gelu = copy.deepcopy(one)
    gelu.config.text_config.hidden_act = "gelu"
    assert fingerprint(one) != fingerprint(gelu)


def test_tokenizer_digest_survives_saving_and_sees_changes(tmp_path: Path) -> None:
    tokenizer = tiny_models.bert_tokenizer()
    reference = tokenizer_digest(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    again(["a cat", "a dog"], padding="max_length", truncation=True, max_length=4)  # leaves a setting behind
    assert tokenizer_digest(again) == reference
    assert tokenizer_digest(tiny_models.xlmr_tokenizer()) != reference
    cased = tiny_models.bert_tokenizer()
    cased.backend_tokenizer.normalizer = None
    assert tokenizer_digest(cased) != reference


@pytest.mark.parametrize("name", ["bert_tokenizer", "clip_tokenizer", "xlmr_tokenizer", "siglip2_tokenizer"])
def test_tokenizers_are_built_alike_each_time(name: str) -> None:
    build = getattr(tiny_models, name)
    assert tokenizer_digest(build()) == tokenizer_digest(build())


def test_image_processor_digest_sees_settings_and_no_more() -> None:
    from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

    reference = image_processor_digest(CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32))
    same = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_resize=True)
    same.image_mean, same.image_std = list(same.image_mean), list(same.image_std)
    assert image_processor_digest(same) == reference
    for change in ({"image_mean": [0.5] * 3}, {"do_center_crop": False}, {"resample": 2}, {"crop_size": 24}):
        other = CLIPImageProcessorPil(**{"size": {"shortest_edge": 32}, "crop_size": 32, **change})
        assert image_processor_digest(other) != reference
    assert image_processor_digest(ViTImageProcessorPil()) != image_processor_digest(CLIPImageProcessorPil())


def test_the_same_numbers_in_another_shape_are_another_model() -> None:
    numbers = torch.arange(6.0)
    shapes = [nn.ParameterDict({"weight": nn.Parameter(numbers.reshape(shape))}) for shape in ((2, 3), (3, 2))]
    assert fingerprint(shapes[0]) != fingerprint(shapes[1])


def test_a_frozen_module_comes_back_from_a_file_as_it_was(tmp_path: Path) -> None:
    module = freeze(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    torch.save(module, tmp_path / "module.pt")
    again = torch.load(tmp_path / "module.pt", weights_only=False)
    assert not again.train().training
    assert not again[1].training
    assert torch.equal(again[0].weight, module[0].weight)
