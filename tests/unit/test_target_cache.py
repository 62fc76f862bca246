"""The format of stored targets: nothing is lost, and nothing damaged, foreign or unfinished is ever read."""

import json

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from pipelines.errors import UserError
from std_fast.config.recipe import Distill, TeacherSpec
from std_fast.method.losses import all_log_probs, kl, targets_from_logits
from std_fast.teachers.fingerprint import check_same
from std_fast.teachers.target_cache import TargetCache, open_target_cache
from std_fast.teachers.target_format import Header, bytes_per_epoch, pack, read_header, unpack
from tests.unit.test_journal import full_after

CLASSES, TEACHERS, BATCH = 300, 2, 8
KEYS = ("format", "fingerprint", "classes", "teachers", "top_k")


def logits(rows, seed=0, classes=CLASSES):
    return 3 * torch.randn(rows, TEACHERS, classes, generator=torch.Generator().manual_seed(seed))


def make_store(folder, rows=2 * BATCH, top_k=0, seed=0):
    folder.mkdir(exist_ok=True)
    return TargetCache(folder, Header({"run.seed": seed}, CLASSES, TEACHERS, top_k), rows, BATCH, top_k > 0)


def fill(store, epoch, steps, seed=0):
    """Writes some steps of an epoch; returns what should be there."""
    targets = [targets_from_logits(logits(BATCH, 100 * seed + step), 1.0, store.header.top_k) for step in range(9)]
    writer = store.writer(epoch)
    for step in steps:
        writer.add(step, pack(targets[step]))
    writer.end()
    store.wait()
    return targets


@pytest.mark.parametrize("top_k", [0, 1, 5, CLASSES + 7])
def test_words_hold_an_answer_exactly(top_k):
    targets = targets_from_logits(logits(6), 2.0 if top_k else None, top_k)
    words = pack(targets)
    k = min(top_k, CLASSES - 1)
    assert words.shape == (6, TEACHERS, 2 + 2 * k) and words.dtype == torch.int16
    assert words.numel() * 2 + 16 == bytes_per_epoch(6, TEACHERS, k)
    back = unpack(words, soft=top_k > 0)
    for name, value in targets._asdict().items():
        got = getattr(back, name)
        assert (got is None and value is None) or (got.dtype == value.dtype and torch.equal(got, value)), name


def test_the_largest_label_fits():
    targets = targets_from_logits(logits(1))._replace(labels=torch.tensor([[65534, 32767]]))
    assert torch.equal(unpack(pack(targets), False).labels, targets.labels)


