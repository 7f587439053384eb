"""Tiny random models of every family, built from configuration in milliseconds, saved as ordinary folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

IMAGE_SIZE = 32
PATCH_SIZE = 8
EMBEDDING_DIM = 12
CONTEXT = 24
CORPUS = [
    *("a photo of a cat", "a photo of a dog", "a small red car on the road", "two apples and one orange"),
    *("a bird in the blue sky", "the house near the river", "a cup of green tea", "an old wooden chair"),
    *("people walking in the rain", "a yellow flower in the garden", "the moon over the sea", "a black bear"),
    *("一只猫的照片", "一只狗的照片", "路上的红色小汽车", "两个苹果和一个橙子", "蓝天中的鸟", "河边的房子"),
    *("一杯绿茶", "一把旧木椅", "人们在雨中行走", "花园里的黄花", "海上的月亮", "一只黑熊"),
]

_VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE,
}  # fmt: skip
_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every weight, norms and biases too, a sizeable random part, so that no mistake hides in a zero.

    Matrices are drawn anew: transformers drew them from the generator of the process, and a test that learns from them
    would pass on one day and fail on another.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            if parameter.ndim > 1 or "embedding" in name:
                parameter.copy_(noise)
            elif parameter.ndim == 1:
                parameter.add_(noise)
    return model.eval()


# Tokenizers


def clip_tokenizer() -> Any:
    """CLIP's byte-level BPE with a handful of merges; the end token has the largest id."""
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("p", "h"), ("o", "f</w>")]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=CONTEXT
    )


def bert_tokenizer() -> Any:
    """A WordPiece tokenizer of English and Chinese: the words of `CORPUS`, and characters for the rest."""
    from transformers import BertTokenizer

    letters = sorted(set("".join(CORPUS)) - {" "})
    words = sorted({word for text in CORPUS for word in text.split() if word.isascii()} - set(letters))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *letters, *("##" + letter for letter in letters if letter.isascii()), *words]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return BertTokenizer(vocab=vocabulary, model_max_length=CONTEXT)


def _unigram(special: list[str], template: str, normalizer: normalizers.Normalizer) -> Tokenizer:
    """Single characters, and the words of `CORPUS` where they are likelier."""
    pieces = ["▁", *sorted(set("".join(CORPUS)) - {" "})]
    words = sorted({"▁" + word for text in CORPUS for word in text.split() if word.isascii()})
    scores = [*((t, 0.0) for t in special), *((t, -8.0) for t in pieces), *((t, -9.0) for t in words)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=special.index("<unk>")))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, index) for index, token in enumerate(special)]
    )
    return tokenizer


def xlmr_tokenizer() -> Any:
    """A Unigram tokenizer with XLM-R's special tokens: padding has id 1. It tells no maximum length."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = _unigram(["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>", normalizers.NFKC())
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        cls_token="<s>", sep_token="</s>",
    )  # fmt: skip


def siglip_tokenizer() -> Any:
    """Like SigLIP's: only an end token, which is the padding too, and no attention mask."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = _unigram(["<unk>", "</s>"], "$A </s>", normalizers.Lowercase())
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="</s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=CONTEXT, model_input_names=["input_ids"],
    )  # fmt: skip


def siglip2_tokenizer(name: str = "Siglip2Tokenizer") -> Any:
    """SigLIP 2's class: characters with a byte for each unknown one, an end token, lower case."""
    import transformers

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += sorted(set("".join(CORPUS)) - {" "})
    tokenizer = getattr(transformers, name)(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=CONTEXT,
        padding_side="right", model_input_names=["input_ids"],
    )  # fmt: skip
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return tokenizer


# Dual encoders


def _save(folder: Path, *parts: Any) -> Path:
    from trimtab.towers.parts import quiet

    with quiet():
        for part in parts:
            part.save_pretrained(folder)
    return folder


def _clip_processor() -> Any:
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE)


def build_clip(folder: Path, *, seed: int = 0, hidden_act: str = "quick_gelu") -> Path:
    from transformers import CLIPConfig, CLIPModel

    tokenizer = clip_tokenizer()
    config = CLIPConfig(
        text_config={
            **_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "hidden_act": hidden_act,
        },
        vision_config={**_VISION, "hidden_act": hidden_act},
        projection_dim=EMBEDDING_DIM,
    )  # fmt: skip
    return _save(folder, randomised(CLIPModel(config), seed), tokenizer, _clip_processor())


