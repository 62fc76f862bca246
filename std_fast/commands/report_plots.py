"""The plots of a report: PNG files, and the same images embedded in its page."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from std_fast.commands.report_data import COLOURS, RunData, points
from std_fast.runtime.budget import PARTS

PART_COLOURS = dict(
    zip(PARTS, ("#b8b8b8", "#8c6bb1", "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#00614a", "#D55E00"), strict=True)
)
LIGHT = ("start", "teacher", "data")  # parts whose colour is light: dark numbers on them
HEADS = {"top1_class": "class head", "top1_distill": "distillation heads", "top1_mean": "mean of both"}


class Plots:
    """Draws plots in one style; keeps each as a PNG file and for the page."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.pngs: dict[str, bytes] = {}

    def draw(self, name: str, size: tuple[float, float], fill: Callable[[Any], None], alt: str) -> str:
        """`fill` draws on the axes; returns the figure as HTML."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        fill(axes)
        buffer = BytesIO()
        figure.savefig(buffer, format="png")
        return self.keep(name, buffer.getvalue(), alt, round(100 * size[0]))

    def keep(self, name: str, png: bytes, alt: str, width: int) -> str:
        (self.out / f"{name}.png").write_bytes(png)
        self.pngs[name] = png
        data = base64.b64encode(png).decode("ascii")
        return f'<figure><img width="{width}" alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></figure>'

    def curves(
        self, name: str, curves: list[tuple[str, str, str, tuple[list[float], list[float]]]], x: str, y: str
    ) -> str | None:
        """Lines (label, colour, style, points); None when there is nothing to draw."""
        curves = [curve for curve in curves if curve[3][0]]
        if not curves:
            return None

        def fill(axes: Any) -> None:
            for label, colour, style, (xs, ys) in curves:
                marker = "o" if len(xs) < 40 else None
                axes.plot(xs, ys, style, color=colour, label=plain(label), linewidth=1.6, marker=marker, markersize=3)
            axes.set_xlabel(x)
            axes.set_ylabel(y)
            axes.legend(frameon=False, fontsize=8)

        labels = ", ".join(label for label, *_ in curves)
        return self.draw(name, (6.4, 3.6), fill, f"{y} against {x}: {labels}")


def plain(text: str) -> str:
    """Text as matplotlib shall draw it: no formula, and nothing that hides it from the legend."""
    return " " + text.replace("$", r"\$") if text.startswith("_") else text.replace("$", r"\$")


def accuracy(plots: Plots, runs: list[RunData], x: str, label: str) -> str | None:
    curves = [(t.name, t.colour, "-", points(t.evals, x, "top1")) for t in runs]
    return plots.curves(f"accuracy_{x}", curves, label, "validation top-1 (%)")


def figure_of(plots: Plots, runs: list[RunData], key: str, y: str) -> str | None:
    curves = [(t.name, t.colour, "-", points(t.lines, "epoch", key)) for t in runs]
    return plots.curves(key, curves, "epochs", y)


def throughput(plots: Plots, runs: list[RunData]) -> str | None:
    curves = [(t.name, t.colour, "-", points(t.lines, "gpu_hours", "images_per_second")) for t in runs]
    return plots.curves("throughput", curves, "device-hours", "training images per second")


def teacher_weights(plots: Plots, runs: list[RunData]) -> str | None:
    curves = []
    for t in runs:
        if len(t.recipe.distill.teachers) < 2:  # one teacher has all the weight
            continue
        for i, style in zip(range(len(t.recipe.distill.teachers)), ("-", "--", ":", "-.") * 8, strict=False):
            label = f"{t.name}, teacher {i}"
            curves.append((label, t.colour, style, points(t.lines, "epoch", f"teacher_weight_{i}")))
    return plots.curves("teacher_weights", curves, "epochs", "mean confidence weight")


def where_hours_went(plots: Plots, runs: list[RunData]) -> str | None:
    held = [t for t in runs if t.seconds]
    if not held:
        return None

    def fill(axes: Any) -> None:
        axes.grid(visible=False, axis="y")
        starts = [0.0] * len(held)
        rows = range(len(held))
        for part in PARTS:
            widths = [100 * t.seconds.get(part, 0.0) / max(sum(t.seconds.values()), 1e-9) for t in held]
            if max(widths) > 0.05:
                axes.barh(rows, widths, left=starts, height=0.6, color=PART_COLOURS[part], label=part)
                for row, (start, width) in enumerate(zip(starts, widths, strict=True)):
                    if width > 6:
                        ink = "#1d2329" if part in LIGHT else "white"
                        middle = dict(ha="center", va="center", color=ink, fontsize=8)
                        axes.text(start + width / 2, row, f"{width:.0f}", **middle)
            starts = [a + b for a, b in zip(starts, widths, strict=True)]
        axes.set_yticks(rows, [plain(t.name) for t in held])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the time held (%)")
        above = dict(loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1.0)
        axes.legend(frameon=False, fontsize=8, ncols=8, **above)

    return plots.draw("hours", (8.6, 1.5 + 0.45 * len(held)), fill, "where the time went: " + ", ".join(PARTS))


def heads(plots: Plots, runs: list[RunData]) -> str | None:
    distilled = [t for t in runs if t.evals and "top1_class" in t.evals[-1]]
    if not distilled:
        return None

    def fill(axes: Any) -> None:
        axes.grid(visible=False, axis="x")
        for i, (key, label) in enumerate(HEADS.items()):
            values = [t.evals[-1].get(key, math.nan) for t in distilled]
            places = [row + 0.26 * (i - 1) for row in range(len(distilled))]
            bars = axes.bar(places, values, width=0.24, label=label, color=COLOURS[i])
            axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
        axes.set_xticks(range(len(distilled)), [plain(t.name) for t in distilled])
        axes.set_ylabel("validation top-1 (%)")
        axes.margins(y=0.12)
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return plots.draw("heads", (max(4.2, 1.8 + 1.7 * len(distilled)), 3.4), fill, "last top-1 of each head")
