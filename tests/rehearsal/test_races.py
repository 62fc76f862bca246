"""No race between the streams of teachers and student; and each wait between them is seen when it is missing."""

import subprocess

import pytest

from benchmarks import fake_gpu
from benchmarks.harness import ROOT

pytestmark = pytest.mark.skipif(fake_gpu.find() is None, reason=fake_gpu.missing())


def sanitized(what, folder):
    words = fake_gpu.command(["-m", "tests.rehearsal.races", what, str(folder)], fake_gpu.find())
    env = fake_gpu.environment({"TORCH_CUDA_SANITIZER": "1"})
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("what", ["as it is", "just written"])
def test_no_race_is_reported(tmp_path, what):
    code, text = sanitized(what, tmp_path)
    assert code == 0 and "no race" in text and "data race" not in text, text[-2000:]


@pytest.mark.parametrize("what", ["without the event of the batch", "just written, not waited for"])
def test_a_missing_wait_is_reported(tmp_path, what):
    """Of the batch's event; and of the side stream for what the student's was given before."""
    code, text = sanitized(what, tmp_path)
    assert code != 0 and "data race" in text, text[-2000:]
