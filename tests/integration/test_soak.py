"""The long-run benchmark at its smallest: it trains, stops, resumes and finds nothing left; and it sees leaks."""

import importlib.util
import json
import subprocess
import sys

from benchmarks import harness, soak


def test_a_short_soak_leaves_nothing_behind(tmp_path):
    packages = {"ffcv": "ffcv", "dali": "nvidia", "torch": "torch"}
    backends = [name for name, package in packages.items() if importlib.util.find_spec(package) is not None]
    words = ["-m", "benchmarks.soak", "--smoke", "--backends", ",".join(backends), "--out", str(tmp_path), "--json"]
    done = subprocess.run([sys.executable, *words], cwd=harness.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["name"] for row in rows] == backends
    for row in rows:
        assert row["epochs"] > 0 and row["runs"] >= 1 and row["abandoned"] >= 1, row["name"]
        assert (row["left_threads"], row["left_processes"]) == ([], 0), row["name"]
        assert row["zombies_most"] == row["children_most"] == row["shm_most"] == 0, row["name"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".png"]


def curve(**last):
    """A flat one of 100 looks, but for what grows evenly to `last`."""
    flat = {"rss_mib": 500.0, "threads": 7, "files": 9, "shm": 0, "children": 0, "zombies": 0}
    grown = {key: last.get(key, value) - value for key, value in flat.items()}
    return [{"seconds": i, **{key: flat[key] + grown[key] * i / 99 for key in flat}} for i in range(100)]


def test_what_grows_is_seen():
    assert soak.verdict(curve())["flat"]
    assert soak.verdict(curve(rss_mib=510.0))["flat"]
    for leak in ({"rss_mib": 560.0}, {"threads": 30}, {"files": 12}, {"shm": 4}, {"children": 2}, {"zombies": 1}):
        assert not soak.verdict(curve(**leak))["flat"], leak
    coming_and_going = curve()
    for i in range(0, 100, 7):
        coming_and_going[i]["threads"] += 1  # a checkpoint's
    assert soak.verdict(coming_and_going)["flat"]
