"""Both towers of a model as ONNX files, all adapters inside, equal to PyTorch or not written."""

from __future__ import annotations

import inspect
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from trimtab import __version__, scripts
from trimtab.adapters.domain import DomainAdapted
from trimtab.adapters.gate import mixed
from trimtab.adapters.prompt import Pictures
from trimtab.data import rgb
from trimtab.errors import ModelError, TrimtabError
from trimtab.files import atomic_folder, atomic_path, replaceable, write_json, write_text
from trimtab.serve import onnx_runtime
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.layers import TowerCut, lowest_site
from trimtab.towers.prompting import image_tokens
from trimtab.towers.tokens import TextInputs

SCHEMA_VERSION = 1
EXPORT_FILE = "export.json"
RUNTIME_FILE = "runtime.py"
TOLERANCE = 1e-4
_OPSET = 18
logger = logging.getLogger(__name__)

TEXTS = (
    "a photo of a cat", "红色的苹果", "two boats on a calm sea at dusk, with a lighthouse far behind them", "",
    "一只狗在公园的草地上追着一个黄色的球跑", "ein Fahrrad", "a", "海", "2 × 3 = 6",
)  # fmt: skip
"""What parity is checked on beside a user's own texts: short and long, in two scripts."""


CLASSES_LEFT_OUT = (
    "prompts with an instance part are made anew for each picture, which takes the text tower along: serve the model "
    "itself, or train with prompt.instance=null"
)
"""Why `export_onnx` writes both towers of a prompt link, and none of its classes."""


class ImageTower(nn.Module):
    """Pixels (B, 3, H, W) to unit embeddings (B, D)."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.encoder = model
        self.parts = nn.ModuleList(_modules(model))

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = image_features(self.encoder, {"pixel_values": pixel_values})
        return nn.functional.normalize(features.float(), dim=-1)


class TextTower(nn.Module):
    """Token ids (B, T), and their mask where the tower uses one, to unit embeddings (B, D)."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.encoder = model
        self.parts = nn.ModuleList(_modules(model))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        tokens = {"input_ids": input_ids}
        if attention_mask is not None:
            tokens["attention_mask"] = attention_mask
        return nn.functional.normalize(self.encoder.token_features(tokens).float(), dim=-1)


def image_features(model: Any, pixels: dict[str, Tensor]) -> Tensor:
    """`DualEncoder.pixel_features` without branches: a gate of the domain link runs the adapters for some pictures
    only, and a traced graph has one way for all."""
    while not isinstance(model, DomainAdapted) and hasattr(model, "base"):
        model = model.base
    if not isinstance(model, DomainAdapted) or model.gate is None or model.alpha == 0:
        return model.pixel_features(pixels)
    cut = TowerCut(model.base, "image", lowest_site(model.adapters, "image"))
    below = cut.lower(pixels)
    features = cut.upper(below)  # (B, D)
    with model.adapters.attach(model.base):
        adapted = model.recalled(cut.upper(below))
    return mixed(features, adapted, model.gate(features))


def _modules(model: Any) -> list[nn.Module]:
    """Everything with weights in a model, whatever its links."""
    found: list[nn.Module] = []
    while model is not None:
        for name in ("model", "adapter", "adapters"):
            if isinstance(one := getattr(model, name, None), nn.Module) and one not in found:
                found.append(one)
        if (student := getattr(model, "student", None)) is not None and student.model not in found:
            found.append(student.model)
        model = getattr(model, "core", None) or getattr(model, "base", None)
    return found


@dataclass(frozen=True)
class TextRoute:
    """One text tower of a model.

    Attributes:
        script: which texts go through it: "all", "latin" or "other".
        name: of its files.
        model: whose `token_features` and `text_inputs` it is.
    """

    script: str
    name: str
    model: DualEncoder


