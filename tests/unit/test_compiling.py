"""What torch.compile is given, how often it compiles, who pays for it, and that a step never waits for the device."""

import os
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from pipelines.errors import UserError
from std_fast.runtime import compiling
from std_fast.runtime.budget import Ledger
from std_fast.runtime.metrics import read_jsonl
from std_fast.training.run import Run
from std_fast.training.schedule import StepSettings
from std_fast.training.train import train
from tests.small_runs import at, small_recipe


@pytest.fixture(scope="module")
def recipe(image_folder, teacher, tmp_path_factory):
    distill = {"mode": "std", "teachers": [{"weights": str(teacher)}] * 2, "mine": {"every": "2 steps"}}
    run = {"length": "3 epochs", "eval_every": "1 epoch", "log_every": 3, "save_every": "10 minutes"}
    return small_recipe(image_folder, tmp_path_factory.mktemp("run"), distill=distill, run=run)


def test_nothing_is_compiled_again_after_the_first_two_steps(recipe, tmp_path):
    """With and without MINE, over epochs, with evaluation between: two graphs of the student and of the objective, one
    of the teachers, the augmentation and stochastic depth each. The losses are those of a run without compilation, up
    to the order in which gradients are summed."""
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    train(
        at(recipe, tmp_path / "compiled", compile="eager"), quiet=True,
        on_step=lambda run: graphs.append(counters["stats"]["unique_graphs"]),
    )  # fmt: skip
    assert graphs == [5] + [7] * 8
    assert not counters["graph_break"], dict(counters["graph_break"])
    train(at(recipe, tmp_path / "plain", compile="off"), quiet=True)
    one, two = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("compiled", "plain"))
    for a, b in zip(one, two, strict=True):
        for name in {"loss", "loss_class", "loss_distill", "information", "grad_norm", "top1"} & b.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), (a["step"], name)
    assert one[0]["seconds"]["compile"] > 0.05 and two[0]["seconds"]["compile"] == 0


def test_python_without_assertions_cannot_compile(monkeypatch):
    """torch's tracer raises StopIteration there."""
    monkeypatch.setattr(compiling, "sys", SimpleNamespace(flags=SimpleNamespace(optimize=1)))
    for chosen, device, complaint in (("eager", "cpu", "run.compile: eager"), ("auto", "cuda", "run.compile: auto")):
        with pytest.raises(UserError, match=complaint):
            compiling.backend_of(chosen, torch.device(device))
    for chosen, device in (("auto", "cpu"), ("off", "cuda")):
        assert compiling.backend_of(chosen, torch.device(device)) is None


def test_settings_of_inductor_reach_inductor_alone():
    assert compiling.options("aot_eager", realize_opcount_threshold=100) == {"backend": "aot_eager", "dynamic": False}
    tuned = compiling.options("max-autotune", realize_opcount_threshold=100)
    assert tuned["backend"] == "inductor" and "mode" not in tuned  # torch.compile takes one of the two
    assert tuned["options"]["max_autotune"] and tuned["options"]["realize_opcount_threshold"] == 100


def test_compilation_is_booked_wherever_it_happens():
    torch._dynamo.reset()
    ledger = Ledger()
    ledger.switch("evaluate")
    twice = compiling.compiled(lambda x: x * 2, "eager")
    with compiling.compile_time(ledger):
        twice(torch.ones(3))
        assert ledger.switch("evaluate") == "evaluate"  # the part before is back
        booked = ledger.read()["compile"]
        twice(torch.ones(3))
        assert ledger.read()["compile"] == booked > 0
    compiling.compiled(lambda x: x * 3, "eager")(torch.ones(3))
    assert ledger.read()["compile"] == booked


