"""Align `starter`'s image tower to its text tower: `make starter` (about half an hour on 2 cores).

Trained: the Transformer layers over the trunk's patch tokens, and what is added to the weights of the trunk's last
blocks. Data: emoji of three vendors with names and keywords, clip art with titles. Kept out: all Tux Paint stamps, the
vendor OpenMoji, the names in `corpora.held_out_emoji`.

The pictures are drawings, and a model that learns from drawings alone forgets photographs. What keeps it from that:

- photographs without texts, in crops, on which the trunk's map, its class probabilities and the whole output are held
  to what they were (learning without forgetting, arXiv 1606.09282, on pictures of the kind that is to be kept);
- pseudo-photographs, which are feature maps moved towards a class until the trunk is as sure of it as it is of a
  photograph: there the correction is driven to zero;
- the correction that training adds is kept short everywhere.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from trimtab.config import TrainingConfig
from trimtab.data.cache import CachedArrays, cached_arrays
from trimtab.data.corpora import imagenet21k_texts, imagenet_classes
from trimtab.data.images import read_image
from trimtab.data.packages import fetch, fetch_file
from trimtab.data.pictures import EMOJI_VENDORS, Picture, clip_art, emoji_pictures, photographs, render_svg
from trimtab.errors import DataError
from trimtab.evaluation.retrieval import recall_at_k
from trimtab.files import atomic_path, cache_home, digest_of
from trimtab.precision import fast_inference, tune_allocator
from trimtab.towers.efficientnet import EfficientNetLite0, channels_last, load_packaged
from trimtab.towers.parts import quiet
from trimtab.towers.starter import ADDED, committed_weights, load_text_tower, low_rank, minilm_folder
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
PHOTO_CROPS = 6000
PHOTO_SHARE = 1 / 4
"""Crops of photographs in a step, as a share of its pictures."""
KEPT_OUTPUT, KEPT_CLASSES, KEPT_MAP = 5.0, 1.0, 2.0
"""On them: weights of the squared change of the output, of the change in class probabilities (Kullback-Leibler) and of
the mean squared change of the trunk's map in units of each channel's spread."""
TRUNK_FROM = 11
"""The first of the trunk's blocks that is trained; what enters it is cached."""
RANK = 32
"""Of what is added to a matrix of the trunk."""
PART = 64
WEIGHTS = (SHORTNESS, REPLAY, NAME_SHARE, PHOTO_SHARE, KEPT_OUTPUT, KEPT_CLASSES, KEPT_MAP, TRUNK_FROM, RANK)
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
    views = [picture_maps(pictures, trunk, view) for view in range(VIEWS)]
    crops = photograph_maps(trunk)
    captions = [captions_of(picture) for picture in pictures]
    known = sorted({caption for several in captions for caption in several})
    vectors = texts.encode(known)  # (T, D)
    place = {caption: i for i, caption in enumerate(known)}
    held_out = validation_groups(pictures)
    training = [i for i, picture in enumerate(pictures) if picture.group not in held_out]
    validation = [i for i, picture in enumerate(pictures) if picture.group in held_out]

    task = AlignmentTask(trunk, texts.class_embeddings(), range(0, len(pictures), 4), views[0])
    groups = _numbers([picture.group for picture in pictures])
    steps = len(training) // SETTINGS.batch_size

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        rng = random.Random(f"{SEED}:{epoch}")
        order = rng.sample(training, len(training))
        for start in range(0, steps * SETTINGS.batch_size, SETTINGS.batch_size):
            rows = sorted(order[start : start + SETTINGS.batch_size])
            drawn = [captions[i][0] if rng.random() < NAME_SHARE else rng.choice(captions[i]) for i in rows]
            chosen = torch.tensor([place[caption] for caption in drawn])
            maps = torch.from_numpy(views[rng.randrange(VIEWS)][rows])
            some = sorted(rng.sample(range(PHOTO_CROPS), int(PHOTO_SHARE * SETTINGS.batch_size)))
            yield maps, torch.from_numpy(crops[some]), vectors[chosen], groups[rows], chosen

    def validate(_: int) -> dict[str, float]:
        images = task.embed(views[0], validation)
        names = sorted({captions[i][0] for i in validation})
        column = {name: j for j, name in enumerate(names)}
        positives = [(row, column[captions[i][0]]) for row, i in enumerate(validation)]
        unit = F.normalize(vectors[[place[name] for name in names]], dim=-1).numpy()
        recall = recall_at_k((images, unit), positives)
        return {"mR": recall.mR}

    tune_allocator()
    result = train(
        task.step,
        task,
        batches,
        steps_per_epoch=steps,
        settings=SETTINGS,
        checkpoint_dir=Path(out) / "checkpoints",
        digest=digest_of("starter", str(SETTINGS), str(WEIGHTS), *known),
        seed=SEED,
        validate=validate,
        select=Selection("mR"),
        accelerator=make_accelerator(cpu=True),  # trunk, maps and texts lie there
    )
    save_alignment(committed_weights(), task, texts)
    print(f"validation mR {(result.best or {}).get('mR', math.nan):.1f} after {result.seconds:.0f} s")
    return committed_weights()


