from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from trimtab.adapters.files import (
    SCHEMA_VERSION,
    BaseReference,
    StudentReference,
    check_base,
    check_student,
    is_adapted_folder,
    load_into,
    read_adapter,
    save_adapter,
)
from trimtab.errors import ModelError, TrimtabError

BASE = BaseReference("starter", "b" * 64, "vision-text-dual-encoder", 12)
STUDENT = StudentReference("e5-small", "s" * 64, "query: ", (6, -1), 64)


def adapter_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))  # with a 0-d integer buffer


def write(folder: Path, **changes: Any) -> Path:
    options: dict[str, Any] = {
        "link": "language",
        "tensors": adapter_module().state_dict(),
        "config": {"width": 3},
        "base": BASE,
        "student": STUDENT,
        "tokenizer": {"digest": "t"},
        "recipe": {"seed": 1, "languages": ["中文"]},
        "data": {"digest": "d", "pairs": 5},
        "metrics": {"translation_match": 0.5},
        "card": "# Chinese adapter\n",
    }
    return save_adapter(folder, **{**options, **changes})


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "adapted")


def test_what_is_saved_is_read(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"adapter.safetensors", "adapter.json", "README.md"}
    assert is_adapted_folder(folder)
    assert not is_adapted_folder(folder.parent)
    adapter = read_adapter(folder)
    assert (adapter.link, adapter.base, adapter.student) == ("language", BASE, STUDENT)
    assert adapter.config == {"width": 3}
    assert adapter.recipe["languages"] == ["中文"]
    assert adapter.data["pairs"] == 5
    assert adapter.metrics == {"translation_match": 0.5}
    assert {"trimtab", "torch", "transformers", "python"} <= adapter.versions.keys()
    fresh = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    load_into(fresh, adapter)
    for name, tensor in adapter_module().state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)


def test_description_alone_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from trimtab.adapters.files import read_adapter;"
        f"print(read_adapter({str(folder)!r}, tensors=False).base.name, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.split() == ["starter", "False"]


def test_writing_again_replaces_everything(folder: Path) -> None:
    write(folder, tensors={"w": torch.ones(2)}, student=None, metrics={"loss": float("nan"), "all": (1, 2)})
    adapter = read_adapter(folder)
    assert adapter.tensors.keys() == {"w"}
    assert adapter.student is None
    assert adapter.metrics == {"loss": None, "all": [1, 2]}  # JSON has no NaN
    assert not list(folder.glob(".*"))


def test_shared_and_strided_tensors_are_saved_by_value(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    write(tmp_path / "a", tensors={"one": weight, "same": weight, "turned": weight.T})
    tensors = read_adapter(tmp_path / "a").tensors
    assert torch.equal(tensors["turned"], weight.T)
    assert torch.equal(tensors["one"], tensors["same"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_tensors_are_refused(tmp_path: Path, value: float) -> None:
    bad = {"weight": torch.tensor([1.0, value])}
    with pytest.raises(ModelError, match="NaN or infinity in weight"):
        write(tmp_path / "a", tensors=bad)
    assert not (tmp_path / "a").exists()

    write(tmp_path / "a", tensors={"weight": torch.ones(2)})
    save_file(bad, tmp_path / "a" / "adapter.safetensors")
    with pytest.raises(ModelError, match="NaN or infinity in weight"):
        read_adapter(tmp_path / "a")


def test_nothing_to_save_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tensors to save"):
        write(tmp_path / "a", tensors={})


@pytest.mark.parametrize("keep", [0, 6, 100, -1])
def test_damaged_tensors_are_named(folder: Path, keep: int) -> None:
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"adapter\.safetensors is damaged or cut short"):
        read_adapter(folder)


def test_absent_tensors_are_named(folder: Path) -> None:
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapter\.safetensors cannot be read"):
        read_adapter(folder)


def test_changed_tensors_are_refused(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    tensors = load_file(path)
    weight = tensors.pop("0.weight")
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"missing 0\.weight"):
        read_adapter(folder)
    save_file({**tensors, "0.weight": weight, "extra": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="unexpected extra"):
        read_adapter(folder)
    save_file({**tensors, "0.weight": weight[:2].clone()}, path)
    with pytest.raises(ModelError, match=r"0\.weight is \(2, 4\) rather than \(3, 4\)"):
        read_adapter(folder)
    save_file({**tensors, "0.weight": weight + 1}, path)
    with pytest.raises(ModelError, match="checksum differs"):
        read_adapter(folder)


def test_another_module_is_refused(folder: Path) -> None:
    adapter = read_adapter(folder)
    with pytest.raises(ModelError, match=r"missing 0\.bias.*0\.weight is") as caught:
        load_into(nn.Sequential(nn.Linear(4, 2)), replace(adapter, tensors={"0.weight": torch.zeros(3, 4)}))
    assert "language adapter" in str(caught.value)
    with pytest.raises(ModelError, match="unexpected"):
        load_into(nn.Sequential(nn.Linear(4, 3)), adapter)


def test_newer_schema_asks_for_an_upgrade(folder: Path) -> None:
    edit(folder, schema_version=SCHEMA_VERSION + 1, versions={"trimtab": "9.9"})
    with pytest.raises(ModelError, match=r"written by trimtab 9\.9: upgrade"):
        read_adapter(folder)


@pytest.mark.parametrize("role", ["base", "student"])
def test_what_a_newer_version_says_of_a_model_asks_for_an_upgrade(folder: Path, role: str) -> None:
    known = json.loads((folder / "adapter.json").read_text())[role]
    edit(folder, **{role: {**known, "later": 1}}, versions={"trimtab": "9.9"})
    with pytest.raises(ModelError, match=rf"later of the {role} .* written by trimtab 9\.9: upgrade"):
        read_adapter(folder)


def test_folders_of_the_first_schema_are_read(folder: Path) -> None:
    edit(folder, schema_version=1)
    assert read_adapter(folder).schema_version == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": True}, "no valid schema_version"),
        ({"schema_version": 1.0}, "no valid schema_version"),
        ({"schema_version": None}, "no valid schema_version"),
        ({"schema_version": "1"}, "no valid schema_version"),
        ({"base": {"nom": "x"}}, "value of a wrong kind"),
        ({"base": 7}, "value of a wrong kind"),
        ({"student": {"name": "x"}}, "value of a wrong kind"),
        ({"config": [1]}, "value of a wrong kind"),
        ({"tensors": 3}, "value of a wrong kind"),
    ],
)
def test_wrong_descriptions_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(ModelError, match=message):
        read_adapter(folder)


def test_damaged_descriptions_are_named(folder: Path) -> None:
    path = folder / "adapter.json"
    for text, message in (("", "is damaged"), ("[]", "is not a JSON object"), ('{"schema_version": 1}', "lacks link")):
        path.write_text(text)
        with pytest.raises(ModelError, match=rf"adapter\.json {message}"):
            read_adapter(folder)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="is damaged"):
        read_adapter(folder)
    path.unlink()
    with pytest.raises(ModelError, match="is not an adapted folder"):
        read_adapter(folder)


