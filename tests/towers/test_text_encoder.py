from __future__ import annotations

import contextlib
import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_models
from tiny_models import CONTEXT, CORPUS
from trimtab.errors import DataError, ModelError
from trimtab.towers.freezing import fingerprint
from trimtab.towers.parts import quiet
from trimtab.towers.text_encoder import TextEncoder

TEXTS = [*CORPUS, "", "一" * 60]


@pytest.fixture
def student(tiny_folder: Callable[[str], Path]) -> Callable[..., TextEncoder]:
    return lambda name, **options: TextEncoder.load(tiny_folder(name), device="cpu", **options)


@pytest.mark.parametrize("name", sorted(tiny_models.TEXT_ENCODERS))
def test_states_match_transformers(name: str, student: Any, tiny_folder: Callable[[str], Path]) -> None:
    from transformers import AutoModel, AutoTokenizer

    with quiet():
        model = AutoModel.from_pretrained(tiny_folder(name)).eval()
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder(name))
    tokens = tokenizer(TEXTS, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, output_hidden_states=True)
    expected = torch.cat([output.hidden_states[1], output.last_hidden_state], dim=-1)

    states = student(name).token_states(TEXTS, layers=(1, -1), batch_size=4)

    assert [len(one) for one in states] == tokens["attention_mask"].sum(1).tolist()  # no padding
    for row, one in enumerate(states):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, expected[row, : len(one)].numpy(), atol=1e-5)


@pytest.mark.parametrize("name", sorted({**tiny_models.TEXT_ENCODERS, **tiny_models.DUAL_ENCODERS}))
@pytest.mark.parametrize("layers", [(0, 1, -1), (1,)])
def test_threads_do_not_mix_their_states(name: str, layers: tuple[int, ...], student: Any, two_cores: None) -> None:
    encoder, texts = student(name), TEXTS * 5
    states = encoder.token_states(texts, layers, batch_size=2)
    torch.set_num_threads(1)
    for one, alone in zip(states, encoder.token_states(texts, layers, batch_size=2), strict=True):
        np.testing.assert_allclose(one, alone, atol=1e-5)


@pytest.mark.parametrize("family", sorted(tiny_models.DUAL_ENCODERS))
def test_text_tower_of_a_dual_encoder_is_a_student(family: str, student: Any, tiny_base: Any) -> None:
    encoder, base = student(family), tiny_base(family)
    assert (encoder.hidden_size, encoder.num_layers, encoder.max_tokens) == (16, 2, CONTEXT)
    states = encoder.token_states(CORPUS)
    ids = base.text_inputs.token_ids(CORPUS)[0]
    assert [one.shape for one in states] == [(len(tokens), 16) for tokens in ids]
    with torch.no_grad():
        tower = base.model.text_model
        tower = tower.roberta if family == "altclip" else tower
        expected = tower(**base.text_inputs(CORPUS)).last_hidden_state
    for row, one in enumerate(states):
        np.testing.assert_allclose(one, expected[row, : len(one)].numpy(), atol=1e-5)


def test_tensors_and_arrays_agree(student: Any) -> None:
    encoder = student("bert")
    states, mask = encoder.states(CORPUS[:5], layers=[0, 1, 2])
    assert states.shape == (5, mask.shape[1], 3 * 16)
    assert mask.dtype == torch.bool
    for row, one in enumerate(encoder.token_states(CORPUS[:5], layers=[0, 1, 2])):
        assert mask[row].sum() == len(one)
        np.testing.assert_allclose(states[row][mask[row]].numpy(), one, atol=1e-5)


