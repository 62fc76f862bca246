"""Table and figure of the best students for a cost, from a stored result; see evidence.md."""

from __future__ import annotations

from pathlib import Path

from benchmarks import harness

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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