class TrunkUpdate(nn.Module):
    """The trunk's last blocks and head, with what training adds to their weights, at first nothing.

    To a matrix (a convolution of one pixel) is added a product of two of rank `RANK` (LoRA, arXiv 2106.09685), to all
    else a value for each. What is trained is what is added, so weight decay draws to the packaged weights, not to zero.
    """

    def __init__(self, trunk: EfficientNetLite0) -> None:
        super().__init__()
        last = {str(place): block for place, block in enumerate(trunk.blocks) if place >= TRUNK_FROM}
        packaged = nn.Sequential(OrderedDict(last | {"head": trunk.head}))
        self._packaged = [packaged.requires_grad_(False)]  # in a list, so that it is no submodule
        self.whole, self.down, self.up = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for name, value in self.packaged.named_parameters():
            key = name.replace(".", "-")  # dots are not allowed
            if value.ndim == 4 and value.shape[1] > RANK:
                self.down[key] = torch.randn(RANK, value.shape[1]) / math.sqrt(value.shape[1])
                self.up[key] = torch.zeros(value.shape[0], RANK)
            else:
                self.whole[key] = torch.zeros_like(value)

    @property
    def packaged(self) -> nn.Sequential:
        return self._packaged[0]

    def forward(self, maps: Tensor) -> Tensor:  # what enters block `TRUNK_FROM` (B, 112, 14, 14) -> (B, 1280, 7, 7)
        added = {key: low_rank(up, self.down[key]) for key, up in self.up.items()} | dict(self.whole.items())
        now = {name: value + added[name.replace(".", "-")] for name, value in self.packaged.named_parameters()}
        # Parts whose maps stay in the processor's cache.
        return torch.cat([functional_call(self.packaged, now, (channels_last(part),)) for part in maps.split(PART)])

    @torch.no_grad()
    def before(self, maps: Tensor) -> Tensor:
        """What the packaged trunk makes of the same, (B, 1280, 7, 7)."""
        return torch.cat([self.packaged(channels_last(part)) for part in maps.split(PART)])

    def named(self) -> dict[str, Tensor]:
        """What is added, as `trimtab.towers.starter.build_starter` reads it, by the names of `EfficientNetLite0`."""
        named = {}
        for kind, values in (("whole", self.whole), ("up", self.up), ("down", self.down)):
            for key, value in values.items():
                name = key.replace("-", ".")
                named[f"{ADDED}{kind}.{name if name.startswith('head') else f'blocks.{name}'}"] = value.detach()
        return named


