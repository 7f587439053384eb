"""Evaluate a model on a manifest: read and check, encode, score, write JSON and a report."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from trimtab import __version__
from trimtab.data.labelled import LabelledPictures
from trimtab.data.manifests import (
    LabelledImage,
    RetrievalPairs,
    read_class_names,
    read_classification,
    read_retrieval,
)
from trimtab.data.shards import PictureFile
from trimtab.data.shots import warn_of_copies
from trimtab.data.templates import fill_all
from trimtab.errors import DataError, TrimtabError
from trimtab.evaluation import (
    ClassificationResult,
    Hubness,
    Report,
    RetrievalResult,
    classify,
    classify_with,
    retrieve,
    write_report,
)
from trimtab.evaluation.blocks import (
    BarPanel,
    Bars,
    Block,
    Column,
    Details,
    GridImage,
    GridQuery,
    ImageGrid,
    Table,
    TableRow,
    Tile,
)
from trimtab.evaluation.summaries import class_errors, reproducibility, skipped_images
from trimtab.files import digest_of, explain_disk_errors, followed, is_special, sha256_of, write_json

if TYPE_CHECKING:
    from trimtab.adapters.prompted import PromptClassifier
    from trimtab.towers.dual_encoder import DualEncoder

logger = logging.getLogger(__name__)

Model: TypeAlias = "str | Path | DualEncoder"

_LISTED = 20
_MOST_ROWS = 200
_GRID_ROWS, _GRID_IMAGES = 8, 6


def evaluate_classification(
    model: Model,
    items: str | Path,
    classes: str | Path | Sequence[str],
    *,
    templates: Sequence[str] | None = None,
    root: str | Path | None = None,
    json_path: str | Path | None = None,
    report: str | Path | None = None,
    device: str = "auto",
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, Any]:
    """Classification of a manifest's pictures: zero-shot, or as learned prompts score them where the model has any.

    Args:
        model: what `trimtab.load` takes, or what it returned.
        items: manifest with the columns ``image`` and ``label``.
        classes: file with one class name per line, or the names.
        templates: sentences with one ``{}``, which replace prompts; None takes the model's prompts, or without any
            takes `DualEncoder.default_templates`, by the script of the names.
        root: folder of the pictures; the manifest's own by default.
        json_path: where to write the result as well.
        report: folder for ``report.html`` and ``report.md``.
        device: for a model that is loaded here.
        batch_size: images per forward pass.
        progress: show bars.

    Returns:
        ``top1``, ``top5`` in percent, ``n``, the templates used (none behind prompts: ``templates_for`` is then
        ``prompts``), classes, confusions, skipped pictures, and what was measured on what (fingerprint of the model,
        digests of the files); exactly what the JSON holds.

    Raises:
        DataError: manifest or class names cannot be used, or no picture can be read.
        RecipeError: a template without exactly one ``{}``.
        ModelError: the model cannot be used.
    """
    _check_targets(json_path, report, [items, *([classes] if isinstance(classes, (str, Path)) else [])])
    names = read_class_names(classes) if isinstance(classes, (str, Path)) else list(classes)
    if templates is not None:
        fill_all(templates, ["name"])  # refuses templates that cannot be filled, before the model is loaded
    labelled = read_classification(items, names, root)
    encoder = _InBatches.of(model, device, batch_size)
    start = time.perf_counter()
    origin, chosen = encoder.model.default_templates(names) if templates is None else ("given", list(templates))
    prompts = _prompts(encoder.model, names) if templates is None else None
    if prompts is None:
        result = classify(encoder, labelled, names, chosen, progress=progress)
    else:
        origin = "prompts"
        result = classify_with(prompts, labelled, batch_size=batch_size, progress=progress)
    _warn_of_copies(labelled, {item.source for item in result.skipped}, names)
    figures = _relative(result.as_json(), items, root)
    outcome = {
        "task": "classification",
        **{key: figures.pop(key) for key in ("top1", "top5", "n", "n_classes", "mean_per_class", "templates")},
        "templates_for": origin,
        **_provenance(encoder, items, start),
        "classes_digest": digest_of(*names),
        **figures,
    }
    headline = ("top1", "top5", "n")
    _publish(outcome, headline, json_path, report, lambda: _classification_report(result, outcome))
    return outcome


def evaluate_retrieval(
    model: Model,
    pairs: str | Path,
    *,
    root: str | Path | None = None,
    hubness: Hubness = "none",
    json_path: str | Path | None = None,
    report: str | Path | None = None,
    device: str = "auto",
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, Any]:
    """Image-text retrieval on a manifest with the columns ``image`` and ``text``.

    Several texts of an image and several images of a text all count as right.

    Args:
        hubness: "csls" or "dual_softmax" correct for candidates that are near everything; they look at all
            queries at once, so such figures are transductive, and the result names the correction.

    The other arguments are those of `evaluate_classification`.

    Returns:
        ``mR``, ``i2t`` and ``t2i`` (each ``R@1``, ``R@5``, ``R@10``) in percent, ``n_images``, ``n_texts``,
        skipped pictures, and what was measured on what; exactly what the JSON holds.

    Raises:
        DataError: the manifest cannot be used, or no picture can be read.
        ModelError: the model cannot be used.
    """
    _check_targets(json_path, report, [pairs])
    read = read_retrieval(pairs, root)
    encoder = _InBatches.of(model, device, batch_size)
    start = time.perf_counter()
    result = retrieve(encoder, read, hubness=hubness, progress=progress, warn=True)
    figures = _relative(result.as_json(), pairs, root)
    outcome = {
        "task": "retrieval",
        **{key: figures.pop(key) for key in ("mR", "i2t", "t2i", "n_images", "n_texts", "hubness")},
        **_provenance(encoder, pairs, start),
        **figures,
    }
    headline = ("mR", "i2t", "t2i", "n_images", "n_texts")
    _publish(outcome, headline, json_path, report, lambda: _retrieval_report(result, outcome, read))
    return outcome


@dataclass
class _InBatches:
    """The encoder that evaluation asks for, with the user's batch size."""

    model: DualEncoder
    batch_size: int
    last_skipped: Any = ()

    @classmethod
    def of(cls, model: Model, device: str, batch_size: int) -> _InBatches:
        if isinstance(model, (str, Path)):
            from trimtab.adapters.adapted import load  # late: manifests are checked before torch is waited for

            model = load(model, device=device)
        return cls(model, batch_size)

    @property
    def logit_scale(self) -> float:
        return self.model.logit_scale

    def encode_image(self, images: Any, *, on_error: Any = "raise", progress: bool = False) -> np.ndarray:
        found = self.model.encode_image(images, batch_size=self.batch_size, on_error=on_error, progress=progress)
        self.last_skipped = self.model.last_skipped
        return found

    def encode_text(self, texts: Any, *, progress: bool = False) -> np.ndarray:
        return self.model.encode_text(texts, progress=progress)


