"""What `std-fast bench codegen` counts; that it compiles is not tested here: it needs a GPU or the fake one."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import codegen, codegen_report, fake_gpu
from pipelines.errors import UserError
from tests.killing import Child

MEGA = 1_000_000


@pytest.fixture(autouse=True)
def as_if_on_a_gpu(monkeypatch):
    """Bytes are counted of what lies on a GPU; here that is everything."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


def counted(call):
    """(operator, bytes read, bytes written) of all that `call` does."""
    recorder = codegen.Recorder(1.0, 1.0, 1.0)
    enter, leave = torch.utils._python_dispatch.TorchDispatchMode.__enter__, type(recorder).__mro__[1].__exit__
    enter(recorder)
    try:
        call()
    finally:
        leave(recorder, None, None, None)
    return [(k.name, k.read, k.written) for k in recorder.kernels.values()]


def test_bytes_of_operators():
    a, b, out = torch.ones(8, 16), torch.ones(16, 4), torch.empty(8, 4)
    assert counted(lambda: torch.mm(a, b)) == [("aten.mm", 4 * (128 + 64), 4 * 32)]
    assert counted(lambda: torch.mm(a, b, out=out)) == [("aten.mm.out", 4 * (128 + 64), 4 * 32)]
    assert counted(lambda: a.add_(a)) == [("aten.add_.Tensor", 2 * 4 * 128, 4 * 128)]
    assert counted(lambda: a.copy_(torch.Tensor.detach(a))) == [("aten.copy_", 4 * 128, 4 * 128)]
    assert counted(lambda: a.fill_(1.0)) == [("aten.fill_.Scalar", 0, 4 * 128)]
    assert counted(lambda: a.view(16, 8).T.unsqueeze(0)) == []
    assert counted(lambda: torch.mm(a, torch.ones(()).expand(16, 4)))[-1] == ("aten.mm", 4 * (128 + 1), 4 * 32)
    pair = [torch.ones(8), torch.ones(8)]
    assert counted(lambda: torch._foreach_mul_(pair, 2.0)) == [("aten._foreach_mul_.Scalar", 64, 64)]


def test_the_least_time_is_by_the_larger_of_arithmetic_and_bytes():
    """Ceilings of 1000 and 10 operations a second and 100 bytes a second."""
    recorder = codegen.Recorder(1000.0, 10.0, 100.0)
    recorder.region = "here"
    assert recorder.add("bytes", 150.0, 50.0, 1000.0).seconds == 2.0
    assert recorder.add("arithmetic", 10.0, 10.0, 5000.0).seconds == 5.0
    assert recorder.add("single", 10.0, 10.0, 50.0, low=False).seconds == 5.0
    assert recorder.add("bytes", 150.0, 50.0, 1000.0).seconds == 4.0
    total = codegen_report.sum_of("all", list(recorder.kernels.values()))
    assert total["launches"] == 4 and total["least_ms"] == 14_000 and total["spilling"] == 0


def test_a_report_sums_regions_and_steps():
    def kernel(region, seconds, compiled=()):
        return codegen_report.Kernel(region, "k", 1, 8e9, 4e9, 790e9, seconds, list(compiled))

    spills = {"registers": 255, "spilled": 8, "shared": 0, "warps": 4}
    kernels = [
        kernel("outside", 9.0),
        kernel("plain: student, forward", 0.010),
        kernel("plain: student, backward", 0.020),
        kernel("STD, targets given: student, forward", 0.033, [spills, {**spills, "spilled": 0}]),
        kernel("augmentation", 0.001, [spills]),
        kernel("teachers", 0.016),
    ]
    args = SimpleNamespace(
        batch=300, tflops=790.0, model="m", target="sm_90", precision="auto", no_teachers=False, set=[]
    )
    report = codegen_report.report_of(args, kernels)
    plain, std, running = report["steps"]
    assert (plain["least_ms"], std["least_ms"], running["least_ms"]) == (30, 33, 50)
    assert plain["images_per_second"] == 10_000 and report["std_percent"] == 10
    assert plain["mfu_percent"] == pytest.approx(100 * 2 * 790e9 / 790e12 / 0.030, rel=0.01)
    assert {region["name"]: region["spilling"] for region in report["regions"]}["augmentation"] == 1
    assert running["spilling"] == 1  # where one configuration does not spill, it can be taken
    assert [row["least_us"] for row in report["rows"]] == [33_000, 20_000, 16_000, 10_000, 1_000]


def test_where_no_gpu_is_one_line_says_what_is_needed(monkeypatch, capsys):
    monkeypatch.setenv(fake_gpu.NAMED_BY, "/nowhere/fake-gpu")
    monkeypatch.delenv(codegen.FRESH, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(codegen.sys, "argv", ["codegen"])
    assert codegen.main() == 2
    assert "needs a GPU; STD_FAST_FAKE_GPU: /nowhere/fake-gpu is no script" in capsys.readouterr().err


def command_under(tool):
    os.environ[fake_gpu.NAMED_BY] = tool
    sys.argv[:] = ["codegen"]
    codegen.main()


def test_a_signal_reaches_the_process_that_compiles(tmp_path):
    """The tool takes the command's place: there is no parent that could be ended alone."""
    tool = tmp_path / "fake-gpu"
    tool.write_text("#!/bin/sh\necho $$ $STD_FAST_CODEGEN\nexit 7\n")
    tool.chmod(0o755)
    with Child([str(tool)], tmp_path / "said", target=command_under) as child:
        assert child.wait() == 7 and child.text == f"{child.pid} 1\n"


def test_settings_hold_inside_alone():
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    found = inductor.combo_kernels, inductor.triton.persistent_reductions, functorch.activation_memory_budget
    words = ["combo_kernels=true", "triton.persistent_reductions=false", "activation_memory_budget=0.5"]
    with codegen.settings_of(words):
        assert inductor.combo_kernels is True and inductor.triton.persistent_reductions is False
        assert functorch.activation_memory_budget == 0.5
    assert found == (inductor.combo_kernels, inductor.triton.persistent_reductions, functorch.activation_memory_budget)
    for wrong in ("combo_kernels", "no_such_setting=1"):
        with pytest.raises(UserError, match=f"--set: '{wrong}' is not NAME=VALUE"), codegen.settings_of([wrong]):
            pass
