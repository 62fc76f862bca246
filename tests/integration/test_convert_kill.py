"""A conversion killed again and again ends with the bytes of an undisturbed one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from pipelines.convert.job import ConvertSettings, convert
from tests.beton_tools import encoded, pixels

CODE = """
import sys
from pipelines.convert import journal as convert_journal
from pipelines.convert.job import ConvertSettings, convert
convert_journal.COMMIT_SECONDS = 0.05  # small steps, since the conversion takes a few seconds
convert(sys.argv[1], sys.argv[2], settings=ConvertSettings(size=100, seed=None), workers=2)
"""
ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("STD_FAST_KILLS", "4"))


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """kill -9 to the parent alone; its workers end by themselves. Nothing is ever there under the final name before the
    end; a run that follows does not do again what is done. STD_FAST_KILLS: how often (the issue's figure is 10)."""
    for number in range(600):
        folder = tmp_path / "src" / str(number % 3)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(encoded(pixels(150 + number % 7, 200, number)))
    reference, path = tmp_path / "reference.beton", tmp_path / "x.beton"
    convert(str(tmp_path / "src"), str(reference), settings=ConvertSettings(size=100, seed=None))
    command = [sys.executable, "-c", CODE, str(tmp_path / "src"), str(path)]
    journal = tmp_path / ".x.beton.converting" / "journal"
    random = np.random.default_rng(int(time.time_ns()))
    lengths = []
    while len(lengths) < KILLS:
        before = journal.stat().st_size if journal.exists() else 0
        process = subprocess.Popen(command, cwd=ROOT)
        # Some moments after the journal has grown, or, once in a while, before.
        grown = before + (0 if random.random() < 0.2 else 1)
        while process.poll() is None and not (journal.exists() and journal.stat().st_size >= grown):
            time.sleep(0.005)
        time.sleep(float(random.uniform(0, 0.3)))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:  # it was faster than the signal: from the beginning again
            assert path.read_bytes() == reference.read_bytes()
            path.unlink()
            Path(f"{path}.json").unlink()
            continue
        assert not (path.exists() and not Path(f"{path}.json").exists())
        lengths.append(journal.stat().st_size if journal.exists() else 0)
    finished = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert path.read_bytes() == reference.read_bytes()
    assert not journal.parent.exists()
    assert max(lengths) > 0  # at least once there was work to go on from
