"""The domain link end to end: read top to bottom."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.adapters.gate import DomainGate, Gated, fit_gate
from trimtab.config import LARGEST_SCALE, ContrastiveConfig, DomainRecipe, MemoryBankConfig, to_mapping
from trimtab.controls import without_controls
from trimtab.data.pairs import ImageTextPairs
from trimtab.data.sampling import draw_hard_epoch, pairs_per_epoch, steps_per_epoch
from trimtab.errors import RecipeError
from trimtab.evaluation.embedding import Encoder
from trimtab.evaluation.forgetting import GeneralSet, alpha_curve, forgetting, mean_score, measure
from trimtab.evaluation.retrieval import Recall, recall_at_k, retrieve
from trimtab.files import digest_of
from trimtab.objectives.memory_bank import MemoryBank, global_difficulty
from trimtab.precision import tune_allocator
from trimtab.recipes.domain_methods import METHODS, Adapters, Method
from trimtab.recipes.domain_pairs import DomainPairs, RetrievalSet, as_read, general_sets, read_pairs, readable
from trimtab.recipes.domain_plan import plan
from trimtab.recipes.domain_report import model_card, write_domain_report
from trimtab.recipes.domain_states import FrozenStates, base_embeddings, embed, frozen_states
from trimtab.recipes.folders import check_out, claim, recipe_digest, training_folder
from trimtab.tasks.domain import Batch, DomainTask
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.hf import load_base, portable
from trimtab.towers.map_views import draw_numbers
from trimtab.towers.memory import PairMemory
from trimtab.training import distributed
from trimtab.training.checkpoint import CheckpointFolder
from trimtab.training.distributed import World
from trimtab.training.loop import train
from trimtab.training.run import Selection
from trimtab.training.trackers import progress_reporter

logger = logging.getLogger(__name__)

_VIEW_STREAM = 3  # so that views are drawn independently of pairs
# Of the memory. So sharp, it moves pictures of scenes that it knows and leaves others where they are.
_MEMORY_WEIGHT, _MEMORY_SHARPNESS = 0.25, 40.0
_MEMORY_STREAM = 4
_QUANTILES = (0.1, 0.5, 0.9)


def adapt_domain(recipe: DomainRecipe, *, dry_run: bool = False) -> dict[str, Any] | None:
    """Train a domain adapter or one of its baselines; see `trimtab.recipes.adapt.adapt`."""
    started = time.monotonic()
    tune_allocator()
    # The user's mistakes first: no model is loaded before the data are known to be good.
    check_out(recipe.out, METHODS[recipe.method].files)
    pairs = read_pairs(recipe)
    asked = recipe.training.epochs
    recipe = long_enough(recipe, len(pairs.train))
    general = general_sets(recipe.general, recipe.seed, pairs.train)
    accelerator = distributed.make_accelerator()
    world = distributed.checked_world(accelerator, recipe.training.processes)
    base = load_base(recipe.base, device=str(world.device))
    check_scale(recipe.objective, base)
    pairs = as_read(pairs, base)
    digest = digest_of(recipe_digest(recipe), pairs.train.digest, pairs.validation.digest, *base.digests)
    CheckpointFolder(training_folder(recipe.out)).check(digest)
    torch.manual_seed(recipe.seed)
    method = METHODS[recipe.method](base, recipe)
    frozen = frozen_states(recipe, method, pairs.train, pairs.validation)
    if dry_run:
        if world.is_main:
            print(without_controls(plan(recipe, pairs, method, frozen, asked)))
        return None

    if world.is_main:
        frozen.room()
    before = measure(base, general) if world.is_main else {}
    clock = time.monotonic()
    frozen.fill()
    embeddings = base_embeddings(frozen, pairs.train)
    task = make_task(recipe, method, frozen, pairs.train, world, embeddings)
    gated = make_gate(recipe, method, frozen, pairs, embeddings[0])
    encoding = time.monotonic() - clock
    drawn = pairs_per_epoch(len(pairs.train), recipe.bank.epoch_share, recipe.training.batch_size)
    select = judged_by(pairs.validation)
    with method.at_work():
        result = train(
            task.step,
            task,
            lambda epoch: draw_epoch(task.bank, pairs.train, recipe, epoch, world),
            steps_per_epoch=steps_per_epoch(drawn, recipe.training.batch_size),
            settings=recipe.training,
            checkpoint_dir=training_folder(recipe.out),
            digest=digest,
            seed=recipe.seed,
            validate=lambda _: validate(frozen, pairs, gated),
            select=select,
            run_config=to_mapping(recipe),
            accelerator=accelerator,
        )  # fmt: skip
        if not world.is_main:
            return None
        hardness = Hardness.of(task, frozen, pairs.train)
        found = dict(result.best or {})
        judge = select.metric
        at_start = next(one for one in result.history if one["kind"] == "validation")
        if found.get("epoch", 0) < 0:
            logger.warning(
                "validation was worse after every epoch than before the first (%s %.1f%%), so nothing of what was "
                "learned is kept: check the captions, lower training.learning_rate, or give more pairs",
                judge,
                at_start[judge],
            )
        memory = remember(recipe, method, frozen, pairs, gated, hardness, found)
        if memory and memory["kept"]:
            found |= memory["with"]
    outcome: dict[str, Any] = {
        "folder": recipe.out,
        "method": recipe.method,
        "validation": found,
        "judged_by": judge,
        "validation_before": {name: at_start[name] for name in ("top1", "mR")},
        "pairs": len(pairs.train),
        "images": len(pairs.train.images),
        "captions": len(pairs.train.captions),
        "counts": pairs.counts,
        "trained_parameters": method.trained_parameters,
        "base_parameters": method.base_parameters,
        "logit_scale": final_scale(recipe, task, base),
        "difficulty": {"before": quantiles(hardness.before), "after": quantiles(hardness.now)},
        "steps": result.steps,
        "history": result.history,
    }
    if memory:
        outcome["memory"] = memory
    if gated:
        outcome["gate"] = {"kind": recipe.gate.kind, "validation": passed(gated.gate, base, pairs.validation)}
    if general:
        measured, by_alpha = remembered(recipe, method, pairs.validation, general, before, outcome["logit_scale"])
        outcome |= measured
        # Of whole pictures in full precision, as the dial's: one model has one figure.
        outcome["validation"] |= by_alpha.get(1.0, {})
        outcome["validation_before"] |= by_alpha.get(0.0, {})
    outcome["seconds"] = {"encoding": encoding, "training": result.seconds, "total": time.monotonic() - started}
    save(recipe, method, pairs, outcome)  # before the page, which may fail
    outcome["report"] = str(write_domain_report(recipe, pairs.train, hardness, outcome, base))
    return outcome


def long_enough(recipe: DomainRecipe, pairs: int) -> DomainRecipe:
    """The recipe with as many epochs as `least_steps` asks for with so many training pairs.

    It validates no more often for that: with few pairs and many validation pictures that would take most of the time.
    """
    training = recipe.training
    drawn = pairs_per_epoch(pairs, recipe.bank.epoch_share, training.batch_size)
    epochs = math.ceil(recipe.least_steps / steps_per_epoch(drawn, training.batch_size))
    if epochs <= training.epochs:
        return recipe
    every = training.validate_every * math.ceil(epochs / training.epochs)
    return replace(recipe, training=replace(training, epochs=epochs, validate_every=every))


def largest_scale(base: DualEncoder) -> float:
    """Bound of a logit_scale in training: SigLIP's checkpoints have more than CLIP's 100."""
    return max(LARGEST_SCALE, base.logit_scale)


def check_scale(objective: ContrastiveConfig, base: DualEncoder) -> None:
    """Refuse a logit_scale out of bounds, and warn where one is learned beside a bias that is not.

    Raises:
        RecipeError: it is too large for this base.
    """
    largest = largest_scale(base)
    if objective.logit_scale is not None and objective.logit_scale > largest:
        raise RecipeError(
            f"objective.logit_scale={objective.logit_scale:g} must be above 0 to {largest:.6g}, or null for the base's "
            f"own ({base.logit_scale:.6g})"
        )
    if objective.learn_logit_scale and base.logit_bias:
        logger.warning(
            "%s has a logit_bias, which stays as it is while objective.learn_logit_scale changes the scale: sigmoid "
            "probabilities of what is trained no longer hold. Rankings do not depend on either",
            base.name,
        )


def make_task(
    recipe: DomainRecipe,
    method: Method,
    frozen: FrozenStates,
    pairs: ImageTextPairs,
    world: World,
    embeddings: tuple[torch.Tensor, torch.Tensor],
) -> DomainTask:
    """The towers with what is trained, and a memory bank that knows how hard every pair is for the frozen base.

    Args:
        embeddings: the base's, (I, D) of the training pictures and (U, D) of their captions.
    """
    base = method.base
    images, texts = embeddings
    captions = torch.from_numpy(pairs.caption_index).to(texts.device)
    groups = torch.from_numpy(pairs.caption_sets[pairs.image_index]).to(texts.device)
    scale = recipe.objective.logit_scale or base.logit_scale
    difficulty = _difficulty(recipe.bank, pairs, images, texts, captions, groups, scale)
    return DomainTask(
        method,
        image=frozen.image_side,
        text=frozen.text_side,
        image_of=pairs.image_index,
        caption_of=pairs.caption_index,
        belong=pairs.belong,
        objective=recipe.objective,
        bank=MemoryBank(recipe.bank, captions, texts, difficulty, logit_scale=scale, groups=groups),
        logit_scale=scale,
        largest_scale=largest_scale(base),
        gather=functools.partial(distributed.gather_rows, world=world),
    )


def _difficulty(
    bank: MemoryBankConfig,
    pairs: ImageTextPairs,
    images: torch.Tensor,
    texts: torch.Tensor,
    captions: torch.Tensor,
    groups: torch.Tensor,
    logit_scale: float,
) -> torch.Tensor:
    """`global_difficulty` of all pairs (N,), from embeddings of their pictures (I, D) and captions (U, D)."""
    of_pairs = images[torch.from_numpy(pairs.image_index).to(images.device)]
    measure = MemoryBank.measure(bank)
    with progress_reporter("difficulty", "pairs") as report:
        return global_difficulty(
            of_pairs, texts, captions, measure, logit_scale=logit_scale, groups=groups, report=report
        )


def make_gate(
    recipe: DomainRecipe, method: Method, frozen: FrozenStates, pairs: DomainPairs, train: torch.Tensor
) -> Gated | None:
    """The method's gate, if the recipe has one, on the validation pictures.

    Args:
        train: (I, D) the base's embeddings of the training pictures.
    """
    if recipe.gate.kind == "none" or not isinstance(method, Adapters):
        return None
    validation = embed(frozen.image_side, len(train) + np.arange(len(pairs.validation.images)))
    method.gate = fit_gate(recipe.gate, train, validation)
    return Gated(method.gate, validation)


def passed(gate: DomainGate, base: DualEncoder, validation: ImageTextPairs) -> float:
    """Percent of the validation pictures that get all of the adapters in use, where pictures are passed whole.

    The gate was fitted on cached states, which are half precise: a picture at its bound may change sides.
    """
    features = torch.from_numpy(base.encode_image([readable(image) for image in validation.images]))
    return 100 * float((gate(features.to(base.device)) == 1).float().mean())


def draw_epoch(
    bank: MemoryBank, pairs: ImageTextPairs, recipe: DomainRecipe, epoch: int, world: World
) -> list[Batch]:  # fmt: skip
    """What an epoch sees, hard pairs more often or all alike: batches of pairs (B,), a view of each pair's picture (B,)
    and numbers (B, K) for the view of its map."""
    batch_size, share = recipe.training.batch_size, recipe.bank.epoch_share
    probability = np.full(len(pairs), 1 / len(pairs))
    if recipe.bank.enabled:
        distributed.copy_from_main(bank, world)
        probability = bank.start_epoch(epoch, pairs_per_epoch(len(pairs), share, batch_size)).numpy()
    drawn = draw_hard_epoch(
        probability,
        share=share,
        batch_size=batch_size,
        seed=recipe.seed,
        epoch=epoch,
        captions=pairs.caption_index,
    )
    rng = np.random.default_rng([recipe.seed, epoch, _VIEW_STREAM])
    views = rng.integers(0, recipe.data.views + 1, drawn.shape)
    return list(zip(drawn, views, draw_numbers(rng, drawn.shape), strict=True))


def validate(
    frozen: FrozenStates, pairs: DomainPairs, gated: Gated | None = None, memory: PairMemory | None = None
) -> dict[str, float]:
    """Whether pictures that no training saw find their captions among those of validation, and mean recall."""
    first_image, first_caption = len(pairs.train.images), len(pairs.train.captions)
    validation = pairs.validation
    images = embed(frozen.image_side, first_image + np.arange(len(validation.images)))
    if memory is not None:
        images = memory(images)
    if gated:
        images = gated(images)
    texts = embed(frozen.text_side, first_caption + np.arange(len(validation.captions)))
    positives = np.stack([validation.image_index, validation.caption_index], axis=1)
    return figures(recall_at_k((images.cpu().numpy(), texts.cpu().numpy()), positives))


def figures(recall: Recall) -> dict[str, float]:
    """What is told of validation."""
    return {"top1": recall.i2t["R@1"], "mR": recall.mR}


def judged_by(validation: ImageTextPairs) -> Selection:
    """By what weights are kept: where captions name classes, whether a picture gets its own; where most pictures have a
    caption of their own, mean recall, as the first place among so many says little."""
    images, captions = len(validation.images), len(validation.captions)
    if 2 * captions <= images:
        return Selection("top1", with_start=True, counted=images)
    # Both sides ask, and the mean of two percentages has a quarter of the sum of their variances.
    return Selection("mR", with_start=True, counted=round(4 / (1 / images + 1 / captions)))


@dataclass(frozen=True, eq=False)
class Hardness:
    """How hard the training pairs are.

    Attributes:
        before, now: (N,) for the frozen base, and for the model as it was kept.
        drawn: (N,) how often each was trained on, up to then.
        images, texts: (I, D), (U, D) embeddings of the model as it was kept.
    """

    before: np.ndarray
    now: np.ndarray
    drawn: np.ndarray
    images: torch.Tensor
    texts: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, task: DomainTask, frozen: FrozenStates, pairs: ImageTextPairs) -> Hardness:
        """Measured anew over all pairs: the bank's own figures are of the step at which a pair was last drawn."""
        bank = task.bank
        images = embed(frozen.image_side, np.arange(len(pairs.images)))
        texts = embed(frozen.text_side, np.arange(len(pairs.captions)))
        now = _difficulty(bank.config, pairs, images, texts, bank.captions, bank.groups, bank.logit_scale)
        return cls(bank.base.cpu().numpy(), now.cpu().numpy(), bank.seen.cpu().numpy(), images.cpu(), texts.cpu())


