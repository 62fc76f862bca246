"""The harness, and that what the benchmarks compare with computes the same function as what it is compared with."""

import argparse
import errno
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import accumulate, gpu_suite, harness, kernels, naive, peers, step, study, workload
from pipelines.augment.device import TrainBatch
from pipelines.errors import UserError
from std_fast import cli
from std_fast.commands import tool_verbs
from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict
from std_fast.library import create_student
from std_fast.method.losses import class_loss, targets_from_logits
from std_fast.method.mine import MutualInformation
from std_fast.runtime.flops import count_macs
from std_fast.training.step import Objective
from tests.killing import Child

ARGS = SimpleNamespace(device="cpu", repeats=4, turn_seconds=0.0)


# The harness


def test_contestants_take_turns_forwards_and_backwards():
    order = []
    times = harness.measure({name: lambda n=name: order.append(n) for name in "abc"}, ARGS, warm_up=2)
    assert "".join(order) == "aabbcc" + "abc" + "cba" + "abc" + "cba"
    assert all(len(one.turns) == len(one.processor) == 4 and one.first > 0 for one in times.values())


def test_a_turn_repeats_short_calls_and_counts_one(monkeypatch):
    """By a clock that the call itself moves, a millisecond each time."""
    now, calls = [0.0], []

    def call():
        calls.append(0)
        now[0] += 0.001

    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    args = SimpleNamespace(device="cpu", repeats=2, turn_seconds=0.02)
    one = harness.measure({"a": call}, args, warm_up=2)["a"]
    assert len(calls) == 2 + 2 * 20
    assert one.median == pytest.approx(0.001) and one.first == pytest.approx(0.001)


def test_spread_and_ratio_are_of_medians():
    assert harness.spread([1.0, 5.0, 2.0, 4.0, 3.0]) == {"median": 3, "lower_quartile": 2, "upper_quartile": 4}
    assert harness.spread([7.0])["upper_quartile"] == 7
    fast, slow = harness.Times(9.0, [1.0, 2.0, 4.0]), harness.Times(9.0, [3.0, 6.0, 6.0])
    found = harness.ratio("fast over slow", fast, slow)
    assert found["ratio"] == {"median": 3.0, "lower_quartile": 2.25, "upper_quartile": 3.0}
    assert "cpu_ratio" not in found
    row = harness.row("fast", fast, batch=8, more=1)
    assert row["images_per_second"] == 4.0 and row["more"] == 1 and row["turns_ms"] == [1000, 2000, 4000]


