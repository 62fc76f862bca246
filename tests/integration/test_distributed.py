"""Two processes (gloo, CPU) train as one does: losses, weights, files, stopping, and what happens when one fails."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import UserError
from pipelines.loaders.base import available_cores
from std_fast.commands.arguments import PEER_LOST
from std_fast.commands.teach import teach
from std_fast.config import recipe as recipes
from std_fast.method.mine import log_mean_exp, over_parts
from std_fast.runtime import checkpoint, distributed
from std_fast.runtime.distributed import World, init_distributed
from std_fast.runtime.metrics import read_jsonl
from std_fast.training.build import build
from std_fast.training.step import Trainer
from std_fast.training.train import train
from tests.small_runs import at, small_recipe

# Every scenario in one pair of processes: starting them takes longer than all that they do.
DRIVER = """
import json, os, sys
from dataclasses import replace
import torch, torch.distributed as dist
from pipelines.errors import DataError
from std_fast import cli
from std_fast.config import recipe as recipes
from std_fast.method.student import Student
from std_fast.runtime.distributed import PeerLost
from std_fast.training.not_finite import NotFinite
from std_fast.training.run import Stopped
from std_fast.training.train import train

def run(name, on_step=None, **sections):
    sections["run"] = {"out": f"{folder}/{name}", **sections.get("run", {})}
    changed = {s: replace(getattr(recipe, s), **values) for s, values in sections.items()}
    try:
        train(replace(recipe, **changed), quiet=True, on_step=on_step)
        outcome = "done"
    except (Stopped, NotFinite, PeerLost, DataError) as error:
        outcome = f"{type(error).__name__}: {error}"
    os.write(1, f"OUTCOME {json.dumps([rank, name, outcome])}\\n".encode())  # at once: the ranks share the pipe

recipe, folder = recipes.load(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()

def stop(now):
    now.stop_wanted = now.step == 4 and rank == 1

def data_fails(now):  # in a batch that the loader prepares ahead
    if now.step == 4 and rank == 1:
        now.parts.train_loader.fault = DataError("a.jpg: gone")

def data_fails_late(now):  # in one of the batches behind the last step, which the loader prepares too
    if now.step == 7 and rank == 1:
        now.parts.train_loader.fault = DataError("a.jpg: gone")

def stop_evaluating(now):  # in the evaluation after step 3
    if now.step == 2 and rank == 1:
        kept = now.parts.val_loader.epoch
        def begun(number):
            now.stop_wanted = True
            yield from kept(number)
        now.parts.val_loader.epoch = begun

def poison(now):
    if now.step == 4 and rank == 1:
        kept = now.parts.trainer.objective
        now.parts.trainer.objective = lambda *a: (l := kept(*a))._replace(total=l.total * float("nan"))

def once(now):  # rank 1's loss of step 5 alone
    if now.step == 4 and rank == 1:
        trainer = now.parts.trainer
        kept = trainer.objective
        def poisoned(*a):
            trainer.objective = kept
            return (l := kept(*a))._replace(total=l.total * float("nan"))
        trainer.objective = poisoned

def batch_norms(now):
    if now.step >= 2:
        buffers = torch.cat([b.flatten().double() for b in now.parts.trainer.student.buffers()])
        one, other = now.world.gather(buffers[None])
        assert torch.equal(one, other) == (now.step == 3)  # after which was evaluated

def short_of_memory(self, images, *rest):  # on rank 1 alone
    if self.training and rank == 1 and len(images) > 4:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return forward(self, images, *rest)

run("complete")
large = {"batch": 16, "length": "4 steps", "profile": "steps 3-4"}
run("in_one", run=large)
run("accumulated", run={**large, "micro_batch": 4})
forward, Student.forward = Student.forward, short_of_memory
run("auto", run={**large, "micro_batch": "auto"})
Student.forward = forward
run("compiled", run={**large, "compile": "aot_eager"})
run("stopped", stop)
run("data_fails", data_fails)
run("data_fails_late", data_fails_late)
run("evaluating", stop_evaluating)
run("poisoned", poison)
run("skipped", once, run={"not_finite": "skip"})
run("rolled_back", once, run={"not_finite": "rollback", "rollback_every": "3 steps"})
run("budget", run={"length": "0.0003 gpu-hours", "log_every": 10, "eval_every": "9 epochs"})
targets = {"target_cache": f"{folder}/store", "views": 2}
run("written", distill=targets)
run("read", lambda now: now.parts.teachers and sys.exit("teachers were built"), distill=targets)
run("batch_norms", batch_norms, student={"name": "test_resnet", "options": {}, "drop_path": 0.0},
    distill={"mode": "none", "teachers": ()}, optim={"ema": 0.0}, run={"length": "3 steps"})
words = ["--distill.views", "1", "--distill.target-cache", f"{folder}/targets"]
cli.main(["teach", sys.argv[1], *words, "--quiet", "--json"])
run("left", lambda now: now.step == 3 and rank == 1 and os._exit(0))
os._exit(0)
"""

HANG = """
import sys, threading
from std_fast import cli
from std_fast.training import train
from std_fast.runtime.distributed import rank

def hang(run):
    if rank() == 1 and run.step == 2:
        threading.Event().wait()

kept = train.train
train.train = lambda *args, **kw: kept(*args, **kw, on_step=hang)
sys.exit(cli.main(["train", sys.argv[1], "--quiet"]))
"""


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(recipes.__file__).parents[2])}


def torchrun(*args):
    """-> exit code, standard output and error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, args)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=480)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def recipe(image_folder, teacher, tmp_path_factory):
    distill = {"mode": "std", "teachers": [{"weights": str(teacher)}] * 2, "mine": {"every": "2 steps", "ema": 0.1}}
    run = {"length": "9 steps", "eval_every": "1 epoch", "eval_batch": 10, "log_every": 1, "save_every": "10 minutes"}
    return small_recipe(image_folder, tmp_path_factory.mktemp("run"), distill=distill, run=run)


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """The same run in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(at(recipe, folder), quiet=True)
    return folder


@pytest.fixture(scope="module")
def together(recipe, tmp_path_factory):
    """Folder of the driver's runs, and {(rank, name): outcome}."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "recipe.yaml").write_text(recipes.dump(recipe))
    (folder / "driver.py").write_text(DRIVER)
    code, out, err = torchrun(folder / "driver.py", folder / "recipe.yaml", folder)
    assert code == 0, err[-4000:]
    lines = [json.loads(line.split("OUTCOME ")[1]) for line in out.splitlines() if "OUTCOME" in line]
    images = [int(line.split(":")[1].strip(" ,")) for line in out.splitlines() if '"images"' in line]
    return folder, {(rank, name): outcome for rank, name, outcome in lines} | {(0, "images"): sum(images)}


