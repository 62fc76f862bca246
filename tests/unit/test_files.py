"""A file is replaced in one piece or not at all."""

import errno
import os

import pytest

from pipelines.files import AppendFile, replacing, write_atomic


def test_records_after_a_file_was_removed_go_into_a_new_one(tmp_path):
    file = AppendFile(tmp_path / "x.jsonl", head=b"0\n")
    for record in (b"1\n", b"2\n"):
        (tmp_path / "x.jsonl").unlink(missing_ok=True)
        file.append(record)
        assert (tmp_path / "x.jsonl").read_bytes() == b"0\n" + record
    file.close()


def test_a_file_that_could_not_be_opened_again_is_opened_with_a_later_record(tmp_path):
    path = tmp_path / "x.jsonl"
    file = AppendFile(path)
    file.append(b"1\n")
    path.unlink()
    path.mkdir()
    for _ in range(2):
        with pytest.raises(IsADirectoryError):
            file.append(b"2\n")
    path.rmdir()
    file.append(b"3\n")
    assert path.read_bytes() == b"3\n"
    file.close()


def test_a_file_that_another_machine_removed_is_opened_again(tmp_path, monkeypatch):
    file = AppendFile(tmp_path / "x.jsonl")
    file.append(b"1\n")

    def stale(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(os.path, "samestat", stale)
        file.append(b"2\n")
    assert (tmp_path / "x.jsonl").read_bytes() == b"1\n2\n"
    file.close()


def test_a_text_replaces_a_file(tmp_path):
    path = tmp_path / "x.json"
    for text in ("{}", "ä\n"):
        write_atomic(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(path) as draft:
        draft.write_text("ne")
        assert path.read_text() == "old"
        raise OSError("disk full")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]


def test_what_is_flushed_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda one, two: seen.append("replace") or replace(one, two))
    with replacing(tmp_path / "x", flush=True) as written:
        written.write_text("text")
    draft = str(tmp_path / f".x.{os.getpid()}.partial")
    assert seen == [draft, "replace", str(tmp_path)]
