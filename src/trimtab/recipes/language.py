"""The language link end to end: read top to bottom."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.adapters.cards import card_head, shown_name
from trimtab.adapters.files import BaseReference, StudentReference, save_adapter
from trimtab.adapters.language import LanguageAdapter, masked_mean
from trimtab.adapters.ridge import RidgeSums
from trimtab.config import LanguageData, LanguageRecipe, TextSource, to_mapping, to_yaml
from trimtab.controls import without_controls
from trimtab.data.cache import CachedArrays, PackedStates, cache_bytes_needed, cached_states, cached_vectors
from trimtab.data.cached import cached_count
from trimtab.data.parallel import ParallelText
from trimtab.data.sampling import draw_epoch, steps_per_epoch
from trimtab.errors import ModelError, RecipeError
from trimtab.evaluation.embedding import normalise
from trimtab.evaluation.matching import match_of_parts, mean_pairwise_cosine, translation_match
from trimtab.files import cache_home, digest_of
from trimtab.objectives.distillation import Standardiser
from trimtab.precision import fast_inference, resolved_precision, tune_allocator
from trimtab.recipes.estimates import about, room_on_disk
from trimtab.recipes.folders import check_out, recipe_digest, training_folder
from trimtab.recipes.sources import PREPARED, PreparedText, Words, drawing_probability, prepare, shown_source
from trimtab.scripts import is_latin
from trimtab.tasks.language import LanguageTask
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.hf import load_base, portable
from trimtab.towers.memory import PairMemory
from trimtab.towers.passes import Passes
from trimtab.towers.text_encoder import TextEncoder
from trimtab.training import distributed
from trimtab.training.checkpoint import CheckpointFolder
from trimtab.training.loop import train
from trimtab.training.run import Selection
from trimtab.training.trackers import progress_reporter

logger = logging.getLogger(__name__)

RIDGE = 1e-2
_SAMPLE = 30_000  # pairs from which the units of both ends are estimated
_STATE_NUMBERS = 250_000_000  # of token states, from which the student's units are estimated: 2 GB in float64
_BATCH = 1000  # pairs that are pooled at a time
_UNKNOWN_SHARE = 0.2
_LATIN_SHARE, _LATIN_NOTED = 0.3, 0.05
_NO_WORDS = Words(ParallelText.from_pairs([]))
_MEMORY_WEIGHTS = (16.0, 8.0, 4.0, 2.0, 1.0, 0.0)
_MEMORY_SHARPNESS = 18.0  # a word is drawn to its own meanings, and hardly to those of compounds that hold it
_MATCH_LOSS = 0.5  # points of validation match, on words that the memory does not hold, that it may cost


@dataclass(frozen=True)
class FrozenFeatures:
    """What the frozen towers say of the pairs, computed once.

    Attributes:
        states: the student's token states of the training targets, validation targets, validation English.
        teacher: (texts, D) the base's embeddings of the English texts.
        english: (pairs,) row in `teacher` of each training pair; `validation` and `words` the same for validation
            pairs and for the words of a memory, whose states follow those of the validation pairs.
        seconds: spent on encoding, near 0 when the cache had them.
    """

    states: PackedStates
    teacher: CachedArrays
    english: np.ndarray
    validation: np.ndarray
    words: np.ndarray
    seconds: float


def adapt_language(recipe: LanguageRecipe, *, dry_run: bool = False) -> dict[str, Any] | None:
    """Train a language adapter; see `trimtab.recipes.adapt.adapt`."""
    started = time.monotonic()
    tune_allocator()
    check_out(recipe.out)  # the user's mistakes first: no model is loaded before the data is known to be good
    text = prepare(recipe)
    warn_of_idle_weights(recipe.data, text.train)
    accelerator = distributed.make_accelerator()  # each process has a device of its own
    world = distributed.checked_world(accelerator, recipe.training.processes)
    device = str(world.device)
    base = load_base(recipe.base, device=device)
    student = TextEncoder.load(recipe.student.name, prefix=recipe.student.prefix, device=device)
    check_pairing(recipe, base, student, text.train)
    digest = digest_of(
        recipe_digest(recipe),
        text.train.digest,
        text.validation.digest,
        *base.digests,
        student.fingerprint,
        str(student.max_tokens),
    )
    CheckpointFolder(training_folder(recipe.out)).check(digest)
    torch.manual_seed(recipe.seed)
    adapter = LanguageAdapter(  # what is trained has no memory yet: what is kept there depends on it
        replace(recipe.adapter, memory=0),
        input_dim=student.hidden_size * len(recipe.student.layers),
        output_dim=base.embedding_dim,
    )
    if dry_run:
        if world.is_main:
            print(without_controls(plan(recipe, text, base, student, adapter)))
        return None

    frozen = encode(recipe, text, base, student)
    probability = drawing_probability(text.train, recipe.data)
    standardiser = start_adapter(adapter, frozen, probability, recipe)

    def lookup(indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        states, mask = frozen.states.rows(indices)
        teacher = frozen.teacher[frozen.english[indices]]
        return torch.from_numpy(states), torch.from_numpy(mask), torch.from_numpy(teacher)

    task = LanguageTask(adapter, standardiser, recipe.objective, lookup)
    pairs = recipe.data.epoch_pairs or len(text.train)
    result = train(
        task.step,
        task,
        lambda epoch: draw_epoch(
            probability,
            frozen.states.lengths[: len(text.train)],
            pairs=pairs,
            batch_size=recipe.training.batch_size,
            seed=recipe.seed,
            epoch=epoch,
        ),
        steps_per_epoch=steps_per_epoch(pairs, recipe.training.batch_size),
        settings=recipe.training,
        checkpoint_dir=training_folder(recipe.out),
        digest=digest,
        seed=recipe.seed,
        validate=lambda _: validate(task, frozen, text),
        # With few pairs nothing that is trained beats the closed form.
        select=Selection("match", with_start=recipe.adapter.init == "ridge"),
        run_config=to_mapping(recipe),
        accelerator=accelerator,
    )
    if not world.is_main:
        return None
    best = dict(result.best or {})
    if best.get("epoch", 0) < 0:
        logger.warning(
            "no epoch was better on validation than the start (match %.1f%%): the closed-form solution is kept, and "
            "training added nothing; give more pairs, or lower training.learning_rate",
            best["match"],
        )
    if text.words is not None:
        best |= remember(task, frozen, text)
    outcome = {
        "folder": recipe.out,
        "validation": best,
        "pairs": len(text.train),
        "counts": text.counts,
        "languages": text.train.language_counts(),
        "validation_languages": text.validation.language_counts(),
        "seconds": {
            "encoding": frozen.seconds,
            "training": result.seconds,
            "total": time.monotonic() - started,
        },
        "steps": result.steps,
        "history": result.history,
    }
    save(recipe, adapter, base, student, text, outcome)
    return outcome


def warn_of_idle_weights(data: LanguageData, train: ParallelText) -> None:
    """Say where the weight of a source changes nothing, as no other pairs of its language are there to be compared."""
    if data.phrases or data.templates:  # are such pairs
        return
    sources: dict[str, list[TextSource]] = {}
    for source in data.train:
        name, _, locale = source.path.partition(":")
        tag = re.split("[-_]", locale)[0] if name in PREPARED and locale else source.language
        sources.setdefault(tag.strip().replace("_", "-").lower(), []).append(source)
    if not {tag.lower() for tag in train.language_counts()} - {"en"} <= set(sources):
        return  # a file has a column of its own for them
    for tag, (first, *others) in sources.items():
        if not others and first.weight != 1 and first.path != "imagenet21k":  # English has other pairs
            logger.warning(
                "%s is the only source of its language (%s), so its weight=%g changes nothing: data.language_balance "
                "says how often languages are drawn",
                first.path,
                tag,
                first.weight,
            )


def check_pairing(recipe: LanguageRecipe, base: DualEncoder, student: TextEncoder, train: ParallelText) -> None:
    """Refuse a student that cannot read a target language or lacks a layer, and routing by script where scripts are the
    same.

    Raises:
        ModelError: naming base and student, or the layers that there are.
        RecipeError: naming the language.
    """
    student.states(["a"], recipe.student.layers)
    tokenizer = student.text_inputs.tokenizer
    by_language: dict[str, list[str]] = {}
    for target, language in zip(train.targets, train.languages, strict=True):
        by_language.setdefault(language, []).append(target)
    for language, targets in by_language.items():
        if language == "en":
            continue
        sample = targets[:: max(1, len(targets) // 500)]
        # Special tokens are left out: CLIP's unknown token is its end token, which every text has.
        ids = tokenizer(sample, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        unknown = float(np.mean([token == tokenizer.unk_token_id for one in ids for token in one] or [1.0]))
        if unknown > _UNKNOWN_SHARE:
            raise ModelError(
                f"student {student.name!r} does not know {unknown:.0%} of the tokens of the target texts "
                f"({language}), so it cannot teach base {base.name!r} this language: choose a student trained on it, "
                "or a multilingual one"
            )
        latin = float(np.mean([is_latin(text) for text in sample])) if recipe.english == "route" else 0.0
        if latin > _LATIN_SHARE:
            raise RecipeError(
                f"english=route tells English from the target language ({language}) by its script, but its texts are "
                "in Latin script too: set english=adapter (and data.english_share above 0, which keeps English)"
            )
        if latin > _LATIN_NOTED:
            logger.warning(
                "%.0f%% of the target texts (%s) are in Latin script: english=route sends such texts to the base's "
                "English tower, so what they teach is lost, though validation reads them through the adapter. If they "
                "are of another language, set english=adapter or leave them out",
                100 * latin, language,
            )  # fmt: skip


def encode(recipe: LanguageRecipe, text: PreparedText, base: DualEncoder, student: TextEncoder) -> FrozenFeatures:
    """Pass every text through the frozen towers once; those of any earlier run come from the cache."""
    started = time.monotonic()
    folder = cache_home() / "features"
    words = text.words or _NO_WORDS
    english, items = _to_encode(text)
    taught_by, read_by = _cache_keys(recipe, base, student)
    place = {sentence: i for i, sentence in enumerate(english)}

    def teach(texts: list[str]) -> np.ndarray:
        with fast_inference(base.device):
            return base.encode_text(texts)

    def read(texts: list[str]) -> list[np.ndarray]:
        with fast_inference(student.device):
            return student.token_states(texts, recipe.student.layers, batch_size=128)

    with progress_reporter("teacher") as report:
        teacher = cached_vectors(folder, taught_by, english, teach, progress=report)
    with progress_reporter("student") as report, student.one_encoding():
        states = cached_states(folder, read_by, items, read, progress=report)
    return FrozenFeatures(
        states,
        teacher,
        np.array([place[sentence] for sentence in text.train.english]),
        np.array([place[sentence] for sentence in text.validation.english]),
        np.array([place[sentence] for sentence in words.pairs.english], dtype=np.int64),
        time.monotonic() - started,
    )


def _to_encode(text: PreparedText) -> tuple[list[str], list[str]]:
    """Different texts for the teacher; and those for the student, in the order of `FrozenFeatures.states`."""
    words = text.words or _NO_WORDS
    english = list(dict.fromkeys([*text.train.english, *text.validation.english, *words.pairs.english]))
    read = [*text.train.targets, *text.validation.targets, *text.validation.english]
    return english, [*read, *words.pairs.targets, *words.variants]


def _cache_keys(
    recipe: LanguageRecipe, base: DualEncoder, student: TextEncoder
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What names the caches of the teacher and of the student."""
    precision = resolved_precision("auto", base.device)
    layers = ",".join(map(str, recipe.student.layers))
    return (
        ("teacher", base.fingerprint, base.text_input_digest, precision),
        ("student", student.fingerprint, student.prefix, layers, str(student.max_tokens), precision),
    )


