"""What the compiler makes of a training step for a GPU, without one: each kernel, sums per region, the least time.

One step is compiled by inductor and run once: student and objective (plain, and with STD and MINE), optimizer, guard
and moving average, augmentation, teachers. Of each kernel: what is fused in it, bytes read and written, registers,
spills and shared memory of the configurations that were compiled. Where no GPU is, it runs under the fake GPU (see
benchmarks/fake_gpu.py), whose kernels do nothing: nothing here is timed.

The least time of a kernel is the larger of its arithmetic over --tflops and its bytes over --tbps; that of a region is
the sum over its kernels, and assumes that every byte comes from memory, none from the cache, and that launches are
free. Bytes of Triton's kernels are inductor's count (an operand once, however often it is read), those of all others
what their operands hold.

    std-fast bench codegen --out benchmarks/results                 # Mixer-S16 for sm_90
    std-fast bench codegen --model resmlp_s24 --batch 512 --target sm_80
    std-fast bench codegen --set combo_kernels=true triton.persistent_reductions=false     # what a setting would change
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import fake_gpu, harness, workload
from benchmarks.codegen_report import PLAIN, STD, Kernel, report_of, show
from benchmarks.kernels import held, tensors, traffic
from pipelines.augment.device import TrainBatch
from pipelines.errors import UserError
from std_fast.training.build import Parts

CEILINGS = {"sm_80": (312.0, 19.5, 2.0), "sm_90": (790.0, 67.0, 4.3)}
"""TFLOP/s in bfloat16 and in float32 (without TF32) and TB/s: by the data sheets of an A100 80 GB and an H200, but for
the H200's bfloat16 (989 there) and bandwidth (4.8), which are what large products and copies are known to reach"""
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132}
FRESH = "STD_FAST_CODEGEN"  # set in the process that compiles


def add_arguments(parser: argparse.ArgumentParser) -> None:
    workload.add_arguments(parser)
    workload.add_teachers(parser)
    parser.add_argument("--target", choices=sorted(CEILINGS), default="sm_90", help="compile for this [sm_90]")
    parser.add_argument("--tflops", type=float, default=0.0, help="ceiling of bfloat16's products [of the target]")
    parser.add_argument("--tbps", type=float, default=0.0, help="ceiling of memory traffic, TB/s [of the target]")
    parser.add_argument("--no-teachers", action="store_true", help="leave the teachers out, which compile longest")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of inductor or AOTAutograd"
    )


# -- what is recorded -------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Inside, every launch of Triton's kernels and every operator that reaches torch is recorded under `region`."""

    def __init__(self, low: float, single: float, memory: float) -> None:
        """Ceilings: operations per second in bfloat16 and in float32, bytes per second."""
        super().__init__()
        self.low, self.single, self.memory = low, single, memory
        self.region = "outside"
        self.kernels: dict[tuple[str, str], Kernel] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is compiled stays so under this mode."""
        return True

    def add(self, name: str, read: float, written: float, flops: float = 0.0, low: bool = True) -> Kernel:
        kernel = self.kernels.setdefault((self.region, name), Kernel(self.region, name))
        kernel.launches += 1
        kernel.read, kernel.written, kernel.flops = kernel.read + read, kernel.written + written, kernel.flops + flops
        kernel.seconds += max(flops / (self.low if low else self.single), (read + written) / self.memory)
        return kernel

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not any(x.is_cuda for x in tensors((args, kwargs, out))):
            return out
        read, written = traffic(func, args, kwargs, out, on_gpu=True)
        if read or written:
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count is not None else 0.0
            low = any(x.dtype in (torch.bfloat16, torch.float16) for x in tensors((args, kwargs)))
            self.add(str(func).removesuffix(".default"), read, written, flops, low)
        return out

    def __enter__(self) -> Recorder:
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        self._run = run = CachingAutotuner.run

        def recorded(tuner: Any, *args: Any, **kwargs: Any) -> Any:
            result = run(tuner, *args, **kwargs)
            signature = list(tuner.triton_meta.get("signature", {}))
            named = [(name, held(x)) for name, x in zip(signature, args, strict=False) if isinstance(x, Tensor)]
            written = float(sum(size for name, size in named if "out_ptr" in name))
            total = 1e9 * tuner.inductor_meta.get("kernel_num_gb", 0.0)  # combined kernels have no count
            total = total or written + sum(size for name, size in named if name.startswith("in_"))
            written = min(total, written)
            kernel = self.add(tuner.inductor_meta.get("kernel_name", tuner.fn.__name__), total - written, written)
            if not kernel.compiled:
                kernel.compiled = configurations(tuner)
            return result

        CachingAutotuner.run = recorded  # type: ignore[method-assign,assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        super().__exit__(*error)
        CachingAutotuner.run = self._run  # type: ignore[method-assign]


def configurations(tuner: Any) -> list[dict[str, int]]:
    """What ptxas made of each configuration of one of inductor's kernels (its cubin says so)."""
    found = []
    for result in tuner.compile_results:
        binary = result.kernel
        shared = binary.shared if hasattr(binary, "shared") else binary.metadata.shared
        numbers = {"registers": binary.n_regs, "spilled": 4 * binary.n_spills, "shared": shared}
        found.append(numbers | {"warps": result.config.num_warps})
    return found


