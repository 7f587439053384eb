from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import trimtab
from tiny_adapted import save_tiny_adapted
from tiny_models import CORPUS
from trimtab.adapters.adapted import LanguageAdapted, build_language_adapter, load_adapted
from trimtab.adapters.files import BaseReference, read_adapter, save_adapter
from trimtab.adapters.language import LanguageAdapter
from trimtab.config import LanguageAdapterConfig, to_mapping
from trimtab.errors import DataError, ModelError, TrimtabError
from trimtab.recipes.info import describe
from trimtab.towers.dual_encoder import DualEncoder
from trimtab.towers.hf import load_base
from trimtab.towers.text_encoder import TextEncoder

ENGLISH = [text for text in CORPUS if text.isascii()]
CHINESE = [text for text in CORPUS if not text.isascii()]


@pytest.fixture(scope="module")
def student(tiny_folder: Callable[[str], Path]) -> TextEncoder:
    return TextEncoder.load(tiny_folder("bert"), prefix="the ", max_tokens=20, device="cpu")


def make_adapter(base: DualEncoder, student: TextEncoder, *, taken: int = 1, **changes: Any) -> LanguageAdapter:
    torch.manual_seed(0)
    config = LanguageAdapterConfig(**{"width": 8, "layers": 1, "heads": 2, **changes})
    adapter = LanguageAdapter(config, input_dim=student.hidden_size * taken, output_dim=base.embedding_dim)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    adapter.set_statistics(torch.randn(30, adapter.input_mean.numel()), torch.randn(30, base.embedding_dim) * 3)
    return adapter


@pytest.fixture
def adapted(tiny_base: Any, student: TextEncoder) -> LanguageAdapted:
    base = tiny_base("clip")
    return LanguageAdapted(base, student, make_adapter(base, student, taken=2), layers=(1, -1))


def save(folder: Path, adapted: LanguageAdapted, **changes: Any) -> Path:
    from trimtab.adapters.files import StudentReference

    student = adapted.student
    options: dict[str, Any] = {
        "link": "language",
        "tensors": adapted.adapter.state_dict(),
        "config": {
            "adapter": to_mapping(adapted.adapter.config),
            "input_dim": adapted.adapter.input_mean.numel(),
            "output_dim": adapted.embedding_dim,
            "english": adapted.english,
        },
        "base": BaseReference.of(adapted.base),
        "student": StudentReference(
            student.name, student.fingerprint, student.prefix, adapted.layers, student.max_tokens
        ),
        "card": "# card\n",
    }
    return save_adapter(folder, **{**options, **changes})


# Encoding


def test_other_scripts_go_through_the_adapter(adapted: LanguageAdapted) -> None:
    found = adapted.encode_text(CHINESE, batch_size=5)
    states = adapted.student.token_states(CHINESE, (1, -1))
    with torch.no_grad():
        for row, one in zip(found, states, strict=True):
            features = adapted.adapter(torch.from_numpy(one)[None], torch.ones(1, len(one), dtype=torch.bool))
            expected = torch.nn.functional.normalize(features, dim=-1)[0]
            np.testing.assert_allclose(row, expected, atol=1e-5)
    assert found.dtype == np.float32
    assert found.shape == (len(CHINESE), adapted.embedding_dim)


@pytest.mark.parametrize(
    "name",
    [
        *("bert", "xlm-roberta", "clip", "chinese_clip"),
        "siglip",
    ],
)
def test_deployment_sees_the_states_that_training_cached(name: str, tiny_folder: Any, tiny_base: Any) -> None:
    """Training reads `token_states` from a cache, deployment goes through tokens; both are one thing."""
    student = TextEncoder.load(tiny_folder(name), device="cpu")
    base = tiny_base("clip")
    adapted = LanguageAdapted(base, student, make_adapter(base, student), english="adapter")
    texts = [*CHINESE[:3], "a photo of a cat " * 9, "a"]
    found = adapted.encode_text(texts)
    with torch.no_grad():
        for row, one in zip(found, student.token_states(texts), strict=True):
            features = adapted.adapter(torch.from_numpy(one)[None], torch.ones(1, len(one), dtype=torch.bool))
            np.testing.assert_allclose(row, torch.nn.functional.normalize(features, dim=-1)[0], atol=1e-5)