@torch.no_grad()
def remember(
    recipe: DomainRecipe,
    method: Method,
    frozen: FrozenStates,
    pairs: DomainPairs,
    gated: Gated | None,
    trained: Hardness,
    validation: dict[str, Any],
) -> dict[str, Any] | None:
    """Keep training pictures with their captions beside the adapters, unless validation falls by it.

    Where what the run is judged by stays as it is, the other figure must not fall.

    Args:
        validation: what it says of the trained adapters alone.

    Returns:
        What validation says with and without them, and whether they are kept; None if the recipe asks for none.
    """
    if not recipe.memory or not isinstance(method, Adapters):
        return None
    train = pairs.train
    count = len(train.images)
    drawn = np.random.default_rng([recipe.seed, _MEMORY_STREAM]).permutation(count)[: recipe.memory]
    kept = torch.from_numpy(np.sort(drawn))
    captions = torch.zeros(count, trained.texts.shape[1]).index_add_(
        0, torch.from_numpy(train.image_index), trained.texts.float()[torch.from_numpy(train.caption_index)]
    )
    memory = PairMemory(len(kept), captions.shape[1])
    memory.fill(trained.images[kept], captions[kept])
    memory.weight.fill_(_MEMORY_WEIGHT)
    memory.sharpness.fill_(_MEMORY_SHARPNESS)
    memory.to(method.base.device)
    found = validate(frozen, pairs, gated, memory)
    judge = judged_by(pairs.validation).metric
    other = "mR" if judge == "top1" else "top1"
    better = (found[judge], found[other]) >= (validation[judge], validation[other])
    if better:
        method.memory = memory
    alone = {name: validation[name] for name in found}
    return {"pictures": len(kept), "kept": better, "without": alone, "with": found}


