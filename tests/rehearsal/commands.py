"""Complete commands on "cuda" under the fake GPU: train with each backend, in each order, compiled, stopped and
resumed; what comes before and after a training; the benchmarks."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from benchmarks import fake_gpu, gpu_suite, harness, workload
from benchmarks.harness import ROOT
from tests.rehearsal import steps
from tests.small_runs import ON_A_GPU, assert_same_bits, final_tensors, small_study

VALUES, COMPILES = {"FAKE_GPU_VALUES": "1"}, {"FAKE_GPU_VALUES": "compile"}
LIMIT = 1200.0  # seconds that any command may take
RECIPE = ON_A_GPU | {
    "data": {"train": "images", "val": "images", "image_size": 16, "threads": 1, "backend": "torch"},
    "distill": {"mode": "std", "teachers": [{"weights": "teacher"}] * 2, "mine": {"every": "2 steps"}},
}


class Ground:
    """A folder in which the commands run one after the other, each under the tool."""

    def __init__(self, folder: Path, tool: Path) -> None:
        self.folder, self.tool = folder, tool
        if not (folder / "images").is_dir():
            workload.write_images(folder / "images", 3, 24, 48)
        (folder / "std.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
        plain = {**RECIPE, "student": {"name": "test_resnet"}, "distill": {"mode": "none"}}
        (folder / "plain.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")

    def start(self, words: str, log: Path, settings: dict[str, str], module: str = "std_fast.cli") -> subprocess.Popen:
        line = fake_gpu.command(["-m", module, *shlex.split(words)], self.tool)
        env = fake_gpu.environment(settings)
        env["PYTHONPATH"] = f"{ROOT}:{env.get('PYTHONPATH', '')}"
        with open(log, "w", encoding="utf-8") as file:
            return subprocess.Popen(line, cwd=self.folder, env=env, stdout=file, stderr=file)

    def run(self, words: str, settings: dict[str, str] = VALUES, code: int = 0, module: str = "std_fast.cli") -> str:
        """Its output. AssertionError, with the last lines, when it ends otherwise than with `code`."""
        log = self.folder / "last.log"
        process = self.start(words, log, settings, module)
        try:
            found = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            found = process.wait()
        text = log.read_text(encoding="utf-8", errors="replace")
        assert found == code, f"exit code {found}: " + " | ".join(text.strip().splitlines()[-3:])
        return text

    def same_weights(self, one: str, two: str) -> None:
        assert_same_bits(final_tensors(self.folder / one), final_tensors(self.folder / two))


def train(g: Ground, out: str, words: str = "", settings: dict[str, str] = VALUES, code: int = 0) -> str:
    return g.run(f"train std.yaml --quiet --run.out {out} {words}", settings, code)


def a_teacher(g: Ground) -> None:
    g.run("train plain.yaml --quiet --run.out teacher --run.length '2 steps'")


def in_turn(g: Ground) -> None:
    train(g, "serial", "--run.overlap off")


def beside(g: Ground) -> None:
    train(g, "beside", "--run.overlap on")
    g.same_weights("serial", "beside")


def by_trial(g: Ground) -> None:
    train(g, "auto", "--run.overlap auto")
    g.same_weights("serial", "auto")


def ffcv(g: Ground) -> None:
    g.run("convert images images.beton")
    data = "--data.train images.beton --data.val images.beton"
    train(g, "ffcv", f"{data} --data.backend ffcv --run.overlap on")


def resident(g: Ground) -> None:
    data = "--data.train images.beton --data.val images.beton"
    train(g, "resident", f"{data} --data.backend resident --run.overlap on")


def compiled(g: Ground) -> None:
    """What Triton's kernels write is whatever was there: steps may be not finite, and are skipped."""
    skip = "--run.not_finite skip --run.not_finite_limit 1000"
    train(g, "compiled", f"--run.compile inductor --run.overlap on {skip}", COMPILES)


def stopped_and_resumed(g: Ground) -> None:
    """SIGTERM after the first lines of the log: exit code 3, and the resumed run has the weights of the other."""
    log = g.folder / "stopped.log"
    process = g.start("train std.yaml --quiet --run.out stopped --run.overlap on --run.log_every 1", log, VALUES)
    lines, until = g.folder / "stopped" / "metrics.jsonl", time.monotonic() + LIMIT
    while process.poll() is None and time.monotonic() < until:
        if lines.is_file() and lines.read_text(encoding="utf-8").count("\n") >= 2:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    code = process.wait(LIMIT)
    assert code == 3, f"exit code {code}: {log.read_text(encoding='utf-8')[-300:]}"
    train(g, "stopped", "--resume --run.overlap off")
    g.same_weights("serial", "stopped")


def evaluated(g: Ground) -> None:
    assert "top" in g.run("eval serial images"), "no accuracy was printed"


def stored_targets(g: Ground) -> None:
    g.run("teach std.yaml --distill.target_cache targets --run.out teach")
    train(g, "cached", "--distill.target_cache targets --run.overlap on")


