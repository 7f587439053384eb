"""Align `starter`'s image tower to its text tower: `make starter` (about 15 minutes on 2 cores).

Trained: the Transformer layers over the trunk's patch tokens. Data: emoji of three vendors with names and keywords,
clip art with titles. Kept out: all Tux Paint stamps, the vendor OpenMoji, the names in `corpora.held_out_emoji`.

The pictures are drawings, and a model that learns from drawings alone forgets photographs. Two terms keep what the
trunk knows of them: the correction that training adds is kept short, and it is driven to zero on pseudo-photographs,
which are feature maps moved towards a class until the trunk is as sure of it as it is of a photograph.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.config import TrainingConfig
from trimtab.data.cache import CachedArrays, cached_vectors
from trimtab.data.corpora import imagenet21k_texts
from trimtab.data.images import read_image
from trimtab.data.packages import fetch, fetch_file
from trimtab.data.pictures import EMOJI_VENDORS, Picture, clip_art, emoji_pictures, render_svg
from trimtab.errors import DataError
from trimtab.evaluation.retrieval import recall_at_k
from trimtab.files import atomic_path, cache_home, digest_of
from trimtab.precision import fast_inference
from trimtab.towers.efficientnet import EfficientNetLite0, load_packaged
from trimtab.towers.parts import quiet
from trimtab.towers.starter import committed_weights, load_text_tower, minilm_folder
from trimtab.towers.starter_model import IMAGE_SIZE, SentenceBertModel, StarterAlignment, StarterVisionConfig
from trimtab.training.distributed import make_accelerator
from trimtab.training.loop import train
from trimtab.training.run import Selection

SEED = 0
VIEWS = 5
NAME_SHARE = 0.4
"""How often a picture's caption is its name alone, beside the draws of `captions_of` that are."""
VALIDATION_SHARE = 1 / 12
SHARPNESS = 1.0
SHORTNESS = 1.0
"""Weight of the squared length of the correction."""
REPLAY = 5.0
"""Weight of the same on pseudo-photographs."""
SETTINGS = TrainingConfig(
    epochs=12, batch_size=256, learning_rate=1e-3, weight_decay=0.05, warmup=0.05, trackers=(), precision="auto"
)


def align_starter(out: str | Path = "runs/starter") -> Path:
    """Train the alignment and write it where `ensure_starter` finds it.

    Args:
        out: folder for checkpoints; a killed run goes on from there.
    """
    torch.manual_seed(SEED)
    pictures = training_pictures()
    trunk = load_packaged(str(fetch_file("efficientnet-lite0", "*.pth"))).eval()
    with quiet():
        texts = TextSide(load_text_tower())
    features = [picture_features(pictures, trunk, view) for view in range(VIEWS)]
    captions = [captions_of(picture) for picture in pictures]
    known = sorted({caption for several in captions for caption in several})
    vectors = texts.encode(known)  # (T, D)
    place = {caption: i for i, caption in enumerate(known)}
    held_out = validation_groups(pictures)
    training = [i for i, picture in enumerate(pictures) if picture.group not in held_out]
    validation = [i for i, picture in enumerate(pictures) if picture.group in held_out]

    task = AlignmentTask(trunk, texts.class_embeddings(), _maps(trunk, features[0], range(0, len(pictures), 4)))
    groups = _numbers([picture.group for picture in pictures])
    steps = len(training) // SETTINGS.batch_size

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        rng = random.Random(f"{SEED}:{epoch}")
        order = rng.sample(training, len(training))
        for start in range(0, steps * SETTINGS.batch_size, SETTINGS.batch_size):
            rows = sorted(order[start : start + SETTINGS.batch_size])
            drawn = [captions[i][0] if rng.random() < NAME_SHARE else rng.choice(captions[i]) for i in rows]
            chosen = torch.tensor([place[caption] for caption in drawn])
            maps = torch.from_numpy(np.asarray(features[rng.randrange(VIEWS)][rows]))
            yield maps, vectors[chosen], groups[rows], chosen

    def validate(_: int) -> dict[str, float]:
        images = task.embed(features[0], validation)
        names = sorted({captions[i][0] for i in validation})
        column = {name: j for j, name in enumerate(names)}
        positives = [(row, column[captions[i][0]]) for row, i in enumerate(validation)]
        unit = F.normalize(vectors[[place[name] for name in names]], dim=-1).numpy()
        recall = recall_at_k((images, unit), positives)
        return {"mR": recall.mR}

    result = train(
        task.step,
        task,
        batches,
        steps_per_epoch=steps,
        settings=SETTINGS,
        checkpoint_dir=Path(out) / "checkpoints",
        digest=digest_of("starter", str(SETTINGS), str(SHORTNESS), str(REPLAY), str(NAME_SHARE), *known),
        seed=SEED,
        validate=validate,
        select=Selection("mR"),
        accelerator=make_accelerator(cpu=True),  # trunk, features and texts lie there
    )
    save_alignment(committed_weights(), task, texts)
    print(f"validation mR {(result.best or {}).get('mR', math.nan):.1f} after {result.seconds:.0f} s")
    return committed_weights()


