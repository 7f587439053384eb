"""A model as folders that transformers and sentence-transformers load without Trimtab.

The base lies in an ordinary transformers folder. The text side of a language link has layers that no architecture of
transformers has, so its folder brings the Python file of its own model along (`trimtab.towers.merged_text`); so does a
folder of `starter` (`trimtab.towers.starter_model`) or of CLIP's ResNets (`trimtab.towers.clip_resnet`). Such folders
load with `trust_remote_code=True`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.adapters.cards import shown_name
from trimtab.errors import ModelError
from trimtab.files import atomic_folder, write_json, write_text
from trimtab.serve.export import CLASSES_LEFT_OUT, TEXTS, describe_processor, made_pictures, on_cpu, without_prompts
from trimtab.towers import clip_resnet, efficientnet, memory, merged_text, starter_model
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.hf import load_base
from trimtab.towers.memory import PairMemory
from trimtab.towers.merged_text import AdaptedTextConfig, AdaptedTextModel

BASE = "base"
CODE = "text_encoder.py"
TOLERANCE = 1e-5
_OURS = "trimtab_"  # how the kinds of our own towers start
_BUT = f"except its classes: {CLASSES_LEFT_OUT}"


def merge(model: DualEncoder, out: str | Path) -> dict[str, Any]:
    """Write folders that give the same embeddings without Trimtab.

    What the domain link's methods `full`, `lora` and `probe` trained lies in the weights of the base already. A
    language link becomes a text encoder of its own, with the base in a folder `base` inside. Adapters of a domain and
    prompts are refused, see `why_not`.

    Raises:
        ModelError: it cannot be merged, with the reason; or what was written gives other embeddings. Nothing is left
            then.
    """
    if reason := why_not(model):
        raise ModelError(f"{model.name} cannot be merged: {reason}")
    out = Path(out)
    scratch = f".{out.resolve().name}."  # of this function itself, where it was killed
    if out.exists() and (not out.is_dir() or any(not one.name.startswith(scratch) for one in out.iterdir())):
        raise ModelError(f"{out} holds other files: choose another folder")
    language = _language(model)
    plain: DualEncoder = getattr(language or model, "base", model)
    while hasattr(plain, "base"):  # a domain link at alpha 0
        plain = plain.base
    with on_cpu(model), atomic_folder(out, "config.json") as new:
        # Libraries keep loaded code under the name of its folder, so it is checked in one of the final name.
        built = new / "_" / out.resolve().name
        built.mkdir(parents=True)
        worst = write_base(plain, built / BASE if language else built)
        if language is not None:
            worst = max(worst, write_text_encoder(language, built))
        for one in built.iterdir():
            one.rename(new / one.name)
        built.rmdir()
        built.parent.rmdir()
    where = repr(str(out))
    code = ", trust_remote_code=True"
    about = {
        "folder": str(out),
        "load_with": f"transformers.{type(plain.model).__name__}.from_pretrained({where})",
        "largest difference": f"{worst:.1e}",
    }
    if own_kinds(plain):
        about["load_with"] = f"transformers.AutoModel.from_pretrained({where}{code})"
    if language is not None:
        about["load_with"] = f"sentence_transformers.SentenceTransformer({where}{code})"
        about["or"] = f"transformers.AutoModel.from_pretrained({where}{code})"
        about["pictures, and English through its own tower"] = str(out / BASE)
    return about


def why_not(model: Any) -> str:
    """Why no folder can hold what a model learned; empty if one can."""
    links = model.links if hasattr(model, "core") else {"": model}
    prompts = [link for link in links.values() if hasattr(link, "prompt_tower")]
    instead = _instead(model, leaves_classes=any(link.prompt.instance is not None for link in prompts))
    for link in links.values():
        if link in prompts:
            return (
                "its prompts are inputs of the text tower and vectors of classes, which a folder of weights has no "
                f"place for. {instead}"
            )
        if hasattr(link, "student"):
            inputs = link.student.text_inputs
            left = (inputs.padding_side or inputs.tokenizer.padding_side) == "left"
            if inputs.pad_to_limit or not inputs.use_mask or left:
                return (
                    f"its student {link.student.name} reads texts without a mask or padded in a way of its own, which "
                    f"a program that pads as usual does not give it. {instead}"
                )
        elif hasattr(link, "adapters") and link.alpha != 0:
            return (
                "the adapters of its domain bend (norm, Down, GELU, Up) beside whole layers, and no change of a "
                f"layer's weights does the same. {instead}. What method=lora, full or probe trains are weights of a "
                "transformers folder"
            )
    return ""


def _instead(model: Any, *, leaves_classes: bool = False) -> str:
    """The other format, where that can hold the model."""
    try:
        describe_processor(without_prompts(model))
    except ModelError as error:
        return f"ONNX cannot hold it either: {error}"
    return "`trimtab export --format onnx` writes it with everything inside" + (f", {_BUT}" if leaves_classes else "")


def own_kinds(model: DualEncoder) -> list[str]:
    """Kinds of a base's towers that transformers does not have."""
    config: Any = model.model.config
    kinds = [getattr(getattr(config, name, None), "model_type", "") for name in ("vision_config", "text_config")]
    return [str(kind) for kind in kinds if str(kind).startswith(_OURS)]