def test_english_is_the_bases_own(adapted: LanguageAdapted) -> None:
    assert np.array_equal(adapted.encode_text(ENGLISH), adapted.base.encode_text(ENGLISH))
    assert np.array_equal(adapted.encode_text("a cat"), adapted.base.encode_text("a cat"))


def test_english_through_the_adapter_if_so_wished(adapted: LanguageAdapted) -> None:
    through = LanguageAdapted(adapted.base, adapted.student, adapted.adapter, layers=adapted.layers, english="adapter")
    assert np.abs(through.encode_text(ENGLISH) - adapted.base.encode_text(ENGLISH)).max() > 0.1
    np.testing.assert_allclose(through.encode_text(CHINESE), adapted.encode_text(CHINESE), atol=1e-6)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(CORPUS), max_size=12), st.integers(1, 5))
def test_mixtures_keep_their_order(adapted: LanguageAdapted, texts: list[str], batch_size: int) -> None:
    together = adapted.encode_text(iter(texts), batch_size=batch_size)
    assert together.shape == (len(texts), adapted.embedding_dim)
    for row, text in zip(together, texts, strict=True):
        np.testing.assert_allclose(row, adapted.encode_text(text)[0], atol=1e-5)


def test_images_are_the_bases_own(adapted: LanguageAdapted, pictures: list[Image.Image]) -> None:
    assert np.array_equal(adapted.encode_image(pictures), adapted.base.encode_image(pictures))
    similarity = adapted.similarity(pictures, [*CHINESE[:2], *ENGLISH[:2]])
    assert similarity.shape == (5, 4)
    np.testing.assert_allclose(similarity[:, 2:], adapted.base.similarity(pictures, ENGLISH[:2]), atol=1e-6)
    assert adapted.logit_scale == adapted.base.logit_scale


def test_skipped_images_are_told_by_the_adapted_model(adapted: LanguageAdapted, pictures: list[Image.Image]) -> None:
    assert len(adapted.encode_image([pictures[0], b"not a picture", pictures[1]], on_error="skip")) == 2
    assert [skipped[0] for skipped in adapted.last_skipped] == [1]


def test_cut_texts_of_both_towers_are_counted(adapted: LanguageAdapted) -> None:
    adapted.encode_text(["a cat " * 50, "猫" * 50, "a cat", "猫", "狗" * 60])
    assert adapted.last_truncated == 3
    adapted.encode_text(["猫"])
    assert adapted.last_truncated == 0


@pytest.mark.parametrize("english", ["route", "adapter"])
def test_what_is_no_text_is_named_by_its_place(adapted: LanguageAdapted, english: Any) -> None:
    adapted.english = english
    with pytest.raises(DataError, match="text 2 is a NoneType"):
        adapted.encode_text(["猫", "a cat", None])  # type: ignore[list-item]


def test_all_three_move_together(tiny_folder: Any) -> None:
    base = load_base(tiny_folder("clip"), device="cpu")
    student = TextEncoder.load(tiny_folder("bert"), device="cpu")
    adapted = LanguageAdapted(base, student, make_adapter(base, student))
    assert adapted.to("cpu") is adapted
    assert adapted.to(torch.device("meta")) is adapted
    for device in (base.device, student.device, adapted.device, adapted.adapter.input_mean.device):
        assert device.type == "meta"


def test_everything_is_frozen(adapted: LanguageAdapted) -> None:
    for module in (adapted.base.model, adapted.student.model, adapted.adapter):
        assert not any(parameter.requires_grad for parameter in module.parameters())
        module.train()
        assert not any(part.training for part in module.modules())
    adapted.encode_text(CHINESE)
    assert not adapted.text_features(CHINESE[:2]).requires_grad


def test_fingerprints_tell_adapters_and_their_use_apart(tiny_base: Any, student: TextEncoder) -> None:
    """Caches of embeddings are keyed by it."""
    base = tiny_base("clip")
    adapter = make_adapter(base, student)
    other = make_adapter(base, student)
    with torch.no_grad():
        other.up.bias[0] += 1e-3
    models = [
        LanguageAdapted(base, student, adapter),
        LanguageAdapted(base, student, other),
        LanguageAdapted(base, student, adapter, english="adapter"),
        LanguageAdapted(base, student, adapter, layers=(1,)),
        LanguageAdapted(tiny_base("chinese_clip"), student, adapter),
    ]
    assert len({base.fingerprint, *(model.fingerprint for model in models)}) == 6
    assert {model.image_fingerprint for model in models[:4]} == {base.image_fingerprint}  # their pictures are the same
    assert LanguageAdapted(base, student, make_adapter(base, student)).fingerprint == models[0].fingerprint


