from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import trimtab
from tiny_adapted import save_tiny_adapted
from trimtab.cli import _Warnings, app
from trimtab.cli.printing import say, show, tell
from trimtab.errors import Interrupted
from trimtab.recipes.info import describe
from trimtab.towers.text_encoder import TextEncoder

NAMES = ["cat", "dog", "bird"]
RECIPE = "link: language\nbase: starter\nout: {out}\ndata:\n  train: [pairs.csv]\n"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: Any) -> str:
    """The message of a command that must end with status 2 and without a traceback."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1
    return str(result.output)


def process(*arguments: Any, code: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command in a process of its own, after `code`."""
    program = f"import sys; {code}\nfrom trimtab.cli import main\nmain()"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment}, check=False, timeout=60)


@pytest.fixture
def clip(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("clip")


@pytest.fixture
def data(tmp_path: Path, pictures: list[Image.Image]) -> Path:
    """A folder with five pictures, classes.txt, items.csv and pairs.csv."""
    folder = tmp_path / "data"
    folder.mkdir()
    items, pairs = ["image,label"], ["image,text"]
    for at, picture in enumerate(pictures):
        picture.save(folder / f"{at}.png")
        items.append(f"{at}.png,{NAMES[at % 3]}")
        pairs.append(f"{at}.png,一只{at}号猫")
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    (folder / "items.csv").write_text("\n".join(items) + "\n", encoding="utf-8")
    (folder / "pairs.csv").write_text("\n".join(pairs) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def adapted(tmp_path: Path, tiny_base: Callable[[str], Any], tiny_folder: Callable[[str], Path]) -> Path:
    student = TextEncoder.load(tiny_folder("bert"), device="cpu")
    return save_tiny_adapted(tmp_path / "中文", tiny_base("clip"), student)


def classification(model: Any, data: Path, *more: Any) -> tuple[Any, ...]:
    return ("evaluate", model, "--classification", data / "items.csv", "--classes", data / "classes.txt", *more)


# Evaluation


def test_classification_writes_its_result(clip: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = run(*classification(clip, data, "--template", "a {}", "--template", "{}", "--json", out))
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["n"] == 5
    assert 0 <= found["top1"] <= found["top5"] == 100
    assert found["templates"] == ["a {}", "{}"]
    assert f"{found['top1']:.2f}" in result.output
    assert f"wrote {out}" in result.output


def test_retrieval_writes_its_result(clip: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = ("evaluate", clip, "--retrieval", data / "pairs.csv", "--hubness", "csls", "--batch-size", 2)
    result = run(*command, "--device", "cpu", "--json", out, "--report", tmp_path / "report")
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text(encoding="utf-8"))
    assert {"mR", "i2t", "t2i", "n_images", "n_texts"} <= found.keys()
    assert found["t2i"].keys() == found["i2t"].keys() == {"R@1", "R@5", "R@10"}
    assert (found["n_images"], found["n_texts"], found["hubness"]) == (5, 5, "csls")
    assert f"mR {found['mR']:.2f} on 5 images and 5 texts, corrected by csls" in result.output
    assert (tmp_path / "report" / "report.html").is_file()


def test_an_adapted_folder_is_evaluated_like_a_base(adapted: Path, data: Path) -> None:
    result = run("evaluate", adapted, "--retrieval", data / "pairs.csv")
    assert result.exit_code == 0, result.output
    assert "text finds image" in result.output
    (data / "classes.txt").write_text("猫\n狗\n", encoding="utf-8")
    (data / "items.csv").write_text("image,label\n0.png,猫\n1.png,狗\n", encoding="utf-8")
    result = run(*classification(adapted, data))
    assert result.exit_code == 0, result.output
    assert "templates (zh): 一张{}的照片 | " in result.output


def test_one_corrupt_picture_is_skipped_and_named(clip: Path, data: Path, tmp_path: Path) -> None:
    (data / "3.png").write_bytes((data / "3.png").read_bytes()[:100])
    result = run(*classification(clip, data, "--json", tmp_path / "out.json"))
    assert result.exit_code == 0, result.output
    assert "images left out because they cannot be used: 1\n  3.png: " in result.output
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (found["n"], found["n_skipped"], found["skipped"][0]["source"]) == (4, 1, "3.png")


def test_lost_texts_are_counted(clip: Path, data: Path) -> None:
    assert "left out with" not in run("evaluate", clip, "--retrieval", data / "pairs.csv", "--device", "cpu").output
    (data / "1.png").write_bytes(b"nothing")
    result = run("evaluate", clip, "--retrieval", data / "pairs.csv", "--device", "cpu")
    assert "on 4 images and 4 texts; texts left out with their pictures: 1" in result.output


def test_every_picture_corrupt(clip: Path, data: Path) -> None:
    for path in data.glob("*.png"):
        path.write_bytes(b"nothing")
    message = refused(*classification(clip, data))
    assert "none of the 5 images can be read" in message
    assert "0.png" in message
    assert "--root" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ["no such file"]),
        (b"", ["is empty"]),
        (b"image,label\n", ["has no rows"]),
        (b"file,class\n0.png,cat\n", ["no column 'image', 'label'", "columns found: file, class"]),
        ("image,label\n0.png,花园里的小猫\n".encode("gb18030"), ["not UTF-8", "line 2", "iconv -f GB18030"]),
        (b"image,label\n../../secret.png,cat\n", ["row 2", "'../../secret.png'", "--root"]),
        (b"image,label\n/etc/passwd,cat\n", ["row 2", "'/etc/passwd'", "--root"]),
        (b"image,label\n0.png,Cat\n1.png,dgo\n", ["2 labels are not among the 3 classes", "'cat'?", "'dog'?", "Mend"]),
    ],
)
def test_manifests_that_cannot_be_used(content: bytes | None, expected: list[str], clip: Path, data: Path) -> None:
    (data / "items.csv").unlink()
    if content is not None:
        (data / "items.csv").write_bytes(content)
    message = refused(*classification(clip, data))
    assert "items.csv" in message
    for part in expected:
        assert part in message


