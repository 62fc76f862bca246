"""`std-fast report`: one self-contained HTML page about runs, and its plots as PNG files.

Reads what runs leave behind (recipe.yaml, metrics.jsonl, summary.json, checkpoints), also runs that are not finished.
The page needs nothing but itself: plots are embedded, no script, no address is asked; every text from a run is escaped.
"""

from __future__ import annotations

import base64
import functools
import html
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from pipelines.augment.device import Augment
from pipelines.errors import UserError
from pipelines.untrusted import read_json
from std_fast.config.recipe import Recipe, read_saved
from std_fast.config.schema import difference, to_dict
from std_fast.method.student import predict
from std_fast.runtime.budget import PARTS
from std_fast.runtime.metrics import read_jsonl
from std_fast.teachers.teacher import autocast, load_weights, read_run
from std_fast.training.build import build_student, open_val_loader, pick_device, precision_of

log = logging.getLogger("std_fast")
Record = dict[str, Any]

# Okabe and Ito's colours, which most colour-blind people can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
PART_COLOURS = dict(
    zip(PARTS, ("#b8b8b8", "#8c6bb1", "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#00614a", "#D55E00"), strict=True)
)
LIGHT = ("start", "teacher", "data")  # parts whose colour asks for dark figures on it
HEADS = {"top1_class": "class head", "top1_distill": "distillation heads", "top1_mean": "mean of both"}


# -- what a run left --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """A run as the report shows it."""

    folder: Path
    name: str
    colour: str
    recipe: Recipe
    lines: list[Record]
    """of the log"""
    evals: list[Record]
    summary: Record
    """empty of a run that is not finished"""

    def last(self, key: str) -> Any:
        """The last known value of a figure, None if there is none."""
        return next((record[key] for record in reversed(self.lines + self.evals) if key in record), None)

    @property
    def seconds(self) -> dict[str, float]:
        """By part of the ledger."""
        found = self.summary.get("seconds") or self.last("seconds")
        return {k: float(v) for k, v in found.items() if number(v)} if isinstance(found, dict) else {}


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_told(folders: Sequence[Path]) -> list[Told]:
    """Raises UserError for a folder that holds no run."""
    told: list[Told] = []
    for i, folder in enumerate(folders):
        try:
            recipe = read_saved(folder)
            found = folder / "summary.json"
            summary = read_json(found) if found.is_file() else {}
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: cannot be read ({error})") from None
        records = [r for r in read_jsonl(folder / "metrics.jsonl") if isinstance(r, dict) and number(r.get("step"))]
        name = folder.resolve().name
        if name in (other.name for other in told):
            name = str(folder)
        kinds = {kind: [r for r in records if r.get("kind") == kind] for kind in ("train", "eval")}
        summary = summary if isinstance(summary, dict) else {}
        told.append(Told(folder, name, COLOURS[i % len(COLOURS)], recipe, kinds["train"], kinds["eval"], summary))
    return told


def points(records: list[Record], x: str, y: str) -> tuple[list[float], list[float]]:
    """Both figures of the records that have both."""
    pairs = [(r[x], r[y]) for r in records if number(r.get(x)) and number(r.get(y))]
    return [a for a, _ in pairs], [b for _, b in pairs]


# -- plots ------------------------------------------------------------------------------------------------------------


class Plots:
    """Draws figures in one style; keeps each as a PNG file and for the page."""

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


def accuracy(plots: Plots, told: list[Told], x: str, label: str) -> str | None:
    curves = [(t.name, t.colour, "-", points(t.evals, x, "top1")) for t in told]
    return plots.curves(f"accuracy_{x}", curves, label, "validation top-1 (%)")


def figure_of(plots: Plots, told: list[Told], key: str, y: str) -> str | None:
    curves = [(t.name, t.colour, "-", points(t.lines, "epoch", key)) for t in told]
    return plots.curves(key, curves, "epochs", y)