LEARNED = re.compile(r"step|samples|lr|loss.*|grad_norm|information|teacher_weight_.|top.*|images")


def metrics(folder, kind):
    """What a run's records say of the learning; the rest is about speed."""
    records = [record for record in read_jsonl(folder / "metrics.jsonl") if record["kind"] == kind]
    return [{name: value for name, value in r.items() if LEARNED.fullmatch(name)} for r in records]


def assert_close(folder, other, kinds=("train", "eval")):
    """Metrics of every step and evaluation, weights, their averages, and the optimizer's first moments.

    Not the weights of psi: Adam divides by the gradient's size, so where a gradient is zero but for rounding (shifting
    all scores changes no bound), its steps are rounding too. Its moments are compared, but for those of that shift, and
    not the running mean of the scores, which moves with it.
    """
    for kind in kinds:
        one, two = metrics(folder, kind), metrics(other, kind)
        assert len(one) == len(two) > 0
        for a, b in zip(one, two, strict=True):
            assert a == pytest.approx(b, rel=5e-4, abs=5e-4), a["step"]  # psi's information by 1.3e-4 on torch 2.14
    mine, theirs = (checkpoint.newest(f / "checkpoints")[1] for f in (folder, other))
    mine = {name: tensor for name, tensor in mine.items() if not name.startswith("snapshot.")}
    assert mine.keys() == theirs.keys()
    rounding = re.compile(r"(model|ema)\..*\.(psi\..*|log_average)|.*psi\.fc3\.bias:exp_avg|optim\..*:(?!exp_avg$).*")
    for name, tensor in mine.items():
        if not rounding.fullmatch(name):
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_learn_what_one_learns(alone, together):
    folder, outcomes = together
    assert outcomes[0, "complete"] == outcomes[1, "complete"] == "done"
    assert_close(folder / "complete", alone)
    assert [r["step"] for r in metrics(alone, "train") if "information" in r] == [1, 3, 5, 7, 9]
    assert metrics(folder / "complete", "eval")[-1]["images"] == 24
    assert not list((folder / "complete").glob("**/*.partial"))
    summary = json.loads((folder / "complete" / "summary.json").read_text())
    assert summary["gpu_hours"] * 3600 == pytest.approx(2 * sum(summary["seconds"].values()), rel=0.01)


