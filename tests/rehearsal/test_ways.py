"""The tests marked `gpu` under the fake GPU, where it is: two of the ways of `make rehearse`, which takes longer."""

import pytest

from benchmarks import fake_gpu
from tests.rehearsal import ways


@pytest.mark.skipif(fake_gpu.find() is None, reason=fake_gpu.missing())
@pytest.mark.parametrize("way", ["values", "lazy"])
def test_the_gpu_s_tests_pass_without_one(tmp_path, way):
    outcomes = ways.rehearse(way, fake_gpu.find(), tmp_path)
    assert not [one for one in outcomes if one.state == "failed"], (tmp_path / f"{way}.log").read_text()[-5000:]
    assert sum(one.state == "passed" for one in outcomes) >= {"values": 25, "lazy": 8}[way]
    assert {one.reason for one in outcomes if one.state == "skipped"} <= {
        *("not rehearsed: the fake GPU has no DALI", "not rehearsed: the fake GPU has no nvJPEG"),
        *(
            "not rehearsed: compares what kernels computed",
            "not rehearsed: a run reads its losses, and goes on by them",
        ),
        "not rehearsed: takes its batches from the device's memory by kernels",
        *("not rehearsed: compiling takes minutes; another way does it", "apex is not installed"),
    }