class AlignmentTask(nn.Module):
    """Trainable layers and logit_scale; the trunk's head is frozen and not part of the checkpoint."""

    def __init__(self, trunk: EfficientNetLite0, class_embeddings: Tensor, sample: Tensor) -> None:
        super().__init__()
        self._trunk = [trunk]  # in a list, so that it is no submodule
        self.alignment = StarterAlignment(StarterVisionConfig(dropout=0.3))
        self.alignment.class_embeddings.data.copy_(class_embeddings)
        pooled = sample.mean(dim=(2, 3))
        self.alignment.feature_mean.data.copy_(pooled.mean(dim=0))
        self.alignment.feature_std.data.copy_(pooled.std(dim=0) + 0.05)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(20.0)))
        # Directions in feature space along which one class's logit rises by one standard deviation.
        covariance = torch.cov(pooled.T) + 1e-3 * torch.eye(pooled.shape[1])
        weights = trunk.classifier.weight.detach()
        towards = weights @ covariance
        spread = (towards * weights).sum(dim=1, keepdim=True).sqrt()
        self.register_buffer("class_directions", towards / spread, persistent=False)
        self.class_directions: Tensor

    @property
    def trunk(self) -> EfficientNetLite0:
        return self._trunk[0]

    def features(self, maps: Tensor) -> Tensor:  # (B, 15680) cached -> (B, 1280, 7, 7)
        with torch.no_grad():
            return self.trunk.head(maps.float().view(-1, 320, 7, 7))

    def forward(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) and the correction (B, D) in them that is trained."""
        with torch.no_grad():
            probabilities = (SHARPNESS * self.trunk.logits(feature_map)).softmax(dim=-1)
        with fast_inference(feature_map.device):
            correction = self.alignment.correction(self.alignment.tokens(feature_map)[-1])
        correction = correction.float()
        return probabilities @ self.alignment.class_embeddings + correction, correction

    def step(self, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        maps, texts, groups, captions = batch
        feature_map = self.features(maps)
        images, correction = self(feature_map)
        logits = self.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T  # (B, B)
        same = (groups[:, None] == groups) | (captions[:, None] == captions)
        positive = same.float() / same.sum(dim=1, keepdim=True)
        contrastive = -(positive * (logits.log_softmax(dim=1) + logits.T.log_softmax(dim=1))).sum(dim=1).mean() / 2
        _, on_photographs = self(self.pseudo_photographs(feature_map[::2]))
        return {
            "contrastive": contrastive,
            "shortness": SHORTNESS * correction.square().sum(dim=1).mean(),
            "replay": REPLAY * on_photographs.square().sum(dim=1).mean(),
        }

    def pseudo_photographs(self, feature_map: Tensor) -> Tensor:
        """Feature maps half drawn to the mean and moved towards a random class, (B, 1280, 7, 7)."""
        count = len(feature_map)
        strength = torch.rand(count, 1, 1, 1) * 6 + 2
        towards = self.class_directions[torch.randint(len(self.class_directions), (count,))][..., None, None]
        mean = self.alignment.feature_mean[:, None, None]
        own = feature_map[torch.randperm(count)] * torch.rand(count, 1, 1, 1) / 2
        return (own + mean / 2 + strength * towards).clamp(0, 6)

    @torch.no_grad()
    def embed(self, features: CachedArrays, rows: Sequence[int], batch: int = 128) -> np.ndarray:
        parts = []
        for start in range(0, len(rows), batch):
            maps = torch.from_numpy(np.asarray(features[list(rows[start : start + batch])]))
            parts.append(F.normalize(self(self.features(maps))[0], dim=-1))
        return torch.cat(parts).numpy()


class TextSide:
    """The text tower with its centre: the mean of English names of things."""

    def __init__(self, tower: SentenceBertModel) -> None:
        from transformers import AutoTokenizer

        self.tower = tower
        self.tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
        names = [text for text, _ in imagenet21k_texts()]
        self.centre = self.encode(names[::7]).mean(dim=0)
        tower.centre.data.copy_(self.centre)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch: int = 128) -> Tensor:  # -> (N, D)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        result = torch.zeros(len(texts), self.tower.config.hidden_size)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            chosen = [texts[i] for i in rows]
            tokens = self.tokenizer(chosen, return_tensors="pt", padding=True, truncation=True, max_length=64)
            with fast_inference(result.device):
                result[rows] = self.tower(**tokens).pooler_output.float()
        return result.clone()

    def class_embeddings(self) -> Tensor:
        """One vector for each ImageNet class: its names alone, in a template and with the definition; (1000, D)."""
        folder = fetch("imagenet-names") / "timm/data/_info"
        lemmas, definitions = (
            dict(
                line.split("\t", 1)
                for line in (folder / f"imagenet_synset_to_{kind}.txt").read_text(encoding="utf-8").splitlines()
            )
            for kind in ("lemma", "definition")
        )
        vectors = []
        for synset in (folder / "imagenet_synsets.txt").read_text(encoding="utf-8").split():
            names = [name.strip() for name in lemmas[synset].split(",")][:3]
            forms = ("{}", "a photo of a {}", f"{{}}, {definitions[synset]}"[:150])
            each = [F.normalize(self._uncentred([form.format(name) for name in names]), dim=0) for form in forms]
            vectors.append(F.normalize(torch.stack(each).sum(dim=0), dim=0) - self.centre)
        return torch.stack(vectors)

    def _uncentred(self, texts: list[str]) -> Tensor:
        return (self.encode(texts) + self.centre).mean(dim=0)


def training_pictures() -> list[Picture]:
    """Emoji of the training vendors, and clip art of things rather than of computer icons and flags."""
    root = fetch("openclipart") / "usr/share/openclipart/svg"
    art = [p for p in clip_art() if p.path.relative_to(root).parts[0] not in ("computer", "geography", "buttons")]
    rendered = []
    for picture in art:
        try:
            target = cache_home() / "clipart" / f"{digest_of(str(picture.path.relative_to(root)))[:20]}.png"
            path = render_svg(picture.path, target, background=None)
        except DataError:
            continue  # a few files hold no drawing
        rendered.append(Picture(path, picture.name, picture.keywords, picture.group))
    return [picture for vendor in EMOJI_VENDORS for picture in emoji_pictures(vendor)] + rendered


def captions_of(picture: Picture) -> list[str]:
    """Texts for one picture: name, templates, keywords; drawn from at random in training, the name first."""
    name, keywords = picture.name.lower().strip(), [keyword.lower() for keyword in picture.keywords]
    rng = random.Random(name)
    captions = [name, name, f"a photo of a {name}", f"a drawing of a {name}", f"{name}: {', '.join(keywords[:4])}"]
    captions += [f"{name}, {', '.join(rng.sample(keywords, min(3, len(keywords))))}" for _ in range(2)]
    if picture.group.startswith("emoji:"):
        captions += rng.sample(keywords, min(2, len(keywords)))
    return captions


def validation_groups(pictures: Sequence[Picture]) -> set[str]:
    groups = sorted({picture.group for picture in pictures}, key=lambda group: digest_of("validation", group))
    return set(groups[: int(len(groups) * VALIDATION_SHARE)])


def picture_features(pictures: Sequence[Picture], trunk: EfficientNetLite0, view: int) -> CachedArrays:
    """The trunk's 320-channel maps (N, 15680) of one view of every picture, cached on disk in fp16."""
    # By the place in the cache: vendors name their files alike.
    items = [f"{view}:{picture.path.relative_to(cache_home()).as_posix()}" for picture in pictures]
    paths = {item: picture.path for item, picture in zip(items, pictures, strict=True)}

    @torch.inference_mode()
    def compute(wanted: list[str]) -> np.ndarray:
        rows = []
        for start in range(0, len(wanted), 16):  # small batches stay in the processor's cache
            pixels = np.stack([_pixels(paths[item], view, item) for item in wanted[start : start + 16]])
            x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().sub(127).div(128)
            with fast_inference(x.device):
                x = trunk.stem(x.contiguous(memory_format=torch.channels_last))
                for block in trunk.blocks:
                    x = block(x)
            rows.append(x.float().flatten(1).numpy())
        return np.concatenate(rows)

    return cached_vectors(cache_home() / "features", ("starter-alignment-3",), items, compute, chunk=512)