def text_routes(model: Any) -> list[TextRoute]:
    """The text towers of a model: two where English keeps the base's own."""
    model = getattr(model, "core", model)
    if hasattr(model, "student") and model.english == "route":
        return [TextRoute("latin", "text-english", model.base), TextRoute("other", "text", model)]
    return [TextRoute("all", "text", model)]


def export_onnx(
    model: DualEncoder,
    out: str | Path,
    *,
    pictures: Sequence[Image.Image] = (),
    texts: Sequence[str] = (),
    tolerance: float = TOLERANCE,
    finish: Callable[[Path, dict[str, Any]], None] = lambda folder, about: None,
) -> dict[str, Any]:
    """Write both towers, tokenizers, preprocessing and a loader that needs neither Trimtab nor torch.

    Args:
        out: a new or empty folder, or one of an earlier export.
        pictures, texts: what parity is checked on, beside made pictures and texts.
        tolerance: largest difference of any number of any unit vector from PyTorch's.
        finish: adds to the folder, and to what ``export.json`` holds, before they take their place.

    Returns:
        what ``export.json`` holds.

    Raises:
        ModelError: a tower or processor that cannot be exported, or that differs by more than the tolerance;
            nothing is written then.
        TrimtabError: ONNX is not installed, another process writes `out`, or the disk is full.
    """
    _import_onnx()
    out = Path(out)
    if not replaceable(out, EXPORT_FILE):
        raise ModelError(f"{out} holds something else than an export: choose another folder")
    core = without_prompts(model)
    image = describe_processor(core)
    routes = text_routes(core)
    about: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": model.name,
        "fingerprint": model.fingerprint,
        "image_fingerprint": model.image_fingerprint,
        "embedding_dim": model.embedding_dim,
        "logit_scale": model.logit_scale,
        "logit_bias": model.logit_bias,
        "image": {"file": "image.onnx", **image},
        "texts": [describe_text(route) for route in routes],
        "versions": {"trimtab": __version__, "torch": torch.__version__, "opset": _OPSET},
    }
    with (
        on_cpu(model),
        atomic_folder(out, EXPORT_FILE) as built,
        tempfile.TemporaryDirectory(prefix="trimtab-") as scratch,
    ):
        checked: list[Image.Image | Path] = [*pictures, *made_pictures(), *made_files(Path(scratch))]
        _write_towers(core, routes, built)
        for route, described in zip(routes, about["texts"], strict=True):
            _write_tokenizer(route.model, built / described["tokenizer"])
        core.image_processor.save_pretrained(built)
        write_text(built / RUNTIME_FILE, _runtime_code())
        write_json(built / EXPORT_FILE, about)
        prompted = _prompted(model)
        if prompted is not None and prompted.prompt.instance is not None:
            about["classes_left_out"] = CLASSES_LEFT_OUT
            logger.warning("%s: the classes are not exported: %s", model.name, CLASSES_LEFT_OUT)
            prompted = None
        if prompted is not None:
            _write_classes(prompted, built)
        about["parity"] = parity(core, built, checked, [*texts, *TEXTS], tolerance)
        if prompted is not None:
            about["parity"]["classes"] = class_parity(model, built, checked, tolerance)
        finish(built, about)
        write_json(built / EXPORT_FILE, about)
    return about


@contextmanager
def on_cpu(model: DualEncoder) -> Iterator[None]:
    """A loaded model is its caller's: it goes back to where it was."""
    device = model.device
    model.to("cpu")
    try:
        yield
    finally:
        model.to(device)


def _runtime_code() -> str:
    """The loader as one file, which imports nothing of Trimtab."""
    loader = re.sub(r"^from trimtab\..*\n", "", inspect.getsource(onnx_runtime), flags=re.MULTILINE)
    first = "from __future__ import annotations\n"
    return "\n".join([loader, *(inspect.getsource(module).partition(first)[2] for module in (scripts, rgb))])


def without_prompts(model: Any) -> Any:
    """Prompts learn in the classifier alone: whose towers those of a model are."""
    core = getattr(model, "core", model)
    return core.base if hasattr(core, "prompt_tower") else core


