"""Runs from wherever they left their results: adapted folders, training folders, result files."""

from __future__ import annotations

import contextlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import trimtab
from trimtab.adapters.files import COMPOSED_FILE, DESCRIPTION_FILE, TENSORS_FILE, read_adapter
from trimtab.errors import DataError, TrimtabError
from trimtab.evaluation.blocks import Value
from trimtab.evaluation.escape import shortened
from trimtab.evaluation.report import render_html
from trimtab.evaluation.side_by_side import FIGURES, RunResult, Score, side_by_side
from trimtab.evaluation.summaries import five_row_labels
from trimtab.files import digest_of, write_text
from trimtab.recipes.folders import training_folder

TRAINING = ".training"
RESULTS_FILE = "results.json"
# What a run is about, where a result file compares it with others.
_MAIN_ROWS = ("adapted_target", "adapter_hard", "adapter", "prompt", "structured")
_LARGEST = 256 << 20  # bytes of a result file
_SHOWN = 80  # letters of templates in a row


def report_runs(paths: Sequence[str | Path], out: str | Path) -> dict[str, Any]:
    """Write the page; runs that cannot be read are named on it and left out.

    Args:
        paths: adapted or composed folders, their training folders, folders with a ``results.json``, such files,
            the JSON of `trimtab evaluate`, and JSON lines of few-shot runs.
        out: an HTML file.

    Returns:
        the file, the names of the runs, and what could not be read.

    Raises:
        TrimtabError: no path is a run, or `out` cannot be written.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise DataError(f"--out {out} must be an .html file")
    if not paths:
        raise DataError("name at least one run: an adapted folder or a file of results")
    runs, unreadable = read_runs(paths)
    if not runs:
        lines = "\n".join(f"  {path}: {reason}" for path, reason in unreadable)
        raise DataError(f"none of these is a run that can be read:\n{lines}")
    page = render_html(side_by_side(runs, unreadable, footer=f"trimtab {trimtab.__version__}"))
    write_text(out, page)
    return {"report": str(out), "runs": [run.name for run in runs], "unreadable": [path for path, _ in unreadable]}


def read_runs(paths: Sequence[str | Path]) -> tuple[list[RunResult], list[tuple[str, str]]]:
    """All runs that can be read, and the paths of the others with the reasons."""
    runs, unreadable = [], []
    seen: set[Path] = set()
    for path, name in zip(map(Path, paths), short_names(paths), strict=True):
        try:
            place = _owner(path)
            if place.resolve() in seen:
                continue
            seen.add(place.resolve())
            runs.append(read_run(place, name))
        except (TrimtabError, OSError) as error:
            unreadable.append((str(path), str(error)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # Files of other programs, or of other versions: one must not cost the page.
            unreadable.append((str(path), f"is not what trimtab writes ({type(error).__name__}: {error})"))
    return _tell_templates_apart(_tell_test_sets_apart(runs)), unreadable


def _tell_test_sets_apart(runs: Sequence[RunResult]) -> list[RunResult]:
    """Test sets of one name, as of two files ``test.csv``, with what they differ in behind it."""
    found: dict[tuple[str, str], set[tuple[str, ...]]] = {}
    for run in runs:
        if run.test_set:
            found.setdefault((run.scores[0].dataset, run.scores[0].metric), set()).add(run.test_set)
    named = []
    for run in runs:
        if run.test_set and len(others := found[run.scores[0].dataset, run.scores[0].metric]) > 1:
            differing = [one for one, *rest in zip(run.test_set, *others, strict=True) if len(set(rest)) > 1]
            name = f"{run.scores[0].dataset} ({'; '.join(differing)})"
            run = replace(run, scores=[replace(score, dataset=name) for score in run.scores])
        named.append(run)
    return named


def _tell_templates_apart(runs: Sequence[RunResult]) -> list[RunResult]:
    """Evaluations on one test set whose class names stood in other sentences, with these in their rows."""
    found: dict[str, set[str]] = {}
    for run in runs:
        if run.templates and run.scores:
            found.setdefault(run.scores[0].dataset, set()).add(run.templates)
    named = []
    for run in runs:
        if run.templates and run.scores and len(found[run.scores[0].dataset]) > 1:
            row = f"model, templates: {shortened(run.templates, _SHOWN)}"
            run = replace(run, scores=[replace(score, row=row) for score in run.scores])
        named.append(run)
    return named


def read_run(path: Path, name: str) -> RunResult:
    """One run.

    Raises:
        TrimtabError: no run, or a damaged one.
    """
    if not path.exists():
        raise DataError("no such file or folder")
    if path.is_dir():
        if (path / DESCRIPTION_FILE).is_file():
            return _adapted(path, name)
        if (path / COMPOSED_FILE).is_file():
            return _composed(path, name)
        if (path / RESULTS_FILE).is_file():
            return _results(_json(path / RESULTS_FILE), path, name)
        if path.name.endswith(TRAINING):
            return _unfinished(path, name)
        raise DataError(f"holds neither {DESCRIPTION_FILE} nor {RESULTS_FILE}")
    if path.suffix == ".jsonl":
        return _few_shot(path, name)
    return _results(_json(path), path, name)


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """The last part of each path, or as many as it takes to tell them apart."""
    parts = [[part for part in Path(path).parts if part not in ("/", "..")] or ["."] for path in paths]
    parts = [[*one[:-1], one[-1].removesuffix(TRAINING)] for one in parts]
    names = [one[-1] for one in parts]
    for depth in range(2, 1 + max(map(len, parts), default=0)):
        twice = {name for name in names if names.count(name) > 1}
        names = ["/".join(one[-depth:]) if name in twice else name for one, name in zip(parts, names)]
    return names


def _owner(path: Path) -> Path:
    """The adapted folder that a training folder stands beside, or the path itself."""
    if path.name.endswith(TRAINING):
        beside = path.with_name(path.name.removesuffix(TRAINING))
        if (beside / DESCRIPTION_FILE).is_file():
            return beside
    return path


def _adapted(folder: Path, name: str) -> RunResult:
    described = read_adapter(folder, tensors=False)
    data, recipe = described.data, described.recipe
    facts: list[tuple[str, Value]] = [
        ("folder", str(folder)),
        ("base", f"{described.base.name}, {described.base.fingerprint[:16]}"),
        *([("student", described.student.name)] if described.student else []),
        ("size on disk, MB", round((folder / TENSORS_FILE).stat().st_size / 1e6, 1)),
        *((key, value) for key, value in data.items() if isinstance(value, int)),
        *(("with " + key, value) for key, value in described.versions.items()),
    ]
    return RunResult(
        name,
        f"{described.link} link",
        base=described.base.name,
        figures=_known(described.metrics),
        history=history_of(training_folder(str(folder))),
        recipe=recipe,
        recipe_text=_yaml(recipe),
        data_digest=str(data.get("digest") or ""),
        facts=facts,
    )


def _composed(folder: Path, name: str) -> RunResult:
    about = _json(folder / COMPOSED_FILE)
    links = list(map(str, about["links"]))
    parts = {link: read_adapter(folder / link, tensors=False) for link in links}
    # Prompts come last, and do not hide what the domain has.
    figures = {key: value for link in reversed(links) for key, value in _known(parts[link].metrics).items()}
    facts = [("folder", str(folder)), *((link, f"trained on {part.base.name}") for link, part in parts.items())]
    kind = f"composed: {' + '.join(links)}"
    return RunResult(name, kind, base=str(about["base"]["name"]), figures=figures, facts=facts)


def _unfinished(folder: Path, name: str) -> RunResult:
    history = history_of(folder)
    if not history:
        raise DataError("is a training folder without a checkpoint that can be read")
    validations = [record for record in history if record.get("kind") == "validation"]
    figures = _known(validations[-1]) if validations else {}
    return RunResult(name, "not finished", figures=figures, history=history, facts=[("folder", str(folder))])


def history_of(folder: Path) -> list[dict[str, Any]]:
    """The records of training that the newest readable checkpoint carries; none where there is none."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        with contextlib.suppress(SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError):
            with safe_open(path, framework="numpy") as file:  # the head alone
                state = json.loads((file.metadata() or {})["document"])
            return [dict(record) for record in state["history"]]
    return []


