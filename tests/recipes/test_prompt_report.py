"""What the report of the prompt link reads of a base."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from trimtab.recipes.prompt_report import near_words
from trimtab.towers.prompting import PromptTower


class PythonTokenizer:
    """As one that is written in Python, it knows the ids of its own tokens alone."""

    def __init__(self, tokenizer: Any) -> None:
        self.words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.all_special_tokens = tokenizer.all_special_tokens

    def __len__(self) -> int:
        return len(self.words)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.words[one] for one in ids]


def test_rows_beyond_the_tokens_are_no_words(tiny_base: Callable[[str], Any]) -> None:
    base = tiny_base("vision-text-dual-encoder")
    real = PromptTower(base)
    tokenizer: Any = PythonTokenizer(base.text_inputs.tokenizer)
    own = real._table.weight.detach()
    table = nn.Embedding.from_pretrained(torch.cat([own, torch.ones(7, own.shape[1])]))
    start = real.tokens_of(["photo of"])[0]
    tower = SimpleNamespace(
        base=SimpleNamespace(text_inputs=SimpleNamespace(tokenizer=tokenizer)),
        _table=table,
        tokens_of=lambda _: [start],
    )
    # The first learned token lies at the rows that stand for nothing, the others where they started.
    general = torch.cat([table.weight[-1:], table.weight[torch.as_tensor(start)]])
    prompt = SimpleNamespace(general=general, config=SimpleNamespace(general=SimpleNamespace(init="photo of")))
    found = near_words(SimpleNamespace(prompt=prompt, task=SimpleNamespace(classes=SimpleNamespace(tower=tower))))  # type: ignore[arg-type]
    assert [one.start for one in found] == ["", "photo", "of"]
    assert [one.words[0][0] for one in found[1:]] == ["photo", "of"]
    assert all(word in tokenizer.words for one in found for word, _ in one.words)
