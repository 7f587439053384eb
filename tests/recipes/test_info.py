from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tiny_adapted import save_tiny_adapted
from tiny_links import CLASSES, save_tiny_domain, save_tiny_prompt
from tiny_models import CONTEXT, DUAL_ENCODERS, EMBEDDING_DIM, IMAGE_SIZE
from trimtab.adapters.adapted import load_adapted
from trimtab.errors import ModelError
from trimtab.recipes.compose import compose
from trimtab.recipes.info import describe
from trimtab.towers.text_encoder import TextEncoder


@pytest.mark.parametrize("family", DUAL_ENCODERS)
def test_a_base_is_described_by_its_towers(
    family: str, tiny_folder: Callable[[str], Path], tiny_base: Callable[[str], Any]
) -> None:
    facts, base = describe(tiny_folder(family)), tiny_base(family)
    assert (facts["family"], facts["embedding_dim"]) == (family, base.embedding_dim)
    assert facts["fingerprint"] == base.fingerprint
    assert facts["logit_scale"] == pytest.approx(base.logit_scale)
    assert facts["text_tower"]["context_length"] == base.max_tokens
    for tower in ("image_tower", "text_tower"):
        assert (facts[tower]["width"], facts[tower]["layers"], facts[tower]["heads"]) == (16, 2, 2)
    counts = facts["parameters"]
    assert counts["total"] == sum(parameter.numel() for parameter in base.model.parameters())
    assert counts["total"] == counts["image"] + counts["text"] + counts["other"]
    assert counts["image"] > 1000
    assert counts["text"] > 1000
    assert (counts["other"] > 10) == (family == "flava")  # its fusion; elsewhere logit_scale and bias
    assert facts["file_bytes"]["model.safetensors"] > 4 * counts["total"] * 0.9


def test_sizes_are_those_of_the_configuration(tiny_folder: Callable[[str], Path]) -> None:
    facts = describe(str(tiny_folder("clip")))
    assert facts["image_tower"]["image_size"] == IMAGE_SIZE
    assert facts["text_tower"]["context_length"] == CONTEXT
    assert facts["embedding_dim"] == EMBEDDING_DIM


@pytest.fixture
def adapted(tmp_path: Path, tiny_base: Callable[[str], Any], tiny_folder: Callable[[str], Path]) -> Path:
    student = TextEncoder.load(tiny_folder("bert"), device="cpu")
    return save_tiny_adapted(tmp_path / "语言", tiny_base("clip"), student)


def test_an_adapted_folder_is_described_from_its_files(adapted: Path, tiny_base: Callable[[str], Any]) -> None:
    facts, base = describe(adapted), tiny_base("clip")
    assert (facts["model"], facts["link"], facts["languages"]) == (str(adapted), "language", ["zh"])
    assert (facts["base"]["name"], facts["base"]["fingerprint"]) == (base.name, base.fingerprint)
    assert facts["student"]["layers"] == [-1]
    assert facts["adapter"]["width"] == 12
    tensors = load_file(adapted / "adapter.safetensors").values()
    assert facts["adapter"]["numbers"] == sum(tensor.numel() for tensor in tensors)
    assert facts["metrics"] == {"translation_match": 46.5}
    assert facts["data"]["digest"] == "d" * 64
    assert facts["file_bytes"].keys() == {"README.md", "adapter.json", "adapter.safetensors"}


def test_an_adapted_folder_needs_neither_torch_nor_its_base(adapted: Path) -> None:
    code = (
        "import sys; from trimtab.recipes.info import describe;"
        f"describe({str(adapted)!r}); print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_prompt_folder_is_described_by_its_classes(tmp_path: Path, tiny_base: Callable[[str], Any]) -> None:
    base = tiny_base("clip")
    facts = describe(save_tiny_prompt(tmp_path / "prompt", base, instance=True))
    assert (facts["link"], facts["classes"], facts["first classes"]) == ("prompt", len(CLASSES), list(CLASSES))
    assert facts["parts"][:2] == ["general tokens from 'a photo of a'", "instance tokens by attention"]
    assert "class vectors over patches" in facts["parts"]
    assert facts["adapter"]["numbers"] > 0
    assert not {"languages", "english", "student"} & facts.keys()
    assert describe(save_tiny_prompt(tmp_path / "plain", base))["parts"] == ["general tokens from 'a photo of a'"]


def test_a_training_folder_is_told_from_what_the_run_wrote(tmp_path: Path) -> None:
    (tmp_path / "mine.v2.training").mkdir()
    with pytest.raises(ModelError, match=rf"it is the training folder of {tmp_path}/mine\.v2, give that$"):
        describe(tmp_path / "mine.v2.training")


def test_a_composed_folder_has_the_facts_of_each_link(
    adapted: Path, tmp_path: Path, tiny_base: Callable[[str], Any]
) -> None:
    base = tiny_base("clip")
    domain = save_tiny_domain(tmp_path / "domain", base)
    prompt = save_tiny_prompt(tmp_path / "prompt", load_adapted(domain, base=base))
    compose([base.name, adapted, domain, prompt], tmp_path / "all", device="cpu")
    facts = describe(tmp_path / "all")
    assert facts["links"] == "domain, language, prompt"
    assert (facts["prompt"]["classes"], facts["prompt"]["first classes"]) == (len(CLASSES), list(CLASSES))
    assert facts["language"]["languages"] == ["zh"]
    assert (facts["domain"]["alpha"], facts["domain"]["gate"]) == (1.0, "none")


def test_languages_stand_in_the_data_or_in_the_recipe(
    tmp_path: Path, tiny_base: Callable[[str], Any], tiny_folder: Callable[[str], Path]
) -> None:
    student = TextEncoder.load(tiny_folder("bert"), device="cpu")
    data = {"languages": {"zh": 20, "de": 10}}
    folder = save_tiny_adapted(tmp_path / "a", tiny_base("clip"), student, data=data, recipe={})
    assert describe(folder)["languages"] == ["zh", "de"]
    folder = save_tiny_adapted(tmp_path / "b", tiny_base("clip"), student, data={}, recipe={})
    assert describe(folder)["languages"] == []


def test_a_cut_adapter_is_noticed(adapted: Path) -> None:
    path = adapted / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"adapter\.safetensors .*cut short.*copy the folder again"):
        describe(adapted)
    path.unlink()
    with pytest.raises(ModelError, match=r"adapter\.safetensors is missing"):
        describe(adapted)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ModelError, match="no such folder"):
        describe("nowhere/nothing")
