"""The faults of the campaign, each with what should happen. See `ground` for what they stand on."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from std_fast.runtime import checkpoint
from std_fast.runtime.metrics import read_jsonl
from std_fast.runtime.process import SAME_PRESS
from tests.faults.ground import Ground, Seen, ends, enlarge, fault, logged, small_disk, steps_saved
from tests.faults.kills import KilledTraining
from tests.killing import Child, kill_again_and_again
from tests.small_runs import assert_same_bits, final_tensors

SINCE_THE_SAVE = "steps since the last save"
CONTINUES = "nothing saved is lost; started again it continues, to the same bits"

# -- kill -9 --------------------------------------------------------------------------------------------------------


@fault("train: kill -9 at random moments", CONTINUES)
def _(ground: Ground) -> Seen:
    kills = 6 * ground.scale
    seen = KilledTraining(ground.recipe(), ground.folder).run(kills, ground.random)
    return Seen(f"{seen.finished} runs to their ends, the same bits", kills, lost=SINCE_THE_SAVE)


@fault("train with teachers, MINE and targets written through: kill -9", CONTINUES)
def _(ground: Ground) -> Seen:
    kills = 4 * ground.scale
    targets = {"target_cache": str(ground.folder / "run" / "targets"), "views": 2}
    recipe = ground.recipe(std=True, distill=targets, run={"length": "6 epochs"})
    seen = KilledTraining(recipe, ground.folder).run(kills, ground.random)
    return Seen(f"{seen.finished} runs to their ends, the same bits", kills, lost=SINCE_THE_SAVE)


@fault("train: kill -9 while a checkpoint is written", "the one before is used, the draft goes, same bits in the end")
def _(ground: Ground) -> Seen:
    recipe = ground.recipe(run={"save_every": "0 seconds"})
    run, kills = Path(recipe.run.out), 4 * ground.scale
    expected = ground.expected(recipe)
    for number in range(kills):
        saved = steps_saved(run)
        with ground.train(recipe) as child:
            child.until(lambda saved=saved: steps_saved(run) > saved and list((run / "checkpoints").glob(".*")))
            child.send(signal.SIGKILL)
            assert child.wait() in (-signal.SIGKILL, 0)
        assert checkpoint.newest(run / "checkpoints") is not None, f"kill {number}: no complete checkpoint"
    ground.resumed(recipe, expected)
    assert not list((run / "checkpoints").glob(".*")), "a draft is left"
    return Seen("always a complete checkpoint, the same bits", kills, lost="the save under way")


@fault("teach: kill -9 at random moments", "what is stored is right; started again it continues, to the same bytes")
def _(ground: Ground) -> Seen:
    recipe = ground.recipe(std=True, run={"length": "12 epochs"})

    def folder_of(name: str) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (ground.folder / name).glob("epoch-*.targets")}

    path, kills = ground.write(recipe), 4 * ground.scale
    began = time.monotonic()
    ground.finish(["teach", path, "--quiet", "--distill.target-cache", str(ground.folder / "undisturbed")])
    duration, expected = time.monotonic() - began, folder_of("undisturbed")

    def finished() -> None:
        assert folder_of("killed") == expected, "stored targets differ"
        shutil.rmtree(ground.folder / "killed")

    def start() -> Child:
        return ground.start(["teach", path, "--quiet", "--distill.target-cache", str(ground.folder / "killed")])

    seen = kill_again_and_again(start, finished, kills, duration, ground.random)
    return Seen(f"{seen.finished} times to the end, the same bytes", kills, lost="batches since the last write")


@fault("convert: kill -9 at random moments", "no half of a beton; started again it continues, to the same bytes")
def _(ground: Ground) -> Seen:
    kills = 4 * ground.scale
    reference, killed = ground.folder / "reference.beton", ground.folder / "killed.beton"
    began = time.monotonic()
    ground.finish(conversion(ground, reference))
    duration = time.monotonic() - began

    def finished() -> None:
        assert killed.read_bytes() == reference.read_bytes(), "the betons differ"
        assert not (ground.folder / ".killed.beton.converting").exists(), "the working folder is left"
        killed.unlink()
        Path(f"{killed}.json").unlink()

    def start() -> Child:
        return ground.start(conversion(ground, killed), before=commit_often)

    def check() -> None:
        assert not killed.exists() or Path(f"{killed}.json").exists()

    seen = kill_again_and_again(start, finished, kills, duration, ground.random, check)
    return Seen(f"{seen.finished} times to the end, the same bytes", kills, lost="the last second of converting")


def conversion(ground: Ground, path: Path) -> list[str]:
    return ["convert", str(ground.many_images), str(path), "--size", "100", "--workers", "2"]


def commit_often() -> None:
    """Small steps, since the conversion takes a second."""
    from pipelines.convert import journal

    journal.COMMIT_SECONDS = 0.05


@fault("export: kill -9 at random moments", "the folder is complete or not there; a later export leaves nothing else")
def _(ground: Ground) -> Seen:
    kills, out = 4 * ground.scale, ground.folder / "exported"
    words = ["--formats", "timm"]
    began = time.monotonic()
    ground.finish(["export", str(ground.teacher), str(out), *words])
    duration = time.monotonic() - began
    expected = {file.name for file in out.iterdir()}
    shutil.rmtree(out)

    def check() -> None:
        assert not out.exists() or {file.name for file in out.iterdir()} == expected, "half an export"
        if out.exists():  # complete, just before the kill
            shutil.rmtree(out)

    def finished() -> None:
        check()
        litter = [file.name for file in ground.folder.glob(".exported*")]
        assert not litter, f"drafts are left: {litter}"

    def start() -> Child:
        return ground.start(["export", str(ground.teacher), str(out), *words])

    kill_again_and_again(start, finished, kills, duration, ground.random, check)
    return Seen("complete or not there, no draft left", kills)


# -- disks ----------------------------------------------------------------------------------------------------------


@fault("train: disk full", "exit 2, one line that says so; with room made it continues, to the same bits")
def _(ground: Ground) -> Seen:
    with small_disk(ground.folder / "disk", 420) as disk:
        recipe = ground.recipe(name="disk/run", run={"keep_checkpoints": 20})
        expected = ground.expected(recipe)
        began = time.monotonic()
        with ground.train(recipe) as child:
            _, line = ends(child, 2, r"(was not saved|cannot be written).*(No space|space)")
        notice = time.monotonic() - began
        found = steps_saved(disk / "run")
        assert found and checkpoint.newest(disk / "run" / "checkpoints"), "no complete checkpoint is left"
        enlarge(disk, 64_000)
        ground.resumed(recipe, expected)
    return Seen(f"stopped behind a complete checkpoint: {line[10:90]}", notice=notice, lost=SINCE_THE_SAVE)


@fault("train: disk full at the log, not at a checkpoint", "exit 2 with one line, or it continues and says so")
def _(ground: Ground) -> Seen:
    with small_disk(ground.folder / "disk", 60) as disk:
        recipe = ground.recipe(
            name="disk/run", run={"save_every": "10 minutes", "log_every": 1, "length": "200 epochs"}
        )
        with ground.train(recipe) as child:
            seconds, line = ends(child, 2, r"(was not saved|cannot be written)")
        assert read_jsonl(disk / "run" / "metrics.jsonl")
    return Seen(line[10:110], notice=seconds, lost=SINCE_THE_SAVE)


@fault("convert: disk full", "exit 2 with one line; with room made it continues, to the same bytes")
def _(ground: Ground) -> Seen:
    reference = ground.folder / "reference.beton"
    ground.finish(conversion(ground, reference))
    needed = reference.stat().st_size // 1024
    with small_disk(ground.folder / "disk", needed + 600) as disk:
        (disk / "ballast").write_bytes(bytes(1024))
        beton = disk / "x.beton"
        with ground.start(conversion(ground, beton)) as child:
            child.until(lambda: (disk / ".x.beton.converting" / "data").exists())
            fill(disk / "ballast")  # another program fills the disk
            seconds, line = ends(child, 2, r"(No space left|are free)")
        assert not beton.exists()
        (disk / "ballast").unlink()
        enlarge(disk, 4 * needed)
        ground.finish(conversion(ground, beton))
        assert beton.read_bytes() == reference.read_bytes()
    return Seen(line[10:110], notice=seconds)


def fill(path: Path) -> None:
    with open(path, "ab", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC


@fault("teach: disk full", "exit 2 with one line; with room made it continues")
def _(ground: Ground) -> Seen:
    recipe = ground.recipe(std=True, run={"length": "150 epochs"})
    with small_disk(ground.folder / "disk", 80) as disk:
        words = ["teach", ground.write(recipe), "--quiet", "--distill.target-cache", str(disk / "targets")]
        with ground.start(words) as child:
            seconds, line = ends(child, 2, r"(cannot be written|cannot be made).*(No space|space)")
        stored = len(list((disk / "targets").glob("epoch-*.targets")))
        assert stored
        enlarge(disk, 8000)
        ground.finish(words)
        assert len(list((disk / "targets").glob("epoch-*.targets"))) == 150
    return Seen(line[10:110], notice=seconds)


@fault("export: disk full", "exit 2 with one line, nothing left behind; with room made it works")
def _(ground: Ground) -> Seen:
    with small_disk(ground.folder / "disk", 900) as disk:
        words = ["export", str(ground.teacher), str(disk / "out"), "--formats", "timm"]
        with ground.start(words) as child:
            seconds, line = ends(child, 2, "cannot be written")
        assert not list(disk.iterdir()), f"left behind: {list(disk.iterdir())}"
        enlarge(disk, 64_000)
        ground.finish(words)
    return Seen(line[10:110], notice=seconds)


@fault("train: limit on the size of files (RLIMIT_FSIZE)", "exit 2 with one line, behind a complete record")
def _(ground: Ground) -> Seen:
    recipe = ground.recipe()
    with ground.train(recipe, before=small_files) as child:
        seconds, line = ends(child, 2, r"(was not saved|cannot be written).*(too large|large)")
    expected = ground.expected(recipe)
    ground.resumed(recipe, expected)
    return Seen(line[10:110], notice=seconds, lost=SINCE_THE_SAVE)


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


# -- files that change, vanish or cannot be read --------------------------------------------------------------------


def changes_while_in_use(ground: Ground, backend: str, change: str) -> Child:
    """A training on a beton that is cut off, or removed, after its first steps. The child, which still runs."""
    recipe = ground.recipe(
        ground.beton, data={"backend": backend}, run={"length": "3000 steps", "eval_every": "0 steps"}
    )
    child = ground.train(recipe)
    child.until(lambda: logged(Path(recipe.run.out)) >= 2)
    if change == "cut":
        os.truncate(ground.beton, 20_000)
    else:
        ground.beton.unlink()
    return child


def cut_off(backend: str) -> None:
    @fault(f"train, {backend}: the beton is cut off while in use", "exit 2, one line with the file's name; no SIGBUS")
    def _(ground: Ground) -> Seen:
        with changes_while_in_use(ground, backend, "cut") as child:
            seconds, line = ends(child, 2, r"own\.beton: became shorter while it was in use.*; step \d+ is saved")
        return Seen(line[10:].split("/")[-1], notice=seconds)


for _backend in ("ffcv", "dali", "torch"):
    cut_off(_backend)


@fault("train: the beton is removed while in use", "the open file serves on; a later start says that it is gone")
def _(ground: Ground) -> Seen:
    with changes_while_in_use(ground, "ffcv", "remove") as child:
        before = logged(ground.folder / "run")
        child.until(lambda: logged(ground.folder / "run") > before + 5)
        child.send(signal.SIGTERM)
        assert child.wait() == 3
    with ground.train(ground.recipe(ground.beton)) as child:
        seconds, line = ends(child, 2, r"own\.beton: not there; this run read")
    return Seen("trained on; " + line[10:].split("/")[-1], notice=seconds)


@fault("train: an image of the folder is removed while in use", "exit 2, one line with its name")
def _(ground: Ground) -> Seen:
    folder = ground.folder / "images"
    shutil.copytree(ground.images, folder)
    recipe = ground.recipe(folder, run={"length": "3000 steps", "eval_every": "0 steps"})
    with ground.train(recipe) as child:
        child.until(lambda: logged(ground.folder / "run") >= 2)
        (folder / "bee" / "003.jpg").unlink()
        seconds, line = ends(child, 2, r"bee/003\.jpg: not a readable image .*No such file.*; step \d+ is saved")
    return Seen(line[10:].split("/")[-1], notice=seconds)


@fault(
    "train: stored targets are cut off while in use",
    "it continues with what it has checked; the next start names the file",
)
def _(ground: Ground) -> Seen:
    targets = ground.folder / "targets"
    recipe = ground.recipe(
        std=True,
        distill={"target_cache": str(targets), "views": 1},
        run={"length": "90 steps", "eval_every": "0 steps"},
    )
    ground.finish(["teach", ground.write(recipe), "--quiet"])
    with ground.train(recipe) as child:
        child.until(lambda: logged(ground.folder / "run") >= 2)
        os.truncate(targets / "epoch-00000.targets", 10)
        assert child.wait() == 0, child.text[-1500:]
    return Seen("trained to its end from memory")


@fault("train: the disk fails while the beton is read (EIO)", "exit 2, one line with file and place; no SIGBUS")
def _(ground: Ground) -> Seen:
    trigger = ground.folder / "fail"
    recipe = ground.recipe(
        ground.beton, data={"backend": "ffcv"}, run={"length": "3000 steps", "eval_every": "0 steps"}
    )
    shim = str(ground.folder / "shim.so")
    source = str(Path(__file__).with_name("failing_disk.c"))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    words = [shim, "own.beton", str(trigger), ground.write(recipe)]
    with ground.start(words, target=train_on_failing_disk) as child:
        child.until(lambda: logged(ground.folder / "run") >= 2)
        trigger.touch()
        seconds, line = ends(child, 2, r"own\.beton: cannot be read at byte")
    return Seen(line[10:].split("/")[-1], notice=seconds, lost=SINCE_THE_SAVE)


def train_on_failing_disk(shim: str, name: str, trigger: str, recipe: str) -> None:
    """`std-fast train` under a shim of `pread` that fails with EIO for the file `name`, once `trigger` is there."""
    environment = os.environ | {"LD_PRELOAD": shim, "FAIL_FILE": name, "FAIL_WHEN": trigger}
    words = ["-m", "std_fast.cli", "train", recipe, "--quiet", "--resume"]
    os.execve(sys.executable, [sys.executable, *words], environment)


@fault("train: its folder is removed", "exit 2, one line")
def _(ground: Ground) -> Seen:
    recipe = ground.recipe(run={"length": "3000 steps", "eval_every": "0 steps", "save_every": "10 minutes"})
    with ground.train(recipe) as child:
        child.until(lambda: logged(ground.folder / "run") >= 2)
        shutil.rmtree(ground.folder / "run")
        (ground.folder / "run").write_text("a file in its place")
        child.send(signal.SIGTERM)
        seconds, line = ends(child, 2, r"(was not saved|cannot be written)")
    return Seen(line[10:].replace(str(ground.folder), "")[:100], notice=seconds, lost="the run, which was removed")


# -- processes ------------------------------------------------------------------------------------------------------


def converting(ground: Ground, **more) -> tuple[Child, list[int]]:
    """A conversion that is under way, and its workers' process numbers."""
    child = ground.start(conversion(ground, ground.folder / "x.beton"), **more)
    data = ground.folder / ".x.beton.converting" / "data"
    child.until(lambda: len(children_of(child.pid)) >= 2 and data.exists())
    return child, children_of(child.pid)