def test_micro_batches_and_compilation_of_two_processes(recipe, together, tmp_path):
    """Rank 1 alone runs out of memory in "auto": both halve. Gradients are sent once a step, whatever its pieces.

    Compiled before DDP wraps it, a student learns the same.
    """
    folder, outcomes = together
    train(at(recipe, tmp_path / "run", batch=16, length="4 steps"), quiet=True)
    for name in ("in_one", "accumulated", "auto", "compiled"):
        assert outcomes[0, name] == outcomes[1, name] == "done"
        assert_close(folder / name, tmp_path / "run")
    assert checkpoint.newest(folder / "auto" / "checkpoints")[2]["micro_batch"] == 4
    sent = [all_reduces(folder / name / "profile" / "steps-3-4.pt.trace.json") for name in ("in_one", "accumulated")]
    assert sent[0] == sent[1] > 0


def all_reduces(trace: Path) -> int:
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    return sum("allreduce" in name.lower().replace("_", "") for name in names)


def test_one_rank_is_asked_to_stop_all_stop_and_one_process_goes_on(recipe, alone, together):
    folder, outcomes = together
    for rank in (0, 1):
        assert outcomes[rank, "stopped"].startswith("Stopped: stopped at step 5")  # one later than it was asked
    _, _, meta = checkpoint.newest(folder / "stopped" / "checkpoints")
    held = 2 * sum(meta["seconds"].values()) / 3600
    assert meta["devices"] == 2
    summary = train(at(recipe, folder / "stopped"), resume=True, quiet=True)
    assert_close(folder / "stopped", alone)
    assert summary["gpu_hours"] > held  # what two held counts twice


def test_the_data_of_one_rank_will_fail_and_all_stop_before(together):
    folder, outcomes = together
    for rank in (0, 1):
        assert outcomes[rank, "data_fails_late"] == "done"
        assert outcomes[rank, "data_fails"].startswith("DataError: a.jpg: gone; step 5 is saved, from which the run")
    assert checkpoint.newest(folder / "data_fails" / "checkpoints")[2]["step"] == 5


def test_one_rank_is_asked_to_stop_while_all_evaluate(recipe, alone, together):
    folder, outcomes = together
    for rank in (0, 1):
        assert outcomes[rank, "evaluating"].startswith("Stopped: stopped at step 3")
    assert not metrics(folder / "evaluating", "eval")
    train(at(recipe, folder / "evaluating"), resume=True, quiet=True)
    assert_close(folder / "evaluating", alone)


def test_one_rank_is_not_finite_and_all_stop_with_the_weights_before(together):
    folder, outcomes = together
    for rank in (0, 1):
        assert outcomes[rank, "poisoned"].startswith("NotFinite: step 5 is not finite (loss, gradient")
    assert json.loads((folder / "poisoned" / "not_finite.json").read_text())["step"] == 5
    _, tensors, _ = checkpoint.newest(folder / "poisoned" / "checkpoints")
    assert all(t.isfinite().all() for name, t in tensors.items() if name.startswith("ema."))


@pytest.mark.parametrize(("name", "void"), [("skipped", {5}), ("rolled_back", {4, 5})])
def test_one_rank_is_not_finite_and_all_pass_over_it(recipe, together, tmp_path, monkeypatch, name, void):
    folder, outcomes = together
    assert outcomes[0, name] == outcomes[1, name] == "done"
    assert json.loads((folder / name / "summary.json").read_text())["bad_steps"] == [5]
    original = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, batch, now: now.step in void or original(self, batch, now))
    train(at(recipe, tmp_path / "run"), quiet=True)
    assert_close(folder / name, tmp_path / "run", kinds=["eval"])


def test_a_budget_is_spent_by_one_clock(together):
    """Ranks whose clocks differ would take different numbers of steps, and so hang."""
    folder, outcomes = together
    assert outcomes[0, "budget"] == outcomes[1, "budget"] == "done"
    last = metrics(folder / "budget", "train")[-1]
    assert last["lr"] == pytest.approx(1e-5)