def budgeted(g: Ground) -> None:
    train(g, "hours", "--run.length '0.006 gpu-hours'")
    text = (g.folder / "hours" / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"gpu_hours"' in text


def short_of_memory(g: Ground) -> None:
    sizes = "--data.image_size 128 --run.batch 24 --student.options '{patch_size: 4, dim: 128, depth: 6}'"
    text = train(g, "memory", sizes, {**VALUES, "FAKE_GPU_MEMORY": "600M"}, 2)
    assert re.search(r"run\.batch: 24 does not fit", text), text.strip().splitlines()[-1]


def planned(g: Ground) -> None:
    g.run("plan std.yaml --run.length '0.1 gpu-hours'")


def exported(g: Ground) -> None:
    g.run("export serial exported")


def reported(g: Ground) -> None:
    g.run("report serial beside --out report")
    assert (g.folder / "report" / "report.html").stat().st_size > 1000


def benchmarks_compiled(g: Ground) -> None:
    """Those whose tiny sizes leave the compiler out, and the ones that count what it makes."""
    tiny = "--model mixer --batch 8 --image-size 32 --classes 8 --repeats 1 --turn-seconds 0"
    for name, words in {
        "step": "--smoke",
        "roofline": "--smoke",
        "peers": f"--only compiled {tiny}",
        "compile": f"--modes inductor {tiny}",
    }.items():
        report = bench(g, name, words, COMPILES)
        failed = [row for row in report["rows"] if "milliseconds" not in row]
        assert report["conditions"]["gpu"] and not failed, (name, failed)


def students(g: Ground) -> None:
    bench(g, "students", "--smoke")


def bench(g: Ground, name: str, words: str, settings: dict[str, str] = VALUES) -> harness.Report:
    """The report of `std-fast bench NAME WORDS`, whose output stands in one file with its progress."""
    return harness.printed_report(g.run(f"{words} --device cuda --json", settings, module=f"benchmarks.{name}"))


def steady_steps(g: Ground) -> None:
    for form, compile in steps.MOST:
        if compile == "inductor":
            steps.check(form, compile, g.tool)


def suite_stopped_and_resumed(g: Ground) -> None:
    """Every benchmark of the suite at tiny sizes; SIGTERM once the first has its result; then calls until all are."""
    log, folder = g.folder / "suite.log", g.folder / "suite"
    study = [*small_study(g.folder / "study", g.folder / "images"), str(g.folder / "study" / "work")]
    words = f"--smoke --device cuda --minutes 11 --out {folder} --study {shlex.join(study)}"
    first = g.start(words, log, VALUES, "benchmarks.gpu_suite")
    until = time.monotonic() + LIMIT
    while first.poll() is None and time.monotonic() < until and not list(folder.glob("*.json")):
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    assert first.wait(LIMIT) == 143, f"exit code {first.returncode}"
    (path,) = folder.glob("*.json")
    before = after = gpu_suite.results(path)
    wanted = {part.question for part in gpu_suite.PARTS if part.question}
    assert 0 < len(before) < len(wanted)
    for _ in range(3):  # a call begins what fits into its minutes
        if set(after) < wanted:
            g.run(words, module="benchmarks.gpu_suite")
            after = gpu_suite.results(path)
    wrong = {name: one.get("said", [""])[-1] for name, one in after.items() if one["state"] != "ok"}
    assert set(after) == wanted and not wrong, wrong or wanted - set(after)
    assert all(after[name] == one for name, one in before.items()), "a result that was there was taken again"


COMMANDS: dict[str, Callable[[Ground], None]] = {
    "train, a teacher": a_teacher,
    "train, torch, overlap off": in_turn,
    "train, torch, overlap on: the weights of overlap off": beside,
    "train, torch, overlap auto: the weights of overlap off": by_trial,
    "convert, train, ffcv": ffcv,
    "train, resident": resident,
    "train, compiled by inductor": compiled,
    "train, SIGTERM, --resume: the weights of the undisturbed run": stopped_and_resumed,
    "eval": evaluated,
    "teach, train with stored targets": stored_targets,
    "train by GPU-hours": budgeted,
    "train, out of memory: exit code 2 and one line": short_of_memory,
    "plan": planned,
    "export": exported,
    "report": reported,
    "bench students": students,
    "bench gpu_suite --minutes 11, tiny sizes, SIGTERM, again": suite_stopped_and_resumed,
    "bench step, roofline, peers, compile, compiled by inductor": benchmarks_compiled,
    "steady steps, compiled: no wait, so many launches": steady_steps,
}


def rehearse(tool: Path, folder: Path, only: str = "") -> list[dict[str, str]]:
    """Runs the commands whose names the pattern finds, in order; later ones use what earlier ones made. `reason`: why
    one is not as it should be; empty where it is."""
    chosen = [name for name in COMMANDS if re.search(only, name)] if only != "-" else []
    ground, found = Ground(folder, tool), []
    for name in chosen:
        reason, began = "", time.monotonic()
        try:
            COMMANDS[name](ground)
        except Exception as error:  # one that fails must not end the others
            reason = f"{type(error).__name__}: {error}"
        found.append({"name": name, "reason": reason, "outcome": reason or "as it should"})
        print(f"{name}: {reason or 'ok'}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return found