def children_of(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            found += [int(word) for word in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def converts_to_the_end(ground: Ground) -> None:
    reference, beton = ground.folder / "reference.beton", ground.folder / "x.beton"
    for path in (reference, beton):
        ground.finish(conversion(ground, path))
    assert reference.read_bytes() == beton.read_bytes()


@fault("convert: a worker is killed", "exit 2, one line with the image it was at; started again, the same bytes")
def _(ground: Ground) -> Seen:
    child, workers = converting(ground)
    with child:
        os.kill(workers[0], signal.SIGKILL)
        seconds, line = ends(child, 2, r"a converting process was ended by SIGKILL at .*if memory was short")
    converts_to_the_end(ground)
    return Seen(line[10:110], notice=seconds, lost="the last second of converting")


@fault("convert: a worker is stopped and continued", "it waits, and ends with the same bytes")
def _(ground: Ground) -> Seen:
    child, workers = converting(ground)
    with child:
        os.kill(workers[0], signal.SIGSTOP)
        child.sleep(1.5)
        os.kill(workers[0], signal.SIGCONT)
        assert child.wait() == 0, child.text[-1500:]
    converts_to_the_end(ground)
    return Seen("went on, the same bytes")


@fault("convert: a worker hangs", "exit 2, one line with the image, after the time for it (here 2 s)")
def _(ground: Ground) -> Seen:
    child, workers = converting(ground, before=impatient)
    with child:
        os.kill(workers[0], signal.SIGSTOP)
        seconds, line = ends(child, 2, r"a converting process has made no progress for 2 s at")
    converts_to_the_end(ground)
    return Seen(line[10:110], notice=seconds, lost="the last second of converting")


def impatient() -> None:
    from pipelines.convert import workers as convert_workers

    convert_workers.HANG_SECONDS = 2


@fault("convert: memory runs out in a worker", "exit 2, the images or the worker's end are named; then the same bytes")
def _(ground: Ground) -> Seen:
    child, workers = converting(ground)
    with child:
        for worker in workers:
            size = int(Path(f"/proc/{worker}/statm").read_text().split()[0]) * resource.getpagesize()
            resource.prlimit(worker, resource.RLIMIT_AS, (size, size))
        seconds, line = ends(child, 2, r"(cannot be converted: .*memory|a converting process (was ended|ended))")
    faults = ground.folder / "x.beton.faults.txt"
    faults.unlink(missing_ok=True)
    shutil.rmtree(ground.folder / ".x.beton.converting", ignore_errors=True)
    converts_to_the_end(ground)
    return Seen(line[10:110], notice=seconds)


@fault("train: memory runs out (RLIMIT_AS)", "exit 2, one line; resumed with memory, the same bits")
def _(ground: Ground) -> Seen:
    recipe = ground.recipe()
    expected = ground.expected(recipe)
    with ground.train(recipe, before=little_memory) as child:
        seconds, line = ends(child, 2, "memory")
    ground.resumed(recipe, expected)
    return Seen(line[10:110], notice=seconds, lost=SINCE_THE_SAVE)


def little_memory() -> None:
    """Room for 1 MB more than there is when the tenth step begins."""
    from std_fast.training.step import Trainer

    original = Trainer.step

    def step(self, batch, now):
        if now.step == 10:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), resource.RLIM_INFINITY))
            torch.empty(1 << 26)  # what a larger batch would ask for
        original(self, batch, now)

    Trainer.step = step  # type: ignore[method-assign]


