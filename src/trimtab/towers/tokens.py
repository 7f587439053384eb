"""Texts to padded token tensors: context length, cutting that keeps the end token, batches of like length."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from trimtab.errors import DataError, ModelError
from trimtab.files import digest_of
from trimtab.scripts import normal_form
from trimtab.towers.freezing import tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# Texts that are tokenised and sorted together, and their letters: bounds memory, and sorting more gains nothing.
_CHUNK = 16_384
_CHUNK_LETTERS = 1 << 24
_DEFAULT_LIMIT = 512
_UNLIMITED = 1_000_000  # tokenizers without a limit say 10^30


def check_texts(texts: Sequence[object]) -> None:
    """
    Raises:
        DataError: an item is not a text.
    """
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"text {index} is a {type(text).__name__}, not a string: {text!r:.80}")


@dataclass(frozen=True)
class TextInputs:
    """What one text tower expects as input.

    Attributes:
        limit: most tokens of one text, special tokens included.
        pad_to_limit: pad every text to `limit`, as SigLIP was trained, not to the longest of its batch.
        use_mask: pass an attention mask.
        padding_side: defaults to the tokenizer's.
        prefix: set before every text.
    """

    tokenizer: PreTrainedTokenizerBase
    limit: int
    pad_to_limit: bool = False
    use_mask: bool = True
    padding_side: Literal["left", "right"] | None = None
    prefix: str = ""

    @cached_property
    def digest(self) -> str:
        """Names what decides the token tensors of a text in `normal_form`; it survives saving the tokenizer again."""
        settings = [self.limit, self.pad_to_limit, self.use_mask, self._side, self.prefix, self._filler]
        settings.append(self.tokenizer.truncation_side)
        return digest_of(tokenizer_digest(self.tokenizer), json.dumps(settings))

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Token tensors (B, T) of one batch, ready for the tower."""
        return self.pad(self.token_ids(texts)[0])

    def token_ids(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token ids of each text, cut to `limit` with the end token kept, and how many were cut.

        Raises:
            DataError: an item is not a text that can be encoded.
        """
        if not texts:
            return [], 0
        texts = self._checked(texts)
        ids = self._tokenise(texts, truncation=False)
        long = [index for index, one in enumerate(ids) if len(one) > self.limit]
        if long:
            cut = self._tokenise([texts[index] for index in long], truncation=True)
            for index, one in zip(long, cut, strict=True):
                ids[index] = one
        return ids, len(long)

    def same(self, texts: Sequence[str]) -> tuple[list[int], int]:
        """Of each text the position of the first with the same token ids, which no tower can tell it from.

        Texts may differ in what the tokenizer drops, such as case, in words that it does not know, and beyond `limit`.

        Returns:
            the positions, a text's own where no other goes before it; and how many texts were cut to `limit`.
        """
        known: dict[bytes, int] = {}
        first: list[int] = []
        cut = 0
        for some in _chunks(texts):
            ids, long = self.token_ids(some)
            cut += long
            for one in ids:  # the ids themselves would take gigabytes of millions of texts
                digest = hashlib.blake2b(array("q", one).tobytes(), digest_size=16).digest()
                first.append(known.setdefault(digest, len(first)))
        return first, cut

    def whole_token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, however long.

        Raises:
            DataError: an item is not a text that can be encoded.
        """
        return self._tokenise(self._checked(texts), truncation=False)

    def pad(self, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Tensors (B, T) of a batch: ``input_ids`` and, where the tower uses it, ``attention_mask``."""
        length = self.limit if self.pad_to_limit else max((len(one) for one in ids), default=1)
        left = self._side == "left"
        tokens = torch.full((len(ids), length), self._filler, dtype=torch.long)  # (B, T)
        mask = torch.zeros_like(tokens)
        for row, one in enumerate(ids):
            span = slice(length - len(one), length) if left else slice(0, len(one))
            tokens[row, span] = torch.tensor(one, dtype=torch.long)
            mask[row, span] = 1
        return {"input_ids": tokens, "attention_mask": mask} if self.use_mask else {"input_ids": tokens}

    def batches(
        self, texts: Sequence[str], batch_size: int
    ) -> Iterator[tuple[list[int], dict[str, Tensor], list[int], int]]:
        """Batches of texts of like length, so that little is spent on padding.

        Yields:
            The positions in `texts`, the token tensors, the lengths in tokens, and how many texts were newly
            found too long and cut.
        """
        start = 0
        for some in _chunks(texts):
            ids, cut = self.token_ids(some)
            # The longest first: too little memory shows at once rather than after an hour.
            order = sorted(range(len(ids)), key=lambda index: len(ids[index]), reverse=True)
            for first in range(0, len(order), batch_size):
                picked = order[first : first + batch_size]
                rows = [ids[index] for index in picked]
                yield [start + index for index in picked], self.pad(rows), [len(row) for row in rows], cut
                cut = 0
            start += len(some)

    def _checked(self, texts: Sequence[str]) -> list[str]:
        check_texts(texts)
        for index, text in enumerate(texts):
            if not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise DataError(f"text {index} is not valid Unicode ({error.reason}): {text!r:.80}") from error
        return [self.prefix + normal_form(text) for text in texts]

    def _tokenise(self, texts: list[str], *, truncation: bool) -> list[list[int]]:
        encoded = self.tokenizer(
            texts,
            padding=False,
            truncation=truncation,
            max_length=self.limit if truncation else None,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        # A tokenizer without special tokens makes nothing of "": one filler keeps the attention defined.
        return [list(ids) or [self._filler] for ids in encoded["input_ids"]]

    @property
    def _side(self) -> str:
        return self.padding_side or self.tokenizer.padding_side

    @property
    def _filler(self) -> int:
        return self.tokenizer.pad_token_id or 0


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """All texts in order; a chunk ends after `_CHUNK` of them or so many letters."""
    start = letters = 0
    for end, text in enumerate(texts, 1):
        letters += len(text) if isinstance(text, str) else 0
        if end - start == _CHUNK or letters >= _CHUNK_LETTERS:
            yield texts[start:end]
            start, letters = end, 0
    if start < len(texts):
        yield texts[start:]


def context_length(tokenizer: PreTrainedTokenizerBase, text_tower: nn.Module, config: PreTrainedConfig) -> int:
    """Most tokens that both a tokenizer and a text tower's position table take.

    RoBERTa-type towers count positions from ``padding_idx + 1``, so that many rows of their table are out of
    use: 514 positions hold 512 tokens.
    """
    limits = []
    if 0 < tokenizer.model_max_length < _UNLIMITED:
        limits.append(tokenizer.model_max_length)
    for name, module in text_tower.named_modules():
        if name.split(".")[-1] in ("position_embedding", "position_embeddings") and isinstance(module, nn.Embedding):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - unused)
            break
    else:
        positions = getattr(config, "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 0:
            limits.append(positions)
    limit = min(limits, default=_DEFAULT_LIMIT)
    special = tokenizer.num_special_tokens_to_add(pair=False)
    if limit <= special:
        raise ModelError(f"a context of {limit} tokens leaves no room beside {special} special tokens")
    return limit
