"""Where each part of a step stands under this machine's roof: measured matrix-product and copy ceilings.

A part's arithmetic is that of its matrix products and convolutions; its bytes are what its operators read and write, or
where it is compiled, what inductor counts of its kernels. Neither is what the part needs, but what it does: a part near
the roof can still be made faster by moving less. The share of the roof is the least time that the ceilings allow for
this arithmetic and these bytes, by the time taken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness, workload
from benchmarks.kernels import CountBytes, inductor_count
from pipelines.augment.device import TrainBatch
from std_fast.runtime.compiling import compiled as compiled_by
from std_fast.training.build import Parts
from std_fast.training.step import Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    workload.add_arguments(parser)
    workload.add_teachers(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    workload.settle(args)
    if args.smoke:
        args.teachers = [workload.TINY_TEACHER] * 2
    teachers = tuple(args.teachers)
    with workload.workplace(args, teachers) as folder:
        recipe = workload.recipe_for(args, folder, teachers)
        with workload.built(recipe) as parts:
            report = place(args, parts)
    return report


def place(args: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    dtype = workload.compute_dtype(parts)
    small = args.smoke
    matmul = workload.matmul_ceiling(args.device, dtype, 128 if small else 0)
    copying = workload.copy_ceiling(args.device, 1 << 22 if small else 0)
    plain, fast = pieces(parts)
    flops, moved = {}, {}
    for name, call in plain.items():
        harness.progress(f"{name}: counting")
        with FlopCounterMode(display=False) as counter:
            call()
        flops[name] = counter.get_total_flops()
        moved[name] = 0
        if parts.backend in ("inductor", "max-autotune"):
            with inductor_count() as total:
                fast[name]()
            moved[name] = total[0]
        if not moved[name]:  # uncompiled, like the optimizer
            with CountBytes() as counting:
                call()
            moved[name] = counting.total
    times = harness.measure(fast, args)
    rows = []
    for name, one in times.items():
        least = max(flops[name] / matmul, moved[name] / copying)
        rows.append(
            harness.row(
                name,
                one,
                args.batch,
                gflop=harness.significant(flops[name] / 1e9),
                moved_mb=harness.significant(moved[name] / 1e6),
                flop_per_byte=harness.significant(flops[name] / moved[name], 3),
                tflops=harness.significant(flops[name] / one.seconds / 1e12, 3),
                gb_per_s=harness.significant(moved[name] / one.seconds / 1e9, 3),
                limit="arithmetic" if flops[name] / matmul > moved[name] / copying else "memory",
                roof_percent=harness.significant(100 * least / one.seconds, 3),
            )
        )
    return {
        "variant": workload.variant(args),
        "rows": rows,
        "matmul_ceiling_tflops": harness.significant(matmul / 1e12),
        "copy_ceiling_gb_per_s": harness.significant(copying / 1e9),
        "precision": str(dtype).removeprefix("torch."),
    }


Calls = dict[str, Callable[[], object]]
Form = tuple[Callable[..., list[Tensor]], list[Tensor], list[Tensor]]


def pieces(parts: Parts) -> tuple[Calls, Calls]:
    """The parts of a step, uncompiled, and as they run in training."""
    trainer, student = parts.trainer, parts.trainer.student
    raw = workload.raw_batch(parts)
    with torch.no_grad(), trainer.autocast():
        mixed = parts.augment(raw)
    forms = forms_of(trainer, mixed)

    def learn(form: Callable[..., list[Tensor]], given: list[Tensor], wanted: list[Tensor]) -> Callable[[], object]:
        def call() -> None:
            with trainer.autocast():
                out = form(*given)
            torch.autograd.backward(out, [torch.ones_like(o) for o in out])
            for tensor in wanted:
                tensor.grad = None

        return call

    plain: Calls = {name: learn(*form) for name, form in forms.items()}
    fast: Calls = {name: learn(compiled_by(form, parts.backend), *rest) for name, (form, *rest) in forms.items()}

    def optimize() -> None:
        for parameter, grad in gradients:
            parameter.grad = grad
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        if trainer.ema is not None:
            trainer.ema.update(1, trainer.guard.found_inf)

    gradients = [(p, torch.randn_like(p)) for p in student.parameters() if p.requires_grad]
    teachers = parts.teachers
    assert teachers is not None

    @torch.no_grad()
    def ask(call: Callable[[Tensor], object]) -> object:
        with trainer.autocast():
            return call(mixed.images)

    no_grad = torch.no_grad()
    plain |= {
        "optimizer and average": optimize,
        "augmentation": no_grad(lambda: parts.augment.forward(raw)),
        "teachers": lambda: ask(teachers.forward),
    }
    fast |= {
        "optimizer and average": optimize,
        "augmentation": no_grad(lambda: parts.augment(raw)),
        "teachers": lambda: ask(teachers),
    }
    return plain, fast


def forms_of(trainer: Trainer, mixed: TrainBatch) -> dict[str, Form]:
    """The parts of the student: function, inputs, and the tensors that get a gradient. Images `[B, 3, H, W]`."""
    student = trainer.student
    with torch.no_grad(), trainer.autocast():
        features = [z.detach() for z in student.backbone.forward_taps(mixed.images, student.taps, None).features]
        tokens = [module(z) for module, z in zip(student.std, features, strict=True)]
    keep = trainer.stochastic_depth(mixed)
    inputs = [z.requires_grad_() for z in features]
    pairs = [(a.spatial.detach().requires_grad_(), a.channel.detach().requires_grad_()) for a in tokens]

    def backbone(images: Tensor) -> list[Tensor]:
        taps = student.backbone.forward_taps(images, student.taps, keep)
        return [*taps.features, taps.logits]

    def modules(*features: Tensor) -> list[Tensor]:
        return [module(z).logits for module, z in zip(student.std, features, strict=True)]

    def information(*flat: Tensor) -> list[Tensor]:
        both = zip(flat[::2], flat[1::2], strict=True)
        return [mine(s, c) for mine, (s, c) in zip(student.mine, both, strict=True)]

    forms: dict[str, Form] = {
        "backbone": (backbone, [mixed.images], list(student.backbone.parameters())),
        "STD modules": (modules, inputs, [*inputs, *student.std.parameters()]),
    }
    if student.mine:
        flat = [t for pair in pairs for t in pair]
        forms["MINE"] = (information, flat, [*flat, *student.mine.parameters()])
    return forms


def draw(report: dict[str, Any], path: Path) -> None:
    """The roof, and each part that has arithmetic under it."""
    from matplotlib.figure import Figure

    peak, bandwidth = report["matmul_ceiling_tflops"], report["copy_ceiling_gb_per_s"] / 1e3
    rows = [row for row in report["rows"] if row["tflops"] > 0]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    ridge = peak / bandwidth
    left = min([row["flop_per_byte"] for row in rows] + [ridge]) / 4
    right = max([row["flop_per_byte"] for row in rows] + [ridge]) * 4
    axes.plot([left, ridge, right], [left * bandwidth, peak, peak], color="black")
    for number, row in enumerate(rows):
        axes.plot(
            row["flop_per_byte"],
            row["tflops"],
            "o",
            color=f"C{number}",
            label=f"{row['name']} ({row['roof_percent']} %)",
        )
    axes.set(
        xscale="log", yscale="log", xlabel="operations per byte moved", ylabel="TFLOP/s",
        title=f"{peak} TFLOP/s in {report['precision']}, {report['copy_ceiling_gb_per_s']} GB/s",
    )  # fmt: skip
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


COLUMNS = {
    "part": "name",
    "ms (quartiles)": "milliseconds",
    "CPU ms (quartiles)": "cpu_milliseconds",
    "GFLOP": "gflop",
    "moved, MB": "moved_mb",
    "FLOP/byte": "flop_per_byte",
    "TFLOP/s": "tflops",
    "GB/s": "gb_per_s",
    "limit": "limit",
    "of the roof, %": "roof_percent",
}


def show(report: dict[str, Any]) -> str:
    return harness.show(report, COLUMNS) + (
        f"\n\nCeilings measured here: {report['matmul_ceiling_tflops']} TFLOP/s in {report['precision']}, "
        f"{report['copy_ceiling_gb_per_s']} GB/s read and written."
    )


if __name__ == "__main__":
    sys.exit(harness.main("roofline", run, show, add_arguments, draw, text=__doc__))
