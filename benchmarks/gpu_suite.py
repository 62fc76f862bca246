"""Everything that needs a GPU, in pieces of at most three minutes: the tests marked `gpu` and every benchmark.

    std-fast bench gpu_suite --minutes 11 --out OUT      # the next pieces that fit; call it again for the others
    std-fast bench gpu_suite --out OUT                   # all that are left
    std-fast bench gpu_suite --only kernels "step mixer_s16" --out OUT
    std-fast bench gpu_suite --list --out OUT            # the pieces, the seconds they need, what is there
    std-fast bench gpu_suite --split OUT/gpu_suite-....json --out benchmarks/results   # a file for each benchmark

What is most worth knowing comes first. Each piece is a process of its own with a time limit, so that one that fails or
hangs takes nothing with it. After each, `gpu_suite-CARD-CODE.json` in the folder of --out (by default $OUT) is written
anew; CODE is a digest of what decides a result: code, recipes, the GPU's tests, versions, the card's size. A piece
whose result is there, for this card and this code, is not taken again; one that failed or was cut off comes after
those that have not been tried. --known FOLDER reads results from there too, where --out starts empty. `gpu_suite.log`
holds the output of the pieces.

--study IMAGENETTE TEACHERS WORK makes the study a piece, of up to nine minutes: its runs are in WORK, where the next
piece continues; those that are done are also in `study-CARD.json` beside the results, and are not made again on
another disk, whatever code made them (examples/imagenet_teachers.py makes TEACHERS).

--caches FOLDER keeps what inductor and Triton compile, so that a second call starts warm. A folder that a fake GPU
filled for sm_90 serves a real one in part: Triton's kernels are found by their source and target, while inductor's
graphs carry the name of the card in their key and are compiled anew; what it chose without a clock (*.best_config)
is deleted at the end. --smoke runs the benchmarks at tiny sizes, on the
CPU or with --device cuda on whatever torch takes for a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pipelines
import std_fast
from benchmarks import fake_gpu, harness
from pipelines.errors import UserError
from pipelines.files import write_atomic

OTHERS = ("mixer_b16", "resmlp_s24", "resmlp_b24", "cyclemlp_b1", "cyclemlp_b2")


@dataclass(frozen=True)
class Part:
    """A piece."""

    name: str
    words: tuple[str, ...]
    """after `python -m`"""
    expected: float = 120
    """seconds: it is begun where so many are left"""
    limit: float = 180
    """seconds after which it is ended"""

    @property
    def question(self) -> str | None:
        """The benchmark's name; None for the tests."""
        return self.words[0].partition("benchmarks.")[2] or None


def bench(question: str, *words: str, name: str = "", expected: float = 120) -> Part:
    return Part(name or question, (f"benchmarks.{question}", *words), expected)


def other(model: str) -> Part:
    """The step of another student; what its teachers are does not matter, so they are tiny."""
    tiny = ("--teachers", "test_resnet", "test_resnet")
    return bench("step", "--model", model, "--batch", "512", "--profile", *tiny, name=f"step {model}")


TESTS = ("tests/gpu", "tests/integration/test_out_of_memory.py")  # all marked gpu; the others need more packages
PARTS = (
    Part("tests", ("pytest", "-q", "-m", "gpu", "--no-header", "-p", "no:cacheprovider", *TESTS), 90),
    bench("step", "--profile", name="step mixer_s16", expected=150),
    bench("peers", "--only", "compiled", name="peers compiled"),
    bench("peers", "--only", "eager", name="peers eager", expected=60),
    bench("overlap"),
    bench("end_to_end"),
    bench("kernels", expected=90),
    *(other(model) for model in OTHERS),
    bench("roofline", "--compile", "inductor"),
    bench("teachers", "--teachers", "resnet50", "resnet101", "swin_base_patch4_window7_224"),
    bench("options", name="options mixer_s16", expected=150),
    bench("options", "--model", "cyclemlp_b1", "--batch", "512", name="options cyclemlp_b1", expected=150),
    bench("compile", "--limit", "80", expected=150),
    bench("mine_gaussians", expected=60),
    Part("study", ("benchmarks.evidence", "--size", "gpu"), expected=120, limit=540),
)
UNFINISHED = "to be continued"
SMOKE_RUN = "C-16-plain-0"
SAVING = 40
"""seconds that a piece has to end in, from a signal on: a run of the study is saved"""


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 when a piece failed, ran past its limit or could not be written; 2: the user's mistake."""
    try:
        args = parsed(argv)
        return split(args) if args.split else take(args)
    except UserError as error:
        print(f"std-fast bench gpu_suite: {error}", file=sys.stderr)
        return 2