def quantiles(difficulty: np.ndarray) -> dict[str, float]:
    """Three figures that say how a distribution lies."""
    return {f"{at:.0%}": round(float(np.quantile(difficulty, at)), 4) for at in _QUANTILES}


def final_scale(recipe: DomainRecipe, task: DomainTask, base: DualEncoder) -> float:
    """The logit_scale of the trained model: the base's own unless the recipe gave or learned another."""
    objective = recipe.objective
    own = objective.logit_scale is None and not objective.learn_logit_scale
    return base.logit_scale if own else float(task.logit_scale.detach())


def remembered(
    recipe: DomainRecipe,
    method: Method,
    validation: ImageTextPairs,
    general: list[GeneralSet],
    before: dict[str, float],
    logit_scale: float,
) -> tuple[dict[str, Any], dict[float, dict[str, float]]]:
    """General scores before and after, and how they and the domain's change along `alpha`.

    Returns:
        these, and what validation says at each `alpha`.
    """
    pairs = RetrievalSet.of(validation)
    recalls: list[Recall] = []

    def domain(model: Encoder) -> float:
        recalls.append(retrieve(model, pairs).recall)
        return recalls[-1].i2t["R@1"]

    with method.at_alpha(1.0, logit_scale) as model:
        after = measure(model, general)
    with contextlib.ExitStack() as stack:

        def at(alpha: float) -> DualEncoder:
            stack.close()
            return stack.enter_context(method.at_alpha(alpha, logit_scale))

        points = alpha_curve(
            at,
            recipe.alphas,
            domain,
            lambda model: mean_score(measure(model, general)),
        )
    measured = {"general": {"before": before, "after": after, "forgetting": forgetting(before, after)}, "alpha": points}
    return measured, {alpha: figures(recall) for alpha, recall in zip(recipe.alphas, recalls, strict=True)}


def save(recipe: DomainRecipe, method: Method, pairs: DomainPairs, outcome: dict[str, Any]) -> None:
    """Write the adapted folder, or of a baseline the whole model."""
    metrics = {name: value for name, value in outcome["validation"].items() if name in ("top1", "mR")}
    if "general" in outcome:
        metrics["forgetting"] = outcome["general"]["forgetting"]["points"]
    if method.files is None:
        claim(recipe.out)
    method.base.name = portable(method.base.name)
    method.save(
        Path(recipe.out),
        outcome["logit_scale"],
        card=model_card(recipe, metrics, outcome),
        recipe=to_mapping(recipe),
        data={
            "digest": pairs.train.digest,
            "validation_pairs": len(pairs.validation),
            **{name: outcome[name] for name in ("pairs", "images", "captions", "counts")},
        },
        metrics=metrics,
    )
