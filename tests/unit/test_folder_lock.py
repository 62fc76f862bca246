"""The lock of a run's folder holds for the folder, whatever becomes of its path."""

import errno
import fcntl
import os
import resource
import shutil
from contextlib import closing

import pytest

from pipelines.errors import UserError
from std_fast.runtime.folder_lock import FolderLock


def test_a_folder_that_is_gone_is_made_anew_and_one_of_another_run_is_not_touched(tmp_path):
    folder = tmp_path / "run"
    with closing(FolderLock(folder)) as lock:
        with pytest.raises(UserError, match="another process is training into it"):
            FolderLock(folder)
        assert lock.held()
        shutil.rmtree(folder)
        assert not lock.held()
        lock.keep()
        assert lock.held()
        folder.rename(tmp_path / "renamed")
        for _ in range(2):  # the other run goes on, and has ended
            with closing(FolderLock(folder)), pytest.raises(UserError, match="another run has begun in a new one"):
                lock.keep()


def test_a_folder_that_was_moved_to_another_disk_stays_locked(tmp_path):
    folder = tmp_path / "run"
    with closing(FolderLock(folder)) as lock:
        shutil.copytree(folder, tmp_path / "elsewhere")
        shutil.rmtree(folder)
        folder.symlink_to(tmp_path / "elsewhere")
        lock.keep()
        with pytest.raises(UserError, match="another process is training into it"):
            FolderLock(tmp_path / "elsewhere")


def test_a_disk_without_locks_or_that_does_not_answer_ends_no_run(tmp_path, monkeypatch, caplog):
    def fails(code):
        def call(*_, **__):
            raise OSError(code, os.strerror(code))

        return call

    monkeypatch.setattr(fcntl, "flock", fails(errno.ENOSYS))
    with closing(FolderLock(tmp_path / "run")) as lock:
        assert "cannot be locked there (Function not implemented)" in caplog.text
        monkeypatch.setattr(os, "stat", fails(errno.ESTALE))
        held = lock.held()
        monkeypatch.undo()
        assert held


def test_a_folder_that_is_gone_is_locked_again_once_the_disk_has_room(tmp_path):
    folder, kept = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(FolderLock(folder)) as lock:
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