def test_a_description_that_is_nested_too_deeply_is_damaged(folder: Path) -> None:
    (folder / "adapter.json").write_text('{"schema_version": 1, "x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ModelError, match=r"adapter\.json is damaged"):
        read_adapter(folder)


@pytest.mark.parametrize("versions", [[1], "2.0", None, {}])
def test_a_newer_schema_may_have_versions_of_any_shape(folder: Path, versions: Any) -> None:
    edit(folder, schema_version=SCHEMA_VERSION + 1, versions=versions)
    with pytest.raises(ModelError, match="by trimtab a newer version: upgrade"):
        read_adapter(folder)


def test_another_base_or_student_is_refused(folder: Path) -> None:
    adapter = read_adapter(folder)
    check_base(adapter, SimpleNamespace(name="a copy", fingerprint=BASE.fingerprint))
    check_student(adapter, SimpleNamespace(name="e5-small", fingerprint=STUDENT.fingerprint))
    other = SimpleNamespace(name="other/clip", fingerprint="c" * 64)
    with pytest.raises(ModelError, match=r"base 'starter' \(fingerprint bbbb.*not on 'other/clip' \(fingerprint cccc"):
        check_base(adapter, other)
    with pytest.raises(ModelError, match=r"student 'e5-small' \(fingerprint ssss.*not on 'other/clip'"):
        check_student(adapter, other)
    with pytest.raises(ModelError, match="without a student"):
        check_student(replace(adapter, student=None), other)


def test_references_of_loaded_models(tiny_base: Any) -> None:
    base = tiny_base("clip")
    digests = (base.text_input_digest, base.image_input_digest)
    assert BaseReference.of(base) == BaseReference(base.name, base.fingerprint, "clip", 12, *digests)


@pytest.mark.parametrize(
    ("key", "words"), [("text_input_digest", "another tokenizer"), ("image_input_digest", "another image processor")]
)
def test_a_base_that_prepares_otherwise_is_refused(folder: Path, tiny_base: Any, key: str, words: str) -> None:
    base = tiny_base("clip")
    own = BaseReference.of(base)
    check_base(replace(read_adapter(folder), base=own), base)
    check_base(replace(read_adapter(folder), base=replace(own, **{key: ""})), base)  # a folder that does not say
    with pytest.raises(ModelError, match=words):
        check_base(replace(read_adapter(folder), base=replace(own, **{key: "f" * 64})), base)


def test_full_disk_keeps_the_old_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if "safetensors" in path.name:
            real(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TrimtabError, match="disk is full"):
        write(folder, tensors={"w": torch.ones(2)})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert read_adapter(folder).config == {"width": 3}
