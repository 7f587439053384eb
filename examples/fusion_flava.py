"""Teach a FLAVA to read Chinese inside its fusion transformer, from parallel text and pictures of anything.

    python examples/fusion_flava.py

builds a tiny FLAVA and a tiny Chinese BERT with random weights, so it runs anywhere in seconds and shows the steps;
its numbers mean nothing beyond "the loss falls". With real models, where they can be fetched:

    python examples/fusion_flava.py --base facebook/flava-full --student google-bert/bert-base-chinese \
        --pairs zh-en.tsv --images some/pictures --out runs/flava-zh

`--pairs` has the columns target and english; `--images` is a folder of pictures that need not belong to the texts.
Trimtab reads safetensors only. If a hub repository has none, convert it once where transformers may unpickle it:

    for kind in (FlavaModel, AutoTokenizer, AutoImageProcessor):
        kind.from_pretrained("facebook/flava-full").save_pretrained("flava")      # then: --base flava
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trimtab.adapters.fusion import FusionAdapted, check_fusion_base, load_fusion_adapted, save_fusion_adapter
from trimtab.adapters.resampler import FusionAdapter, ResamplerConfig
from trimtab.config import LanguageAdapterConfig, TrainingConfig
from trimtab.data.images import read_image
from trimtab.data.parallel import read_parallel
from trimtab.tasks.fusion import FusionObjective, FusionTask
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.fusion import image_sequence, teacher_sequence
from trimtab.towers.hf import load_base
from trimtab.towers.text_encoder import TextEncoder
from trimtab.training import train

PAIRS = [
    ("一只猫的照片", "a photo of a cat"),
    ("一只狗的照片", "a photo of a dog"),
    ("路上的红色小汽车", "a small red car on the road"),
    ("两个苹果和一个橙子", "two apples and one orange"),
    ("蓝天中的鸟", "a bird in the blue sky"),
    ("河边的房子", "the house near the river"),
    ("一杯绿茶", "a cup of green tea"),
    ("一把旧木椅", "an old wooden chair"),
    ("人们在雨中行走", "people walking in the rain"),
    ("花园里的黄花", "a yellow flower in the garden"),
    ("海上的月亮", "the moon over the sea"),
    ("一只黑熊", "a black bear"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="FLAVA folder or hub id (default: a tiny random one)")
    parser.add_argument("--student", help="text encoder of the target language (default: a tiny random one)")
    parser.add_argument("--pairs", type=Path, help="CSV, TSV, JSONL or Parquet with the columns target and english")
    parser.add_argument("--images", type=Path, help="folder of pictures (default: noise)")
    parser.add_argument("--out", type=Path, help="adapted folder to write (default: a temporary one)")
    parser.add_argument("--epochs", type=int, help="default: 10, or 200 with the built-in sentences")
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run(options, Path(temporary))


def run(options: argparse.Namespace, temporary: Path) -> None:
    base = load_base(options.base or build_tiny_flava(temporary / "flava"))
    check_fusion_base(base)
    student = TextEncoder.load(options.student or build_tiny_bert(temporary / "bert"))
    parallel = read_parallel(options.pairs) if options.pairs else None
    targets = parallel.targets if parallel else [target for target, _ in PAIRS]
    english = parallel.english if parallel else [text for _, text in PAIRS]
    pictures: list[Any] = sorted(p for p in options.images.iterdir() if p.is_file()) if options.images else noise(6)

    # 1. Everything frozen is computed once. A large corpus belongs on disk instead: see trimtab.data.cache.
    data = frozen_states(base, student, targets, english)
    probes = torch.cat([
        image_sequence(base.model, pixels.to(base.device, base.dtype))
        for pixels in (base.preprocess(picture)["pixel_values"] for picture in open_all(pictures))
    ])  # fmt: skip

    # 2. What is trained, from its closed-form start.
    real = options.base is not None
    torch.manual_seed(0)
    adapter = FusionAdapter(
        LanguageAdapterConfig() if real else LanguageAdapterConfig(width=32, heads=4, layers=1),
        ResamplerConfig() if real else ResamplerConfig(tokens=32, heads=4, layers=1),
        input_dim=student.hidden_size,
        output_dim=base.model.text_to_mm_projection.in_features,
    ).to(base.device)
    sample = {name: tensor[:4096] for name, tensor in data.items()}
    adapter.fit(sample["states"], sample["mask"], sample["teacher"], sample["teacher_mask"])

    # 3. Train: every step fuses each text with a picture drawn at random, and each translation with the same one.
    def batches(epoch: int) -> Iterator[dict[str, Tensor]]:
        order = np.random.default_rng([0, epoch])
        rows = torch.from_numpy(order.permutation(len(targets)))
        for part in rows.split(options.batch_size):
            drawn = torch.from_numpy(order.integers(len(probes), size=len(part)))
            yield {**{name: tensor[part] for name, tensor in data.items()}, "images": probes[drawn]}

    first = next(iter(batches(0)))
    task = FusionTask.measured(base.model, adapter, FusionObjective(), first)
    with torch.no_grad():
        before = task(first)
    settings = TrainingConfig(
        epochs=options.epochs or (10 if options.pairs else 200),
        batch_size=options.batch_size,
        learning_rate=1e-3 if real else 5e-3,
        trackers=(),
    )
    train(
        task, adapter, batches, steps_per_epoch=-(-len(targets) // options.batch_size), settings=settings,
        checkpoint_dir=(options.out or temporary / "out") / "checkpoints", digest="example",
    )  # fmt: skip
    with torch.no_grad():
        after = task(first)
    for name in before:
        print(f"{name:12} {before[name]:.3f} -> {after[name]:.3f}   (on training sentences)")

    # 4. Use: save the small part, load it onto the frozen models, fuse pictures with Chinese.
    out = save_fusion_adapter(options.out or temporary / "out", adapter, base=base, student=student)
    model: FusionAdapted = load_fusion_adapted(out, base=base, student=student)
    fused = model.fused(list(open_all(pictures))[:2], targets[:2])
    assert fused.cls is not None
    print(f"fused CLS {tuple(fused.cls.shape)}, image {tuple(fused.image.shape)}, text {tuple(fused.text.shape)}")
    size = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    print(f"{out if options.out else 'the adapted folder'} holds {size / 1e6:.2f} MB")


@torch.no_grad()
def frozen_states(base: DualEncoder, student: TextEncoder, targets: list[str], english: list[str]) -> dict[str, Tensor]:
    """Token states of the student and of FLAVA's own text tower, padded, with their masks."""
    rows: dict[str, list[Tensor]] = {"states": [], "teacher": []}
    for start in range(0, len(targets), 64):
        states, mask = student.states(targets[start : start + 64])
        rows["states"] += [row[keep] for row, keep in zip(states, mask, strict=True)]
        tokens = {
            name: tensor.to(base.device) for name, tensor in base.text_inputs(english[start : start + 64]).items()
        }
        keep_all = tokens["attention_mask"].bool()
        rows["teacher"] += [
            row[keep] for row, keep in zip(teacher_sequence(base.model, **tokens), keep_all, strict=True)
        ]
    padded = {name: pad_sequence(some, batch_first=True) for name, some in rows.items()}
    masks = {
        name: pad_sequence(
            [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in some], batch_first=True
        )
        for name, some in (("mask", rows["states"]), ("teacher_mask", rows["teacher"]))
    }
    return {**padded, **masks}


