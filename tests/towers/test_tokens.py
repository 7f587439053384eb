from __future__ import annotations

import unicodedata
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertConfig

import tiny_models
from tiny_models import CORPUS
from trimtab.errors import ModelError
from trimtab.towers import tokens
from trimtab.towers.tokens import TextInputs, context_length


@pytest.fixture(scope="module")
def inputs() -> TextInputs:
    return TextInputs(tiny_models.bert_tokenizer(), limit=10)


def test_batches_hold_every_text_once_and_the_longest_first(
    inputs: TextInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_CHUNK", 10)
    batches = list(inputs.batches(CORPUS, 4))
    assert sorted(position for positions, *_ in batches for position in positions) == list(range(len(CORPUS)))
    for positions, tensors, lengths, _ in batches:
        assert lengths == sorted(lengths, reverse=True)
        assert tensors["input_ids"].shape == (len(positions), lengths[0])
        assert tensors["attention_mask"].sum(1).tolist() == lengths
    assert sum(cut for *_, cut in batches) == inputs.token_ids(CORPUS)[1] > 0


def test_padding_follows_the_tower(inputs: TextInputs) -> None:
    left = replace(inputs, padding_side="left")(["a cat", "a"])
    assert left["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    full = replace(inputs, pad_to_limit=True, use_mask=False)(["a cat"])
    assert full.keys() == {"input_ids"}
    assert full["input_ids"].shape == (1, 10)


def test_a_text_without_tokens_gets_a_filler(inputs: TextInputs) -> None:
    bare = tiny_models.bert_tokenizer()
    bare.backend_tokenizer.post_processor = None
    batch = replace(inputs, tokenizer=bare)(["", "a"])
    assert batch["attention_mask"].tolist() == [[1], [1]]


def test_context_is_the_smaller_of_tokenizer_and_positions() -> None:
    config = BertConfig(max_position_embeddings=99)
    tokenizer = tiny_models.xlmr_tokenizer()  # without a limit of its own
    table = nn.ModuleDict({"position_embeddings": nn.Embedding(30, 4)})
    offset = nn.ModuleDict({"position_embeddings": nn.Embedding(30, 4, padding_idx=1)})
    assert context_length(tokenizer, table, config) == 30
    assert context_length(tokenizer, offset, config) == 28
    assert context_length(tokenizer, nn.Identity(), config) == 99  # rotary positions have no table
    assert context_length(tiny_models.bert_tokenizer(), table, config) == tiny_models.CONTEXT
    with pytest.raises(ModelError, match="leaves no room beside 2 special tokens"):
        context_length(tokenizer, nn.ModuleDict({"position_embeddings": nn.Embedding(2, 4)}), config)


def test_settings_left_in_a_tokenizer_do_not_matter(inputs: TextInputs) -> None:
    expected = inputs(CORPUS[:3])
    inputs.tokenizer(CORPUS, padding="max_length", truncation=True, max_length=4)
    torch.testing.assert_close(inputs(CORPUS[:3])["input_ids"], expected["input_ids"])


def test_the_digest_sees_what_changes_token_tensors(inputs: TextInputs) -> None:
    changed = [replace(inputs, limit=inputs.limit - 1), replace(inputs, prefix="query: ")]
    changed += [replace(inputs, use_mask=not inputs.use_mask), replace(inputs, pad_to_limit=not inputs.pad_to_limit)]
    changed.append(replace(inputs, tokenizer=tiny_models.clip_tokenizer()))
    digests = {one.digest for one in changed}
    assert len(digests) == len(changed)
    assert inputs.digest not in digests
    assert replace(inputs).digest == inputs.digest


def test_long_texts_are_taken_few_at_a_time(inputs: TextInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(inputs.batches(CORPUS, 100))
    monkeypatch.setattr(tokens, "_CHUNK_LETTERS", 60)
    at_once: list[int] = []
    original = TextInputs.token_ids

    def counted(self: TextInputs, texts: list[str]) -> tuple[list[list[int]], int]:
        at_once.append(sum(map(len, texts)))
        return original(self, texts)

    monkeypatch.setattr(TextInputs, "token_ids", counted)
    found = list(inputs.batches(CORPUS, 100))
    assert len(at_once) > 3
    assert max(at_once) < 60 + max(map(len, CORPUS))
    ids = [{at: row for batch in some for at, row in zip(batch[0], batch[2], strict=True)} for some in (whole, found)]
    assert ids[0] == ids[1]
    assert sum(batch[3] for batch in found) == sum(batch[3] for batch in whole)


def test_texts_of_the_same_tokens_are_found_over_all_chunks(
    inputs: TextInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_CHUNK", 2)
    start = "a photo of a cat and a photo of a"
    texts = ["a cat", "a dog", "A  Cat", "ж", f"{start} dog", "a cat", "щ", f"{start} cat"]
    assert inputs.same(texts) == ([0, 1, 0, 3, 4, 0, 3, 4], 2)
    assert inputs.same([]) == ([], 0)


def test_letters_are_composed_before_they_are_read(inputs: TextInputs) -> None:
    inputs = replace(inputs, tokenizer=tiny_models.siglip_tokenizer())  # which composes none itself
    for composed in ("ä", "사과", "ガ"):
        assert inputs.token_ids([unicodedata.normalize("NFD", composed)]) == inputs.token_ids([composed])
        assert inputs.whole_token_ids([unicodedata.normalize("NFD", composed)]) == inputs.whole_token_ids([composed])
