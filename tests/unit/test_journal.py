"""What a run records: a full disk loses records, never the training, and leaves no half ones."""

import contextlib
import json
import resource
import shutil
import threading

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from std_fast.runtime.metrics import Journal, read_jsonl
from std_fast.runtime.trackers import TensorBoard
from std_fast.runtime.write_faults import WriteFaults


@contextlib.contextmanager
def full_after(size):
    """A file of more bytes cannot be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def steps_in(folder):
    """(in metrics.jsonl, in TensorBoard's newest file)"""
    events = EventFileLoader(str(max((folder / "tensorboard").iterdir()))).Load()
    return [r["step"] for r in read_jsonl(folder / "metrics.jsonl")], [e.step for e in events if e.HasField("summary")]


def test_a_full_disk_loses_records_and_is_named_once(tmp_path, caplog):
    faults = WriteFaults()
    journal = Journal(tmp_path, 0, {"tensorboard": TensorBoard(tmp_path / "tensorboard", 0)}, faults)
    journal.write("train", {"step": 1, "loss": 1.0})
    room = [(tmp_path / "metrics.jsonl").stat().st_size, next((tmp_path / "tensorboard").iterdir()).stat().st_size]
    with full_after(max(room) + 10):  # room for a part of a record
        for step in (2, 3, 4, 5):
            journal.write("train", {"step": step, "loss": 1.0})
    journal.write("train", {"step": 6, "loss": 1.0})  # another program's files were removed
    journal.close()
    logged, shown = steps_in(tmp_path)
    assert logged[0] == shown[0] == 1 and logged[-1] == shown[-1] == 6
    assert faults.counts == {"metrics.jsonl": 6 - len(logged), "tensorboard": 6 - len(shown)}
    assert min(faults.counts.values()) >= 2
    named = [record.message.split(":")[0] for record in caplog.records]
    assert sorted(named) == ["metrics.jsonl", "tensorboard"]


def test_a_folder_that_cannot_be_written_yet(tmp_path):
    faults = WriteFaults()
    (tmp_path / "tensorboard").write_text("a file in its place")
    (tmp_path / "metrics.jsonl").mkdir()
    journal = Journal(tmp_path, 0, {"tensorboard": TensorBoard(tmp_path / "tensorboard", 0)}, faults)
    journal.write("train", {"step": 1, "loss": 1.0})
    assert faults.counts == {"metrics.jsonl": 2, "tensorboard": 1}
    (tmp_path / "tensorboard").unlink()
    (tmp_path / "metrics.jsonl").rmdir()
    journal.write("train", {"step": 2, "loss": 1.0})
    journal.close()
    assert steps_in(tmp_path) == ([2], [2])


def test_records_after_the_folder_was_removed_or_renamed_go_into_a_new_one(tmp_path):
    faults = WriteFaults()
    folder = tmp_path / "run"
    folder.mkdir()
    journal = Journal(folder, 0, {"tensorboard": TensorBoard(folder / "tensorboard", 0)}, faults)
    for step, gone in ((1, lambda: shutil.rmtree(folder)), (2, lambda: folder.rename(tmp_path / "renamed")), (3, None)):
        journal.write("train", {"step": step, "loss": 1.0})
        assert steps_in(folder) == ([step], [step])
        if gone:
            gone()
    journal.close()
    assert not faults.counts and steps_in(tmp_path / "renamed") == ([2], [2])
    first = next(EventFileLoader(str(next((folder / "tensorboard").iterdir()))).Load())
    assert first.file_version


def test_a_resumed_journal_forgets_what_will_be_logged_again(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n7\n{"kind": "odd"}\n{"step": 3}\n{"st')
    journal = Journal(tmp_path, 2, {}, WriteFaults())
    journal.write("train", {"step": 3, "loss": 1.0})
    journal.close()
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_the_evaluation_that_a_resumed_run_begins_with_is_logged_once(tmp_path):
    records = [{"kind": kind, "step": step} for step in (1, 2) for kind in ("train", "eval")]
    for evaluates, kept in ((False, records), (True, records[:3])):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        Journal(tmp_path, 2, {}, WriteFaults(), evaluates).close()
        assert read_jsonl(tmp_path / "metrics.jsonl") == kept


def test_torchs_writer_loses_the_error_in_a_thread(tmp_path, monkeypatch):
    """Why there is a writer of ours: torch's prints a traceback, and nobody counts what is lost."""
    from torch.utils.tensorboard import SummaryWriter

    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_type))
    writer = SummaryWriter(str(tmp_path), max_queue=1)
    with full_after(1000), contextlib.suppress(OSError):
        for step in range(1000):
            writer.add_scalar("train/loss", 1.0, step)
    assert seen == [OSError]
