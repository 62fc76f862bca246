"""Does a long run keep its memory, threads and files? Training on the CPU over thousands of short epochs.

    std-fast bench soak --minutes 30 --out benchmarks/results

Each backend trains a tiny Mixer for its time in a process of its own, by `std_fast.training.train`: an epoch has four
steps. Every so often an evaluation's epoch is left after its first batch, and now and then the run is stopped in the
middle of an epoch, which saves, and resumed by a new one in the same process, which reads the checkpoint, opens
loaders anew and has to leave nothing of the old ones behind. Looked at meanwhile, from outside: resident memory,
threads, open files, what is mapped or open in /dev/shm, children and zombies. At the end: whether the process has
threads left that the first, short run did not leave, and whether any process that it started outlives it.

Flat means, of the second fifth of the time against the last one, by their medians (a checkpoint's thread comes and
goes): no more threads, files, shared memory or children, and resident memory that grows by less than GROWTH. And never
a zombie.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import harness
from pipelines.errors import UserError

BACKENDS = ("ffcv", "dali", "torch", "resident")
IMAGES, BATCH, SIZE = 64, 16, 32
COUNTED = ("threads", "files", "shm", "children")
GROWTH = 12.0  # MiB of resident memory: what the allocators' arenas move by, over any time
ABANDON_EVERY = 20  # steps between abandoned epochs of the validation loader
RUN_SECONDS = 40.0  # between a stop in the middle of an epoch and the next one


# -- what a process holds ---------------------------------------------------------------------------------------------


def process_use(pid: int) -> dict[str, float]:
    """What a process holds at the moment. Raises OSError when it has ended."""
    proc = Path("/proc") / str(pid)
    memory = {}
    for line in (proc / "status").read_text(encoding="ascii", errors="replace").splitlines():
        key, _, value = line.partition(":")
        memory[key] = value.split()
    shared = sum("/dev/shm/" in line for line in (proc / "maps").read_text(errors="replace").splitlines())
    descriptors = list((proc / "fd").iterdir())
    for descriptor in descriptors:
        try:
            shared += os.readlink(descriptor).startswith("/dev/shm/")
        except OSError:  # closed meanwhile
            continue
    states = [state_of(child) for child in children(pid)]
    return {
        "rss_mib": round(int(memory["VmRSS"][0]) / 1024, 2),
        "threads": int(memory["Threads"][0]),
        "files": len(descriptors),
        "shm": shared,
        "children": len(states),
        "zombies": states.count("Z"),
    }


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in (Path("/proc") / str(pid) / "task").iterdir():
        try:
            found += map(int, (task / "children").read_text().split())
        except OSError:  # the thread has ended
            continue
    return found


def state_of(pid: int) -> str:
    """R, S, D, Z ...; empty for a process that is no more."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def adopt_orphans() -> None:
    """What a child leaves running becomes a child of this process (Linux: prctl PR_SET_CHILD_SUBREAPER)."""
    if ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


# -- the process that trains ------------------------------------------------------------------------------------------


def work(backend: str, data: Path, out: Path, seconds: float) -> None:
    """Trains until the time is over, in runs of RUN_SECONDS that are stopped in the middle of an epoch."""
    import torch

    torch.set_num_threads(1)
    progress = {"phase": "warming up", "steps": 0, "epochs": 0.0, "runs": 0, "abandoned": 0}
    run_for(backend, data, out / "first", 0.0, progress)  # libraries' own pools of threads are there from now on
    before = {thread.name for thread in threading.enumerate()}
    native = process_use(os.getpid())["threads"]
    progress |= {"phase": "training", "steps": 0, "epochs": 0.0, "runs": 0, "abandoned": 0}
    send(progress)
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        run_for(backend, data, out / "run", min(left, RUN_SECONDS), progress)
    left_over = sorted({thread.name for thread in threading.enumerate()} - before)
    send(
        progress
        | {"phase": "done", "left_threads": left_over, "more_threads": process_use(os.getpid())["threads"] - native}
    )


def send(progress: dict[str, Any]) -> None:
    print(json.dumps(progress), flush=True)