def parity(
    model: DualEncoder, folder: Path, pictures: Sequence[Image.Image | Path], texts: Sequence[str], tolerance: float
) -> dict[str, Any]:
    """Largest differences of the exported towers' unit vectors from PyTorch's, at batch sizes and lengths that the
    export was not traced with.

    Raises:
        ModelError: one is above the tolerance.
    """
    encoder = onnx_runtime.Encoder(folder)
    found: dict[str, Any] = {"pictures": len(pictures), "texts": len(texts), "tolerance": tolerance}
    sides: Any = (
        ("image", encoder.encode_image, model.encode_image, list(pictures)),
        ("text", encoder.encode_text, model.encode_text, list(texts)),
    )
    for what, run, reference, items in sides:
        worst = 0.0
        for size in (1, 3, 32):
            wanted, got = reference(items, batch_size=size), run(items, batch_size=size)
            worst = max(worst, float(np.abs(wanted - got).max()))
        found[what] = worst
        if not worst <= tolerance:
            raise ModelError(
                f"the exported {what} tower of {model.name} differs from PyTorch's by {worst:.1e}, more than the "
                f"tolerance of {tolerance:g}: it was not written. This family or version cannot be exported so"
            )
    return found


def class_parity(model: Any, folder: Path, pictures: Sequence[Image.Image | Path], tolerance: float) -> float:
    """Largest difference of any class's probability from that of `model.classifier()`.

    Raises:
        ModelError: it is above the tolerance.
    """
    wanted = model.classifier().scores(list(pictures))
    got = onnx_runtime.Encoder(folder).class_scores(list(pictures))
    worst = float(np.abs(wanted - got).max())
    if not worst <= tolerance:
        raise ModelError(
            f"the exported classes of {model.name} differ from PyTorch's by {worst:.1e}, more than the tolerance of "
            f"{tolerance:g}: nothing was written"
        )
    return worst


# Pieces


def _write_towers(model: DualEncoder, routes: Sequence[TextRoute], folder: Path) -> None:
    pixels = torch.cat([model.preprocess(one)["pixel_values"] for one in made_pictures()[:2]])
    _trace(ImageTower(model), {"pixel_values": pixels}, {"pixel_values": {0: "batch"}}, folder / "image.onnx")
    for route in routes:
        inputs = route.model.text_inputs
        tokens = inputs(["a photo of a cat", "two"])
        axes = {0: "batch"} if inputs.pad_to_limit else {0: "batch", 1: "tokens"}
        _trace(TextTower(route.model), tokens, dict.fromkeys(tokens, axes), folder / f"{route.name}.onnx")


def _trace(
    tower: nn.Module, inputs: dict[str, Tensor], axes: dict[str, dict[int, str]], path: Path, output: str = "embedding"
) -> None:
    try:
        with _plain_attention(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                tower,
                tuple(inputs.values()),
                str(path),
                input_names=list(inputs),
                output_names=[output],
                dynamic_axes={**axes, output: {0: "batch"}},
                opset_version=_OPSET,
                # Traces in seconds what the newer exporter takes minutes for; parity is checked in any case.
                dynamo=False,
            )
    except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ModelError(f"{path.stem} of this model cannot be exported to ONNX: {reason}") from error