@fault("train: stopped and continued (SIGSTOP, SIGCONT)", "it continues, the same bits, the pause in its ledger")
def _(ground: Ground) -> Seen:
    recipe = ground.recipe()
    expected = ground.expected(recipe)
    with ground.train(recipe) as child:
        child.until(lambda: logged(ground.folder / "run") >= 2)
        child.send(signal.SIGSTOP)
        child.sleep(1.0)
        child.send(signal.SIGCONT)
        assert child.wait() == 0, child.text[-1500:]
    assert_same_bits(final_tensors(ground.folder / "run"), expected)
    held = json.loads((ground.folder / "run" / "summary.json").read_text())["gpu_hours"] * 3600
    assert held >= 1.0, f"the ledger says {held:.2f} s"
    return Seen("went on, the same bits")


@fault("train: SIGTERM twice", "saved once, exit 3; resumed, the same bits")
def _(ground: Ground) -> Seen:
    recipe = ground.recipe()
    expected = ground.expected(recipe)
    times = 3 * ground.scale
    for number in range(times):
        with ground.train(recipe) as child:
            before = logged(ground.folder / "run")
            child.until(lambda before=before, number=number: logged(ground.folder / "run") > (before if number else 0))
            child.send(signal.SIGTERM)
            child.sleep(float(ground.random.uniform(0, 0.05)))
            child.send(signal.SIGTERM)
            code = child.wait()
        assert code in (3, 0), f"exit code {code}: {child.text[-1500:]}"
        assert "Traceback" not in child.text and checkpoint.newest(ground.folder / "run" / "checkpoints")
    ground.resumed(recipe, expected)
    return Seen("saved, exit 3, the same bits", times)