class AlignmentTask(nn.Module):
    """Trainable layers, the trunk's update and logit_scale; what is packaged is no part of the checkpoint."""

    def __init__(
        self, trunk: EfficientNetLite0, class_embeddings: Tensor, sample: Sequence[int], maps: CachedArrays
    ) -> None:
        super().__init__()
        self._classifier = [trunk.classifier.requires_grad_(False)]  # in a list, so that it is no submodule
        self.trunk = TrunkUpdate(trunk)
        self.alignment = StarterAlignment(StarterVisionConfig(dropout=0.3))
        self.alignment.class_embeddings.data.copy_(class_embeddings)
        parts = (sample[start : start + 128] for start in range(0, len(sample), 128))
        pooled = torch.cat([self.trunk.before(_floats(maps[list(part)])).mean(dim=(2, 3)) for part in parts])
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

    def log_probabilities(self, feature_map: Tensor) -> Tensor:  # (B, 1280, 7, 7) -> (B, 1000)
        logits = self._classifier[0](feature_map.mean(dim=(2, 3)))
        return (SHARPNESS * logits.float()).log_softmax(dim=-1)

    def correction(self, feature_map: Tensor) -> Tensor:  # (B, 1280, 7, 7) -> (B, D)
        return self.alignment.correction(self.alignment.tokens(feature_map)[-1]).float()

    def knowledge(self, log_probabilities: Tensor) -> Tensor:  # (B, 1000) -> (B, D)
        return log_probabilities.exp() @ self.alignment.class_embeddings

    def step(self, batch: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        maps, crops, texts, groups, captions = batch
        crops = _floats(crops)
        both = self.trunk(torch.cat([_floats(maps), crops])).float()
        log_probabilities, correction = self.log_probabilities(both), self.correction(both)
        outputs = self.knowledge(log_probabilities) + correction  # (B + C, D)
        images, correction, feature_map = (each[: len(maps)] for each in (outputs, correction, both))
        logits = self.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T  # (B, B)
        same = (groups[:, None] == groups) | (captions[:, None] == captions)
        positive = same.float() / same.sum(dim=1, keepdim=True)
        contrastive = -(positive * (logits.log_softmax(dim=1) + logits.T.log_softmax(dim=1))).sum(dim=1).mean() / 2
        on_pseudo = self.correction(self.pseudo_photographs(feature_map[::2].detach()))

        before = self.trunk.before(crops).float()
        classes_before = self.log_probabilities(before)
        moved = outputs[len(maps) :] - self.knowledge(classes_before)
        classes = F.kl_div(log_probabilities[len(maps) :], classes_before, reduction="batchmean", log_target=True)
        spread = self.alignment.feature_std[:, None, None]
        return {
            "contrastive": contrastive,
            "shortness": SHORTNESS * correction.square().sum(dim=1).mean(),
            "replay": REPLAY * on_pseudo.square().sum(dim=1).mean(),
            "kept_output": KEPT_OUTPUT * moved.square().sum(dim=1).mean(),
            "kept_classes": KEPT_CLASSES * classes,
            "kept_map": KEPT_MAP * ((both[len(maps) :] - before) / spread).square().mean(),
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
    def embed(self, maps: CachedArrays, rows: Sequence[int], batch: int = 128) -> np.ndarray:
        parts = []
        for start in range(0, len(rows), batch):
            with fast_inference(torch.device("cpu")):
                feature_map = self.trunk(_floats(maps[list(rows[start : start + batch])])).float()
                correction = self.correction(feature_map)
            output = self.knowledge(self.log_probabilities(feature_map)) + correction
            parts.append(F.normalize(output, dim=-1))
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
        vectors = []
        for names, definition in imagenet_classes():
            forms = ("{}", "a photo of a {}", f"{{}}, {definition}"[:150])
            each = [F.normalize(self._uncentred([form.format(name) for name in names[:3]]), dim=0) for form in forms]
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


def picture_maps(pictures: Sequence[Picture], trunk: EfficientNetLite0, view: int) -> CachedArrays:
    """What enters the first trained block, (N, 112, 14, 14), of one view of every picture, cached on disk in fp16."""
    # By the place in the cache: vendors name their files alike.
    items = [f"{view}:{picture.path.relative_to(cache_home()).as_posix()}" for picture in pictures]
    paths = {item: picture.path for item, picture in zip(items, pictures, strict=True)}
    return _cached_maps(trunk, items, lambda item: _pixels(paths[item], view, item))


def photograph_maps(trunk: EfficientNetLite0) -> CachedArrays:
    """The same of crops of photographs, (`PHOTO_CROPS`, 112, 14, 14)."""
    whole = [read_image(file) for file in photographs()]

    def pixels(item: str) -> np.ndarray:
        number, rng = int(item.partition(":")[2]), random.Random(item)
        photograph = whole[number % len(whole)]
        if rng.random() < 0.7:
            sides = [int(side * rng.uniform(0.35, 1)) for side in photograph.size]
            x, y = (rng.randint(0, length - side) for length, side in zip(photograph.size, sides, strict=True))
            photograph = photograph.crop((x, y, x + sides[0], y + sides[1]))
        if rng.random() < 0.5:
            photograph = photograph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(photograph.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))

    return _cached_maps(trunk, [f"photograph:{number}" for number in range(PHOTO_CROPS)], pixels)


def _cached_maps(trunk: EfficientNetLite0, items: list[str], pixels: Callable[[str], np.ndarray]) -> CachedArrays:
    @torch.inference_mode()
    def compute(wanted: list[str]) -> np.ndarray:
        rows = []
        for start in range(0, len(wanted), 16):  # small batches stay in the processor's cache
            some = np.stack([pixels(item) for item in wanted[start : start + 16]])
            x = torch.from_numpy(some).permute(0, 3, 1, 2).float().sub(127).div(128)
            with fast_inference(x.device):
                x = trunk.stem(channels_last(x))
                for block in trunk.blocks[:TRUNK_FROM]:
                    x = block(x)
            rows.append(x.float().contiguous().numpy())
        return np.concatenate(rows)

    return cached_arrays(cache_home() / "features", ("starter-alignment-4", str(TRUNK_FROM)), items, compute, chunk=512)


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
    """Write our own weights, and nothing of the packaged towers, as fp16; of the trunk what is added to its weights."""
    tensors = {f"vision_model.alignment.{name}": value for name, value in task.alignment.state_dict().items()}
    tensors |= task.trunk.named() | {"text_model.centre": texts.centre, "logit_scale": task.logit_scale.detach()}
    with atomic_path(path) as temporary:
        save_file({k: v.half().contiguous() for k, v in tensors.items()}, temporary, {"sharpness": str(SHARPNESS)})


def _floats(maps: Tensor | np.ndarray) -> Tensor:
    return torch.as_tensor(maps).float()


def _numbers(names: Sequence[str]) -> Tensor:
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([order[name] for name in names])
