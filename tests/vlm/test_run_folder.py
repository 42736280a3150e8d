"""Folders that are checked before they are written, by one process at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from visproj.errors import InputError
from visproj.vlm.run_folder import (
    LOCK_NAME,
    PROCESS_COUNTS,
    check_writable,
    refuse_parallel,
    sole_writer,
)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in PROCESS_COUNTS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", PROCESS_COUNTS)
def test_several_processes_are_refused(monkeypatch, name):
    for count in ("", "0", "1", "01"):
        monkeypatch.setenv(name, count)
        refuse_parallel("training")
    monkeypatch.setenv(name, "2")
    with pytest.raises(InputError, match=rf"^training runs in one process, .* one of 2 \({name}\)"):
        refuse_parallel("training")


def test_a_process_group_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for count in (1, 3):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda count=count: count)
        if count == 1:
            refuse_parallel("training")
    with pytest.raises(InputError, match="this process group has 3"):
        refuse_parallel("training")


def test_folders_that_can_be_written(tmp_path, monkeypatch):
    check_writable(tmp_path)
    check_writable(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    check_writable(Path("a"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "b", "b/c"])
def test_a_file_in_the_way(tmp_path, below):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(NotADirectoryError, match=f"^{tmp_path / 'a'} is a file"):
        check_writable(tmp_path / "a" / below)


@pytest.mark.parametrize("below", ["", "b/c"])
def test_no_permission(tmp_path, monkeypatch, below):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may do all
    with pytest.raises(PermissionError, match="no permission to write"):
        check_writable(tmp_path / below)


def test_a_failed_block_leaves_no_folder(tmp_path):
    def fail():
        with sole_writer(tmp_path / "a" / "b"):
            assert (tmp_path / "a" / "b" / LOCK_NAME).is_file()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_or_there_stays(tmp_path):
    (tmp_path / "there").mkdir()
    with sole_writer(tmp_path / "there"):
        pass
    with sole_writer(tmp_path / "new"):
        (tmp_path / "new" / "file").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "new", "there"]


def test_a_second_writer_is_refused(tmp_path):
    with sole_writer(tmp_path / "a"):
        with (
            pytest.raises(InputError, match=rf"^another process is writing {tmp_path / 'a'}: "),
            sole_writer(tmp_path / "a"),
        ):
            pytest.fail("two writers")
        with sole_writer(tmp_path / "b"):
            pass
    with sole_writer(tmp_path / "a"):
        pass


def test_a_killed_writer_is_forgotten(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from visproj.vlm.run_folder import sole_writer\n"
        "with sole_writer(Path(sys.argv[1])): os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], check=False)
    assert done.returncode == 9
    assert (tmp_path / LOCK_NAME).exists()
    with sole_writer(tmp_path):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(self, **options):
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with sole_writer(tmp_path / "a"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