def test_loading_leaves_the_random_numbers_of_the_caller(tiny_folder: Callable[[str], Path]) -> None:
    """Its file has no pooler, which transformers fills with random weights."""
    before = torch.get_rng_state()
    TextEncoder.load(tiny_folder("bert"), device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_too_little_memory_for_a_batch_changes_no_state(student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = student("bert")
    wanted = encoder.token_states(CORPUS)
    whole = encoder._hidden_states

    def small(tokens: dict[str, torch.Tensor], layers: Any) -> Any:
        if len(tokens["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(tokens, layers)

    monkeypatch.setattr(encoder, "_hidden_states", small)
    for one, other in zip(encoder.token_states(CORPUS), wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_roberta_positions_leave_room_for_the_offset(student: Any) -> None:
    """A table of CONTEXT + 2 positions holds CONTEXT tokens, since positions start at padding_idx + 1."""
    encoder = student("xlm-roberta")
    assert encoder.model.embeddings.position_embeddings.num_embeddings == CONTEXT + 2
    assert encoder.max_tokens == CONTEXT
    assert len(encoder.token_states(["黑 熊 " * 50])[0]) == CONTEXT


def test_long_texts_are_cut_and_counted(student: Any, caplog: pytest.LogCaptureFixture) -> None:
    encoder = student("bert", max_tokens=8)
    with caplog.at_level(logging.WARNING):
        states = encoder.token_states(["一" * 60, "一", "二" * 60])
    assert [len(one) for one in states] == [8, 3, 8]
    assert encoder.last_truncated == 2
    assert "2 of 3 texts were longer than the 8 tokens" in caplog.text
    assert encoder.text_inputs(["一" * 60])["input_ids"][0, -1] == encoder.text_inputs.tokenizer.sep_token_id


def test_what_the_parts_of_an_encoding_cut_is_told_once(student: Any, caplog: pytest.LogCaptureFixture) -> None:
    encoder = student("bert", max_tokens=8)
    with caplog.at_level(logging.WARNING):
        with encoder.one_encoding():
            for texts in (["一" * 60, "一"], ["一"], ["二" * 60, "三" * 60]):
                encoder.token_states(texts)
            assert not caplog.text
        assert encoder.last_truncated == 3
        assert caplog.text.count("3 of 5 texts were longer than the 8 tokens") == 1
        encoder.token_states(["一"])
    assert encoder.last_truncated == 0
    assert caplog.text.count("were cut") == 1
    with contextlib.suppress(KeyboardInterrupt), encoder.one_encoding():
        encoder.token_states(["一" * 60])
        raise KeyboardInterrupt
    assert "1 of 1 texts" in caplog.text, "also of one that is stopped"


@pytest.mark.parametrize("max_tokens", [2, CONTEXT + 1])
def test_impossible_contexts_are_refused(student: Any, max_tokens: int) -> None:
    with pytest.raises(ModelError, match=f"max_tokens={max_tokens} must lie between 3 and {CONTEXT}"):
        student("bert", max_tokens=max_tokens)


def test_prefix_is_set_before_each_text(student: Any, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    plain, prefixed = student("bert"), student("bert", prefix="a photo of ")
    assert plain.prefix == ""
    # The encoder reads the prefix, but the states of its tokens say nothing of the text and are left out.
    whole = plain.token_states(["a photo of a cat"])[0]
    kept = prefixed.token_states(["a cat"])[0]
    left_out = len(whole) - len(kept)
    assert left_out > 0
    np.testing.assert_allclose(kept, np.concatenate([whole[:1], whole[1 + left_out :]]), atol=1e-6)
    folder = Path(shutil.copytree(tiny_folder("bert"), tmp_path / "e5"))
    (folder / "trimtab.json").write_text(json.dumps({"prefix": "query: "}))
    assert TextEncoder.load(folder, device="cpu").prefix == "query: "
    assert TextEncoder.load(folder, device="cpu", prefix="").prefix == ""
    for text in ("{", "[]", "[" * 100_000):
        (folder / "trimtab.json").write_text(text)
        with pytest.raises(ModelError, match=r"trimtab\.json is damaged"):
            TextEncoder.load(folder, device="cpu")


def test_prefix_of_e5_on_the_hub(tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tiny_folder("bert")))
    assert TextEncoder.load("intfloat/multilingual-e5-small", device="cpu").prefix == "query: "
    assert TextEncoder.load("someone/bert", device="cpu").prefix == ""
    for name in ("multilingual-e5-large-instruct", "e5-mistral-7b-instruct"):
        assert TextEncoder.load(f"intfloat/{name}", device="cpu").prefix == ""
        assert TextEncoder.load(f"intfloat/{name}", device="cpu", prefix="Query: ").prefix == "Query: "


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("multilingual-e5-small", "query: "),
        ("e5-large-v2", "query: "),
        ("bert", ""),
        ("type5-small", ""),
        ("multilingual-e5-large-instruct", ""),
        ("e5-mistral-7b-instruct", ""),
        ("e5-base-instruct-copy", ""),
    ],
)
def test_prefix_of_e5_in_a_folder(name: str, prefix: str, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("bert"), tmp_path / "intfloat" / name)
    assert TextEncoder.load(f"{folder}/", device="cpu").prefix == prefix
    assert TextEncoder.load(folder, prefix="", device="cpu").prefix == ""


def test_an_encoder_without_its_decoder_is_a_student(tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel, T5Model

    tokenizer = tiny_models.siglip_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    whole = tiny_models.randomised(T5Model(config))
    alone = T5EncoderModel(copy.deepcopy(config))  # which it changes
    alone.load_state_dict(whole.state_dict(), strict=False)
    students = []
    for model, folder in ((whole, tmp_path / "whole"), (alone, tmp_path / "alone")):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        students.append(TextEncoder.load(folder, device="cpu"))
    first, second = (one.token_states(CORPUS) for one in students)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_fingerprint_covers_the_tokenizer(student: Any, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    reference = student("bert").fingerprint
    assert student("bert", dtype="bfloat16").fingerprint == reference
    folder = Path(shutil.copytree(tiny_folder("bert"), tmp_path / "bert"))
    assert TextEncoder.load(folder, device="cpu").fingerprint == reference
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert TextEncoder.load(folder, device="cpu").fingerprint != reference


def test_student_is_frozen(student: Any) -> None:
    encoder = student("bert")
    torch.nn.ModuleList([encoder.model]).train()
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert len(fingerprint(encoder.model)) == 64


def test_edges(student: Any) -> None:
    encoder = student("bert")
    assert encoder.token_states([]) == []
    assert len(encoder.token_states("一只猫")) == 1
    with pytest.raises(ModelError, match=r"has layers 0 to 2 \(or -1 to -3\)"):
        encoder.token_states(["a"], layers=(3,))
    with pytest.raises(ModelError, match=r"layers=\[\]"):
        encoder.token_states(["a"], layers=())
    with pytest.raises(DataError, match="text 0 is a int"):
        encoder.token_states([7])  # type: ignore[list-item]


def test_missing_weights_are_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_folder("bert"), tmp_path / "bert"))
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"encoder\.layer\.1\.output\.dense\.bias"):
        TextEncoder.load(folder, device="cpu")


def test_encoder_of_an_encoder_decoder(tmp_path: Path) -> None:
    from transformers import T5Config, T5Model

    tokenizer = tiny_models.xlmr_tokenizer()
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    with quiet():
        T5Model(T5Config(**sizes, vocab_size=len(tokenizer), decoder_start_token_id=0)).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
    encoder = TextEncoder.load(tmp_path, device="cpu")
    assert (encoder.num_layers, encoder.hidden_size, encoder.max_tokens) == (2, 16, 512)
    assert encoder.token_states(["一只猫"])[0].shape[1] == 16