def _results(found: Any, path: Path, name: str) -> RunResult:
    """A result file by what it holds: of `trimtab evaluate`, or of a run that measured itself."""
    if not isinstance(found, dict):
        raise DataError("is JSON, but no results")
    if found.get("task") in ("classification", "retrieval"):
        metrics = {key: found[key] for key in FIGURES if key in found}
        dataset = Path(str(found.get("manifest") or found.get("dataset") or "test set")).stem
        if (hubness := str(found.get("hubness") or "none")) != "none":
            dataset = f"{dataset} (transductive: {hubness})"
        scores = [Score(dataset, "model", key, float(value)) for key, value in metrics.items()]
        facts = [(key, value) for key, value in found.items() if isinstance(value, (str, int, float))]
        templates = ""
        if found["task"] == "classification":
            templates = "; ".join(map(str, found.get("templates") or [found.get("templates_for", "unknown")]))
            facts.append(("templates", templates))
        base = str(found.get("base") or found.get("model") or "")
        test_set = _test_set(found) if scores else ()
        return RunResult(
            name,
            "evaluation",
            base=base,
            scores=scores,
            facts=[("file", str(path)), *facts],
            test_set=test_set,
            templates=templates,
        )
    rows = [row for part in _row_lists(found) for row in part]
    scores = [score for score in map(_score, rows) if score is not None]
    if not scores:
        raise DataError("holds no scores")
    recipe = found["recipe"] if isinstance(found.get("recipe"), dict) else {}
    seconds = found.get("seconds") or {}
    facts = [
        ("file", str(path)),
        *([("seed", found["seed"])] if "seed" in found else []),
        *((f"{key}, s", round(value)) for key, value in seconds.items() if isinstance(value, (int, float))),
    ]
    return RunResult(
        name,
        "measured run",
        base=str(recipe.get("base") or ""),
        figures=_known(found.get("validation") or {}),
        scores=scores,
        main_row=next((_row_name(key) for key in _MAIN_ROWS if any(row["row"] == key for row in rows)), ""),
        recipe=recipe,
        recipe_text=_yaml(recipe),
        facts=facts,
    )


