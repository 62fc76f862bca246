"""Where the faults of the campaign are tried: data, recipes, processes, and how a row says what it saw."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from std_fast.config.recipe import Recipe
from std_fast.runtime import checkpoint
from tests.beton_tools import encoded, pixels
from tests.killing import Child
from tests.small_runs import RESNET, assert_same_bits, final_tensors, small_recipe, write_recipe


@dataclass
class Seen:
    """What happened: in words, how many times it was tried, seconds until it was noticed, what was lost."""

    happened: str
    tried: int = 1
    notice: float | None = None
    lost: str = "nothing"


@dataclass
class Fault:
    name: str
    should: str
    run: Callable[[Ground], Seen]


FAULTS: list[Fault] = []


def fault(name: str, should: str) -> Callable[[Callable[[Ground], Seen]], Callable[[Ground], Seen]]:
    """Registers a row of the campaign. It raises AssertionError when what happens is not what should."""

    def add(run: Callable[[Ground], Seen]) -> Callable[[Ground], Seen]:
        FAULTS.append(Fault(name, should, run))
        return run

    return add


@dataclass
class Ground:
    """A folder of its own for one row, its random numbers, and data that all rows share and none changes."""

    folder: Path
    shared: Path
    random: np.random.Generator
    scale: int = 1  # how many times as often as usual things are tried
    _number: int = field(default=0)

    # -- data ---------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def images(self) -> Path:
        """SRC/CLASS/NN.jpg, 3 classes of 8."""
        return self._made("images", lambda path: write_images(path, 8))

    @functools.cached_property
    def many_images(self) -> Path:
        """600 images, for a second of converting."""
        return self._made("many", lambda path: write_images(path, 200, (150, 200)))

    @functools.cached_property
    def beton(self) -> Path:
        """`images` as a beton of this row's own."""
        made = self._made("images.beton", lambda path: self.finish(["convert", str(self.images), str(path)]))
        own = self.folder / "own.beton"
        for end in ("", ".json"):
            shutil.copy(f"{made}{end}", f"{own}{end}")
        return own

    @functools.cached_property
    def teacher(self) -> Path:
        return self._made("teacher", self._train_teacher)

    def _train_teacher(self, out: Path) -> None:
        plain = {"student": RESNET, "run": {"length": "2 steps"}}
        path = write_recipe(small_recipe(self.images, out, **plain), self.folder / "teacher.yaml")
        self.finish(["train", path, "--quiet"])

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self.shared / name
        if not path.exists():
            make(path)
        return path

    # -- recipes and runs ---------------------------------------------------------------------------------------------

    def recipe(self, on: Path | None = None, name: str = "run", std: bool = False, **sections: dict) -> Recipe:
        """See `small_runs.small_recipe`; on: the data; std: by two teachers, with MINE."""
        if std:
            teachers = {
                "mode": "std",
                "teachers": [{"weights": str(self.teacher)}] * 2,
                "mine": {"every": "1 step", "ema": 0.1},
            }
            sections["distill"] = teachers | sections.get("distill", {})
        return small_recipe(on or self.images, self.folder / name, **sections)

    def write(self, recipe: Recipe) -> str:
        self._number += 1
        return write_recipe(recipe, self.folder / f"recipe{self._number}.yaml")

    def start(self, argv: list[str], **more: Callable) -> Child:
        """`std-fast ARGV`."""
        self._number += 1
        return Child(argv, self.folder / f"child{self._number}.log", **more)

    def train(self, recipe: Recipe, *words: str, **more: Callable) -> Child:
        return self.start(["train", self.write(recipe), "--quiet", "--resume", *words], **more)

    def finish(self, argv: list[str]) -> str:
        """Runs to its good end; what it said."""
        with self.start(argv) as child:
            code = child.wait()
            assert code == 0, f"std-fast {argv[0]} ended with {code}: {child.text[-2000:]}"
            return child.text

    def expected(self, recipe: Recipe) -> dict:
        """The final tensors of an undisturbed run of this recipe, which has another folder."""
        twin = self.folder / "undisturbed"
        self.finish(["train", self.write(recipe), "--quiet", "--run.out", str(twin)])
        return final_tensors(twin)

    def resumed(self, recipe: Recipe, expected: dict) -> None:
        """Resumes to the end, which must have the expected bits."""
        with self.train(recipe) as child:
            assert child.wait() == 0, child.text[-2000:]
        assert_same_bits(final_tensors(Path(recipe.run.out)), expected)


def write_images(folder: Path, each: int, size: tuple[int, int] = (60, 70)) -> None:
    for label, name in enumerate(("ant", "bee", "cat")):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            image = pixels(size[0] + number % 7, size[1], 100 * label + number)
            (folder / name / f"{number:03}.jpg").write_bytes(encoded(image, quality=92))


def ends(child: Child, code: int, words: str, limit: float = 120.0) -> tuple[float, str]:
    """Waits for the end, which must have this exit code and one line with `words` (a pattern), without a traceback.
    Returns seconds from now, and the line."""
    began = time.monotonic()
    found = child.wait(limit)
    seconds = time.monotonic() - began
    text = child.text
    assert found == code, f"exit code {found}, not {code}: {text[-1500:]}"
    assert "Traceback" not in text, f"a traceback: {text[-1500:]}"
    lines = [line for line in text.splitlines() if line.startswith("std-fast: ")]
    assert len(lines) == 1 and re.search(words, lines[0]), f"not one line with {words!r}: {lines} {text[-800:]}"
    return seconds, lines[0]


def steps_saved(run: Path) -> int:
    """The newest step in a run's checkpoints, 0 for none."""
    there = checkpoint.listed(run / "checkpoints")
    return int(there[-1].stem.removeprefix("step-")) if there else 0


def logged(run: Path) -> int:
    """Lines in the run's record."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A disk of this size. Raises OSError where one cannot be mounted (by others than root)."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        raise OSError(done.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def enlarge(folder: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(folder)], check=True)
