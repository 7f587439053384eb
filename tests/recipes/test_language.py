"""Parts of the language recipe: what it refuses, what it encodes once, where the adapter starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tiny_language import toy_pairs, toy_recipe, write_pairs
from trimtab.adapters.adapted import LanguageAdapted, load_adapted
from trimtab.adapters.language import LanguageAdapter
from trimtab.config import LanguageRecipe
from trimtab.data import corpora
from trimtab.data.parallel import ParallelText
from trimtab.errors import ModelError, OutOfMemory, RecipeError, TrimtabError
from trimtab.recipes import language
from trimtab.recipes.adapt import adapt
from trimtab.recipes.sources import PreparedText, prepare
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.hf import load_base
from trimtab.towers.text_encoder import TextEncoder
from trimtab.training.distributed import World

PAIRS = toy_pairs(200)
TOLERANCE = 0.03  # of fp16 caches filled in bf16, where the machine has it
RUSSIAN = ["красная кошка", "большая собака", "старый дом", "синий чайник"]


@pytest.fixture
def make(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., LanguageRecipe]:
    """The toy recipe with changes, over two hundred pairs."""
    pairs = write_pairs(tmp_path / "pairs.csv", PAIRS)

    def build(out: Path | None = None, **changes: Any) -> LanguageRecipe:
        places = tiny_folder("vision-text-dual-encoder"), tiny_folder("bert"), pairs
        return toy_recipe(*places, out or tmp_path / "out", **changes)

    return build


def test_processes_that_do_not_run_are_told_before_a_model_is_loaded(make: Any, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(language, "load_base", refuse)
    with pytest.raises(TrimtabError, match=r"training\.processes asks for 2 processes but 1 run"):
        adapt(make(training={"processes": 2}))


def test_a_rank_that_a_scheduler_left_is_no_second_process(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RANK", "1")
    recipe = make()
    assert adapt(recipe) is not None
    assert (Path(recipe.out) / "adapter.json").is_file()


def test_the_plan_is_printed_by_one_of_several_processes(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    printed = []
    for rank in range(2):
        world = World(rank, 2, torch.device("cpu"))
        monkeypatch.setattr(language.distributed, "checked_world", lambda *_, world=world: world)
        adapt(make(), dry_run=True)
        printed.append("parameters" in capsys.readouterr().out)
    assert printed == [True, False]


def test_the_plan_times_the_adapter_where_it_is_trained(
    make: Any, base: Any, student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waited.append(True))

    class Elsewhere:
        device = torch.device("meta")

        def __getattr__(self, name: str) -> Any:
            return getattr(base, name)

    recipe = make()
    width = student.hidden_size * len(recipe.student.layers)
    adapter = LanguageAdapter(recipe.adapter, input_dim=width, output_dim=base.embedding_dim)
    text = language.plan(recipe, prepare(recipe), Elsewhere(), student, adapter)  # type: ignore[arg-type]
    assert "to train" in text
    assert {parameter.device.type for parameter in adapter.parameters()} == {"meta"}
    assert waited


@pytest.fixture
def base(tiny_base: Callable[[str], DualEncoder]) -> DualEncoder:
    return tiny_base("vision-text-dual-encoder")


@pytest.fixture
def student(tiny_folder: Callable[[str], Path]) -> TextEncoder:
    return TextEncoder.load(tiny_folder("bert"), device="cpu")


@pytest.fixture
def encoded(make: Any, base: Any, student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Recipe, text and frozen features."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    recipe = make(data={"english_share": 0.1})
    text = prepare(recipe)
    return recipe, text, language.encode(recipe, text, base, student)


# The folder to write


def test_a_folder_of_other_things_is_left_alone(
    make: Any, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(language, "prepare", None)  # before any work
    with pytest.raises(RecipeError, match=r"holds other files \(config\.json \.\.\.\); choose a folder of its own"):
        adapt(make(tiny_folder("vision-text-dual-encoder")))  # the base itself
    with pytest.raises(RecipeError, match=r"pairs\.csv is a file; choose another folder"):
        adapt(make(tmp_path / "pairs.csv"))
    with pytest.raises(RecipeError, match=r"pairs\.csv is a file; choose another folder"):
        adapt(make(tmp_path / "pairs.csv" / "out"))


def test_the_digest_names_what_decides_the_weights(make: Any) -> None:
    digest = language.recipe_digest(make())
    assert language.recipe_digest(make(Path("elsewhere"))) == digest
    assert language.recipe_digest(make(training={"checkpoint_every": 7, "log_every": 3})) == digest
    for change in ({"seed": 1}, {"training": {"epochs": 3}}, {"english": "adapter"}, {"objective": {"gram": 1.0}}):
        assert language.recipe_digest(make(**change)) != digest


# Pairing


def texts(*languages: tuple[str, list[str]]) -> ParallelText:
    parts = [ParallelText.from_pairs([(target, "a cat") for target in targets], code) for code, targets in languages]
    return parts[0].concat(*parts[1:])


def test_a_student_that_cannot_read_the_language_is_refused_with_both_named(make: Any, base: Any, student: Any) -> None:
    with pytest.raises(ModelError) as caught:
        language.check_pairing(make(), base, student, texts(("ru", RUSSIAN)))
    for words in (repr(student.name), repr(base.name), "100% of the tokens", "(ru)", "multilingual"):
        assert words in str(caught.value)


def test_a_whole_run_refuses_it_before_encoding(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "encode", None)
    write_pairs(tmp_path / "pairs.csv", [(f"{RUSSIAN[i % 4]} {'аб'[i % 2] * i}", f"cat {i}") for i in range(60)])
    with pytest.raises(ModelError, match="does not know"):
        adapt(make(data={"validation_size": 5}))
    assert not (tmp_path / "out").exists()


def test_one_unreadable_language_among_readable_ones_is_found(make: Any, base: Any, student: Any) -> None:
    many = [target for target, _ in PAIRS] * 20
    with pytest.raises(ModelError, match=r"\(ru\)"):
        language.check_pairing(make(), base, student, texts(("zh", many), ("ru", RUSSIAN)))


@pytest.mark.parametrize("name", ["clip", "xlm-roberta"])
def test_special_tokens_are_not_unknown_ones(name: str, make: Any, base: Any, tiny_folder: Any) -> None:
    """CLIP's unknown token is its end token, which every text has; it knows every byte."""
    other = TextEncoder.load(tiny_folder(name), device="cpu")
    language.check_pairing(make(), base, other, texts(("zh", ["猫", "狗", "茶"])))