@torch.no_grad()
def start_adapter(
    adapter: LanguageAdapter, frozen: FrozenFeatures, probability: np.ndarray, recipe: LanguageRecipe
) -> Standardiser:
    """Fix the adapter's units from a sample of pairs and, with `init=ridge`, solve its linear path on all of them."""
    rng = np.random.default_rng(recipe.seed)
    sample = rng.choice(len(probability), size=min(_SAMPLE, 4 * len(probability)), p=probability)
    teacher = torch.from_numpy(frozen.teacher[frozen.english[sample]].astype(np.float32))
    adapter.set_statistics(some_states(frozen.states, sample[:5000]), teacher)
    if recipe.adapter.init == "ridge":
        sums = RidgeSums(len(adapter.input_mean), len(adapter.output_mean))
        # Texts of like length together need little padding; the sums do not depend on the order.
        order = np.argsort(frozen.states.lengths[: len(probability)], kind="stable")
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            states, mask = frozen.states.rows(rows)
            pooled = masked_mean(torch.from_numpy(states).float(), torch.from_numpy(mask))
            targets = torch.from_numpy(frozen.teacher[frozen.english[rows]].astype(np.float32))
            adapter.add_to(sums, pooled, targets, torch.from_numpy(probability[rows]))
        adapter.set_linear(sums, ridge=RIDGE)
    return Standardiser.fit(teacher)