def test_equal_class_names(clip: Path, data: Path) -> None:
    (data / "classes.txt").write_text("cat\ndog\nbird\ndog\n")
    message = refused(*classification(clip, data))
    for part in ("classes.txt", "'dog'", "line 2", "line 4", "remove one"):
        assert part in message


def test_a_template_without_a_place(clip: Path, data: Path) -> None:
    message = refused(*classification(clip, data, "--template", "a photo of a thing"))
    assert "'a photo of a thing'" in message
    assert "exactly one {}" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "exactly one of --classification and --retrieval"),
        (("--classification", "a.csv", "--classes", "b.txt", "--retrieval", "c.csv"), "exactly one of"),
        (("--classification", "a.csv"), "needs --classes"),
        (("--classification", "a.csv", "--classes", "b.txt", "--hubness", "csls"), "--hubness belongs to --retrieval"),
        (("--retrieval", "a.csv", "--classes", "b.txt"), "belong to --classification"),
        (("--retrieval", "a.csv", "--template", "{}"), "belong to --classification"),
    ],
)
def test_options_that_do_not_go_together(arguments: tuple[str, ...], expected: str) -> None:
    assert expected in refused("evaluate", "model", *arguments)


@pytest.mark.parametrize(
    "arguments",
    [("--retrieval", "a.csv", "--hubness", "magic"), ("--retrieval", "a.csv", "--batch-size", "0"), ("--unknown",)],
)
def test_options_that_do_not_exist(arguments: tuple[str, ...]) -> None:
    assert run("evaluate", "model", *arguments).exit_code == 2