@contextmanager
def _plain_attention() -> Iterator[None]:
    """PyTorch's fused Transformer layer has no counterpart in ONNX."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def describe_processor(model: DualEncoder) -> dict[str, Any]:
    """Preprocessing as numbers, for `trimtab.serve.onnx_runtime.preprocess`.

    Raises:
        ModelError: it does more than resize, crop, scale and normalise.
    """
    processor: Any = model.image_processor
    probe = model.preprocess(made_pictures()[0])
    extra = set(probe) - {"pixel_values"}
    if extra or probe["pixel_values"].ndim != 4:
        raise ModelError(
            f"the image processor of {model.name} gives {', '.join(sorted(probe))}, pictures of varying sizes: such "
            "towers are not exported"
        )

    def on(name: str) -> bool:
        return bool(getattr(processor, f"do_{name}", False))

    def plain(value: Any) -> dict[str, int]:
        if isinstance(value, int):
            return {"height": value, "width": value}
        return {key: int(one) for key, one in dict(value).items() if one is not None}

    size = plain(processor.size) if on("resize") else None
    if size is not None and not ({"shortest_edge"} == set(size) or {"height", "width"} == set(size)):
        raise ModelError(f"the image processor of {model.name} resizes to {size}, which is not exported")
    about = {
        "resize": size,
        "resample": int(processor.resample) if on("resize") else 0,
        "crop": plain(processor.crop_size) if on("center_crop") else None,
        "scale": float(processor.rescale_factor) if on("rescale") else 1.0,
        "mean": list(map(float, processor.image_mean)) if on("normalize") else None,
        "std": list(map(float, processor.image_std)) if on("normalize") else None,
    }
    for picture in made_pictures():
        wanted = model.preprocess(picture)["pixel_values"][0].float().numpy()
        got = onnx_runtime.preprocess(picture, about)
        if wanted.shape != got.shape or np.abs(wanted - got).max() > 1e-3:
            raise ModelError(f"the image processor of {model.name} does more than resize, crop, scale and normalise")
    return about


def describe_text(route: TextRoute) -> dict[str, Any]:
    """What the loader has to know of a text tower."""
    inputs = route.model.text_inputs
    return {
        "script": route.script,
        "file": f"{route.name}.onnx",
        "tokenizer": route.name.replace("text", "tokenizer") + ("" if _backend(inputs) is None else ".json"),
        "inputs": ["input_ids", "attention_mask"] if inputs.use_mask else ["input_ids"],
        "limit": inputs.limit,
        "pad_to_limit": inputs.pad_to_limit,
        "pad_id": inputs.tokenizer.pad_token_id or 0,
        "padding_side": inputs.padding_side or inputs.tokenizer.padding_side,
        "prefix": inputs.prefix,
    }


def _write_tokenizer(model: DualEncoder, path: Path) -> None:
    tokenizer, backend = model.text_inputs.tokenizer, _backend(model.text_inputs)
    if backend is None:
        _write_python_tokenizer(tokenizer, path, model.name)
        return
    raw = json.loads(backend.to_str())
    write_json(path, {**raw, "truncation": None, "padding": None})


def _backend(inputs: TextInputs) -> Any:
    """The tokenizer of the library `tokenizers`; None where it is written in Python, as the first SigLIP's is."""
    return getattr(inputs.tokenizer, "backend_tokenizer", None)


def _write_python_tokenizer(tokenizer: Any, folder: Path, name: str) -> None:
    kind = type(tokenizer)
    if not kind.__module__.startswith("transformers."):
        raise ModelError(f"the tokenizer of {name} ({kind.__name__}) is code of its own, which is not exported")
    tokenizer.save_pretrained(folder)


class ClassScores(nn.Module):
    """Pixels (B, 3, H, W) to scores (B, C) of classes behind prompts that look at patch tokens."""

    def __init__(self, prompt: Any, weights: Tensor) -> None:
        super().__init__()
        self.encoder, self.prompt = prompt.base, prompt.prompt
        self.parts = nn.ModuleList(_modules(prompt.base))
        self.register_buffer("weights", weights)
        self.weights: Tensor

    def forward(self, pixel_values: Tensor) -> Tensor:
        features, tokens, mask = image_tokens(self.encoder, {"pixel_values": pixel_values})
        embeddings = nn.functional.normalize(features.float(), dim=-1)
        pooled = self.prompt.pooled(Pictures(embeddings, tokens.float(), mask))
        return embeddings @ self.weights.T + pooled @ self.prompt.patches.T


