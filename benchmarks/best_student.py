"""The best students for their cost: their table from the folders of finished runs, and its figure; see evidence.md."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from benchmarks import harness
from benchmarks.study import rounded, time_steps
from benchmarks.study_report import Group
from pipelines.errors import UserError
from std_fast.config import recipe as recipes
from std_fast.config.files import RECIPES
from std_fast.config.recipe import Recipe
from std_fast.runtime.metrics import read_jsonl

COLUMNS = {
    "student": "student",
    "parameters": "parameters",
    "training": "training",
    "recipe": "recipe",
    "step of 128, ms": "step_ms",
    "CPU minutes": "minutes",
    "epochs": "epochs",
    "top-1, %": "top1",
}


def show(report: harness.Report) -> str:
    """One table of the students compared on images held out, one of those read from the validation images."""
    parts = []
    for images in ("held out", "validation"):
        rows = [row | {"top1": f"{row['top1']:.1f} ± {row['error']:.1f}"} for row in report["students"]]
        parts.append(f"{images}:\n\n" + harness.table([row for row in rows if row["images"] == images], COLUMNS))
    return "\n\n".join(parts)


def draw(report: harness.Report, path: Path) -> None:
    """Validation accuracy over processor time, a line for each family of students and way of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axis = figure.subplots()
    lines: dict[str, list[harness.Report]] = {}
    for row in report["students"]:
        if row["images"] == "validation":
            lines.setdefault(f"{row['student'].split()[0]}, {row['training']}", []).append(row)
    for label, rows in lines.items():
        rows.sort(key=lambda row: row["minutes"])
        x, y, error = zip(*[(row["minutes"], row["top1"], row["error"]) for row in rows], strict=True)
        axis.errorbar(x, y, error, marker="o", capsize=3, label=label)
    axis.set(xscale="log", xlabel="minutes of one core, teachers' excluded", ylabel="top-1, %")
    axis.set_title("Imagenette at 128 px: accuracy over cost, each run trained to its end")
    ticks = sorted({round(row["minutes"]) for rows in lines.values() for row in rows})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="upper left")
    figure.savefig(path, dpi=110)


def collect(folders: Sequence[str], args: argparse.Namespace) -> harness.Report:
    """Table and records of finished runs; a step of each recipe is timed anew, all in turns.

    A run counts by the images of its `data.val`; one of the study, which holds predictions.json, by the validation
    images, together with its other initialisations. Raises UserError where a run is not complete or cannot be built.
    """
    recipe_of = {folder: recipes.read_saved(Path(folder)) for folder in folders}
    runs = [record(Path(folder)) for folder in folders]
    without_val = {name: replace(recipe, data=replace(recipe.data, val="")) for name, recipe in recipe_of.items()}
    times = time_steps(without_val, args)
    rows: dict[tuple[str, str, str], list[tuple[str, harness.Report]]] = {}
    for folder, run in zip(folders, runs, strict=True):
        rows.setdefault((*describe(recipe_of[folder]), run["images"]), []).append((folder, run))
    students = []
    for (student, training, images), members in rows.items():
        recipe, summaries = recipe_of[members[0][0]], [run["summary"] for _, run in members]
        ms = 1e3 * statistics.median(times[folder].seconds for folder, _ in members)
        samples = statistics.mean(summary["samples"] for summary in summaries)
        top1, error = accuracy([run for _, run in members])
        students.append(
            {
                "student": student,
                "training": training,
                "parameters": f"{summaries[0]['parameters'] / 1e6:.2f} M",
                "images": images,
                "recipe": f"`{recipe.name}`" if (RECIPES / f"{recipe.name}.yaml").is_file() else None,
                "step_ms": f"{ms:.0f}",
                "minutes": round(samples * ms / recipe.run.batch / 60_000, 1),
                "epochs": f"{statistics.mean(summary['epochs'] for summary in summaries):.1f}",
                "top1": top1,
                "error": error,
            }
        )
    steps = [harness.row(folder, of, recipe_of[folder].run.batch) for folder, of in times.items()]
    return {"variant": "best-student", "students": students, "runs": runs, "rows": steps}


def record(folder: Path) -> harness.Report:
    """What is kept of a run. UserError where it is not complete."""
    if not (folder / "summary.json").is_file():
        raise UserError(f"--students {folder}: holds no summary.json; name a run that is complete")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    records = read_jsonl(folder / "metrics.jsonl")
    run = {
        "name": folder.name,
        "init": recipe["run"]["init_seed"] or 0,
        "images": "held out" if Path(recipe["data"]["val"]).stem == "held-out" else "validation",
        "recipe": recipe,
        "metrics": [rounded(r) for r in records if r["kind"] in ("eval", "end")],
        "loss_of_steps": [[r["step"], round(r["loss"], 4)] for r in records if r["kind"] == "train"],
        "summary": json.loads((folder / "summary.json").read_text(encoding="utf-8")),
    }
    if (predictions := folder / "predictions.json").is_file():
        run |= {"images": "validation", "predictions": json.loads(predictions.read_text(encoding="utf-8"))}
    return run


def describe(recipe: Recipe) -> tuple[str, str]:
    """Student, and how it is trained, in a few words."""
    options, distill = recipe.student.options, recipe.distill
    sizes = options.get("embed_dims") or [options.get("dim", "")]
    way = "plain" if distill.mode == "none" else "STD" if distill.tokens == "both" else f"{distill.tokens} tokens"
    way += " on true labels" * (distill.mode != "none" and distill.labels == "ground_truth")
    return f"{recipe.student.name} {', '.join(map(str, sizes))}", f"{recipe.optim.name}, {way}"


def accuracy(runs: list[harness.Report]) -> tuple[float, float]:
    """Mean top-1, %, and its standard error: over images, and over initialisations where there are several."""
    if all("predictions" in run for run in runs):
        return Group("", "", runs).accuracy()
    results = [run["summary"]["result"] for run in runs]
    every = [result["top1"] for result in results]
    top1 = statistics.mean(every)
    over_images = math.sqrt(top1 * (100 - top1) / results[0]["images"])
    return top1, math.hypot(over_images, statistics.stdev(every) / math.sqrt(len(every)) if len(every) > 1 else 0.0)
