from __future__ import annotations

import contextlib
import copy
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_links import CLASSES, save_language, save_tiny_domain, save_tiny_prompt
from trimtab.adapters.adapted import load, load_adapted
from trimtab.adapters.composing import load_composed
from trimtab.errors import DataError, ModelError
from trimtab.recipes.compose import compose, read_aliases
from trimtab.towers.memory import PairMemory
from trimtab.towers.prompting import PromptTower
from trimtab.towers.text_encoder import TextEncoder

ENGLISH, CHINESE = ["a cat", "a photo of a dog"], ["一只猫", "红色小汽车"]


@pytest.fixture(scope="module")
def base(tiny_base: Callable[[str], Any]) -> Any:
    return tiny_base("clip")


@pytest.fixture(scope="module")
def student(tiny_folder: Callable[[str], Path]) -> TextEncoder:
    return TextEncoder.load(tiny_folder("bert"), device="cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, base: Any, student: TextEncoder) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("links")
    found = {
        "language": save_language(place / "zh", base, student),
        "domain": save_tiny_domain(place / "shop", base, logit_scale=33.0),
        "prompt": save_tiny_prompt(place / "prompt", base),
    }
    on_domain = load_adapted(found["domain"], base=base)
    found["domain prompt"] = save_tiny_prompt(place / "domain-prompt", on_domain)
    found["instance prompt"] = save_tiny_prompt(place / "instance-prompt", on_domain, instance=True)
    return found


def put(base: Any, *parts: Path, **options: Any) -> Any:
    return load_composed(parts, base=base, **options)


def test_every_tower_is_that_of_its_link(
    base: Any, student: TextEncoder, folders: dict[str, Path], pictures: list[Image.Image]
) -> None:
    model = put(base, folders["language"], folders["domain"], student=student)
    domain, language = load_adapted(folders["domain"], base=base), load_adapted(folders["language"], base=base)
    assert list(model.links) == ["domain", "language"]
    assert np.array_equal(model.encode_image(pictures), domain.encode_image(pictures))
    assert np.array_equal(model.encode_text(ENGLISH), domain.encode_text(ENGLISH))
    assert np.array_equal(model.encode_text(CHINESE), language.encode_text(CHINESE))
    mixed = model.encode_text([CHINESE[0], ENGLISH[0]])
    assert np.allclose(mixed, [language.encode_text(CHINESE)[0], domain.encode_text(ENGLISH)[0]], atol=1e-6)
    assert model.logit_scale == pytest.approx(33)
    assert model.image_fingerprint == domain.fingerprint
    assert model.fingerprint not in (domain.fingerprint, language.fingerprint)
    assert np.array_equal(base.encode_image(pictures), load(base.name, device="cpu").encode_image(pictures))


@pytest.mark.parametrize("link", ["language", "domain", "prompt", "instance prompt"])
def test_loading_leaves_the_random_numbers_of_the_caller(base: Any, student: Any, folders: Any, link: str) -> None:
    before = torch.get_rng_state()
    own = base if link != "instance prompt" else load_adapted(folders["domain"], base=base)
    load_adapted(folders[link], base=own, **({"student": student} if link == "language" else {}))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_order_does_not_matter(base: Any, folders: dict[str, Path]) -> None:
    a, b = folders["language"], folders["domain"]
    assert put(base, a, b).fingerprint == put(base, b, a).fingerprint


def test_a_model_is_saved_from_where_it_was_loaded(
    base: Any, student: TextEncoder, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another folder of the same name may lie in what is the current one by then."""
    for project, seed in (("here", 1), ("there", 5)):
        save_tiny_domain(tmp_path / project / "shop", base, seed=seed)
        for link in ("language", "prompt"):
            shutil.copytree(folders[link], tmp_path / project / link)
    monkeypatch.chdir(tmp_path / "here")
    put(base, Path("shop"), Path("language"), student=student).save_pretrained("all")
    models = {name: load_adapted(name, base=base) for name in ("shop", "prompt")}
    models["language"] = load_adapted("language", base=base, student=student)
    models["all"] = put(base, Path("all"), student=student)
    monkeypatch.chdir(tmp_path / "there")
    shutil.rmtree("prompt")
    shutil.rmtree("language")
    for name, model in models.items():
        assert model.name == name
        model.save_pretrained(tmp_path / "saved" / name)
    assert load_adapted(tmp_path / "saved" / "shop", base=base).fingerprint == models["shop"].fingerprint
    assert put(base, tmp_path / "saved" / "all", student=student).fingerprint == models["all"].fingerprint


def test_english_through_the_adapter_stays_so(base: Any, student: Any, folders: Any, tmp_path: Path) -> None:
    other = save_language(tmp_path / "zh", base, student, english="adapter")
    model = put(base, other, folders["domain"])
    assert np.array_equal(model.encode_text(ENGLISH), load_adapted(other, base=base).encode_text(ENGLISH))


def test_names_in_latin_script_go_the_way_of_texts(
    base: Any, student: Any, folders: Any, pictures: list[Image.Image], tmp_path: Path
) -> None:
    german = save_language(tmp_path / "de", base, student, english="adapter", language="de")
    names = [*CLASSES, "Hund"]
    routed = put(base, folders["language"], folders["prompt"], student=student)
    assert routed.prompted_name("Hund") == "Hund"
    model = put(base, german, folders["prompt"], student=student)
    assert model.prompted_name("Hund") is None
    assert [model.prompted_name(name) for name in CLASSES] == list(CLASSES)
    mixed, alone = model.classifier(names), load_adapted(german, base=base, student=student).classifier(["Hund"])
    assert alone.templates == ("{}",)
    cosines = alone.similarities(pictures)[:, 0] * float(model.prompt.prompt.text_weight)
    assert np.allclose(mixed.similarities(pictures)[:, 3], cosines, atol=1e-5)


@pytest.mark.parametrize("with_language", [False, True])
def test_the_dial_turns_the_domain_alone(
    base: Any, folders: dict[str, Path], pictures: list[Image.Image], with_language: bool
) -> None:
    parts = [folders["domain"], *([folders["language"]] if with_language else [])]
    model = put(base, *parts)
    whole, before = model.encode_text(CHINESE), model.fingerprint
    model.alpha = 0
    assert model.alpha == 0
    assert model.fingerprint != before
    assert np.array_equal(model.encode_image(pictures), base.encode_image(pictures))
    if with_language:
        assert np.array_equal(model.encode_text(CHINESE), whole)
    model.alpha = 1
    assert model.fingerprint == before


def test_without_a_domain_there_is_no_dial(base: Any, folders: dict[str, Path]) -> None:
    for model in (put(base, folders["language"]), load_adapted(folders["prompt"], base=base), base):
        for name in ("alpha", "gate", "memory", "states_below"):
            assert not hasattr(model, name)
            with pytest.raises(ModelError, match="no domain link"):
                setattr(model, name, 0.5)


def test_whoever_turns_the_domain_turns_the_model(
    base: Any, folders: dict[str, Path], pictures: list[Image.Image], tmp_path: Path
) -> None:
    model = put(base, folders["language"], folders["domain"], folders["domain prompt"])
    before = model.fingerprint
    model.domain.alpha = 0.4
    assert model.alpha == 0.4
    assert model.fingerprint != before
    assert model.language.fingerprint == model.language.fingerprint_on(model.domain)
    again = load(model.save_pretrained(tmp_path / "turned"), base=base)
    assert again.fingerprint == model.fingerprint
    assert np.array_equal(again.encode_image(pictures), model.encode_image(pictures))
    model.domain.alpha = 1
    assert model.fingerprint == before
    model.memory = PairMemory(2, base.embedding_dim)
    assert model.domain.memory is model.memory is not None
    assert model.fingerprint != before
    model.memory = None
    assert model.fingerprint == before
    assert model.gate is None


def test_prompts_on_a_domain_have_its_dial(base: Any, folders: dict[str, Path], pictures: list[Image.Image]) -> None:
    domain = load_adapted(folders["domain"], base=base)
    model = load_adapted(folders["domain prompt"], base=domain)
    model.alpha = 0
    assert domain.alpha == 0
    assert model.fingerprint == domain.fingerprint
    assert np.array_equal(model.encode_image(pictures), base.encode_image(pictures))
    assert np.array_equal(model.encode_text(ENGLISH), base.encode_text(ENGLISH))


# Threads


def test_models_of_one_base_take_turns(
    base: Any, folders: dict[str, Path], pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one has its adapters on the towers, the others wait rather than pass through them."""
    first, second = (load_adapted(folders["domain"], base=base) for _ in range(2))
    scored = load_adapted(folders["instance prompt"], base=first).classifier()
    passes = {
        "base": lambda: base.encode_image(pictures),
        "texts": lambda: base.encode_text(ENGLISH),
        "second": lambda: second.encode_image(pictures),
        "scores": lambda: scored.scores(pictures),
    }
    expected = {name: run() for name, run in passes.items()}
    inside, leave = threading.Event(), threading.Event()
    attach = first.adapters.attach

    @contextlib.contextmanager
    def held(base: Any) -> Iterator[None]:
        with attach(base):
            inside.set()
            leave.wait(10)
            yield

    monkeypatch.setattr(first.adapters, "attach", held)
    found: dict[str, Any] = {}
    holder = threading.Thread(target=lambda: first.encode_text(ENGLISH))
    holder.start()
    assert inside.wait(10)
    others = [threading.Thread(target=lambda name=name: found.update({name: passes[name]()})) for name in passes]
    for thread in others:
        thread.start()
    others[0].join(0.2)
    assert found == {}
    leave.set()
    for thread in (holder, *others):
        thread.join(30)
    assert found.keys() == passes.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name


def test_a_deep_copy_is_a_model_of_its_own(base: Any, folders: dict[str, Path], pictures: list[Image.Image]) -> None:
    model = put(base, folders["language"], folders["domain"], folders["domain prompt"])
    twin = copy.deepcopy(model)
    before = model.encode_image(pictures)
    twin.alpha = 0
    assert np.array_equal(model.encode_image(pictures), before)
    assert np.array_equal(twin.encode_image(pictures), base.encode_image(pictures))
    assert twin.model is not model.model
    assert twin.turn is twin.domain.turn is not model.turn
    assert np.array_equal(twin.encode_text(CHINESE), model.encode_text(CHINESE))
    assert copy.copy(model).model is model.model


# Prompts


@pytest.mark.parametrize("kind", ["domain prompt", "instance prompt"])
def test_prompts_score_as_on_the_model_they_were_trained_on(
    base: Any, folders: dict[str, Path], pictures: list[Image.Image], kind: str
) -> None:
    model = put(base, folders["language"], folders["domain"], folders[kind])
    alone = load_adapted(folders[kind], base=load_adapted(folders["domain"], base=base))
    expected = alone.classifier().scores(pictures)
    assert model.classifier().classes == CLASSES
    assert np.allclose(model.classifier().scores(pictures), expected, atol=1e-5)
    assert np.array_equal(model.encode_image(pictures), alone.encode_image(pictures))
    plain = put(base, folders["language"], folders["domain"])
    assert model.fingerprint != plain.fingerprint
    assert model.image_fingerprint == plain.image_fingerprint


@pytest.mark.parametrize("kind", ["domain prompt", "instance prompt"])
def test_names_in_chinese(base: Any, folders: dict[str, Path], pictures: list[Image.Image], kind: str) -> None:
    aliases = {"猫": "cat", "狗": "dog"}
    model = put(base, folders["language"], folders["domain"], folders[kind], aliases=aliases)
    chinese = model.classifier(["猫", "狗", "red car"])
    assert chinese.classes == ("猫", "狗", "red car")
    english = model.classifier(list(CLASSES)).scores(pictures)
    assert np.allclose(chinese.scores(pictures), english, atol=1e-6)
    assert chinese.predict(pictures[0], top_k=3)[0][0].label in chinese.classes
    # A name that the prompts do not know is a vector of the language link.
    mixed = model.classifier(["茶", "狗", "猫"]).scores(pictures)
    assert np.allclose(mixed[:, 2] / mixed[:, 1], english[:, 0] / english[:, 1], rtol=1e-3)
    zero_shot = model.classifier(["茶", "花"])
    plain = put(base, folders["language"], folders["domain"])
    assert np.allclose(zero_shot.scores(pictures), plain.classifier(["茶", "花"]).scores(pictures), atol=1e-6)
    added = model.classifier()
    added.add_classes(["茶"])
    assert added.classes == (*CLASSES, "茶")
    assert added.scores(pictures).shape == (len(pictures), 4)


@pytest.mark.parametrize("kind", ["domain prompt", "instance prompt"])
def test_names_for_one_class_are_named(
    base: Any, folders: dict[str, Path], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = put(base, folders["language"], folders["domain"], folders[kind], aliases={"狗": "dog"})
    with caplog.at_level(logging.WARNING, "trimtab"):
        model.classifier(["cat", "dog", "茶"])
        model.classifier(["cat", "dog", "狗", "茶"])
    found = [record.args[:2] for record in caplog.records if record.name == "trimtab.data.classes"]  # type: ignore[index]
    assert found == [("dog", "狗")]


def test_a_mixed_score_is_the_cosine_with_the_language_links_vector(
    base: Any, folders: dict[str, Path], pictures: list[Image.Image]
) -> None:
    model = put(base, folders["language"], folders["domain"], folders["domain prompt"])
    scores = model.classifier(["cat", "茶"]).scores(pictures)
    vector = model.classifier(["茶"])._known[1][0]  # zero-shot
    prompted = model.prompt.prompted(CLASSES)
    with torch.no_grad():
        cat = prompted.weights(prompted.embeddings())[0].numpy()
    images = model.encode_image(pictures)
    expected = 20.0 * (images @ vector - images @ cat)
    assert np.allclose(np.log(scores[:, 1] / scores[:, 0]), expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["domain prompt", "instance prompt"])
def test_a_name_that_prompts_do_not_know_weighs_the_same_in_every_script(
    base: Any, folders: dict[str, Path], pictures: list[Image.Image], kind: str
) -> None:
    model = put(base, folders["language"], folders["domain"], folders[kind])
    model.prompt.prompt.text_weight.fill_(0.25)
    classes, embeddings = model.classifier(["cat", "bear", "茶"])._known[1]
    weights = classes.weights(embeddings)
    assert weights[1:].norm(dim=1).tolist() == pytest.approx([0.25, 0.25], abs=1e-5)
    # Pictures are scored so too, also where each has prompts of its own.
    scores = np.log(model.classifier(["茶", "花", "cat"]).scores(pictures))
    vectors = model.classifier(["茶", "花"])._known[1]  # zero-shot
    difference = 0.25 * 20.0 * model.encode_image(pictures) @ (vectors[0] - vectors[1])
    assert np.allclose(scores[:, 0] - scores[:, 1], difference, atol=1e-3)


def test_names_are_known_in_other_case_and_white_space(
    base: Any, folders: dict[str, Path], pictures: list[Image.Image]
) -> None:
    parts = folders["language"], folders["domain"], folders["domain prompt"]
    model = put(base, *parts, aliases={"小 猫": "cat", "Hund": "dog"})
    expected = model.classifier(list(CLASSES)).scores(pictures)
    for names in (["Cat", " dog", "red\xa0car"], ["cat", "DOG\ufeff", "Red  Car"], ["小\u3000猫 ", "hund", "red car"]):
        classifier = model.classifier(names)
        assert classifier.classes == tuple(names)
        assert np.allclose(classifier.scores(pictures), expected, atol=1e-6)
        assert classifier.predict(pictures[0], top_k=3)[0][0].label in names


def test_hand_templates_replace_prompts(base: Any, folders: dict[str, Path], pictures: list[Image.Image]) -> None:
    model = put(base, folders["domain"], folders["domain prompt"])
    plain = put(base, folders["domain"])
    given = {"classes": ["cat", "dog"], "templates": ["a {}"]}
    assert np.allclose(
        model.classifier(**given).scores(pictures), plain.classifier(**given).scores(pictures), atol=1e-6
    )


def test_without_prompts_a_classifier_needs_names(base: Any, folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="not trained on classes"):
        put(base, folders["domain"]).classifier()


# What does not go together


def test_sets_that_cannot_work_are_refused(
    base: Any, tiny_base: Callable[[str], Any], student: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = save_tiny_domain(tmp_path / "other", base, seed=5)
    with pytest.raises(ModelError, match="are both domain links"):
        put(base, folders["domain"], other)
    siglip = tiny_base("siglip")
    foreign = save_tiny_domain(tmp_path / "foreign", siglip)
    with pytest.raises(ModelError, match="was trained on the base"):
        put(base, folders["language"], foreign)
    with pytest.raises(ModelError, match="was trained on the base"):
        put(siglip, folders["domain"])
    with pytest.raises(ModelError, match=r"without the domain link .*shop.*Train the prompts again with base="):
        put(base, folders["domain"], folders["prompt"])
    with pytest.raises(ModelError, match=r"that is not among the links: give that folder too"):
        put(base, folders["language"], folders["domain prompt"])
    with pytest.raises(ModelError, match="give that folder too"):
        load_composed([folders["domain prompt"]])
    with pytest.raises(ModelError, match="both no adapted folders"):
        load_composed(["starter", base.name, folders["domain"]])
    with pytest.raises(ModelError, match="at least one adapted folder"):
        load_composed([base.name])
    with pytest.raises(DataError, match="no prompt link"):
        put(base, folders["domain"], aliases={"猫": "cat"})
    for name in ("dog", "Dog"):
        with pytest.raises(DataError, match=rf"'{name}' is given as another name of 'cat'.* class 'dog': leave it out"):
            put(base, folders["domain"], folders["domain prompt"], aliases={name: "cat"})
    assert put(base, folders["domain"], folders["domain prompt"], aliases={"Cat": "cat"}).aliases == {"Cat": "cat"}
    with pytest.raises(DataError, match=r"do not know: 鸟 for 'bird'"):
        put(base, folders["domain"], folders["domain prompt"], aliases={"鸟": "bird"})


def test_a_fusion_link_is_refused(base: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["language"], tmp_path / "fusion"))
    raw = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps({**raw, "link": "fusion"}))
    with pytest.raises(ModelError, match="fusion link"):
        put(base, folders["domain"], folder)


def test_prompts_trained_on_a_language_model_need_no_more_than_its_towers(
    base: Any, student: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    spoken = load_adapted(folders["language"], base=base)
    prompt = save_tiny_prompt(tmp_path / "prompt", spoken)
    assert put(base, folders["language"], prompt).prompt is not None
    with pytest.raises(ModelError, match="without the domain link"):
        put(base, folders["language"], folders["domain"], prompt)


def test_prompts_trained_on_a_composed_model_go_through_its_text_adapters(
    base: Any, folders: dict[str, Path], pictures: list[Image.Image], tmp_path: Path
) -> None:
    core = put(base, folders["language"], folders["domain"])
    assert PromptTower(core).base is core.domain
    assert PromptTower(put(base, folders["language"])).base is base
    prompt = save_tiny_prompt(tmp_path / "prompt", core)
    expected = load_adapted(prompt, base=core).classifier().scores(pictures)
    whole = put(base, folders["language"], folders["domain"], prompt)
    assert np.allclose(whole.classifier().scores(pictures), expected, atol=1e-6)


def test_a_class_that_prompts_score_is_named_with_the_others(base: Any, folders: dict[str, Path]) -> None:
    model = put(base, folders["language"], folders["domain"], folders["domain prompt"])
    classifier = model.classifier(["茶", "花"])
    classifier.add_classes("狗")
    with pytest.raises(DataError, match="'cat' is scored by prompts, and the classes so far are not: name all"):
        classifier.add_classes(["一只猫", "cat"])
    assert classifier.classes == ("茶", "花", "狗")


def test_the_student_below_prompts_may_lie_elsewhere(
    base: Any, student: TextEncoder, folders: dict[str, Path], tmp_path: Path, pictures: list[Image.Image]
) -> None:
    spoken = load_adapted(folders["language"], base=base)
    prompt = save_tiny_prompt(tmp_path / "prompt", spoken)
    moved = shutil.copytree(student.name, tmp_path / "moved")
    found = load_adapted(prompt, student=moved, device="cpu")
    assert Path(found.base.student.name) == moved
    assert np.allclose(found.encode_text(CHINESE), spoken.encode_text(CHINESE), atol=1e-6)
    with pytest.raises(ModelError, match="no language link"):
        load_adapted(prompt, base=spoken, student=moved)


# Folders


@pytest.fixture
def composed(base: Any, folders: dict[str, Path], tmp_path: Path) -> Path:
    names = tmp_path / "names.csv"
    names.write_text("class,zh\ncat,猫\ndog,狗\n", encoding="utf-8")
    parts = [base.name, folders["language"], folders["domain prompt"], folders["domain"]]
    outcome = compose(parts, tmp_path / "shop-zh", names=names, device="cpu")
    assert outcome["names"] == 2
    return tmp_path / "shop-zh"


def test_a_folder_gives_the_same_model(
    base: Any, folders: dict[str, Path], composed: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    model = load(composed, device="cpu")
    direct = load(base.name, links=[folders["domain"], folders["language"], folders["domain prompt"]], device="cpu")
    assert model.aliases == {"猫": "cat", "狗": "dog"}
    assert np.array_equal(model.encode_image(pictures), direct.encode_image(pictures))
    assert np.array_equal(model.encode_text(CHINESE), direct.encode_text(CHINESE))
    scores = model.classifier(["猫", "狗", "red car"]).scores(pictures)
    assert np.allclose(scores, direct.classifier(list(CLASSES)).scores(pictures), atol=1e-6)
    files = sorted(path.relative_to(composed).as_posix() for path in composed.rglob("*") if path.is_file())
    links = [
        f"{link}/{name}"
        for link in ("domain", "language", "prompt")
        for name in ("adapter.json", "adapter.safetensors")
    ]
    assert set(links) | {"README.md", "composed.json"} <= set(files)
    moved = Path(shutil.move(composed, tmp_path / "moved"))
    assert load(moved, device="cpu").fingerprint == model.fingerprint


def test_the_dial_is_kept(composed: Path, tmp_path: Path) -> None:
    model = load(composed, device="cpu")
    model.alpha = 0.5
    again = load(model.save_pretrained(tmp_path / "half"), device="cpu")
    assert again.alpha == 0.5
    assert again.fingerprint == model.fingerprint


def test_a_composed_folder_takes_a_further_link(base: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    compose([folders["domain"]], tmp_path / "one", device="cpu")
    model = load(tmp_path / "one", links=[folders["language"]], device="cpu")
    assert list(model.links) == ["domain", "language"]
    with pytest.raises(ModelError, match="both domain links"):
        load(tmp_path / "one", links=[folders["domain"]], device="cpu")


def test_a_composed_folder_takes_names(composed: Path, tmp_path: Path) -> None:
    names = tmp_path / "more.csv"
    names.write_text("class,de\ncat,Katze\n", encoding="utf-8")
    assert compose([composed], tmp_path / "named", names=names, device="cpu")["names"] == 3
    model = load(tmp_path / "named", device="cpu")
    assert model.aliases == {"猫": "cat", "狗": "dog", "Katze": "cat"}
    assert model.fingerprint != load(composed, device="cpu").fingerprint
    change(composed, aliases={"狗": "cat"})
    with pytest.raises(ModelError, match="not what was composed"):
        compose([composed], tmp_path / "again", names=names, device="cpu")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "language/adapter.safetensors").unlink(), r"language lacks adapter\.safetensors"),
        (lambda folder: (folder / "composed.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "composed.json").write_text("[" * 100_000), "damaged"),
        (lambda folder: change(folder, schema_version=float("inf")), "damaged"),
        (lambda folder: change(folder, schema_version=2), "upgrade"),
        (lambda folder: change(folder, schema_version=2, links=None, base=None), "upgrade"),
        (lambda folder: change(folder, schema_version=True), "no valid schema_version"),
        (lambda folder: change(folder, schema_version=1.0), "no valid schema_version"),
        (lambda folder: change(folder, links=["../x"]), "none of domain"),
        (lambda folder: change(folder, aliases={"狗": "cat"}), "not what was composed"),
    ],
)
def test_damaged_folders_are_refused(composed: Path, damage: Callable[[Path], Any], words: str) -> None:
    damage(composed)
    with pytest.raises(ModelError, match=words):
        load(composed, device="cpu")


def change(folder: Path, **values: Any) -> None:
    raw = json.loads((folder / "composed.json").read_text())
    (folder / "composed.json").write_text(json.dumps({**raw, **values}))


def test_folders_of_other_things_are_left_alone(base: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ModelError, match="something else"):
        compose([folders["domain"]], tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,zh\ncat,猫\n", "needs one column 'class'"),
        ("class,zh,class\ncat,猫,dog\n", "needs one column 'class'"),
        ("class\ncat\n", "and one with other names"),
        ("class,zh\ncat,猫\ndog,猫\n", "row 3: '猫' stands for 'cat' and for 'dog'"),
        ("class,zh\ncat\n", "row 2: has 1 fields"),
        ('class,zh\n\ncat,"大\n猫"\n\ndog,"大\n猫"\n', "row 6: .* stands for 'cat' and for 'dog'"),
    ],
)
def test_tables_of_names_are_checked(folders: Any, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "names.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        compose([folders["domain"], folders["domain prompt"]], tmp_path / "out", names=tmp_path / "names.csv")


def test_every_column_but_the_class_gives_names(tmp_path: Path) -> None:
    path = tmp_path / "names.csv"
    path.write_text("zh,class,zh,\n猫,cat,猫咪,\n狗,dog,,cafe\u0301\n", encoding="utf-8")
    assert read_aliases(path) == {"猫": "cat", "猫咪": "cat", "狗": "dog", "caf\u00e9": "dog"}