def test_an_epoch_comes_back_and_its_size_is_four_bytes_an_answer(tmp_path):
    store = make_store(tmp_path)
    targets = fill(store, 3, range(2))
    assert store.path(3).stat().st_size == bytes_per_epoch(2 * BATCH, TEACHERS) == 4 * TEACHERS * 2 * BATCH + 16
    words = store.open(3)
    assert not words.flags.writeable
    again = unpack(torch.from_numpy(words.astype(np.uint16).view(np.int16)), False)
    assert torch.equal(again.labels, torch.cat([a.labels for a in targets[:2]]))
    assert torch.equal(again.confidence, torch.cat([a.confidence for a in targets[:2]]))
    assert store.missing(5) == [0, 1, 2, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["epoch-00003.targets"]  # no partial file is left
    store.close()


def test_a_gap_keeps_the_epoch_from_its_name_until_it_is_filled(tmp_path):
    store = make_store(tmp_path, rows=3 * BATCH - 2)  # the last step is not full
    fill(store, 0, [0, 2])
    assert not store.stored(0)
    writer = store.writer(0)
    assert writer.filled() == BATCH
    writer.end()
    expected = fill(store, 0, [1])
    words = unpack(torch.from_numpy(store.open(0).astype(np.uint16).view(np.int16)), False)
    assert torch.equal(words.labels, torch.cat([a.labels for a in expected[:3]])[: 3 * BATCH - 2])
    # the same bytes as written in one go
    complete = make_store(tmp_path / "complete", rows=3 * BATCH - 2)
    fill(complete, 0, range(3))
    assert complete.path(0).read_bytes() == store.path(0).read_bytes()
    # one that needs more positions does not take it for stored
    assert not make_store(tmp_path, rows=3 * BATCH).stored(0)
    store.close()
    complete.close()


def test_damage_and_exchanged_files_are_noticed(tmp_path):
    store = make_store(tmp_path)
    fill(store, 0, range(2))
    good = store.path(0).read_bytes()
    for place in (0, len(good) // 2, len(good) - 1):
        bad = bytearray(good)
        bad[place] ^= 4
        store.path(1).write_bytes(bad)
        with pytest.raises(UserError, match=r"epoch-00001.targets: its digest does not match.*std-fast teach"):
            store.open(1)
    store.path(1).write_bytes(good)  # complete, but of another epoch
    with pytest.raises(UserError, match="digest"):
        store.open(1)
    other = make_store(tmp_path / "other", seed=1)
    other.path(0).write_bytes(good)  # complete, but of another store
    with pytest.raises(UserError, match="digest"):
        other.open(0)
    for cut in (0, 10, len(good) - 2):
        store.path(2).write_bytes(good[:cut])
        with pytest.raises(UserError, match="cut short"):
            store.open(2)
    with pytest.raises(UserError, match="cannot be read"):
        store.open(7)
    store.close()
    other.close()


@pytest.mark.parametrize(("word", "value", "top_k"), [(0, CLASSES + 1, 0), (0, 0, 0), (1, 0x7C00, 0), (4, CLASSES, 2)])
def test_an_intact_file_of_values_that_cannot_be_is_refused(tmp_path, word, value, top_k):
    """Whoever makes the file makes its digest: what would be used as an index must be one."""
    store = make_store(tmp_path, top_k=top_k)
    fill(store, 0, range(2))
    words = store.open(0).copy()
    words[5, 1, word] = value
    digest = store.header.digest(4)
    digest.update(words.tobytes())
    store.path(4).write_bytes(words.tobytes() + digest.digest())
    with pytest.raises(UserError, match="holds (classes|positions|numbers)"):
        store.open(4)
    store.close()


def test_two_writers_of_one_epoch(tmp_path):
    one, two = make_store(tmp_path), make_store(tmp_path)
    writer = one.writer(0)
    with pytest.raises(UserError, match="another process is writing it"):
        two.writer(0)
    two.writer(1).end()
    writer.end()
    one.close()
    two.close()


def test_a_full_disk_is_noticed_before_the_epoch_begins(tmp_path):
    store = make_store(tmp_path, rows=1 << 16)
    with full_after(1 << 16), pytest.raises(UserError, match=r"cannot be written.*free space"):
        store.writer(0)
    store.close()


def test_a_header_that_is_none(tmp_path):
    good = {"format": 1, "fingerprint": {}, "classes": 3, "teachers": 1, "top_k": 0}
    path = tmp_path / "targets.json"
    path.write_text(json.dumps(good))
    assert read_header(tmp_path) == Header({}, 3, 1, 0)
    for change in (
        {"format": 2},
        {"fingerprint": []},
        {"classes": -1},
        {"teachers": 0},
        {"teachers": True},
        {"top_k": 3},
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=r"targets.json: "):
            read_header(tmp_path)


VALUES = st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda some: st.lists(some, max_size=3))


def test_a_folder_in_which_nothing_is_stored_yet_takes_other_settings(tmp_path):
    """A start that failed, for example for a teacher of other classes, leaves a header."""
    teachers = (TeacherSpec("test_resnet", "w"),) * TEACHERS
    distill = Distill(mode="std", teachers=teachers, target_cache=str(tmp_path))
    about = {f"distill.teachers.{i}.weights": "w" for i in range(TEACHERS)}
    about |= {"classes": CLASSES, "distill.labels": "hard", "data.train": "first"}
    other = about | {"data.train": "second"}
    open_target_cache(distill, about, 2 * BATCH, BATCH).close()
    cache = open_target_cache(distill, other, 2 * BATCH, BATCH)
    fill(cache, 0, range(2))
    cache.close()
    with pytest.raises(UserError, match=r"data.train: the targets in .* are of other data"):
        open_target_cache(distill, about, 2 * BATCH, BATCH)


def test_the_differing_field_is_named(tmp_path):
    stored = {"run.seed": 0, "distill.labels": "soft", "distill.top_k": 5, "distill.teachers.0.weights": "ab"}
    hard = {**stored, "distill.labels": "hard", "distill.top_k": 0}
    check_same(tmp_path, stored, hard)  # a store of soft labels has the hard ones too
    check_same(tmp_path, stored, {**stored, "distill.teachers.0.weights": None})  # not on this machine
    check_same(tmp_path, stored, {**stored, "data.train.images": "ab"})  # which earlier versions did not store
    stored["data.train.images"] = "cd"
    for change, message in (
        ({"run.seed": 1}, "run.seed: the targets in .* are of 0, this run has 1"),
        ({"distill.top_k": 6}, "distill.top_k"),
        ({"distill.teachers.0.weights": "cd"}, "distill.teachers.0.weights: .* other weights"),
        ({"augment.new": 1}, "augment.new: .* None"),
        ({"data.train.images": "ab"}, "data.train: .* other data"),
    ):
        with pytest.raises(UserError, match=message):
            check_same(tmp_path, stored, {**stored, **change})
    with pytest.raises(UserError, match="distill.labels"):
        check_same(tmp_path, hard, stored)


@pytest.mark.parametrize("top_k", [1, 4, 100])
def test_a_truncated_distribution_is_the_one_that_is_documented(top_k):
    torch.manual_seed(0)
    targets = targets_from_logits(2 * torch.randn(5, 1, 12), 1.0, top_k)
    k = min(top_k, 11)
    kept = targets.top_probs[:, 0].double()
    p = ((1 - kept.sum(1)) / (12 - k)).clamp(min=2**-24)[:, None].repeat(1, 12)
    p.scatter_(1, targets.top_classes[:, 0], kept)
    p /= p.sum(1, keepdim=True)
    student = torch.randn(5, 12)
    expected = (p * (p.log() - student.double().log_softmax(1))).sum(1)
    got = kl(student, all_log_probs(targets, 0, 12), 1.0)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)
    full = targets_from_logits(2 * torch.randn(5, 1, 12), 1.0)
    assert full.top_probs is None and full.log_probs is not None


def test_a_certain_teacher_gives_a_finite_loss():
    targets = targets_from_logits(torch.tensor([[[500.0, 0, -500, 3]]]), 1.0, 2)
    assert targets.top_probs.tolist() == [[[1.0, 0.0]]]
    student = torch.randn(1, 4, requires_grad=True)
    loss = kl(student, all_log_probs(targets, 0, 4), 1.0).sum()
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