@pytest.mark.parametrize("command", ["adapt", "fewshot"])
def test_a_key_given_as_an_option_is_told_how_keys_are_given(command: str, recipe: Path) -> None:
    for options, key in ((("--base", "models/clip"), "base"), (("--data.train=t.csv",), "data.train")):
        result = run(command, recipe, *options)
        assert result.exit_code == 2
        said = " ".join(re.sub("[^!-~]", " ", result.output).split())
        assert f"values of a recipe are given without dashes, as {key}=VALUE" in said
    assert "VALUE)" not in run(command, recipe, "--unknown").output
    assert "VALUE)" not in run("evaluate", "--base", "starter").output


# Models


def test_an_unknown_base(data: Path) -> None:
    message = refused(*classification("nowhere/nothing", data))
    assert "'nowhere/nothing'" in message
    assert "give 'starter'" in message


def test_a_damaged_base(clip: Path, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in clip.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[: -1000 if path.suffix == ".safetensors" else None])
    message = refused(*classification(broken, data))
    assert str(broken / "model.safetensors") in message
    assert "fetch it again" in message


def test_a_damaged_adapter(adapted: Path, data: Path) -> None:
    path = adapted / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = refused(*classification(adapted, data))
    assert str(path) in message
    assert "copy the folder again" in message
    assert str(path) in refused("info", adapted)


def test_an_adapter_of_another_base(
    tmp_path: Path, data: Path, tiny_base: Callable[[str], Any], tiny_folder: Callable[[str], Path]
) -> None:
    student = TextEncoder.load(tiny_folder("bert"), device="cpu")
    base = tiny_base("clip")
    stranger = replace(reference(base), fingerprint="0" * 64)
    folder = save_tiny_adapted(tmp_path / "adapted", base, student, base=stranger)
    message = refused(*classification(folder, data))
    for part in (str(folder), "0" * 16, base.fingerprint[:16], "train it again"):
        assert part in message


def reference(base: Any) -> Any:
    from trimtab.adapters.files import BaseReference

    return BaseReference.of(base)


def test_info_of_a_base_and_of_an_adapted_folder(clip: Path, adapted: Path, tiny_base: Callable[[str], Any]) -> None:
    result = run("info", clip)
    assert result.exit_code == 0, result.output
    for part in ("family", "clip", "context_length", "logit_scale", tiny_base("clip").fingerprint):
        assert part in result.output
    result = run("info", adapted)
    assert result.exit_code == 0, result.output
    for part in ("language", "zh", "translation_match", "46.5", "pairs", "30,000", "adapter.safetensors"):
        assert part in result.output
    assert "no such folder" in refused("info", "nowhere/nothing")


def test_convert_passes_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def convert(checkpoint: Path, out: Path, **options: Any) -> Path:
        calls.append((checkpoint, out, options))
        return out

    monkeypatch.setattr("trimtab.towers.open_clip.convert_open_clip", convert)
    result = run("convert", "a.pt", tmp_path / "out", "--tokenizer", "t", "--no-quick-gelu")
    assert result.exit_code == 0, result.output
    assert f"wrote {tmp_path / 'out'}" in result.output
    assert run("convert", "a.pt", "out", "--config", "c.json").exit_code == 0
    assert calls == [
        (Path("a.pt"), tmp_path / "out", {"config": None, "tokenizer": "t", "quick_gelu": False}),
        (Path("a.pt"), Path("out"), {"config": Path("c.json"), "tokenizer": None, "quick_gelu": None}),
    ]


def test_convert_refuses_what_is_not_there(tmp_path: Path) -> None:
    assert "no.pt: no such checkpoint file" in refused("convert", tmp_path / "no.pt", tmp_path / "out")


