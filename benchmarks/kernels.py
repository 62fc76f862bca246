"""The STD module and MINE on their own, forward and backward: naive, by better algebra, compiled.

Beside the times, the bytes that each form moves through memory: of an eager form what its operators read and write, of
a compiled one what inductor counts of its kernels. The floor is what no form can avoid: the features read once forward
and once backward and their gradient written, each parameter read twice and its gradient written, the outputs written
and their gradients read. A form near its floor in bytes is limited by memory only if it is also near the copy ceiling.
The share of the arithmetic is the time that the matrix products of the naive form take at this machine's measured
ceiling, by the time taken.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import harness, naive, workload
from pipelines.errors import UserError
from std_fast.config.recipe import MineSpec
from std_fast.method.mine import MutualInformation
from std_fast.method.tokens import STDModule
from std_fast.models import build_backbone

Form = Callable[..., tuple[Tensor, ...]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="mixer_s16", help="whose features are read [mixer_s16]")
    parser.add_argument("--batch", type=int, default=0, help="images [1024 on a GPU, 8 on a CPU]")
    parser.add_argument("--dim", type=int, default=0, help=workload.DIM_HELP)
    parser.add_argument("--image-size", type=int, default=224, help="[224]")
    parser.add_argument("--classes", type=int, default=1000, help="[1000]")
    parser.add_argument("--teachers", type=int, default=1, help="M of the module [1]")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--backend", default="inductor", help="of the compiled forms; off leaves them out [inductor]")


def run(args: argparse.Namespace) -> dict[str, Any]:
    workload.settle(args)
    if args.smoke:
        args.backend = "eager"  # traced, not compiled
    if args.batch % 4:
        raise UserError(f"--batch: {args.batch} must be a multiple of 4")
    low = args.precision == "bfloat16" or (args.precision == "auto" and args.device == "cuda")
    args.precision = "bfloat16" if low else "float32"
    shape = build_backbone(args.model, 1, args.image_size, **workload.options_of_mixer(args))
    kinds = kinds_of(args, low, shape.dim, shape.patches)
    passes: dict[str, Pass] = {}
    floors = {}
    for kind, (inputs, forms) in kinds.items():
        for name, (owner, form) in forms.items():
            passes[f"{kind}, {name}"] = one = Pass(owner, inputs, form, low)
            floors[kind] = floor_bytes(owner, inputs, one.outputs())
        for name, (owner, form) in forms.items() if args.backend != "off" else ():
            fast = torch.compile(form, backend=args.backend, fullgraph=True)
            passes[f"{kind}, {name}, compiled"] = Pass(owner, inputs, fast, low)
    moved, flops = {}, {}
    for name, one in passes.items():
        harness.progress(f"{name}: counting bytes")
        moved[name] = bytes_moved(one, args.backend if "compiled" in name else "")
        if name.endswith("naive"):
            with CountBytes() as counter:
                one()
            flops[name.split(",")[0]] = counter.flops
    times = harness.measure(passes, args)
    copying = workload.copy_ceiling(args.device, 1 << 24 if args.smoke else 0)
    products = workload.matmul_ceiling(args.device, torch.bfloat16 if low else torch.float32, 128 if args.smoke else 0)
    ratios = [
        harness.ratio(f"{kind}, {name} over naive", times[f"{kind}, {name}"], times[f"{kind}, naive"])
        for kind in kinds
        for name in ("algebra", "naive, compiled", "algebra, compiled")
        if f"{kind}, {name}" in times
    ]
    return {
        "variant": workload.variant(args),
        "shape": {"batch": args.batch, "patches": shape.patches, "dim": shape.dim, "teachers": args.teachers},
        "rows": rows_of(times, moved, floors, flops, products),
        "ratios": ratios,
        "copy_ceiling_gb_per_s": harness.significant(copying / 1e9),
        "matmul_ceiling_tflops": harness.significant(products / 1e12),
    }


Kinds = dict[str, tuple[list[Tensor], dict[str, tuple[nn.Module, Form]]]]
"""STD and MINE -> inputs, and the module and the function of each form"""


def kinds_of(args: argparse.Namespace, low: bool, dim: int, patches: int) -> Kinds:
    """Features `[B, P, C]` for the STD module, tokens `[B, M, C]` and `[B, M, P]` for MINE; in bfloat16 where `low`."""
    torch.manual_seed(0)
    module = STDModule(dim, patches, args.classes, args.teachers).to(args.device)
    mine = MutualInformation(dim, patches, MineSpec().width, MineSpec().weight).to(args.device)
    features = torch.randn(args.batch, patches, dim, device=args.device)
    tokens = [torch.randn(args.batch, args.teachers, n, device=args.device) for n in (dim, patches)]
    if low:
        features, tokens = features.bfloat16(), [t.bfloat16() for t in tokens]

    slow_mine = naive.NaiveMine(mine).to(args.device)

    def std_naive(z: Tensor) -> tuple[Tensor, ...]:
        return tuple(naive.std_by_concatenation(module, z))  # type: ignore[arg-type]

    return {
        "STD": ([features], {"naive": (module, std_naive), "algebra": (module, lambda z: tuple(module(z)))}),
        "MINE": (
            tokens,
            {"naive": (slow_mine, lambda *x: (slow_mine(*x),)), "algebra": (mine, lambda *x: (mine(*x),))},
        ),
    }


def rows_of(
    times: dict[str, harness.Times],
    moved: dict[str, int | None],
    floors: dict[str, int],
    flops: dict[str, int],
    products: float,
) -> list[dict[str, Any]]:
    """A row for each pass: its times; bytes moved, against the floor of its kind; arithmetic, against `products`.

    Args:
        moved: bytes, by pass; None where they could not be counted.
        floors, flops: by kind.
        products: the ceiling of matrix products, operations per second.
    """
    rows = []
    for name, measured in times.items():
        kind, total = name.split(",")[0], moved[name]
        floor = floors[kind]
        more: dict[str, Any] = {
            "floor_mb": harness.significant(floor / 1e6),
            "gflop": harness.significant(flops[kind] / 1e9),
            "arithmetic_percent": harness.significant(100 * flops[kind] / products / measured.seconds, 3),
        }
        if total is not None:
            more |= {
                "moved_mb": harness.significant(total / 1e6),
                "times_floor": harness.significant(total / floor, 3),
                "gb_per_s": harness.significant(total / measured.seconds / 1e9, 3),
            }
        rows.append(harness.row(name, measured, **more))
    return rows


class Pass:
    """Forward and backward of one form; gradients reach the inputs and every parameter."""

    def __init__(self, owner: nn.Module, inputs: list[Tensor], form: Form, low: bool) -> None:
        self.parameters = list(owner.parameters())
        self.inputs = [x.clone().requires_grad_() for x in inputs]
        self.form, self.low = form, low
        self.gradients: list[Tensor] = []

    def outputs(self) -> tuple[Tensor, ...]:
        device = self.inputs[0].device.type
        with torch.autocast(device, torch.bfloat16) if self.low else contextlib.nullcontext():
            return self.form(*self.inputs)

    def __call__(self) -> tuple[Tensor, ...]:
        outputs = self.outputs()
        if not self.gradients:
            self.gradients = [torch.randn_like(output) for output in outputs]
        return torch.autograd.grad(outputs, [*self.inputs, *self.parameters], self.gradients, allow_unused=True)


def floor_bytes(owner: nn.Module, inputs: list[Tensor], outputs: tuple[Tensor, ...]) -> int:
    """See the top of the file."""
    return (
        3 * sum(p.nbytes for p in owner.parameters())
        + 3 * sum(x.nbytes for x in inputs)
        + 2 * sum(x.nbytes for x in outputs)
    )


class CountBytes(TorchDispatchMode):
    """Adds what the operators under it read and write, and the operations of their products."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.flops = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        self.total += sum(traffic(func, args, kwargs, out))
        return out


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def held(x: Tensor) -> int:
    """Bytes that all of a tensor occupies; what is broadcast counts once."""
    return min(x.nbytes, x.untyped_storage().nbytes())


OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_")


def traffic(func: Any, args: tuple, kwargs: dict, out: Any, on_gpu: bool = False) -> tuple[int, int]:
    """Bytes that an operator reads and writes, with `on_gpu` those of a GPU's memory alone; views and empty tensors
    move none."""
    name = func._schema.name.partition("::")[2].removeprefix("_foreach_")
    given = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
    new = [x for x in tensors(out) if x.untyped_storage()._cdata not in given]
    if name.startswith(("empty", "new_empty", "record")) or not (new or func._schema.is_mutable):
        return 0, 0

    def size(tree: Any) -> int:
        return sum(held(x) for x in tensors(tree) if x.is_cuda or not on_gpu)

    read, written = 0, size(new)
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        written += size(value) if argument.is_write else 0
        overwritten = argument.is_out or (argument.is_write and name in OVERWRITES)
        read += 0 if overwritten else size(value)
    return read, written


def bytes_moved(one: Pass, backend: str) -> int | None:
    """Bytes of one forward and backward; None for a compiled form where inductor's count cannot be had."""
    if not backend:
        with CountBytes() as counter:
            one()
        return counter.total
    with inductor_count() if backend == "inductor" else contextlib.nullcontext([0]) as total:
        one()
    return total[0] or None


@contextlib.contextmanager
def inductor_count() -> Iterator[list[int]]:
    """Inside, what inductor compiles anew is counted into the one number of the list (private to torch, so: or not)."""
    total = [0]
    try:
        import torch._functorch.config
        from torch._inductor import compile_fx, config, metrics

        log = compile_fx.inductor_metrics_log
    except (ImportError, AttributeError):
        yield total
        return
    level, before = log.level, metrics.num_bytes_accessed
    propagate = log.propagate
    log.setLevel(logging.INFO)  # it counts only where it would log the count
    log.propagate = False
    try:
        with config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
            yield total
        total[0] = metrics.num_bytes_accessed - before
    finally:
        log.setLevel(level)
        log.propagate = propagate


COLUMNS = {
    "what": "name",
    "ms (quartiles)": "milliseconds",
    "CPU ms (quartiles)": "cpu_milliseconds",
    "moved, MB": "moved_mb",
    "floor, MB": "floor_mb",
    "times the floor": "times_floor",
    "GB/s": "gb_per_s",
    "GFLOP": "gflop",
    "arithmetic's share, %": "arithmetic_percent",
}


def show(report: dict[str, Any]) -> str:
    s = report["shape"]
    shape = f"B {s['batch']}, P {s['patches']}, C {s['dim']}, M {s['teachers']}, {report['settings']['precision']}"
    return harness.show(report, COLUMNS) + (
        f"\n\n{shape}. Ceilings: {report['copy_ceiling_gb_per_s']} GB/s copied, "
        f"{report['matmul_ceiling_tflops']} TFLOP/s in matrix products."
    )


if __name__ == "__main__":
    sys.exit(harness.main("kernels", run, show, add_arguments, text=__doc__))
