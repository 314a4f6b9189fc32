"""The small text files of a checkpoint: read, or named with what is wrong."""

from pathlib import Path

import pytest

from clip_jax.errors import CheckpointError
from clip_jax.tokenizers.files import exists, expanded, listing, names_in, read_json, read_optional_json, read_text


@pytest.mark.parametrize("read", [read_text, read_json])
@pytest.mark.parametrize(("name", "reason"), [("none.json", "No such file or directory"), ("folder", "Is a directory")])
def test_what_cannot_be_read_is_named_with_the_reason(tmp_path, read, name, reason):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name}: cannot be read: {reason}. Check the path and its permissions."


def test_an_optional_file_that_is_not_there_is_empty(tmp_path):
    assert read_optional_json(tmp_path / "none.json") == {}


def test_a_folder_that_may_not_be_looked_into(tmp_path, monkeypatch):
    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", forbidden)
    monkeypatch.setattr(Path, "iterdir", forbidden)
    for look in (exists, names_in, listing, lambda path: read_optional_json(path / "a.json")):
        with pytest.raises(CheckpointError, match=r"cannot be read: Permission denied\. Check the path and its perm"):
            look(tmp_path)


def test_what_is_in_a_folder_is_listed_for_messages(tmp_path):
    assert listing(tmp_path / "none") == "no such folder"
    assert listing(tmp_path) == "an empty folder"
    for name in "cab":
        (tmp_path / name).touch()
    assert listing(tmp_path) == "a, b, c"
    for name in range(1000):
        (tmp_path / f"x{name:04}").touch()
    assert listing(tmp_path) == "a, b, c, x0000, x0001, x0002, x0003, x0004, ..."


def test_a_tilde_is_the_users_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert expanded("~/a/b") == Path("/somewhere/a/b")
    assert expanded("a~/b") == Path("a~/b")
    assert expanded("~nobody-of-that-name/b") == Path("~nobody-of-that-name/b")


def test_json_that_is_too_deep_is_named(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"deep\.json is not valid JSON \(maximum recursion depth"):
        read_json(tmp_path / "deep.json")
