"""How fast, and at what cost, the loaders give batches; in turns with them, the plain libraries that they stand on.

Every contestant runs in a process of its own and loads one epoch after the other, in turns, so that the machine's load
is the same for all; between its turns it is idle. All read the same encoded images: libraries that read files get
the beton's JPEGs, written to a temporary folder. A turn gives images per second (from the start of the epoch to its
last batch) and CPU time per image (the process and its children). Measured once: seconds from opening (with the imports
of the library, without torch's) to the first batch, peak memory beyond what the process held before, and images per
second when the files have to be read from the disk.

    std-fast bench loader --data X.beton --json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.loader_contestants import NEEDS, PAIRS, Settings, extract
from benchmarks.loader_pixels import differences
from benchmarks.loader_process import Contestant, drop_from_cache
from pipelines.errors import UserError


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def main(
    data: str,
    *,
    backends: tuple[str, ...] = ("ffcv", "dali", "torch"),
    repeats: int = 7,
    threads: int = 0,
    batch: int = 64,
    image_size: int = 224,
    device: str = "cpu",
    cold: bool = True,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measures our `backends`, what each stands on (PAIRS), and decoding alone, on a beton of JPEGs.

    Each is opened and loads one epoch to warm up, then all take `repeats` turns. With `cold`, each is then started
    anew after the files have been dropped from the page cache, where that succeeds.

    Returns:
        The report, plain values for JSON; `left_out` names the backends that are not installed.

    Raises:
        UserError: an unknown backend, raw images, or fewer images than two batches.
    """
    from pipelines.loaders.base import available_cores

    for backend in backends:
        if backend not in PAIRS:
            raise UserError(f"--backends: {backend!r} is unknown: choose from {', '.join(PAIRS)}")
    say = progress or (lambda line: None)
    missing = [name for name in backends if name in NEEDS and not _installed(NEEDS[name])]
    names = [name for ours in backends if ours not in missing for name in (ours, *PAIRS[ours])] + ["decoding alone"]
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="std-fast-bench-") as files:
        count, shape = extract(data, files)
        if count < 2 * batch:
            raise UserError(f"{data} has {count} images, too few for batches of {batch}: take at most {count // 2}")
        settings = Settings(data, files, threads or available_cores(), batch, image_size, device)
        turns = _alternate(names, settings, repeats, say)
        cold_rows, still_held = _cold(names, settings, say) if cold else ({}, None)
        pixels = differences(settings, [name for name in backends if name not in missing])
    rows = [_row(name, turns[name], cold_rows.get(name)) for name in names]
    settings_shown = {key: value for key, value in asdict(settings).items() if key != "files"}
    return {
        "question": "loader",
        "variant": Path(data).stem,
        "conditions": harness.conditions(device) | {"load_average": load_before, "load_average_after": os.getloadavg()},
        "settings": settings_shown | {"repeats": repeats, "images": count, **shape},
        "left_out": missing,
        "cold_share_still_cached": still_held,
        "rows": rows,
        "ratios": _ratios(rows, backends, missing),
        "pixel_differences": pixels,
    }