def test_targets_are_written_by_two_and_read_by_two_or_one(recipe, together):
    folder, outcomes = together
    assert outcomes[0, "written"] == outcomes[1, "written"] == outcomes[1, "read"] == "done"
    assert_close(folder / "read", folder / "written")
    stored = replace(recipe, distill=replace(recipe.distill, target_cache=str(folder / "store"), views=2))
    train(at(stored, folder / "read_by_one"), quiet=True)
    assert_close(folder / "read_by_one", folder / "written")


def test_two_teach_what_one_teaches(recipe, together, tmp_path):
    folder, outcomes = together
    assert outcomes[0, "images"] == 24  # one document, of rank 0
    store = replace(recipe.distill, target_cache=str(tmp_path), views=1)
    teach(replace(recipe, distill=store), quiet=True)
    files = [path / "epoch-00000.targets" for path in (tmp_path, folder / "targets")]
    one, two = (np.fromfile(file, "<u2", 24 * 4).reshape(-1, 2) for file in files)
    assert (one[:, 0] == two[:, 0]).all()
    confidence = [words[:, 1].copy().view(np.float16).astype(np.float32) for words in (one, two)]
    np.testing.assert_allclose(*confidence, rtol=2e-3)


def test_batch_norms_are_evaluated_with_the_statistics_of_rank_0(together):
    """The driver compares them, before and after the evaluation."""
    folder, outcomes = together
    assert outcomes[0, "batch_norms"] == outcomes[1, "batch_norms"] == "done"
    assert metrics(folder / "batch_norms", "eval")[-1]["images"] == 24


def test_a_rank_that_dies_is_an_error_on_the_others(together):
    folder, outcomes = together
    assert (1, "left") not in outcomes
    assert outcomes[0, "left"].startswith("PeerLost: rank 0: another process has died")


def test_a_rank_that_hangs_is_an_error_on_the_others(recipe, tmp_path):
    """Without torchrun, which would give the one that hangs half a minute more."""
    (tmp_path / "recipe.yaml").write_text(recipes.dump(at(recipe, tmp_path / "run", timeout="3 seconds")))
    (tmp_path / "hang.py").write_text(HANG)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(tmp_path / "hang.py"), str(tmp_path / "recipe.yaml")]
    ranks = []
    for rank in ("0", "1"):
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        ranks.append(subprocess.Popen(command, env=environment() | place, stderr=subprocess.PIPE, text=True))
    try:
        _, err = ranks[0].communicate(timeout=120)
        assert ranks[0].returncode == PEER_LOST, err
        assert "std-fast: rank 0: another process has died, or has not answered for 3 seconds" in err
        assert ranks[1].poll() is None
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_what_a_user_gets_wrong(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    complaint = "WORLD_SIZE: is 2 in the environment, without RANK, .* for one unset it"
    with pytest.raises(UserError, match=complaint), init_distributed(False, 1.0):
        pass
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE: 'two' .* unset it"), init_distributed(False, 1.0):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "tcp://10.0.0.1:80")  # as Kubernetes sets it for a service called master
    assert distributed.rank() == 0  # left over from a torchrun; this is one process
    with init_distributed(False, 1.0) as world:
        assert world.size == 1
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="MASTER_PORT: 'tcp.* is no number; torchrun"), init_distributed(False, 1.0):
        pass
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "x")
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE: 'x' in the environment is no number of processes"):
        available_cores()
    monkeypatch.undo()
    with pytest.raises(UserError, match="run.batch: 8 over 3 processes must be a multiple of 12"):
        build(recipe, World(2, 3))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.floats(-20, 20), st.integers(0, 1000))
def test_the_bound_over_ranks_has_the_value_and_the_gradient_of_the_full_batch(ranks, scale, seed):
    torch.manual_seed(seed)
    joint, marginal = torch.randn(2, ranks, 6, dtype=torch.float64) * scale
    full = [x.clone().requires_grad_() for x in (joint, marginal)]
    value = full[0].mean() - log_mean_exp(full[1])
    expected = torch.autograd.grad(value, full)
    local = [[joint[r].clone().requires_grad_(), marginal[r].clone().requires_grad_()] for r in range(ranks)]
    terms = [(j.mean(), log_mean_exp(m)) for j, m in local]
    everyone = torch.stack([torch.stack(t).detach() for t in terms])
    for r in range(ranks):
        a, b = over_parts(*terms[r], everyone)
        torch.testing.assert_close(a - b, value)
        for got, want in zip(torch.autograd.grad(a - b, local[r]), expected, strict=True):
            torch.testing.assert_close(got / ranks, want[r])  # DDP divides by the number of ranks