def _test_set(found: Mapping[str, Any]) -> tuple[str, ...]:
    """What the figures of an evaluation are of: others of the same set alone compare with them."""
    left_out = sorted(str(item["source"]) for item in found.get("skipped") or ())
    return (
        f"file {str(found.get('manifest_sha256') or 'unknown')[:8]}",
        f"classes {str(found.get('classes_digest') or 'unknown')[:8]}",
        f"{len(left_out)} pictures left out" + (f", {digest_of(*left_out)[:8]}" if left_out else ""),
    )


def _row_lists(found: Mapping[str, Any]) -> list[list[Any]]:
    """Lists of score rows: at the top, or one level down."""
    places = [found, *(value for value in found.values() if isinstance(value, dict))]
    return [place["rows"] for place in places if isinstance(place.get("rows"), list)]


def _score(row: Mapping[str, Any]) -> Score | None:
    value = row["value"]
    if row["metric"] not in FIGURES or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return Score(str(row["dataset"]), _row_name(row["row"]), str(row["metric"]), float(value))


def _row_name(key: str) -> str:
    labels = five_row_labels("Target language")
    return labels[key][0] if key in labels else str(key).replace("_", " ")


def _few_shot(path: Path, name: str) -> RunResult:
    """Mean over seeds of each method and number of shots; of runs that were done again the last one counts.

    Runs of other settings or data are rows and columns of their own.
    """
    groups: dict[tuple[str, str, int, str, str, str], dict[Any, float]] = {}
    lines = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            record = json.loads(line)  # a line that a kill cut off is none
            value = float(record["top1"])
            if math.isfinite(value):
                dataset, base = str(record.get("dataset", "test")), f"base {record.get('base') or 'unknown'}"
                key = (dataset, str(record["method"]), int(record["shots"]), base, *_setting_and_data(record))
                groups.setdefault(key, {})[record.get("seed", f"line {lines}")] = value
                lines += 1
    if not groups:
        raise DataError("holds no few-shot runs: lines with method, shots and top1")
    bases = {base for *_, base, _, _ in groups}
    settings, sets = defaultdict(set), defaultdict(set)
    for dataset, method, shots, base, setting, data in groups:
        settings[dataset, method, shots, base].add(setting)
        sets[dataset].add(data)
    scores, rows = [], {}
    for (dataset, method, shots, base, setting, data), values in sorted(
        groups.items(), key=lambda item: (item[0][0], item[0][2])
    ):
        row = f"{method.replace('_', ' ')}, {shots} shot{'s' if shots > 1 else ''}"
        row += f", {base}" if len(bases) > 1 else ""
        row += f", {setting}" if len(settings[dataset, method, shots, base]) > 1 else ""
        shown = f"{dataset} ({data})" if len(sets[dataset]) > 1 else dataset
        scores.append(Score(shown, row, "top1", fmean(values.values())))
        rows[row] = (method in _MAIN_ROWS, shots)
    counted = sum(map(len, groups.values()))
    facts: list[tuple[str, Value]] = [("file", str(path)), ("runs", counted)]
    if counted < lines:
        facts.append(("runs that were done again", lines - counted))
    # The link's own method at the most shots stands for the file; without it the first method does.
    return RunResult(name, "few-shot", scores=scores, main_row=max(rows, key=rows.__getitem__), facts=facts)


def _setting_and_data(record: Mapping[str, Any]) -> tuple[str, str]:
    """What tells runs of one method apart but for the seed; lines of older versions have counts alone."""
    setting, data = (str(record.get(key) or "")[:8] for key in ("setting", "data"))
    views, train, test = (record.get(key, "unknown") for key in ("views", "n_train", "n_test"))
    return (
        f"views {views}, " + (f"setting {setting}" if setting else f"training pictures {train}"),
        f"test pictures {test}" + (f"; data {data}" if data else ""),
    )


def _known(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Validation figures; the prompt link, which may have test figures too, says so in their names."""
    found = {key: metrics.get(key, metrics.get(f"validation {key}")) for key in FIGURES}
    return {
        key: float(value) for key, value in found.items() if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _json(path: Path) -> Any:
    if path.stat().st_size > _LARGEST:
        raise DataError(f"is larger than {_LARGEST >> 20} MiB")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON ({error})") from error


def _yaml(recipe: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(recipe), allow_unicode=True, sort_keys=False) if recipe else ""