def _row(name: str, turns: list[dict[str, float]], cold: float | None) -> dict[str, Any]:
    """A contestant's row, from its turns (the first to warm up) and its images per second from the disk."""
    rates = [turn["images_per_second"] for turn in turns[1:]]
    return {
        "name": name,
        "images_per_second": _summary(rates),
        "cpu_us_per_image": _summary([turn["cpu_us_per_image"] for turn in turns[1:]]),
        "turns": [round(value, 1) for value in rates],
        "first_batch_seconds": turns[0]["first_batch_seconds"],
        "memory_mib": max(turn["memory_mib"] for turn in turns),
        "cold_images_per_second": cold,
    }


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _alternate(
    names: list[str], settings: Settings, repeats: int, say: Callable[[str], None]
) -> dict[str, list[dict[str, float]]]:
    """Measurements of each contestant's turns, the first to warm up."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    contestants: list[Contestant] = []
    try:
        for turn in range(repeats + 1):
            for place, name in enumerate(names):
                if turn == 0:
                    contestants.append(Contestant(name, settings))
                turns[name].append(contestants[place].run(turn))
                say(f"turn {turn}/{repeats}: {name}: {turns[name][-1]['images_per_second']:.0f} images/s")
    finally:
        for contestant in contestants:
            contestant.close()
    return turns


def _cold(names: list[str], settings: Settings, say: Callable[[str], None]) -> tuple[dict[str, float | None], float]:
    """Images per second of a fresh process after dropping the files from the page cache, from its first batch on (what
    comes before is importing and compiling); None where the files stay."""
    paths = [settings.data, *(str(path) for path in Path(settings.files).rglob("*.jpg"))]
    rows: dict[str, float | None] = {}
    most = 0.0
    for name in names:
        held = drop_from_cache(paths)
        most = max(most, held)
        if held > 0.05:
            rows[name] = None
            continue
        contestant = Contestant(name, settings)
        try:
            rows[name] = contestant.run(0)["after_first_batch"]
        finally:
            contestant.close()
        say(f"cold: {name}: {rows[name]:.0f} images/s")
    return rows, most


def _ratios(rows: list[dict[str, Any]], backends: tuple[str, ...], missing: list[str]) -> list[dict[str, Any]]:
    """Ours over the other: medians of images per second and of CPU time per image (the other's over ours)."""
    by_name = {row["name"]: row for row in rows}
    ratios = []
    for ours in backends:
        for rival in PAIRS[ours] if ours not in missing else ():
            a, b = by_name[ours], by_name[rival]
            each = [x / y for x, y in zip(a["turns"], b["turns"], strict=True)]
            ratios.append(
                {
                    "ours": ours,
                    "rival": rival,
                    "images_per_second": a["images_per_second"]["median"] / b["images_per_second"]["median"],
                    "turn_by_turn": _summary(each),
                    "cpu_time": b["cpu_us_per_image"]["median"] / a["cpu_us_per_image"]["median"],
                }
            )
    return ratios


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "| loader | images/s | lowest to highest | CPU us/image | first batch, s | memory, MiB | cold, images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        speed, cold = row["images_per_second"], row["cold_images_per_second"]
        lines.append(
            f"| {row['name']} | {speed['median']:.0f} | {speed['lowest']:.0f} to {speed['highest']:.0f} | "
            f"{row['cpu_us_per_image']['median']:.0f} | {row['first_batch_seconds']:.2f} | {row['memory_mib']:.0f} | "
            f"{'-' if cold is None else f'{cold:.0f}'} |"
        )
    lines += ["", "| ours | over | images/s | turn by turn | CPU time |", "|---|---|---|---|---|"]
    for ratio in report["ratios"]:
        each = ratio["turn_by_turn"]
        lines.append(
            f"| {ratio['ours']} | {ratio['rival']} | {ratio['images_per_second']:.2f} | "
            f"{each['lowest']:.2f} to {each['highest']:.2f} | {ratio['cpu_time']:.2f} |"
        )
    lines += ["", "| pixels of | mean difference, of 255 | largest | cause |", "|---|---|---|---|"]
    for row in report["pixel_differences"]:
        lines.append(f"| {row['pair']} | {row['mean']:.3f} | {row['largest']} | {row['cause']} |")
    return "\n".join(lines)


def command(argv: list[str] | None = None) -> int:
    """`std-fast bench loader`; returns the exit code."""
    parser = argparse.ArgumentParser("std-fast bench loader", description=__doc__)
    parser.add_argument("--data", required=True, help="a beton of JPEGs")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--out", metavar="FOLDER", help="also write QUESTION-DATA-HARDWARE-DATE.json there")
    parser.add_argument(
        "--backends",
        default="ffcv,dali,torch",
        help=f"of {', '.join(PAIRS)}; each with what it stands on [ffcv,dali,torch]",
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--no-cold", dest="cold", action="store_false", help="do not drop the files from the page cache"
    )
    options = vars(parser.parse_args(argv))
    as_json, out = options.pop("json"), options.pop("out")
    options["backends"] = tuple(options["backends"].split(","))
    try:
        result = main(options.pop("data"), **options, progress=harness.progress)
    except UserError as error:
        print(f"std-fast bench loader: {error}", file=sys.stderr)
        return 2
    if out:
        harness.progress(str(harness.write(result, Path(out))))
    print(json.dumps(result, indent=1) if as_json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(command())