def build_siglip(folder: Path, tokenizer: Any = None) -> Path:
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    tokenizer = tokenizer or siglip_tokenizer()
    config = SiglipConfig(
        text_config={
            **_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT,
            "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config=_VISION,
    )  # fmt: skip
    processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return _save(folder, randomised(SiglipModel(config)), tokenizer, processor)


def build_siglip2_naflex(folder: Path) -> Path:
    from transformers import Siglip2Config, Siglip2ImageProcessorPil, Siglip2Model

    tokenizer = siglip2_tokenizer()
    vision = {key: value for key, value in _VISION.items() if key != "image_size"}
    config = Siglip2Config(
        text_config={
            **_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT,
            "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**vision, "num_patches": 16},
    )  # fmt: skip
    processor = Siglip2ImageProcessorPil(patch_size=PATCH_SIZE, max_num_patches=16)
    return _save(folder, randomised(Siglip2Model(config)), tokenizer, processor)


def build_chinese_clip(folder: Path) -> Path:
    from transformers import ChineseCLIPConfig, ChineseCLIPImageProcessorPil, ChineseCLIPModel

    tokenizer = bert_tokenizer()
    config = ChineseCLIPConfig(
        text_config={**_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 64},
        vision_config=_VISION,
        projection_dim=EMBEDDING_DIM,
    )
    processor = ChineseCLIPImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False)
    return _save(folder, randomised(ChineseCLIPModel(config)), tokenizer, processor)


def build_altclip(folder: Path) -> Path:
    from transformers import AltCLIPConfig, AltCLIPModel

    tokenizer = xlmr_tokenizer()
    text = {**_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT + 2, "project_dim": 16}
    config = AltCLIPConfig(text_config=text, vision_config=_VISION, projection_dim=EMBEDDING_DIM)
    return _save(folder, randomised(AltCLIPModel(config)), tokenizer, _clip_processor())


def build_vision_text(folder: Path) -> Path:
    from transformers import (
        BertConfig,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
        ViTConfig,
        ViTImageProcessorPil,
    )

    tokenizer = bert_tokenizer()
    config = VisionTextDualEncoderConfig(
        vision_config=ViTConfig(**_VISION).to_dict(),
        text_config=BertConfig(**_TEXT, vocab_size=len(tokenizer), max_position_embeddings=64).to_dict(),
        projection_dim=EMBEDDING_DIM,
    )
    processor = ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return _save(folder, randomised(VisionTextDualEncoderModel(config)), tokenizer, processor)


def build_flava(folder: Path) -> Path:
    from transformers import FlavaConfig, FlavaImageProcessorPil, FlavaModel

    tokenizer = bert_tokenizer()
    multimodal = {**_TEXT, "hidden_size": 24}
    config = FlavaConfig(
        text_config={**_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 64},
        image_config=_VISION,
        multimodal_config=multimodal,
        image_codebook_config={"hidden_size": 8, "vocab_size": 16},
        hidden_size=16,
        projection_dim=EMBEDDING_DIM,
        init_codebook=False,
    )
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = FlavaImageProcessorPil(size=square, crop_size=square)
    return _save(folder, randomised(FlavaModel(config)), tokenizer, processor)


DUAL_ENCODERS: dict[str, Callable[[Path], Path]] = {
    "clip": build_clip,
    "siglip": build_siglip,
    "siglip2": build_siglip2_naflex,
    "chinese_clip": build_chinese_clip,
    "altclip": build_altclip,
    "vision-text-dual-encoder": build_vision_text,
    "flava": build_flava,
}

# Text encoders, as students


def build_bert(folder: Path) -> Path:
    from transformers import BertConfig, BertModel

    tokenizer = bert_tokenizer()
    config = BertConfig(**_TEXT, vocab_size=len(tokenizer), max_position_embeddings=64)
    return _save(folder, randomised(BertModel(config, add_pooling_layer=False)), tokenizer)


def build_xlmr(folder: Path) -> Path:
    from transformers import XLMRobertaConfig, XLMRobertaModel

    tokenizer = xlmr_tokenizer()
    config = XLMRobertaConfig(**_TEXT, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT + 2)
    return _save(folder, randomised(XLMRobertaModel(config)), tokenizer)


TEXT_ENCODERS: dict[str, Callable[[Path], Path]] = {"bert": build_bert, "xlm-roberta": build_xlmr}

BUILDERS: dict[str, Callable[[Path], Path]] = {**DUAL_ENCODERS, **TEXT_ENCODERS}
