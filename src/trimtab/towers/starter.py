"""`starter`: a small dual encoder that needs no model hub, as an ordinary `VisionTextDualEncoderModel`.

Image tower: an ImageNet-trained EfficientNet-Lite0 whose 7x7 map becomes 49 patch tokens for Transformer layers with
a CLS token. Its output adds two paths:

- knowledge: the mean of the text embeddings of the 1,000 ImageNet classes, mixed by the trunk's own sharpened class
  probabilities (a convex combination of semantic embeddings: Norouzi et al., arXiv 1312.5650). Frozen.
- alignment: the CLS token through a linear layer, trained by us on emoji and clip art (`make starter`).

The same training adds to the weights of the trunk's last blocks; photographs keep what the trunk makes of photographs.

Text tower: MiniLM-L6 with mean pooling; the mean of English is subtracted, since a shared offset carries no meaning
and makes hubs. Only what we trained is committed; the packaged towers are fetched when the folder is first built.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from torch import Tensor, nn

from trimtab.data.packages import fetch_file
from trimtab.errors import ModelError
from trimtab.files import build_folder, cache_home, sha256_of
from trimtab.towers.efficientnet import load_packaged
from trimtab.towers.parts import quiet
from trimtab.towers.starter_model import (
    IMAGE_SIZE,
    SentenceBertConfig,
    SentenceBertModel,
    StarterVisionConfig,
    StarterVisionModel,
)

PIXEL_MEAN = 127 / 255
PIXEL_STD = 128 / 255
ADDED = "vision_model.trunk.added."
"""Before the names of what training adds to the packaged trunk."""


def committed_weights() -> Path:
    """The alignment that we trained and ship with the package."""
    return Path(str(files("trimtab.towers") / "starter_alignment.safetensors"))


def minilm_folder() -> Path:
    """The packaged MiniLM encoder, a transformers folder with its tokenizer."""
    return fetch_file("minilm", "*/model/config.json").parent


def load_text_tower() -> SentenceBertModel:
    """MiniLM-L6 as fetched, its centre still zero."""
    from safetensors.torch import load_file

    config = SentenceBertConfig.from_pretrained(minilm_folder())
    tower = SentenceBertModel(config)
    state = load_file(minilm_folder() / "model.safetensors")
    state = {name: value for name, value in state.items() if not name.startswith("pooler.")}
    missing, unexpected = tower.load_state_dict(state, strict=False)
    unknown = [name for name in unexpected if not name.endswith("position_ids")]
    if [name for name in missing if name != "centre"] or unknown:
        raise ModelError(f"the packaged MiniLM lacks {missing[:3]} or has unknown {unknown[:3]}")
    return tower.eval()


def low_rank(up: Tensor, down: Tensor) -> Tensor:  # (C', r), (r, C) -> weights of a 1 x 1 convolution (C', C, 1, 1)
    return (up @ down)[..., None, None]


def added_to_trunk(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """What training adds to the trunk's weights, by their names: as it is stored, or a product of two matrices."""
    kinds: dict[str, dict[str, Tensor]] = {"whole": {}, "up": {}, "down": {}}
    for name, value in ours.items():
        if name.startswith(ADDED):
            kind, _, rest = name.removeprefix(ADDED).partition(".")
            kinds[kind][rest] = value
    products = {name: low_rank(up, kinds["down"][name]) for name, up in kinds["up"].items()}
    return kinds["whole"] | products


def build_starter(folder: Path) -> None:
    """Join the packaged towers and our alignment into a transformers folder.

    Raises:
        ModelError: the committed alignment is missing or damaged.
        DataError: a package cannot be fetched.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessorPil,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
        VisionTextDualEncoderProcessor,
    )

    try:
        with safe_open(committed_weights(), "pt") as archive:
            sharpness = float((archive.metadata() or {})["sharpness"])
            ours = {name: archive.get_tensor(name).float() for name in archive.keys()}  # noqa: SIM118
        added = {f"vision_model.trunk.{name}": value for name, value in added_to_trunk(ours).items()}
        ours = {name: value for name, value in ours.items() if not name.startswith(ADDED)}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ModelError(f"{committed_weights()} cannot be read ({error}): install trimtab again") from error
    text_tower = load_text_tower()
    vision_config = StarterVisionConfig(sharpness=sharpness)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision_config, text_tower.config, projection_dim=vision_config.hidden_size
    )
    vision_tower = StarterVisionModel(vision_config)
    trunk = load_packaged(str(fetch_file("efficientnet-lite0", "*.pth")))
    vision_tower.trunk.load_state_dict(trunk.state_dict())
    model = VisionTextDualEncoderModel(config=config, vision_model=vision_tower, text_model=text_tower)
    # The alignment was trained to give features in the text tower's own space.
    nn.init.eye_(model.visual_projection.weight)
    nn.init.eye_(model.text_projection.weight)
    state = model.state_dict()
    # Whatever is neither of a package nor a projection; if any were left out it would keep its random start.
    given = ("vision_model.trunk.", "text_model.", "visual_projection.", "text_projection.")
    expected = {
        name: tensor.shape
        for name, tensor in state.items()
        if not name.startswith(given) or name == "text_model.centre" or name in added
    }
    if problem := sorted(expected.items() ^ {name: tensor.shape for name, tensor in (ours | added).items()}.items()):
        names = list(dict.fromkeys(name for name, _ in problem))
        raise ModelError(
            f"{committed_weights()} does not hold exactly what starter adds to its packages; {len(names)} tensors "
            f"are missing, unknown or of another shape: {names[:3]}"
        )
    model.load_state_dict(state | ours | {name: state[name] + difference for name, difference in added.items()})
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder(), model_max_length=128)
    processor = CLIPImageProcessorPil(
        # The whole picture, squeezed to a square: as good as a central crop on photographs and better on objects
        # that fill an oblong picture.
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    VisionTextDualEncoderProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)


def ensure_starter() -> Path:
    """Folder of the built base, built on first use and again when the committed alignment changes."""
    if not committed_weights().exists():
        raise ModelError("starter's alignment is not in this installation: run `make starter` or install again")
    version = sha256_of(committed_weights())[:12]
    folder = cache_home() / "models" / f"starter-{version}"
    with quiet():
        return build_folder(folder, "config.json", build_starter)