def split(args: argparse.Namespace) -> int:
    """Writes each report of the file of --split."""
    try:
        parts = results(Path(args.split), must_exist=True)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--split: {args.split} holds no results of gpu_suite ({error})") from error
    for one in parts.values():
        if "report" in one:
            print(harness.write(one["report"], Path(args.out)))
    return 0


def take(args: argparse.Namespace) -> int:
    """Takes the pieces that are left, and prints what is known."""
    folder, device = Path(args.out), args.device
    on = card() if device == "cuda" or not args.smoke else "cpu"
    tiny = "-smoke" if args.smoke else ""
    path = folder / f"gpu_suite-{on}-{code(on)}{tiny}.json"
    found = results(path) or results(Path(args.known or folder) / path.name)
    if args.list:
        print(listed([part for part in PARTS if part.name in (args.only or [part.name])], found))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {error}") from error
    parts = [part for part in PARTS if part.name in (args.only or [part.name])]
    if not args.study:
        parts = [part for part in parts if part.name != "study"]
        harness.progress("study: left out, --study does not say where its images are")
    if args.smoke:
        words = ("--smoke", *(("--device", device) if device != "auto" else ()))
        one_of_each: dict[str, Part] = {}
        for part in parts:
            if part.question:
                one_of_each.setdefault(part.question, replace(part, name=part.question, words=(part.words[0], *words)))
        parts = list(one_of_each.values())
    parts = [with_study(part, args, f"study-{on}{tiny}.json") for part in parts]
    keep_caches(args.caches)
    try:
        beside = harness.cores() if args.smoke and device != "cuda" else 1
        run(next_parts(parts, found), found, path, args.minutes, beside)
    finally:
        if args.caches and fake_gpu.active():  # which of its configurations is fastest, a fake GPU cannot tell
            for choice in Path(args.caches).rglob("*.best_config"):
                choice.unlink(missing_ok=True)
        print(table(found), flush=True)  # also after a signal: it may be all that comes home
    tried = [found[part.name] for part in parts if part.name in found]
    written = not tried or kept(save, path, found)
    return 0 if written and all(one["state"] in ("ok", UNFINISHED) for one in tried) else 1