def _warn_of_copies(items: Sequence[LabelledImage], skipped: Collection[str], names: Sequence[str]) -> None:
    read = [item for item in items if str(item.path) not in skipped]
    pictures = tuple(PictureFile(item.path, item.path.name) for item in read)
    with contextlib.suppress(DataError):  # a picture that has gone meanwhile must not cost the figures
        warn_of_copies(LabelledPictures(pictures, np.array([item.label for item in read]), tuple(names)), name="test")


def _prompts(model: DualEncoder, names: Sequence[str]) -> PromptClassifier | None:
    """The model's own classifier for these names; None where it has no prompts, or none that score any of them."""
    if getattr(model, "prompt", None) is None:
        return None
    from trimtab.adapters.prompted import PromptClassifier

    classifier = model.classifier(names)
    prompted: Any = model  # or composed with such
    if others := [name for name in names if prompted.trained_name(name) is None]:
        logger.warning(
            "%d of %d classes are none of those that the prompts were trained on, %r for one: the name is all that is "
            "known of them",
            len(others), len(names), others[0],
        )  # fmt: skip
    return classifier if isinstance(classifier, PromptClassifier) else None


def _provenance(encoder: _InBatches, manifest: str | Path, start: float) -> dict[str, Any]:
    return {
        "model": encoder.model.name,
        "fingerprint": encoder.model.fingerprint,
        "version": __version__,
        "seconds": round(time.perf_counter() - start, 3),
        "manifest": str(manifest),
        "manifest_sha256": sha256_of(manifest),
    }


def _relative(figures: dict[str, Any], manifest: str | Path, root: str | Path | None) -> dict[str, Any]:
    """The figures with pictures named as in the manifest rather than by their place on this machine."""
    base = (Path(manifest).parent if root is None else Path(root)).resolve()
    for entries, key in ((figures.get("mistakes", ()), "image"), (figures["skipped"], "source")):
        for entry in entries:
            entry[key] = os.path.relpath(entry[key], base)
    return figures


# Writing


def _check_targets(json_path: str | Path | None, report: str | Path | None, inputs: Sequence[str | Path]) -> None:
    """Find out before the work, not after it, that its result has no place, or only that of a file that is read."""
    files = [Path(json_path)] if json_path is not None else []
    files += [Path(report, name) for name in ("report.html", "report.md")] if report is not None else []
    for file in files:
        with explain_disk_errors(file), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            file.stat()
            if any(file.samefile(path) for path in inputs if Path(path).exists()):
                raise TrimtabError(f"cannot write {file}: it is a file that this evaluation reads; name another")
    folders: list[Path] = []
    if json_path is not None and not is_special(Path(json_path)):
        if Path(json_path).is_dir():
            raise TrimtabError(f"cannot write {json_path}: it is a folder; name a file in it")
        folders.append(followed(Path(json_path)).parent)
    for folder in [*folders, Path(report)] if report is not None else folders:
        try:
            with explain_disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # special file systems, such as /proc, hold no folders of ours
            raise TrimtabError(f"cannot write into {folder}: no folder can be made there; choose another") from error
        if not os.access(folder, os.W_OK):
            raise TrimtabError(f"cannot write into {folder}: permission denied: choose a folder that you may write to")