def _language(model: Any) -> Any:
    link = getattr(model, "language", model)
    return link if hasattr(link, "student") else None


# The base


def write_base(model: DualEncoder, folder: Path) -> float:
    """Write a transformers folder of a base; the largest difference of its unit vectors.

    Raises:
        ModelError: it gives other embeddings.
    """
    model.save_pretrained(folder)
    if kinds := own_kinds(model):
        resnet = clip_resnet.ClipResNetVisionConfig.model_type in kinds
        module, name = (clip_resnet, "ClipResNet") if resnet else (starter_model, "Starter")
        _bring_code(folder, [efficientnet, module])
        code = module.__name__.rpartition(".")[2]
        _point_to(folder, {f"Auto{part}": f"{code}.{name}{part}" for part in ("Config", "Model")})
    again = load_base(str(folder), device="cpu")
    worst = max(
        float(np.abs(model.encode_image(made_pictures()) - again.encode_image(made_pictures())).max()),
        float(np.abs(model.encode_text(TEXTS) - again.encode_text(TEXTS)).max()),
    )
    return _checked(worst, model.name)


def _bring_code(folder: Path, modules: Sequence[Any]) -> None:
    for module in modules:
        # Inside the folder the files are a package of their own.
        path = Path(module.__file__)
        code = path.read_text(encoding="utf-8").replace("from trimtab.towers.", "from .")
        write_text(folder / path.name, code)


def _point_to(folder: Path, classes: dict[str, str]) -> None:
    path = folder / "config.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "auto_map": classes})


# The text side of a language link