def test_options_take_paths_in_the_home_folder(
    clip: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = classification(clip, data, "--json=~/out.json", "--template=a ~/{}", "--device=cpu")
    assert run(*arguments).exit_code == 0
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["templates"] == ["a ~/{}"]


# Recipes


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the recipes were called with, in place of running them."""
    seen: list[Any] = []

    def stand_in(result: Any) -> Callable[..., Any]:
        def record(*arguments: Any, **options: Any) -> Any:
            seen.append((*arguments, options))
            return result

        return record

    for module, name, result in (
        ("adapt", "adapt", {"out": "runs/language", "steps": 1234}),
        ("quickstart", "quickstart", Path("somewhere")),
        ("starter", "align_starter", Path("elsewhere")),
    ):
        stand = SimpleNamespace(**{name: stand_in(result)})
        monkeypatch.setitem(sys.modules, f"trimtab.recipes.{module}", stand)  # type: ignore[arg-type]
    return seen


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(out=tmp_path / "out"))
    return path


def test_adapt_resolves_the_recipe_and_runs_it(calls: list[Any], recipe: Path) -> None:
    result = run("adapt", recipe, "training.epochs=3", "seed=7", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "1,234" in result.output
    [(resolved, options)] = calls
    assert (resolved.training.epochs, resolved.seed, options) == (3, 7, {"dry_run": True})
    assert run("adapt", recipe).exit_code == 0
    assert calls[1][1] == {"dry_run": False}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.epoch=3", ["epoch", "epochs"]),
        ("training.epochs=0", ["epochs=0", "at least 1"]),
        ("training.epochs=many", ["epochs", "many"]),
        ("english=both", ["both", "route"]),
        ("epochs", ["epochs", "="]),
    ],
)
def test_recipes_with_mistakes(override: str, expected: list[str], calls: list[Any], recipe: Path) -> None:
    message = refused("adapt", recipe, override)
    for part in expected:
        assert part in message
    assert not calls


def test_a_recipe_that_is_not_there(calls: list[Any], tmp_path: Path) -> None:
    assert "no.yaml does not exist; recipes/ has examples" in refused("adapt", tmp_path / "no.yaml")


def test_quickstart_and_starter_say_what_they_wrote(calls: list[Any]) -> None:
    assert "wrote somewhere" in run("quickstart").output
    assert "wrote somewhere" in run("quickstart", "--out", "x").output
    assert "wrote elsewhere" in run("align-starter", "--out", "y").output
    assert calls == [(Path("runs/quickstart"), {}), (Path("x"), {}), (Path("y"), {})]


# The process


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import atexit; atexit.register(lambda: print("
        "'heavy:', [name for name in ('torch', 'transformers', 'numpy', 'PIL', 'yaml') if name in sys.modules]))"
    )
    result = process("--help", code=code)
    assert result.returncode == 0
    text = result.stdout.decode()
    assert "heavy: []" in text
    for command in ("adapt", "evaluate", "info", "convert", "quickstart"):
        assert command in text
    result = process("--version", code=code)
    assert result.stdout.decode().split("\n")[:2] == [f"trimtab {trimtab.__version__}", "heavy: []"]


def test_python_finds_the_command_too() -> None:
    found = subprocess.run([sys.executable, "-m", "trimtab", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"trimtab {trimtab.__version__}"


def test_errors_go_to_stderr_alone(tmp_path: Path) -> None:
    result = process("adapt", tmp_path / "没有.yaml", LC_ALL="C")
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.decode("utf-8").startswith(f"error: recipe {tmp_path / '没有.yaml'} does not exist")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_output_is_utf8_whatever_the_locale(encoding: str, adapted: Path) -> None:
    result = process("info", adapted, PYTHONIOENCODING=encoding)
    assert result.returncode == 0, result.stderr.decode()
    assert "中文" in result.stdout.decode("utf-8")


STUB = "import trimtab.recipes.info as info, time; info.describe = lambda name: "


def test_a_bug_keeps_its_traceback_and_asks_for_a_report() -> None:
    result = process("info", "x", code=STUB + "{}['gone']")
    text = result.stderr.decode()
    assert result.returncode == 1
    assert "Traceback" in text
    assert "KeyError: 'gone'" in text
    assert text.rstrip().endswith("please report it with the text above and the command.")


@pytest.mark.parametrize("told", [False, True])
def test_one_process_of_several_says_that_they_were_interrupted(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(name: str) -> None:
        raise Interrupted("interrupted at step 5", told=told)

    monkeypatch.setattr("trimtab.recipes.info.describe", stop)
    result = CliRunner().invoke(app, ["info", "x"])
    assert result.exit_code == 2
    assert ("interrupted at step 5" in result.output) is not told


@pytest.mark.parametrize("error", ["MemoryError()", "RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB.')"])
def test_too_little_memory_is_no_bug(error: str) -> None:
    stub = f"from trimtab.recipes import info; info.describe = lambda *a, **k: (_ for _ in ()).throw({error})"
    finished = process("info", "starter", code=stub)
    assert finished.returncode == 2
    assert finished.stderr.startswith(b"error: out of memory: give a lower --batch-size")
    assert (b"(CUDA out of memory. Tried to allocate 2.00 GiB.)" in finished.stderr) is ("2.00" in error)
    assert b"Traceback" not in finished.stderr


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_ends_with_a_sentence() -> None:
    program = f"{STUB}(print('ready', flush=True), time.sleep(60))\nfrom trimtab.cli import main\nmain()"
    command = [sys.executable, "-c", program, "info", "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"ready\n"
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=30)
    assert running.returncode == 130
    assert errors.decode().startswith("stopped by Ctrl-C.")
    assert b"Traceback" not in errors


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX pipe")
def test_a_reader_that_goes_away_is_no_error() -> None:
    program = f"{STUB}dict.fromkeys(map(str, range(3000)), 'x' * 50)\nfrom trimtab.cli import main\nmain()"
    command = [sys.executable, "-c", program, "info", "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.read(100)
        running.stdout.close()
        assert running.stderr.read() == b""
        running.wait(timeout=30)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
@pytest.mark.parametrize("stub", ["{'a': 1}", "print('a')"])  # one flushes, the other leaves it to the end
def test_output_that_finds_no_room(stub: str) -> None:
    program = f"{STUB}{stub}\nfrom trimtab.cli import main\nmain()"
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", program, "info", "x"], stdout=full, stderr=subprocess.PIPE, check=False, timeout=60
        )
    assert ended.returncode == 2
    assert ended.stderr.decode() == "error: cannot write the output: the disk is full: free some space\n"


def test_a_warning_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("trimtab.test")
    handler = _Warnings()
    logger.addHandler(handler)
    try:
        for _ in range(3):
            logger.warning("%d of %d texts were [cut]", 1, 2)
        logger.info("nothing")
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr().err == "warning: 1 of 2 texts were [cut]\n"


STEERING = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


def test_nothing_of_a_users_text_steers_the_terminal(
    tiny_base: Callable[[str], Any], tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: Any
) -> None:
    """Described models, messages and warnings are all printed by way of one helper."""
    student = TextEncoder.load(tiny_folder("bert"), device="cpu")
    folder = save_tiny_adapted(tmp_path / "zh", tiny_base("clip"), student)
    raw = json.loads((folder / "adapter.json").read_text())
    raw["data"][STEERING] = STEERING
    (folder / "adapter.json").write_text(json.dumps(raw))
    show(describe(str(folder)))
    show([STEERING])
    show({STEERING: {STEERING: [STEERING]}})
    show(Path(STEERING))
    say(STEERING, "yellow")
    tell(STEERING)
    told = capsys.readouterr()
    told_by_an_error = refused("info", tmp_path / STEERING)
    for text in (told.out, told.err, told_by_an_error):
        assert "owned" in text
        assert not set(text) & set("\x1b\x07\x9b\u202e")


def test_evaluation_is_quiet_beside_its_result(clip: Path, data: Path) -> None:
    result = process("evaluate", clip, "--retrieval", data / "pairs.csv", "--device", "cpu")
    assert result.returncode == 0, result.stderr.decode()
    assert result.stderr.decode().count("\n") <= 1  # that texts were cut
    assert np.isfinite(float(result.stdout.decode().split("mR ")[1].split()[0]))