def run_for(backend: str, data: Path, out: Path, seconds: float, progress: dict[str, Any]) -> None:
    """A run into `out`, from its last checkpoint on, stopped in the middle of an epoch after so many seconds."""
    from std_fast.training.run import Run, Stopped
    from std_fast.training.train import train

    began, at_start = time.monotonic(), progress["steps"]
    first: list[int] = []

    def on_step(run: Run) -> None:
        first[:] = first or [run.step - 1]
        progress["steps"] = at_start + run.step - first[0]
        progress["epochs"] = progress["steps"] / run.parts.train_loader.steps_per_epoch
        if run.step % ABANDON_EVERY == 0 and run.parts.val_loader is not None:
            epoch = run.parts.val_loader.epoch(0)
            next(epoch)
            epoch.close()
            progress["abandoned"] += 1
        if time.monotonic() - began >= seconds and run.step % run.parts.train_loader.steps_per_epoch == 2:
            run.stop_wanted = True

    try:
        train(recipe_of(backend, data, out), resume=True, quiet=True, on_step=on_step)
    except Stopped:
        pass
    progress["runs"] += 1
    progress["abandoned"] += 1
    send(progress)


def recipe_of(backend: str, data: Path, out: Path) -> Any:
    from std_fast.config.recipe import Recipe
    from std_fast.config.schema import from_dict

    options = {"patch_size": 8, "dim": 16, "depth": 2, "token_dim": 8, "channel_dim": 32}
    values = {
        "data": {"train": str(data), "val": str(data), "image_size": SIZE, "backend": backend, "threads": 2},
        "student": {"name": "mixer", "options": options},
        "optim": {"lr": 1e-3, "lr_batch": 0, "warmup": "0 steps", "ema": 0.9},
        "run": {
            "out": str(out), "batch": BATCH, "length": "1e9 epochs", "device": "cpu", "eval_every": "10 epochs",
            "save_every": "5 seconds", "log_every": 10,
        },
    }  # fmt: skip
    return from_dict(Recipe, values)


# -- the process that measures ----------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=30.0, help="for each backend [30]")
    parser.add_argument("--backends", default="ffcv,dali", help=f"some of {', '.join(BACKENDS)} [ffcv,dali]")
    parser.add_argument("--every", type=float, default=0.0, help="seconds between samples [time / 1000]")


def run(args: argparse.Namespace) -> dict[str, Any]:
    names = args.backends.split(",")
    if unknown := [name for name in names if name not in BACKENDS]:
        raise UserError(f"--backends: {unknown[0]!r} is none of {', '.join(BACKENDS)}")
    if args.device != "cpu":
        raise UserError("--device: this one is about a CPU; leave it out")
    seconds = 3.0 if args.smoke else 60 * args.minutes
    rows = [soak(name, seconds, args.every or max(0.2, seconds / 1000)) for name in names]
    return {"variant": "-".join(names), "growth_allowed_mib": GROWTH, "rows": rows, "ratios": []}


def soak(backend: str, seconds: float, every: float) -> dict[str, Any]:
    """One backend's row, its curve included."""
    from benchmarks.workload import write_images
    from pipelines.convert.job import ConvertSettings, convert

    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="std_fast-soak-") as name:
        folder = Path(name)
        write_images(folder / "images", 4, IMAGES, 48)
        convert(str(folder / "images"), str(folder / "x.beton"), settings=ConvertSettings(), workers=1)
        words = [backend, str(folder / "x.beton"), name, str(seconds)]
        command = [sys.executable, "-m", "benchmarks.soak", "--worker", *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with open(folder / "errors", "wb") as errors:
            worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True)
        known = set(children(os.getpid())) - {worker.pid}
        code, progress, curve = watch(worker, every)
        if code:
            last = (folder / "errors").read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"the process of backend {backend} ended with exit code {code}: {' '.join(last)}")
        left = set(children(os.getpid())) - known
    row = {
        "name": backend,
        "minutes": round(curve[-1]["seconds"] / 60, 2),
        **{key: round(progress[key], 2) for key in ("epochs", "steps", "runs", "abandoned")},
        **verdict(curve),
        "left_threads": progress["left_threads"],
        "more_threads": progress["more_threads"],
        "left_processes": len(left),
        "curve": harness.thinned(curve, 240),
    }
    row["flat"] = row["flat"] and not row["left_threads"] and row["more_threads"] <= 0 and not left
    harness.progress(f"{backend}: {row['epochs']:.0f} epochs, memory {row['growth_mib']:+.1f} MiB, flat: {row['flat']}")
    return row


