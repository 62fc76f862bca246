"""What the fuzzers found stays fixed: each input of the corpus, and each valid one, is read again."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.errors import UserError
from tests.fuzz.targets import TARGETS, Finding, Target, execute

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).resolve().parent / "corpus"
NEEDS = {"ffcv": "ffcv", "dali": "nvidia.dali"}
CHANGED = {"devkit": 2, "beton": 300, "tar": 300}  # inputs instead of 30; one of devkit takes a process


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_and_changed_seeds_are_read_or_refused(name, tmp_path):
    if name in NEEDS and importlib.util.find_spec(NEEDS[name].partition(".")[0]) is None:
        pytest.skip(f"no {name} here")
    target = TARGETS[name](tmp_path)
    seeds = target.seeds()
    assert seeds and all(len(seed) <= target.max_bytes for seed in seeds)
    accepted = [execute(target, seed) for seed in seeds]
    assert any(accepted), "none of the seeds is valid: the target does not reach its reader"
    for path in sorted((CORPUS / name).glob("*")):
        execute(target, path.read_bytes())
    rng = random.Random(0)
    for _ in range(CHANGED.get(name, 30)):
        data = rng.choice(seeds)
        execute(target, target.mutate(data, rng) if target.mutate else flipped(data, rng))


def flipped(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out)


def test_every_corpus_has_its_target():
    assert {path.name for path in CORPUS.iterdir()} <= set(TARGETS)


class Loud(Target):
    def seeds(self) -> list[bytes]:
        return [b"x"]

    def read(self, data: bytes) -> None:
        raise {b"u": UserError("x: fix it"), b"v": ValueError(), b"f": Finding("odd")}[data]


def test_only_a_user_error_of_one_printable_line_is_no_finding(tmp_path, monkeypatch):
    target = Loud(tmp_path)
    assert execute(target, b"u") is False
    for data, kind in ((b"v", ValueError), (b"f", Finding)):
        with pytest.raises(kind):
            execute(target, data)
    monkeypatch.setattr(UserError, "__init__", Exception.__init__)  # as if it did not escape what it is given
    for text in ("a\nb", "x" * 3000):
        monkeypatch.setattr(target, "read", lambda data, text=text: (_ for _ in ()).throw(UserError(text)))
        with pytest.raises(Finding, match="a message of"):
            execute(target, b"u")


def test_the_fuzzers_run_and_report(tmp_path):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install -c constraints.txt atheris")
    report = str(tmp_path / "report.json")
    words = ["--minutes", "0.03", "--targets", "target_cache", "--out", str(tmp_path), "--json", report]
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert row["executions"] > 20 and not row["exceptions"] and not row["deaths"]
    assert "target_cache" in done.stdout