def with_study(part: Part, args: argparse.Namespace, name: str) -> Part:
    """The piece with the study's folders, where it is the study; `name`: of the file that keeps its runs."""
    if part.question != "evidence":
        return part
    keep, known = Path(args.out) / name, Path(args.known or args.out) / name
    if known.is_file() and not keep.exists():
        shutil.copyfile(known, keep)
    images, teachers, work = map(os.path.abspath, args.study)
    words = ("--data", images, "--teachers", teachers, "--work", work, "--keep", os.path.abspath(keep))
    return replace(part, words=(*part.words, *words, *(("--only", SMOKE_RUN) if args.smoke else ())))


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.Parser(
        "std-fast bench gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=os.environ.get("OUT", ""), help="folder of the results [$OUT]")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for all pieces of this call [no limit]")
    parser.add_argument("--only", nargs="+", metavar="PIECE", choices=[p.name for p in PARTS], help="these pieces")
    parser.add_argument("--known", metavar="FOLDER", help="results are looked for there, if --out has none")
    parser.add_argument("--caches", metavar="FOLDER", help="what is compiled stays there [where torch keeps it]")
    parser.add_argument(
        "--study", nargs=3, metavar=("IMAGENETTE", "TEACHERS", "WORK"), help="folders; with them, the study is a piece"
    )
    parser.add_argument("--list", action="store_true", help="only name the pieces, their seconds and what is there")
    parser.add_argument("--split", metavar="FILE", help="only write each report of this file to --out")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: whether it runs, not how fast")
    parser.add_argument("--device", choices=("auto", "cuda"), default="auto", help="of --smoke [the CPU]")
    args = parser.parse_args(argv)
    if not (args.out or args.list):
        raise UserError("--out: name a folder, or set $OUT")
    if not args.minutes >= 0:
        raise UserError("--minutes: must be 0 or more")
    if "study" in (args.only or ()) and not (args.study or args.list):
        raise UserError("--only study: needs --study IMAGENETTE TEACHERS WORK")
    if not (args.split or args.list) and card() == "cpu" and (args.device == "cuda" or not args.smoke):
        raise UserError("torch sees no GPU; look at `std-fast doctor`, or give --smoke alone for tiny sizes on the CPU")
    return args


def next_parts(parts: Sequence[Part], found: Mapping[str, dict[str, Any]]) -> list[Part]:
    """Without those whose results are there; those that have not been tried first."""
    left = [part for part in parts if found.get(part.name, {}).get("state") != "ok"]
    return sorted(left, key=lambda part: part.name in found)


def run(parts: Sequence[Part], found: dict[str, dict[str, Any]], path: Path, minutes: float, beside: int = 1) -> None:
    """Takes the pieces that fit into so many minutes, in order, and writes what is known after each.

    Args:
        beside: so many at once, where no time is taken.
    """
    until = time.monotonic() + 60 * minutes

    def go(part: Part) -> None:
        left = until - time.monotonic()
        if left < part.expected:
            harness.progress(f"{part.name}: does not fit into the {max(left, 0):.0f} s that are left")
            return
        found[part.name] = attempt(part, min(part.limit if beside == 1 else 600, left), path.parent)
        kept(save, path, found)
        harness.progress(f"{part.name}: {found[part.name]['state']}")

    if beside == 1:  # in this thread, where a signal ends the piece too
        for part in parts:
            go(part)
        return
    with ThreadPoolExecutor(beside) as pool:
        list(pool.map(go, parts))


def card() -> str:
    """The GPU as it stands in a file's name."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def code(on: str) -> str:
    """A digest of what decides a result on a card (or "cpu"): with other code, versions or memory it is another one."""
    found = harness.conditions("cpu" if on == "cpu" else "cuda")
    digest = hashlib.sha256(json.dumps([found["gpu"], found["versions"], found["python"]]).encode())
    packages = [Path(str(module.__file__)).parent for module in (std_fast, pipelines, harness)]
    tests = [*(harness.ROOT / "tests").glob("*.py"), *(harness.ROOT / test for test in TESTS)]
    for path in [*packages, *tests]:
        inside = [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in (".py", ".yaml")]
        for file in sorted(inside):
            digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def keep_caches(folder: str | None) -> None:
    """Names `folder` as the cache of what the pieces compile."""
    if folder:
        place = Path(folder).resolve()
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(place), "TRITON_CACHE_DIR": str(place / "triton")}


def results(path: Path, must_exist: bool = False) -> dict[str, dict[str, Any]]:
    """What an earlier call wrote; empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8"))["parts"] if must_exist or path.is_file() else {}


