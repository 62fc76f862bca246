"""Checkpoints are complete or not there, and damage is reported."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from pipelines.errors import UserError
from std_fast.runtime import checkpoint

TENSORS = {
    "model.a": torch.randn(3, 4),
    "model.b": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "optim.a:step": torch.tensor(3.0),
    "ema.n": torch.arange(5),
    "ema.h": torch.randn(3).bfloat16(),
}
META = {"step": 7, "recipe": "", "num_classes": 3}


def write(path):
    checkpoint.save(path, TENSORS, META)
    return path


def test_what_is_saved_is_read_back(tmp_path):
    tensors, meta = checkpoint.load(write(tmp_path / "step-00000007.safetensors"))
    assert meta["step"] == 7
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007.safetensors"]  # no draft is left


def test_others_may_read_it_as_the_umask_says(tmp_path):
    path, plain = tmp_path / "a.safetensors", tmp_path / "plain"
    checkpoint.write_tensors(path, {"x": torch.zeros(1)}, {})
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_every_flipped_byte_and_every_cut_is_noticed(tmp_path):
    data = write(tmp_path / "good").read_bytes()
    bad = tmp_path / "bad"
    for at in range(0, len(data), 41):
        bad.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            tensors, meta = checkpoint.load(bad)
        except UserError:
            continue
        # only spare bytes of the header may change without harm
        assert meta["step"] == 7 and all(torch.equal(tensors[n], v) for n, v in TENSORS.items()), at
    for size in (0, 1, 9, len(data) // 2, len(data) - 1):
        bad.write_bytes(data[:size])
        with pytest.raises(UserError, match="no complete checkpoint"):
            checkpoint.load(bad)


def test_other_files_are_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(UserError, match="another program's"):
        checkpoint.load(tmp_path / "foreign")
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.load(tmp_path / "nothing")


def test_newest_passes_over_a_damaged_one_and_says_so(tmp_path, caplog):
    for step in (5, 40, 300):
        write(tmp_path / f"step-{step:08d}.safetensors")
    damaged = tmp_path / "step-00000300.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING, "std_fast"):
        path, _, _ = checkpoint.newest(tmp_path)
    assert path.name == "step-00000040.safetensors"
    assert "step-00000300" in caplog.text
    assert checkpoint.newest(tmp_path / "empty") is None


def test_writer_keeps_the_newest_and_passes_errors_on(tmp_path):
    writer = checkpoint.Writer(tmp_path / "c", keep=2)
    for step in (1, 2, 3):
        writer.save(step, TENSORS, META)
    writer.wait()
    assert [p.stem for p in checkpoint.listed(tmp_path / "c")] == ["step-00000002", "step-00000003"]
    (tmp_path / "file").write_text("")
    broken = checkpoint.Writer(tmp_path / "file", keep=2)  # a file where the folder should be
    broken.save(1, TENSORS, META)
    with pytest.raises(UserError, match="was not saved"):
        broken.wait()


def test_metadata_that_changes_while_the_file_is_written_is_that_of_the_call(tmp_path, monkeypatch):
    """The loop goes on while a thread writes, and counts costs in the very dictionary that it handed over."""
    costs, digest = {"evaluate": 1.0}, checkpoint.digest

    def changing(tensors, meta):
        found = digest(tensors, meta)
        costs["checkpoint"] = 2.0
        return found

    writer = checkpoint.Writer(tmp_path, keep=1)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "digest", changing)
        writer.save(7, TENSORS, {**META, "costs": costs})
        writer.wait()
    assert costs == {"evaluate": 1.0, "checkpoint": 2.0}
    _, meta = checkpoint.load(tmp_path / "step-00000007.safetensors")
    assert meta["costs"] == {"evaluate": 1.0}


def test_the_copy_is_taken_at_the_call(tmp_path):
    live = torch.zeros(1000)
    writer = checkpoint.Writer(tmp_path, keep=1)
    writer.save(1, {"model.a": live}, META)
    live.fill_(1)
    writer.wait()
    assert checkpoint.newest(tmp_path)[1]["model.a"].sum() == 0