def some_states(states: PackedStates, sample: np.ndarray) -> Tensor:
    """Token states (N, H) float64 of the sample's first texts, as many as memory bears: wide students of long texts
    have a thousand times the numbers of short words."""
    numbers = np.cumsum(states.lengths[sample]) * states.dim
    count = max(1, int(np.searchsorted(numbers, _STATE_NUMBERS, side="right")))
    # Widened here, as the statistics are taken in float64 anyway: another copy would be the largest thing in memory.
    return torch.from_numpy(np.concatenate([states[i] for i in sample[:count]])).double()


def validate(task: LanguageTask, frozen: FrozenFeatures, text: PreparedText) -> dict[str, float]:
    """Translation match of both languages on pairs that no training saw, and the collapse measure.

    Of several target languages `match` is the mean of what each has (`match_de` ...): none is too small to count.
    """
    first, count = len(text.train), len(text.validation)
    target = _features(task, frozen.states, np.arange(first, first + count))
    english = _features(task, frozen.states, np.arange(first + count, first + 2 * count))
    teacher = frozen.teacher[frozen.validation].astype(np.float32)
    groups = frozen.validation
    languages = np.asarray(text.validation.languages, dtype=object)
    of = {f"match_{name}": languages == name for name in text.validation.language_counts()}
    matches = {name: one.accuracy for name, one in match_of_parts(target, teacher, of, groups=groups).items()}
    return {
        "match": float(np.mean(list(matches.values()))),
        **(matches if len(matches) > 1 else {}),
        "english_match": translation_match(english, teacher, groups=groups).accuracy,
        "cosine": float(np.mean(np.sum(normalise(target) * normalise(teacher), axis=1))),
        "collapse": narrowing(mean_pairwise_cosine(target), mean_pairwise_cosine(teacher)),
    }