def write_text_encoder(link: Any, folder: Path) -> float:
    """Write the folder of a text encoder, for transformers and for sentence-transformers; the largest difference.

    All texts go through it, English too: routing by script belongs to the program that uses it.

    Raises:
        ModelError: it gives other vectors.
    """
    student, adapter = link.student, link.adapter
    inputs, span = student.text_inputs, student._prefix_span
    config = AdaptedTextConfig(
        encoder=student.model.config.to_dict(),
        states=student._checked_layers(link.layers),
        hidden_size=link.embedding_dim,
        adapter={name: getattr(adapter.config, name) for name in _ADAPTER_KEYS},
        prefix=inputs.prefix,
        prefix_span=[span.start, span.stop] if span else [0, 0],
    )
    merged = AdaptedTextModel(config).eval()
    weights = {f"encoder.{name}": one for name, one in student.model.state_dict().items() if "pooler." not in name}
    weights |= {f"adapter.{name}": one for name, one in adapter.state_dict().items()}
    if wrong := merged.load_state_dict(weights, strict=False):
        lacking = [*wrong.missing_keys, *wrong.unexpected_keys]
        if lacking:
            raise ModelError(
                f"the student {student.name} is of a kind that cannot be built anew from its configuration "
                f"({', '.join(lacking[:3])}). {_instead(link)}"
            )
    merged.save_pretrained(folder)
    inputs.tokenizer.model_max_length = inputs.limit
    inputs.tokenizer.save_pretrained(folder)
    write_text(folder / CODE, _text_code())
    names = {"AutoConfig": "AdaptedTextConfig", "AutoModel": "AdaptedTextModel"}
    _point_to(folder, {kind: f"{CODE[:-3]}.{name}" for kind, name in names.items()})
    _write_for_sentence_transformers(folder, inputs.prefix)
    write_text(folder / "README.md", _card(link))
    return _checked(_text_difference(link, folder), link.name)


def _text_code() -> str:
    """One file: transformers finds no second one where its package of such files was imported before the folder."""
    line = "from trimtab.towers.memory import PairMemory\n"
    code = Path(str(merged_text.__file__)).read_text(encoding="utf-8")
    assert line in code
    return f"{code.replace(line, '')}\n\nDIRECTIONS = {memory.DIRECTIONS}\n\n\n{inspect.getsource(PairMemory)}"


_ADAPTER_KEYS = ("width", "layers", "heads", "feedforward", "hidden", "pooling", "init", "memory")


def _write_for_sentence_transformers(folder: Path, prefix: str) -> None:
    module = "sentence_transformers.models.Transformer"
    write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": module}])
    write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}},
            "module_output_name": "sentence_embedding",
        },
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": {"text": prefix} if prefix else {},
            "default_prompt_name": "text" if prefix else None,
            "similarity_fn_name": "cosine",
        },
    )


@torch.no_grad()
def _text_difference(link: Any, folder: Path) -> float:
    """Of unit vectors, with everything as a user has it: read from the folder by the code that lies there."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(str(folder), trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)
    texts = [text for text in TEXTS if text]
    wanted = DualEncoder.encode_text(link, texts)  # without routing
    given = [link.student.prefix + text for text in texts]
    worst = 0.0
    for size in (1, len(given)):
        for at in range(0, len(given), size):
            tokens = tokenizer(given[at : at + size], padding=True, truncation=True, return_tensors="pt")
            vectors = model(**tokens).pooler_output.numpy()
            worst = max(worst, float(np.abs(vectors - wanted[at : at + size]).max()))
    return worst


def _checked(worst: float, name: str) -> float:
    if not worst <= TOLERANCE:
        raise ModelError(f"what was written gives other embeddings than {name} (by {worst:.1e}): it was not kept")
    return worst


def _card(link: Any) -> str:
    prefix = f"\nSet {link.student.prefix!r} before every text; sentence-transformers does so by itself.\n"
    english = (
        "English goes through it here too. The model that this was made of sends texts in Latin script to the base's "
        f"own text tower, which is in `{BASE}/` and is better at English.\n"
        if link.english == "route"
        else ""
    )
    return f"""---
library_name: sentence-transformers
pipeline_tag: feature-extraction
---
# Text encoder in the space of {shown_name(link.base.name)}

Texts to unit vectors of {link.embedding_dim} numbers, beside those that the image tower in `{BASE}/` gives of pictures.
{english}
```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("this/folder", trust_remote_code=True)
model.encode(["一个红苹果"])
```

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("this/folder", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained("this/folder", trust_remote_code=True)
tokens = tokenizer(["一个红苹果"], padding=True, truncation=True, return_tensors="pt")
vectors = model(**tokens).pooler_output
```

`{CODE}` holds the model, which needs torch and transformers alone; `trust_remote_code` lets it run.
{prefix if link.student.prefix else ""}"""