def watch(worker: subprocess.Popen[str], every: float) -> tuple[int, dict[str, Any], list[dict[str, float]]]:
    """Samples `process_use` of a worker until it ends, every so many seconds from the start of its training on.

    Returns:
        Its exit code, its last progress (see `work`), and the samples, each with its `seconds`.
    """
    progress: dict[str, Any] = {}
    curve: list[dict[str, float]] = []

    def listen() -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            progress.update(json.loads(line))

    listener = threading.Thread(target=listen)
    listener.start()
    began = None
    try:
        while worker.poll() is None:
            if progress.get("phase") == "training":
                began = began or time.monotonic()
                try:
                    curve.append({"seconds": round(time.monotonic() - began, 1), **process_use(worker.pid)})
                except (OSError, KeyError):  # a process that is about to end has no memory
                    break
            time.sleep(every if began else 0.2)
        code = worker.wait()
    finally:
        worker.kill()
        worker.wait()
        listener.join()
    return code, progress, curve


def verdict(curve: list[dict[str, float]]) -> dict[str, Any]:
    """How the last fifth of a curve compares with the second one."""
    fifth = max(1, len(curve) // 5)
    second, last = curve[fifth : 2 * fifth] or curve, curve[-fifth:]
    middle = {key: [statistics.median(p[key] for p in part) for part in (second, last)] for key in curve[0]}
    growth = middle["rss_mib"][1] - middle["rss_mib"][0]
    more = {key: middle[key][1] - middle[key][0] for key in COUNTED}
    most = {f"{key}_most": max(p[key] for p in curve) for key in (*COUNTED, "zombies")}
    flat = growth < GROWTH and not any(value > 0 for value in more.values()) and not most["zombies_most"]
    return {"rss_mib": middle["rss_mib"][1], "growth_mib": round(growth, 2), "more": more, **most, "flat": flat}


def draw(report: dict[str, Any], path: Path) -> None:
    """Memory, and all that is counted, over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3 * len(report["rows"])), layout="constrained")
    for axes, row in zip(figure.subplots(len(report["rows"]), 2, squeeze=False), report["rows"], strict=True):
        minutes = [point["seconds"] / 60 for point in row["curve"]]
        memory = [point["rss_mib"] for point in row["curve"]]
        axes[0].plot(minutes, memory)
        title = f"{row['name']}: {row['epochs']:.0f} epochs"
        axes[0].set(ylabel="resident memory, MiB", title=title, ylim=(0, 1.1 * max(memory)))
        for key in COUNTED:
            axes[1].plot(minutes, [point[key] for point in row["curve"]], label=key)
        axes[1].set(ylabel="number", title=f"{row['runs']} runs, {row['abandoned']} epochs left early", ylim=(-1, None))
        axes[1].legend(fontsize="small")
        for ax in axes:
            ax.set_xlabel("minutes")
    figure.savefig(path, dpi=100)


COLUMNS = {
    "backend": "name", "minutes": "minutes", "epochs": "epochs", "runs": "runs", "epochs left early": "abandoned",
    "memory, MiB": "rss_mib", "growth, MiB": "growth_mib", "threads": "threads_most", "files": "files_most",
    "/dev/shm": "shm_most", "children": "children_most", "zombies": "zombies_most", "threads left": "more_threads",
    "processes left": "left_processes", "flat": "flat",
}  # fmt: skip


def show(report: dict[str, Any]) -> str:
    return harness.show(report, COLUMNS)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), float(sys.argv[5]))
    else:
        sys.exit(harness.main("soak", run, show, add_arguments, draw, text=__doc__))