def test_a_result_carries_its_conditions(tmp_path, capsys):
    def run(args):
        return {"rows": [{"name": "x", "milliseconds": harness.spread([1.0, 3.0])}], "ratios": []}

    assert harness.main("nothing", run, harness.show, argv=["--json", "--out", str(tmp_path), "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["repeats"] == 7
    found = report["conditions"]
    assert {"cpu", "cores", "threads", "load_average", "load_average_after", "versions", "date"} <= found.keys()
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert isinstance(found["uncommitted_changes"], bool) or found["commit"] == "none"
    (file,) = tmp_path.iterdir()
    assert file.name == f"nothing-{harness.hardware(found)}-{found['date'][:10]}.json"
    assert json.loads(file.read_text()) == report
    assert "| x | 2 (1.5 to 2.5) |" in harness.show(report)


def test_mistakes_end_with_one_line_and_code_2(capsys):
    def run(args):
        raise UserError("--model: no")

    assert harness.main("q", run, harness.show, argv=["--device", "cpu"]) == 2
    assert harness.main("q", run, harness.show, argv=["--nope"]) == 2
    assert harness.main("q", run, harness.show, argv=["--repeats", "0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2][:8] for line in lines] == ["--model:", "unrecogn", "--repeat"]


def test_the_cli_knows_every_benchmark_and_no_other():
    folder = harness.ROOT / "benchmarks"
    runnable = {path.stem for path in folder.glob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8")}
    assert set(tool_verbs.BENCHMARKS) == runnable


def test_the_cli_starts_a_benchmark_with_its_own_arguments(monkeypatch, capsys):
    """In the same process, so that a signal reaches the benchmark."""
    started = []
    monkeypatch.setattr(tool_verbs.os, "execve", lambda *what: started.append(what))
    cli.main(["bench", "peers", "--model", "cyclemlp_b1"])
    ((program, words, environment),) = started
    assert program == sys.executable and words[1:] == ["-m", "benchmarks.peers", "--model", "cyclemlp_b1"]
    assert str(harness.ROOT) in environment["PYTHONPATH"].split(os.pathsep)
    assert cli.main(["bench", "pears"]) == 2 and len(started) == 1
    assert "invalid choice: 'pears'" in capsys.readouterr().err


# What is compared is equal


def tiny_args(**more):
    values = {"smoke": True, "model": "mixer", "batch": 8, "image_size": 32, "classes": 8, "device": "cpu"}
    return argparse.Namespace(**values, precision="float32", compile="off", **more)


def test_pieces_of_a_batch_are_trained_alike():
    report = accumulate.run(tiny_args(pieces=[1, 2, 4], steps=0))
    names = [row["name"] for row in report["rows"]]
    assert names == ["1 x 16", "2 x 8", "4 x 4"]
    for row in report["rows"]:
        assert len(row["losses"]) == 4 and row["largest_difference"] < 1e-5 and row["images_per_second"] > 0


def test_naive_mine_is_the_same_function():
    torch.manual_seed(0)
    mine = MutualInformation(6, 5, width=16, weight=0.3).double()
    rival = naive.NaiveMine(mine).double()
    results = []
    for form in (mine, rival):
        tokens = [torch.linspace(-2, 1, 8 * 2 * n, dtype=torch.float64).sin().view(8, 2, n) for n in (6, 5)]
        tokens = [t.requires_grad_() for t in tokens]
        value = form(*tokens)
        results.append([value, *torch.autograd.grad(value, tokens)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["mixer", "resmlp"])
def test_naive_student_and_loss_are_ours(name):
    """timm's blocks, concatenations and losses against the student and the objective, with the same weights."""
    from timm.models import mlp_mixer

    torch.manual_seed(0)
    options = {"patch_size": 8, "dim": 16, "depth": 3}
    student = create_student(name, 8, 32, 2, mine_weight=0.2, mine_width=16, **options).train()
    kind = (
        {"block_layer": mlp_mixer.ResBlock, "norm_layer": mlp_mixer.Affine, "mlp_ratio": 4} if name == "resmlp" else {}
    )
    backbone = mlp_mixer.MlpMixer(8, 32, 3, 8, 3, 16, **kind)
    backbone.load_state_dict(student.backbone.state_dict())
    rival = naive.NaiveStudent(backbone, student)
    mixed = TrainBatch(
        torch.randn(8, 3, 32, 32),
        torch.randint(0, 8, (8,)),
        torch.randint(0, 8, (8,)),
        torch.rand(8),
        torch.arange(8),
        0,
        0,
    )
    targets = targets_from_logits(torch.randn(8, 2, 8))
    ours, plain = student(mixed.images), rival(mixed.images)
    torch.testing.assert_close(ours.class_logits, plain.class_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.dist_logits, plain.dist_logits, rtol=1e-4, atol=1e-5)
    distill = from_dict(Recipe, {"distill": {"mode": "std", "teachers": [{"name": "a"}, {"name": "b"}]}}).distill
    expected = Objective(distill, 0.1, student.head_teacher)(ours, replace(mixed, targets=targets)).total
    target = naive.mixed_target(mixed, 8, 0.1)
    found = naive.naive_objective(plain, target, targets, distill.alpha, student.head_teacher)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    again = class_loss(ours.class_logits, mixed.labels_a, mixed.labels_b, mixed.lam, 0.1)
    torch.testing.assert_close(naive.soft_target_loss(ours.class_logits, target), again)


def test_peers_do_equal_work_and_learn():
    args = tiny_args()
    teachers = (workload.TINY_TEACHER,) * 2
    with workload.workplace(args, teachers) as folder:
        with workload.built(workload.recipe_for(args, folder, teachers)) as std:
            plain_recipe = workload.recipe_for(args, folder, ())
            with workload.built(plain_recipe) as plain:
                theirs = peers.timm_backbone(plain_recipe, 8)
                shapes = {name: p.shape for name, p in theirs.named_parameters()}
                assert shapes == {n: p.shape for n, p in plain.trainer.student.backbone.named_parameters()}
                batch = workload.given_batch(std)
                flops = workload.step_flops(plain, replace(batch, targets=None))
                stem = 16 * (3 * 8 * 8) * 16  # products of the first layer, whose input needs no gradient
                assert flops == 2 * (3 * count_macs(plain.trainer.student, 32) - stem)
            step = workload.Stepper(std)
            before = [p.clone() for p in std.trainer.student.parameters()]
            step(batch)
            step.check()
            assert any(not torch.equal(a, b) for a, b in zip(before, std.trainer.student.parameters(), strict=True))
            rival = peers.naive_step(std)
            first = rival(batch)
            for _ in range(30):
                last = rival(batch)
            assert last < first
            std.trainer.guard.steps.fill_(1)
            with pytest.raises(RuntimeError, match="step 1 was not finite"):
                step.check()


# Bytes


def test_bytes_of_operators():
    """Each kind of operator: test_codegen.py."""
    with kernels.CountBytes() as counter:
        torch.mm(torch.ones(2, 3), torch.ones(3, 5), out=torch.empty(2, 5))  # what it writes into is not read
    assert (counter.total, counter.flops) == (4 * (6 + 15 + 10) + 4 * (6 + 15), 2 * 2 * 3 * 5)  # the ones are written


def test_share_of_time_is_compared_with_the_share_of_arithmetic():
    times = {name: harness.Times(0.0, [cost] * 3, [cost] * 3) for name, cost in ((step.PLAIN, 2.0), (step.GIVEN, 2.6))}
    found = step.share(step.GIVEN, {step.PLAIN: 400, step.GIVEN: 480}, times)
    assert (found["arithmetic_percent"], found["time_over_arithmetic"]) == (20.0, 1.5)
    assert found["time_percent"]["median"] == found["time_percent"]["upper_quartile"] == 30.0


def test_the_studys_students_are_measured_by_their_channels(capsys):
    args = argparse.Namespace(model="mixer", dim=64)
    assert workload.options_of_mixer(args) | workload.TINY == workload.TINY  # the same fields
    assert workload.options_of_mixer(args)["channel_dim"] == 256
    assert workload.variant(args) == "mixer-c64"
    assert (
        harness.main(
            "kernels",
            kernels.run,
            kernels.show,
            kernels.add_arguments,
            argv=["--model", "mixer_s16", "--dim", "64", "--device", "cpu"],
        )
        == 2
    )
    assert "--dim: mixer_s16" in capsys.readouterr().err


def test_images_are_as_large_as_photographs(tmp_path):
    workload.write_images(tmp_path / "i", 3, 7, 256)
    files = sorted((tmp_path / "i").rglob("*.jpg"))
    assert len(files) == 7 and len({file.parent for file in files}) == 3
    from PIL import Image

    for file in files[:3]:
        with Image.open(file) as image:
            assert 0.1 < file.stat().st_size / (image.width * image.height) < 0.5


# The suite


def test_a_part_that_hangs_or_fails_takes_nothing_with_it(tmp_path):
    hangs = gpu_suite.Part("hangs", ("timeit", "-n1", "-r1", "import time; time.sleep(60)"), limit=1.5)
    fails = gpu_suite.Part("fails", ("timeit", "1/0"), limit=20)
    found = {part.name: gpu_suite.attempt(part, part.limit, tmp_path) for part in (hangs, fails)}
    assert found["hangs"]["state"] == "ran past its limit of 2 s" and found["hangs"]["seconds"] < 10
    assert found["fails"]["state"] == "exit code 1" and "ZeroDivisionError" in found["fails"]["said"][-1]
    gpu_suite.save(tmp_path / "found.json", found)
    assert gpu_suite.results(tmp_path / "found.json") == found
    assert "hangs: ran past" in gpu_suite.table(found)


def test_the_suites_reports_become_files_of_their_own(tmp_path, capsys):
    conditions = {"gpu": {"name": "NVIDIA H200"}, "date": "2026-01-02T03:04:05+00:00"}
    report = {"question": "step", "variant": "resmlp_s24", "conditions": conditions, "rows": []}
    path = tmp_path / "found.json"
    gpu_suite.save(path, {"step resmlp_s24": {"state": "ok", "report": report}, "tests": {"state": "ok"}})
    assert gpu_suite.main(["--split", str(path), "--out", str(tmp_path / "results")]) == 0
    (file,) = (tmp_path / "results").iterdir()
    assert file.name == "step-resmlp_s24-nvidia-h200-2026-01-02.json" and json.loads(file.read_text()) == report
    assert capsys.readouterr().out.strip() == str(file)


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu_suite, "card", lambda: "nvidia-h200")
    monkeypatch.setattr(gpu_suite, "code", lambda on: "abc")
    monkeypatch.setattr(gpu_suite.signal, "signal", lambda *_: None)


def test_a_suite_that_is_stopped_goes_on_where_it_was(tmp_path, monkeypatch, capsys, on_a_gpu):
    """What is there is not taken again; what failed comes last; another code's results are not this one's."""
    calls = []

    def attempt(part, limit, folder):
        calls.append(part.name)
        if part.name == "b" and calls.count("b") == 1:
            return {"state": "exit code 1", "seconds": 1.0}
        if part.name == "c" and calls.count("c") == 1:
            raise KeyboardInterrupt
        return {"state": "ok", "seconds": 1.0}

    monkeypatch.setattr(gpu_suite, "PARTS", tuple(gpu_suite.Part(name, ("timeit",), 60) for name in "abcd"))
    monkeypatch.setattr(gpu_suite, "attempt", attempt)
    words = ["--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        gpu_suite.main(words)
    assert calls == ["a", "b", "c"] and "a: ok" in capsys.readouterr().out.splitlines()[0]
    assert gpu_suite.main(words) == 0 and calls[3:] == ["c", "d", "b"]
    assert gpu_suite.main(words) == 0 and len(calls) == 6
    assert gpu_suite.main(["--out", str(tmp_path / "empty"), "--known", str(tmp_path)]) == 0 and len(calls) == 6
    monkeypatch.setattr(gpu_suite, "code", lambda on: "another")
    assert gpu_suite.main(words) == 0 and calls[6:] == ["a", "b", "c", "d"]


def test_results_are_of_the_recipes_tests_versions_and_memory_that_made_them(tmp_path, monkeypatch):
    names = ["std_fast/a.py", "std_fast/recipes/b.yaml", "pipelines/c.py", "benchmarks/d.py", "tests/small_runs.py"]
    names += ["tests/gpu/conftest.py", *(test for test in gpu_suite.TESTS if test.endswith(".py"))]
    for name in [*names, "tests/unit/test_x.py", "benchmarks/results/x.json"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    for package in ("std_fast", "pipelines"):
        monkeypatch.setattr(gpu_suite, package, SimpleNamespace(__file__=str(tmp_path / package / "__init__.py")))
    found = {"gpu": {"memory_gib": 80}, "versions": {"torch": "2.8.0"}, "python": "3.11.7", "load_average": [0]}
    in_place = {
        "ROOT": tmp_path,
        "__file__": str(tmp_path / "benchmarks" / "harness.py"),
        "conditions": lambda _: found,
    }
    monkeypatch.setattr(gpu_suite, "harness", SimpleNamespace(**in_place))
    seen = {gpu_suite.code("cpu")}
    for name in names:
        (tmp_path / name).write_text("2")
        seen.add(gpu_suite.code("cpu"))
    for change in ({"gpu": {"memory_gib": 40}}, {"versions": {"torch": "2.9.0"}}, {"python": "3.12.1"}):
        found |= change
        seen.add(gpu_suite.code("cpu"))
    assert len(seen) == 1 + len(names) + 3
    (tmp_path / "tests" / "unit" / "test_x.py").write_text("2")
    (tmp_path / "benchmarks" / "results" / "x.json").write_text("2")
    found["load_average"] = [9]
    assert gpu_suite.code("cpu") in seen


def test_the_pieces_are_listed_with_what_they_need_and_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "card", lambda: "cpu")
    monkeypatch.setattr(gpu_suite, "code", lambda on: "abc")
    gpu_suite.save(tmp_path / "gpu_suite-cpu-abc.json", {"overlap": {"state": "exit code 1"}})
    assert gpu_suite.main(["--list", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| overlap | 120 | 180 | exit code 1 |" in lines and "| kernels | 90 | 180 | not taken |" in lines
    assert [line.split(" | ")[0] for line in lines[2:-2]] == [f"| {part.name}" for part in gpu_suite.PARTS]
    assert lines[-1] == f"together {sum(part.expected for part in gpu_suite.PARTS) / 60:.0f} minutes"


@pytest.mark.parametrize("fault", ["print('no report')", "raise SystemExit(3)", "os.abort()"])
def test_a_piece_that_fails_stops_no_other(tmp_path, monkeypatch, fault):
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "bad.py").write_text(f"import os; os.write(2, b'\\xff: why\\n'); {fault}")
    (package / "good.py").write_text("print('{a library} says', '{', '}', 'something', sep=chr(10))")
    monkeypatch.setattr(gpu_suite.harness, "ROOT", tmp_path)
    parts = [gpu_suite.Part(name, (f"benchmarks.{name}",), 0) for name in ("bad", "good")]
    found = {}
    gpu_suite.run(parts, found, tmp_path / "found.json", minutes=4)
    assert gpu_suite.results(tmp_path / "found.json") == found
    assert found["bad"]["state"] != "ok" and "why" in "".join(found["bad"]["said"]) and found["good"]["report"] == {}


def test_the_suite_s_tests_are_those_marked_gpu():
    files = {file for file in (harness.ROOT / "tests").glob("*/test_*.py") if "mark.gpu" in file.read_text()}
    inside = {harness.ROOT / path for path in gpu_suite.TESTS}
    assert len(files) >= 6 and all(inside & {file, *file.parents} for file in files - {Path(__file__)})


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "torch sees no GPU"),
        (["--smoke", "--device", "cuda"], "torch sees no GPU"),
        (["--smoke", "--only", "study"], "--only study: needs --study"),
        (["--smoke", "--only", "naive"], "invalid choice: 'naive'"),
        (["--smoke", "--minutes", "nan"], "--minutes"),
        (["--smoke", "--minutes", "0", "--out", __file__], "--out: "),
        (["--split", __file__], "--split: "),
        (["--split", "absent.json"], "--split: absent.json"),
    ],
)
def test_the_suite_refuses_what_would_waste_its_minutes(tmp_path, monkeypatch, capsys, words, named):
    """Without a GPU its pieces would take their minutes on the CPU, and its tests be skipped as if they had passed."""
    monkeypatch.setattr(gpu_suite, "card", lambda: "cpu")
    monkeypatch.setattr(gpu_suite, "run", lambda *_: pytest.fail("a piece was begun"))
    monkeypatch.setattr(gpu_suite.signal, "signal", lambda *_: None)
    assert gpu_suite.main(["--out", str(tmp_path), *words]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("study: left out"))
    assert named in line


def test_a_full_disk_costs_the_file_and_no_piece(tmp_path, monkeypatch, capsys, on_a_gpu):
    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "gpu_suite.log").symlink_to("/dev/full")
    monkeypatch.setattr(gpu_suite, "write_atomic", full)
    words = ("timeit", "-n1", "-r1", "pass")
    monkeypatch.setattr(gpu_suite, "PARTS", tuple(gpu_suite.Part(name, words) for name in "ab"))
    assert gpu_suite.main(["--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "a: ok" in printed.out and "b: ok" in printed.out and "No space left on device" in printed.err


def start_piece(folder, code):
    gpu_suite.attempt(gpu_suite.Part("x", ("timeit", "-n1", "-r1", code)), 60, Path(folder))


def start_run(folder, code):
    study.Children(1).run([sys.executable, "-c", code], None)


@pytest.mark.parametrize("start", [start_piece, start_run])
def test_a_piece_does_not_outlive_a_suite_nor_a_run_its_study_that_is_killed(tmp_path, start):
    """It would run beside the pieces of the next call, on the same GPU."""
    os.mkfifo(tmp_path / "alive")
    wait = f"import time; file = open({str(tmp_path / 'alive')!r}, 'w'); time.sleep(20); file.write('it did')"
    with Child([str(tmp_path), wait], tmp_path / "said", target=start) as parent:
        with open(tmp_path / "alive") as file:  # waits for the piece to open it
            parent.send(signal.SIGKILL)
            assert file.read() == ""  # waits for its end


def test_a_piece_that_is_killed_leaves_none_of_its_processes(tmp_path):
    os.mkfifo(tmp_path / "alive")
    child = f"import time; file = open({str(tmp_path / 'alive')!r}, 'w'); time.sleep(20); file.write('it did')"
    piece = (
        f"import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], stdout=-3, stderr=-3); "
        f"open({str(tmp_path / 'alive')!r}).close(); os.kill(os.getpid(), 9)"
    )
    keeps = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    found = gpu_suite.attempt(gpu_suite.Part("x", ("timeit", "-n1", "-r1", piece)), 60, tmp_path)
    assert found["state"] == "exit code -9"
    os.set_blocking(keeps, True)
    assert os.read(keeps, 10) == b""  # waits for its end


def test_pieces_are_begun_only_where_they_fit(tmp_path, monkeypatch):
    now, taken = [0.0], []

    def attempt(part, limit, folder):
        taken.append((part.name, limit))
        now[0] += 100
        return {"state": "ok", "seconds": 100.0}

    monkeypatch.setattr(gpu_suite.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu_suite, "attempt", attempt)
    seconds = {"a": 90, "b": 150, "c": 150, "d": 30}
    parts = [gpu_suite.Part(name, ("timeit",), expected) for name, expected in seconds.items()]
    gpu_suite.run(parts, {}, tmp_path / "found.json", minutes=4)
    assert taken == [("a", 180), ("d", 140)]


def test_the_suite_names_each_part_once_and_every_benchmark_of_the_gpu():
    names = [part.name for part in gpu_suite.PARTS]
    assert len(names) == len(set(names)) and names[:3] == ["tests", "step mixer_s16", "peers compiled"]
    assert all(part.expected <= part.limit <= (540 if part.name == "study" else 180) for part in gpu_suite.PARTS)
    wanted = "roofline kernels step peers overlap teachers end_to_end options compile mine_gaussians evidence"
    assert {part.question for part in gpu_suite.PARTS if part.question} == set(wanted.split())


def test_the_study_stops_in_time_and_continues_by_what_is_kept(tmp_path, monkeypatch, capsys, on_a_gpu):
    """The benchmark has less time than its piece; another disk begins with the runs of the one before."""
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "evidence.py").write_text(
        "import json, sys, pathlib\nwords = sys.argv[1:]\n"
        "keep = pathlib.Path(words[words.index('--keep') + 1])\n"
        "runs = json.loads(keep.read_text()) + [1] if keep.exists() else [1]\n"
        "keep.write_text(json.dumps(runs))\n"
        "report = {'runs': runs, 'left': [2] * (2 - len(runs)), 'words': words}\n"
        "print(json.dumps(report, indent=1))"
    )
    monkeypatch.setattr(gpu_suite.harness, "ROOT", tmp_path)
    words = ["--only", "study", "--minutes", "5", "--study", "images", "teachers", str(tmp_path / "work")]
    assert gpu_suite.main([*words, "--out", str(tmp_path / "one")]) == 0
    (path,) = (tmp_path / "one").glob("gpu_suite-*.json")
    (study,) = gpu_suite.results(path).values()
    assert study["state"] == gpu_suite.UNFINISHED
    said = [word for word in study["report"]["words"] if word != "--json"]
    settings = dict(zip(said[::2], said[1::2], strict=True))
    assert 4.0 < float(settings["--minutes"]) < 5 - gpu_suite.SAVING / 60 and settings["--size"] == "gpu"
    assert Path(settings["--data"]) == Path("images").resolve()
    assert "1 runs are done, 1 left" in capsys.readouterr().out
    assert gpu_suite.main([*words, "--out", str(tmp_path / "two"), "--known", str(tmp_path / "one")]) == 0
    (path,) = (tmp_path / "two").glob("gpu_suite-*.json")
    (study,) = gpu_suite.results(path).values()
    assert study["state"] == "ok" and study["report"]["runs"] == [1, 1]


def test_what_a_fake_gpu_chose_without_a_clock_is_not_kept(tmp_path, monkeypatch, on_a_gpu):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "x")  # restored afterwards
    choice, kernel = tmp_path / "caches" / "ab" / "1.best_config", tmp_path / "caches" / "ab" / "1.py"
    choice.parent.mkdir(parents=True)
    for active in (False, True):
        choice.touch(), kernel.touch()
        monkeypatch.setattr(gpu_suite.fake_gpu, "active", lambda active=active: active)
        words = ["--out", str(tmp_path), "--minutes", "0", "--caches", str(tmp_path / "caches")]
        assert gpu_suite.main(words) == 0
        assert choice.exists() is not active and kernel.exists()