@torch.no_grad()
def remember(task: LanguageTask, frozen: FrozenFeatures, text: PreparedText) -> dict[str, float]:
    """Give the trained adapter its translation memory, as strong as new words bear; what validation says of it."""
    assert text.words is not None
    adapter, words = task.adapter, text.words
    first, rows = len(text.train) + 2 * len(text.validation), len(words.pairs)
    _, starts, word = np.unique(words.pairs.targets, return_index=True, return_inverse=True)
    count = len(starts)
    keys = torch.from_numpy(_features(task, frozen.states, first + starts))
    variants = None
    if words.templates:
        more = np.arange(first + rows, first + rows + len(words.variants))
        variants = torch.from_numpy(_features(task, frozen.states, more)).unflatten(0, (-1, words.templates))
    meanings = normalise(frozen.teacher[frozen.words].astype(np.float32)) * words.pairs.weights[:, None]
    values = np.zeros((count, meanings.shape[1]), np.float32)
    np.add.at(values, word, meanings)
    memory = PairMemory(count, len(adapter.output_mean))
    memory.fill(keys, torch.from_numpy(values), variants)
    memory.sharpness.fill_(_MEMORY_SHARPNESS)
    alone = validate(task, frozen, text)["match"]
    adapter.memory = memory.to(task.device)
    for weight in _MEMORY_WEIGHTS:
        memory.weight.fill_(weight)
        found = validate(task, frozen, text)
        if found["match"] >= alone - _MATCH_LOSS:
            break
    if weight:
        adapter.config = replace(adapter.config, memory=count)
    else:  # it would take room and time, and change nothing
        adapter.memory = None
    return {**found, "match_without_memory": alone, "memory_weight": weight}