# Stand-ins


def noise(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 48, 64, 3), dtype=np.uint8))


def open_all(pictures: list[Any]) -> Iterator[Image.Image]:
    return map(read_image, pictures)


def small_tokenizer() -> Any:
    from transformers import BertTokenizer

    letters = sorted({letter for pair in PAIRS for text in pair for letter in text} - {" "})
    words = sorted({word for _, english in PAIRS for word in english.split()} - set(letters))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *words, *("##" + letter for letter in letters)]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, model_max_length=64)


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,  # so that random layers do something
}


def build_tiny_bert(folder: Path) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    tokenizer = small_tokenizer()
    config = BertConfig(**SMALL, vocab_size=len(tokenizer), max_position_embeddings=64)
    for part in (BertModel(config, add_pooling_layer=False), tokenizer):
        part.save_pretrained(folder)
    return folder


def build_tiny_flava(folder: Path) -> Path:
    from transformers import FlavaConfig, FlavaImageProcessorPil, FlavaModel

    torch.manual_seed(2)
    tokenizer = small_tokenizer()
    config = FlavaConfig(
        text_config={**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 64},
        image_config={**SMALL, "image_size": 32, "patch_size": 8},
        multimodal_config={**SMALL, "hidden_size": 48},
        image_codebook_config={"hidden_size": 8, "vocab_size": 16},
        hidden_size=32,
        projection_dim=24,
        init_codebook=False,
        initializer_range=0.2,
    )
    size = {"height": 32, "width": 32}
    for part in (FlavaModel(config), tokenizer, FlavaImageProcessorPil(size=size, crop_size=size)):
        part.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