def throughput(plots: Plots, told: list[Told]) -> str | None:
    curves = [(t.name, t.colour, "-", points(t.lines, "gpu_hours", "images_per_second")) for t in told]
    return plots.curves("throughput", curves, "GPU-hours", "training images per second")


def teacher_weights(plots: Plots, told: list[Told]) -> str | None:
    curves = []
    for t in told:
        if len(t.recipe.distill.teachers) < 2:  # one teacher has all the weight
            continue
        for i, style in zip(range(len(t.recipe.distill.teachers)), ("-", "--", ":", "-.") * 8, strict=False):
            label = f"{t.name}, teacher {i}"
            curves.append((label, t.colour, style, points(t.lines, "epoch", f"teacher_weight_{i}")))
    return plots.curves("teacher_weights", curves, "epochs", "mean confidence weight")


def where_hours_went(plots: Plots, told: list[Told]) -> str | None:
    held = [t for t in told if t.seconds]
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


def heads(plots: Plots, told: list[Told]) -> str | None:
    distilled = [t for t in told if t.evals and "top1_class" in t.evals[-1]]
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


# -- predictions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A validation image and what a run says about it."""

    png: bytes
    truth: str
    guess: str
    confidence: float


@torch.no_grad()
def predictions(told: Told, count: int) -> list[Sample]:
    """What the run's newest weights say about `count` images, spread evenly over its validation data.

    Raises:
        UserError: the run has no whole checkpoint, or its validation data is not there.
    """
    from PIL import Image

    stored = read_run(told.folder)
    recipe = stored.recipe
    if not recipe.data.val:
        raise UserError("its recipe names no data.val")
    data = replace(recipe.data, threads=1)
    recipe = replace(recipe, data=data, run=replace(recipe.run, eval_batch=max(4, min(64, recipe.run.batch))))
    device = pick_device(recipe.run.device)
    loader = open_val_loader(recipe, device)
    assert loader is not None
    with loader:
        student = build_student(replace(recipe, student=replace(recipe.student, weights="")), stored.num_classes)
        load_weights(student, stored.state, str(told.folder))
        student.to(device).eval()
        normalise = Augment(recipe.augment, recipe.run.seed).to(device).normalise_only
        cast = functools.partial(autocast, device, precision_of(recipe.run.precision, device))
        names = loader.source.class_names or [str(i) for i in range(stored.num_classes)]
        total, batch = loader.source.num_samples, loader.spec.global_batch
        wanted = sorted({i * total // count for i in range(min(count, total))})
        samples = []
        for step in sorted({place // batch for place in wanted}):
            batches = loader.epoch(0, step)
            one = next(batches)
            batches.close()  # type: ignore[attr-defined]
            with cast():
                shares = predict(student.outputs(normalise(one.images)), recipe.distill.predict).float().softmax(-1)
            best, guesses = (values.cpu() for values in shares.max(-1))
            for row in (place - step * batch for place in wanted if place // batch == step):
                if one.labels[row] < 0:  # a corrupt image
                    continue
                buffer = BytesIO()
                Image.fromarray(one.images[row].permute(1, 2, 0).cpu().numpy()).save(buffer, format="png")
                truth, guess = int(one.labels[row]), int(guesses[row])
                samples.append(Sample(buffer.getvalue(), names[truth], names[guess], float(best[row])))
    return samples


def predictions_html(told: list[Told], count: int) -> str:
    """Each run's predictions, or why there are none."""
    parts = []
    for t in told:
        parts.append(f"<h3>{swatch(t)}{html.escape(t.name)}</h3>")
        try:
            samples = predictions(t, count)
        except (UserError, OSError) as error:
            parts.append(f'<p class="none">No predictions: {html.escape(str(error))}</p>')
            continue
        cells = []
        for s in samples:
            kind = "right" if s.truth == s.guess else "wrong"
            data = base64.b64encode(s.png).decode("ascii")
            truth = "" if s.truth == s.guess else f"<br><small>is {html.escape(s.truth)}</small>"
            cells.append(
                f'<div class="sample {kind}"><img alt="{html.escape(s.truth)}" src="data:image/png;base64,{data}">'
                f"<span>{html.escape(s.guess)} <small>{100 * s.confidence:.0f} %</small>{truth}</span></div>"
            )
        parts.append(f'<div class="samples">{"".join(cells)}</div>')
    return "".join(parts)


# -- the page ---------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light; --ink: #1d2329; --soft: #5c6670; --line: #e1e5e9; --paper: #ffffff; --wash: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 0 0 12px; }
h3 { font-size: 15px; margin: 16px 0 8px; }
p.lead, p.note, p.none, figcaption { color: var(--soft); margin: 0 0 12px; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
          padding: 20px 22px; margin-top: 20px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 16px; }
figure { margin: 0; }
figure img { max-width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: 13px; } td.n, th.n { text-align: right; }
th, td:first-child code, .whole { white-space: nowrap; }
td:first-child { min-width: 150px; }
td code { font: 13px/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 8px; }
.samples { display: flex; flex-wrap: wrap; gap: 12px; }
.sample { width: 112px; border: 1px solid var(--line); border-top-width: 4px; border-radius: 6px; padding: 8px;
          background: var(--paper); font-size: 13px; line-height: 1.35; overflow-wrap: anywhere; }
.sample img { width: 94px; height: 94px; object-fit: contain; image-rendering: pixelated; display: block;
              margin-bottom: 6px; }
.sample.right { border-top-color: #009E73; } .sample.wrong { border-top-color: #D55E00; }
small { color: var(--soft); overflow-wrap: anywhere; }
"""


def swatch(told: Told) -> str:
    return f'<span class="swatch" style="background:{told.colour}"></span>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """Cells are HTML; the columns `numeric` are set to the right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if i in numeric else ''}>{cell}</{tag}>" for i, cell in enumerate(row)
        )  # fmt: skip

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


def shown(value: Any, form: str) -> str:
    return format(value, form) if number(value) else "–"


def overview(told: list[Told]) -> str:
    rows, unfinished = [], "<br><small>not finished</small>"
    for t in told:
        s = t.summary
        best = max((r["top1"] for r in t.evals if number(r.get("top1"))), default=None)
        r = t.recipe
        teachers = len(r.distill.teachers)
        how = f"STD, {teachers} teacher{'s' * (teachers > 1)}" if teachers else "plain"
        rows.append([
            f"{swatch(t)}{html.escape(t.name)}<br><small>{html.escape(r.summary)}</small>",
            f"{html.escape(r.student.name)}<br><small>{html.escape(how)}</small>",
            f'<span class="whole">{html.escape(r.run.length)}</span>{"" if s else unfinished}',
            shown(t.last("top1"), ".2f"),
            shown(best, ".2f"),
            shown(s.get("epochs", t.last("epoch")), ".1f"),
            shown(s.get("gpu_hours", t.last("gpu_hours")), ".4g"),
            shown(s.get("images_per_second", t.last("images_per_second")), ",.0f"),
            shown(s.get("parameters", math.nan) / 1e6 if number(s.get("parameters")) else None, ".1f"),
            html.escape(str(s.get("device", "–"))),
        ])  # fmt: skip
    head = ("run", "student", "length", "top-1 %", "best", "epochs", "GPU-hours", "images/s", "M param.", "on")
    return table(head, rows, range(3, 9))


def differences(told: list[Told]) -> str:
    """The fields in which the recipes differ, a column a run."""
    names: list[str] = []
    for other in told[1:]:
        found = difference(told[0].recipe, other.recipe)
        names += [name for name in found if name not in names and name not in ("name", "summary", "run.out")]
    if not names:
        return '<p class="none">None: the recipes are the same.</p>'
    plain_values = [to_dict(t.recipe) for t in told]

    def cell(values: Any, name: str) -> str:
        for key in name.split("."):
            values = values[key]
        return f"<code>{html.escape(json.dumps(values, ensure_ascii=False))}</code>"

    rows = [[f"<code>{html.escape(name)}</code>", *(cell(values, name) for values in plain_values)] for name in names]
    return table(("field", *(f"{swatch(t)}{html.escape(t.name)}" for t in told)), rows)


def hours_table(told: list[Told]) -> str:
    used = [part for part in PARTS if any(t.seconds.get(part, 0.0) >= 0.05 for t in told)]
    rows = []
    for t in told:
        total = sum(t.seconds.values())
        row = [f"{swatch(t)}{html.escape(t.name)}", *(shown(t.seconds.get(part), ",.1f") for part in used)]
        rows.append([*row, shown(total or None, ",.1f")])
    return table(("seconds a GPU was held", *used, "all"), rows, range(1, len(used) + 2))


def section(title: str, *parts: str | None, note: str = "") -> str:
    """Empty when none of the parts is there."""
    found = [part for part in parts if part]
    if not found:
        return ""
    lead = f'<p class="note">{html.escape(note)}</p>' if note else ""
    body = f'<div class="pair">{"".join(found)}</div>' if len(found) > 1 and "<figure" in found[1] else "".join(found)
    return f"<section><h2>{html.escape(title)}</h2>{lead}{body}</section>"


def page(told: list[Told], plots: Plots, images: int) -> str:
    """The HTML document."""
    names = ", ".join(t.name for t in told)
    versions = next((found for t in told if isinstance(found := t.summary.get("versions"), dict)), None)
    made = " · ".join(f"{name} {version}" for name, version in (versions or {}).items())
    sections = [
        f"<section><h2>Runs</h2>{overview(told)}</section>",
        section(
            "Accuracy",
            accuracy(plots, told, "gpu_hours", "GPU-hours"),
            accuracy(plots, told, "epoch", "epochs"),
            note="On the validation data; an hour counts for every GPU that is held, whatever it does.",
        ),
        section("Training loss and speed", figure_of(plots, told, "loss", "training loss"), throughput(plots, told)),
        section("Where the hours went", where_hours_went(plots, told), hours_table(told)),
        section(
            "Teachers and tokens",
            teacher_weights(plots, told),
            figure_of(plots, told, "information", "MINE's estimate (nats)"),
            note="How much each teacher is trusted, averaged over images, where there are several; and the mutual "
            "information between spatial and channel tokens, which the student is trained to lower.",
        ),
        section("Heads", heads(plots, told), note="At the last evaluation. A student is used without its teachers."),
        section("Recipes", differences(told) if len(told) > 1 else None, note="The fields in which they differ."),
    ]
    if images > 0:
        note = "Spread evenly over the validation data; green: right, red: wrong, with what it is."
        sections.append(section("Predictions", predictions_html(told, images), note=note))
    title = html.escape(f"std_fast: {names}")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>Training report</h1><p class="lead">{html.escape(names)}{" — " if made else ""}{html.escape(made)}</p>'
        f"{''.join(sections)}</main></body></html>\n"
    )


def write_report(runs: Sequence[Path], out: Path, images: int = 12) -> dict[str, Any]:
    """Writes `report.html` and the plots into the folder `out`; returns the files and the runs' main figures.

    Args:
        images: validation images whose predictions are shown of each run; 0: none.

    Raises:
        UserError: a folder holds no run, or `out` cannot be written.
    """
    told = read_told(runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        plots = Plots(out)
        path = out / "report.html"
        path.write_text(page(told, plots, images), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error}); give another folder") from None
    return {
        "html": str(path),
        "png": [str(out / f"{name}.png") for name in plots.pngs],
        "runs": {
            t.name: {"finished": bool(t.summary), **{key: t.last(key) for key in ("top1", "gpu_hours")}} for t in told
        },
    }