# -- what is compiled -------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, Any]:
    workload.settle(args)
    if args.smoke:
        args.teachers, args.compile, args.device = [workload.TINY_TEACHER] * 2, "inductor", "cuda"
    if args.device != "cuda":
        raise UserError(fake_gpu.missing())
    here = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if here != args.target and not fake_gpu.active():
        raise UserError(f"--target: this GPU is {here} and runs nothing for {args.target}; hide it, with a fake GPU")
    tflops, single, tbps = CEILINGS[args.target]
    args.tflops, args.tbps = args.tflops or tflops, args.tbps or tbps
    recorder = Recorder(1e12 * args.tflops, 1e12 * single, 1e12 * args.tbps)
    teachers = tuple(args.teachers)
    chosen, place = settings_of(args.set), workload.workplace(args, teachers)
    with counting_bytes(), chosen, targeted(args.target), place as folder:
        with workload.built(workload.recipe_for(args, folder, ())) as plain:
            record_step(recorder, PLAIN, plain, workload.given_batch(plain))
        del plain
        with workload.built(workload.recipe_for(args, folder, teachers)) as std:
            record_step(recorder, STD, std, workload.given_batch(std))
            record_rest(recorder, std, not args.no_teachers)
    return report_of(args, list(recorder.kernels.values()))


def record_step(recorder: Recorder, kind: str, parts: Parts, batch: TrainBatch) -> None:
    """A step of `Trainer`, once to compile and once recorded, in regions `KIND: student, backward` and so on."""
    stepper, trainer = workload.Stepper(parts), parts.trainer
    harness.progress(f"{kind}: compiling")
    stepper(batch)
    student, objective = trainer.forward, trainer.objective

    def enter(region: str) -> None:
        recorder.region = f"{kind}: {region}"

    def rest() -> None:
        enter("optimizer, guard, average")

    def forward(*given: Any) -> Any:
        enter("student, forward")
        out = student(*given)
        for logits in (out.class_logits, out.dist_logits):
            if logits is not None:
                logits.register_hook(lambda _: enter("student, backward"))
        return out

    def losses(*given: Any) -> Any:
        enter("objective")
        found = objective(*given)
        found.total.register_hook(begin_backward)
        enter("optimizer, guard, average")
        return found

    def begin_backward(_: Tensor) -> None:
        enter("objective")
        torch.autograd.Variable._execution_engine.queue_callback(rest)  # at the end of this backward pass

    trainer.forward, trainer.objective = forward, losses
    try:
        with recorder:
            enter("stochastic depth and the like")
            stepper(batch)
    finally:
        trainer.forward, trainer.objective = student, objective
    recorder.region = "outside"


