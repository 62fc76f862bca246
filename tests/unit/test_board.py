"""TensorBoard's files are written in the loop's own thread: a full disk ends there, in one error."""

import contextlib
import resource
import threading

import pytest

from std_fast.runtime.metrics import Board


@contextlib.contextmanager
def full_after(size):
    """A file of more bytes cannot be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_of_the_write(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_type))
    board = Board(tmp_path, None)
    with full_after(1000), pytest.raises(OSError):
        for step in range(100):
            board.add({"train/loss": 1.0}, step)
    assert not seen


def test_torchs_writer_loses_the_error_in_a_thread(tmp_path, monkeypatch):
    """Why there is a `Board`: it prints a traceback, and a run whose last lines are lost ends as if all were well."""
    from torch.utils.tensorboard import SummaryWriter

    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_type))
    writer = SummaryWriter(str(tmp_path), max_queue=1)
    with full_after(1000), contextlib.suppress(OSError):
        for step in range(1000):
            writer.add_scalar("train/loss", 1.0, step)
    assert seen == [OSError]