@fault("train: Ctrl-C, and the terminal is closed (SIGINT, SIGHUP)", "saved, exit 3; resumed, the same bits")
def _(ground: Ground) -> Seen:
    recipe = ground.recipe()
    expected = ground.expected(recipe)
    for signum in (signal.SIGINT, signal.SIGHUP):
        with ground.train(recipe, before=heed_all) as child:
            before = logged(ground.folder / "run")
            child.until(lambda before=before: logged(ground.folder / "run") > before)
            child.send(signum)
            assert child.wait() == 3, child.text[-1500:]
        assert "Traceback" not in child.text and checkpoint.newest(ground.folder / "run" / "checkpoints")
    ground.resumed(recipe, expected)
    return Seen("saved, exit 3, the same bits", 2)


def heed_all() -> None:
    """As started from a terminal, whoever runs the campaign."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


@fault("train: Ctrl-C twice", "exit 130 at once, though a save is slow; resumed, the same bits")
def _(ground: Ground) -> Seen:
    recipe = ground.recipe()
    expected = ground.expected(recipe)
    times = 2 * ground.scale
    for _number in range(times):
        (ground.folder / "run" / "metrics.jsonl").unlink(missing_ok=True)
        with ground.train(recipe, before=slow_saves) as child:
            child.until(lambda: logged(ground.folder / "run") >= 2)
            child.send(signal.SIGINT)
            child.until(lambda child=child: "Ctrl-C again" in child.text)
            child.sleep(2 * SAME_PRESS)
            child.send(signal.SIGINT)
            began = time.monotonic()
            assert child.wait() == 130 and "Traceback" not in child.text, child.text[-1500:]
            notice = time.monotonic() - began
    ground.resumed(recipe, expected)
    return Seen("left at once, the same bits", times, notice=notice, lost=SINCE_THE_SAVE)


def slow_saves() -> None:
    heed_all()
    kept = checkpoint.save

    def save(*args: object) -> None:
        time.sleep(30.0)
        kept(*args)  # type: ignore[arg-type]

    checkpoint.save = save


@fault("convert: Ctrl-C", "exit 130 with one line; started again, the same bytes")
def _(ground: Ground) -> Seen:
    child, _ = converting(ground, before=heed_python)
    with child:
        child.send(signal.SIGINT)
        seconds, _line = ends(child, 130, "interrupted")
    converts_to_the_end(ground)
    return Seen("one line, the same bytes", notice=seconds, lost="the last second of converting")


def heed_python() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def loses_its_log(name: str, before: Callable[[], None]) -> None:
    @fault(f"train: {name}", "it trains to its end, exit 0, the same bits; what was lost is counted")
    def _(ground: Ground) -> Seen:
        recipe = ground.recipe()
        expected = ground.expected(recipe)
        with ground.start(["train", ground.write(recipe)], before=before) as child:
            assert child.wait() == 0, child.text[-1500:]
        run = ground.folder / "run"
        assert_same_bits(final_tensors(run), expected)
        lost = json.loads((run / "summary.json").read_text())["lost_writes"]
        # a stream that was closed at the start leads to the null device
        assert set(lost) == (set() if before is closed_streams else {"standard error"}), lost
        assert "Traceback" not in child.text
        return Seen("the same bits", lost=f"lines of the log: {lost.get('standard error', 'all')}")


def reader_gone() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    write_to(writer)


def log_disk_full() -> None:
    write_to(os.open("/dev/full", os.O_WRONLY))


def write_to(fd: int) -> None:
    for number in (1, 2):
        os.dup2(fd, number)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False, buffering=1)


def closed_streams() -> None:
    sys.stdout = sys.stderr = None  # type: ignore[assignment]
    for number in (0, 1, 2):
        os.close(number)


loses_its_log("the reader of its log leaves (| head)", reader_gone)
loses_its_log("the disk of its log is full", log_disk_full)
loses_its_log("its standard streams are closed", closed_streams)


@fault("two trainings into one folder", "the second: exit 2, one line; the first is not disturbed")
def _(ground: Ground) -> Seen:
    recipe = ground.recipe(run={"length": "150 steps"})
    expected = ground.expected(recipe)
    with ground.train(recipe) as first:
        first.until(lambda: logged(ground.folder / "run") >= 1)
        with ground.train(recipe) as second:
            seconds, line = ends(second, 2, "another process is training into it")
        assert first.wait() == 0, first.text[-1500:]
    assert_same_bits(final_tensors(ground.folder / "run"), expected)
    return Seen(line[10:].split("/")[-1], notice=seconds)


@fault("two conversions to one beton", "the second: exit 2, one line; the first is not disturbed")
def _(ground: Ground) -> Seen:
    child, _ = converting(ground)
    with child:
        with ground.start(conversion(ground, ground.folder / "x.beton")) as second:
            seconds, line = ends(second, 2, "another process is converting to it")
        assert child.wait() == 0, child.text[-1500:]
    converts_to_the_end(ground)
    return Seen(line[10:].split("/")[-1], notice=seconds)


# -- numbers and clocks ---------------------------------------------------------------------------------------------


@fault("a loss is not finite, run.not_finite: stop", "exit 4, one line, saved as of the step before")
def _(ground: Ground) -> Seen:
    recipe = ground.recipe(run={"log_every": 5})
    with ground.train(recipe, before=poison) as child:
        seconds, line = ends(child, 4, "step 13 is not finite")
    newest = checkpoint.newest(ground.folder / "run" / "checkpoints")
    assert newest and newest[2]["step"] == 12
    return Seen(line[10:100], notice=seconds)


def poison() -> None:
    """Step 13 sees images that are not finite."""
    from dataclasses import replace

    from std_fast.training.step import Trainer

    original = Trainer.step

    def step(self, batch, now):
        if now.step == 13:
            batch = replace(batch, images=batch.images * torch.nan)
        original(self, batch, now)

    Trainer.step = step  # type: ignore[method-assign]


@fault("the wall clock jumps by days, both ways", "only the record's `time` follows it; same bits, true ledger")
def _(ground: Ground) -> Seen:
    recipe = ground.recipe(run={"save_every": "0.2 seconds"})
    expected = ground.expected(recipe)
    began = time.monotonic()
    with ground.train(recipe, before=jumping_clock) as child:
        assert child.wait() == 0, child.text[-1500:]
    took = time.monotonic() - began
    run = ground.folder / "run"
    assert_same_bits(final_tensors(run), expected)
    summary = json.loads((run / "summary.json").read_text())
    # the process was forked from one that is older: its age counts too, on both sides
    assert 0 < sum(summary["seconds"].values()) < took + 60, summary["seconds"]
    times = [record["time"] for record in read_jsonl(run / "metrics.jsonl")]
    assert max(times) - min(times) > 86_000, "the clock did not jump"
    return Seen("the same bits, the ledger true")


def jumping_clock() -> None:
    real, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return real() + (0, 86_400, -86_400, 3_000_000)[calls[0] // 3 % 4]

    time.time = jumping


# -- checkpoints ----------------------------------------------------------------------------------------------------


def interrupted(ground: Ground, **run: object):
    """A recipe, its expected end, and its run with a few checkpoints, half-way."""
    recipe = ground.recipe(run={"keep_checkpoints": 3, "save_every": "0 seconds", **run})
    expected = ground.expected(recipe)
    with ground.train(recipe) as child:
        child.until(lambda: steps_saved(ground.folder / "run") >= 20)
        child.send(signal.SIGKILL)
        child.wait()
    return recipe, expected, checkpoint.listed(ground.folder / "run" / "checkpoints")


def damaged(name: str, harm) -> None:
    @fault(f"the newest checkpoint {name}", "it is named and renamed, the one before is used, same bits in the end")
    def _(ground: Ground) -> Seen:
        recipe, expected, there = interrupted(ground)
        assert len(there) >= 2, "too few checkpoints"
        harm(there[-1], ground)
        with ground.train(recipe) as child:
            assert child.wait() == 0, child.text[-1500:]
        assert f"passed over a checkpoint: {there[-1]}" in child.text, child.text[-800:]
        assert_same_bits(final_tensors(ground.folder / "run"), expected)
        return Seen("named, renamed, the same bits", lost="steps since the checkpoint before it")


def flip(path: Path, ground: Ground) -> None:
    data = bytearray(path.read_bytes())
    data[int(ground.random.integers(len(data) // 2, len(data)))] ^= 1 << int(ground.random.integers(8))
    path.write_bytes(data)


def cut(path: Path, ground: Ground) -> None:
    os.truncate(path, int(ground.random.integers(0, path.stat().st_size)))


def other_version(path: Path, _: Ground) -> None:
    _, meta = checkpoint.load(path)
    save_file(load_file(path), path, metadata={checkpoint.KEY: json.dumps(meta | {"format": 99})})


def folder_instead(path: Path, _: Ground) -> None:
    path.unlink()
    path.mkdir()


damaged("has a flipped bit", flip)
damaged("is cut short", cut)
damaged("is of another version", other_version)
damaged("cannot be read", folder_instead)


@fault("all checkpoints are damaged", "exit 2, one line: it does not begin anew over them")
def _(ground: Ground) -> Seen:
    recipe, _, there = interrupted(ground)
    for path in there:
        cut(path, ground)
    with ground.train(recipe) as child:
        seconds, line = ends(child, 2, r"none of its \d checkpoints can be read")
    assert checkpoint.listed(ground.folder / "run" / "checkpoints") == there
    return Seen(line[10:].split("/")[-1][:90], notice=seconds, lost="what was damaged")


@fault("record, ledger and recipe of a run are garbled", "named in the log; resumed, the same bits")
def _(ground: Ground) -> Seen:
    recipe, expected, _ = interrupted(ground)
    run = ground.folder / "run"
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "train", "st')
    (run / "held.json").write_text("{")
    (run / "recipe.yaml").write_bytes(b"\xff\xfe")
    ground.resumed(recipe, expected)
    return Seen("the same bits", lost="the ledger's seconds since the last save")
