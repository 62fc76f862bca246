"""How long processes of this machine take to average their gradients."""

from __future__ import annotations

import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROUNDS = 10
LIMIT = timedelta(minutes=2)


def all_reduce_seconds(numbers: int, processes: int, on_gpu: bool) -> float:
    """Median seconds of one all-reduce of `[numbers]` float32, by NCCL on the first GPUs or by gloo on the CPU.

    DistributedDataParallel sends the same bytes in buckets during the backward pass, so a step waits for less.

    Raises:
        RuntimeError: a process has failed, or there are fewer GPUs than processes.
    """
    if on_gpu and torch.cuda.device_count() < processes:
        raise RuntimeError(f"{torch.cuda.device_count()} GPU(s) here")
    with tempfile.TemporaryDirectory(prefix="std_fast-") as folder:
        try:
            mp.spawn(_time, (numbers, processes, on_gpu, folder), nprocs=processes)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise RuntimeError(str(error).strip().splitlines()[-1]) from error
        return float(Path(folder, "seconds").read_text(encoding="ascii"))


def _time(rank: int, numbers: int, processes: int, on_gpu: bool, folder: str) -> None:
    """One process; rank 0 writes the median to `folder`/seconds."""
    if on_gpu:
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=meeting, rank=rank, world_size=processes, timeout=LIMIT
    )
    gradient = torch.zeros(numbers, device="cuda" if on_gpu else "cpu")
    seconds = []
    for _ in range(ROUNDS + 2):  # the first two connect the processes
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(gradient)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if rank == 0:
        Path(folder, "seconds").write_text(str(statistics.median(seconds[2:])), encoding="ascii")
    dist.destroy_process_group()
