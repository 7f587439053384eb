"""The memory bank: how hard every training pair is, and how often and how heavily it is therefore trained on.

A pair's entry starts with its difficulty for the frozen base and becomes an exponential moving average of its
difficulty for the model in training, measured against the stored embeddings of all captions (a memory bank as
Wu et al. 2018, arXiv 1805.01978, have it for images). Pairs are drawn in proportion to (eps + difficulty) ** gamma
with importance weights, as experience is replayed by Schaul et al. 2016 (arXiv 1511.05952). Plain high loss is
often noise: ``learnability`` is the loss above that of a reference (Mindermann et al. 2022, arXiv 2206.07137; Evans
et al. 2024, arXiv 2406.17711).

Difficulty is that of finding the caption for the image. The other direction is left out: the bank stores captions,
which many images share, so that it stays small and refreshes often; and a caption of many images has no one partner
whose rank or margin could be told.

**Resume.** All state is in buffers, and `start_epoch` fixes what an epoch is drawn by, so that a run which stops in
the middle of an epoch draws the same epoch again. **Several processes.** Every rank keeps the whole bank and gives
`update` the rows of all ranks (`training.distributed.gather_rows`), so all banks stay equal; the ranks of different
devices may differ in the last bits, so give all of them the main process's bank before every epoch
(`training.distributed.copy_from_main`).

**Very many captions.** Up to `MOST_COMPARED` captions a pair is compared with all of them. Of more, the same random
`MOST_COMPARED` stand for all in a run and when it resumes, so that time and memory grow with the pairs alone and not
with pairs times captions. A pair's own captions are always known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import DataError
from trimtab.objectives.contrastive import unique_rows

if TYPE_CHECKING:
    from trimtab.config import MemoryBankConfig

Measure = Literal["margin", "rank", "loss"]

MOST_COMPARED = 65_536

# A wrong caption this close to the right one counts as ahead, as everywhere in the evaluation: equal vectors can
# give cosines that differ in the last bits, and a model that has collapsed must not look perfect.
_TIE = 1e-6
# Captions that no objective can part: they are equal but for rounding.
_SAME = 1 - 1e-5


@torch.no_grad()
def global_difficulty(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    captions: Tensor,
    measure: Measure = "margin",
    *,
    logit_scale: float,
    groups: Tensor | None = None,
    chunk: int = 256,
    report: Callable[[int, int], None] | None = None,
) -> Tensor:
    """How hard it is to find each image's caption among all captions: (N,) from 0 (easy) to 1.

    With c the cosines of an image, its partner its own caption, and M wrong captions:

    - ``margin``: sigmoid(logit_scale * (highest wrong c - partner's c)); 0.5 when they tie.
    - ``rank``: log(1 + wrong captions at least as high) / log(1 + M); 0 when the partner is first.
    - ``loss``: L / (L + log(1 + M)), L the cross-entropy of the partner among the wrong; 0.5 at chance.

    Exact, over all pairs, up to `MOST_COMPARED` captions; memory is a few times chunk x U floats.

    Args:
        image_embeddings: (N, D), one row per pair; may be on another device than the texts.
        text_embeddings: (U, D) of all different captions.
        captions: (N,) caption number of each pair.
        groups: (N,) pairs with equal numbers show the same thing (one image with several captions, or one class):
            each other's captions are not wrong. Equal captions never are.
        report: told how many pairs of how many are done.

    Raises:
        DataError: values that are not finite.
        ValueError: shapes or numbers that do not fit, or another measure.
    """
    if measure not in get_args(Measure):
        raise ValueError(f"measure={measure!r} must be one of {', '.join(get_args(Measure))}")
    device = text_embeddings.device
    _check_finite(image_embeddings, "image")
    _check_finite(text_embeddings, "text")
    positives = _Positives(captions, len(text_embeddings), groups).to(device)
    if len(image_embeddings) != len(captions):
        raise ValueError(f"{len(image_embeddings)} image embeddings for {len(captions)} pairs")
    texts = F.normalize(text_embeddings.float(), dim=-1)
    found = []
    for rows in torch.arange(len(captions), device=device).split(chunk):
        images = F.normalize(image_embeddings[int(rows[0]) : int(rows[-1]) + 1].to(device).float(), dim=-1)
        found.append(_difficulty(images, texts, rows, positives, measure, logit_scale))
        if report:
            report(int(rows[-1]) + 1, len(captions))
    return torch.cat(found)


class MemoryBank(nn.Module):
    """Difficulties of N pairs and the embeddings of their U captions; buffers only.

    Buffers:
        captions: (N,) caption number of each pair.
        groups: (N,) see `global_difficulty`.
        base: (N,) difficulty for the frozen base.
        running: (N,) moving average of the difficulty, from `base` on.
        reference: (N,) difficulty for the reference of ``learnability``.
        seen: (N,) how often a pair was updated.
        text_embeddings: (U, D) latest embedding of every caption; (0, D) if the bank is not enabled.
        epoch, drawn_by, pair_weights: what `start_epoch` fixed.
    """

    captions: Tensor
    groups: Tensor
    base: Tensor
    running: Tensor
    reference: Tensor
    seen: Tensor
    text_embeddings: Tensor
    epoch: Tensor
    drawn_by: Tensor
    pair_weights: Tensor

    of_training_alone = ("text_embeddings",)
    """Buffers that a run needs to go on and a trained model does not."""

    def __init__(
        self,
        config: MemoryBankConfig,
        captions: Tensor,
        text_embeddings: Tensor,
        difficulty: Tensor,
        *,
        logit_scale: float,
        groups: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> None:
        """Start from what the frozen base finds.

        Args:
            captions: (N,) caption number of each pair, below U.
            text_embeddings: (U, D) the base's embeddings of all different captions.
            difficulty: (N,) the base's, by `global_difficulty` with ``MemoryBank.measure(config)``.
            logit_scale: the unit in which cosines are compared; kept when the trained one changes, so that
                difficulties of different times can be compared.
            groups: (N,) see `global_difficulty`.
            reference: (N,) difficulty, by the same measure, for the reference of ``learnability``, such as a model
                trained on other pairs; the base's own when not given.

        Raises:
            DataError: fewer than two different captions, or embeddings that are not finite.
            ValueError: shapes or numbers that do not fit.
        """
        super().__init__()
        if len(text_embeddings) < 2:
            raise DataError("all pairs have the same caption; hard pairs need at least two different captions")
        _check_finite(text_embeddings, "text")
        for name, values in (("difficulty", difficulty), ("reference", reference)):
            if values is not None and (values.shape != captions.shape or not bool(values.isfinite().all())):
                raise ValueError(f"{name} {tuple(values.shape)} must be {len(captions)} finite numbers")
        self.config = config
        self.logit_scale = logit_scale
        self.positives = _Positives(captions, len(text_embeddings), groups)
        difficulty = difficulty.detach().float()
        self.register_buffer("captions", captions.clone())
        self.register_buffer("groups", (captions if groups is None else groups).clone())
        self.register_buffer("base", difficulty.clone())
        self.register_buffer("running", difficulty.clone())
        self.register_buffer("reference", (difficulty if reference is None else reference.detach().float()).clone())
        self.register_buffer("seen", torch.zeros_like(captions))
        stored = text_embeddings.detach() if config.enabled else text_embeddings.detach()[:0]
        self.register_buffer("text_embeddings", F.normalize(stored.float(), dim=-1))
        self.register_buffer("epoch", torch.tensor(-1))
        self.register_buffer("drawn_by", self.difficulty().clone())
        self.register_buffer("pair_weights", torch.ones_like(difficulty))

    @staticmethod
    def measure(config: MemoryBankConfig) -> Measure:
        """What is measured of a pair; ``learnability`` compares losses."""
        return "loss" if config.difficulty == "learnability" else config.difficulty

    def difficulty(self) -> Tensor:
        """(N,) as it is now, from 0 to 1: the running difficulty, or its excess over the reference."""
        if self.config.difficulty == "learnability":
            return (self.running - self.reference).clamp_min(0)
        return self.running

    # -- in training

    @torch.no_grad()
    def update(self, indices: Tensor, image_embeddings: Tensor, caption_ids: Tensor, text_embeddings: Tensor) -> None:
        """Take in a step's features: store its captions', then measure its pairs against all captions.

        Rows that come twice count once. Features that are not finite change nothing: the loop stops at such a step.
        A bank that is not enabled only counts.

        Args:
            indices: (B,) pairs, of all ranks.
            image_embeddings: (B, D) of these pairs; features do as well.
            caption_ids: (T,) captions whose embeddings follow, hard negatives too.
            text_embeddings: (T, D).
        """
        device = self.running.device
        indices, first = unique_rows(indices.to(device))
        if not self.config.enabled:
            self.seen[indices] += 1
            return
        images = F.normalize(image_embeddings.to(device).float(), dim=-1)[first]  # (B', D)
        caption_ids, first = unique_rows(caption_ids.to(device))
        texts = F.normalize(text_embeddings.to(device).float(), dim=-1)[first]  # (T', D)
        if not (images.isfinite().all() and texts.isfinite().all()):
            return
        self.text_embeddings[caption_ids] = texts
        measure = self.measure(self.config)
        now = _difficulty(images, self.text_embeddings, indices, self.positives, measure, self.logit_scale)
        self.running[indices] = torch.lerp(now, self.running[indices], self.config.momentum)
        self.seen[indices] += 1

    @torch.no_grad()
    def hard_negatives(self, indices: Tensor, count: int) -> Tensor:
        """The captions whose stored embeddings are closest to any caption of the pairs `indices`: (count,) or fewer.

        Left out are the captions of these pairs, those of their groups, and captions that equal one of them but for
        rounding. Most confused first; ties by number, so all ranks choose alike.
        """
        indices = indices.to(self.running.device)
        batch = self.captions[indices].unique()
        confusion = _cosines(self.positives.compared(self.text_embeddings), self.text_embeddings[batch]).amax(1)  # (C,)
        confusion[self.positives.columns(indices)[1]] = torch.inf
        value, order = confusion.masked_fill(confusion > _SAME, -torch.inf).sort(descending=True, stable=True)
        return self.positives.caption_of(order[value > -torch.inf][:count])

    # -- between epochs

    @torch.no_grad()
    def start_epoch(self, epoch: int, drawn: int) -> Tensor:
        """Fix what `epoch` is drawn by and its weights; returns `probability`.

        Called again for the same epoch, by a run that resumes in its middle, it changes nothing.

        Args:
            drawn: how many pairs the epoch draws; see `data.sampling.pairs_per_epoch`.
        """
        if int(self.epoch) != epoch:
            self.drawn_by.copy_(self.difficulty())
            self.pair_weights.copy_(instance_weights(self.drawn_by, self.config, drawn))
            self.epoch.fill_(epoch)
        return self.probability()

    def probability(self) -> Tensor:
        """(N,) float64 on the CPU, sums to 1: how likely each pair is drawn first in the current epoch."""
        return sampling_probability(self.drawn_by, self.config)

    def weights(self, indices: Tensor) -> Tensor:
        """(B,) instance weights of these pairs in the current epoch; only their ratios matter."""
        return self.pair_weights[indices.to(self.pair_weights.device)]

    def hardest(self, count: int) -> tuple[Tensor, Tensor]:
        """Indices (count,) of the hardest pairs as things are now, hardest first, and their difficulties."""
        value, order = self.difficulty().sort(descending=True, stable=True)
        return order[:count], value[:count]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("captions", "groups"):
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and not (saved.shape == own.shape and torch.equal(saved.to(own.device), own)):
                error_msgs = rest[-1]
                error_msgs.append(f"this memory bank was saved for other pairs ({name} differ)")
                return
        super()._load_from_state_dict(state_dict, prefix, *rest)


def sampling_probability(difficulty: Tensor, config: MemoryBankConfig) -> Tensor:
    """(N,) difficulties from 0 to 1 -> (N,) float64 on the CPU that sums to 1.

    In proportion to (eps + d) ** gamma, d with its tail lowered, within ``floor / N`` and ``cap / N``: what the
    bounds add or take is made up for by all pairs between them in proportion.
    """
    count = len(difficulty)
    wanted = (config.eps + _lower_tail(difficulty, config.tail)) ** config.gamma
    wanted = wanted / wanted.mean()
    floor, cap = config.floor, min(float(count), config.cap or count)
    # The sum of the clamped values rises with the factor: bisect for the factor at which it is N.
    low, high = 0.0, cap / wanted.min().item()
    for _ in range(400):  # the first interval may span 60 orders of magnitude
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if (middle * wanted).clamp(floor, cap).sum().item() < count:
            low = middle
        else:
            high = middle
    return (high * wanted).clamp(floor, cap) / count


def instance_weights(difficulty: Tensor, config: MemoryBankConfig, drawn: int) -> Tensor:
    """(N,) float64 weights of pairs when `drawn` of them are drawn by `sampling_probability`.

    The product of two factors: one that rises with difficulty, ``1 - s + s d / mean d`` with s the
    ``instance_weight``; and the importance correction ``((drawn / N) / pi) ** importance`` with pi the
    `inclusion_probability`. At importance 1 the latter averages 1 over an epoch's draws, and weighted sums over them
    are unbiased for all pairs.
    """
    lowered = _lower_tail(difficulty, config.tail)
    mean = lowered.mean()
    rising = 1 + config.instance_weight * (lowered / mean - 1) if mean > 0 else torch.ones_like(lowered)
    inclusion = inclusion_probability(sampling_probability(difficulty, config), drawn)
    return rising * (min(drawn / len(difficulty), 1.0) / inclusion) ** config.importance


def inclusion_probability(probability: Tensor, drawn: int) -> Tensor:
    """How likely each pair is among `drawn` that are drawn without replacement: (N,) float64 that sums to `drawn`.

    ``drawn * p`` holds for small draws only and passes 1. In exponential-clock sampling (as in
    `data.sampling.draw_hard_epoch`) pair i is drawn when its clock, of rate p_i, rings before the `drawn` first are
    full; that time hardly varies among many pairs, so pi_i = 1 - exp(-t p_i) with t such that they sum to `drawn`
    (Rosén 1997, "Asymptotic theory for order sampling").
    """
    p = probability.cpu().double()
    if drawn >= len(p):
        return torch.ones_like(p)
    # Newton's method from below on a concave function: it never overshoots.
    t = float(drawn)
    for _ in range(100):
        missing = drawn + torch.expm1(-t * p).sum().item()
        if missing < 1e-9 * drawn:
            break
        t += missing / (p * torch.exp(-t * p)).sum().item()
    return -torch.expm1(-t * p)


class _Positives(nn.Module):
    """The captions that pairs are compared with, and which of them are right for each: those of all pairs of its
    group. Rebuilt, never saved."""

    among: Tensor | None
    captions: Tensor
    group: Tensor
    size: Tensor
    start: Tensor
    members: Tensor

    def __init__(self, captions: Tensor, texts: int, groups: Tensor | None) -> None:
        super().__init__()
        if captions.ndim != 1 or len(captions) == 0 or not 0 <= int(captions.min()) <= int(captions.max()) < texts:
            raise ValueError(f"captions {tuple(captions.shape)} must be (N,) numbers of the {texts} text embeddings")
        if groups is not None and groups.shape != captions.shape:
            raise ValueError(f"groups {tuple(groups.shape)} must be as many as captions {tuple(captions.shape)}")
        _, group = (captions if groups is None else groups).unique(return_inverse=True)
        members = torch.stack([group, captions], 1).unique(dim=0)  # (M, 2), by group
        size = members[:, 0].bincount()
        among = None
        if texts > MOST_COMPARED:
            drawn = torch.randperm(texts, generator=torch.Generator().manual_seed(0))[:MOST_COMPARED]
            among = drawn.sort().values.to(captions.device)
        self.register_buffer("among", among, persistent=False)  # (C,) captions, or None for all
        self.register_buffer("captions", captions, persistent=False)
        self.register_buffer("group", group, persistent=False)
        self.register_buffer("size", size, persistent=False)
        self.register_buffer("start", size.cumsum(0) - size, persistent=False)
        self.register_buffer("members", members[:, 1].contiguous(), persistent=False)

    def compared(self, texts: Tensor) -> Tensor:
        """Of all captions (U, D) those that pairs are compared with (C, D)."""
        return texts if self.among is None else texts[self.among]

    def caption_of(self, columns: Tensor) -> Tensor:
        """Caption numbers of columns of `compared`."""
        return columns if self.among is None else self.among[columns]

    def columns(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(row, column of `compared`) of every right caption of the pairs `indices`, rows counted from 0."""
        group = self.group[indices]
        size = self.size[group]
        rows = torch.arange(len(indices), device=indices.device).repeat_interleave(size)
        before = (size.cumsum(0) - size).repeat_interleave(size)
        within = torch.arange(len(rows), device=indices.device) - before
        captions = self.members[self.start[group].repeat_interleave(size) + within]
        if self.among is None:
            return rows, captions
        columns = torch.searchsorted(self.among, captions).clamp_max(len(self.among) - 1)
        found = self.among[columns] == captions
        return rows[found], columns[found]


def _difficulty(
    images: Tensor, texts: Tensor, indices: Tensor, positives: _Positives, measure: Measure, logit_scale: float
) -> Tensor:  # (b, D), (U, D), (b,) -> (b,)
    cosines = _cosines(images, positives.compared(texts))  # (b, C)
    own = positives.captions[indices]
    among_all = positives.among is None  # else its own caption may not be among those compared
    partner = cosines.gather(1, own[:, None]).squeeze(1) if among_all else (images * texts[own]).sum(1)  # (b,)
    rows, columns = positives.columns(indices)
    cosines[rows, columns] = -torch.inf
    wrong = cosines.shape[1] - rows.bincount(minlength=len(indices))  # (b,)
    if measure == "margin":
        return torch.sigmoid(logit_scale * (cosines.amax(1) - partner))
    log_candidates = wrong.clamp_min(1).log1p()
    if measure == "rank":
        ahead = (cosines >= partner[:, None] - _TIE).sum(1)
        return ahead.log1p() / log_candidates
    loss = F.softplus((logit_scale * cosines).logsumexp(1) - logit_scale * partner)
    return loss / (loss + log_candidates)


def _cosines(a: Tensor, b: Tensor) -> Tensor:  # unit-norm (A, D), (B, D) -> (A, B)
    with torch.autocast(a.device.type, enabled=False):  # bf16 is too coarse to tell close captions apart
        return a @ b.T


def _lower_tail(difficulty: Tensor, tail: float) -> Tensor:
    """(N,) in float64 on the CPU with the hardest ``tail * N``, rounded down, as hard as the next hardest."""
    difficulty = difficulty.detach().cpu().double()  # Apple's GPUs know no float64
    spared = int(tail * len(difficulty) + 1e-9)
    return difficulty.clamp_max(difficulty.kthvalue(len(difficulty) - spared).values)


def _check_finite(embeddings: Tensor, side: str) -> None:
    bad = (~embeddings.isfinite().all(1)).nonzero()
    if len(bad):
        raise DataError(
            f"{len(bad)} of {len(embeddings)} {side} embeddings are not finite, row {int(bad[0])} first; "
            "delete the cache they were read from, so that they are computed again"
        )