def _prompted(model: Any) -> Any:
    """The prompt link of a model; None if it has none."""
    prompt = getattr(model, "prompt", None) if hasattr(model, "core") else model
    return prompt if hasattr(prompt, "prompt_tower") else None


def _write_classes(prompt: Any, folder: Path) -> None:
    """Classes of prompts: vectors, or a graph where they look at patch tokens."""
    with torch.no_grad():
        classes = prompt.prompted(prompt.classes)
        vectors = classes.weights(classes.embeddings()).float().cpu()
    if prompt.prompt.config.reads_patches:
        pixels = torch.cat([prompt.base.preprocess(one)["pixel_values"] for one in made_pictures()[:2]])
        graph = ClassScores(prompt, vectors)
        _trace(graph, {"pixel_values": pixels}, {"pixel_values": {0: "batch"}}, folder / "classify.onnx", "scores")
    else:
        np.save(folder / "classes.npy", vectors.numpy(), allow_pickle=False)
    write_json(folder / "classes.json", {"classes": list(prompt.classes), "scale": prompt.class_scale})


def made_pictures() -> list[Image.Image]:
    """Pictures of noise, gradients and one colour, in several shapes."""
    noise = np.random.default_rng(0)
    ramp, flat = np.linspace(0, 255, 320, dtype=np.uint8), np.zeros((200, 320), np.uint8)
    arrays = [
        noise.integers(0, 256, (240, 320, 3), dtype=np.uint8),
        np.stack([np.broadcast_to(ramp, (200, 320)), flat + 90, flat], axis=2),
        noise.integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(20, 0).repeat(11, 1),
        np.full((300, 200, 3), (200, 40, 60), np.uint8),
        noise.integers(0, 256, (31, 57, 3), dtype=np.uint8),
    ]
    return [Image.fromarray(np.ascontiguousarray(one)) for one in arrays]


def made_files(folder: Path) -> list[Path]:
    """Pictures of 16 bits and on their side by EXIF, as files: what the loader must read as Trimtab does."""
    deep, turned = folder / "deep.png", folder / "turned.jpg"
    Image.fromarray(np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)).save(deep)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    made_pictures()[1].save(turned, exif=exif)
    return [deep, turned]


def _import_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise TrimtabError("ONNX export needs the extra: pip install 'trimtab[onnx]'") from error


def quantise(folder: Path) -> list[str]:
    """Write int8 twins of all towers (dynamic quantisation of products and tables); their file names."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    about = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))
    names = [about["image"]["file"], *(one["file"] for one in about["texts"])]
    written = []
    for name in names:
        target = name.replace(".onnx", "-int8.onnx")
        with atomic_path(folder / target) as temporary, _quiet_root():
            quantize_dynamic(
                _with_weights_in_place(onnx.load(folder / name)),
                temporary,
                weight_type=QuantType.QInt8,
                per_channel=True,
                # And tables of embeddings. Convolutions in int8 are slower on CPUs without special kernels.
                op_types_to_quantize=["MatMul", "Gemm", "Gather"],
                extra_options={"DefaultTensorType": 1},
            )
        written.append(target)
    return written


def _with_weights_in_place(model: Any) -> Any:
    """Without the nodes by which a weight of two uses goes to the second, as in the two passes of a gate: what comes
    out of a node is no weight to the quantiser, and would stay as it is."""
    graph = model.graph
    weights = {one.name for one in graph.initializer}
    results = {one.name for one in graph.output}
    copies = [
        node
        for node in graph.node
        if node.op_type == "Identity" and node.input[0] in weights and node.output[0] not in results
    ]
    names = {node.output[0]: node.input[0] for node in copies}
    for node in copies:
        graph.node.remove(node)
    for node in graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = names.get(name, name)
    return model


@contextmanager
def _quiet_root() -> Iterator[None]:
    """onnxruntime advises, on the root logger, what is done already."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