def _pixels(path: Path, view: int, item: str) -> np.ndarray:
    rng = random.Random(item)
    picture = Image.open(path).convert("RGBA")
    picture.thumbnail((IMAGE_SIZE, IMAGE_SIZE))
    if view == 0:
        side = max(picture.size)
        square = Image.new("RGBA", (side, side), (255, 255, 255, 255))
        square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return np.asarray(read_image(square).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    return np.asarray(_augment(picture, rng))


def _augment(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The drawing at a random size, place and slight angle on white, on a colour or on blurred noise."""
    scale = rng.uniform(0.55, 1.0) * IMAGE_SIZE / max(picture.size)
    size = (max(8, int(picture.width * scale)), max(8, int(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        picture = picture.rotate(rng.uniform(-15, 15), expand=True, resample=Image.Resampling.BICUBIC)
    picture.thumbnail((IMAGE_SIZE, IMAGE_SIZE))
    kind, square = rng.random(), (IMAGE_SIZE, IMAGE_SIZE)
    if kind < 0.4:
        background = Image.new("RGBA", square, (255, 255, 255, 255))
    elif kind < 0.8:
        background = Image.new("RGBA", square, (*(rng.randrange(256) for _ in range(3)), 255))
    else:
        cells = rng.choice([2, 4, 7])
        noise = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 256, (cells, cells, 3), np.uint8)
        background = Image.fromarray(noise).resize(square, Image.Resampling.BICUBIC).convert("RGBA")
    x, y = (rng.randint(0, IMAGE_SIZE - side) for side in picture.size)
    background.alpha_composite(picture, (x, y))
    return background.convert("RGB")


def save_alignment(path: Path, task: AlignmentTask, texts: TextSide) -> None:
    """Write our own weights, and nothing of the packaged towers, as fp16."""
    tensors = {f"vision_model.alignment.{name}": value for name, value in task.alignment.state_dict().items()}
    tensors |= {"text_model.centre": texts.centre, "logit_scale": task.logit_scale.detach()}
    with atomic_path(path) as temporary:
        save_file({k: v.half().contiguous() for k, v in tensors.items()}, temporary, {"sharpness": str(SHARPNESS)})


def _maps(trunk: EfficientNetLite0, features: CachedArrays, rows: Sequence[int]) -> Tensor:
    with torch.no_grad():
        maps = torch.from_numpy(np.asarray(features[list(rows)])).float()
        return torch.cat([trunk.head(part.view(-1, 320, 7, 7)) for part in maps.split(128)])


def _numbers(names: Sequence[str]) -> Tensor:
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([order[name] for name in names])
