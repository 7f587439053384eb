"""A frozen text encoder as the student of a language link: texts to the hidden states of their tokens."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.errors import ModelError
from trimtab.files import digest_of
from trimtab.towers.dual_encoder import Family
from trimtab.towers.early_exit import LayerStack
from trimtab.towers.freezing import fingerprint, freeze, tokenizer_digest
from trimtab.towers.hf import FAMILIES, is_hub_id, pick_device, pick_dtype, resolve_folder, text_inputs_for
from trimtab.towers.parts import load_config, load_tokenizer, load_weights
from trimtab.towers.passes import Passes, per_pass, results, rows_of
from trimtab.towers.tokens import TextInputs, context_length

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

# Where the text encoder sits inside a dual encoder, if not at `text_model`.
_TEXT_TOWERS = {"altclip": "text_model.roberta"}
# Pooling heads are never used here, and many checkpoints lack them.
_POOLER = "pooler."
# What transformers calls the encoder alone of a model that has a decoder too, such as T5EncoderModel.
_ENCODER_ONLY = "EncoderModel"
# In names of local folders; files of e5 models do not say what they are.
_E5 = re.compile(r"(^|-)e5-(small|base|large)")
# Of e5 models, those that want an instruction before a query, and nothing before other texts.
_INSTRUCT = re.compile(r"(^|-)instruct($|-)", re.IGNORECASE)


class TextEncoder:
    """Any transformers text encoder, or the text tower of a dual encoder, frozen.

    Attributes:
        name: what it was loaded by.
        model: the encoder, frozen and in eval mode.
        hidden_size: H, width of one layer's states.
        num_layers: number of layers L; layer 0 is the embedding output.
        max_tokens: context length, special tokens included.
        prefix: set before every text ("query: " for e5 models). The encoder reads it, but the states of its
            tokens are left out of the output: they are nearly the same for every text.
        fingerprint: names weights, configuration and tokenizer.
        last_truncated: how many texts the last call cut to the context length; within `one_encoding`, all calls so far.
    """

    def __init__(
        self,
        model: nn.Module,
        text_inputs: TextInputs,
        *,
        name: str,
        config: PreTrainedConfig,
    ) -> None:
        self.name = name
        # A cast to lower precision comes later, see `to`.
        self.fingerprint = digest_of(
            fingerprint(model, config, exclude=[_POOLER]), tokenizer_digest(text_inputs.tokenizer)
        )
        self.model: Any = freeze(model)
        self.text_inputs = text_inputs
        self.last_truncated = 0
        self._read: int | None = None  # texts within `one_encoding`
        with torch.no_grad():
            probe = text_inputs(["a"])
            self._stack = LayerStack.find(model, lambda: self._all_states(probe))
            states = self._all_states(probe)
        self._prefix_span = self._find_prefix()
        self.num_layers = len(states) - 1
        self.hidden_size = states[-1].shape[-1]

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        prefix: str | None = None,
        max_tokens: int | None = None,
        device: str = "auto",
        dtype: str = "float32",
        trust_remote_code: bool = False,
    ) -> TextEncoder:
        """Load a frozen text encoder.

        Args:
            name: "e5-small", a transformers folder or a model hub id, of a text encoder or of a dual encoder.
            prefix: set before every text; None takes what the model is known to expect.
            max_tokens: a shorter context than the model's own.
            device: "auto" takes a GPU where there is one; or a torch device.
            dtype: precision of weights and activations; states are float32 in any case.
            trust_remote_code: run Python code from the model folder.

        Raises:
            ModelError: unknown, incomplete or damaged model; the message says what to do.
        """
        target_device, target_dtype = pick_device(device), pick_dtype(dtype)
        folder = resolve_folder(name, trust_remote_code=trust_remote_code)
        config = load_config(folder, trust_remote_code=trust_remote_code)
        facts = FAMILIES.get(config.model_type)
        model = load_weights(
            facts.model_class if facts else _model_class(config),
            folder,
            config,
            trust_remote_code=trust_remote_code,
            may_miss=rf"(^|\.){_POOLER}",
            hub_id=str(name) if is_hub_id(name) else None,
        )
        if facts:
            model = model.get_submodule(_TEXT_TOWERS.get(config.model_type, "text_model"))
            config = config.text_config
        elif config.is_encoder_decoder or type(model).__name__.endswith(_ENCODER_ONLY):
            model = model.get_encoder()
        tokenizer = load_tokenizer(folder, config, trust_remote_code=trust_remote_code)
        limit = context_length(tokenizer, model, config)
        if max_tokens is not None:
            special = tokenizer.num_special_tokens_to_add(pair=False)
            if not special < max_tokens <= limit:
                raise ModelError(f"max_tokens={max_tokens} must lie between {special + 1} and {limit} for {name}")
            limit = max_tokens
        text_inputs = text_inputs_for(
            facts or Family("AutoModel"),
            tokenizer,
            limit,
            # After padding on the left, absolute positions would depend on the longest text of a batch.
            padding_side="right",
            prefix=_known_prefix(str(name), folder) if prefix is None else prefix,
        )
        encoder = cls(model, text_inputs, name=str(name), config=config)
        encoder.model.to(target_device, target_dtype)
        return encoder

    def __repr__(self) -> str:
        return f"TextEncoder({self.name!r}, hidden_size={self.hidden_size}, num_layers={self.num_layers})"

    @property
    def max_tokens(self) -> int:
        return self.text_inputs.limit

    @property
    def prefix(self) -> str:
        return self.text_inputs.prefix

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> TextEncoder:
        """Move the weights; returns itself."""
        self.model.to(device)
        return self

    def states(self, texts: Sequence[str], layers: Sequence[int] = (-1,)) -> tuple[Tensor, Tensor]:
        """Hidden states of one batch as tensors on the encoder's device.

        Args:
            layers: which layers, 0 (embeddings) to L or negative from the end; their states are concatenated.
                The last one is the encoder's output, after a final norm where there is one. Layers above the
                highest are not run.

        Returns:
            States (B, T, H * len(layers)) float32, and the mask (B, T) bool of real tokens, special ones too.
        """
        ids, self.last_truncated = self.text_inputs.token_ids(texts)
        return self._states(self.text_inputs.pad(ids), [len(one) for one in ids], self._checked_layers(layers))

    def states_of(self, tokens: dict[str, Tensor], layers: Sequence[int] = (-1,)) -> tuple[Tensor, Tensor]:
        """As `states`, of what `tokenize` returned."""
        return self._states(tokens, self._lengths(tokens), self._checked_layers(layers))

    def _lengths(self, tokens: dict[str, Tensor]) -> Tensor:  # (B,)
        if "attention_mask" in tokens:
            return tokens["attention_mask"].sum(dim=1)
        ids, tokenizer = tokens["input_ids"], self.text_inputs.tokenizer  # (B, T)
        places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        lengths = (places * (ids != tokenizer.pad_token_id)).amax(dim=1)
        # SigLIP pads with its end token: the first of them is the text's own.
        lengths += int(tokenizer.pad_token_id == tokenizer.eos_token_id)
        return lengths.clamp(1, ids.shape[1])

    def token_states(
        self, texts: Iterable[str], layers: Sequence[int] = (-1,), *, batch_size: int = 64
    ) -> list[np.ndarray]:
        """Hidden states of any number of texts, without padding.

        Args:
            layers: as for `states`.
            batch_size: most texts per forward pass, fewer on a CPU; texts of like length share a pass.

        Returns:
            For each text (T_i, H * len(layers)) float32, special tokens included, the prefix's left out.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        picked = self._checked_layers(layers)
        kept_states: list[np.ndarray] = [np.empty(0)] * len(texts)
        truncated = 0
        batches = self.text_inputs.batches(texts, per_pass(batch_size, "texts", self.device))
        passes = Passes(batch_size)

        def read(batch: tuple[list[int], dict[str, Tensor], list[int], int]) -> tuple[list[int], list[np.ndarray], int]:
            positions, tokens, lengths, cut = batch

            def run(span: slice) -> list[np.ndarray]:
                states = self._states(rows_of(tokens, span), lengths[span], picked)[0].cpu().numpy()
                kept = (length - len(self._prefix_span) for length in lengths[span])
                # A view would keep the padding alive.
                return [row[:count].copy() for row, count in zip(states, kept, strict=True)]

            return positions, [row for rows in passes.of(run, len(positions)) for row in rows], cut

        # A pass that stops early does so by hooks, which passes of other threads would run into.
        several = max(picked) == self.num_layers
        with contextlib.closing(results(read, batches, self.device, threads=several)) as found:
            for positions, some, cut in found:
                for position, states in zip(positions, some, strict=True):
                    kept_states[position] = states
                truncated += cut
        if self._read is None:
            self.last_truncated = truncated
            self._tell_truncated(len(texts))
        else:
            self.last_truncated += truncated
            self._read += len(texts)
        return kept_states

    @contextlib.contextmanager
    def one_encoding(self) -> Iterator[None]:
        """Takes calls of `token_states` as parts of one: what they cut is counted together and told once."""
        self._read = self.last_truncated = 0
        try:
            yield
        finally:
            read, self._read = self._read, None
            self._tell_truncated(read)

    def _tell_truncated(self, count: int) -> None:
        if self.last_truncated:
            logger.warning(
                "%d of %d texts were longer than the %d tokens that %s reads, and were cut",
                self.last_truncated, count, self.max_tokens, self.name,
            )  # fmt: skip

    def _states(
        self, tokens: dict[str, Tensor], lengths: Sequence[int] | Tensor, layers: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        hidden = self._hidden_states({name: tensor.to(self.device) for name, tensor in tokens.items()}, layers)
        states = torch.cat([hidden[layer] for layer in layers], dim=-1).float()  # (B, T, H * len(layers))
        if span := self._prefix_span:
            states = torch.cat([states[:, : span.start], states[:, span.stop :]], dim=1)
        positions = torch.arange(states.shape[1], device=states.device)
        mask = positions < torch.as_tensor(lengths, device=states.device)[:, None] - len(span)  # (B, T)
        return states, mask

    def _find_prefix(self) -> range:
        """Positions of the prefix's own tokens, which start every text alike; special tokens are not part."""
        if not self.prefix:
            return range(0)
        probes, _ = self.text_inputs.token_ids(["a", "7", "苹", "the end"])
        same = 0
        for tokens in zip(*probes, strict=False):
            if len(set(tokens)) > 1:
                break
            same += 1
        special = set(self.text_inputs.tokenizer.all_special_ids)
        leading = next((i for i, token in enumerate(probes[0]) if token not in special), 0)
        return range(leading, max(leading, same))

    def _hidden_states(self, tokens: dict[str, Tensor], layers: Sequence[int]) -> Mapping[int, Tensor]:
        if self._stack and max(layers) < self.num_layers:
            return self._stack.states(lambda: self.model(**tokens, return_dict=True), layers)
        return dict(enumerate(self._all_states(tokens)))

    def _all_states(self, tokens: dict[str, Tensor]) -> list[Tensor]:
        output = self.model(**tokens, output_hidden_states=True, return_dict=True)
        return [*output.hidden_states[:-1], output.last_hidden_state]

    def _checked_layers(self, layers: Sequence[int]) -> list[int]:
        count = self.num_layers + 1
        wrong = [layer for layer in layers if not -count <= layer < count]
        if wrong or not layers:
            raise ModelError(
                f"layers={list(layers)}: {self.name} has layers 0 to {self.num_layers} (or -1 to {-count})"
            )
        return [layer % count for layer in layers]


def _model_class(config: PreTrainedConfig) -> str:
    """The class to load a text encoder by: checkpoints of an encoder alone lack the weights of its decoder."""
    import transformers

    for name in config.architectures or ():
        if name.endswith(_ENCODER_ONLY) and hasattr(transformers, name):
            return name
    return "AutoModel"


def _known_prefix(name: str, folder: Path) -> str:
    """What a model wants before short texts: noted in its folder by us, or known of the e5 models."""
    note = folder / "trimtab.json"
    if note.is_file():
        try:
            return str(json.loads(note.read_text(encoding="utf-8")).get("prefix", ""))
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ModelError(f"{note} is damaged ({error}): fetch the model again") from error
    if is_hub_id(name):
        owner, _, model = name.rpartition("/")
        known = owner == "intfloat" and "e5" in model
    else:
        known = bool(_E5.search(Path(name).name))
    return "query: " if known and not _INSTRUCT.search(Path(name).name) else ""