def attempt(part: Part, limit: float, folder: Path) -> dict[str, Any]:
    """Runs a part; returns its state, seconds, and report or last lines."""
    words = [sys.executable, "-m", *part.words] + (["--json"] if part.question else [])
    if part.question == "evidence":
        words += ["--minutes", f"{max(limit - SAVING, 0) / 60:.2f}"]
    began = time.monotonic()
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        words, stdout=pipe, stderr=pipe, text=True, errors="replace", cwd=harness.ROOT, start_new_session=True,
        preexec_fn=harness.end_with_parent,
    )  # fmt: skip
    state = ""
    try:
        out, said = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        out, said = end(process)
        state = f"ran past its limit of {limit:.0f} s"
    except BaseException:  # this call is ended: so is the piece, which leaves no result
        end(process)
        raise
    sweep(process, signal.SIGKILL)  # what a piece that was killed has left would run on beside the next one
    kept(note, folder / "gpu_suite.log", f"== {' '.join(words)}\n{said}\n" + ("" if part.question else out))
    result: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1), "command": " ".join(words[1:])}
    if not state and process.returncode == 0 and part.question:
        try:
            report = harness.printed_report(out)
            return {"state": UNFINISHED if report.get("left") else "ok", **result, "report": report}
        except ValueError:
            state = "wrote no report"
    state = state or ("ok" if process.returncode == 0 else f"exit code {process.returncode}")
    return {"state": state, **result, "said": f"{said}\n{out}".strip().splitlines()[-5:]}


def end(process: subprocess.Popen) -> tuple[str, str]:
    """Ends a piece with the processes that it has started; returns what it has written."""
    sweep(process, signal.SIGTERM)
    try:
        return process.communicate(timeout=SAVING)
    except subprocess.TimeoutExpired:
        sweep(process, signal.SIGKILL)
        return process.communicate()


def sweep(process: subprocess.Popen, signum: int) -> None:
    """Sends a signal to a piece and to what it has started and left in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


def kept(write: Callable[..., None], path: Path, what: Any) -> bool:
    """Whether `write` could write `what`: a full disk costs a file, and not the pieces that follow and their table."""
    try:
        write(path, what)
    except OSError as error:
        harness.progress(f"{path}: not written ({error.strerror or error})")
        return False
    return True


def note(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def save(path: Path, found: Mapping[str, dict[str, Any]]) -> None:
    """Writes what is known, complete or not at all."""
    write_atomic(path, json.dumps({"parts": found}, indent=1) + "\n")


def listed(parts: Sequence[Part], found: Mapping[str, dict[str, Any]]) -> str:
    """A line for each piece: the seconds that must be left for it to begin, its limit, its state."""
    rows = [
        {"piece": p.name, "needs": p.expected, "limit": p.limit, "is": found.get(p.name, {}).get("state", "not taken")}
        for p in parts
    ]
    columns = {"piece": "piece", "needs, s": "needs", "ended after, s": "limit", "state": "is"}
    return f"{harness.table(rows, columns)}\n\ntogether {sum(p.expected for p in parts) / 60:.0f} minutes"


def table(found: Mapping[str, dict[str, Any]]) -> str:
    """A line for each part, and one for each of its rows and ratios."""
    lines = []
    for name, one in found.items():
        report = one.get("report", {})
        lines.append(f"{name}: {one['state']}" + (f", {one['seconds']} s" if "seconds" in one else ""))
        lines += [f"    {line}" for line in one.get("said", ())]
        lines += [f"    {len(report['runs'])} runs are done, {len(report['left'])} left"] if "left" in report else []
        for row in report.get("rows", ()):
            keys = (
                *("milliseconds", "images_per_second", "mfu_percent", "roof_percent", "times_floor"),
                *("agree_percent", "error_percent"),
            )
            numbers = {key: row[key] for key in keys if row.get(key) is not None}
            if "milliseconds" in numbers:
                numbers["milliseconds"] = numbers["milliseconds"]["median"]
            shown = "  ".join(f"{key} {harness.cell(value)}" for key, value in numbers.items())
            lines.append(f"    {row['name']}: {shown or row.get('failed', '')}")
        lines += [f"    {r['what']}: {r['ratio']['median']}" for r in report.get("ratios", ())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
