"""In a steady step the host waits for nothing, makes no copy that would wait, and launches so many kernels."""

import collections

import pytest

from benchmarks import fake_gpu
from tests.rehearsal import steps


@pytest.mark.skipif(fake_gpu.find() is None, reason=fake_gpu.missing())
@pytest.mark.parametrize("form", ["teachers beside", "targets stored"])
def test_a_steady_step_waits_for_nothing(form):
    """Eager ones; `make rehearse` counts compiled ones."""
    steps.check(form, "off", fake_gpu.find())


def test_lines_of_the_log_are_counted(tmp_path):
    log = tmp_path / "calls.log"
    lines = [
        *("launch name=early library=torch", "mark step", "launch name=triton_poi_fused_0 library=driver"),
        *("launch name=gemm library=cublas", "memcpy kind=h2d async size=4", "mark step", "memcpy kind=h2d staged"),
        *("memcpy kind=d2h blocking", "sync what=stream", "record event=1", "mark end", "sync what=device"),
    ]
    text = "".join(f"12 345 678 {line}\n" for line in lines)
    log.write_text(text.replace("12 345 678 mark end", "12 345 999 sync what=event\n12 345 678 mark end"))
    assert steps.counts_of(log) == [
        collections.Counter({"launches": 2, "of Triton": 1, "copies": 1}),
        collections.Counter({"copies": 2, "blocking copies": 2, "host waits": 1}),
    ]