def test_a_prefix_does_not_hide_unknown_tokens(make: Any, base: Any, tiny_folder: Any) -> None:
    student = TextEncoder.load(tiny_folder("bert"), prefix="a photo of a small red car on the road ", device="cpu")
    with pytest.raises(ModelError, match="100% of the tokens"):
        language.check_pairing(make(), base, student, texts(("ru", ["дом"])))


@pytest.mark.parametrize("targets", [["un cane rosso", "la casa"], ["un café", "小猫", "小狗"]])
def test_routing_by_script_is_refused_for_latin_targets(targets: list[str], make: Any, base: Any, student: Any) -> None:
    train = texts(("zh", [target for target, _ in PAIRS]), ("it", targets))
    with pytest.raises(RecipeError, match=r"english=route .*\(it\).*set english=adapter"):
        language.check_pairing(make(), base, student, train)
    language.check_pairing(make(english="adapter"), base, student, train)


def test_some_latin_targets_among_others_are_told(
    make: Any, base: Any, student: Any, caplog: pytest.LogCaptureFixture
) -> None:
    chinese = [target for target, _ in PAIRS]
    some = chinese[: len(PAIRS) * 3 // 4] + ["un cane rosso"] * (len(PAIRS) // 4)
    language.check_pairing(make(), base, student, texts(("zh", some)))
    assert "25% of the target texts (zh) are in Latin script" in caplog.text
    caplog.clear()
    language.check_pairing(make(english="adapter"), base, student, texts(("zh", some)))
    language.check_pairing(make(), base, student, texts(("zh", [*chinese, "un cane"])))
    assert caplog.text == ""


def test_english_pairs_are_no_target_language(make: Any, base: Any, student: Any) -> None:
    english = ["a red cat"] * 30_000
    language.check_pairing(make(), base, student, texts(("en", english), ("zh", ["小猫", "小狗"])))
    with pytest.raises(ModelError, match=r"\(ru\)"):
        language.check_pairing(make(), base, student, texts(("en", english), ("ru", RUSSIAN)))


# Features


def test_features_are_those_of_the_towers(encoded: Any, base: Any, student: Any) -> None:
    _, text, frozen = encoded
    at = [0, 7, len(text.train) - 1]  # the last is an English-English pair
    expected = base.encode_text([text.train.english[i] for i in at])
    np.testing.assert_allclose(frozen.teacher[frozen.english[at]], expected, atol=TOLERANCE)
    for i in at:
        (states,) = student.token_states([text.train.targets[i]], (0, -1))
        np.testing.assert_allclose(frozen.states[i], states, atol=TOLERANCE)
    first, count = len(text.train), len(text.validation)
    assert len(frozen.states) == first + 2 * count
    (states,) = student.token_states([text.validation.english[3]], (0, -1))
    np.testing.assert_allclose(frozen.states[first + count + 3], states, atol=TOLERANCE)
    expected = base.encode_text(text.validation.english)
    np.testing.assert_allclose(frozen.teacher[frozen.validation], expected, atol=TOLERANCE)


def test_a_second_encoding_reads_the_cache(
    encoded: Any, base: Any, student: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, text, frozen = encoded
    monkeypatch.setattr(TextEncoder, "token_states", None)
    monkeypatch.setattr(DualEncoder, "encode_text", None)
    again = language.encode(recipe, text, base, student)
    assert np.array_equal(again.teacher, frozen.teacher)
    assert all(np.array_equal(again.states[i], frozen.states[i]) for i in range(len(frozen.states)))


def test_another_tokenizer_of_the_teacher_is_another_cache(
    encoded: Any, student: Any, tiny_folder: Any, tmp_path: Path
) -> None:
    recipe, text, _ = encoded
    folder = Path(shutil.copytree(tiny_folder("vision-text-dual-encoder"), tmp_path / "other"))
    about = json.loads((folder / "tokenizer.json").read_text())
    ids = about["model"]["vocab"]
    ids["red"], ids["a"] = ids["a"], ids["red"]
    (folder / "tokenizer.json").write_text(json.dumps(about))
    other = load_base(folder, device="cpu")
    frozen = language.encode(recipe, text, other, student)
    expected = other.encode_text(text.train.english[:5])
    np.testing.assert_allclose(frozen.teacher[frozen.english[:5]], expected, atol=TOLERANCE)


def test_other_layers_are_another_cache(encoded: Any, base: Any, student: Any, make: Any, tmp_path: Path) -> None:
    _, text, frozen = encoded
    last = make(student={"layers": [-1]})
    assert language.encode(last, text, base, student).states.dim == frozen.states.dim / 2
    assert len([path for path in (tmp_path / "cache" / "features").iterdir() if path.is_dir()]) == 3


# The start, and validation


def start(encoded: Any, **adapter: Any) -> tuple[LanguageAdapter, Any]:
    recipe, text, frozen = encoded
    torch.manual_seed(recipe.seed)
    config = type(recipe.adapter)(**{"width": 32, "heads": 2, **adapter})
    module = LanguageAdapter(config, input_dim=frozen.states.dim, output_dim=frozen.teacher.shape[1])
    recipe = type(recipe)(**{**vars(recipe), "adapter": config})
    probability = np.full(len(text.train), 1 / len(text.train))
    return module, language.start_adapter(module, frozen, probability, recipe)


@pytest.mark.parametrize("init", ["ridge", "random"])
def test_the_adapter_starts_in_the_teachers_units(init: str, encoded: Any) -> None:
    _, text, frozen = encoded
    adapter, standardiser = start(encoded, init=init)
    teacher = np.asarray(frozen.teacher[frozen.english], np.float32)
    np.testing.assert_allclose(adapter.output_mean.numpy(), teacher.mean(0), atol=0.1)
    np.testing.assert_allclose(standardiser.std.numpy(), teacher.std(0), rtol=0.3)
    states, mask = frozen.states.rows(np.arange(len(text.train)))
    with torch.no_grad():
        output = adapter(torch.from_numpy(states).float(), torch.from_numpy(mask)).numpy()
    error = np.mean(((output - teacher) / standardiser.std.numpy()) ** 2)
    # Closed form explains most of the variance before the first step; chance explains none.
    assert error < 0.6 if init == "ridge" else error > 0.9


def test_units_of_the_student_are_estimated_from_what_memory_bears(
    encoded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, text, frozen = encoded
    sample = np.arange(len(text.train))
    every = np.concatenate([frozen.states[i] for i in sample])
    assert np.array_equal(language.some_states(frozen.states, sample).numpy(), every)  # nothing is left out of few
    few = sum(frozen.states.lengths[:7])
    for room in (few * frozen.states.dim, (few + 1) * frozen.states.dim):
        monkeypatch.setattr(language, "_STATE_NUMBERS", room)
        some = language.some_states(frozen.states, sample)
        assert some.dtype == torch.float64
        assert np.array_equal(some.numpy(), every[:few])
    monkeypatch.setattr(language, "_STATE_NUMBERS", 1)
    assert len(language.some_states(frozen.states, sample)) == frozen.states.lengths[0]


def test_validation_of_the_teacher_itself_is_perfect(encoded: Any) -> None:
    _, text, frozen = encoded

    class Teacher:
        def features(self, states: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
            return np.asarray(frozen.teacher[frozen.validation], np.float32)

    figures = language.validate(Teacher(), frozen, text)
    assert figures["match"] == figures["english_match"] == 100
    assert figures["cosine"] == pytest.approx(1, abs=1e-5)
    assert figures["collapse"] == pytest.approx(0, abs=1e-6)


def test_validation_takes_fewer_at_once_where_memory_is_short(encoded: Any) -> None:
    _, text, frozen = encoded
    teacher = np.asarray(frozen.teacher[frozen.validation], np.float32)
    sizes: list[int] = []

    class Small:
        room = len(teacher) // 3

        def features(self, states: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
            sizes.append(len(states))
            if len(states) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return states.numpy()[:, 0, : teacher.shape[1]].astype(np.float32)

    roomy, small = Small(), Small()
    roomy.room = 10_000
    assert language.validate(small, frozen, text) == language.validate(roomy, frozen, text)
    assert min(sizes) <= small.room
    small.room = 0
    with pytest.raises(OutOfMemory):
        language.validate(small, frozen, text)


def test_match_is_the_mean_of_languages(encoded: Any) -> None:
    _, text, frozen = encoded
    few = 5
    languages = ["ja"] * few + ["zh"] * (len(text.validation) - few)
    text = replace(text, validation=replace(text.validation, languages=languages))
    teacher = np.asarray(frozen.teacher[frozen.validation], np.float32)

    class KnowsOne:
        def features(self, states: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
            return np.concatenate([-teacher[:few], teacher[few:]])

    figures = language.validate(KnowsOne(), frozen, text)
    assert figures["match_ja"] == 0
    assert figures["match_zh"] > 90
    assert figures["match"] == figures["match_zh"] / 2


def test_a_constant_output_is_a_collapse(encoded: Any) -> None:
    _, text, frozen = encoded

    class Constant:
        def features(self, states: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
            return np.ones((len(states), frozen.teacher.shape[1]), np.float32)

    figures = language.validate(Constant(), frozen, text)
    assert figures["collapse"] == pytest.approx(1, abs=1e-3)
    assert figures["match"] <= 100 / len(text.validation) + 1e-9


@pytest.mark.parametrize(
    ("student", "teacher", "expected"), [(0.3, 0.3, 0), (0.1, 0.3, 0), (1, 0.3, 1), (0.65, 0.3, 0.5)]
)
def test_narrowing(student: float, teacher: float, expected: float) -> None:
    assert language.narrowing(student, teacher) == pytest.approx(expected)


# Weights of sources


@pytest.mark.parametrize(
    ("sources", "changes", "warned"),
    [
        ([{"path": "a.csv", "weight": 3}], {}, ["a.csv"]),
        ([{"path": "a.csv"}], {}, []),
        ([{"path": "a.csv", "weight": 3}], {"templates": 5}, []),  # relative to these
        ([{"path": "a.csv", "weight": 3}, "cedict"], {}, []),
        ([{"path": "a.csv", "weight": 3}, "cldr:zh"], {}, []),
        ([{"path": "a.csv", "weight": 3}, {"path": "cldr:de_AT", "weight": 2}], {}, ["a.csv", "cldr:de_AT"]),
        ([{"path": "a.csv", "weight": 3}, {"path": "b.csv", "language": "ZH"}], {}, []),
        ([{"path": "a.csv", "weight": 3, "language": "en"}], {}, []),  # a column names them
        (["cedict", {"path": "imagenet21k", "language": "en", "weight": 2}], {}, []),
    ],
)
def test_a_weight_that_changes_nothing_is_told(
    sources: list[Any], changes: Any, warned: list[str], make: Any, caplog: Any
) -> None:
    data = make(data={"train": sources, **changes}).data
    found = [("de", ["Hund"])] if "cldr:de_AT" in warned else []
    language.warn_of_idle_weights(data, texts(("zh", ["狗"]), ("en", ["dog"]), *found))
    assert [message.split()[0] for message in caplog.messages] == warned
    assert all("is the only source of its language" in message for message in caplog.messages)


# The model card


def test_the_card_is_read_by_machines_and_people(make: Any) -> None:
    outcome = {"pairs": 1234567, "steps": 100}
    card = language.model_card(make(), ["zh", "no"], {"match": 46.512}, outcome)
    front = yaml.safe_load(card.split("---")[1])
    assert front["language"] == ["zh", "no", "en"]  # Norwegian, not false
    assert "1,234,567 pairs" in card
    assert "| match | 46.5 |" in card
    assert "sent to the base's own text tower" in card
    assert "of several languages" not in card
    sources = ["cedict", "cldr:zh_Hant", "/home/me/secret/pairs.csv"]
    card = language.model_card(make(data={"train": sources}), ["zh"], {}, outcome)
    assert "- `cedict`: CC-BY-SA-4.0\n- `cldr:zh_Hant`: Unicode-3.0\n- `pairs.csv`\n" in card
    assert "secret" not in card
    several = language.model_card(
        make(), ["zh", "de"], {}, {**outcome, "validation_languages": {"zh": 900, "de": 1000}}
    )
    assert "of several languages the mean (validation pairs: zh 900, de 1,000)" in several
    assert "read by the adapter as well" in language.model_card(make(english="adapter"), ["zh"], {}, outcome)


def test_a_prepared_text_needs_no_counts() -> None:
    text = ParallelText.from_pairs([("猫", "cat")])
    assert PreparedText(text, text).counts == {}


# The translation memory


def test_a_run_with_a_memory_looks_words_up(
    make: Any, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "concrete_nouns", lambda: frozenset(english for _, english in PAIRS))
    monkeypatch.setattr(language, "_MATCH_LOSS", 100.0)  # among so few words any memory disturbs the others
    recipe = make(adapter={"memory": 60})
    outcome = adapt(recipe)
    assert outcome is not None
    assert {"match_without_memory", "memory_weight"} <= set(outcome["validation"])
    model = load_adapted(tmp_path / "out", base=base)
    assert isinstance(model, LanguageAdapted)
    memory = model.adapter.memory
    assert memory is not None
    assert model.adapter.config.memory == len(memory) == 60
    words = prepare(recipe).words
    assert words is not None
    wanted = base.encode_text(words.pairs.english)
    strength = memory.weight.clone()
    cosines = []
    for weight in (torch.tensor(0.0), strength):
        memory.weight.copy_(weight)
        cosines.append((model.encode_text(words.pairs.targets) * wanted).sum(1))
    assert strength == 16
    assert cosines[1].mean() > cosines[0].mean()
    assert cosines[1].mean() > 0.95


def test_a_remembered_word_lies_between_its_meanings(
    make: Any, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "concrete_nouns", lambda: frozenset(english for _, english in PAIRS))
    monkeypatch.setattr(language, "_MATCH_LOSS", 100.0)
    recipe = make(adapter={"memory": 60})
    text = prepare(recipe)
    assert text.words is not None
    pairs = text.words.pairs
    word, english = pairs.targets[0], base.encode_text(pairs.english)
    light = int(np.argmin(english @ english[0]))
    both = ParallelText(
        [*pairs.targets, word], [*pairs.english, pairs.english[light]], ["zh"] * 61, np.float32([3] * 60 + [1])
    )
    monkeypatch.setattr(language, "prepare", lambda _: replace(text, words=replace(text.words, pairs=both)))
    adapt(recipe)
    memory = load_adapted(tmp_path / "out", base=base).adapter.memory
    assert len(memory) == 60
    found = (memory.values.float() * memory.value_scale[:, None])[sorted(pairs.targets).index(word)].numpy()
    expected = 3 * english[0] + english[light]
    expected /= np.linalg.norm(expected)
    assert np.abs(found - expected).max() < np.abs(english[0] - expected).max() / 4  # kept in 8 bits


def test_a_run_that_gains_nothing_says_that_the_start_is_kept(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    outcome = adapt(make(adapter={"init": "ridge"}, training={"learning_rate": 1e-12}))
    assert outcome is not None
    assert outcome["validation"]["epoch"] == -1
    assert "no epoch was better on validation than the start" in caplog.text
    assert "closed-form solution is kept, and training added nothing" in caplog.text


def test_a_memory_that_costs_match_is_weakened(
    make: Any, base: Any, student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "concrete_nouns", lambda: frozenset(english for _, english in PAIRS))
    monkeypatch.setattr(language, "_MATCH_LOSS", -200.0)  # nothing is good enough
    outcome = adapt(make(adapter={"memory": 60}))
    assert outcome is not None
    assert outcome["validation"]["memory_weight"] == 0
    assert outcome["validation"]["match"] == outcome["validation"]["match_without_memory"]
    model = load_adapted(tmp_path / "out", base=base)
    assert isinstance(model, LanguageAdapted)
    assert model.adapter.memory is None  # one that does nothing takes no room
    assert model.adapter.config.memory == 0


def test_a_memory_needs_nouns(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "concrete_nouns", frozenset)
    with pytest.raises(RecipeError, match=r"adapter\.memory=60.*no nouns.*set adapter\.memory=0"):
        adapt(make(adapter={"memory": 60}))
