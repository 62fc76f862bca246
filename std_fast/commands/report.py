"""`std-fast report`: one self-contained HTML page about runs, and its plots as PNG files.

Reads the files of runs (recipe.yaml, metrics.jsonl, summary.json, checkpoints), finished or not. The page is
self-contained: plots are embedded, there is no script and no address is loaded; every text from a run is escaped.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from std_fast.commands.report_data import RunData, number, predictions, read_runs
from std_fast.commands.report_plots import (
    Plots,
    accuracy,
    figure_of,
    heads,
    teacher_weights,
    throughput,
    where_hours_went,
)
from std_fast.config.schema import difference, to_dict
from std_fast.runtime.budget import PARTS

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
th, td:first-child code, .nowrap { white-space: nowrap; }
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


def swatch(run: RunData) -> str:
    return f'<span class="swatch" style="background:{run.colour}"></span>'


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


def overview(runs: list[RunData]) -> str:
    rows, unfinished = [], "<br><small>not finished</small>"
    for t in runs:
        s = t.summary
        best = max((r["top1"] for r in t.evals if number(r.get("top1"))), default=None)
        r = t.recipe
        teachers = len(r.distill.teachers)
        how = f"STD, {teachers or 'no'} teacher{'s' * (teachers > 1)}" if r.distill.mode == "std" else "plain"
        rows.append([
            f"{swatch(t)}{html.escape(t.name)}<br><small>{html.escape(r.summary)}</small>",
            f"{html.escape(r.student.name)}<br><small>{html.escape(how)}</small>",
            f'<span class="nowrap">{html.escape(r.run.length)}</span>{"" if s else unfinished}',
            shown(t.last("top1"), ".2f"),
            shown(best, ".2f"),
            shown(s.get("epochs", t.last("epoch")), ".1f"),
            shown(s.get("gpu_hours", t.last("gpu_hours")), ".4g"),
            shown(s.get("images_per_second", t.last("images_per_second")), ",.0f"),
            shown(s.get("parameters", math.nan) / 1e6 if number(s.get("parameters")) else None, ".1f"),
            html.escape(str(s.get("device", "–"))),
        ])  # fmt: skip
    head = ("run", "student", "length", "top-1 %", "best", "epochs", "device-hours", "images/s", "M param.", "on")
    return table(head, rows, range(3, 9))


def lost_writes(runs: list[RunData]) -> str | None:
    """What of a run's log could not be written, by destination; None where nothing was lost."""
    lost = [(t, t.summary["lost_writes"]) for t in runs if isinstance(t.summary.get("lost_writes"), dict)]
    rows = [
        (f"{swatch(t)}{html.escape(t.name)}", html.escape(name), shown(count, ",d"))
        for t, counts in lost
        for name, count in counts.items()
    ]
    return table(("run", "written to", "writes lost"), rows, [2]) if rows else None


def differences(runs: list[RunData]) -> str:
    """The fields in which the recipes differ, a column a run."""
    names: list[str] = []
    for other in runs[1:]:
        found = difference(runs[0].recipe, other.recipe)
        names += [name for name in found if name not in names and name not in ("name", "summary", "run.out")]
    if not names:
        return '<p class="none">None: the recipes are the same.</p>'
    plain_values = [to_dict(t.recipe) for t in runs]

    def cell(values: Any, name: str) -> str:
        for key in name.split("."):
            values = values[key]
        return f"<code>{html.escape(json.dumps(values, ensure_ascii=False))}</code>"

    rows = [[f"<code>{html.escape(name)}</code>", *(cell(values, name) for values in plain_values)] for name in names]
    return table(("field", *(f"{swatch(t)}{html.escape(t.name)}" for t in runs)), rows)


def hours_table(runs: list[RunData]) -> str:
    used = [part for part in PARTS if any(t.seconds.get(part, 0.0) >= 0.05 for t in runs)]
    rows = []
    for t in runs:
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


def predictions_html(runs: list[RunData], count: int) -> str:
    """Each run's predictions, or why there are none."""
    parts = []
    for t in runs:
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


def page(runs: list[RunData], plots: Plots, images: int) -> str:
    names = ", ".join(t.name for t in runs)
    versions = next((found for t in runs if isinstance(found := t.summary.get("versions"), dict)), None)
    made = " · ".join(f"{name} {version}" for name, version in (versions or {}).items())
    sections = [
        f"<section><h2>Runs</h2>{overview(runs)}</section>",
        section("Lost", lost_writes(runs), note="A disk or a network failed; the training itself was not affected."),
        section(
            "Accuracy",
            accuracy(plots, runs, "gpu_hours", "device-hours"),
            accuracy(plots, runs, "epoch", "epochs"),
            note="On the validation data; an hour counts for every GPU that is held, whatever it does.",
        ),
        section("Training loss and speed", figure_of(plots, runs, "loss", "training loss"), throughput(plots, runs)),
        section("Where the hours went", where_hours_went(plots, runs), hours_table(runs)),
        section(
            "Teachers and tokens",
            teacher_weights(plots, runs),
            figure_of(plots, runs, "information", "MINE's estimate (nats)"),
            note="The weight of each teacher, averaged over images, where there are several; and the mutual "
            "information between spatial and channel tokens, which the student is trained to lower.",
        ),
        section("Heads", heads(plots, runs), note="At the last evaluation. A student is used without its teachers."),
        section("Recipes", differences(runs) if len(runs) > 1 else None, note="The fields in which they differ."),
    ]
    if images > 0:
        note = "Spread evenly over the validation data; green: right, red: wrong, with what it is."
        sections.append(section("Predictions", predictions_html(runs, images), note=note))
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


def write_report(folders: Sequence[Path], out: Path, images: int = 12) -> dict[str, Any]:
    """Writes `report.html` and the plots into the folder `out`; returns the files and the runs' main metrics.

    Args:
        images: validation images whose predictions are shown of each run; 0: none.

    Raises:
        UserError: a folder holds no run, or `out` cannot be written.
    """
    runs = read_runs(folders)
    try:
        out.mkdir(parents=True, exist_ok=True)
        plots = Plots(out)
        path = out / "report.html"
        path.write_text(page(runs, plots, images), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error}); give another folder") from None
    return {
        "html": str(path),
        "png": [str(out / f"{name}.png") for name in plots.pngs],
        "runs": {
            t.name: {"finished": bool(t.summary), **{key: t.last(key) for key in ("top1", "gpu_hours")}} for t in runs
        },
    }