def narrowing(student: float, teacher: float) -> float:
    """How far a student's mean pairwise cosine has gone from its teacher's (0) towards a constant output (1)."""
    return max(0.0, (student - teacher) / max(1 - teacher, 1e-6))


def _features(task: LanguageTask, states: PackedStates, rows: np.ndarray) -> np.ndarray:
    def run(span: slice) -> np.ndarray:
        values, mask = states.rows(rows[span])
        return task.features(torch.from_numpy(values), torch.from_numpy(mask))

    return np.concatenate(Passes(500).of(run, len(rows)))


def plan(
    recipe: LanguageRecipe, text: PreparedText, base: DualEncoder, student: TextEncoder, adapter: LanguageAdapter
) -> str:
    """What a run would do: resolved recipe, parameters, cache, and time measured on a few hundred texts."""
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    frozen = sum(p.numel() for model in (base.model, student.model) for p in model.parameters())
    english, read = _to_encode(text)
    targets = list(dict.fromkeys(read))
    sample, sample_english = targets[:: max(1, len(targets) // 256)], english[:: max(1, len(english) // 256)]
    with fast_inference(student.device):
        states = student.token_states(sample, recipe.student.layers)
        student_rate = _best_rate(sample, lambda some: student.token_states(some, recipe.student.layers))
    with fast_inference(base.device):
        teacher_rate = _best_rate(sample_english, base.encode_text)
    width = states[0].shape[1]
    batch = [torch.from_numpy(one) for one in states[: recipe.training.batch_size]]
    adapter.to(base.device)

    def step(some: list[Tensor]) -> None:
        padded = torch.nn.utils.rnn.pad_sequence(some, batch_first=True).to(base.device)
        mask = torch.ones(padded.shape[:2], dtype=torch.bool, device=base.device)
        with fast_inference(base.device):
            adapter(padded, mask).sum().backward()
        if base.device.type != "cpu":
            torch.accelerator.synchronize()  # a GPU is asked and does the work later

    adapter_rate = _best_rate(batch, step)
    adapter.zero_grad(set_to_none=True)
    tokens = float(np.mean([len(one) for one in states]))
    folder = cache_home() / "features"
    taught_by, read_by = _cache_keys(recipe, base, student)
    new_targets = len(targets) - cached_count(folder, "states", read_by, targets)
    new_english = len(english) - cached_count(folder, "arrays", taught_by, english)

    def cache_bytes(targets: int, english: int) -> int:
        read = cache_bytes_needed(targets, width, tokens_per_item=tokens)
        return read + cache_bytes_needed(english, base.embedding_dim)

    size, missing = cache_bytes(len(targets), len(english)), cache_bytes(new_targets, new_english)
    there = f", {(size - missing) / 1e9:.2f} GB of it are there" if missing < size else ""
    pairs = recipe.data.epoch_pairs or len(text.train)
    encoding = about(new_targets / student_rate + new_english / teacher_rate) + " to encode once"
    training = recipe.training.epochs * pairs / adapter_rate
    return "\n".join(
        [
            to_yaml(recipe).rstrip(),
            "",
            f"pairs        {len(text.train):,} to train on, {len(text.validation):,} for validation",
            f"parameters   {trained:,} trained, {frozen:,} frozen",
            f"cache        {size / 1e9:.2f} GB in {folder}{there}",
            f"free         {room_on_disk(folder, missing)} on its disk",
            f"time         {encoding if missing else 'all is cached'}, {about(training)} to train "
            f"({recipe.training.epochs} epochs of {pairs:,} pairs)",
        ]
    )


def _best_rate(items: list[Any], run: Callable[[list[Any]], Any], repeats: int = 3) -> float:
    """Items per second in the fastest of several runs: what else the machine does can only slow a run down."""
    best = math.inf
    for _ in range(repeats):
        clock = time.monotonic()
        run(items)
        best = min(best, time.monotonic() - clock)
    return len(items) / max(best, 1e-9)


def save(
    recipe: LanguageRecipe,
    adapter: LanguageAdapter,
    base: DualEncoder,
    student: TextEncoder,
    text: PreparedText,
    outcome: dict[str, Any],
) -> None:
    """Write the adapted folder."""
    languages = [language for language in outcome["languages"] if language != "en"]
    reference = replace(BaseReference.of(base), name=portable(base.name))
    metrics = {k: v for k, v in outcome["validation"].items() if k not in ("kind", "step", "epoch")}
    save_adapter(
        recipe.out,
        link="language",
        tensors=adapter.state_dict(),
        config={
            "adapter": to_mapping(adapter.config),
            "input_dim": len(adapter.input_mean),
            "output_dim": len(adapter.output_mean),
            "english": recipe.english,
        },
        base=reference,
        student=StudentReference(
            portable(student.name),
            student.fingerprint,
            student.prefix,
            tuple(recipe.student.layers),
            student.max_tokens,
        ),
        tokenizer={"class": type(student.text_inputs.tokenizer).__name__, "max_tokens": student.max_tokens},
        recipe=to_mapping(recipe),
        data={
            "digest": text.train.digest,
            "pairs": len(text.train),
            "validation_pairs": len(text.validation),
            "languages": outcome["languages"],
            "validation_languages": outcome["validation_languages"],
            "counts": text.counts,
        },
        metrics=metrics,
        card=model_card(recipe, languages, metrics, outcome),
    )


def model_card(recipe: LanguageRecipe, languages: list[str], metrics: dict[str, float], outcome: dict[str, Any]) -> str:
    """What a reader of the folder wants to know first."""
    name = Path(recipe.out).name
    figures = "\n".join(f"| {key} | {value:.3g} |" for key, value in metrics.items())
    head = card_head(
        ["clip", "multilingual", "adapter"],
        models=[recipe.base, recipe.student.name],
        languages=[*languages, "en"],
    )
    return f"""{head}
# {name}

A language adapter: it lets the frozen base `{shown_name(recipe.base)}` read {", ".join(languages)} through the frozen
text encoder `{shown_name(recipe.student.name)}`. It was trained on {outcome["pairs"]:,} pairs of parallel text and
saw no image. This folder holds the adapter alone; base and student are loaded from their own places and checked by
fingerprint.

```python
import trimtab
model = trimtab.load("{name}")
model.similarity(["picture.jpg"], ["..."])
```

English is {"sent to the base's own text tower" if recipe.english == "route" else "read by the adapter as well"}.

## Validation ({outcome["steps"]} steps, seed {recipe.seed})

| figure | value |
|---|---|
{figures}

`match` is translation match in percent: how often a sentence's vector is nearest to that of its translation among the
validation pairs, mean of both directions{_counted(outcome.get("validation_languages", {}))}. These are not retrieval
figures.

## Sources

{_sources(recipe)}

If you pass this folder on, look at their licences and name those that ask for it.

## Limits

The adapter knows the words and kinds of sentence it was trained on, and the base's own limits remain. Check it on your
own data with `trimtab evaluate` before you rely on it.
"""


def _sources(recipe: LanguageRecipe) -> str:
    """Lines for the card."""
    names = dict.fromkeys(source.path for source in (*recipe.data.train, *recipe.data.validation))
    return "\n".join(f"- {shown_source(name)}" for name in names)


def _counted(languages: dict[str, int]) -> str:
    """Of several languages, the validation pairs of each, for the card."""
    if len(languages) < 2:
        return ""
    counts = ", ".join(f"{name} {count:,}" for name, count in languages.items())
    return f"; of several languages the mean (validation pairs: {counts})"
