from __future__ import annotations

import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trimtab.data.picture_folder import PictureFolder
from trimtab.errors import DataError


def test_paths_inside_the_root(root: Path) -> None:
    expected = (root / "sub" / "a.jpg").resolve()
    (root / "link.jpg").symlink_to(root / "sub" / "a.jpg")
    for value in ("sub/a.jpg", "./sub//a.jpg", "sub/../sub/a.jpg", str(root / "sub" / "a.jpg"), "link.jpg"):
        assert PictureFolder(root).find(value, file="m.csv", row=3) == expected
    missing = PictureFolder(root).find("none.jpg", file="m.csv", row=3)
    assert missing == root.resolve() / "none.jpg"


def test_paths_that_lead_out_are_refused(root: Path) -> None:
    (root / "out.jpg").symlink_to(root.parent / "secret.jpg")
    (root / "up").symlink_to(root.parent)
    (root / "again").symlink_to(root / "up")
    (root / "sub" / "out.jpg").symlink_to("../out.jpg")
    for value, message in (
        ("../secret.jpg", "outside the data folder.*--root"),
        ("sub/../../secret.jpg", "--root"),
        ("/etc/hostname", "--root"),
        (str(root) + "-other/a.jpg", "--root"),
        ("out.jpg", "symbolic link.*--root"),
        ("up/secret.jpg", "symbolic link"),
        ("up/none.jpg", "symbolic link"),
        ("again/secret.jpg", "symbolic link"),
        ("sub/out.jpg", "symbolic link"),
        ("sub/../up/secret.jpg", "symbolic link"),
        ("again/..", "symbolic link"),
        ("..", "--root"),
        ("https://example.org/a.jpg", "address"),
        ("file:///etc/hostname", "address"),
        ("", "empty"),
        ("a\0.jpg", "not a path"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            PictureFolder(root).find(value, file="m.csv", row=3)
        assert "m.csv, row 3" in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["..", ".", "a", "b", "", "/"]), min_size=1, max_size=8).map("/".join))
def test_no_path_leads_out(value: str) -> None:
    assume(value)
    root = Path(tempfile.gettempdir()) / "root" / "deep"
    try:
        path = PictureFolder(root).find(value, file="m.csv", row=1)
    except DataError:
        return
    assert path.is_relative_to(root.resolve())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["..", ".", "a", "b", "in", "out", "dangling", "", "/", "\\"]), min_size=1, max_size=6))
def test_paths_are_followed_as_the_system_does(parts: list[str]) -> None:
    value = "/".join(parts)
    assume(value)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "root"
        (root / "a" / "b").mkdir(parents=True)
        (root / "in").symlink_to(root / "a")
        (root / "a" / "out").symlink_to(root.parent)
        (root / "dangling").symlink_to(root / "none")
        expected = (root / value).resolve()
        pictures = PictureFolder(root)
        for _ in range(2):
            try:
                assert pictures.find(value, file="m.csv", row=1) in (
                    expected,
                    (root / value.replace("\\", "/")).resolve(),
                )
                inside = True
            except DataError:
                inside = False
            assert inside == expected.is_relative_to(root)


def test_a_folder_is_judged_alike_in_every_row(root: Path) -> None:
    (root / "up").symlink_to(root.parent)
    pictures = PictureFolder(root)
    for row in (2, 3):
        assert pictures.find("sub/a.jpg", file="m.csv", row=row) == (root / "sub" / "a.jpg").resolve()
        with pytest.raises(DataError, match=f"row {row}: .*symbolic link"):
            pictures.find("up/secret.jpg", file="m.csv", row=row)


def test_spellings_of_other_systems_find_the_file(root: Path) -> None:
    (root / "sub" / unicodedata.normalize("NFD", "Äpfel.jpg")).write_bytes(b"x")
    (root / "odd\\name.jpg").write_bytes(b"x")
    pictures = PictureFolder(root)
    apples = (root / "sub").resolve() / unicodedata.normalize("NFD", "Äpfel.jpg")
    for value in ("sub/Äpfel.jpg", "sub\\Äpfel.jpg", unicodedata.normalize("NFD", "sub/Äpfel.jpg")):
        assert pictures.find(value, file="m.csv", row=1) == apples
    assert pictures.find("odd\\name.jpg", file="m.csv", row=1).name == "odd\\name.jpg"
    assert pictures.find("sub\\none.jpg", file="m.csv", row=1) == root.resolve() / "sub\\none.jpg"
    assert pictures.find("..\\secret.jpg", file="m.csv", row=1) == root.resolve() / "..\\secret.jpg"