# Folders


@pytest.mark.parametrize("family", ["clip", "siglip", "chinese_clip", "altclip", "vision-text-dual-encoder", "flava"])
def test_what_is_saved_is_loaded_exactly(
    family: str, tiny_base: Any, student: TextEncoder, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    base = tiny_base(family)
    model = LanguageAdapted(base, student, make_adapter(base, student))
    folder = save(tmp_path / "adapted", model)
    again = trimtab.load(folder, device="cpu")
    assert isinstance(again, LanguageAdapted)
    for texts in (CHINESE, ENGLISH, CORPUS):
        assert np.array_equal(again.encode_text(texts), model.encode_text(texts))
    assert np.array_equal(again.encode_image(pictures), model.encode_image(pictures))
    assert (again.name, again.folder) == (str(folder), folder)
    assert (again.student.prefix, again.student.max_tokens) == ("the ", 20)
    assert again.fingerprint == model.fingerprint
    assert again.embedding_dim == base.embedding_dim


@pytest.mark.parametrize(
    "changes",
    [{"pooling": "attention"}, {"pooling": "cls", "layers": 2}, {"init": "random", "layers": 0}, {"feedforward": 1}],
)
def test_every_kind_of_adapter_is_built_again(
    changes: dict[str, Any], tiny_base: Any, student: TextEncoder, tmp_path: Path
) -> None:
    base = tiny_base("clip")
    model = LanguageAdapted(base, student, make_adapter(base, student, **changes), english="adapter")
    again = load_adapted(save(tmp_path / "a", model), base=base, student=student)
    assert again.adapter.config == model.adapter.config
    assert again.english == "adapter"
    assert np.array_equal(again.encode_text(CORPUS), model.encode_text(CORPUS))


def test_loaded_objects_are_used_as_they_are(adapted: LanguageAdapted, tmp_path: Path) -> None:
    again = load_adapted(save(tmp_path / "a", adapted), base=adapted.base, student=adapted.student)
    assert again.base is adapted.base
    assert again.student is adapted.student
    assert again.layers == (1, -1)


def test_base_and_student_may_have_moved(adapted: LanguageAdapted, tmp_path: Path) -> None:
    places = {"base": tmp_path / "base", "student": tmp_path / "student"}
    shutil.copytree(adapted.base.name, places["base"])
    shutil.copytree(adapted.student.name, places["student"])
    described = {
        "base": replace(BaseReference.of(adapted.base), name=str(tmp_path / "gone")),
        "student": replace(read_adapter(save(tmp_path / "x", adapted)).student, name=str(tmp_path / "gone")),  # type: ignore[type-var]
    }
    folder = save(tmp_path / "a", adapted, **described)
    with pytest.raises(ModelError, match=r"names the base .*gone'.* trimtab relocate \S+/a --base"):
        trimtab.load(folder, device="cpu")
    with pytest.raises(ModelError, match=r"names the student .*gone'.* --student"):
        trimtab.load(folder, device="cpu", base=places["base"])
    with pytest.raises(ModelError, match="names the base 'C:"):  # written on another system
        trimtab.load(save(tmp_path / "b", adapted, base=replace(described["base"], name="C:\\models\\clip")))
    again = trimtab.load(folder, device="cpu", **places)
    assert np.array_equal(again.encode_text(CORPUS), adapted.encode_text(CORPUS))


@pytest.mark.parametrize("gone", ["/models/{}", "C:\\models\\{}"])
def test_models_beside_the_folder_are_found(
    gone: str, adapted: LanguageAdapted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = read_adapter(save(tmp_path / "x", adapted)).student
    assert student is not None
    described = {
        "base": replace(BaseReference.of(adapted.base), name=gone.format("clip-base")),
        "student": replace(student, name=gone.format("text-encoder")),
    }
    shipped = tmp_path / "shipped"
    folder = save(shipped / "chinese", adapted, **described)
    shutil.copytree(adapted.base.name, shipped / "clip-base")
    shutil.copytree(adapted.student.name, shipped / "text-encoder")
    again = trimtab.load(folder, device="cpu")
    assert np.array_equal(again.encode_text(CORPUS), adapted.encode_text(CORPUS))
    assert "clip-base is taken" in caplog.text
    # Composed models look beside themselves, also for what their links name.
    saved = trimtab.load(shipped / "clip-base", links=[folder], device="cpu").save_pretrained(shipped / "both")
    shutil.rmtree(folder)
    assert np.array_equal(trimtab.load(saved, device="cpu").encode_text(CORPUS), adapted.encode_text(CORPUS))
    # Another model of that name is not taken for it.
    shutil.rmtree(shipped / "clip-base")
    shutil.copytree(adapted.student.name, shipped / "clip-base")
    with pytest.raises(ModelError):
        trimtab.load(saved, device="cpu")


def test_an_uploaded_folder_names_no_place_and_can_be_loaded(
    adapted: LanguageAdapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hub:
        def __init__(self, token: str | None = None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, **_: Any) -> str:
            return repo_id

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    folder = save(
        tmp_path / "zh", adapted, recipe={"out": str(tmp_path / "zh")}, data={str(tmp_path / "pairs.csv"): {"pairs": 3}}
    )
    single = trimtab.load(folder, device="cpu")
    together = trimtab.load(adapted.base.name, links=[folder], device="cpu")
    for model, repository in ((single, "me/zh"), (together, "me/both")):
        model.push_to_hub(repository)
        uploaded = tmp_path / repository
        texts = [path.read_text(encoding="utf-8") for path in uploaded.rglob("*") if path.suffix in (".json", ".md")]
        parents = {str(place.parent) for place in (tmp_path, Path(adapted.base.name), Path(adapted.student.name))}
        assert not [parent for parent in parents for text in texts if parent in text]
        # What it was trained on is asked for, and not taken from a hub.
        with pytest.raises(ModelError, match=r"no such folder: put it .*trimtab relocate"):
            trimtab.load(uploaded, device="cpu")
        places = {"base": adapted.base.name, "student": adapted.student.name}
        again = trimtab.load(uploaded, device="cpu", **places)
        assert np.array_equal(again.encode_text(CORPUS), adapted.encode_text(CORPUS))
    assert read_adapter(folder).recipe == {"out": str(tmp_path / "zh")}  # the folder itself keeps what it says
    for model in (adapted.base, adapted.student):
        shutil.copytree(model.name, tmp_path / "me" / Path(model.name).name)
    for name in ("zh", "both"):
        again = trimtab.load(tmp_path / "me" / name, device="cpu")
        assert np.array_equal(again.encode_text(CORPUS), adapted.encode_text(CORPUS))


def test_another_base_or_student_is_refused(adapted: LanguageAdapted, tiny_folder: Any, tmp_path: Path) -> None:
    import tiny_models

    folder = save(tmp_path / "a", adapted)
    with pytest.raises(ModelError, match=r"was trained on the base .* not on .*chinese_clip"):
        load_adapted(folder, base=tiny_folder("chinese_clip"), device="cpu")
    twin = tiny_models.build_clip(tmp_path / "twin", seed=1)  # the same sizes, other weights
    with pytest.raises(ModelError, match=r"was trained on the base .* not on .*twin"):
        load_adapted(folder, base=twin, device="cpu")
    with pytest.raises(ModelError, match=r"was trained on the student .* not on .*xlm-roberta"):
        load_adapted(folder, base=adapted.base, student=tiny_folder("xlm-roberta"), device="cpu")
    with pytest.raises(ModelError, match="was trained on the base"):
        load_adapted(folder, base=adapted)  # an adapted model is not its base


def test_descriptions_that_do_not_fit_are_refused(adapted: LanguageAdapted, tmp_path: Path) -> None:
    config = read_adapter(save(tmp_path / "whole", adapted)).config
    cases: list[tuple[dict[str, Any], str]] = [
        ({key: value for key, value in config.items() if key != "input_dim"}, "lacks config 'input_dim'"),
        ({key: value for key, value in config.items() if key != "adapter"}, "lacks config 'adapter'"),
        ({key: value for key, value in config.items() if key != "english"}, "english=None rather than 'route'"),
        ({**config, "english": "maybe"}, "english='maybe' rather than 'route'"),
        ({**config, "output_dim": None}, "has a wrong size"),
        ({**config, "output_dim": 7}, "does not fit the language adapter"),
        ({**config, "adapter": {**config["adapter"], "width": 16}}, "does not fit the language adapter"),
        ({**config, "adapter": {**config["adapter"], "depth": 1}}, "depth"),
    ]
    for changed, message in cases:
        folder = save(tmp_path / "a", adapted, config=changed)
        with pytest.raises(TrimtabError, match=message) as caught:
            load_adapted(folder, base=adapted.base, student=adapted.student)
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize("size", [-1, 10**13, 10**30, float("inf")])
@pytest.mark.parametrize("key", ["input_dim", "output_dim", "width", "hidden", "feedforward", "memory"])
def test_described_sizes_take_no_memory(adapted: LanguageAdapted, tmp_path: Path, key: str, size: Any) -> None:
    folder = save(tmp_path / "a", adapted)
    raw = json.loads((folder / "adapter.json").read_text())
    (raw["config"] if key in raw["config"] else raw["config"]["adapter"])[key] = size
    (folder / "adapter.json").write_text(json.dumps(raw))
    with pytest.raises(TrimtabError) as caught:
        load_adapted(folder, base=adapted.base, student=adapted.student)
    assert str(folder) in str(caught.value)


def test_other_links_are_refused(adapted: LanguageAdapted, tmp_path: Path) -> None:
    for changes in ({"link": "prompt"}, {"link": "domain"}, {"student": None}, {"link": "fusion", "student": None}):
        with pytest.raises(ModelError, match="adapter, which this version cannot load"):
            trimtab.load(save(tmp_path / "a", adapted, **changes))


def test_places_belong_to_adapted_folders(tiny_folder: Any) -> None:
    with pytest.raises(ModelError, match="is not an adapted folder: base, student have no meaning"):
        trimtab.load(tiny_folder("clip"), base="x", student="y")
    assert type(trimtab.load(tiny_folder("clip"), device="cpu")) is DualEncoder


def test_trust_reaches_base_and_student(adapted: LanguageAdapted, tmp_path: Path, monkeypatch: Any) -> None:
    folder = save(tmp_path / "a", adapted)
    trusted = []

    def load(found: Any) -> Callable[..., Any]:
        return lambda *_, trust_remote_code, **__: trusted.append(trust_remote_code) or found

    monkeypatch.setattr("trimtab.adapters.adapted.load_base", load(adapted.base))
    monkeypatch.setattr(TextEncoder, "load", load(adapted.student))
    trimtab.load(folder)
    trimtab.load(folder, trust_remote_code=True)
    assert trusted == [False, False, True, True]


def test_saving_again_copies_the_folder(adapted: LanguageAdapted, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", adapted)
    (folder / "notes.txt").write_text("private")
    loaded = load_adapted(folder, base=adapted.base, student=adapted.student)
    copy = loaded.save_pretrained(tmp_path / "deep" / "copy")
    assert {path.name for path in copy.iterdir()} == {"adapter.json", "adapter.safetensors", "README.md"}
    for path in copy.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
    again = load_adapted(copy, base=adapted.base, student=adapted.student)
    assert np.array_equal(again.encode_text(CORPUS), loaded.encode_text(CORPUS))
    assert loaded.save_pretrained(folder) == folder  # onto itself
    assert np.array_equal(
        load_adapted(folder, base=adapted.base, student=adapted.student).encode_text(CHINESE),
        loaded.encode_text(CHINESE),
    )


def test_a_model_that_was_never_saved_says_so(adapted: LanguageAdapted, tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match="was never saved"):
        adapted.save_pretrained(tmp_path / "a")


def test_building_needs_no_base(tiny_base: Any, student: TextEncoder, tmp_path: Path) -> None:
    folder = save_tiny_adapted(tmp_path / "a", tiny_base("clip"), student)
    adapter = build_language_adapter(read_adapter(folder, tensors=False))
    assert adapter.input_mean.shape == (student.hidden_size,)


def test_a_base_with_another_tokenizer_is_refused(adapted: LanguageAdapted, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", adapted)
    other = Path(shutil.copytree(adapted.base.name, tmp_path / "other"))
    about = json.loads((other / "tokenizer.json").read_text())
    ids = about["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (other / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(ModelError, match="another tokenizer or context length"):
        load_adapted(folder, base=other, student=adapted.student, device="cpu")
    # What the student reads is no matter of the base.
    assert adapted.text_input_digest == adapted.base.text_input_digest


def test_what_was_pushed_to_the_hub_comes_back(
    adapted: LanguageAdapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    pushed = trimtab.load(save(tmp_path / "a", adapted), device="cpu").save_pretrained(tmp_path / "pushed")
    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in_hub(pushed, tmp_path / "snapshot"))
    again = trimtab.load("me/chinese", device="cpu")
    assert isinstance(again, LanguageAdapted)
    assert again.name == "me/chinese"
    facts = describe("me/chinese")
    assert facts["model"] == "me/chinese"
    assert facts["link"] == "language"
    assert np.array_equal(again.encode_text(CORPUS), adapted.encode_text(CORPUS))
    copied = again.save_pretrained(tmp_path / "copied")
    assert {one.name for one in copied.iterdir()} == {one.name for one in pushed.iterdir()}


def test_a_composed_model_and_links_of_the_hub(
    adapted: LanguageAdapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder = save(tmp_path / "a", adapted)
    composed = trimtab.load(adapted.base.name, links=[folder], device="cpu").save_pretrained(tmp_path / "composed")
    for name, pushed in (("me/both", composed), ("me/chinese", folder)):
        (tmp_path / name).mkdir(parents=True)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in_hub(pushed, tmp_path / name))
        links = [] if name == "me/both" else [name]
        again = trimtab.load(adapted.base.name if links else name, links=links, device="cpu")
        assert list(again.links) == ["language"]  # type: ignore[attr-defined]
        assert describe(name)["link" if links else "links"] == "language"
        assert np.array_equal(again.encode_text(CORPUS), adapted.encode_text(CORPUS))


def stand_in_hub(repository: Path, snapshot: Path) -> Callable[..., str]:
    """A `snapshot_download` that copies the files that are asked for, as the hub's client chooses them."""
    from huggingface_hub.utils import filter_repo_objects

    def fetch(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        files = [str(one.relative_to(repository)) for one in repository.rglob("*") if one.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (snapshot / file).parent.mkdir(exist_ok=True)
            shutil.copy(repository / file, snapshot / file)
        return str(snapshot)

    return fetch


def test_features_go_where_the_text_goes(adapted: LanguageAdapted) -> None:
    mixed = [CHINESE[0], ENGLISH[0], CHINESE[1], ENGLISH[1]]
    for texts in (mixed, ENGLISH[:2], CHINESE[:2]):
        unit = torch.nn.functional.normalize(adapted.text_features(texts).float(), dim=-1)
        np.testing.assert_allclose(unit.numpy(), adapted.encode_text(texts), atol=1e-6)
    assert torch.equal(adapted.text_features(ENGLISH[0]), adapted.base.text_features(ENGLISH[:1]))


def test_a_folder_that_went_away_is_named(adapted: LanguageAdapted, tmp_path: Path) -> None:
    model = load_adapted(save(tmp_path / "adapted", adapted), base=adapted.base, student=adapted.student)
    (tmp_path / "adapted").rename(tmp_path / "elsewhere")
    with pytest.raises(TrimtabError, match=r"adapted, which this model was loaded from, is not there any more"):
        model.save_pretrained(tmp_path / "again")


def test_a_place_may_be_any_path_like(adapted: LanguageAdapted, tmp_path: Path) -> None:
    class Place:
        def __fspath__(self) -> str:
            return str(tmp_path / "folder")

    save(tmp_path / "folder", adapted)
    model = trimtab.load(Place(), base=adapted.base, student=adapted.student)
    assert (model.name, model.fingerprint) == (str(tmp_path / "folder"), adapted.fingerprint)
    assert trimtab.load(adapted.base.name, links=Place(), device="cpu").fingerprint == adapted.fingerprint


def test_one_link_alone_and_a_misspelt_place(adapted: LanguageAdapted, tmp_path: Path) -> None:
    folder = save(tmp_path / "adapted", adapted)
    model = trimtab.load(adapted.base.name, links=str(folder), device="cpu")
    assert list(model.links) == ["language"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'bse'"):
        trimtab.load(folder, bse="starter")