def _publish(
    outcome: Mapping[str, Any],
    headline: Sequence[str],
    json_path: str | Path | None,
    report: str | Path | None,
    make_report: Callable[[], Report],
) -> None:
    try:
        if json_path is not None:
            write_json(json_path, outcome)
        if report is not None:
            write_report(report, make_report())
    except TrimtabError as error:
        figures = json.dumps({key: outcome[key] for key in headline})
        raise TrimtabError(f"{error}. The evaluation itself is done: {figures}") from error


# Reports


def _classification_report(result: ClassificationResult, outcome: Mapping[str, Any]) -> Report:
    prompted = outcome["templates_for"] == "prompts"
    measure = "score" if prompted else "cosine"
    confusions = Table(
        [Column("Class", numeric=False), Column("Taken for", numeric=False), Column("Times")],
        [TableRow([cell["class"], cell["taken_for"], cell["count"]]) for cell in outcome["confusions"][:_LISTED]],
        title="Most frequent confusions",
    )
    together: dict[tuple[str, str], list[GridImage]] = {}
    for mistake in result.mistakes:
        found = together.setdefault((mistake.true, mistake.predicted), [])
        found.append(GridImage(mistake.source, f"{Path(mistake.source).name}, by {mistake.margin:.3f}"))
    largest = sorted(together.items(), key=lambda entry: -len(entry[1]))[:_GRID_ROWS]
    grid = ImageGrid(
        [GridQuery(true, images[:_GRID_IMAGES], meaning=f"taken for {taken}") for (true, taken), images in largest],
        title="Confident mistakes",
        note=f"Below each picture, how far the wrong class lies above the right one in {measure}.",
    )
    sections: list[Block] = [class_errors(outcome, result.confusions())]
    if outcome["confusions"]:
        sections += [confusions, grid]
    if not prompted:
        sections.append(Details("Templates", [Table([Column("Template", numeric=False)], _rows(result.templates))]))
    return _report(
        "Classification by prompts" if prompted else "Zero-shot classification",
        f"{result.top1:.1f}% of {result.n:,} pictures get their own class among {result.n_classes:,}.",
        [
            Tile("Top-1", result.top1, "%", tone="good"),
            Tile("Top-5", result.top5, "%"),
            Tile("Mean over classes", result.mean_per_class, "%"),
            Tile("Pictures", result.n, note=f"{len(result.skipped)} left out"),
        ],
        sections,
        outcome,
    )


def _retrieval_report(result: RetrievalResult, outcome: Mapping[str, Any], pairs: RetrievalPairs) -> Report:
    ks = list(result.recall.t2i)
    recalls = [[ways[k] for k in ks] for ways in (result.recall.t2i, result.recall.i2t)]
    last = np.argsort(-result.text_ranks, kind="stable")[:_LISTED]
    hardest = [
        TableRow([pairs.texts[result.text_positions[at]], int(result.text_ranks[at])])
        for at in last
        if result.text_ranks[at] > 1
    ]
    sections: list[Block] = [
        Bars(["Text finds image", "Image finds text"], [BarPanel(ks, recalls)], title="Recall", maximum=100, unit="%"),
        Table(
            [Column("Text", numeric=False), Column("Rank of its picture")],
            hardest,
            title="Texts that find their picture last",
        ),
    ]
    if result.lost_texts:
        beyond = len(result.lost_texts) - _MOST_ROWS
        note = f"and {beyond:,} more" if beyond > 0 else ""
        lost = Table([Column("Text", numeric=False)], _rows(result.lost_texts), note=note)
        sections.append(Details(f"Texts left out with their pictures: {len(result.lost_texts)}", [lost]))
    corrected = "" if result.hubness == "none" else f" (transductive: corrected by {result.hubness})"
    return _report(
        "Image-text retrieval",
        f"Mean recall {result.mR:.1f}% among {result.n_images:,} pictures and {result.n_texts:,} texts{corrected}.",
        [
            Tile("mR", result.mR, "%", tone="good"),
            Tile("Text finds image", result.recall.t2i["R@1"], "%", note="R@1"),
            Tile("Image finds text", result.recall.i2t["R@1"], "%", note="R@1"),
            Tile("Pictures", result.n_images, note=f"{len(result.skipped)} left out"),
        ],
        sections,
        outcome,
    )


def _report(
    title: str, verdict: str, tiles: Sequence[Tile], sections: list[Block], outcome: Mapping[str, Any]
) -> Report:
    if (left_out := skipped_images(outcome["skipped"])) is not None:
        sections.append(left_out)
    facts = ("model", "fingerprint", "manifest", "manifest_sha256", "classes_digest", "hubness", "seconds", "version")
    sections.append(reproducibility([(key.replace("_", " "), outcome[key]) for key in facts if key in outcome]))
    return Report(title, verdict, tiles, sections, context=outcome["model"], footer=f"trimtab {__version__}")


def _rows(texts: Sequence[str]) -> list[TableRow]:
    return [TableRow([text]) for text in texts[:_MOST_ROWS]]