def test_what_auto_means(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert compiling.backend_of("auto", cpu) is None
    assert compiling.backend_of("off", cuda) is None
    assert compiling.backend_of("aot_eager", cpu) == "aot_eager"
    find_spec = compiling.importlib.util.find_spec
    for there in (True, False):
        monkeypatch.setattr(
            compiling.importlib.util, "find_spec",
            lambda name, there=there: (there or None) if name == "triton" else find_spec(name),
        )  # fmt: skip
        assert compiling.backend_of("auto", cuda) == ("inductor" if there else None)
        assert compiling.backend_of("inductor", cpu) == "inductor"  # C++ there
        if not there:
            with pytest.raises(UserError, match=r"run.compile: inductor needs Triton on a GPU; pip install triton"):
                compiling.backend_of("inductor", cuda)


def test_the_cache_is_kept_unless_the_user_chose_another(tmp_path, monkeypatch, caplog):
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for before in (None, default_cache_dir()):  # torch sets it to its own default when first asked
        monkeypatch.setenv(compiling.CACHE, before or "x")
        if before is None:
            monkeypatch.delenv(compiling.CACHE)
        compiling.keep_cache()
        assert cache_dir() == str(tmp_path / "std_fast" / "inductor")
        assert (tmp_path / "std_fast" / "inductor").is_dir()
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "mine"))
    compiling.keep_cache()
    assert cache_dir() == str(tmp_path / "mine")
    monkeypatch.delenv(compiling.CACHE)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiling.keep_cache()
    assert compiling.CACHE not in os.environ and "cannot be made" in caplog.text


# No host synchronisation

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


@contextmanager
def nothing_is_read():
    """Inside, whatever would make the host wait for a GPU's value is an error."""

    def refuse(name):
        def call(self, *args, **kw):
            raise AssertionError(f"Tensor.{name} makes the host wait for the device")

        return call

    kept = {name: torch.Tensor.__dict__.get(name) for name in READS}  # None: inherited from the C base
    try:
        for name in READS:
            setattr(torch.Tensor, name, refuse(name))
        yield
    finally:
        for name, method in kept.items():
            if method is None:
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, method)


def test_the_hook_sees_each_way_of_reading():
    one = torch.ones(())
    for read in (torch.Tensor.item, bool, int, float, range, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
        with nothing_is_read(), pytest.raises(AssertionError, match="wait"):
            getattr(one, read.__name__)() if read.__qualname__.startswith(("_", "T")) else read(one)
    assert one.item() == 1.0 and bool(one) and float(one) == 1.0


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_a_step_never_waits_for_the_device(recipe, tmp_path, name):
    """Augmentation, teachers, and steps with and without MINE; a GPU's own check is in tests/gpu."""
    changed = replace(recipe, optim=replace(recipe.optim, name=name))
    run = Run(at(changed, tmp_path / "run"), quiet=True)
    try:
        trainer = run.trainer
        for step in (1, 2):  # state is made
            trainer.step(next(run.stream), StepSettings(step, 1e-3, 1e-3, with_mine=step == 2))
        batches = list(run.parts.train_loader.epoch(1))
        run.stream.seek(3)
        run.parts.train_loader.epoch = lambda *_: (batch for batch in batches)
        for step in (3, 4):
            with nothing_is_read():
                trainer.step(next(run.stream), StepSettings(step, 1e-3, 1e-3, with_mine=step == 4))
        assert trainer.guard.read() == ([], False)
    finally:
        run.close()


def test_a_line_of_the_log_says_how_fast(recipe, tmp_path):
    summary = train(at(recipe, tmp_path / "run"), quiet=True)
    lines = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in lines] == [3, 6, 9]
    for line in lines:
        shares = [line[f"share_{part}"] for part in ("augment", "teacher", "student", "optimizer")]
        assert all(share > 0 for share in shares)
        assert 0 <= line["data_wait"] < 1 and sum(shares) < 1 and 0.05 < line["peak_memory_gib"] < 64
        assert "mfu" not in line  # a CPU's peak is not known
    assert summary["images_per_second"] > 0


def test_a_model_s_own_settings_reach_inductor_where_this_torch_has_them(monkeypatch):
    seen = {}
    monkeypatch.setattr(torch, "compile", lambda call, **kwargs: seen.update(kwargs) or call)
    compiling.compiled(len, "inductor", **{"triton.spill_threshold": 8, "triton.no_such_setting": 1})
    assert seen["options"] == {"realize_opcount_threshold": 100, "triton.spill_threshold": 8}