def record_rest(recorder: Recorder, parts: Parts, with_teachers: bool) -> None:
    """Augmentation and teachers."""
    raw = workload.raw_batch(parts)

    def augment() -> TrainBatch:
        with torch.no_grad():
            return parts.augment(raw)

    mixed = augment()

    def ask() -> None:
        assert parts.teachers is not None
        with torch.no_grad(), parts.trainer.autocast():
            parts.teachers(mixed.images)

    calls: dict[str, Callable[[], object]] = {"augmentation": augment} | ({"teachers": ask} if with_teachers else {})
    for region, call in calls.items():
        harness.progress(f"{region}: compiling")
        call()
        recorder.region = region
        with recorder:
            call()
    recorder.region = "outside"


@contextlib.contextmanager
def counting_bytes() -> Iterator[None]:
    """Inside, inductor writes its count of bytes into each kernel, and compiles all configurations that it would choose
    from, whatever an earlier run chose. UserError where it has no such count."""
    from torch._inductor import config

    if not hasattr(config, "benchmark_kernel"):
        raise UserError(f"codegen: torch {torch.__version__} has no count of bytes (config.benchmark_kernel)")
    with config.patch(benchmark_kernel=True, autotune_local_cache=False):
        yield


@contextlib.contextmanager
def settings_of(words: list[str]) -> Iterator[None]:
    """Inside, NAME=VALUE holds in torch._inductor.config, or in torch._functorch.config where that has the name.

    Raises:
        UserError: neither has it, or a word has no value.
    """
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    with contextlib.ExitStack() as stack:
        for word in words:
            name, _, value = word.partition("=")
            home = next((config for config in (inductor, functorch) if name in config.get_config_copy()), None)
            if home is None or not value:
                raise UserError(
                    f"--set: {word!r} is not NAME=VALUE of a setting of torch._inductor or torch._functorch"
                )
            stack.enter_context(home.patch({name: yaml.safe_load(value)}))
        yield


@contextlib.contextmanager
def targeted(target: str) -> Iterator[None]:
    """Inside, inductor compiles for `target`, whatever GPU torch sees (it must see one)."""
    from torch._inductor.runtime.hints import DeviceProperties

    original, capability = DeviceProperties.__dict__["create"], int(target.removeprefix("sm_"))

    def create(cls: Any, device: Any) -> Any:
        found = original.__get__(None, cls)(device)
        more = {"cc": capability, "multi_processor_count": MULTIPROCESSORS[target]}
        return found._replace(**more, **({"major": capability // 10} if hasattr(found, "major") else {}))

    DeviceProperties.create = classmethod(create)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        DeviceProperties.create = original  # type: ignore[method-assign]


def main() -> int:
    """Where torch sees no GPU, the same command under the fake one."""
    if FRESH not in os.environ and not {"-h", "--help"} & set(sys.argv):
        tool = None if torch.cuda.is_available() else fake_gpu.find()
        if not torch.cuda.is_available() and tool is None:
            print(f"std-fast bench codegen: needs a GPU; {fake_gpu.missing()}", file=sys.stderr)
            return 2
        words = ["-m", "benchmarks.codegen", *sys.argv[1:]]
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "std_fast" / "codegen"
        target = next((word for word in CEILINGS if word in sys.argv), "sm_90")
        folders = {"TORCHINDUCTOR_CACHE_DIR": str(home / target), "TRITON_CACHE_DIR": str(home / target / "triton")}
        more = {FRESH: "1", **folders} | ({"FAKE_GPU_MEMORY": "140G"} if tool else {})
        done = fake_gpu.command(words, tool) if tool else [sys.executable, *words]
        os.execvpe(done[0], done, fake_gpu.environment(more))  # in this process's place: it gets the signals
    return harness.main("codegen", run, show, add_arguments, text=__doc__)


if __name__ == "__main__":
    sys.exit(main())
