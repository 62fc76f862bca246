"""The lock of a run's folder holds for the folder, whatever becomes of its path."""

import errno
import fcntl
import os
import resource
import shutil
from contextlib import closing

import pytest

from pipelines.errors import UserError
from std_fast.cli import main
from std_fast.runtime.folder_lock import FolderLock


def test_a_folder_that_is_gone_is_made_anew_and_one_of_another_run_is_not_touched(tmp_path):
    folder = tmp_path / "run"
    with closing(FolderLock(folder)) as lock:
        with pytest.raises(UserError, match="another process is training into it"):
            FolderLock(folder)
        lock.claim()
        assert lock.held()
        shutil.rmtree(folder)
        assert not lock.held()
        lock.keep()
        assert lock.held()
        folder.rename(tmp_path / "renamed")
        with closing(FolderLock(folder)), pytest.raises(OSError, match="another command is starting a run there"):
            lock.keep()
        for _ in range(2):  # the other run goes on, and has ended
            with closing(FolderLock(folder)) as other, pytest.raises(UserError, match="another run has begun"):
                other.claim()
                lock.keep()


def moved(folder, to):
    """To another disk, while a run goes on in it."""
    shutil.copytree(folder, to)
    shutil.rmtree(folder)
    folder.symlink_to(to)


def test_a_folder_that_was_moved_to_another_disk_stays_locked(tmp_path):
    folder = tmp_path / "run"
    with closing(FolderLock(folder)) as lock:
        lock.claim()
        moved(folder, tmp_path / "elsewhere")
        lock.keep()
        with pytest.raises(UserError, match="another process is training into it"):
            FolderLock(tmp_path / "elsewhere")


def test_a_command_ends_the_run_of_a_moved_folder_only_once_it_trains_there(tmp_path):
    folder = tmp_path / "run"
    with closing(FolderLock(folder)) as lock:
        lock.claim()
        moved(folder, tmp_path / "elsewhere")
        with closing(FolderLock(folder)):  # is refused later, as with another recipe
            lock.keep()
            assert not lock.held()
        lock.keep()
        assert lock.held()
        moved(tmp_path / "elsewhere", tmp_path / "further")
        with closing(FolderLock(folder)) as other:
            other.claim()
            with pytest.raises(UserError, match="another run has begun"):
                lock.keep()


def test_a_new_run_into_a_used_folder_is_refused_without_a_write(tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000001.safetensors").touch()
    words = ["train", "digits_mixer", "--run.out", str(folder)]
    assert main(words) == 2 and f"{folder}: already holds a run; start" in capsys.readouterr().err
    assert os.listdir(folder) == ["checkpoints"]
    with closing(FolderLock(folder)) as lock:
        lock.claim()
        word = (folder / ".lock").read_bytes()
        assert main(words) == 2 and "another process is training into it" in capsys.readouterr().err
    assert main(words) == 2 and "already holds a run" in capsys.readouterr().err
    assert (folder / ".lock").read_bytes() == word


def fails(code):
    def call(*_, **__):
        raise OSError(code, os.strerror(code))

    return call


def test_a_disk_without_locks_that_does_not_answer_ends_no_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", fails(errno.ENOSYS))
    with closing(FolderLock(tmp_path / "run")) as lock, closing(FolderLock(tmp_path / "run")) as other:
        assert "cannot be locked there (Function not implemented)" in caplog.text
        lock.claim()
        assert lock.held()
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", fails(errno.EIO))
            held = lock.held()
        assert held
        other.claim()
        with pytest.raises(UserError, match="another run has begun in it"):
            lock.keep()
        assert other.held()


@pytest.mark.parametrize("call", ["stat", "fstat"])
def test_a_folder_that_another_machine_removed_is_not_held(call, tmp_path, monkeypatch):
    with closing(FolderLock(tmp_path / "run")) as lock:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails(errno.ESTALE))
            held = lock.held()
        assert not held
        lock.close()  # as `keep` does in the other thread
        assert not lock.held()


def test_a_folder_whose_disk_is_away_is_an_error_that_a_log_counts(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    with closing(FolderLock(tmp_path / "runs" / "run")) as lock:
        (tmp_path / "disk").rename(tmp_path / "away")
        with pytest.raises(OSError, match="exists"):
            lock.keep()
        with pytest.raises(UserError, match="is a file, or lies below one"):
            FolderLock(tmp_path / "runs" / "run")
        (tmp_path / "away").rename(tmp_path / "disk")
        lock.keep()
        assert lock.held()


def test_a_folder_that_is_gone_is_locked_again_once_the_disk_has_room(tmp_path):
    folder, kept = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(FolderLock(folder)) as lock:
        lock.claim()
        shutil.rmtree(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, kept[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                lock.keep()
            assert not lock.held()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        lock.keep()
        assert lock.held()


def test_two_machines_whose_disk_locks_on_each_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with closing(FolderLock(tmp_path)) as one, closing(FolderLock(tmp_path)) as other:
        one.claim()
        other.claim()
        other.keep()
        with pytest.raises(UserError, match="another run has begun in it"):
            one.keep()
