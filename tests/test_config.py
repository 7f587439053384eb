"""Recipes: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from trimtab import config, strict_yaml
from trimtab.config import (
    DistillationConfig,
    LabelSource,
    LanguageAdapterConfig,
    LanguageData,
    LanguageRecipe,
    PairSource,
    TextSource,
    TrainingConfig,
    from_mapping,
    load_recipe,
    to_mapping,
    to_yaml,
)
from trimtab.errors import RecipeError

MINIMAL = "link: language\ndata: {train: cedict}\n"


@pytest.fixture
def recipe(tmp_path: Path):
    def read(text: str, *overrides: str) -> LanguageRecipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides)

    return read


def test_minimal_recipe_gets_defaults(recipe):
    read = recipe(MINIMAL)
    assert read == LanguageRecipe(data=LanguageData(train=(TextSource("cedict"),)))
    assert read.languages == ("zh",)


@pytest.mark.parametrize(
    ("lines", "share"),
    [
        ("", 0.0),  # English never reaches the adapter
        ("english: route\n", 0.0),
        ("english: adapter\n", 0.1),
        ("english: adapter\ndata: {train: [cedict], english_share: 0}\n", 0.0),
        ("data: {train: [cedict], english_share: 0.1}\n", 0.1),
        ("data: {train: [cedict], english_share: null}\n", 0.0),
    ],
)
def test_english_is_mixed_in_where_the_adapter_reads_it(recipe, lines, share):
    read = recipe("link: language\n" + lines if "data:" in lines else MINIMAL + lines)
    assert read.data.english_share == share
    assert to_mapping(read)["data"]["english_share"] == share  # as it is used, in folders and digests too


def test_types_follow_the_field_not_yaml_1_1(recipe):
    read = recipe(
        "link: language\nbase: 1.50\nout: yes\nstudent: e5-small\n"
        "data:\n  train: [{path: a.csv, language: no, weight: 2}, b.csv]\n"
        "training: {learning_rate: 1e-4, epochs: 1e1, clip: null, trackers: []}\n"
    )
    assert read.base == "1.50"
    assert read.out == "yes"
    assert read.student.name == "e5-small"
    assert read.data.train == (TextSource("a.csv", language="no", weight=2.0), TextSource("b.csv"))
    assert isinstance(read.data.train[0].weight, float)
    assert read.training.learning_rate == 1e-4
    assert read.training.epochs == 10
    assert read.training.clip is None
    assert read.training.trackers == ()
    assert read.languages == ("no", "zh")


@pytest.mark.parametrize(("text", "expected"), [("no", False), ("True", True), ("on", True), ("false", False)])
def test_booleans_where_a_boolean_is_expected(text, expected):
    @dataclass(frozen=True)
    class Switch:
        flag: bool
        sizes: dict[str, int]

    globals()["Switch"] = Switch
    raw = strict_yaml.parse(f"flag: {text}\nsizes: {{a: 12345678901234567}}", "x")
    assert from_mapping(Switch, raw, "x") == Switch(expected, {"a": 12345678901234567})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("link: language\nlink: language\n", "line 2: duplicate key 'link', first given in line 1"),
        (MINIMAL + "training:\n  epochs: 1\n  epochs: 2\n", "line 5: duplicate key 'epochs'"),
        (MINIMAL + "sede: 1\n", "no 'sede'; did you mean 'seed'?; it has the keys 'link', 'base'"),
        (MINIMAL + "epochs: 1\n", "did you mean 'training.epochs'"),
        (
            MINIMAL + "training: {learning_rat: 1}\n",
            "training has no 'learning_rat'; did you mean 'learning_rate'",
        ),
        (MINIMAL + "training: {epochs: many}\n", "training.epochs='many' must be a whole number"),
        (MINIMAL + "training: {epochs: 1.5}\n", "training.epochs='1.5' must be a whole number"),
        (
            MINIMAL + "training: {learning_rate: .inf}\n",
            "training.learning_rate='.inf' must be a finite number",
        ),
        (MINIMAL + "training: {learning_rate: -1}\n", "training.learning_rate=-1.0 must be above 0"),
        (MINIMAL + "training: {trackers: tensorbord}\n", "did you mean 'tensorboard'"),
        (MINIMAL + "training: 5\n", "training must be a section with the keys 'epochs'"),
        (MINIMAL + "adapter: {width: 100}\n", "adapter.width=100 must be a positive multiple of heads=6"),
        (MINIMAL + "english: both\n", "english='both' must be one of 'route', 'adapter'"),
        (MINIMAL + "base:\n", "base=None must be text"),
        (MINIMAL + "objective: {mse: 0}\n", "objective.mse=0.0 must be above 0, or one of cosine"),
        (
            MINIMAL + "objective: {infonce: 1}\ntraining: {batch_size: 1}\n",
            "training.batch_size=1 must be at least 2",
        ),
        ("link: language\n", "needs 'data'"),
        ("link: language\ndata: {train: [a.csv, {language: zh}]}\n", "data.train[1] needs 'path'"),
        ("link: language\ndata: {train: []}\n", "data.train=() must be at least one source"),
        ("link: language\ndata: {train: }\n", "write [] for an empty list"),
        ("link: langage\n", "link='langage' is unknown; link is one of 'language'"),
        ("base: starter\n", "no key 'link'"),
        ("", "holds nothing"),
        ("- a\n", "is a mapping with the key 'link'"),
        ("link: [a\n", "line 2"),
        (
            "link: !!python/object/apply:os.system ['true']\n",
            "line 1: tag '!!python/object/apply:os.system' is refused",
        ),
        ("? [a, b]\n: 1\n", "a key must be text"),
        ("[" * 5000, "cannot be read as YAML"),
    ],
)
def test_refusals_name_the_place_and_the_remedy(recipe, text, message):
    with pytest.raises(RecipeError) as caught:
        recipe(text)
    assert message in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(RecipeError, match=r"absent\.yaml does not exist"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "gbk.yaml").write_bytes("link: language # 汉语".encode("gb18030"))
    with pytest.raises(RecipeError, match="not UTF-8 at byte 17"):
        load_recipe(tmp_path / "gbk.yaml")


def test_nested_aliases_do_not_explode():
    bomb = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join(['*' + old] * 8)}]\n" for old, new in zip("abcdefghi", "bcdefghij")
    )
    raw = {"link": "language", "data": "x", "seed": strict_yaml.parse(bomb, "bomb")["j"]}
    with pytest.raises(RecipeError, match=r"data must be a section"):
        config.recipe_from_mapping(raw, "test")
    with pytest.raises(RecipeError, match=r"seed=.* must be a whole number"):
        config.recipe_from_mapping({**raw, "data": {"train": "cedict"}}, "test")


def test_byte_order_mark_and_crlf(tmp_path):
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_recipe(path).link == "language"


def test_overrides(recipe):
    read = recipe(
        MINIMAL + "student: e5-small\ntraining: {clip: 0.5}\n",
        "training.learning_rate=1e-4",
        "training.clip=null",
        "training.trackers=[]",
        "student.layers=[6, -1]",
        "adapter.layers=1",
        "data.train={path: pairs.tsv, language: no}",
        "out=runs/a=b#1",
        "adapter.dropout='0.5'",
    )
    assert read.training.learning_rate == 1e-4
    assert read.training.clip is None
    assert read.training.trackers == ()
    assert read.student == config.StudentConfig("e5-small", (6, -1))
    assert read.adapter == LanguageAdapterConfig(layers=1, dropout=0.5)
    assert read.data.train == (TextSource("pairs.tsv", language="no"),)
    assert read.out == "runs/a=b#1"


def test_paths_in_the_home_folder(recipe, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    read = recipe(
        "link: language\nout: ~/runs/x\nbase: ~/base\nstudent: ~/student\n"
        "data: {train: [~/a.csv, cedict], exclude: [~/b.csv, c.csv]}\n"
    )
    assert (read.out, read.base, read.student.name) == ("/home/me/runs/x", "/home/me/base", "/home/me/student")
    assert [source.path for source in read.data.train] == ["/home/me/a.csv", "cedict"]
    assert read.data.exclude == ("/home/me/b.csv", "c.csv")
    assert recipe(MINIMAL, "out=~/x", "data.train=~/c.csv").data.train == (TextSource("/home/me/c.csv"),)
    domain = recipe(
        "link: domain\ndata: {train: {path: ~/p.csv, root: ~/pictures, descriptions: ~/d.csv}}\n", "method=full"
    )
    assert domain.data.train == (PairSource("/home/me/p.csv", root="/home/me/pictures", descriptions="/home/me/d.csv"),)
    prompt = recipe("link: prompt\ndata: {train: {path: ~/p, root: ~/pictures}, classes: ~/c.txt}\n")
    assert prompt.data.train == (LabelSource("/home/me/p", root="/home/me/pictures"),)
    assert prompt.data.classes == "/home/me/c.txt"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "must have the form key=value"),
        ("=3", "must have the form key=value"),
        ("training.epoch=3", "training has no 'epoch'; did you mean 'epochs'?; it has the keys 'epochs'"),
        ("epochs=3", "did you mean 'training.epochs'?"),
        ("data.train.path=x", "data.train has no keys; give data.train=... as a whole"),
        ("seed.x=1", "seed has no keys"),
        ("training.epochs=0", "training.epochs=0 must be at least 1"),
        ("out=[a", "override 'out=[a' is not YAML (expected ',' or ']', but got '<stream end>'): put quotes around"),
        ("out=runs/exp #2", "what follows # would be left out as a comment of YAML"),
        ("out=runs/exp #2", "put quotes around the value and the whole, \"out='runs/exp #2'\""),
        ("out=#2", "comment of YAML"),
        ("data.train=[a.csv] # b", "comment of YAML"),
        ("data.train=*.csv", "\"data.train='*.csv'\""),
        ("data.train=@x", "\"data.train='@x'\""),
        ("data.train=it's: @x", "\"data.train='it''s: @x'\""),
        ('data.train="C:\\data\\x.csv"', "\"data.train='C:\\data\\x.csv'\""),
        ('out="a\\0b"', "override 'out=\"a\\\\0b\"', line 1: 'a\\x00b' has the character '\\x00'"),
        ('out="\\ud800.csv"', "has the character '\\ud800', which no file name or text can hold; leave it out"),
        ("link=prompts", "link='prompts' is unknown"),
    ],
)
def test_bad_overrides(recipe, override, message):
    with pytest.raises(RecipeError) as caught:
        recipe(MINIMAL, override)
    assert message in str(caught.value)


def test_paths_stand_for_their_text() -> None:
    mapping = {"link": "language", "base": Path("a/clip"), "student": Path("b/bert"), "data": {"train": Path("p.csv")}}
    recipe = config.recipe_from_mapping(mapping, "the recipe", ["student.prefix=query"])
    assert recipe.base == str(Path("a/clip"))
    assert (recipe.student.name, recipe.student.prefix) == (str(Path("b/bert")), "query")
    assert [source.path for source in recipe.data.train] == ["p.csv"]


def test_overriding_leaves_the_mapping_alone():
    raw = {"link": "language", "data": {"train": ["a.csv"]}}
    config.recipe_from_mapping(raw, "test", ["data.max_chars=5", "training.epochs=1"])
    assert raw == {"link": "language", "data": {"train": ["a.csv"]}}


def test_resolved_yaml_reads_back_equal(recipe, tmp_path):
    read = recipe(
        MINIMAL,
        "data.train=[{path: a.csv, language: no, limit: 7}, 'null']",
        "training.learning_rate=1e-5",
        "student.prefix='1e3'",
        "training.ema=0.999",
    )
    (tmp_path / "resolved.yaml").write_text(to_yaml(read), encoding="utf-8")
    assert load_recipe(tmp_path / "resolved.yaml") == read
    assert from_mapping(LanguageRecipe, to_mapping(read), "json") == read


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextSource(""), "path='' must be non-empty"),
        (lambda: TextSource("a", target="x", english="x"), "english='x' must be another column than"),
        (lambda: TextSource("a", limit=0), "limit=0 must be at least 1"),
        (lambda: LanguageData((TextSource("a"),), english_share=1.0), "english_share=1.0 must be at least 0"),
        (lambda: LanguageData((TextSource("a"),), phrases=-1), "phrases=-1 must be at least 0"),
        (lambda: config.StudentConfig(layers=(1, 1)), r"layers=\(1, 1\) must be one or more different"),
        (lambda: LanguageAdapterConfig(dropout=1), "dropout=1 must be at least 0 and below 1"),
        (lambda: DistillationConfig(gram=-1), "gram=-1 must be at least 0"),
        (lambda: TrainingConfig(ema=1.0), "ema=1.0 must be between 0 and 1"),
        (lambda: TrainingConfig(warmup=1.0), "warmup=1.0 must be a fraction"),
        (lambda: TrainingConfig(trackers=("wandb", "wandb")), "without repeats"),
    ],
)
def test_impossible_values_cannot_be_made(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


def test_import_is_light():
    code = "import sys, trimtab.config; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_recipes_of_the_package_are_found_from_anywhere(tmp_path, monkeypatch):
    place = tmp_path / "package" / "config"
    (tmp_path / "package" / "recipes" / "yaml").mkdir(parents=True)
    monkeypatch.setattr("trimtab.config.__file__", str(place / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    shipped = tmp_path / "package" / "recipes" / "yaml" / "mine.yaml"
    shipped.write_text(MINIMAL + "out: shipped\n", encoding="utf-8")
    assert load_recipe("recipes/mine.yaml").out == "shipped"
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe("other/mine.yaml")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(MINIMAL + "out: own\n", encoding="utf-8")
    assert load_recipe("recipes/mine.yaml").out == "own"
