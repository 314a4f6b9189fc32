"""A folder appears whole or not at all, and what was there stays until then."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest

from clip_jax import CheckpointError
from clip_jax.params.staging import check_apart, check_free, path_of, staged_folder


def make_checkpoint(path, content="old"):
    path.mkdir()
    (path / "_CHECKPOINT_METADATA").write_text('{"custom_metadata": {"format": "clip_jax"}}')
    (path / "state").write_text(content)


def write(out, content="new", **kwargs):
    with staged_folder(out, **kwargs) as folder:
        make_checkpoint(folder, content)


def test_the_folder_appears_at_the_end(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged_folder(out) as folder:
        make_checkpoint(folder)
        assert not out.exists()
    assert sorted(p.name for p in out.iterdir()) == ["_CHECKPOINT_METADATA", "state"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_an_existing_folder_is_refused_without_overwrite(tmp_path):
    make_checkpoint(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"out exists already.*overwrite=True"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "state").read_text() == "old"
    write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "state").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_no_checkpoint_is_never_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "file").write_text("text")
    for name, metadata in (("training", '{"custom_metadata": null}'), ("torn", "{"), ("odd", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "_CHECKPOINT_METADATA").write_text(metadata)
    for name in ("thesis", "file", "training", "torn", "odd"):
        with pytest.raises(CheckpointError, match="not a checkpoint written by clip_jax, so it is not overwritten"):
            write(tmp_path / name, overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_a_link_to_nothing_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "deep").symlink_to(tmp_path / "none" / "gone")
    for link, message in (
        ("link", "link is a link to .*gone, which is not there"),
        ("deep", "gone cannot be written: No such file or directory"),
    ):
        with (
            pytest.raises(CheckpointError, match=message),
            staged_folder(tmp_path / link, overwrite=True),
        ):
            pytest.fail("the block was run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "link"]


def test_what_a_link_leads_to_is_replaced_and_not_the_link(tmp_path):
    make_checkpoint(tmp_path / "target")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target" / "state").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "target"]


def test_from_a_folder_that_is_gone(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "out")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "state").read_text() == "new"
    with pytest.raises(CheckpointError, match="^out cannot be written: No such file or directory"):
        path_of("out")


def test_where_the_process_runs_is_never_overwritten(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "out")
    (tmp_path / "out" / "below").mkdir()
    for inside in ("out", "out/below"):
        monkeypatch.chdir(tmp_path / inside)
        with pytest.raises(CheckpointError, match="out is where this process runs, so it is not overwritten"):
            write(tmp_path / "out", overwrite=True)


def test_what_is_to_be_read_is_never_replaced(tmp_path):
    (tmp_path / "out" / "source").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "out" / "source")
    for source in ("out", "out/source", "link"):
        with pytest.raises(CheckpointError, match="lies in .*out, which is to be replaced. Choose another place"):
            check_apart(tmp_path / "out", [tmp_path, tmp_path / source])
    check_apart(tmp_path / "out", [tmp_path, tmp_path / "out too"])


def test_names_of_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert path_of("~/out") == path_of("out") == path_of(tmp_path / "out") == tmp_path / "out"
    for wrong, message in (("", "has no name"), ("a\\b", "has a backslash"), ("x" * 300, "File name too long")):
        with pytest.raises(CheckpointError, match=message):
            path_of(wrong)


def test_where_nothing_can_be_written_is_an_error(tmp_path, monkeypatch):
    def refused(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied", ".hidden")

    monkeypatch.setattr("tempfile.mkdtemp", refused)
    with pytest.raises(CheckpointError, match="out cannot be written: Permission denied. Choose another place."):
        write(tmp_path / "out")


def test_names_that_look_like_patterns(tmp_path):
    """A stage that was left of `model1` is none of `model[1]`."""
    stage = tmp_path / ".model1.clip-jax-leftover"
    stage.mkdir()
    (stage / "lock").touch()
    make_checkpoint(stage / "old")
    write(tmp_path / "model[1]")
    assert (tmp_path / "model[1]" / "state").read_text() == "new"
    assert (stage / "old").is_dir()
    with pytest.raises(CheckpointError, match="exists already"):
        write(tmp_path / "model1")  # was put back


def test_an_error_leaves_the_old_folder_and_no_new_one(tmp_path):
    make_checkpoint(tmp_path / "out")
    with (
        pytest.raises(RuntimeError, match="disk full"),
        staged_folder(tmp_path / "out", overwrite=True) as folder,
    ):
        make_checkpoint(folder)
        raise RuntimeError("disk full")
    assert (tmp_path / "out" / "state").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_appeared_meanwhile_is_kept(tmp_path):
    with pytest.raises(CheckpointError, match="exists already"), staged_folder(tmp_path / "out") as folder:
        make_checkpoint(folder, "slow")
        write(tmp_path / "out", "quick")
    assert (tmp_path / "out" / "state").read_text() == "quick"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("point", ["write", "swap"])
def test_a_killed_process_leaves_the_old_folder_and_is_cleared_up_after(tmp_path, point):
    make_checkpoint(tmp_path / "out")
    code = textwrap.dedent(
        f"""
        import os, pathlib, signal
        from clip_jax.params.staging import check_apart, path_of, staged_folder
        die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        out = pathlib.Path({str(tmp_path / "out")!r})
        with staged_folder(out, overwrite=True) as folder:
            folder.mkdir()
            (folder / "_CHECKPOINT_METADATA").write_text("half")
            if {point!r} == "write":
                die()
            rename = pathlib.Path.rename  # dies between moving the old folder away and moving the new one in
            pathlib.Path.rename = lambda self, target: die() if self.name == "new" else rename(self, target)
        """
    )
    died = subprocess.run([sys.executable, "-c", code], check=False)
    assert died.returncode == -signal.SIGKILL
    left = {p.name for p in tmp_path.iterdir()}
    assert any(name.startswith(".out.clip-jax-") for name in left)
    with pytest.raises(CheckpointError, match="exists already"):  # clears up first, then finds the old folder
        write(tmp_path / "out")
    assert (tmp_path / "out" / "state").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_staging_folder_of_a_running_process_is_left_alone(tmp_path):
    with staged_folder(tmp_path / "out") as folder:
        make_checkpoint(folder, "slow")
        with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "out"):
            raise ZeroDivisionError
        assert os.path.isdir(folder)
    assert (tmp_path / "out" / "state").read_text() == "slow"


def test_what_was_there_comes_back_when_the_last_step_fails(tmp_path):
    out = tmp_path / "out"
    make_checkpoint(out)
    with pytest.raises(CheckpointError, match="No such file"), staged_folder(out, overwrite=True):
        pass  # nothing is made, so that there is nothing to rename
    assert (out / "state").read_text() == "old"


def test_an_empty_folder_may_be_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "state").read_text() == "new"


def test_a_staging_folder_that_has_no_lock_yet_is_left_alone(tmp_path, monkeypatch):
    """Another that writes to the same folder comes between the two."""
    out, mkdtemp = tmp_path / "out", tempfile.mkdtemp

    def fail():
        with pytest.raises(ZeroDivisionError), staged_folder(out, overwrite=True):
            raise ZeroDivisionError

    other = threading.Thread(target=fail)

    def made(**options):
        monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
        folder = mkdtemp(**options)
        other.start()
        other.join(1)
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", made)
    write(out)
    other.join()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_made_anew_while_it_is_removed_is_removed_again(tmp_path, monkeypatch):
    rmtree, removed = shutil.rmtree, []

    def remove(path, **options):
        rmtree(path, **options)
        if not removed:  # as a thread of Orbax does that still writes
            (path / "new" / "state").mkdir(parents=True)
        removed.append(path)

    monkeypatch.setattr(shutil, "rmtree", remove)
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "out"):
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir())


def renames(monkeypatch, fails):
    """Has those renames fail of which `fails(name, target)` is true."""
    rename = Path.rename

    def renamed(path, target):
        if fails(path.name, target):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)


def test_what_cannot_be_put_back_is_kept_and_found(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "out")
    with monkeypatch.context() as broken:
        renames(broken, lambda name, target: name in ("new", "old"))
        with pytest.raises(CheckpointError, match="could not be replaced .*, and what was there is in (.*)[.]") as told:
            write(tmp_path / "out", overwrite=True)
    left = Path(re.search("is in (.*)[.]", str(told.value))[1])
    assert (left / "state").read_text() == "old"
    write(tmp_path / "out", overwrite=True)  # puts it back before
    assert (tmp_path / "out" / "state").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_somebody_puts_there_in_between_is_kept_and_so_is_what_was_there(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "out")

    def meanwhile(name, target):
        if name == "new":
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").touch()

    with monkeypatch.context() as broken:
        renames(broken, meanwhile)
        with pytest.raises(CheckpointError, match="what was there is in"):
            write(tmp_path / "out", overwrite=True)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="not a checkpoint written by clip_jax"):
            write(tmp_path / "out", overwrite=True)
        (stage,) = tmp_path.glob(".out.clip-jax-*")
        assert (stage / "old" / "state").read_text() == "old"


def test_the_target_of_a_link_is_put_back_too(tmp_path):
    """As it is left by a process that was killed between the two renames."""
    (tmp_path / "current").symlink_to(tmp_path / "v1")
    stage = tmp_path / ".v1.clip-jax-leftover"
    stage.mkdir()
    (stage / "lock").touch()
    make_checkpoint(stage / "old")
    make_checkpoint(stage / "new", "new")
    with pytest.raises(CheckpointError, match="current exists already"):
        check_free(tmp_path / "current", overwrite=False)
    assert (tmp_path / "v1" / "state").read_text() == "old"
    assert not stage.exists()


def test_stages_of_longer_names_are_left_alone(tmp_path):
    stage = tmp_path / ".a.clip-jax-b.clip-jax-leftover"
    stage.mkdir()
    (stage / "lock").touch()
    make_checkpoint(stage / "old")
    write(tmp_path / "a")
    assert (tmp_path / "a" / "state").read_text() == "new"
    assert (stage / "old" / "state").read_text() == "old"


def test_what_others_put_beside_a_checkpoint_is_kept(tmp_path):
    make_checkpoint(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("which seed it was")
    with pytest.raises(
        CheckpointError, match="a checkpoint beside which clip_jax did not write notes.txt, so it is not"
    ):
        write(tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "notes.txt").rename(tmp_path / "out" / ".DS_Store")
    write(tmp_path / "out", overwrite=True)


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "out")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(CheckpointError, match="out is a mount point, which cannot be replaced. Choose a folder in it"):
        check_free(tmp_path / "out", overwrite=True)


def test_a_folder_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    make_checkpoint(tmp_path / "out")
    with staged_folder(tmp_path / "out", overwrite=True) as folder:
        make_checkpoint(folder)
        (folder / "tokenizers").mkdir()
        (folder / "tokenizers" / "a").touch()
    names = [str(folder / name) for name in ("tokenizers/a", "tokenizers", "_CHECKPOINT_METADATA", "state", "")]
    assert sorted(synced[:-1]) == sorted(name.rstrip("/") for name in names)
    assert synced[-1] == str(tmp_path)


def test_permissions_stay(tmp_path):
    make_checkpoint(tmp_path / "out")
    (tmp_path / "out").chmod(0o700)
    write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
